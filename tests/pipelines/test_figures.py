"""Figures are saved whole, without pyplot, and with their text drawn as it is written."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from ssast.pipelines import figures
from ssast.pipelines.figures import save_figure, subplots

NAMES = ["cost $5 to $9", r"$\nosuch{$", "caf\u00e9", "bytes \udcff", r"a \$ b"]


def draw(path, names, layout="constrained"):
    """A figure with text in every place where one of ours has some."""
    figure, (left, right) = subplots(1, 2, figsize=(9, 5), layout=layout)
    for number, name in enumerate(names):
        left.plot([0, 1], [0, number], label=name)
        left.annotate(name, (0.5, number / 2))
        right.text(0, number, name)
    left.set(xlabel=names[0], ylabel=names[1], title=names[0])
    left.legend(title=names[1])
    image = right.imshow(np.zeros((len(names), len(names))))
    right.set_xticks(range(len(names)), names, rotation=90)
    right.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=right, label=names[1])
    figure.suptitle(names[1])
    figure.legend(loc="upper center")
    return figure, save_figure(figure, path)


@pytest.mark.parametrize("layout", ["tight", "constrained"])
def test_text_is_drawn_literally(tmp_path, layout):
    figure, path = draw(tmp_path / "new/figure.png", NAMES, layout)
    assert imread(path).shape == (550, 990, 4)
    drawn = [text.get_text() for text in figure.findobj(Text)]
    for name in (r"cost \$5 to \$9", r"\$\nosuch{\$", "caf\u00e9", "bytes ?", r"a \\$ b"):
        # Tick labels of two axes, text, annotation, and two legends.
        assert drawn.count(name) >= 6
    parsed = [text._preprocess_math(text.get_text()) for text in figure.findobj(Text)]
    assert {is_math for _, is_math in parsed} == {False}
    assert {name.replace("\udcff", "?") for name in NAMES} <= {text for text, _ in parsed}


def test_powers_of_ten_stay_formulas(tmp_path):
    figure, axes = subplots(figsize=(4, 3))
    axes.loglog([1, 1e6], [1, 1e6])
    figure.savefig(tmp_path / "plain.png", dpi=110)
    saved = save_figure(figure, tmp_path / "saved.png")
    assert np.array_equal(imread(saved), imread(tmp_path / "plain.png"))
    assert any("$" in label.get_text() for label in axes.get_xticklabels())


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    figure, _ = subplots(figsize=(4, 3))
    save_figure(figure, path)
    old = path.read_bytes()

    def full(temporary, **settings):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_neither_pyplot_nor_a_backend_is_chosen(tmp_path):
    program = """if True:
        import sys
        from pathlib import Path
        from ssast.pipelines.figures import save_figure, subplots

        assert "matplotlib" not in sys.modules
        figure, axes = subplots(figsize=(4, 3))
        save_figure(figure, Path(sys.argv[1]))
        assert "matplotlib.pyplot" not in sys.modules
    """
    path = tmp_path / "figure.png"
    subprocess.run([sys.executable, "-c", program, path], check=True)
    assert path.is_file()


def test_characters_that_no_font_has(tmp_path, caplog, recwarn):
    figures._say_missing.cache_clear()
    for _ in range(2):
        figure, axes = subplots(figsize=(2, 1), layout="tight")
        axes.set_title("\N{EGYPTIAN HIEROGLYPH A001} \u732b \u00e4")
        save_figure(figure, tmp_path / "a.png")
    assert len(caplog.records) <= 1 and "lack characters that no installed font has" in caplog.text
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    figures._say_missing.cache_clear()
    figure, axes = subplots(figsize=(2, 1))
    axes.set_title("\u00e4")
    save_figure(figure, tmp_path / "b.png")
    assert len(caplog.records) <= 1
