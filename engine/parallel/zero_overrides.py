"""Work of DeepSpeed's ZeRO stages 1 and 2 in fewer launches and bytes, with the same numbers.

Written for DeepSpeed 0.19, whose methods are replaced on one optimizer. What they move, of P
trained parameters with gradients of e bytes each, and launch, of N parameter tensors:

    copies to a bucket and to a partition   8 e P, 2 N launches: left out where there is one rank
    flat gradient in fp32                   2 e P + (e + 4) P:   (e + 4) P, in few launches
    test for what is not finite             13 N launches:       by the norm, which is taken anyway
"""

from typing import Any

import torch
from torch import Tensor


def replace_slow_parts(zero: Any, world_size: int) -> None:
    """Replace methods of a ZeRO optimizer of stage 1 or 2 that keeps its state on the device."""
    _take_norm_once(zero)
    if zero.dtype != torch.float32:
        _flatten_to_fp32(zero)
    # Sums over micro-batches in another precision are kept in a buffer of DeepSpeed's.
    if world_size == 1 and zero.gradient_accumulation_dtype == zero.dtype:
        _keep_gradients_in_place(zero)


def _take_norm_once(zero: Any) -> None:
    """Let the gradient norm alone find what is not finite, as in stage 3.

    A test of its own takes 13 launches for each parameter and waits for the device, and the norm of
    each parameter two, over a copy in float64.
    """
    from deepspeed.runtime.zero.utils import get_norm_dtype

    take_norm = zero.get_grad_norm_direct

    def norm(gradients: list[Tensor], params: list[Tensor], norm_type: int = 2) -> Tensor:
        own = [g.detach() for g in gradients if not getattr(g, "_zero_padding", False)]
        if len(own) < 2:
            return take_norm(gradients, params, norm_type)
        norms = torch.stack(torch._foreach_norm(own, norm_type, dtype=get_norm_dtype()))
        return take_norm([norms], params[:1], norm_type)

    zero.get_grad_norm_direct = norm
    zero.check_overflow = lambda **_: None


def _flatten_to_fp32(zero: Any) -> None:
    """Write the gradients of a step into one flat tensor in fp32, and in no other before."""
    take_flat = zero._get_preflattened_grad_partition

    def flatten(group: int) -> Tensor:
        flat = take_flat(group)
        if flat is not None:
            return flat
        gradients = [g.detach().reshape(-1) for g in zero.averaged_gradients[group]]
        sizes = [len(g) for g in gradients]
        flat = gradients[0].new_empty(sum(sizes), dtype=torch.float32)
        torch._foreach_copy_(list(flat.split(sizes)), gradients)
        return flat

    zero._get_preflattened_grad_partition = flatten


def _keep_gradients_in_place(zero: Any) -> None:
    """Leave the gradients of a single rank, which are not summed with others, where they are."""
    zero.contiguous_gradients = False  # no buckets are allocated
    zero.reduce_independent_p_g_buckets_and_remove_grads = lambda param, group: None
    zero.reduce_ipg_grads = lambda comm_dtype=None: None
