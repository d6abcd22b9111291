"""Clips that are longer than the input, found before training."""

from types import SimpleNamespace

from finetune_runs import load, plain_file
from sounds import tone, write

from ssast.engine.evaluation.cut_clips import sampled_cut
from ssast.engine.finetune import finetune
from ssast.engine.settings import Audio


def test_a_sample_of_the_clips_is_looked_at(tmp_path):
    lengths = {"a": 16000, "b": 20719, "c": 20880, "d": 48000}  # 128 frames are 20,720 samples
    paths = [str(write(tmp_path / f"{name}.wav", tone(n))) for name, n in lengths.items()]
    audio = Audio(num_frames=128)
    assert sampled_cut(paths[:2], audio) == ""
    assert sampled_cut(paths, audio).startswith("2 of 4 training clips that were looked at are")
    assert "input of 1.295 s" in sampled_cut(paths, audio)
    behind = SimpleNamespace(path="https://host/shards/00000.tar")  # nothing is fetched for it
    assert sampled_cut([*paths[3:], behind, tmp_path / "gone.wav"], audio).startswith("1 of 2 ")
    many = sampled_cut(paths[3:] * 1000, audio)
    assert many.startswith("100 of 100 training clips that were looked at")


def test_a_run_says_so(splits, tmp_path, capsys):
    for name, crop in (("beginnings", False), ("parts", True)):
        config = load(plain_file(tmp_path), splits, tmp_path / name, finetune__epochs=1,
                      audio__num_frames=16, data__random_crop=crop)  # fmt: skip
        assert finetune(config) == 0
        said = capsys.readouterr().out
        assert ("clips that were looked at are longer than the input" in said) != crop
