"""What an operation computes in under ``torch.autocast``, and what it returns.

Every operation has one rule, which casts its inputs; autocast is off while it runs, and its results
have the dtypes that it gives for such inputs:

    lower_precision   the dtype of autocast: operations with matmuls
    float32           float32: losses, norms, the filterbank
    promote           the widest dtype among the inputs: operations that copy
    none              no cast: integers, and the backward passes, whose inputs were cast before

As in PyTorch only floating-point tensors of up to 32 bits are cast. A cast is differentiable: the
gradient of a float32 parameter is float32.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Rule = Literal["lower_precision", "float32", "promote", "none"]

DEVICES = ("cpu", "cuda")
RULES: dict[str, Rule] = {}
"""The rule of each operation, by name."""


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of autocast on a type of device; None where autocast is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast_off(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast on a type of device."""
    is_off = autocast_dtype(device) is None
    return nullcontext() if is_off else torch.autocast(device, enabled=False)


def _is_cast(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def cast_inputs(
    rule: Rule, args: Sequence[Any], device: str, keep: Collection[int] = ()
) -> Sequence[Any]:
    """Cast the arguments of an operation by its rule, where autocast is on.

    Args:
        rule: Rule of the operation.
        args: Arguments; what is no floating-point tensor stays as it is.
        device: Type of device, such as "cuda".
        keep: Positions of tensors that are not cast.
    """
    lower = autocast_dtype(device)
    chosen = [i for i, x in enumerate(args) if i not in keep and _is_cast(x)]
    if rule == "none" or lower is None or not chosen:
        return args
    if rule == "promote":
        dtype = functools.reduce(torch.promote_types, [args[i].dtype for i in chosen])
    else:
        dtype = lower if rule == "lower_precision" else torch.float32
    return [x.to(dtype) if i in chosen else x for i, x in enumerate(args)]


def autocast_rule(rule: Rule) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a function that is no custom operation a rule; its first argument is a tensor."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        RULES[function.__name__] = rule

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            first = args[0]
            assert isinstance(first, Tensor)
            device = first.device.type
            if autocast_dtype(device) is None:
                return function(*args, **kwargs)
            cast = cast_inputs(rule, [*args, *kwargs.values()], device)
            named = dict(zip(kwargs, cast[len(args) :], strict=True))
            with torch.autocast(device, enabled=False):
                return function(*cast[: len(args)], **named)

        return call

    return decorate
