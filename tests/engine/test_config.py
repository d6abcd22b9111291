import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ssast.engine.config import CONFIGS, Config, dump_config, from_plain, load_config, to_plain
from ssast.engine.errors import ConfigError

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_there_is_a_recipe_for_each_published_model():
    published = {f"{s}_{k}" for s in ("tiny", "small", "base") for k in ("patch", "frame")}
    assert published | {"demo", "large", "huge", "giant"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_is_written_back(name, tmp_path):
    config = load_config(name)
    assert config.run.folder == f"runs/{name}"
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert from_plain(to_plain(config)) == config


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_recipes_are_as_published(size):
    for kind, patch, mask in (("patch", (16, 16), "official"), ("frame", (128, 2), "random")):
        config = load_config(f"{size}_{kind}")
        assert (config.model.size, config.model.patch) == (size, patch)
        assert (config.objective.mask, config.objective.num_masked) == (mask, 400)
        assert (config.audio.mean, config.audio.std) == (-4.2677393, 4.5689974)
        rate, batch = (5e-4, 120) if size == "tiny" else (1e-4, 24)
        assert (config.optim.lr, config.optim.betas) == (rate, (0.95, 0.999))
        assert config.train.batch_size == batch
        assert (config.optim.weight_decay, config.optim.warmup_steps) == (5e-7, 1000)
        assert config.train.steps * config.train.batch_size == 19_200_000


def test_overrides_go_before_the_file(tmp_path):
    path = write(tmp_path, "train: {steps: 5}\nmodel:\n  size: small\n")
    config = load_config(path, ["train.steps=7", "optim.lr=1e-4", "model.patch=[128, 2]"])
    assert (config.train.steps, config.optim.lr) == (7, 1e-4)
    assert (config.model.size, config.model.patch) == ("small", (128, 2))
    assert config.run.folder == "runs/mine"


@pytest.mark.parametrize(
    "path",
    ["/x/a #1.json", "#1.json", "/x/a: b.json", "[a].json", "{a}", "caf\udce9", "*a", "&a", "- a"],
)
def test_paths_on_the_command_line_are_taken_literally(path, tmp_path):
    assert load_config(write(tmp_path, ""), [f"data.train={path}"]).data.train == path
    quoted = load_config(write(tmp_path, ""), [f"data.train={json.dumps(path)}"])
    assert quoted.data.train == path


def test_byte_order_marks_of_a_configuration(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "c.yaml").write_text("run: {folder: caf\u00e9}", encoding)
        assert load_config(tmp_path / "c.yaml").run.folder == "caf\u00e9"


def test_a_run_is_repeated_from_its_stored_configuration(tmp_path):
    (tmp_path / "first").mkdir()
    path = tmp_path / "first" / "config.yaml"
    path.write_text("train: {steps: 5}")
    assert load_config(path).run.folder == "runs/first"


def test_an_empty_file_and_an_empty_section_are_the_defaults(tmp_path):
    assert load_config(write(tmp_path, ""), ["run.folder=x"]) == from_plain(
        {"run": {"folder": "x"}}
    )
    assert load_config(write(tmp_path, "train:\nmodel:\n")).train == Config().train


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
        ("steps=3", "unknown key steps; did you mean train.steps?"),
        ("trian.steps=3", "unknown key trian; did you mean train"),
        ("model.size=bse", "model.size must be one of tiny, .*got 'bse'; did you mean base?"),
        ("train.steps=many", "train.steps must be a whole number, got 'many'"),
        ("train.steps=1.5", "train.steps must be a whole number, got 1.5"),
        ("train.steps=true", "train.steps must be a whole number, got True"),
        ("train.compile=1", "train.compile must be one of auto, true, false, got 1"),
        (
            "train.compile=ture",
            "train.compile must be one of auto, true, false, got 'ture'",
        ),
        (
            "train={zero_stage: 3, cuda_graphs: true}",
            "train.cuda_graphs: true needs train.zero_stage 1 or 2",
        ),
        ("train.steps=0", "train.steps must be at least 1, got 0"),
        ("train.steps=", "train.steps must be a whole number, got None"),
        ("optim.lr=-1", "optim.lr must be at least 0, got -1.0"),
        ("optim.lr=.nan", "optim.lr must be at least 0, got nan"),
        ("optim.lr=fast", "optim.lr must be a number, got 'fast'"),
        ("optim.betas=[0.9, 1.0]", "optim.betas must be between 0 and 0.999999, got 1.0"),
        ("optim.betas=[0.9]", r"optim.betas must be a list of 2, got \[0.9\]"),
        ("model.patch=16", "model.patch must be a list of 2, got 16"),
        ("model.patch=[16, x]", r"model.patch\[1\] must be a whole number, got 'x'"),
        ("model.patch=[16, 2000]", "model.patch .* does not fit"),
        ("data.train=3", "data.train must be a string, got 3"),
        ("run.loggers=wandb", "run.loggers must be a list, got 'wandb'"),
        ("run.loggers=[tensorbord]", r"run.loggers\[0\] must be one of .*mean tensorboard?"),
        ("objective.num_masked=511", "objective.num_masked must be at most 510 of the 8 x 64"),
        ("objective={kind: joint, clones: 4}", "objective.clones is for .* latent, got 'joint'"),
        ("optim.min_lr=1e-6", "optim.min_lr is for optim.schedule cosine, got 'plateau'"),
        (
            "optim={schedule: constant, plateau_patience: 5}",
            "optim.plateau_patience is for optim.schedule plateau, got 'constant'",
        ),
        ("optim.decay_every=2", "optim.decay_every is for optim.schedule multistep, got 'plateau'"),
        ("train.zero_stage=0", "train.zero_stage must be 1, 2 or 3, got 0: "),
        ("model=3", "model: expected a mapping"),
        ("train.steps", "expected section.key=value, got 'train.steps'"),
        (".steps=1", "expected section.key=value"),
        ("train.steps=[", "train.steps: .* is not YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(override, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path, ""), [override])
    assert "\n" not in str(error.value)


def test_a_recipe_may_hold_the_keys_of_other_schedules(tmp_path):
    recipe = write(tmp_path, "optim: {plateau_patience: 5, min_lr: 1e-6}")
    for schedule in ("constant", "cosine", "plateau"):
        given = [f"optim.schedule={schedule}", "optim.decay_factor=0.5"]  # its default
        assert load_config(recipe, given).optim.plateau_patience == 5


def test_what_needs_the_other_kind_of_training_is_refused(tmp_path):
    for text, override, message in (
        ("{}", "optim.schedule=multistep", "multistep needs epochs"),
        ("finetune: {}", "train.spike_factor=20", "train.spike_factor is for pretraining"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(write(tmp_path, text), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.schedule=plateau", "plateau follows the validation loss, which says little"),
        ("objective.two_pass=true", "objective.two_pass needs objective.kind joint, got 'latent'"),
        ("objective.mse_weight=5", "objective.mse_weight is for objective.kind joint, discrim"),
        ("objective.softmax_axis=paper", "objective.softmax_axis is for .*generative, got 'lat"),
        ("objective.num_masked=512", "objective.num_masked must be at most 511 of the 8 x 64"),
        ("objective.clones=65", "objective.clones must be between 1 and 64, got 65"),
        ("objective.teacher_decay=[0.9, 0.8]", r"teacher_decay must not fall, got \[0.9, 0.8\]"),
        ("objective.teacher_decay=0.9", "objective.teacher_decay must be a list of 2"),
    ],
)
def test_mistakes_with_latent_targets(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config("eat_tiny", [override])
    assert "\n" not in str(error.value)


def test_latent_targets_have_their_own_share_of_masked_patches(tmp_path):
    text = "{objective: {kind: latent}, optim: {schedule: cosine}}"
    assert load_config(write(tmp_path, text)).objective.num_masked == 410
    assert load_config(write(tmp_path, text), ["audio.num_frames=128"]).objective.num_masked == 51


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- 1", "expected a mapping"),
        ("\x00", "line 1: a NUL"),
    ],
)
def test_a_file_that_is_no_configuration(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_configuration_is_named_with_its_neighbour():
    with pytest.raises(
        ConfigError, match=r"no configuration 'base_pach'; did you mean base_patch\?"
    ):
        load_config("base_pach")
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config("nowhere/base.yaml")


KEYS = [(s, k) for s, section in to_plain(Config()).items() for k in section]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
)


@settings(deadline=None)  # of a machine under load
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_is_taken_or_refused_by_name(key, value):
    section, name = key
    try:
        config = from_plain({section: {name: value}})
    except ConfigError as error:
        assert name in str(error) or "num_masked" in str(error)
        return
    assert from_plain(yaml.safe_load(dump_config(config))) == config
