"""The clips that a stream could not read, and whether they are too many."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

EVIDENCE = math.log(1e4)  # chance alone gives such a share in one of 10,000 samples
NUM_EXAMPLES = 3  # in a message


@dataclass(frozen=True)
class Counts:
    """Counts of the clips of a stream.

    Attributes:
        total: Clips of the data set.
        seen: Clips so far; those of later epochs count again.
        rejected: Those of them that could not be read.
        files: Different ones among those.
        shuffled: Whether the clips come in random order, so that the first tell of all.
    """

    total: int
    seen: int
    rejected: int
    files: int
    shuffled: bool

    def too_many(self, limit: float) -> bool:
        """Return whether more clips than allowed cannot be read.

        One bad file says nothing about its data set, wherever it comes up, unless none is allowed.
        More of them are too many when even the whole data set is allowed fewer, or when the share
        of a random sample is beyond what chance makes of the allowed one.

        Args:
            limit: Allowed share; 1 allows everything.
        """
        if limit >= 1 or self.files < (1 if limit == 0 else min(2, self.total)):
            return False
        certain = self.files > limit * self.total
        return certain or (self.shuffled and self._evidence(limit) > EVIDENCE)

    def message(self, limit: float, examples: Sequence[tuple[str, str]]) -> str:
        """Return the error message.

        Args:
            limit: Allowed share.
            examples: Paths and reasons of some clips.
        """
        shown = "; ".join(f"{path} ({reason})" for path, reason in examples[:NUM_EXAMPLES])
        return (
            f"{self.rejected} of the first {self.seen} clips cannot be used (allowed: "
            f"{limit:.0%}), all of them in rejected.jsonl: {shown}"
        )

    def _evidence(self, limit: float) -> float:
        """Return -log of Chernoff's bound on the chance of so many rejected clips."""
        bad = self.rejected / self.seen
        if bad <= limit:
            return 0.0
        good = (1 - bad) * math.log((1 - bad) / (1 - limit)) if bad < 1 else 0.0
        return self.seen * (bad * math.log(bad / limit) + good) if limit else math.inf


@dataclass
class Rejections:
    """The clips of a stream that could not be read by this rank.

    Attributes:
        total: Clips of the data set.
        shuffled: Whether they come in random order.
        seen: Clips so far.
        rejected: Those of them that could not be read.
        files: Path and reason of each clip that could not be read, by clip id.
    """

    total: int
    shuffled: bool
    seen: int = 0
    rejected: int = 0
    files: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        """Counts of this rank."""
        return Counts(self.total, self.seen, self.rejected, len(self.files), self.shuffled)

    def examples(self) -> list[tuple[str, str]]:
        """Return path and reason of the first clips that could not be read."""
        return list(self.files.values())[:NUM_EXAMPLES]
