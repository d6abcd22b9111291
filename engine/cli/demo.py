"""The demonstration: real recordings, a short pretraining, and what pretraining is for."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ssast.engine.cli.comparison import draw_comparison, finetune_twice
from ssast.engine.config import load_config
from ssast.engine.evaluation.probe_tasks import find_tasks
from ssast.engine.evaluation.reconstructions import visualize
from ssast.engine.formats.known_weights import ours
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.engine.pretrain import pretrain
from ssast.engine.train.task import run_folder
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.demo.corpora import fetch_demo
from ssast.pipelines.demo.publish import TASKS, publish_labels
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.pack import Packing, prepare_shards

AGAIN = "run the same command again to go on"
RELEASED, TASK = "tiny_patch", "voice"


def demo(source: Path | None, overrides: Sequence[str] = ()) -> int:
    """Get audio, pretrain on it as configs/demo.yaml says, draw pictures; fine-tune on one task.

    Each part goes on where an earlier call was stopped.

    Args:
        source: A folder of audio files; a few hours of real recordings are fetched if None.
        overrides: Settings that override those of configs/demo.yaml.

    Returns:
        0, or the number of the signal that stopped the training.

    Raises:
        ValueError: See :func:`ssast.pipelines.demo.corpora.fetch_demo` and
            :func:`ssast.engine.pretrain.pretrain`.
    """
    name = "demo"
    if source is not None:
        place = os.path.realpath(source)
        name = f"demo-{re.sub(r'[^A-Za-z0-9_-]+', '_', os.path.basename(place)) or 'root'}"
    folder, run = Path("data") / name, Path("runs") / name
    channel = load_config("demo", overrides).audio.channel  # also tells mistakes before any work
    if source is None:
        train = fetch_demo(folder).train
    else:
        prepare_shards(source, folder, Packing(Recipe(channel=channel), drop_duplicates=True))
        train = publish_labels(folder, source)
    places = [f"data.train={train}", f"run.folder={run}"]
    config = load_config("demo", [*places, *overrides])
    run = run_folder(config)
    stopped = pretrain(config, resume=True)
    if stopped:
        print(AGAIN)
        return stopped

    pictures = visualize(run)
    accuracies = scalars(read_metrics(run / "metrics.jsonl"), "valid/pretext_accuracy")
    if accuracies:  # a generative objective has none
        (_, before), (_, after) = accuracies[0], accuracies[-1]
        hidden = config.objective.num_masked
        print(
            f"\nPretext (InfoNCE) accuracy on held-out clips: {after:.1%}\n"
            f"(untrained {before:.1%}, chance {1 / hidden:.1%}: {hidden} masked patches)."
        )
    print("\nResults:", *pictures, run / "metrics.jsonl", sep="\n  ")
    if not (folder / TASKS).is_dir():
        return 0
    return _compare(folder / TASKS, run, config.data.num_threads)


def _compare(tasks: Path, run: Path, num_threads: int | None) -> int:
    """Fine-tune on one task from scratch and from the released weights, and draw both curves."""
    found, pretrained = find_tasks(tasks), ours().get(RELEASED)
    task = TASK if TASK in found else next(iter(found))
    if pretrained is None:  # an installed package has none
        print(f"fine-tuning on {task}: left out, checkpoints/{RELEASED} comes with a clone alone")
        return 0
    print(f"\nFine-tuning on the task {task}, from scratch and from {pretrained}:")
    try:
        curves = finetune_twice(found[task], pretrained, run / "finetuning", num_threads)
    except DataError as error:
        print(f"fine-tuning on {task}: left out, {error}")
        return 0
    if isinstance(curves, int):
        print(AGAIN)
        return curves
    picture = draw_comparison(curves, task, run / "finetuning.png")
    print(f"\nAccuracy on {curves[0].num_test} test clips of the task {task}, fine-tuned:")
    for curve in curves:
        print(f"  {curve.start:22}{curve.test:6.1%}")
    print(f"  {picture}")
    return 0
