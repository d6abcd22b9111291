"""The published numbers of tests/golden/ and our models with their weights."""

from functools import cache
from typing import Any

import torch
from paths import GOLDEN
from torch import Tensor

from ssast.engine.api import from_published, published_name
from ssast.engine.config import Config, from_plain
from ssast.engine.model.embedding import resize_pos_embed
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import MSPM, mean_losses
from ssast.engine.settings import Audio
from ssast.kernels.masking import Masks, masks_from_ids

PATCHES = {"patch": (16, 16), "frame": (128, 2)}
# Their gradients are zero but for rounding noise under the official softmax axis.
NOISE = ("cpredlayer.2.bias",)


@cache
def golden(kind: str) -> dict[str, Any]:
    """The numbers of the ``patch`` or the ``frame`` model."""
    path = GOLDEN / f"ssast_tiny2_{kind}.pt"
    return torch.load(path, weights_only=True)


def config(which: str, **objective: object) -> Config:
    """The configuration of that model; (0, 0.5) leaves the normalised input as it is."""
    case = golden(which)
    return from_plain(
        {
            "model": {"size": "tiny", "depth": case["depth"], "patch": list(PATCHES[which])},
            "audio": {"num_frames": case["input_tdim"], "mean": 0.0, "std": 0.5},
            "objective": {"num_masked": case["mask_patch"], **objective},
        }
    )


def pretraining_case(
    which: str, dtype: torch.dtype, **objective: object
) -> tuple[MSPM, torch.Tensor, Masks]:
    """Model, filterbanks [2, 256, 128] and the masks of the published run."""
    case = golden(which)
    model = MSPM(config(which, **objective)).to(dtype)
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict(from_published(case["state_dict"], names))
    fbank = case["input"].to(dtype)
    rows, columns = model.grid
    return model, fbank, masks_from_ids(case["mask_ids"], rows * columns)


def encoder_for(kind: str, finetune: dict[str, Any], dtype: torch.dtype) -> SpectrogramTransformer:
    """The encoder at the stride and length of a fine-tuning case."""
    settings = config(kind)
    audio = Audio(num_frames=finetune["input_tdim"], mean=0.0, std=0.5)
    stride = (finetune["fstride"], finetune["tstride"])
    encoder = SpectrogramTransformer(settings.model, audio, stride).to(dtype)
    model, _, _ = pretraining_case(kind, dtype)
    weights = model.encoder.state_dict()
    # Interpolated in float32, as the published numbers were.
    pos_embed = weights["embed.pos_embed"].float()
    weights["embed.pos_embed"] = resize_pos_embed(pos_embed, settings.grid, encoder.embed.grid, 2)
    encoder.load_state_dict(weights)
    return encoder


KINDS = ["patch", "frame"]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


def relative(dtype: torch.dtype, float32: float) -> float:
    return 1e-10 if dtype == torch.float64 else float32


def joint_loss(model: MSPM, fbank: Tensor, *masks: Any) -> dict[str, Tensor]:
    valid = torch.ones(len(fbank), dtype=torch.bool)
    return mean_losses(model(fbank, *masks), valid, 10.0)


def gradients(model: MSPM) -> dict[str, Tensor]:
    """By published name, of the parameters that have one."""
    return {
        published_name(name): p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def whole_state(kind: str) -> dict[str, torch.Tensor]:
    """The state dict as published, with ImageNet's heads."""
    state = {name: value.clone() for name, value in golden(kind)["state_dict"].items()}
    for head in ("head", "head_dist"):
        state[f"module.v.{head}.weight"] = torch.zeros(1000, 192)
        state[f"module.v.{head}.bias"] = torch.zeros(1000)
    return state
