"""The training state of a sharded model in one portable form, independent of ZeRO stage and ranks.

    "weight/NAME"      fp32 master weight of parameter NAME, in its own shape
    "exp_avg/NAME"     Adam's first and
    "exp_avg_sq/NAME"  second moment; both absent where the parameter is not trained
    "ema/NAME"         moving average of a trained parameter, where one is kept
    "buffer/NAME"      buffers of the module's state dict

DeepSpeed's own formats cannot cross stages 1/2 <-> 3 or another number of ranks. Written for
DeepSpeed 0.19, whose omissions it works around where noted.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssast.engine.parallel.averaged_copy import AveragedCopy, find_pieces, whole_shape
from ssast.engine.parallel.ranks import World

KINDS = ("weight", "exp_avg", "exp_avg_sq")
EMA = "ema"  # a fourth kind; it is a state of the optimizer, which is sharded with the others


class ShardedState:
    """Reads and writes the state of a module whose Adam is sharded by DeepSpeed.

    Every method but `misfit` and `averaged_copy` is collective.

    Args:
        module: the module that DeepSpeed wraps.
        zero: DeepSpeed's ZeRO optimizer around Adam or AdamW.
        stage: its stage, 1 to 3.
        world: this process's world.
        averages: whether a moving average of the weights is kept.
    """

    def __init__(
        self, module: nn.Module, zero: Any, *, stage: int, world: World, averages: bool = False
    ) -> None:
        self.module = module
        self.stage = stage
        self.world = world
        self.kinds = (*KINDS, EMA) if averages else KINDS
        self._zero = zero
        self._create_moments()

    @property
    def adam_step(self) -> int:
        """Number of optimizer steps taken."""
        return max(int(self._zero.optimizer.state[flat]["step"]) for flat in self._flats())

    def read(self) -> dict[str, Tensor]:
        """Return the whole state on the CPU of rank 0; an empty dict on the other ranks."""
        tensors: dict[str, Tensor] = {}
        for name, param in self.module.named_parameters():
            for kind in self.kinds if param.requires_grad else KINDS[:1]:
                value = self._gather(param, kind)
                if self.world.is_main:
                    tensors[f"{kind}/{name}"] = value.detach().to("cpu", torch.float32, copy=True)
        if self.world.is_main:
            for name, buffer in self._buffers().items():
                tensors[f"buffer/{name}"] = buffer.detach().to("cpu", copy=True)
        return tensors

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Return how the tensors differ from the module's names and shapes; None if they fit.

        They may lack the averages, or have some that are not kept.
        """
        kinds = self.kinds if has_average(tensors) else KINDS
        expected = {f"buffer/{name}": tuple(b.shape) for name, b in self._buffers().items()}
        for name, param in self.module.named_parameters():
            for kind in kinds if param.requires_grad else KINDS[:1]:
                expected[f"{kind}/{name}"] = tuple(whole_shape(param))
        found = {
            name: tuple(tensor.shape)
            for name, tensor in tensors.items()
            if name.partition("/")[0] in (*kinds, "buffer")
        }
        for what, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unknown", sorted(found.keys() - expected.keys())),
        ):
            if names:
                return f"{what}: {names[0]} ({len(names)} in all)"
        for name, shape in expected.items():
            if found[name] != shape:
                return f"{name} has shape {list(found[name])}, expected {list(shape)}"
        return None

    def write(self, tensors: Mapping[str, Tensor], adam_step: int, *, averaged: bool) -> None:
        """Replace the state by rank 0's; the other ranks may pass nothing.

        Args:
            tensors: on rank 0 all that `misfit` expects.
            adam_step: number of optimizer steps taken, the same on every rank.
            averaged: whether rank 0 has averages; if not, those that are kept begin anew.
        """
        for flat in self._flats():
            self._zero.optimizer.state[flat]["step"].fill_(adam_step)
        self._write_parameters(tensors, self.kinds if averaged else KINDS)
        if not averaged:
            self.begin_averages()
        for name, buffer in self._buffers().items():
            self._receive(tensors.get(f"buffer/{name}"), buffer)

    def write_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the master weights alone by rank 0's "weight/NAME"."""
        self._write_parameters(tensors, KINDS[:1])

    @torch.no_grad()
    def begin_averages(self) -> None:
        """Set the averages to the weights as they are, where averages are kept."""
        for average, flat in zip(self._averages(), self._flats(), strict=False):
            average.copy_(flat)

    @torch.no_grad()
    def update_averages(self, decay: float) -> None:
        """Move the averages to decay * average + (1 - decay) * weight.

        In few launches, over flat partitions; not collective, as each rank has its share of both.
        """
        torch._foreach_lerp_(self._averages(), self._flats(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the module have the averages as its weights; not to be read or written meanwhile.

        After an error inside, the state is right, but the module is not: it may be that of a rank
        that is gone, without which no weights can be gathered.
        """
        self._exchange()
        self._refresh_evaluated()
        try:
            yield
        except BaseException:
            self._exchange()
            raise
        self._exchange()
        self._refresh_evaluated()

    def averaged_copy(self, module: nn.Module, prefix: str, group: Any) -> AveragedCopy:
        """Return another module as a copy of the averages; see :class:`AveragedCopy`."""
        pieces = find_pieces(
            self.module, self._zero, stage=self.stage, world_size=self.world.world_size
        )
        return AveragedCopy(module, self.module, prefix, pieces, world=self.world, group=group)

    def write_copy(self, copy: AveragedCopy, *, fixed: bool) -> None:
        """Set a copy to the averages as they are; see :meth:`AveragedCopy.write`."""
        copy.write(self._averages(), fixed=fixed)

    def _exchange(self) -> None:
        # The storages change places: no value is copied, and what views them is right again after
        # the second time.
        for average, flat in zip(self._averages(), self._flats(), strict=True):
            average.data, flat.data = flat.data, average.data

    def _refresh_evaluated(self) -> None:
        if self.stage == 3:  # a forward pass leaves some parameters whole
            self._zero._partition_all_parameters()
        self._refresh_module()

    def _averages(self) -> list[Tensor]:
        """Return this rank's averages in the order of the partitions; none where none are kept."""
        states = [self._zero.optimizer.state[flat] for flat in self._flats()]
        return [state[EMA] for state in states if EMA in state]

    def _flats(self) -> list[Tensor]:
        """Return this rank's fp32 partitions, which the optimizer updates; padded with zeros."""
        if self.stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _buffers(self) -> dict[str, Tensor]:
        """Return the buffers that belong to the state dict, by name."""
        found: dict[str, Tensor] = {}
        for prefix, module in self.module.named_modules():
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    found[name] = buffer
        return found

    def _create_moments(self) -> None:
        """Create the zero moments that Adam would create in its first step.

        So the state can be read and written before that step, and DeepSpeed links the moments
        of every group: by itself it does so after the first group's first step, when the other
        groups have none yet, and they stay unreadable.
        """
        adam = self._zero.optimizer
        on_device = adam.defaults.get("fused") or adam.defaults.get("capturable")
        for flat in self._flats():
            values = flat.detach()
            device = values.device if on_device else torch.device("cpu")
            adam.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(values),
                "exp_avg_sq": torch.zeros_like(values),
            }
            if EMA in self.kinds:
                adam.state[flat][EMA] = values.clone()
        if self.stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _gather(self, param: nn.Parameter, kind: str) -> Tensor:
        """Return the whole weight or moment of a parameter, in its shape, on every rank."""
        from deepspeed import utils, zero

        if not param.requires_grad:
            with zero.GatheredParameters([param], enabled=self.stage == 3):
                return param.detach().clone()
        if kind == "weight":
            return utils.safe_get_full_fp32_param(param)
        return utils.safe_get_full_optimizer_state(param, kind)

    def _receive(self, source: Tensor | None, target: Tensor) -> None:
        """Copy rank 0's source into the target of every rank."""
        value = torch.empty_like(target, memory_format=torch.contiguous_format)
        if self.world.is_main and source is not None:
            value.copy_(source)
        if self.world.world_size > 1:
            dist.broadcast(value, src=0)
        target.copy_(value)

    @torch.no_grad()
    def _write_parameters(self, tensors: Mapping[str, Tensor], kinds: tuple[str, ...]) -> None:
        """Set these kinds from rank 0's tensors, then the module's own copies of the weights."""
        from deepspeed import zero

        if self.stage == 3:
            self._zero._partition_all_parameters()
        for name, param in self.module.named_parameters():
            if not param.requires_grad:
                with zero.GatheredParameters([param], 0, enabled=self.stage == 3):
                    self._receive(tensors.get(f"weight/{name}"), param.data)
                continue
            for kind in kinds:
                value = torch.empty(
                    whole_shape(param), dtype=torch.float32, device=self.world.device
                )
                self._receive(tensors.get(f"{kind}/{name}"), value)
                self._scatter(param, kind, value)
        self._refresh_module()

    def _scatter(self, param: nn.Parameter, kind: str, value: Tensor) -> None:
        """Put this rank's share of a whole weight or moment into its partition."""
        from deepspeed import utils

        if self.stage < 3 and kind == "weight":
            utils.safe_set_full_fp32_param(param, value)
            return
        if self.stage < 3:
            utils.safe_set_full_optimizer_state(param, value, kind)
            return
        # DeepSpeed's setter of whole values forgets the padding of the last rank's share.
        size = param.ds_tensor.numel()  # type: ignore[attr-defined]
        missing = size * self.world.world_size - value.numel()
        shares = nn.functional.pad(value.flatten(), (0, missing)).view(-1, size)
        if kind == "weight":
            utils.safe_set_local_fp32_param(param, shares[self.world.rank])
        else:
            utils.safe_set_local_optimizer_state(param, shares[self.world.rank], kind)

    def _refresh_module(self) -> None:
        """Copy the master weights into the module, as the end of an optimizer step does."""
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        for index in range(len(self._flats())):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        if self._zero.persistent_parameters:  # the small ones stay whole on every rank
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)


def has_average(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a state holds averaged weights."""
    return any(name.startswith(f"{EMA}/") for name in tensors)
