"""The benchmark of a step runs and reports, and the allocator setting does what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ssast.benchmarks.training.groups import GroupTime
from ssast.benchmarks.training.setting import Setting
from ssast.benchmarks.training.step import Quartiles, Result, _mfu, _table, main
from ssast.engine.monitoring.flops import step_flops_per_clip
from ssast.engine.monitoring.gpus import load_gpu

ALLOCATE = """
import resource, sys, torch
from ssast.kernels.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(12):
    if turn == 8:  # the first turns fault their pages in either way
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(10, 1024, 1024) for _ in range(3)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
tensors = [torch.ones(10, 1024, 1024) for _ in range(3)]
print([int(x.split()[1]) for x in open("/proc/self/smaps_rollup") if x.startswith("AnonHuge")][0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    def measured(how: str) -> list[int]:
        command = [sys.executable, "-c", ALLOCATE, how]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [int(line) for line in found.split()]

    (kept, huge), (faults, without) = measured("keep"), measured("default")
    assert kept < 0.1 * faults
    settings = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if settings.exists() and "[madvise]" in settings.read_text():
        assert huge > without  # KiB; of 120 MiB, how much depends on what the kernel has


def test_quartiles() -> None:
    quartiles = Quartiles.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (quartiles.low, quartiles.median, quartiles.high) == (2.0, 3.0, 4.0)
    assert f"{quartiles:.1f}" == "3.0 (2.0 to 4.0)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    ["", " --objective latent", " --finetune"],
    ids=["pretraining", "latent targets", "fine-tuning"],
)
def test_both_steps_are_measured(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--sizes tiny --frames 64 --batch 2 --repeats 2 --threads 1 --json" + more
    assert main(arguments.split()) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["loss_difference"] < 5e-6
    # With so few patches these are no faster than the published ones.
    assert result["cpu_ratio"]["median"] > (0.3 if more else 1)
    assert result["gflop"] > 1 and result["gflops_per_cpu_s"] > 0


def test_error_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--repeats", "1"])
    assert "needs at least 2 repeats and 32 frames" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--objective", "latent", "--finetune"])
    assert "--objective is of pretraining" in capsys.readouterr().err


def result_on(device: str) -> Result:
    half, one, two = (Quartiles(s, s, s) for s in (0.005, 0.01, 0.02))
    setting = Setting("tiny", 64, 1024, 2, False, device=device, precision="bf16")
    groups = [GroupTime("matmul", 2.0, 100.0, 1.5, 0.5 if device != "cpu" else None)]
    return Result(
        setting, two, two, one, half, two, two, 500.0, 1e5, 4e5, 1e-7, 3.0, 1.5,
        {"baseline": 0.1, "ours": 0.4}, ["training pass: CUDA graphs"], groups,
    )  # fmt: skip


def test_a_gpu_has_rates_memory_mfu_and_its_execution() -> None:
    text = _table(result_on("cuda:0"))
    assert "cuda:0, bf16" in text and "GPU s" in text and "wall s" not in text
    assert "published: 3200.0 clips/s, 3.00 GiB" in text
    assert "this project: 12800.0 clips/s, 1.50 GiB" in text
    assert "MFU baseline: 10.0%" in text and "MFU ours: 40.0%" in text
    assert "training pass: CUDA graphs" in text and "25%" in text.splitlines()[-1]


def test_a_cpu_has_none_of_these() -> None:
    text = _table(result_on("cpu"))
    assert "GPU" not in text and "MFU" not in text and "clips/s" not in text


def test_mfu_is_of_the_data_sheet_and_of_its_own_passes() -> None:
    setting, times = Setting("tiny", 64, 1024, 2, False, device="cuda:0"), [(1.0, 0.01)] * 3
    gpu = load_gpu("h100")
    found = _mfu(setting, gpu, times, times)
    flops = step_flops_per_clip(setting.config()) * 64
    assert found["ours"] == pytest.approx(flops / 0.01 / 989e12)
    assert found["baseline"] > 1.8 * found["ours"]  # two forward passes
    assert _mfu(setting, None, times, times) == {}
