"""``ssast bench dropping``: what it drops, its sounds, its tables."""

import pytest

from ssast.benchmarks.study import dropping
from ssast.benchmarks.study.sounds import write_sounds
from ssast.engine.config import Config
from ssast.engine.errors import ConfigError
from ssast.pipelines.clips.manifest import read_manifest


def test_the_same_shares_are_dropped_in_both_grids() -> None:
    for rows, columns, want in ((8, 32, (2, 12)), (4, 8, (1, 3))):
        given = dropping.dropped("drop_columns, drop_rows", rows, columns)
        assert given == (f"finetune.drop_columns={want[1]}", f"finetune.drop_rows={want[0]}")
        assert dropping.dropped("drop_tokens 0.4", rows, columns) == ("finetune.drop_tokens=0.4",)


@pytest.fixture
def configs(monkeypatch) -> list[Config]:
    """The configurations of the trainings, none of which is done."""
    found: list[Config] = []
    monkeypatch.setattr(dropping, "finetune", lambda config, *, resume: found.append(config))
    return found


def test_the_tables(configs, tmp_path, monkeypatch, capsys) -> None:
    scores = iter([0.5, 0.25, 0.75, 1.0, 0.6, 0.35, 0.65, 1.0])
    monkeypatch.setattr(dropping, "accuracy", lambda folder, split: next(scores))
    given = ["--batch", "1", "--repeats", "1", "--clips", "2", "--seeds", "2"]
    assert dropping.main([*given, "--out", str(tmp_path), "optim.lr=0.002"]) == 0
    drops = [
        (c.finetune.drop_tokens, c.finetune.drop_columns, c.finetune.drop_rows) for c in configs
    ]
    assert drops == 2 * [(0.0, 0, 0), (0.2, 0, 0), (0.4, 0, 0), (0.0, 3, 1)]
    assert [c.train.seed for c in configs] == [0] * 4 + [1] * 4
    assert {c.optim.lr for c in configs} == {0.002}
    labels = read_manifest(tmp_path / "train.json").labels
    assert len(labels) == 16 and len(set(labels)) == 8
    shown = capsys.readouterr().out
    assert "| all tokens | 1.00 |" in shown
    assert "| drop_tokens 0.2 | 30.0" in shown and "| drop_columns, drop_rows | 100.0" in shown


def test_clips_of_ones_own(configs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(dropping, "measure_passes", lambda *_: {"all tokens": 1.0})
    monkeypatch.setattr(dropping, "accuracy", lambda folder, split: 0.5)
    clips = [str(write_sounds(tmp_path / part, 2, 0)) for part in ("train", "test")]
    given = ["--seeds", "1", "--epochs", "3", "--out", str(tmp_path / "runs"), "model.depth=5"]
    assert dropping.main(["--labelled", *clips, *given]) == 0
    for config in configs:
        assert [str(config.data.train), str(config.finetune.test)] == clips
        assert (config.grid, config.model.depth, config.finetune.epochs) == ((8, 8), 5, 3)
    last = configs[-1].finetune
    assert (last.drop_columns, last.drop_rows, last.checkpoint) == (3, 2, None)


def test_a_stopped_training_stops_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(dropping, "measure_passes", lambda *_: {"all tokens": 1.0})
    monkeypatch.setattr(dropping, "finetune", lambda config, *, resume: 15)
    assert dropping.main(["--clips", "1", "--out", str(tmp_path)]) == 143


def test_runs_with_other_settings_are_not_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(dropping, "measure_passes", lambda *_: {"all tokens": 1.0})
    monkeypatch.setattr(dropping, "SETTINGS", {"all tokens": ()})
    small = ["model.depth=1", "train.batch_size=8", "data.num_threads=1"]
    given = ["--clips", "4", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path), *small]
    assert dropping.main(given) == 0
    trained = (tmp_path / "0-0" / "valid" / "metrics.json").stat().st_mtime_ns
    assert dropping.main(given) == 0
    assert (tmp_path / "0-0" / "valid" / "metrics.json").stat().st_mtime_ns == trained
    with pytest.raises(ConfigError, match=r"0-0/config.yaml has optim.lr 0.001, got 0.002: choose"):
        dropping.main([*given, "optim.lr=2e-3"])
