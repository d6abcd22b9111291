"""Plans: formulas against what PyTorch does and others published, and what the command says."""

import json
from dataclasses import replace

import pytest
import torch

from ssast.benchmarks.loading.report import Result
from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.model.objective import MSPM, mean_losses
from ssast.engine.monitoring.gpus import GPUS, Gpu, find_gpu, load_gpu
from ssast.engine.planning import order as plan_order
from ssast.engine.planning.activations import activations
from ssast.engine.planning.calibrate import write_gpu
from ssast.engine.planning.plan import (
    GIB,
    Parameters,
    bus_bandwidth,
    choose,
    collective_s,
    count_parameters,
    largest_batch,
    memory,
    step_time,
    wire_elements,
)
from ssast.engine.planning.report import PlanRequest, make_plan

SMALL = ["audio.num_frames=256", "objective.num_masked=90"]


def saved_bytes(config, batch):
    """Bytes that autograd keeps of a real forward pass, each storage once, without weights."""
    model = MSPM(config)
    model.encoder.activation_checkpoint_every = config.train.activation_checkpoint_every
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    audio, ids = config.audio, torch.arange(batch)
    fbank = torch.randn(batch, audio.num_frames, audio.n_mels)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(fbank, *model.draw_masks(ids, torch.zeros_like(ids)))
        mean_losses(losses, torch.ones(batch, dtype=torch.bool), 10.0)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        ["model.depth=1"],
        ["model.depth=3"],
        ["model.depth=2", "objective.kind=generative"],
        ["model.depth=2", "objective.two_pass=true"],
        ["model.depth=2", "model.size=small", "objective.num_masked=20"],
        ["model.depth=2", "model.patch=[128, 2]"],
        ["model.depth=1", "model.norm=post"],
        ["model.depth=3", "model.norm=post", "model.extra_tokens=cls", "model.positions=sincos"],
        ["model.depth=2", "model.norm=post", "objective.num_masked=20"],
    ],
)
def test_activations_are_those_that_autograd_keeps(settings, batch):
    config = load_config("tiny_patch", [*SMALL, *settings])
    P = config.model.patch[0] * config.model.patch[1]
    # Until the loss: predictions of the MSE, and its targets, unless InfoNCE keeps them.
    alive = 4 * batch * P * config.objective.num_masked
    alive *= 2 if config.objective.two_pass or config.objective.kind == "generative" else 1
    want = saved_bytes(config, batch)
    assert activations(config, batch, 4, None) - alive == pytest.approx(want, rel=3e-3)


def test_of_a_block_that_is_computed_again_only_the_input_is_kept():
    config = load_config(
        "tiny_patch", [*SMALL, "model.depth=6", "train.activation_checkpoint_every=2"]
    )
    # That of the fifth block, when the passes of the last one and of the heads are over.
    row = 3 * 130 * 192 * 4
    masked = 3 * 90
    last = 4 * 192 * (4 * 3 * 130 + 13 * masked) + 12 * masked + 8 * (3 * 130 + masked)
    tail = 4 * masked * (4 * 192 + 5 * 256) + 8 * masked
    alive = 4 * masked * 256  # predictions of the MSE, until the loss
    recomputed = saved_bytes(config, 3) - last - tail + alive - row
    want = recomputed + (16 + 5) * row + 3 * 130 * (12 + 16)
    assert activations(config, 3, 4, 2) == pytest.approx(want, rel=0.02)
    whole = activations(config, 3, 4, None)
    assert activations(config, 3, 4, 1) < activations(config, 3, 4, 2) < 0.8 * whole


@pytest.mark.parametrize("name", ["tiny_patch", "base_frame", "esc50_patch"])
def test_parameters_are_counted_without_memory(name):
    config = load_config(name, ["model.depth=2"])
    counted = count_parameters(config)
    if config.finetune is None:
        model = MSPM(config)
        assert counted.total == counted.trained == sum(p.numel() for p in model.parameters())
    else:  # the mask token is left as it is
        assert counted.total - counted.trained == 768


@pytest.mark.parametrize(
    ("gpu", "width", "depth", "length", "published"),
    [("a100", 768, 12, 2048, 0.426), ("h100", 1536, 24, 2048, 0.404)],
    ids=["MPT-125M", "MPT-760M"],
)
def test_shares_of_the_peak_agree_with_published_rates(gpu, width, depth, length, published):
    """Their FLOPs: 6 for each parameter and token, and 12 L D for attention in each block."""
    device, tokens, vocabulary = load_gpu(gpu), 2048 * 32, 50368
    products = 6.0 * tokens * (12 * depth * width**2 + vocabulary * width)
    attention = 12.0 * tokens * length * width * depth
    peak = device.peak_tflops * 1e12
    seconds = products / peak / device.gemm_share * (width + device.half_width) / width
    seconds += attention / 2 / peak / device.attention_share  # causal: half of them is computed
    moved = 75.0 * tokens * width * depth * 2
    seconds += moved / (1e9 * device.bandwidth_gb_s * device.bandwidth_share)
    assert (products + attention) / seconds / peak == pytest.approx(published, rel=0.2)


def test_sharding_divides_what_its_stage_says():
    config, gpu = load_config("giant"), load_gpu("h100")
    parameters = count_parameters(config)
    shape = {"world_size": 64, "batch": 1}
    one, two, three = (memory(config, gpu, parameters, stage=s, **shape) for s in (1, 2, 3))
    P = parameters.total
    assert one.weights == 2 * P and one.optimizer == 12 * P / 64
    assert one.gradients == 2 * P + 4 * P / 64 and two.gradients == 6 * P / 64
    twice = replace(config, train=replace(config.train, accumulation_steps=2))
    kept = [memory(twice, gpu, parameters, stage=s, **shape).accumulated for s in (1, 2)]
    assert kept == [4 * P, 4 * P / 64] and one.accumulated == 0
    assert three.weights < two.weights == one.weights
    offloaded = replace(config, train=replace(config.train, offload="cpu"))
    assert memory(offloaded, gpu, parameters, stage=1, **shape).optimizer == 0
    averaged = replace(config, train=replace(config.train, ema=0.9999))
    assert memory(averaged, gpu, parameters, stage=3, **shape).optimizer == 16 * P / 64
    once = step_time(config, gpu, parameters, stage=1, **shape).optimizer
    more = step_time(averaged, gpu, parameters, stage=1, **shape).optimizer - once
    assert more * gpu.bandwidth_gb_s * gpu.bandwidth_share * 1e9 == pytest.approx(12 * P / 64)


def test_the_largest_batch_is_the_largest_that_fits():
    config, gpu = load_config("base_patch"), load_gpu("l4")
    parameters = count_parameters(config)

    def need(batch):
        return memory(config, gpu, parameters, world_size=8, batch=batch, stage=1).total

    most = largest_batch(config, gpu, parameters, world_size=8, stage=1)
    assert need(most) <= gpu.memory_gib * GIB < need(most + 1)
    tiny = replace(gpu, memory_gib=2.1)
    assert largest_batch(config, tiny, parameters, world_size=8, stage=1) == 0


def test_what_is_recommended_is_no_more_than_is_needed():
    config, gpu = load_config("giant"), load_gpu("h100")
    parameters = count_parameters(config)
    choice, _ = choose(config, gpu, parameters, 64)
    assert (choice.stage, choice.every) == (1, None)
    choice, reasons = choose(config, replace(gpu, memory_gib=4.0), parameters, 64)
    assert choice.every is not None and "activation_checkpoint_every" in " ".join(reasons)
    choice, _ = choose(config, replace(gpu, memory_gib=6.5), parameters, 64, batch=1)
    assert (choice.stage, choice.every, choice.batch) == (2, None, 1)
    assert choose(config, replace(gpu, memory_gib=2.2), parameters, 64) is None


def test_collectives():
    gpu = load_gpu("h100")
    assert collective_s(gpu, 1, 1e9, 1) == 0.0
    assert bus_bandwidth(gpu, 8) == 400e9 and bus_bandwidth(gpu, 16) == pytest.approx(340e9)
    assert collective_s(gpu, 8, 4e11, 1) == pytest.approx(7 / 8, rel=1e-3)
    # Ten thousand devices: more than a thousand hops for each piece.
    assert collective_s(gpu, 10_000, 1.0, 10) == pytest.approx(10 * (2e-5 + 6e-6 * 1249))
    assert wire_elements(Parameters(10, 10), 1, 4) == (20.0, 10.0)
    assert wire_elements(Parameters(10, 10), 2, 4) == (40.0, 10.0)
    assert wire_elements(Parameters(10, 10), 3, 1) == (10.0, 20.0)


def test_computing_blocks_again_costs_a_forward_pass():
    config, gpu = load_config("base_patch"), load_gpu("h100")
    shape = {"world_size": 1, "batch": 64, "stage": 1}
    parameters = count_parameters(config)
    plain = step_time(config, gpu, parameters, **shape)
    again = step_time(config, gpu, parameters, every=1, **shape)
    # But for the last product of each block, of which only the inputs are kept.
    assert 1.2 < again.device / plain.device < 1.3
    assert 1.2 < (again.matmul + again.attention) / (plain.matmul + plain.attention) < 1.27


@pytest.mark.parametrize(
    ("given", "native", "used"),
    [("auto", True, "bf16"), ("auto", False, "fp32"), ("fp32", True, "fp32")],
)
def test_a_cpu_is_planned_in_the_precision_of_the_run(given, native, used, capsys, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": native})
    given = f"train.precision={given}"
    assert main(["plan", "tiny_patch", given, "--gpu", "cpu", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["gpu"]["precision"] == used


def test_the_command_prints_a_plan(capsys, tmp_path):
    assert main(["plan", "base_patch", "--gpus", "64", "--gpu", "h100", "--price", "2"]) == 0
    text = capsys.readouterr().out
    for word in ("87.2 M", "295.5 G", "ZeRO 1", "recommended: train.zero_stage=1", "MFU", "cost"):
        assert word in text
    assert "train.batch_size=24 cannot be divided over 64 devices" in text


def test_the_command_prints_json_and_draws(capsys, tmp_path):
    picture = tmp_path / "new" / "scaling.png"
    arguments = ["base_patch", "--gpus", "10000", "--gpu", "h100", "--png", picture, "--json"]
    assert main(["plan", *map(str, arguments)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["flops_per_clip"] == pytest.approx(295.5e9, rel=1e-3)
    assert 2 < plan["memory_per_gpu"] < 79 and 0.001 < plan["mfu"] < 0.5
    assert plan["clips_per_s"] == pytest.approx(
        plan["mfu"] * 989e12 * 10_000 / plan["flops_per_clip"]
    )
    efficiencies = {row["gpus"]: row["efficiency"] for row in plan["scaling"]}
    assert efficiencies[1] == 1.0 and efficiencies[64] > efficiencies[4096] > efficiencies[10_000]
    assert plan["choice"]["train.batch_size"] == 40_000
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_a_batch_that_is_given_is_planned_with():
    request = PlanRequest(gpus=64, gpu=load_gpu("h100"))
    plan = make_plan(load_config("base_patch", ["train.batch_size=512"]), request)
    assert plan["choice"]["train.batch_size"] == 512 and plan["choice"]["batch_per_gpu"] == 8
    plan = make_plan(load_config("base_patch"), replace(request, batch=16, clips=1e6))
    assert plan["steps"] == 977 and plan["choice"]["train.batch_size"] == 1024
    assert "only 977 steps" in " ".join(plan["reasons"])
    alone = make_plan(
        load_config("base_patch"), PlanRequest(gpus=1, gpu=load_gpu("h100"), clips=1e4)
    )
    assert alone["choice"]["train.batch_size"] == 24 and not alone["communication"]["reduced_gib"]
    assert "steps" not in " ".join(alone["reasons"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "--gpu h1000: expected cpu, b200, "),
        (["--gpus", "0"], "--gpus must be positive and finite, got 0"),
        (["--gpu", "l4", "--batch", "99999"], "99999 clips do not fit into 22 GiB of L4"),
        (["--gpu", "missing.yaml"], "missing.yaml: cannot be read as YAML"),
        (["--loader", "missing.json"], "--loader missing.json: cannot be read"),
        (
            ["--ledger", "--order=9", "--clips=9", "--price=1", "--loader=a", "--png=a.png"],
            "expected no --clips, --price, --loader, --order, --png beside it",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "base_patch", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


def test_a_described_gpu(tmp_path):
    path = tmp_path / "new" / "mine.yaml"
    write_gpu(GPUS[0], path)
    assert load_gpu(str(path)) == GPUS[0]
    good = "name: x\npeak_tflops: 100\nmemory_gib: 40\nbandwidth_gb_s: 900\n"
    path.write_text(good)
    assert load_gpu(str(path)) == Gpu(name="x", peak_tflops=100, memory_gib=40, bandwidth_gb_s=900)
    for text, message in (
        (good + "peek: 3\n", "unknown key 'peek'"),
        ("name: x\n", "missing key 'bandwidth_gb_s'"),
        (good.replace("100", "-3"), "peak_tflops must be positive: -3"),
        (good + "precision: fp8\n", "precision must be bf16 or fp32, got 'fp8'"),
        ("- 3\n", "expected a mapping"),
        ("a: [\n", "cannot be read as YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_gpu(str(path))


def test_gpus_are_found_by_what_the_driver_calls_them():
    assert find_gpu("NVIDIA H100 PCIe").bandwidth_gb_s == 2000
    assert find_gpu("NVIDIA L40S").name == "L40S" and find_gpu("NVIDIA A10").name == "A10"
    assert find_gpu("NVIDIA A10G").peak_tflops == 70  # AWS's, with 600 GB/s as an A10
    assert find_gpu("NVIDIA A100-SXM4-40GB").memory_gib == 39
    assert find_gpu("NVIDIA A100-SXM4-80GB").memory_gib == 79
    assert find_gpu("NVIDIA GeForce RTX 4090").name == "4090"
    for name in ("NVIDIA L40", "NVIDIA GH200 480GB", "Something else"):  # none of its likes
        assert find_gpu(name) is None


def test_the_loader_s_speed_is_taken_from_its_benchmark(tmp_path, capsys):
    path = tmp_path / "data.json"
    cpu_ms = {"soundfile": 9.0, "files": 5.0, "files decode": 2.0, "files read": 1.0}
    measured = Result("flac", 10.0, 8, 3, cpu_ms, cpu_ms, 0.0)
    path.write_text(json.dumps([measured.as_json()]))
    assert main(["plan", "base_patch", "--loader", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["clips_per_s_per_core"] == 500
    path.write_text("{}")
    assert main(["plan", "base_patch", "--loader", str(path)]) == 2
    assert "expected what ssast bench data --json prints" in capsys.readouterr().err


def test_4096_ranks_share_an_epoch_exactly():
    order = plan_order.work_out_order(100_003, 4096, 8, seed=3)
    assert order["partition"] and order["steps"] == 4
    assert "each exactly once" in plan_order.format_order(order)


def test_an_order_that_leaves_clips_out_is_noticed(monkeypatch):
    def off_by_one(start, iteration, batch_size, rank, world_size):
        return plan_order.np.arange(batch_size) + rank * (batch_size - 1)

    monkeypatch.setattr(plan_order, "rank_positions", off_by_one)
    order = plan_order.work_out_order(512, 64, 8, seed=3)
    assert not order["partition"] and "NOT" in plan_order.format_order(order)


def test_a_batch_that_leaves_the_gpu_waiting_is_not_recommended_in_silence():
    config, gpu = load_config("base_patch"), load_gpu("h100")
    plan = make_plan(config, PlanRequest(gpus=8, gpu=gpu))
    found, text = plan["not_filled"], " ".join(plan["reasons"])
    assert found["host_seconds"] > found["device_seconds"]
    assert found["train.batch_size"] == 8 * found["batch_per_gpu"]
    growth = found["train.batch_size"] / 24
    assert found["optim.lr"]["linear"] == pytest.approx(1e-4 * growth)
    assert found["optim.lr"]["square root"] == pytest.approx(1e-4 * growth**0.5)
    for word in (
        "the GPU is not filled",
        f"train.batch_size={found['train.batch_size']}",
        "square",
    ):
        assert word in text
    filled = make_plan(config, PlanRequest(gpus=8, gpu=gpu, batch=found["batch_per_gpu"]))
    assert filled["not_filled"] is None and "not filled" not in " ".join(filled["reasons"])
    small = replace(gpu, memory_gib=3.0)
    assert "no batch that fits fills it" in str(
        make_plan(config, PlanRequest(gpus=8, gpu=small))["reasons"]
    )


@pytest.mark.parametrize("gpu", ["a100", "h100"])
@pytest.mark.parametrize("name", ["tiny_throughput", "small_throughput", "base_throughput"])
def test_throughput_recipes_fill_one_gpu_and_eight(name, gpu):
    published = load_config(name.replace("throughput", "patch"))
    for gpus, overrides in ((8, []), (1, ["train.accumulation_steps=8"])):
        config = load_config(name, overrides)
        plan = make_plan(config, PlanRequest(gpus=gpus, gpu=load_gpu(gpu)))
        assert plan["not_filled"] is None
        assert plan["choice"]["train.batch_size"] == config.train.batch_size
        assert plan["choice"]["train.activation_checkpoint_every"] is None
        assert plan["memory_per_gpu"] < 0.5 * load_gpu(gpu).memory_gib
    growth = config.train.batch_size / published.train.batch_size
    assert config.optim.lr == pytest.approx(published.optim.lr * growth**0.5, rel=0.01)
    clips = [c.train.steps * c.train.batch_size for c in (config, published)]
    assert clips[0] == clips[1]
