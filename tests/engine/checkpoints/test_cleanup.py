"""What cannot be removed or marked never makes a save fail, is named once, and is tried again."""

import errno
import json
import math
import os
import shutil

import pytest
import torch

from ssast.engine.checkpoints import store
from ssast.engine.checkpoints.store import Checkpoints

ERRORS = [errno.EBUSY, errno.ENOTEMPTY, errno.EACCES]  # NFS and its open files; a read-only folder


def save(checkpoints, step, value=0.0):
    return checkpoints.save({"weight/a": torch.full((2,), value)}, {}, step=step)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def failing(monkeypatch):
    """Calls of os and shutil that fail with an errno where a path has a part of its name."""
    rules: list[tuple[str, str, int]] = []

    def patched(name, real):
        def call(path, *arguments, **options):
            for function, part, number in rules:
                if function == name and part in str(path):
                    raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **options)

        return call

    monkeypatch.setattr(store.shutil, "rmtree", patched("rmtree", shutil.rmtree))
    monkeypatch.setattr(store.os, "rename", patched("rename", os.rename))
    monkeypatch.setattr(store.os, "replace", patched("replace", os.replace))
    return rules


@pytest.mark.parametrize("number", ERRORS)
def test_trash_that_stays_fails_no_save(tmp_path, failing, number, caplog):
    failing.append(("rmtree", ".trash-", number))
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(1, 6):
        save(checkpoints, step)
        assert checkpoints.latest().name == f"step00000000{step}"
    trash = [f".trash-step00000000{step}" for step in range(1, 5)]
    assert names(tmp_path) == [*trash, "latest", "step000000005"]
    for name in trash:
        (message,) = (r.message for r in caplog.records if f"{name} " in r.message)
        assert message.startswith(f"{tmp_path / name} is not removed, until a later save: ")
        assert os.strerror(number) in message
    save(checkpoints, 3)  # a step whose trash is still there, back in time
    save(checkpoints, 6)
    failing.clear()
    save(checkpoints, 7)
    assert names(tmp_path) == ["latest", "step000000007"]


@pytest.mark.parametrize("number", ERRORS)
def test_a_checkpoint_that_cannot_be_renamed_stays(tmp_path, failing, number, caplog):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    failing.append(("rename", "step000000001", number))
    for step in (2, 3):
        save(checkpoints, step)
    assert names(tmp_path) == ["latest", "step000000001", "step000000003"]
    assert caplog.text.count("step000000001 is not removed") == 1
    failing.clear()
    save(checkpoints, 4)
    assert names(tmp_path) == ["latest", "step000000004"]


def test_what_killed_saves_left_and_stays_is_no_obstacle(tmp_path, failing, caplog):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for name in (".tmp-step000000001", "step000000001.old"):
        shutil.copytree(save(Checkpoints(tmp_path / "other"), 1, -1.0), tmp_path / name)
    failing += [("rmtree", ".tmp-", errno.ENOTEMPTY), ("rename", ".old", errno.EBUSY)]
    for value in (1.0, 2.0):  # of the same step
        path = save(checkpoints, 1, value)
        assert Checkpoints.load(path)[0]["weight/a"][0] == value
    assert checkpoints.latest() == path
    for name in (".tmp-step000000001", "step000000001.old"):
        assert caplog.text.count(f"{name} is not removed") == 1
    failing.clear()
    save(checkpoints, 2)
    assert names(tmp_path) == ["latest", "other", "step000000002"]


def test_a_full_disk_may_have_space_for_the_name_after_the_old_one_is_removed(
    tmp_path, failing, monkeypatch, caplog
):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    failing.append(("replace", "latest", errno.ENOSPC))
    remove = Checkpoints._remove

    def freed(self, path):
        remove(self, path)
        failing.clear()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_remove", freed)
        save(checkpoints, 2)
    assert (tmp_path / "latest").read_text() == "step000000002\n"
    failing.append(("replace", "latest", errno.ENOSPC))
    caplog.clear()
    for step in (3, 4):
        save(checkpoints, step)
    assert caplog.text.count("latest is not written, until a later save: ") == 1
    assert (tmp_path / "latest").read_text() == "step000000002\n"
    assert Checkpoints(tmp_path).latest().name == "step000000004"


def test_the_best_value_is_that_of_a_checkpoint_on_the_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best_value() == math.inf
    path = save(checkpoints, 1)
    assert checkpoints.best_value() == math.inf
    checkpoints.mark_best(1, 0.1 + 0.2)
    assert checkpoints.best_value() == 0.1 + 0.2
    checkpoints.mark_best(1, -math.inf)
    assert json.loads((tmp_path / "best.json").read_text())["value"] == -math.inf
    assert checkpoints.best_value() == -math.inf
    os.truncate(path / "state.safetensors", 3)
    assert checkpoints.best_value() == math.inf
    shutil.rmtree(path)
    assert checkpoints.best_value() == math.inf


def test_what_another_folder_has_newer_is_discarded(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in (1, 2, 3):
        save(checkpoints, step)
    os.truncate(tmp_path / "step000000001/meta.json", 1)
    Checkpoints(tmp_path).discard(2)
    assert names(tmp_path) == ["latest", "step000000001", "step000000003"]
