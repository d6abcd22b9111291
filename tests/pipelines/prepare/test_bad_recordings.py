"""What of the recordings cannot be used is reported by name; the rest is packed."""

import os
import re
import shutil
import stat
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared import prepared, rejected
from sounds import bad_files, tone, write

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.sidecar import Sidecar
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare import pack
from ssast.pipelines.stream.stream import AudioStream

SPEC = FbankSpec(num_frames=200)


def awkward(folder: Path) -> dict[str, str]:
    """Bad files of every kind by name, with a pattern of the reason; and good ones beside them."""
    folder.mkdir()
    reasons = {path.name: "" for path in bad_files(folder)}
    reasons.pop("missing.wav")  # in a folder nothing is missing
    reasons.pop("folder.wav")
    del reasons["slow.wav"], reasons["loud.wav"]
    good = tone(20000)
    ogg = write(folder / "good.ogg", good).read_bytes()
    (folder / "half.ogg").write_bytes(ogg[: len(ogg) // 2])
    write(folder / "one.wav", good[:1], subtype="PCM_16")
    write(folder / "silent.wav", 0 * good, subtype="PCM_16")
    reasons |= {
        "dangling.wav": "cannot be read: No such file",
        "half.ogg": "truncated: ends in the middle of an Ogg page",
        "half.wav": "truncated",
        "half.flac": "cannot be decoded|truncated",
        "infinite.wav": "NaN or infinite",
        "nan.wav": "NaN or infinite",
        "one.wav": "too short: 0.000 s",
        "short.wav": "too short: 0.025 s",
        "silent.wav": "nothing but silence",
        "slow.wav": "states a sample rate of 10 Hz",
        "text.wav": "cannot be decoded: Format not recognised",
        "empty.wav": "empty file",
    }
    return reasons


def good_ones(folder: Path) -> dict[str, float]:
    """Unusual but good files by name, with their length in seconds."""
    write(folder / "eight.wav", np.stack([tone(24000, seed=k) for k in range(8)], 1) / 4, 16000)
    write(folder / "fine.wav", tone(96000, rate_hz=96000), 96000, subtype="PCM_24")
    write(folder / "cd.flac", tone(44100, rate_hz=44100), 44100)
    write(folder / "phone.wav", tone(8000, rate_hz=8000), 8000)
    write(folder / "\u00e4\u65e5\u672c.wav", tone(16000, seed=7))
    write(folder / f"{'long' * 60}.flac", tone(16000, seed=8))
    shutil.copy(folder / "phone.wav", os.fsencode(folder) + b"/\xff\xfe.wav")
    (folder / "loop").symlink_to(folder)
    (folder / "self.wav").symlink_to(folder / "self.wav")
    return {"eight.wav": 1.5, "fine.wav": 1.0, "cd.flac": 1.0, "phone.wav": 1.0} | {
        "\u00e4\u65e5\u672c.wav": 1.0,
        f"{'long' * 60}.flac": 1.0,
        "\udcff\udcfe.wav": 1.0,
    }


def test_bad_files_are_reported_by_name_and_the_rest_is_trained_on(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    reasons = awkward(folder)
    lengths = good_ones(folder)
    reasons["self.wav"] = "cannot be read: Too many levels of symbolic links"
    index = prepared(folder, out, Recipe(clip_s=10.0))
    found = rejected(out)
    assert set(found) == set(reasons)
    for name, pattern in reasons.items():
        assert re.search(pattern, found[name]), (name, found[name])
    clips = [c for s in sorted(out.glob("shards/*.jsonl")) for c in Sidecar.read(s).clips]
    durations = {clip["name"]: clip["duration_s"] for clip in clips}
    for name, length in lengths.items():
        assert durations[name] == pytest.approx(length, abs=1e-3), name
    with AudioStream(
        index, SPEC, batch_size=4, epochs=1, device=torch.device("cpu"), max_rejected=0.0
    ) as stream:
        batches = list(stream)
        assert not stream.rejected
    ids = torch.cat([batch.clip_ids[batch.valid] for batch in batches])
    assert ids.tolist() == list(range(len(index)))
    assert all(torch.isfinite(batch.fbank).all() for batch in batches)
    # The same batches come from a folder without the bad files: bit for bit.
    for name in reasons:
        (folder / name).unlink()
    again = prepared(folder, tmp_path / "clean", Recipe(clip_s=10.0))
    assert [clip.read() for clip in again] == [clip.read() for clip in index]


@pytest.mark.parametrize("labels", ["", ",dog"])
def test_listed_files_are_taken_whatever_their_suffix(tmp_path: Path, labels: str) -> None:
    """A list without labels names what to prepare as one with labels does."""
    for name in ("a.wav", "b.sound", "c"):
        write(tmp_path / name, tone(16000), format="WAV", subtype="PCM_16")
    (tmp_path / "d.doc").write_text("no sound")
    lines = [f"{name}{labels}\n" for name in ("a.wav", "b.sound", "c", "d.doc", "e.dat")]
    header = "wav,labels\n" if labels else "wav\n"
    (tmp_path / "list.csv").write_text(header + "".join(lines))
    index = prepared(tmp_path / "list.csv", tmp_path / "out")
    assert sorted(line["name"] for _, line in index.sidecar_lines()) == ["a.wav", "b.sound", "c"]
    assert set(rejected(tmp_path / "out")) == {"d.doc", "e.dat"}


def test_what_breaks_off_late_leaves_nothing(tmp_path: Path) -> None:
    """Clips of a recording that were packed before its damage are taken back, byte for byte."""
    (tmp_path / "in").mkdir()
    sound = tone(16000 * 40)  # more than a block
    for name in ("a", "c"):
        write(tmp_path / f"in/{name}.wav", sound[: 16000 * 2], subtype="PCM_16")
    without = prepared(tmp_path / "in", tmp_path / "without", shard_mib=9)
    sound[-1] = np.nan
    write(tmp_path / "in/b.wav", sound, subtype="FLOAT")
    index = prepared(tmp_path / "in", tmp_path / "out", shard_mib=9)
    assert rejected(tmp_path / "out") == {"b.wav": "holds NaN or infinite samples"}
    shard = "shards/00000.tar"
    assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "without" / shard).read_bytes()
    np.testing.assert_array_equal(index.table(), without.table())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission(source: Path, tmp_path: Path) -> None:
    (source / "a/0.wav").chmod(0)
    (source / "a/b").chmod(0)
    try:
        prepared(source, tmp_path / "out")
        found = rejected(tmp_path / "out")
        assert found["a/0.wav"] == "cannot be read: Permission denied"
        assert found["a/b"] == "Permission denied"
    finally:
        (source / "a/b").chmod(stat.S_IRWXU)


def test_a_file_deleted_midway(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pack.check_space

    def delete(*arguments: object) -> None:
        (source / "a/0.wav").unlink()
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pack, "check_space", delete)
    prepared(source, tmp_path / "out")
    assert rejected(tmp_path / "out") == {"a/0.wav": "cannot be read: No such file or directory"}


def member(name: str, data: bytes, size: int | None = None, **kind: object) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(data) if size is None else size
    for key, value in kind.items():
        setattr(header, key, value)
    return header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def test_archives_that_lie(tmp_path: Path) -> None:
    """Nothing is unpacked anywhere, every oddity is named, and what comes before it is used."""
    wav = write(tmp_path / "a.wav", tone(16000)).read_bytes()
    (tmp_path / "a.wav").unlink()
    folder = tmp_path / "in"
    folder.mkdir()
    link = member("link.wav", b"", linkname="/etc/passwd", type=tarfile.SYMTYPE)
    paths = member("../out.wav", wav) + member("/root.wav", wav) + member("x/../../y.wav", wav)
    end = bytes(1024)
    good = member("good.wav", wav)
    (folder / "names.tar").write_bytes(good + paths + link + member("b.txt", b"text") + good + end)
    (folder / "short.tar").write_bytes(good + member("small.wav", wav, 1000) + good + end)
    (folder / "long.tar").write_bytes(good + member("large.wav", wav, 10**9) + good + end)
    (folder / "cut.tar").write_bytes((good + good)[: len(good) + 1000])
    (folder / "empty.tar").write_bytes(b"")
    (folder / "text.tar").write_bytes(b"text" * 1000)
    index = prepared(folder, tmp_path / "out")
    expected = {
        "names.tar/../out.wav": "its path leads out of the archive",
        "names.tar//root.wav": "its path leads out of the archive",
        "names.tar/x/../../y.wav": "its path leads out of the archive",
        "names.tar/link.wav": "a link, a device or sparse, not an ordinary member",
        "short.tar/small.wav": "truncated: 956 of 32000 bytes of samples",
        "short.tar": "damaged archive: no header at byte",
        "long.tar/large.wav": "truncated: the archive ends after",
        "long.tar": "damaged archive",
        "cut.tar/good.wav#2": "truncated: the archive ends after",
        "cut.tar": "damaged archive",
        "empty.tar": "damaged archive",
        "text.tar": "damaged archive",
    }
    found = rejected(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(found[name].startswith(why) for name, why in expected.items()), found
    assert len(index) == 5  # good.wav, twice in names.tar
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
@pytest.mark.parametrize("alone", [True, False])
def test_compressed_archives_are_refused(tmp_path: Path, name: str, alone: bool) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / name, "w:gz") as archive:
        archive.add(write(tmp_path / "a.wav", tone(16000)))
    source = tmp_path / "in" / name if alone else tmp_path / "in"
    with pytest.raises(DataError, match=f"{name}: a compressed archive .* unpack it"):
        prepared(source, tmp_path / "out")


FFMPEG = """#!{python}
import sys
import numpy as np
url = sys.argv[sys.argv.index("-i") + 1]
start, end, path = 0, None, url.removeprefix("file:")
if url.startswith("subfile,"):
    _, _, _, start, _, end, _, path = url.split(",", 7)
    path = path.removeprefix(":")
data = open(path, "rb").read()[int(start) : end and int(end)]
if not data.startswith(b"m4a"):
    sys.exit("[in @ 0x1234] Invalid data found when processing input")
tone = np.frombuffer(data[4:], "<f4")
out = sys.stdout.buffer
out.write(b".snd" + np.array([32, 2**32 - 1, 6, 48000, 2], ">u4").tobytes() + bytes(8))
out.write(np.stack([tone, tone / 2], 1).astype(">f4").tobytes())
sys.exit(data[3] and "broke off")
"""


def test_ffmpeg_reads_what_libsndfile_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    sound = tone(2 * 48000, rate_hz=48000).astype("<f4")
    (folder / "good.m4a").write_bytes(b"m4a\0" + sound.tobytes())
    (folder / "renamed.wav").write_bytes(b"m4a\0" + sound.tobytes())
    (folder / "broken.webm").write_bytes(b"m4a\1" + sound.tobytes())
    (folder / "text.wma").write_bytes(b"text")
    (folder / "text.wav").write_bytes(b"text")
    with tarfile.open(folder / "t.tar", "w") as archive:
        archive.add(folder / "good.m4a", "a.m4a")
    write(folder / "mean.wav", sound * 0.75, 48000, subtype="FLOAT")
    monkeypatch.setenv("PATH", "/nowhere")
    index = prepared(folder, tmp_path / "out")
    assert len(index) == 2
    advice = "libsndfile cannot decode it: install ffmpeg to read this format"
    unrecognised = "cannot be decoded: Format not recognised"
    files = ("broken.webm", "good.m4a", "t.tar/a.m4a", "text.wma")
    expected = dict.fromkeys(files, advice)
    assert rejected(tmp_path / "out") == expected | {
        "renamed.wav": unrecognised,
        "text.wav": unrecognised,
    }
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/ffmpeg"
    program.write_text(FFMPEG.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    for shard in (tmp_path / "out/shards").glob("*.jsonl"):  # renamed.wav is not tried again
        shard.unlink()
    index = prepared(folder, tmp_path / "out")
    assert rejected(tmp_path / "out") == {
        "broken.webm": "cannot be decoded by ffmpeg: broke off",
        "text.wav": unrecognised,
        "text.wma": "cannot be decoded by ffmpeg: Invalid data found when processing input",
    }
    clips = [c for s in (tmp_path / "out/shards").glob("*.jsonl") for c in Sidecar.read(s).clips]
    digests: dict[str, set[str]] = {str(part): set() for part in range(2)}
    for clip in clips:
        digests[str(clip["part"])].add(clip["digest"])
    assert len(index) == len(clips) == 8 and all(len(found) == 1 for found in digests.values())
