"""Attention by batched products of whole heads: a backend for CPUs."""

import pytest
import torch
from attention_cases import (
    ROUNDING,
    SHAPES,
    assert_ignores_padding,
    queries_keys_values,
)
from compare import DTYPES, REGIMES, assert_as_good_as_reference

from ssast.kernels import attention as backends
from ssast.kernels import blocked_attention as module
from ssast.kernels.attention import attention, attention_backend, attention_reference, run_backend
from ssast.kernels.blocked_attention import _attention, blocked_attention
from ssast.kernels.matmul import fast_matmul

CPU = torch.device("cpu")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 130, 130, 3, 64), (0, 4, 4, 2, 8)], ids=str)
def test_equals_the_definition(
    shape: tuple[int, ...], regime: str, dtype: torch.dtype, fast: bool
) -> None:
    inputs = queries_keys_values(shape, regime)
    if not fast:
        check(inputs, dtype, regime)
        return
    with fast_matmul():
        check(inputs, dtype, regime)


def check(inputs: list[torch.Tensor], dtype: torch.dtype, regime: str) -> None:
    assert_as_good_as_reference(
        blocked_attention,
        attention_reference,
        inputs,
        dtype,
        slack=5.0,
        rounding=0.0 if not inputs[0].numel() else ROUNDING[regime],
    )


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [x.float() for x in queries_keys_values((3, 9, 9, 5, 8), "unit")]
    whole = outputs_and_gradients(inputs)
    for scores in (1, 2 * 81, 4 * 81):  # also blocks that end in the middle of a clip
        monkeypatch.setattr(module, "BLOCK", scores)
        for got, want in zip(outputs_and_gradients(inputs), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_probabilities_change_no_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [x.to(dtype) for x in queries_keys_values((3, 9, 9, 5, 8), "unit")]
    monkeypatch.setattr(module, "BLOCK", 4 * 81)
    whole = outputs_and_gradients(inputs)
    monkeypatch.setattr(module, "KEPT", 3 * 5 * 81 - 1)
    for got, want in zip(outputs_and_gradients(inputs), whole, strict=True):
        assert torch.equal(got, want)


def test_probabilities_are_kept_for_a_backward_pass_where_they_are_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaves = [x.requires_grad_() for x in queries_keys_values((3, 9, 9, 5, 8), "unit")]

    def kept_bytes() -> int:
        sizes = list[int]()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.nbytes) or x, lambda x: x
        ):
            blocked_attention(*leaves)
        return max(sizes, default=0)

    monkeypatch.setattr(module, "KEPT", 3 * 5 * 81)
    assert kept_bytes() == 3 * 5 * 81 * 8
    monkeypatch.setattr(module, "KEPT", 3 * 5 * 81 - 1)
    assert kept_bytes() == leaves[0].nbytes
    with torch.no_grad():
        assert kept_bytes() == 0


def outputs_and_gradients(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = blocked_attention(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def test_gradcheck_and_opcheck() -> None:
    inputs = [x.requires_grad_() for x in queries_keys_values((2, 3, 4, 2, 3), "unit")]
    assert torch.autograd.gradcheck(blocked_attention, inputs)
    real = torch.tensor([[True, True, False, True], [False, True, False, False]])
    for mask, keep in ((None, False), (real, True)):
        torch.library.opcheck(_attention, (*inputs, mask, keep))


def test_padding_has_no_effect() -> None:
    assert_ignores_padding(lambda *args: run_backend("blocked", *args))


def test_reads_one_packed_projection() -> None:
    packed = torch.randn(2, 9, 3 * 16, generator=torch.Generator().manual_seed(0)).double()
    leaf = packed.requires_grad_()
    views = [x.unflatten(2, (2, 8)) for x in leaf.chunk(3, 2)]
    got, want = blocked_attention(*views), attention_reference(*views)
    torch.testing.assert_close(got, want)
    (a,) = torch.autograd.grad(got.square().sum(), leaf)
    (b,) = torch.autograd.grad(want.square().sum(), leaf)
    torch.testing.assert_close(a, b)


def test_is_used_where_matmul_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(**cpu: bool) -> str:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
        return attention_backend(CPU, torch.bfloat16)

    assert found(avx512_bf16=True) == "blocked"
    assert found(avx512_bf16=True, amx_tile=True) == "blocked-or-sdpa"
    assert found() == "sdpa"
    monkeypatch.undo()
    assert attention_backend(CPU, torch.float32) == "sdpa"
    with fast_matmul() as fast:
        assert attention_backend(CPU, torch.float32) == ("blocked" if fast else "sdpa")
        assert attention_backend(CPU, torch.float64) == "sdpa"


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_or_sdpa(monkeypatch: pytest.MonkeyPatch, fits: bool, trained: bool) -> None:
    """With AMX: in training, where the probabilities are kept."""
    inputs = [x.requires_grad_(trained) for x in queries_keys_values((2, 9, 9, 2, 8), "unit")]
    monkeypatch.setattr(module, "KEPT", 2 * 2 * 9 * 9 - (not fits))
    calls = []

    def counted(*inputs: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return blocked_attention(*inputs)

    monkeypatch.setattr(backends, "blocked_attention", counted)
    got = run_backend("blocked-or-sdpa", *inputs)
    assert len(calls) == (fits and trained)
    torch.testing.assert_close(got, attention_reference(*inputs).to(got.dtype))
    with torch.no_grad():
        run_backend("blocked-or-sdpa", *inputs)
    assert len(calls) == (fits and trained)


def test_compiles_without_a_graph_break() -> None:
    inputs = [x.requires_grad_() for x in queries_keys_values((2, 5, 9, 2, 8), "unit")]
    compiled = torch.compile(blocked_attention, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(attention(*inputs).square().sum(), inputs)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    torch.testing.assert_close(got, want)
