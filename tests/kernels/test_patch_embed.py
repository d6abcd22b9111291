"""The patch embedding against its definition: values, gradients, shapes, compilation, messages."""

import functools
import re
from collections.abc import Iterator

import pytest
import torch
from compare import (
    DTYPES,
    REGIMES,
    assert_as_good_as_reference,
    random_inputs,
    values_and_gradients,
)
from on_triton import PLACES, on_triton, running_on
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssast.kernels import patch_embed_kernels
from ssast.kernels.aot import recorded
from ssast.kernels.masking import Masks, draw_masks, masks_from_ids, no_masks
from ssast.kernels.patch_embed import (
    _patch_embed,
    _patch_embed_backward,
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
    "one_visible": (2, 20, 16, (8, 5), (8, 5), 6, 7),
    "uneven": (2, 24, 20, (10, 12), (10, 12), 6, 2),
    "long": (2, 142, 7, (3, 70), (3, 70), 6, 2),
    "wide": (2, 8, 8, (4, 4), (4, 4), 300, 1),
    "many": (9, 16, 16, (2, 2), (2, 2), 20, 20),
}


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the operation runs."""
    with running_on(request.param, _patch_embed, _patch_embed_backward) as device:
        yield device


def random_masks(B: int, N: int, M: int) -> Masks:
    if M == 0:
        return no_masks(B, (1, N), torch.device("cpu"))
    clips = torch.arange(B)
    return draw_masks(clips, clips, seed=0, kind="random", grid=(1, N), num_masked=M)


def case(shape: str, regime: str = "unit") -> tuple[list[Tensor], Masks, tuple[int, int]]:
    B, T, F, patch, stride, D, M = SHAPES[shape]
    rows, columns = patch_grid(F, T, patch, stride)
    N = rows * columns
    # In float32, so that it matters when it is rounded to bf16.
    mean, std = REGIMES[regime]
    noise = torch.randn(B, T, F, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fbank = (mean + std * noise).float().double()
    E = 1 if shape == "uneven" else 2  # prefix tokens
    rest = random_inputs((D, 1, *patch), (D,), (D,), (1, E + N, D), (1, E, D), regime="unit")
    return [fbank, *rest], random_masks(B, N, M), stride


def run(
    fbank: Tensor,
    parameters: tuple[Tensor, ...] | list[Tensor],
    masks: Masks,
    stride: tuple[int, int],
    device: str,
    mean: float = 0.25,
    std: float = 0.75,
) -> tuple[Tensor, Tensor]:
    """The operation on a device, its results on the CPU."""
    moved = Masks(*(ids.to(device) for ids in masks[:2]))
    leaves = [p.to(device) for p in parameters]
    tokens, targets = patch_embed(
        fbank.to(device), *leaves, moved, mean=mean, std=std, stride=stride
    )
    return tokens.cpu(), targets.cpu()


def check(shape: str, regime: str, dtype: torch.dtype, device: str) -> None:
    (fbank, *parameters), masks, stride = case(shape, regime)
    mean, std = REGIMES[regime][0] + 0.25, 0.75
    # The filterbank stays float32 under bf16 weights, as in training.
    fbank = fbank if dtype == torch.float64 else fbank.float()

    def reference(*weights: Tensor) -> tuple[Tensor, ...]:
        x = fbank.double() if weights[0].dtype == torch.float64 else fbank.float()
        return patch_embed_reference(x, *weights, masks, mean=mean, std=std, stride=stride)

    def operation(*weights: Tensor) -> tuple[Tensor, ...]:
        return run(fbank, weights, masks, stride, device, mean, std)

    assert_as_good_as_reference(operation, reference, parameters, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, regime: str, dtype: torch.dtype, device: str) -> None:
    check(shape, regime, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["patch", "uneven", "wide", "many"])
def test_the_block_sizes_of_newer_architectures(shape: str, dtype: torch.dtype) -> None:
    with on_triton(_patch_embed, _patch_embed_backward, architecture=90):
        check(shape, "unit", dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_program_sums_many_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_embed_kernels, "MULTIPROCESSORS", {80: 1})
    with on_triton(_patch_embed, _patch_embed_backward):
        check("many", "unit", dtype, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_size(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "full", (2, 1024, 128, (16, 16), (16, 16), 64, 400))
    check("full", "unit", dtype, device)


VIEWS = {
    "cut_in_time": lambda x: torch.cat((x, x, x), 1)[:, x.shape[1] : 2 * x.shape[1]],
    "cut_in_mel": lambda x: torch.cat((x, x), 2)[:, :, : x.shape[2]],
    "mel_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second": lambda x: x.repeat_interleave(2, 0)[::2],
    "clips_last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", ["patch", "overlapping"])
def test_any_strides(shape: str, view: str, device: str) -> None:
    (fbank, *parameters), masks, stride = case(shape)
    viewed = VIEWS[view](fbank.float().to(device))
    assert not viewed.is_contiguous() and viewed.cpu().equal(fbank.float())
    strided = [p.unsqueeze(-1).expand(*p.shape, 2).contiguous()[..., 0] for p in parameters]
    columns = Masks(*(ids.t().contiguous().t() for ids in masks[:2]))
    want = values_and_gradients(
        lambda *p: run(fbank.float(), p, masks, stride, device), parameters, torch.bfloat16
    )
    got = values_and_gradients(
        lambda *p: run(viewed, p, columns, stride, device), strided, torch.bfloat16
    )
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_filterbank_of_less_precision(dtype: torch.dtype, device: str) -> None:
    (fbank, *parameters), masks, stride = case("patch", "mean_100")

    def both(x: Tensor) -> list[Tensor]:
        return values_and_gradients(
            lambda *p: run(x, p, masks, stride, device, mean=100.25), parameters, dtype
        )

    short = fbank.to(dtype)
    assert all(a.equal(b) for a, b in zip(both(short), both(short.float()), strict=True))


@pytest.mark.parametrize("M", [0, 3, 8])
def test_no_clips(M: int, device: str) -> None:
    _, *parameters = random_inputs(
        (0, 20, 16), (6, 1, 8, 5), (6,), (6,), (1, 10, 6), (1, 2, 6), regime="unit"
    )
    ids = torch.empty(0, 8, dtype=torch.int64)
    masks, fbank = Masks(ids[:, :M], ids[:, M:]), torch.empty(0, 20, 16)
    tokens, targets, *gradients = values_and_gradients(
        lambda *p: run(fbank, p, masks, (8, 5), device), parameters, torch.float32
    )
    assert tokens.shape == (0, 10, 6) and targets.shape == (0, M, 40)
    for gradient, parameter in zip(gradients, parameters, strict=True):
        assert gradient.equal(torch.zeros(parameter.shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_launches(shape: str) -> None:
    """One forward and three backward, on tensors without data, with the results of the fakes."""
    (fbank, *parameters), masks, stride = case(shape)
    x, *leaves, masked, visible = (
        t.to("meta", torch.bfloat16 if t.is_floating_point() else t.dtype)
        for t in (fbank, *parameters, *masks[:2])
    )
    with recorded() as launches:
        results = patch_embed_kernels.forward(x, *leaves, masked, visible, 0.0, 1.0, stride)
        assert len(launches) == 1
        gradients = patch_embed_kernels.backward(
            results[0], x, leaves[0], masked, visible, 0.0, 1.0, stride
        )
    assert len(launches) == 4
    fakes = _patch_embed(x, *leaves, masked, visible, 0.0, 1.0, stride)
    fake_gradients = _patch_embed_backward(
        results[0], x, leaves[0], masked, visible, 0.0, 1.0, stride
    )
    for got, want in zip((*results, *gradients), (*fakes, *fake_gradients), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_repeats_itself(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "base", (8, 1024, 128, (16, 16), (16, 16), 768, 400))
    (fbank, *parameters), masks, stride = case("base")
    first, second = (
        values_and_gradients(
            lambda *p: run(fbank.float(), p, masks, stride, "cuda"), parameters, dtype
        )
        for _ in range(2)
    )
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    for shape in ("overlapping", "nothing_masked"):
        (fbank, *parameters), masks, stride = case(shape)
        fbank, leaves = fbank.to(device, dtype), [p.to(device, dtype) for p in parameters]
        leaves = [p.requires_grad_() for p in leaves]
        ids = (i.to(device) for i in masks[:2])
        torch.library.opcheck(_patch_embed, (fbank, *leaves, *ids, 0.5, 2.0, list(stride)))


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
    for shape in ((2, 2, 24), (1, 2, 23), (2, 24)):
        wrong = [*parameters[:4], torch.zeros(shape)]
        message = f"patch_embed: prefix must be [1, E, 24], got {list(shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            run(fbank, *wrong, masks=masks)
