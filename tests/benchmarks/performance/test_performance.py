"""The study of speed: its variants of the step, its files, its page."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetune_runs import make_sounds

from ssast.benchmarks.performance import cases as performance_cases
from ssast.benchmarks.performance.cases import sections
from ssast.benchmarks.performance.comparison import MARKS
from ssast.benchmarks.performance.others import OtherWork
from ssast.benchmarks.performance.page import missing, write_page
from ssast.benchmarks.performance.performance import main
from ssast.benchmarks.performance.records import Record, publish
from ssast.benchmarks.performance.store import Case, ResultStore, Scope
from ssast.benchmarks.performance.tables import floor, step_rows
from ssast.benchmarks.training.setting import Setting
from ssast.benchmarks.training.variants import (
    DEFAULT,
    LACKING,
    OPTIONS,
    VARIANTS,
    check_mask_ids,
)
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.flops import step_flops_per_clip
from ssast.engine.parallel.ranks import close_world
from ssast.kernels import matmul
from ssast.kernels.attention import attention_backend
from ssast.kernels.matmul import fast_matmul, is_fast
from ssast.pipelines.clips.manifest import write_manifest

TOY = Setting("tiny", batch=3, frames=64, threads=1, default_memory=False)
MACHINE = {
    "name": "A CPU, 2 cores",
    "cpu": "A CPU",
    "microarchitecture": None,
    "instructions": ["avx2"],
    "cores": 2,
    "torch": "2.0",
    "commit": "abc",
    "date": "2026-01-01",
    "load": 0.25,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Enough for toys; the variants set it as well, and leave it so."""
    before = torch.get_num_threads()
    torch.set_num_threads(TOY.threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs on the machine of the tests is no disturbance."""
    monkeypatch.setattr(OtherWork, "share", 0.0)


@pytest.fixture(scope="module")
def published() -> list[float]:
    """Losses of two steps on the same masks: the second depends on the gradients of the first."""
    return losses("published")


def losses(name: str) -> list[float]:
    # This process should go on giving memory back.
    variant = replace({**VARIANTS, **OPTIONS}[name], keep_memory=False)
    try:
        with variant.prepared():
            step, masks = variant.build(TOY), check_mask_ids(TOY)
            return [step(masks), step(masks)]
    finally:
        close_world()


@pytest.mark.parametrize("name", [*list(VARIANTS)[1:], "bf16"])
def test_variants_agree_with_the_published_step(name: str, published: list[float]) -> None:
    first, second = losses(name)
    rounding = 1e-2 if name == "bf16" else 2e-6
    assert first == pytest.approx(published[0], rel=rounding)
    # Adam divides by the gradient: where that is mere rounding, the steps differ.
    fall = published[0] - published[1]
    assert fall > 0
    assert first - second == pytest.approx(fall, rel=0.5 if name == "bf16" else 0.02)


def test_variants_are_told_the_parts_and_draw_masks() -> None:
    parts: list[str] = []
    step = replace(DEFAULT, engine=False).build(TOY)
    drawn = {step(mark=parts.append), step(), step(check_mask_ids(TOY))}
    assert parts == ["data", "inputs", "backward", "optimizer", "other"] and len(drawn) == 3
    assert VARIANTS["published"].num_passes == 2
    assert {v.num_passes for n, v in VARIANTS.items() if n != "published"} == {1}


def test_what_a_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(matmul, "_is_usable", lambda: False)
    found = {}
    for name, variant in {**VARIANTS, **OPTIONS}.items():
        with replace(variant, keep_memory=False).prepared() as lacking:
            found[name] = lacking
    assert {name: lacking for name, lacking in found.items() if lacking} == {
        "fast matmul": "no library has a faster matmul here",
        "blocked": "scaled_dot_product_attention is as fast here",
        "compiled": "there is no C++ compiler (g++)",
        "bf16": "the CPU has no bf16 matmul (AVX512-BF16)",
        "tried": "there is no GPU",
    }
    gpu, needs = torch.device("cuda", 0), {n: v.needs for n, v in (VARIANTS | OPTIONS).items()}
    there = {name: LACKING[need](gpu) for name, need in needs.items() if need}
    assert {name: lacking for name, lacking in there.items() if lacking} == {
        "kept memory": "PyTorch keeps the memory of a GPU",
        "fast matmul": "no library has a faster matmul here",
        "blocked": "scaled_dot_product_attention is as fast here",
    }


def test_attention_is_what_the_variant_says() -> None:
    fp32 = torch.device("cpu"), torch.float32
    with replace(VARIANTS["fast matmul"], keep_memory=False).prepared() as lacking:
        assert attention_backend(*fp32) == "sdpa" and is_fast() == (not lacking)
    with replace(DEFAULT, keep_memory=False).prepared():
        assert attention_backend(*fp32) == ("blocked" if is_fast() else "sdpa")
    assert not is_fast()


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    store, scope, done = ResultStore(tmp_path), Scope(), []

    def case(name: str, killed: bool = False):
        def measure() -> dict[str, str]:
            if killed:
                raise KeyboardInterrupt
            done.append(name)
            return {"name": name}

        return measure

    with pytest.raises(KeyboardInterrupt):
        store.measure("loader", {"a": case("a"), "b": case("b", killed=True)}, scope, MACHINE)
    assert set(store.read("loader")) == {"a"}
    later = {**MACHINE, "commit": "def"}
    store.measure("loader", {n: case(n) for n in "abc"}, replace(scope, sizes=("tiny",)), later)
    assert done == ["a", "b", "c"] and set(store.read("loader")) == set("abc")
    assert [machine["commit"] for machine in store.machines()] == ["abc", "def"]
    with pytest.raises(ConfigError, match="was measured with batch 8, got 4: resume without"):
        store.measure("loader", {}, replace(scope, batch=4), MACHINE)
    (tmp_path / "loader.json").write_text('{"results":')
    with pytest.raises(ConfigError, match=r"loader.json is damaged, delete it: Expecting"):
        store.read("loader")


def sample(seconds: float, loss: float = 2.0) -> dict:
    return {
        "wall_s": [seconds, 1.1 * seconds, 0.9 * seconds],
        "cpu_s": [2 * seconds] * 3,
        "loss": loss,
        "memory_gib": 1.25,
        "peak_gflops": 100.0,
    }


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    """Some measurements of tiny."""
    engine = next(name for name, variant in VARIANTS.items() if variant == DEFAULT)
    steps = {
        "published, repeat 1": sample(4.0),
        "published, repeat 2": sample(4.0),
        "shared pass, repeat 1": sample(2.5, loss=2.0002),
        f"{engine}, repeat 1": sample(0.5),
        "compiled, repeat 1": {"left_out": "no compiler"},
    }
    found = {
        "step-tiny": steps,
        "roofline": {
            "peak fp32": {"gb_per_s": 20.0, "gflop_per_s": 200.0},
            "profile tiny": {"step_ms": 10.0, "parts_ms": {"data": 0.0, "mlp": 4.0, "loss": 6.0}},
        },
        "scaling": {
            "batch 8": {"clips_per_s": 10.0, "memory_gib": 1.0},
            "threads 1": {"clips_per_s": 5.0, "memory_gib": 1.0},
        },
    }
    store = ResultStore(tmp_path / "runs")
    for section, results in found.items():
        cases = {key: lambda value=value: value for key, value in results.items()}
        store.measure(section, cases, Scope(), MACHINE)
    return store


def published_docs(store: ResultStore, tmp_path: Path) -> Path:
    """A folder with the record of a machine."""
    publish(store, tmp_path / "docs" / "performance")
    return tmp_path / "docs"


def test_the_page_is_written_from_the_files(store: ResultStore, tmp_path: Path) -> None:
    page = write_page(published_docs(store, tmp_path)).read_text()
    assert "| A CPU, 2 cores | avx2 | 2.0 | abc | 2026-01-01 | 0.25 |" in page
    assert "## In detail: A CPU, 2 cores" in page and "| tiny: step, fp32 | 8.00 |" in page
    gflop = 2 * step_flops_per_clip(Scope().setting().config()) * 8 / 1e9  # of two passes
    published = next(line for line in page.splitlines() if line.startswith("| published step"))
    assert "| 4 | 8 | 1.00 | 1.00 |" in published
    rate = float(published.split("|")[6])
    assert rate == pytest.approx(gflop / 8.0, rel=0.02) and f"| {rate:.0f}% | 1.25 |" in published
    assert "| + one forward pass for both losses | 2.5 | 5 | 1.60 | 1.60 |" in page
    assert "| 1.25 | 1e-04 |" in page
    assert f"| **+ {DEFAULT.title}** | **0.5** | **1** | **8.00** | **8.00** |" in page
    assert "- left out: train.compile=true: no compiler" in page
    assert "| fp32 | 200 | 20 |" in page
    assert "| threads 1 | 5.0 | 0.50 | 1.00 |" in page
    assert "| size tiny | 16.00 |" in page
    assert "**Nothing here is measured**" in page and "| base, h100 |" in page
    assert "waiting for the next batch" not in page  # it takes no time
    drawn = {path.name for path in (tmp_path / "docs" / "performance").iterdir()}
    assert drawn == {"step.png", "parts.png", "scaling.png", "a-cpu-2-cores.json"}
    assert "## The loader" not in page and "## End to end" not in page


def test_what_is_not_measured_is_named(store: ResultStore, tmp_path: Path) -> None:
    docs = published_docs(store, tmp_path)
    left = missing(Record(docs / "performance" / "a-cpu-2-cores.json"))
    assert {"step-small", "step-base", "loader", "runs"} <= set(left)
    tiny = next(text for text in left if text.startswith("step-tiny"))
    assert "batched" in tiny and "published" not in tiny and "compiled" not in tiny
    with pytest.raises(ConfigError, match="no measurements of ssast bench performance there"):
        publish(ResultStore(tmp_path / "nothing"), tmp_path)
    with pytest.raises(ConfigError, match="no records of ssast bench performance there"):
        write_page(tmp_path)


def test_the_floor_is_at_the_peaks(store: ResultStore) -> None:
    least = floor(store, Scope(), "tiny")
    assert least is not None
    flops = 8 * step_flops_per_clip(Scope().setting().config())
    # The default step does less than what FLOPs are counted by, which saves nothing; but PyTorch's
    # attention computes its scores again, where the one by blocks keeps them.
    with fast_matmul():
        keeps = attention_backend(torch.device("cpu"), torch.float32) == "blocked"
    share = (least.matmul + least.attention) / (flops / 200e9)
    assert 0.9 < share < (0.99 if keeps else 1.05)
    assert least.total == least.device > least.matmul + least.attention + least.elementwise
    rows, _ = step_rows(store, Scope(sizes=("tiny",)), "small")
    assert rows == []


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--frames must be 32 or more, got 8"):
        main(["--frames", "8", "--out", str(tmp_path)])


@pytest.mark.slow
def test_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(tmp_path / "data" / "train.json", make_sounds(tmp_path / "p", 2, 8, seed=1))
    few = {name: VARIANTS[name] for name in ("published", "shared pass")}
    changes = {
        "VARIANTS": {**few, "default": DEFAULT},
        "OPTIONS": {},
        "MAX_STEPS": 1,
        "SCALING_STEPS": 1,
        "PEAK_REPEATS": 1,
        "PROFILED_STEPS": 1,
        "KINDS": ("wav",),
        "CLIP_SECONDS": (0.5,),
        "RUN_STEPS": {"demo": 4, "long": 4},
        "LOG_LINES": 2,
    }
    run_cases = performance_cases.run_cases
    for name, value in changes.items():
        monkeypatch.setattr(performance_cases, name, value)

    def one_run(scope: Scope) -> dict[str, Case]:
        return {"demo": run_cases(scope)["demo"]}

    monkeypatch.setattr(performance_cases, "run_cases", one_run)
    paths = [f"--{name}={tmp_path / name}" for name in ("out", "docs", "data", "readme")]
    (tmp_path / "readme").write_text("\n".join(["before", *MARKS, "after"]))
    parts = "--sections step roofline scaling loader runs"
    toy = "--sizes tiny --repeats 1 --batch 2 --frames 32 --threads 1 --clips 2"
    command = [*parts.split(), *toy.split(), *paths]
    assert main(command) == 0
    assert "runs, 1 of 1: demo" in capsys.readouterr().out
    page = (tmp_path / "docs" / "performance.md").read_text()
    for text in (
        "| wav, 0.5 s |",
        "| demo: `ssast pretrain demo` |",
        "| processes 2 |",
        "| bf16 |",
    ):
        assert text in page
    found = json.loads((tmp_path / "out" / "step-tiny.json").read_text())["results"]
    assert len({round(result["loss"], 4) for result in found.values()}) == 1
    readme = (tmp_path / "readme").read_text().splitlines()
    assert readme[0] == "before" and readme[-1] == "after" and "| tiny, fp32 |" in readme[2]
    assert len(sections(Scope(("tiny",)))) == 6
    assert main(command) == 0  # nothing is measured again
    assert " of " not in capsys.readouterr().out
