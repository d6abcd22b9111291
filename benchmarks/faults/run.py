"""Fault injection: disturb small runs in every way that one machine allows; check what is lost.

A plan of faults is drawn from a seed. A run is disturbed again and again until it has taken its
last step, then another one begins. Its losses must be those of a run that was never disturbed, and
no checkpoint may be lost. The disk of a run is a tmpfs where mounting is allowed (to root, or after
``unshare --user --map-root-user --mount``), so that it can be full or read-only; otherwise limits
and permissions stand in for that.
"""

import argparse
import contextlib
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ssast.benchmarks.faults.disk import Unavailable
from ssast.benchmarks.faults.inject import Effect, inject
from ssast.benchmarks.faults.plan import KINDS, Fault, draw_plan
from ssast.benchmarks.faults.processes import fork_server, until
from ssast.benchmarks.faults.report import LINE_HEADER, Result, table
from ssast.benchmarks.faults.trial import (
    LIMIT_S,
    Data,
    Losses,
    Trial,
    first_difference,
    make_data,
)

FINISH_S = 300.0


class Campaign:
    """All runs of a plan.

    Args:
        folder: For everything that is written.
        world_sizes: Numbers of ranks that the runs take in turn.
        settings: Settings of the runs, beside those of all trials.

    Attributes:
        verbose: Whether to show what the processes print last after each fault.
        results: What came of each fault.
        skipped: Kinds that cannot be made here, with the reasons.
    """

    def __init__(self, folder: Path, world_sizes: Sequence[int], settings: Sequence[str]) -> None:
        self.folder, self.world_sizes, self.settings = folder, world_sizes, settings
        self.context = fork_server()
        self.verbose = False
        self.results: list[Result] = []
        self.skipped: dict[str, str] = {}
        self._data: dict[bool, Data] = {}
        self._whole: dict[tuple[bool, int], Losses] = {}
        self._num_trials = 0

    def run(self, plan: Sequence[Fault]) -> None:
        """Inject all faults of a plan, in as many runs as that takes."""
        left, world_sizes = list(plan), itertools.cycle(self.world_sizes)
        while left:
            sharded, world_size = left[0].sharded, next(world_sizes)
            first = len(self.results)
            with contextlib.closing(self._trial(sharded, world_size)) as trial:
                while left and left[0].sharded == sharded and not trial.finished:
                    if left[0].kind in self.skipped or self._disturb(trial, left[0]):
                        left.pop(0)
                self._finish(trial)
                self._compare(trial, self.whole(sharded, world_size), self.results[first:])

    def whole(self, sharded: bool, world_size: int) -> Losses:
        """Return the losses of an undisturbed run."""
        key = (sharded, world_size)
        if key not in self._whole:
            with contextlib.closing(self._trial(sharded, world_size)) as trial:
                trial.launch()
                self._finish(trial)
                self._whole[key] = trial.losses()
        return self._whole[key]

    def _trial(self, sharded: bool, world_size: int) -> Trial:
        if sharded not in self._data:
            folder = self.folder / ("shards" if sharded else "files")
            self._data[sharded] = make_data(folder, sharded=sharded)
        self._num_trials += 1
        folder = self.folder / f"trial{self._num_trials:03d}"
        return Trial(folder, self.context, self._data[sharded], world_size, self.settings)

    def _disturb(self, trial: Trial, fault: Fault) -> bool:
        """Inject a fault in its moment; return False if the run has finished before."""
        problem = _reach(trial, fault)
        if trial.finished:
            return False
        step = trial.last_step()
        trial.lost()
        try:
            effect = Effect(failures=[problem]) if problem else inject(trial, fault)
        except Unavailable as reason:
            self.skipped[fault.kind] = str(reason)
            return True
        lost = trial.lost()
        if lost:
            effect.failures.append(f"the checkpoint of {lost} steps later is lost")
        result = Result(
            fault.number,
            fault.kind,
            fault.moment,
            trial.world_size,
            step,
            effect.statuses,
            effect.noticed_s,
            int(lost > 0),
            effect.failures,
        )
        self.results.append(result)
        print(result.line(), flush=True)
        if trial.ranks is not None and (effect.failures or self.verbose):
            print(trial.ranks.output()[-2000:], flush=True)
        return True

    def _finish(self, trial: Trial) -> None:
        """Let a run come to its end; a run that ends otherwise is a failure of its last fault."""
        if trial.finished:
            return
        if not trial.running:
            _end(trial)
            trial.launch()
        assert trial.ranks is not None
        trial.ranks.wait(FINISH_S)
        if not trial.finished and self.results:
            problem = f"the run does not finish: {trial.ranks.statuses}"
            self.results[-1].failures.append(problem)
            print(f"{problem}\n{trial.ranks.output()[-2000:]}", flush=True)

    def _compare(self, trial: Trial, whole: Losses, found: Sequence[Result]) -> None:
        """Compare the losses of a run; the last fault before the first difference is to blame."""
        ours = trial.losses()
        blamed = None
        step = first_difference(ours, whole, trial.unlogged)
        if step is not None:
            blamed = max((r.number for r in found if r.step <= step), default=None)
        for result in found:
            if blamed is not None and result.number > blamed:
                return
            if KINDS[result.kind].changes_data:
                missing = whole.keys() - ours.keys()
                if result.number == blamed and missing:
                    result.failures.append(f"{len(missing)} losses were not logged")
                continue
            result.equal = result.number != blamed
            if not result.equal:
                result.failures.append(f"from step {step} on the losses differ")
                print(f"fault {result.number} ({result.kind}): {result.failures[-1]}", flush=True)


def _reach(trial: Trial, fault: Fault) -> str | None:
    """Bring a run to the moment of a fault; return what went wrong before."""
    if fault.moment in ("resume", "start") or not trial.running:
        _end(trial)
    if fault.moment == "resume" or trial.finished:
        return None
    ranks, step = trial.ranks if trial.running else None, trial.last_step()
    ranks = ranks or trial.launch()
    if fault.moment == "start":
        until(lambda: ranks.ended, fault.delay_s)
        return None
    until(lambda: ranks.ended or trial.last_step() > step, LIMIT_S)
    until(lambda: ranks.ended, fault.delay_s)
    if fault.moment == "save":
        until(lambda: ranks.ended or trial.saving(), LIMIT_S, every_s=0.0005)
    if not ranks.ended:
        return None
    ranks.wait(LIMIT_S)
    return None if trial.finished else f"before the fault the run ended: {ranks.statuses}"


def _end(trial: Trial) -> None:
    """End the processes of a run at once: what they have not saved is trained again."""
    if trial.ranks is not None:
        trial.ranks.send(signal.SIGKILL)
        trial.ranks.wait(LIMIT_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if anything was lost or went otherwise than it should."""
    parser = argparse.ArgumentParser("ssast bench faults", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="number of faults (200)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=_kinds()
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the plan (0)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2], help="ranks of the runs, in turn (1 2)"
    )
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage (1)")
    parser.add_argument("--steps", type=int, default=240, help="steps of each run (240)")
    parser.add_argument(
        "--verbose", action="store_true", help="show what the runs print last after each fault"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results")
    options = parser.parse_args(arguments)
    plan = draw_plan(options.kinds, options.count, options.seed)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        settings = [f"train.steps={options.steps}", f"train.zero_stage={options.stage}"]
        campaign = Campaign(Path(name), options.ranks, settings)
        campaign.verbose = options.verbose
        print(LINE_HEADER)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            campaign.run(plan)
        finally:  # also where it is stopped: nothing stays mounted, and the table is shown
            signal.signal(signal.SIGTERM, before)
            failures = _report(campaign, time.monotonic() - begin, options)
    return 1 if failures else 0


def _report(campaign: Campaign, seconds: float, options: argparse.Namespace) -> list[str]:
    """Print and write what came of the faults; return all failures."""
    results = campaign.results
    failures = [f"{r.number} ({r.kind}): {text}" for r in results for text in r.failures]
    print(f"\n{table(results)}\n")
    for kind, reason in campaign.skipped.items():
        print(f"{kind} cannot be tried here: {reason}")
    lost = sum(result.lost for result in results)
    print(
        f"{len(results)} faults in {seconds:.0f} s: {lost} checkpoints lost, "
        f"{len(failures)} failures"
    )
    for text in failures:
        print(f"failure: {text}")
    if options.json is not None:
        content = {
            "plan": vars(options) | {"json": None},
            "skipped": campaign.skipped,
            "failures": failures,
            "faults": [asdict(result) for result in results],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return failures


def _kinds() -> str:
    return "; ".join(f"{kind.name}: {kind.does}" for kind in KINDS.values())


if __name__ == "__main__":
    sys.exit(main())
