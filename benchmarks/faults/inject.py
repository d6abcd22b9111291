"""The faults themselves: each is made, watched and undone."""

import contextlib
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from ssast.benchmarks.faults.disk import disconnected, limited
from ssast.benchmarks.faults.plan import Fault
from ssast.benchmarks.faults.processes import Ranks, until
from ssast.benchmarks.faults.trial import (
    LIMIT_S,
    RETRY_S,
    TIMEOUT_S,
    Trial,
    said,
    shuffled_manifests,
    vanished,
)
from ssast.engine.monitoring.watchdog import EX_TEMPFAIL

USER_ERROR = 2
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
NO_PEER = (0, EX_TEMPFAIL)  # statuses of a rank that has lost another one


@dataclass
class Effect:
    """What a fault did.

    Attributes:
        statuses: Exit statuses of the ranks; None of those that went on.
        noticed_s: Seconds until the run ended or said what is wrong; None if it need not.
        failures: What should not have happened.
    """

    statuses: list[int | None] = field(default_factory=list)
    noticed_s: float | None = None
    failures: list[str] = field(default_factory=list)

    def expect(self, condition: bool, otherwise: str) -> None:
        """Record a failure unless the condition holds."""
        if not condition:
            self.failures.append(otherwise)


def inject(trial: Trial, fault: Fault) -> Effect:
    """Make a fault, watch what the run does, and undo it.

    Args:
        trial: The run; it trains, or is about to be started where the fault comes at "resume".
        fault: The fault.
    """
    effect = Effect()
    ranks = None if fault.moment == "resume" else trial.ranks
    if ranks is not None:
        ranks.forget_output()
    INJECTORS[fault.kind](trial, ranks, fault, fault.draws(), effect)
    assert trial.ranks is not None
    effect.statuses = trial.ranks.statuses
    return effect


def _ends(ranks: Ranks, allowed: tuple[int, ...], effect: Effect, limit_s: float = LIMIT_S) -> None:
    """Wait until all ranks have exited, each with one of these statuses."""
    waited_s = ranks.wait(limit_s)
    effect.noticed_s = waited_s if effect.noticed_s is None else effect.noticed_s
    effect.expect(waited_s <= limit_s, f"ranks ran on for {limit_s:g} s")
    wrong = [status for status in ranks.statuses if status not in allowed]
    effect.expect(not wrong, f"exit status {wrong}")


def _kill(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    assert ranks is not None
    ranks.send(signal.SIGKILL, draw.randrange(len(ranks)))
    _ends(ranks, (-signal.SIGKILL, *NO_PEER), effect)


def _signal(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    assert ranks is not None
    number, everyone = draw.choice((*CAUGHT, signal.SIGHUP)), draw.random() < 0.7
    once = draw.random() < 0.75
    rank = None if everyone else draw.randrange(len(ranks))
    ranks.send(number, rank)
    if not once:
        time.sleep(draw.uniform(0.0, 0.3))
        ranks.send(number, rank)
    _ends(ranks, (128 + number, -number, *NO_PEER), effect)
    over = said(ranks, r"step +(\d+)/\1 ")  # after the last step a signal ends a run at once
    if once and number in CAUGHT and fault.moment != "start" and not over:
        orderly = all(status == 128 + number for status in ranks.statuses)
        effect.expect(orderly, f"exit status {ranks.statuses}")
        saved, step = trial.newest(), trial.last_step()
        effect.expect(saved == step, f"stopped after step {step}, but saved step {saved}")


def _stop(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    assert ranks is not None
    rank, long = draw.randrange(len(ranks)), draw.random() < 0.5
    ranks.send(signal.SIGSTOP, rank)
    if not long:
        time.sleep(draw.uniform(0.2, TIMEOUT_S / 3))
        ranks.send(signal.SIGCONT, rank)
        effect.expect(trial.advances(ranks), f"a stop of a moment: {ranks.statuses}")
        return
    others = [process for n, process in enumerate(ranks.processes) if n != rank]
    gone = until(lambda: all(p.exitcode is not None for p in others), LIMIT_S) if others else None
    if gone is None:
        time.sleep(TIMEOUT_S + 2.0)
    effect.noticed_s = gone
    effect.expect(gone is not None or not others, "the other rank has not noticed")
    ranks.send(signal.SIGCONT, rank)
    if not others and until(lambda: ranks.ended, 2.0) is None:
        return  # it was between two heartbeats, and goes on
    _ends(ranks, NO_PEER, effect)


def _full(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    _fail_disk(trial, ranks, effect, trial.disk.full, lasting=draw.random() < 0.3)


def _read_only(
    trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect
) -> None:
    folder = trial.checkpoints if ranks and draw.random() < 0.5 else trial.run
    folder.mkdir(parents=True, exist_ok=True)
    lasting = draw.random() < 0.3
    _fail_disk(trial, ranks, effect, lambda _: trial.disk.read_only(folder), lasting=lasting)


def _fail_disk(
    trial: Trial,
    ranks: Ranks | None,
    effect: Effect,
    failing: Callable[[list[int]], contextlib.AbstractContextManager[None]],
    *,
    lasting: bool,
) -> None:
    """Let a disk fail until the run has said so, or has ended; start the run on it if none runs."""
    with contextlib.ExitStack() as stack:
        if trial.disk.mounted:
            stack.enter_context(failing([]))
        ranks = ranks or trial.launch()
        if not trial.disk.mounted:
            stack.enter_context(failing(ranks.pids()))
        begin, words = time.monotonic(), "cannot write|cannot be written|cannot be used"
        told = until(lambda: ranks.all_ended or said(ranks, words), LIMIT_S)
        effect.noticed_s = time.monotonic() - begin
        effect.expect(told is not None, "a failing disk was not noticed")
        if lasting:
            ranks.wait(LIMIT_S)
    if not ranks.ended and trial.advances(ranks):
        return
    ranks.wait(LIMIT_S)
    trial.unlogged.update(map(int, re.findall(r"step (\d+) is not logged yet", ranks.output())))
    wrong = [status for status in ranks.statuses if status not in (USER_ERROR, *NO_PEER)]
    effect.expect(not wrong, f"exit status {wrong}")
    if not trial.finished:
        effect.expect(said(ranks, "ssast: error: "), "it has ended without a message")


def _slow(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    assert ranks is not None
    trial.switches.set(fsync_s=draw.uniform(0.3, 1.5))
    try:
        if draw.random() < 0.5:
            until(lambda: trial.saving() or ranks.ended, LIMIT_S)
            time.sleep(draw.uniform(0.0, 2.0))
            _kill(trial, ranks, fault, draw, effect)
            return
        effect.expect(trial.advances(ranks), f"a slow disk: {ranks.statuses}")
    finally:
        trial.switches.set()


def _storage(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    assert ranks is not None
    long, begin = draw.random() < 0.5, time.monotonic()
    with disconnected(trial.data.files[0].parent):
        if not long:
            until(lambda: ranks.ended, draw.uniform(0.5, RETRY_S / 2))
        else:
            _ends(ranks, NO_PEER, effect)
            effect.noticed_s = time.monotonic() - begin
            words = "storage has failed for|lost another process"
            effect.expect(trial.finished or said(ranks, words), "storage is not to blame")
    if not long:
        effect.expect(trial.advances(ranks), f"storage failed: {ranks.statuses}")


def _owner(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    begin = time.monotonic()
    first = ranks or trial.start()
    # Where both begin at once either may win, and the sums of another world round otherwise.
    sizes = (trial.world_size,) if ranks is None else (1, trial.world_size)
    second = trial.start(world_size=draw.choice(sizes))
    if ranks is None:  # both begin at once: whoever comes second gives up
        until(lambda: first.all_ended or second.all_ended, LIMIT_S)
        if first.all_ended:
            first, second = second, first
    else:
        until(lambda: second.all_ended, LIMIT_S)
    effect.noticed_s = time.monotonic() - begin
    trial.ranks = first
    if not trial.finished:
        effect.expect(
            set(second.statuses) <= {USER_ERROR, EX_TEMPFAIL} and said(second, "another process"),
            f"the second run in the folder ended with {second.statuses}",
        )
    second.send(signal.SIGKILL)
    second.wait(LIMIT_S)
    effect.expect(trial.advances(first), f"the first run in the folder: {first.statuses}")


def _torn(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    assert ranks is not None
    ranks.send(signal.SIGKILL)
    ranks.wait(LIMIT_S)
    newest = trial.newest()
    folder, part = trial.checkpoints / f"step{newest:09d}", draw.choice(list(TORN))
    path = {"latest": trial.checkpoints, "best.json": trial.checkpoints, "metrics.jsonl": trial.run}
    target = path.get(part, folder) / part if part != "folder" else folder
    if not newest or not target.exists():
        trial.launch()
        return
    of_checkpoint, backup = part not in path, trial.folder / "backup"
    shutil.rmtree(backup, ignore_errors=True)
    shutil.copytree(folder, backup)
    TORN[part](target, draw)
    if of_checkpoint:
        trial.kept = trial.newest()  # what is left is what may not be lost
    begin = time.monotonic()
    ranks = trial.launch()
    if of_checkpoint and not trial.kept:
        _ends(ranks, (USER_ERROR, *NO_PEER), effect)
        effect.expect(said(ranks, "every checkpoint is damaged|is gone"), "no word of the damage")
        shutil.rmtree(folder, ignore_errors=True)
        backup.rename(folder)
        return
    told = until(lambda: ranks.all_ended or said(ranks, "damaged|is gone|resumed from"), LIMIT_S)
    effect.noticed_s = time.monotonic() - begin
    effect.expect(told is not None, f"{part} was torn and nothing said")
    effect.expect(trial.advances(ranks), f"{part} was torn: {ranks.statuses}")


def _cut(path: Path, draw: Random) -> None:
    os.truncate(path, int(path.stat().st_size * draw.random()))


def _flip(path: Path, draw: Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _cut_end(path: Path, draw: Random) -> None:
    os.truncate(path, path.stat().st_size - draw.randrange(1, 80))


TORN: dict[str, Callable[[Path, Random], None]] = {
    "state.safetensors": _cut,
    "meta.json": _flip,
    "manifest.json": _cut,
    "folder": lambda path, _: shutil.rmtree(path),
    "latest": _cut,
    "best.json": _cut,
    "metrics.jsonl": _cut_end,
}


def _clock(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    assert ranks is not None
    trial.switches.set(clock_s=draw.choice((-1, 1)) * draw.choice((60.0, 3600.0, 1e6, 1e9)))
    try:
        effect.expect(trial.advances(ranks), f"the clock has jumped: {ranks.statuses}")
    finally:
        trial.switches.set()
    if not ranks.ended:
        effect.expect(trial.advances(ranks), f"the clock has jumped back: {ranks.statuses}")


def _manifest(
    trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect
) -> None:
    manifest, over = trial.data.manifest, threading.Event()
    right, step = manifest.read_text(), trial.last_step()

    def rewrite() -> None:
        for text in shuffled_manifests(manifest):
            with manifest.open("w") as file:
                file.write(text[: len(text) // 2])
                file.flush()
                over.wait(0.02)
                file.write(text[len(text) // 2 :])
            if over.wait(0.02):
                break
        manifest.write_text(right)

    writer = threading.Thread(target=rewrite)
    writer.start()
    begin = time.monotonic()
    ranks = trial.launch()
    until(lambda: ranks.all_ended or trial.last_step() > step or said(ranks, "resumed"), LIMIT_S)
    effect.noticed_s = time.monotonic() - begin
    over.set()
    writer.join()
    if ranks.ended:
        _ends(ranks, (USER_ERROR, *NO_PEER), effect)
        named = "train.json|training clips|validation clips"
        effect.expect(trial.finished or said(ranks, named), "it does not say what changed")
    else:
        effect.noticed_s = None
        effect.expect(trial.advances(ranks), f"the manifest has changed: {ranks.statuses}")


def _memory(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    assert ranks is not None
    with contextlib.suppress(OSError, IndexError):  # it may just have ended
        pid = draw.choice(ranks.pids())
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        room = draw.choice((0, 1 << 20, 8 << 20))
        with limited([pid], resource.RLIMIT_AS, pages * resource.getpagesize() + room):
            begin = time.monotonic()
            until(lambda: ranks.ended, 3.0)
            effect.noticed_s = time.monotonic() - begin if ranks.ended else None
    _breaks_down(trial, ranks, effect)


def _open_files(
    trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect
) -> None:
    assert ranks is not None
    with contextlib.suppress(OSError, IndexError):
        pid = draw.choice(ranks.pids())
        highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        with limited([pid], resource.RLIMIT_NOFILE, highest + 1):
            begin = time.monotonic()
            until(lambda: ranks.ended, draw.uniform(0.5, RETRY_S / 2))
            effect.noticed_s = time.monotonic() - begin if ranks.ended else None
    _breaks_down(trial, ranks, effect)


def _breaks_down(trial: Trial, ranks: Ranks, effect: Effect) -> None:
    """A process without memory or files may end in many ways, but never hang."""
    noticed_s = effect.noticed_s
    if not ranks.ended and trial.advances(ranks):
        return
    waited_s = ranks.wait(LIMIT_S)
    effect.expect(waited_s <= LIMIT_S, "ranks hang")
    effect.noticed_s = waited_s if noticed_s is None else noticed_s


def _output(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    if draw.random() < 0.5:
        ranks = trial.launch(stdout="/dev/full")
    else:
        pipe = trial.folder / "pipe"
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        ranks = trial.launch(stdout=str(pipe))
        until(lambda: ranks.ended or _readable(reader), LIMIT_S)
        time.sleep(draw.uniform(0.0, 1.0))
        os.close(reader)
    effect.expect(trial.advances(ranks), f"nothing can be printed: {ranks.statuses}")
    ranks.send(signal.SIGTERM)
    _ends(ranks, (128 + signal.SIGTERM, -signal.SIGTERM, 0), effect)


def _readable(pipe: int) -> bool:
    """Return whether something was written to a pipe that does not block, and read a part."""
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe, 1) != b""
    return False


def _vanish(trial: Trial, ranks: Ranks | None, fault: Fault, draw: Random, effect: Effect) -> None:
    assert ranks is not None
    files, log = trial.data.files, trial.run / "rejected.jsonl"
    count = draw.choice((1, 2, len(files)))
    before, begin = log.stat().st_size if log.exists() else 0, time.monotonic()
    with vanished(draw.sample(files, count)):
        told = until(lambda: ranks.ended or (log.exists() and log.stat().st_size > before), RETRY_S)
        until(lambda: ranks.ended, 1.0)
    effect.noticed_s = time.monotonic() - begin if told is not None else None
    if trial.advances(ranks):
        return
    _ends(ranks, (USER_ERROR, *NO_PEER), effect)
    effect.expect(said(ranks, "cannot be used"), "it does not say what is gone")


Injector = Callable[[Trial, Ranks | None, Fault, Random, Effect], None]
INJECTORS: dict[str, Injector] = {
    "kill": _kill,
    "signal": _signal,
    "stop": _stop,
    "full-disk": _full,
    "read-only": _read_only,
    "slow-disk": _slow,
    "storage": _storage,
    "owner": _owner,
    "torn": _torn,
    "clock": _clock,
    "manifest": _manifest,
    "memory": _memory,
    "open-files": _open_files,
    "output": _output,
    "clip": _vanish,
    "shard": _vanish,
}
