"""A module's forward and backward pass as two CUDA graphs: one launch each instead of hundreds.

A graph repeats the same kernels on the same memory. So the module gets its inputs in tensors that
stay where they are and are filled anew for each batch, and whatever else its forward depends on
must not change: no Python number, no shape, no address of a weight. Autograd sees one operation
with the parameters as inputs, whose gradients it hands on, so that hooks on them (ZeRO's) fire.

:func:`torch.cuda.make_graphed_callables` does the same for arguments that are tensors alone; here
they may be nested and None, gradients are copied out of the graph, so that one that is kept
(accumulation) is not overwritten by the next, and recording is behind a protocol, which tests
implement without a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

T = TypeVar("T")

_WARM_UP = 3  # passes in which libraries, Triton and the compiler choose their kernels


class Recorder(Protocol):
    """Records work of a device, to launch it again as a whole."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do the work a few times as it will be recorded.

        Raises:
            RuntimeError: The host waits for the device in it, which cannot be recorded.
        """

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record the work; return its result, whose tensors each replay fills, and the replay.

        Raises:
            RuntimeError: It cannot be recorded.
        """


class CudaRecorder:
    """Records CUDA graphs that share one memory pool and are replayed in the order of recording."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do the work on a side stream; once with an error where the host would wait."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        before = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    work()
                torch.cuda.set_sync_debug_mode("error")
                work()
        finally:  # after an error as well: memory that the work reads may be given to others
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.current_stream().wait_stream(stream)

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Capture the work as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        # Threads of DALI and NCCL go on with what a capture forbids to its own thread.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay


class StaticInputs:
    """Copies of nested tensors that stay where they are in memory, to be filled anew.

    Args:
        inputs: Tensors and None, or tuples, lists and dicts of them.

    Raises:
        RuntimeError: There is something else among them, such as a number, that a graph would keep.
    """

    def __init__(self, inputs: Any):
        leaves, self._form = pytree.tree_flatten(inputs)
        for leaf in leaves:
            if leaf is not None and not isinstance(leaf, Tensor):
                raise RuntimeError(f"an input is no tensor: {type(leaf).__name__} {leaf!r}")
        self._leaves = [None if leaf is None else leaf.detach().clone() for leaf in leaves]

    def get(self) -> Any:
        """Return the copies, nested as the inputs were."""
        return pytree.tree_unflatten(self._leaves, self._form)

    def fill(self, inputs: Any) -> bool:
        """Copy other inputs in; return False if they have another form, shape, dtype or device."""
        leaves, form = pytree.tree_flatten(inputs)
        if form != self._form or any(
            _layout(mine) != _layout(theirs)
            for mine, theirs in zip(self._leaves, leaves, strict=True)
        ):
            return False
        _copy(self._leaves, leaves)
        return True


class GraphedFunction:
    """A function of tensors without gradients, recorded.

    Args:
        function: Takes nested tensors, and returns some.
        inputs: What it is recorded with.
        recorder: Records it.

    Raises:
        RuntimeError: It cannot be recorded.
    """

    def __init__(self, function: Callable[[Any], Any], inputs: Any, recorder: Recorder):
        self._function, self._inputs = function, StaticInputs(inputs)

        @torch.no_grad()
        def run() -> Any:
            return function(self._inputs.get())

        recorder.warm_up(run)
        outputs, self._replay = recorder.record(run)
        self._outputs, self._form = pytree.tree_flatten(outputs)

    def __call__(self, inputs: Any) -> Any:
        """Return copies of the outputs."""
        if not self._inputs.fill(inputs):
            return self._function(inputs)
        self._replay()
        return pytree.tree_unflatten(_copies(self._outputs), self._form)


class GraphedModule:
    """The training pass of a module, recorded; :meth:`install` makes it the module's forward.

    A call in evaluation mode, without gradients or with inputs of another form runs as before. The
    backward pass of a call must come before the next call, as the activations are overwritten.

    Args:
        module: Module in training mode, whose parameters stay where they are in memory. It returns
            a dict of tensors.
        inputs: Arguments of its forward for a batch: tensors and None, or tuples, lists and dicts
            of them.
        recorder: Records the two passes.

    Raises:
        RuntimeError: The passes cannot be recorded, or an argument is no tensor.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], recorder: Recorder):
        self._module, self._eager, self._inputs = module, module.forward, StaticInputs(inputs)
        trained = [p for p in module.parameters() if p.requires_grad]
        recorder.warm_up(lambda: _gradients(self._run(), trained))
        outputs, self._replay_forward = recorder.record(self._run)
        self._names, self._outputs = list(outputs), list(outputs.values())
        self._upstream = [
            torch.zeros_like(value) if value.requires_grad else None for value in self._outputs
        ]
        gradients, self._replay_backward = recorder.record(
            lambda: _gradients(outputs, trained, self._upstream)
        )
        # Autograd must not expect gradients of parameters that a plain pass would leave without.
        used = [(p, g) for p, g in zip(trained, gradients, strict=True) if g is not None]
        self._parameters, self._parameter_gradients = [p for p, _ in used], [g for _, g in used]

    def install(self) -> None:
        """Replay from now on whenever the module is called in training."""
        self._module.forward = self._forward

    def remove(self) -> None:
        """Give the module its own forward back."""
        self._module.__dict__.pop("forward", None)

    def _run(self) -> dict[str, Tensor]:
        return self._eager(*self._inputs.get())

    def _forward(self, *inputs: Any) -> dict[str, Tensor]:
        training = self._module.training and torch.is_grad_enabled()
        if not (training and self._inputs.fill(inputs)):
            return self._eager(*inputs)
        outputs = _Replay.apply(self, *self._parameters)
        return dict(zip(self._names, outputs, strict=True))

    def forward_pass(self) -> tuple[list[Tensor], list[Tensor]]:
        """Replay the forward pass; return copies of the outputs, and those without a gradient."""
        self._replay_forward()
        outputs = _copies([value.detach() for value in self._outputs])
        fixed = [o for o, up in zip(outputs, self._upstream, strict=True) if up is None]
        return outputs, fixed

    def backward_pass(self, upstream: tuple[Tensor, ...]) -> list[Tensor]:
        """Replay the backward pass; return copies of the gradients of the parameters."""
        _copy(self._upstream, list(upstream))
        self._replay_backward()
        return _copies(self._parameter_gradients)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: GraphedModule, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs = graphs
        outputs, fixed = graphs.forward_pass()
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.graphs.backward_pass(upstream)


def _gradients(
    outputs: dict[str, Tensor],
    parameters: list[nn.Parameter],
    upstream: list[Tensor | None] | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the parameters; of the sum of all outputs without ``upstream``."""
    values = [value for value in outputs.values() if value.requires_grad]
    if upstream is None:
        given = [torch.ones_like(value) for value in values]
    else:
        given = [gradient for gradient in upstream if gradient is not None]
    return torch.autograd.grad(values, parameters, given, allow_unused=True)


def _layout(leaf: Any) -> object:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _copy(targets: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> None:
    """Copy tensors into others, but for None, in few launches."""
    into = [target for target in targets if target is not None]
    given = [s for t, s in zip(targets, sources, strict=True) if t is not None and s is not None]
    with torch.no_grad():
        torch._foreach_copy_(into, given)


def _copies(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Copy tensors, in few launches."""
    new = [None if tensor is None else torch.empty_like(tensor) for tensor in tensors]
    _copy(new, tensors)
    return new
