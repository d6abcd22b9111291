"""The public models, small, under autocast: by themselves and on the ranks of a world."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssast.engine.api import ASTModel
from ssast.engine.config import from_plain
from ssast.engine.model.classifier import Classifier, LossClassifier
from ssast.engine.model.encoder import SpectrogramTransformer, layer_states
from ssast.engine.model.objective import MSPM
from ssast.kernels.masking import masks_from_ids

Losses = Callable[[nn.Module, Tensor], dict[str, Tensor]]
CONFIG = from_plain(
    {
        "model": {"size": "tiny", "depth": 2},
        "audio": {"num_frames": 64, "mean": -1.0, "std": 1.5},
        "objective": {"num_masked": 12},
    }
)
OPTIONS = replace(
    CONFIG, model=replace(CONFIG.model, positions="sincos", extra_tokens="cls", norm="post")
)
IDS = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(i))[:12]
                   for i in range(4)])  # fmt: skip
LABELS = torch.eye(3)[[0, 2, 1, 1]]
PAPER = {"fshape": 16, "tshape": 16, "fstride": 16, "tstride": 16, "input_fdim": 128,
         "input_tdim": 64, "model_size": "tiny"}  # fmt: skip


def _encoder() -> SpectrogramTransformer:
    return SpectrogramTransformer(CONFIG.model, CONFIG.audio)


def _published(**settings: Any) -> ASTModel:
    model = ASTModel(**PAPER, **settings)
    model.v.blocks = model.v.blocks[:2]
    return model


def _pretrain(model: nn.Module, fbank: Tensor) -> dict[str, Tensor]:
    accuracy, nce = model(fbank, "pretrain_mpc", mask_patch=12, mask_ids=IDS[: len(fbank)])
    mse = model(fbank, "pretrain_mpg", mask_patch=12, mask_ids=IDS[: len(fbank)])
    return {"loss": nce + 10 * mse, "accuracy": accuracy}


def _mspm(model: nn.Module, fbank: Tensor) -> dict[str, Tensor]:
    losses = model(fbank, masks_from_ids(IDS[: len(fbank)], 32))
    return {"loss": (losses["infonce_loss"] + 10 * losses["mse_loss"]).mean(), **losses}


def _classify(model: nn.Module, fbank: Tensor) -> dict[str, Tensor]:
    logits = model(fbank, torch.tensor([64, 40, 64, 17])[: len(fbank)])
    return {"loss": nn.functional.cross_entropy(logits, LABELS[: len(fbank)]), "logits": logits}


def _with_loss(model: nn.Module, fbank: Tensor) -> dict[str, Tensor]:
    results = model(fbank, LABELS[: len(fbank)])
    return {"loss": results["loss"].mean(), "logits": results["logits"]}


def _states(model: nn.Module, fbank: Tensor) -> dict[str, Tensor]:
    states = layer_states(model, fbank)
    return {"loss": torch.stack([x.float().square().mean() for x in states]).mean()}


MODELS: dict[str, tuple[Callable[[], nn.Module], Losses]] = {
    "MSPM": (lambda: MSPM(CONFIG), _mspm),
    "MSPM options": (lambda: MSPM(OPTIONS), _mspm),
    "Classifier": (lambda: Classifier(_encoder(), 3), _classify),
    "LossClassifier": (lambda: LossClassifier(_encoder(), 3), _with_loss),
    "ASTModel pretraining": (_published, _pretrain),
    "layer_states": (_encoder, _states),
}


def build(name: str) -> tuple[nn.Module, Losses]:
    """The same weights each time, large enough that they matter."""
    torch.manual_seed(0)
    make, losses = MODELS[name]
    model = make()
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, model.parameters()):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, losses


def clips() -> Tensor:
    return torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(1))


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to a dtype; off for None."""
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        yield


def step(
    model: nn.Module, losses: Losses, fbank: Tensor, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the model returns, and the gradients of the parameters that have one."""
    model.zero_grad()
    with autocast(dtype):
        results = losses(model, fbank)
    results["loss"].backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in results.items()}, gradients


def sharded(world, name: str, kind: str, dtype: torch.dtype):
    """One step on this rank's half of the clips: its loss, and gradients averaged over ranks."""
    model, losses = build(name)
    half = slice(2 * world.rank, 2 * world.rank + 2)
    if kind == "DDP":
        wrapped: nn.Module = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        # Of the second block each part by itself: its biases are used outside of them.
        first, second = model.encoder.blocks
        for part in (first, second.mlp.fc2, second.mlp, second.attn.proj, second.attn, second):
            fully_shard(part)
        wrapped = fully_shard(model)
    results, gradients = step(wrapped, losses, clips()[half], dtype)
    whole = {
        name.removeprefix("module."): g.full_tensor() if kind == "FSDP2" else g
        for name, g in gradients.items()
    }
    return results["loss"].item(), {name: g.numpy() for name, g in whole.items()}
