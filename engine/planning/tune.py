"""The fastest settings on this machine, found by short real runs.

One setting after another is varied, the others staying at the best so far: the precision where
there is a choice, threads, the batch, doubled as long as it helps and fits, and compilation. Each
run is a process of its own, so one that runs out of memory, hangs or crashes is a line in the table
and no more. The batch changes what is learned: among those within 3 % of the fastest the smallest
is taken.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ssast.engine.config import Config, dump_config, to_plain
from ssast.engine.errors import ConfigError
from ssast.engine.planning.trial import Trial, try_out
from ssast.kernels.matmul import multiplies_bf16
from ssast.pipelines.cores import usable_cores
from ssast.pipelines.files import write_atomically

CLOSE = 0.97  # of the best rate: as fast, given how much such runs vary
_COST_S = 12.0  # of starting a process, at least


@dataclass(frozen=True)
class Candidate:
    """Settings, and the result of their trial."""

    config: Config
    num_threads: int | None = None
    trial: Trial | None = None

    @property
    def rate(self) -> float:
        """Clips per second, 0 if it did not run."""
        return self.trial.clips_per_s if self.trial and self.trial.outcome == "ok" else 0.0


def check_seconds(seconds: float) -> None:
    """Check the time for all runs.

    Raises:
        ConfigError: It is not positive and finite.
    """
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds must be positive and finite, got {seconds:g}")


def tune(
    config: Config,
    *,
    seconds: float = 120.0,
    say: Callable[[str], None] = lambda text: None,
    run: Callable[..., Trial] = try_out,
) -> list[Candidate]:
    """Try settings until time is up.

    Args:
        config: Configuration to begin with, of one process; its clips are read where
            ``data.train`` is set.
        seconds: Time for all runs together; the first is made in any case.
        say: Called with a line about each run.
        run: Makes a trial, as :func:`~ssast.engine.planning.trial.try_out`.

    Returns:
        What was tried, in that order; the first is the configuration as given.

    Raises:
        ConfigError: No time, a batch that accumulation does not divide, or an objective or a
            backbone that is registered in this process alone.
    """
    check_seconds(seconds)
    if config.train.batch_size % config.train.accumulation_steps:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} cannot be divided by "
            f"train.accumulation_steps {config.train.accumulation_steps}"
        )
    end = time.monotonic() + seconds
    tried: list[Candidate] = []

    def attempt(candidate: Candidate) -> Candidate | None:
        """Return the candidate with its trial; None when time is up."""
        left = end - time.monotonic()
        if tried and left < _COST_S:
            return None
        trial = run(
            candidate.config,
            seconds=max(3.0, 0.06 * seconds),
            num_threads=candidate.num_threads,
            timeout_s=max(left, 2 * _COST_S) if tried else max(0.4 * seconds, 30.0),
        )
        tried.append(replace(candidate, trial=trial))
        say(format_line(tried[-1]))
        return tried[-1]

    best = attempt(Candidate(config, num_threads=usable_cores()))
    assert best is not None
    while best.trial is not None and best.trial.outcome == "too slow":
        smaller = _with_batch(best, 0.25)
        done = attempt(smaller) if smaller is not None else None
        if done is None:
            break
        best = done

    def improve(vary: Callable[[Candidate], Iterator[Candidate]], best: Candidate) -> Candidate:
        for candidate in vary(best):
            done = attempt(candidate)
            if done is not None and done.rate * CLOSE > best.rate:
                best = done
        return best

    for vary in (_checkpointing, _precisions, _threads, _loaders):
        best = improve(vary, best)
    # A larger batch must be faster; a smaller one may be as fast, or the first one that runs.
    if not _follow(best, 2, attempt, lambda done, before: done.rate * CLOSE > before.rate):
        _follow(best, 0.5, attempt, lambda done, before: done.rate >= CLOSE * before.rate)
    if any(candidate.rate for candidate in tried):
        improve(_compiled, fastest(tried))  # last, as compiling may take all the time that is left
    return tried


def fastest(tried: list[Candidate]) -> Candidate:
    """Return the candidate with the smallest batch among the fastest.

    Raises:
        ConfigError: None of them ran.
    """
    top = max(candidate.rate for candidate in tried)
    if not top:
        trial = tried[0].trial
        assert trial is not None
        raise ConfigError(f"no setting ran: {trial.outcome}: {trial.reason}")
    good = [candidate for candidate in tried if candidate.rate >= CLOSE * top]
    return min(good, key=lambda candidate: (candidate.config.train.batch_size, -candidate.rate))


def write_tuned(config: Config, tried: list[Candidate], path: Path) -> None:
    """Write what was set, and the fastest settings, for ``ssast pretrain``.

    What nobody set is left out, so that a run still takes it from its checkpoint.

    Args:
        config: The configuration as given.
        tried: Result of :func:`tune`.
        path: The file to write.

    Raises:
        ConfigError: None of them ran.
    """
    best = fastest(tried)
    found, given = (" ".join(format_line(candidate).split()) for candidate in (best, tried[0]))
    words = [f"# {found}", f"# as given: {given}"]
    if best.num_threads is not None and best.num_threads != usable_cores():
        words.append(f"# to be run with OMP_NUM_THREADS={best.num_threads}")
    if best.config.train.batch_size != config.train.batch_size:
        words.append(
            f"# train.batch_size was {config.train.batch_size}: steps and optim.lr are as they were"
        )
    settings = dump_config(_set_or_tuned(config, best.config))
    write_atomically(path, "\n".join(words) + "\n" + settings)


def _set_or_tuned(given: Config, best: Config) -> dict[str, Any]:
    """Return what the user or the recipe set, and what tuning has changed, by section."""
    before, stated = to_plain(given), given.stated
    found = {
        section: {
            key: value
            for key, value in values.items()
            if stated is None or f"{section}.{key}" in stated or value != before[section][key]
        }
        for section, values in to_plain(best).items()
    }
    # An empty section finetune still says what is trained.
    return {name: keys for name, keys in found.items() if keys or name == "finetune"}


def format_line(candidate: Candidate) -> str:
    """Format a candidate as a line of text."""
    train, trial = candidate.config.train, candidate.trial
    assert trial is not None
    settings = f"batch {train.batch_size}"
    if candidate.num_threads is not None:
        settings += f", {candidate.num_threads} threads"
    if candidate.config.data.train is not None:
        settings += f", {candidate.config.data.num_threads or 'default'} DALI threads"
    settings += f", {train.precision}" if train.precision != "auto" else ""
    settings += ", compiled" if train.compile is True else ""
    settings += f", every {train.activation_checkpoint_every}. block recomputed" * bool(
        train.activation_checkpoint_every
    )
    if trial.outcome != "ok":
        return f"  {settings:48} {trial.outcome}: {trial.reason[:100]}"
    return (
        f"  {settings:48} {trial.clips_per_s:9.2f} clips/s  {trial.step_s:8.3f} s a step  "
        f"{trial.memory_gib:6.2f} GiB"
    )


def format_results(tried: list[Candidate]) -> str:
    """Format all candidates, the fastest first."""
    best = fastest(tried)
    ranked = sorted(tried, key=lambda candidate: -candidate.rate)
    given = tried[0].rate
    gain = f"{best.rate / given:.2f} times as fast as given" if given else "as given it did not run"
    return "\n".join(
        [
            "fastest first:",
            *map(format_line, ranked),
            f"chosen ({gain}):",
            format_line(best),
        ]
    )


def _follow(
    best: Candidate,
    factor: float,
    attempt: Callable[[Candidate], Candidate | None],
    helps: Callable[[Candidate, Candidate], bool],
) -> bool:
    """Multiply the batch as long as it helps; return whether it did at all."""
    before = best
    while (other := _with_batch(before, factor)) is not None:
        done = attempt(other)
        if done is None or not helps(done, before):
            break
        before = done
    return before is not best


def _precisions(best: Candidate) -> Iterator[Candidate]:
    """Vary what auto stands for in a long run on a CPU; trials are too short to choose."""
    train = best.config.train
    if not torch.cuda.is_available() and train.precision == "auto" and multiplies_bf16():
        yield replace(best, config=replace(best.config, train=replace(train, precision="bf16")))


def _threads(best: Candidate) -> Iterator[Candidate]:
    cores = usable_cores()
    if not torch.cuda.is_available() and cores > 1:
        yield replace(best, num_threads=cores // 2)


def _loaders(best: Candidate) -> Iterator[Candidate]:
    data = best.config.data
    if data.train is not None:
        for count in sorted({1, max(1, usable_cores() // 2), min(8, usable_cores())}):
            if count != data.num_threads:
                changed = replace(data, num_threads=count)
                yield replace(best, config=replace(best.config, data=changed))


def _compiled(best: Candidate) -> Iterator[Candidate]:
    if torch.cuda.is_available() or shutil.which("g++"):
        train = replace(best.config.train, compile=best.config.train.compile is not True)
        yield replace(best, config=replace(best.config, train=train))


def _checkpointing(best: Candidate) -> Iterator[Candidate]:
    """Recompute activations, only where the configuration does not fit as it is."""
    if best.trial is not None and best.trial.outcome == "out of memory":
        for every in (2, 1):
            train = replace(best.config.train, activation_checkpoint_every=every)
            yield replace(best, config=replace(best.config, train=train))


def _with_batch(candidate: Candidate, factor: float) -> Candidate | None:
    train = candidate.config.train
    batch = int(train.batch_size * factor)
    if batch < train.accumulation_steps or batch % train.accumulation_steps:
        return None
    config = replace(candidate.config, train=replace(train, batch_size=batch))
    return replace(candidate, config=config, trial=None)
