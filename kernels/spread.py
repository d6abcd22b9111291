"""Rows that all clips share, and rows of their own, put together to one batch of tokens.

    out[b, e]     = own[b, e]                e < E, the extra tokens
    out[b, E + n] = own[b, E + rank of n]    patch n visible in clip b
                  = shared[n]                patch n masked in clip b

What depends on the mask embedding and the position alone is the same in every clip, so it need be
computed once per position: the first block's LayerNorm and projections of 400 of 514 tokens.
"""

import torch
from torch import Tensor

from ssast.kernels.masking import Masks
from ssast.kernels.operation import custom_op
from ssast.kernels.patch_embed import take


def spread_reference(own: Tensor, shared: Tensor, masks: Masks) -> Tensor:
    """The definition; differentiable."""
    extra = own.shape[1] - masks.visible_ids.shape[1]
    out = torch.cat((own[:, :extra], shared.expand(len(own), -1, -1)), 1)
    ids = (extra + masks.visible_ids)[..., None].expand(-1, -1, own.shape[2])
    return out.scatter(1, ids, own[:, extra:])


def _spread_torch(own: Tensor, shared: Tensor, mask_ids: Tensor, visible_ids: Tensor) -> Tensor:
    (B, rows, D), N = own.shape, len(shared)
    extra = rows - visible_ids.shape[1]
    out = own.new_empty(B, extra + N, D)
    out[:, :extra] = own[:, :extra]
    patches = out[:, extra:]
    patches.copy_(shared.expand(B, -1, -1))
    patches.scatter_(1, visible_ids[..., None].expand(-1, -1, D), own[:, extra:])
    return out


def _spread_fake(own: Tensor, shared: Tensor, mask_ids: Tensor, visible_ids: Tensor) -> Tensor:
    extra = own.shape[1] - visible_ids.shape[1]
    return own.new_empty(len(own), extra + len(shared), own.shape[2])


_spread = custom_op("spread", _spread_torch, fake=_spread_fake)


def _spread_backward_torch(
    grad: Tensor, mask_ids: Tensor, visible_ids: Tensor
) -> tuple[Tensor, Tensor]:
    N = mask_ids.shape[1] + visible_ids.shape[1]
    extra = grad.shape[1] - N
    patches = grad[:, extra:]
    own = torch.cat((grad[:, :extra], take(patches, visible_ids)), 1)
    masked = grad.new_zeros(len(grad), N).scatter_(1, mask_ids, 1.0)
    # A product of [1, B] and [B, D] per patch: reads the gradient once, in a fixed order.
    shared = torch.bmm(masked.T[:, None], patches.transpose(0, 1))[:, 0]
    return own, shared


def _spread_backward_fake(
    grad: Tensor, mask_ids: Tensor, visible_ids: Tensor
) -> tuple[Tensor, Tensor]:
    N, D = mask_ids.shape[1] + visible_ids.shape[1], grad.shape[2]
    rows = grad.shape[1] - mask_ids.shape[1]
    return grad.new_empty(len(grad), rows, D), grad.new_empty(N, D)


_spread_backward = custom_op("spread_backward", _spread_backward_torch, fake=_spread_backward_fake)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx, grad: Tensor):
    return *_spread_backward(grad, *ctx.saved_tensors), None, None


_spread.register_autograd(_backward, setup_context=_save)


def own_ids(masks: Masks, extra: int) -> Tensor:
    """Places of the extra tokens and the visible patches among all tokens, [B, E + V]."""
    first = torch.arange(extra, device=masks.visible_ids.device)
    return torch.cat((first.expand(len(masks.visible_ids), -1), extra + masks.visible_ids), 1)


def spread(own: Tensor, shared: Tensor, masks: Masks) -> Tensor:
    """Put the clips' own rows and the shared ones in their places.

    Args:
        own: [B, E + V, D], the extra tokens and the visible patches of each clip.
        shared: [N, D], what stands at a masked patch, by position.
        masks: Which of the N patches are hidden.

    Returns:
        [B, E + N, D].

    Raises:
        ValueError: Shapes that do not belong together.
    """
    B, V = masks.visible_ids.shape
    N = masks.mask_ids.shape[1] + V
    if len(own) != B or own.shape[1] < V or shared.shape != (N, own.shape[2]):
        raise ValueError(
            f"spread: masks of {B} clips with {V} of {N} patches visible do not belong to "
            f"{list(own.shape)} and {list(shared.shape)}"
        )
    return _spread(own, shared, masks.mask_ids, masks.visible_ids)
