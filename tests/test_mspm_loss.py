"""InfoNCE and the reconstruction loss against their definitions and the published numbers."""

import re
from pathlib import Path

import pytest
import torch
from compare import DTYPES, REGIMES, assert_as_good_as_reference, random_inputs
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
GOLDEN = torch.load(Path(__file__).parent / "golden" / "infonce.pt", weights_only=True)


def in_float32(reference, targets: Tensor, *args):
    """The definition as the operations promise it: in float32 even where the inputs are half."""

    def run(predictions: Tensor):
        dtype = predictions.dtype if predictions.dtype == torch.float64 else torch.float32
        return reference(targets.to(dtype), predictions.to(dtype), *args)

    return run


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_info_nce_equals_the_definition(
    shape: tuple[int, ...], axis: SoftmaxAxis, regime: str, dtype: torch.dtype
) -> None:
    targets, predictions = random_inputs(shape, shape, regime=regime)
    reference = in_float32(info_nce_reference, targets, axis)
    assert_as_good_as_reference(
        lambda c: info_nce(targets.to(c.dtype), c, axis)[0],
        lambda c: reference(c)[0],
        [predictions],
        dtype,
    )


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_accuracy_equals_the_definition(axis: SoftmaxAxis, dtype: torch.dtype) -> None:
    targets, noise = random_inputs((3, 40, 16), (3, 40, 16), regime="unit")
    predictions = (0.1 * targets + 0.2 * noise).bfloat16().double()
    got = info_nce(targets.to(dtype), predictions.to(dtype), axis)[1]
    want = info_nce_reference(targets, predictions, axis)[1]
    assert want.min() > 0.1 and want.max() < 0.99
    assert got.tolist() == pytest.approx(want.tolist(), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mse_equals_the_definition(shape: tuple[int, ...], regime: str, dtype: torch.dtype) -> None:
    targets, predictions = random_inputs(shape, shape, regime=regime)
    assert_as_good_as_reference(
        lambda r: mse(targets.to(r.dtype), r),
        in_float32(mse_reference, targets),
        [predictions],
        dtype,
    )


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"scale_{c['scale']}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_info_nce_equals_the_published_numbers(
    case: dict, axis: SoftmaxAxis, dtype: torch.dtype
) -> None:
    expected = case[axis]
    predictions = case["pred"].to(dtype).requires_grad_()
    nce, accuracy = info_nce(GOLDEN["targets"].to(dtype), predictions, axis)
    nce.sum().backward()
    exact = dtype == torch.float64
    assert nce.item() == pytest.approx(expected["nce"], rel=1e-12 if exact else 2e-6)
    if "acc" in expected:
        assert accuracy.item() == pytest.approx(expected["acc"], abs=1e-7)
    assert predictions.grad is not None
    worst = (predictions.grad.double() - expected["dpred"].double()).abs().max()
    largest = expected["dpred"].abs().max()
    assert worst < largest * (6e-8 if exact else 4e-6)  # the golden gradients are float32


@pytest.mark.parametrize("axis", AXES)
def test_gradcheck(axis: SoftmaxAxis) -> None:
    targets, predictions = random_inputs((2, 6, 4), (2, 6, 4), regime="unit")
    predictions.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: info_nce(targets, c, axis)[0], predictions)
    assert torch.autograd.gradcheck(lambda r: mse(targets, r), predictions)


def test_gradients_are_scaled_by_clip() -> None:
    """A clip that counts nothing has no gradient, one that counts double has twice as much."""
    targets, predictions = random_inputs((3, 6, 4), (3, 6, 4), regime="unit")
    predictions.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    for loss in (info_nce(targets, predictions)[0], mse(targets, predictions)):
        (once,) = torch.autograd.grad(loss.sum(), predictions, retain_graph=True)
        (weighted,) = torch.autograd.grad((loss * weights).sum(), predictions)
        assert weighted.equal(once * weights[:, None, None])


def test_huge_logits_stay_finite() -> None:
    targets, predictions = random_inputs((2, 9, 4), (2, 9, 4), regime="unit")
    predictions = (1e4 * predictions).float().requires_grad_()
    nce, _ = info_nce(targets.float(), predictions)
    nce.sum().backward()
    assert nce.isfinite().all() and predictions.grad is not None
    assert predictions.grad.isfinite().all()


def test_opcheck() -> None:
    targets, predictions = random_inputs((2, 6, 4), (2, 6, 4), regime="unit")
    predictions.requires_grad_()
    for over_targets in (False, True):
        torch.library.opcheck(_info_nce, (targets, predictions, over_targets))
    torch.library.opcheck(_mse, (targets, predictions))


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode(), torch.no_grad():  # a backward pass would start a CUDA thread
        targets = torch.empty(3, 6, 4, device="cuda", dtype=torch.bfloat16)
        predictions = torch.empty_like(targets)
        values = [*info_nce(targets, predictions), mse(targets, predictions)]
    for value in values:
        assert value.device.type == "cuda" and value.dtype == torch.float32
        assert tuple(value.shape) == (3,)


def test_compiles_without_a_graph_break() -> None:
    targets, predictions = random_inputs((2, 6, 4), (2, 6, 4), regime="unit")
    predictions.requires_grad_()

    def run(c: Tensor) -> Tensor:
        nce, accuracy = info_nce(targets, c, "paper")
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
