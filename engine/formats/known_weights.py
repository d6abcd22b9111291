"""Weights that can be had by name: those that the authors of SSAST publish, and ours.

Names, addresses and scores are those of the README of YuanGongND/ssast, which has no checksums: the
mean accuracies of fine-tuned models on the paper's audio and speech tasks, in percent.
"""

from dataclasses import dataclass
from pathlib import Path

OURS = Path(__file__).resolve().parents[2] / "checkpoints"
_TABLE = """
SSAST-Base-Patch-400    base  16x16  400  59.9  79.5  ewrzpco95n9jdz6/SSAST-Base-Patch-400.pth
SSAST-Base-Frame-400    base  128x2  400  57.6  84.0  nx6nl4d4bl71sm8/SSAST-Base-Frame-400.pth
SSAST-Base-Patch-250    base  16x16  250  58.6  79.5  mxrm9qog6aj8hif/SSAST-Base-Patch-250.pth
SSAST-Base-Frame-250    base  128x2  250  55.6  81.6  4e6l7ulhwrfoana/SSAST-Base-Frame-250.pth
SSAST-Small-Patch-400   small 16x16  400  58.1  78.2  i24w446rl9pkf05/SSAST-Small-Patch-400.pth
SSAST-Tiny-Patch-400    tiny  16x16  400  53.3  75.7  fkbtf78y94113wz/SSAST-Tiny-Patch-400.pth
SSAST-Tiny-Frame-400    tiny  128x2  400  47.8  -     rx7g60ruzawffzv/SSAST-Tiny-Frame-400.pth
ablation-100-masked     base  16x16  100  -     -     0oyrtfbjzkwho2p/audio_model_100m.pth
ablation-discriminative base  16x16  400  -     -     znuzgwf2zvrpjkr/audio_model_dis.pth
ablation-generative     base  16x16  400  -     -     u6ws5fjrid10x4p/audio_model_gen.pth
ablation-audioset-20k   base  16x16  400  -     -     y6x2ck2ca3tb7d9/audio_model_as20k.pth
ablation-audioset-2m    base  16x16  400  -     -     m9p782df3faql1q/audio_model_as.pth
ablation-librispeech    base  16x16  400  -     -     f4bn2qelu3m8ksu/audio_model_librispeech.pth
"""


@dataclass(frozen=True)
class Weights:
    """Published weights.

    Attributes:
        size: Size of the model.
        patch: Patch size, mel bins x frames.
        num_masked: Masked patches of 512.
        audio: Mean accuracy on audio tasks in percent, or "-".
        speech: Mean accuracy on speech tasks in percent, or "-".
        url: Address of the file.
    """

    size: str
    patch: str
    num_masked: int
    audio: str
    speech: str
    url: str


def _published() -> dict[str, Weights]:
    rows = [line.split() for line in _TABLE.strip().splitlines()]
    return {
        name: Weights(
            size, patch, int(masked), audio, speech, f"https://www.dropbox.com/s/{path}?dl=1"
        )
        for name, size, patch, masked, audio, speech, path in rows
    }


PUBLISHED = _published()


def ours() -> dict[str, Path]:
    """Return the folders of the weights that come with a clone of the project, by name."""
    return {path.name: path for path in sorted(OURS.glob("*")) if (path / "meta.json").is_file()}
