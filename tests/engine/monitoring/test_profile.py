"""What a profile records, and that a run with one computes what it computes without."""

import contextlib
import io
import json
from dataclasses import replace

import finetune_runs
import pytest
import torch
from runs import lines, make_data, overrides, write_config
from torch.profiler import ProfilerActivity, profile, record_function

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.finetune import finetune
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.monitoring.profiling import (
    PARTS,
    WARMUP_STEPS,
    StepProfiler,
    communication_ms,
    format_profile,
)
from ssast.engine.pretrain import pretrain


def weights(run):
    return Checkpoints.load(Checkpoints(run / "checkpoints").latest())[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same pretraining with and without a profile; a validation lies within it."""
    folder = tmp_path_factory.mktemp("profile")
    data, config, outputs = make_data(folder), write_config(folder), {}
    for name, steps in (("plain", 0), ("profiled", 4)):
        run = (f"run.folder={folder / name}", f"profile.steps={steps}")
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            assert pretrain(load_config(config, [*overrides(), *data, *run])) == 0
        outputs[name] = shown.getvalue()
    return folder, outputs


def test_a_profile_changes_no_number(runs):
    folder, _ = runs
    for split in ("train", "valid"):
        assert lines(folder / "plain", split) == lines(folder / "profiled", split)
    plain, profiled = weights(folder / "plain"), weights(folder / "profiled")
    assert plain.keys() == profiled.keys()
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)
    assert not (folder / "plain" / "profile").exists()


ATTENTION = {"aten::scaled_dot_product_attention", "ssast::blocked_attention"}


def test_a_profile_is_a_trace_and_a_table(runs):
    folder, outputs = runs
    table = json.loads((folder / "profiled" / "profile" / "table.json").read_text())
    assert (table["first_step"], table["steps"]) == (WARMUP_STEPS + 1, 4)
    assert list(table["parts_ms"]) == list(PARTS)
    assert all(ms > 0 for ms in table["parts_ms"].values())
    assert table["step_ms"] == pytest.approx(sum(table["parts_ms"].values()))
    assert format_profile(table) in outputs["profiled"]

    trace = folder / "profiled" / "profile" / "trace.json"
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    count = {part: sum(e["name"] == part for e in events) for part in PARTS}
    # One block: a stretch of the encoder before, between and behind embed, attention and MLP. The
    # validation after step 6 has none.
    assert count == {**dict.fromkeys(PARTS, 4), "encoder": 16}
    names = {e["name"] for e in events}
    assert "ssast::patch_embed" in names and len(ATTENTION & names) == 1
    for part in ("backward", "attention"):
        ms = sum(e["dur"] for e in events if e["name"] == part) / 4e3
        assert ms == pytest.approx(table["parts_ms"][part], rel=0.3)


def test_a_run_too_short_for_a_profile_says_so(tmp_path, world):
    config = load_config("tiny_patch", ["profile.steps=1", f"run.folder={tmp_path / 'run'}"])
    said = []
    with StepProfiler(config, world, torch.nn.Linear(1, 1), said.append) as profiler:
        for _ in range(WARMUP_STEPS - 1):
            profiler.mark("data")
            profiler.end_step()
    assert said == ["profile.steps: no profile, the run ended within 5 steps"]
    assert not (tmp_path / "run").exists()


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, world):
    (tmp_path / "profile").touch()  # no folder
    config = load_config("tiny_patch", ["profile.steps=1", f"run.folder={tmp_path}"])
    said, model = [], SpectrogramTransformer(config.model, config.audio)
    with StepProfiler(config, world, model, said.append, warmup_steps=1) as profiler:
        for _ in range(3):
            profiler.mark("data")
            profiler.end_step()
    assert len(said) == 1
    assert said[0].startswith("profile.steps: the profile cannot be written: [Errno 17] File exis")


def test_fine_tuning_has_profiles_too(tmp_path):
    splits = finetune_runs.make_splits(tmp_path)
    settings = [
        *finetune_runs.overrides(finetune__epochs=4),
        *finetune_runs.data_overrides(splits),
        f"run.folder={tmp_path / 'run'}",
        "profile.steps=2",
    ]
    config = load_config(write_config(tmp_path), settings)
    assert finetune(config, finetune_runs.pretrained_file(tmp_path)) == 0
    table = json.loads((tmp_path / "run" / "profile" / "table.json").read_text())
    assert table["steps"] == 2 and min(table["parts_ms"].values()) > 0


def test_other_ranks_record_nothing(tmp_path, world):
    config = load_config("tiny_patch", ["profile.steps=1", f"run.folder={tmp_path}"])
    said = []
    other = replace(world, rank=1, world_size=2)
    with StepProfiler(config, other, torch.nn.Linear(1, 1), said.append) as profiler:
        for _ in range(WARMUP_STEPS + 2):
            profiler.mark("data")
            profiler.end_step()
    assert not said and not list(tmp_path.iterdir())


def test_communication_is_the_time_in_collectives(tmp_path):
    trace = tmp_path / "trace.json"

    def event(name, begin, end, cat="cpu_op"):
        return {"ph": "X", "name": name, "cat": cat, "ts": begin, "dur": end - begin}

    def written(*events):
        trace.write_text(json.dumps({"traceEvents": events}))
        return communication_ms(trace)

    steps = [event("backward", 1000, 5000), event("optimizer", 5000, 9000)]
    # Two at a time count once, and what lies between steps does not count.
    gloo = [("gloo:all_reduce", 2000, 4000), ("gloo:all_reduce", 3000, 6000)]
    late = ("gloo:all_gather", 8000, 12000)
    assert written(*steps, *(event(*g) for g in (*gloo, late))) == pytest.approx(5.0)
    assert written(*steps) == 0.0
    # On a GPU its kernels count, not their launches.
    kernel = event("ncclDevKernel_AllReduce", 9000, 12000, "kernel")
    assert written(*steps, kernel, event("nccl:all_reduce", 1000, 8000)) == pytest.approx(3.0)


def test_collectives_have_the_names_that_are_looked_for(tmp_path, world):
    with profile(activities=[ProfilerActivity.CPU]) as recorded, record_function("backward"):
        torch.distributed.all_reduce(torch.ones(100_000))
    trace = tmp_path / "trace.json"
    recorded.export_chrome_trace(str(trace))
    assert "gloo:all_reduce" in trace.read_text()
    assert communication_ms(trace) > 0


def test_the_number_of_steps_is_checked():
    with pytest.raises(ConfigError, match=r"profile\.steps must be at least 0, got -1"):
        load_config("tiny_patch", ["profile.steps=-1"])
