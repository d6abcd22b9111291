"""How close an operation must be to its definition: what its dtype costs the definition itself."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Offset and spread of the random inputs: ordinary ones, a large common mean, very small ones.
REGIMES = {"unit": (0.0, 1.0), "mean_100": (100.0, 1.0), "std_1e-3": (0.0, 1e-3)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def random_inputs(*shapes: Sequence[int], regime: str, seed: int = 0) -> list[Tensor]:
    """Float64 tensors that bf16 holds exactly, so that every dtype sees the same numbers."""
    mean, std = REGIMES[regime]
    generator = torch.Generator().manual_seed(seed)
    normal = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [(mean + std * x).bfloat16().double() for x in normal]


def values_and_gradients(
    operation: Operation, inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Outputs in ``dtype``, then the gradient of each input for a fixed random upstream."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = operation(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for output in (o for o in outputs if o.requires_grad):
        upstream = torch.randn(output.shape, generator=generator).bfloat16()
        total = total + (output * upstream.to(output.dtype)).double().sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*(o.detach() for o in outputs), *(g for g in gradients if g is not None)]


def assert_as_good_as_reference(
    operation: Operation,
    reference: Operation,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    slack: float = 2.0,
    rounding: float = 0.0,
) -> None:
    """An operation may err ``slack`` times as much as its definition does in that dtype.

    One rounding of the largest value (``rounding`` times it, if that is more) comes on top. The
    truth is the definition in float64. What float64 itself costs cannot be seen from there: it
    must come out 1e-10 exact, or as exact as float32, scaled, where the problem is ill-conditioned.
    """
    seen, rounding = dtype, max(rounding, torch.finfo(dtype).eps)
    if dtype == torch.float64:
        seen, slack, rounding = torch.float32, 8.0, 1e-10
    scale = torch.finfo(dtype).eps / torch.finfo(seen).eps
    truths = values_and_gradients(reference, inputs, torch.float64)
    costs = values_and_gradients(reference, inputs, seen)
    results = values_and_gradients(operation, inputs, dtype)
    assert len(truths) == len(costs) == len(results)
    for place, (result, cost, truth) in enumerate(zip(results, costs, truths, strict=True)):
        assert result.shape == truth.shape, place
        if truth.numel() == 0:
            continue
        assert torch.isfinite(result).all(), f"value {place} is not finite"
        error = (result.double() - truth).abs().max().item()
        own = (cost.double() - truth).abs().max().item() * scale
        last = rounding * truth.abs().max().item()
        assert error <= slack * own + last, (
            f"value {place}: error {error:.2e} > {slack} x {own:.2e} + {last:.2e}"
        )
