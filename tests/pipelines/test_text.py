"""Text of users: encodings, CSV, JSON lines, and what is shown."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from names import AWKWARD, TEXTS

from ssast.pipelines.errors import DataError
from ssast.pipelines.text import (
    LONGEST_CELL,
    csv_rows,
    json_line,
    markdown,
    printable,
    read_text,
    say,
)

TEXT = "wav,label\r\ncaf\u00e9.wav,\U0001f600\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "t") == TEXT


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-32-be"])
def test_big_endian_by_its_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t").write_bytes(("\ufeff" + TEXT).encode(encoding))
    assert read_text(tmp_path / "t") == TEXT


BAD = {
    b"a\nb\xe9c": "t: not UTF-8 text: byte 3",
    b"\xef\xbb\xbfa\xe9": "t: not UTF-8 text: byte",
    b"\xff\xfea": "t: not UTF-16 text: byte",
    b"\xff\xfe\0\0a": "t: not UTF-32 text: byte",
    "a\nb".encode("utf-16-le"): "t: line 1: a NUL character, expected text: save UTF-16 as UTF-8",
    b"a\n\0": "t: line 2: a NUL character",
}


@pytest.mark.parametrize("data", BAD)
def test_what_is_no_text(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_text(tmp_path / "t")
    assert BAD[data] in str(caught.value)


def test_rows_and_their_lines() -> None:
    text = 'a,b\r\n\n"x\ny","""q"""\r1,2\n \nlast,'
    rows = [(1, ["a", "b"]), (3, ["x\ny", '"q"']), (5, ["1", "2"]), (7, ["last", ""])]
    assert list(csv_rows(text, "t")) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a\nb\n"c\nd\n', "t.csv: line 3: not CSV: a quote that begins here is not closed"),
        ('a\n"b\n' + "c\n" * 100_000, "t.csv: line 2: not CSV: a quote that begins here is not"),
        ('a\n"b\nc\n"d"\n', "t.csv: line 2: not CSV: expected a comma after a closing quote"),
        ('a\n"b"c\n', "t.csv: line 2: not CSV: expected a comma after a closing quote"),
    ],
)
def test_quotes_that_are_not_closed(text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(csv_rows(text, "t.csv"))
    assert message in str(caught.value)


def test_long_cells() -> None:
    """Python refuses those of more than 131,072 characters, unless it is told otherwise."""
    rows = [(1, ["a", "x" * 300_000]), (2, ["b", "y\n" * 100_000])]
    assert list(csv_rows(f'a,{"x" * 300_000}\nb,"{rows[1][1][1]}"\n', "t.csv")) == rows
    with pytest.raises(DataError, match="line 2: not CSV: a quote that is not closed, or a cell"):
        list(csv_rows(f"a\n{'x' * (LONGEST_CELL + 1)}\n", "t.csv"))


@given(TEXTS)
def test_json_lines_are_utf8_and_give_the_text_back(text: str) -> None:
    line = json_line({"path": text})
    assert json.loads(line.decode()) == {"path": text}
    assert line.count(b"\n") == 1


@given(TEXTS)
def test_what_is_shown_is_one_line_that_can_be_written(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert len(shown.splitlines()) <= 1 and "\x1b" not in shown
    assert shown == text or not text.isprintable()


def test_what_is_shown() -> None:
    assert printable("caf\u00e9 \u05d0 e\u0301 \u00a0.wav") == "caf\u00e9 \u05d0 e\u0301 \u00a0.wav"
    assert printable("a\udce9\n\x1b[31m") == r"a\udce9\n\x1b[31m"
    assert printable(Path("a\tb")) == r"a\tb"


def test_markdown() -> None:
    assert markdown("runs/base_patch") == "runs/base_patch"
    assert markdown("_a|b`c*\n_d_") == r"\_a\|b\`c\*\\n_d\_"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_print_never_raises(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding))
    for name in AWKWARD:
        say(name)
    sys.stdout.flush()
    assert out.getvalue().decode(encoding).count("x" * 200) == 1


def test_print_outlives_a_full_disk() -> None:
    code = "from ssast.pipelines.text import print_error, say; say('a'); say('b'); print_error('c')"
    command = [sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=True)
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full, check=True)
    lost = b"standard output: [Errno 28] No space left on device: lines are lost\n"
    assert done.stderr == lost + b"c\n"


def test_the_command_prints_any_name_to_any_terminal(tmp_path: Path) -> None:
    for name in ("a\udce9\n.wav", "\U0001f600.wav"):
        (tmp_path / name).write_bytes(b"no sound")
    command = [sys.executable, "-m", "ssast.engine.cli", "data", "check", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1, done.stderr.decode()
    lines = done.stdout.decode("ascii").splitlines()
    assert len(lines) == 3 and r"a\udce9\n.wav: " in lines[1] and r"\U0001f600.wav" in lines[2]
