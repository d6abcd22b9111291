"""Recordings to prepare."""

import tarfile
from pathlib import Path

import pytest
from sounds import tone, write


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
