"""Labelled sounds that are the same on every machine: tones of eight pitches in noise."""

from pathlib import Path

import numpy as np
import soundfile

from ssast.pipelines.clips.manifest import write_manifest

RATE_HZ, NUM_CLASSES = 16000, 8


def write_sounds(folder: Path, each: int, seed: int) -> Path:
    """Write tones in noise, a quarter of an octave from class to class; return their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    random, paths, labels = np.random.default_rng(seed), list[Path](), list[list[str]]()
    times = np.arange(int(1.3 * RATE_HZ)) / RATE_HZ
    for number in range(NUM_CLASSES):
        for take in range(each):
            pitch_hz = 400 * 2 ** (number / 4) * random.uniform(0.96, 1.04)
            sound = 0.1 * np.sin(2 * np.pi * pitch_hz * times)
            sound *= times > random.uniform(0, 1)  # begins anywhere in the first second
            sound += 0.1 * random.standard_normal(len(times))
            paths.append(folder / f"{number}-{take}.wav")
            labels.append([f"pitch{number}"])
            soundfile.write(paths[-1], sound.astype(np.float32), RATE_HZ, subtype="PCM_16")
    manifest = folder.with_suffix(".json")
    write_manifest(manifest, paths, labels)
    return manifest
