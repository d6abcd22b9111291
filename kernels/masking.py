"""Which patches are masked: a pure function of (seed, stream, epoch, clip) on any device.

Every number comes from Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and the counter
(block, clip, epoch, stream): the mask of a clip depends on nothing else, neither on the batch it is
in nor on the rank, the device or what was drawn before. Draw d of a clip is word d % 4 of block
d // 4. Integers below n are the high word of draw * n.

The patch grid has F_p rows (frequency) and T_p columns (time); patch (f, t) has id f * T_p + t.

- ``official``: the published cluster masks. C in {3, 4, 5} (draw 0); starts (draws 2, 3, ...) cover
  {start + T_p * i + j : 0 <= i, j < C} with 0 < id < N, until MORE than M ids are covered; the M
  smallest stay. Blocks wrap over the end of a row, and low ids are favoured.
- ``uniform``: clusters that favour no position. The corner of a C x C block is drawn from all
  positions where it touches the grid, so that a block is as likely to cover one patch as another;
  what lies outside is cut off. When M or more ids are covered, a contiguous run of the surplus
  (draw 1 says where) is dropped. Of 400 in 8 x 64, every row and column gets 0.778 to 0.784.
- ``random``: M single patches; patch i has draw i as its key, and the M smallest keys win.

A clip that ends early has padding in its last columns. Its mask is that of the smaller grid of its
own columns, and padding is neither masked nor visible: it fills up both lists.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ssast.kernels.masking_kernel import draw_masks_on_cuda
from ssast.kernels.operation import custom_op

MaskKind = Literal["official", "uniform", "random"]

_WORD = 0xFFFFFFFF


class Masks(NamedTuple):
    """Masked and visible patches of a batch of clips, both in ascending order.

    Where clips have padding, the first ``num_masked`` and ``num_visible`` of each list are valid;
    the rest of both are the patches of padding.

    A tuple, so that it may pass through modules whose hooks (ZeRO-3's) look for tensors.
    """

    mask_ids: Tensor  # [B, M] int64
    visible_ids: Tensor  # [B, N - M] int64
    num_masked: Tensor | None = None  # [B] int64; all are valid if None
    num_visible: Tensor | None = None  # [B] int64


def philox(seed: int, block: Tensor, clip: Tensor, epoch: Tensor, stream: int) -> Tensor:
    """Philox4x32-10 with the key ``seed`` (64 bits) at the counter (block, clip, epoch, stream).

    The counters are int64 tensors that broadcast to a shape S and are taken modulo 2**32.

    Returns:
        [*S, 4] int64, four independent words in [0, 2**32).
    """
    c0, c1, c2 = (c & _WORD for c in torch.broadcast_tensors(block, clip, epoch))
    c3 = torch.full_like(c0, stream & _WORD)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The product of two words may exceed int64 and wrap: its 64 bits are right all the same.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & _WORD, (p1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def _below(words: Tensor, n: int | Tensor) -> Tensor:
    return (words * n) >> 32


def draw_masks_reference(
    clip: int, epoch: int, seed: int, stream: int, kind: MaskKind, grid: tuple[int, int], M: int
) -> list[int]:
    """Return the masked ids of one clip, one draw after the other: the reference."""
    rows, columns = grid
    N = rows * columns

    def draw(d: int) -> int:
        block, c, e = (torch.tensor(n) for n in (d // 4, clip, epoch))
        return int(philox(seed, block, c, e, stream)[d % 4])

    if kind == "random":
        return sorted(sorted(range(N), key=lambda i: (draw(i), i))[:M])
    C = 3 + (draw(0) * 3 >> 32)
    covered: set[int] = set()
    d = 2
    while len(covered) < (M + 1 if kind == "official" else M):
        if kind == "official":
            start = draw(d) * N >> 32
            block = (start + columns * i + j for i in range(C) for j in range(C))
            covered |= {i for i in block if 0 < i < N}
        else:
            start = draw(d) * (rows + C - 1) * (columns + C - 1) >> 32
            f, t = divmod(start, columns + C - 1)
            cells = ((f - i, t - j) for i in range(C) for j in range(C))
            covered |= {a * columns + b for a, b in cells if 0 <= a < rows and 0 <= b < columns}
        d += 1
    ids = sorted(covered)
    first = 0 if kind == "official" else draw(1) * len(ids) >> 32
    return sorted((ids[first:] + ids[:first])[:M])


def _draw_masks_torch(
    clip_ids: Tensor,
    epochs: Tensor,
    valid_columns: Tensor | None,
    num_masked: Tensor | None,
    seed: int,
    stream: int,
    kind: str,
    rows: int,
    columns: int,
    M: int,
) -> tuple[Tensor, Tensor]:
    B, N, device = len(clip_ids), rows * columns, clip_ids.device
    if valid_columns is None or num_masked is None:
        valid_columns = torch.full((B,), columns, device=device)
        num_masked = torch.full((B,), M, device=device)
    valid, wanted = valid_columns[:, None], num_masked[:, None]  # [B, 1]
    if kind == "random":
        blocks = torch.arange(-(-N // 4), device=device)
        words = philox(seed, blocks, clip_ids[:, None], epochs[:, None], stream)
        ids = torch.arange(N, device=device)
        # The id in the low bits breaks ties, so the order does not depend on how a device sorts.
        keys = ((words.flatten(1)[:, :N] << 16) | ids).where(ids < rows * valid, 1 << 48)
        kept = (keys <= _smallest(keys, wanted)) & (wanted > 0)
    else:
        kept = _clusters(clip_ids, epochs, valid, wanted, seed, stream, kind, rows, N)
    # From ids in the grid of the clip's own columns to ids in the whole grid.
    ids = torch.arange(N, device=device)
    f, t = torch.div(ids, columns, rounding_mode="floor"), ids % columns
    own = f * valid + t
    padding = t >= valid
    masked = kept.gather(1, own.where(~padding, 0)) & ~padding
    # A stable sort lists the masked ids first, and each kind in ascending order.
    fill = padding & (padding.cumsum(1) <= M - wanted)  # padding that fills up the masked ids
    order = (3 - 3 * masked.byte() - 2 * fill.byte() - (~padding & ~masked).byte()).argsort(
        dim=1, stable=True
    )
    # Copies even of a single row: two results of an operation may not share memory.
    masked_ids, visible_ids = (
        part.clone(memory_format=torch.contiguous_format) for part in order.split((M, N - M), 1)
    )
    return masked_ids, visible_ids


def _smallest(values: Tensor, k: Tensor) -> Tensor:
    """Return the k-th smallest of each row, k [B, 1] from 1 on."""
    return values.sort(1).values.gather(1, (k - 1).clamp(min=0))


def _clusters(
    clip_ids: Tensor,
    epochs: Tensor,
    columns: Tensor,
    wanted: Tensor,
    seed: int,
    stream: int,
    kind: str,
    rows: int,
    N: int,
) -> Tensor:
    """Return the masked patches, [B, N] bool, in the grids of [B, 1] ``columns``.

    Instead of drawing until enough is covered, all starts are drawn at once and each patch learns
    the FIRST draw that covers it; the draw that brings the count to ``need`` is then the need-th
    smallest of these.
    """
    device, own = clip_ids.device, rows * columns
    need = wanted + 1 if kind == "official" else wanted
    offsets = torch.arange(5, device=device)
    i, j = offsets[:, None].expand(5, 5).flatten(), offsets.repeat(5)  # the cells of a 5 x 5 block
    # Expected number of 3 x 3 blocks, with a margin; few clips in a million need the doubling.
    num_blocks = math.ceil(0.6 * math.log(N + 1) * N / 9 / 4) + 8
    if clip_ids.numel():
        left = (own / (own - need + 1)).log().mul(1.6 * N / 9 / 4).max().item()
        num_blocks = min(num_blocks, math.ceil(left) + 8)
    while True:
        blocks = torch.arange(num_blocks, device=device)
        words = philox(seed, blocks, clip_ids[:, None], epochs[:, None], stream).flatten(1)
        C = (3 + _below(words[:, 0], 3))[:, None]  # [B, 1]
        starts = words[:, 2:]  # [B, K]
        if kind == "official":
            starts = _below(starts, own)
            cells = starts[..., None] + columns[..., None] * i + j
            inside = (cells > 0) & (cells < own[..., None])
        else:
            width = columns + C - 1
            starts = _below(starts, (rows + C - 1) * width)
            f = torch.div(starts, width, rounding_mode="floor")
            f, t = f[..., None] - i, (starts - f * width)[..., None] - j
            cells = f * columns[..., None] + t
            inside = (f >= 0) & (f < rows) & (t >= 0) & (t < columns[..., None])
        inside &= (torch.maximum(i, j) < C)[:, None]
        never = starts.shape[1]
        draws = torch.arange(never, device=device)[:, None].expand(cells.shape)
        first = torch.full((len(clip_ids), N + 1), never, device=device)
        first.scatter_reduce_(1, cells.where(inside, N).flatten(1), draws.flatten(1), "amin")
        first = first[:, :N]
        last = _smallest(first, need)
        if bool(((last < never) | (wanted == 0)).all()):
            break
        num_blocks *= 2
    covered = (first <= last) & (first < never)
    rank = covered.cumsum(1) - 1
    if kind == "uniform":
        count = rank[:, -1:] + 1
        rank = (rank - _below(words[:, 1:2], count)) % count.clamp(min=1)
    return covered & (rank < wanted)


def _draw_masks_fake(
    clip_ids: Tensor, epochs: Tensor, valid_columns: Tensor | None, num_masked: Tensor | None,
    seed: int, stream: int, kind: str, rows: int, columns: int, M: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, N = len(clip_ids), rows * columns
    ids = clip_ids.new_empty
    return ids((B, M), dtype=torch.int64), ids((B, N - M), dtype=torch.int64)


_draw_masks = custom_op(
    "draw_masks",
    _draw_masks_torch,
    cuda=draw_masks_on_cuda,
    fake=_draw_masks_fake,
    autocast="none",
)


def draw_masks(
    clip_ids: Tensor,
    epochs: Tensor,
    *,
    seed: int,
    kind: MaskKind,
    grid: tuple[int, int],
    num_masked: int,
    stream: int = 0,
    valid_columns: Tensor | None = None,
) -> Masks:
    """Draw the mask of each clip of a batch.

    Autocast: none, these are integers. There are no derivatives, and no ``torch.vmap``: clips of
    any number are drawn in one call.

    Args:
        clip_ids: [B] int64, which clip of the data set.
        epochs: [B] int64, which pass over it: a clip's mask is drawn anew in each.
        seed: Seed of the run, from 0 to 2**63 - 1.
        kind: Kind of mask, see the module.
        grid: Rows and columns of patches, [F_p, T_p].
        num_masked: M, masked patches of a clip without padding.
        stream: Number that makes masks differ at the same clip and epoch (the second pass).
        valid_columns: [B] int64, columns of patches before the padding, from 1 to T_p; all of them
            if None. Of a clip with fewer, the same share is masked, rounded up: the same patches
            as in a grid of its own size. Where that grid is too small for a mask, nothing is.

    Raises:
        ValueError: The grid cannot hold that many masked patches.
    """
    N = grid[0] * grid[1]
    most = N - 2 if kind == "official" else N
    if not 1 <= num_masked <= most:
        raise ValueError(
            f"draw_masks: {kind} masks of a {grid[0]} x {grid[1]} grid cover 1 to {most} patches, "
            f"got num_masked={num_masked}"
        )
    if N > 1 << 16:
        raise ValueError(f"draw_masks: a grid may have {1 << 16} patches at most, got {N}")
    counts = None
    if valid_columns is not None:
        valid = grid[0] * valid_columns
        share = torch.div(num_masked * valid + N - 1, N, rounding_mode="floor")
        counts = torch.minimum(share, (valid - (N - most)).clamp(min=0))
    masks = Masks(
        *_draw_masks(clip_ids, epochs, valid_columns, counts, seed, stream, kind, *grid, num_masked)
    )
    return (
        masks if counts is None else masks._replace(num_masked=counts, num_visible=valid - counts)
    )


def masks_from_ids(mask_ids: Tensor, num_patches: int) -> Masks:
    """Build masks from the ids of masked patches.

    Args:
        mask_ids: [B, M] integers in [0, num_patches), distinct in each row, in any order.
        num_patches: N.

    Raises:
        ValueError: An id lies outside the grid or occurs twice in a row.
    """
    ids = mask_ids.long().sort(1).values
    wrong = (ids < 0) | (ids >= num_patches)
    if bool(wrong.any()) or bool((ids[:, 1:] == ids[:, :-1]).any()):
        raise ValueError(
            f"mask_ids must be distinct numbers from 0 to {num_patches - 1} in each row"
        )
    visible = torch.ones(len(ids), num_patches, dtype=torch.bool, device=ids.device)
    visible.scatter_(1, ids, False)
    order = visible.byte().argsort(dim=1, stable=True)
    return Masks(ids, order[:, ids.shape[1] :].contiguous())


def no_masks(
    batch_size: int,
    grid: tuple[int, int],
    device: torch.device,
    valid_columns: Tensor | None = None,
) -> Masks:
    """Return masks that cover nothing, as in fine-tuning; arguments as in :func:`draw_masks`."""
    rows, columns = grid
    ids = torch.arange(rows * columns, device=device).expand(batch_size, -1)
    if valid_columns is None:
        return Masks(ids[:, :0], ids)
    padding = ids % columns >= valid_columns[:, None]
    order = padding.byte().argsort(dim=1, stable=True)
    counts = rows * valid_columns
    return Masks(ids[:, :0], order, torch.zeros_like(counts), counts)


def valid_patches(masks: Masks) -> Tensor | None:
    """Return which patches are not padding, [B, N] bool; None where no clip has padding."""
    if masks.num_masked is None or masks.num_visible is None:
        return None
    every = torch.cat((masks.mask_ids, masks.visible_ids), 1)
    flags = torch.zeros_like(every, dtype=torch.bool)
    for ids, count in ((masks.mask_ids, masks.num_masked), (masks.visible_ids, masks.num_visible)):
        rank = torch.arange(ids.shape[1], device=ids.device)
        flags.scatter_(1, ids, rank < count[:, None])
    return flags
