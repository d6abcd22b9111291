import json

import pytest
import torch

from ssast.engine.config import from_plain, load_config
from ssast.engine.monitoring.flops import forward_flops, peak_flops, step_flops_per_clip
from ssast.engine.monitoring.monitor import Monitor, duration, environment, read_metrics
from ssast.engine.parallel.ranks import World

WORLD = World(0, 0, 1, "single", torch.device("cpu"))


def monitor(folder, step=0):
    return Monitor(
        folder, world=WORLD, step=step, steps=20, batch_size=4, flops_per_clip=1e9, peak_flops=None
    )


def test_lines_hold_values_and_rates(tmp_path, capsys):
    log = monitor(tmp_path)
    with log.waiting_for_data():
        pass
    log.log_train(2, {"loss": 1.5, "accuracy": 0.25, "lr": 1e-4})
    log.log_valid(2, {"loss": 1.25})
    log.close()
    train, valid = read_metrics(tmp_path / "metrics.jsonl")
    assert (train["step"], train["split"], train["loss"]) == (2, "train", 1.5)
    assert train["clips_per_s"] > 0 and 0 <= train["data_wait_share"] <= 1
    assert train["gflops_per_device"] == pytest.approx(train["clips_per_s"])
    assert train["memory_gib"] > 0
    assert (valid["split"], valid["loss"]) == ("valid", 1.25)
    shown = capsys.readouterr().out
    assert "step 2/20  loss 1.500  acc 0.250  lr 1.0e-04" in shown and "ETA" in shown
    assert list((tmp_path / "tensorboard").iterdir())


def test_steps_before_a_restart_of_the_clock_do_not_count(tmp_path, monkeypatch):
    seconds = iter([0.0, 10.0, 12.0, 12.0])
    monkeypatch.setattr("ssast.engine.monitoring.monitor.time.perf_counter", lambda: next(seconds))
    log = monitor(tmp_path)
    log.restart_clock(4)  # at 10 s, after 4 steps and a validation
    log.log_train(6, {"loss": 1.0, "lr": 0.1})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["clips_per_s"] == pytest.approx(2 * 4 / 2.0)


def test_resuming_drops_the_lines_of_steps_that_are_taken_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = [{"step": s, "split": "train"} for s in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept) + '{"step": 5, "spl')
    monitor(tmp_path, step=3).close()
    assert read_metrics(path) == kept[:3]
    monitor(tmp_path, step=0).close()
    assert read_metrics(path) == []


def test_other_ranks_write_nothing(tmp_path, capsys):
    other = World(1, 1, 2, "torchrun", torch.device("cpu"))
    log = Monitor(
        tmp_path, world=other, step=0, steps=2, batch_size=4, flops_per_clip=1, peak_flops=None
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


def test_flops_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from ssast.engine.model.encoder import SpectrogramTransformer

    config = from_plain(
        {
            "model": {"size": "tiny", "depth": 2},
            "audio": {"num_frames": 64},
            "objective": {"num_masked": 9},
        }
    )
    encoder = SpectrogramTransformer(config.model, config.audio)
    # torch counts the products of its plain attention only.
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
