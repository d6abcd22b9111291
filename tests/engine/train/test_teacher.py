"""Objectives with a teacher: after each step it has the averaged weights, also in graphs."""

import shutil

import devices
import noise_runs
import pytest
import teacher_objective
import torch
from runs import lines, overrides
from tape import TapeRecorder

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.formats.open import open_model
from ssast.engine.model.encoder import Block
from ssast.engine.model.objective import MSPM
from ssast.engine.planning.synthetic import SyntheticContext, noise
from ssast.engine.pretrain import pretrain
from ssast.engine.train.building import build_engine
from ssast.engine.train.graphs import CudaRecorder, GraphedModule
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.step import train_step

KIND = {"objective__kind": teacher_objective.KIND}
SILENT = {"objective__kind": f"{teacher_objective.KIND}.silent"}


@pytest.fixture(scope="module")
def configure(config_file, data):
    def configure(run, **changed):
        given = overrides(**KIND | changed)
        return load_config(config_file, [*given, *data, f"run.folder={run}"])

    return configure


@pytest.fixture(scope="module")
def run(tmp_path_factory, configure):
    """A run of 12 steps with a teacher, which no test may change."""
    run = tmp_path_factory.mktemp("runs") / "taught"
    assert pretrain(configure(run)) == 0
    return run


def newest(run):
    return Checkpoints.load(Checkpoints(run / "checkpoints").latest())[0]


def test_the_teacher_is_no_part_of_the_module(world):
    task, engine = noise_runs.build(world, **KIND)
    module, teacher = task.module, task.module.teacher
    assert teacher is task.teacher and teacher is not module.encoder
    names = {name for name, _ in module.named_modules()} | module.state_dict().keys()
    assert not any("teacher" in name for name in names)
    assert all(part is not teacher for part in module.modules())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    module.train()
    assert not teacher.training
    engine.close()
    fresh = type(module)(task.context.config)
    assert fresh.teacher is fresh.encoder  # as it is opened
    assert MSPM(noise_runs.configure()).teacher is None


@pytest.mark.parametrize(
    "changed",
    [
        {"train__accumulation_steps": 2},
        {"train__precision": "bf16", "train__zero_stage": 3},
        {"train__offload": "cpu", "train__zero_stage": 2},
    ],
    ids=str,
)
def test_the_teacher_has_a_plain_average_in_float64(changed, world):
    task, engine = noise_runs.build(world, **KIND | changed)
    averages = {n: p.double() for n, p in engine.state()[0].items() if n.startswith("weight/")}
    dtype = next(task.teacher.parameters()).dtype
    assert (dtype == torch.bfloat16) == ("train__precision" in changed)
    for step in range(3):
        noise_runs.train(task, engine, task.context.batches(), steps=1)
        decay = min(0.5 + 0.1 * step, 0.9)
        for name, value in engine.state()[0].items():
            if name in averages:
                averages[name] = decay * averages[name] + (1 - decay) * value.double()
        for name, value in task.teacher.named_parameters():
            expected = averages[f"weight/encoder.{name}"].to(dtype)
            tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(value.cpu(), expected, rtol=tolerance, atol=1e-7)
    engine.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_have_one_teacher(stage, world, two_ranks):
    expected, losses = teacher_objective.taught(world, stage=1)
    for found, other in two_ranks.run(teacher_objective.taught, stage):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
        assert other == pytest.approx(losses, rel=1e-4)


def test_a_step_that_is_skipped_leaves_the_teacher(world):
    task, engine = noise_runs.build(world, **KIND)
    noise_runs.train(task, engine, task.context.batches(), steps=1)
    before = [p.clone() for p in task.teacher.parameters()]
    batch = next(task.context.batches())
    batch.fbank.fill_(torch.nan)
    updated, _ = train_step(task, engine, iter([batch]), 1e-3)
    assert not updated and all(map(torch.equal, before, task.teacher.parameters()))
    engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replayed_pass_sees_the_teacher_as_it_is(precision, world, device):
    settings = KIND | {"train__precision": precision, "train__accumulation_steps": 2}
    task, engine = noise_runs.build(world, **settings)
    expected, state = noise_runs.train(task, engine, task.context.batches())
    engine.close()
    task, engine = noise_runs.build(world, **settings)
    batches, calls = task.context.batches(), []
    inputs, _ = task.inputs(next(task.context.batches()), training=True)
    recorder = TapeRecorder() if device == devices.CPU else CudaRecorder()
    GraphedModule(task.module, inputs, recorder).install()
    task.teacher.register_forward_pre_hook(lambda *_: calls.append("eager"))
    found, other = noise_runs.train(task, engine, batches)
    assert not calls and devices.same(found, expected) and devices.same(other, state)
    engine.close()


def test_blocks_of_both_are_compiled(world, monkeypatch):
    compiled = []
    monkeypatch.setattr(Block, "compile", lambda self: compiled.append(self))
    task, engine = noise_runs.build(world, **KIND, train__compile=True)
    assert compiled == [*task.encoder.blocks, *task.teacher.blocks] == task.blocks()
    engine.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_resumes_bit_for_bit(stage, run, configure, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "checkpoints/step000000012")
    assert pretrain(configure(again, train__zero_stage=stage), resume=True) == 0
    ours, theirs = newest(again), newest(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    assert lines(again, "valid") == lines(run, "valid")


def test_a_run_is_validated_once_and_opened_with_its_average(run):
    assert [line["step"] for line in lines(run, "valid")] == [0, 6, 12]
    assert lines(run, "ema") == []
    loaded = open_model(run)
    assert loaded.weights == "ema" and loaded.model.teacher is loaded.model.encoder
    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.best() is None, "targets move: no validation tells which weights are better"
    latest = Checkpoints.load(checkpoints.latest())[0]
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, latest[f"ema/{name}"])


def test_the_teacher_begins_from_the_weights_that_are_continued(run, configure, world, tmp_path):
    config, found = configure(tmp_path), open_model(run)
    fbank = noise(config, 4)
    context = SyntheticContext(config, world, fbank=fbank)
    task = Pretraining(context, [""] * 4, [""] * 4, found)
    engine = build_engine(task)
    for name, value in found.model.encoder.named_parameters():
        assert torch.equal(value, task.teacher.get_parameter(name).cpu()), name
    engine.close()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (KIND | {"train__ema": 0.9}, r"train.ema 0.9: expected null, as objective.kind 'teacher_"),
        (SILENT, r"train.ema null: expected the decay of the teacher of objective.kind 'teacher_"),
    ],
)
def test_one_setting_decides_the_decay(changed, message, world):
    with pytest.raises(ConfigError, match=message):
        noise_runs.build(world, **changed)
    task, engine = noise_runs.build(world, **SILENT, train__ema=0.9)
    noise_runs.train(task, engine, task.context.batches(), steps=1)
    state, weight = engine.state()[0], task.teacher.norm.weight
    assert torch.equal(weight.cpu(), state["ema/encoder.norm.weight"])
    engine.close()
