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
- ``inverse_blocks``: visible clusters, as EAT draws them (Chen et al. 2024). Around each of
  int((N - M + 0.07 N) / 25) patches, at least one (draws 2**16, 2**16 + 1, ...; one may come
  twice), a block of 5 x 5 patches is covered; what lies outside of the grid is cut off. Patch i has
  draw i as its key: of the covered patches, then of the others, those with the smallest keys are
  visible until N - M are. In a grid of fewer than 5 rows or columns, 25 is the area that fits.

A clip that ends early has padding in its last columns. Its mask is that of the smaller grid of its
own columns, and padding is neither masked nor visible: it fills up both lists.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ssast.kernels.operation import custom_op, on_first_call

MaskKind = Literal["official", "uniform", "random", "inverse_blocks"]

_KINDS: tuple[str, ...] = get_args(MaskKind)
MOST_PATCHES = 1 << 16  # of a grid: keys of patches hold an id in 16 bits
CENTRES = MOST_PATCHES  # the first draw of inverse_blocks that is no key of a patch
_WORD = 0xFFFFFFFF

Draw = Callable[[int, int], Tensor]  # (first, count) to [B, count] draws


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


def philox(seed: int, block: Tensor, clip: Tensor, epoch: Tensor, stream: int | Tensor) -> Tensor:
    """Draw Philox4x32-10 with the key ``seed`` (64 bits) at (block, clip, epoch, stream).

    The counters are int64 tensors that broadcast to a shape S and are taken modulo 2**32.

    Returns:
        [*S, 4] int64, four independent words in [0, 2**32).
    """
    if not isinstance(stream, Tensor):
        stream = torch.full_like(epoch, stream & _WORD)
    c0, c1, c2, c3 = (c & _WORD for c in torch.broadcast_tensors(block, clip, epoch, stream))
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
    if kind == "inverse_blocks":
        shown: set[int] = set()
        area = min(5, rows) * min(5, columns)
        for k in range(max(1, (100 * (N - M) + 7 * N) // (100 * area))):
            f, t = divmod(draw(CENTRES + k) * N >> 32, columns)
            cells = ((a, b) for a in range(f - 2, f + 3) for b in range(t - 2, t + 3))
            shown |= {a * columns + b for a, b in cells if 0 <= a < rows and 0 <= b < columns}
        return sorted(sorted(range(N), key=lambda i: (i not in shown, draw(i), i))[N - M :])
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
    streams: Tensor | None,
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

    def draw(first: int, count: int) -> Tensor:
        """Draw numbers of each clip, [B, count], from draw ``first`` on, a multiple of 4."""
        blocks = first // 4 + torch.arange(-(-count // 4), device=device)
        counters = (clip_ids[:, None], epochs[:, None])
        c3 = stream if streams is None else streams[:, None] + stream
        return philox(seed, blocks, *counters, c3).flatten(1)[:, :count]

    if kind == "random":
        kept = _lowest(draw(0, N), rows * valid, wanted)
    elif kind == "inverse_blocks":
        kept = _inverse_blocks(draw, valid, wanted, rows, N)
    else:
        kept = _clusters(draw, valid, wanted, kind, rows, N)
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


def _lowest(keys: Tensor, own: Tensor, count: Tensor) -> Tensor:
    """Return flags of the patches of the ``count`` lowest keys.

    Args:
        keys: [B, N], non-negative, below 2**33.
        own: [B, 1], number of patches of each clip, the first of N.
        count: [B, 1].
    """
    ids = torch.arange(keys.shape[1], device=keys.device)
    # The id in the low bits breaks ties, so the order does not depend on how a device sorts.
    keys = ((keys << 16) | ids).where(ids < own, 1 << 49)
    return (keys <= _smallest(keys, count)) & (count > 0)


def _inverse_blocks(draw: Draw, columns: Tensor, wanted: Tensor, rows: int, N: int) -> Tensor:
    """Return the masked patches, [B, N] bool, in the grids of [B, 1] ``columns``."""
    device, own = columns.device, rows * columns
    visible = own - wanted
    area = min(5, rows) * columns.clamp(max=5)
    count = ((100 * visible + 7 * own) // (100 * area)).clamp(min=1)
    centres = _below(draw(CENTRES, int(count.max()) if len(count) else 0), own)  # [B, K]
    offsets = torch.arange(-2, 3, device=device)
    f = torch.div(centres, columns, rounding_mode="floor")
    t = centres - f * columns
    f, t = f[..., None] + offsets.repeat_interleave(5), t[..., None] + offsets.repeat(5)
    inside = (f >= 0) & (f < rows) & (t >= 0) & (t < columns[..., None])
    inside &= (torch.arange(centres.shape[1], device=device) < count)[..., None]
    cells = (f * columns[..., None] + t).where(inside, N).flatten(1)
    covered = torch.zeros(len(columns), N + 1, dtype=torch.bool, device=device)
    covered = covered.scatter_(1, cells, True)[:, :N]
    keys = draw(0, N) + (~covered).long().mul(1 << 32)
    return ~_lowest(keys, own, visible) & (torch.arange(N, device=device) < own)


def _clusters(draw: Draw, columns: Tensor, wanted: Tensor, kind: str, rows: int, N: int) -> Tensor:
    """Return the masked patches, [B, N] bool, in the grids of [B, 1] ``columns``.

    Instead of drawing until enough is covered, all starts are drawn at once and each patch learns
    the FIRST draw that covers it; the draw that brings the count to ``need`` is then the need-th
    smallest of these.
    """
    device, own = columns.device, rows * columns
    need = wanted + 1 if kind == "official" else wanted
    offsets = torch.arange(5, device=device)
    i, j = offsets[:, None].expand(5, 5).flatten(), offsets.repeat(5)  # the cells of a 5 x 5 block
    # Expected number of 3 x 3 blocks, with a margin; few clips in a million need the doubling.
    num_blocks = math.ceil(0.6 * math.log(N + 1) * N / 9 / 4) + 8
    if len(columns):
        left = (own / (own - need + 1)).log().mul(1.6 * N / 9 / 4).max().item()
        num_blocks = min(num_blocks, math.ceil(left) + 8)
    while True:
        words = draw(0, 4 * num_blocks)
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
        first = torch.full((len(columns), N + 1), never, device=device)
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
    clip_ids: Tensor, epochs: Tensor, streams: Tensor | None, valid_columns: Tensor | None,
    num_masked: Tensor | None, seed: int, stream: int, kind: str, rows: int, columns: int, M: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, N = len(clip_ids), rows * columns
    ids = clip_ids.new_empty
    return ids((B, M), dtype=torch.int64), ids((B, N - M), dtype=torch.int64)


_draw_masks = custom_op(
    "draw_masks",
    _draw_masks_torch,
    cuda=on_first_call("masking_kernel", "draw_masks_on_cuda"),
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
    stream: int | Tensor = 0,
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
        stream: Number that makes masks differ at the same clip and epoch, below 2**31: of the
            second pass, or [B] int64, of the clones of a clip.
        valid_columns: [B] int64, columns of patches before the padding, from 1 to T_p; all of them
            if None. Of a clip with fewer, the same share is masked, rounded up: the same patches
            as in a grid of its own size. Where that grid is too small for a mask, nothing is.

    Raises:
        ValueError: The kind is unknown, the grid cannot hold that many masked patches, or there is
            not a number for each clip.
    """
    if kind not in _KINDS:
        raise ValueError(f"draw_masks: kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    N = grid[0] * grid[1]
    most = N - 2 if kind == "official" else N
    if not 1 <= num_masked <= most:
        raise ValueError(
            f"draw_masks: {kind} masks of a {grid[0]} x {grid[1]} grid cover 1 to {most} patches, "
            f"got num_masked={num_masked}"
        )
    if N > MOST_PATCHES:
        raise ValueError(f"draw_masks: a grid may have {MOST_PATCHES} patches at most, got {N}")
    if clip_ids.ndim != 1:
        raise ValueError(f"draw_masks: clip_ids must be [B], got {list(clip_ids.shape)}")
    streams, stream = (stream, 0) if isinstance(stream, Tensor) else (None, stream)
    given = {"epoch": epochs, "stream": streams, "number of valid columns": valid_columns}
    for name, numbers in given.items():
        if numbers is not None and numbers.shape != clip_ids.shape:
            raise ValueError(
                f"draw_masks: expected one {name} for each of {len(clip_ids)} clips, got "
                f"{list(numbers.shape)}"
            )
    counts = None
    if valid_columns is not None:
        valid = grid[0] * valid_columns
        share = torch.div(num_masked * valid + N - 1, N, rounding_mode="floor")
        counts = torch.minimum(share, (valid - (N - most)).clamp(min=0))
    masks = Masks(
        *_draw_masks(
            clip_ids, epochs, streams, valid_columns, counts, seed, stream, kind, *grid, num_masked
        )
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
