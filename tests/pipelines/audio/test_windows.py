"""Windows of long recordings: which there are, of files and of segments."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards import make_recordings, prepare
from sounds import tone, write

from ssast.pipelines.audio.windows import cut_into_windows, window_starts
from ssast.pipelines.clips.holdout import recordings_of
from ssast.pipelines.clips.listed import FileList
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.errors import DataError


@pytest.mark.parametrize(
    ("length_s", "window_s", "hop_s", "starts"),
    [
        (10.0, 5.0, 5.0, [0.0, 5.0]),
        (10.0, 4.0, 4.0, [0.0, 4.0, 6.0]),
        (1.0, 4.0, 2.0, [0.0]),
        (0.9, 0.3, 0.1, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    ],
)
def test_window_starts(length_s: float, window_s: float, hop_s: float, starts: Any) -> None:
    np.testing.assert_allclose(window_starts(length_s, window_s, hop_s), starts, atol=1e-6)


@pytest.mark.parametrize("kind", [list, FileList.of])
def test_clips_are_cut(tmp_path: Path, kind: Any) -> None:
    a = str(write(tmp_path / "a.flac", tone(5 * 8000, rate_hz=8000), 8000))
    b = str(write(tmp_path / "b.wav", tone(16000)))
    gone = str(tmp_path / "gone.wav")
    clips = [a, b, Segment(a, 1.0, 3.5), gone, Segment(a, 4.5, 9.0), Segment(b, 3.0, 9.0)]
    windows, rows = cut_into_windows(kind(clips), 2.0, 1.5)
    assert rows.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 5]
    assert list(windows) == [
        *(Segment(a, begin_s, 2.0) for begin_s in (0.0, 1.5, 3.0)),
        b,
        *(Segment(a, begin_s, 2.0) for begin_s in (1.0, 2.5)),
        *clips[3:],  # the pipeline says what is wrong with them
    ]
    assert len(set(recordings_of(windows).tolist())) == 3
    assert len(cut_into_windows(kind([a]), 2.5)[0]) == 2


def test_prepared_clips_are_not_cut(tmp_path: Path) -> None:
    make_recordings(tmp_path / "in", 2)
    prepare(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="prepared clips are not cut"):
        cut_into_windows(ShardIndex(tmp_path / "out"), 2.0)


def test_sounds_in_archives_are_not_cut(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(write(tmp_path / "a.wav", tone(16000)), "a.wav")
    with pytest.raises(DataError, match=r"a.tar: sounds in archives are not cut into windows"):
        cut_into_windows(read_clips(tmp_path / "a.tar"), 0.5)
