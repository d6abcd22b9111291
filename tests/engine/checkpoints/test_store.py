"""Checkpoints are whole or absent: round trips, damage, full disks, kills at every line."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import SUPPORT
from rank_jobs import small_files

from ssast.engine.checkpoints import store
from ssast.engine.checkpoints.store import Checkpoints, find_damage
from ssast.engine.errors import CheckpointError

TENSORS = {
    "weight/a": torch.arange(6.0).view(2, 3).t(),
    "exp_avg/a": torch.tensor([-0.0, torch.inf, 1e-45]),
    "weight/empty": torch.zeros(0, 4),
    "buffer/n": torch.tensor(7),
    "rng/cpu": torch.arange(300, dtype=torch.int32).to(torch.uint8),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def save(folder, step, **options):
    tensors = TENSORS | {"step": torch.tensor(step)}
    return Checkpoints(folder, **options).save(tensors, {"position": step * 10}, step=step)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_round_trip(tmp_path):
    meta = {"position": 2**60, "loss": 0.1 + 0.2, "config": {"a": [1, "\u00e9"]}, "none": None}
    path = Checkpoints(tmp_path / "new" / "folder").save(TENSORS, meta, step=12)
    assert path.name == "step000000012"
    tensors, found = Checkpoints.load(path)
    assert found == meta | {"step": 12}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
    assert (path.parent / "latest").read_text() == "step000000012\n"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=10,
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(meta=st.dictionaries(st.text(), json_values))
def test_meta_comes_back_as_it_was(tmp_path, meta):
    path = Checkpoints(tmp_path).save({}, meta, step=1)
    assert Checkpoints.load(path)[1] == meta | {"step": 1}


def test_loaded_tensors_are_read_when_they_are_used(tmp_path):
    large = torch.ones(16 << 20)  # 64 MiB

    def resident_mib():
        return (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
        )

    path = Checkpoints(tmp_path).save({"large": large}, {}, step=1)
    before = resident_mib()
    tensors, _ = Checkpoints.load(path)
    assert resident_mib() - before < 32
    assert tensors["large"].sum() == large.sum()


def test_newest_are_kept_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None and checkpoints.best() is None
    for step in range(1, 5):
        save(tmp_path, step, keep=2)
        if step == 1:
            checkpoints.mark_best(1, 0.5)
    assert names(tmp_path) == [
        "best.json",
        "latest",
        "step000000001",
        "step000000003",
        "step000000004",
    ]
    assert checkpoints.best() == tmp_path / "step000000001"
    assert json.loads((tmp_path / "best.json").read_text())["value"] == 0.5
    checkpoints.mark_best(4, 0.4)
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["best.json", "latest", "step000000004", "step000000005"]
    with pytest.raises(CheckpointError, match="step000000003 as the best: it is not saved"):
        checkpoints.mark_best(3, 0.1)
    with pytest.raises(ValueError, match="keep: expected at least 1, found 0"):
        Checkpoints(tmp_path, keep=0)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": (lambda p: flip(p / "state.safetensors"), "state.safetensors has another sha"),
    "cut short": (lambda p: os.truncate(p / "state.safetensors", 100), "has 100 bytes, expected"),
    "state gone": (lambda p: (p / "state.safetensors").unlink(), "state.safetensors is missing"),
    "meta changed": (lambda p: flip(p / "meta.json"), "meta.json has another sha256"),
    "manifest torn": (lambda p: os.truncate(p / "manifest.json", 20), "manifest.json is not read"),
    "manifest strange": (lambda p: (p / "manifest.json").write_text("[1]"), "is not readable"),
    "manifest gone": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "all gone": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_and_the_one_before_is_taken(tmp_path, damage, caplog):
    break_it, message = DAMAGE[damage]
    save(tmp_path, 1)
    save(tmp_path, 2)
    break_it(tmp_path / "step000000002")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == tmp_path / "step000000001"
    assert checkpoints.latest() == tmp_path / "step000000001"
    with pytest.raises(CheckpointError, match=f"cannot load checkpoint {tmp_path}/step0+2: ") as e:
        Checkpoints.load(tmp_path / "step000000002")
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    if damage not in ("manifest gone", "all gone"):  # those were never complete
        assert message in checkpoints.damaged["step000000002"]
        assert [r.message for r in caplog.records if "step000000002" in r.message][1:] == []
    save(tmp_path, 2)  # the run comes to this step again
    assert checkpoints.latest() == tmp_path / "step000000002"


def test_unchecked_load_still_sees_what_is_missing(tmp_path):
    path = save(tmp_path, 1)
    flip(path / "state.safetensors")
    assert find_damage(path) is not None
    Checkpoints.load(path, check=False)
    os.truncate(path / "state.safetensors", 50)
    with pytest.raises(CheckpointError, match="has 50 bytes"):
        Checkpoints.load(path, check=False)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    save(tmp_path, 1)
    before = names(tmp_path)
    big = {"weight/a": torch.zeros(1 << 16)}
    with small_files(), pytest.raises(CheckpointError, match=r"step000000002: .*too large"):
        Checkpoints(tmp_path).save(big, {}, step=2)
    with small_files(), pytest.raises(CheckpointError, match=r"step000000001: .*too large"):
        Checkpoints(tmp_path).save({}, {"text": "x" * 10000}, step=1)
    with small_files(4), pytest.raises(CheckpointError, match=r"best\.json: .*too large"):
        Checkpoints(tmp_path).mark_best(1, 0.0)
    assert names(tmp_path) == before
    assert Checkpoints(tmp_path).best() is None
    assert Checkpoints.load(Checkpoints(tmp_path).latest())[1]["position"] == 10


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*/file/step000000001"):
        save(tmp_path / "file", 1)


def test_everything_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """The order of flushes and renames: what a loss of power could otherwise tear."""
    save(tmp_path, 1, keep=1)
    events = []

    def fsync(descriptor, real=os.fsync):
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real(descriptor)

    def rename(source, target, real=os.rename):
        events.append(f"rename {Path(source).name}")
        real(source, target)

    def replace(source, target, real=os.replace):
        events.append(f"replace {Path(target).name}")
        real(source, target)

    for name, function in (("fsync", fsync), ("rename", rename), ("replace", replace)):
        monkeypatch.setattr(store.os, name, function)
    save(tmp_path, 2, keep=1)
    assert events == [
        "flush state.safetensors",
        "flush meta.json",
        "flush manifest.json",
        "flush .tmp-step000000002",
        "replace step000000002",
        f"flush {tmp_path.name}",
        "flush .tmp-latest",
        "replace latest",
        f"flush {tmp_path.name}",
        "rename step000000001",
    ]


@pytest.fixture(scope="module")
def killed_saves():
    """What crash_save.py found for each scenario."""
    # A kill needs no slow disk.
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    done = subprocess.run(
        [sys.executable, SUPPORT / "crash_save.py", Path(folder) / "run"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "old", "new", "best"),
    [
        ("first", [None, None], [2, 2.0], [None, None]),
        ("next", [1, 1.0], [2, 2.0], [1, 1]),
        ("same", [1, 1.0], [1, 2.0], [1, 1]),
        ("best", [2, 2.0], [2, 2.0], [1, 2]),
    ],
)
def test_a_kill_at_any_line_leaves_a_checkpoint_that_loads(killed_saves, scenario, old, new, best):
    found = killed_saves[scenario]
    assert len(found) > (15 if scenario == "best" else 60)
    for key, before, after in (("loaded", old, new), ("best", *best)):
        values = [case[key] for case in found]
        switch = values.index(after)
        assert values == [before] * switch + [after] * (len(values) - switch), "the old or the new"
    for case in found:
        hidden = [name for name in case["left"] if name.startswith(".") or name.endswith(".old")]
        assert hidden == [], "the next save sweeps up"


@pytest.fixture
def unreadable(monkeypatch):
    """Paths that fail with an errno when they are opened or listed, as root may read everything."""
    failing: dict[Path, int] = {}

    def fail(path):
        for prefix, number in failing.items():
            if Path(path).is_relative_to(prefix):
                raise OSError(number, os.strerror(number), str(path))

    def patched(real):
        def call(path, *arguments, **options):
            if isinstance(path, str | os.PathLike):
                fail(path)
            return real(path, *arguments, **options)

        return call

    monkeypatch.setattr("builtins.open", patched(open))
    monkeypatch.setattr(io, "open", patched(io.open))
    monkeypatch.setattr(os, "listdir", patched(os.listdir))
    return failing


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("part", ["", "manifest.json", "state.safetensors", "meta.json"])
def test_what_cannot_be_read_is_an_error_and_not_damaged(part, number, tmp_path, unreadable):
    save(tmp_path, 1)
    save(tmp_path, 2)
    checkpoints, path = Checkpoints(tmp_path), tmp_path / "step000000002"
    unreadable[path / part] = number
    with pytest.raises(CheckpointError, match=f"{path} cannot be read: .*{os.strerror(number)}"):
        checkpoints.latest()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoints.load(path)
    assert checkpoints.damaged == {}
    unreadable.clear()
    assert checkpoints.latest() == path


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path, unreadable):
    save(tmp_path, 1)
    unreadable[tmp_path] = errno.ESTALE
    with pytest.raises(CheckpointError, match=f"{tmp_path} cannot be read: Stale"):
        Checkpoints(tmp_path).latest()


@pytest.mark.parametrize("linked", ["", "step000000001", "step000000001/state.safetensors"])
def test_a_link_to_a_disk_that_is_gone_is_not_damage(linked, tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    source = folder / linked
    source.rename(tmp_path / "disk")
    source.symlink_to(tmp_path / "disk")
    assert Checkpoints(folder).latest() == folder / "step000000001"
    (tmp_path / "disk").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"cannot be read: .*No such file"):
        Checkpoints(folder).latest()


@pytest.mark.parametrize("name", ["state.safetensors", "meta.json", "manifest.json"])
def test_nothing_usable_is_not_nothing(name, tmp_path):
    for step in (1, 2):
        os.truncate(save(tmp_path, step) / name, 0)
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(step0+2: "):
        Checkpoints(tmp_path).latest()
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step00000000{step}")
    with pytest.raises(CheckpointError, match="step000000002 was saved here and is gone"):
        Checkpoints(tmp_path).latest()


def test_only_whole_checkpoints_of_this_run_are_removed(tmp_path, unreadable, caplog):
    others = {"clips": {"count": 3}, "config": {"model": {"size": "tiny"}}}
    ours = {"clips": {"count": 2}, "config": {"model": {"size": "tiny", "depth": None}}}
    changed = ours | {"config": {"model": {"size": "base"}}}
    for step, meta in ((1, others), (2, changed), (3, ours), (4, ours), (5, ours), (6, ours)):
        Checkpoints(tmp_path, keep=9).save(TENSORS, meta, step=step)
    os.truncate(tmp_path / "step000000003/state.safetensors", 0)
    unreadable[tmp_path / "step000000004/state.safetensors"] = errno.EIO
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.latest() == tmp_path / "step000000006"
    for step in (7, 8):
        checkpoints.save(TENSORS, ours, step=step)
    found = [name for name in names(tmp_path) if name.startswith("step")]
    assert found == [f"step00000000{step}" for step in (1, 2, 3, 4, 8)]
    for step, why in ((1, "of other clips"), (2, "another model"), (4, "Input/output error")):
        (line,) = [r.message for r in caplog.records if f"step00000000{step} is not" in r.message]
        assert why in line


def test_a_mark_that_cannot_be_read_removes_nothing(tmp_path, unreadable, caplog):
    save(tmp_path, 1, keep=1)
    Checkpoints(tmp_path).mark_best(1, 0.5)
    unreadable[tmp_path / "best.json"] = errno.EIO
    for step in (2, 3):
        save(tmp_path, step, keep=1)
    assert "best.json cannot be read: Input/output error" in caplog.text
    unreadable.clear()
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["best.json", "latest", "step000000001", "step000000004"]


def test_a_damaged_checkpoint_is_set_aside_when_its_step_comes_again(tmp_path):
    for _ in range(3):
        state = save(tmp_path, 1) / "state.safetensors"
        os.truncate(state, 7)
    save(tmp_path, 1)
    assert Checkpoints(tmp_path).latest() == tmp_path / "step000000001"
    aside = [f"step000000001.damaged{number}" for number in ("", 1, 2)]
    assert names(tmp_path) == ["latest", "step000000001", *aside]
    assert (tmp_path / aside[0] / "state.safetensors").stat().st_size == 7


def test_a_checkpoint_that_was_removed_is_missed(tmp_path, caplog):
    save(tmp_path, 1)
    shutil.rmtree(save(tmp_path, 2))
    assert Checkpoints(tmp_path).latest() == tmp_path / "step000000001"
    assert "step000000002 is gone: the newest checkpoint is" in caplog.text
