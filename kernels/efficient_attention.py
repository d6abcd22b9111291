"""PyTorch's memory-efficient attention, with the three gradients side by side in memory.

    P = softmax(q k^T / sqrt(D_h));  out = P v
    dv = P^T g;  dS = P * (g v^T - rowsum(P * g v^T)) / sqrt(D_h);  dq = dS k;  dk = dS^T q

The linear layer that q, k and v come from reads dq, dk and dv as one matrix. PyTorch's attention
returns three, which are copied together first. The kernel of this backend (Rabe and Staats 2021;
Lefaudeux et al. 2022) can write them into one tensor [B, L, 3, H, D_h]; those of flash and cuDNN
cannot, as PyTorch calls them.
"""

from typing import Any

import torch
from torch import Tensor

from ssast.kernels.operation import custom_op

_aten = torch.ops.aten
_NO_MASK = 0
_LSE_ALIGNMENT = 32  # of the logsumexp's length


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return q k^T / sqrt(D_h), [B, H, L, L], float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("blhd,bmhd->bhlm", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5


def _attention_torch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k)
    out = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v.to(scores.dtype))
    return out.to(q.dtype).contiguous(), scores.logsumexp(-1)


def _attention_cuda(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = _aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0, _NO_MASK, True
    )
    return out, logsumexp


def _attention_fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    length = L if q.device.type == "cpu" else -(-L // _LSE_ALIGNMENT) * _LSE_ALIGNMENT
    return q.new_empty(q.shape), q.new_empty(B, H, length, dtype=dtype)


_attention = custom_op(
    "efficient_attention",
    _attention_torch,
    cuda=_attention_cuda,
    fake=_attention_fake,
    autocast="lower_precision",
    formula_for=("q", "k", "v"),
)


def _attention_backward_torch(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> Tensor:
    # Of q, k and v alone: a second derivative is one of nothing else.
    P = _scores(q, k).softmax(-1)
    grad, queries, keys, values = (x.to(P.dtype) for x in (grad, q, k, v))
    dP = torch.einsum("blhd,bmhd->bhlm", grad, values)
    dS = P * (dP - (P * dP).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dq = torch.einsum("bhlm,bmhd->blhd", dS, keys)
    dk = torch.einsum("bhlm,blhd->bmhd", dS, queries)
    dv = torch.einsum("bhlm,blhd->bmhd", P, grad)
    return torch.stack((dq, dk, dv), 2).to(q.dtype)


def _attention_backward_cuda(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> Tensor:
    L = q.shape[1]
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout: there is none
    dq, *_ = _aten._efficient_attention_backward(
        grad, q, k, v, None, out, None, None, L, L, logsumexp, 0.0, unused, unused, _NO_MASK, False,
        shared_storage_dqdkdv=True,
    )  # fmt: skip
    return dq.as_strided(*_side_by_side(q), 0)


def _side_by_side(q: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and strides of three tensors like q as one [B, L, 3, H, D_h]."""
    B, L, H, width = q.shape
    row = 3 * H * width
    return (B, L, 3, H, width), (L * row, row, H * width, width, 1)


def _attention_backward_fake(grad: Tensor, q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(_side_by_side(q)[0])


_attention_backward = custom_op(
    "efficient_attention_backward",
    _attention_backward_torch,
    cuda=_attention_backward_cuda,
    fake=_attention_backward_fake,
    autocast="none",
)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, _: None):
    if grad is None:
        return None, None, None
    return _attention_backward(grad, *ctx.saved_tensors).unbind(2)


_attention.register_autograd(_backward, setup_context=_save)


def efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax attention of every query to every key.

    On a CPU it is the plain formula: its scores are all there at a time.

    Args:
        q: [B, L, H, D_h].
        k: [B, L, H, D_h].
        v: [B, L, H, D_h].

    Returns:
        [B, L, H, D_h].
    """
    return _attention(q, k, v)[0]
