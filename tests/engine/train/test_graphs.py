"""A module whose passes are replayed trains exactly as the module itself."""

import devices
import noise_runs
import pytest
import torch
from tape import TapeRecorder

from ssast.engine.train.graphs import CudaRecorder, GraphedFunction, GraphedModule


@pytest.fixture
def recorder(device):
    """CUDA graphs, or tapes in their place."""
    return TapeRecorder() if device == devices.CPU else CudaRecorder()


SETTINGS = {
    "stage 1": {},
    "stage 2": {"train__zero_stage": 2},
    "fp32 sums of two": {"train__accumulation_steps": 2},
    "stage 2, sums of two": {"train__accumulation_steps": 2, "train__zero_stage": 2},
    "bf16": {"train__precision": "bf16", "train__accumulation_steps": 2},
    "offload": {"train__offload": "cpu"},
    "two passes, recomputed": {
        "objective__two_pass": True,
        "model__depth": 2,
        "train__activation_checkpoint_every": 1,
    },
    "fine-tuning": {"finetune": True},
    "only the head": {"finetune": True, "finetune__freeze": "encoder"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_replayed_passes_train_to_the_same_bits(name, world, recorder):
    task, engine = noise_runs.build(world, **SETTINGS[name])
    expected, state = noise_runs.train(task, engine, task.context.batches())
    engine.close()

    task, engine = noise_runs.build(world, **SETTINGS[name])
    batches, calls = task.context.batches(), []
    inputs, _ = task.inputs(next(task.context.batches()), training=True)
    GraphedModule(task.module, inputs, recorder).install()
    task.encoder.register_forward_pre_hook(lambda *_: calls.append("eager"))
    found, other = noise_runs.train(task, engine, batches)
    assert not calls, "the module ran by itself"
    assert devices.same(found, expected) and devices.same(other, state)
    engine.close()


def test_other_calls_run_as_before(world, recorder):
    task, engine = noise_runs.build(world)
    inputs, _ = task.inputs(next(task.context.batches()), training=True)
    smaller = tuple(torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x[:2], inputs))
    wanted = task.module(*smaller)
    graphs, calls = GraphedModule(task.module, inputs, recorder), []
    graphs.install()
    task.encoder.register_forward_pre_hook(lambda *_: calls.append("eager"))
    found = task.module(*smaller)
    assert devices.same(found, wanted)
    with torch.no_grad():
        task.module(*inputs)
    task.module.eval()
    task.module(*inputs)
    assert len(calls) == 3
    task.module.train()
    task.module(*inputs)
    assert len(calls) == 3
    graphs.remove()
    task.module(*inputs)
    assert len(calls) == 4
    engine.close()


def test_what_a_graph_cannot_hold_is_refused(recorder, device):
    ones = torch.ones(2, device=device)
    with pytest.raises(RuntimeError, match="an input is no tensor: int 3"):
        GraphedFunction(lambda inputs: inputs[0], (ones, 3), recorder)
    with pytest.raises(RuntimeError, match=r"waits for the device|synchroniz"):
        GraphedFunction(lambda x: x * x.sum().item(), ones, recorder)


def test_results_are_not_overwritten_by_the_next_replay(recorder, device):
    ones = torch.ones(2, device=device)
    double = GraphedFunction(lambda x: {"twice": 2 * x, "same": x}, ones, recorder)
    first, second = double(torch.tensor([1.0, 2.0], device=device)), double(2 * ones + ones)
    assert first["twice"].tolist() == [2, 4] and first["same"].tolist() == [1, 2]
    assert second["twice"].tolist() == [6, 6]
    other = torch.ones(3, device=device)  # of another shape: not replayed
    assert double(other)["twice"].tolist() == [2, 2, 2]
