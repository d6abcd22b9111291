"""Section of the results page on features: a linear head on each layer, beside fine-tuning."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssast.benchmarks.study.analysis import Cells
from ssast.benchmarks.study.models import FAMILIES, LATENT, LATENT_SCRATCH, MODELS, Model
from ssast.benchmarks.study.plan import Plan, probe_folder
from ssast.benchmarks.study.tables import NOT_FINISHED, of_seeds, table
from ssast.engine.evaluation.layer_probe import REPORTS, WEIGHTED
from ssast.engine.evaluation.probe import UNTRAINED
from ssast.pipelines.errors import DataError

Reports = Mapping[tuple[str, str], Mapping[str, Any]]
"""Reports of the probe, by names of model and task."""


def read_reports(out: Path) -> Reports:
    """Read the reports of the probes that are finished, by names of model and task.

    Raises:
        DataError: A file is damaged.
    """
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for model in (model for model in MODELS.values() if model.probed):
        path = probe_folder(out, model) / REPORTS
        if not path.exists():
            continue
        try:
            for report in json.loads(path.read_text(encoding="utf-8")):
                found[_probed(model, report["weights"]), report["task"]] = report
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not the scores of a probe by layer: {error}") from error
    return found


def _probed(model: Model, weights: str) -> str:
    """Return the name of the model that a report of a probe is of."""
    if weights != UNTRAINED:
        return model.name
    return LATENT_SCRATCH.name if model in LATENT else f"{model.family}-scratch"


def best_layer(report: Mapping[str, Any] | None) -> str:
    """Format the accuracy of the layer that is best on held-out training clips, and its number."""
    if report is None:
        return NOT_FINISHED
    return f"{100 * report['best_accuracy']:.1f} ({report['best']})"


def layer_accuracy(report: Mapping[str, Any] | None, layer: str) -> str:
    """Format the accuracy of a layer, or of the learned weighted sum."""
    return NOT_FINISHED if report is None else f"{100 * _scores(report, 'accuracy')[layer]:.1f}"


def _scores(report: Mapping[str, Any], kind: str) -> dict[str, float]:
    return {score["layer"]: score[kind] for score in report["scores"]}


def probes(plan: Plan, cells: Cells, reports: Reports) -> list[str]:
    """Tabulate the probes of the main models, and say what to take; nothing without any."""
    models = [MODELS[name] for family in FAMILIES for name in (family, f"{family}-scratch")]
    rows = []
    for task in plan.tasks:
        for model in models:
            report = reports.get((model.name, task))
            if report is None:
                continue
            last = max(int(layer) for layer in _scores(report, "accuracy") if layer != WEIGHTED)
            rows.append([
                f"{task}, {model.what if model.share else f'{model.family}, untrained'}",
                layer_accuracy(report, str(last)),
                best_layer(report),
                layer_accuracy(report, WEIGHTED),
                of_seeds(plan, cells.get((model.name, task)), model),
            ])  # fmt: skip
    if not rows:
        return []
    advice = [line for family in FAMILIES for line in _advice(plan, cells, reports, family)]
    header = ["task, model", "last layer", "best layer", "weighted sum", "fine-tuned"]
    return [
        "Test accuracy in percent of a linear head on frozen features, the mean of the patch "
        "tokens: of the last layer, of the layer that is best on held-out training clips (its "
        "number; 0 is the patch embedding) and of the learned weighted sum of all layers. Beside "
        "it, all weights fine-tuned; of untrained encoders, trained from scratch.",
        "",
        *([*advice, ""] if advice else []),
        *table(header, rows),
    ]


def layer_to_take(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the layer that is best over some tasks together, on held-out training clips."""
    inner = [_scores(report, "inner") for report in reports.values()]
    return max(
        (name for name in inner[0] if name != WEIGHTED),
        key=lambda name: statistics.mean(scores[name] for scores in inner),
    )


def _advice(plan: Plan, cells: Cells, reports: Reports, family: str) -> list[str]:
    """Say which layer of a model to take, and whether a probe or fine-tuning scores more."""
    found = {task: reports[family, task] for task in plan.tasks if (family, task) in reports}
    if not found:
        return []
    text = (
        f"- {family} model: layer {layer_to_take(found)} is best over the tasks together, on "
        "training clips."
    )
    both = [task for task in found if (family, task) in cells]
    if both:
        ours = {task: found[task]["best_accuracy"] for task in both}
        tuned = {task: cells[family, task].mean for task in both}
        means = (f"{100 * statistics.mean(scores.values()):.1f}" for scores in (ours, tuned))
        text += (
            f" The probe of the best layer scores {' %, fine-tuning '.join(means)} % on average; "
            f"the probe is above on {sum(ours[task] > tuned[task] for task in both)} of "
            f"{len(both)} tasks."
        )
    return [text]
