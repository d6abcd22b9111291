"""The kernel benchmark measures, checks first, and writes what it found."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from ssast.benchmarks.operations import kernels
from ssast.benchmarks.operations.kernels import WrongResult, check, main, peak_bytes
from ssast.benchmarks.operations.problems import PROBLEMS, Problem, Shape
from ssast.benchmarks.operations.report import Compiled
from ssast.kernels.aot import Report
from ssast.kernels.roofline import Work

CPU = torch.device("cpu")


@pytest.mark.slow
def test_smoke(tmp_path, capsys) -> None:
    assert main(["--smoke", "--no-compile", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert {row["operation"] for row in rows} == set(PROBLEMS)
    for row in rows:
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["roofline"] > 0 and row["gb_per_s"] > 0 and row["peak_mib"] >= 0
        assert row["torch"] == torch.__version__ and row["device"]
        assert row["operation"] in table
    phases = {row["phase"] for row in rows if row["operation"] == "patch_embed"}
    assert phases == {"forward", "forward+backward"}
    assert (tmp_path / "kernels.md").read_text() in table
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


@pytest.mark.parametrize("operation", [name for name in PROBLEMS if name != "draw_masks"])
def test_a_wrong_result_is_not_timed(operation, monkeypatch, tmp_path, capsys) -> None:
    right = PROBLEMS[operation]

    def wrong(*args) -> Problem:
        problem = right(*args)
        ours = problem.providers["ours"]

        def off(*leaves):
            out = ours(*leaves)
            return out * 1.01 if isinstance(out, torch.Tensor) else (out[0] * 1.01, *out[1:])

        problem.providers["ours"] = off
        return problem

    check(right(Shape("tiny", 1, 64), torch.float32, CPU))
    with pytest.raises(WrongResult, match=f"{operation} in fp32"):
        check(wrong(Shape("tiny", 1, 64), torch.float32, CPU))
    monkeypatch.setitem(kernels.PROBLEMS, operation, wrong)
    arguments = ["--smoke", "--no-compile", "--operations", operation, "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert operation in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_peak_memory() -> None:
    x = torch.ones(1 << 20)
    assert peak_bytes(lambda: x + 1, CPU) == pytest.approx(4 << 20, abs=1024)
    assert peak_bytes(lambda: (x + 1) + (x + 2), CPU) == pytest.approx(12 << 20, abs=1024)


def test_the_roofline_is_the_least_time_over_the_measured() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    problem = Problem(
        "mse", torch.float32, [torch.ones(4)], {"ours": call, "eager": call}, Work(1000, 10)
    )
    peaks = kernels.Peaks(1e6, {torch.float32: 1e9})
    found = list(
        kernels.time_problem(
            problem, Shape("tiny", 1), peaks, repeats=3, compiled=False, device=CPU
        )
    )
    assert [t.provider for t in found] == ["ours", "eager"]
    for t in found:
        assert t.roofline == pytest.approx(1e-3 / t.median_s)
        assert t.gb_per_s == pytest.approx(1e-6 / t.median_s)


@pytest.mark.parametrize("chosen", ["cpu", "auto"])
def test_a_cpu_multiplies_as_in_training(chosen, monkeypatch, tmp_path) -> None:
    inside, seen = [False], []

    @contextmanager
    def fast() -> Iterator[bool]:
        inside[0] = True
        yield True
        inside[0] = False

    def record(name: str, result: object) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            devices = {x for x in arguments if isinstance(x, torch.device)}
            seen.append((name, inside[0], devices or {options.get("device")}))
            return result

        return call

    peaks = kernels.Peaks(1e9, {torch.float32: 1e9})
    timing = kernels.Timing("mse", "eager", "forward", "any", 2, "fp32", *[1.0] * 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: chosen == "cpu")
    monkeypatch.setattr(kernels, "fast_matmul", fast)
    monkeypatch.setattr(kernels, "measure_peaks", record("peaks", peaks))
    monkeypatch.setattr(kernels, "time_problem", record("timing", [timing]))
    monkeypatch.setattr(kernels, "plot", lambda *arguments: None)
    arguments = ["--smoke", "--operations", "mse", "--out", str(tmp_path)]
    assert main([*arguments, "--device", chosen]) == 0
    assert seen == [("peaks", True, {CPU}), ("timing", True, {CPU})]


def test_a_line_of_what_was_compiled_is_flat() -> None:
    report = Report("_mse_kernel", "sm_90", 8, 40, 0, 0, 227 << 10, 6, 0, 1, 2, 0, 200)
    row = Compiled("mse", "_mse_kernel", "", "fp32", "any", report).row()
    assert row["registers"] == 40 and row["size"] == "any" and "report" not in row


def test_bad_arguments(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--repeats", "1"])
    assert stopped.value.code == 2
    assert "at least 2 repeats" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path) -> None:
    arguments = ["--sizes", "base", "--batches", "8", "--no-compile", "--out", str(tmp_path)]
    assert main(arguments) == 0
