"""The interpreter is as strict as a GPU: roundings, bounds, order of programs."""

import pytest
import torch
import triton
import triton.language as tl

from ssast.kernels.aot import compile_launch, recorded
from ssast.kernels.interpret import MemoryFault, interpreter_mode


@triton.jit
def _row_sums(x, K: tl.constexpr):
    return tl.sum(x, 1)


@triton.jit
def _matmul(
    a,
    b,
    out,
    sums,
    M,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k, n = tl.arange(0, K), tl.arange(0, N)
    x = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None], other=0.0)
    y = tl.load(b + k[:, None] * N + n[None, :])
    product = tl.dot(x, y, input_precision=PRECISION)
    tl.store(
        out + m[:, None] * N + n[None, :],
        product.to(out.dtype.element_ty),
        mask=(m < M)[:, None],
    )
    tl.store(sums + m, _row_sums(x.to(tl.float32), K), mask=m < M)


def matmul(dtype: torch.dtype, precision: str = "ieee") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((40, 32), (32, 16)))
    out, sums = torch.empty(40, 16), torch.empty(40)
    with interpreter_mode():
        _matmul[(3,)](a, b, out, sums, 40, K=32, N=16, BLOCK=16, PRECISION=precision, num_warps=4)
    return out, a.double() @ b.double(), sums, a.double().sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_exact_in_float32(dtype: torch.dtype) -> None:
    out, want, sums, want_sums = matmul(dtype)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=4e-6)
    torch.testing.assert_close(sums.double(), want_sums, rtol=0, atol=4e-6)


def test_tf32_has_ten_bits_and_three_products_make_up_for_it() -> None:
    rough, want, *_ = matmul(torch.float32, "tf32")
    fine, *_ = matmul(torch.float32, "tf32x3")
    scale = want.abs().max()
    assert 2**-13 < (rough - want).abs().max() / scale < 2**-8
    assert (fine - want).abs().max() / scale < 2**-20


@triton.jit
def _cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


def test_rounds_to_bfloat16_as_torch_does() -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    x = bits.int().view(torch.float32)
    x[:4] = torch.tensor([float("nan"), float("inf"), 1 + 2**-8, 1 + 3 * 2**-8])  # two ties
    y = torch.empty(4096, dtype=torch.bfloat16)
    with interpreter_mode():
        _cast[(1,)](x, y, N=4096)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(4096)
    with interpreter_mode():
        _cast[(1,)](y, back, N=4096)
    torch.testing.assert_close(back, y.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _arithmetic(x, y, KIND: tl.constexpr):
    i = tl.arange(0, 16)
    v = tl.load(x + i)
    if KIND == "add":
        v = v + v
    elif KIND == "exp":
        v = tl.exp(v.to(tl.float32)).to(tl.bfloat16) * v
    elif KIND == "reduce":
        v = v.to(tl.float32) + tl.reduce(v, 0, _larger)
    elif KIND == "fma":
        v = tl.fma(v, v, v)
    tl.store(y + i, tl.where(i < 8, v, v))


@pytest.mark.parametrize("kind", ["add", "exp", "reduce", "fma"])
def test_refuses_bfloat16_arithmetic(kind: str) -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    with interpreter_mode():
        _arithmetic[(1,)](x, y, KIND="none")
        assert torch.equal(x, y)
        with pytest.raises(TypeError, match="cast to float32 first"):
            _arithmetic[(1,)](x, y, KIND=kind)


@triton.jit
def _larger_of(x, y, out, PROPAGATE: tl.constexpr):
    i = tl.arange(0, 4)
    a, b = tl.load(x + i), tl.load(y + i)
    if PROPAGATE:
        tl.store(out + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    else:
        tl.store(out + i, tl.maximum(a, b))


@pytest.mark.parametrize("propagate", [False, True])
def test_maximum_treats_nan_as_a_gpu_does(propagate: bool) -> None:
    nan = float("nan")
    x, y, out = (
        torch.tensor([1.0, nan, 2.0, nan]),
        torch.tensor([nan, 3.0, 1.0, nan]),
        torch.empty(4),
    )
    with interpreter_mode():
        _larger_of[(1,)](x, y, out, PROPAGATE=propagate)
    want = [nan, nan, 2.0, nan] if propagate else [1.0, 3.0, 2.0, nan]
    torch.testing.assert_close(out, torch.tensor(want), equal_nan=True)


@triton.jit
def _shift(x, y, shift_x, shift_y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i + shift_y, tl.load(x + i + shift_x, mask=i < N), mask=i < N)


@pytest.mark.parametrize(
    ("shift_x", "shift_y", "what"),
    [
        (0, 0, None),
        (1, 0, "a load 4 bytes past the end"),
        (0, 1, "a store 4 bytes past the end"),
        (-1, 0, "a load"),
        (0, -1, "a store"),
    ],
)
def test_refuses_access_out_of_bounds(shift_x: int, shift_y: int, what: str | None) -> None:
    """Also where the neighbour is memory of the same allocation."""
    x, y = torch.arange(128.0)[32:72], torch.zeros(128)[64:104]
    with interpreter_mode():
        if what is None:
            _shift[(3,)](x, y, shift_x, shift_y, 40, BLOCK=16)
            assert torch.equal(x, y)
            return
        with pytest.raises(MemoryFault, match=what):
            _shift[(3,)](x, y, shift_x, shift_y, 40, BLOCK=16)


@triton.jit
def _race(x, y, KIND: tl.constexpr):
    p, i = tl.program_id(0), tl.arange(0, 16)
    if KIND == "write":
        tl.store(y + i, i + p)
    elif KIND == "read":
        tl.store(x + 16 * p + i, tl.load(x + 16 + i))
    elif KIND == "stale":
        tl.store(x + 16 * p + i, tl.load(x + 16 * (1 - p) + i))
    elif KIND == "twice":
        tl.store(y + i // 2, i)
    else:
        tl.store(y + 16 * p + i, tl.load(x + i))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("none", None),
        ("write", "writes what another one has written"),
        ("read", "writes what another one has read"),
        ("stale", "reads what another one has written"),
        ("twice", "writes one place twice"),
    ],
)
def test_refuses_results_that_depend_on_the_order(kind: str, what: str | None) -> None:
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    with interpreter_mode():
        if what is None:
            _race[(2,)](x, y, KIND=kind)
            assert y.tolist() == [*range(16), *range(16)]
            return
        with pytest.raises(MemoryFault, match=what):
            _race[(2,)](x, y, KIND=kind)


def test_refuses_an_empty_grid() -> None:
    x = torch.zeros(4)
    with interpreter_mode(), pytest.raises(ValueError, match="empty grid"):
        _shift[(0,)](x, x, 0, 0, 4, BLOCK=16)


def test_leaves_nothing_behind() -> None:
    """After an interpreted launch, and after one that failed, kernels compile as before."""
    test_refuses_access_out_of_bounds(1, 0, "a load 4 bytes past the end")
    a, out = torch.empty(64, 32, device="meta"), torch.empty(64, 16, device="meta")
    with recorded() as launches:
        _matmul[(4,)](a, a, out, out, 64, K=32, N=16, BLOCK=16, PRECISION="ieee", num_warps=2)
    report = compile_launch(launches[0], 90)
    assert report.registers > 0 and report.num_warps == 2
    assert type(tl.arange).__name__ == "function" and tl.range.__module__ == "triton.language.core"
