import json
import time

import pytest
import torch
from rank_jobs import small_files
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssast.engine.config import from_plain, load_config
from ssast.engine.monitoring.flops import forward_flops, peak_flops, step_flops_per_clip
from ssast.engine.monitoring.loggers import TensorBoard
from ssast.engine.monitoring.monitor import (
    Monitor,
    duration,
    environment,
    read_metrics,
    scalars,
)
from ssast.engine.parallel.ranks import World

WORLD = World(0, 0, 1, "single", torch.device("cpu"))


def monitor(folder, step=0):
    return Monitor(
        folder,
        world=WORLD,
        step=step,
        steps=20,
        batch_size=4,
        flops_per_clip=1e9,
        peak_flops=None,
        loggers=[TensorBoard(folder, {})],
    )


def test_lines_hold_values_and_rates(tmp_path, capsys):
    log = monitor(tmp_path)
    with log.waiting_for_data():
        pass
    log.log_train(2, {"loss": 1.5, "pretext_accuracy": 0.25, "lr": 1e-4})
    log.log_valid(2, {"loss": 1.25})
    log.close()
    train, valid = read_metrics(tmp_path / "metrics.jsonl")
    assert (train["step"], train["train/loss"], train["train/lr"]) == (2, 1.5, 1e-4)
    assert train["perf/clips_per_s"] > 0 and 0 <= train["perf/data_wait_share"] <= 1
    assert train["perf/tflops_per_device"] == pytest.approx(train["perf/clips_per_s"] / 1000)
    assert train["perf/step_s"] == pytest.approx(4 / train["perf/clips_per_s"])
    assert train["perf/memory_gib"] > 0 and "perf/mfu" not in train
    assert valid.keys() == {"step", "time", "valid/loss"} and valid["valid/loss"] == 1.25
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("step  2/20  loss  1.5000  pretext acc  25.0%  lr 1.00e-04  clips/s")
    assert "  ETA 0:00:" in shown[0] and shown[1:] == ["step  2/20  validation: loss 1.2500"]


def test_tensorboard_has_the_names_of_the_log(tmp_path):
    log = monitor(tmp_path)
    log.log_train(1, {"loss": 1.5, "lr": 1e-4, "grad_norm": 0.5})
    log.log_valid(1, {"loss": 1.25, "accuracy": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    names = {name for line in lines for name in line} - {"step", "time"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        board = [(event.step, event.value) for event in events.Scalars(name)]
        assert board == [(1, pytest.approx(scalars(lines, name)[0][1]))]
    assert {"train/grad_norm", "valid/accuracy", "perf/step_s"} <= names


def test_mfu_of_a_known_accelerator(tmp_path, monkeypatch, capsys):
    seconds = iter([0.0, 2.0, 2.0])
    monkeypatch.setattr("ssast.engine.monitoring.monitor.time.perf_counter", lambda: next(seconds))
    log = Monitor(
        tmp_path, world=WORLD, step=0, steps=9, batch_size=4, flops_per_clip=1e9, peak_flops=1e10
    )
    log.log_train(5, {"loss": 1.0, "lr": 0.1})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["perf/clips_per_s"] == 10 and line["perf/mfu"] == pytest.approx(1.0)
    assert line["perf/step_s"] == pytest.approx(0.4)
    assert "MFU 100.0%" in capsys.readouterr().out


def test_steps_before_a_restart_of_the_clock_do_not_count(tmp_path, monkeypatch):
    seconds = iter([0.0, 10.0, 12.0, 12.0])
    monkeypatch.setattr("ssast.engine.monitoring.monitor.time.perf_counter", lambda: next(seconds))
    log = monitor(tmp_path)
    log.restart_clock(4)  # at 10 s, after 4 steps and a validation
    log.log_train(6, {"loss": 1.0, "lr": 0.1})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["perf/clips_per_s"] == pytest.approx(2 * 4 / 2.0)


def test_resuming_drops_the_lines_of_steps_that_are_taken_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = [{"step": s, "train/loss": 1.0} for s in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept) + '{"step": 5, "tra')
    monitor(tmp_path, step=3).close()
    assert read_metrics(path) == kept[:3]
    monitor(tmp_path, step=0).close()
    assert read_metrics(path) == []


def test_nothing_is_appended_to_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "tra')  # killed while it wrote
    log = monitor(tmp_path, step=1)
    log.log_train(2, {"loss": 0.5, "lr": 1e-4})
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_full_disk_delays_lines_and_loses_none(tmp_path, capsys):
    log = monitor(tmp_path)
    values = {"loss": 1.5, "lr": 1e-4}
    log.log_train(1, values)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with small_files(size + 20):  # the next line fits in part
        log.log_train(2, values)
        log.log_valid(2, {"loss": 1.25})
        time.sleep(0.1)  # TensorBoard writes in a thread
        log.log_train(3, values)
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
    log.log_train(4, values)
    log.log_train(5, values)
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3, 4, 5]
    said = capsys.readouterr().out
    assert all(f"step {step} is not logged yet: [Errno 27]" in said for step in (2, 3))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert {event.step for event in events} >= {1, 5}


def test_other_ranks_write_nothing(tmp_path, capsys):
    other = World(1, 1, 2, "torchrun", torch.device("cpu"))
    log = Monitor(
        tmp_path,
        world=other,
        step=0,
        steps=2,
        batch_size=4,
        flops_per_clip=1,
        peak_flops=None,
        loggers=[TensorBoard(tmp_path, {})],
    )
    log.log_train(1, {"loss": 1.0, "lr": 0.1})
    log.say("nothing")
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_environment_names_versions_and_choices():
    facts = environment(WORLD, attention="sdpa")
    assert facts["attention"] == "sdpa"
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cores"] >= 1 and facts["device"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "shared", "two_pass"), [("tiny", 24.2, 48.1), ("small", 81.6, 162), ("base", 296, 587)]
)
def test_flops_of_a_step(name, shared, two_pass):
    config = load_config(f"{name}_patch")
    assert step_flops_per_clip(config) == pytest.approx(shared * 1e9, rel=5e-3)
    config = load_config(f"{name}_patch", ["objective.two_pass=true"])
    assert step_flops_per_clip(config) == pytest.approx(two_pass * 1e9, rel=5e-3)


@pytest.mark.parametrize("options", [{}, {"extra_tokens": "cls", "norm": "post"}])
def test_flops_are_those_that_torch_counts(options):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from ssast.engine.model.encoder import SpectrogramTransformer

    config = from_plain(
        {
            "model": {"size": "tiny", "depth": 2, **options},
            "audio": {"num_frames": 64},
            "objective": {"num_masked": 9},
        }
    )
    encoder = SpectrogramTransformer(config.model, config.audio)
    # torch counts the matmuls of its plain attention only.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(3, 64, 128), encoder.no_masks(3))
    # torch does not look into our patch embedding: add it.
    embed = 3 * 2 * 32 * 256 * 192
    assert counter.get_total_flops() + embed == 3 * forward_flops(config)


def test_peaks_of_known_devices():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Something else") is None
