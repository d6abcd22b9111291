"""``ssast bench batches``: its runs, and what is made of them."""

import json

import pytest

from ssast.benchmarks.study.batches import main, read_runs, runs, table
from ssast.engine.config import dump_config, load_config
from ssast.engine.errors import ConfigError


def finished(folder, batch, lr, losses, steps=4):
    run = folder / f"b{batch}-{lr}"
    run.mkdir(parents=True)
    given = [f"train.batch_size={batch}", f"optim.lr={lr}", f"train.steps={steps}"]
    (run / "config.yaml").write_text(dump_config(load_config("demo", given)))
    lines = [{"step": step, "valid/loss": loss} for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_both_rules_for_each_larger_batch():
    assert runs(1e-3) == [(24, 1e-3), (96, 2e-3), (96, 4e-3), (384, 4e-3), (384, 1.6e-2)]


def test_finished_runs_are_drawn_and_named_by_their_rule(tmp_path, capsys):
    finished(tmp_path, 24, 0.002, {0: 7.0, 2: 5.0, 4: 3.5})
    finished(tmp_path, 96, 0.004, {0: 7.0, 2: 5.5, 4: 4.0})
    finished(tmp_path, 96, 0.008, {0: 7.0, 2: 6.0, 4: 4.5})
    finished(tmp_path, 384, 0.008, {0: 7.0, 2: 6.0})  # not finished
    curves = read_runs(tmp_path)
    assert list(curves) == [(24, 0.002), (96, 0.004), (96, 0.008)]
    assert curves[24, 0.002] == [(0, 7.0), (48, 5.0), (96, 3.5)]
    shown = table(curves)
    assert "| 96 | 4 | 0.004 | square root | 4.00 |" in shown
    assert "| 96 | 4 | 0.008 | linear | 4.50 |" in shown
    assert main(["--page", "--out", str(tmp_path), "--picture", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").is_file() and shown in capsys.readouterr().out


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ConfigError, match="no finished run"):
        main(["--page", "--out", str(tmp_path)])
