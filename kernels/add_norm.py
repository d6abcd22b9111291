"""Residual addition and LayerNorm (Ba et al. 2016) as one operation.

    s = x + (update + bias)
    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + norm_bias          over the last axis

``update`` is a linear layer's product without its bias. The gradient of that bias is the sum of the
gradient of s over all rows, taken in the pass that computes this gradient. Forward, x and update
are read, s and y written; backward, s and the gradients of s and y are read, and one gradient, that
of x and of the update, is written: 4 tensors each way, where PyTorch's operations move 5 and 7.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ssast.kernels.autocast import autocast_dtype
from ssast.kernels.linear import sum_rows
from ssast.kernels.operation import custom_op, on_first_call


def add_norm_reference(
    x: Tensor, update: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute :func:`add_norm` in plain, differentiable torch: the reference."""
    total = x + (update + bias)
    return total, functional.layer_norm(total, weight.shape, weight, norm_bias, eps)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _for_torch(vector: Tensor, total: Tensor) -> Tensor:
    # On a CPU, PyTorch's mean and deviation have the dtype of the weight.
    return vector.to(_statistics_dtype(total)) if total.is_cpu else vector


def _add_norm_torch(
    x: Tensor, update: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The bias goes to the update first: in bf16, beside a large x, it would be rounded away.
    total = torch.add(update, bias).add_(x)
    weight, norm_bias = (_for_torch(v, total) for v in (weight, norm_bias))
    out, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, norm_bias, eps)
    return total, out, mean.squeeze(-1), rstd.squeeze(-1)


def _add_norm_plain(
    x: Tensor, update: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x + (update + bias)
    out, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, norm_bias, eps)
    dtype = _statistics_dtype(x)
    return total, out, mean.squeeze(-1).to(dtype), rstd.squeeze(-1).to(dtype)


def _add_norm_fake(
    x: Tensor, update: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=_statistics_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


_add_norm = custom_op(
    "add_norm",
    _add_norm_torch,
    cuda=on_first_call("add_norm_kernels", "forward"),
    fake=_add_norm_fake,
    autocast="float32",
    plain=_add_norm_plain,
    formula_for=("x", "update", "bias", "weight", "norm_bias"),
)


def _add_norm_backward_torch(
    dout: Tensor, dtotal: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd, w = mean[..., None], rstd[..., None], _for_torch(weight, total)
    # On a CPU, PyTorch sums rows in the dtype of x: of thousands, bf16 loses half.
    is_exact = not total.is_cpu or total.dtype == _statistics_dtype(total)
    dx, dweight, dshift = torch.ops.aten.native_layer_norm_backward(
        dout, total, weight.shape, mean, rstd, w, w, [True, is_exact, is_exact]
    )
    if not is_exact:
        dweight = sum_rows((total - mean).mul_(rstd).mul_(dout)).to(weight.dtype)
        dshift = sum_rows(dout)
    if dtotal is not None:
        dx += dtotal
    return dx, sum_rows(dx), dweight, dshift


def _add_norm_backward_plain(
    dout: Tensor, dtotal: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the same by PyTorch's operation alone, which differentiates the statistics too."""
    out, x, w = (t.to(_statistics_dtype(total)) for t in (dout, total, weight))
    dx, dweight, dshift = torch.ops.aten.native_layer_norm_backward(
        out, x, weight.shape, mean[..., None], rstd[..., None], w, w, [True, True, True]
    )
    if dtotal is not None:
        dx = dx + dtotal
    dbias, dweight, dshift = (t.to(weight.dtype) for t in (sum_rows(dx), dweight, dshift))
    return dx.to(total.dtype), dbias, dweight, dshift


def _add_norm_backward_fake(
    dout: Tensor, dtotal: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias, dweight, dshift = (weight.new_empty(weight.shape) for _ in range(3))
    return total.new_empty(total.shape), dbias, dweight, dshift


_add_norm_backward = custom_op(
    "add_norm_backward",
    _add_norm_backward_torch,
    cuda=on_first_call("add_norm_kernels", "backward"),
    fake=_add_norm_backward_fake,
    autocast="none",
    plain=_add_norm_backward_plain,
)


def _save(ctx, inputs, output) -> None:
    total, _, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, inputs[3])
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # the last sum of a model has no gradient of its own


def _backward(ctx, dtotal: Tensor | None, dout: Tensor | None, *_: None):
    saved = ctx.saved_tensors  # once: activation checkpointing computes them again for each time
    if dout is None:
        dout = torch.zeros_like(saved[0])
    dx, dbias, dweight, dshift = _add_norm_backward(dout, dtotal, *saved)
    return dx, dx, dbias, dweight, dshift, None


_add_norm.register_autograd(_backward, setup_context=_save)


def add_norm(
    x: Tensor, update: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add an update to x, and normalise the sum.

    Autocast: float32, whatever the dtypes of the inputs; so are both results.

    Args:
        x: [..., D], the residual stream.
        update: [..., D], what is added, without its bias.
        bias: [D], added as well.
        weight: [D], of the LayerNorm.
        norm_bias: [D], of the LayerNorm.
        eps: Added to the variance.

    Returns:
        The sum and the normalised sum, both [..., D].

    Raises:
        ValueError: The shapes do not match.
    """
    vectors = (bias, weight, norm_bias)
    if x.shape != update.shape or any(v.shape != x.shape[-1:] for v in vectors):
        raise ValueError(
            f"add_norm: {list(x.shape)}, {list(update.shape)} and vectors of "
            f"{[list(v.shape) for v in vectors]} do not match"
        )
    mixed = any(t.dtype != x.dtype for t in (update, *vectors))
    is_cast = autocast_dtype(x.device.type) is not None
    if (mixed and not is_cast) or torch.compiler.is_exporting():
        return add_norm_reference(x, update, bias, weight, norm_bias, eps)
    total, out, _, _ = _add_norm(x, update, bias, weight, norm_bias, eps)
    return total, out
