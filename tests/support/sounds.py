"""Audio files for tests: good ones in many formats, and bad ones."""

from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16000


def tone(samples: int, *, seed: int = 0, rate_hz: int = RATE_HZ) -> np.ndarray:
    """A chirp over noise, within [-1, 1]: [S] float32."""
    random = np.random.default_rng(seed)
    times = np.arange(samples) / rate_hz
    low, high = random.uniform(100, 3000, 2)
    chirp = 0.4 * np.sin(2 * np.pi * (low * times + (high - low) * times**2 / 4))
    return (chirp + 0.1 * random.standard_normal(samples).clip(-4, 4)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate_hz: int = RATE_HZ, **kwargs: str) -> Path:
    soundfile.write(path, samples, rate_hz, **kwargs)
    return path


def write_clips(folder: Path, count: int, *, samples: int = 8000) -> list[Path]:
    """Clips of different lengths, FLAC and WAV in turn."""
    return [
        write(
            folder / f"{k:03d}.{'wav' if k % 2 else 'flac'}",
            tone(samples - 700 * (k % 5), seed=k),
            subtype="PCM_16",
        )
        for k in range(count)
    ]


def bad_files(folder: Path) -> dict[Path, str]:
    """Bad files and a pattern of the reason for which each must be rejected."""
    good = tone(20000)
    flac = write(folder / "good.flac", good).read_bytes()
    wav = write(folder / "good.wav", good, subtype="PCM_16").read_bytes()
    mp3 = write(folder / "good.mp3", good).read_bytes()
    torn = bytearray(flac)
    torn[len(torn) // 2 : len(torn) // 2 + 400] = bytes(range(100)) * 4
    claims_much = bytearray(flac)
    claims_much[21:26] = bytes([claims_much[21] | 0x0F, 255, 255, 255, 255])
    nan, infinite, loud = good.copy(), good.copy(), good.copy()
    nan[777], infinite[0], loud[5] = np.nan, -np.inf, 1e30
    contents = {
        "empty.wav": (b"", "empty file"),
        "text.wav": (b"This is not a sound.\n" * 50, "cannot be decoded: Format not recognised"),
        "one_byte.flac": (b"f", "cannot be decoded"),
        "magic_only.flac": (b"fLaC", "cannot be decoded"),
        "magic_only.wav": (b"RIFF\0\0\0\0WAVE", "cannot be decoded"),
        "header_only.flac": (flac[:42], "cannot be decoded|truncated"),
        "header_only.wav": (wav[:44], "truncated|too short: 0 samples"),
        "half.flac": (flac[: len(flac) // 2], "cannot be decoded|truncated"),
        "half.wav": (wav[: len(wav) // 2], "truncated"),
        "half.mp3": (mp3[: len(mp3) // 2], "truncated"),
        "torn.flac": (bytes(torn), "cannot be decoded|truncated"),
        "claims_much.flac": (bytes(claims_much), "cannot be decoded|truncated"),
        "zeros.wav": (bytes(5000), "cannot be decoded"),
    }
    reasons = {}
    for name, (data, reason) in contents.items():
        (folder / name).write_bytes(data)
        reasons[folder / name] = reason
    for name, samples in (("nan", nan), ("infinite", infinite), ("loud", loud)):
        path = write(folder / f"{name}.wav", samples, subtype="FLOAT")
        reasons[path] = "NaN, infinite or absurdly large"
    reasons[write(folder / "short.wav", good[:399], subtype="PCM_16")] = "too short: 399 samples"
    reasons[write(folder / "short.flac", good[:399])] = "too short: 399 samples"
    reasons[write(folder / "short44k.wav", good[:1000], 44100)] = "too short: 363 samples"
    reasons[write(folder / "slow.wav", good, 10)] = "sample rate of 10 Hz"
    (folder / "folder.wav").mkdir()
    reasons[folder / "folder.wav"] = "not a regular file"
    (folder / "dangling.wav").symlink_to(folder / "nowhere")
    reasons[folder / "dangling.wav"] = "No such file or directory"
    reasons[folder / "missing.wav"] = "No such file or directory"
    return reasons
