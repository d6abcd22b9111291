"""What is refused at the door of every export, before a file is written."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.finetune import FinetuneEngine
from ssast.engine.formats.huggingface import export_huggingface
from ssast.engine.formats.open import MissingMetadata, open_model
from ssast.engine.formats.portable import Portable, save_onnx, save_program
from ssast.engine.formats.published import save_published
from ssast.engine.model.backbones import Backbone
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio, Model

AUDIO = Audio(num_frames=64)
EXPORTS = {"hf": export_huggingface, "pt2": save_program, "onnx": save_onnx}


def make(pooling: str = "avgtok") -> Classifier:
    torch.manual_seed(0)
    encoder = SpectrogramTransformer(Model(size="tiny", depth=1), AUDIO, (16, 16))
    classifier = Classifier(encoder, 3, pooling).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return classifier


def compiled() -> Classifier:
    model = make()
    model.encoder = torch.compile(model.encoder)  # type: ignore[assignment]
    return model


def compiled_block() -> Classifier:
    model = make()
    model.encoder.blocks[0] = torch.compile(model.encoder.blocks[0])
    return model


def pruned() -> Classifier:
    model = make()
    prune.l1_unstructured(model.encoder.blocks[0].mlp.fc1, "weight", 0.5)
    return model


def other_head() -> Classifier:
    model = make()
    model.head = nn.Sequential(nn.LayerNorm(192), nn.Dropout(), nn.Linear(192, 3))
    return model


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.DataParallel(make()), "expected a Classifier or .* got DataParallel: give the"),
        (lambda: torch.compile(make()), "got OptimizedModule: give the module inside"),
        (compiled, "expected a SpectrogramTransformer as .encoder, got OptimizedModule"),
        (compiled_block, r"weights 'encoder\.blocks\.0\._orig_mod"),
        (pruned, r"weights 'encoder\.blocks\.0\.mlp\.fc1\.weight"),
        (other_head, r"weights 'head\.1\.bias': expected a model whose modules"),
    ],
)
def test_models_that_are_not_whole(kind, build, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        EXPORTS[kind](build(), tmp_path / "out", AUDIO)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("build", [pruned, other_head])
def test_the_published_format_as_well(build, tmp_path):
    with pytest.raises(ConfigError, match=r"the published format: (missing|unexpected) weights"):
        save_published(build(), tmp_path / "a.pth", AUDIO)


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": -3.0}, r"audio.mean: expected -\d.*, as the model was made for, got -3.0"),
        ({"std": 9.0}, r"audio.std: expected"),
        ({"num_frames": 128}, r"audio.num_frames: expected \(8, 4\), .* got \(8, 8\)"),
        ({"ignore_padding": True}, r"audio.ignore_padding: expected False"),
    ],
)
def test_audio_of_another_model(kind, change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        EXPORTS[kind](make(), tmp_path / "out", replace(AUDIO, **change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", EXPORTS)
def test_classes_and_loss(kind, tmp_path):
    for labels in (["a"], ["a", "a", "b"]):
        with pytest.raises(ConfigError, match="labels: expected 3 different names"):
            EXPORTS[kind](make(), tmp_path / "out", AUDIO, labels)
    with pytest.raises(ConfigError, match="loss: expected ce or bce, got 'BCE'"):
        EXPORTS[kind](make(), tmp_path / "out", AUDIO, ["a", "b", "c"], "BCE")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [save_onnx, save_program])
def test_a_misspelt_input(save, tmp_path):
    with pytest.raises(ConfigError, match="fed: expected fbank or waveform, got 'wave'"):
        save(make(), tmp_path / "out", AUDIO, fed="wave")
    assert not list(tmp_path.iterdir())


def test_labels_may_be_numbers(tmp_path):
    export_huggingface(make(), tmp_path / "out", AUDIO, torch.arange(3).numpy())  # type: ignore[arg-type]
    assert open_model(tmp_path / "out").classes == ("0", "1", "2")


def test_raw_weights_beside_averaged_ones(tmp_path):
    averaged, raw = make(), make()
    with torch.no_grad():
        raw.head[1].bias += 100
    export_huggingface(averaged, tmp_path, AUDIO, raw=raw)
    for weights, model in ((None, averaged), ("ema", averaged), ("raw", raw)):
        loaded = open_model(tmp_path, weights=weights)
        torch.testing.assert_close(loaded.classifier.head[1].bias, model.head[1].bias)
        assert loaded.weights == (weights or "ema")
    export_huggingface(averaged, tmp_path, AUDIO)
    assert open_model(tmp_path, weights="raw").weights is None
    with pytest.raises(CheckpointError, match="has one kind of weights, no averaged ones"):
        open_model(tmp_path, weights="ema")


def test_misspelt_choices(tmp_path):
    export_huggingface(make(), tmp_path, AUDIO)
    for metadata, message in (
        (MissingMetadata(loss="softmax"), "loss: expected ce or bce, got 'softmax'"),
        (MissingMetadata(pooling="mean"), "pooling: expected avgtok or cls, got 'mean'"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_model(tmp_path, metadata)
    with pytest.raises(ConfigError, match="weights: expected raw or ema, got 'EMA'"):
        open_model(tmp_path, weights="EMA")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pooling: expected avgtok or cls, got 'mean'"):
        make("mean")


def test_the_axes_of_filterbanks():
    model = make()
    square = SpectrogramTransformer(Model(size="tiny", depth=1), Audio(num_frames=1024), (16, 16))
    for encoder, shape in ((square, (2, 128, 1024)), (model.encoder, (64, 128))):
        with pytest.raises(ValueError, match=r"expected filterbanks \[B, T, F\] of 8 x "):
            Classifier(encoder, 3)(torch.zeros(shape))


def test_the_epsilon_of_norms_is_the_models():
    model = make()
    for norm in (model.encoder.blocks[0].norm1, model.encoder.blocks[0].norm2):
        norm.eps = 1e-2
    x = torch.randn(2, 64, 128)
    torch.testing.assert_close(Portable(model)(x), model(x))


def test_a_state_dict_alone(tmp_path):
    torch.save(make().state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="export_huggingface and ssast export write whole"):
        open_model(tmp_path / "a.pth")


def test_a_recipe_beside_a_fine_tuned_model(tmp_path):
    export_huggingface(make(), tmp_path, AUDIO)
    with pytest.raises(ConfigError, match="is fine-tuned already, expected a pretrained model"):
        FinetuneEngine.from_checkpoint(tmp_path, overrides=["optim.lr=1"])
    assert FinetuneEngine.from_checkpoint(tmp_path).trained is not None


def test_blocks_of_ones_own_are_pre_norm():
    with pytest.raises(ConfigError, match=r"model.norm: expected pre with a model.backbone"):
        Backbone(Model(size="tiny", norm="post"), AUDIO)
