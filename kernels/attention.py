"""Softmax attention through one function, by the fastest backend that runs and is right.

    out = softmax(q k^T / sqrt(D_h)) v                   Vaswani et al. 2017

On a CUDA device the candidates of :data:`CANDIDATES` are tried once per dtype, in their order, on
514 tokens with gradients; the first whose numbers agree with the reference is used from then on.
flash-attn (Dao 2023; Shah et al. 2024) is an optional dependency. The choice is not left to
PyTorch: it depends on versions, and cuDNN before 9.15 is wrong on Hopper for lengths that are not a
multiple of 128, such as 514.
"""

from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssast.kernels.autocast import autocast_rule
from ssast.kernels.blocked_attention import attention_reference, blocked_attention, is_kept
from ssast.kernels.efficient_attention import efficient_attention
from ssast.kernels.launch import architecture
from ssast.kernels.linear import joined_view
from ssast.kernels.matmul import is_fast
from ssast.kernels.operation import is_transformed

Backend = Literal[
    "flash-attn-3",
    "flash-attn-2",
    "cudnn",
    "flash",
    "efficient",
    "math",
    "sdpa",
    "blocked",
    "blocked-or-sdpa",
]

# For half precision, by architecture, fastest first; newer architectures use the last row.
CANDIDATES: dict[int, tuple[Backend, ...]] = {
    80: ("flash-attn-2", "flash", "efficient", "math"),
    90: ("flash-attn-3", "cudnn", "flash-attn-2", "flash", "efficient", "math"),
    100: ("cudnn", "flash-attn-2", "flash", "efficient", "math"),
}
FULL_PRECISION: tuple[Backend, ...] = ("efficient", "math")
CPU_BACKENDS = ("sdpa", "blocked", "blocked-or-sdpa")  # need no trial

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_TAKE_A_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_MIN_CUDNN = 91500  # right at any length
_TRIAL_LENGTH, _MAX_TRIAL_ERROR = 514, 0.02


class PaddingMask(NamedTuple):
    """Which keys of each clip are valid and which are padding; made once for a batch."""

    valid: Tensor  # [B, L] bool, at least one in each row
    cu_seqlens: Tensor  # [B + 1] int32, where each clip begins among the valid keys
    indices: Tensor  # [number of valid keys] int64, in [B * L]


def make_padding_mask(valid: Tensor) -> PaddingMask:
    """Prepare a padding mask for all backends.

    Waits for the device once: shapes depend on the number of valid keys.

    Args:
        valid: [B, L] bool, False for padding; at least one of each row is True.
    """
    cu_seqlens = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).int()
    return PaddingMask(valid, cu_seqlens, valid.flatten().nonzero().flatten())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, padding_mask: PaddingMask | None) -> Tensor:
    mask = None
    if padding_mask is not None:
        mask = padding_mask.valid[:, None, None]
        k, v = _without_padding(k, padding_mask), _without_padding(v, padding_mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def _without_padding(x: Tensor, padding_mask: PaddingMask) -> Tensor:
    # NaN in padding would survive a probability of 0.
    return x.masked_fill(~padding_mask.valid[..., None, None], 0)


def _blocked(q: Tensor, k: Tensor, v: Tensor, padding_mask: PaddingMask | None) -> Tensor:
    if padding_mask is None:
        return blocked_attention(q, k, v)
    k, v = _without_padding(k, padding_mask), _without_padding(v, padding_mask)
    return blocked_attention(q, k, v, padding_mask.valid)


class _NoDerivative(torch.autograd.Function):
    """The gradients of a backward pass; an error for who differentiates them again."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "attention: the second derivative of flash-attn is not implemented; use "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )


class _OnceDifferentiable(torch.autograd.Function):
    """Queries, keys and values as they are, for an operation that has first derivatives alone.

    The mark of that name in torch.autograd.function overlooks gradients that are constants.
    """

    @staticmethod
    def forward(ctx: Any, *qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*qkv)
        return tuple(x.view_as(x) for x in qkv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return _NoDerivative.apply(*grads, *ctx.saved_tensors) if torch.is_grad_enabled() else grads


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        joined = joined_view([x.flatten(2) for x in (q, k, v)])
        assert joined is not None
        return joined.view(*q.shape[:2], 3, *q.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.unbind(2)


def packed_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Return q, k and v as one tensor [B, L, 3, H, D_h] where one linear layer made them.

    Their gradients are views of that tensor's gradient: nothing is copied either way.
    """
    merges = all(x.shape == q.shape and x.stride()[2:] == (x.shape[3], 1) for x in (q, k, v))
    if not merges or joined_view([x.detach().flatten(2) for x in (q, k, v)]) is None:
        return None
    return _Pack.apply(q, k, v)


def _flash_attn(
    package: Any, q: Tensor, k: Tensor, v: Tensor, padding_mask: PaddingMask | None
) -> Tensor:
    """Call flash-attn 2 or 3, whose functions and arguments have the same names."""
    q, k, v = _OnceDifferentiable.apply(q, k, v)
    if padding_mask is None:
        qkv = packed_view(q, k, v)
        if qkv is None:
            out = package.flash_attn_func(q, k, v)
        else:
            out = package.flash_attn_qkvpacked_func(qkv)
    else:
        B, queries = q.shape[:2]
        out = package.flash_attn_varlen_func(
            q.flatten(0, 1),
            *(x.flatten(0, 1)[padding_mask.indices] for x in (k, v)),
            cu_seqlens_q=torch.arange(B + 1, device=q.device, dtype=torch.int32) * queries,
            cu_seqlens_k=padding_mask.cu_seqlens,
            max_seqlen_q=queries,
            max_seqlen_k=k.shape[1],
        )
    out = out[0] if isinstance(out, tuple) else out  # early versions 3 add the logsumexp
    return out.view(q.shape)


def run_backend(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, padding_mask: PaddingMask | None = None
) -> Tensor:
    """Compute :func:`attention` by one backend, whether or not it is the best."""
    if backend == "flash-attn-3":
        import flash_attn_interface as flash3

        return _flash_attn(flash3, q, k, v, padding_mask)
    if backend == "flash-attn-2":
        import flash_attn as flash2

        return _flash_attn(flash2, q, k, v, padding_mask)
    if backend == "blocked-or-sdpa":
        backend = "blocked" if is_kept(q, k, v) else "sdpa"
    if backend == "sdpa":
        return _sdpa(q, k, v, padding_mask)
    if backend == "blocked":
        return _blocked(q, k, v, padding_mask)
    if backend == "efficient" and padding_mask is None and q.shape == k.shape:
        return efficient_attention(q, k, v)
    with sdpa_kernel([_SDPA[backend]] if padding_mask is None else _TAKE_A_MASK):
        return _sdpa(q, k, v, padding_mask)


def _cpu_backend(dtype: torch.dtype) -> Backend:
    """Return the fastest backend on this CPU, by where oneDNN's matmuls are fast."""
    cpu = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16 and cpu.get("amx_tile"):
        # PyTorch's has AMX as well: its forward pass is twice as fast, but the backward pass a
        # third as fast at 66 tokens, and slower wherever `blocked` keeps the probabilities.
        return "blocked-or-sdpa"
    fast = cpu.get("avx512_bf16") if dtype == torch.bfloat16 else is_fast()
    return "blocked" if fast and dtype in (torch.bfloat16, torch.float32) else "sdpa"


def _only_math() -> bool:
    """Return whether the caller has left PyTorch's attention no backend but ``math``."""
    settings = torch.backends.cuda  # for every device
    return settings.math_sdp_enabled() and not (
        settings.flash_sdp_enabled()
        or settings.mem_efficient_sdp_enabled()
        or settings.cudnn_sdp_enabled()
    )


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    """List the backends for a device and dtype, the fastest first."""
    if device.type != "cuda":
        return (_cpu_backend(dtype),)
    if dtype not in (torch.bfloat16, torch.float16):
        return FULL_PRECISION
    return CANDIDATES[max(a for a in CANDIDATES if a <= max(80, architecture(device)))]


def rejection_reason(backend: Backend, device: torch.device, dtype: torch.dtype) -> str:
    """Try a backend on 514 tokens; return why it is not used, or "" if it is right."""
    if backend == "cudnn" and (torch.backends.cudnn.version() or 0) < _MIN_CUDNN:
        return f"cuDNN {torch.backends.cudnn.version()} is older than {_MIN_CUDNN}"
    generator = torch.Generator().manual_seed(0)
    # The first call may come from where there are no gradients.
    with torch.inference_mode(False), torch.enable_grad():
        *qkv, upstream = torch.randn(4, 2, _TRIAL_LENGTH, 2, 64, generator=generator).to(device)
        exact = [x.to(dtype).double().requires_grad_() for x in qkv]
        # Side by side, as the linear layer makes them.
        q, k, v = tried = torch.stack(exact, 2).detach().to(dtype).requires_grad_().unbind(2)
        try:
            out = run_backend(backend, q, k, v)
            gradients = torch.autograd.grad(out, tried, upstream.to(dtype))
        except Exception as error:  # whatever a package raises that is half there, or misbuilt
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        want = attention_reference(*exact)
        wanted = torch.autograd.grad(want, exact, upstream.to(dtype).double())
    for got, true in zip((out, *gradients), (want, *wanted), strict=True):
        relative_error = ((got.double() - true).abs().max() / true.abs().max()).item()
        if not relative_error < _MAX_TRIAL_ERROR:
            return f"wrong at {_TRIAL_LENGTH} tokens, relative error {relative_error:.1e}"
    return ""


@cache
def attention_trials(device: torch.device, dtype: torch.dtype) -> dict[Backend, str]:
    """Try the candidates in their order, up to the first that is right.

    Returns:
        Why each was rejected, in the order of trial; "" for the last one, which is used.

    Raises:
        RuntimeError: No candidate works.
    """
    trials: dict[Backend, str] = {}
    for backend in candidates(device, dtype):
        tried = backend not in CPU_BACKENDS
        trials[backend] = rejection_reason(backend, device, dtype) if tried else ""
        if not trials[backend]:
            return trials
    raise RuntimeError(f"no attention works on {device} in {dtype}: {trials}")


def attention_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend of :func:`attention` for a device and dtype."""
    if _only_math():
        return "math"
    if device.type == "cpu":
        return candidates(device, dtype)[0]  # it depends on settings: nothing to remember
    if device.type == "meta" or not torch.cuda.is_available():
        return "math"  # fake tensors: only shapes matter
    return next(reversed(attention_trials(device, dtype)))


# What torch.compiler.assume_constant_result does, without importing the compiler (a second).
attention_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@autocast_rule("lower_precision")
def attention(q: Tensor, k: Tensor, v: Tensor, padding_mask: PaddingMask | None = None) -> Tensor:
    """Compute softmax attention of every query to every valid key.

    Autocast: its dtype, for inputs and result. Second derivatives are those of the backend: as for
    PyTorch's attention, ``math`` has them, which
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` chooses, and ``blocked`` and ``efficient``;
    the others raise an error. Inside ``torch.func`` and with forward-mode derivatives it is
    ``math``.

    Args:
        q: [B, L, H, D_h].
        k: [B, L', H, D_h].
        v: [B, L', H, D_h].
        padding_mask: Which keys are valid; all if None. Values at padding have no effect, not
            even NaN, and get no gradient.

    Returns:
        [B, L, H, D_h].
    """
    if torch.compiler.is_exporting():  # a file for other programs has PyTorch's operations alone
        return run_backend("sdpa", q, k, v, padding_mask)
    if is_transformed(q, k, v):
        return run_backend("math", q, k, v, padding_mask)
    return run_backend(attention_backend(q.device, q.dtype), q, k, v, padding_mask)
