"""The losses of masked spectrogram patch modelling, with their gradients from the forward pass.

Within one clip, over its M masked patches with targets t, contrastive predictions c and
reconstructions r (SSAST, equations 1 and 2):

    S_ij     = t_i . c_j
    InfoNCE  = -1/M sum_i log softmax_j(S)_ii      softmax_axis "official", the published code
             = -1/M sum_j log softmax_i(S)_jj      softmax_axis "paper", equation 1
    accuracy = 1/M #{j : argmax_i softmax(S)_ij = j}
    MSE      = 1/(M P) sum_i |r_i - t_i|^2

The upstream gradient of a loss is one number per clip, so the forward pass computes the gradient
already: d InfoNCE / d c_j = 1/M sum_i (softmax(S)_ij - delta_ij) t_i. It is saved, and the backward
pass scales it; that of the MSE, divided by all M P values, in float32 where predictions are
float16. On CUDA, S and its softmax exist in tiles alone.

Second derivatives are those of the saved gradient, which is a result of the operation as the loss
is: that of the MSE is linear in the predictions, that of InfoNCE is computed from the inputs.

Where clips have different numbers of masked patches, M is the largest of them and ``num_masked``
says how many rows of a clip are valid. The others may hold anything, and their gradient is 0.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ssast.kernels.operation import custom_op, on_first_call

SoftmaxAxis = Literal["official", "paper"]
_AXES: tuple[str, ...] = get_args(SoftmaxAxis)


def info_nce_reference(
    targets: Tensor,
    predictions: Tensor,
    softmax_axis: SoftmaxAxis,
    num_masked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE and its accuracy, both [B], in differentiable torch: the reference."""
    if num_masked is not None:
        clips = [
            info_nce_reference(targets[b : b + 1, :n], predictions[b : b + 1, :n], softmax_axis)
            for b, n in enumerate(num_masked.tolist())
        ]
        return torch.cat([nce for nce, _ in clips]), torch.cat([hit for _, hit in clips])
    if targets.shape[1] == 0:
        nothing = predictions.sum((1, 2))
        return nothing, nothing.detach().clone()
    scores = torch.einsum("bip,bjp->bij", targets, predictions)
    log_p = scores.log_softmax(2 if softmax_axis == "official" else 1)
    # The published code takes the argmax down the columns, whichever way the softmax went.
    best = (log_p if softmax_axis == "official" else scores).argmax(1)
    hit = best == torch.arange(scores.shape[1], device=scores.device)
    nce = -log_p.diagonal(dim1=1, dim2=2).mean(1)
    return nce, hit.to(scores.dtype).mean(1)


def mse_reference(targets: Tensor, predictions: Tensor, num_masked: Tensor | None = None) -> Tensor:
    """Compute the reconstruction loss, [B], in differentiable torch: the reference."""
    if num_masked is not None:
        clips = [
            mse_reference(targets[b : b + 1, :n], predictions[b : b + 1, :n])
            for b, n in enumerate(num_masked.tolist())
        ]
        return torch.cat(clips)
    if targets.shape[1] == 0:
        return predictions.sum((1, 2))
    return (predictions - targets).square().mean((1, 2))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _valid_rows(num_masked: Tensor | None, M: int) -> Tensor | None:
    """Return which rows are valid, [B, M] bool; None: all of them."""
    if num_masked is None:
        return None
    return torch.arange(M, device=num_masked.device) < num_masked[:, None]


def _num_valid(num_masked: Tensor | None, M: int, dtype: torch.dtype) -> Tensor | int:
    """Return the divisor of a clip's mean over its rows, at least 1, [B]."""
    return max(M, 1) if num_masked is None else num_masked.clamp(1, max(M, 1)).to(dtype)


def _zero_padding(rows: Tensor | None, x: Tensor) -> Tensor:
    """Set padding rows to 0; ``x`` is [B, M] or [B, M, P]."""
    return x if rows is None else x.where(rows.view(*rows.shape, *[1] * (x.ndim - 2)), 0)


def _prepared(
    targets: Tensor, predictions: Tensor, num_masked: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | int]:
    """Return which rows are valid, both in float32 or more with 0 for padding, and the divisor."""
    M = targets.shape[1]
    rows = _valid_rows(num_masked, M)
    t, c = (_zero_padding(rows, _at_least_fp32(x)) for x in (targets, predictions))
    return rows, t, c, _num_valid(num_masked, M, t.dtype)


def _info_nce_torch(
    targets: Tensor, predictions: Tensor, over_targets: bool, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    B, M, _ = targets.shape
    rows, t, c, count = _prepared(targets, predictions, num_masked)
    if M == 0:
        return t.new_zeros(B), t.new_zeros(B), torch.zeros_like(predictions)
    scores, axis = t @ c.transpose(1, 2), 1 if over_targets else 2  # [B, i, j]
    if rows is None:
        log_p = scores.log_softmax(axis)
    else:  # filled twice: the softmax of a padding row is NaN
        padding = ~(rows[:, :, None] & rows[:, None, :])
        log_p = scores.masked_fill_(padding, -torch.inf).log_softmax(axis)
        log_p.masked_fill_(padding, -torch.inf)
    del scores
    nce = -_zero_padding(rows, log_p.diagonal(dim1=1, dim2=2)).sum(1) / count
    # Over the targets, the normaliser of column j is the same for all i: the argmax is that of S.
    hit = _zero_padding(rows, log_p.argmax(1) == torch.arange(M, device=t.device))
    p = log_p.exp_()
    p.diagonal(dim1=1, dim2=2).sub_(1 if rows is None else rows.to(p.dtype))
    gradient = torch.bmm(p.transpose(1, 2), t)
    gradient /= count if isinstance(count, int) else count[:, None, None]
    return nce, hit.sum(1).to(t.dtype) / count, gradient.to(predictions.dtype)


def _info_nce_plain(
    targets: Tensor, predictions: Tensor, over_targets: bool, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    B, M, _ = targets.shape
    rows, t, c, count = _prepared(targets, predictions, num_masked)
    if M == 0:
        return c.sum((1, 2)), t.new_zeros(B), torch.zeros_like(predictions)
    scores, axis = t @ c.transpose(1, 2), 1 if over_targets else 2  # [B, i, j]
    if rows is not None:  # finite, as the softmax of a padding row has a derivative
        padding = ~(rows[:, :, None] & rows[:, None, :])
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min / 2)
    log_p = scores.log_softmax(axis)
    nce = -_zero_padding(rows, log_p.diagonal(dim1=1, dim2=2)).sum(1) / count
    best = log_p if rows is None else log_p.masked_fill(padding, -torch.inf)
    hit = _zero_padding(rows, best.argmax(1) == torch.arange(M, device=t.device))
    error = log_p.exp() - torch.eye(M, dtype=t.dtype, device=t.device)
    gradient = _zero_padding(rows, torch.bmm(error.transpose(1, 2), t))
    gradient = gradient / (count[:, None, None] if isinstance(count, Tensor) else count)
    return nce, hit.sum(1).to(t.dtype) / count, gradient.to(predictions.dtype)


def _info_nce_fake(
    targets: Tensor, predictions: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss, _ = _mse_fake(targets, predictions)
    return loss, torch.empty_like(loss), predictions.new_empty(predictions.shape)


_info_nce = custom_op(
    "info_nce",
    _info_nce_torch,
    cuda=on_first_call("mspm_loss_kernels", "info_nce_on_cuda"),
    fake=_info_nce_fake,
    autocast="float32",
    plain=_info_nce_plain,
    formula_for=("predictions",),
)


def mse_gradient_dtype(predictions: Tensor) -> torch.dtype:
    """Return the dtype in which the gradient of the MSE is kept for the backward pass."""
    # Divided by as many values as a clip has, it would underflow before a loss scale counts.
    return torch.float32 if predictions.dtype == torch.float16 else predictions.dtype


def _mse_torch(
    targets: Tensor, predictions: Tensor, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _, M, P = targets.shape
    error = _at_least_fp32(predictions) - _at_least_fp32(targets)
    error = _zero_padding(_valid_rows(num_masked, M), error)
    size = _num_valid(num_masked, M, error.dtype) * max(P, 1)
    mse = error.flatten(1).square().sum(1) / size
    error *= 2 / (size if isinstance(size, int) else size[:, None, None])
    return mse, error.to(mse_gradient_dtype(predictions)).contiguous()


def _mse_plain(
    targets: Tensor, predictions: Tensor, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    error = _at_least_fp32(predictions) - _at_least_fp32(targets)
    error = _zero_padding(_valid_rows(num_masked, targets.shape[1]), error)
    size = _mse_size(targets, num_masked, error.dtype)
    gradient = (error * (2 / size)).to(mse_gradient_dtype(predictions))
    return error.square().sum((1, 2)) / size[:, 0, 0], gradient


def _mse_size(x: Tensor, num_masked: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return how many values of each clip are averaged, at least 1, [B, 1, 1] or [1, 1, 1]."""
    size = torch.as_tensor(_num_valid(num_masked, x.shape[1], dtype), dtype=dtype, device=x.device)
    return (size * max(x.shape[2], 1)).view(-1, 1, 1)


def _mse_fake(targets: Tensor, predictions: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(targets.dtype, torch.float32)
    gradient = predictions.new_empty(predictions.shape, dtype=mse_gradient_dtype(predictions))
    return targets.new_empty(len(targets), dtype=dtype), gradient


_mse = custom_op(
    "mse",
    _mse_torch,
    cuda=on_first_call("mspm_loss_kernels", "mse_on_cuda"),
    fake=_mse_fake,
    autocast="float32",
    plain=_mse_plain,
    formula_for=("predictions",),
)


def _scaled(gradient: Tensor, upstream: Tensor | None) -> Tensor | None:
    return None if upstream is None else gradient * upstream.to(gradient.dtype)[:, None, None]


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return x if y is None else y if x is None else x + y


def _save_info_nce(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.over_targets, num_masked = inputs
    ctx.save_for_backward(*tensors, num_masked, output[2])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made for what has no gradient


def _info_nce_backward(ctx: Any, dnce: Tensor | None, _: None, more: Tensor | None) -> Any:
    targets, predictions, num_masked, gradient = ctx.saved_tensors
    second = None
    if more is not None:  # of a second derivative
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            again = _info_nce_plain(targets, predictions, ctx.over_targets, num_masked)[2]
        (second,) = torch.autograd.grad(again, predictions, more, create_graph=create_graph)
    return None, _add(_scaled(gradient, dnce), second), None, None


def _save_mse(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(output[1], inputs[2])
    ctx.set_materialize_grads(False)


def _mse_backward(ctx: Any, dmse: Tensor | None, more: Tensor | None) -> Any:
    gradient, num_masked = ctx.saved_tensors
    second = None
    if more is not None:
        more = _zero_padding(_valid_rows(num_masked, more.shape[1]), more)
        second = (more * (2 / _mse_size(more, num_masked, torch.float64))).to(more.dtype)
    total = _add(_scaled(gradient, dmse), second)
    return None, None if total is None else total.to(ctx.dtype), None


_info_nce.register_autograd(_info_nce_backward, setup_context=_save_info_nce)
_mse.register_autograd(_mse_backward, setup_context=_save_mse)


def info_nce(
    targets: Tensor,
    predictions: Tensor,
    softmax_axis: SoftmaxAxis = "official",
    num_masked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE over the masked patches of each clip, and its (pretext) accuracy.

    Autocast: float32, for inputs and results.

    Args:
        targets: [B, M, P], the normalised masked patches.
        predictions: [B, M, P].
        softmax_axis: Axis of the softmax, see the module.
        num_masked: [B] int64, from 0 to M: only the first ``num_masked[b]`` rows of clip b are
            valid, the others may hold anything. All are valid if None.

    Returns:
        The loss (nats) and the accuracy of each clip, [B], float32 (float64 for float64 input); 0
        where no row is valid.

    Raises:
        ValueError: The axis is unknown, or the shapes do not match.
    """
    if softmax_axis not in _AXES:
        raise ValueError(
            f"info_nce: softmax_axis must be {' or '.join(_AXES)}, got {softmax_axis!r}"
        )
    _check(targets, predictions, num_masked, "info_nce")
    nce, accuracy, _ = _info_nce(targets, predictions, softmax_axis == "paper", num_masked)
    return nce, accuracy


def mse(targets: Tensor, predictions: Tensor, num_masked: Tensor | None = None) -> Tensor:
    """Compute the mean squared error over the masked patches of each clip.

    Autocast: float32, for inputs and result.

    Args:
        targets: [B, M, P], the normalised masked patches.
        predictions: [B, M, P].
        num_masked: [B] int64, as for :func:`info_nce`.

    Returns:
        [B], float32 (float64 for float64 input); 0 where no row is valid.

    Raises:
        ValueError: The shapes do not match.
    """
    _check(targets, predictions, num_masked, "mse")
    return _mse(targets, predictions, num_masked)[0]


def _check(targets: Tensor, predictions: Tensor, num_masked: Tensor | None, name: str) -> None:
    if targets.shape != predictions.shape or targets.ndim != 3:
        raise ValueError(
            f"{name}: targets and predictions must both be [B, M, P], "
            f"got {list(targets.shape)} and {list(predictions.shape)}"
        )
    if num_masked is not None and num_masked.shape != targets.shape[:1]:
        raise ValueError(
            f"{name}: num_masked must be [B], [{len(targets)}], got {list(num_masked.shape)}"
        )
