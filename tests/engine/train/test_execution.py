"""How the training pass is executed: what is tried at the start, refused, chosen and used."""

import json
import re

import devices
import noise_runs
import pytest
import torch
from runs import lines, overrides
from tape import TapeTools
from torch.utils._pytree import tree_map_only

from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.model.blocks import Block
from ssast.engine.model.objective import MSPM
from ssast.engine.pretrain import pretrain
from ssast.engine.train import execution
from ssast.engine.train.execution import Mode, start_execution
from ssast.engine.train.pretraining import Pretraining

EAGER, GRAPHS = Mode(False, False), Mode(False, True)
COMPILED = Mode(True, False)


@pytest.fixture
def tools(monkeypatch, device):
    """A GPU's own tools, or tapes in place of its graphs."""
    tools = TapeTools() if device == devices.CPU else execution.CudaTools()
    monkeypatch.setattr(execution, "tools_of", lambda device: tools)
    return tools


@pytest.fixture
def start(world):
    """Build a task and its engine, and choose the execution."""

    def start(steps=1, **changed):
        task, engine = noise_runs.build(world, **changed)
        found, batches = start_execution(task, task.context.batches(), steps=steps)
        return found, task, engine, batches

    return start


@pytest.mark.parametrize(
    "changed",
    [
        {"train__accumulation_steps": 2},
        {"train__precision": "bf16", "train__zero_stage": 2},
        {"finetune": True},
    ],
    ids=str,
)
def test_a_run_by_graphs_is_the_run_without(changed, world, start, tools):
    """Masks, mixup and the other augmentations are replayed too, for other clips and epochs."""
    task, engine = noise_runs.build(world, **changed)
    expected, state = noise_runs.train(task, engine, task.context.batches())
    engine.close()
    found, task, engine, batches = start(**changed | {"train__cuda_graphs": True})
    assert found.mode == GRAPHS and found.ms.keys() == {EAGER, GRAPHS}
    calls = []
    task.encoder.register_forward_pre_hook(lambda *_: calls.append("eager"))
    outputs, other = noise_runs.train(task, engine, batches)
    assert not calls and devices.same(outputs, expected) and devices.same(other, state)
    engine.close()


def test_the_choice_is_printed_and_stored(tools, config_file, data, tmp_path, capsys):
    logs = []
    for name, graphs in (("eager", False), ("graphs", "auto")):
        given = overrides(
            train__steps=7,
            train__validate_every=4,
            train__cuda_graphs=graphs,
            profile__steps=2 * (graphs == "auto"),
        )
        run = tmp_path / name
        assert pretrain(load_config(config_file, [*given, *data, f"run.folder={run}"])) == 0
        logs.append((lines(run, "train"), lines(run, "valid")))
        facts = json.loads((run / "environment.json").read_text())
    assert devices.same(logs[1], logs[0])
    parts_ms = json.loads((run / "profile" / "table.json").read_text())["parts_ms"]
    if facts["execution"]["mode"] == "CUDA graphs":
        assert parts_ms["forward"] > 0 and parts_ms["embed"] == parts_ms["mlp"] == 0
    assert facts["attention"]
    assert facts["execution"]["mode"] in ("CUDA graphs", "eager")
    reason = facts["execution"]["rejected"]["compiled"]
    assert "too few to repay compiling" in reason
    if devices.current() == devices.CPU:
        assert facts["execution"]["mode"] == "CUDA graphs"  # it has fewer launches
    printed = capsys.readouterr().out
    assert f"training pass, compiled: not used: {reason}" in printed
    assert f"training pass: {facts['execution']['mode']} (eager" in printed


def counting(method):
    """A method whose result depends on how often it was called: a number of the host."""
    calls = []

    def call(self, *arguments, **named):
        calls.append(1)
        return method(self, *arguments, **named), len(calls)

    return call


def late_loss(self, *inputs):
    losses, calls = counted_forward(self, *inputs)
    return losses | {"mse_loss": losses["mse_loss"] * calls}


def late_masks(self, clip_ids, epochs, num_frames=None):
    masks, calls = counted_masks(self, clip_ids, epochs, num_frames)
    return [m._replace(mask_ids=(m.mask_ids + calls) % 6) for m in masks]


counted_forward, counted_masks = counting(MSPM.forward), counting(MSPM.draw_masks)
honest_inputs, honest_forward = Pretraining.inputs, MSPM.forward


def inputs_of_the_first_epoch(self, batch, *, training):
    (fbank, _), valid = honest_inputs(self, batch, training=training)
    first = self.module.draw_masks(batch.clip_ids, batch.epochs.new_full((4,), batch.epochs[0]))
    return (fbank, *first), valid


@pytest.mark.parametrize(
    ("owner", "name", "planted", "reason"),
    [
        (MSPM, "forward", late_loss, "wrong: "),
        (MSPM, "draw_masks", late_masks, "wrong: "),
        (Pretraining, "inputs", inputs_of_the_first_epoch, "waits for the device|synchroniz"),
        (
            Pretraining,
            "inputs",
            lambda *a, **k: ((*honest_inputs(*a, **k)[0], 3), honest_inputs(*a, **k)[1]),
            "an input is no tensor: int 3",
        ),
    ],
    ids=["loss", "masks", "epoch", "argument"],
)
def test_numbers_of_the_host_are_refused(owner, name, planted, reason, monkeypatch, tools, start):
    monkeypatch.setattr(owner, name, planted)
    if "int 3" in reason:
        monkeypatch.setattr(MSPM, "forward", lambda self, f, m, number: honest_forward(self, f, m))
    found, task, engine, _ = start()
    assert found.mode == EAGER and re.search(reason, found.rejected[GRAPHS])
    assert "forward" not in vars(task.module) and "inputs" not in vars(task)
    engine.close()


def test_padding_masks_wait_for_the_device(tools, start):
    found, _, engine, _ = start(audio__ignore_padding=True)
    assert found.mode == EAGER
    assert re.search("waits for the device|synchroniz", found.rejected[GRAPHS])
    engine.close()


def test_a_batch_of_silence_proves_nothing(tools, start, monkeypatch):
    monkeypatch.setattr(
        MSPM,
        "forward",
        lambda *a: {name: value * torch.nan for name, value in honest_forward(*a).items()},
    )
    found, _, engine, _ = start()
    assert found.rejected[GRAPHS].startswith("the first batch has no finite loss")
    engine.close()


def test_graphs_that_leave_no_memory_are_refused(world):
    mode, reasons = noise_runs.choose(world, full=0)
    assert mode == EAGER and reasons[0].startswith("leaves 0.0 GiB of memory, a step takes")


def test_without_memory_for_a_trial_the_run_begins_without_one(tools, start, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(execution._Trials, "_exact_pass", full)
    found, _, engine, _ = start()
    assert found.mode == EAGER and set(found.rejected) == {COMPILED, GRAPHS}
    assert all(reason.startswith("no memory for a pass") for reason in found.rejected.values())
    engine.close()
    with pytest.raises(ConfigError, match=r"cuda_graphs: true does not work here: no memory"):
        start(train__cuda_graphs=True)


def test_all_ranks_use_the_same_mode(two_ranks):
    (mode, other), (mode_, reasons) = two_ranks.run(noise_runs.choose, 1)
    assert mode == mode_ == EAGER
    assert other[0] == "another rank cannot use it" and reasons[0].startswith("leaves 0.0 GiB")
    assert [mode for mode, _ in two_ranks.run(noise_runs.choose, 2)] == [GRAPHS, GRAPHS]


def compile_to(factor):
    """A compiler whose blocks give what they should, if the factor is 1."""

    def rounded(x):
        return factor * x + (1 - factor) * x.roll(1, -1)

    def compile_block(self):
        if factor is None:
            raise FileNotFoundError("no compiler\nanywhere")

        def run(*arguments, **named):
            found = self._call_impl(*arguments, **named)
            return tree_map_only(torch.Tensor, rounded, found)

        self._compiled_call_impl = run

    return compile_block


@pytest.mark.parametrize(
    ("precision", "factor", "reason"),
    [
        ("fp32", 1.0, None),
        ("fp32", 1.02, "wrong: "),
        ("fp32", None, "FileNotFoundError: no compiler"),
        ("bf16", 1.0, None),
        ("bf16", 1 + 2**-8, None),  # rounding
        ("bf16", 2.0, "wrong: "),
    ],
)
def test_blocks_are_compiled_where_that_is_right(
    precision, factor, reason, monkeypatch, tools, start
):
    monkeypatch.setattr(Block, "compile", compile_to(factor))
    found, task, engine, _ = start(
        steps=10**7, train__cuda_graphs=False, train__precision=precision
    )
    assert GRAPHS not in found.rejected | found.ms
    assert COMPILED in (found.ms if reason is None else found.rejected)
    if reason is not None:
        assert found.mode == EAGER and found.rejected[COMPILED].startswith(reason)
    assert [block._compiled_call_impl is not None for block in task.encoder.blocks] == [
        found.mode == COMPILED
    ]
    engine.close()


@pytest.mark.parametrize(("compiled_ms", "mode"), [(9.0, COMPILED), (9.8, EAGER)])
def test_a_tie_is_not_decided_by_noise(compiled_ms, mode, monkeypatch, tools, start):
    monkeypatch.setattr(Block, "compile", compile_to(1.0))
    times = iter((10.0, compiled_ms))
    monkeypatch.setattr(tools, "milliseconds", lambda work: next(times))
    found, _, engine, _ = start(steps=10**7, train__cuda_graphs=False)
    assert found.mode == mode and found.ms == {EAGER: 10.0, COMPILED: compiled_ms}
    engine.close()


def test_what_is_asked_for_is_used_or_an_error(tools, start, monkeypatch):
    found, _, engine, _ = start(train__cuda_graphs=True)
    assert found.mode == GRAPHS
    engine.close()
    monkeypatch.setattr(tools, "free_bytes", lambda: 0)
    with pytest.raises(ConfigError, match=r"cuda_graphs: true does not work here: leaves 0.0 GiB"):
        start(train__cuda_graphs=True, train__compile=False)


@pytest.mark.parametrize(
    ("changed", "rejected"),
    [
        ({"train__cuda_graphs": False, "train__compile": False}, []),
        ({"train__zero_stage": 3}, [COMPILED, GRAPHS]),
    ],
    ids=["off", "stage 3"],
)
def test_nothing_is_tried_where_there_is_no_choice(changed, rejected, tools, world):
    task, engine = noise_runs.build(world, **changed)
    found, batches = start_execution(task, iter(()), steps=1)
    assert found.mode == EAGER and list(found.rejected) == rejected and not list(batches)
    engine.close()


def test_a_cpu_has_no_graphs(world):
    with pytest.raises(ConfigError, match=r"cuda_graphs: true needs a GPU, found cpu"):
        noise_runs.build(world, train__cuda_graphs=True)
    task, engine = noise_runs.build(world)
    found, _ = start_execution(task, iter(()), steps=1)
    assert found.mode == EAGER and not found.lines()
    engine.close()
