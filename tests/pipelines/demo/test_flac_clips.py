"""Recordings to clips: what comes out, what is refused, and that a killed run changes nothing."""

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssast.pipelines.audio.convert import Clip, Recipe, clip_stem, convert
from ssast.pipelines.audio.decode import Item
from ssast.pipelines.demo.flac_clips import Report, prepare
from ssast.pipelines.demo.publish import split, without_duplicates
from ssast.pipelines.errors import DataError, UnusableError
from ssast.pipelines.files import exclusive


def tone(seconds: float, rate_hz: int, hz: float = 440.0, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def encoded(
    samples: np.ndarray, rate_hz: int, kind: str = "WAV", subtype: str | None = None
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


def converted(
    data: bytes | Path, out: Path, recipe: Recipe | None = None
) -> list[tuple[Clip, np.ndarray]]:
    (out / "flac").mkdir(parents=True, exist_ok=True)
    clips = convert(Item("a/b.wav", data), out, recipe or Recipe())
    read = [(clip, *soundfile.read(out / clip.file, dtype="float32")) for clip in clips]
    assert all(rate == 16000 and samples.ndim == 1 for _, samples, rate in read)
    return [(clip, samples) for clip, samples, _ in read]


def prepared(items: list[Item], out: Path, **options: object) -> Report:
    return prepare(items, out, Recipe(), progress=False, jobs=2, **options)  # type: ignore[arg-type]


KINDS = [
    ("WAV", "PCM_16", 44100, 2),
    ("WAV", "PCM_U8", 8000, 1),
    ("WAV", "PCM_24", 48000, 6),
    ("WAV", "DOUBLE", 22050, 1),
    ("FLAC", "PCM_16", 96000, 1),
    ("OGG", "VORBIS", 44100, 2),
    ("OGG", "OPUS", 48000, 1),
    ("MP3", "MPEG_LAYER_III", 44100, 2),
    ("AIFF", "PCM_16", 11025, 1),
    ("AU", "ULAW", 8000, 1),
    ("CAF", "PCM_16", 16000, 2),
]


@pytest.mark.parametrize(("kind", "subtype", "rate_hz", "channels"), KINDS)
@pytest.mark.parametrize("as_file", [False, True])
def test_formats(
    tmp_path: Path, kind: str, subtype: str, rate_hz: int, channels: int, as_file: bool
) -> None:
    data: bytes | Path = encoded(tone(1.5, rate_hz, channels=channels), rate_hz, kind, subtype)
    if as_file:
        (tmp_path / "sound").write_bytes(data)  # type: ignore[arg-type]
        data = tmp_path / "sound"
    [(clip, samples)] = converted(data, tmp_path / "out")
    assert clip.duration_s == pytest.approx(1.5, abs=0.06 if kind == "MP3" else 0.001)
    assert clip.num_bytes == (tmp_path / "out" / clip.file).stat().st_size
    spectrum = np.abs(np.fft.rfft(samples[4000:20000] * np.hanning(16000)))
    assert abs(int(spectrum.argmax()) - 440) <= 1  # 1 Hz a bin
    assert np.sqrt(np.mean(samples[4000:20000] ** 2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.03)


def test_16_khz_samples_are_kept_exactly(tmp_path: Path) -> None:
    original = np.random.default_rng(0).integers(-(2**15) + 1, 2**15, 30000).astype(np.int16)
    [(clip, _)] = converted(encoded(original, 16000), tmp_path)
    stored, _ = soundfile.read(tmp_path / clip.file, dtype="int16")
    # 1/32768 a step in, 32767 steps out: off by one at most
    assert np.abs(stored.astype(int) - original).max() <= 1


@pytest.mark.parametrize("hz", [9000, 12000, 15000, 20000])
def test_no_aliases(tmp_path: Path, hz: float) -> None:
    wave = tone(2.0, 44100, hz) + tone(2.0, 44100, 1000) / 10
    [(_, samples)] = converted(encoded(wave, 44100, subtype="FLOAT"), tmp_path)
    spectrum = np.abs(np.fft.rfft(samples[8000:24000] * np.blackman(16000)))  # 1 Hz a bin
    kept = spectrum[995:1006].max()
    spectrum[995:1006] = 0
    assert 20 * np.log10(spectrum.max() / kept) < -70  # 10 times as loud before, so -90 dB


def test_channels_are_averaged(tmp_path: Path) -> None:
    stereo = np.stack([tone(1, 16000)[:, 0], -tone(1, 16000)[:, 0] / 2], axis=1)
    [(_, samples)] = converted(encoded(stereo, 16000), tmp_path)
    np.testing.assert_allclose(samples, tone(1, 16000)[:, 0] / 4, atol=1e-4)


@pytest.mark.parametrize("rate_hz", [16000, 44100])
def test_long_recordings_are_cut(tmp_path: Path, rate_hz: int) -> None:
    wave = np.random.default_rng(1).uniform(-0.5, 0.5, int(25.05 * rate_hz)).astype(np.float32)
    parts = converted(encoded(wave, rate_hz), tmp_path)
    assert [clip.part for clip, _ in parts] == [0, 1, 2]
    assert [clip.duration_s for clip, _ in parts] == [10.0, 10.0, pytest.approx(5.05, abs=1e-3)]
    whole = converted(encoded(wave, rate_hz), tmp_path / "whole", Recipe(clip_s=1000))
    # nothing is lost or repeated at a cut
    np.testing.assert_allclose(np.concatenate([s for _, s in parts]), whole[0][1], atol=1e-4)


def test_the_rest_and_pauses_of_a_long_recording_are_left_out(tmp_path: Path) -> None:
    wave = np.concatenate([tone(10, 16000), np.zeros((160000, 1), np.float32), tone(10.05, 16000)])
    assert [clip.part for clip, _ in converted(encoded(wave, 16000), tmp_path)] == [0, 2]


def test_trim_and_level(tmp_path: Path) -> None:
    quiet = np.zeros((16000, 1), np.float32)
    wave = np.concatenate([quiet, tone(1, 16000) / 100, quiet])
    recipe = Recipe(trim_db=60, level_rms=0.07)
    [(clip, samples)] = converted(encoded(wave, 16000, subtype="FLOAT"), tmp_path, recipe)
    assert clip.duration_s == pytest.approx(1.125, abs=0.002)
    assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.07, rel=0.08)


def test_beyond_full_scale_is_scaled_down(tmp_path: Path) -> None:
    [(_, samples)] = converted(encoded(tone(1, 16000) * 30, 16000, subtype="FLOAT"), tmp_path)
    assert np.abs(samples).max() == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(samples, tone(1, 16000)[:, 0] / 0.3, atol=1e-3)


NAN = tone(1, 16000)
NAN[100] = np.nan
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 80000)
UNUSABLE = {
    "empty file": (b"", "cannot be decoded: Format not recognised"),
    "text": (b"This is no sound.\n" * 100, "cannot be decoded: Format not recognised"),
    "header only": (encoded(tone(0, 16000), 16000), "holds no samples"),
    "half a header": (encoded(tone(1, 16000), 16000)[:20], "cannot be decoded"),
    "NaN": (encoded(NAN, 16000, subtype="FLOAT"), "holds NaN or infinite samples"),
    "NaN at 44.1 kHz": (encoded(NAN, 44100, subtype="FLOAT"), "holds NaN or infinite samples"),
    "silence": (encoded(np.zeros(16000), 16000), "holds nothing but silence"),
    "50 ms": (encoded(tone(0.05, 16000), 16000), "too short: 0.050 s of sound, at least 0.1 s"),
    "truncated FLAC": (encoded(NOISE, 16000, "FLAC")[:60000], ""),
    "rate of 1 Hz": (encoded(tone(1, 16000), 1), "states a sample rate of 1 Hz"),
    "rate of 1 GHz": (encoded(tone(1, 16000), 10**9), "states a sample rate of 1000000000 Hz"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable(tmp_path: Path, name: str) -> None:
    data, reason = UNUSABLE[name]
    with pytest.raises(UnusableError) as caught:
        converted(data, tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "flac").iterdir()) == []


def test_what_breaks_off_late_leaves_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000 * 100).astype(np.float32)
    noise[-1] = np.inf
    with pytest.raises(UnusableError, match="holds NaN"):
        converted(encoded(noise, 16000, subtype="FLOAT"), tmp_path)
    assert list((tmp_path / "flac").iterdir()) == []


def test_names_are_plain_and_unique() -> None:
    names = [
        "a.wav",
        "a/b.wav",
        "a_b.wav",
        "A.wav",
        "\u3105\u311a1/3.ogg",
        "\udcff.wav",
        "../../x",
        "y" * 300,
    ]
    stems = [clip_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    assert all(s.isascii() and "/" not in s and s[0] != "." and len(s) < 120 for s in stems)


def bestiary(folder: Path) -> list[Item]:
    folder.mkdir()
    (folder / "good.wav").write_bytes(encoded(tone(1, 44100), 44100))
    (folder / "text.wav").write_text("not a sound")
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    names = ["good.wav", "text.wav", "folder.wav", "pipe.wav", "missing.wav"]
    return [Item(name, folder / name) for name in names]


def test_rejected_are_reported(tmp_path: Path) -> None:
    report = prepared(bestiary(tmp_path / "in"), tmp_path / "out")
    assert [clip.name for clip in report.clips] == ["good.wav"]
    assert {r.name: r.reason for r in report.rejected} == {
        "text.wav": "cannot be decoded: Format not recognised",
        "folder.wav": "unreadable: not a regular file",
        "pipe.wav": "unreadable: not a regular file",
        "missing.wav": "unreadable: No such file or directory",
    }


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    items = bestiary(tmp_path / "in")
    first = prepared(items, tmp_path / "out")
    clip = tmp_path / "out" / first.clips[0].file
    written = clip.stat().st_mtime_ns
    again = prepared(items, tmp_path / "out")
    assert (again.clips, again.rejected) == (first.clips, first.rejected)
    assert again.num_reused == len(items)
    assert clip.stat().st_mtime_ns == written
    clip.write_bytes(b"damaged")  # another size: seen
    assert prepared(items, tmp_path / "out").num_reused == len(items) - 1
    assert soundfile.info(clip).frames == 16000
    (tmp_path / "in/good.wav").write_bytes(encoded(tone(2, 8000), 8000))  # changed: done again
    assert prepared(items, tmp_path / "out").clips[0].duration_s == 2.0
    (tmp_path / "in/text.wav").write_bytes(encoded(tone(2, 8000), 8000))  # repaired
    assert len(prepared(items, tmp_path / "out").clips) == 2


def test_clips_that_are_no_more_are_removed(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000 * 25)
    (tmp_path / "a.wav").write_bytes(encoded(noise, 16000))
    assert len(prepared([Item("a", tmp_path / "a.wav")], tmp_path / "out").clips) == 3
    (tmp_path / "a.wav").write_bytes(encoded(noise[:16000], 16000))
    [clip] = prepared([Item("a", tmp_path / "a.wav")], tmp_path / "out").clips
    assert os.listdir(tmp_path / "out/flac") == [Path(clip.file).name]


def test_other_settings_do_all_again(tmp_path: Path) -> None:
    items = [Item("a", encoded(tone(3, 16000), 16000))]
    prepare(items, tmp_path, Recipe(), progress=False)
    report = prepare(items, tmp_path, Recipe(clip_s=1.0), progress=False)
    assert (len(report.clips), report.num_reused) == (3, 0)


@pytest.mark.parametrize("rubbish", [b'{"name": "b", "sig', b"\xff\xfe", b'{"name"'])
def test_torn_last_line_of_the_index(tmp_path: Path, rubbish: bytes) -> None:
    items = [Item(name, encoded(tone(n, 16000), 16000)) for n, name in enumerate("abc", 1)]
    expected = prepared(items, tmp_path / "whole")
    prepared(items[:2], tmp_path / "torn")
    with open(tmp_path / "torn/index.jsonl", "ab") as index:
        index.write(rubbish)
    report = prepared(items, tmp_path / "torn")
    assert (report.clips, report.num_reused) == (expected.clips, 2)
    whole = (tmp_path / "whole/index.jsonl").read_text()
    assert (tmp_path / "torn/index.jsonl").read_text() == whole


def test_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "index.jsonl").write_text('{"name": "a"}\nrubbish\n')
    with pytest.raises(DataError, match=r"index\.jsonl: line 2 is damaged"):
        prepared([], tmp_path)


def test_two_recordings_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a: two recordings have this name"):
        prepared([Item("a", b"x"), Item("a", b"y")], tmp_path)


def test_order_does_not_depend_on_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = [
        Item(f"{n}", encoded(rng.uniform(-0.5, 0.5, 2000 + 40000 * (n % 3 == 0)), 16000))
        for n in range(60)
    ]
    one = prepare(items, tmp_path / "1", Recipe(), jobs=1, progress=False)
    many = prepare(items, tmp_path / "8", Recipe(), jobs=8, progress=False)
    assert one == many
    assert [clip.name for clip in one.clips] == [item.name for item in items]


PROGRAM = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path
    from ssast.pipelines.audio.convert import Recipe
    from ssast.pipelines.audio.decode import Item
    from ssast.pipelines.demo.flac_clips import prepare
    from ssast.pipelines.files import exclusive

    def run(source, out):
        items = [Item(path.name, path) for path in sorted(source.iterdir())]
        with exclusive(out):
            prepare(items, out, Recipe(clip_s=2.0), jobs=2, progress=False)

    source, out, *waits = sys.argv[1:]
    killed = 0
    for wait in waits:
        child = os.fork()
        if child == 0:
            run(Path(source), Path(out))
            os._exit(0)
        time.sleep(float(wait))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(killed)
    run(Path(source), Path(out))
    """
)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_killed_runs_end_with_the_same_result(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for n in range(150):
        wave = rng.uniform(-0.5, 0.5, (int(44100 * rng.uniform(0.5, 7)), 2))
        (tmp_path / f"in/{n:03d}.wav").write_bytes(encoded(wave, 44100))
    items = [Item(path.name, path) for path in sorted((tmp_path / "in").iterdir())]
    with exclusive(tmp_path / "whole"):
        prepare(items, tmp_path / "whole", Recipe(clip_s=2.0), progress=False)
    waits = [str(0.05 + 0.05 * n) for n in range(8)]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "in"), str(tmp_path / "killed")]
    run = subprocess.run([*command, *waits], check=True, capture_output=True, text=True)
    assert int(run.stdout) >= 3  # the others were through before
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    def limit() -> None:  # the largest file, which a clip exceeds: as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.wav").write_bytes(encoded(NOISE, 16000))
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "in"), str(tmp_path / "out")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert "DataError: preparing the data failed:" in last and "File too large" in last
    assert (tmp_path / "out/index.jsonl").read_text() == ""


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(DataError, match="another run"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):  # free again
        pass


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(DataError, match="out: cannot be written to"), exclusive(tmp_path / "out"):
        pass


def some_clips(num_names: int, num_parts: int = 1) -> list[Clip]:
    return [
        Clip(f"flac/{n}-{p}.flac", f"{n}", p, 1.0, f"{n}-{p}", 10)
        for n in range(num_names)
        for p in range(num_parts)
    ]


@pytest.mark.parametrize(("num_names", "num_parts"), [(2, 1), (1, 2), (3, 2), (10, 1), (3000, 2)])
def test_split(num_names: int, num_parts: int) -> None:
    clips = some_clips(num_names, num_parts)
    train, valid = split(clips, 0.03)
    assert train and valid
    assert {*train, *valid} == set(clips)
    assert len(train) + len(valid) == len(clips)
    if num_names > 1:
        assert not {c.name for c in train} & {c.name for c in valid}
    if num_names == 3000:
        assert 0.02 < len(valid) / len(clips) < 0.04
        # the choice of a clip depends on nothing but its name
        fewer = split([c for c in clips if int(c.name) % 2], 0.03)[1]
        assert set(fewer) == {c for c in valid if int(c.name) % 2}


def test_split_of_a_large_share() -> None:
    train, valid = split(some_clips(2), 0.999)
    assert train and valid


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_to_split(count: int) -> None:
    with pytest.raises(DataError, match=f"only {count} usable clip"):
        split(some_clips(count), 0.03)


def test_duplicates_by_samples(tmp_path: Path) -> None:
    wav = encoded((tone(1, 16000) * 2**15).round() / 2**15, 16000)
    flac = encoded((tone(1, 16000) * 2**15).round() / 2**15, 16000, "FLAC")
    items = [Item("a", wav), Item("b", encoded(tone(1, 16000, 500), 16000)), Item("c", flac)]
    assert [c.name for c in without_duplicates(prepared(items, tmp_path).clips)] == ["a", "b"]


def test_index_is_lines_of_json(tmp_path: Path) -> None:
    prepared(bestiary(tmp_path / "in"), tmp_path / "out")
    lines = (tmp_path / "out/index.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines][:2] == ["good.wav", "text.wav"]
