"""A small study, and the files of its finished runs."""

import csv
import json
from pathlib import Path

from finetune_runs import make_sounds, manifest

from ssast.benchmarks.study.models import MODELS
from ssast.benchmarks.study.plan import FineTuning, Plan, kept_models, probe_folder
from ssast.engine.evaluation.layer_probe import REPORTS
from ssast.pipelines.clips.manifest import write_manifest

SMALL = ("model.depth=1", "audio.num_frames=48", "data.num_threads=1")


def small_plan(data: Path) -> Plan:
    """Tasks `pitch` and `tone`, whose clips are tones of two pitches."""
    write_manifest(data / "train.json", make_sounds(data / "p", 2, 12, seed=5))
    for seed, task in enumerate(("pitch", "tone")):
        for part, each in (("train", 8), ("eval", 4)):
            paths = make_sounds(data / task / part, 2, each, seed=2 * seed + (part == "eval"))
            manifest(data / "tasks" / f"{task}_{part}.json", paths)
    tasks, rates = ("pitch", "tone"), (1e-3, 3e-3)
    return Plan(
        str(data), tasks, 80, 1, 2, 2, ("pitch",), rates=rates, overrides=SMALL, latent_time=4.0
    )


def fake_scores(run: Path, **scores: float) -> None:
    """The metrics of a finished fine-tuning, by split."""
    for split, value in scores.items():
        (run / split).mkdir(parents=True, exist_ok=True)
        (run / split / "metrics.json").write_text(json.dumps({"accuracy": value}))


def fake(plan, out, model, task, rate, seed, valid, right=None):
    """The files of a finished fine-tuning, with so many of ten test clips named rightly."""
    models = {**MODELS, **{each.name: each for each in kept_models(plan)}}
    run = FineTuning(models[model], task, rate, seed).folder(out)
    for split, value in (("valid", valid), ("test", right and right / 10)):
        if value is None:
            continue
        fake_scores(run, **{split: value})
        with (run / split / "predictions.csv").open("w", newline="") as file:
            rows = [("a.wav", "x", "x" if clip < round(10 * value) else "y") for clip in range(10)]
            csv.writer(file).writerows([("wav", "labels", "class1"), *rows])


def report(task: str, weights: str, best: float, weighted: float) -> dict[str, object]:
    scores = [
        {"layer": layer, "accuracy": accuracy, "inner": accuracy}
        for layer, accuracy in (
            ("0", best - 0.1),
            ("1", best),
            ("2", best - 0.2),
            ("weighted", weighted),
        )
    ]
    interval = [best - 0.05, best + 0.05]
    known = {"task": task, "weights": weights, "best": "1", "scores": scores}
    return known | {"best_accuracy": best, "best_interval": interval}


def write_probe(out: Path, model: str, *reports: dict[str, object]) -> None:
    folder = probe_folder(out, MODELS[model])
    folder.mkdir(parents=True)
    (folder / REPORTS).write_text(json.dumps(reports))
