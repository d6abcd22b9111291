"""The released weights: each gives the figures of its card."""

import re
from pathlib import Path

import pytest

from ssast.benchmarks.study.release import CARD, CHECKPOINTS, FIGURES, figures
from ssast.engine.formats.open import load_pretrained

FOLDERS = sorted(
    path.parent for path in (Path(__file__).parents[3] / CHECKPOINTS).glob("*/" + CARD)
)


def stated(folder: Path, what: str) -> float:
    """The number that a card states beside these words."""
    (found,) = re.findall(
        rf"^\| {re.escape(what)} \| ([\d.]+) \|$", (folder / CARD).read_text(), re.M
    )
    return float(found)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_states_what_its_weights_do(folder):
    for name, value in figures(folder).items():
        assert value == pytest.approx(stated(folder, FIGURES[name]), abs=3e-4), name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_states_its_settings(folder):
    model, config = load_pretrained(folder)
    text = (folder / CARD).read_text()
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M weights" in text
    rows, columns = config.grid
    assert f"| masked patches | {config.objective.num_masked} of {rows * columns}, " in text
    assert f"{config.audio.num_frames} frames of 10 ms" in text


def test_all_are_there():
    assert [folder.name for folder in FOLDERS] == ["tiny_frame", "tiny_patch"]
