"""How OpenMP's threads should wait: a training step on an idle CPU and beside busy programs.

One process per way to wait, with the variables of :mod:`ssast.pipelines.cores` in its environment,
takes steps in turn with the others; competitors are processes that do nothing but count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from ssast.engine.errors import ConfigError
from ssast.pipelines.cores import CHOSEN_BY, SPIN_COUNT, usable_cores

MODULE = "ssast.benchmarks.training.waiting"
DEFAULT, PASSIVE = "default", "passive"
SPINS = (100, 1000, SPIN_COUNT, 3000, 10_000)


@dataclass(frozen=True)
class Load:
    """What every process computes.

    Attributes:
        size: Size of the model.
        clips: Batch size.
        frames: Frames of a clip.
        precision: As ``train.precision``.
        threads: Threads of PyTorch.
    """

    size: str = "tiny"
    clips: int = 4
    frames: int = 1024
    precision: str = "fp32"
    threads: int = 2


@dataclass(frozen=True)
class Row:
    """Seconds of a step: one way to wait, beside some competitors.

    Attributes:
        way: "default", "passive", or a number of spins.
        competitors: Busy programs beside it.
        wall_s: Wall-clock seconds of a step, median of the rounds.
        cpu_s: CPU seconds of a step, likewise.
    """

    way: str
    competitors: int
    wall_s: float
    cpu_s: float


class Waiter:
    """A process that takes training steps when it is told to, and waits in one way."""

    def __init__(self, way: str, load: Load):
        env = {key: value for key, value in os.environ.items() if key not in CHOSEN_BY}
        if way != DEFAULT:
            env |= {"OMP_WAIT_POLICY": PASSIVE} if way == PASSIVE else {"GOMP_SPINCOUNT": way}
        env["OMP_NUM_THREADS"] = str(load.threads)
        self.way = way
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, "--process", json.dumps(asdict(load))],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def take(self, steps: int) -> tuple[float, float]:
        """Take steps; return the wall-clock and the CPU seconds of one.

        Raises:
            ConfigError: The process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:
            if line.startswith("["):  # DeepSpeed prints as well
                wall_s, cpu_s = json.loads(line)
                return wall_s / steps, cpu_s / steps
        raise ConfigError(f"the process of {self.way} ended with {self._process.wait()}")


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many other processes busy inside."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(
    ways: Sequence[str], load: Load, competitors: Sequence[int], *, rounds: int, steps: int
) -> Iterator[Row]:
    """Yield the seconds of each way beside each number of competitors.

    Args:
        ways: See :attr:`Row.way`.
        load: What is computed.
        competitors: Numbers of busy programs.
        rounds: Turns of each way, in another order each time.
        steps: Steps of a turn.
    """
    with ExitStack() as stack:
        waiters = [stack.enter_context(Waiter(way, load)) for way in ways]
        for waiter in waiters:
            waiter.take(2)
        for count in competitors:
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            with busy(count):
                for first in range(rounds):
                    for turn in range(len(waiters)):
                        waiter = waiters[(first + turn) % len(waiters)]
                        found[waiter.way].append(waiter.take(steps))
            for way, times in found.items():
                wall_s, cpu_s = (statistics.median(column) for column in zip(*times, strict=True))
                yield Row(way, count, wall_s, cpu_s)


def format_rows(rows: Sequence[Row]) -> str:
    """Format the seconds as a table, each beside its ratio to the better of default and passive."""
    counts = dict.fromkeys(row.competitors for row in rows)
    ways = dict.fromkeys(row.way for row in rows)
    found = {(row.way, row.competitors): row for row in rows}
    lines = ["wall-clock s of a step, to the better of default and passive; CPU s"]
    lines.append(f"{'':10}" + "".join(f"{f'beside {count}':>24}" for count in counts))
    for way in ways:
        cells = []
        for count in counts:
            usual = [found[w, count].wall_s for w in (DEFAULT, PASSIVE) if (w, count) in found]
            row = found[way, count]
            ratio = f"{row.wall_s / min(usual):.2f}" if usual else ""
            cells.append(f"{f'{row.wall_s:.3f}  {ratio}  {row.cpu_s:.3f}':>24}")
        lines.append(f"{way:10}" + "".join(cells))
    return "\n".join(lines)


def _answer(load: Load) -> None:
    """Take steps as the lines of stdin say; write the seconds of each turn to stdout."""
    import torch

    from ssast.benchmarks.training.ours import OurStep
    from ssast.engine.config import load_config
    from ssast.engine.planning.synthetic import noise
    from ssast.kernels.matmul import fast_matmul
    from ssast.kernels.memory import keep_freed_memory

    given = {
        "train.precision": load.precision,
        "audio.num_frames": load.frames,
        "objective.num_masked": 400 * load.frames // 1024,
    }
    config = load_config(f"{load.size}_patch", [f"{key}={value}" for key, value in given.items()])
    keep_freed_memory()
    with fast_matmul():
        step = OurStep(config, noise(config, load.clips), deepspeed=True)
        torch.set_num_threads(load.threads)  # DeepSpeed sets them as well
        for line in sys.stdin:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            for _ in range(int(line)):
                step()
            print([time.perf_counter() - wall_s, time.process_time() - cpu_s], flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("ssast bench waiting", description=__doc__)
    parser.add_argument("--size", choices=["tiny", "small", "base"], default=Load.size)
    parser.add_argument("--batch", type=int, default=Load.clips, help="(default: %(default)s)")
    parser.add_argument("--frames", type=int, default=Load.frames, help="(default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default=Load.precision)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="(default: cores)")
    parser.add_argument("--spins", type=int, nargs="*", default=SPINS, metavar="N")
    parser.add_argument("--competitors", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn (default: 3)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.process is not None:
        _answer(Load(**json.loads(args.process)))
        return 0
    load = Load(args.size, args.batch, args.frames, args.precision, args.threads)
    ways = [DEFAULT, PASSIVE, *map(str, dict.fromkeys(args.spins))]
    rows = [*measure(ways, load, args.competitors, rounds=args.rounds, steps=args.steps)]
    print(json.dumps([asdict(row) for row in rows]) if args.json else format_rows(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
