"""The training engine: forward, backward, optimizer step and state over all ranks.

The one file that knows DeepSpeed (written for 0.19). What it guarantees to its callers:

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
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssast.engine.checkpoint import CheckpointError
from ssast.engine.distributed import World, broadcast_object

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


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
) -> dict[str, Any]:
    """DeepSpeed's settings; whatever is not named keeps DeepSpeed's default.

    Args:
        world_size: number of ranks.
        batch_size: clips per micro-batch and rank.
        accumulate: micro-batches per optimizer step.
        zero_stage: 1 shards the optimizer state, 2 the gradients as well, 3 the weights as well.
        precision: "fp32" or "bf16".
        max_grad_norm: clip the global gradient norm to this; None does not clip.
        num_params: number of weights of the model.
        cuda: whether the ranks compute on GPUs.
    """
    # The default of 5e8 makes one bucket of the whole model: 0.9 GiB and no overlap with backward.
    bucket = 2 * (min(max(num_params // 4, 500_000), 50_000_000) // 2)
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "overlap_comm": cuda,
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
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if accumulate > 1 and zero_stage > 1:
            # At stage 1 this setting selects another optimizer class, without overlap.
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class TrainEngine:
    """A module and its Adam, sharded over the ranks.

    for batch in batches:
        loss = engine(batch)
        engine.backward(loss)
        stepped = engine.step(lr)

    Args:
        module: the model, with the same structure on every rank; rank 0's weights count. Under
            bf16 its parameters become bfloat16 (its buffers keep their type).
        optimizer: torch.optim.Adam or AdamW over exactly the trainable parameters of `module`.
        world: this process's world.
        batch_size: clips per micro-batch and rank.
        accumulate: micro-batches per optimizer step.
        zero_stage: 1, 2 or 3.
        precision: "fp32" or "bf16" (weights and gradients bf16, master weights and Adam fp32).
        max_grad_norm: clip the global gradient norm to this; None does not clip.

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
        precision: Literal["fp32", "bf16"] = "fp32",
        max_grad_norm: float | None = None,
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
        config = deepspeed_config(
            world_size=world.world_size,
            batch_size=batch_size,
            accumulate=accumulate,
            zero_stage=zero_stage,
            precision=precision,
            max_grad_norm=max_grad_norm,
            num_params=sum(p.numel() for p in module.parameters()),
            cuda=world.device.type == "cuda",
        )
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config
        )
        _limit_waiting(world.timeout_s)
        self._create_adam_state()
        if precision == "bf16":
            self._write(exact, kinds=("weight",))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the module; at ZeRO stage 3 this gathers the weights it needs.

        The module must return tensors, or tuples, lists or dicts of them.
        """
        return self._engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        """Switches the module between training and evaluation."""
        self.module.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch; `loss` is a scalar and is divided by `accumulate` here."""
        self._engine.backward(loss)

    def step(self, lr: float) -> bool:
        """Ends a micro-batch; at the end of an accumulation, takes the optimizer step.

        Args:
            lr: learning rate of every parameter group for this step.

        Returns:
            Whether the weights changed: False between accumulation boundaries, and when a
            gradient was not finite on some rank (see `skipped_steps`).
        """
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        return self._engine.was_step_applied()

    @property
    def grad_norm(self) -> Tensor | float | None:
        """Global gradient norm before clipping of the last step, inf if it was skipped.

        A tensor on the device where possible: reading it there costs a wait.
        """
        return self._engine.get_global_grad_norm()

    @property
    def skipped_steps(self) -> int:
        """Steps left out so far because a gradient was not finite; not part of the state."""
        return self._engine.skipped_steps

    def close(self) -> None:
        """Removes DeepSpeed's hooks from the module and frees the sharded state."""
        self._engine.destroy()

    def state(self) -> tuple[dict[str, Tensor], int]:
        """The whole training state in its portable form. Collective; between optimizer steps only.

        Returns:
            On rank 0 the tensors "weight/NAME", "exp_avg/NAME" and "exp_avg_sq/NAME", fp32 on the
            CPU with the shape of parameter NAME ("weight/NAME" alone where it is not trained),
            and "buffer/NAME" for the buffers of the module's state dict; on the other ranks an
            empty dict. And the number of optimizer steps taken, on every rank.
        """
        self._between_steps()
        tensors: dict[str, Tensor] = {}
        for name, param in self.module.named_parameters():
            for kind in KINDS if param.requires_grad else KINDS[:1]:
                value = self._gather(param, kind)
                if self.world.is_main:
                    tensors[f"{kind}/{name}"] = value.detach().to("cpu", torch.float32, copy=True)
        if self.world.is_main:
            for name, buffer in self._buffers().items():
                tensors[f"buffer/{name}"] = buffer.detach().to("cpu", copy=True)
        return tensors, self._adam_step()

    def load_state(self, tensors: Mapping[str, Tensor], adam_step: int) -> None:
        """Continues from a state of any stage, precision and number of ranks. Collective.

        Args:
            tensors: what `state` gave. Only rank 0's count, so the other ranks may pass nothing,
                and the files need not be visible to them.
            adam_step: number of optimizer steps taken; rank 0's counts.

        Raises:
            CheckpointError: on every rank, when the tensors do not fit the module.
        """
        self._between_steps()
        problem = self._misfit(tensors) if self.world.is_main else None
        problem, adam_step = broadcast_object((problem, adam_step), self.world)
        if problem is not None:
            raise CheckpointError(f"checkpoint does not fit the model: {problem}")
        for flat in self._flats():
            self._zero.optimizer.state[flat]["step"].fill_(adam_step)
        self._write(tensors, kinds=KINDS)
        for name, buffer in self._buffers().items():
            self._receive(tensors.get(f"buffer/{name}"), buffer)

    def _between_steps(self) -> None:
        if self._engine.micro_steps % self.accumulate:
            raise RuntimeError("the state is complete only between optimizer steps")

    def _buffers(self) -> dict[str, Tensor]:
        """Buffers that belong to the state dict, by name."""
        names = {name for name, _ in self.module.named_buffers()} & set(self.module.state_dict())
        return {name: b for name, b in self.module.named_buffers() if name in names}

    def _flats(self) -> list[Tensor]:
        """This rank's fp32 partitions, one per group: what the optimizer updates."""
        if self.zero_stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _adam_step(self) -> int:
        return max(int(self._zero.optimizer.state[flat]["step"]) for flat in self._flats())

    def _create_adam_state(self) -> None:
        """Creates the zero moments that Adam would create in its first step.

        So the state can be read and written before that, and DeepSpeed links it for every group:
        by itself it links after the first group's first step, when the others have none yet.
        """
        adam = self._zero.optimizer
        on_device = adam.defaults.get("fused") or adam.defaults.get("capturable")
        for flat in self._flats():
            values = flat.detach()
            device = values.device if on_device else "cpu"
            adam.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(values),
                "exp_avg_sq": torch.zeros_like(values),
            }
        if self.zero_stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _gather(self, param: nn.Parameter, kind: str) -> Tensor:
        """The whole weight or moment of a parameter. Collective."""
        from deepspeed import utils, zero

        if not param.requires_grad:
            with zero.GatheredParameters([param], enabled=self.zero_stage == 3):
                return param.detach().clone()
        if kind == "weight":
            return utils.safe_get_full_fp32_param(param)
        return utils.safe_get_full_optimizer_state(param, kind)

    def _misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """How the tensors differ from the module's names and shapes; None if they fit."""
        expected = {f"buffer/{name}": tuple(b.shape) for name, b in self._buffers().items()}
        for name, param in self.module.named_parameters():
            for kind in KINDS if param.requires_grad else KINDS[:1]:
                expected[f"{kind}/{name}"] = tuple(getattr(param, "ds_shape", param.shape))
        found = {
            name: tuple(tensor.shape)
            for name, tensor in tensors.items()
            if name.partition("/")[0] in (*KINDS, "buffer")
        }
        for what, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unknown", sorted(found.keys() - expected.keys())),
        ):
            if names:
                return f"{len(names)} tensors {what}, the first is {names[0]}"
        for name, shape in expected.items():
            if found[name] != shape:
                return f"{name} has shape {list(found[name])}, expected {list(shape)}"
        return None

    def _receive(self, source: Tensor | None, target: Tensor) -> None:
        """Copies rank 0's tensor into the target on every rank. Collective."""
        value = torch.empty_like(target, memory_format=torch.contiguous_format)
        if self.world.is_main and source is not None:
            value.copy_(source)
        if self.world.world_size > 1:
            dist.broadcast(value, src=0)
        target.copy_(value)

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor], kinds: tuple[str, ...]) -> None:
        """Sets weights and moments from rank 0's full tensors on every rank. Collective."""
        from deepspeed import utils, zero

        if self.zero_stage == 3:
            self._zero._partition_all_parameters()
        for name, param in self.module.named_parameters():
            if not param.requires_grad:
                with zero.GatheredParameters([param], 0, enabled=self.zero_stage == 3):
                    self._receive(tensors.get(f"weight/{name}"), param.data)
                continue
            shape = getattr(param, "ds_shape", param.shape)
            for kind in kinds:
                value = torch.empty(shape, dtype=torch.float32, device=self.world.device)
                self._receive(tensors.get(f"{kind}/{name}"), value)
                if self.zero_stage == 3:
                    part = self._partition(param, value)
                    if kind == "weight":
                        utils.safe_set_local_fp32_param(param, part)
                    else:
                        utils.safe_set_local_optimizer_state(param, part, kind)
                elif kind == "weight":
                    utils.safe_set_full_fp32_param(param, value)
                else:
                    utils.safe_set_full_optimizer_state(param, value, kind)
        self._refresh_module()

    def _partition(self, param: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's padded share at stage 3; DeepSpeed's own setter forgets the padding."""
        size = param.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = nn.functional.pad(
            value.flatten(), (0, size * self.world.world_size - value.numel())
        )
        return padded[self.world.rank * size : (self.world.rank + 1) * size]

    def _refresh_module(self) -> None:
        """Copies the master weights into the module, as the end of an optimizer step does."""
        if self.zero_stage < 3:
            self._zero.update_lp_params()
            return
        for index in range(len(self._flats())):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        if self._zero.persistent_parameters:  # small ones stay whole on every rank
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)


def _check(
    module: nn.Module, optimizer: torch.optim.Optimizer, *, zero_stage: int, precision: str
) -> None:
    """Raises a ValueError for what the engine does not offer."""
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
    """Imports DeepSpeed without its prints and without its hidden compilation."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns on stdout
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Else 75 s of g++ for shared-memory collectives; a killed build locks out later runs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    return deepspeed


def _limit_waiting(timeout_s: float) -> None:
    """Gives every process group the run's time limit; DeepSpeed's own groups wait 30 minutes."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
