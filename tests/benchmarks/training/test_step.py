"""The benchmark of a step runs and reports, and the allocator setting does what it says."""

import json
import subprocess
import sys

import pytest

from ssast.benchmarks.training.step import Quartiles, main

ALLOCATE = """
import resource, sys, torch
from ssast.engine.train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(12):
    if turn == 8:  # the first turns fault their pages in either way
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(10, 1024, 1024) for _ in range(3)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    def page_faults(how: str) -> int:
        command = [sys.executable, "-c", ALLOCATE, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert page_faults("keep") < 0.1 * page_faults("default")


def test_quartiles() -> None:
    quartiles = Quartiles.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (quartiles.low, quartiles.median, quartiles.high) == (2.0, 3.0, 4.0)
    assert f"{quartiles:.1f}" == "3.0 (2.0 to 4.0)"


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", " --finetune"], ids=["pretraining", "fine-tuning"])
def test_both_steps_are_measured(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--sizes tiny --frames 64 --batch 2 --repeats 2 --threads 1 --json" + more
    assert main(arguments.split()) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["loss_difference"] < 5e-6
    # A fine-tuning of so few patches is no faster than the published one.
    assert result["cpu_ratio"]["median"] > (0.3 if more else 1)
    assert result["gflop"] > 1 and result["gflops_per_cpu_s"] > 0


def test_error_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--repeats", "1"])
    assert "needs at least 2 repeats and 32 frames" in capsys.readouterr().err
