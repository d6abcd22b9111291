"""Labelled sounds, pretrained weights and a finished fine-tuning run, which no test may change."""

import pytest
from finetune_runs import command, make_splits, pretrained_file
from runs import call


@pytest.fixture(scope="session")
def splits(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return pretrained_file(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    augmented = "mixup: 0.5, freq_mask: 4, time_mask: 6, noise: 0.1, roll: 3, drop_tokens: 0.25"
    path.write_text(f"finetune: {{{augmented}}}\n")
    return path


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory, splits, checkpoint, recipe):
    """A run that was never interrupted, from the command line."""
    run = tmp_path_factory.mktemp("runs") / "finetuned"
    done = call(*command(run, splits, checkpoint, recipe))
    assert done.returncode == 0, done.stderr
    return run, done
