"""The demonstration: real recordings, a short pretraining, and what came out of it."""

import re
from collections.abc import Sequence
from pathlib import Path

from ssast.engine.config import Config, load_config
from ssast.engine.evaluation.probe import format_scores, probe_run
from ssast.engine.evaluation.reconstructions import visualize
from ssast.engine.formats.open import load_pretrained
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.engine.pretrain import pretrain
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.demo.corpora import fetch_demo
from ssast.pipelines.demo.publish import TASKS, publish_labels
from ssast.pipelines.prepare.pack import Packing, prepare_shards

RELEASED = Path(__file__).parents[2] / "checkpoints" / "tiny_patch"


def demo(source: Path | None, overrides: Sequence[str] = ()) -> int:
    """Get audio, pretrain on it as configs/demo.yaml says, draw pictures, score the features.

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
        name = f"demo-{re.sub(r'[^A-Za-z0-9_-]+', '_', source.resolve().name) or 'root'}"
    folder, run = Path("data") / name, Path("runs") / name
    if source is None:
        train = fetch_demo(folder).train
    else:
        recipe = Recipe(channel=load_config("demo", overrides).audio.channel)
        prepare_shards(source, folder, Packing(recipe, drop_duplicates=True))
        train = publish_labels(folder)
    places = [f"data.train={train}", f"run.folder={run}"]
    config = load_config("demo", [*places, *overrides])
    stopped = pretrain(config, resume=True)
    if stopped:
        print("run the same command again to go on")
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
    results = [*pictures, run / "metrics.jsonl"]
    if (folder / TASKS).is_dir():
        scores, written = probe_run(run, folder / TASKS, _released(config))
        print("\nAccuracy on held-out labelled clips, from frozen features:")
        print(format_scores(scores))
        results.append(written)
    print("\nResults:", *results, sep="\n  ")
    return 0


def _released(config: Config) -> dict[str, SpectrogramTransformer]:
    """Return the encoder of the released weights, if they are of the same model."""
    if not RELEASED.is_dir():
        return {}  # an installed package has none
    model, theirs = load_pretrained(RELEASED)
    same = (theirs.audio, theirs.model) == (config.audio, config.model)
    return {"released": model.encoder} if same else {}
