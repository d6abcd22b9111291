"""Which patches are hidden: a pure function of (seed, stream, epoch, clip) on any device.

Every number comes from Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and the counter
(block, clip, epoch, stream): the mask of a clip depends on nothing else, neither on the batch it is
in nor on the rank, the device or what was drawn before. Draw d of a clip is word d % 4 of block
d // 4. Integers below n are the high word of draw * n.

The patch grid has F_p rows (frequency) and T_p columns (time); patch (f, t) has id f * T_p + t.

- ``official``: the published cluster masks. C in {3, 4, 5} (draw 0); starts (draws 2, 3, ...) cover
  {start + T_p * i + j : 0 <= i, j < C} with 0 < id < N, until MORE than M ids are covered; the M
  smallest stay. Blocks wrap over the end of a row, and low ids are favoured.
- ``uniform``: clusters that favour no position. The corner of a C x C block is drawn from all
  places where it touches the grid, so that a block is as likely to cover one patch as another;
  what lies outside is cut off. When M or more ids are covered, a contiguous run of the surplus
  (its place is draw 1) is dropped. Of 400 in 8 x 64, every row and column gets 0.778 to 0.784.
- ``random``: M single patches; patch i has draw i as its key, and the M smallest keys win.
"""

import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MaskKind = Literal["official", "uniform", "random"]

_WORD = 0xFFFFFFFF


class Masks(NamedTuple):
    """Hidden and visible patches of a batch of clips, both in ascending order.

    A tuple, so that it may pass through modules whose hooks (ZeRO-3's) look for tensors.
    """

    mask_ids: Tensor  # [B, M] int64
    visible_ids: Tensor  # [B, N - M] int64


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
    """The definition for one clip, one draw after the other; returns its masked ids."""
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


@triton.jit
def _draw(seed, d, clip, epoch, stream):
    """Draw d (a scalar or a block of them) of a clip, uint32."""
    zero = d * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + d // 4, zero + clip, zero + epoch, zero + stream)
    word = d % 4
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))


@triton.jit
def _draw_below(n, seed, d, clip, epoch, stream):
    word = _draw(seed, d, clip, epoch, stream)
    return tl.umulhi(word, (d * 0 + n).to(tl.uint32)).to(tl.int32)


@triton.jit
def _smallest_keys(ids, M, seed, clip, epoch, stream, N: tl.constexpr):
    """Flags of the M ids with the smallest (draw, id)."""
    draws = _draw(seed, ids, clip, epoch, stream).to(tl.int64)
    keys = tl.where(ids < N, draws << 16 | ids, 1 << 48)
    bound = tl.sum(ids, 0).to(tl.int64) * 0
    for bit in range(48):  # the largest bound with fewer than M keys below is the M-th key
        trial = bound | tl.full((), 1, tl.int64) << (47 - bit)
        bound = tl.where(tl.sum((keys < trial).to(tl.int32), 0) < M, trial, bound)
    return keys <= bound


@triton.jit
def _covered(
    ids, M, seed, clip, epoch, stream, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr
):
    """Flags of the M ids that clusters cover."""
    N: tl.constexpr = ROWS * COLUMNS
    OFFICIAL: tl.constexpr = KIND == "official"
    zero = M * 0
    C = 3 + _draw_below(3, seed, zero, clip, epoch, stream)
    need = M + 1 if OFFICIAL else M
    on = ids < 0
    count = zero
    d = zero + 2
    while count < need:
        if OFFICIAL:
            offset = ids - _draw_below(N, seed, d, clip, epoch, stream)
            on |= (offset >= 0) & (offset // COLUMNS < C) & (offset % COLUMNS < C)
            on &= (ids > 0) & (ids < N)
        else:
            places = (ROWS + C - 1) * (COLUMNS + C - 1)
            corner = _draw_below(places, seed, d, clip, epoch, stream)
            f = corner // (COLUMNS + C - 1) - ids // COLUMNS
            t = corner % (COLUMNS + C - 1) - ids % COLUMNS
            on |= (f >= 0) & (f < C) & (t >= 0) & (t < C) & (ids < N)
        count = tl.sum(on.to(tl.int32), 0)
        d += 1
    rank = tl.cumsum(on.to(tl.int32), 0) - 1
    if not OFFICIAL:
        rank -= _draw_below(count, seed, zero + 1, clip, epoch, stream)
        rank = tl.where(rank < 0, rank + count, rank)
    return on & (rank < M)


@triton.jit(do_not_specialize=["seed", "stream", "M"])
def _masks_kernel(
    clip_ids,
    epochs,
    masked,
    visible,
    seed,
    stream,
    M,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per clip."""
    N: tl.constexpr = ROWS * COLUMNS
    b = tl.program_id(0).to(tl.int64)
    clip = tl.load(clip_ids + b).to(tl.int32)
    epoch = tl.load(epochs + b).to(tl.int32)
    ids = tl.arange(0, BLOCK)
    if KIND == "random":
        hidden = _smallest_keys(ids, M, seed, clip, epoch, stream, N)
    else:
        hidden = _covered(ids, M, seed, clip, epoch, stream, ROWS, COLUMNS, KIND)
    before = tl.cumsum(hidden.to(tl.int32), 0) - hidden.to(tl.int32)
    tl.store(masked + b * M + before, ids.to(tl.int64), mask=hidden)
    out = visible + b * (N - M) + ids - before
    tl.store(out, ids.to(tl.int64), mask=(ids < N) & (hidden == 0))


@torch.library.custom_op("ssast::draw_masks", mutates_args=())
def _draw_masks(
    clip_ids: Tensor,
    epochs: Tensor,
    seed: int,
    stream: int,
    kind: str,
    rows: int,
    columns: int,
    M: int,
) -> tuple[Tensor, Tensor]:
    N = rows * columns
    if kind == "random":
        blocks = torch.arange(-(-N // 4), device=clip_ids.device)
        words = philox(seed, blocks, clip_ids[:, None], epochs[:, None], stream)
        ids = torch.arange(N, device=clip_ids.device)
        # The id in the low bits breaks ties, so the order does not depend on how a device sorts.
        keys = (words.flatten(1)[:, :N] << 16) | ids
        kept = torch.zeros(len(keys), N, dtype=torch.bool, device=keys.device)
        kept.scatter_(1, keys.topk(M, 1, largest=False).indices, True)
    else:
        kept = _clusters(clip_ids, epochs, seed, stream, kind, rows, columns, M)
    # A stable sort of the flags lists the masked ids first, each list in ascending order.
    order = (~kept).byte().argsort(dim=1, stable=True)
    # Copies even of a single row: two results of an operation may not share memory.
    masked, visible = (
        part.clone(memory_format=torch.contiguous_format) for part in order.split((M, N - M), 1)
    )
    return masked, visible


def _clusters(
    clip_ids: Tensor,
    epochs: Tensor,
    seed: int,
    stream: int,
    kind: str,
    rows: int,
    columns: int,
    M: int,
) -> Tensor:
    """Flags of the masked patches, [B, N] bool.

    Instead of drawing until enough is covered, all starts are drawn at once and each patch learns
    the FIRST draw that covers it; the draw that brings the count to ``need`` is then the need-th
    smallest of these.
    """
    N, device = rows * columns, clip_ids.device
    need = M + 1 if kind == "official" else M
    offsets = torch.arange(5, device=device)
    i, j = offsets[:, None].expand(5, 5).flatten(), offsets.repeat(5)  # the cells of a 5 x 5 block
    # Expected number of 3 x 3 blocks, with a margin; few clips in a million need the doubling.
    num_blocks = math.ceil(0.6 * math.log(N + 1) * N / 9 / 4) + 8
    num_blocks = min(num_blocks, math.ceil(1.6 * math.log(N / (N - need + 1)) * N / 9 / 4) + 8)
    while True:
        blocks = torch.arange(num_blocks, device=device)
        words = philox(seed, blocks, clip_ids[:, None], epochs[:, None], stream).flatten(1)
        C = (3 + _below(words[:, 0], 3))[:, None]  # [B, 1]
        starts = words[:, 2:]  # [B, K]
        if kind == "official":
            starts = _below(starts, N)
            cells = starts[..., None] + columns * i + j
            inside = (cells > 0) & (cells < N)
        else:
            starts = _below(starts, (rows + C - 1) * (columns + C - 1))
            f = torch.div(starts, columns + C - 1, rounding_mode="floor")
            f, t = f[..., None] - i, (starts - f * (columns + C - 1))[..., None] - j
            cells = f * columns + t
            inside = (f >= 0) & (f < rows) & (t >= 0) & (t < columns)
        inside &= (torch.maximum(i, j) < C)[:, None]
        never = starts.shape[1]
        draws = torch.arange(never, device=device)[:, None].expand(cells.shape)
        first = torch.full((len(clip_ids), N + 1), never, device=device)
        first.scatter_reduce_(1, cells.where(inside, N).flatten(1), draws.flatten(1), "amin")
        first = first[:, :N]
        last = first.kthvalue(need, 1, keepdim=True).values
        if bool((last < never).all()):
            break
        num_blocks *= 2
    covered = first <= last
    rank = covered.cumsum(1) - 1
    if kind == "uniform":
        count = rank[:, -1:] + 1
        rank = (rank - _below(words[:, 1:2], count)) % count
    return covered & (rank < M)


@_draw_masks.register_kernel("cuda")
def _draw_masks_cuda(
    clip_ids: Tensor,
    epochs: Tensor,
    seed: int,
    stream: int,
    kind: str,
    rows: int,
    columns: int,
    M: int,
) -> tuple[Tensor, Tensor]:
    B, N = len(clip_ids), rows * columns
    masked = torch.empty(B, M, dtype=torch.int64, device=clip_ids.device)
    visible = torch.empty(B, N - M, dtype=torch.int64, device=clip_ids.device)
    if B:
        block = max(32, triton.next_power_of_2(N))
        _masks_kernel[(B,)](
            clip_ids.contiguous(), epochs.contiguous(), masked, visible, seed, stream, M,
            ROWS=rows, COLUMNS=columns, KIND=kind, BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return masked, visible


@_draw_masks.register_fake
def _(
    clip_ids: Tensor,
    epochs: Tensor,
    seed: int,
    stream: int,
    kind: str,
    rows: int,
    columns: int,
    M: int,
) -> tuple[Tensor, Tensor]:
    B, N = len(clip_ids), rows * columns
    ids = clip_ids.new_empty
    return ids((B, M), dtype=torch.int64), ids((B, N - M), dtype=torch.int64)


def draw_masks(
    clip_ids: Tensor,
    epochs: Tensor,
    *,
    seed: int,
    kind: MaskKind,
    grid: tuple[int, int],
    num_masked: int,
    stream: int = 0,
) -> Masks:
    """Draw the mask of each clip of a batch.

    Args:
        clip_ids: [B] int64, which clip of the data set.
        epochs: [B] int64, which pass over it: a clip's mask is drawn anew in each.
        seed: Of the run, from 0 to 2**63 - 1.
        kind: See the module.
        grid: Rows and columns of patches, [F_p, T_p].
        num_masked: M, the same for every clip.
        stream: Separates masks that must differ at the same clip and epoch (the second pass).

    Raises:
        ValueError: The grid cannot hold that many masked patches.
    """
    N = grid[0] * grid[1]
    most = N - 2 if kind == "official" else N
    if not 1 <= num_masked <= most:
        raise ValueError(
            f"draw_masks: {kind} masks of a {grid[0]} x {grid[1]} grid hide 1 to {most} patches, "
            f"got num_masked={num_masked}"
        )
    if N > 1 << 16:
        raise ValueError(f"draw_masks: a grid may have {1 << 16} patches at most, got {N}")
    return Masks(*_draw_masks(clip_ids, epochs, seed, stream, kind, *grid, num_masked))


def masks_from_ids(mask_ids: Tensor, num_patches: int) -> Masks:
    """Masks at given places.

    Args:
        mask_ids: [B, M] integers in [0, num_patches), distinct in each row, in any order.
        num_patches: N.

    Raises:
        ValueError: An id lies outside the grid or stands twice in a row.
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


def no_masks(batch_size: int, num_patches: int, device: torch.device) -> Masks:
    """Nothing hidden, as in fine-tuning."""
    ids = torch.arange(num_patches, device=device).expand(batch_size, num_patches)
    return Masks(ids[:, :0], ids)
