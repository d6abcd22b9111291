"""One training step: what it returns, and what is logged of it."""

import math

import pytest
import torch
from runs import lines, overrides

from ssast.engine.config import load_config
from ssast.engine.data.clips import find_clips
from ssast.engine.parallel.ranks import World
from ssast.engine.planning.synthetic import SyntheticContext, noise, synthetic_task
from ssast.engine.pretrain import pretrain
from ssast.engine.train.building import build_engine
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.step import Totals, train_step
from ssast.engine.train.task import RunContext

WORLD = World(0, 0, 1, "single", torch.device("cpu"))


def test_totals_are_means_over_clips_and_the_latest_values():
    totals = Totals(WORLD.device)
    for loss, valid in ((1.0, [True, True]), (4.0, [True, False]), (100.0, [False, False])):
        totals.add({"loss": torch.tensor(loss)}, torch.tensor(valid))
    totals.add({"loss": torch.tensor(1e9)}, torch.tensor([True]), counts=False)
    found = totals.read(WORLD, grad_norm=torch.tensor(0.5), other=2.0)
    assert found == {"loss": 2.0, "grad_norm": 0.5, "other": 2.0}
    again = totals.read(WORLD, grad_norm=math.inf)
    assert math.isnan(again["loss"]) and again["grad_norm"] == math.inf


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_trains_on_as_many_micro_batches_as_are_accumulated(accumulate, world, config_file):
    config = load_config(config_file, overrides(train__accumulation_steps=accumulate))
    fbank = noise(config, config.train.batch_size // accumulate)
    task = synthetic_task(SyntheticContext(config, world, fbank=fbank))
    engine, marks = build_engine(task), []
    before = task.module.encoder.blocks[0].attn.qkv.weight.detach().clone()
    with task.train_batches(0) as batches:
        updated, micro_batches = train_step(task, engine, batches, 1e-3, marks.append)
    engine.close()
    assert updated and len(micro_batches) == accumulate
    assert not torch.equal(before, task.module.encoder.blocks[0].attn.qkv.weight)
    assert marks == [*["data", "inputs", "backward", "optimizer"] * accumulate, "other"]
    for micro_batch in micro_batches:
        assert micro_batch.outputs["infonce_loss"].shape == (len(fbank),)
        assert micro_batch.valid.all() and micro_batch.means["loss"].ndim == 0


def test_gradient_norms_are_logged(config_file, data, tmp_path):
    """In each line, and that of the second step is PyTorch's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = overrides(train__steps=4, train__log_every=2, optim__warmup_steps=4)
    config = load_config(config_file, [*settings, *data, f"run.folder={tmp_path / 'run'}"])
    assert pretrain(config) == 0
    norms = [line["grad_norm"] for line in lines(tmp_path / "run", "train")]
    assert len(norms) == 2 and all(0 < norm < math.inf for norm in norms)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    shown = [event.value for event in board.Scalars("train/grad_norm")]
    assert shown == pytest.approx(norms)

    torch.manual_seed(config.train.seed)
    task = Pretraining(RunContext(config, WORLD), *find_clips(config))
    optimizer = task.optimizer()
    with task.train_batches(0) as batches:
        for step in range(2):
            inputs, valid = task.inputs(next(batches), training=True)
            optimizer.zero_grad()
            task.means(task.module(*inputs), valid)["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(task.module.parameters(), math.inf)
            optimizer.param_groups[0]["lr"] = config.optim.lr * (step + 1) / 4
            optimizer.step()
    assert norms[0] == pytest.approx(norm.item(), rel=1e-4)
