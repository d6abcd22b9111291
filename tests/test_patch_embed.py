"""The patch embedding against its definition: values, gradients, shapes, compilation, messages."""

import functools
import re

import pytest
import torch
from compare import DTYPES, REGIMES, assert_as_good_as_reference, random_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssast.kernels.masking import Masks, draw_masks, masks_from_ids, no_masks
from ssast.kernels.patch_embed import (
    _patch_embed,
    cut_patches,
    join_patches,
    patch_embed,
    patch_embed_reference,
    patch_grid,
)

# name: B, T, F, patch, stride, D, masked
SHAPES = {
    "patch": (3, 64, 32, (16, 16), (16, 16), 24, 5),
    "frame": (2, 14, 16, (16, 2), (16, 2), 8, 4),
    "overlapping": (2, 26, 21, (8, 6), (5, 3), 7, 3),
    "odd": (1, 23, 17, (5, 3), (5, 3), 5, 1),
    "one_patch": (2, 5, 7, (7, 5), (7, 5), 3, 1),
    "nothing_masked": (2, 20, 16, (8, 5), (8, 5), 6, 0),
    "everything_masked": (2, 20, 16, (8, 5), (8, 5), 6, 8),
}


def random_masks(B: int, N: int, M: int) -> Masks:
    if M == 0:
        return no_masks(B, N, torch.device("cpu"))
    clips = torch.arange(B)
    return draw_masks(clips, clips, seed=0, kind="random", grid=(1, N), num_masked=M)


def case(shape: str, regime: str = "unit") -> tuple[list[Tensor], Masks, tuple[int, int]]:
    B, T, F, patch, stride, D, M = SHAPES[shape]
    rows, columns = patch_grid(F, T, patch, stride)
    N = rows * columns
    (fbank,) = random_inputs((B, T, F), regime=regime)
    rest = random_inputs((D, 1, *patch), (D,), (D,), (1, 2 + N, D), (1, 2, D), regime="unit")
    return [fbank, *rest], random_masks(B, N, M), stride


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, regime: str, dtype: torch.dtype) -> None:
    (fbank, *parameters), masks, stride = case(shape, regime)
    mean, std = REGIMES[regime][0] + 0.25, 0.75
    # The filterbank stays float32 under bf16 weights, as in training.
    fbank = fbank if dtype == torch.float64 else fbank.float()

    def reference(*weights: Tensor) -> tuple[Tensor, ...]:
        x = fbank.double() if weights[0].dtype == torch.float64 else fbank.float()
        return patch_embed_reference(x, *weights, masks.mask_ids, mean, std, stride)

    def operation(*weights: Tensor) -> tuple[Tensor, ...]:
        return patch_embed(fbank, *weights, masks, mean=mean, std=std, stride=stride)

    assert_as_good_as_reference(operation, reference, parameters, dtype)


@pytest.mark.parametrize("shape", ["overlapping", "odd", "nothing_masked", "everything_masked"])
def test_gradcheck(shape: str) -> None:
    (fbank, *parameters), masks, stride = case(shape)
    tokens = functools.partial(patch_embed, masks=masks, mean=0.5, std=2.0, stride=stride)
    leaves = [p.requires_grad_() for p in parameters]
    assert torch.autograd.gradcheck(lambda *p: tokens(fbank, *p)[0], leaves)


def test_no_gradient_flows_to_the_targets() -> None:
    (fbank, *parameters), masks, stride = case("patch")
    leaves = [p.requires_grad_() for p in parameters]
    tokens, targets = patch_embed(fbank, *leaves, masks, mean=0.0, std=1.0, stride=stride)
    assert tokens.requires_grad and not targets.requires_grad


def test_a_patch_is_numbered_row_by_row() -> None:
    fbank = torch.arange(6 * 4).view(1, 6, 4)  # 6 frames, 4 mel bins
    patches = cut_patches(fbank, (2, 3), (2, 3))
    assert patches.shape == (1, 4, 6)
    # The second patch holds the lower two mel bins of the last three frames.
    assert patches[0, 1].tolist() == [12, 16, 20, 13, 17, 21]
    assert patches[0, 2].tolist() == [2, 6, 10, 3, 7, 11]


@pytest.mark.parametrize("shape", ["patch", "frame", "one_patch"])
def test_cut_patches_join_again(shape: str) -> None:
    _, T, F, patch, stride, _, _ = SHAPES[shape]
    fbank = random_inputs((2, T, F), regime="unit")[0]
    grid = patch_grid(F, T, patch, stride)
    assert join_patches(cut_patches(fbank, patch, stride), grid, patch).equal(fbank)


def test_opcheck() -> None:
    for shape in ("overlapping", "nothing_masked"):
        (fbank, *parameters), masks, stride = case(shape)
        leaves = [p.requires_grad_() for p in parameters]
        torch.library.opcheck(_patch_embed, (fbank, *leaves, *masks, 0.5, 2.0, list(stride)))


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode(), torch.no_grad():
        fbank = torch.empty(2, 64, 32, device="cuda")
        shapes = [(24, 1, 16, 16), (24,), (24,), (1, 10, 24), (1, 2, 24)]
        parameters = [torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        masks = Masks(
            torch.empty(2, 5, device="cuda", dtype=torch.int64),
            torch.empty(2, 3, device="cuda", dtype=torch.int64),
        )
        tokens, targets = patch_embed(fbank, *parameters, masks, mean=0.0, std=1.0, stride=(16, 16))
    for got, shape in ((tokens, (2, 10, 24)), (targets, (2, 5, 256))):
        assert got.device.type == "cuda" and got.dtype == torch.bfloat16
        assert tuple(got.shape) == shape


def test_compiles_without_a_graph_break() -> None:
    (fbank, *parameters), masks, stride = case("patch")

    def run(*p: Tensor) -> Tensor:
        tokens, targets = patch_embed(fbank, *p, masks, mean=0.0, std=1.0, stride=stride)
        return tokens.square().sum() + targets.sum()

    leaves = [p.requires_grad_() for p in parameters]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(run(*leaves), leaves)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_error_messages() -> None:
    (fbank, *parameters), masks, stride = case("patch")
    run = functools.partial(patch_embed, mean=0.0, std=1.0, stride=stride)
    message = "16 x 16 patches of 3 x 32 mel bins x 64 frames make 2 x 4, but the masks are for"
    with pytest.raises(ValueError, match=f"{message} 3 x 9"):
        run(fbank, *parameters, masks=masks_from_ids(masks.mask_ids, 9))
    with pytest.raises(ValueError, match=f"{message} 2 x 8"):
        run(fbank, *parameters, masks=masks_from_ids(masks.mask_ids[:2], 8))
    for place, name, shape in ((1, "bias", "[24]"), (2, "mask_embed", "[24]")):
        wrong = [p[:-1] if i == place else p for i, p in enumerate(parameters)]
        message = f"patch_embed: {name} must be {shape}, got [23]"
        with pytest.raises(ValueError, match=re.escape(message)):
            run(fbank, *wrong, masks=masks)
    wrong = [*parameters[:3], parameters[3][:, 1:], parameters[4]]
    message = "patch_embed: pos_embed must be [1, 10, 24], got [1, 9, 24]"
    with pytest.raises(ValueError, match=re.escape(message)):
        run(fbank, *wrong, masks=masks)
