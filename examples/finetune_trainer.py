"""Fine-tune an export with the Trainer of transformers, one folder of recordings per class.

    ssast export SSAST-Base-Patch-400 --to hf pretrained
    python finetune_trainer.py pretrained sounds out --bf16
    ssast predict out dog.wav

``sounds/dog/1.wav`` is of the class dog. Nothing of ``ssast`` is imported: the feature extractor
and the model are those of the folder. An encoder of 16 x 16 patches is a plain AST there: its
classifier pools the CLS and the distillation token, not the mean of the patches.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr
from torch.utils.data import Dataset
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)


def mono(samples: np.ndarray, channel: str) -> np.ndarray:
    """Return the waveform [S] of samples [S, channels]: their mean, the left or the right one."""
    if channel == "mean":
        return samples.mean(1)
    return samples[:, min(channel == "right", samples.shape[1] - 1)]


class Recordings(Dataset):
    """Input values [T, F] and class numbers of the .wav files in a folder of folders."""

    def __init__(self, folder: Path, extractor):
        self.extractor = extractor
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.items = [
            (path, number)
            for number, name in enumerate(self.classes)
            for path in sorted((folder / name).glob("*.wav"))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        path, number = self.items[index]
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        sampling_rate = self.extractor.sampling_rate
        channel = getattr(self.extractor, "channel", "mean")
        wave = soxr.resample(mono(samples, channel), rate, sampling_rate)
        found = self.extractor(wave, sampling_rate=sampling_rate, return_tensors="pt")
        return {"input_values": found.input_values[0], "labels": number}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the folder."""
    parser = argparse.ArgumentParser(description="Fine-tune an export with transformers")
    parser.add_argument("checkpoint", help="folder of ssast export --to hf")
    parser.add_argument("sounds", type=Path, help="folder with a folder of .wav files per class")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--cpu", action="store_true", help="for bf16 where there is no GPU")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args(arguments)

    set_seed(0)
    extractor = AutoFeatureExtractor.from_pretrained(options.checkpoint)
    data = Recordings(options.sounds, extractor)
    model = AutoModelForAudioClassification.from_pretrained(
        options.checkpoint,
        trust_remote_code=True,  # the model file that the export carries, if it is no plain AST
        id2label=dict(enumerate(data.classes)),
        label2id={name: number for number, name in enumerate(data.classes)},
        problem_type="single_label_classification",
        ignore_mismatched_sizes=True,  # a head of other classes is replaced
    )
    settings = TrainingArguments(
        str(options.out),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        bf16=options.bf16,
        use_cpu=options.cpu,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
    )
    trainer = Trainer(model, settings, train_dataset=data, processing_class=extractor)
    trainer.train()
    trainer.save_model()  # and the feature extractor


if __name__ == "__main__":
    main()
