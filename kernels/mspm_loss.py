"""The losses of masked spectrogram patch modelling, with their gradients from the forward pass.

Within one clip, over its M masked patches with targets t, contrastive predictions c and
reconstructions r (SSAST, equations 1 and 2):

    S_ij     = t_i . c_j
    InfoNCE  = -1/M sum_i log softmax_j(S)_ii      softmax_axis "official", the published code
             = -1/M sum_j log softmax_i(S)_jj      softmax_axis "paper", equation 1
    accuracy = 1/M #{j : argmax_i softmax(S)_ij = j}
    MSE      = 1/(M P) sum_i |r_i - t_i|^2

Both losses are linear in what comes from above, so the forward pass already has the gradients:
d InfoNCE / d c_j = 1/M sum_i (softmax(S)_ij - delta_ij) t_i. S and the softmax are not kept.
"""

from typing import Literal

import torch
from torch import Tensor

SoftmaxAxis = Literal["official", "paper"]


def info_nce_reference(
    targets: Tensor, predictions: Tensor, softmax_axis: SoftmaxAxis
) -> tuple[Tensor, Tensor]:
    """The definition of InfoNCE and its accuracy, both [B]; differentiable."""
    scores = torch.einsum("bip,bjp->bij", targets, predictions)
    log_p = scores.log_softmax(2 if softmax_axis == "official" else 1)
    # The published code takes the argmax down the columns, whichever way the softmax went.
    best = (log_p if softmax_axis == "official" else scores).argmax(1)
    hit = best == torch.arange(scores.shape[1], device=scores.device)
    nce = -log_p.diagonal(dim1=1, dim2=2).mean(1)
    return nce, hit.to(scores.dtype).mean(1)


def mse_reference(targets: Tensor, predictions: Tensor) -> Tensor:
    """The definition of the reconstruction loss, [B]; differentiable."""
    return (predictions - targets).square().mean((1, 2))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@torch.library.custom_op("ssast::info_nce", mutates_args=())
def _info_nce(
    targets: Tensor, predictions: Tensor, over_targets: bool
) -> tuple[Tensor, Tensor, Tensor]:
    M = targets.shape[1]
    t, c = _at_least_fp32(targets), _at_least_fp32(predictions)
    log_p = t @ c.transpose(1, 2)  # [B, i, j]; one buffer becomes scores, log p, p and p - delta
    log_p -= log_p.logsumexp(1 if over_targets else 2, keepdim=True)
    nce = -log_p.diagonal(dim1=1, dim2=2).mean(1)
    # Over the targets, the normaliser of column j is the same for all i: the argmax is that of S.
    hit = log_p.argmax(1) == torch.arange(M, device=t.device)
    p = log_p.exp_()
    p.diagonal(dim1=1, dim2=2).sub_(1)
    gradient = torch.bmm(p.transpose(1, 2), t).div_(M)
    return nce, hit.to(t.dtype).mean(1), gradient.to(predictions.dtype)


@_info_nce.register_fake
def _(targets: Tensor, predictions: Tensor, over_targets: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(targets.dtype, torch.float32)
    per_clip = targets.new_empty(len(targets), dtype=dtype)
    return per_clip, torch.empty_like(per_clip), torch.empty_like(predictions)


@torch.library.custom_op("ssast::mse", mutates_args=())
def _mse(targets: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    error = _at_least_fp32(predictions) - _at_least_fp32(targets)
    mse = error.flatten(1).square().mean(1)
    return mse, error.mul_(2 / error[0].numel()).to(predictions.dtype)


@_mse.register_fake
def _(targets: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(targets.dtype, torch.float32)
    return targets.new_empty(len(targets), dtype=dtype), torch.empty_like(predictions)


def _save_gradient(ctx, inputs, output) -> None:
    *values, gradient = output
    ctx.save_for_backward(gradient)
    ctx.mark_non_differentiable(*values[1:], gradient)


def _scale_gradient(ctx, upstream: Tensor) -> Tensor:
    (gradient,) = ctx.saved_tensors
    return gradient * upstream.to(gradient.dtype)[:, None, None]


_info_nce.register_autograd(
    lambda ctx, dnce, _a, _g: (None, _scale_gradient(ctx, dnce), None), setup_context=_save_gradient
)
_mse.register_autograd(
    lambda ctx, dmse, _g: (None, _scale_gradient(ctx, dmse)), setup_context=_save_gradient
)


def info_nce(
    targets: Tensor, predictions: Tensor, softmax_axis: SoftmaxAxis = "official"
) -> tuple[Tensor, Tensor]:
    """InfoNCE over the masked patches of each clip, and how often a patch is told from the others.

    Args:
        targets: [B, M, P], the normalised masked patches; no gradient flows to them.
        predictions: [B, M, P].
        softmax_axis: See the module.

    Returns:
        The loss (nats) and the accuracy of each clip, [B], float32 (float64 for float64 input).

    Raises:
        ValueError: The shapes differ.
    """
    _check(targets, predictions, "info_nce")
    nce, accuracy, _ = _info_nce(targets, predictions, softmax_axis == "paper")
    return nce, accuracy


def mse(targets: Tensor, predictions: Tensor) -> Tensor:
    """Mean squared error over the masked patches of each clip.

    Args:
        targets: [B, M, P], the normalised masked patches; no gradient flows to them.
        predictions: [B, M, P].

    Returns:
        [B], float32 (float64 for float64 input).

    Raises:
        ValueError: The shapes differ.
    """
    _check(targets, predictions, "mse")
    return _mse(targets, predictions)[0]


def _check(targets: Tensor, predictions: Tensor, name: str) -> None:
    if targets.shape != predictions.shape or targets.ndim != 3:
        raise ValueError(
            f"{name}: targets and predictions must both be [B, M, P], "
            f"got {list(targets.shape)} and {list(predictions.shape)}"
        )
