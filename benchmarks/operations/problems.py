"""The operations of a training step as separate problems: inputs, providers, work."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import functional

from ssast.benchmarks.training.baseline import draw_published_mask
from ssast.engine.settings import SIZES
from ssast.kernels import roofline
from ssast.kernels.add_norm import _add_norm, _add_norm_backward, add_norm, add_norm_reference
from ssast.kernels.attention import (
    attention,
    attention_reference,
    candidates,
    rejection_reason,
    run_backend,
)
from ssast.kernels.fbank import FbankSpec, _fbank, fbank, fbank_reference
from ssast.kernels.fill_masked import (
    _noise_rows,
    fill_masked,
    fill_masked_reference,
    noise_rows,
)
from ssast.kernels.linear import _gelu_backward, _join_chunks, linear_chunks, linear_gelu
from ssast.kernels.masking import Masks, _draw_masks, draw_masks
from ssast.kernels.mspm_loss import (
    _info_nce,
    _mse,
    info_nce,
    info_nce_reference,
    mse,
    mse_reference,
)
from ssast.kernels.patch_embed import (
    _patch_embed,
    _patch_embed_backward,
    patch_embed,
    patch_embed_reference,
)
from ssast.kernels.roofline import Work

MEAN, STD = -4.27, 4.57  # AudioSet's


@dataclass(frozen=True)
class Shape:
    """A batch of clips for the patch model, with 400 of 512 patches masked."""

    size: str
    batch: int
    frames: int = 1024
    n_mels: int = 128

    @property
    def embed_dim(self) -> int:
        """D."""
        return SIZES[self.size].embed_dim

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of 16 x 16 patches."""
        return self.n_mels // 16, self.frames // 16

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def num_masked(self) -> int:
        """M."""
        return round(400 / 512 * self.num_patches)


Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """One operation on given inputs.

    Attributes:
        operation: Name of the operation.
        dtype: Dtype of the floating point inputs.
        leaves: Arguments of the providers, for which gradients are computed.
        providers: Implementations by name, "ours" and "eager" among them.
        forward: Least work of a call.
        backward: Least work of its backward pass; None where there is no gradient.
        kernels: Variant name, custom operation and arguments of each Triton launch behind "ours",
            to be compiled ahead of time.
        comparable: Whether all providers return the same numbers.
    """

    operation: str
    dtype: torch.dtype
    leaves: list[Tensor]
    providers: dict[str, Callable[..., Outputs]]
    forward: Work
    backward: Work | None = None
    kernels: list[tuple[str, CustomOpDef, tuple[Any, ...]]] = field(default_factory=list)
    comparable: bool = True


def _masks(shape: Shape, device: torch.device) -> Masks:
    B, N, M = shape.batch, shape.num_patches, shape.num_masked
    if device.type == "meta":
        empty = functools.partial(torch.empty, dtype=torch.int64, device=device)
        return Masks(empty(B, M), empty(B, N - M))
    clips = torch.arange(B, device=device)
    return draw_masks(
        clips, torch.zeros_like(clips), seed=0, kind="official", grid=shape.grid, num_masked=M
    )


def masking_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build the problem of cluster masks; eager is the published loop over clips.

    The kernels of the other masks and of the noise of masked places, of integers too, are compiled.
    """
    B, N, M = shape.batch, shape.num_patches, shape.num_masked
    clips = torch.arange(B, device=device)
    epochs = torch.zeros_like(clips)

    def ours() -> Outputs:
        return draw_masks(clips, epochs, seed=0, kind="official", grid=shape.grid, num_masked=M)[0]

    def eager() -> Outputs:
        masks = [draw_published_mask(*shape.grid, M) for _ in range(B)]
        return torch.tensor(masks, device=device)

    return Problem(
        "draw_masks",
        torch.int64,
        [],
        {"ours": ours, "eager": eager},
        roofline.draw_masks(B, N),
        kernels=[
            (kind, _draw_masks, (clips, epochs, None, None, None, 0, 0, kind, *shape.grid, M))
            for kind in ("official", "uniform", "random", "inverse_blocks")
        ]
        + [("", _noise_rows, (clips, clips, clips, 0, N, 4096))],
        comparable=False,  # each has its own random numbers
    )


def fill_masked_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build the problem of noise at the masked places; both have the same rows of noise."""
    B, N, D, table_rows = shape.batch, shape.num_patches, shape.embed_dim, 4096
    clips, masks = torch.arange(B, device=device), _masks(shape, device)
    table = (0.01 * torch.randn(table_rows, D, device=device)).to(dtype)
    visible = torch.randn(*masks.visible_ids.shape, D, device=device).to(dtype)
    drawn: dict[str, Any] = {"seed": 0, "num_patches": N, "table_rows": table_rows}
    rows = noise_rows(clips, clips, clips, **drawn)

    def ours(x: Tensor) -> Outputs:
        own = noise_rows(clips, clips, clips, **drawn)
        return fill_masked(x, table.to(x.dtype), own, masks)

    size = B, N, shape.num_masked, D
    return Problem(
        "fill_masked",
        dtype,
        [visible],
        {"ours": ours, "eager": lambda x: fill_masked_reference(x, table, rows, masks)},
        roofline.fill_masked(*size, itemsize=dtype.itemsize),
        roofline.fill_masked_backward(*size, itemsize=dtype.itemsize),
    )


def patch_embed_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build the problem of the patch embedding, from fp32 filterbanks to tokens of ``dtype``."""
    B, N, M, D = shape.batch, shape.num_patches, shape.num_masked, shape.embed_dim
    normal = functools.partial(torch.randn, device=device)
    fbank = MEAN + 2 * STD * normal(B, shape.frames, shape.n_mels)
    leaves = [
        (0.05 * normal(*s)).to(dtype)
        for s in ((D, 1, 16, 16), (D,), (D,), (1, 2 + N, D), (1, 2, D))
    ]
    masks = _masks(shape, device)
    settings: dict[str, Any] = {"mean": MEAN, "std": STD, "stride": [16, 16]}

    def ours(*p: Tensor) -> Outputs:
        weight, bias, mask_embed, pos_embed, prefix = p
        return patch_embed(fbank, weight, bias, mask_embed, pos_embed, prefix, masks, **settings)

    def eager(*p: Tensor) -> Outputs:
        x = fbank.to(torch.promote_types(p[0].dtype, torch.float32))  # normalised before rounding
        weight, bias, mask_embed, pos_embed, prefix = p
        return patch_embed_reference(
            x, weight, bias, mask_embed, pos_embed, prefix, masks, **settings
        )

    size = {"fbank_bytes": 4, "weight_bytes": dtype.itemsize}
    gradient = torch.empty(B, 2 + N, D, dtype=dtype, device=device)
    return Problem(
        "patch_embed",
        dtype,
        leaves,
        {"ours": ours, "eager": eager},
        roofline.patch_embed(B, N, M, 256, D, **size),
        roofline.patch_embed_backward(B, N, M, 256, D, **size),
        [
            ("", _patch_embed, (fbank, *leaves, *masks[:2], *settings.values())),
            (
                "",
                _patch_embed_backward,
                (gradient, fbank, leaves[0], *masks[:2], *settings.values()),
            ),
        ],
    )


def _targets_and_predictions(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    size = shape.batch, shape.num_masked, 256
    targets = 0.5 * torch.randn(size, device=device)
    predictions = 0.05 * targets + 0.1 * torch.randn(size, device=device)
    return targets.to(dtype), predictions.to(dtype)


def info_nce_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build the problem of InfoNCE with its accuracy; eager stores the scores."""
    targets, predictions = _targets_and_predictions(shape, dtype, device)
    size = shape.batch, shape.num_masked, 256
    return Problem(
        "info_nce",
        dtype,
        [predictions],
        {
            "ours": lambda c: info_nce(targets, c)[0],
            "eager": lambda c: info_nce_reference(targets.to(c.dtype), c, "official")[0],
        },
        roofline.info_nce(*size, itemsize=dtype.itemsize),
        roofline.scale_gradient(*size, itemsize=dtype.itemsize),
        [
            (axis, _info_nce, (targets, predictions, axis == "paper"))
            for axis in ("official", "paper")
        ],
    )


def mse_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build the problem of the reconstruction loss."""
    targets, predictions = _targets_and_predictions(shape, dtype, device)
    size = shape.batch, shape.num_masked, 256
    return Problem(
        "mse",
        dtype,
        [predictions],
        {
            "ours": lambda r: mse(targets, r),
            "eager": lambda r: mse_reference(targets.to(r.dtype), r),
        },
        roofline.mse(*size, itemsize=dtype.itemsize),
        roofline.scale_gradient(*size, itemsize=dtype.itemsize),
        [("", _mse, (targets, predictions))],
    )


def attention_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build the problem of self-attention over all tokens; eager stores the probabilities."""
    B, L, D = shape.batch, shape.num_patches + 2, shape.embed_dim
    heads = SIZES[shape.size].num_heads
    qkv = torch.randn(3, B, L, heads, D // heads, device=device).to(dtype)
    providers: dict[str, Callable[..., Outputs]] = {"ours": attention, "eager": attention_reference}
    if device.type == "cuda":
        for backend in candidates(device, dtype):
            if not rejection_reason(backend, device, dtype):
                providers[backend] = functools.partial(run_backend, backend)
    return Problem(
        "attention",
        dtype,
        list(qkv),
        providers,
        roofline.attention(B, L, D, itemsize=dtype.itemsize),
        roofline.attention_backward(B, L, D, itemsize=dtype.itemsize),
    )


def add_norm_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build the problem of the residual addition with LayerNorm."""
    size, D = (shape.batch, shape.num_patches + 2, shape.embed_dim), shape.embed_dim
    normal = functools.partial(torch.randn, device=device)
    leaves = [normal(*s).to(dtype) for s in (size, size, (D,), (D,), (D,))]
    rows = [torch.empty(size[:2], device=device) for _ in range(2)]
    return Problem(
        "add_norm",
        dtype,
        leaves,
        {
            "ours": functools.partial(add_norm, eps=1e-6),
            "eager": functools.partial(add_norm_reference, eps=1e-6),
        },
        roofline.add_norm(*size, itemsize=dtype.itemsize),
        roofline.add_norm(*size, itemsize=dtype.itemsize),
        [
            ("", _add_norm, (*leaves, 1e-6)),
            ("", _add_norm_backward, (*leaves[:2], leaves[0], *rows, leaves[3])),
        ],
    )


def _linear_leaves(
    shape: Shape, dtype: torch.dtype, device: torch.device, widths: int
) -> list[Tensor]:
    D = shape.embed_dim
    sizes = (shape.batch, shape.num_patches + 2, D), (widths * D, D), (widths * D,)
    x, weight, bias = (torch.randn(*size, device=device) for size in sizes)
    return [t.to(dtype) for t in (x, weight * D**-0.5, bias)]


def linear_gelu_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build the problem of the first layer of the MLP with its GELU."""
    leaves = _linear_leaves(shape, dtype, device, 4)
    h = leaves[0].new_empty(*leaves[0].shape[:2], len(leaves[1]))
    size = leaves[0].shape
    return Problem(
        "linear_gelu",
        dtype,
        leaves,
        {
            "ours": linear_gelu,
            "eager": lambda *p: functional.gelu(functional.linear(*p)),
        },
        roofline.linear_gelu(*size, itemsize=dtype.itemsize),
        roofline.linear_gelu_backward(*size, itemsize=dtype.itemsize),
        [("", _gelu_backward, (h, h))],
    )


def linear_chunks_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build the problem of the projection to queries, keys and values."""
    leaves = _linear_leaves(shape, dtype, device, 3)
    size = leaves[0].shape
    return Problem(
        "linear_chunks",
        dtype,
        leaves,
        {
            "ours": lambda x, weight, bias: linear_chunks(x, weight, bias, 3),
            "eager": lambda *p: functional.linear(*p).chunk(3, -1),
        },
        roofline.linear_chunks(*size, itemsize=dtype.itemsize),
        roofline.linear_chunks_backward(*size, itemsize=dtype.itemsize),
        [("", _join_chunks, (leaves[0], leaves[0], leaves[0]))],
    )


def fbank_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build the problem of the filterbank of 16 kHz waveforms, in fp32 for every dtype."""
    spec = FbankSpec(n_mels=shape.n_mels, num_frames=shape.frames)
    waveforms = 0.1 * torch.randn(shape.batch, spec.num_samples, device=device)
    lengths = torch.full((shape.batch,), spec.num_samples, device=device)
    args = spec.sample_rate_hz, spec.n_mels, spec.num_frames, float(spec.low_hz)
    return Problem(
        "fbank",
        torch.float32,
        [],
        {
            "ours": lambda: fbank(waveforms, lengths, spec),
            "eager": lambda: fbank_reference(waveforms, lengths, spec),
        },
        roofline.fbank(shape.batch, spec.num_samples, spec.num_frames, spec.n_mels, spec.n_fft),
        kernels=[("", _fbank, (waveforms, lengths, *args))],
    )


PROBLEMS: dict[str, Callable[[Shape, torch.dtype, torch.device], Problem]] = {
    "draw_masks": masking_problem,
    "fill_masked": fill_masked_problem,
    "patch_embed": patch_embed_problem,
    "info_nce": info_nce_problem,
    "mse": mse_problem,
    "attention": attention_problem,
    "add_norm": add_norm_problem,
    "linear_gelu": linear_gelu_problem,
    "linear_chunks": linear_chunks_problem,
    "fbank": fbank_problem,
}
# The same for every size of the model.
SIZELESS = ("draw_masks", "info_nce", "mse", "fbank")


def size_name(operation: str, shape: Shape) -> str:
    """Return the model size of a problem, "any" if it does not depend on it."""
    return "any" if operation in SIZELESS else shape.size


def problems(
    operations: Sequence[str],
    sizes: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    frames: int = 1024,
) -> Iterator[tuple[Shape, Problem]]:
    """Yield each problem once: some do not depend on the size or the dtype of the model."""
    for name in operations:
        for size in sizes[:1] if name in SIZELESS else sizes:
            for batch in batches:
                shape, seen = Shape(size, batch, frames), set()
                for dtype in dtypes:
                    problem = PROBLEMS[name](shape, dtype, device)
                    if problem.dtype not in seen:
                        seen.add(problem.dtype)
                        yield shape, problem
