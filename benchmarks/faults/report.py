"""What came of the faults: a line for each, and a table with a row for each kind."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ssast.benchmarks.faults.plan import KINDS

HEADER = (
    "Kind",
    "What is done",
    "Faults",
    "Exit statuses",
    "Noticed in s: median, most",
    "Checkpoints lost",
    "Losses equal",
)


@dataclass
class Result:
    """A fault and what came of it.

    Attributes:
        number: Number in the plan.
        kind: Name of its kind.
        moment: When it came.
        ranks: Ranks of the run.
        step: Last step that was logged before it.
        statuses: Exit statuses of the ranks; None of those that went on.
        noticed_s: Seconds until the run ended or said what is wrong; None if it need not.
        lost: Checkpoints lost.
        failures: What should not have happened.
        equal: Whether the losses up to the next fault are those of an undisturbed run; None if
            they need not be.
    """

    number: int
    kind: str
    moment: str
    ranks: int
    step: int
    statuses: list[int | None]
    noticed_s: float | None
    lost: int
    failures: list[str] = field(default_factory=list)
    equal: bool | None = None

    def line(self) -> str:
        """Return a line for the terminal."""
        noticed = "" if self.noticed_s is None else f"{self.noticed_s:.2f}"
        return (
            f"{self.number:5d} {self.kind:10} {self.moment:6} {self.ranks:5d} {self.step:5d} "
            f"{_statuses(self.statuses):18} {noticed:>9}  {'; '.join(self.failures)}"
        ).rstrip()


LINE_HEADER = "fault kind       moment ranks  step exit status        noticed s"


def _statuses(statuses: Iterable[int | None]) -> str:
    return " ".join("goes on" if s is None else str(s) for s in dict.fromkeys(statuses))


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table with a row for each kind of fault."""
    lines: list[tuple[str, ...]] = [HEADER, (":--", ":--", "--:", ":--", "--:", "--:", ":--")]
    for name, kind in KINDS.items():
        found = [result for result in results if result.kind == name]
        if found:
            lines.append((name, kind.does, *_cells(found)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(results: Sequence[Result]) -> tuple[str, ...]:
    counts = Counter(status for result in results for status in set(result.statuses))
    named = ((f"{n} x {_statuses([s])}") for s, n in counts.most_common())
    times = [result.noticed_s for result in results if result.noticed_s is not None]
    noticed = f"{statistics.median(times):.1f}, {max(times):.1f}" if times else "-"
    compared = [result.equal for result in results if result.equal is not None]
    equal = f"{sum(compared)} of {len(compared)}" if compared else "other data"
    return (
        str(len(results)),
        ", ".join(named),
        noticed,
        str(sum(result.lost for result in results)),
        equal,
    )
