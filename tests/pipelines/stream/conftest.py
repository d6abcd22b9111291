"""Clips to stream."""

from pathlib import Path

import pytest
from sounds import write_clips


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_clips(tmp_path_factory.mktemp("clips"), 14, samples=11000)
