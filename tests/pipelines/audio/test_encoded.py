"""Bytes for DALI: what is handed on, what is converted, what is rejected and why."""

import errno
import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sounds import bad_files, tone, write

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio import decode as blocks
from ssast.pipelines.audio import encoded as clip
from ssast.pipelines.audio.decode import Item, read_blocks
from ssast.pipelines.audio.encoded import (
    decode,
    plain_samples,
    read_clip,
    read_through,
    silence,
    wav_bytes,
)
from ssast.pipelines.audio.lengths import examine
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.errors import DataError, StorageError

SPEC = FbankSpec(num_frames=100)  # 16240 samples


def samples_of(encoded: np.ndarray) -> np.ndarray:
    samples, rate_hz = soundfile.read(io.BytesIO(encoded.tobytes()), dtype="float32")
    assert rate_hz == 16000 and samples.ndim == 1
    return samples


@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [
        ("flac", "PCM_S8"),
        ("flac", "PCM_16"),
        ("flac", "PCM_24"),
        ("wav", "PCM_U8"),
        ("wav", "PCM_16"),
        ("wav", "PCM_24"),
        ("wav", "PCM_32"),
    ],
)
def test_plain_files_are_handed_on_as_they_are(tmp_path: Path, suffix: str, subtype: str) -> None:
    path = write(tmp_path / f"a.{suffix}", tone(12345), subtype=subtype)
    data = path.read_bytes()
    sound = examine(lambda at, count: data[at : at + count], len(data))
    assert plain_samples(sound, SPEC) == 12345
    assert read_clip(path, SPEC).tobytes() == data
    # verified, they are decoded here: to the same samples
    np.testing.assert_array_equal(
        samples_of(read_clip(path, SPEC, verify=True)), samples_of(read_clip(path, SPEC))
    )


@pytest.mark.parametrize(
    ("name", "rate_hz", "subtype"),
    [
        ("a.wav", 16000, "FLOAT"),
        ("a.wav", 16000, "DOUBLE"),
        ("a.wav", 16000, "ULAW"),
        ("a.wav", 16000, "IMA_ADPCM"),
        ("a.rf64", 16000, "PCM_16"),
        ("a.w64", 16000, "PCM_16"),
        ("a.aiff", 16000, "PCM_16"),
        ("a.au", 16000, "PCM_16"),
        ("a.caf", 16000, "PCM_16"),
        ("a.ogg", 16000, "VORBIS"),
        ("a.mp3", 16000, "MPEG_LAYER_III"),
        ("a.wav", 44100, "PCM_16"),
        ("a.wav", 8000, "PCM_16"),
        ("a.flac", 48000, "PCM_24"),
        ("a.mp3", 44100, "MPEG_LAYER_III"),
        ("a.opus", 48000, "OPUS"),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_other_files_become_mono_at_the_wanted_rate(
    tmp_path: Path, name: str, rate_hz: int, subtype: str, channels: int
) -> None:
    """A sine of 1 kHz at 0.5 comes out as one: the mean of 0.75 and 0.25 where there are two."""
    times = np.arange(rate_hz // 2) / rate_hz
    sine = np.sin(2 * np.pi * 1000 * times)
    sound = 0.5 * sine if channels == 1 else np.stack([0.75 * sine, 0.25 * sine], 1)
    lossless = subtype.startswith(("PCM", "FLOAT", "DOUBLE"))
    path = write(
        tmp_path / name,
        sound,
        rate_hz,
        subtype=subtype,
        **({"format": "OGG"} if name.endswith("opus") else {}),
    )
    got = samples_of(read_clip(path, SPEC))
    assert len(got) == 8000 or not lossless
    got = got[2000:6000].astype(np.float64)  # 250 whole periods
    wave = np.exp(-2j * np.pi * 1000 / 16000 * np.arange(4000))
    amplitude = 2 * abs(np.mean(got * wave))
    rest = np.sqrt(max(0.0, np.mean(got**2) - amplitude**2 / 2))
    assert abs(amplitude - 0.5) < (1e-3 if lossless else 0.03)
    assert rest < (1e-3 if lossless else 0.03)


def test_resampling_does_not_alias(tmp_path: Path) -> None:
    """12 kHz cannot be told at 16 kHz: it must vanish, not come out as 4 kHz."""
    times = np.arange(44100) / 44100
    path = write(tmp_path / "high.wav", 0.5 * np.sin(2 * np.pi * 12000 * times), 44100)
    assert np.abs(samples_of(read_clip(path, SPEC))[400:-400]).max() < 1e-4


@pytest.mark.parametrize("rate_hz", [16000, 44100])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_of_long_recordings_the_start_counts(tmp_path: Path, rate_hz: int, suffix: str) -> None:
    sound = tone(20 * rate_hz, rate_hz=rate_hz)
    long = write(tmp_path / f"long.{suffix}", sound, rate_hz)
    got = samples_of(read_clip(long, SPEC))
    expected = soundfile.read(long, frames=2 * rate_hz, dtype="float32")[0]
    expected = soxr.resample(expected, rate_hz, 16000, "HQ")[: SPEC.num_samples]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_wav_written_as_a_stream_is_read_to_its_end(tmp_path: Path) -> None:
    for suffix, at in (("44k", 44100), ("16k", 16000)):
        path = write(tmp_path / f"{suffix}.wav", tone(at // 2), at, subtype="PCM_16")
        data = bytearray(path.read_bytes())
        data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
        path.write_bytes(data)
        assert len(samples_of(read_clip(path, SPEC))) == 8000


def test_every_bad_file_is_rejected_for_its_reason(tmp_path: Path) -> None:
    for path, reason in bad_files(tmp_path).items():
        for verify in (False, True):
            if not verify and path.name in ("half.flac", "torn.flac", "header_only.flac"):
                continue  # well to look at: DALI will stumble, and the stream recover
            with pytest.raises(DataError, match=reason):
                read_clip(path, FbankSpec(num_frames=200), verify=verify)


def test_named_pipes_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(DataError, match="not a regular file"):
        read_clip(tmp_path / "pipe.wav", SPEC)


def test_the_shortest_clip(tmp_path: Path) -> None:
    for suffix in ("wav", "flac"):
        path = write(tmp_path / f"a.{suffix}", tone(400))
        assert len(samples_of(read_clip(path, SPEC))) == 400


def test_names_do_not_matter(tmp_path: Path) -> None:
    """A suffix like .raw, for which soundfile wants to be told more, or none at all."""
    data = write(tmp_path / "a.wav", tone(5000), 44100).read_bytes()
    for name in ("a.raw", "a", "a.mp3", "\udce4.wav"):
        (tmp_path / name).write_bytes(data)
        assert len(samples_of(read_clip(tmp_path / name, SPEC))) == 1814


def test_transient_errors_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav", tone(1000), subtype="PCM_16")
    real, failures = clip._read, [errno.EIO, errno.ESTALE]

    def flaky(*args: object) -> np.ndarray:
        if failures:
            raise OSError(failures.pop(), "flaky")
        return real(*args)

    monkeypatch.setattr(clip, "_read", flaky)
    assert read_clip(path, SPEC).tobytes() == path.read_bytes()
    failures[:] = [errno.EIO] * 100
    with pytest.raises(StorageError, match=r"a\.wav: flaky: storage has failed for 0\.5"):
        read_clip(path, SPEC)
    failures[:] = [errno.EIO, errno.EACCES]  # the second is not transient
    with pytest.raises(DataError, match="flaky"):
        read_clip(path, SPEC)
    assert failures == [errno.EIO]


def test_storage_that_fails_in_the_decoder_is_not_a_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libsndfile says "System error", or that the file is truncated."""
    path = write(tmp_path / "a.wav", tone(2000), 44100)
    with open("/proc/self/mem", "rb", buffering=0) as file, pytest.raises(OSError) as caught:
        read_through(file)  # nothing is mapped at address 0
    assert caught.value.errno == errno.EIO
    real, failures = clip.decode, [1, 1]

    def torn(*args: object) -> np.ndarray:
        if failures:
            raise DataError("cannot be decoded: System error")
        return real(*args)

    def probe(file: object) -> None:
        if failures.pop():
            raise OSError(errno.EIO, "flaky")

    monkeypatch.setattr(clip, "decode", torn)
    monkeypatch.setattr(clip, "read_through", probe)
    assert len(samples_of(read_clip(path, SPEC))) == 726
    failures[:] = [0]
    with pytest.raises(DataError, match="System error"):
        read_clip(path, SPEC)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    paths = [*bad_files(tmp_path), write(tmp_path / "a.mp3", tone(9000))]
    before = len(os.listdir("/proc/self/fd"))
    for path in paths:
        try:
            read_clip(path, SPEC)
        except DataError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_silence_and_wav_bytes_are_wav_files() -> None:
    assert samples_of(silence(SPEC)).tolist() == [0.0]
    wave = tone(777)
    np.testing.assert_array_equal(samples_of(wav_bytes(wave, 16000)), wave)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_headers_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    """Random bytes in the first 64 of a file: some decision, no other exception."""
    suffix = data.draw(st.sampled_from(["wav", "flac"]))
    path = write(tmp_path / f"a.{suffix}", tone(2000), subtype="PCM_16")
    damaged = bytearray(path.read_bytes())
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), min_size=1, max_size=6)
    ):
        damaged[at] = value
    cut = data.draw(st.integers(0, len(damaged)))
    path.write_bytes(damaged[:cut] if data.draw(st.booleans()) else damaged)
    for verify in (False, True):
        try:
            assert len(read_clip(path, SPEC, verify=verify)) >= 44
        except DataError as error:
            assert str(error)


def test_decode_keeps_the_descriptor_open(tmp_path: Path) -> None:
    with open(write(tmp_path / "a.wav", tone(1000)), "rb") as file:
        assert len(decode(file.fileno(), SPEC)) == 1000
        assert file.read(4) is not None


@pytest.mark.parametrize("crop", [0.0, 0.25, 0.7, 0.99999])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("long", [False, True])
def test_a_crop_is_a_part_of_the_whole(
    tmp_path: Path, suffix: str, crop: float, long: bool
) -> None:
    """Also of a file that would be handed on as it is, and of one that is read in part."""
    spec = FbankSpec(num_frames=20)
    samples = 40 * spec.num_samples if long else spec.num_samples + 700
    path = write(tmp_path / f"a.{suffix}", tone(samples))
    whole, _ = soundfile.read(path, dtype="float32")
    start = int(crop * (len(whole) - spec.num_samples + 1))
    got = samples_of(read_clip(path, spec, crop=crop))
    if crop == 0:
        got = got[: spec.num_samples]
    assert len(got) == spec.num_samples
    # Vorbis blocks overlap: a decoder that starts in the middle rounds differently.
    tolerance = 1e-4 if suffix == "ogg" else 0
    np.testing.assert_allclose(got, whole[start : start + len(got)], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("rate_hz", "channels", "mode", "level", "table"),
    [
        (16000, 1, "VARIABLE", 0.5, True),
        (22050, 1, "CONSTANT", 0.9, True),
        (48000, 2, "AVERAGE", 0.9, True),
        (16000, 2, "VARIABLE", 0.5, False),
        (8000, 1, "VARIABLE", 0.9, False),
    ],
)
def test_parts_of_an_mp3_file_are_those_of_the_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rate_hz: int,
    channels: int,
    mode: str,
    level: float,
    table: bool,
) -> None:
    """Crops, segments and blocks: frames of few bits hold those of the frames behind them."""
    sound = np.stack([tone(9 * rate_hz, seed=k, rate_hz=rate_hz) for k in range(channels)], 1)
    path = tmp_path / "a"
    form = {"format": "MP3", "bitrate_mode": mode}
    write(path, sound, rate_hz, compression_level=level, **form)  # type: ignore[arg-type]
    if not table:  # which is the first frame
        data = path.read_bytes()
        path.write_bytes(data[data.index(data[:2], 100) :])
    item = Item("a", path)
    whole = np.concatenate([block for block, _ in read_blocks(item)])
    monkeypatch.setattr(blocks, "BLOCK_SAMPLES", 5000)
    found = np.concatenate([block for block, _ in read_blocks(item)])
    np.testing.assert_array_equal(found, whole)
    spec = FbankSpec(num_frames=100, sample_rate_hz=rate_hz)
    for crop in (0.1, 0.37, 0.5, 0.8, 0.95):
        start = int(crop * (len(whole) - spec.num_samples + 1))
        want = whole[start : start + spec.num_samples]
        for clip_, at in ((path, crop), (Segment(str(path), start / rate_hz, 9), 0.0)):
            data = read_clip(clip_, spec, crop=at).tobytes()
            got = soundfile.read(io.BytesIO(data), dtype="float32")[0]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_a_crop_of_a_short_clip_is_the_clip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", tone(3000))
    np.testing.assert_array_equal(read_clip(path, SPEC, crop=0.9), read_clip(path, SPEC))


def test_a_crop_is_resampled_like_the_whole(tmp_path: Path) -> None:
    spec = FbankSpec(num_frames=20)
    path = write(tmp_path / "a.wav", tone(44100, rate_hz=44100), 44100)
    got = samples_of(read_clip(path, spec, crop=0.5))
    assert len(got) == spec.num_samples
    whole, _ = soundfile.read(path, dtype="float32")
    start = int(0.5 * (44100 - math.ceil(spec.num_samples / 16000 * 44100) + 1))
    want = soxr.resample(whole[start:], 44100, 16000, quality="HQ")[: spec.num_samples]
    np.testing.assert_allclose(got[50:], want[50:], atol=1e-4)  # but for the edge
