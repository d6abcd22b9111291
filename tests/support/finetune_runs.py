"""Small fine-tuning runs for tests: labelled sounds, a pretrained model, settings."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch

from ssast.engine.api import save_published
from ssast.engine.config import Config, from_plain, load_config
from ssast.engine.model.objective import MSPM
from ssast.pipelines.clips.manifest import write_manifest

RATE_HZ = 16000
SETTINGS = {
    "model.size": "tiny",
    "model.depth": 2,
    "audio.n_mels": 32,
    "audio.num_frames": 48,
    "audio.mean": -6.0,
    "optim.name": "adamw",
    "optim.schedule": "cosine",
    "optim.warmup_steps": 2,
    "optim.lr": 1e-3,
    "optim.eps": 1e-6,
    "train.precision": "fp32",  # on a GPU as well
    "train.batch_size": 8,
    "train.log_every": 1,
    "data.num_threads": 1,
    "finetune.epochs": 3,
}
AUGMENTED = {
    "finetune__mixup": 0.5,
    "finetune__freq_mask": 8,
    "finetune__time_mask": 8,
    "finetune__noise": 0.1,
    "finetune__roll": 4,
    "finetune__label_smoothing": 0.1,
}


def make_sounds(folder: Path, num_classes: int, each: int, *, seed: int = 0) -> list[Path]:
    """Tones whose pitch tells the class, over noise, each another one, class after class."""
    folder.mkdir(parents=True, exist_ok=True)
    random, paths = np.random.default_rng(seed), []
    times = np.arange(8000) / RATE_HZ
    for number in range(num_classes):
        for take in range(each):
            pitch = 300 * 2**number * random.uniform(0.95, 1.05)
            sound = 0.3 * np.sin(2 * np.pi * pitch * times + random.uniform(0, 6))
            sound += 0.02 * random.standard_normal(len(times))
            path = folder / f"{number}_{take}.wav"
            soundfile.write(path, sound.astype(np.float32), RATE_HZ, subtype="PCM_16")
            paths.append(path)
    return paths


def manifest(path: Path, paths: list[Path], labels: list[str] | None = None) -> Path:
    """A manifest with the number in each file's name as its label, unless others are given."""
    names = labels or [f"pitch{p.name[0]}" for p in paths]
    write_manifest(path, paths, [name.split(",") for name in names])
    return path


def make_splits(folder: Path, num_classes: int = 3, each: int = 8) -> dict[str, Path]:
    """Manifests of training, held-out and test clips."""
    return {
        split: manifest(
            folder / f"{split}.json",
            make_sounds(folder / split, num_classes, each if split == "train" else 3, seed=seed),
        )
        for seed, split in enumerate(("train", "valid", "test"))
    }


def pretrained_file(folder: Path) -> Path:
    """A published checkpoint of the model of SETTINGS, as drawn."""
    torch.manual_seed(7)
    config = from_plain(
        {
            "model": {"size": "tiny", "depth": 2},
            "audio": {"n_mels": 32, "num_frames": 64},
            "objective": {"num_masked": 2},
        }
    )
    path = folder / "pretrained.pth"
    save_published(MSPM(config), path)
    return path


def overrides(**changed: object) -> list[str]:
    """SETTINGS as overrides; ``finetune__epochs=3`` changes finetune.epochs."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changed.items()}
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def data_overrides(splits: dict[str, Path]) -> list[str]:
    return [
        f"data.train={splits['train']}",
        f"data.valid={splits['valid']}",
        f"finetune.test={splits['test']}",
    ]


def command(
    run: Path, splits: dict[str, Path], checkpoint: Path, recipe: Path, **changed: object
) -> list[object]:
    """Arguments of a run on the command line."""
    settings = {"finetune__average_last_epochs": 2, "train__save_every": 2} | changed
    given = [*overrides(**settings), *data_overrides(splits), f"run.folder={run}"]
    return ["finetune", recipe, *given, "--checkpoint", checkpoint]


def load(recipe: Path, splits: dict[str, Path], run: Path, **changed: object) -> Config:
    """The configuration of a run."""
    given = [*overrides(**changed), *data_overrides(splits), f"run.folder={run}"]
    return load_config(recipe, given)


def plain_file(tmp_path: Path) -> Path:
    """A recipe that changes nothing."""
    path = tmp_path / "plain.yaml"
    path.write_text("finetune: {}\n")
    return path
