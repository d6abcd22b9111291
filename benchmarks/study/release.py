"""Export the study's pretrained weights to checkpoints/, in float16, each with a model card.

The cards are generated from the files of the runs, as the results page is.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ssast.benchmarks.study.analysis import Cells, gather
from ssast.benchmarks.study.models import FAMILIES, MODELS
from ssast.benchmarks.study.page import OUT
from ssast.benchmarks.study.plan import Plan, stored_plan, weights_of
from ssast.benchmarks.study.probes import layer_to_take, read_reports
from ssast.benchmarks.study.reproduce import DATA
from ssast.benchmarks.study.sounds import NUM_CLASSES, write_sounds
from ssast.benchmarks.study.tables import chance_of, of_seeds, table, what
from ssast.engine.checkpoints.weights import export_weights
from ssast.engine.config import Config
from ssast.engine.errors import CheckpointError
from ssast.engine.evaluation.pretext import pretext_losses
from ssast.engine.formats.open import load_pretrained, open_encoder
from ssast.pipelines.files import write_atomically

CHECKPOINTS = Path("checkpoints")
CARD = "README.md"
EACH, SEED = 8, 0  # made sounds of each class, for the figures that can be checked anywhere
FIGURES = {
    "infonce_loss": "InfoNCE (nats)",
    "mse_loss": "MSE",
    "pretext_accuracy": "pretext accuracy",
}


def release(out: Path, folder: Path, families: Sequence[str] = FAMILIES) -> list[Path]:
    """Export the weights of the patch and of the frame model.

    Args:
        out: Folder of the study's runs.
        folder: Folder for tiny_patch/ and tiny_frame/.
        families: Those to export.

    Raises:
        ConfigError: There are no runs.
        CheckpointError: A pretraining is not finished, or a folder cannot be written.
    """
    plan = stored_plan(out)
    cells, written = gather(plan, out), []
    for family in families:
        loaded = open_encoder(weights_of(out, MODELS[family]))
        step = loaded.step or 0
        if step < plan.steps:
            raise CheckpointError(f"{out}: {family} has {step} of {plan.steps} steps")
        path = folder / f"tiny_{family}"
        export_weights(loaded.model, _anywhere(loaded.config, family), step, path, torch.float16)
        write_atomically(path / CARD, card(out, plan, cells, family, step, path))
        written.append(path)
    return written


def _anywhere(config: Config, family: str) -> Config:
    """Return a configuration with the folders of ``make reproduce``, not those of a machine."""
    train = DATA / Path(config.data.train or "").name
    return replace(
        config,
        data=replace(config.data, train=str(train)),
        run=replace(config.run, folder=str(OUT / "pretrain" / family)),
    )


def figures(weights: Path) -> dict[str, float]:
    """Compute the losses of a released model on made sounds, which need no download."""
    with tempfile.TemporaryDirectory() as folder:
        sounds = write_sounds(Path(folder, "sounds"), EACH, SEED)
        found = pretext_losses(weights, sounds, progress=False)
    return {name: found[name] for name in FIGURES}


def checked(weights: Path) -> list[str]:
    """Tabulate the figures that a test computes again."""
    found = figures(weights)
    return [
        f"On {EACH * NUM_CLASSES} made sounds (`ssast.benchmarks.study.sounds`, seed {SEED}), with "
        "the masks of a validation. They need no download, and a test computes these figures "
        "again:",
        "",
        *table(["", "this model"], [(what, f"{found[n]:.4f}") for n, what in FIGURES.items()]),
    ]


def layers(out: Path, plan: Plan, family: str) -> list[str]:
    """Tabulate the probe's accuracies by layer; nothing where it is not finished."""
    reports = read_reports(out)
    found = {task: reports[family, task] for task in plan.tasks if (family, task) in reports}
    if not found:
        return []
    layer = layer_to_take(found)
    names = [score["layer"] for score in next(iter(found.values()))["scores"]]
    rows = []
    for number, name in enumerate(names):
        row = [name]
        for report in found.values():
            text = f"{100 * report['scores'][number]['accuracy']:.1f}"
            row.append(f"**{text}**" if name == report["best"] else text)
        rows.append(row)
    untrained = [reports.get((f"{family}-scratch", task)) for task in found]
    if all(untrained):
        best = [f"{100 * report['best_accuracy']:.1f}" for report in untrained if report]
        rows.append(["untrained, best layer", *best])
    return [
        "Test accuracy in percent of a linear head on frozen features, the mean of the patch "
        "tokens, by layer: 0 is the patch embedding, `weighted` the learned sum of all layers. "
        "Bold: the layer that is best on held-out training clips of the task. Over the tasks "
        f"together that is layer {layer}: `ssast embed --layer {layer}`.",
        "",
        *table(["layer", *found], rows),
    ]


def card(out: Path, plan: Plan, cells: Cells, family: str, steps: int, path: Path) -> str:
    """Write the model card, in Markdown."""
    weights, config = load_pretrained(path)
    number = sum(p.numel() for p in weights.parameters()) / 1e6
    made = json.loads(Path(plan.data, "demo.json").read_text(encoding="utf-8"))
    audio, model, objective = config.audio, config.model, config.objective
    patches = f"{model.patch[0]} mel bins x {model.patch[1]} frames"
    rows, columns = config.grid
    scores = [
        [
            f"{task}: {what(task)}",
            f"{100 * chance_of(plan, task)[0]:.1f}",
            of_seeds(plan, cells[f"{family}-scratch", task], MODELS[f"{family}-scratch"]),
            of_seeds(plan, cells[family, task], MODELS[family]),
        ]
        for task in plan.tasks
        if (family, task) in cells and (f"{family}-scratch", task) in cells
    ]
    lines = [
        f"# {model.size}, {family} model",
        "",
        f"An audio spectrogram transformer ({model.size}: {number:.2f} M weights, with "
        "both heads of its pretraining) pretrained with masked spectrogram patch modelling, "
        "without labels. It is small and pretrained on little data: a starting point for "
        "experiments with few clips and for trying the commands, not a substitute for the "
        "published models.",
        "",
        f"    ssast finetune classifier --checkpoint {path} data.train=mine.json",
        f"    ssast embed {path} /my/recordings --out x.npy",
        "",
        "## Training",
        "",
        *table(["", "this model"], [
            ("input", f"16 kHz mono, {audio.num_frames} frames of 10 ms, {audio.n_mels} mel bins, "
                      f"mean {audio.mean:g}, standard deviation {audio.std:g}"),
            ("patches", f"{patches}, {rows} x {columns} of them"),
            ("masked patches", f"{objective.num_masked} of {rows * columns}, `{objective.mask}`"),
            ("padding", "ignored" if audio.ignore_padding else "part of the input"),
            ("objective", f"{objective.kind}, softmax axis `{objective.softmax_axis}`"),
            ("training", f"{steps:,} steps, batch size {config.train.batch_size}, "
                         f"{config.train.precision}, {config.optim.name}, learning rate "
                         f"{config.optim.lr:g}, {config.optim.schedule}"),
            ("recordings", f"{made['hours']:.1f} h of {made['num_clips']:,} clips from Debian's "
                           f"packages {', '.join(made['packages'])}"),
            ("in this folder", "weights in float16 (loaded as float32), configuration, checksums"),
        ]),
        "The recordings are those of `ssast data demo --sounds`, mostly speech of games and "
        "learning programs. Their licences, all free, are in the folder `licences/` that this "
        "command writes. This folder contains no recordings.",
        "",
        "## Results",
        "",
        f"Test accuracy in percent after fine-tuning for {plan.epochs} epochs, mean and standard "
        f"deviation over {plan.seeds} seeds:",
        "",
        *table(["task", "largest class", "from scratch", "from these weights"], scores),
        *layers(out, plan, family),
        *checked(path),
        "More: docs/results.md, and the command that trains such weights again in "
        "docs/pretraining.md.",
        "",
        "## Limitations",
        "",
        "The recordings have few voices, languages and channels, which are correlated. Noise, "
        "distance, music and other languages were not evaluated. Licence: Apache-2.0.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the models."""
    parser = argparse.ArgumentParser("ssast bench release", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=OUT, help=f"folder of the runs (default: {OUT})"
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=CHECKPOINTS,
        help=f"folder to write (default: {CHECKPOINTS})",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=FAMILIES,
        default=FAMILIES,
        metavar="MODEL",
        help="export only these: %(choices)s",
    )
    options = parser.parse_args(arguments)
    print(*release(options.out, options.checkpoints, options.only), sep="\n")
    return 0
