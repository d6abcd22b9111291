"""The examples for clusters: they are whole, and say what the command line understands."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from paths import ROOT

from ssast.engine.config import load_config

EXAMPLES = ROOT / "examples"


def submit(folder: Path, status: int, **variables: str) -> tuple[int, list[str], list[str]]:
    """The script's exit status, what it has given to srun, and its calls of scontrol."""
    for name, code in (("srun", status), ("scontrol", 0)):
        tool = folder / name
        tool.write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.log\nexit {code}\n')
        tool.chmod(0o755)
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm.sh", "base_patch", "data.train=/a b"],
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "12",
            **variables,
        },
        check=False,
    )
    calls = folder / "scontrol.log"
    given = shlex.split((folder / "srun.log").read_text())
    return done.returncode, given, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("status", [0, 2, 75, 137, 138, 143])
def test_slurm_requeues_what_can_go_on(status, tmp_path):
    code, given, calls = submit(tmp_path, status)
    assert code == status
    assert given[:3] == ["--kill-on-bad-exit=0", "--cpus-per-task=12", "ssast"]
    assert given[3:5] == ["pretrain", "base_patch"]
    assert given[-1] == "--resume"
    assert calls == (["requeue 7"] if status > 2 else [])


def test_slurm_gives_up_at_last(tmp_path):
    assert submit(tmp_path, 75, SLURM_RESTART_COUNT="100")[2] == []


def test_the_slurm_script_asks_for_what_it_describes():
    options = dict(
        re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (EXAMPLES / "slurm.sh").read_text(), re.M)
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # a process for each GPU
    assert options["signal"].startswith("USR1@")
    example = re.search(r"sbatch examples/slurm.sh (.*)", (EXAMPLES / "slurm.sh").read_text())
    ranks = int(options["nodes"]) * int(options["ntasks-per-node"])
    recipe, *overrides = shlex.split(example[1])
    assert load_config(recipe, overrides).train.batch_size % ranks == 0


def test_the_kubernetes_job_is_one_run():
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    master, worker = job["spec"]["pytorchReplicaSpecs"].values()
    assert master == worker  # rank 0 is a process like the others
    (container,) = master["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["nprocPerNode"]
    command, recipe, *arguments = container["args"]
    assert command == "pretrain"
    assert arguments.pop() == "--resume"
    config = load_config(recipe, arguments)
    ranks = 2 * int(job["spec"]["nprocPerNode"])
    assert config.train.batch_size % ranks == 0
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    for path in (config.data.train, config.run.folder):
        assert any(str(path).startswith(folder + "/") for folder in mounted)
