"""Attention on a CPU by batched matmuls, a few heads at a time.

    P = softmax(q k^T / sqrt(D_h));  out = P v
    dv = P^T g;  dS = P * (g v^T - rowsum(P * g v^T)) / sqrt(D_h);  dq = dS k;  dk = dS^T q

PyTorch's own CPU kernel works on tiles of a head, with matmuls by MKL. Where oneDNN's are far
faster, whole heads are better: their scores stay in the cache from the first matmul to the last.
The backward pass reads P, where it is small, and else computes it again, with the same bits:
reading it takes a fifth of the time. Scores and softmax are float32 at least.
"""

from typing import Any

import torch
from torch import Tensor

from ssast.kernels.operation import custom_op

BLOCK = 1 << 20  # scores at a time, 4 MiB
KEPT = 1 << 23  # at most so many probabilities are kept for the backward pass, 32 MiB in float32


def attention_reference(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute attention by its formula: the reference.

    Args:
        q: [B, L, H, D_h].
        k: [B, L', H, D_h].
        v: [B, L', H, D_h].
        valid: [B, L'] bool, False for padding.

    Returns:
        [B, L, H, D_h].
    """
    if valid is not None:
        v = v.masked_fill(~valid[..., None, None], 0)
    return torch.einsum("bhlm,bmhd->blhd", _softmax(q, k, valid), v)


def _softmax(q: Tensor, k: Tensor, valid: Tensor | None) -> Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
    return scores.softmax(-1)


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)  # [B * H, L, D_h], contiguous


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    B, L, H, width = like.shape
    return x.view(B, H, L, width).transpose(1, 2)


def _gradients(buffer: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """View a buffer as dq, dk and dv, side by side for the layer that q, k and v come from."""
    if q.shape == k.shape:
        return buffer.view(*q.shape[:2], 3, *q.shape[2:]).unbind(2)
    dq, rest = buffer[: q.numel()], buffer[q.numel() :]
    return dq.view(q.shape), *rest.view(*k.shape[:2], 2, *k.shape[2:]).unbind(2)


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    """Split the first axis of q [B * H, L, D_h] so that a block's scores fit into the cache."""
    rows = max(1, BLOCK // max(1, q.shape[1] * k.shape[1]))
    return [slice(i, min(i + rows, len(q))) for i in range(0, len(q), rows)]


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _buffer(q: Tensor, k: Tensor, blocks: list[slice], dtype: torch.dtype) -> Tensor:
    rows = blocks[0].stop if blocks else 0
    return q.new_empty(rows, q.shape[1], k.shape[1], dtype=dtype)


def _probabilities(q: Tensor, k: Tensor, padding: Tensor | None, out: Tensor) -> Tensor:
    """Compute P of some heads in place of ``out``, and return it in the dtype of q."""
    scale = q.shape[2] ** -0.5
    left, right = q.to(out.dtype), k.to(out.dtype).transpose(1, 2)
    torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)
    if padding is not None:
        out.masked_fill_(padding[:, None], float("-inf"))
    return torch.softmax(out, 2, out=out).to(q.dtype)


def _padding(valid: Tensor | None, heads: int) -> Tensor | None:
    return None if valid is None else ~valid.repeat_interleave(heads, 0)  # [B * H, L']


def _rows(padding: Tensor | None, block: slice) -> Tensor | None:
    return None if padding is None else padding[block]


def _attention_torch(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    like, padding = q, _padding(valid, q.shape[2])
    q, k, v = map(_by_head, (q, k, v))
    blocks, out = _blocks(q, k), torch.empty_like(q)
    kept = q.new_empty(len(q), q.shape[1], k.shape[1]) if keep else q.new_empty(0)
    in_place = keep and q.dtype == _precise(q)
    scores = kept if in_place else _buffer(q, k, blocks, _precise(q))
    for b in blocks:
        block = scores[b] if in_place else scores[: b.stop - b.start]
        P = _probabilities(q[b], k[b], _rows(padding, b), block)
        if keep and not in_place:
            kept[b] = P
        torch.bmm(P, v[b], out=out[b])
    return _by_token(out, like).contiguous(), kept


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B * H, L, k.shape[1]) if keep else 0)


def _attention_plain(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    return attention_reference(q, k, v, valid), q.new_empty(0)


_attention = custom_op(
    "blocked_attention",
    _attention_torch,
    fake=_attention_fake,
    autocast="lower_precision",
    plain=_attention_plain,
    formula_for=("q", "k", "v"),
)


def _attention_backward_torch(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, kept: Tensor
) -> Tensor:
    scale, padding = q.shape[3] ** -0.5, _padding(valid, q.shape[2])
    queries, keys = q, k
    grad, q, k, v = map(_by_head, (grad, q, k, v))
    blocks = _blocks(q, k)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dscores = _buffer(q, k, blocks, q.dtype)
    scores = None if kept.numel() else _buffer(q, k, blocks, _precise(q))
    for b in blocks:
        n = b.stop - b.start
        P = kept[b] if scores is None else _probabilities(q[b], k[b], _rows(padding, b), scores[:n])
        torch.bmm(P.transpose(1, 2), grad[b], out=dv[b])
        dS = torch.bmm(grad[b], v[b].transpose(1, 2), out=dscores[:n])
        torch._softmax_backward_data(dS, P, 2, q.dtype, grad_input=dS)
        torch.baddbmm(dq[b], dS, k[b], beta=0, alpha=scale, out=dq[b])
        torch.baddbmm(dk[b], dS.transpose(1, 2), q[b], beta=0, alpha=scale, out=dk[b])
    buffer = queries.new_empty(queries.numel() + 2 * keys.numel())
    for target, source in zip(_gradients(buffer, queries, keys), (dq, dk, dv), strict=True):
        target.copy_(_by_token(source, target))
    return buffer


def _attention_backward_plain(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, kept: Tensor
) -> Tensor:
    P = _softmax(q, k, valid)
    dP = torch.einsum("blhd,bmhd->bhlm", grad, v)
    dS = P * (dP - (P * dP).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dq, dk = torch.einsum("bhlm,bmhd->blhd", dS, k), torch.einsum("bhlm,blhd->bmhd", dS, q)
    dv = torch.einsum("bhlm,blhd->bmhd", P, grad)
    if q.shape == k.shape:
        return torch.stack((dq, dk, dv), 2).flatten()
    return torch.cat((dq.flatten(), torch.stack((dk, dv), 2).flatten()))


def _attention_backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.numel() + 2 * k.numel())


_attention_backward = custom_op(
    "blocked_attention_backward",
    _attention_backward_torch,
    fake=_attention_backward_fake,
    autocast="none",
    plain=_attention_backward_plain,
)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made in the shape of P


def _backward(ctx, grad: Tensor | None, _: None):
    if grad is None:
        return (None,) * 5
    saved = ctx.saved_tensors  # once: activation checkpointing computes them again for each time
    gradients = _gradients(_attention_backward(grad, *saved), saved[0], saved[1])
    return *gradients, None, None


_attention.register_autograd(_backward, setup_context=_save)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute softmax attention of every query to every valid key.

    The probabilities are kept for the backward pass where they are at most :data:`KEPT`.

    Args:
        q: [B, L, H, D_h] on a CPU.
        k: [B, L', H, D_h].
        v: [B, L', H, D_h].
        valid: [B, L'] bool, False for padding, where k and v must be finite.

    Returns:
        [B, L, H, D_h].
    """
    return _attention(q, k, v, valid, is_kept(q, k, v))[0]


def is_kept(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether there will be a backward pass, and P is kept for it."""
    B, L, H, _ = q.shape
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return trained and keeps_probabilities(B, H, L, k.shape[1])


def keeps_probabilities(B: int, H: int, queries: int, keys: int) -> bool:
    """Return whether a forward pass in training keeps P [B * H, queries, keys]."""
    return B * H * queries * keys <= KEPT
