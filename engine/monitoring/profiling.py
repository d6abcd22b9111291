"""Profiling of training steps: a trace for a viewer, and a short table.

Marks cut a step into parts, each of which lasts until the next mark, so the parts add up to the
step. On a GPU a mark is a CUDA event: it measures device time, and nothing synchronises before the
last profiled step. Marks change no numbers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from ssast.engine.config import Config
from ssast.engine.model.blocks import Attention, Mlp
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.parallel.ranks import World
from ssast.pipelines.files import write_atomically

PARTS = {
    "data": "waiting for the next batch",
    "inputs": "masks, or targets and augmentations",
    "forward": "forward pass as one CUDA graph",
    "embed": "patch embedding",
    "attention": "attention of all blocks, including projections",
    "mlp": "MLP of all blocks",
    "encoder": "rest of the encoder: norms, residuals; whole blocks if compiled",
    "loss": "heads and losses",
    "backward": "backward, including recomputation and overlapped gradient reduction",
    "optimizer": "optimizer step, including its communication",
    "other": "metrics",
}
WARMUP_STEPS = 5  # caches, compilers and allocators settle in the first steps
_FORWARD = {"inputs", "forward", "embed", "attention", "mlp", "encoder", "loss"}
_PART_OF: dict[type[nn.Module], str] = {Attention: "attention", Mlp: "mlp"}
_COMMUNICATION = ("nccl", "gloo:")


class StepProfiler:
    """Profiler of ``profile.steps`` steps on rank 0; it does nothing on other ranks.

    with StepProfiler(config, world, module, print) as profiler:
        for batch in batches:
            profiler.mark("inputs")
            ...
            profiler.end_step()

    Args:
        config: Configuration of the run, in whose folder ``profile/trace.json`` and
            ``profile/table.json`` are written.
        world: This process's rank.
        module: The trained module, which contains a :class:`SpectrogramTransformer`.
        say: Prints the table.
        warmup_steps: Steps before the profiled ones, at least 1.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        module: nn.Module,
        say: Callable[[str], None],
        warmup_steps: int = WARMUP_STEPS,
    ) -> None:
        self._warmup_steps = warmup_steps
        self._wanted = config.profile.steps if world.is_main else 0
        self._folder = Path(config.run.folder or ".") / "profile"
        self._module, self._say = module, say
        self._cuda = world.device.type == "cuda"
        self._done = 0  # steps, recorded or not
        self._part = ""
        self._stamps: list[tuple[str, Any]] = []
        self._range: Any = None
        self._hooks: list[Any] = []
        self._profile: profile | None = None

    def __enter__(self) -> "StepProfiler":
        """Start the profiler, which waits for the first profiled step."""
        if self._wanted:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
            self._profile = profile(
                activities=activities,
                schedule=schedule(
                    skip_first=self._warmup_steps - 1,
                    wait=0,
                    warmup=1,
                    active=self._wanted,
                    repeat=1,
                ),
            )
            self._profile.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write the steps profiled so far, if the run ended early."""
        if self._profile is None:
            return
        recorded = self._done - self._warmup_steps
        if recorded > 0 and kind is None:
            self._finish(recorded)
        else:
            self._stop()
            how = "was interrupted" if recorded > 0 else f"ended within {self._warmup_steps} steps"
            self._say(f"profile.steps: no profile, the run {how}")

    def mark(self, part: str) -> None:
        """Begin a part of the step, one of :data:`PARTS`."""
        if self._recording:
            self._stamp(part)

    def end_step(self) -> None:
        """End the step; time until the next mark belongs to no step."""
        if self._profile is None:
            return
        if self._recording:
            self._stamp("between")
        self._done += 1
        self._profile.step()
        if self._done == self._warmup_steps:
            self._watch_module()
        if self._done == self._warmup_steps + self._wanted:
            self._finish(self._wanted)

    @property
    def _recording(self) -> bool:
        return self._profile is not None and self._done >= self._warmup_steps

    def _stamp(self, part: str) -> None:
        self._close_range()
        if self._cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = perf_counter()
        self._stamps.append((part, now))
        self._part = part
        if part != "between":
            self._range = record_function(part)
            self._range.__enter__()

    def _close_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _watch_module(self) -> None:
        encoder = next(m for m in self._module.modules() if isinstance(m, SpectrogramTransformer))
        self._watch(self._module, "forward", then="loss")  # all that a graph calls
        self._watch(encoder, "encoder", then="loss")
        self._watch(encoder.embed, "embed", then="encoder")
        for block in encoder.blocks:
            if block._compiled_call_impl is None:  # else a hook would have it compiled anew
                for module in block.children():
                    if type(module) in _PART_OF:
                        self._watch(module, _PART_OF[type(module)], then="encoder")

    def _watch(self, module: nn.Module, part: str, *, then: str) -> None:
        def enter(*_: Any) -> None:
            if self._part in _FORWARD:  # not in a validation, nor where a block is run again
                self._stamp(part)

        def leave(*_: Any) -> None:
            if self._part in _FORWARD and self._part != then:
                self._stamp(then)

        self._hooks += [module.register_forward_pre_hook(enter)]
        self._hooks += [module.register_forward_hook(leave)]

    def _stop(self) -> None:
        self._close_range()
        for hook in self._hooks:
            hook.remove()
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _finish(self, recorded: int) -> None:
        found = self._profile
        assert found is not None
        self._stop()
        try:
            self._write(found, recorded)
        except (OSError, RuntimeError, ValueError) as error:  # a full disk: training goes on
            self._say(f"profile.steps: the profile cannot be written: {error}")

    def _write(self, found: profile, recorded: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json"
        found.export_chrome_trace(str(trace))
        parts = self._parts_ms(recorded)
        table = {
            "first_step": self._done - recorded + 1,  # of this process
            "steps": recorded,
            "step_ms": sum(parts.values()),
            "parts_ms": parts,
            "communication_ms": communication_ms(trace) / recorded,
        }
        write_atomically(self._folder / "table.json", json.dumps(table, indent=1) + "\n")
        self._say(format_profile(table) + f"\n  {trace}")

    def _parts_ms(self, recorded: int) -> dict[str, float]:
        """Return the time of each part, ms per step."""
        sums = dict.fromkeys(PARTS, 0.0)
        if self._cuda:
            torch.cuda.synchronize()
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        for (part, begin), (_, end) in pairs:
            if part != "between":
                ms = begin.elapsed_time(end) if self._cuda else 1e3 * (end - begin)
                sums[part] += ms / recorded
        return sums


def communication_ms(trace: Path) -> float:
    """Return the time in collectives, ms over all steps, from a Chrome trace.

    On a GPU the time of communication kernels; else the time of collectives on the host within
    steps. Overlapping ones count once.
    """
    events = json.loads(trace.read_text())["traceEvents"]
    complete = [e for e in events if e.get("ph") == "X"]
    found = [e for e in complete if e["name"].startswith(_COMMUNICATION)]
    # The launch on the host has the name of the collective too: kernels only.
    kernels = [e for e in found if e.get("cat") == "kernel"]
    if kernels:
        return _covered(kernels) / 1e3
    steps = [e for e in complete if e["name"] in PARTS]
    # The intersection: |A| + |B| - |A or B|.
    within = _covered(found) + _covered(steps) - _covered(found + steps)
    return within / 1e3


def _covered(events: list[dict[str, Any]]) -> float:
    """Return the length of the union of the events, microseconds."""
    total, end = 0.0, float("-inf")
    for begin, last in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        total += max(0.0, last - max(begin, end))
        end = max(end, last)
    return total


def format_profile(table: dict[str, Any]) -> str:
    """Format a profile as a table with a line per part."""
    whole, first = max(table["step_ms"], 1e-9), table["first_step"]
    lines = [f"profile of steps {first} to {first + table['steps'] - 1}: ms per step"]
    for part, ms in table["parts_ms"].items():
        lines.append(f"  {part:14}{ms:10.2f} {ms / whole:6.1%}  {PARTS[part]}")
    lines.append(f"  {'step':14}{whole:10.2f}")
    lines.append(
        f"  {'communication':14}{table['communication_ms']:10.2f}         collectives, "
        "included in the parts above"
    )
    return "\n".join(lines)
