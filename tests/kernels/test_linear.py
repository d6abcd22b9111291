"""Linear layers with a GELU or in chunks against PyTorch's: values, gradients, launches, copies."""

from collections.abc import Callable, Iterator

import pytest
import torch
from compare import DTYPES, REGIMES, assert_as_good_as_reference, random_inputs
from on_triton import PLACES, on_triton, running_on
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from ssast.kernels import linear_kernels, partial_sums
from ssast.kernels.aot import recorded
from ssast.kernels.linear import (
    _gelu_backward,
    _join_chunks,
    joined_view,
    linear_chunks,
    linear_gelu,
)

SHAPES = {  # of x, and the width of the result
    "usual": ((3, 7, 10), 24),
    "one_row": ((1, 5), 6),
    "vector": ((5,), 6),
    "narrow": ((4, 3), 6),
    "wide": ((5, 8), 612),
    "many_rows": ((150, 4), 12),
}
Layer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
LAYERS: dict[str, tuple[Layer, Layer]] = {  # ours, PyTorch's
    "gelu": (
        lambda x, w, b: (linear_gelu(x, w, b),),
        lambda x, w, b: (functional.gelu(functional.linear(x, w, b)),),
    ),
    "2 chunks": (
        lambda x, w, b: linear_chunks(x, w, b, 2),
        lambda x, w, b: functional.linear(x, w, b).chunk(2, -1),
    ),
    "3 chunks": (
        lambda x, w, b: linear_chunks(x, w, b, 3),
        lambda x, w, b: functional.linear(x, w, b).chunk(3, -1),
    ),
}
layers = pytest.mark.parametrize("layer", LAYERS)
some_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the operations run."""
    with running_on(request.param, _gelu_backward, _join_chunks) as device:
        yield device


def case(shape: str, regime: str = "unit") -> list[Tensor]:
    """x, weight and bias."""
    size, width = SHAPES[shape]
    x = random_inputs(size, regime=regime)
    return [*x, *random_inputs((width, size[-1]), (width,), regime="unit", seed=1)]


def check(layer: str, shape: str, regime: str, dtype: torch.dtype, device: str) -> None:
    ours, plain = LAYERS[layer]

    def operation(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.cpu() for t in ours(*(t.to(device) for t in leaves)))

    assert_as_good_as_reference(operation, plain, case(shape, regime), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES)
@layers
def test_equals_the_layer_of_torch(
    layer: str, shape: str, regime: str, dtype: torch.dtype, device: str
) -> None:
    check(layer, shape, regime, dtype, device)


@some_dtypes
@layers
def test_a_program_sums_many_rows(
    layer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_sums, "MULTIPROCESSORS", {80: 1})
    with on_triton(_gelu_backward, _join_chunks):
        check(layer, "many_rows", "unit", dtype, "cpu")


@layers
def test_gradients_are_those_of_the_formula(layer: str) -> None:
    leaves = [t.requires_grad_() for t in case("usual")]
    assert torch.autograd.gradcheck(LAYERS[layer][0], leaves)


@layers
def test_no_rows(layer: str, device: str) -> None:
    leaves = [torch.ones(*s, device=device, requires_grad=True) for s in [(0, 4), (6, 4), (6,)]]
    total = torch.cat(LAYERS[layer][0](*leaves), -1).sum()
    gradients = torch.autograd.grad(total, leaves)
    assert all(g.equal(torch.zeros_like(t)) for g, t in zip(gradients, leaves, strict=True))


@layers
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_get_no_gradient(layer: str, frozen: int) -> None:
    leaves = case("usual")
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i != frozen)
    sum(y.sum() for y in LAYERS[layer][0](*leaves)).backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


@pytest.mark.parametrize("lengths", [3, 2])
def test_gradients_that_lie_side_by_side_are_not_copied(lengths: int) -> None:
    """As attention writes them: one tensor [B, L, n, H, D_h], seen as n of [B, L, H D_h]."""
    together = torch.randn(2, 5, lengths, 4, 3)
    chunks = [t.flatten(2) for t in together.unbind(2)]
    joined = joined_view(chunks)
    assert joined is not None and joined.data_ptr() == together.data_ptr()
    assert joined.equal(torch.cat(chunks, -1))
    assert joined_view([*chunks[1:], chunks[0]]) is None
    assert joined_view([*chunks[:-1], chunks[-1].clone()]) is None
    assert joined_view([t[:, :2] for t in chunks]) is None  # not one piece of memory
    apart = [t.contiguous() for t in chunks]
    assert joined_view(apart) is None


def test_equal_results_from_gradients_side_by_side_and_apart() -> None:
    leaves = [t.requires_grad_() for t in case("usual")]
    together = torch.randn(3, 7, 3, 8, dtype=torch.float64)
    aside = together.unbind(2)
    outputs = linear_chunks(*leaves, 3)
    a = torch.autograd.grad(outputs, leaves, aside, retain_graph=True)
    b = torch.autograd.grad(outputs, leaves, [t.contiguous() for t in aside])
    assert all(x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("chunks", [2, 3])
def test_second_derivatives_from_gradients_side_by_side(chunks: int) -> None:
    """A view of memory would take them from the first chunk alone."""

    def run(*leaves: Tensor) -> Tensor:
        together = torch.stack(linear_chunks(*leaves, chunks), -2)
        return together.sigmoid() * together.flatten(-2).sum(-1)[..., None, None]

    leaves = [t.requires_grad_() for t in case("usual")]
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_launches(shape: str) -> None:
    """Two, on tensors without data, with the results of the fakes."""
    x, weight, bias = (t.to("meta", torch.bfloat16) for t in case(shape))
    h = functional.linear(x, weight, bias)
    for kernel, operation, args in (
        (linear_kernels.gelu_backward, _gelu_backward, (h, h)),
        (linear_kernels.join_chunks, _join_chunks, (x, x, None)),
        (linear_kernels.join_chunks, _join_chunks, (x, x, x)),
    ):
        with recorded() as launches:
            results = kernel(*args)
        assert len(launches) == 2
        for got, want in zip(results, operation(*args), strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    x = case("usual")[0].to(device, dtype)
    torch.library.opcheck(_gelu_backward, (x, x))
    for third in (x, None):
        torch.library.opcheck(_join_chunks, (x, 2 * x, third))


@layers
def test_compiles_without_a_graph_break(layer: str) -> None:
    leaves = [t.requires_grad_() for t in case("usual")]

    def run(*t: Tensor) -> Tensor:
        return torch.stack([y.square().sum() for y in LAYERS[layer][0](*t)]).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(run(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), want)


@layers
def test_autocast(layer: str) -> None:
    leaves = [t.float().requires_grad_() for t in case("usual")]
    results = []
    for implementation in LAYERS[layer]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = implementation(*leaves)
        assert all(y.dtype == torch.bfloat16 for y in outputs)
        gradients = torch.autograd.grad(sum(y.float().sum() for y in outputs), leaves)
        results.append([*outputs, *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * want.abs().max().item())


@layers
def test_an_export_has_the_operations_of_torch_alone(layer: str) -> None:
    x, weight, bias = case("usual")

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(LAYERS[layer][0](x, weight, bias))

    graph = torch.export.export(Module(), (x,)).graph
    calls = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert calls and all(c.startswith(("aten", "<built-in")) for c in calls), calls


@layers
def test_tensors_without_data(layer: str) -> None:
    leaves = [t.to("meta").requires_grad_() for t in case("usual")]
    outputs = LAYERS[layer][0](*leaves)
    gradients = torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])
    assert [g.shape for g in gradients] == [t.shape for t in leaves]


@layers
def test_fake_tensors_on_a_gpu(layer: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        inputs = [torch.empty(s, device="cuda") for s in [(2, 5, 8), (12, 8), (12,)]]
        for y in LAYERS[layer][0](*inputs):
            assert y.device.type == "cuda" and y.shape[:2] == (2, 5)


def test_error_messages() -> None:
    x, weight, bias = case("usual")
    for chunks in (4, 1):
        with pytest.raises(ValueError, match=f"24 rows of the weight for {chunks} chunks"):
            linear_chunks(x, weight, bias, chunks)
    with pytest.raises(ValueError, match="23 rows"):
        linear_chunks(x, weight[1:], bias[1:], 3)
