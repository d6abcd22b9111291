"""What the ranks of a world do in tests. Every function runs on every rank."""

import math
import resource
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from toy import build_adam, build_engine, build_toy, clips, train

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.errors import CheckpointError
from ssast.engine.parallel import long_work
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.parallel.ranks import broadcast_object, reduce_max, reduce_sum, run_on_main


def exchange(world):
    """Every collective once."""
    big = 2**53 - world.world_size
    return {
        "sum": reduce_sum([world.rank + 1, 0.1, big if world.is_main else 1], world),
        "max": reduce_max([world.rank, -world.rank], world),
        "object": broadcast_object({"from": world.rank}, world),
        "main": run_on_main(lambda: world.rank, world),
    }


def once_a_machine(world, fails):
    """What run_long returns or raises on this rank, and how often it ran here."""
    calls = []

    def work(tick):
        for _ in range(3):
            calls.append(world.rank)
            tick()
        if fails:
            raise CheckpointError("no space")
        return "done"

    world = replace(world, local_rank=world.rank)
    with mock.patch.object(long_work, "MEET_S", 0.0):
        try:
            return long_work.run_long(work, world, here=world.local_rank == 0), calls
        except CheckpointError as error:
            return str(error), calls


def fail_on_main(world):
    """The error that run_on_main raises on this rank, and whether the world still works."""

    def fail():
        raise CheckpointError("no space")

    try:
        run_on_main(fail, world)
    except CheckpointError as error:
        return str(error), reduce_sum([1], world)
    return None


def resume(world, stage, precision, folder, offload="none", reduce_dtype="auto"):
    """Trains 2 + 2 steps with a checkpoint between them; the second half again from it."""
    settings = {
        "stage": stage,
        "precision": precision,
        "offload": offload,
        "reduce_dtype": reduce_dtype,
        "averages": True,
    }
    engine = build_engine(world, seed=world.rank, **settings)
    first = train(engine, range(2))
    save(engine, folder, 2)
    second = train(engine, range(2, 4))
    expected, _ = engine.state()
    engine.close()

    engine = build_engine(world, seed=99, **settings)
    step = load(engine, folder)
    again = train(engine, range(step, 4))
    found, adam_step = engine.state()
    engine.close()
    return {
        "losses": (first, second, again),
        "differ": [name for name in expected if not torch.equal(expected[name], found[name])],
        "tensors": len(found),
        "adam_step": adam_step,
    }


def train_from(world, folder, start, stop, stage, precision):
    """Losses of these steps, from a checkpoint where there is one; writes the next one."""
    engine = build_engine(world, stage=stage, precision=precision, averages=True)
    if start:
        assert load(engine, folder) == start
    losses = train(engine, range(start, stop))
    save(engine, folder, stop)
    engine.close()
    return losses


def save(engine, folder, step):
    tensors, adam_step = engine.state()
    meta = {"adam_step": adam_step}
    run_on_main(lambda: Checkpoints(folder).save(tensors, meta, step=step), engine.world)


def load(engine, folder):
    """Rank 0 alone looks at the files."""
    tensors, meta = {}, None
    if engine.world.is_main:
        tensors, meta = Checkpoints.load(Checkpoints(folder).latest())
    meta = broadcast_object(meta, engine.world)
    engine.load_state(tensors, meta["adam_step"] if engine.world.is_main else -1)
    return meta["step"]


def accumulated(world, stage, precision, accumulate, offload="none"):
    """The gradient of one step over alike micro-batches of one clip, on rank 0, flat."""
    module = build_toy().to(world.device)
    engine = TrainEngine(
        module,
        build_adam(module),
        world=world,
        batch_size=1,
        accumulate=accumulate,
        zero_stage=stage,
        precision=precision,
        offload=offload,
    )
    draws = torch.Generator().manual_seed(world.rank)
    for _ in range(accumulate):
        x = (1 + 0.3 * torch.randn(1, 5, 7, generator=draws)).to(world.device)
        y = (2 + torch.randn(1, 5, 3, generator=draws)).to(world.device)
        engine.backward((engine(x)["logits"] - y).square().mean())
        engine.step(1e-3)
    state, _ = engine.state()
    engine.close()
    moments = [t.flatten() for name, t in sorted(state.items()) if name.startswith("exp_avg/")]
    return torch.cat(moments) if moments else None


def skip(world, stage, precision, accumulate):
    """One step whose loss is not a number on the last rank, between two good ones."""
    engine = build_engine(
        world, stage=stage, precision=precision, accumulate=accumulate, averages=True
    )
    train(engine, range(1))
    before, _ = engine.state()
    train(engine, range(1, 2), poison=1)
    after, adam_step = engine.state()
    norm, skipped = float(engine.grad_norm), engine.skipped_steps
    losses = train(engine, range(2, 3))
    norm_after = float(engine.grad_norm)
    changed = [n for n in before if n != "buffer/seen" and not torch.equal(before[n], after[n])]
    engine.close()
    return {
        "changed": changed,
        "adam_step": adam_step,
        "skipped": skipped,
        "norms": (norm, norm_after),
        "finite": all(map(math.isfinite, losses)),
    }


def averages(world, stage, precision, accumulate=1, offload="none"):
    """The averages after some steps, of which one is skipped, and the weights after each step.

    On rank 0 both; and what evaluating with the averages gave and has changed, on every rank, with
    the values and addresses of a copy of the averages, and of one in an engine that took them up.
    """
    settings = {"stage": stage, "precision": precision, "accumulate": accumulate}
    engine = build_engine(world, averages=True, offload=offload, **settings)
    copy = copy_of_toy(world, precision)
    copies, addresses = [], [p.data_ptr() for p in copy.parameters()]
    engine.average_into(copy, "")
    history = [engine.state()[0]]
    copies.append(snapshot(copy))
    for step in range(4):
        train(engine, range(step, step + 1), poison=2)
        history.append(engine.state()[0])
        copies.append(snapshot(copy))
    in_place = addresses == [p.data_ptr() for p in copy.parameters()]
    part = copy_of_toy(world, precision).blocks
    engine.average_into(part, "blocks.")
    part_now = snapshot(part)
    x, _ = clips(0)
    before = [p.detach().clone() for p in engine.module.parameters()]
    engine.train(False)
    with torch.no_grad(), engine.averaged():
        outputs = engine(x.to(world.device))["logits"].cpu()
    engine.train(True)
    after = [p.detach().clone() for p in engine.module.parameters()]
    state = engine.state()[0]
    losses = train(engine, range(4, 6))
    engine.close()
    engine = build_engine(world, averages=True, seed=3, offload=offload, **settings)
    resumed = copy_of_toy(world, precision)
    engine.average_into(resumed, "")
    engine.load_state(state, 3)
    copies.append(snapshot(resumed))
    engine.close()
    engine = build_engine(world, averages=False, offload=offload, **settings)
    expected = train(engine, range(6), poison=2)[4:]
    engine.close()
    return {
        "history": history,
        "outputs": outputs,
        "changed": [n for n, t in state.items() if not torch.equal(t, history[-1][n])],
        "module": all(map(torch.equal, before, after)),
        "copies": copies,
        "in_place": in_place,
        "part": part_now,
        "losses": (losses, expected),
    }


def copy_of_toy(world, precision):
    """Another toy on the device, its parameters in the precision of an engine."""
    module = build_toy(seed=7 + world.rank).to(world.device)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return module


def snapshot(module):
    """Its parameters and buffers as they are."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors}


def load_misfit(world, stage):
    """The error of each state that does not fit."""
    engine = build_engine(world, stage=stage)
    tensors, adam_step = engine.state()
    errors = []
    for change in (
        lambda t: t.pop("exp_avg/head.bias", None),
        lambda t: t.update({"weight/extra": torch.zeros(1)}),
        lambda t: t.update({"weight/norm.bias": torch.zeros(3)}),
    ):
        wrong = dict(tensors)
        change(wrong)
        try:
            engine.load_state(wrong, adam_step)
        except CheckpointError as error:
            errors.append(str(error))
    engine.load_state(tensors | {"rng/cpu": torch.zeros(2)}, adam_step)  # others' are left alone
    engine.close()
    return errors


def save_without_space(world, folder):
    """A failing save between two good ones; the errors and what is on the disk afterwards."""
    engine = build_engine(world)
    train(engine, range(1))
    save(engine, folder, 1)
    error = None
    with small_files() if world.is_main else contextmanager(lambda: iter([None]))():
        try:
            save(engine, folder, 2)
        except CheckpointError as caught:
            error = str(caught)
    losses = train(engine, range(1, 2))
    engine.close()
    return error, run_on_main(lambda: Checkpoints(folder).latest().name, world), losses


@contextmanager
def small_files(limit: int = 4096):
    """The system refuses files above this size, as a full disk refuses to write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def group_timeouts(world):
    """Seconds that each process group waits, DeepSpeed's own included."""
    engine = build_engine(world, stage=1)
    train(engine, range(1))
    groups = dist.distributed_c10d._world.pg_map
    found = [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups]
    engine.close()
    return found


def die(world, rank):
    """One rank is killed; how long the other one waits in a collective before it fails."""
    import os
    import signal
    import time

    reduce_sum([1], world)
    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        reduce_sum([1], world)
    except RuntimeError:
        return time.monotonic() - start
    return None
