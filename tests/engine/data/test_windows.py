"""Windows of long recordings as the training set of pretraining."""

from pathlib import Path

import pytest
from sounds import tone, write

from ssast.engine.config import Config, load_config
from ssast.engine.data.clips import find_clips
from ssast.engine.errors import ConfigError
from ssast.engine.settings import Data
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.errors import DataError


def test_windows_of_whole_recordings_are_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for number in range(5):
        write(tmp_path / f"{number}.wav", tone(4 * 8000, seed=number, rate_hz=8000), 8000)
    data = Data(train=str(tmp_path), window_s=1.0, hop_s=0.5, valid_share=0.2)
    train, held = find_clips(Config(data=data))
    assert (len(train), len(held)) == (28, 7)
    assert {clip.path for clip in held}.isdisjoint(clip.path for clip in train)
    assert held[0] == Segment(held[0].path, 0.0, 1.0)
    assert f"{tmp_path}: 35 windows of 5 clips" in caplog.text
    (tmp_path / "one").mkdir()
    write(tmp_path / "one/a.wav", tone(32000))
    with pytest.raises(DataError, match="clips of one recording that overlap"):
        find_clips(Config(data=Data(train=str(tmp_path / "one"), window_s=1.0, hop_s=0.5)))
    train, held = find_clips(Config(data=Data(train=str(tmp_path / "one"), window_s=0.5)))
    assert (len(train), len(held)) == (3, 1)


@pytest.mark.parametrize(
    ("recipe", "changed", "message"),
    [
        ("demo", ["data.hop_s=1"], "data.hop_s is between the windows of data.window_s"),
        ("demo_finetune", ["data.window_s=1"], "data.window_s is for pretraining"),
        ("demo", ["data.window_s=0"], "data.window_s"),
    ],
)
def test_settings(recipe: str, changed: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, changed)
