import json
import random
import re
import signal
import subprocess
import sys

import devices
import pytest
import torch
from runs import call, call_on_two_ranks, environment, lines, make_data, overrides, stop_at

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import dump_config, load_config
from ssast.engine.errors import ConfigError
from ssast.engine.formats.open import load_pretrained
from ssast.engine.model.blocks import Block
from ssast.engine.pretrain import pretrain
from ssast.kernels.attention import attention_backend
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.errors import DataError


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, config_file):
    """A run that was never interrupted, from the command line."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = call("pretrain", config_file, *overrides(), *data, f"run.folder={run}")
    assert done.returncode == 0, done.stderr
    return run, done


def weights(run):
    tensors, meta = Checkpoints.load(Checkpoints(run / "checkpoints").latest())
    return tensors, meta


def assert_same_run(one, other):
    for split in ("train", "valid"):
        assert devices.same(lines(one, split), lines(other, split))
    (ours, meta), (theirs, other_meta) = weights(one), weights(other)
    assert devices.same(meta["progress"], other_meta["progress"])
    assert devices.same(ours, theirs)


def test_a_run_leaves_what_it_should(whole):
    run, done = whole
    assert done.stderr == ""
    assert "step 12/12" in done.stdout and "clips/s" in done.stdout and "wait" in done.stdout
    names = {"config.yaml", "metrics.jsonl", "environment.json", "curves.png", "checkpoints"}
    assert names | {"tensorboard"} <= {path.name for path in run.iterdir()}
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 13))
    assert [line["step"] for line in lines(run, "valid")] == [0, 6, 12]
    facts = json.loads((run / "environment.json").read_text())
    with fast_matmul():
        attention = attention_backend(torch.device("cpu"), torch.float32)
    assert (facts["world_size"], facts["precision"], facts["attention"]) == (1, "fp32", attention)
    kept = {path.name for path in (run / "checkpoints").glob("step*")}
    best = Checkpoints(run / "checkpoints").best()
    assert kept == {"step000000006", "step000000008", "step000000012"} | {best.name}


def test_the_loss_falls(device, whole):
    train, valid = lines(whole[0], "train"), lines(whole[0], "valid")
    assert train[-1]["loss"] < train[0]["loss"]
    assert valid[-1]["loss"] < valid[0]["loss"]


def test_the_pretrained_model_is_that_of_the_best_checkpoint(whole):
    model, config = load_pretrained(whole[0])
    tensors, _ = Checkpoints.load(Checkpoints(whole[0] / "checkpoints").best())
    assert config.train.steps == 12
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[f"weight/{name}"])


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(device, whole, data, config_file, tmp_path):
    run = tmp_path / "killed"
    arguments = ("pretrain", config_file, *overrides(), *data, f"run.folder={run}")
    step = random.randint(6, 9)  # the first checkpoint is that of step 4
    status = stop_at(step, signal.SIGKILL, run, *arguments)
    assert status == -signal.SIGKILL, f"killed at step {step}"
    done = call(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(whole[0], run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_stopped_run_saves_first_and_resumes(number, status, whole, data, config_file, tmp_path):
    run = tmp_path / "stopped"
    arguments = ("pretrain", config_file, *overrides(), *data, f"run.folder={run}")
    assert stop_at(2, number, run, *arguments) == status
    stopped_at = lines(run, "train")[-1]["step"]
    latest = Checkpoints(run / "checkpoints").latest()
    assert latest.name == f"step{stopped_at:09d}"
    assert call(*arguments, "--resume").returncode == 0
    assert lines(run, "train") == lines(whole[0], "train")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_train_as_one(stage, whole, data, config_file, tmp_path):
    run = tmp_path / "two"
    settings = overrides(train__zero_stage=stage)
    done = call_on_two_ranks("pretrain", config_file, *settings, *data, f"run.folder={run}")
    assert done.returncode == 0, done.stderr
    for split in ("train", "valid"):
        for ours, theirs in zip(lines(run, split), lines(whole[0], split), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5)
    assert json.loads((run / "environment.json").read_text())["launcher"] == "torchrun"
    # One process goes on where two have stopped.
    more = call(
        "pretrain", config_file, *overrides(train__steps=14), *data, f"run.folder={run}", "--resume"
    )
    assert more.returncode == 0, more.stderr
    assert lines(run, "train")[-1]["step"] == 14


@pytest.mark.slow
def test_the_deepspeed_launcher_starts_a_run(whole, data, config_file, tmp_path):
    run = tmp_path / "deepspeed"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    program = ["--module", "ssast.engine.cli", "pretrain", str(config_file)]
    done = subprocess.run(
        [*launcher, *program, *overrides(), *data, f"run.folder={run}"],
        capture_output=True,
        text=True,
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "environment.json").read_text())["launcher"] == "deepspeed"
    assert lines(run, "train")[-1]["loss"] == pytest.approx(
        lines(whole[0], "train")[-1]["loss"], rel=2e-4
    )


def load(config_file, data, run, **changed):
    return load_config(config_file, [*overrides(**changed), *data, f"run.folder={run}"])


@pytest.mark.parametrize(
    "changed",
    [
        {"objective__kind": "discriminative"},
        {"objective__kind": "generative"},
        {"objective__two_pass": True},
        {"objective__softmax_axis": "paper", "objective__mask": "official"},
        {"objective__mask": "random", "model__patch": [32, 2]},
        {"train__precision": "bf16", "optim__name": "adamw", "optim__schedule": "cosine"},
        {"train__accumulation_steps": 2, "optim__max_grad_norm": 1.0, "train__zero_stage": 2},
    ],
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_every_setting_trains(device, changed, config_file, data, tmp_path):
    config = load(config_file, data, tmp_path / "run", **{"train__steps": 8} | changed)
    assert pretrain(config) == 0
    valid = lines(tmp_path / "run", "valid")
    assert valid[-1]["loss"] < valid[0]["loss"]
    contrastive = {"infonce_loss", "pretext_accuracy", "pretext_chance"}
    generative = {"mse_loss"}
    expected = {"joint": contrastive | generative, "discriminative": contrastive}
    assert expected.get(config.objective.kind, generative) == valid[0].keys() - {"step", "loss"}


def test_accumulation_changes_nothing(device, whole, config_file, data, tmp_path):
    assert pretrain(load(config_file, data, tmp_path / "run", train__accumulation_steps=2)) == 0
    for ours, theirs in zip(
        lines(tmp_path / "run", "train"), lines(whole[0], "train"), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_computing_blocks_again_changes_nothing(
    device, stage, config_file, data, tmp_path, monkeypatch
):
    calls = []
    honest = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *a, **k: calls.append(0) or honest(*a, **k))
    found, counts = [], []
    for every in (None, 1, 2):
        calls.clear()
        run = tmp_path / f"every-{every}"
        changed = {"model__depth": 3, "train__steps": 3, "train__zero_stage": stage}
        changed |= {"train__cuda_graphs": False}  # which call no block
        assert (
            pretrain(
                load(config_file, data, run, train__activation_checkpoint_every=every, **changed)
            )
            == 0
        )
        found.append(lines(run, "train"))
        counts.append(len(calls))
    # Not to the last bit: between recomputed blocks no addition is part of the next LayerNorm.
    for again in found[1:]:
        for ours, theirs in zip(again, found[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    # Three blocks again in each of three steps, or two of them.
    assert (counts[1] - counts[0], counts[2] - counts[0]) == (9, 6)


def test_a_run_is_repeated_from_its_own_configuration(whole, tmp_path):
    config = load_config(whole[0] / "config.yaml", [f"run.folder={tmp_path / 'again'}"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    done = call("pretrain", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert_same_run(whole[0], tmp_path / "again")


def test_a_finished_run_is_not_overwritten(whole, config_file, data):
    config = load(config_file, data, whole[0])
    with pytest.raises(ConfigError, match=r"holds a run \(step000000012\): add --resume"):
        pretrain(config)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model__depth": 2}, "model.depth was 1 when .* began, now it is 2"),
        ({"audio__mean": 0.0}, "audio.mean was"),
        ({"train__seed": 1}, "train.seed was 0"),
        ({"objective__num_masked": 2}, "objective.num_masked was 3"),
    ],
)
def test_resuming_refuses_another_model(changed, message, whole, config_file, data):
    with pytest.raises(ConfigError, match=message):
        pretrain(load(config_file, data, whole[0], **changed), resume=True)


def test_resuming_refuses_other_clips(whole, config_file, data, tmp_path):
    other = make_data(tmp_path, num_train=11)
    with pytest.raises(ConfigError, match=r"lists other clips \(11\) than when .* began \(10\)"):
        pretrain(load(config_file, other, whole[0]), resume=True)
    with pytest.raises(ConfigError, match=r"data.window_s \(None, now 0.25\) gives other clips"):
        pretrain(load(config_file, data, whole[0], data__window_s=0.25), resume=True)


def test_a_run_goes_on_that_does_not_know_a_setting(config_file, data, tmp_path):
    config = load(config_file, data, tmp_path / "run", train__steps=4)
    assert pretrain(config) == 0
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    tensors, meta = Checkpoints.load(checkpoints.latest())
    del meta["config"]["objective"]["two_pass"], meta["config"]["profile"]
    checkpoints.save({name: t.clone() for name, t in tensors.items()}, meta, step=4)
    assert pretrain(load(config_file, data, tmp_path / "run", train__steps=6), resume=True) == 0
    other = load(config_file, data, tmp_path / "run", train__steps=8, objective__two_pass=True)
    with pytest.raises(ConfigError, match=r"objective\.two_pass was False when"):
        pretrain(other, resume=True)


def test_a_torn_checkpoint_is_passed_over(device, config_file, data, tmp_path):
    run = tmp_path / "run"
    assert pretrain(load(config_file, data, run, train__save_every=2, train__steps=4)) == 0
    state = run / "checkpoints" / "step000000004" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    assert pretrain(load(config_file, data, run, train__steps=6), resume=True) == 0
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 7))


def test_without_held_out_clips_a_share_is_held_out(config_file, data, tmp_path):
    config = load(config_file, data[:1], tmp_path / "run", data__valid_share=0.3, train__steps=2)
    assert pretrain(config) == 0
    meta = weights(tmp_path / "run")[1]
    assert meta["clips"]["count"] == 7


def test_bad_files_are_named_and_do_not_end_a_run(config_file, tmp_path):
    data = make_data(tmp_path)
    bad = tmp_path / "train" / "bad.wav"
    bad.write_text("no audio")
    config = load(config_file, data, tmp_path / "run", data__max_rejected=0.5)
    assert pretrain(config) == 0
    rejected = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    (line,) = map(json.loads, rejected)  # once, though it came up in each epoch
    assert (line["path"], line["split"]) == (str(bad), "train")
    assert line["reason"]


def test_too_many_bad_files_end_a_run(config_file, tmp_path):
    data = make_data(tmp_path)
    for path in (tmp_path / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="rejected"):
        pretrain(load(config_file, data, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"data__train": None}, ConfigError, "data.train is not set: give a manifest or a folder"),
        ({"data__train": "/nowhere.json"}, DataError, "/nowhere.json: cannot be read: No such"),
        ({"data__train": "/nowhere"}, DataError, "/nowhere"),
        (
            {"train__accumulation_steps": 3},
            ConfigError,
            "train.batch_size 4 cannot be divided over 1",
        ),
    ],
)
def test_mistakes_are_found_before_any_work(changed, error, message, config_file, data, tmp_path):
    arguments = [*data, *overrides(**changed), f"run.folder={tmp_path / 'run'}"]
    with pytest.raises(error, match=message):
        pretrain(load_config(config_file, arguments))
    assert not (tmp_path / "run").exists()


def test_diverging_training_stops_with_advice(config_file, data, tmp_path):
    config = load(config_file, data, tmp_path / "run", optim__lr=1e18, train__max_skipped_steps=3)
    from ssast.engine.errors import TrainingError

    with pytest.raises(
        TrainingError, match=r"no step from (\d+) to \d+ gave a finite gradient"
    ) as caught:
        pretrain(config)
    first = int(re.search(r"from (\d+)", str(caught.value))[1])
    saved, meta = weights(tmp_path / "run")
    assert meta["progress"]["step"] == first + 2
    assert all(tensor.isfinite().all() for name, tensor in saved.items() if "rng" not in name)
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").open()]
    assert [line["step"] for line in skipped] == [first, first + 1, first + 2]
    assert all(len(line["clips"]) == 4 and line["rank"] == 0 for line in skipped)
