"""Measure token dropping in fine-tuning: the time of a training pass, and the accuracy.

Time: forward and backward pass of a classifier of the tiny model on 512 frames, in CPU seconds of
this process, the settings in turn. Accuracy: a small model is trained from scratch on synthetic
sounds, whose pitch is their class, with several seeds; or, with --labelled, the recipe
demo_finetune on clips of your own. Runs that are finished are kept.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ssast.benchmarks.study.kept import check_kept
from ssast.benchmarks.study.plan import accuracy
from ssast.benchmarks.study.sounds import write_sounds
from ssast.benchmarks.study.tables import mean_and_std
from ssast.engine.config import Config, load_config
from ssast.engine.finetune import finetune
from ssast.engine.parallel.ranks import World
from ssast.engine.planning.synthetic import SyntheticContext, noise, synthetic_task
from ssast.engine.train.finetuning import is_finished

SETTINGS: dict[str, tuple[str, ...]] = {  # name: what is dropped
    "all tokens": (),
    "drop_tokens 0.2": ("finetune.drop_tokens=0.2",),
    "drop_tokens 0.4": ("finetune.drop_tokens=0.4",),
    "drop_columns, drop_rows": (),  # in proportion to PaSST's 40 of 99 columns and 4 of 12 rows
}
SOUNDS: tuple[str, ...] = (  # settings of a small model for synthetic sounds
    *("audio.n_mels=64", "audio.num_frames=128", "audio.mean=-6", "audio.std=4"),
    *("model.size=tiny", "model.depth=2", "finetune.loss=ce", "optim.lr=1e-3"),
    *("optim.warmup_steps=10", "train.batch_size=16", "train.precision=fp32"),
    *("finetune.freq_mask=0", "finetune.time_mask=0", "data.valid_share=0.2"),
    "finetune.layer_decay=0.75",  # of the recipe, which leaves it out from scratch
)
LABELLED: tuple[str, ...] = ("finetune.checkpoint=null",)  # unless another is given


def dropped(name: str, rows: int, columns: int) -> tuple[str, ...]:
    """Return the settings of one of SETTINGS for a grid of patches."""
    if not name.startswith("drop_columns"):
        return SETTINGS[name]
    return f"finetune.drop_columns={columns * 40 // 99}", f"finetune.drop_rows={rows * 4 // 12}"


def measure_passes(batch: int, repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of a training pass of ``batch`` clips with each setting."""
    world = World(0, 0, 1, "single", torch.device("cpu"))
    tasks, times = {}, {name: list[float]() for name in SETTINGS}
    for name in SETTINGS:
        given = ("model.size=tiny", "audio.num_frames=512", f"train.batch_size={batch}")
        config = load_config("classifier", [*given, *dropped(name, 8, 32)])
        tasks[name] = synthetic_task(SyntheticContext(config, world, fbank=noise(config, batch)))
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            with task.train_batches(repeat * batch) as batches:
                began = time.process_time()
                inputs, valid = task.inputs(next(batches), training=True)
                task.means(task.module(*inputs), valid)["loss"].backward()
                times[name].append(time.process_time() - began)
            task.module.zero_grad()
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def run_config(name: str, seed: int, recipe: str, settings: Sequence[str], folder: Path) -> Config:
    """Return the configuration of one run."""
    given = [*settings, f"train.seed={seed}", f"run.folder={folder}"]
    return load_config(recipe, [*given, *dropped(name, *load_config(recipe, given).grid)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print both tables; return 0, or the status of a run that was stopped.

    Args:
        arguments: Command-line arguments without the program's name; None: those of the process.

    Raises:
        ConfigError: A run in the folder had other settings.
    """
    parser = argparse.ArgumentParser("ssast bench dropping", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/dropping"), help="folder of the runs (%(default)s)")
    add("--batch", type=int, default=4, help="clips of a timed pass (%(default)s)")
    add("--repeats", type=int, default=7, help="timed passes (%(default)s)")
    add("--labelled", type=Path, nargs=2, metavar=("TRAIN", "TEST"), help="manifests of clips")
    add("--clips", type=int, default=30, help="synthetic clips of each class (%(default)s)")
    add("--epochs", type=int, default=8, help="(%(default)s)")
    add("--seeds", type=int, default=3, help="(%(default)s)")
    add("override", nargs="*", help="settings of all trainings")
    options = parser.parse_args(arguments)
    times = measure_passes(options.batch, options.repeats)
    print("| dropped | CPU s of a training pass, share |\n| :-- | --: |")
    for name, seconds in times.items():
        print(f"| {name} | {seconds / times['all tokens']:.2f} |", flush=True)
    recipe, settings, data = "demo_finetune", LABELLED, options.labelled
    if data is None:
        recipe, settings = "classifier", SOUNDS
        data = [
            write_sounds(options.out / "train", options.clips, 0),
            write_sounds(options.out / "test", 25, 1),
        ]
    files = (f"data.train={data[0]}", f"finetune.test={data[1]}")
    settings = (*settings, *files, f"finetune.epochs={options.epochs}", *options.override)
    scores = {name: list[float]() for name in SETTINGS}
    for seed in range(options.seeds):  # a seed after the other
        for number, name in enumerate(SETTINGS):
            folder = options.out / f"{number}-{seed}"
            config = run_config(name, seed, recipe, settings, folder)
            check_kept(config)
            if not is_finished(folder) and (stopped := finetune(config, resume=True)):
                return 128 + stopped
            scores[name].append(accuracy(folder, "test") or 0.0)
    print("\n| dropped | test accuracy % |\n| :-- | --: |")
    for name, found in scores.items():
        print(f"| {name} | {mean_and_std(found)} |")
    return 0
