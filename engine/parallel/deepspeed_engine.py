"""The training engine: forward, backward, optimizer step and state over all ranks.

This file, sharded_state.py, averaged_copy.py and zero_overrides.py are all that knows DeepSpeed
(0.19). What they guarantee:

- one code path for 1 to N ranks, ZeRO stages 1 to 3, fp32 and bf16;
- a gradient that is not finite on any rank skips the step on all ranks;
- master weights that start from the fp32 weights, not from their bf16 rounding;
- a training state in one portable form, independent of stage and number of ranks.

Stage 0 is not offered: under bf16 it takes a dry optimizer step at the start, and one NaN
poisons every weight.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssast.engine.errors import CheckpointError
from ssast.engine.parallel.averaged_copy import AveragedCopy
from ssast.engine.parallel.pending_sum import PendingSum
from ssast.engine.parallel.ranks import World, broadcast_object
from ssast.engine.parallel.sharded_state import ShardedState, has_average
from ssast.engine.parallel.zero_overrides import replace_slow_parts
from ssast.engine.settings import Precision


def deepspeed_config(
    *,
    world_size: int,
    batch_size: int,
    accumulate: int,
    zero_stage: int,
    precision: str,
    max_grad_norm: float | None,
    num_params: int,
    cuda: bool,
    offload: str = "none",
    reduce_dtype: str = "auto",
) -> dict[str, Any]:
    """Return DeepSpeed's settings; whatever is not named keeps DeepSpeed's default.

    Args:
        world_size: Number of ranks.
        batch_size: Clips per micro-batch and rank.
        accumulate: Micro-batches per optimizer step.
        zero_stage: 1 shards the optimizer state, 2 the gradients as well, 3 the weights as well.
        precision: "fp32" or "bf16".
        max_grad_norm: Clip the global gradient norm to this; None does not clip.
        num_params: Number of weights of the model.
        cuda: Whether the ranks compute on GPUs.
        offload: "cpu" keeps the optimizer's state in main memory; "none" on the device.
        reduce_dtype: "fp32" or "bf16" for gradients between ranks; "auto": as they are.
    """
    # The default of 5e8 makes one bucket of the whole model: 0.9 GiB and no overlap with backward.
    bucket = 2 * (min(max(num_params // 4, 500_000), 50_000_000) // 2)
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "overlap_comm": cuda and world_size > 1,  # else it waits for the device for nothing
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": max(bucket, 200_000_000),
    }
    if zero_stage == 3:
        # The defaults (1e9) keep every model below 1 B weights whole on every rank.
        zero |= {
            "stage3_max_live_parameters": 100_000_000,
            "stage3_max_reuse_distance": 100_000_000,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": min(100_000, num_params // 100),
        }
    if offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulate,
        "train_batch_size": batch_size * accumulate * world_size,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_optimization": zero,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # else two device waits per micro-batch
    }
    if reduce_dtype != "auto":
        config["communication_data_type"] = reduce_dtype
    if offload != "none":
        config["zero_force_ds_cpu_optimizer"] = False  # else it compiles its own Adam
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if accumulate > 1:  # a sum of hundreds of micro-batches in bf16 loses the small ones
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class TrainEngine:
    """A module and its Adam, sharded over the ranks.

    for batch in batches:
        loss = engine(batch)
        engine.backward(loss)
        stepped = engine.step(lr)

    Args:
        module: The model, with the same structure on every rank; rank 0's weights count. Under
            bf16 its parameters become bfloat16 (its buffers keep their type).
        optimizer: torch.optim.Adam or AdamW over exactly the trainable parameters of `module`.
        world: This process's world.
        batch_size: Clips per micro-batch and rank.
        accumulate: Micro-batches per optimizer step.
        zero_stage: 1, 2 or 3.
        precision: "fp32" or "bf16" (weights and gradients bf16, master weights and Adam fp32).
        max_grad_norm: Clip the global gradient norm to this; None does not clip.
        offload: "none" or "cpu", where the optimizer's state is and its step is taken.
        reduce_dtype: "auto", "fp32" or "bf16", of gradients on their way between ranks.
        ema_decay: Decay of an exponential moving average of the trained weights, in fp32, by the
            number of optimizer steps taken before; None keeps no average.

    Attributes:
        settings: what DeepSpeed was given.
        averages: whether an average of the weights is kept.

    Raises:
        ValueError: a setting or an optimizer that the engine does not offer.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        world: World,
        batch_size: int,
        accumulate: int = 1,
        zero_stage: int = 1,
        precision: Precision = "fp32",
        max_grad_norm: float | None = None,
        offload: Literal["none", "cpu"] = "none",
        reduce_dtype: Literal["auto", "fp32", "bf16"] = "auto",
        ema_decay: Callable[[int], float] | None = None,
    ) -> None:
        _check(module, optimizer, zero_stage=zero_stage, precision=precision)
        deepspeed = _import_deepspeed()
        # bf16 rounds the weights before DeepSpeed copies them: keep rank 0's fp32 values.
        exact = {}
        if precision == "bf16" and world.is_main:
            exact = {f"weight/{n}": p.detach() for n, p in module.named_parameters()}
        self.module = module
        self.world = world
        self.accumulate = accumulate
        self.zero_stage = zero_stage
        self.settings = deepspeed_config(
            world_size=world.world_size,
            batch_size=batch_size,
            accumulate=accumulate,
            zero_stage=zero_stage,
            precision=precision,
            max_grad_norm=max_grad_norm,
            num_params=sum(p.numel() for p in module.parameters()),
            cuda=world.device.type != "cpu",
            offload=offload,
            reduce_dtype=reduce_dtype,
        )
        self._linear = nn.functional.linear
        with _one_optimizer_class():
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=self.settings
            )
        if zero_stage < 3 and offload == "none":
            replace_slow_parts(self._zero, world.world_size)
        _limit_waiting(world.timeout_s)
        self.averages, self._ema_decay, self._steps_taken = ema_decay is not None, ema_decay, 0
        self._state = ShardedState(
            module, self._zero, stage=zero_stage, world=world, averages=self.averages
        )
        self._copies = list[AveragedCopy]()
        if precision == "bf16":
            self._state.write_weights(exact)
            self._state.begin_averages()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward; at ZeRO stage 3 this gathers the weights it needs.

        The module must return tensors, or tuples, lists or dicts of them.
        """
        return self._engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        """Switch the module between training and evaluation."""
        self.module.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of one micro-batch; `loss` is divided by `accumulate` here."""
        self._engine.backward(loss)

    def sum_over_ranks(self, count: Tensor) -> PendingSum:
        """Begin to sum a count over the ranks, in turn with the gradients. Collective."""
        return PendingSum(count, self._group, self.world)

    def step(self, lr: float, grad_scale: float = 1.0) -> bool:
        """End a micro-batch; at the end of an accumulation, take the optimizer step.

        Args:
            lr: Learning rate of this step; a parameter group's is `lr` times its "lr_scale", if it
                has one.
            grad_scale: What the accumulated gradient is too large by, above 0, the same on all
                ranks: it is divided by this before its norm is taken and clipped.

        Returns:
            Whether the weights changed: False between accumulation boundaries, and when a
            gradient was not finite on some rank (see `skipped_steps`).
        """
        for group in self._zero.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        # For this call alone: backward would multiply the loss by it.
        self._zero.loss_scale = grad_scale
        self._engine.step()
        self._zero.loss_scale = 1.0
        if not self._engine.was_step_applied():
            return False
        if self._ema_decay is not None:
            self._state.update_averages(self._ema_decay(self._steps_taken))
            self._write_copies(fixed=False)
        self._steps_taken += 1
        return True

    def averaged(self) -> AbstractContextManager[None]:
        """Compute with the averaged weights instead of the trained ones inside. Collective.

        Between optimizer steps only, for evaluation; the state is not read or loaded inside. The
        weights are the same bits afterwards. After an error inside, the state can be saved, but the
        training cannot go on.

        Raises:
            RuntimeError: No average is kept.
        """
        self._check_averages()
        return self._state.averaged()

    def average_into(self, module: nn.Module, prefix: str = "encoder.") -> None:
        """Keep the averaged weights in another module, in memory as it is. Collective.

        They are copied now, after each step that is taken, and with each state that is loaded. With
        one rank that is one read of the averages; ranks gather them in the module's dtype.

        Args:
            module: Parameters on the device, in one dtype.
            prefix: Beginning of the names that the parameters have in the trained module. Those
                that are not trained there, and buffers, are copied as they are.

        Raises:
            RuntimeError: No average is kept.
            ValueError: The trained module has no parameter of a name, or one of another shape.
        """
        self._check_averages()
        self._copies.append(self._state.averaged_copy(module, prefix, self._group))
        self._state.write_copy(self._copies[-1], fixed=True)

    def _write_copies(self, *, fixed: bool) -> None:
        for copy in self._copies:
            self._state.write_copy(copy, fixed=fixed)

    def _check_averages(self) -> None:
        self._between_steps()
        if not self.averages:
            raise RuntimeError("no average of the weights is kept")

    @property
    def _group(self) -> Any:
        return self._engine.seq_data_parallel_group

    @property
    def grad_norm(self) -> Tensor | float:
        """Global gradient norm of the last step, before clipping; inf if it was skipped.

        A tensor on the device where possible: reading it there costs a wait.
        """
        return self._engine.get_global_grad_norm()

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far because a gradient was not finite; not part of the state."""
        return self._engine.skipped_steps

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the module and free the sharded state."""
        self._engine.destroy()
        # Stage 3 replaces it for the whole process, by one that rounds once more under bf16.
        nn.functional.linear = self._linear

    def state(self) -> tuple[dict[str, Tensor], int]:
        """Return the whole training state in its portable form. Collective.

        Between optimizer steps only.

        Returns:
            On rank 0 the tensors "weight/NAME", "exp_avg/NAME" and "exp_avg_sq/NAME", fp32 on the
            CPU with the shape of parameter NAME ("weight/NAME" alone where it is not trained),
            "ema/NAME" where averages are kept, and "buffer/NAME" for the buffers of the module's
            state dict; on the other ranks an empty dict. And the number of optimizer steps taken,
            on every rank.
        """
        self._between_steps()
        return self._state.read(), self._state.adam_step

    def load_state(self, tensors: Mapping[str, Tensor], adam_step: int) -> bool:
        """Load a state of any stage, precision and number of ranks. Collective.

        Averages that are kept begin from the weights where the state has none; those that are not
        kept are left out.

        Args:
            tensors: What `state` gave. Only rank 0's count, so the other ranks may pass nothing,
                and the files need not be visible to them.
            adam_step: Number of optimizer steps taken; rank 0's counts.

        Returns:
            Whether the state had averages.

        Raises:
            CheckpointError: on every rank, when the tensors do not fit the module.
        """
        self._between_steps()
        problem = self._state.misfit(tensors) if self.world.is_main else None
        averaged = has_average(tensors)
        problem, adam_step, averaged = broadcast_object((problem, adam_step, averaged), self.world)
        if problem is not None:
            raise CheckpointError(f"checkpoint does not fit the model: {problem}")
        self._state.write(tensors, adam_step, averaged=averaged)
        self._write_copies(fixed=True)
        self._steps_taken = adam_step
        return averaged

    def _between_steps(self) -> None:
        if self._engine.micro_steps % self.accumulate:
            raise RuntimeError("the state is complete only between optimizer steps")


def _check(
    module: nn.Module, optimizer: torch.optim.Optimizer, *, zero_stage: int, precision: str
) -> None:
    """Raise a ValueError for what the engine does not offer."""
    if zero_stage not in (1, 2, 3):
        raise ValueError(f"zero_stage: expected 1, 2 or 3, found {zero_stage}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision: expected fp32 or bf16, found {precision!r}")
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(f"optimizer: expected Adam or AdamW, found {type(optimizer).__name__}")
    if optimizer.defaults["amsgrad"]:
        raise ValueError("optimizer: amsgrad is not supported")
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    if len(given) != len(set(given)) or set(given) != trained:
        raise ValueError(
            f"optimizer: expected the {len(trained)} trainable parameters of the module, each "
            f"once; found {len(given)}, of which {len(set(given) & trained)} are the module's"
        )


def _import_deepspeed() -> Any:
    """Import DeepSpeed without its prints and without its hidden compilation."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns on stdout
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Else 75 s of g++ for shared-memory collectives; a killed build locks out later runs.
        with _silent_compilers():
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    return deepspeed


@contextmanager
def _silent_compilers() -> Iterator[None]:
    """Drop what the compilers print that DeepSpeed tries out.

    It does so itself where the standard error of Python is that of the process: not in a notebook.
    """
    before = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@contextmanager
def _one_optimizer_class() -> Iterator[None]:
    """Let stage 1 have the optimizer class of stage 2 with fp32 gradient accumulation as well.

    DeepSpeed gives it that class when its state is offloaded, otherwise BF16_Optimizer: without
    overlap, and without the loss scale that :meth:`TrainEngine.step` sets.
    """
    from deepspeed.runtime import engine

    check = engine.DeepSpeedEngine._do_optimizer_sanity_check

    def choose(self: Any, optimizer: Any) -> Any:
        chosen = check(self, optimizer)
        return engine.ZERO_OPTIMIZATION if chosen == engine.BFLOAT16 else chosen

    engine.DeepSpeedEngine._do_optimizer_sanity_check = choose
    try:
        yield
    finally:
        engine.DeepSpeedEngine._do_optimizer_sanity_check = check


def _limit_waiting(timeout_s: float) -> None:
    """Give every process group the run's timeout; DeepSpeed's own groups wait 30 minutes."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
