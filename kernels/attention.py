"""Softmax attention through one function, by the fastest kernel that runs and is right.

    out = softmax(q k^T / sqrt(D_h)) v                   Vaswani et al. 2017

On a CUDA device the candidates of :data:`CANDIDATES` are tried once per dtype, in their order, on
514 tokens with gradients; the first whose numbers agree with the definition is used from then on.
flash-attn (Dao 2023; Shah et al. 2024) is an optional dependency. PyTorch's choice is not left to
itself: it depends on versions, and cuDNN before 9.15 is wrong on Hopper for lengths that are no
multiple of 128, such as 514.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssast.kernels.blocked_attention import blocked_attention
from ssast.kernels.launch import architecture
from ssast.kernels.matmul import is_fast

Backend = Literal[
    "flash-attn-3", "flash-attn-2", "cudnn", "flash", "efficient", "math", "sdpa", "blocked"
]

# In half precision by architecture, the fastest first; later ones are as the last.
CANDIDATES: dict[int, tuple[Backend, ...]] = {
    80: ("flash-attn-2", "flash", "efficient", "math"),
    90: ("flash-attn-3", "cudnn", "flash-attn-2", "flash", "efficient", "math"),
    100: ("cudnn", "flash-attn-2", "flash", "efficient", "math"),
}
IN_FULL_PRECISION: tuple[Backend, ...] = ("efficient", "math")
UNTRIED = ("sdpa", "blocked")  # those of CPUs

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Of PyTorch's kernels these take a mask.
_FOR_MASKS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_CUDNN_RIGHT_AT_ANY_LENGTH = 91500
_TRIAL_LENGTH, _TRIAL_ERROR = 514, 0.02


class RealKeys(NamedTuple):
    """Which keys of each clip count; the rest is padding. Made once for a batch."""

    real: Tensor  # [B, L] bool, at least one in each row
    offsets: Tensor  # [B + 1] int32, where each clip begins among the keys that count
    places: Tensor  # [number of them] int64, in [B * L]


def real_keys(real: Tensor) -> RealKeys:
    """What attention needs to know of the padding.

    Waits for the device once: how many keys there are in all decides on shapes.

    Args:
        real: [B, L] bool, False for padding; at least one of each row is True.
    """
    offsets = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    return RealKeys(real, offsets, real.flatten().nonzero().flatten())


def attention_reference(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
    """The definition, with the probabilities in memory; ``real`` [B, L'] bool marks the keys."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None], float("-inf"))
        v = v.masked_fill(~real[..., None, None], 0)
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, keys: RealKeys | None) -> Tensor:
    mask = None
    if keys is not None:
        mask, k, v = keys.real[:, None, None], _finite(k, keys), _finite(v, keys)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def _finite(x: Tensor, keys: RealKeys) -> Tensor:
    return x.masked_fill(~keys.real[..., None, None], 0)


def _blocked(q: Tensor, k: Tensor, v: Tensor, keys: RealKeys | None) -> Tensor:
    if keys is None:
        return blocked_attention(q, k, v)
    return blocked_attention(q, _finite(k, keys), _finite(v, keys), keys.real)


def _flash_attn(
    dense: Callable, ragged: Callable, q: Tensor, k: Tensor, v: Tensor, keys: RealKeys | None
) -> Tensor:
    """Versions 2 and 3 of flash-attn, whose arguments have the same names."""
    if keys is None:
        out = dense(q, k, v)
    else:
        B, queries = q.shape[:2]
        out = ragged(
            q.flatten(0, 1),
            *(x.flatten(0, 1)[keys.places] for x in (k, v)),
            cu_seqlens_q=torch.arange(B + 1, device=q.device, dtype=torch.int32) * queries,
            cu_seqlens_k=keys.offsets,
            max_seqlen_q=queries,
            max_seqlen_k=k.shape[1],
        )
    out = out[0] if isinstance(out, tuple) else out  # early versions 3 add the logsumexp
    return out.view(q.shape)


def run_backend(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, keys: RealKeys | None = None
) -> Tensor:
    """:func:`attention` by one backend, whether or not it is the best."""
    if backend == "flash-attn-3":
        import flash_attn_interface as flash3

        return _flash_attn(flash3.flash_attn_func, flash3.flash_attn_varlen_func, q, k, v, keys)
    if backend == "flash-attn-2":
        import flash_attn as flash2

        return _flash_attn(flash2.flash_attn_func, flash2.flash_attn_varlen_func, q, k, v, keys)
    if backend == "sdpa":
        return _sdpa(q, k, v, keys)
    if backend == "blocked":
        return _blocked(q, k, v, keys)
    with sdpa_kernel([_SDPA[backend]] if keys is None else _FOR_MASKS):
        return _sdpa(q, k, v, keys)


def _products_are_fast(dtype: torch.dtype) -> bool:
    """Whether a CPU's matrix products leave behind those inside PyTorch's attention."""
    if dtype == torch.bfloat16:  # with AMX, PyTorch's attention has them as well
        cpu = torch.cpu.get_capabilities()
        return bool(cpu.get("avx512_bf16")) and not cpu.get("amx_tile")
    return dtype == torch.float32 and is_fast()


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    """What may run there, the fastest first."""
    if device.type != "cuda":
        return ("blocked",) if _products_are_fast(dtype) else ("sdpa",)
    if dtype not in (torch.bfloat16, torch.float16):
        return IN_FULL_PRECISION
    return CANDIDATES[max(a for a in CANDIDATES if a <= max(80, architecture(device)))]


def objection(backend: Backend, device: torch.device, dtype: torch.dtype) -> str:
    """Why a candidate is not used; empty if nothing speaks against it."""
    if backend == "cudnn" and (torch.backends.cudnn.version() or 0) < _CUDNN_RIGHT_AT_ANY_LENGTH:
        return f"cuDNN {torch.backends.cudnn.version()} is older than {_CUDNN_RIGHT_AT_ANY_LENGTH}"
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = torch.randn(4, 2, _TRIAL_LENGTH, 2, 64, generator=generator).to(device)
    with torch.enable_grad():
        exact = [x.to(dtype).double().requires_grad_() for x in (q, k, v)]
        tried = [x.detach().to(dtype).requires_grad_() for x in exact]
        try:
            out = run_backend(backend, *tried)
            gradients = torch.autograd.grad(out, tried, upstream.to(dtype))
        except (ImportError, RuntimeError) as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        want = attention_reference(*exact)
        wanted = torch.autograd.grad(want, exact, upstream.to(dtype).double())
    for got, true in zip((out, *gradients), (want, *wanted), strict=True):
        error_of_trial = ((got.double() - true).abs().max() / true.abs().max()).item()
        if not error_of_trial < _TRIAL_ERROR:
            return f"wrong at {_TRIAL_LENGTH} tokens, relative error {error_of_trial:.1e}"
    return ""


@cache
def attention_trials(device: torch.device, dtype: torch.dtype) -> dict[Backend, str]:
    """What was tried for tensors of this device and dtype, up to the one that is used.

    Returns:
        Candidate to objection, in the order of trial; the last one has none, it is "".

    Raises:
        RuntimeError: No candidate works.
    """
    trials: dict[Backend, str] = {}
    for backend in candidates(device, dtype):
        trials[backend] = "" if backend in UNTRIED else objection(backend, device, dtype)
        if not trials[backend]:
            return trials
    raise RuntimeError(f"no attention works on {device} in {dtype}: {trials}")


@torch.compiler.assume_constant_result
def attention_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """What :func:`attention` uses for tensors of this device and dtype."""
    if device.type == "cpu":
        return candidates(device, dtype)[0]  # it depends on settings: nothing to remember
    if not torch.cuda.is_available():
        return "math"  # shapes alone are asked for
    return next(reversed(attention_trials(device, dtype)))


def attention(q: Tensor, k: Tensor, v: Tensor, keys: RealKeys | None = None) -> Tensor:
    """Attention of every query to every key that counts.

    Args:
        q: [B, L, H, D_h].
        k: [B, L', H, D_h].
        v: [B, L', H, D_h].
        keys: Which of them count; all do if None. What stands in the others has no effect, and
            they have no gradient.

    Returns:
        [B, L, H, D_h].
    """
    if torch.compiler.is_exporting():  # a file for other programs has PyTorch's operations alone
        return run_backend("sdpa", q, k, v, keys)
    return run_backend(attention_backend(q.device, q.dtype), q, k, v, keys)
