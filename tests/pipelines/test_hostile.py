"""Hostile and strange files among recordings, archives, manifests and prepared folders."""

import contextlib
import itertools
import os
import shutil
import socket
import struct
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from prepared import prepared, rejected
from sounds import tone, write

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.decode import Item, read_blocks, reader, sndfile_blocks
from ssast.pipelines.audio.encoded import read_clip
from ssast.pipelines.audio.lengths import examine
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.members import LONGEST_HEADER
from ssast.pipelines.clips.shards import INDEX, REPORT, ShardIndex
from ssast.pipelines.errors import DataError, UnusableError
from ssast.pipelines.files import open_regular
from ssast.pipelines.prepare.recordings import Recording, tar_recordings
from ssast.pipelines.text import read_text

SPEC = FbankSpec(num_frames=48)


def in_time(action: Callable[[], object], limit_s: float = 10) -> object:
    """What an action returns or raises; it must not hang."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(action())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    assert found, "it hangs"
    return found[0]


def strange(folder: Path) -> dict[str, Path]:
    """What is no file with an end, under the names of sounds."""
    folder.mkdir()
    os.mkfifo(folder / "pipe.wav")
    (folder / "folder.wav").mkdir()
    (folder / "zeros.wav").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 107 bytes
        server.bind("socket.wav")
        os.chdir(here)
    (folder / "nowhere.wav").symlink_to(folder / "gone")
    (folder / "self.wav").symlink_to(folder / "self.wav")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["pipe", "folder", "zeros", "socket", "nowhere", "self"])
def test_what_is_no_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    path = strange(tmp_path / "in")[name]
    for read in (
        lambda: read_clip(str(path), SPEC),
        lambda: list(read_blocks(Item(path.name, path))),
        lambda: read_text(path),
        lambda: open_regular(path),
    ):
        assert isinstance(in_time(read), (DataError, UnusableError, OSError))
    write(tmp_path / "in/good.wav", tone(16000))
    in_time(lambda: prepared(tmp_path / "in", tmp_path / "out"))
    assert f"{name}.wav" in rejected(tmp_path / "out") or name == "folder"


def test_pipes_in_other_places(tmp_path: Path) -> None:
    """As an archive, a manifest, a shard and the files of a prepared folder."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/good.wav", tone(16000))
    os.mkfifo(tmp_path / "in/a.tar")
    index = in_time(lambda: prepared(tmp_path / "in", tmp_path / "out"))
    assert isinstance(index, ShardIndex)
    assert rejected(tmp_path / "out") == {"a.tar": "cannot be read: not a regular file"}
    for name in ("m.json", "m.csv"):
        os.mkfifo(tmp_path / name)
        found = in_time(lambda name=name: read_manifest(tmp_path / name))  # type: ignore[misc]
        assert isinstance(found, DataError) and "not a regular file" in str(found)
    shard = Path(index[0].path)
    for path in (
        shard,
        shard.with_suffix(".jsonl"),
        *(tmp_path / "out" / n for n in (REPORT, INDEX)),
    ):
        path.unlink()
        os.mkfifo(path)
    assert "not a regular file" in str(in_time(lambda: read_clip(index[0], SPEC)))
    assert "not a regular file" in str(in_time(index.overlapping))
    assert "not a regular file" in str(in_time(lambda: ShardIndex(tmp_path / "out")))


def wav(channels: int = 1, rate_hz: int = 16000, size: int | None = None, bits: int = 16) -> bytes:
    data = bytes(range(256)) * 40
    block = channels * bits // 8
    fields = (1, channels, rate_hz, rate_hz * block % 2**32, block % 2**16, bits)
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, *fields)
    head += b"data" + struct.pack("<I", len(data) if size is None else size)
    return b"RIFF" + struct.pack("<I", len(head) + len(data)) + head + data


CLAIMS = {
    "65535 channels": wav(channels=65535),
    "0 channels": wav(channels=0),
    "0 Hz": wav(rate_hz=0),
    "4 GHz": wav(rate_hz=2**32 - 1),
    "0 bits": wav(bits=0),
    "65535 bits": wav(bits=65535),
    "1 GiB of samples": wav(size=0x40000000),
    "a chunk without end": b"RIFF\0\0\0\0WAVEjunk\xff\xff\xff\xff" + bytes(100),
    "W64 chunk": b"riff\x2e\x91\xcf\x11" + bytes(32) + b"junk" + bytes(12) + b"\xff" * 7 + b"\x7f",
    "CAF chunk": b"caff\0\1\0\0desc" + struct.pack(">Q", 2**63 - 1) + bytes(64),
    "ID3 tag": b"ID3\4\0\0\x7f\x7f\x7f\x7f" + bytes(100),
    "FLAC metadata": b"fLaC\x04\xff\xff\xff" + bytes(100),
    "AU header": b".snd" + struct.pack(">5I", 2**32 - 1, 2**32 - 1, 3, 16000, 2**32 - 1),
    "AIFF rate": b"FORM\0\0\0\x40AIFFCOMM\0\0\0\x12\0\1\xff\xff\xff\xff\0\x10\x7f\xff"
    + b"\xff" * 20,
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_claims_of_headers(kind: str, tmp_path: Path) -> None:
    """Refused, whatever they claim, as a clip and as a recording."""
    path = tmp_path / "a.wav"
    path.write_bytes(CLAIMS[kind])
    with pytest.raises(DataError):
        read_clip(str(path), SPEC)
    with pytest.raises(UnusableError):
        list(read_blocks(Item(path.name, path)))


@pytest.mark.parametrize("format", ["WAV", "W64", "CAF", "AIFF", "AU", "FLAC", "RF64", "MP3"])
def test_sizes_of_chunks_lead_nowhere(format: str, tmp_path: Path) -> None:
    """Any eight bytes of a header may state a size; no exception of Python's comes out."""
    path = tmp_path / "a.wav"
    data = write(path, tone(2000), format=format).read_bytes()
    with open(path, "r+b") as file:
        number = file.fileno()
        for at, value in itertools.product(range(120), (0x7FFFFFFF, 2**63 - 1, 2**64 - 1)):
            for order in ("<Q", ">Q"):
                os.pwrite(number, struct.pack(order, value), at)
                with contextlib.suppress(DataError):
                    examine(reader(number, 0, len(data)), len(data))
            os.pwrite(number, data[at : at + 8], at)


def test_nothing_beside_a_recording_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resource fork, which macOS leaves in archives: libsndfile reads a format out of it."""
    fork = tmp_path / "source/a.wav"
    fork.parent.mkdir()
    soundfile.write(fork, tone(4000), 16000, format="SD2")
    (resource,) = (path for path in fork.parent.iterdir() if path != fork)
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "good.wav", tone(4000))
    for name in ("a.wav", "b.sd2", "c.vox", "d.gsm"):
        shutil.copy(fork, folder / name)
        shutil.copy(resource, folder / f"._{name}")
    shutil.copy(resource, tmp_path / "._")  # what a file in memory is taken for
    monkeypatch.chdir(tmp_path)
    assert soundfile.info(folder / "a.wav").format == "SD2"
    for name in ("a.wav", "b.sd2", "c.vox", "d.gsm"):
        data = (folder / name).read_bytes()
        for content in (folder / name, data):
            with pytest.raises(UnusableError, match="cannot be decoded: Format not recognised"):
                list(sndfile_blocks(Item(name, content)))
        with pytest.raises(DataError, match="cannot be decoded: Format not recognised"):
            read_clip(str(folder / name), SPEC)
    assert len(read_clip(str(folder / "good.wav"), SPEC))


@pytest.mark.parametrize("change", ["grows", "shrinks", "is emptied"])
def test_a_recording_that_changes_while_it_is_read(change: str, tmp_path: Path) -> None:
    sound = tone(3 * 2**19)
    path = write(tmp_path / "a.wav", sound, subtype="FLOAT")
    blocks = sndfile_blocks(Item("a.wav", path))
    first, _ = next(blocks)
    if change == "grows":
        with open(path, "ab") as file:
            file.write(bytes(2**20))
        rest = [block for block, _ in blocks]
        assert np.concatenate([first, *rest])[:, 0].tobytes() == sound.tobytes()
        return
    os.truncate(path, 2**20 if change == "shrinks" else 0)
    with pytest.raises(UnusableError, match="truncated"):
        list(blocks)


def member(name: str, data: bytes = b"", **fields: object) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for key, value in fields.items():
        setattr(header, key, value)
    return header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def tar_of(tmp_path: Path, data: bytes) -> list[Recording]:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    found = in_time(lambda: list(tar_recordings("a.tar", path)))
    assert isinstance(found, list), found
    return found


@pytest.mark.parametrize(
    "kind",
    [
        *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
        tarfile.GNUTYPE_SPARSE,
    ],
)
def test_members_that_are_no_files(kind: bytes, tmp_path: Path) -> None:
    """Links out of the archive, devices and pipes, which nobody opens or makes."""
    data = member("a.wav", type=kind, linkname="/etc/passwd", devmajor=1, devminor=5)
    (found,) = tar_of(tmp_path, data + bytes(1024))
    assert found.problem == "a link, a device or sparse, not an ordinary member"


def test_members_that_never_end(tmp_path: Path) -> None:
    good = member("good.wav", wav())
    for size in (-1, -512, -1024, -(2**40)):
        found = tar_of(tmp_path, good + member("a.wav", size=size) + bytes(1024))
        assert [f.problem is None for f in found] == [True, False] and len(found) == 2
    found = tar_of(tmp_path, good + member("a.wav", size=2**62) + bytes(1024))
    assert found[1].problem is not None and "the archive ends after" in found[1].problem


def test_headers_of_archives_that_are_too_long(tmp_path: Path) -> None:
    """Names of gigabytes, a number of a million digits, names of names of names."""
    name = b"x" * 200 + b".wav\0"
    whole = member("././@LongLink", name, type=b"L") + member("a.wav", wav()) + bytes(1024)
    assert tar_of(tmp_path, whole)[0].item.name == f"a.tar/{'x' * 200}.wav"
    for size in (LONGEST_HEADER + 1, 2**31, 2**40, -5):
        long = member("././@LongLink", name, type=b"L")[:512]
        header = tarfile.TarInfo.frombuf(long, "utf-8", "strict")
        header.size = size
        data = header.tobuf(tarfile.GNU_FORMAT) + name + bytes(2 * LONGEST_HEADER)
        assert all(f.problem is not None for f in tar_of(tmp_path, data + whole)[:1])
    digits = member("././@PaxHeader", b"1" * 2**20, type=b"x")
    tar_of(tmp_path, digits + whole)
    chain = member("././@LongLink", name, type=b"L") * 3000
    assert "damaged archive" in str(tar_of(tmp_path, chain + whole)[-1].problem)
