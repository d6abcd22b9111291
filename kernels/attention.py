"""Softmax attention through one function: flash-attn where it runs, PyTorch's own elsewhere.

    out = softmax(q k^T / sqrt(D_h)) v                   Vaswani et al. 2017

flash-attn (Dao 2023) takes half precision on a CUDA device and is an optional dependency.
"""

import importlib.util
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["flash-attn", "sdpa"]


@cache
def _flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def attention_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """What :func:`attention` uses for tensors of this device and dtype."""
    half = dtype in (torch.bfloat16, torch.float16)
    return "flash-attn" if device.type == "cuda" and half and _flash_attn_installed() else "sdpa"


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, with the probabilities in memory."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every query to every key.

    Args:
        q: [B, L, H, D_h].
        k: [B, L', H, D_h].
        v: [B, L', H, D_h].

    Returns:
        [B, L, H, D_h].
    """
    if attention_backend(q.device, q.dtype) == "flash-attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
