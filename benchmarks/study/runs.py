"""Runs of ``ssast bench reproduce``, which several processes may share.

Each run is claimed by one process. What others are at is left to them, and waited for at the end.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ssast.benchmarks.study.models import GROUPS, MODELS, Model
from ssast.benchmarks.study.plan import (
    FineTuning,
    Plan,
    accuracy,
    chosen_rate,
    diverged,
    finetuning_config,
    kept_models,
    pretraining_config,
    probe_folder,
    runs_of,
    stored_plan,
    weights_of,
)
from ssast.benchmarks.study.store import KeepWeights, Store, keep_weights, weights_folder
from ssast.engine.checkpoints.store import MANIFEST, Checkpoints
from ssast.engine.errors import ConfigError, TrainingError
from ssast.engine.evaluation.layer_probe import REPORTS, probe_layers, write_reports
from ssast.engine.evaluation.reconstructions import visualize
from ssast.engine.finetune import FinetuneEngine, finetune
from ssast.engine.formats.open import open_model
from ssast.engine.pretrain import pretrain
from ssast.engine.train.finetuning import is_finished
from ssast.pipelines.files import write_atomically

POLL_S = 10.0


class Interrupted(Exception):
    """A run was stopped by a signal, after it had saved a checkpoint."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


class Study:
    """Runs all unfinished runs, the most important first.

    Args:
        plan: The plan.
        out: Folder of the runs.
        store: Folder of the store; None: there is none.
        kept: Also fine-tune from the weights kept during the pretraining of the main models.
        groups: Models, the most important first.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        store: Path | None = None,
        kept: bool = False,
        groups: Sequence[Sequence[Model]] = GROUPS,
    ):
        self.plan, self.out = plan, out
        self.store = Store(out, store)
        self.groups = (*groups, kept_models(plan)) if kept else groups
        self.only: frozenset[str] = frozenset()

    def run(self, only: Sequence[str]) -> None:
        """Pretrain, fine-tune and probe the named models, and wait for what others are at.

        Raises:
            Interrupted: A signal stopped a run.
            ConfigError: The learning rates of the patch model are missing, and nobody tries them.
            ConfigError, DataError, CheckpointError, TrainingError: A run failed; fine-tuning runs
                that diverge are recorded as such.
        """
        self.only, told = frozenset(only), False
        self._check_rates()
        while not self._round():
            if not told:
                print("waiting for the runs of other processes", flush=True)
            told = True
            time.sleep(POLL_S)

    def _check_rates(self) -> None:
        """Fetch the patch model's learning rates where others need them and nobody tries them."""
        patch = MODELS["patch"]
        named = [m for group in self.groups for m in group if m.run() in self.only]
        needed = [m for m in named if not m.tuned and patch.name not in self.only]
        for task in dict.fromkeys(task for model in needed for task in self.plan.tasks_of(model)):
            if chosen_rate(self.plan, patch, task, self.out) is not None:
                continue
            for rate in self.plan.rates:
                self.store.fetch(FineTuning(patch, task, rate, 0).folder(self.out))
            if chosen_rate(self.plan, patch, task, self.out) is None:
                raise ConfigError(
                    f"--only {needed[0].name}: needs the learning rates of patch on {task}, which "
                    "is not finished"
                )

    def _round(self) -> bool:
        """Run what no other process is at; return whether everything is finished."""
        finished = True
        for group in self.groups:
            named = [model for model in group if model.run() in self.only]
            ready = [model for model in named if not model.share or self.pretrain(model)]
            finished &= len(ready) == len(named)
            for seed in range(max(map(self.plan.seeds_of, ready), default=0)):
                for model in ready:
                    if seed < self.plan.seeds_of(model):
                        finished &= self.scores(model, seed)
            for model in ready:
                if model.probed:
                    finished &= self.probe(model)
        return finished

    def scores(self, model: Model, seed: int) -> bool:
        """Fine-tune with a seed on all tasks, pretrained with the seed where the model is so.

        Returns:
            Whether all are finished.
        """
        finished = True
        if model.replicated and not self.pretrain(model, seed):
            return False
        for task, rates in runs_of(self.plan, model, seed):
            finished &= self.score(model, task, rates, seed)
        return finished

    def _once(self, run: Path, is_done: Callable[[], bool], work: Callable[[], None]) -> bool:
        """Work on a run unless another process does, or has done; return whether it is finished."""
        if is_done() and self.store.has(run):
            return True
        with self.store.claim(run) as ours:
            if not ours:
                return False
            if not is_done():
                self.store.fetch(run)
            if not is_done():
                work()
            if not self.store.has(run):
                self.store.put(run)
        return True

    def pretrain(self, model: Model, seed: int = 0) -> bool:
        """Pretrain a model, keep weights and plot reconstructions; return whether it is finished.

        Args:
            model: The model.
            seed: Seed of the pretraining.

        Raises:
            ConfigError: Of a finished pretraining, the weights of the step were not kept.
        """
        run = self.out / "pretrain" / model.run(seed)
        final, pictures = weights_folder(run, None), run / "pictures.txt"

        def is_done() -> bool:
            return (final / MANIFEST).exists() and pictures.exists()

        def work() -> None:
            config = pretraining_config(self.plan, model, self.out, seed)
            latest = Checkpoints(run / "checkpoints").latest()
            if latest is None or int(latest.name[4:]) < config.train.steps:
                keeper = KeepWeights(lambda: self.store.put_weights(run))
                _go(
                    f"pretrain {run.name}",
                    lambda: pretrain(config, resume=True, callbacks=[keeper]),
                )
            if not (final / MANIFEST).exists():
                keep_weights(run, final)
            if not pictures.exists():
                names = [path.name for path in visualize(run)]
                write_atomically(pictures, "".join(f"{name}\n" for name in names))

        if model.step is None:
            return self._once(run, is_done, work)
        kept = weights_folder(run, model.step)
        if not (kept / MANIFEST).exists():
            self.store.fetch(run)
        if is_done() and not (kept / MANIFEST).exists():
            raise ConfigError(
                f"{kept}: missing, expected weights kept while {run.name} was trained"
            )
        return (kept / MANIFEST).exists()

    def probe(self, model: Model) -> bool:
        """Probe the layers of a pretrained model.

        Returns:
            Whether it is finished.
        """
        folder = probe_folder(self.out, model)

        def work() -> None:
            print(f"\n{time.strftime('%H:%M:%S')}  probe {model.name}", flush=True)
            tasks: dict[str, tuple[Path, Path | None]] = {
                task: (self.plan.labelled(task, "train"), self.plan.labelled(task, "eval"))
                for task in self.plan.tasks
            }
            weights = open_model(weights_of(self.out, model))
            reports = list(probe_layers(weights, tasks, progress=False, untrained=model.untrained))
            folder.mkdir(parents=True, exist_ok=True)
            write_reports(reports, folder / REPORTS)

        return self._once(folder, (folder / REPORTS).exists, work)

    def score(self, model: Model, task: str, rates: Sequence[float], seed: int) -> bool:
        """Fine-tune with a seed, trying all these learning rates, and evaluate the test clips.

        Returns:
            Whether it is finished.
        """
        tried = [self.finetune(FineTuning(model, task, rate, seed)) for rate in rates]
        chosen = chosen_rate(self.plan, model, task, self.out)
        if not all(tried) or chosen is None:
            return False
        return self.finetune(FineTuning(model, task, chosen, seed), test=True)

    def finetune(self, run: FineTuning, test: bool = False) -> bool:
        """Fine-tune once, and evaluate the test clips; return whether it is finished.

        A finished run keeps only the selected weights.
        """
        folder = run.folder(self.out)

        def is_done() -> bool:
            return diverged(folder) or accuracy(folder, "test" if test else "valid") is not None

        def work() -> None:
            if not is_finished(folder):
                config = finetuning_config(self.plan, run, self.out)
                try:
                    _go(str(folder), lambda: finetune(config, resume=True))
                except TrainingError as error:  # divergence is a result of a learning rate
                    print(error)
                    write_atomically(folder / "diverged.txt", f"{error}\n")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if test and not diverged(folder):
                engine = FinetuneEngine.from_checkpoint(folder)
                clips = self.plan.labelled(run.task, "eval")
                values = engine.evaluate(clips, folder / "test")["accuracy"]
                what = f"{run.model.name}, {run.task}, seed {run.seed}"
                print(f"{what}: test accuracy {values:.4f}")

        return self._once(folder, is_done, work)


def folders_of(plan: Plan, out: Path) -> Iterator[Path]:
    """Yield the folders of all runs that the plan can have."""
    for model in (*MODELS.values(), *kept_models(plan)):
        yield probe_folder(out, model)
        for seed in range(plan.seeds_of(model)):
            yield out / "pretrain" / model.run(seed)
            for task in plan.tasks_of(model):
                for rate in plan.rates:
                    yield FineTuning(model, task, rate, seed).folder(out)


def fetch_runs(out: Path, folder: Path) -> None:
    """Fetch the plan of a store, and the runs that are not in the folder of the runs.

    Args:
        out: Folder of the runs.
        folder: Folder of the store.

    Raises:
        ConfigError: There is no plan in either.
        DataError: A file is damaged.
    """
    plan = Plan.read(out) or stored_plan(folder)
    plan.write(out)
    store = Store(out, folder)
    for run in dict.fromkeys(folders_of(plan, out)):
        if not run.exists():
            store.fetch(run)


def _go(name: str, train: Callable[[], int]) -> None:
    print(f"\n{time.strftime('%H:%M:%S')}  {name}", flush=True)
    stopped = train()
    if stopped:
        raise Interrupted(stopped)
