"""Packing recordings into shards: what it writes, what it does again, what kills it."""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from prepared import prepared, samples_of, tree
from sounds import tone, write

from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare import pack


def test_overlapping_clips(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    sound = tone(40000)
    write(tmp_path / "in/a.wav", sound, subtype="FLOAT")
    index = prepared(tmp_path / "in", tmp_path / "out", Recipe(clip_s=1.0, hop_s=0.5))
    whole = np.rint(sound * np.float32(32767)).astype(np.int16)
    starts = [0, 8000, 16000, 24000]
    for clip, start in zip(index, starts, strict=True):
        np.testing.assert_array_equal(samples_of(clip.read()), whole[start : start + 16000])


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
        packing = Packing(Recipe(clip_s=1.0), shard_mib=0.5, drop_duplicates=True)
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
