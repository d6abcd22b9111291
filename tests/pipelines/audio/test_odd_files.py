"""Odd but whole files: damaged chunks never cost the sound, and the table in the docs is true."""

import io
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lengths import SAMPLES, sound
from odd_files import ROWS, damaged_files, damaged_flac, damaged_tags, some_odd_files
from paths import ROOT

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.decode import Item, length_note, read_blocks
from ssast.pipelines.audio.encoded import read_clip

SPEC = FbankSpec(num_frames=120)
KINDS = [
    *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("AIFF", "PCM_16"), ("AIFF", "FLOAT")),
    *(("CAF", "PCM_16"), ("RF64", "PCM_16")),
]


def wrong(files: Iterator[tuple[str, bytes]], path: Path) -> dict[str, str]:
    """Read files as ``prepare`` and as training do: names of those that are not :func:`sound`."""
    found, want = {}, sound()
    for number, (name, data) in enumerate(files):
        try:
            if number % 2:
                path.write_bytes(data)
                clip = io.BytesIO(read_clip(path, SPEC))
                got = soundfile.read(clip, dtype="float32")[0]
            else:
                got = np.concatenate([block for block, _ in read_blocks(Item(name, data))])
            if name.endswith("mp3"):
                assert 0 <= len(got) - SAMPLES <= 2304, len(got)
            else:
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
        except Exception as error:
            found[name] = repr(error)
    return found


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_damaged_chunks_never_cost_the_sound(kind: str, subtype: str, tmp_path: Path) -> None:
    assert wrong(damaged_files(kind, subtype), tmp_path / "a") == {}


def test_damaged_metadata_never_costs_the_sound(tmp_path: Path) -> None:
    assert wrong(damaged_flac(), tmp_path / "a") == {}
    assert wrong(damaged_tags(), tmp_path / "a") == {}


def test_texts_that_name_chunks_are_none(tmp_path: Path) -> None:
    """Behind a lie about its size, the samples are found by their name: not in a text."""
    (_, whole), *_ = damaged_files("WAV")
    text = b"LIST\xff\xff\xff\xff" + b"INFOICMT fmt data of data fmt data and metadata\0"
    files = [("a.wav", whole[:12] + text + whole[12:]), ("b.wav", whole[:36] + text + whole[36:])]
    assert wrong(iter(files * 2), tmp_path / "a") == {}


def test_the_table_in_the_docs_is_true() -> None:
    """Each kind stands there, each file is of one kind, and those that are named are."""
    rows = re.findall(r"^\| (.+?) \| (yes|no) \|$", (ROOT / "docs/odd-files.md").read_text(), re.M)
    assert rows == [(kind, named) for kind, _, named in ROWS]
    files, seen = some_odd_files(), set()
    for kind, patterns, named in ROWS:
        names = {name for name in files if any(fnmatch(name, p) for p in patterns)}
        names -= seen
        assert names, kind
        seen |= names
        noted = {name for name in names if length_note(Item(name, files[name])) is not None}
        assert noted == (names if named == "yes" else set()), kind
    ordinary = {name for name in files if "_right" in name or name.startswith("MP3_with")}
    assert set(files) - seen == ordinary
