"""How the training pass of a run is executed: eager or compiled, launched or as CUDA graphs.

On a GPU the ways that ``train.compile`` and ``train.cuda_graphs`` leave open are tried at the start
on a real batch: losses and gradients must be as exact as those of the eager pass, and the fastest
is used. A graph is recorded with another batch (clips in reverse order, of the next epoch) than it
is compared on: a number of the host that became part of it shows as a wrong gradient.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ssast.engine.config import Config
from ssast.engine.errors import ConfigError
from ssast.engine.parallel.ranks import reduce_max
from ssast.engine.settings import Train
from ssast.engine.train.graphs import CudaRecorder, GraphedFunction, GraphedModule, Recorder
from ssast.engine.train.task import Task
from ssast.pipelines.stream.batch import Batch
from ssast.pipelines.text import one_line

TOLERANCE = {"fp32": 1e-3, "bf16": 0.02}
"""Largest error of the loss, and of the gradient of each parameter relative to its norm, besides
twice that of the eager pass: against the pass in fp32 that is a tenth under bf16, when training
begins."""

_SMALL = 1e-3  # of the largest norm: gradients below are rounding, such as those of key biases
_COMPILING_S = 120.0  # what a run must gain by compiling, at a guess of a fifth of its steps
_COMPILED_GAIN = 0.2
_NO_MEMORY = "no memory for a pass in fp32, which the results are compared with"
_MARGIN = 1.05  # compiling rounds otherwise: noise must not decide when a run is resumed
_STEP_BYTES = 8  # per parameter: what an optimizer step allocates besides the activations


class Mode(NamedTuple):
    """A way to execute the training pass."""

    compiled: bool
    graphs: bool

    def __str__(self) -> str:
        names = ["compiled"] * self.compiled + ["CUDA graphs"] * self.graphs
        return " + ".join(names) or "eager"


class Tools(Protocol):
    """What trials need of a device."""

    def recorder(self) -> Recorder:
        """Return a recorder of graphs."""

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Return how long some work takes, by the median of a few turns."""

    def free_bytes(self) -> int:
        """Return the memory that is left, after caches were emptied."""


class CudaTools:
    """Tools of the current GPU."""

    def recorder(self) -> Recorder:
        """Return a recorder with a memory pool of its own."""
        return CudaRecorder()

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Return the median time between CUDA events, ms."""
        work()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
        for event in events:
            event.record()
            work()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))

    def free_bytes(self) -> int:
        """Return the free memory of the GPU, besides PyTorch's cache."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


def tools_of(device: torch.device) -> Tools | None:
    """Return what trials on a device need; None where nothing is tried, as on a CPU."""
    return CudaTools() if device.type == "cuda" else None


@dataclass
class Execution:
    """The mode that a run uses, and what was found of each.

    Attributes:
        mode: The mode in use.
        rejected: Why others are not.
        ms: Time of forward and backward pass of one micro-batch, where it was measured.
    """

    mode: Mode
    rejected: dict[Mode, str] = field(default_factory=dict)
    ms: dict[Mode, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return lines for the terminal: the choice, and why the others are not used."""
        lines = [
            f"training pass, {mode}: not used: {reason}" for mode, reason in self.rejected.items()
        ]
        if self.ms:
            times = ", ".join(f"{mode} {ms:.2f} ms" for mode, ms in self.ms.items())
            lines.append(f"training pass: {self.mode} ({times})")
        return lines

    def facts(self) -> dict[str, Any]:
        """Return what ``environment.json`` holds."""
        rejected = {str(mode): reason for mode, reason in self.rejected.items()}
        ms = {str(mode): ms for mode, ms in self.ms.items()}
        return {"mode": str(self.mode), "rejected": rejected, "pass_ms": ms}


def check_execution(config: Config, device: torch.device) -> None:
    """Check what ``train.cuda_graphs=true`` needs.

    Raises:
        ConfigError: The device is no GPU.
    """
    if config.train.cuda_graphs is True and tools_of(device) is None:
        raise ConfigError(f"train.cuda_graphs: true needs a GPU, found {device.type}")


def start_execution(
    task: Task, batches: Iterator[Batch], *, steps: int
) -> tuple[Execution, Iterator[Batch]]:
    """Choose the mode of a run by trials and set it up. Collective.

    Args:
        task: What is trained; its engine is built.
        batches: Training batches, of which the first is tried, where there is a choice.
        steps: Optimizer steps of the whole run, which compiling must be worth.

    Returns:
        The choice, and the same batches.

    Raises:
        ConfigError: ``train.cuda_graphs`` is true, and graphs do not work.
    """
    train, device = task.context.config.train, task.context.world.device
    tools = tools_of(device)
    graphs = train.cuda_graphs is True
    given = Mode(train.compile is True, graphs)
    if tools is None or (not graphs and "auto" not in (train.compile, train.cuda_graphs)):
        return Execution(given), batches
    if train.zero_stage == 3:
        reason = "ZeRO stage 3 gathers weights during the pass"
        return passed_over(train, given, reason), batches
    first = next(batches)
    trials = _Trials(task, first, tools)
    return trials.choose(steps * train.accumulation_steps), itertools.chain([first], batches)


def passed_over(train: Train, mode: Mode, reason: str) -> Execution:
    """Return a mode that is used without a trial, and why the others are not tried."""
    others = [Mode(True, False)] * (train.compile == "auto") + [Mode(mode.compiled, True)]
    return Execution(mode, dict.fromkeys(others, reason))


class _Trials:
    """Trials of a task's training pass on one batch."""

    def __init__(self, task: Task, batch: Batch, tools: Tools):
        self.task, self.batch, self.tools = task, batch, tools
        self.context, self.train = task.context, task.context.config.train
        self._graphs: GraphedModule | None = None

    def choose(self, passes: int) -> Execution:
        """Try the modes, set the fastest one up and return it. Collective.

        Args:
            passes: Micro-batches of this rank in the whole run.
        """
        compile_, cuda_graphs = self.train.compile, self.train.cuda_graphs
        plain = Mode(compile_ is True, False)
        found = Execution(plain)
        expected = self._expected()
        reason, _ = self._agreed("" if expected else _NO_MEMORY, 0.0)
        if not expected or reason:
            return self._untried(plain, reason)
        exact, eager = expected
        self._set_up(plain)
        found.ms[plain] = self._agreed("", self.tools.milliseconds(self._pass))[1]
        for compiled in [compile_] if compile_ != "auto" else [False, True]:
            for graphs in [cuda_graphs] if cuda_graphs != "auto" else [False, True]:
                mode = Mode(bool(compiled), bool(graphs))
                if mode == plain:
                    continue
                self.context.heartbeat(f"a trial: {mode}")
                reason, ms = self._try(mode, passes, found, exact, eager)
                if reason:
                    found.rejected[mode] = reason
                else:
                    found.ms[mode] = ms
        allowed = [m for m in found.ms if m.graphs or cuda_graphs is not True]
        if not allowed:
            reasons = "; ".join(found.rejected.values())
            raise ConfigError(f"train.cuda_graphs: true does not work here: {reasons}")
        found.mode = min(allowed, key=lambda mode: found.ms[mode] * _MARGIN**mode.compiled)
        self._set_up(found.mode)
        return found

    def _untried(self, mode: Mode, reason: str) -> Execution:
        """Return the mode that needs no trial.

        Raises:
            ConfigError: ``train.cuda_graphs`` is true.
        """
        if self.train.cuda_graphs is True:
            raise ConfigError(f"train.cuda_graphs: true does not work here: {reason}")
        self._set_up(mode)
        return passed_over(self.train, mode, reason)

    def _try(
        self,
        mode: Mode,
        passes: int,
        found: Execution,
        exact: list[Tensor],
        eager: Tensor,
    ) -> tuple[str, float]:
        """Return why a mode cannot be used, or "", and the milliseconds of its pass. Collective."""
        eager_ms = next(iter(found.ms.values()))
        if mode.compiled and self.train.compile == "auto":
            gain_s = passes * eager_ms * _COMPILED_GAIN / 1e3
            if gain_s < _COMPILING_S:
                return f"{passes} passes of {eager_ms:.1f} ms are too few to repay compiling", 0.0
        without = found.rejected.get(Mode(mode.compiled, False))
        if mode.graphs and without:
            return without, 0.0
        reason, ms = "", 0.0
        try:
            self._set_up(mode)
            reason = self._wrong(relative_errors(self._pass(), exact), exact, eager)
            if not reason:
                ms = self.tools.milliseconds(self._pass)
        # Whatever a compiler, a driver or a lack of memory may raise.
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error):.200}"
        if mode.graphs and not reason:
            reason = self._shortage()
        self._set_up(Mode(self.train.compile is True, False))
        return self._agreed(reason, ms)

    def _agreed(self, reason: str, ms: float) -> tuple[str, float]:
        """Return a reason, if any rank has one, and the time of the slowest rank. Collective."""
        failed, slowest = reduce_max([float(bool(reason)), ms], self.context.world)
        return reason or ("another rank cannot use it" if failed else ""), slowest

    def _set_up(self, mode: Mode) -> None:
        """Leave the present mode, then enter another."""
        if self._graphs is not None:
            self._graphs.remove()
            self._graphs = None
        self.task.__dict__.pop("inputs", None)
        for block in self.task.blocks():
            if not mode.compiled:
                block._compiled_call_impl = None
            elif block._compiled_call_impl is None:
                block.compile()
        if mode.graphs:
            self._record()

    def _record(self) -> None:
        task, recorder, other = self.task, self.tools.recorder(), _other(self.batch)
        eager, kind = task.inputs, type(other)
        replayed = GraphedFunction(
            lambda fields: eager(kind(**fields), training=True), vars(other), recorder
        )

        def inputs(batch: Batch, *, training: bool) -> tuple[tuple[Any, ...], Tensor]:
            return replayed(vars(batch)) if training else eager(batch, training=False)

        self._graphs = GraphedModule(task.module, eager(other, training=True)[0], recorder)
        self._graphs.install()
        task.inputs = inputs  # type: ignore[method-assign]

    def _trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.task.module.named_parameters() if p.requires_grad}

    def _pass(self) -> list[Tensor]:
        """Return the loss of the batch, and the gradients of the trained parameters."""
        return _loss_and_gradients(self.task, self.batch, list(self._trained().values()))

    def _expected(self) -> tuple[list[Tensor], Tensor] | None:
        """Return the results in fp32, and the errors of the eager pass; None without memory."""
        try:
            exact = self._exact_pass()
            return exact, relative_errors(self._pass(), exact)
        except torch.OutOfMemoryError:  # fp32 takes up to twice the memory of the run
            return None

    def _exact_pass(self) -> list[Tensor]:
        """Return the results of the eager pass with weights and activations in fp32."""
        if self.context.precision == "fp32":
            return self._pass()
        encoder = self.task.encoder
        every, encoder.activation_checkpoint_every = encoder.activation_checkpoint_every, 1
        try:
            return pass_in(self.task, self.batch, torch.float32)()
        finally:
            encoder.activation_checkpoint_every = every

    def _wrong(self, errors: Tensor, exact: list[Tensor], eager: Tensor) -> str:
        """Return the worst error, if there is one that the eager pass has not; else ""."""
        allowed = 2 * eager + TOLERANCE[self.context.precision]
        wrong = ~(errors <= allowed)  # NaN is
        if not wrong.any():
            return ""
        sizes = _norms(exact)
        if not (torch.isfinite(sizes).all() and sizes[1:].any()):
            return "the first batch has no finite loss and gradient to compare with"
        worst = int(errors.where(wrong, -1.0).nan_to_num(torch.inf).argmax())
        what = ["the loss", *(f"the gradient of {name}" for name in self._trained())][worst]
        return f"wrong: {what} has a relative error of {errors[worst]:.1e}"

    def _shortage(self) -> str:
        """Return that graphs, whose activations stay allocated, leave too little memory, or ""."""
        count = sum(p.numel() for p in self.task.module.parameters())
        free, needed = self.tools.free_bytes(), _STEP_BYTES * count
        if free >= needed:
            return ""
        return f"leaves {free / 2**30:.1f} GiB of memory, a step takes {needed / 2**30:.1f} GiB"


def _other(batch: Batch) -> Batch:
    """Return a batch of the same form: its clips in reverse order, of the next epoch."""
    flipped = {name: tensor.flip(0) for name, tensor in vars(batch).items()}
    return type(batch)(**{**flipped, "epochs": flipped["epochs"] + 1})


def pass_in(task: Task, batch: Batch, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """Return the eager pass on a batch with weights and activations in a dtype.

    It returns the loss of the batch, and the gradients of the trained parameters.
    """
    weights = {
        f"module.{name}": p.detach().to(dtype).requires_grad_(p.requires_grad)
        for name, p in task.module.named_parameters()
    }
    trained = [weight for weight in weights.values() if weight.requires_grad]
    # The backward pass may recompute blocks, which must be with these weights too.
    both = _ForwardAndBackward(task, batch, trained)
    return lambda: torch.func.functional_call(both, weights, ())


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    """Return the relative errors of a loss and of its gradients, in that order."""
    sizes = _norms(exact)
    sizes[1:] = sizes[1:].clamp(min=_SMALL * sizes[1:].max())
    return _norms([f.float() - e.float() for f, e in zip(found, exact, strict=True)]) / sizes


class _ForwardAndBackward(nn.Module):
    """Both passes of a task as the forward of one module."""

    def __init__(self, task: Task, batch: Batch, trained: list[Tensor]):
        super().__init__()
        self.module = task.module
        self.forward = lambda: _loss_and_gradients(task, batch, trained)


def _loss_and_gradients(task: Task, batch: Batch, trained: Sequence[Tensor]) -> list[Tensor]:
    """Return the loss of a batch, and its gradients; zeros where there is none."""
    inputs, valid = task.inputs(batch, training=True)
    loss = task.means(task.module.forward(*inputs), valid)["loss"]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    pairs = zip(gradients, trained, strict=True)
    return [loss.detach(), *(torch.zeros_like(w) if g is None else g for g, w in pairs)]


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double().norm() for tensor in tensors])
