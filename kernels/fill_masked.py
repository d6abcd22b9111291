"""Fill the masked places of a grid of visible tokens with noise, as a decoder's input.

    out[r, n] = visible[r, rank of n]     patch n visible in row r
              = table[rows[r, n]]         patch n masked
              = 0                         patch n padding

The noise is a fixed table of K vectors, and which of them a masked patch gets is drawn by Philox
with the seed as key and the counter (block, clip, epoch, 2**31 + stream), of which masks take the
other half: draw n of a clip, times K, has the row of patch n as its high word. So no noise is
stored, and it is the same on every device.
"""

import torch
from torch import Tensor

from ssast.kernels.masking import Masks, philox, valid_patches
from ssast.kernels.operation import custom_op, on_first_call

NOISE_STREAM = 1 << 31


def _noise_rows_torch(
    clip_ids: Tensor, epochs: Tensor, streams: Tensor, seed: int, num_patches: int, table_rows: int
) -> Tensor:
    blocks = torch.arange(-(-num_patches // 4), device=clip_ids.device)
    counters = (clip_ids[:, None], epochs[:, None], streams[:, None] + NOISE_STREAM)
    return (philox(seed, blocks, *counters).flatten(1)[:, :num_patches] * table_rows) >> 32


def _noise_rows_fake(
    clip_ids: Tensor, epochs: Tensor, streams: Tensor, seed: int, num_patches: int, table_rows: int
) -> Tensor:
    return clip_ids.new_empty((len(clip_ids), num_patches), dtype=torch.int64)


_noise_rows = custom_op(
    "noise_rows",
    _noise_rows_torch,
    cuda=on_first_call("masking_kernel", "noise_rows_on_cuda"),
    fake=_noise_rows_fake,
    autocast="none",
)


def noise_rows(
    clip_ids: Tensor,
    epochs: Tensor,
    streams: Tensor,
    *,
    seed: int,
    num_patches: int,
    table_rows: int,
) -> Tensor:
    """Draw a row of a table of noise for each patch of each row of a batch.

    Autocast: none, these are integers. There are no derivatives.

    Args:
        clip_ids: [R] int64, which clip of the data set.
        epochs: [R] int64, which pass over it.
        streams: [R] int64, below 2**31, which clone of the clip.
        seed: Seed of the run, from 0 to 2**63 - 1.
        num_patches: N.
        table_rows: K, rows of the table, below 2**31.

    Returns:
        [R, N] int64, from 0 to K - 1.

    Raises:
        ValueError: The shapes do not match, or there is no patch or no row to draw.
    """
    if not clip_ids.shape == epochs.shape == streams.shape == (len(clip_ids),):
        raise ValueError(
            f"noise_rows: expected clips, epochs and streams [R], got {list(clip_ids.shape)}, "
            f"{list(epochs.shape)} and {list(streams.shape)}"
        )
    if num_patches < 1 or not 1 <= table_rows < 1 << 31:
        raise ValueError(
            f"noise_rows: expected patches and 1 to 2**31 - 1 rows of a table, got {num_patches} "
            f"patches and {table_rows} rows"
        )
    return _noise_rows(clip_ids, epochs, streams, seed, num_patches, table_rows)


def fill_masked_reference(visible: Tensor, table: Tensor, rows: Tensor, masks: Masks) -> Tensor:
    """Compute :func:`fill_masked` in plain, differentiable torch: the reference."""
    ids = masks.visible_ids[..., None].expand(-1, -1, visible.shape[2])
    out = table.to(visible.dtype)[rows].scatter(1, ids, visible)
    valid = valid_patches(masks)
    return out if valid is None else out.where(valid[..., None], 0)


def _places(ids: Tensor, num_patches: int) -> Tensor:
    """Return ids [R, V] of patches as places in the rows of all clips, [R * V]."""
    return (torch.arange(len(ids), device=ids.device)[:, None] * num_patches + ids).flatten()


def _fill_masked_torch(
    visible: Tensor,
    table: Tensor,
    rows: Tensor,
    mask_ids: Tensor,
    visible_ids: Tensor,
    num_masked: Tensor | None,
    num_visible: Tensor | None,
) -> Tensor:
    (R, N), D = rows.shape, visible.shape[2]
    # Whole rows are copied: on a CPU twice as fast as a scatter of elements.
    out = table.to(visible.dtype).index_select(0, rows.flatten())
    out.index_copy_(0, _places(visible_ids, N), visible.flatten(0, 1))
    valid = valid_patches(Masks(mask_ids, visible_ids, num_masked, num_visible))
    if valid is not None:
        out.masked_fill_(~valid.flatten()[:, None], 0)
    return out.view(R, N, D)


def _fill_masked_fake(visible: Tensor, table: Tensor, rows: Tensor, *rest: Tensor) -> Tensor:
    return visible.new_empty(*rows.shape, visible.shape[2])


def _fill_masked_plain(
    visible: Tensor, table: Tensor, rows: Tensor, mask_ids: Tensor, visible_ids: Tensor,
    num_masked: Tensor | None, num_visible: Tensor | None,
) -> Tensor:  # fmt: skip
    masks = Masks(mask_ids, visible_ids, num_masked, num_visible)
    return fill_masked_reference(visible, table, rows, masks)


_fill_masked = custom_op(
    "fill_masked",
    _fill_masked_torch,
    fake=_fill_masked_fake,
    autocast="promote",
    plain=_fill_masked_plain,
    formula_for=("visible",),
)


def _fill_masked_backward_torch(
    grad: Tensor, visible_ids: Tensor, num_visible: Tensor | None
) -> Tensor:
    N, D = grad.shape[1:]
    out = grad.reshape(-1, D).index_select(0, _places(visible_ids, N)).view(*visible_ids.shape, D)
    if num_visible is not None:
        rank = torch.arange(visible_ids.shape[1], device=grad.device)
        out.masked_fill_((rank >= num_visible[:, None])[..., None], 0)
    return out


def _fill_masked_backward_fake(
    grad: Tensor, visible_ids: Tensor, num_visible: Tensor | None
) -> Tensor:
    return grad.new_empty(*visible_ids.shape, grad.shape[2])


_fill_masked_backward = custom_op(
    "fill_masked_backward",
    _fill_masked_backward_torch,
    fake=_fill_masked_backward_fake,
    autocast="none",
)


def _save(ctx, inputs, output) -> None:
    _, _, _, _, visible_ids, _, num_visible = inputs
    ctx.save_for_backward(visible_ids, num_visible)


def _backward(ctx, grad: Tensor):
    return _fill_masked_backward(grad, *ctx.saved_tensors), *(None,) * 6


_fill_masked.register_autograd(_backward, setup_context=_save)


def fill_masked(visible: Tensor, table: Tensor, rows: Tensor, masks: Masks) -> Tensor:
    """Build the whole grid of each row: visible tokens at their places, noise at the masked ones.

    Autocast: the wider dtype of visible tokens and table; otherwise that of the tokens.

    Args:
        visible: [R, V, D], tokens of the visible patches.
        table: [K, D], noise. Data: in training it needs no gradient.
        rows: [R, N] int64, row of the table of each patch, from :func:`noise_rows`.
        masks: Which of the N patches are visible; places of padding become 0.

    Returns:
        [R, N, D].

    Raises:
        ValueError: The shapes do not match.
    """
    (R, V), D = masks.visible_ids.shape, visible.shape[-1]
    N = masks.mask_ids.shape[1] + V
    if visible.shape != (R, V, D) or table.shape[1:] != (D,) or rows.shape != (R, N):
        raise ValueError(
            f"fill_masked: masks of {R} rows with {V} of {N} patches visible do not match tokens "
            f"{list(visible.shape)}, a table {list(table.shape)} and its rows {list(rows.shape)}"
        )
    return _fill_masked(visible, table, rows, *masks)
