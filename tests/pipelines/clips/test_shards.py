"""Recordings to shards and back: bytes, resumption, bad input of every kind, training on them."""

import io
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import textwrap
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from runs import call, overrides, write_config
from sounds import bestiary, tone, write

from ssast.engine.config import Config
from ssast.engine.data.clips import find_clips
from ssast.engine.settings import Data
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.convert import Recipe, convert
from ssast.pipelines.audio.decode import Item
from ssast.pipelines.audio.encoded import read_clip
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.clips.shards import ShardIndex, Sidecar
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare import pack
from ssast.pipelines.prepare.pack import Packing, prepare_shards
from ssast.pipelines.stream.stream import AudioStream

SPEC = FbankSpec(num_frames=200)
RECIPE = Recipe(clip_s=1.0, whole=True)


def prepared(source: Path, out: Path, recipe: Recipe = RECIPE, **settings: object) -> ShardIndex:
    packing = Packing(recipe, **{"shard_mib": 0.1, **settings})  # type: ignore[arg-type]
    prepare_shards(source, out, packing, jobs=2, progress=False, log=lambda line: None)
    index = read_manifest(out).paths
    assert isinstance(index, ShardIndex)
    return index


def rejected(out: Path) -> dict[str, str]:
    lines = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    return {line["name"]: line["reason"] for line in lines}


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


def samples_of(data: bytes) -> np.ndarray:
    samples, rate_hz = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate_hz == 16000 and samples.ndim == 1
    return samples


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Recordings of 0.5 to 3 s at several rates, in folders and in an archive."""
    folder = tmp_path / "in"
    (folder / "a/b").mkdir(parents=True)
    for k in range(8):
        rate_hz = (16000, 44100, 8000)[k % 3]
        sound = tone(rate_hz * (k + 1) // 3 + 16 * k, seed=k, rate_hz=rate_hz)
        write(folder / ("a", "a/b")[k % 2] / f"{k}.{('wav', 'flac', 'ogg')[k % 3]}", sound, rate_hz)
    with tarfile.open(folder / "more.tar", "w") as archive:
        for path in sorted((folder / "a").glob("*.*")):
            archive.add(path, f"inside/{path.name}")
    return folder


@pytest.mark.parametrize("codec", ["flac", "wav"])
def test_round_trip_is_bit_exact(source: Path, tmp_path: Path, codec: str) -> None:
    """The same samples as loose files hold; the members that tarfile and the index see agree."""
    index = prepared(source, tmp_path / "out", codec=codec)
    (tmp_path / "loose/flac").mkdir(parents=True)
    expected: dict[str, list[np.ndarray]] = {}
    for path in sorted(source.rglob("*.*")):
        if path.suffix != ".tar":
            name = str(path.relative_to(source))
            clips = convert(Item(name, path), tmp_path / "loose", RECIPE)
            files = [(tmp_path / "loose" / clip.file).read_bytes() for clip in clips]
            expected[name] = [samples_of(data) for data in files]
            if path.parent == source / "a":  # in the archive as well
                expected[f"more.tar/inside/{path.name}"] = expected[name]
    found: dict[str, list[np.ndarray]] = {name: [] for name in expected}
    members: list[tuple[str, bytes]] = []
    shards = sorted((tmp_path / "out/shards").glob("*.tar"))
    assert len(shards) > 3
    for shard in shards:
        for line in Sidecar.read(shard.with_suffix(".jsonl")).clips:
            data = shard.read_bytes()[line["offset"] : line["offset"] + line["size"]]
            found[line["name"]].append(samples_of(data))
            assert line["part"] == len(found[line["name"]]) - 1
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None and (member.mtime, member.uid, member.mode) == (0, 0, 0o644)
                assert member.name.isascii() and len(member.name) <= 100
                members.append((f"{shard}: {member.name}", file.read()))
    for name, parts in expected.items():
        for got, wanted in zip(found[name], parts, strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert [str(clip) for clip in index] == [name for name, _ in members]
    for clip, (_, data) in zip(index, members, strict=True):
        assert read_clip(clip, SPEC).tobytes() == data == clip.read()
        decoded, _ = soundfile.read(io.BytesIO(read_clip(clip, SPEC, trust=False).tobytes()))
        np.testing.assert_array_equal(decoded * 2**15, samples_of(data))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["clips"] == len(members) == len(index)
    assert report["source_rates_hz"] == {"8000": 3, "16000": 5, "44100": 4}
    assert report["duplicates"] == sum(len(v) for k, v in expected.items() if "tar" in k)


def test_the_index_is_a_sequence(source: Path, tmp_path: Path) -> None:
    index = prepared(source, tmp_path / "out")
    every = list(index)
    rows = np.array([5, 0, 3])
    assert list(index.subset(rows)) == [every[5], every[0], every[3]]
    assert list(index.subset(rows).subset(np.array([2]))) == [every[3]]
    assert list(index[2:4]) == every[2:4] and index[-1] == every[-1]
    with pytest.raises(IndexError):
        index[len(index)]
    assert index.fingerprint() != index[1:].fingerprint()
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert ShardIndex(Path(moved)).fingerprint() == index.fingerprint()


def test_overlapping_clips(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    sound = tone(40000)
    write(tmp_path / "in/a.wav", sound, subtype="FLOAT")
    index = prepared(tmp_path / "in", tmp_path / "out", Recipe(clip_s=1.0, hop_s=0.5))
    whole = np.rint(sound * np.float32(32767)).astype(np.int16)
    starts = [0, 8000, 16000, 24000]
    for clip, start in zip(index, starts, strict=True):
        np.testing.assert_array_equal(samples_of(clip.read()), whole[start : start + 16000])


def test_a_shard_that_changed_is_named(source: Path, tmp_path: Path) -> None:
    index = prepared(source, tmp_path / "out")
    clip = index[len(index) - 1]
    name = str(clip)
    shard = Path(clip.path)
    data = shard.read_bytes()
    shard.write_bytes(data[: clip.offset + 100])
    with pytest.raises(DataError) as caught:
        read_clip(clip, SPEC)
    assert f"{name}: the shard is truncated" in str(caught.value)
    shard.write_bytes(os.urandom(len(data)))  # the sidecar still knows the name
    with pytest.raises(DataError) as caught:
        read_clip(clip, SPEC)
    assert f"{name}: the shard was overwritten" in str(caught.value)
    shard.unlink()
    with pytest.raises(DataError, match="No such file"):
        read_clip(clip, SPEC)
    assert str(clip) == name


def test_labels_are_kept(source: Path, tmp_path: Path) -> None:
    files = sorted(str(path) for path in source.rglob("*.*") if path.suffix != ".tar")
    labels = [("dog", "bark") if k % 2 else ("cat",) for k in range(len(files))]
    write_manifest(tmp_path / "m.json", [*files, "gone.wav"], [*labels, ("cat",)])
    manifest = read_manifest(tmp_path / "m.json")
    prepared(tmp_path / "m.json", tmp_path / "out")
    found = read_manifest(tmp_path / "out")
    assert manifest.labels and found.labels and len(found.labels) == len(found.paths)
    of_name = {os.path.relpath(f, tmp_path): names for f, names in zip(files, labels, strict=True)}
    clips = [c for s in sorted(tmp_path.glob("out/shards/*.jsonl")) for c in Sidecar.read(s).clips]
    assert [of_name[clip["name"]] for clip in clips] == list(found.labels)
    names = json.loads((tmp_path / "out/labels.json").read_text())["names"]
    assert names == ["bark", "cat", "dog"]
    assert rejected(tmp_path / "out") == {"gone.wav": "cannot be read: No such file or directory"}


def test_clips_of_a_recording_are_held_out_together(source: Path, tmp_path: Path) -> None:
    index = prepared(source, tmp_path / "out")
    config = Config(data=Data(train=str(tmp_path / "out"), valid_share=0.2))
    train, valid = find_clips(config)
    assert isinstance(train, ShardIndex) and isinstance(valid, ShardIndex)
    assert sorted(map(str, [*train, *valid])) == sorted(map(str, index))
    assert not set(train.recordings()) & set(valid.recordings())
    assert len(valid) >= round(0.2 * len(index))


def test_what_is_done_is_not_done_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    made: list[int] = []
    real = pack.make_shard
    monkeypatch.setattr(pack, "make_shard", lambda n, *rest: (made.append(n), real(n, *rest))[1])
    index = prepared(source, out)
    count, whole = len(made), tree(out)
    made.clear()
    prepared(source, out)
    assert (made, tree(out)) == ([], whole)
    (out / "shards/00001.jsonl").unlink()
    (out / "shards/00002.tar").write_bytes(b"another size")
    prepared(source, out)
    assert (sorted(made), tree(out)) == ([1, 2], whole)
    made.clear()
    fewer = prepared(source, out, drop_duplicates=True)  # of the index alone
    report = json.loads((out / "report.json").read_text())
    assert made == [] and len(fewer) == len(index) - report["duplicates"] < len(index)
    prepared(source, out, Recipe(clip_s=2.0))
    assert len(made) == count
    made.clear()
    os.utime(source / "a/0.wav")
    prepared(source, out, Recipe(clip_s=2.0))
    assert made == [0]


PROGRAM = textwrap.dedent(
    """
    import itertools, os, signal, sys, time
    from pathlib import Path
    from ssast.pipelines.audio.convert import Recipe
    from ssast.pipelines.prepare.pack import Packing, prepare_shards

    def run(source, out):
        packing = Packing(Recipe(clip_s=1.0, whole=True), shard_mib=0.5, drop_duplicates=True)
        prepare_shards(
            Path(source), Path(out), packing, jobs=2, progress=False, log=lambda line: None
        )

    def die_at(moment, after):
        # That call, of those that make a file last, appear or vanish, kills the process.
        moments = itertools.count()

        def deadly(call):
            def called(*args, **settings):
                here = next(moments) == moment
                if here and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return call(*args, **settings)
                finally:
                    if here:
                        os.kill(os.getpid(), signal.SIGKILL)
            return called

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))

    def in_child(work):
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        return child

    def calls_of(source, out):
        # Killed at each in turn, before it or after it, until there are no more.
        for moment in itertools.count():
            here = f"{out}{moment}"
            child = in_child(lambda: (die_at(moment, moment % 2), run(source, here)))
            if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                return moment
            run(source, here)

    source, out, *waits = sys.argv[1:]
    if waits == ["calls"]:
        print(calls_of(source, out), 0.0)
        raise SystemExit
    killed = 0
    for wait in waits:
        child = in_child(lambda: run(source, out))
        time.sleep(float(wait))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    start = time.perf_counter()
    run(source, out)
    print(killed, time.perf_counter() - start)
    """
)


def interrupted(source: Path, out: Path, *waits: object) -> tuple[int, float]:
    """How often preparing was killed before it was through, and the seconds of its last run."""
    arguments = [sys.executable, "-c", PROGRAM, str(source), str(out), *map(str, waits)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    count, seconds = done.stdout.split()
    return int(count), float(seconds)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    """Killed 20 times at random moments, each run goes on; so does one that is killed at once."""
    rng, moments = np.random.default_rng(0), random.Random(0)
    (tmp_path / "in").mkdir()
    for n in range(60):
        sound = rng.uniform(-0.5, 0.5, (int(44100 * rng.uniform(0.5, 5)), 2))
        write(tmp_path / f"in/{n % 50:03d}{'' if n < 50 else 'x'}.wav", sound, 44100)
    (tmp_path / "in/bad.wav").write_bytes(b"no sound")
    _, seconds = interrupted(tmp_path / "in", tmp_path / "whole")
    killed = 0
    for round_ in range(4):
        out = tmp_path / f"killed{round_}"
        waits = (seconds * moments.uniform(0.01, 0.3) for _ in range(5))
        killed += interrupted(tmp_path / "in", out, *waits)[0]
        assert tree(out) == tree(tmp_path / "whole")
    assert killed >= 10  # the others were through before


@pytest.mark.slow
def test_killed_at_each_call_that_finishes_a_file(tmp_path: Path) -> None:
    """Before or after each fsync, rename and removal: shards, sidecars, index, lists, report."""
    (tmp_path / "in").mkdir()
    for n in range(7):
        write(tmp_path / f"in/{n}.wav", tone(66150, seed=n % 4, rate_hz=44100), 44100)
    interrupted(tmp_path / "in", tmp_path / "whole")
    moments, _ = interrupted(tmp_path / "in", tmp_path / "killed", "calls")
    assert moments >= 20
    for moment in range(moments):
        assert tree(tmp_path / f"killed{moment}") == tree(tmp_path / "whole"), moment


def awkward(folder: Path) -> dict[str, str]:
    """Bad files of every kind by name, with a pattern of the reason; and good ones beside them."""
    folder.mkdir()
    reasons = {path.name: "" for path in bestiary(folder)}
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


def test_bestiary_is_reported_by_name_and_the_rest_is_trained_on(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    reasons = awkward(folder)
    lengths = good_ones(folder)
    reasons["self.wav"] = "cannot be read: Too many levels of symbolic links"
    index = prepared(folder, out, Recipe(clip_s=10.0, whole=True))
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
    again = prepared(folder, tmp_path / "clean", Recipe(clip_s=10.0, whole=True))
    assert [clip.read() for clip in again] == [clip.read() for clip in index]


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


def test_clips_lost_in_mid_epoch_are_reported(source: Path, tmp_path: Path) -> None:
    index = prepared(source, tmp_path / "out")
    lost = {k for k, clip in enumerate(index) if clip.path == index[0].path}
    names = {k: str(index[k]) for k in lost}
    Path(index[0].path).write_bytes(b"overwritten")
    with AudioStream(
        index, SPEC, batch_size=4, epochs=1, device=torch.device("cpu"), max_rejected=1.0
    ) as stream:
        batches = list(stream)
        assert {k: path for k, (path, _) in stream.rejected.items()} == names
    valid = torch.cat([batch.clip_ids[batch.valid] for batch in batches])
    assert set(valid.tolist()) == set(range(len(index))) - lost


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


def test_no_aliases_in_shards(tmp_path: Path) -> None:
    """12 kHz at 44.1 kHz cannot be told at 16 kHz: what is left is below -90 dB of it."""
    (tmp_path / "in").mkdir()
    times = np.arange(3 * 44100) / 44100
    quiet = 0.003 * np.sin(2 * np.pi * 1000 * times)  # so that it is not taken for silence
    wave = quiet + 0.9 * np.sin(2 * np.pi * 12000 * times)
    write(tmp_path / "in/a.wav", wave, 44100, subtype="FLOAT")
    [clip] = prepared(tmp_path / "in", tmp_path / "out", Recipe(clip_s=10.0))
    samples = samples_of(clip.read())[8000:40000] / 2**15
    spectrum = np.abs(np.fft.rfft(samples * np.blackman(32000))) / (0.42 * 16000)  # 0.5 Hz a bin
    assert spectrum[2000] == pytest.approx(0.003, rel=0.01)
    spectrum[1990:2011] = 0
    assert 20 * np.log10(spectrum.max() / 0.9) < -90


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": Recipe(clip_s=0)}, "--clip-s is 0, expected a length"),
        ({"recipe": Recipe(hop_s=-1.0)}, "--hop-s is -1, expected a length"),
        ({"recipe": Recipe(min_s=11)}, "--min-s is 11, expected 0 to --clip-s, 10"),
        ({"shard_mib": 0}, "--shard-mib is 0, expected a size"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, tmp_path / "out", **settings)


def test_wrong_sources(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, message in (
        (tmp_path / "nowhere", "found nothing"),
        (source / "a/0.wav", "found this file"),
        (source / "a/b/../..", "need a folder of their own"),
    ):
        with pytest.raises(DataError, match=message):
            prepared(wrong, source)
    with pytest.raises(DataError, match="a URL does not survive as a Path"):
        prepared(source, Path("s3://bucket/out"))
    prepared(source, tmp_path / "out")
    with pytest.raises(DataError, match="is prepared already"):
        prepared(tmp_path / "out", tmp_path / "again")
    with pytest.raises(DataError, match="out: is prepared already: leave it out of"):
        prepared(tmp_path, tmp_path / "again")
    (tmp_path / "out/report.json").unlink()
    with pytest.raises(DataError, match="prepared in part only"):
        read_manifest(tmp_path / "out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.wav").write_bytes(b"text")
    with pytest.raises(DataError, match=r"none of 1 recordings can be used.*'a.wav'"):
        prepared(tmp_path / "bad", tmp_path / "no")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"need about 0\.0 GiB, only 0\.0 GiB are free"):
        prepared(source, tmp_path / "full")


def test_millions_of_clips_cost_nothing_to_open(tmp_path: Path) -> None:
    count = 2_000_000
    rows = np.stack([np.arange(count) // 1000, 512 * np.arange(count), np.full(count, 9)], 1)
    np.save(tmp_path / "index.npy", rows.astype(np.int64))
    np.save(tmp_path / "recordings.npy", np.arange(count) // 3)
    (tmp_path / "shards").mkdir()
    (tmp_path / "report.json").write_text("{}")
    assert (tmp_path / "index.npy").stat().st_size < 48.1e6
    started = time.process_time()
    index = read_manifest(tmp_path).paths
    assert len(index) == count and index[1_234_567].offset == 512 * 1_234_567  # type: ignore[union-attr]
    assert time.process_time() - started < 0.1
    train, valid = find_clips(Config(data=Data(train=str(tmp_path))))
    assert len(train) + len(valid) == count
    assert 40_000 <= len(valid) <= 40_002


@pytest.mark.slow
def test_a_run_trains_on_shards_and_goes_on(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path / "out")
    config = write_config(tmp_path)
    settings = [f"data.train={tmp_path / 'out'}", f"run.folder={tmp_path / 'run'}"]
    for steps, more in ((2, []), (4, ["--resume"])):
        done = call("pretrain", config, *overrides(train__steps=steps), *settings, *more)
        assert done.returncode == 0, done.stderr
        assert f"step {steps} of {steps}" in done.stdout
    assert not (tmp_path / "run/rejected.jsonl").exists()
