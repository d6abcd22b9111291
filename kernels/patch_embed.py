"""Patch embedding: normalise a filterbank, cut it into patches, project the visible ones.

    x       = (fbank - mean) / (2 std)                                    SSAST, published code
    token_n = W patch_n + b     (visible)   or   mask_embed   (masked)    + pos_embed_n
    tokens  = [cls + pos, dist + pos, token_0, ..., token_{N-1}]
    targets = the normalised masked patches

Masked patches cost no arithmetic: with 400 of 512 masked, the projection works on 22 % of the
rows. Patches lie on a grid of F_p rows (frequency) and T_p columns (time), numbered row by row; a
patch is flattened row by row over (mel bin, frame), as a convolution's kernel is.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ssast.kernels.masking import Masks
from ssast.kernels.operation import custom_op, on_first_call


def patch_grid(
    n_mels: int, num_frames: int, patch: Sequence[int], stride: Sequence[int]
) -> tuple[int, int]:
    """Return the rows and columns of whole patches that fit into a spectrogram."""
    return (n_mels - patch[0]) // stride[0] + 1, (num_frames - patch[1]) // stride[1] + 1


def cut_patches(fbank: Tensor, patch: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Cut a filterbank [B, T, F] into flattened patches [B, N, P], P = patch[0] * patch[1]."""
    tiles = fbank.unfold(1, patch[1], stride[1]).unfold(2, patch[0], stride[0])
    return tiles.permute(0, 2, 1, 4, 3).flatten(3).flatten(1, 2)  # [B, T_p, F_p, t, f] before


def join_patches(patches: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Join non-overlapping patches [B, N, P] to a spectrogram [B, T, F]."""
    tiles = patches.unflatten(1, tuple(grid)).unflatten(3, tuple(patch))  # [B, F_p, T_p, f, t]
    return tiles.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)


def patch_embed_reference(
    fbank: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask_embed: Tensor,
    pos_embed: Tensor,
    prefix: Tensor,
    masks: Masks,
    *,
    mean: float,
    std: float,
    stride: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute :func:`patch_embed` as the published code does: the reference."""
    x = ((fbank - mean) / (2 * std)).to(weight.dtype)
    image = x.transpose(1, 2).unsqueeze(1)  # [B, 1, F, T]
    tokens = functional.conv2d(image, weight, bias, tuple(stride)).flatten(2).transpose(1, 2)
    masked = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=fbank.device)
    masked = masked.scatter(1, masks.mask_ids, True)
    tokens = torch.where(masked[..., None], mask_embed, tokens)
    tokens = torch.cat((prefix.expand(len(fbank), -1, -1), tokens), 1) + pos_embed
    patches = functional.unfold(image, weight.shape[2:], stride=tuple(stride)).transpose(1, 2)
    return tokens, take(patches, masks.mask_ids)


def take(rows: Tensor, ids: Tensor) -> Tensor:
    """Gather rows [B, K, D] of [B, N, D] at the ids [B, K]."""
    return rows.gather(1, ids[..., None].expand(-1, -1, rows.shape[2]))


def _normalised(
    fbank: Tensor, weight: Tensor, mean: float, std: float, stride: Sequence[int]
) -> Tensor:
    # Normalised in float32 at least, and only then rounded to the precision of the weights.
    patches = cut_patches(fbank, weight.shape[2:], stride)
    patches = patches.to(torch.promote_types(fbank.dtype, torch.float32))
    return patches.sub(mean).mul_(0.5 / std).to(weight.dtype)


def _patch_embed_torch(
    fbank: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask_embed: Tensor,
    pos_embed: Tensor,
    prefix: Tensor,
    mask_ids: Tensor,
    visible_ids: Tensor,
    mean: float,
    std: float,
    stride: Sequence[int],
) -> tuple[Tensor, Tensor]:
    D, num_prefix = weight.shape[0], prefix.shape[1]
    patches = _normalised(fbank, weight, mean, std, stride)
    visible = take(patches, visible_ids)  # [B, N - M, P]
    pos = pos_embed[0]
    rows = torch.addmm(bias, visible.flatten(0, 1), weight.flatten(1).T).view(*visible.shape[:2], D)
    rows += pos[num_prefix + visible_ids]
    tokens = torch.cat((prefix[0] + pos[:num_prefix], mask_embed + pos[num_prefix:]))
    tokens = tokens.expand(len(fbank), -1, -1).contiguous()
    tokens.scatter_(1, (num_prefix + visible_ids)[..., None].expand(-1, -1, D), rows)
    return tokens, take(patches, mask_ids)


def _patch_embed_fake(
    fbank: Tensor, weight: Tensor, bias: Tensor, mask_embed: Tensor, pos_embed: Tensor,
    prefix: Tensor, mask_ids: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, M = mask_ids.shape
    P = math.prod(weight.shape[1:])
    return weight.new_empty(B, *pos_embed.shape[1:]), weight.new_empty(B, M, P)


def _patch_embed_plain(
    fbank: Tensor, weight: Tensor, bias: Tensor, mask_embed: Tensor, pos_embed: Tensor,
    prefix: Tensor, mask_ids: Tensor, visible_ids: Tensor, mean: float, std: float,
    stride: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return patch_embed_reference(
        fbank, weight, bias, mask_embed, pos_embed, prefix, Masks(mask_ids, visible_ids),
        mean=mean, std=std, stride=stride,
    )  # fmt: skip


_patch_embed = custom_op(
    "patch_embed",
    _patch_embed_torch,
    cuda=on_first_call("patch_embed_kernels", "forward"),
    fake=_patch_embed_fake,
    autocast="lower_precision",
    keep=("fbank",),
    plain=_patch_embed_plain,
    formula_for=("weight", "bias", "mask_embed", "pos_embed", "prefix"),
)


def _patch_embed_backward_torch(
    grad: Tensor,
    fbank: Tensor,
    weight: Tensor,
    mask_ids: Tensor,
    visible_ids: Tensor,
    mean: float,
    std: float,
    stride: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_prefix = grad.shape[1] - mask_ids.shape[1] - visible_ids.shape[1]
    visible = take(_normalised(fbank, weight, mean, std, stride), visible_ids).flatten(0, 1)
    rows = take(grad, num_prefix + visible_ids).flatten(0, 1)
    dweight = (rows.T @ visible).view_as(weight)
    dmask_embed = take(grad, num_prefix + mask_ids).sum((0, 1))
    return dweight, rows.sum(0), dmask_embed, grad.sum(0, keepdim=True)


def _patch_embed_backward_fake(
    grad: Tensor, fbank: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new, D = grad.new_empty, grad.shape[2]
    return new(weight.shape), new(D), new(D), new(1, *grad.shape[1:])


_patch_embed_backward = custom_op(
    "patch_embed_backward",
    _patch_embed_backward_torch,
    cuda=on_first_call("patch_embed_kernels", "backward"),
    fake=_patch_embed_backward_fake,
    autocast="none",
)


def _save(ctx, inputs, output) -> None:
    fbank, weight, _, _, _, prefix, mask_ids, visible_ids, ctx.mean, ctx.std, ctx.stride = inputs
    ctx.num_prefix = prefix.shape[1]
    ctx.save_for_backward(fbank, weight, mask_ids, visible_ids)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made in the shape of the targets


def _backward(ctx, grad: Tensor | None, _: Tensor | None):
    if grad is None:
        return (None,) * 11
    dweight, dbias, dmask_embed, dpos = _patch_embed_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.mean, ctx.std, ctx.stride
    )
    # Cloned: two gradients may not share memory.
    dprefix = dpos[:, : ctx.num_prefix].clone()
    return None, dweight, dbias, dmask_embed, dpos, dprefix, *(None,) * 5


_patch_embed.register_autograd(_backward, setup_context=_save)


def patch_embed(
    fbank: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask_embed: Tensor,
    pos_embed: Tensor,
    prefix: Tensor,
    masks: Masks,
    *,
    mean: float,
    std: float,
    stride: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute the tokens of a batch of filterbanks, and the masked patches as targets.

    Autocast: its dtype, and so are tokens and targets; the filterbank is not cast, but normalised
    in float32 and then rounded, as always.

    Args:
        fbank: [B, T, F] log-mel before normalisation, float32 or the weights' dtype. Where it
            needs a gradient, tokens and targets give it one, and all patches are projected.
        weight: [D, 1, f, t], the patch projection as the weight of a convolution.
        bias: [D].
        mask_embed: [D], the learned token of a masked patch.
        pos_embed: [1, E + N, D], learned positions, those of the prefix tokens first.
        prefix: [1, E, D], the prefix tokens (cls and dist).
        masks: Which of the N patches are masked.
        mean: Mean of the data set's filterbanks.
        std: Standard deviation of the data set's filterbanks.
        stride: Mel bins and frames from one patch to the next.

    Returns:
        tokens [B, E + N, D] and targets [B, M, f * t], in the dtype of the weights.

    Raises:
        ValueError: The shapes do not match.
    """
    D, _, f, t = weight.shape
    B, T, F = fbank.shape
    rows, columns = patch_grid(F, T, (f, t), stride)
    num_patches = masks.mask_ids.shape[1] + masks.visible_ids.shape[1]
    if num_patches != rows * columns or len(masks.mask_ids) != B:
        raise ValueError(
            f"patch_embed: {f} x {t} patches of {B} x {F} mel bins x {T} frames make "
            f"{rows} x {columns}, but the masks are for {len(masks.mask_ids)} x {num_patches}"
        )
    if prefix.ndim != 3 or prefix.shape[0] != 1 or prefix.shape[2] != D:
        raise ValueError(f"patch_embed: prefix must be [1, E, {D}], got {list(prefix.shape)}")
    expected = {
        "bias": (D,),
        "mask_embed": (D,),
        "pos_embed": (1, prefix.shape[1] + num_patches, D),
    }
    given = {"bias": bias, "mask_embed": mask_embed, "pos_embed": pos_embed}
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(
                f"patch_embed: {name} must be {list(shape)}, got {list(given[name].shape)}"
            )
    return _patch_embed(
        fbank, weight, bias, mask_embed, pos_embed, prefix,
        masks.mask_ids, masks.visible_ids, mean, std, list(stride),
    )  # fmt: skip
