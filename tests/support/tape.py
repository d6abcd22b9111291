"""What stands for CUDA graphs on a CPU: a tape of operations on fixed memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Their results, or their shapes, go to the host.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
UNSET = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}


class Tape(TorchDispatchMode):
    """Records every operation with its very arguments; a replay writes to its very results.

    As in a graph, Python numbers are those of the recording, and tensors are memory.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in WAITS:
            raise RuntimeError(f"{packet} waits for the device")
        result = func(*args, **kwargs)
        if packet not in UNSET:
            self.calls.append((func, args, kwargs, result))
        return result

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                inputs = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
                for old, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage()._cdata not in inputs:  # else a view, or in place
                        old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class TapeRecorder:
    """A recorder of :mod:`ssast.engine.train.graphs`."""

    def warm_up(self, work):
        with Tape():
            work()

    def record(self, work):
        tape = Tape()
        with tape:
            result = work()
        return result, tape.replay


class TapeTools:
    """Tools of :mod:`ssast.engine.train.execution`: work with fewer launches takes less time.

    Args:
        free_bytes: Memory that is left.
        launch_ms: Time of an operation that is launched; a tape is one launch.
    """

    def __init__(self, free_bytes=1 << 40, launch_ms=1.0):
        self._free_bytes, self._launch_ms = free_bytes, launch_ms
        self.replays = 0

    def recorder(self):
        return self

    def warm_up(self, work):
        TapeRecorder().warm_up(work)

    def record(self, work):
        result, replay = TapeRecorder().record(work)

        def counted():
            self.replays += 1
            with _disable_current_modes():  # one launch
                replay()

        return result, counted

    def milliseconds(self, work):
        counter, before = Counter(), self.replays
        with counter:
            work()
        return self._launch_ms * (counter.count + self.replays - before)

    def free_bytes(self):
        return self._free_bytes


class Counter(TorchDispatchMode):
    """Counts operations that are launched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))
