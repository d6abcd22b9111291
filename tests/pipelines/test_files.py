"""Files that appear whole or not at all."""

import contextlib
import os
from pathlib import Path
from typing import get_args

import pytest
from paths import ROOT
from rank_jobs import small_files

from ssast.pipelines.errors import DataError
from ssast.pipelines.files import (
    CACHE,
    Kept,
    append,
    cache_folder,
    check_new,
    replacing,
    use_default_mode,
    write_atomically,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_outputs_are_new(tmp_path):
    """An input is named as such, by whatever name it is given."""
    given, folder = tmp_path / "clips.csv", tmp_path / "folder"
    given.write_text("wav,label\n")
    folder.mkdir()
    (tmp_path / "link.csv").symlink_to(given)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    check_new([tmp_path / "new", folder, tmp_path / "a/b"], [given, "s3://bucket/clips"])
    for name in ("clips.csv", "link.csv", "folder/../clips.csv"):
        with pytest.raises(DataError, match="is an input of this command"):
            check_new([tmp_path / "new", tmp_path / name], ["s3://bucket/clips", given])
    (folder / "file").touch()
    for name in ("clips.csv", "folder", "gone"):
        with pytest.raises(DataError, match="exists already: remove it, or choose another"):
            check_new([tmp_path / name], [tmp_path / "other"])


@pytest.mark.parametrize("kind", get_args(Kept))
def test_one_folder_holds_what_is_kept_for_later_runs(kind, monkeypatch):
    monkeypatch.setenv(CACHE, "~/mine")
    assert cache_folder(kind) == Path.home() / "mine" / kind
    for unset in ("", None):
        monkeypatch.setenv(CACHE, "") if unset == "" else monkeypatch.delenv(CACHE)
        assert cache_folder(kind) == Path.home() / ".cache/ssast" / kind
    page = (ROOT / "docs" / "data.md").read_text().partition("## The cache")[2]
    assert f"| `{kind}` |" in page


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_at_the_end(tmp_path, shared):
    path = tmp_path / "new/folder/file.txt"
    write_atomically(path, "old", shared=shared)
    with replacing(path, shared=shared) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


def test_text_is_utf8_and_bytes_are_bytes(tmp_path):
    write_atomically(tmp_path / "text", "\u00e4\n")
    write_atomically(tmp_path / "bytes", b"\r\n\xff")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa4\n"
    assert (tmp_path / "bytes").read_bytes() == b"\r\n\xff"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_the_error_of_the_body_is_the_one_raised(tmp_path):
    with pytest.raises(ValueError, match="first"), replacing(tmp_path / "file"):
        raise ValueError("first")  # before there is a temporary file to remove


def test_a_file_that_cannot_be_replaced(tmp_path):
    (tmp_path / "folder/inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", "text")
    assert names(tmp_path) == ["folder"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    for fails in (True, False):
        expected = pytest.raises(OSError) if fails else contextlib.nullcontext()
        with expected, replacing(tmp_path / "out", durable=True) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text("text")
            if fails:
                raise OSError
        assert names(tmp_path) == ([] if fails else ["out"])
    assert (tmp_path / "out/file").read_text() == "text"


def test_lines_are_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines"
    append(path, b"one\n")
    with small_files(6), pytest.raises(OSError, match="too large"):
        append(path, b"two\n")
    append(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"
    with pytest.raises(NotADirectoryError):
        append(path / "file", b"")


def test_writers_of_a_shared_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with replacing(path, shared=True) as first, replacing(path, shared=True) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer one ends last
    assert names(tmp_path) == ["file"]


def test_what_a_killed_write_left_is_overwritten(tmp_path):
    path = tmp_path / "file"
    child = os.fork()
    if child == 0:
        with replacing(path) as temporary:
            temporary.write_text("half")
            os._exit(0)
    os.waitpid(child, 0)
    assert not path.exists() and len(names(tmp_path)) == 1
    write_atomically(path, "whole")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [False, True])
def test_a_durable_file_is_flushed_before_it_is_named(tmp_path, monkeypatch, durable):
    events = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(source, target):
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "file", b"data", durable=durable)
    assert events == ([".tmp-file", "replace", tmp_path.name] if durable else ["replace"])


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_mode_is_that_of_a_new_file(tmp_path, mask):
    path = tmp_path / "file"
    before = os.umask(mask)
    try:
        os.close(os.open(path, os.O_CREAT, 0o600))
        use_default_mode(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert names(tmp_path) == ["file"]
