"""What a run takes from the checkpoint that it begins from."""

from dataclasses import replace

import pytest
from finetune_runs import plain_file

from ssast.engine.checkpoints.adopt import adopt
from ssast.engine.config import OVERRIDE, Config, load_config
from ssast.engine.errors import CheckpointError
from ssast.engine.finetune_settings import Finetune
from ssast.engine.objective_settings import Objective
from ssast.engine.settings import Audio, Model

AUDIO = Audio(
    sample_rate_hz=8000, n_mels=64, num_frames=128, mean=-6.5, std=5.0, ignore_padding=True
)
THEIRS = Config(
    model=Model(size="tiny", depth=2),
    audio=AUDIO,
    objective=Objective(kind="generative", num_masked=16, mask="random"),
)


def test_what_nobody_set_is_the_checkpoints(tmp_path):
    config, lines = adopt(load_config(plain_file(tmp_path)), THEIRS, "ckpt")
    assert (config.model, config.audio) == (THEIRS.model, AUDIO)
    assert lines == [
        "from ckpt: size tiny, patch [16,16], depth 2, sample_rate_hz 8000, n_mels 64, "
        "num_frames 128, mean -6.5, std 5, ignore_padding True"
    ]


def test_the_command_line_and_then_the_file_come_first(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("audio: {mean: -1.0, std: 2.0}\nfinetune: {}\n")
    config = load_config(path, ["audio.std=3.0", "audio.num_frames=256"])
    adopted, lines = adopt(config, THEIRS, "ckpt")
    assert (adopted.audio.mean, adopted.audio.std, adopted.audio.num_frames) == (-1.0, 3.0, 256)
    assert lines[1:] == [
        f"audio.num_frames 256 {OVERRIDE}, the checkpoint has 128",
        "audio.mean -1 from mine.yaml, the checkpoint has -6.5",
        f"audio.std 3 {OVERRIDE}, the checkpoint has 5",
    ]
    again, _ = adopt(adopted, THEIRS, "ckpt")  # a second time changes nothing
    assert again == adopted


def test_a_setting_that_is_the_default_counts_as_set_where_it_was_written(tmp_path):
    path = tmp_path / "published.yaml"
    path.write_text(f"audio: {{mean: {Audio().mean}}}\nfinetune: {{}}\n")
    adopted, _ = adopt(load_config(path), THEIRS, "ckpt")
    assert adopted.audio.mean == Audio().mean and adopted.audio.std == 5.0


def test_of_a_configuration_from_python_what_differs_from_the_defaults_is_set():
    ours = Config(audio=Audio(num_frames=64), finetune=Finetune())
    adopted, _ = adopt(ours, THEIRS, "ckpt")
    assert adopted.audio == replace(AUDIO, num_frames=64)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("model.size", "small", "set model.size=tiny"),
        ("model.patch", "[32, 8]", "set model.patch=[16,16]"),
        ("model.depth", "null", "set model.depth=2"),
        ("audio.n_mels", "80", "set audio.n_mels=64"),
    ],
)
def test_weights_of_another_shape_are_refused(tmp_path, key, value, shown):
    config = load_config(plain_file(tmp_path), [f"{key}={value}"])
    with pytest.raises(CheckpointError, match="ckpt: has ") as error:
        adopt(config, THEIRS, "ckpt")
    assert shown in str(error.value)


def test_another_sample_rate_must_be_asked_for_on_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("audio: {sample_rate_hz: 16000}\nfinetune: {}\n")
    with pytest.raises(CheckpointError, match=r"has audio\.sample_rate_hz 8000"):
        adopt(load_config(path), THEIRS, "ckpt")
    adopted, _ = adopt(load_config(path, ["audio.sample_rate_hz=16000"]), THEIRS, "ckpt")
    assert adopted.audio.sample_rate_hz == 16000


def test_measured_statistics_are_not_replaced(tmp_path):
    config = load_config(plain_file(tmp_path), ["audio.stats=measure"])
    adopted, lines = adopt(config, THEIRS, "ckpt")
    assert adopted.audio.mean == Audio().mean and "mean" not in lines[0]


def test_what_a_published_file_does_not_say_is_named(tmp_path):
    _, lines = adopt(load_config(plain_file(tmp_path)), THEIRS, "ckpt", assumed=("audio.mean",))
    assert lines[1] == "ckpt does not say, so assumed: mean -6.5"
    assert "mean" not in lines[0]


def test_a_stride_of_overlapping_patches_is_kept(tmp_path):
    overlapping = replace(THEIRS, finetune=Finetune(stride=(10, 10)))
    plain = load_config(plain_file(tmp_path))
    assert adopt(plain, overlapping, "ckpt")[0].finetune.stride == (10, 10)
    apart = replace(THEIRS, finetune=Finetune(stride=(16, 16)))
    assert adopt(plain, apart, "ckpt")[0].finetune.stride is None


def test_continued_pretraining_keeps_the_objective_and_its_share_of_masks(tmp_path):
    path = tmp_path / "continue.yaml"
    path.write_text("optim: {lr: 1.0e-5}\n")
    config = load_config(path, ["audio.num_frames=256", "audio.n_mels=80"])
    adopted, _ = adopt(config, THEIRS, "ckpt")
    assert adopted.objective == replace(THEIRS.objective, num_masked=40)  # half of 5 x 16
    assert adopted.audio.n_mels == 80
    generative = load_config(path, ["objective.kind=joint", "objective.num_masked=3"])
    adopted, _ = adopt(generative, THEIRS, "ckpt")
    assert (adopted.objective.kind, adopted.objective.num_masked) == ("joint", 3)


def test_the_default_number_of_masks_fits_the_grid(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("audio: {num_frames: 128}\n")
    assert load_config(path).objective.num_masked == 50  # 400 of 512, of 64
    assert load_config("base_patch").objective.num_masked == 400
