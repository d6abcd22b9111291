"""Folders for transformers, by the numbers of transformers' own classes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from paths import GOLDEN
from sounds import RATE_HZ, tone

from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.huggingface import export_huggingface, import_huggingface
from ssast.engine.model.classifier import Classifier, pool
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio, Model
from ssast.kernels.fbank import FbankSpec, fbank

FBANK = GOLDEN / "fbank.pt"
AUDIO = Audio(num_frames=96)
SHAPES = {
    "patch": ((16, 16), (16, 16)),
    "overlapping": ((16, 16), (10, 10)),
    "frame": ((128, 2), (128, 1)),
}
LABELS = ["dog", "cat", "rain", "sea", "crow"]


def make_encoder(shape: str) -> SpectrogramTransformer:
    torch.manual_seed(0)
    patch, stride = SHAPES[shape]
    return SpectrogramTransformer(Model(size="tiny", depth=2, patch=patch), AUDIO, stride).eval()


def make_classifier(shape: str, pooling: str) -> Classifier:
    classifier = Classifier(make_encoder(shape), len(LABELS), pooling).eval()
    with torch.no_grad():  # as after training: nothing is 0 or 1 by its initialisation
        for parameter in classifier.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return classifier


def clip() -> torch.Tensor:
    return torch.from_numpy(tone(13_000))


def filterbanks() -> torch.Tensor:
    """Of speech, two clips, one of them padded: [2, 96, 128]."""
    waves = torch.load(FBANK, weights_only=True)["waves"]
    (speech,) = (wave["fbank"] for wave in waves if wave["name"] == "speech_espeak_16k")
    padded = torch.cat((speech[100:180], torch.zeros(16, 128)))
    return torch.stack((speech[:96], padded)).float()


@torch.no_grad()
def our_states(encoder: SpectrogramTransformer, x: torch.Tensor) -> list[torch.Tensor]:
    masks = encoder.no_masks(len(x))
    states = [encoder.embed(x, masks)[0]]
    for block in encoder.blocks:
        states.append(block(states[-1]))
    return [*states, encoder(x, masks)[0]]


def load(auto: type, folder: Path) -> transformers.PreTrainedModel:
    """What transformers makes of a folder; nothing may be missing or left over."""
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    left = {name for name in info["unexpected_keys"] if not name.startswith(("classifier", "head"))}
    assert not left
    return model.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < tolerance * max(1.0, ours.abs().max().item())


@pytest.mark.parametrize(
    ("shape", "pooling", "kind"),
    [
        ("patch", "cls", "ASTForAudioClassification"),
        ("overlapping", "cls", "ASTForAudioClassification"),
        ("overlapping", "avgtok", "SsastForAudioClassification"),
        ("frame", "avgtok", "SsastForAudioClassification"),
        ("frame", "cls", "SsastForAudioClassification"),
    ],
)
def test_classifiers_have_our_logits_and_hidden_states(shape, pooling, kind, tmp_path, modules):
    ours = make_classifier(shape, pooling)
    folder = export_huggingface(ours, tmp_path / "model", AUDIO, LABELS)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    theirs, x = load(transformers.AutoModelForAudioClassification, folder), filterbanks()
    assert type(theirs).__name__ == kind
    assert [theirs.config.id2label[i] for i in range(5)] == LABELS
    with torch.no_grad():
        normalised = ours.encoder.embed.normalise(x)
        out = theirs(normalised, output_hidden_states=True)
        assert_close(ours(x), out.logits)
        encoder = load(transformers.AutoModel, folder)
        hidden = encoder(normalised)
        loss = theirs(normalised, labels=torch.tensor([1, 3])).loss
    *states, last = our_states(ours.encoder, x)
    assert len(out.hidden_states) == len(states) == 3
    for state, want in zip(out.hidden_states, states, strict=True):
        assert_close(want, state)
    assert_close(last, hidden.last_hidden_state)
    tokens = slice(2) if pooling == "cls" else slice(2, None)
    assert_close(last[:, tokens].mean(1), hidden.pooler_output)
    want = torch.nn.functional.cross_entropy(out.logits, torch.tensor([1, 3]))
    torch.testing.assert_close(loss, want)

    again, audio, labels, names, found = import_huggingface(folder)
    assert found is None and names == labels
    assert audio == AUDIO and list(labels) == LABELS and again.pooling == pooling
    for name, value in ours.state_dict().items():
        if not name.endswith("mask_embed"):
            assert again.state_dict()[name].equal(value), name
    with torch.no_grad():
        assert_close(again(x), out.logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_encoders_alone(shape, tmp_path, modules):
    ours, x = make_encoder(shape), filterbanks()
    folder = export_huggingface(ours, tmp_path / "model", AUDIO)
    theirs = load(transformers.AutoModel, folder)
    assert type(theirs).__name__ == ("SsastModel" if shape == "frame" else "ASTModel")
    with torch.no_grad():
        found = theirs(ours.embed.normalise(x))
    hidden = found.last_hidden_state
    assert_close(our_states(ours, x)[-1], hidden)
    if shape == "frame":  # a stock AST pools cls and dist, always
        assert_close(pool(hidden, "avgtok", ours.num_extra_tokens), found.pooler_output)
    again, audio, labels, *_ = import_huggingface(folder)
    assert isinstance(again, SpectrogramTransformer) and audio == AUDIO and labels == ()
    assert our_states(again, x)[-1].equal(our_states(ours, x)[-1])


@pytest.mark.parametrize(
    ("shape", "pooling", "loss"),
    [("overlapping", "cls", "ce"), ("overlapping", "cls", "bce"), ("frame", "avgtok", "bce")],
)
def test_from_a_waveform_to_labels_by_transformers_alone(shape, pooling, loss, tmp_path, modules):
    ours = make_classifier(shape, pooling)
    folder = export_huggingface(ours, tmp_path / "model", AUDIO, LABELS, loss)
    extract = transformers.AutoFeatureExtractor.from_pretrained(folder)
    wave = clip().numpy()
    theirs = extract(wave, sampling_rate=RATE_HZ, return_tensors="pt")["input_values"]
    spec = FbankSpec(num_frames=AUDIO.num_frames)
    x = fbank((clip() - clip().mean())[None], torch.tensor([13_000]), spec)
    assert_close(ours.encoder.embed.normalise(x), theirs, 1e-4)
    classify = transformers.pipeline(
        "audio-classification", model=str(folder), trust_remote_code=True, device="cpu"
    )
    found = {line["label"]: line["score"] for line in classify(wave, top_k=5)}
    with torch.no_grad():
        want = ours(x)[0].sigmoid() if loss == "bce" else ours(x)[0].softmax(0)
    assert [found[label] for label in LABELS] == pytest.approx(want.tolist(), abs=1e-4)


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_a_model_that_transformers_saved(eps, tmp_path):
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768,
        max_length=96, layer_norm_eps=eps, num_labels=5,
        id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)},
    )  # fmt: skip
    theirs = transformers.ASTForAudioClassification(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(max_length=96, mean=-5.0, std=4.0).save_pretrained(tmp_path)
    ours, audio, labels, *_ = import_huggingface(tmp_path)
    assert list(labels) == LABELS and (audio.mean, audio.std) == (-5.0, 4.0)
    x = filterbanks()
    with torch.no_grad():
        out = theirs(ours.encoder.embed.normalise(x), output_hidden_states=True)
        assert_close(ours(x), out.logits)
    *states, _ = our_states(ours.encoder, x)
    for state, want in zip(out.hidden_states, states, strict=True):
        assert_close(want, state)


def test_wrong_exports(tmp_path):
    classifier = make_classifier("patch", "cls")
    with pytest.raises(ConfigError, match="labels: expected 5 different names, got 5, 4 of them"):
        export_huggingface(classifier, tmp_path, AUDIO, ["a", "a", "b", "c", "d"])
    with pytest.raises(ConfigError, match="names: expected 5 different names, got 1, 1 of them"):
        export_huggingface(classifier, tmp_path, AUDIO, LABELS, names=["a"])
    with pytest.raises(ConfigError, match=r"audio.sample_rate_hz is 8000, .* works at 16000"):
        export_huggingface(classifier, tmp_path, replace(AUDIO, sample_rate_hz=8000))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file.model: cannot be written"):
        export_huggingface(classifier, tmp_path / "file" / "model", AUDIO)


def change(folder: Path, name: str, **changed: object) -> None:
    content = json.loads((folder / name).read_text())
    content |= {key: value for key, value in changed.items() if value is not None}
    for key in [key for key, value in changed.items() if value is None]:
        del content[key]
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "wav2vec2"}, "model_type is 'wav2vec2', expected 'audio-spec"),
        ({"num_attention_heads": 6}, "hidden_size 192 with 6 heads, expected 192 with 3"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected 'gelu'"),
        ({"max_length": None}, "the key 'max_length' is missing"),
        ({"num_hidden_layers": 3}, r"missing .*encoder\.layer\.2\.layernorm_before\.weight"),
        ({"num_hidden_layers": 1}, r"unexpected .*encoder\.layer\.1\.layernorm_before\.weight"),
        ({"problem_type": "regression"}, "problem_type is 'regression', expected single_label_cl"),
        ({"problem_type": ["ce"]}, r"problem_type is \['ce'\], expected single_label_cl"),
        ({"time_stride": 8}, r"shapes that do not fit: encoder\.embed\.pos_embed"),
    ],
)
def test_wrong_folders_are_one_line(changed, message, tmp_path):
    folder = export_huggingface(make_classifier("patch", "cls"), tmp_path / "model", AUDIO)
    change(folder, "config.json", **changed)
    with pytest.raises(CheckpointError, match=message) as caught:
        import_huggingface(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_damaged_files(tmp_path):
    folder = export_huggingface(make_classifier("patch", "cls"), tmp_path / "model", AUDIO)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        import_huggingface(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: cannot be read"):
        import_huggingface(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object, found list"):
        import_huggingface(folder)
