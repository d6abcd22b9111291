"""Every operation with small inputs, for what must hold of each of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ssast.kernels.add_norm import add_norm, add_norm_reference
from ssast.kernels.attention import attention, attention_reference
from ssast.kernels.blocked_attention import blocked_attention
from ssast.kernels.efficient_attention import efficient_attention
from ssast.kernels.fbank import fbank_reference
from ssast.kernels.fill_masked import fill_masked, fill_masked_reference, noise_rows
from ssast.kernels.linear import linear_chunks, linear_gelu
from ssast.kernels.masking import draw_masks, masks_from_ids
from ssast.kernels.mel import FbankSpec
from ssast.kernels.mspm_loss import info_nce, info_nce_reference, mse, mse_reference
from ssast.kernels.patch_embed import patch_embed, patch_embed_reference
from ssast.kernels.scatter_tokens import scatter_tokens, scatter_tokens_reference

Run = Callable[..., Any]
op = torch.ops.ssast


@dataclass(frozen=True)
class Case:
    """An operation of floating-point inputs, and the same in torch alone."""

    run: Run
    reference: Run
    shapes: dict[str, tuple[int, ...]]  # of the floating-point inputs
    computes_in: str  # under autocast, as the documentation calls it
    kept: tuple[str, ...] = ()  # inputs that are not cast
    data: tuple[str, ...] = ()  # inputs that need no gradient in training
    second: str = ""  # the error of second derivatives; "": they are right
    scale: dict[str, float] = field(default_factory=dict)

    def inputs(self) -> list[Tensor]:
        """Float64 inputs that half precision holds exactly."""
        generator = torch.Generator().manual_seed(0)
        return [
            (torch.randn(shape, generator=generator) * self.scale.get(name, 1.0))
            .to(torch.bfloat16)
            .double()
            for name, shape in self.shapes.items()
        ]

    def by_hand(self, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Cast the inputs as autocast to ``dtype`` must."""
        widest = max((x.dtype for x in inputs), key=lambda t: t.itemsize)
        targets = {DTYPE: dtype, "float32": torch.float32, "the widest of its inputs": widest}
        target = targets.get(self.computes_in)
        return [
            x if target is None or name in self.kept else x.to(target)
            for name, x in zip(self.shapes, inputs, strict=True)
        ]


DTYPE = "dtype of autocast"
MASKS = masks_from_ids(torch.tensor([[0, 2], [1, 3]]), 4)  # of 2 x 2 patches
ROWS = torch.tensor([[0, 1, 4, 1], [2, 0, 0, 3]])  # of a table of 5
_NONE = torch.empty(0)
COUNTS = torch.tensor([3, 2])
SPEC = FbankSpec(sample_rate_hz=8000, n_mels=6, num_frames=3)
_EMBED = {
    "fbank": (2, 8, 6),
    "weight": (5, 1, 3, 4),
    "bias": (5,),
    "mask_embed": (5,),
    "pos_embed": (1, 6, 5),
    "prefix": (1, 2, 5),
}
_NORM = {"x": (2, 3, 4), "update": (2, 3, 4), "bias": (4,), "weight": (4,), "norm_bias": (4,)}
_LOSS = {"targets": (2, 3, 4), "predictions": (2, 3, 4)}
_LINEAR = {"x": (3, 4), "weight": (6, 4), "bias": (6,)}
_QKV = {name: (2, 3, 2, 4) for name in ("q", "k", "v")}
_SAMPLES = torch.tensor([SPEC.num_samples, SPEC.num_samples - SPEC.hop])


def _embedded(function: Run, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    return function(*inputs, MASKS, mean=0.5, std=0.8, stride=(3, 4))


def _statistics(total: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(total, -1, correction=0)
    return mean, (var + 1e-5).rsqrt()


CASES = {
    "draw_masks": Case(
        lambda: draw_masks(
            torch.arange(3), torch.zeros(3, dtype=torch.int64),
            seed=0, kind="official", grid=(4, 4), num_masked=5,
        )[:2],
        lambda: None, {}, "integers",
    ),
    "patch_embed": Case(
        lambda *x: _embedded(patch_embed, *x),
        lambda *x: _embedded(patch_embed_reference, *x),
        _EMBED, DTYPE, kept=("fbank",), data=("fbank",),
    ),
    "scatter_tokens": Case(
        lambda *x: scatter_tokens(*x, MASKS),
        lambda *x: scatter_tokens_reference(*x, MASKS),
        {"visible": (2, 4, 3), "shared": (4, 3)}, "the widest of its inputs",
    ),
    "noise_rows": Case(
        lambda: (
            noise_rows(*[torch.arange(3)] * 3, seed=0, num_patches=5, table_rows=7),
        ),
        lambda: None, {}, "integers",
    ),
    "fill_masked": Case(
        lambda *x: fill_masked(*x, ROWS, MASKS),
        lambda *x: fill_masked_reference(*x, ROWS, MASKS),
        {"visible": (2, 2, 3), "table": (5, 3)}, "the widest of its inputs", data=("table",),
    ),
    "info_nce": Case(
        lambda *x: info_nce(*x, "official", COUNTS)[0],
        lambda *x: _valid(info_nce_reference, *x, "official"),
        _LOSS, "float32", data=("targets",),
    ),
    "mse": Case(
        lambda *x: mse(*x, COUNTS), lambda *x: _valid(mse_reference, *x), _LOSS, "float32",
        data=("targets",),
    ),
    "attention": Case(attention, attention_reference, _QKV, DTYPE, second="not implemented"),
    "blocked_attention": Case(blocked_attention, attention_reference, _QKV, DTYPE),
    "efficient_attention": Case(efficient_attention, attention_reference, _QKV, DTYPE),
    "add_norm": Case(
        lambda *x: add_norm(*x, 1e-5), lambda *x: add_norm_reference(*x, 1e-5), _NORM, "float32"
    ),
    "linear_gelu": Case(
        linear_gelu, lambda *x: functional.gelu(functional.linear(*x)), _LINEAR, DTYPE
    ),
    "linear_chunks": Case(
        lambda *x: linear_chunks(*x, 3),
        lambda *x: functional.linear(*x).chunk(3, -1),
        _LINEAR, DTYPE,
    ),
    "fbank": Case(
        lambda x: op.fbank(x, _SAMPLES, SPEC.sample_rate_hz, SPEC.n_mels, SPEC.num_frames, 20.0),
        lambda x: fbank_reference(x, _SAMPLES, SPEC),
        {"waveforms": (2, SPEC.num_samples)},
        "float32", data=("waveforms",), scale={"waveforms": 0.1},
    ),
}  # fmt: skip


def _valid(reference: Run, targets: Tensor, predictions: Tensor, *rest: Any) -> Tensor:
    """The losses of the valid rows alone, clip by clip."""
    results = []
    for b, n in enumerate(COUNTS.tolist()):
        loss = reference(targets[b : b + 1, :n], predictions[b : b + 1, :n], *rest)
        results.append(loss[0] if isinstance(loss, tuple) else loss)
    return torch.cat(results)


_BIG = {"grad": (2, 6, 5), "fbank": (2, 8, 6), "weight": (5, 1, 3, 4)}
BACKWARD = {  # what runs in the backward pass of an operation; autocast leaves it alone
    "patch_embed_backward": Case(
        lambda *x: op.patch_embed_backward(*x, *MASKS[:2], 0.5, 0.8, [3, 4]),
        lambda: None, _BIG, "none",
    ),
    "scatter_tokens_backward": Case(
        lambda x: op.scatter_tokens_backward(x, *MASKS[:2]), lambda: None, {"grad": (2, 6, 3)},
        "none",
    ),
    "fill_masked_backward": Case(
        lambda x: op.fill_masked_backward(x, MASKS.visible_ids, torch.tensor([2, 1])),
        lambda: None, {"grad": (2, 4, 3)}, "none",
    ),
    "blocked_attention_backward": Case(
        lambda *x: op.blocked_attention_backward(*x, None, _NONE),
        lambda: None, {"grad": (2, 3, 2, 4)} | _QKV, "none",
    ),
    "efficient_attention_backward": Case(
        lambda grad, *qkv: op.efficient_attention_backward(
            grad, *qkv, *op.efficient_attention(*qkv)
        ),
        lambda: None, {"grad": (2, 3, 2, 4)} | _QKV, "none",
    ),
    "add_norm_backward": Case(
        lambda dout, total, weight: op.add_norm_backward(
            dout, None, total, *_statistics(total), weight
        ),
        lambda: None, {"dout": (2, 3, 4), "total": (2, 3, 4), "weight": (4,)}, "none",
    ),
    "gelu_backward": Case(
        op.gelu_backward, lambda: None, {"grad": (3, 4), "h": (3, 4)}, "none"
    ),
    "join_chunks": Case(
        op.join_chunks, lambda: None, {name: (3, 4) for name in ("a", "b", "c")}, "none"
    ),
}  # fmt: skip
