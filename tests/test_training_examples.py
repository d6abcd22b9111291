"""The examples of training with other frameworks: a few steps, and a model that predict reads."""

import runpy
from pathlib import Path

import pytest
import torch
from finetune_runs import make_sounds, pretrained_file
from paths import ROOT

from ssast.engine.cli.main import main
from ssast.engine.evaluation.predict import predict
from ssast.engine.formats.open import open_model

TRAINING = ["--epochs", "6", "--batch-size", "4", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A pretrained model, as a published file."""
    return pretrained_file(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Sounds of two classes, a folder for each."""
    folder = tmp_path_factory.mktemp("sounds")
    for path in make_sounds(folder, 2, 6):
        name = folder / ("low" if path.name[0] == "0" else "high")
        name.mkdir(exist_ok=True)
        path.rename(name / path.name)
    return folder


def run(example: str, *arguments: object) -> None:
    main = runpy.run_path(str(ROOT / "examples" / example))["main"]
    main([*map(str, arguments), *TRAINING])


def check(out: Path, checkpoint: Path, sounds: Path) -> None:
    """Check that the model was trained, in float32, and that it knows its classes."""
    paths = sorted(sounds.glob("*/*.wav"))
    found = open_model(out)
    assert found.classes == ("high", "low") and found.loss == "ce"
    right = [clip.classes[0][0] == Path(clip.path).parent.name for clip in predict(found, paths)]
    assert sum(right) >= len(paths) - 1
    before = open_model(checkpoint).encoder.blocks[0].mlp.fc1.weight
    after = found.encoder.blocks[0].mlp.fc1.weight
    assert after.dtype == torch.float32 and not after.equal(before)


@pytest.mark.compatible("Lightning", "examples/finetune_lightning.py, in float32 and bf16-mixed")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, checkpoint, sounds, tmp_path):
    out = tmp_path / "out"
    run("finetune_lightning.py", checkpoint, sounds, out, "--precision", precision)
    check(out, checkpoint, sounds)


@pytest.mark.compatible("Accelerate", "examples/finetune_accelerate.py, in float32 and bf16")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, checkpoint, sounds, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # one precision a process, it holds
    out = tmp_path / "out"
    run("finetune_accelerate.py", checkpoint, sounds, out, "--precision", precision)
    AcceleratorState._reset_state(True)
    check(out, checkpoint, sounds)


@pytest.mark.compatible("transformers", "examples/finetune_trainer.py, in float32 and bf16")
@pytest.mark.parametrize("precision", [[], ["--bf16", "--cpu"]])
def test_trainer(precision, checkpoint, sounds, tmp_path, modules):
    pretrained, out = tmp_path / "pretrained", tmp_path / "out"
    assert main(["export", str(checkpoint), "--to", "hf", str(pretrained)]) == 0
    run("finetune_trainer.py", pretrained, sounds, out, *precision)
    check(out, checkpoint, sounds)
