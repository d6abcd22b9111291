"""Which faults are injected, in which order: drawn from a seed before anything is started."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

START_S, STEPS_S = 2.5, 0.8  # longest delays after a start, and after a step


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: Its name on the command line.
        does: What is done, in a few words.
        moments: When it can happen: "resume" (before the processes are started again), "start"
            (while they start), "steps" (while they train), "save" (while a checkpoint is written).
        changes_data: Whether other losses than those of an undisturbed run are right after it.
        sharded: Whether the clips are in shards.
    """

    name: str
    does: str
    moments: tuple[str, ...]
    changes_data: bool = False
    sharded: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("kill", "SIGKILL to a rank", ("start", "steps", "save")),
        Kind(
            "signal",
            "SIGTERM, SIGINT, SIGUSR1, SIGHUP, or twice",
            ("start", "steps", "save"),
        ),
        Kind("stop", "SIGSTOP to a rank, shorter or longer than train.timeout_s", ("steps",)),
        Kind("full-disk", "no space on the disk of the run", ("resume", "steps", "save")),
        Kind("read-only", "the run's folder becomes read-only", ("resume", "steps")),
        Kind("slow-disk", "each fsync takes seconds, perhaps with SIGKILL meanwhile", ("steps",)),
        Kind("storage", "the mount of the clips dies for seconds (ENOTCONN)", ("steps",)),
        Kind("owner", "a second run in the same folder", ("resume", "steps")),
        Kind("torn", "SIGKILL, then a file of the run is cut off, changed or gone", ("save",)),
        Kind("clock", "the clock jumps by hours or decades", ("steps", "save")),
        Kind("manifest", "the manifest is rewritten while it is read", ("resume",)),
        Kind("memory", "no more memory is given to a rank", ("start", "steps", "save")),
        Kind("open-files", "no more files can be opened by a rank", ("steps", "save")),
        Kind("output", "the output is a full disk or a closed pipe", ("resume",)),
        Kind("clip", "audio files vanish", ("steps",), changes_data=True),
        Kind("shard", "a shard vanishes", ("steps",), changes_data=True, sharded=True),
    )
}


@dataclass(frozen=True)
class Fault:
    """One fault of a plan.

    Attributes:
        number: Number in the plan, from 1.
        kind: Name of its kind.
        moment: When it happens, see :class:`Kind`.
        delay_s: Time from that moment to the fault in s.
        seed: Seed of all else: the rank, the signal, the file, ...
    """

    number: int
    kind: str
    moment: str
    delay_s: float
    seed: int

    @property
    def sharded(self) -> bool:
        """Whether the clips are in shards."""
        return KINDS[self.kind].sharded

    def draws(self) -> random.Random:
        """Return the random numbers that decide about the rest."""
        return random.Random(self.seed)


def draw_plan(kinds: Sequence[str], count: int, seed: int) -> list[Fault]:
    """Draw a plan with every kind equally often; those that change data come after others.

    Args:
        kinds: Names of kinds.
        count: Number of faults.
        seed: Seed of the plan.
    """
    random_ = random.Random(seed)
    names = [kinds[number % len(kinds)] for number in range(count)]
    random_.shuffle(names)
    names.sort(key=lambda name: (KINDS[name].sharded, KINDS[name].changes_data))
    turns = dict.fromkeys(names, 0)
    faults = []
    for number, name in enumerate(names, 1):
        moments = KINDS[name].moments
        moment = moments[turns[name] % len(moments)]
        turns[name] += 1
        delay_s = random_.uniform(0.0, START_S if moment == "start" else STEPS_S)
        faults.append(Fault(number, name, moment, delay_s, random_.getrandbits(32)))
    return faults
