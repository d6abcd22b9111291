"""Run logs beside metrics.jsonl; Weights & Biases runs for real, in its offline mode."""

import json
import sqlite3

import pytest
import torch
from runs import lines, overrides
from wandb_files import offline_runs

from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.loggers import LOGGERS, Logger, RunLogs, TensorBoard, check_loggers
from ssast.engine.monitoring.monitor import Monitor, read_metrics
from ssast.engine.parallel.ranks import World
from ssast.engine.pretrain import pretrain


@pytest.fixture(scope="module")
def wandb_service():
    """The process behind all runs: after a second one began, finish() no longer waits for files."""
    wandb = pytest.importorskip("wandb")
    yield wandb
    wandb.teardown()


@pytest.fixture
def wandb(wandb_service, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return wandb_service


def monitor(folder, *loggers, rank=0, step=0):
    world = World(rank, rank, rank + 1, "torchrun", torch.device("cpu"))
    return Monitor(
        folder,
        world=world,
        step=step,
        steps=20,
        batch_size=4,
        flops_per_clip=1e9,
        peak_flops=None,
        loggers=loggers,
    )


def rows(folder):
    """What metrics.jsonl holds, as a logger gets it."""
    return [
        {name: value for name, value in line.items() if name != "time"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def test_weights_and_biases_gets_every_line_of_a_run_and_of_the_resumed_one(
    wandb, data, config_file, tmp_path
):
    """On one run, whose id is kept in the folder: values, steps and configuration."""
    run = tmp_path / "run"
    given = [*data, f"run.folder={run}", "run.loggers=[wandb]"]
    for steps in (2, 4):
        settings = overrides(train__steps=steps, train__save_every=2, train__validate_every=2)
        config = load_config(config_file, [*settings, *given])
        assert pretrain(config, resume=steps == 4) == 0
    first, second = offline_runs(run)
    kept = (run / "wandb_id.txt").read_text().strip()
    assert kept and first[0] == second[0] == kept
    logged = [*first[1], *second[1]]
    assert [row["step"] for row in logged] == [0, 1, 2, 2, 3, 4, 4]
    assert logged == [pytest.approx(row, nan_ok=True) for row in rows(run)]
    assert not (run / "tensorboard").exists()
    assert len(lines(run, "train")) == 4


def test_every_logger_gets_the_lines_of_rank_0(wandb, tmp_path):
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        folder.mkdir()
        log = monitor(
            folder, *(LOGGERS[n](folder, {}) for n in ("tensorboard", "wandb")), rank=rank
        )
        log.log_train(1, {"loss": 1.5, "lr": 1e-4})
        log.close()
    assert list((tmp_path / "1").iterdir()) == []
    ((_, values),) = offline_runs(tmp_path / "0")
    assert values == [pytest.approx(row) for row in rows(tmp_path / "0")]
    assert (tmp_path / "0" / "tensorboard").is_dir()


def test_trackio_goes_on_with_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip("trackio")
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (0, 1):
        log = monitor(folder, LOGGERS["trackio"](folder, {"a": {"b": 1}}), step=step)
        log.log_train(step + 1, {"loss": 1.5 - step, "lr": 1e-4})
        log.close()
    with sqlite3.connect(tmp_path / "store" / "ssast.db") as store:
        found = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in found} == {(folder / "trackio_name.txt").read_text().strip()}
    logged = [{"step": step, **json.loads(metrics)} for _, step, metrics in found]
    assert logged == [pytest.approx(row) for row in rows(folder)]


def test_a_missing_package_is_named_before_anything_is_read(monkeypatch, config_file, tmp_path):
    monkeypatch.setattr("ssast.engine.monitoring.loggers.importlib.util.find_spec", lambda _: None)
    check_loggers(["tensorboard"])
    settings = ["data.train=/gone", f"run.folder={tmp_path / 'run'}", "run.loggers=[trackio]"]
    with pytest.raises(ConfigError, match=r'the package trackio: pip install "ssast-engine\[tr'):
        pretrain(load_config(config_file, settings))
    assert not (tmp_path / "run").exists()


class Failing(Logger):
    """A logger whose server is gone, at the beginning or on the way."""

    title = "Elsewhere"

    def __init__(self, fails_at):
        self.fails_at, self.opened, self.logged = fails_at, 0, []

    def open(self, step):
        self.opened += 1
        self._call("open", step)

    def log(self, step, metrics):
        self._call("log", step)
        self.logged.append(step)

    def close(self):
        self._call("close", 0)

    def _call(self, what, step):
        if (what, step) == self.fails_at:
            raise RuntimeError("no route\nto host")


@pytest.mark.parametrize(
    ("fails_at", "logged", "said"),
    [
        (("open", 0), [], "Elsewhere cannot be opened: no route to host; the run goes on"),
        (("log", 2), [1], "step 2 is missing in Elsewhere: no route to host; the run goes on"),
        (("close", 0), [1, 2, 3], "Elsewhere cannot be finished, what it was sent last may be"),
        (None, [1, 2, 3], ""),
    ],
)
def test_a_logger_that_fails_is_named_once_and_ends_nothing(fails_at, logged, said, tmp_path):
    told = []
    failing, board = Failing(fails_at), TensorBoard(tmp_path, {})
    logs = RunLogs([failing, board], told.append)
    logs.open(0)
    for step in (1, 2, 3):
        logs.log(step, {"train/loss": 1.0})
    logs.close()
    assert failing.logged == logged and failing.opened == 1
    assert len(told) == bool(said) and "".join(told).startswith(said)
    assert (tmp_path / "tensorboard").is_dir()


def test_weights_and_biases_without_a_key_is_said_once(wandb, monkeypatch, tmp_path):
    """What its own library raises, for real."""
    wandb.teardown()  # it has read its settings when the tests above began
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in .netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    told = []
    logs = RunLogs([LOGGERS["wandb"](tmp_path, {})], told.append)
    logs.open(0)
    logs.log(1, {"train/loss": 1.0})
    logs.close()
    assert len(told) == 1 and "API key" in told[0] and "\n" not in told[0]
