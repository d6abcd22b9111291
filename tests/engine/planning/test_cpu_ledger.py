"""The ledger of a CPU's step: what a CPU runs, its blocked attention, and the plan beside it."""

import json
from dataclasses import replace

import pytest
import torch

from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.monitoring.gpus import Gpu
from ssast.engine.planning.ledger import BACKWARD, FORWARD, make_ledger
from ssast.engine.planning.plan import count_parameters, memory, step_time
from ssast.engine.planning.recorder import Recorder
from ssast.kernels import attention, blocked_attention
from ssast.kernels.blocked_attention import blocked_attention as attend

CPU = Gpu(
    name="cpu", peak_tflops=0.1, memory_gib=16, bandwidth_gb_s=10, precision="fp32",
    gemm_share=1.0, half_width=0.0, attention_share=1.0, bandwidth_share=1.0, launch_us=0.0,
    base_gib=0.0, fragmentation=1.0,
)  # fmt: skip
SMALL = ["model.depth=3", "audio.num_frames=512", "objective.num_masked=200"]


@pytest.fixture
def backend(request, monkeypatch):
    monkeypatch.setattr(attention, "_cpu_backend", lambda dtype: request.param)
    return request.param


CASES = [
    ("tiny_patch", None, "fp32", "blocked"),
    ("tiny_patch", 1, "fp32", "blocked"),
    ("tiny_patch", None, "bf16", "blocked"),
    ("tiny_patch", None, "fp32", "sdpa"),
    ("tiny_patch", None, "bf16", "blocked-or-sdpa"),
    ("small_frame", None, "fp32", "blocked"),
]


@pytest.mark.parametrize(("name", "every", "precision", "backend"), CASES, indirect=["backend"])
def test_the_plan_counts_what_the_ledger_lists(name, every, precision, backend):
    """Within 5 %: memory, bytes and FLOPs of a step."""
    more = [f"train.activation_checkpoint_every={every or 'null'}"]
    config, cpu = load_config(name, [*SMALL, *more]), replace(CPU, precision=precision)
    shape = {"world_size": 1, "batch": 8, "stage": 1, "every": every}
    ledger, parameters = make_ledger(config, cpu, 8), count_parameters(config)
    time, rows, total = step_time(config, cpu, parameters, **shape), ledger.rows(), ledger.total()
    bandwidth, peak = cpu.bandwidth_gb_s * 1e9, cpu.peak_tflops * 1e12
    step = sum(rows[name].moved for name in ("flat copies", "gradient norm", "optimizer"))
    rest = total.moved - step - rows["matmul"].moved - rows["attention"].moved
    assert time.attention * peak == pytest.approx(rows["attention"].flops, rel=0.05)
    assert time.matmul * peak == pytest.approx(total.flops - rows["attention"].flops, rel=0.05)
    assert time.elementwise * bandwidth == pytest.approx(rest, rel=0.05)
    assert time.optimizer * bandwidth == pytest.approx(step, rel=0.05)
    needed = memory(config, cpu, parameters, **shape).total
    assert needed == pytest.approx(ledger.recording.peak, rel=0.05)


@pytest.mark.parametrize("backend", ["blocked"], indirect=True)
def test_probabilities_that_are_kept_are_memory_and_traffic_and_save_flops(backend, monkeypatch):
    config = load_config("tiny_patch", SMALL)
    kept = make_ledger(config, CPU, 4)
    monkeypatch.setattr(blocked_attention, "KEPT", 0)
    again = make_ledger(config, CPU, 4)
    L, M = config.num_tokens, config.objective.num_masked
    size = 4 * 4 * 3 * L * (2 * L + M)  # bytes of 3 heads; the last block has queries of M tokens
    rows, rows_again = (x.rows(FORWARD)["attention"] for x in (kept, again))
    assert rows.written - rows_again.written == size and rows.read == rows_again.read
    rows, rows_again = (x.rows(BACKWARD)["attention"] for x in (kept, again))
    assert rows.read - rows_again.read == size and rows.written == rows_again.written
    assert rows_again.flops == pytest.approx(5 / 4 * rows.flops)
    assert 0.8 * size < kept.recording.peak - again.recording.peak <= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_data_is_attention_with_data(dtype):
    """The same peak of memory, and the same FLOPs, as of the real operations."""

    def record(recorder, device):
        q, k, v = (torch.ones(2, 40, 3, 64, dtype=dtype, device=device) for _ in range(3))
        with recorder:
            out, kept = blocked_attention._attention_torch(q, k, v, None, True)
            gradients = blocked_attention._attention_backward_torch(out, q, k, v, None, kept)
        assert gradients.numel() == 3 * q.numel()
        return recorder.recording

    imagined = record(Recorder(cpu_attention="blocked"), "meta")
    real = record(Recorder("cpu"), "cpu")
    assert imagined.peak == real.peak > 0
    flops = [sum(launch.flops for launch in x.launches) for x in (imagined, real)]
    assert flops[0] == flops[1] == (2 + 4) * 2.0 * 2 * 3 * 40 * 40 * 64


def test_blocks_are_one_operation_and_copies_by_head_are_seen():
    q, k, v = (torch.empty(2, 40, 3, 64, device="meta") for _ in range(3))
    with Recorder(cpu_attention="blocked") as recorder:
        attend(q, k, v)
    one = q.nbytes
    found = [(x.name, x.read, x.written) for x in recorder.recording.launches]
    copies = [("clone", one, one)] * 4  # of q, k and v, and of the result
    assert found == [*copies, ("blocked_attention", 3 * one, one)]


@pytest.mark.parametrize("name", ["esc50_patch", "eat_tiny"])
def test_the_command_prints_the_ledger_of_a_cpu(name, capsys, tmp_path):
    machine = tmp_path / "machine.yaml"
    machine.write_text(
        "name: cpu\npeak_tflops: 0.1\nmemory_gib: 16\nbandwidth_gb_s: 20\nprecision: fp32\n"
        "launch_us: 0.0\n"
    )
    arguments = ["plan", name, "--ledger", "--gpu", str(machine), "--batch", "2", "model.depth=1"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for word in (": 2 clips on one cpu, fp32", "100 GFLOP/s and 20 GB/s", "operations", "memory"):
        assert word in text
    assert "launches" not in text and "waits" not in text
    assert main([*arguments, "--json"]) == 0
    ledger = json.loads(capsys.readouterr().out)
    assert ledger["gpu"] == "cpu" and ledger["waits"] == [] and ledger["launch_seconds"] == 0
    groups = ledger["groups"]
    least = ledger["total"]["flops"] / 1e11
    assert least < ledger["total"]["seconds"] < 2 * least
    assert "gather, scatter" in groups and not {"patch_embed", "join_chunks"} & set(groups)
