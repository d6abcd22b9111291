"""Recordings in archives of our own making."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssast.pipelines.demo.archives import members, queen_members, wad_members
from ssast.pipelines.errors import DataError


def mp3() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, 22050)
    soundfile.write(buffer, noise, 22050, format="MP3", subtype="MPEG_LAYER_III")
    return buffer.getvalue()


def queen_archive() -> bytes:
    members = {"JOE1.SB": mp3(), "PIC.LBM": b"picture", "A_B.SB": mp3()}
    place, table, data = 15 + 21 * len(members) + 2, b"", b""
    for name, content in members.items():
        entry = struct.pack(">12sBII", name.encode(), 1, place + len(data), len(content))
        table += entry
        data += content
    return b"QTBLCEM10\0\0\0\1\1\2" + table + b"\x01\xff" + data


def test_queen_archive() -> None:
    found = dict(queen_members(queen_archive()))
    assert list(found) == ["JOE1.SB", "A_B.SB"]
    assert soundfile.info(io.BytesIO(found["A_B.SB"])).samplerate == 22050
    assert list(queen_members(b"QTBLCEM10")) == []


def wad_archive(samples: bytes) -> bytes:
    sound = struct.pack("<HHI", 3, 11025, len(samples) + 32) + bytes(16) + samples + bytes(16)
    lumps = {"MAP01": b"map", "DSPISTOL": sound, "DSEMPTY": sound[:8], "DPPISTOL": b"\0" * 99}
    table, data = b"", b""
    for name, content in lumps.items():
        table += struct.pack("<II8s", 12 + len(data), len(content), name.encode())
        data += content
    return b"PWAD" + struct.pack("<II", len(lumps), 12 + len(data)) + data + table


def test_wad_archive() -> None:
    samples = bytes(range(0, 256, 2))
    [(name, wav)] = wad_members(wad_archive(samples))
    decoded, rate_hz = soundfile.read(io.BytesIO(wav))
    assert (name, rate_hz) == ("DSPISTOL", 11025)
    np.testing.assert_array_equal(128 + 128 * decoded, list(samples))


def test_zip_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pak0.pk3", "w") as archive:
        archive.writestr("sound/steps.MP3", mp3())
        archive.writestr("maps/a.bsp", b"map")
    assert list(members(tmp_path / "pak0.pk3")) == [("sound/steps.MP3", mp3())]


@pytest.mark.parametrize("name", ["pak0.pk3", "doom.wad"])
def test_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(DataError, match=f"{name}: damaged archive"):
        list(members(tmp_path / name))
