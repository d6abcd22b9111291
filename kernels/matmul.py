"""Float32 matmuls on a CPU by the fastest library that is exact.

PyTorch uses MKL, which runs its AVX2 code on processors that are not Intel's. oneDNN runs AVX-512
on all that have it: 2.2 times as fast on an AMD Zen 5. PyTorch uses oneDNN where factors may be
rounded to bfloat16, and oneDNN rounds them only where that is faster: on CPUs with AMX.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_ROUNDING = 1e-5  # relative; the error is 3e-7 in float32, 3e-3 with factors in bfloat16


def onednn_is_faster() -> bool:
    """Return whether this CPU has AVX-512 that MKL leaves unused and oneDNN uses."""
    if not torch.backends.mkldnn.is_available():
        return False
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_f")) and "intel" not in str(cpu.get("cpu_name", "intel")).lower()


def multiplies_bf16() -> bool:
    """Return whether this CPU has instructions that multiply bf16, AVX512-BF16 or AMX."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def is_exact() -> bool:
    """Try whether matmuls are exact to float32 with the current settings.

    Covers a linear layer with its gradients and a batched matmul, in shapes that are large enough
    for every kernel of the library.
    """
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=generator) for s in ((520, 192), (576, 192)))
    y = x @ w.T
    heads = torch.randn(3, 258, 64, generator=generator)
    pairs = [(x, w.T), (y, w), (y.T, x), (heads, heads.transpose(1, 2))]
    for left, right in pairs:
        truth = left.double() @ right.double()
        if ((left @ right).double() - truth).norm() > _ROUNDING * truth.norm():
            return False
    return True


@cache
def _is_usable() -> bool:
    if not onednn_is_faster():
        return False
    with _allowed():
        return is_exact()


def _settings() -> Any:
    backend: Any = torch.backends.mkldnn  # where torch puts its settings is hidden from mypy
    return backend.matmul


@contextmanager
def _allowed() -> Iterator[None]:
    settings = _settings()
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@contextmanager
def fast_matmul() -> Iterator[bool]:
    """Use oneDNN for float32 matmuls in the block, where that is faster and a trial was exact.

    Holds for all threads of the process. Yields whether oneDNN is used.
    """
    if not _is_usable():
        yield False
        return
    with _allowed():
        yield True


def is_fast() -> bool:
    """Return whether float32 matmuls are oneDNN's now."""
    return _settings().fp32_precision == "bf16" and _is_usable()
