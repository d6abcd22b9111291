"""InfoNCE and the reconstruction loss against their definitions and the published numbers."""

import re
from collections.abc import Iterator

import pytest
import torch
from compare import DTYPES, REGIMES, assert_as_good_as_reference, random_inputs
from on_triton import on_triton
from paths import GOLDEN
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssast.kernels.mspm_loss import (
    SoftmaxAxis,
    _info_nce,
    _mse,
    info_nce,
    info_nce_reference,
    mse,
    mse_reference,
)

AXES: list[SoftmaxAxis] = ["official", "paper"]
SHAPES = [(3, 40, 16), (2, 7, 5), (1, 2, 1), (4, 1, 3)]
# For the kernels: more than one tile of patches, an odd width; more than one chunk of a patch.
TILES = [(2, 70, 21), (1, 20, 300), (1, 9, 48)]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
KERNELS = ["interpreted", "interpreted_90", CUDA]
REFERENCE = torch.load(GOLDEN / "infonce.pt", weights_only=True)


@pytest.fixture(params=["torch", "interpreted", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors go so that a test meets an implementation: torch's, or the kernels."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param.startswith("interpreted"):
        with on_triton(_info_nce, _mse, architecture=90 if "90" in request.param else 80):
            yield "cpu"
    else:
        yield "cuda" if request.param == "cuda" else "cpu"


CASES = [
    pytest.param(*where.values, shape, marks=where.marks)
    for where in (pytest.param("torch"), pytest.param("interpreted"), CUDA)
    for shape in SHAPES + TILES
]


def operation(loss, device: str, targets: Tensor, *args):
    """One of the losses on a device, as a function of predictions on the CPU."""

    def run(predictions: Tensor):
        places = [a.to(device) if isinstance(a, Tensor) else a for a in args]
        result = loss(targets.to(device, predictions.dtype), predictions.to(device), *places)
        return result.cpu() if isinstance(result, Tensor) else result[0].cpu()

    return run


def in_float32(reference, targets: Tensor, *args):
    """The definition as the operations promise it: in float32 even where the inputs are half."""

    def run(predictions: Tensor):
        dtype = predictions.dtype if predictions.dtype == torch.float64 else torch.float32
        result = reference(targets.to(dtype), predictions.to(dtype), *args)
        return result if isinstance(result, Tensor) else result[0]

    return run


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("device", "shape"), CASES, ids=str, indirect=["device"])
@pytest.mark.parametrize("axis", AXES)
def test_info_nce_equals_the_definition(
    shape: tuple[int, ...], axis: SoftmaxAxis, regime: str, dtype: torch.dtype, device: str
) -> None:
    targets, predictions = random_inputs(shape, shape, regime=regime)
    assert_as_good_as_reference(
        operation(info_nce, device, targets, axis),
        in_float32(info_nce_reference, targets, axis),
        [predictions],
        dtype,
        rounding=2**-20,  # float32 knows scores around 16 to that, and so their exponentials
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("device", "shape"), CASES, ids=str, indirect=["device"])
def test_mse_equals_the_definition(
    shape: tuple[int, ...], regime: str, dtype: torch.dtype, device: str
) -> None:
    targets, predictions = random_inputs(shape, shape, regime=regime)
    assert_as_good_as_reference(
        operation(mse, device, targets),
        in_float32(mse_reference, targets),
        [predictions],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_full_width(axis: SoftmaxAxis, dtype: torch.dtype, device: str) -> None:
    """Between a guess and certainty, where all of the softmax matters."""
    targets, noise = random_inputs((1, 100, 256), (1, 100, 256), regime="unit")
    # Numbers that the dtype holds, but TF32 does not.
    targets, predictions = (x.to(dtype).double() for x in (targets / 2.1, targets / 20 + noise / 5))
    assert_as_good_as_reference(
        operation(info_nce, device, targets, axis),
        in_float32(info_nce_reference, targets, axis),
        [predictions],
        dtype,
    )


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_accuracy_equals_the_definition(axis: SoftmaxAxis, dtype: torch.dtype, device: str) -> None:
    targets, noise = random_inputs((3, 90, 16), (3, 90, 16), regime="unit")
    predictions = (0.1 * targets + 0.2 * noise).bfloat16().double()
    num_masked = torch.tensor([90, 40, 0])
    for n in (None, num_masked):
        want = info_nce_reference(targets, predictions, axis, n)[1]
        assert want[0] > 0.1 and want[0] < 0.99 and want[0] != want[1]
        t, c = targets.to(device, dtype), predictions.to(device, dtype)
        got = info_nce(t, c, axis, None if n is None else n.to(device))[1]
        assert got.tolist() == pytest.approx(want.tolist(), abs=1e-6)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("twin", [5, 70])
def test_of_equal_targets_the_first_is_taken(axis: SoftmaxAxis, twin: int, device: str) -> None:
    targets = torch.eye(80, device=device)[None].clone()
    targets[0, twin] = targets[0, 3]
    predictions = 8 * targets
    predictions[0, twin] = predictions[0, 0]
    accuracy = info_nce(targets, predictions, axis)[1]
    assert accuracy.item() == pytest.approx(79 / 80, abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "garbage"),
    [
        (torch.float32, torch.nan),
        (torch.float32, 7.0),
        (torch.bfloat16, torch.inf),
        (torch.float64, torch.nan),
    ],
    ids=str,
)
def test_ignored_patches(dtype: torch.dtype, garbage: float, device: str) -> None:
    """Clips of different lengths, padded with anything, are the clips by themselves."""
    shape, num_masked = (4, 70, 21), torch.tensor([33, 70, 0, 65])
    targets, predictions = random_inputs(shape, shape, regime="unit")
    targets, predictions = targets / 4, predictions / 4
    padding = torch.arange(70) >= num_masked[:, None]
    targets[padding], predictions[padding] = garbage, garbage
    for loss, reference, args in (
        (info_nce, info_nce_reference, ("official", num_masked)),
        (info_nce, info_nce_reference, ("paper", num_masked)),
        (mse, mse_reference, (num_masked,)),
    ):
        op = operation(loss, device, targets, *args)
        definition = in_float32(reference, targets, *args)
        assert_as_good_as_reference(op, definition, [predictions], dtype)
        leaf = predictions.to(dtype).requires_grad_()
        values = op(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        assert gradient[padding].eq(0).all() and values[2] == 0
        alone = operation(loss, device, targets[:1, :33], *args[:-1])(
            predictions[:1, :33].to(dtype)
        )
        exact = dtype == torch.float64
        torch.testing.assert_close(values[:1], alone, rtol=1e-13 if exact else 1e-6, atol=0)


def test_nothing_masked(device: str) -> None:
    for shape in ((0, 6, 4), (3, 0, 4)):
        targets = torch.ones(shape, device=device)
        predictions = torch.ones(shape, device=device, requires_grad=True)
        for num_masked in (None, torch.zeros(shape[0], dtype=torch.int64, device=device)):
            values = [
                *info_nce(targets, predictions, "official", num_masked),
                *info_nce(targets, predictions, "paper", num_masked),
                mse(targets, predictions, num_masked),
            ]
            assert all(v.tolist() == [0] * shape[0] for v in values)
            (gradient,) = torch.autograd.grad(sum(values).sum(), predictions)
            assert gradient.shape == shape


def test_views_are_like_copies(device: str) -> None:
    targets, predictions = (
        x.float().to(device) for x in random_inputs((2, 12, 40), (6, 2, 80), regime="unit")
    )
    lengths = torch.tensor([[12, 0], [30, 0]], device=device)[:, 0]
    views = (targets.transpose(1, 2)[:, ::2, :6], predictions.permute(1, 2, 0)[:, ::4])
    assert not any(v.is_contiguous() for v in views)
    for n in (None, lengths.clamp(max=20)):
        got, want = [], []
        for inputs, values in ((views, got), ([v.contiguous() for v in views], want)):
            leaf = inputs[1].detach().requires_grad_()
            outputs = [info_nce(inputs[0], leaf, axis, n)[0] for axis in AXES]
            outputs.append(mse(inputs[0], leaf, n))
            values += [*outputs, *(torch.autograd.grad(o.sum(), leaf)[0] for o in outputs)]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("axis", AXES)
def test_other_precisions_of_the_targets(axis: SoftmaxAxis, device: str) -> None:
    """The wider of two dtypes is computed in; the gradient has that of the predictions."""
    targets, predictions = (
        x.to(device) for x in random_inputs((2, 20, 16), (2, 20, 16), regime="unit")
    )
    predictions = predictions.bfloat16().requires_grad_()
    for loss, args in ((info_nce, (axis,)), (mse, ())):
        got, want = (
            loss(targets.float() + 1e-3, c, *args) for c in (predictions, predictions.float())
        )
        got, want = (v if isinstance(v, Tensor) else v[0] for v in (got, want))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(got.sum(), predictions)
        assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda c: f"scale_{c['scale']}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_info_nce_equals_the_published_numbers(
    case: dict, axis: SoftmaxAxis, dtype: torch.dtype, device: str
) -> None:
    expected = case[axis]
    predictions = case["pred"].to(device, dtype).requires_grad_()
    nce, accuracy = info_nce(REFERENCE["targets"].to(device, dtype), predictions, axis)
    nce.sum().backward()
    exact = dtype == torch.float64
    assert nce.item() == pytest.approx(expected["nce"], rel=1e-12 if exact else 2e-6)
    if "acc" in expected:
        assert accuracy.item() == pytest.approx(expected["acc"], abs=1e-7)
    assert predictions.grad is not None
    worst = (predictions.grad.cpu().double() - expected["dpred"].double()).abs().max()
    largest = expected["dpred"].abs().max()
    assert worst < largest * (6e-8 if exact else 4e-6)  # the golden gradients are float32


@pytest.mark.parametrize("axis", AXES)
def test_gradcheck(axis: SoftmaxAxis) -> None:
    targets, predictions = random_inputs((2, 6, 4), (2, 6, 4), regime="unit")
    predictions.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: info_nce(targets, c, axis)[0], predictions)
    assert torch.autograd.gradcheck(lambda r: mse(targets, r), predictions)
    n = torch.tensor([4, 6])
    assert torch.autograd.gradcheck(lambda c: info_nce(targets, c, axis, n)[0], predictions)
    assert torch.autograd.gradcheck(lambda r: mse(targets, r, n), predictions)


def test_gradients_are_scaled_by_clip() -> None:
    """A clip that counts nothing has no gradient, one that counts double has twice as much."""
    targets, predictions = random_inputs((3, 6, 4), (3, 6, 4), regime="unit")
    predictions.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    for loss in (info_nce(targets, predictions)[0], mse(targets, predictions)):
        (once,) = torch.autograd.grad(loss.sum(), predictions, retain_graph=True)
        (weighted,) = torch.autograd.grad((loss * weights).sum(), predictions)
        assert weighted.equal(once * weights[:, None, None])


def test_float16_keeps_the_small_gradient_of_the_mse(device: str) -> None:
    """Of 400 x 256 values each gradient is below what float16 holds, but for the loss scale."""

    def derivatives(dtype: torch.dtype) -> list[Tensor]:
        pair = (x.to(device, torch.float16) for x in random_inputs(*shape, regime="std_1e-3"))
        targets, predictions = (x.to(dtype) for x in pair)
        loss = 2**14 * mse(targets, predictions.requires_grad_()).sum()
        (first,) = torch.autograd.grad(loss, predictions, create_graph=True)
        (second,) = torch.autograd.grad(first.double().square().sum(), predictions)
        assert first.dtype == second.dtype == dtype
        return [first.double(), second.double()]

    shape = [(1, 400, 256)] * 2
    for got, want in zip(derivatives(torch.float16), derivatives(torch.float64), strict=True):
        assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("axis", AXES)
def test_huge_logits_stay_finite(axis: SoftmaxAxis, device: str) -> None:
    targets, predictions = random_inputs((2, 9, 4), (2, 9, 4), regime="unit")
    predictions = (1e4 * predictions).float().to(device).requires_grad_()
    nce, _ = info_nce(targets.float().to(device), predictions, axis)
    nce.sum().backward()
    assert nce.isfinite().all() and predictions.grad is not None
    assert predictions.grad.isfinite().all()


def test_opcheck(device: str) -> None:
    targets, predictions = (
        x.to(device) for x in random_inputs((2, 6, 4), (2, 6, 4), regime="unit")
    )
    targets, predictions = targets.float(), predictions.float().requires_grad_()
    for num_masked in (None, torch.tensor([4, 0], device=device)):
        for over_targets in (False, True):
            torch.library.opcheck(_info_nce, (targets, predictions, over_targets, num_masked))
        torch.library.opcheck(_mse, (targets, predictions, num_masked))


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode(), torch.no_grad():  # a backward pass would start a CUDA thread
        targets = torch.empty(3, 6, 4, device="cuda", dtype=torch.bfloat16)
        predictions = torch.empty_like(targets)
        lengths = torch.empty(3, dtype=torch.int64, device="cuda")
        values = [*info_nce(targets, predictions), mse(targets, predictions, lengths)]
    for value in values:
        assert value.device.type == "cuda" and value.dtype == torch.float32
        assert tuple(value.shape) == (3,)


def test_compiles_without_a_graph_break() -> None:
    targets, predictions = random_inputs((2, 6, 4), (2, 6, 4), regime="unit")
    predictions.requires_grad_()
    lengths = torch.tensor([6, 3])

    def run(c: Tensor) -> Tensor:
        nce, accuracy = info_nce(targets, c, "paper", lengths)
        return (nce + accuracy + 10 * mse(targets, c)).mean()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(run(predictions), predictions)
    (got,) = torch.autograd.grad(compiled(predictions), predictions)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", [info_nce, mse])
def test_error_messages(loss) -> None:
    message = (
        f"{loss.__name__}: targets and predictions must both be [B, M, P], "
        "got [2, 6, 4] and [2, 6, 5]"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(torch.zeros(2, 6, 4), torch.zeros(2, 6, 5))
    with pytest.raises(ValueError, match=re.escape(f"{loss.__name__}: targets")):
        loss(torch.zeros(6, 4), torch.zeros(6, 4))
    message = f"{loss.__name__}: num_masked must be [B], [2], got [3]"
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(torch.zeros(2, 6, 4), torch.zeros(2, 6, 4), num_masked=torch.ones(3).long())


def test_an_axis_has_one_of_two_names() -> None:
    message = "info_nce: softmax_axis must be official or paper, got 'columns'"
    with pytest.raises(ValueError, match=message):
        info_nce(torch.zeros(2, 6, 4), torch.zeros(2, 6, 4), "columns")
