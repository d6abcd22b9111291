"""Fine-tune a model with Lightning on recordings that lie in one folder for each class.

    python finetune_lightning.py SSAST-Base-Patch-400 sounds out --precision bf16-mixed
    ssast predict out dog.wav

``sounds/dog/1.wav`` is of the class dog. The checkpoint is whatever ``ssast`` can open; ``out``
becomes a folder for ``ssast predict``, and for transformers' ``from_pretrained``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning
import soundfile
import soxr
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from ssast.engine.api import Classifier, FbankSpec, export_huggingface, fbank, open_model
from ssast.pipelines.audio.decode import downmix


class Recordings(Dataset):
    """Log-mel filterbanks [T, F] and class numbers of the .wav files in a folder of folders."""

    def __init__(self, folder: Path, spec: FbankSpec):
        self.spec = spec
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.items = [
            (path, number)
            for number, name in enumerate(self.classes)
            for path in sorted((folder / name).glob("*.wav"))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, number = self.items[index]
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        mono = downmix(samples, self.spec.channel)
        wave = torch.from_numpy(soxr.resample(mono, rate, self.spec.sample_rate_hz))
        # Clips longer than the model's input are cut, shorter ones padded.
        return fbank(wave[None], torch.tensor([len(wave)]), self.spec)[0], number


class Finetuning(lightning.LightningModule):
    """A classifier, its loss and its optimizer."""

    def __init__(self, classifier: Classifier, lr: float):
        super().__init__()
        self.classifier, self.lr = classifier, lr

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        fbanks, classes = batch
        loss = functional.cross_entropy(self.classifier(fbanks), classes)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters."""
        return torch.optim.AdamW(self.parameters(), self.lr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the folder."""
    parser = argparse.ArgumentParser(description="Fine-tune a model with Lightning")
    parser.add_argument("checkpoint", help="pretrained model")
    parser.add_argument("sounds", type=Path, help="folder with a folder of .wav files per class")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args(arguments)

    lightning.seed_everything(0)
    loaded = open_model(options.checkpoint)
    audio = loaded.audio  # how its input is made
    spec = FbankSpec(audio.sample_rate_hz, audio.n_mels, audio.num_frames, channel=audio.channel)
    data = Recordings(options.sounds, spec)
    classifier = Classifier(loaded.encoder, len(data.classes)).train()
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    batches = DataLoader(data, options.batch_size, shuffle=True)
    trainer.fit(Finetuning(classifier, options.lr), batches)
    if trainer.is_global_zero:
        export_huggingface(classifier.cpu(), options.out, audio, data.classes, "ce")


if __name__ == "__main__":
    main()
