"""Every kernel, compiled for GPUs that are not here: registers, memory, instructions."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from paths import ROOT

from ssast.benchmarks.operations.kernels import DTYPES, compile_kernels
from ssast.benchmarks.operations.problems import PROBLEMS
from ssast.benchmarks.operations.report import Compiled, aot_markdown, aot_summary
from ssast.kernels.aot import ARCHITECTURES, Launch, Report, compile_launch, recorded

PAGE = ROOT / "docs" / "kernels.md"

# Kernels that multiply matrices, and those that have nothing to load in runs of 16 bytes.
MATMULS = {
    "_patch_embed_kernel",
    "_weight_grad_kernel",
    "_row_normalisers_kernel",
    "_info_nce_kernel",
    "_fbank_kernel",
}
SCALAR_LOADS = {"_masks_kernel", "_noise_rows_kernel"}


@triton.jit
def _plain(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) * 2.0)


@triton.jit
def _strided(x, y, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * stride))


@triton.jit
def _spilling(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(y + i, v / tl.sum(v, 0))


@triton.jit
def _atomic(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


@triton.jit
def _product(x, y, BLOCK: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, K)
    a = tl.load(x + i[:, None] * K + k[None, :])
    tl.store(y + i[:, None] * BLOCK + i[None, :], tl.dot(a, tl.trans(a)))


def report(run: Callable[..., None], arch: int) -> Report:
    with recorded() as launches:
        run()
    return compile_launch(launches[0], arch)


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_report_shows_spills_atomics_and_narrow_loads(arch: int) -> None:
    x, y = on_meta(1 << 20), on_meta(1 << 20)
    good = report(lambda: _plain[(1024,)](x, y, BLOCK=1024), arch)
    assert (good.spill_bytes, good.atomics, good.tensor_core_ops) == (0, 0, 0)
    assert good.loads == good.load128 == 2 and good.ctas_per_sm >= 8 and good.arch == f"sm_{arch}"
    assert report(lambda: _plain[(1024,)](x[1:], y[1:], BLOCK=1024), arch).load128 in (0, 2)
    scalar = report(lambda: _strided[(1024,)](x, y, 3, BLOCK=1024), arch)
    assert scalar.load128 == 0 and scalar.loads == 8
    spilling = report(lambda: _spilling[(1,)](x, y, BLOCK=1 << 14, num_warps=1), arch)
    assert spilling.spill_bytes > 0
    assert report(lambda: _atomic[(1,)](x, y, BLOCK=1024), arch).atomics == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_report_knows_tensor_cores_and_the_limit_of_shared_memory(arch: int) -> None:
    half, out = on_meta(1 << 20, dtype=torch.bfloat16), on_meta(1 << 20)
    product = report(lambda: _product[(1,)](half, out, BLOCK=128, K=64, num_warps=8), arch)
    assert product.tensor_core_ops > 0 and product.spill_bytes == 0
    assert 0 < product.shared_bytes <= product.shared_limit_bytes and product.ctas_per_sm >= 1
    # Triton compiles it all the same; a device would refuse it.
    large = report(lambda: _product[(1,)](half, out, BLOCK=256, K=512, num_warps=8), arch)
    assert large.shared_bytes > large.shared_limit_bytes and large.ctas_per_sm == 0


def test_arguments_are_specialised_as_in_a_launch() -> None:
    """A stride of 1 is a constant, one that 16 divides keeps loads wide."""
    x, y = on_meta(1 << 20), on_meta(1 << 20)
    with recorded() as launches:
        _strided[(4,)](x, y, 1, BLOCK=1024)
    assert isinstance(launches[0], Launch) and launches[0].grid == (4,)
    assert compile_launch(launches[0], 90).load128 == 2


@pytest.fixture(scope="session")
def compiled() -> list[Compiled]:
    return compile_kernels(list(PROBLEMS), ["base", "large"], list(DTYPES.values()))


def lines(rows: list[Compiled]) -> str:
    return "\n" + aot_markdown(rows)


@pytest.mark.slow
def test_nothing_spills_and_everything_fits(compiled: list[Compiled]) -> None:
    assert {c.report.arch for c in compiled} == {f"sm_{a}" for a in ARCHITECTURES}
    bad = [c for c in compiled if c.report.spill_bytes or not c.report.ctas_per_sm]
    assert not bad, lines(bad)
    # Tiles that are too large for sm_100 may compile, without a word, to next to nothing.
    empty = [c for c in compiled if c.report.loads < 2 or c.report.instructions < 100]
    assert not empty, lines(empty)


@pytest.mark.slow
def test_matmuls_run_on_tensor_cores(compiled: list[Compiled]) -> None:
    assert {c.kernel for c in compiled} >= MATMULS
    bad = [c for c in compiled if c.kernel in MATMULS and not c.report.tensor_core_ops]
    assert not bad, lines(bad)


@pytest.mark.slow
def test_loads_are_wide_and_nothing_is_atomic(compiled: list[Compiled]) -> None:
    narrow = [c for c in compiled if c.kernel not in SCALAR_LOADS and not c.report.load128]
    atomic = [c for c in compiled if c.report.atomics]
    assert not narrow + atomic, lines(narrow + atomic)


@pytest.mark.slow
def test_the_readme_shows_what_the_kernels_compile_to(compiled: list[Compiled]) -> None:
    shown = [c for c in compiled if c.size != "large"]
    assert aot_summary(shown) in PAGE.read_text()
