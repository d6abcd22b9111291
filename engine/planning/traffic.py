"""Bytes of PyTorch's operations, and their kernels on CUDA.

An operation reads each element of its inputs once and writes each element of its results once; an
expanded tensor (stride 0) counts its storage. What differs from that is listed here, from ATen's
CUDA kernels in PyTorch 2.13.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ssast.kernels import roofline

_CHUNK, _BLOCKS = 65536, 320  # elements of a block and blocks of a launch of _foreach_ operations


class Traffic(NamedTuple):
    """Bytes of an operation, and the kernels it launches."""

    read: int
    written: int
    kernels: int = 1


def touched(x: Tensor) -> int:
    """Return the bytes of a tensor's elements, those of an expanded dimension once."""
    if x.numel() == 0:
        return 0
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def total_bytes(*values: Any) -> int:
    """Sum :func:`touched` over the tensors of nested lists and tuples."""
    return sum(map(touched, tensors_in(values)))


def _gather(source: Tensor, index: Any, out: Tensor) -> Traffic:
    taken = min(out.numel() * source.element_size(), touched(source))
    return Traffic(taken + total_bytes(index), touched(out))


def _put(target: Tensor, index: Tensor, source: Any, *, adds: bool) -> Traffic:
    count = index.numel()
    put = count * target.element_size()
    return Traffic(total_bytes(index, source) + adds * put, put)


def _layer_norm_backward(args: Sequence[Any], out: Any) -> Traffic:
    # One kernel for the input's gradient, one for those of weight and bias; both read all of it.
    grad, x, _, mean, rstd, weight, _ = args[:7]
    return Traffic(2 * total_bytes(grad, x, mean, rstd) + total_bytes(weight), total_bytes(out), 2)


def _convolution(args: Sequence[Any], out: Tensor) -> Traffic:
    x, weight, bias = args[:3]
    if bias is None:
        return Traffic(total_bytes(x, weight), touched(out))
    # cuDNN's, then PyTorch adds the bias.
    return Traffic(total_bytes(x, weight, bias, out), 2 * touched(out), 2)


def _convolution_backward(args: Sequence[Any], out: Any) -> Traffic:
    gradient, x, weight = args[:3]
    # A kernel each for the gradients of input, weight and bias.
    sources = [
        total_bytes(gradient, other)
        for other, result in zip((weight, x, ()), out, strict=True)
        if result is not None
    ]
    return Traffic(sum(sources), total_bytes(out), len(sources))


def _part_of_zeros(args: Sequence[Any], out: Tensor) -> Traffic:
    return Traffic(total_bytes(args[0]), touched(out) + total_bytes(args[0]), 2)


def _fused_adam(args: Sequence[Any], out: Any) -> Traffic:
    weights, gradients, first, second, _, steps = args[:6]
    moved = total_bytes(weights, first, second)
    read = moved + total_bytes(gradients, steps)
    return Traffic(read, moved, foreach_kernels(weights))


def foreach_kernels(tensors: Sequence[Tensor]) -> int:
    """Return the launches of an operation on a list of tensors."""
    return max(1, math.ceil(sum(math.ceil(x.numel() / _CHUNK) for x in tensors) / _BLOCKS))


# Of operations that touch other bytes than all of their inputs and outputs, or launch more kernels
# than one: (arguments, result) -> Traffic. Sources: ATen's CUDA kernels, PyTorch 2.13.
TRAFFIC: dict[str, Callable[[Sequence[Any], Any], Traffic]] = {
    "gather": lambda a, out: _gather(a[0], a[2], out),
    "index_select": lambda a, out: _gather(a[0], a[2], out),
    "index": lambda a, out: _gather(a[0], a[1], out),
    "embedding": lambda a, out: _gather(a[0], a[1], out),
    "scatter_": lambda a, out: _put(a[0], a[2], a[3], adds=False),
    "scatter_add_": lambda a, out: _put(a[0], a[2], a[3], adds=True),
    "scatter_reduce_": lambda a, out: _put(a[0], a[2], a[3], adds=True),
    "index_copy_": lambda a, out: Traffic(total_bytes(a[2], a[3]), touched(a[3])),
    # Autograd takes the form that is not in place only because it is watched.
    "scatter_add": lambda a, out: _put(a[0], a[2], a[3], adds=True),
    "native_layer_norm_backward": _layer_norm_backward,
    "slice_backward": _part_of_zeros,
    "select_backward": _part_of_zeros,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "_fused_adam_": _fused_adam,
    "_fused_adamw_": _fused_adam,
}
FILLS = {
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
    "new_full", "arange", "scalar_tensor",
}  # fmt: skip
WRITES = {  # read no target
    "copy_", "_foreach_copy_", "fill_", "zero_", "normal_", "uniform_", "random_",
}  # fmt: skip
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
HOST_READS = {"nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}
# Kernels of what is no single one: in flash attention's backward pass the row sums, the gradients,
# and the queries' gradient from float32; in a sort of rows the radix sort's passes.
KERNELS = {
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "_efficient_attention_backward": 2,
    "sort": 3,
}


def _attention_flops(q: Tensor, products: int) -> float:
    return 2.0 * products * q.numel() * q.shape[1]  # [B, L, H, D_h]


# On a CPU, LayerNorm's backward pass has each row in the cache where it reads it again, and
# convolutions are one operation.
_AS_ANY = {"native_layer_norm_backward", "convolution", "convolution_backward"}
CPU_TRAFFIC = {name: of for name, of in TRAFFIC.items() if name not in _AS_ANY}
# Operations of ours whose steps depend on the data, and move less than anything else.
CPU_AS_ONE = {"draw_masks", "noise_rows"}
# Operations inside of blocked attention that read and write the scores of a few heads: as one they
# move what the whole reads and returns, for those scores stay in the cache.
_IN_BLOCKS = {"baddbmm", "bmm", "masked_fill_", "softmax", "_softmax_backward_data", "_to_copy"}
IN_BLOCKS = {
    "blocked_attention": _IN_BLOCKS | {"copy_"},
    "blocked_attention_backward": _IN_BLOCKS,
}


def _cpu_attention_flops(q: Tensor, k: Tensor, products: int) -> float:
    return 2.0 * products * q.numel() * k.shape[2]  # [B, H, L, D_h]


def _convolution_backward_flops(args: Sequence[Any], out: Any) -> float:
    """Return the FLOPs of the gradients of input and weight; PyTorch's formula knows no groups."""
    gradient, weight = args[0], args[2]
    each = 2.0 * gradient.numel() * weight[0].numel()
    return each * sum(result is not None for result in out[:2])


# Of operations of PyTorch whose FLOPs it does not know: (arguments, result) -> FLOPs.
_FUSED = "_scaled_dot_product_flash_attention_for_cpu"
PYTORCH_FLOPS: dict[str, Callable[[Sequence[Any], Any], float]] = {
    _FUSED: lambda a, out: _cpu_attention_flops(a[0], a[1], 2),
    f"{_FUSED}_backward": lambda a, out: _cpu_attention_flops(a[1], a[2], 5),
    "convolution_backward": _convolution_backward_flops,
}
# Of operations of ours whose matmuls PyTorch does not know, or counts for other shapes.
OUR_FLOPS: dict[str, Callable[[Sequence[Any]], float]] = {
    "patch_embed": lambda a: 2.0 * a[7].numel() * a[1].numel(),  # visible patches, weight
    "patch_embed_backward": lambda a: 2.0 * a[4].numel() * a[2].numel(),
    "info_nce": lambda a: roofline.info_nce(*a[0].shape, itemsize=1).flops,
    "efficient_attention": lambda a: _attention_flops(a[0], 2),
    "efficient_attention_backward": lambda a: _attention_flops(a[1], 5),
}
