"""What transformers promises of every model, of the model file that our exports carry."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from sounds import tone
from torch import nn
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification

from ssast.engine.errors import CheckpointError
from ssast.engine.formats.huggingface import export_huggingface, import_huggingface
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.embedding import resize_pos_embed
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio, Model

AUDIO = Audio(num_frames=32)
LABELS = ["dog", "cat", "rain"]
NAMES = ["Dog", "Cat", "Rain, heavy"]


def make_encoder() -> SpectrogramTransformer:
    torch.manual_seed(0)
    settings = Model(size="tiny", depth=2, patch=(128, 2))
    encoder = SpectrogramTransformer(settings, AUDIO, (128, 2)).eval()
    with torch.no_grad():  # as after training: nothing is 0 or 1 by its initialisation
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return encoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, modules) -> dict[str, Path]:
    """Exports of both losses and of the encoder."""
    root, encoder = tmp_path_factory.mktemp("hf"), make_encoder()
    classifier = Classifier(encoder, len(LABELS)).eval()
    return {
        "ce": export_huggingface(classifier, root / "ce", AUDIO, LABELS, "ce"),
        "bce": export_huggingface(classifier, root / "bce", AUDIO, LABELS, "bce", NAMES),
        "encoder": export_huggingface(encoder, root / "encoder", AUDIO),
    }


def load(folder: Path, auto: type = AutoModelForAudioClassification, **settings: object):
    return auto.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def inputs(B: int = 2) -> torch.Tensor:
    return torch.randn(B, 32, 128, generator=torch.Generator().manual_seed(B))


def targets(loss: str, B: int = 2) -> torch.Tensor:
    numbers = torch.arange(B) % len(LABELS)
    return numbers if loss == "ce" else nn.functional.one_hot(numbers, len(LABELS)).float()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert other.state_dict()[name].equal(value), name


@pytest.mark.compatible("transformers", "save_pretrained to a second and a third checkpoint")
@pytest.mark.parametrize("auto", [AutoModelForAudioClassification, AutoModel])
def test_a_second_checkpoint_is_the_first(auto, folders, tmp_path):
    first = load(folders["bce"], auto)
    first.save_pretrained(tmp_path / "second")
    second = load(tmp_path / "second", auto)
    second.save_pretrained(tmp_path / "third")
    third = load(tmp_path / "third", auto)
    assert_same_weights(first, second)
    assert_same_weights(first, third)
    assert third.config.to_diff_dict() == second.config.to_diff_dict()
    assert third.config.num_frames == 32 and third.config.problem_type.startswith("multi")
    x = inputs()
    with torch.no_grad():
        assert third(x)[0].equal(first(x)[0])


@pytest.mark.compatible("transformers", "save_pretrained(max_shard_size=...): shards open here")
def test_shards(folders, tmp_path):
    load(folders["bce"]).save_pretrained(tmp_path, max_shard_size="1MB")
    AutoFeatureExtractor.from_pretrained(folders["bce"]).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, parts = (import_huggingface(folder) for folder in (folders["bce"], tmp_path))
    with torch.no_grad():
        assert parts.model(inputs()).equal(whole.model(inputs()))
    assert whole[1:] == parts[1:]
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../x.safetensors", "x.bin", 5):
        index.write_text(json.dumps({"weight_map": {"head.0.weight": name}}))
        with pytest.raises(CheckpointError, match=r"index\.json: weight_map is .*expected files"):
            import_huggingface(tmp_path)
    index.write_text(json.dumps({"weight_map": {"head.0.weight": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read"):
        import_huggingface(tmp_path)


@pytest.mark.compatible("transformers", "Trainer: gradient accumulation, checkpoints")
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_trainer_trains_to_a_checkpoint_that_opens_here(loss, folders, tmp_path):
    extract = AutoFeatureExtractor.from_pretrained(folders[loss])
    model, before = load(folders[loss]), load(folders[loss])
    rows = [
        {"input_values": x, "labels": y} for x, y in zip(inputs(4), targets(loss, 4), strict=True)
    ]
    # The gradients of the whole batch, which those of its parts must sum to.
    whole = load(folders[loss])
    whole(inputs(4), labels=targets(loss, 4)).loss.backward()
    settings = transformers.TrainingArguments(
        tmp_path / "run", per_device_train_batch_size=1, gradient_accumulation_steps=4,
        max_steps=2, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0, gradient_checkpointing=True, save_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, train_dataset=rows, processing_class=extract)
    trainer.train()
    once = load(tmp_path / "run" / "checkpoint-1")
    for (name, old), new, wanted in zip(
        before.named_parameters(), once.parameters(), whole.parameters(), strict=True
    ):
        want = old - 0.1 * wanted.grad
        torch.testing.assert_close(new, want, rtol=1e-4, atol=1e-6, msg=name)
    twice = load(tmp_path / "run" / "checkpoint-2")
    assert_same_weights(twice, model)
    ours, audio, labels, names, found = import_huggingface(tmp_path / "run" / "checkpoint-2")
    assert audio == AUDIO and list(labels) == LABELS and found == loss
    assert list(names) == (LABELS if loss == "ce" else NAMES)
    with torch.no_grad():
        want = twice(ours.encoder.embed.normalise(inputs())).logits
        torch.testing.assert_close(ours(inputs()), want, rtol=1e-4, atol=1e-5)


@pytest.mark.compatible("transformers", "from_pretrained(num_labels=...): a fresh head")
@pytest.mark.parametrize("source", ["ce", "encoder"])
def test_a_fresh_head(source, folders, tmp_path):
    before = load(folders[source], AutoModel)
    model = load(folders[source], num_labels=5, ignore_mismatched_sizes=True)
    assert_same_weights(model.encoder, before)
    norm, linear = model.head
    assert linear.weight.shape == (5, 192) and not linear.bias.any()
    assert 0.015 < linear.weight.std() < 0.025
    if source == "encoder":
        assert (norm.weight == 1).all() and not norm.bias.any()
    model.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path), model)
    assert load(tmp_path).config.num_labels == 5


@pytest.mark.compatible("transformers", "attn_implementation, attentions, hidden states")
def test_attention_implementations_and_what_they_return(folders):
    x, sdpa = inputs(), load(folders["ce"])
    eager = load(folders["ce"], attn_implementation="eager")
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == (
        "sdpa",
        "eager",
    )
    with torch.no_grad():
        want = sdpa(x, output_hidden_states=True)
        found = eager(x, output_hidden_states=True, output_attentions=True)
        switched = load(folders["ce"])
        switched.set_attn_implementation("eager")
        assert switched(x).logits.equal(found.logits)
    torch.testing.assert_close(found.logits, want.logits, rtol=1e-4, atol=1e-5)
    assert len(found.hidden_states) == len(want.hidden_states) == 3 and want.attentions is None
    assert [a.shape for a in found.attentions] == [(2, 3, 18, 18)] * 2
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(2, 3, 18))
    block = eager.encoder.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(found.hidden_states[0])).chunk(3, -1)
    scores = q[:, :, :64] @ k[:, :, :64].transpose(1, 2) / 8  # of the first head
    torch.testing.assert_close(found.attentions[0][:, 0], scores.softmax(-1))
    with pytest.raises(ValueError, match=r"expected attn_implementation='eager', found 'sdpa'"):
        sdpa(x, output_attentions=True)


@pytest.mark.compatible("transformers", "interpolate_pos_encoding: inputs of another length")
@pytest.mark.parametrize("frames", [20, 45])
def test_inputs_of_another_length(frames, folders):
    theirs, ours = load(folders["ce"]), import_huggingface(folders["ce"]).model
    audio = Audio(num_frames=frames)
    encoder = SpectrogramTransformer(Model(size="tiny", depth=2, patch=(128, 2)), audio, (128, 2))
    state, old = ours.state_dict(), ours.encoder.embed
    state["encoder.embed.pos_embed"] = resize_pos_embed(
        old.pos_embed, old.grid, encoder.embed.grid, 2
    )
    resized = Classifier(encoder, len(LABELS)).eval()
    resized.load_state_dict(state)
    x = torch.randn(2, frames, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = theirs(x, interpolate_pos_encoding=True).logits
        want = resized(x * 2 * audio.std + audio.mean)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        same = theirs(inputs(), interpolate_pos_encoding=True).logits
        assert same.equal(theirs(inputs()).logits)
    with pytest.raises(ValueError, match=rf"expected \[batch, 32, 128\], got \[2, {frames}, 128\]"):
        theirs(x)
    for wrong in (x[:, :, 1:], x[:, :1]):
        with pytest.raises(ValueError, match=r"expected \[batch, 32, 128\], got"):
            theirs(wrong, interpolate_pos_encoding=True)


@pytest.mark.compatible("transformers", "return_dict=False: tuples")
def test_tuples(folders):
    x, y, model = inputs(), targets("ce"), load(folders["ce"])
    with torch.no_grad():
        want = model(x, labels=y, output_hidden_states=True)
        loss, logits, states = model(x, labels=y, output_hidden_states=True, return_dict=False)
        last, pooled = model.encoder(x, return_dict=False)
        assert loss.equal(want.loss) and logits.equal(want.logits) and len(states) == 3
        assert last.equal(model.encoder.norm(states[-1])) and pooled.equal(last[:, 2:].mean(1))
        model.config.return_dict = False
        assert model(x)[0].equal(want.logits) and isinstance(model(x), tuple)


@pytest.mark.compatible("transformers", "problem_type: the loss of labels")
@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("known", [True, False])
def test_the_loss_of_the_problem_type(loss, known, folders):
    model, x, y = load(folders[loss]), inputs(), targets(loss)
    if not known:  # then the shape of the labels says it
        model.config.problem_type = None
    wanted = nn.functional.cross_entropy
    if loss == "bce":
        wanted = nn.functional.binary_cross_entropy_with_logits
    with torch.no_grad():
        logits = model(x).logits
        torch.testing.assert_close(model(x, labels=y).loss, wanted(logits, y))
        if loss == "bce":  # of integers too
            torch.testing.assert_close(model(x, labels=y.long()).loss, wanted(logits, y))


@pytest.mark.compatible("transformers", "gradient_checkpointing_enable")
def test_gradient_checkpointing_has_the_same_gradients(folders):
    plain, saving = load(folders["ce"]).train(), load(folders["ce"]).train()
    saving.gradient_checkpointing_enable()
    calls = []
    for model in (plain, saving):
        handle = model.encoder.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        model(inputs(), labels=targets("ce")).loss.backward()
        handle.remove()
    assert len(calls) == 3  # the second model computes its block again
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert one.grad is not None and one.grad.equal(other.grad), name


@pytest.mark.compatible("transformers", "dtype, torch_dtype, device_map, autocast")
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_half_precision(key, folders, tmp_path):
    full, half = load(folders["ce"]), load(folders["ce"], device_map="cpu", **{key: torch.bfloat16})
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    x = inputs()
    with torch.no_grad():
        want = full(x).logits
        assert half(x).logits.dtype == torch.bfloat16
        torch.testing.assert_close(half(x).logits.float(), want, rtol=0.1, atol=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(full(x).logits.float(), want, rtol=0.1, atol=0.1)
    half.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path, dtype="auto"), half)


@pytest.mark.compatible("transformers", "pipeline of a second checkpoint")
def test_the_pipeline_of_a_second_checkpoint(folders, tmp_path):
    load(folders["bce"]).save_pretrained(tmp_path)
    AutoFeatureExtractor.from_pretrained(folders["bce"]).save_pretrained(tmp_path)
    found = [
        transformers.pipeline(
            "audio-classification", model=str(folder), trust_remote_code=True, device="cpu"
        )(tone(6_000))
        for folder in (folders["bce"], tmp_path)
    ]
    assert found[0] == found[1] and {line["label"] for line in found[0]} == set(NAMES)
