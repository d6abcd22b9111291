"""Kills saves at every line of store.py and files.py; run by test_store.py in its own process.

    python crash_save.py FOLDER

Prints, as JSON, for each scenario and for each line before which the save was killed, what was on
the disk: step and value of what loads (None if nothing does), the best step, and the files left
after one more save.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from ssast.engine.checkpoints import store
from ssast.engine.checkpoints.store import Checkpoints
from ssast.pipelines import files

FILES = (store.__file__, files.__file__)


def save(folder: Path, step: int, value: float) -> None:
    tensors = {"weight/a": torch.full((3,), value)}
    Checkpoints(folder, keep=1).save(tensors, {"value": value}, step=step)


def prepare(folder: Path, scenario: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if scenario != "first":
        save(folder, 1, 1.0)
        Checkpoints(folder).mark_best(1, 1.0)
    if scenario == "best":
        save(folder, 2, 2.0)


def act(folder: Path, scenario: str) -> None:
    if scenario == "best":
        Checkpoints(folder).mark_best(2, 2.0)
    else:
        save(folder, 1 if scenario == "same" else 2, 2.0)


def kill_at(line: int) -> None:
    """SIGKILL to this process before the given line that FILES execute from now on."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            count += 1
            if count == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def kill_everywhere(folder: Path, scenario: str) -> list[dict]:
    found, line = [], 0
    while True:
        line += 1
        prepare(folder, scenario)
        child = os.fork()
        if child == 0:
            kill_at(line)
            act(folder, scenario)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        checkpoints = Checkpoints(folder)
        path, best = checkpoints.latest(), checkpoints.best()
        loaded = (None, None)
        if path is not None:
            tensors, meta = Checkpoints.load(path)
            loaded = (meta["step"], tensors["weight/a"][0].item())
        best_step = None if best is None else Checkpoints.load(best)[1]["step"]
        save(folder, 2, 3.0)  # the next run comes to the same step, and sweeps up
        left = sorted(p.name for p in folder.iterdir())
        found.append({"loaded": loaded, "best": best_step, "left": left})
        if os.WIFEXITED(status):
            return found


if __name__ == "__main__":
    scenarios = ("first", "next", "same", "best")
    print(json.dumps({name: kill_everywhere(Path(sys.argv[1]), name) for name in scenarios}))
