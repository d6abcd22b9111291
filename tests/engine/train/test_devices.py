"""What computes mixes no devices: every tensor is made where the others are."""

import noise_runs
import pytest
import torch
from fake_gpu import fake_gpu

from ssast.engine.data.clips import fbank_spec
from ssast.engine.evaluation import features
from ssast.engine.formats.open import LoadedModel
from ssast.engine.model.encoder import layer_states, time_states
from ssast.engine.model.objective import MSPM
from ssast.engine.parallel.ranks import World
from ssast.engine.planning.synthetic import SyntheticContext, synthetic_task
from ssast.engine.train.step import Totals
from ssast.kernels.fbank import fbank


def task_on(gpu, **changed):
    config = noise_runs.configure(**changed)
    fbank = torch.zeros(config.train.batch_size, config.audio.num_frames, config.audio.n_mels)
    world = World(0, 0, 1, "single", gpu)
    task = synthetic_task(SyntheticContext(config, world, fbank=fbank))
    task.module.to(gpu)
    return task


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"objective__two_pass": True, "objective__kind": "joint"},
        {"objective__softmax_axis": "paper", "objective__mask": "random"},
        {"finetune": True},
        {"finetune": True, "finetune__loss": "bce", "finetune__pooling": "cls"},
        {"finetune": True, "finetune__drop_tokens": 0.3, "finetune__drop_columns": 1},
    ],
    ids=str,
)
def test_a_training_pass_stays_on_its_device(changed):
    with fake_gpu() as gpu:
        task = task_on(gpu, **changed)
        with task.train_batches(0) as batches:
            batch = next(batches)
        for training in (True, False):
            task.module.train(training)
            inputs, valid = task.inputs(batch, training=training)
            outputs = task.module(*inputs)
            means = task.means(outputs, valid)
            totals = Totals(gpu)
            totals.add(means, valid)
        assert {t.device for t in (*outputs.values(), *means.values(), totals._sums)} == {gpu}


def test_a_tensor_on_another_device_is_noticed(monkeypatch):
    honest = MSPM.forward
    monkeypatch.setattr(
        MSPM,
        "forward",
        lambda self, fbank, *masks: {
            name: value + torch.arange(len(value))
            for name, value in honest(self, fbank, *masks).items()
        },
    )
    with fake_gpu() as gpu, pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        task = task_on(gpu)
        inputs, _ = task.inputs(next(task.context.batches()), training=True)
        task.module(*inputs)


def test_embedding_stays_on_its_device(tmp_path):
    config = noise_runs.configure()
    with fake_gpu() as gpu:
        module = MSPM(config).eval().to(gpu)
        loaded = LoadedModel(module, config, tmp_path, "run")
        waves, lengths = torch.zeros(2, 5000).to(gpu), torch.full((2,), 5000, device=gpu)
        fbanks = fbank(waves, lengths, fbank_spec(config.audio))
        vectors, counts = features.embed_batch(loaded, fbanks, lengths // 160, "clip")
        states = time_states(module.encoder, layer_states(module.encoder, fbanks)[-1])
        assert vectors.device == counts.device == states.device == gpu


def test_a_classifier_stays_on_its_device():
    with fake_gpu() as gpu:
        task = task_on(gpu, finetune=True)
        module = task.module.eval()
        fbank = next(task.context.batches()).fbank
        frames = torch.full((len(fbank),), 40, device=gpu)
        logits = super(type(module), module).forward(fbank, frames)
        assert logits.device == gpu
