"""What a plan takes from the settings of the run: reductions, graphs, precision."""

from dataclasses import asdict, replace

import pytest
import yaml

from ssast.engine.cli.main import main
from ssast.engine.config import dump_config, load_config
from ssast.engine.monitoring.gpus import CPU, Gpu, load_gpu
from ssast.engine.planning.plan import count_parameters, step_time, uses_graphs
from ssast.engine.planning.report import PlanRequest, make_plan

H100 = load_gpu("h100")


def test_gradients_are_reduced_in_their_own_type():
    request = PlanRequest(gpus=64, gpu=H100)
    usual, bf16, fp32 = (
        make_plan(load_config("base_patch", [f"train.reduce_dtype={name}"]), request)[
            "communication"
        ]
        for name in ("auto", "bf16", "fp32")
    )
    assert usual == bf16
    assert fp32["reduced_gib"] == 2 * usual["reduced_gib"] > 0
    assert fp32["gathered_gib"] == usual["gathered_gib"] and fp32["seconds"] > usual["seconds"]


@pytest.mark.parametrize("stage", [1, 2])
def test_stage_1_reduces_once_a_step_behind_the_last_micro_step(stage):
    once, often = (load_config("giant", [f"train.accumulation_steps={n}"]) for n in (1, 8))
    parameters, slow = count_parameters(once), replace(H100, network_gb_s=1)
    one, eight = (
        step_time(config, slow, parameters, world_size=64, batch=8, stage=stage)
        for config in (once, often)
    )
    times = 1 if stage == 1 else 8
    assert eight.reduce == pytest.approx(times * one.reduce)
    assert eight.exposed - eight.gather == pytest.approx(times * (one.exposed - one.gather))
    assert one.exposed - one.gather > one.reduce / 5  # the backward pass does not hide it all


def test_graphs_are_planned_where_a_run_has_them():
    configs = [load_config("giant", [f"train.cuda_graphs={value}"]) for value in ("auto", "false")]
    parameters = count_parameters(configs[0])
    for stage in (1, 3):
        graphs, plain = (
            step_time(config, H100, parameters, world_size=8, batch=8, stage=stage).host
            for config in configs
        )
        assert graphs == plain if stage == 3 else graphs < plain
    padded = load_config("giant", ["audio.ignore_padding=true"])
    assert uses_graphs(configs[0], 2) and not uses_graphs(padded, 2)
    for memory_gib, stage, said in (
        (6, 3, "each kernel launched by itself"),
        (9, 1, "CUDA graphs"),
    ):
        request = PlanRequest(gpus=8, gpu=replace(H100, memory_gib=memory_gib), batch=1)
        plan = make_plan(configs[0], request)
        assert plan["choice"]["train.zero_stage"] == stage
        assert any(said in text for text in plan["assumptions"])


def test_a_cpu_launches_nothing():
    request = PlanRequest(gpus=1, gpu=Gpu(name=CPU, peak_tflops=1, memory_gib=64, bandwidth_gb_s=9))
    plan = make_plan(load_config("tiny_patch"), request)
    assert not any("launched" in text for text in plan["assumptions"])


@pytest.mark.parametrize("more", [[], ["--ledger", "--batch", "2"]])
def test_a_precision_without_a_peak_is_refused(more, capsys, tmp_path):
    given = ["plan", "tiny_patch", "model.depth=1", "train.precision=fp32", *more]
    assert main(given) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert "train.precision fp32: H100 has its peak in bf16 alone" in shown.err
    machine = tmp_path / "machine.yaml"
    machine.write_text(yaml.safe_dump(asdict(H100) | {"precision": "fp32"}))
    assert main([*given, "--gpu", str(machine)]) == 0


def test_a_run_is_planned_without_the_checkpoint_it_began_from(tmp_path):
    gone = load_config("tiny_patch", ["train.checkpoint=gone", f"run.folder={tmp_path}"])
    (tmp_path / "config.yaml").write_text(dump_config(gone))
    given = ["plan", str(tmp_path / "config.yaml"), f"run.folder={tmp_path}"]
    assert main(given) == 2
    (tmp_path / "checkpoints").mkdir()
    assert main(given) == 0
