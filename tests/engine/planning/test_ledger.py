"""The ledger: bytes, launches, memory and waits of small programs, and of steps of the engine."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.model.objective import MSPM
from ssast.engine.monitoring.flops import step_flops_per_clip
from ssast.engine.monitoring.gpus import load_gpu
from ssast.engine.planning.ledger import (
    BACKWARD,
    FORWARD,
    INPUTS,
    LOSS,
    STEP,
    Row,
    make_ledger,
    record_passes,
)
from ssast.engine.planning.plan import ENGINE_S, count_parameters, memory, step_time
from ssast.engine.planning.recorder import Recorder
from ssast.engine.planning.work import work
from ssast.kernels.attention import attention
from ssast.kernels.masking import Masks
from ssast.kernels.scatter_tokens import scatter_tokens

META = torch.device("meta")
H100 = load_gpu("h100")


def empty(*shape, dtype=torch.bfloat16, **kwargs):
    return torch.empty(*shape, dtype=dtype, device=META, **kwargs)


def traffic(program):
    """Return (name, launches, bytes read, bytes written) of each operation of a program."""
    with Recorder() as recorder:
        program()
    return [(x.name, x.kernels, x.read, x.written) for x in recorder.recording.launches]


def test_bytes_are_those_that_an_operation_must_move():
    x, row, ids = empty(8, 16), empty(16), empty(8, 4, dtype=torch.int64)
    matrix, taken = 8 * 16 * 2, 8 * 4 * 2
    assert traffic(lambda: x + row) == [("add", 1, matrix + 32, matrix)]
    assert traffic(lambda: x + row.expand(8, -1)) == [("add", 1, matrix + 32, matrix)]
    assert traffic(lambda: x.add_(row)) == [("add_", 1, matrix + 32, matrix)]
    assert traffic(lambda: x.copy_(row)) == [("copy_", 1, 32, matrix)]
    assert traffic(lambda: x.zero_()) == [("zero_", 1, 0, matrix)]
    assert traffic(lambda: torch.add(x, row, out=empty(8, 16))) == [("add", 1, matrix + 32, matrix)]
    assert traffic(lambda: x.gather(1, ids)) == [("gather", 1, taken + 256, taken)]
    assert traffic(lambda: x.scatter_(1, ids, empty(8, 4))) == [("scatter_", 1, taken + 256, taken)]
    assert traffic(lambda: x.float()) == [("_to_copy", 1, matrix, 2 * matrix)]


def test_views_and_empty_tensors_are_nothing():
    x = empty(8, 16)
    assert traffic(lambda: x.view(16, 8).t()[2:].unflatten(1, (4, 4)).detach()) == []
    assert traffic(lambda: (torch.empty_like(x), x.new_empty(3), x.split(4, 1))) == []
    assert traffic(lambda: torch.ones(3) + 1) == []  # of the host


def test_a_linear_layer_and_its_gradients():
    layer, x = nn.Linear(16, 32, device=META, dtype=torch.bfloat16), empty(8, 16)
    x.requires_grad_()
    with Recorder() as recorder:
        recorder.phase = "forward"
        y = layer(x)
        recorder.phase = "backward"
        y.backward(empty(8, 32))
    flops = [(x.name, x.phase, x.flops) for x in recorder.recording.launches]
    product = 2.0 * 8 * 16 * 32
    assert flops == [
        ("addmm", "forward", product),
        ("mm", "backward", product),
        ("mm", "backward", product),
        ("sum", "backward", 0),
    ]
    weight, into, out = 16 * 32 * 2, 8 * 16 * 2, 8 * 32 * 2
    moved = [x.read + x.written for x in recorder.recording.launches]
    assert moved == [weight + 64 + into + out, *[weight + into + out] * 2, out + 64]


def test_a_grouped_convolution_and_its_gradients():
    layer = nn.Conv2d(32, 32, 3, padding=1, groups=4, device=META, dtype=torch.bfloat16)
    x = empty(2, 32, 5, 7, requires_grad=True)
    with Recorder() as recorder:
        y = layer(x)
        y.backward(empty(*y.shape))
    forward, backward = recorder.recording.launches
    product = 2.0 * 2 * 5 * 7 * 32 * (8 * 9)
    assert (forward.flops, backward.flops) == (product, 2 * product)
    image, weight, bias = 2 * 32 * 5 * 7 * 2, 32 * 8 * 9 * 2, 32 * 2
    assert (forward.kernels, backward.kernels) == (2, 3)
    assert forward.read + forward.written == image + weight + bias + 3 * image
    assert backward.read == 2 * image + (image + weight) + image
    assert backward.written == image + weight + bias


def test_attention_is_one_operation_also_when_it_is_computed_again():
    q, k, v = (empty(2, 10, 3, 64, requires_grad=True) for _ in range(3))
    with Recorder() as recorder:
        recorder.phase = "forward"
        out = checkpoint(attention, q, k, v, use_reentrant=False)
        recorder.phase = "backward"
        out.backward(empty(*out.shape))
    found = [x for x in recorder.recording.launches if "attention" in x.name]
    assert [(x.phase, "backward" in x.name) for x in found] == [
        ("forward", False),
        ("backward", False),
        ("backward", True),
    ]
    one, lse = 2 * 10 * 3 * 64 * 2, 2 * 3 * 10 * 4
    assert found[0].read == 3 * one and abs(found[0].written - one - lse) <= 64
    assert abs(found[2].read - 5 * one - lse) <= 64 and found[2].written == 3 * one
    assert found[2].flops == 2.5 * found[0].flops == 10.0 * 2 * 3 * 10 * 10 * 64


def test_operations_of_ours_are_what_cuda_runs():
    visible, shared = empty(2, 5, 8), empty(7, 8)
    masks = Masks(empty(2, 4, dtype=torch.int64), empty(2, 3, dtype=torch.int64))
    names = [name for name, *_ in traffic(lambda: scatter_tokens(visible, shared, masks))]
    assert names == ["copy_", "copy_", "scatter_"]  # it has no kernel
    ledger = make_ledger(load_config("tiny_patch", ["model.depth=1"]), H100, 3)
    (draw,) = [x for x in ledger.recording.launches if x.operation == "draw_masks"]
    assert draw.name == "_masks_kernel" and (draw.read, draw.written) == (3 * 16, 3 * 512 * 8)
    kernels = [x.name for x in ledger.recording.launches if x.operation == "patch_embed_backward"]
    assert kernels == ["_weight_grad_kernel", "_token_grad_kernel", "_sum_kernel"]


def test_peak_memory_is_that_of_live_tensors():
    with Recorder() as recorder:
        kept = empty(1024, dtype=torch.float32)
        recorder.hold("weights", kept)
        recorder.phase = "forward"
        x = kept + 1  # 8 KiB
        x = x * 2  # 12 KiB, then 8
        del x  # 4 KiB
        x = kept[:512] * 3  # 6 KiB
        assert x.is_meta
    assert recorder.recording.peak == 12 * 1024
    assert recorder.recording.at_peak == {"weights": 4096, "forward": 8192}


@pytest.mark.parametrize(
    ("program", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x.sum()), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.sum(0).tolist(), 1),
        (lambda x: (x > 0).nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: torch.empty(8, 16).copy_(x), 1),
        (lambda x: x.to("cpu", non_blocking=True), 0),
        (lambda x: x[:, torch.zeros(3, dtype=torch.int64, device=META)], 0),
        (lambda x: x.where(x > 0, 0.0).sum(), 0),
    ],
)
def test_waits_of_the_host_are_seen(program, waits):
    x = empty(8, 16, dtype=torch.float32)
    with Recorder() as recorder:
        program(x)
    assert len(recorder.recording.waits) == waits
    for wait in recorder.recording.waits:
        assert "test_ledger.py" in wait.where and "<lambda>" in wait.where


def test_the_step_of_base_is_what_a_trace_by_hand_found():
    """Bytes of a trace that counted each input and output once, before operations were fused."""
    ledger = make_ledger(load_config("base_patch"), H100, 64)
    rows = ledger.rows(FORWARD, BACKWARD)
    assert rows["matmul"].moved == pytest.approx(29.6e9, rel=0.01)
    assert rows["attention"].moved == pytest.approx(7.2e9, rel=0.02)
    assert rows["matmul"].flops == pytest.approx(3 * 5.49e12, rel=0.01)
    passes = ledger.total(INPUTS, FORWARD, LOSS, BACKWARD).moved
    assert 37e9 < passes < 73.3e9  # matmuls and attention alone, and all of it then


@pytest.mark.parametrize(
    "name", ["tiny_patch", "tiny_frame", "esc50_patch", "audioset_20k_patch", "iemocap_frame"]
)
def test_in_a_step_the_host_waits_only_to_learn_whether_it_is_skipped(name):
    waits = make_ledger(load_config(name, ["model.depth=1"]), H100, 4).recording.waits
    places = [f"{wait.phase}: {wait.where.rsplit('/', 1)[-1]}" for wait in waits]
    # The valid clips of the step, counted before the backward pass; then the norm, by DeepSpeed,
    # which asks once more where it clips.
    assert re.fullmatch(r"optimizer: pending_sum.py:\d+ read", places.pop(0))
    assert len(places) in (1, 2)
    assert all(re.fullmatch(r"optimizer: utils.py:\d+ is_invalid_grad_norm", p) for p in places)


@pytest.mark.parametrize("stage", [1, 2])
def test_optimizer_and_norm_take_few_launches(stage):
    few, many = (
        make_ledger(
            load_config("tiny_patch", [f"model.depth={n}", f"train.zero_stage={stage}"]), H100, 2
        )
        for n in (1, 4)
    )
    launches = [ledger.total(STEP).kernels for ledger in (few, many)]
    assert launches[0] == launches[1] < 60
    assert "flat copies" not in many.rows(BACKWARD)
    copied = many.rows(STEP)["flat copies"].moved
    trained = count_parameters(many.config).trained
    assert copied == pytest.approx(12 * trained, rel=1e-3)  # bf16 to fp32, fp32 to bf16
    parameters = sum(1 for _ in MSPM(load_config("tiny_patch", ["model.depth=4"])).parameters())
    assert parameters > 60


def test_recomputed_blocks_cost_a_forward_pass_and_save_memory():
    plain, again = (
        make_ledger(load_config("tiny_patch", ["model.depth=4", *more]), H100, 4)
        for more in ([], ["train.activation_checkpoint_every=1"])
    )
    extra = again.rows(BACKWARD)["matmul"].flops - plain.rows(BACKWARD)["matmul"].flops
    # Not the heads, nor the last product of a block: of it only the inputs are kept.
    assert 0.5 < extra / plain.rows(FORWARD)["matmul"].flops < 2 / 3
    assert again.recording.peak < 0.8 * plain.recording.peak


def test_the_command_prints_the_ledger(capsys):
    arguments = ["plan", "tiny_frame", "--ledger", "--batch", "4", "model.depth=2"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for word in ("tiny, patch [128, 2], pretraining: 4 clips", "LayerNorm", "memory in use", "all"):
        assert word in text
    assert main([*arguments, "--json"]) == 0
    ledger = json.loads(capsys.readouterr().out)
    groups = ledger["groups"].values()
    assert ledger["total"]["launches"] == sum(row["launches"] for row in groups)
    assert ledger["total"]["bytes_read"] == sum(row["bytes_read"] for row in groups)
    parts = [row["flops"] for phase in ledger["phases"].values() for row in phase.values()]
    assert ledger["total"]["flops"] == pytest.approx(sum(parts))
    assert main([*arguments, "train.zero_stage=3"]) == 2
    assert "--ledger: expected train.zero_stage 1 or 2" in capsys.readouterr().err


CASES = [
    *((f"{size}_patch", None) for size in ("tiny", "small", "base")),
    *((f"{size}_frame", None) for size in ("tiny", "small", "base")),
    *((f"{size}_{kind}", 1) for size in ("tiny", "base") for kind in ("patch", "frame")),
    ("small_patch", 2),
    ("eat_tiny", None),
    ("eat_tiny", 1),
    ("eat_base", None),
]


@pytest.mark.parametrize(("name", "every"), CASES)
def test_the_plan_counts_what_the_ledger_lists(name, every, *more):
    """Within 5 %: memory, launches, bytes and FLOPs of a step, the plan's from fewer blocks."""
    overrides = ["model.depth=5", "train.cuda_graphs=false", *more]
    config = load_config(name, [*overrides, f"train.activation_checkpoint_every={every or 'null'}"])
    gpu = replace(H100, fragmentation=1.0, base_gib=0.0, half_width=0.0)
    shares = ("gemm", "attention", "convolution", "bandwidth")
    gpu = replace(gpu, **{f"{name}_share": 1.0 for name in shares})
    ledger, parameters = make_ledger(config, gpu, 16), count_parameters(config)
    shape = {"world_size": 1, "batch": 16, "stage": 1, "every": every}
    time = step_time(config, gpu, parameters, **shape)
    rows, total = ledger.rows(), ledger.total()
    bandwidth, peak = gpu.bandwidth_gb_s * 1e9, gpu.peak_tflops * 1e12
    step = sum(rows[name].moved for name in ("flat copies", "gradient norm", "optimizer"))
    convolutions = rows.get("convolution", Row("none"))
    products = sum(row.moved for row in (rows["matmul"], rows["attention"], convolutions))
    rest = total.moved - step - products
    launches = (time.host - ENGINE_S[1]) / gpu.launch_us * 1e6
    kernels = [x for x in ledger.recording.launches if "attention" in x.name]
    attended = sum(x.flops / (1.25 if "backward" in x.name else 1) for x in kernels)
    assert time.attention * peak == pytest.approx(attended, rel=0.05)
    others = rows["attention"].flops + convolutions.flops
    assert time.matmul * peak == pytest.approx(total.flops - others, rel=0.05)
    assert time.convolution * peak == pytest.approx(convolutions.flops, rel=0.05)
    if every is None and config.objective.kind == "latent":  # which avoids none
        assert step_flops_per_clip(config) * 16 == pytest.approx(
            total.flops - rows["attention"].flops + attended, rel=0.01
        )
    assert time.elementwise * bandwidth == pytest.approx(rest, rel=0.05)
    assert time.optimizer * bandwidth == pytest.approx(step, rel=0.05)
    assert launches == pytest.approx(total.kernels, rel=0.05)
    memory_needed = memory(config, gpu, parameters, **shape).total
    assert memory_needed == pytest.approx(ledger.recording.peak, rel=0.05)


def test_the_plan_counts_an_average_of_the_weights():
    test_the_plan_counts_what_the_ledger_lists("tiny_patch", None, "train.ema=0.9999")
    plain, averaged = (
        make_ledger(load_config("tiny_patch", ["model.depth=1", *more]), H100, 2).rows(STEP)
        for more in ([], ["train.ema=0.9999"])
    )
    weights = count_parameters(load_config("tiny_patch", ["model.depth=1"])).trained
    moved = averaged["optimizer"].moved - plain["optimizer"].moved
    assert moved == pytest.approx(12 * weights, rel=1e-4)
    assert averaged["optimizer"].kernels == plain["optimizer"].kernels + 1


def test_the_plan_counts_the_encoders_options():
    options = ("model.positions=sincos", "model.extra_tokens=cls", "model.norm=post")
    test_the_plan_counts_what_the_ledger_lists("tiny_patch", None, *options)


def test_more_blocks_and_clips_are_more_of_the_same():
    config = load_config("tiny_patch")
    extrapolated = work(config, 100, None, torch.bfloat16)
    whole = record_passes(config, 100, None, torch.bfloat16).launches
    assert extrapolated.launches == sum(launch.kernels for launch in whole)
    flops = sum(launch.flops for launch in whole if "attention" not in launch.name)
    assert extrapolated.matmul == pytest.approx(flops, rel=1e-9)
