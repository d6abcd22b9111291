"""Recordings of any format to clips of 16 kHz samples: what comes out, and what is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssast.pipelines.audio.convert import Part, Recipe, clip_stem, cut
from ssast.pipelines.audio.decode import Item
from ssast.pipelines.errors import UnusableError


def tone(seconds: float, rate_hz: int, hz: float = 440.0, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def encoded(
    samples: np.ndarray, rate_hz: int, kind: str = "WAV", subtype: str | None = None
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


def parts_of(data: bytes | Path, recipe: Recipe | None = None) -> list[Part]:
    parts = list(cut(Item("a/b.wav", data), recipe or Recipe()))
    assert all(part.samples.dtype == np.int16 and part.samples.ndim == 1 for part in parts)
    return parts


def sound_of(part: Part) -> np.ndarray:
    """As a decoder of the stored clip gives it: 32767 steps in, 1/32768 a step out."""
    return part.samples.astype(np.float32) / 2**15


def seconds(part: Part) -> float:
    return len(part.samples) / 16000


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
    [part] = parts_of(data)
    assert part.source_hz == rate_hz
    assert seconds(part) == pytest.approx(1.5, abs=0.06 if kind == "MP3" else 0.001)
    samples = sound_of(part)
    spectrum = np.abs(np.fft.rfft(samples[4000:20000] * np.hanning(16000)))
    assert abs(int(spectrum.argmax()) - 440) <= 1  # 1 Hz a bin
    assert np.sqrt(np.mean(samples[4000:20000] ** 2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.03)


def test_16_khz_samples_are_kept_exactly() -> None:
    original = np.random.default_rng(0).integers(-(2**15) + 1, 2**15, 30000).astype(np.int16)
    [part] = parts_of(encoded(original, 16000))
    # 1/32768 a step in, 32767 steps out: off by one at most
    assert np.abs(part.samples.astype(int) - original).max() <= 1


@pytest.mark.parametrize("hz", [9000, 12000, 15000, 20000])
def test_no_aliases(hz: float) -> None:
    wave = tone(2.0, 44100, hz) + tone(2.0, 44100, 1000) / 10
    [part] = parts_of(encoded(wave, 44100, subtype="FLOAT"))
    spectrum = np.abs(np.fft.rfft(sound_of(part)[8000:24000] * np.blackman(16000)))  # 1 Hz a bin
    kept = spectrum[995:1006].max()
    spectrum[995:1006] = 0
    assert 20 * np.log10(spectrum.max() / kept) < -70  # 10 times as loud before, so -90 dB


def test_channels_are_averaged() -> None:
    stereo = np.stack([tone(1, 16000)[:, 0], -tone(1, 16000)[:, 0] / 2], axis=1)
    [part] = parts_of(encoded(stereo, 16000))
    np.testing.assert_allclose(sound_of(part), tone(1, 16000)[:, 0] / 4, atol=1e-4)


@pytest.mark.parametrize("rate_hz", [16000, 44100])
def test_long_recordings_are_cut(rate_hz: int) -> None:
    wave = np.random.default_rng(1).uniform(-0.5, 0.5, int(25.05 * rate_hz)).astype(np.float32)
    parts = parts_of(encoded(wave, rate_hz))
    assert [part.number for part in parts] == [0, 1, 2]
    assert [seconds(part) for part in parts] == [10.0, 10.0, pytest.approx(5.05, abs=1e-3)]
    [whole] = parts_of(encoded(wave, rate_hz), Recipe(clip_s=1000))
    # nothing is lost or repeated at a cut
    joined = np.concatenate([sound_of(part) for part in parts])
    np.testing.assert_allclose(joined, sound_of(whole), atol=1e-4)


def test_the_rest_and_pauses_of_a_long_recording_are_left_out() -> None:
    wave = np.concatenate([tone(10, 16000), np.zeros((160000, 1), np.float32), tone(10.05, 16000)])
    assert [part.number for part in parts_of(encoded(wave, 16000))] == [0, 2]


def test_trim_and_level() -> None:
    quiet = np.zeros((16000, 1), np.float32)
    wave = np.concatenate([quiet, tone(1, 16000) / 100, quiet])
    recipe = Recipe(trim_db=60, level_rms=0.07)
    [part] = parts_of(encoded(wave, 16000, subtype="FLOAT"), recipe)
    assert seconds(part) == pytest.approx(1.125, abs=0.002)
    assert np.sqrt(np.mean(sound_of(part) ** 2)) == pytest.approx(0.07, rel=0.08)


def test_beyond_full_scale_is_scaled_down() -> None:
    [part] = parts_of(encoded(tone(1, 16000) * 30, 16000, subtype="FLOAT"))
    assert np.abs(sound_of(part)).max() == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(sound_of(part), tone(1, 16000)[:, 0] / 0.3, atol=1e-3)


NAN = tone(1, 16000)
NAN[100] = np.nan
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 80000)
UNUSABLE = {
    "empty file": (b"", "empty file"),
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
def test_unusable(name: str) -> None:
    data, reason = UNUSABLE[name]
    with pytest.raises(UnusableError) as caught:
        parts_of(data)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_at_the_end_is_not_overlooked() -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000 * 100).astype(np.float32)
    noise[-1] = np.inf
    with pytest.raises(UnusableError, match="holds NaN"):
        parts_of(encoded(noise, 16000, subtype="FLOAT"))


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
