"""Fine-tune a model in a loop of your own with Accelerate, one folder of recordings per class.

    accelerate launch finetune_accelerate.py SSAST-Base-Patch-400 sounds out --precision bf16
    ssast predict out dog.wav

``sounds/dog/1.wav`` is of the class dog. The checkpoint is whatever ``ssast`` can open; ``out``
becomes a folder for ``ssast predict``, and for transformers' ``from_pretrained``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import soundfile
import soxr
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the folder."""
    parser = argparse.ArgumentParser(description="Fine-tune a model with Accelerate")
    parser.add_argument("checkpoint", help="pretrained model")
    parser.add_argument("sounds", type=Path, help="folder with a folder of .wav files per class")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for each step")
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args(arguments)

    set_seed(0)
    accelerator = Accelerator(
        mixed_precision=options.precision, gradient_accumulation_steps=options.accumulate
    )
    loaded = open_model(options.checkpoint)
    audio = loaded.audio  # how its input is made
    spec = FbankSpec(audio.sample_rate_hz, audio.n_mels, audio.num_frames, channel=audio.channel)
    data = Recordings(options.sounds, spec)
    classifier = Classifier(loaded.encoder, len(data.classes)).train()
    model, optimizer, batches = accelerator.prepare(
        classifier,
        torch.optim.AdamW(classifier.parameters(), options.lr),
        DataLoader(data, options.batch_size, shuffle=True),
    )
    for epoch in range(options.epochs):
        losses = []
        for fbanks, classes in batches:
            with accelerator.accumulate(model):
                loss = functional.cross_entropy(model(fbanks), classes)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        accelerator.print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.4f}")
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model, keep_fp32_wrapper=False).cpu()
        export_huggingface(trained, options.out, audio, data.classes, "ce")


if __name__ == "__main__":
    main()
