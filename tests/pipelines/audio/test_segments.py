"""The samples of segments are those that went in: slices of whole recordings, read by seeking."""

import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import RATE_HZ, tone, write
from streams import CPU, SPEC, take

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio import extents
from ssast.pipelines.audio.convert import Recipe, cut, resampled
from ssast.pipelines.audio.decode import Item, read_blocks
from ssast.pipelines.audio.encoded import read_clip
from ssast.pipelines.clips.manifest import read_clips, write_manifest
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.check import check_data
from ssast.pipelines.prepare.pack import Packing, prepare_shards
from ssast.pipelines.stream.disk_cache import _identity

LONG = FbankSpec(num_frames=400)  # 4 s
KINDS = [
    ("wav", "PCM_16", RATE_HZ),
    ("wav", "FLOAT", 8000),
    ("flac", "PCM_16", RATE_HZ),
    ("flac", "PCM_24", 44100),
    ("ogg", "VORBIS", 44100),
    ("ogg", "OPUS", 48000),
    ("mp3", "MPEG_LAYER_III", RATE_HZ),
    ("mp3", "MPEG_LAYER_III", 44100),
    ("wav", "GSM610", 8000),  # which cannot seek
    ("au", "G721_32", 8000),
    ("aiff", "PCM_16", 47999),  # without a sample that both rates have, but for whole seconds
]
SEGMENTS = [(0.0, 1.0), (3.3, 2.25), (8.123, 1.5), (5.0, float("inf"))]


def samples(segment: Segment, spec: FbankSpec = LONG, crop: float = 0.0) -> np.ndarray:
    data = read_clip(segment, spec, crop=crop)
    return soundfile.read(io.BytesIO(data.tobytes()), dtype="float32")[0]


def whole(path: Path) -> np.ndarray:
    return np.concatenate(list(resampled(read_blocks(Item("x", path)), RATE_HZ)))


@pytest.mark.parametrize(("kind", "subtype", "rate_hz"), KINDS)
def test_segments_are_slices_of_the_whole(
    tmp_path: Path, kind: str, subtype: str, rate_hz: int
) -> None:
    """In training, and in ``prepare``, which rounds to 16 bits."""
    sound = np.random.default_rng(1).normal(0, 0.1, (10 * rate_hz, 2)).astype(np.float32)
    sound = sound[:, 0] if subtype in ("GSM610", "G721_32") else sound  # have one channel
    path = write(tmp_path / f"a.{kind}", sound, rate_hz, subtype=subtype)
    expected = whole(path)
    for begin_s, duration_s in SEGMENTS:
        segment = Segment(str(path), begin_s, duration_s)
        end_s = min(begin_s + duration_s, len(expected) / RATE_HZ)  # codecs fill their last block
        first, last = round(begin_s * RATE_HZ), round(end_s * RATE_HZ)
        want = expected[first:last]
        found = samples(segment)
        assert len(found) == min(len(want), LONG.num_samples)
        np.testing.assert_allclose(found, want[: LONG.num_samples], atol=1e-5)
        parts = [part.samples for part in cut(Item("x", path, segment), Recipe(clip_s=1.7))]
        found = np.concatenate(parts) / np.float32(32767)
        assert abs(len(found) - len(want)) <= 1
        np.testing.assert_allclose(found[: len(want)], want[: len(found)], atol=4e-5)


@pytest.mark.parametrize("rate_hz", [RATE_HZ, 44100])
def test_crops_lie_inside_of_the_segment(tmp_path: Path, rate_hz: int) -> None:
    times = np.arange(20 * rate_hz, dtype=np.float32) / rate_hz
    path = write(tmp_path / "a.wav", times / 20, rate_hz, subtype="FLOAT")  # a sample's own time
    segment = Segment(str(path), 7.0, 6.0)
    length_s = LONG.num_samples / RATE_HZ
    for crop in (0.0, 0.5, 0.999999):
        found = 20 * samples(segment, crop=crop)
        assert len(found) == LONG.num_samples
        expected_s = 7.0 + crop * (6.0 - length_s) + length_s / 2
        assert found[LONG.num_samples // 2] == pytest.approx(expected_s, abs=1e-3)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_little_of_a_long_recording_is_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{kind}"
    with soundfile.SoundFile(path, "w", RATE_HZ, 1) as file:
        for seed in range(30):  # libsndfile crashes on minutes of Vorbis at once
            file.write(tone(10 * RATE_HZ, seed=seed))
    decoded = []
    real = soundfile.SoundFile.read

    def counted(*args: object, **options: object) -> np.ndarray:
        decoded.append(len(found := real(*args, **options)))
        return found

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    assert len(samples(Segment(str(path), 290.0, 1.0))) == RATE_HZ
    assert sum(decoded[:-1]) == RATE_HZ  # the last is the test's own
    monkeypatch.undo()


def test_beyond_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing there is an error, less than said is said once, and nearly all is nothing."""
    monkeypatch.setattr(extents, "_reported", False)
    path = write(tmp_path / "a.wav", tone(2 * RATE_HZ))
    with pytest.raises(DataError, match=r"^begins at 2.5 s, beyond the end of the recording, 2 s"):
        read_clip(Segment(str(path), 2.5, 1), LONG)
    assert len(samples(Segment(str(path), 1.0, 1.04))) == RATE_HZ and not caplog.records
    caplog.set_level(logging.DEBUG)
    for begin_s in (1.5, 1.2):
        assert len(samples(Segment(str(path), begin_s, 3))) == round((2 - begin_s) * RATE_HZ)
    first, second = caplog.records
    assert "a.wav[1.5-4.5 s]: reaches 2.50 s beyond the end" in first.getMessage()
    assert (first.levelname, second.levelname) == ("WARNING", "DEBUG")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A manifest of three recordings at different rates, and their segments."""
    for name, rate_hz in (("a.flac", RATE_HZ), ("b.wav", 32000), ("c.ogg", 22050)):
        write(tmp_path / name, tone(4 * rate_hz, seed=rate_hz, rate_hz=rate_hz), rate_hz)
    clips = [
        *(Segment(f"{tmp_path}/{name}", begin_s, 0.5) for name in ("b.wav", "a.flac", "c.ogg")
          for begin_s in (0.0, 1.25, 3.0)),
        Segment(f"{tmp_path}/a.flac", 3.5, 2.0),
        Segment(f"{tmp_path}/a.flac", 9.0, 2.0),
    ]  # fmt: skip
    write_manifest(tmp_path / "m.json", clips, [[f"l{k % 2}"] for k in range(len(clips))])
    return tmp_path / "m.json"


def test_a_stream_of_segments(listed: Path) -> None:
    clips = read_clips(listed)
    single = []
    for row, clip in enumerate(clips[:10]):
        file = write(listed.parent / f"{row}.wav", samples(clip), subtype="FLOAT")
        single.append(file)
    want = take(single, 3, epochs=1, batch_size=4, spec=SPEC, device=CPU)
    found = take(clips[:10], 3, epochs=1, batch_size=4, spec=SPEC, device=CPU)
    for one, other in zip(found, want, strict=True):
        np.testing.assert_array_equal(one.fbank, other.fbank)
        assert one.valid.tolist() == other.valid.tolist()
    rejected: list[tuple[int, str, str]] = []
    take(clips, 3, epochs=1, max_rejected=1.0, on_reject=lambda *found: rejected.append(found))
    ((row, name, reason),) = rejected
    assert row == 10 and name.endswith("a.flac[9-11 s]") and "begins at 9 s" in reason


def test_prepared_segments(listed: Path, tmp_path: Path) -> None:
    """Clips of one recording stay one recording, also where they lie in several shards."""
    lines: list[str] = []
    packing = Packing(Recipe(min_s=0.01), codec="wav", shard_mib=0.1)
    report = prepare_shards(listed, tmp_path / "out", packing, progress=False, log=lines.append)
    index = ShardIndex(tmp_path / "out")
    assert report["shards"] > 3 and report["recordings"] == 3
    assert index.recordings().tolist() == [0] * 4 + [1] * 3 + [2] * 3
    names = index.names()
    assert names[1].startswith("a_flac_1_25-1_75_s_") and len(set(names)) == 10
    labels = json.loads((tmp_path / "out/labels.json").read_text())
    assert [labels["names"][numbers[0]] for numbers in labels["clips"]] == [
        "l1", "l0", "l1", "l1", "l0", "l1", "l0", "l0", "l1", "l0"
    ]  # fmt: skip
    for row, name in ((1, "a.flac"), (5, "b.wav"), (8, "c.ogg")):
        found = soundfile.read(io.BytesIO(index[row].read()), dtype="float32")[0]
        want = whole(tmp_path / name)[20000:28000]
        np.testing.assert_allclose(found, want, atol=4e-5)
    (wrong,) = (tmp_path / "out/wrong_lengths.jsonl").read_text().splitlines()
    assert json.loads(wrong) == {"name": "a.flac[3.5-5.5 s]", "stated_s": 2.0, "found_s": 0.5}
    (rejected,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["name"] == "a.flac[9-11 s]"
    assert any("1 of 3 recordings have headers or segments" in line for line in lines)
    again = prepare_shards(listed, tmp_path / "out", packing, progress=False, log=lines.append)
    assert again == report and "done before" in lines[-3]


def test_check_names_segments(listed: Path) -> None:
    found = check_data(listed, jobs=1, progress=False)
    assert (found.num_clips, round(found.seconds, 2)) == (11, 5.0)
    folder = listed.parent
    assert [(problem.where, problem.problem) for problem in found.problems] == [
        (f"{folder}/a.flac[3.5-5.5 s]", "reaches 1.50 s beyond the end of the recording: clipped"),
        (f"{folder}/a.flac[9-11 s]", "begins at 9 s, beyond the end of the "
         "recording, 4 s"),
    ]  # fmt: skip


def test_segments_are_cached_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(RATE_HZ))
    clips = [str(path), Segment(str(path), 0, 1), Segment(str(path), 0.5, 1)]
    assert len({_identity(clip, "") for clip in clips}) == 3
    before = _identity(clips[1], "")
    os.utime(path, (1, 1))
    assert _identity(clips[1], "") != before
