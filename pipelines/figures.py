"""Figures as PNG files: no display, no pyplot, and text that is drawn as it is written.

matplotlib takes most of a second to import, so it is imported by the first figure.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssast.pipelines.files import replacing

log = logging.getLogger(__name__)

WIDE_FONTS = (  # that have what DejaVu Sans lacks: Chinese, Japanese, Korean, Indic and others
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "IPAGothic", "NanumGothic", "Noto Sans"),
    *("Noto Sans Devanagari", "Unifont", "FreeSans"),
)
LONGEST, LONGEST_LABEL = 200, 80  # characters: more would push the axes out of the figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def subplots(
    rows: int = 1,
    columns: int = 1,
    *,
    figsize: tuple[float, float],
    layout: Literal["tight", "constrained"] = "constrained",
    **settings: Any,
) -> "tuple[Figure, Any]":
    """Create a figure and its axes, as ``pyplot.subplots`` does.

    Args:
        rows: Number of rows of axes.
        columns: Number of columns of axes.
        figsize: Width and height in inches.
        layout: How matplotlib makes room for text.
        settings: Arguments of :meth:`matplotlib.figure.Figure.subplots`.

    Returns:
        The figure and one axes or, as ``squeeze`` says, an array of them.
    """
    from matplotlib.figure import Figure

    # A tight layout is computed once, when the figure is saved.
    figure = Figure(figsize=figsize, layout=layout if layout == "constrained" else None)
    return figure, figure.subplots(rows, columns, **settings)


def save_figure(figure: "Figure", path: Path, dpi: int = 110) -> Path:
    """Write a figure of :func:`subplots` as PNG, whole or not at all.

    Titles, labels and legends are drawn literally: in the name of a class or a file, ``$`` does not
    begin a formula, what is not valid text becomes a question mark, and long text is cut off.

    Args:
        figure: The figure; it can be saved once.
        path: Path of the PNG file; its folder is created.
        dpi: Pixels per inch.

    Returns:
        The path.

    Raises:
        OSError: The file cannot be written.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    for text in figure.findobj(Text):
        text.set_text(_literal(text.get_text()))
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            # What set_xticks makes of labels. The others make numbers, some with mathtext: 10^3.
            if isinstance(formatter, FuncFormatter):
                axis.set_major_formatter(_literal_labels(formatter))
    with _fonts(figure):
        if figure.get_layout_engine() is None:
            figure.tight_layout()
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=dpi, format="png")
    return path


@contextmanager
def _fonts(figure: "Figure") -> Iterator[None]:
    """Draw what the usual font lacks in another that is installed; say once if there is none."""
    from matplotlib.font_manager import get_font_names
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    if all(text.get_text().isascii() for text in texts):
        yield
        return
    families = ["DejaVu Sans", *sorted(set(get_font_names()) & set(WIDE_FONTS))]
    for text in texts:
        text.set_fontfamily(families)
    with warnings.catch_warnings(record=True) as found:
        warnings.filterwarnings("always", "Glyph .* missing", UserWarning)
        yield
    glyphs = [str(each.message).partition(" missing")[0] for each in found if _is_of_font(each)]
    if glyphs:
        _say_missing(glyphs[0])
    for each in found:
        if not _is_of_font(each):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _is_of_font(warning: warnings.WarningMessage) -> bool:
    return str(warning.message).startswith("Glyph ")


@cache
def _say_missing(glyph: str) -> None:
    log.warning(
        "pictures lack characters that no installed font has, such as %s: a font like Noto Sans "
        "CJK has them",
        glyph,
    )


def _literal(text: str, longest: int = LONGEST) -> str:
    """Escape what matplotlib would take for mathtext, or could not draw."""
    if len(text) > longest:
        text = text[: longest - 3] + "..."
    return text.encode(errors="replace").decode().replace("$", r"\$")


def _literal_labels(formatter: Any) -> Any:
    return lambda value, position: _literal(formatter(value, position), LONGEST_LABEL)
