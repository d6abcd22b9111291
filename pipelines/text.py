"""Text that users give and see: files in any Unicode encoding, names of any bytes.

The name of a file need not be valid text. As everywhere in Python, bytes that are not UTF-8 are
held as lone surrogates (``surrogateescape``), so that a path opens the file that it names. CSV gets
those bytes back, JSON and what is shown get escapes.
"""

import codecs
import contextlib
import csv
import io
import json
import logging
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ssast.pipelines.errors import DataError

log = logging.getLogger(__name__)

BYTE_ORDER_MARKS = (  # that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
NAME_BYTES = "surrogateescape"  # the error handler that turns bytes of a name to text and back


def read_text(path: Path) -> str:
    """Read a text file: UTF-8, or what its byte order mark says (Notepad, PowerShell, Excel).

    Raises:
        DataError: It is not text of that encoding, or holds NUL characters.
        OSError: It cannot be read.
    """
    data = path.read_bytes()
    codec, name = _encoding(data)
    try:
        text = data.decode(codec)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not {name or 'UTF-8'} text: byte {error.start}") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(
            f"{path}: line {line}: a NUL character, expected text: save UTF-16 as UTF-8, or with a "
            "byte order mark"
        )
    return text


def read_lines(path: Path) -> Iterator[str]:
    """Read the lines of a text file, with any line ends, without holding all of it.

    Raises:
        DataError: See :func:`read_text`.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        codec, _ = _encoding(file.read(4))
    try:
        with path.open(encoding=codec, newline="") as lines:
            for line in lines:
                if "\0" in line:
                    break
                yield line
            else:
                return
    except UnicodeDecodeError:
        pass
    read_text(path)  # says what is wrong
    raise DataError(f"{path}: was changed while it was read")


def _encoding(data: bytes) -> tuple[str, str]:
    """Return codec and name of the encoding that a byte order mark states."""
    marks = ((codec, name) for mark, codec, name in BYTE_ORDER_MARKS if data.startswith(mark))
    return next(marks, ("utf-8", ""))


def csv_rows(
    text: str | Iterable[str], source: object, **settings: Any
) -> Iterator[tuple[int, list[str]]]:
    """Read the rows of a CSV text that are not blank.

    Args:
        text: The text, or its lines, with any line ends.
        source: Path of the file, for messages.
        settings: Arguments of :func:`csv.reader`.

    Yields:
        The line in which a row begins, and its cells.

    Raises:
        DataError: A quote is not closed, or is followed by other text.
    """
    lines = io.StringIO(text, newline="") if isinstance(text, str) else text
    reader = csv.reader(lines, strict=True, **settings)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error)
            if "unexpected end" in reason or "field limit" in reason:
                reason = "a quote that begins here is not closed"
            elif "expected after" in reason:
                reason = "expected a comma after a closing quote (a quote in a cell is doubled)"
            raise DataError(f"{source}: line {line}: not CSV: {reason}") from error
        if len(cells) > 1 or (cells and cells[0].strip()):
            yield line, cells


def json_line(content: Any) -> bytes:
    """Return a line of a JSONL file: readable UTF-8, in which only lone surrogates are escaped."""
    text = json.dumps(content, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # a surrogate becomes what JSON writes for it


def printable(text: object) -> str:
    r"""Return text on one line, without characters that steer a terminal or are half of another.

    Those are shown as escapes such as ``\n`` and ``\udce9`` (the byte E9 of a name).
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    hidden = ("Cc", "Cs", "Zl", "Zp")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in hidden else c for c in shown)


def markdown(text: object) -> str:
    """Return text on one line that Markdown shows as it is, also in a cell of a table."""
    return re.sub(r"[\\`*<>\[\]|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", printable(text))


def say(text: str) -> None:
    """Print a line at once; what the terminal's encoding lacks is escaped, never an error.

    Nor is a full disk or a closed pipe, which is warned of once.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        _warn_of_lost_lines(str(error))
        # What is left in its buffer would be an error again, at the latest when Python ends.
        sys.stdout = open(  # noqa: SIM115
            sys.stdout.fileno(), "w", encoding=encoding, errors="backslashreplace", closefd=False
        )


@cache
def _warn_of_lost_lines(reason: str) -> None:
    log.warning("standard output: %s: lines are lost", reason)


def print_error(text: str) -> None:
    """Print a line to standard error at once; never an error, as a status follows that counts."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
