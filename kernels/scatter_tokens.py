"""Scatter the visible tokens of each clip among the masked tokens that all clips share.

    out[b, e]     = visible[b, e]                e < E, the prefix tokens (cls and dist)
    out[b, E + n] = visible[b, E + rank of n]    patch n visible in clip b
                  = shared[n]                    patch n masked in clip b

A masked token depends on the mask embedding and its position alone, so it is the same in every clip
and need be computed once per position: the first block's LayerNorm and projections of 400 of 514
tokens.
"""

import torch
from torch import Tensor

from ssast.kernels.masking import Masks
from ssast.kernels.operation import custom_op
from ssast.kernels.patch_embed import take


def scatter_tokens_reference(visible: Tensor, shared: Tensor, masks: Masks) -> Tensor:
    """Compute :func:`scatter_tokens` in plain, differentiable torch: the reference."""
    num_prefix = visible.shape[1] - masks.visible_ids.shape[1]
    out = torch.cat((visible[:, :num_prefix], shared.expand(len(visible), -1, -1)), 1)
    ids = (num_prefix + masks.visible_ids)[..., None].expand(-1, -1, visible.shape[2])
    return out.scatter(1, ids, visible[:, num_prefix:])


def _scatter_tokens_torch(
    visible: Tensor, shared: Tensor, mask_ids: Tensor, visible_ids: Tensor
) -> Tensor:
    (B, rows, D), N = visible.shape, len(shared)
    num_prefix = rows - visible_ids.shape[1]
    out = visible.new_empty(B, num_prefix + N, D)
    out[:, :num_prefix] = visible[:, :num_prefix]
    patches = out[:, num_prefix:]
    patches.copy_(shared.expand(B, -1, -1))
    patches.scatter_(1, visible_ids[..., None].expand(-1, -1, D), visible[:, num_prefix:])
    return out


def _scatter_tokens_fake(
    visible: Tensor, shared: Tensor, mask_ids: Tensor, visible_ids: Tensor
) -> Tensor:
    num_prefix = visible.shape[1] - visible_ids.shape[1]
    return visible.new_empty(len(visible), num_prefix + len(shared), visible.shape[2])


def _scatter_tokens_plain(
    visible: Tensor, shared: Tensor, mask_ids: Tensor, visible_ids: Tensor
) -> Tensor:
    return scatter_tokens_reference(visible, shared, Masks(mask_ids, visible_ids))


_scatter_tokens = custom_op(
    "scatter_tokens",
    _scatter_tokens_torch,
    fake=_scatter_tokens_fake,
    autocast="promote",
    plain=_scatter_tokens_plain,
    formula_for=("visible", "shared"),
)


def _scatter_tokens_backward_torch(
    grad: Tensor, mask_ids: Tensor, visible_ids: Tensor
) -> tuple[Tensor, Tensor]:
    N = mask_ids.shape[1] + visible_ids.shape[1]
    num_prefix = grad.shape[1] - N
    patches = grad[:, num_prefix:]
    visible = torch.cat((grad[:, :num_prefix], take(patches, visible_ids)), 1)
    masked = grad.new_zeros(len(grad), N).scatter(1, mask_ids, 1.0)
    # A matmul of [1, B] and [B, D] per patch: reads the gradient once, in a fixed order.
    shared = torch.bmm(masked.T[:, None], patches.transpose(0, 1))[:, 0]
    return visible, shared


def _scatter_tokens_backward_fake(
    grad: Tensor, mask_ids: Tensor, visible_ids: Tensor
) -> tuple[Tensor, Tensor]:
    N, D = mask_ids.shape[1] + visible_ids.shape[1], grad.shape[2]
    rows = grad.shape[1] - mask_ids.shape[1]
    return grad.new_empty(len(grad), rows, D), grad.new_empty(N, D)


_scatter_tokens_backward = custom_op(
    "scatter_tokens_backward",
    _scatter_tokens_backward_torch,
    fake=_scatter_tokens_backward_fake,
    autocast="none",
)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx, grad: Tensor):
    return *_scatter_tokens_backward(grad, *ctx.saved_tensors), None, None


_scatter_tokens.register_autograd(_backward, setup_context=_save)


def visible_token_ids(masks: Masks, num_prefix: int) -> Tensor:
    """Return the positions of the prefix tokens and the visible patches, [B, E + V]."""
    first = torch.arange(num_prefix, device=masks.visible_ids.device)
    return torch.cat((first.expand(len(masks.visible_ids), -1), num_prefix + masks.visible_ids), 1)


def scatter_tokens(visible: Tensor, shared: Tensor, masks: Masks) -> Tensor:
    """Build the whole sequence of each clip from its visible tokens and the shared ones.

    Autocast: the wider dtype of both inputs.

    Args:
        visible: [B, E + V, D], prefix tokens and visible patches of each clip.
        shared: [N, D], token of each patch where it is masked.
        masks: Which of the N patches are masked.

    Returns:
        [B, E + N, D].

    Raises:
        ValueError: The shapes do not match.
    """
    B, V = masks.visible_ids.shape
    N = masks.mask_ids.shape[1] + V
    if len(visible) != B or visible.shape[1] < V or shared.shape != (N, visible.shape[2]):
        raise ValueError(
            f"scatter_tokens: masks of {B} clips with {V} of {N} patches visible do not match "
            f"{list(visible.shape)} and {list(shared.shape)}"
        )
    return _scatter_tokens(visible, shared, masks.mask_ids, masks.visible_ids)
