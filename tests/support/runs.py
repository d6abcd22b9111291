"""Small pretraining runs for tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rank_pool import free_port
from sounds import write_clips

SETTINGS = {
    "model.size": "tiny",
    "model.depth": 1,
    "audio.n_mels": 32,
    "audio.num_frames": 48,
    "objective.num_masked": 3,
    "objective.mask": "uniform",
    "optim.warmup_steps": 2,
    "optim.lr": 1e-3,
    "optim.eps": 1e-4,  # else Adam makes whole steps out of the rounding noise of zero gradients
    "train.precision": "fp32",  # on a GPU as well
    "train.steps": 12,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.save_every": 4,
    "train.validate_every": 6,
    "data.num_threads": 1,
}


def make_data(folder: Path, num_train: int = 10, num_valid: int = 3) -> list[str]:
    """Clips on disk, and the overrides that point to them."""
    for name, count in (("train", num_train), ("valid", num_valid)):
        (folder / name).mkdir()
        write_clips(folder / name, count, samples=9000)
    return [f"data.train={folder / 'train'}", f"data.valid={folder / 'valid'}"]


def overrides(**changed) -> list[str]:
    """SETTINGS as overrides; ``train__steps=3`` changes train.steps."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changed.items()}
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def write_config(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text("{}")
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ssast.engine.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def call(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return _call(command(*arguments), cwd)


def call_on_two_ranks(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return _call([*launcher, "--nproc-per-node", "2", *command(*arguments)[1:]], None)


def _call(words: list[str], cwd: Path | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        env=environment(),
        cwd=cwd,
        timeout=300,
        check=False,
    )


def lines(run: Path, split: str) -> list[dict]:
    """The steps and metrics that a run logged as ``split/...``, their names without the prefix."""
    path, prefix = run / "metrics.jsonl", f"{split}/"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        {"step": line["step"]}
        | {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        for line in found
        if f"{prefix}loss" in line
    ]


def two_ranks(
    *common: object,
    each: Sequence[Sequence[object]] = ((), ()),
    folders: Sequence[Path | None] = (None, None),
) -> list[tuple[int, str]]:
    """Run a command on two ranks, with further arguments of each; their statuses and errors.

    Each runs in a folder of its own, if any are given.
    """
    shared = environment() | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = [
        subprocess.Popen(
            command(*common, *own),
            env=shared | {"RANK": str(rank)},
            cwd=folders[rank],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(each)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return [(p.returncode, error) for p, error in zip(processes, errors, strict=True)]


def stop_at(step: int, number: signal.Signals, run: Path, *arguments: object) -> int:
    """Start a run, send it a signal once it has logged a step; its exit status.

    Checkpoints are written while training goes on: SIGKILL waits for the first one as well.
    """
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        try:
            reached = any(line["step"] >= step for line in lines(run, "train"))
            saved = (run / "checkpoints" / "latest").exists()
            if reached and (saved or number != signal.SIGKILL):
                process.send_signal(number)
                break
        except json.JSONDecodeError:  # a line that is just being written
            pass
        time.sleep(0.002)  # a step of a small model takes little more
    process.communicate(timeout=100)
    return process.returncode
