"""What is written of a classifier's results."""

import csv
from pathlib import Path

import numpy as np
import pytest

from ssast.engine.data.labels import LabelledClips
from ssast.engine.evaluation import report
from ssast.engine.evaluation.report import read_predictions, write_split

CLASSES = ("cost $5 to $9", r"$\nosuch{$", "caf\u00e9", "bytes \udcff")


def write(folder: Path, loss: str) -> None:
    """Write the results of eight clips that are all told right."""
    clips = LabelledClips(
        paths=[f"{n}.wav" for n in range(8)],
        classes=CLASSES,
        indices=np.arange(8) % 4,
        offsets=np.arange(9),
        source="test",
    )
    logits = 4.0 * np.eye(4)[np.arange(8) % 4]
    write_split(folder, clips, logits, np.ones(8, bool), {"accuracy": 1.0}, loss)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_names_of_classes_are_no_formulas(tmp_path, loss):
    r"""``$\nosuch{$`` as mathtext would raise an error after the last step of training."""
    write(tmp_path / "test", loss)
    written = {path.name for path in (tmp_path / "test").iterdir()}
    assert written == {"metrics.json", "predictions.csv", "confusion.png", "classes.png"}
    with (tmp_path / "test/predictions.csv").open(errors="surrogateescape") as file:
        assert len(list(csv.reader(file))) == 9
    found = read_predictions(tmp_path / "test/predictions.csv")
    assert [label for label, _ in found] == [CLASSES[n % 4] for n in range(8)]


@pytest.mark.parametrize("part", ["write_predictions", "write_atomically"])
def test_metrics_come_with_predictions(part, tmp_path, monkeypatch):
    """Metrics alone, after a kill between the two, would look like results."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, part, stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "test", "ce")
    written = [path.name for path in (tmp_path / "test").iterdir()]
    assert written == ([] if part == "write_predictions" else ["predictions.csv"])
