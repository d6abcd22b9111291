"""The loop that prediction is measured against: soundfile, a feature extractor, a model.

python -m ssast.benchmarks.performance.plain_loop MODEL CLIPS BATCH [--embed FILE]
"""

import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

TOP = 5


def main(model_folder: str, clips: str, batch: str, *embed: str) -> None:
    """Print the likeliest classes of all clips of a folder, or write their embeddings."""
    from transformers import ASTFeatureExtractor, ASTForAudioClassification

    model = ASTForAudioClassification.from_pretrained(model_folder).eval()
    extractor = ASTFeatureExtractor.from_pretrained(model_folder)
    paths, vectors = sorted(Path(clips).iterdir()), []
    with torch.inference_mode():
        for first in range(0, len(paths), int(batch)):
            some = paths[first : first + int(batch)]
            sounds = [soundfile.read(path, dtype="float32")[0] for path in some]
            inputs = extractor(sounds, sampling_rate=16000, return_tensors="pt")
            if embed:
                vectors.append(model.audio_spectrogram_transformer(**inputs).pooler_output.numpy())
                continue
            probabilities = model(**inputs).logits.softmax(-1)
            for path, row in zip(some, probabilities, strict=True):
                best = row.topk(TOP)
                names = [model.config.id2label[index] for index in best.indices.tolist()]
                print(path, *zip(names, best.values.tolist(), strict=True))
    if embed:
        np.save(embed[1], np.concatenate(vectors))


if __name__ == "__main__":
    main(*sys.argv[1:])
