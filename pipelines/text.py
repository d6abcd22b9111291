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
import os
import re
import reprlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import yaml

from ssast.pipelines.errors import DataError
from ssast.pipelines.files import open_regular

log = logging.getLogger(__name__)

BYTE_ORDER_MARKS = (  # that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
NAME_BYTES = "surrogateescape"  # the error handler that turns bytes of a name to text and back
YAML_BYTES, YAML_DEPTH = 2**20, 50  # of a configuration
YAML_NODES = 10_000  # values; an alias counts with all that it stands for
YAML_WORD = 10_000  # characters without quotes: a number may take the square of its length

SCANNED_BYTES = 2**20  # of a table at once, to find its encoding
SHOWN = 200  # characters of a value in a message
LONGEST_CELL = 2**24  # characters of CSV: a quote that is not closed takes all that follows
csv.field_size_limit(LONGEST_CELL)  # of this process; csv refuses cells that are valid

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60
_shown.maxlevel = 3


def read_text(path: Path, most_bytes: float = float("inf")) -> str:
    """Read a text file: UTF-8, or what its byte order mark says (Notepad, PowerShell, Excel).

    Raises:
        DataError: It is not text of that encoding, or holds NUL characters; or it is no file but a
            pipe or a device, which might never end, or longer than ``most_bytes``.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise DataError(f"{path}: {size} bytes, expected at most {most_bytes}")
        data = file.read()
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


def legacy_encoding(path: Path) -> str | None:
    """Return the codec of text that is no Unicode, as old spreadsheets write it.

    It is cp1252, or Latin-1 where that has no such byte; None for a byte order mark, for UTF-8, and
    for what holds NUL characters, which is no text or UTF-16 without a mark.

    Raises:
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(SCANNED_BYTES)
        if _encoding(data)[1]:
            return None
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while data:
                decoder.decode(data)
                data = file.read(SCANNED_BYTES)
            decoder.decode(b"", final=True)
            return None
        except UnicodeDecodeError:
            file.seek(0)
        codec = "cp1252"
        while data := file.read(SCANNED_BYTES):
            if b"\0" in data:
                return None
            try:
                data.decode("cp1252")
            except UnicodeDecodeError:
                codec = "latin-1"
    return codec


def told_encoding(path: Path, remedy: str = "") -> str | None:
    """Return :func:`legacy_encoding`, and say so where there is one.

    Args:
        path: The file.
        remedy: What the line ends with.

    Raises:
        OSError: It cannot be read.
    """
    codec = legacy_encoding(path)
    if codec is not None:
        log.warning("%s: not UTF-8: read as %s%s", path, codec, remedy)
    return codec


def read_lines(path: Path, codec: str | None = None) -> Iterator[str]:
    """Read the lines of a text file, with any line ends, without holding all of it.

    Args:
        path: The file.
        codec: Encoding of the text; None: UTF-8, or what its byte order mark says.

    Raises:
        DataError: See :func:`read_text`; or it is not text of this encoding.
        OSError: It cannot be read.
    """
    given = codec
    if codec is None:
        with open_regular(path) as file:
            codec, _ = _encoding(file.read(4))
    try:
        raw = io.BufferedReader(open_regular(path))
        with io.TextIOWrapper(raw, encoding=codec, newline="") as lines:
            for line in lines:
                if "\0" in line:
                    break
                yield line
            else:
                return
    except UnicodeError as error:
        if given is not None:
            raise DataError(f"{path}: not {given} text: {error!s:.100}") from error
    if given is not None:
        raise DataError(f"{path}: a NUL character, expected {given} text")
    read_text(path)  # says what is wrong
    raise DataError(f"{path}: was changed while it was read")


def marked_encoding(data: bytes) -> str | None:
    """Return the codec that a byte order mark at the beginning of a file states."""
    codec, name = _encoding(data)
    return codec if name else None


def _encoding(data: bytes) -> tuple[str, str]:
    """Return codec and name of the encoding that a byte order mark states."""
    marks = ((codec, name) for mark, codec, name in BYTE_ORDER_MARKS if data.startswith(mark))
    return next(marks, ("utf-8", ""))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is none, is nested too deeply, or holds a number that is too long.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML, without objects of Python.

    Raises:
        ValueError: It is none, is nested too deeply, or holds aliases of aliases without end.
    """
    try:
        _check_yaml(text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error
    # What its constructors make of a value that does not fit an explicit tag.
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"a value that cannot be read: {error}") from error


def _check_yaml(text: str) -> None:
    """Count what the text stands for, before anything is made of it."""
    if len(text) > YAML_BYTES:
        raise yaml.YAMLError(f"{len(text)} characters, expected at most {YAML_BYTES}")
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor and nodes so far
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        size = 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, 1))
            if len(open_nodes) > YAML_DEPTH:
                raise yaml.YAMLError(f"nested more than {YAML_DEPTH} deep")
            continue
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{anchor} stands for itself, or for nothing")
            size = sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            if event.style is None and len(event.value) > YAML_WORD:
                raise yaml.YAMLError(f"a word of {len(event.value)} characters")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        else:
            continue
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            sizes[anchor] = size
        parent, before = open_nodes[-1]
        open_nodes[-1] = (parent, before + size)
        if before + size > YAML_NODES:
            raise yaml.YAMLError(f"it stands for more than {YAML_NODES} values")


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def with_home(value: Any) -> Any:
    """Expand ``~/`` at the start of text in nested values: a shell leaves that of ``key=~/x``."""
    if isinstance(value, dict):
        return {with_home(key): with_home(content) for key, content in value.items()}
    if isinstance(value, list):
        return [with_home(content) for content in value]
    is_path = isinstance(value, str) and value.startswith("~/")
    return os.path.expanduser(value) if is_path else value


def shown(value: Any) -> str:
    """Return a value from a file for a message: short, however deep, wide or long it is."""
    try:
        text = _shown.repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"a very long {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


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
        DataError: A quote is not closed, or is followed by other text, or a cell is too long.
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
            if "unexpected end" in reason:
                reason = "a quote that begins here is not closed"
            elif "field limit" in reason:
                reason = f"a quote that is not closed, or a cell of over {LONGEST_CELL} characters"
            elif "expected after" in reason:
                mark = settings.get("delimiter", ",")
                name = {",": "a comma", "\t": "a tab"}.get(mark, repr(mark))
                reason = f"expected {name} after a closing quote (a quote in a cell is doubled)"
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


def in_notebook() -> bool:
    """Return whether this program is the kernel of a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def shows_progress(wanted: bool = True) -> bool:
    """Return whether a progress bar is wanted, and seen: on a terminal or in a notebook."""
    return wanted and (is_terminal(sys.stderr) or in_notebook())


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream is a terminal; it is None where it is closed."""
    return stream is not None and stream.isatty()


@cache
def _warn_of_lost_lines(reason: str) -> None:
    log.warning("standard output: %s: lines are lost", reason)


def print_error(text: str) -> None:
    """Print a line to standard error at once; never an error, as a status follows that counts."""
    if sys.stderr is None:  # closed, and print would take standard output
        return
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
