"""Runs that begin from a checkpoint, and what they take from it."""

import shutil
from dataclasses import replace

import pytest
import torch
from finetune_runs import data_overrides
from runs import lines, make_data, overrides

from ssast.engine.checkpoints.classifier import build_classifier
from ssast.engine.config import load_config
from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.finetune import FinetuneEngine, finetune
from ssast.engine.finetune_settings import Finetune
from ssast.engine.formats.open import load_pretrained, open_encoder
from ssast.engine.formats.published import save_published
from ssast.engine.model.objective import MSPM
from ssast.engine.pretrain import PretrainEngine, pretrain
from ssast.engine.train.pretraining import continue_from
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.stats import measure

QUICK = ["optim.lr=1e-4", "train.steps=1", "train.batch_size=4", "train.log_every=1"]
QUICK += ["train.validate_every=1", "data.num_threads=1"]
THEIRS = {"audio__mean": -5.5, "audio__std": 3.5, "audio__sample_rate_hz": 8000}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, data):
    """A pretraining run with settings of its own."""
    folder = tmp_path_factory.mktemp("pretrained")
    given = overrides(**THEIRS, train__steps=1, train__validate_every=1)
    assert (
        pretrain(load_config(plain(folder), [*given, *data, f"run.folder={folder / 'run'}"])) == 0
    )
    return folder / "run"


def plain(folder):
    """A configuration that sets nothing."""
    path = folder / "plain.yaml"
    path.write_text("{}\n")
    return path


def test_continued_pretraining_begins_with_the_weights_of_the_checkpoint(
    pretrained, data, tmp_path, capsys
):
    """Its first validation is the last one of the checkpoint's run."""
    run = tmp_path / "run"
    config = load_config("continue", [*QUICK, *data, f"run.folder={run}"])
    assert pretrain(config, pretrained) == 0
    before, after = lines(pretrained, "valid")[-1], lines(run, "valid")[0]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)
    stored = load_config(run / "config.yaml")
    assert (stored.audio.mean, stored.audio.sample_rate_hz) == (-5.5, 8000)
    assert stored.objective == load_config(pretrained / "config.yaml").objective
    assert stored.train.checkpoint == str(pretrained)
    shown = capsys.readouterr().out
    assert f"continued from {pretrained} (encoder, heads)" in shown
    assert f"from {pretrained}: size tiny, " in shown and "mean -5.5, std 3.5" in shown
    # It goes on without being told the checkpoint again.
    more = load_config("continue", [*QUICK, *data, f"run.folder={run}", "train.steps=2"])
    assert pretrain(more, resume=True) == 0
    assert [line["step"] for line in lines(run, "train")] == [1, 2]


@pytest.mark.parametrize("form", ["run", "published", "encoder", "classifier"])
def test_pretraining_continues_from_every_kind_of_model(pretrained, tmp_path, form):
    """With another number of frames: the position embedding is resized."""
    source = pretrained
    if form == "published":
        source = tmp_path / "published.pth"
        model, config = load_pretrained(pretrained)
        save_published(model, source, config.audio)
    loaded = open_encoder(source)
    if form == "encoder":
        loaded = replace(loaded, model=loaded.encoder)
    if form == "classifier":
        loaded = replace(loaded, model=make_classifier(loaded.config))
    audio = replace(loaded.audio, num_frames=80)
    torch.manual_seed(1)
    module = MSPM(replace(loaded.config, audio=audio, finetune=None))
    fresh = module.generative_head[0].weight.clone()
    taken = continue_from(module, loaded.model)
    for name, value in loaded.encoder.state_dict().items():
        if name != "embed.pos_embed":
            assert torch.equal(module.encoder.state_dict()[name], value), name
    if form in ("run", "published"):
        theirs = loaded.model.generative_head[0].weight
        assert torch.equal(module.generative_head[0].weight, theirs)
    else:
        assert torch.equal(module.generative_head[0].weight, fresh)
    heads = "heads" if form in ("run", "published") else "fresh heads"
    assert taken == f"encoder, {heads}, position embedding resized from 2 x 3 to 2 x 5"


def make_classifier(config):
    return build_classifier(replace(config, finetune=Finetune()), 3)


def test_fine_tuning_takes_the_input_of_the_checkpoint(pretrained, splits, tmp_path):
    run = tmp_path / "run"
    given = [*QUICK, *data_overrides(splits), "finetune.epochs=1"]
    config = load_config("classifier", [*given, f"run.folder={run}"])
    assert finetune(config, pretrained) == 0
    stored = load_config(run / "config.yaml")
    assert stored.audio == load_config(pretrained / "config.yaml").audio
    assert stored.model == load_config(pretrained / "config.yaml").model
    engine = FinetuneEngine.from_checkpoint(pretrained, overrides=["audio.num_frames=64"])
    assert engine.config.audio == replace(stored.audio, num_frames=64)


def test_clips_of_a_recipe_that_are_not_there_are_left_out_for_others(
    pretrained, splits, tmp_path, capsys
):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {valid: gone.json}\nfinetune: {folds: gone, test: gone/eval.json}\n")
    given = [*QUICK, f"data.train={splits['train']}", "finetune.epochs=1"]
    config = load_config(path, [*given, f"run.folder={tmp_path / 'run'}"])
    assert finetune(config, pretrained) == 0
    shown = capsys.readouterr().out
    for key, value in (("data.valid", "gone.json"), ("finetune.test", "gone/eval.json")):
        assert f"{key} {value} of mine.yaml is left out: it is not there" in shown
    assert "finetune.folds gone of mine.yaml is left out: data.train is given" in shown
    named = load_config(path, [*given, "finetune.test=gone.json", f"run.folder={tmp_path / 'two'}"])
    with pytest.raises(ConfigError, match=r"finetune\.test: gone\.json"):
        finetune(named, pretrained)
    engine = FinetuneEngine.from_checkpoint(pretrained, 3, path, given)
    with pytest.raises(ConfigError, match=r"data\.valid: misspelt\.json"):
        engine.fit(splits["train"], "misspelt.json", folder=tmp_path / "three")


def test_clips_of_a_recipe_that_do_not_fit_to_the_users_are_named(splits, tmp_path):
    (tmp_path / "eval.csv").write_text(f"wav,label\n{splits['valid']},no_such_class\n")
    path = tmp_path / "mine.yaml"
    path.write_text(f"finetune: {{test: {tmp_path / 'eval.csv'}}}\n")
    given = [*QUICK, f"data.train={splits['train']}", f"run.folder={tmp_path / 'run'}"]
    with pytest.raises(DataError, match=r"no_such_class.*finetune.test is that of mine.yaml"):
        finetune(load_config(path, given))
    given.append(f"finetune.test={tmp_path / 'eval.csv'}")
    with pytest.raises(DataError, match=r"no_such_class(?!.*is that of)"):
        finetune(load_config(path, given))


def test_mean_and_std_can_be_measured_on_the_training_clips(data, tmp_path, capsys):
    run = tmp_path / "run"
    given = overrides(audio__stats="measure", train__steps=1, train__validate_every=1)
    assert pretrain(load_config(plain(tmp_path), [*given, *data, f"run.folder={run}"])) == 0
    stored = load_config(run / "config.yaml").audio
    folder = data[0].partition("=")[2]
    stats = measure(folder, spec=fbank_spec(stored), num_threads=1)
    assert stored.mean == pytest.approx(stats.mean, abs=1e-4)
    assert stored.std == pytest.approx(stats.std, abs=1e-4)
    assert f"mean {stored.mean:g}, audio.std {stored.std:g}: measured on 10 of 10" in (
        capsys.readouterr().out
    )
    # A resumed run does not measure again, not even other clips' worth.
    more = [*given, *data, f"run.folder={run}", "train.steps=2"]
    assert pretrain(load_config(plain(tmp_path), more), resume=True) == 0
    assert load_config(run / "config.yaml").audio == stored


def test_a_warm_up_that_does_not_end_is_warned_of(data, tmp_path, capsys):
    given = overrides(optim__warmup_steps=5, train__steps=2, train__validate_every=2)
    assert pretrain(load_config(plain(tmp_path), [*given, *data, f"run.folder={tmp_path}/r"])) == 0
    assert "the warm-up takes 5 steps, the run 2" in capsys.readouterr().out


def test_a_checkpoint_of_another_shape_is_refused_before_anything_is_read(pretrained, tmp_path):
    config = load_config("continue", ["model.size=small", "data.train=/gone"])
    with pytest.raises(CheckpointError, match=r"has model\.size 'tiny'"):
        pretrain(config, pretrained)
    with pytest.raises(ConfigError, match=r"set finetune\.checkpoint"):
        load_config("classifier", ["train.checkpoint=x"])


@pytest.mark.parametrize("task", ["pretraining", "fine-tuning"])
def test_a_run_is_resumed_when_the_checkpoint_it_began_from_is_gone(
    pretrained, data, splits, tmp_path, capsys, task
):
    gone, run = tmp_path / "gone", tmp_path / "run"
    shutil.copytree(pretrained, gone)
    recipe, given, train = ("continue", [*QUICK, *data], pretrain)
    if task == "fine-tuning":
        given = [*QUICK[2:], *data_overrides(splits), "finetune.epochs=1"]
        recipe, train = "classifier", finetune
    config = load_config(recipe, [*given, f"run.folder={run}"])
    assert train(config, gone) == 0
    before = load_config(run / "config.yaml")
    shutil.rmtree(gone)
    longer = "finetune.epochs=2" if task == "fine-tuning" else "train.steps=2"
    config = load_config(recipe, [*given, f"run.folder={run}", longer])
    with pytest.raises(CheckpointError, match="gone"):
        train(load_config(recipe, [*given, f"run.folder={tmp_path / 'new'}"]), gone, resume=True)
    capsys.readouterr()
    assert train(config, gone, resume=True) == 0
    assert "not needed, as the run goes on from its own" in capsys.readouterr().out
    after = load_config(run / "config.yaml")
    assert (after.audio, after.model) == (before.audio, before.model)
    assert after.objective == before.objective and after.audio.mean == THEIRS["audio__mean"]


def test_the_engine_continues_evaluates_and_saves(pretrained, data, tmp_path):
    train, valid = (given.partition("=")[2] for given in data)
    engine = PretrainEngine.from_checkpoint(pretrained, overrides=QUICK)
    before = engine.evaluate(valid)
    assert (before["num_scored"], before["num_clips"]) == (3, 3)
    last = lines(pretrained, "valid")[-1]
    for name in ("loss", "infonce_loss", "mse_loss", "pretext_accuracy"):
        assert before[name] == pytest.approx(last[name], rel=1e-6)
    with pytest.raises(ConfigError, match="nothing is pretrained yet"):
        engine.save(tmp_path / "early")
    engine.fit(train, valid, folder=tmp_path / "run")
    after = engine.evaluate(valid)
    assert after["loss"] == pytest.approx(lines(tmp_path / "run", "valid")[-1]["loss"], rel=1e-6)
    saved = engine.save(tmp_path / "weights")
    again = PretrainEngine.from_checkpoint(saved)
    assert again.evaluate(valid)["loss"] == pytest.approx(after["loss"], rel=1e-3)  # float16
    with pytest.raises(ConfigError, match="there is no model yet"):
        PretrainEngine.from_config("tiny_patch").evaluate(valid)
