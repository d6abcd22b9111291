"""Attention against its definition, and the choice of its backend."""

import pytest
import torch
from compare import DTYPES, REGIMES, assert_as_good_as_reference, random_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssast.kernels import attention as module
from ssast.kernels.attention import attention, attention_backend, attention_reference

# B, queries, keys, heads, width of a head
SHAPES = [(2, 33, 33, 3, 64), (1, 5, 37, 2, 16), (3, 1, 9, 1, 8), (2, 7, 1, 2, 4), (1, 3, 3, 1, 5)]


# PyTorch's CPU kernel takes the exponential to 20 bits and sums a row piece by piece. Its backward
# pass recomputes exp(score - logsumexp); around a mean of 100 both are near 1e5, known to 2**-8.
ROUNDING = {"unit": 2**-17, "mean_100": 2**-8, "std_1e-3": 2**-17}


def assert_good(shape: tuple[int, ...], regime: str, dtype: torch.dtype) -> None:
    assert_as_good_as_reference(
        attention,
        attention_reference,
        queries_keys_values(shape, regime),
        dtype,
        slack=5.0,
        rounding=ROUNDING[regime],
    )


def queries_keys_values(shape: tuple[int, ...], regime: str) -> list[Tensor]:
    B, queries, keys, heads, width = shape
    return random_inputs(
        (B, queries, heads, width), (B, keys, heads, width), (B, keys, heads, width), regime=regime
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, ...], regime: str, dtype: torch.dtype) -> None:
    assert_good(shape, regime, dtype)


def test_equals_the_definition_at_the_length_of_a_clip() -> None:
    assert_good((1, 514, 514, 2, 64), "unit", torch.float32)


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in queries_keys_values((1, 3, 4, 2, 3), "unit")]
    assert torch.autograd.gradcheck(attention, inputs)


def test_reads_one_packed_projection() -> None:
    """Queries, keys and values may be views of one tensor, as the model's are."""
    packed = random_inputs((2, 9, 3, 2, 8), regime="unit")[0].requires_grad_()
    views = packed.unbind(2)
    got, want = attention(*views), attention_reference(*views)
    torch.testing.assert_close(got, want)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(0)).double()
    (a,) = torch.autograd.grad(got, packed, upstream)
    (b,) = torch.autograd.grad(want, packed, upstream)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_backend(
    monkeypatch: pytest.MonkeyPatch, installed: bool, device: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "_flash_attn_installed", lambda: installed)
    flash = installed and device == "cuda" and dtype == torch.bfloat16
    expected = "flash-attn" if flash else "sdpa"
    assert attention_backend(torch.device(device), dtype) == expected


def test_fake_tensors_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_flash_attn_installed", lambda: False)
    with FakeTensorMode():
        q = torch.empty(2, 5, 3, 8, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 9, 3, 8, device="cuda", dtype=torch.bfloat16)
        out = attention(q, k, k)
    assert tuple(out.shape) == (2, 5, 3, 8)
    assert out.device.type == "cuda" and out.dtype == torch.bfloat16


def test_compiles_without_a_graph_break() -> None:
    inputs = [x.requires_grad_() for x in queries_keys_values((2, 5, 9, 2, 8), "unit")]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(attention(*inputs).square().sum(), inputs)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
