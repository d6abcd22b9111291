"""Calibration: shares and memory of a device from trials, and what it keeps of the device."""

from dataclasses import replace
from types import SimpleNamespace as Machine

import pytest

from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.gpus import load_gpu
from ssast.engine.parallel import machine as machines
from ssast.engine.planning import calibrate as calibration
from ssast.engine.planning.calibrate import calibrate, fit, plain_cpu
from ssast.engine.planning.plan import GIB, count_parameters, memory, step_time
from ssast.engine.planning.trial import Trial


def test_shares_are_found_again_from_trials():
    true = replace(
        plain_cpu("fp32"), peak_tflops=0.2, gemm_share=0.7, attention_share=0.25,
        bandwidth_gb_s=10.0, base_gib=0.6, fragmentation=1.3,
    )  # fmt: skip
    configs = [
        load_config(name, [f"audio.num_frames={T}", f"objective.num_masked={T // 4}", batch])
        for name, T, batch in (
            ("tiny_patch", 1024, "train.batch_size=4"),
            ("tiny_patch", 384, "train.batch_size=8"),
            ("small_patch", 1024, "train.batch_size=3"),
        )
    ]

    def expected(config, gpu, batch):
        shape = {"world_size": 1, "batch": batch, "stage": 1}
        parameters = count_parameters(config)
        time = step_time(config, gpu, parameters, **shape).total
        return time, memory(config, gpu, parameters, **shape).total / GIB

    trials = []
    for config in configs:
        seconds, gib = expected(config, true, config.train.batch_size)
        trials.append(Trial("ok", step_s=9 * seconds, least_s=seconds, memory_gib=gib))
    start = replace(plain_cpu("fp32"), peak_tflops=0.2)
    found = fit(start, configs, trials)
    assert found.fragmentation == pytest.approx(1.3, rel=0.01)
    assert found.base_gib == pytest.approx(0.6, rel=0.01)
    for name, batch in (("base_patch", 2), ("tiny_patch", 16)):
        other = load_config(name)
        assert expected(other, found, batch) == pytest.approx(expected(other, true, batch), rel=0.1)
        assert expected(other, start, batch) != pytest.approx(expected(other, true, batch), rel=0.2)


def test_a_machine_on_which_nothing_runs_is_not_calibrated():
    def broken(config, **options):
        return Trial("failed", "no compiler")

    with pytest.raises(ConfigError, match="--calibrate: tiny_patch: failed: no compiler"):
        calibrate(print, run=broken)


def test_a_gpu_keeps_the_time_of_its_launches(monkeypatch):
    known = load_gpu("l4")
    monkeypatch.setattr(calibration.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(calibration.torch.cuda, "get_device_name", lambda: "NVIDIA L4")

    def run(config, **options):
        shape = {"world_size": 1, "batch": config.train.batch_size, "stage": 1}
        time = step_time(config, known, count_parameters(config), **shape)
        return Trial("ok", least_s=2 * time.device, memory_gib=1.0)

    found = calibrate(lambda text: None, run=run)
    assert found.launch_us == known.launch_us > 0
    assert found.gemm_share == pytest.approx(known.gemm_share / 2, rel=0.05)


def test_a_cpu_has_the_memory_of_its_container(tmp_path, monkeypatch):
    machine = Machine(available=5 << 30, total=8 << 30)
    monkeypatch.setattr(calibration, "_least_seconds", lambda work: 1.0)
    monkeypatch.setattr(machines, "CGROUP", tmp_path)
    monkeypatch.setattr(machines.psutil, "virtual_memory", lambda: machine)
    for limit, expected in (("max", 8.0), (f"{3 << 30}", 3.0), (f"{1 << 60}", 8.0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert plain_cpu("fp32").memory_gib == expected
