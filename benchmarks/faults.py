"""Fault injection: kill random ranks of a small run at random times, and check what is lost.

The run is killed many times, while it starts, trains, validates and saves, and is resumed each
time. At the end its losses must be those of an uninterrupted run, and no checkpoint may be lost.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ssast.benchmarks.loading.data import write_clips
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.engine.monitoring.watchdog import EX_TEMPFAIL

SETTINGS = (
    "model.size=tiny",
    "model.depth=1",
    "audio.n_mels=32",
    "audio.num_frames=48",
    "objective.num_masked=3",
    "objective.mask=uniform",
    "optim.warmup_steps=2",
    "train.batch_size=4",
    "train.log_every=1",
    "train.save_every=3",
    "train.validate_every=40",
    "train.timeout_s=20",
    "data.num_threads=1",
    "data.valid_share=0.2",
)
DETECTION_LIMIT_S = 60.0  # a rank that runs on for longer after a kill counts as hanging


@dataclass(frozen=True)
class Kill:
    """One kill, and the state of the run after it."""

    number: int
    rank: int
    phase: str
    at_s: float
    step: int
    """Last step that was logged."""

    saving: bool
    """Whether a checkpoint was being written."""

    checkpoint: int
    """Step of the newest complete checkpoint after the kill."""

    detected_s: float
    """Seconds until all other ranks had exited."""


class Ranks:
    """The processes of one attempt."""

    def __init__(self, world_size: int, arguments: Sequence[str], log: Path):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        shared = os.environ | {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "ssast.engine.cli", "pretrain", *arguments, "--resume"]
        with log.open("a") as output:
            self.processes = [
                subprocess.Popen(
                    command, env=shared | {"RANK": str(rank)}, stdout=output, stderr=output
                )
                for rank in range(world_size)
            ]

    def ended(self) -> bool:
        """Return whether any process has exited."""
        return any(process.poll() is not None for process in self.processes)

    def wait(self, timeout_s: float | None = None) -> list[int]:
        """Wait for all processes and return their exit statuses."""
        return [process.wait(timeout_s) for process in self.processes]

    def kill(self, rank: int) -> float:
        """Kill one rank; return the seconds until the others had exited by themselves."""
        self.processes[rank].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        try:
            self.wait(DETECTION_LIMIT_S)
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            self.wait()
        return time.monotonic() - begin

    def unexpected(self, killed: int) -> list[int]:
        """Return undocumented exit statuses of the ranks that were not killed."""
        return [
            process.returncode
            for rank, process in enumerate(self.processes)
            if rank != killed and process.returncode not in (0, EX_TEMPFAIL)
        ]


def inject_faults(
    run: Path, arguments: Sequence[str], *, kills: int, world_size: int, seed: int
) -> tuple[list[Kill], list[str]]:
    """Kill and resume a run many times, then let it finish.

    Args:
        run: Folder of the run.
        arguments: Arguments of ``ssast pretrain``.
        kills: Number of kills.
        world_size: Number of ranks.
        seed: Seed of the times and the ranks.

    Returns:
        The kills, and a line for each failure.
    """
    draw, done, failures = random.Random(seed), list[Kill](), list[str]()
    log, kept = run.parent / "output.log", 0
    while len(done) < kills:
        ranks, begin, first = Ranks(world_size, arguments, log), time.monotonic(), last_step(run)
        # Mostly between two checkpoints, and now and then before the first step.
        starting = draw.random() < 0.1
        delay_s = draw.uniform(0.0, 4.0 if starting else 1.0)
        while not starting and last_step(run) == first and not ranks.ended():
            time.sleep(0.002)
        reached = time.monotonic()
        while time.monotonic() - reached < delay_s and not ranks.ended():
            time.sleep(0.001)
        if ranks.ended():
            failures.append(f"a process ended by itself: {ranks.wait()}, see {log}")
            break
        rank, saving = draw.randrange(world_size), any(run.glob("checkpoints/.tmp-*"))
        at_s, step = time.monotonic() - begin, last_step(run)
        detected_s = ranks.kill(rank)
        found = Checkpoints(run / "checkpoints").latest()
        now = int(found.name[4:]) if found is not None else 0
        kill = Kill(
            len(done) + 1,
            rank,
            "start" if starting else "steps",
            at_s,
            step,
            saving,
            now,
            detected_s,
        )
        done.append(kill)
        print(row(kill), flush=True)
        if now < kept:
            failures.append(
                f"kill {kill.number}: the checkpoint of step {kept} is lost, the newest is of {now}"
            )
        if detected_s > DETECTION_LIMIT_S:
            failures.append(f"kill {kill.number}: the other ranks did not exit")
        if ranks.unexpected(rank):
            failures.append(f"kill {kill.number}: exit status {ranks.unexpected(rank)}, see {log}")
        kept = now
    statuses = Ranks(world_size, arguments, log).wait()
    if any(statuses):
        failures.append(f"the last attempt ended with {statuses}, see {log}")
    return done, failures


def last_step(run: Path) -> int:
    """Return the last training step that was logged; 0 if none."""
    points = scalars(read_metrics(run / "metrics.jsonl"), "train/loss")
    return points[-1][0] if points else 0


def losses(run: Path) -> dict[tuple[str, int], float]:
    """Return each loss that a run logged, by metric and step."""
    lines = read_metrics(run / "metrics.jsonl")
    return {
        (name, step): loss
        for name in ("train/loss", "valid/loss")
        for step, loss in scalars(lines, name)
    }


def row(kill: Kill) -> str:
    """Format a kill as a line of the table."""
    return (
        f"{kill.number:6d} {kill.rank:5d} {kill.phase:>6} {kill.at_s:7.2f} {kill.step:6d} "
        f"{'yes' if kill.saving else 'no':>7} {kill.checkpoint:5d} {kill.detected_s:11.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if anything was lost."""
    parser = argparse.ArgumentParser("ssast bench faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (100)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the run (2)")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage (1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of ranks and times (0)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        return _run_benchmark(Path(name), options)


def _run_benchmark(folder: Path, options: argparse.Namespace) -> int:
    (folder / "clips").mkdir()
    write_clips(folder / "clips", 12, seconds=0.6, kind="wav")
    (folder / "faults.yaml").write_text("{}")
    common = [
        str(folder / "faults.yaml"),
        *SETTINGS,
        f"data.train={folder / 'clips'}",
        f"train.zero_stage={options.stage}",
    ]
    killed, whole = folder / "killed" / "run", folder / "whole" / "run"
    killed.parent.mkdir()
    whole.parent.mkdir()
    steps = f"train.steps={25 * options.kills + 40}"
    print("  kill  rank  phase  after s   step  saving  ckpt  detected s")
    kills, failures = inject_faults(
        killed,
        [*common, steps, f"run.folder={killed}"],
        kills=options.kills,
        world_size=options.ranks,
        seed=options.seed,
    )
    uninterrupted = [*common, steps, f"run.folder={whole}"]
    if any(Ranks(options.ranks, uninterrupted, whole.parent / "output.log").wait()):
        failures.append("the uninterrupted run failed")
    ours, theirs = losses(killed), losses(whole)
    if ours.keys() != theirs.keys():
        failures.append("the killed run has not logged the same steps")
    differences = [abs(ours[k] - theirs[k]) / abs(theirs[k]) for k in ours.keys() & theirs.keys()]
    results = {
        "kills": len(kills),
        "while_saving": sum(kill.saving for kill in kills),
        "while_starting": sum(kill.phase == "start" for kill in kills),
        "lost_checkpoints": sum("is lost" in failure for failure in failures),
        "losses": len(differences),
        "identical_losses": sum(difference == 0 for difference in differences),
        "largest_relative_difference": max(differences, default=None),
        "detected_s_median": statistics.median(kill.detected_s for kill in kills),
        "detected_s_largest": max(kill.detected_s for kill in kills),
        "failures": failures,
    }
    for key, value in results.items():
        print(f"{key}: {value}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results | {"table": [asdict(kill) for kill in kills]}, indent=1)
        options.out.write_text(text + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
