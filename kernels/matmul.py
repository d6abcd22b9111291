"""Float32 matrix products on a CPU by the fastest library that is exact.

PyTorch gives them to MKL, which runs its AVX2 code on processors that are not Intel's. oneDNN runs
AVX-512 on all that have it: 2.2 times as fast on an AMD Zen 5. PyTorch takes it where products may
be rounded to bfloat16, and oneDNN then rounds where that is faster, which is with AMX alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_ROUNDING = 1e-5  # relative; float32 products err by 3e-7, those of bfloat16 factors by 3e-3


def onednn_is_faster() -> bool:
    """Whether MKL leaves AVX-512 unused here, and oneDNN does not."""
    if not torch.backends.mkldnn.is_available():
        return False
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_f")) and "intel" not in str(cpu.get("cpu_name", "intel")).lower()


def is_exact() -> bool:
    """Whether products are float32's, with the settings of now: those of a layer and its gradients.

    Shapes are large enough for every kernel of the library.
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
def _may_be_used() -> bool:
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
    """Float32 products by oneDNN inside, where that is faster and a trial was exact.

    Holds for all threads of the process. Gives whether they are.
    """
    if not _may_be_used():
        yield False
        return
    with _allowed():
        yield True


def is_fast() -> bool:
    """Whether float32 products are oneDNN's now."""
    return _settings().fp32_precision == "bf16" and _may_be_used()
