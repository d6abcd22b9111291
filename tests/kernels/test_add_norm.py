"""Residual addition with LayerNorm against its definition: values, gradients, launches."""

import re
from collections.abc import Iterator

import pytest
import torch
from compare import DTYPES, REGIMES, assert_as_good_as_reference, random_inputs
from on_triton import PLACES, on_triton, running_on
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssast.kernels import add_norm_kernels, partial_sums
from ssast.kernels.add_norm import _add_norm, _add_norm_backward, add_norm, add_norm_reference
from ssast.kernels.aot import recorded

EPS = 1e-6
SHAPES = {  # of x
    "usual": (3, 7, 24),
    "one_row": (1, 5),
    "vector": (5,),
    "one_column": (4, 1),
    "flat": (9, 40),
    "wide": (5, 300),
    "many_rows": (150, 16),
}


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the operation runs."""
    with running_on(request.param, _add_norm, _add_norm_backward) as device:
        yield device


def case(shape: str, regime: str = "unit") -> list[Tensor]:
    """x, update, bias, weight and bias of the norm."""
    size = SHAPES[shape]
    rest = random_inputs(*[size[-1:]] * 3, regime="unit", seed=1)
    return [*random_inputs(size, size, regime=regime), *rest]


def check(shape: str, regime: str, dtype: torch.dtype, device: str) -> None:
    def operation(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.cpu() for t in add_norm(*(t.to(device) for t in leaves), EPS))

    def reference(*leaves: Tensor) -> tuple[Tensor, ...]:
        return add_norm_reference(*leaves, EPS)

    assert_as_good_as_reference(operation, reference, case(shape, regime), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, regime: str, dtype: torch.dtype, device: str) -> None:
    check(shape, regime, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_program_sums_many_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_sums, "MULTIPROCESSORS", {80: 1})
    monkeypatch.setattr(add_norm_kernels, "_BACKWARD", 64)
    with on_triton(_add_norm, _add_norm_backward):
        check("many_rows", "unit", dtype, "cpu")


def test_bf16_keeps_a_small_bias_beside_a_large_stream(device: str) -> None:
    x, bias = torch.full((512, 64), 6.0), torch.full((64,), 0.01)  # numbers near 6 are 1/32 apart
    update = 0.25 * torch.rand(512, 64, generator=torch.Generator().manual_seed(0))
    inputs = [t.to(device, torch.bfloat16) for t in (x, update, bias, bias, bias)]
    total = add_norm(*inputs, EPS)[0]
    added = (total.double() - inputs[0].double() - inputs[1].double()).mean().item()
    assert added == pytest.approx(0.01, rel=0.05)  # each sum is rounded, their mean is not


def test_bf16_sums_thousands_of_rows(device: str) -> None:
    leaves = [t.bfloat16() for t in random_inputs(*[(4096, 16)] * 2, *[(16,)] * 3, regime="unit")]
    grads = []
    for f, dtype in ((add_norm, torch.bfloat16), (add_norm_reference, torch.float64)):
        inputs = [t.to(device, dtype).requires_grad_() for t in leaves]
        _, out = f(*inputs, EPS)
        upstream = 0.1 + 0.1 * leaves[0].roll(1, 0).to(device, dtype)
        grads.append(torch.autograd.grad(out, inputs, upstream))
    for got, want in zip(grads[0][3:], grads[1][3:], strict=True):
        assert (got.double() - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("used", ["sum", "normalised"])
def test_one_of_the_results_may_be_unused(used: str, device: str) -> None:
    def pick(results: tuple[Tensor, Tensor]) -> Tensor:
        return results[0 if used == "sum" else 1].cpu()

    leaves = [t.to(device).float().requires_grad_() for t in case("usual")]
    upstream = torch.randn(SHAPES["usual"], generator=torch.Generator().manual_seed(3))
    got, want = (
        torch.autograd.grad(pick(f(*leaves, EPS)), leaves, upstream, allow_unused=True)
        for f in (add_norm, add_norm_reference)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_gradients_are_those_of_the_formula() -> None:
    leaves = [t.requires_grad_() for t in case("usual")]
    assert torch.autograd.gradcheck(lambda *t: add_norm(*t, EPS), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_second_derivatives_in_half_precision(dtype: torch.dtype, device: str) -> None:
    def second(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(device, dtype).requires_grad_() for t in case("usual")]
        total, out = (t.double() for t in function(*leaves, EPS))
        loss = (total + out.square()).mean()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        penalty = torch.stack([g.double().square().sum() for g in first]).sum()
        return [g.double() for g in torch.autograd.grad(1e4 * penalty, leaves)]

    for got, want in zip(
        second(add_norm, dtype), second(add_norm_reference, torch.float64), strict=True
    ):
        assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(dtype: torch.dtype, device: str) -> None:
    leaves = [t.to(device, dtype) for t in case("usual")]
    strided = [t.unsqueeze(-1).expand(*t.shape, 2).contiguous()[..., 0] for t in leaves]
    assert not strided[0].is_contiguous()
    for a, b in zip(add_norm(*strided, EPS), add_norm(*leaves, EPS), strict=True):
        assert a.equal(b)


def test_no_rows(device: str) -> None:
    leaves = [torch.zeros(*s, device=device, requires_grad=True) for s in [(0, 4)] * 2 + [(4,)] * 3]
    total, out = add_norm(*leaves, EPS)
    gradients = torch.autograd.grad((total + out).sum(), leaves)
    assert all(g.equal(torch.zeros_like(t)) for g, t in zip(gradients, leaves, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_launches(shape: str) -> None:
    """One forward and two backward, on tensors without data, with the results of the fakes."""
    inputs = [t.to("meta", torch.bfloat16) for t in case(shape)]
    with recorded() as launches:
        results = add_norm_kernels.forward(*inputs, EPS)
        assert len(launches) == 1
        saved = (results[0], *results[2:], inputs[3])
        gradients = add_norm_kernels.backward(results[1], results[0], *saved)
    assert len(launches) == 3
    fakes = (*_add_norm(*inputs, EPS), *_add_norm_backward(results[1], results[0], *saved))
    for got, want in zip((*results, *gradients), fakes, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    leaves = [t.to(device, dtype).requires_grad_() for t in case("usual")]
    torch.library.opcheck(_add_norm, (*leaves, EPS))


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode(), torch.no_grad():
        inputs = [torch.empty(s, device="cuda") for s in [(2, 5, 8)] * 2 + [(8,)] * 3]
        for result in add_norm(*inputs, EPS):
            assert result.device.type == "cuda" and result.shape == (2, 5, 8)


def test_compiles_without_a_graph_break() -> None:
    leaves = [t.requires_grad_() for t in case("usual")]

    def run(*t: Tensor) -> Tensor:
        total, out = add_norm(*t, EPS)
        return (total + 2 * out).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(run(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), want)


def test_other_dtypes_and_exports_use_torch() -> None:
    x, update, *vectors = case("usual")
    mixed = add_norm(x.float(), update.bfloat16(), *(v.float() for v in vectors), EPS)
    assert mixed[1].dtype == torch.float32

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
            return add_norm(x, update, *vectors, EPS)

    graph = torch.export.export(Module(), (x, update)).graph
    assert not [n for n in graph.nodes if "ssast" in str(n.target)]


def test_error_messages() -> None:
    inputs = case("usual")
    with pytest.raises(ValueError, match=re.escape("add_norm: [3, 7, 24], [3, 7, 23] and")):
        add_norm(inputs[0], inputs[1][..., 1:], *inputs[2:], EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_a_gpu_repeats_itself(dtype: torch.dtype) -> None:
    leaves = [torch.randn(s, device="cuda", dtype=dtype) for s in [(4000, 768)] * 2 + [(768,)] * 3]
    leaves = [t.requires_grad_() for t in leaves]
    first, second = (
        torch.autograd.grad(sum(t.square().sum() for t in add_norm(*leaves, EPS)), leaves)
        for _ in range(2)
    )
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
