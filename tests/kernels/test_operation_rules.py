"""What every operation promises: autocast, derivatives of each kind, vmap, compilation.

A new operation needs a case in ``operation_cases`` and a row in ``docs/kernels.md``.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from operation_cases import BACKWARD, CASES, Case
from paths import ROOT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

import ssast.kernels
from ssast.kernels.autocast import RULES

close = torch.testing.assert_close
INTEGERS = {name for name, case in CASES.items() if not case.shapes}


def outputs(results: Any) -> list[Tensor]:
    return [x for x in tree_leaves(results) if x.is_floating_point()]


def total(results: Any) -> Tensor:
    """A number in which each result has a weight of its own, from its square and itself."""
    return sum(((i + 1) * x.double() ** 2 + x.double()).sum() for i, x in enumerate(results))


def gradients(run: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total(outputs(run(*leaves))), leaves))


def leaves_of(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in inputs]


def mixed(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Inputs as autocast meets them: the first in half precision, parameters in float32."""
    first, *rest = case.inputs()
    return [first.to(dtype), *(x.float() for x in rest)]


def check_autocast(case: Case, dtype: torch.dtype) -> None:
    inputs = mixed(case, dtype)
    leaves, hand = leaves_of(inputs), leaves_of(inputs)
    with torch.autocast("cpu", dtype):
        results = outputs(case.run(*leaves))
    want = outputs(case.run(*case.by_hand(hand, dtype)))
    cast = case.by_hand(inputs, dtype)
    returned = next((x.dtype for x in cast[::-1]), None)  # the first may be data that is kept
    for got, true in zip(results, want, strict=True):
        assert got.dtype == true.dtype == returned
        close(got, true, rtol=0, atol=0)
    for got, true, leaf in zip(
        torch.autograd.grad(total(results), leaves),
        torch.autograd.grad(total(want), hand),
        leaves,
        strict=True,
    ):
        assert got.dtype == leaf.dtype
        close(got, true, rtol=0, atol=0)
    check_nested(case, [x.float() for x in inputs])


def check_nested(case: Case, inputs: list[Tensor]) -> None:
    """Autocast that is off inside changes nothing, nor does one around the backward pass."""
    named = zip(case.shapes, leaves_of(inputs), strict=True)
    leaves = [x.requires_grad_(name not in case.data) for name, x in named]
    trained = [x for x in leaves if x.requires_grad]
    want = outputs(case.run(*leaves))
    wanted = torch.autograd.grad(total(want), trained) if trained else []
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            got = outputs(case.run(*leaves))
        found = torch.autograd.grad(total(got), trained) if trained else []
    for a, b in zip([*got, *found], [*want, *wanted], strict=True):
        assert a.dtype == b.dtype
        close(a, b, rtol=0, atol=0)


def check_double_backward(case: Case) -> None:
    leaves = leaves_of(case.inputs())

    def run(*x: Tensor) -> Any:
        return tuple(outputs(case.run(*x)))

    if case.second:
        found = torch.autograd.grad(total(run(*leaves)), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=case.second):
            torch.autograd.grad(total(found), leaves)
        with sdpa_kernel(SDPBackend.MATH):
            assert gradgradcheck(run, leaves, fast_mode=True)
        return
    assert gradgradcheck(run, leaves, fast_mode=True)
    # A penalty on the gradient of some inputs: what else needs none changes nothing.
    for i in range(len(leaves)):
        some = [x.detach().requires_grad_(j == i) for j, x in enumerate(leaves)]

        def penalty(function: Callable[..., Any], some: list[Tensor] = some, i: int = i) -> Tensor:
            loss = total(outputs(function(*some)))
            (gradient,) = torch.autograd.grad(loss, some[i], create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), some[i])[0]

        close(penalty(case.run), penalty(case.reference))


def check_jvp(case: Case) -> None:
    inputs = case.inputs()
    tangents = [x.flip(0).cos() for x in inputs]
    want = torch.func.jvp(case.reference, tuple(inputs), tuple(tangents))
    close(torch.func.jvp(case.run, tuple(inputs), tuple(tangents)), want)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        pairs = [forward_ad.unpack_dual(x) for x in outputs(case.run(*duals))]
        close([x.tangent for x in pairs], outputs(want[1]))


def check_vmap(case: Case) -> None:
    inputs = [torch.stack((x, x.cos())) for x in case.inputs()]
    results = torch.vmap(case.run)(*inputs)
    each = [case.run(*(x[i] for x in inputs)) for i in range(2)]
    close(tree_map(lambda *x: torch.stack(x), *each), results)
    first = [x[0] for x in inputs]  # all but the last input shared by the batch
    shared = torch.vmap(case.run, in_dims=(*[None] * (len(inputs) - 1), 0))
    close(shared(*first[:-1], inputs[-1]), tree_map(lambda *x: torch.stack(x), *[
        case.run(*first[:-1], inputs[-1][i]) for i in range(2)
    ]))  # fmt: skip


def check_func(case: Case) -> None:
    """A whole Hessian: forward over reverse over vmap."""
    inputs = case.inputs()
    place = len(inputs) - 1 if len(inputs) < 3 else 1
    if inputs[place].numel() > 100:
        inputs = [x[:, :1] * x for x in inputs]

    def of(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            given = [*inputs[:place], x, *inputs[place + 1 :]]
            return total(outputs(function(*given)))

        return loss

    run, reference = of(case.run), of(case.reference)
    close(torch.func.grad(run)(inputs[place]), torch.func.grad(reference)(inputs[place]))
    if inputs[place].numel() <= 100:
        close(torch.func.hessian(run)(inputs[place]), torch.func.hessian(reference)(inputs[place]))


def check_compile(case: Case) -> None:
    """Compiled under autocast as without: the same dtypes, numbers and gradients."""
    leaves = leaves_of(mixed(case, torch.bfloat16))

    def run(*x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return case.run(*x)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = outputs(compiled(*leaves)), outputs(run(*leaves))
    close(got, want)
    found, wanted = (torch.autograd.grad(total(x), leaves) for x in (got, want))
    close(found, wanted)


def check_input(case: Case) -> None:
    """Every floating-point input has its gradient, asked for alone and with the others."""
    inputs = case.inputs()

    def run(*x: Tensor) -> Any:
        return tuple(outputs(case.run(*x)))

    assert gradcheck(run, leaves_of(inputs), fast_mode=True)
    want = gradients(case.reference, leaves_of(inputs))
    for i, x in enumerate(inputs):
        some = [*inputs[:i], x.clone().requires_grad_(), *inputs[i + 1 :]]
        close(torch.autograd.grad(total(run(*some)), some[i])[0], want[i])


CHECKS: dict[str, Callable[[Case], None]] = {
    "autocast bf16": lambda case: check_autocast(case, torch.bfloat16),
    "autocast fp16": lambda case: check_autocast(case, torch.float16),
    "double backward": check_double_backward,
    "jvp": check_jvp,
    "vmap": check_vmap,
    "func": check_func,
    "compile": check_compile,
    "input gradient": check_input,
}


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("operation", [name for name in CASES if CASES[name].shapes])
def test_operation(operation: str, kind: str) -> None:
    CHECKS[kind](CASES[operation])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", BACKWARD)
def test_a_backward_pass_is_not_cast(operation: str, dtype: torch.dtype) -> None:
    inputs = [x.float() for x in BACKWARD[operation].inputs()]
    want = BACKWARD[operation].run(*inputs)
    with torch.autocast("cpu", dtype):
        close(BACKWARD[operation].run(*inputs), want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", sorted(CASES.keys() - INTEGERS - {"blocked_attention"}))
def test_autocast_on_a_gpu(operation: str, dtype: torch.dtype, autocast_of_cuda: Callable) -> None:
    """The dtypes, with tensors that have no data."""
    case = CASES[operation]
    inputs = mixed(case, dtype)
    returned = case.by_hand(inputs, dtype)[-1].dtype
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fakes = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in inputs]
        with autocast_of_cuda(dtype):
            results = outputs(case.run(*fakes))
        assert all(x.device.type == "cuda" and x.dtype == returned for x in results)
        with autocast_of_cuda(dtype), torch.autocast("cpu", torch.bfloat16, enabled=False):
            assert outputs(case.run(*fakes))[0].dtype == returned


@pytest.fixture
def autocast_of_cuda() -> Callable[[torch.dtype], AbstractContextManager[None]]:
    """torch.autocast("cuda"), which refuses to be on where there is no GPU."""

    @contextmanager
    def on(dtype: torch.dtype) -> Iterator[None]:
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])

    return on


@pytest.mark.parametrize("operation", sorted(CASES.keys() - INTEGERS - {"attention", "fbank"}))
def test_training_uses_the_formula(operation: str) -> None:
    """Where data needs no gradient: the plain form would be right, but slower."""
    case = CASES[operation]
    named = zip(case.shapes, leaves_of(case.inputs()), strict=True)
    results = outputs(case.run(*(x.requires_grad_(name not in case.data) for name, x in named)))
    node = type(results[0].grad_fn).__name__.replace("_", "").lower()
    wanted = operation.replace("_", "")
    assert node in (f"generatedbackwardforssast{wanted}defaultbackward", f"{wanted}backward")


def test_masks_have_no_floats() -> None:
    assert {"draw_masks", "noise_rows"} == INTEGERS
    for name in INTEGERS:
        want = CASES[name].run()
        with torch.autocast("cpu", torch.bfloat16):
            assert all(a.equal(b) for a, b in zip(CASES[name].run(), want, strict=True))
    columns = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: torch.ops.ssast.draw_masks(x, x, x, x, x, 0, 0, "official", 4, 4, 5))(
            columns
        )


def test_every_operation_has_its_case() -> None:
    for module in pkgutil.iter_modules(ssast.kernels.__path__):
        importlib.import_module(f"ssast.kernels.{module.name}")
    names = {name for name in RULES if not name.startswith("of_a_test")}
    assert names == CASES.keys() | BACKWARD.keys()


def test_the_documented_table() -> None:
    text = (ROOT / "docs/kernels.md").read_text().split("## Autocast and derivatives")[1]
    text = text.split("## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    table = {cells[0].strip("`"): cells[1:] for cells in rows}
    assert table.keys() == CASES.keys() - {"blocked_attention", "efficient_attention"}
    for name, (computes_in, *_, second) in table.items():
        case = CASES[name]
        assert computes_in == case.computes_in, name
        wanted = "none" if not case.shapes else "an error, or `math`" if case.second else "yes"
        assert second == wanted, name
