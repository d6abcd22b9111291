"""The cores that a process may use, and what is set for OpenMP before torch is imported."""

import os
import subprocess
import sys
from types import ModuleType

import pytest

from ssast.pipelines import cores
from ssast.pipelines.cores import chosen_threads, find_cores, prepare_threads, spinning

V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:30 / /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpuacct\n"
    "33 31 0:29 {top} /sys/fs/cgroup/cpu\\040and rw shared:9 - cgroup cgroup rw,cpu,other\n"
    "34 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
HALF = "50000 100000\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Write files of a made-up machine with eight cores; return the cores that are usable."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))

    def usable(groups="", mounts="", files=None, **env):
        written = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **(files or {})}
        for name, text in written.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return find_cores(tmp_path, env)

    return usable


@pytest.mark.parametrize(
    ("groups", "top", "files", "count", "source"),
    [
        ("0::/\n", "/", {}, 8, "CPU affinity"),
        ("0::/\n", "/", {"cpu.max": "max 100000\n"}, 8, "CPU affinity"),
        ("0::/\n", "/", {"cpu.max": HALF}, 1, "quota of 0.5 cores in /sys/fs/cgroup/cpu.max"),
        ("0::/\n", "/", {"cpu.max": "250000 100000\n"}, 3, "2.5 cores in /sys/fs/cgroup/cpu.max"),
        ("0::/\n", "/", {"cpu.max": "9900000 100000\n"}, 8, "CPU affinity"),
        ("0::/\n", "/", {"cpu.max": "nonsense"}, 8, "CPU affinity"),
        ("0::/a/b\n", "/", {"a/b/cpu.max": "200000 100000"}, 2, "fs/cgroup/a/b/cpu.max"),
        ("0::/a/b\n", "/", {"a/cpu.max": HALF, "a/b/cpu.max": "max 1"}, 1, "fs/cgroup/a/cpu.max"),
        ("0::/a/b\n", "/a", {"b/cpu.max": HALF}, 1, "/sys/fs/cgroup/b/cpu.max"),
        ("0::/docker/x\n", "/docker/x", {"cpu.max": HALF}, 1, "/sys/fs/cgroup/cpu.max"),
        ("0::/../other\n", "/", {"cpu.max": HALF}, 1, "/sys/fs/cgroup/cpu.max"),
    ],
)
def test_quotas_of_the_second_version(machine, groups, top, files, count, source):
    written = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    found = machine(groups, V2.format(top=top), written)
    assert found.number == count and found.source.endswith(source)


@pytest.mark.parametrize(
    ("path", "top", "quotas", "count"),
    [
        ("/", "/", {}, 8),
        ("/", "/", {"": -1}, 8),
        ("/a/b", "/", {"a/b/": -1, "a/": 350_000}, 4),
        ("/a/b", "/", {"a/b/": 50_000, "a/": 350_000}, 1),
        ("/docker/x", "/docker/x", {"": 200_000}, 2),
        ("/b", "/", {"a/": 50_000}, 8),  # another group's
    ],
)
def test_quotas_of_the_first_version(machine, path, top, quotas, count):
    files = {}
    for name, quota in quotas.items():
        files[f"sys/fs/cgroup/cpu and/{name}cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"sys/fs/cgroup/cpu and/{name}cpu.cfs_period_us"] = "100000\n"
    found = machine(f"5:cpuacct:/a\n4:cpu,other:{path}\n0::/\n", V1.format(top=top), files)
    assert found.number == count
    assert found.source.endswith("cpu.cfs_quota_us") == (count < 8)


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({"SLURM_CPUS_ON_NODE": "6"}, 6),
        ({"SLURM_CPUS_ON_NODE": "64"}, 8),
        ({"SLURM_CPUS_ON_NODE": "6", "SLURM_CPUS_PER_TASK": "2"}, 6),  # a batch script: no task
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_STEP_ID": "4294967290"}, 8),  # a shell of salloc
        ({"SLURM_CPUS_ON_NODE": "6", "SLURM_CPUS_PER_TASK": "2", "SLURM_STEP_ID": "0"}, 2),
        ({"SLURM_CPUS_ON_NODE": "x"}, 8),
        ({"SLURM_CPUS_ON_NODE": "0"}, 8),
    ],
)
def test_shares_of_a_slurm_job(machine, env, count):
    found = machine(**env)
    assert found.number == count
    assert (found.source in env) == (count < 8)


def test_this_machine_has_cores():
    assert 1 <= find_cores().number <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "given", [{"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "5"}, {"KMP_BLOCKTIME": "0"}]
)
def test_what_the_user_has_chosen_stays(given, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    env = dict(given)
    prepare_threads(env)
    assert env == given and not spinning(given)
    assert cores.describe_waiting(env) == "{}={} (environment)".format(*next(iter(given.items())))


@pytest.mark.parametrize(
    ("given", "threads"),
    [({}, "1"), ({"OMP_NUM_THREADS": "3"}, "3"), ({"RANK": "0"}, None), ({"torch": ""}, None)],
)
def test_the_command_sets_what_torch_reads(given, threads, monkeypatch):
    """Ranks share the cores, which init_world counts; once torch is there it is too late."""
    monkeypatch.setattr(cores, "usable_cores", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "_set", {})
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    if "torch" in given:
        monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    env = dict(given)
    prepare_threads(env)
    assert env.get("OMP_NUM_THREADS") == threads
    assert ("GOMP_SPINCOUNT" in env) == ("torch" not in given)
    shown = cores.describe_waiting(env)
    assert shown.endswith(" (ssast)" if "torch" not in given else "the OpenMP library")


LAUNCHER = """if True:
    import os, subprocess, sys
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TORCHELASTIC_RUN_ID"] = "1"
    child = "import os; from ssast.pipelines.cores import chosen_threads as f; print(f(os.environ))"
    subprocess.run([sys.executable, "-c", child], check=True)
"""


@pytest.mark.parametrize("given", [None, "1", "2"])
def test_one_thread_set_by_torchrun_is_no_choice(given, tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if given is not None:
        env["OMP_NUM_THREADS"] = given
    program = [sys.executable, "-c", LAUNCHER]
    done = subprocess.run(program, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(given is not None)
    elastic = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "1"}
    assert chosen_threads(elastic, tmp_path / "unknown") and not chosen_threads({})
    assert chosen_threads({"OMP_NUM_THREADS": "1"})
