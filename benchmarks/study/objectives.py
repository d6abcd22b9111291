"""Section of the results page on the two objectives: joint, and latent targets.

Both are fine-tuned, and probed by layer. What is not finished is marked as such.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ssast.benchmarks.study.analysis import Cells, compare
from ssast.benchmarks.study.models import (
    JOINT,
    JOINT_ENCODER,
    LATENT,
    LATENT_SCRATCH,
    MODELS,
    OBJECTIVES,
)
from ssast.benchmarks.study.plan import Plan
from ssast.benchmarks.study.probes import Reports, best_layer, layer_accuracy
from ssast.benchmarks.study.tables import NOT_FINISHED, of_seeds, table, training_s
from ssast.engine.config import load_config
from ssast.engine.evaluation.layer_probe import WEIGHTED
from ssast.engine.monitoring.flops import step_flops_per_clip
from ssast.engine.monitoring.monitor import read_metrics, scalars

COMPARED = (MODELS["patch-scratch"], JOINT, LATENT_SCRATCH, JOINT_ENCODER, *LATENT)
PAIRS = (
    (JOINT.name, "patch-scratch"),
    (JOINT_ENCODER.name, LATENT_SCRATCH.name),
    *((model.name, LATENT_SCRATCH.name) for model in LATENT),
    *((model.name, other.name) for model in LATENT for other in (JOINT, JOINT_ENCODER)),
)


def objectives(plan: Plan, out: Path, cells: Cells, reports: Reports) -> list[str]:
    """Describe and tabulate what came out; say so if nothing of this group was run."""
    if not any((out / kind / m.name).exists() for m in OBJECTIVES for kind in _FOLDERS):
        names = " ".join(model.name for model in OBJECTIVES)
        return [
            "Not part of these runs; another plan measured it: "
            "[Which objective](pretraining.md#which-objective). "
            f"`ssast bench reproduce --only {names}` runs it with this plan.",
            "",
        ]
    return [
        "Latent targets (EAT, `eat_demo`) beside the joint objective (SSAST), once with the same "
        "FLOPs and once in the same time; both were chosen before training, the time from the "
        "measured throughput. Encoders differ as the recipes do (positions, extra tokens, norms); "
        "the joint objective was also trained with the encoder of latent targets. "
        "Test accuracy in percent: fine-tuned with the mean of the patch tokens, as all models, "
        "each with its own learning rate; and of a linear head on frozen features (mean of the "
        "patch tokens), of the layer that is best on held-out training clips (its number, 0 is the "
        "patch embedding) and of the learned weighted sum of all layers.",
        "",
        *_costs(out),
        "Pairs of models, the first beside the second: means over the tasks that both have "
        "finished, and tasks on which the first is significantly better or worse. Probes differ "
        "significantly where their 95 % bootstrap intervals over recordings do not overlap.",
        "",
        *_differences(plan, cells, reports),
        *_scores(plan, cells, reports),
    ]


_FOLDERS = ("pretrain", "finetune", "probe")


def _costs(out: Path) -> list[str]:
    rows = []
    for model in (JOINT, JOINT_ENCODER, *LATENT):
        run = out / "pretrain" / model.name
        if not (run / "config.yaml").exists():
            rows.append([model.what, *[NOT_FINISHED] * 4])
            continue
        config = load_config(run / "config.yaml")
        logged = scalars(read_metrics(run / "metrics.jsonl"), "perf/step_s")
        steps = logged[-1][0] if logged else 0
        clips = steps * config.train.batch_size
        rows.append([
            model.what,
            f"{steps:,}" if steps == config.train.steps else f"{steps:,} of {config.train.steps:,}",
            f"{clips:,}",
            f"{clips * step_flops_per_clip(config) / 1e15:.3g}",
            f"{training_s(run / 'metrics.jsonl') / 3600:.2f}",
        ])  # fmt: skip
    return table(["pretraining", "steps", "clips seen", "PFLOP", "hours of training"], rows)


def _scores(plan: Plan, cells: Cells, reports: Reports) -> list[str]:
    rows = []
    for task in plan.tasks:
        for model in COMPARED:
            report = reports.get((model.name, task))
            tuned = of_seeds(plan, cells.get((model.name, task)), model)
            probed = best_layer(report), layer_accuracy(report, WEIGHTED)
            rows.append([f"{task}, {model.what}", tuned, *probed])
    return table(["task, model", "fine-tuned", "probe: best layer", "probe: weighted sum"], rows)


def _differences(plan: Plan, cells: Cells, reports: Reports) -> list[str]:
    tuned = {key: cell.mean for key, cell in cells.items()}
    probed = {key: report["best_accuracy"] for key, report in reports.items()}
    rows = []
    for names in PAIRS:
        rows.append(_difference(plan, names, "fine-tuned", tuned, partial(compare, cells)))
        split = partial(_compare_probes, reports)
        rows.append(_difference(plan, names, "probed, best layer", probed, split))
    header = ["model", "beside", "scores", "tasks", "means", "better on", "worse on"]
    return table(header, rows)


def _difference(
    plan: Plan,
    names: tuple[str, str],
    how: str,
    scores: Mapping[tuple[str, str], float],
    split: Callable[[str, str, Sequence[str]], Sequence[list[str]]],
) -> list[str]:
    pair = [MODELS[name].what for name in names]
    tasks = [t for t in plan.tasks if all((name, t) in scores for name in names)]
    if not tasks:
        return [*pair, how, NOT_FINISHED, "", "", ""]
    means = (f"{100 * statistics.mean(scores[name, t] for t in tasks):.1f}" for name in names)
    higher, lower, *_ = split(*names, tasks)
    done = f"{len(tasks)} of {len(plan.tasks)}"
    return [*pair, how, done, " and ".join(means), ", ".join(higher), ", ".join(lower)]


def _compare_probes(
    reports: Reports, one: str, other: str, tasks: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the tasks on which a model is significantly better than another, and worse."""
    signs = {
        t: _apart(*(reports[name, t]["best_interval"] for name in (one, other))) for t in tasks
    }
    higher, lower = ([t for t in tasks if signs[t] == sign] for sign in (1, -1))
    return higher, lower


def _apart(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> int:
    """Compare two intervals: 1 if ours is above the other, -1 if below, else 0."""
    if ours is None or theirs is None:
        return 0
    return (ours[0] > theirs[1]) - (ours[1] < theirs[0])
