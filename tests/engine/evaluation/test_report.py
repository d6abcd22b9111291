"""What is written of a classifier's results."""

import csv

import numpy as np
import pytest

from ssast.engine.data.labels import LabelledClips
from ssast.engine.evaluation.report import read_predictions, write_split


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_names_of_classes_are_no_formulas(tmp_path, loss):
    r"""``$\nosuch{$`` as mathtext would raise an error after the last step of training."""
    classes = ("cost $5 to $9", r"$\nosuch{$", "caf\u00e9", "bytes \udcff")
    clips = LabelledClips(
        paths=[f"{n}.wav" for n in range(8)],
        classes=classes,
        indices=np.arange(8) % 4,
        offsets=np.arange(9),
        source="test",
    )
    logits = 4.0 * np.eye(4)[np.arange(8) % 4]
    write_split(tmp_path / "test", clips, logits, np.ones(8, bool), {"accuracy": 1.0}, loss)
    written = {path.name for path in (tmp_path / "test").iterdir()}
    assert written == {"metrics.json", "predictions.csv", "confusion.png", "classes.png"}
    with (tmp_path / "test/predictions.csv").open(errors="surrogateescape") as file:
        assert len(list(csv.reader(file))) == 9
    found = read_predictions(tmp_path / "test/predictions.csv")
    assert [label for label, _ in found] == [classes[n % 4] for n in range(8)]
