"""Fuzz every reader of files that a stranger may have made, and count what is not refused cleanly.

Files made from scratch are mutated: bits, sizes in headers, chunks, tokens, values of JSON. Each
input goes to its reader in a process of its own, which has limits on time and memory. It may be
accepted or refused with one of the project's own errors; another exception, a crash, a hang or
memory above the limit is a failure, and its files are kept, to be read again with --replay.

Input number n of a reader is a pure function of --seed and n. A run that was stopped goes on where
it was, if --out names the same folder.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Lock

from ssast.benchmarks.fuzzing.readers import READERS
from ssast.benchmarks.fuzzing.reading import FAILURES, Limits, Reader, Result
from ssast.benchmarks.fuzzing.worker import CASE, Worker
from ssast.pipelines.cores import usable_cores
from ssast.pipelines.files import write_atomically

INPUTS = 23_000
RESULTS, FACTS, FILES = "results.json", "case.json", "files"
SAVE_EVERY = 50  # inputs between two writes of the results
MOST_FAILURES = 50  # of one reader, whose files are kept


@dataclass
class Row:
    """Results of a reader."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    error: int = 0
    crash: int = 0
    hang: int = 0
    memory: int = 0
    slowest_s: float = 0.0
    largest_mib: float = 0.0
    skipped: str = ""
    """Why nothing was read, if so."""

    def add(self, result: Result) -> None:
        """Count a result."""
        self.inputs += 1
        setattr(self, result.outcome, getattr(self, result.outcome) + 1)
        self.slowest_s = max(self.slowest_s, round(result.seconds, 2))
        self.largest_mib = max(self.largest_mib, round(result.memory_mib, 1))

    @property
    def failures(self) -> int:
        """Number of failures of every kind."""
        return sum(getattr(self, kind) for kind in FAILURES)


@dataclass
class Fuzz:
    """A run over some readers.

    Attributes:
        out: Folder of the results and of the inputs that failed.
        seed: Seed of the mutations.
        limits: Limits of each input.
        wanted: Number of inputs by reader.
        rows: Results by reader.
    """

    out: Path
    seed: int
    limits: Limits
    wanted: dict[str, int]
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the results of a run that was stopped."""
        self._lock, self.stop = Lock(), Event()
        path = self.out / RESULTS
        if path.exists():
            content = json.loads(path.read_text())
            if content["seed"] == self.seed and content["limits"] == asdict(self.limits):
                self.rows = {name: Row(**row) for name, row in content["rows"].items()}

    def save(self) -> None:
        """Write the results so far."""
        with self._lock:
            rows = {name: asdict(row) for name, row in self.rows.items()}
            content = {"seed": self.seed, "limits": asdict(self.limits), "rows": rows}
            write_atomically(self.out / RESULTS, json.dumps(content, indent=1) + "\n")

    def run(self, name: str, reader: Reader | None = None) -> None:
        """Give a reader its inputs, from where an earlier run stopped."""
        row = self.rows.setdefault(name, Row())
        if row.inputs >= self.wanted[name]:
            return
        reader = READERS[name] if reader is None else reader
        if not reader.seeds():
            row.skipped = "its program is not installed"
            return
        with tempfile.TemporaryDirectory(prefix=f"ssast-fuzz-{name}-") as folder:
            worker = Worker({name: reader}, Path(folder), self.seed, self.limits)
            try:
                while row.inputs < self.wanted[name] and not self.stop.is_set():
                    number = row.inputs
                    result = worker.run(name, number)
                    row.add(result)
                    if result.outcome in FAILURES:
                        self._report(name, number, result, Path(folder) / CASE, row)
                    if row.inputs % SAVE_EVERY == 0:
                        self.save()
            finally:
                worker.close()
                self.save()

    def _report(self, name: str, number: int, result: Result, case: Path, row: Row) -> None:
        print(f"{name} {number}: {result.outcome}: {result.detail}", flush=True)
        if row.failures > MOST_FAILURES:
            return
        kept = self.out / "failures" / f"{name}-{number:06d}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        shutil.copytree(case, kept / FILES)
        facts = {"reader": name, "number": number, "seed": self.seed} | asdict(result)
        (kept / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def table(rows: dict[str, Row]) -> str:
    """Return the results as a table of Markdown."""
    lines = [
        "| Reader | Inputs | Accepted | Refused | Other error | Crash | Hang | Memory | "
        "Slowest | Largest |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    total = Row()
    for name, row in rows.items():
        what = READERS[name].what if name in READERS else name
        if row.skipped:
            lines.append(f"| {what} | 0 | {row.skipped} |" + " |" * 7)
            continue
        for key in ("inputs", "accepted", "refused", *FAILURES):
            setattr(total, key, getattr(total, key) + getattr(row, key))
        total.slowest_s = max(total.slowest_s, row.slowest_s)
        total.largest_mib = max(total.largest_mib, row.largest_mib)
        lines.append(_line(what, row))
    return "\n".join([*lines, _line("all", total)])


def _line(what: str, row: Row) -> str:
    counts = (row.inputs, row.accepted, row.refused, *(getattr(row, kind) for kind in FAILURES))
    cells = [f"{count:,}" for count in counts]
    cells += [f"{row.slowest_s:.2f} s", f"{row.largest_mib:.0f} MiB"]
    return f"| {what} | {' | '.join(cells)} |"


def shares(total: int, names: Sequence[str]) -> dict[str, int]:
    """Divide a number of inputs between readers."""
    weights = {name: READERS[name].share for name in names}
    counts = {name: total * weight // sum(weights.values()) for name, weight in weights.items()}
    counts[names[0]] += total - sum(counts.values())
    return counts


def replay(folder: Path, limits: Limits) -> Result:
    """Read the files of a failure again, in a process of its own."""
    facts = json.loads((folder / FACTS).read_text())
    with tempfile.TemporaryDirectory(prefix="ssast-fuzz-") as work:
        name = facts["reader"]
        worker = Worker({name: READERS[name]}, Path(work), facts["seed"], limits)
        try:
            return worker.run(name, (folder / FILES).absolute())
        finally:
            worker.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a reader failed."""
    parser = argparse.ArgumentParser("ssast bench fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=INPUTS, help=f"mutated inputs ({INPUTS})")
    parser.add_argument(
        "--readers", nargs="+", choices=READERS, default=list(READERS), help="all by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (0)")
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="readers at once (cores)")
    parser.add_argument(
        "--seconds", type=float, default=Limits.seconds, help="limit of an input (%(default)g)"
    )
    parser.add_argument(
        "--memory-mib",
        type=float,
        default=Limits.memory_mib,
        help="limit of the growth in memory (%(default)g)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/fuzz"), help="folder of results (build/fuzz)"
    )
    parser.add_argument("--replay", type=Path, metavar="DIR", help="read one failure again")
    options = parser.parse_args(arguments)
    if min(options.jobs, options.inputs) < 1:
        parser.error("--jobs and --inputs must be at least 1")
    limits = Limits(options.seconds, options.memory_mib)
    if options.replay is not None:
        found = replay(options.replay, limits)
        print(
            f"{found.outcome}: {found.detail} ({found.seconds:.2f} s, {found.memory_mib:.0f} MiB)"
        )
        return int(found.outcome in FAILURES)
    wanted = shares(options.inputs, list(READERS))
    fuzz = Fuzz(options.out, options.seed, limits, wanted)
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            for done in [pool.submit(fuzz.run, name) for name in options.readers]:
                done.result()
        except BaseException:
            fuzz.stop.set()
            pool.shutdown(cancel_futures=True)
            print(table(fuzz.rows))
            raise
    print(table(fuzz.rows))
    return int(any(row.failures for row in fuzz.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
