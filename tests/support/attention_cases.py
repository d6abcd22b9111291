"""Inputs of attention, and how far a backend may be from its definition."""

import torch
from compare import random_inputs
from torch import Tensor

from ssast.kernels.attention import attention_reference, make_padding_mask

# B, queries, keys, heads, width of a head
SHAPES = [(2, 33, 33, 3, 64), (1, 5, 37, 2, 16), (3, 1, 9, 1, 8), (2, 7, 1, 2, 4), (1, 3, 3, 1, 5)]

# PyTorch's CPU kernel takes the exponential to 20 bits and sums a row piece by piece. Its backward
# pass recomputes exp(score - logsumexp); around a mean of 100 both are near 1e5, known to 2**-8.
ROUNDING = {"unit": 2**-17, "mean_100": 2**-8, "std_1e-3": 2**-17}


def queries_keys_values(shape: tuple[int, ...], regime: str) -> list[Tensor]:
    B, queries, keys, heads, width = shape
    return random_inputs(
        (B, queries, heads, width), (B, keys, heads, width), (B, keys, heads, width), regime=regime
    )


def assert_ignores_padding(run) -> None:
    q, k, v = queries_keys_values((3, 5, 9, 2, 8), "unit")
    real = torch.zeros(3, 9, dtype=torch.bool)
    real[0], real[1, 3], real[2, 1::2] = True, True, True
    k[~real], v[~real] = float("nan"), float("inf")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = run(*leaves, make_padding_mask(real))
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    for b in range(3):
        alone = [x[b : b + 1, real[b]].detach().requires_grad_() for x in (k, v)]
        alone = [q[b : b + 1].detach().requires_grad_(), *alone]
        want = attention_reference(*alone)
        torch.testing.assert_close(out[b : b + 1], want)
        wanted = torch.autograd.grad(want.square().sum(), alone)
        torch.testing.assert_close(gradients[0][b : b + 1], wanted[0])
        for got, true in zip(gradients[1:], wanted[1:], strict=True):
            torch.testing.assert_close(got[b : b + 1, real[b]], true)
            assert not got[b, ~real[b]].any()
