"""Launchers, collectives and what happens when a rank dies."""

import os
import subprocess
import sys

import pytest
import rank_jobs
import torch
from rank_pool import RankPool, free_port

from ssast.engine.errors import ConfigError, LostPeer
from ssast.engine.parallel import ranks as distributed
from ssast.engine.parallel.ranks import (
    Launch,
    World,
    broadcast_object,
    close_world,
    first_host,
    gather_objects,
    init_world,
    read_launch,
    reduce_max,
    reduce_sum,
    run_on_main,
)

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
RANKS = {"RANK": "5", "WORLD_SIZE": "8", **MASTER}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[003-007,12],x1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "8",
    **MASTER,
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Launch("single", 0, 0, 1)),
        (
            RANKS | {"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"},
            Launch("torchrun", 5, 1, 8, "10.0.0.1", 1234, 8),
        ),
        (
            RANKS | {"LOCAL_RANK": "1", "CROSS_RANK": "1", "LOCAL_SIZE": "4"},
            Launch("deepspeed", 5, 1, 8, "10.0.0.1", 1234, 4),
        ),
        (RANKS | {"LOCAL_WORLD_SIZE": "4"}, Launch("env", 5, 1, 8, "10.0.0.1", 1234, 4)),
        (RANKS, Launch("env", 5, 5, 8, "10.0.0.1", 1234, 8)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch("env", 0, 0, 1)),
        (SLURM, Launch("slurm", 5, 1, 8, "gpu003", 23456, 8)),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"},
            Launch("slurm", 5, 1, 8, "gpu003", 23456, 1),
        ),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "1"},
            Launch("slurm", 5, 1, 8, "gpu003", 23456, 2),
        ),
        (SLURM | {"SLURM_CPUS_PER_TASK": "4"}, Launch("slurm", 5, 1, 8, "gpu003", 23456, 1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "6"}, Launch("slurm", 5, 1, 6, "gpu003", 23456, 6)),
        (SLURM | {"SLURM_STEP_ID": "2"}, Launch("slurm", 5, 1, 8, "gpu003", 23470, 8)),
        (SLURM | MASTER, Launch("slurm", 5, 1, 8, "10.0.0.1", 1234, 8)),
        (SLURM | {"SLURM_NTASKS": "1"}, Launch("single", 0, 0, 1)),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}, Launch("single", 0, 0, 1)),
        (OPENMPI, Launch("mpi", 5, 1, 8, "10.0.0.1", 1234, 8)),
        (
            OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            Launch("mpi", 5, 1, 8, "10.0.0.1", 1234, 2),
        ),
        (RANKS | SLURM | {"LOCAL_RANK": "2"}, Launch("env", 5, 2, 8, "10.0.0.1", 1234, 8)),
    ],
)
def test_launchers_are_recognised(env, expected):
    before = dict(env)
    assert read_launch(env) == expected
    assert env == before


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "set, but not MASTER_ADDR and MASTER_PORT"),
        (RANKS | {"RANK": "8"}, "rank 8 of a world of 8"),
        (RANKS | {"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number, found 'two'"),
        (RANKS | {"LOCAL_RANK": "-1"}, "LOCAL_RANK: expected a whole number, found '-1'"),
        ({k: v for k, v in OPENMPI.items() if k != "MASTER_ADDR"}, "mpirun: pass the address"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, "SLURM_PROCID: expected"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "no machine in ''"),
    ],
)
def test_contradicting_environments_are_refused(env, message):
    with pytest.raises(ConfigError, match=message):
        read_launch(env)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-007,12],x1", "gpu003"),
        ("gpu[12,14-15]-ib", "gpu12-ib"),
        ("node1", "node1"),
        ("a-1,a-2", "a-1"),
        ("c[8].site,d", "c8.site"),
    ],
)
def test_first_host_of_a_slurm_list(nodes, host):
    assert first_host(nodes) == host


def test_one_process_is_a_world(world):
    assert (world.rank, world.local_rank, world.world_size) == (0, 0, 1)
    assert world.is_main
    assert world.device.type in ("cpu", "cuda")
    assert init_world() is world
    assert reduce_sum([1, 0.5], world) == [1.0, 0.5]
    assert reduce_max([], world) == []
    assert broadcast_object("x", world) == "x"
    assert gather_objects(7, world) == [7]
    with pytest.raises(ZeroDivisionError):
        run_on_main(lambda: 1 // 0, world)


def test_a_world_can_be_left_and_joined_again(monkeypatch):
    close_world()
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    before = dict(os.environ)
    for _ in range(2):
        init_world()
        assert torch.distributed.is_initialized()
        assert os.environ["WORLD_SIZE"] == "1"
        close_world()
        close_world()
        assert not torch.distributed.is_initialized()
        assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("launcher", "local_rank", "expected"),
    [
        ("torchrun", 0, 0),
        ("torchrun", 1, "local rank 1: this machine shows 1 GPUs"),
        ("slurm", 1, 0),
    ],
)
def test_each_process_gets_its_own_gpu(monkeypatch, launcher, local_rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    launch = Launch(launcher, local_rank, local_rank, 2)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            distributed._pick_device(launch)
    else:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        assert distributed._pick_device(launch) == (torch.device("cuda", expected), expected)
        assert not torch.backends.cudnn.allow_tf32, "fp32 is rounded to 10 bits"


def test_a_gpu_that_cannot_be_used_is_said_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for driver, count in ((tmp_path / "none", 0), (tmp_path, 1)):
        monkeypatch.setattr(distributed, "DRIVER", driver)
        for rank in range(2):
            found = distributed._pick_device(Launch("torchrun", rank, rank, 2))
            assert found == (torch.device("cpu"), rank)
        assert len(caplog.records) == count
    assert "there is an NVIDIA driver, but PyTorch" in caplog.text


def test_collectives_agree_on_every_rank(two_ranks):
    for rank, result in enumerate(two_ranks.run(rank_jobs.exchange)):
        assert result["sum"] == [3, 0.2, 2**53 - 1], "counters are exact"
        assert result["max"] == [1, 0]
        assert result["object"] == {"from": 0}
        assert result["main"] == 0, rank


@pytest.mark.parametrize("fails", [False, True])
def test_one_rank_of_a_machine_works_for_all(two_ranks, fails):
    """However long it takes: the others meet it while it works."""
    said = "no space" if fails else "done"
    assert two_ranks.run(rank_jobs.once_a_machine, fails) == [(said, [0, 0, 0]), (said, [])]


def test_an_error_on_rank_0_reaches_every_rank(two_ranks):
    assert two_ranks.run(rank_jobs.fail_on_main) == [("no space", [2.0])] * 2


def test_world_is_a_plain_value():
    cpu = torch.device("cpu")
    assert World(1, 1, 2, "env", cpu) == World(1, 1, 2, "env", cpu)
    assert not World(1, 1, 2, "env", cpu).is_main


SCRIPT = """
import os, sys
from ssast.engine.parallel.ranks import *
attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
world = init_world(timeout_s=60)
total = reduce_sum([world.rank + 1], world)
if "--die" in sys.argv and attempt == "0" and world.rank == 1:
    os._exit(1)
reduce_sum([0], world)
if world.is_main:
    print(world.launcher, world.world_size, total[0], attempt, "deepspeed" in sys.modules)
close_world()
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


def launch(tmp_path, command, *arguments, **env):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    clean = {k: v for k, v in os.environ.items() if k not in RANKS and k != "LOCAL_RANK"}
    return subprocess.Popen(
        [*command, script, *arguments],
        env=clean | {"OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def output(process):
    try:
        return process.communicate(timeout=90)[0]
    finally:
        process.terminate()  # a launcher takes its processes with it


def test_plain_python_needs_no_launcher_and_no_deepspeed(tmp_path):
    process = launch(tmp_path, [sys.executable])
    assert output(process) == "single 1 1.0 0 False\n"


@pytest.mark.slow
def test_torchrun_and_its_restarts(tmp_path):
    port = f"--master-port={free_port()}"
    process = launch(tmp_path, [*TORCHRUN, port, "--max-restarts=1"], "--die")
    assert output(process) == "torchrun 2 3.0 1 False\n"


@pytest.mark.slow
def test_srun_without_torchrun(tmp_path):
    shared = SLURM | {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}
    shared["MASTER_PORT"] = str(free_port())
    processes = [
        launch(
            tmp_path, [sys.executable], **shared | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)}
        )
        for r in range(2)
    ]
    assert [output(p) for p in processes] == ["slurm 2 3.0 0 False\n", ""]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_starts_is_named(rank, monkeypatch):
    close_world()
    port = free_port()
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(LostPeer, match=rf"rank {rank} of 2 has met no other .*127.0.0.1:{port}: "):
        init_world(timeout_s=1)


def test_a_killed_rank_does_not_leave_the_other_one_waiting():
    pool = RankPool(2)
    with pytest.raises(EOFError):
        pool.run(rank_jobs.die, 1)
    assert pool.processes == []
