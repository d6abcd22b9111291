"""Checkpoints on disk: either complete or absent, whatever happens during the save.

    checkpoints/
      step000002000/
        state.safetensors   weights and Adam moments, fp32, independent of ranks and ZeRO stage
        meta.json           step, data position, schedule, counters, configuration
        manifest.json       bytes and sha256 of the two; written last
      latest                name of the newest checkpoint, for people and scripts
      best.json             step and value of the best one

A save writes into a hidden folder, flushes every file to the disk, and renames the folder into
its place in one atomic operation; only then is anything older removed. Nothing is unpickled.

A checkpoint is damaged only where its bytes were read and differ from the manifest. One that cannot
be read (permissions, an I/O error, a mount that is gone) is an error, as it may be whole; it is
never removed, nor is a damaged one, nor one of other clips or of another model.

What cannot be removed (NFS keeps open files as ``.nfs*``) is no reason for a save to fail: it is
left, named once in a warning, and tried again at each later save.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from ssast.engine.errors import CheckpointError
from ssast.pipelines.files import flush, replacing, use_default_mode, write_atomically
from ssast.pipelines.text import one_line, parse_json, read_text, shown

STATE, META, MANIFEST = "state.safetensors", "meta.json", "manifest.json"

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run, on rank 0.

    Args:
        folder: Folder of the checkpoints, created at the first save.
        keep: Number of the newest checkpoints to keep; the best one is kept in addition.

    Attributes:
        damaged: Damaged checkpoints that were skipped, with the reasons, by name.

    Raises:
        ValueError: ``keep`` is less than 1.
    """

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, found {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.damaged: dict[str, str] = {}
        self._verified: set[str] = set()  # names of those written or verified by this object
        self._spared: set[str] = set()  # names of those that may not be removed
        self._failed: set[str] = set()  # names of what could not be cleaned up, told of once

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, step: int) -> Path:
        """Write a checkpoint, make it the latest, and remove those no longer kept.

        A checkpoint of the same step is replaced; a damaged one is kept as ``step*.damaged``. If
        this raises, the checkpoints from before the call are still there and whole.

        Args:
            tensors: Tensors on the CPU, by name.
            meta: Metadata that JSON can hold; tuples come back as lists.
            step: Number of the checkpoint, at most nine digits.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: The disk is full or the folder cannot be written.
        """
        target = self.folder / f"step{step:09d}"
        try:
            self._sweep()
            replaced = target.exists() and self._is_whole(target)
            with replacing(target, durable=True) as work:
                work.mkdir()
                write_files(work, tensors, {**meta, "step": step})
                if replaced:  # never without a whole checkpoint, not even for a moment
                    old = self.folder / f"{target.name}.old"
                    os.rename(target, self._trash(target) if old.exists() else old)
                elif target.exists():
                    self._set_aside(target)
            self._verified.add(target.name)
            self.damaged.pop(target.name, None)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot write checkpoint {target}: {error}") from error
        # From here on the new one is whole: no reason to fail.
        self._name_latest(target)
        try:
            self._prune(meta)
        except (OSError, CheckpointError) as error:
            _log.warning("older checkpoints in %s are not removed: %s", self.folder, error)
        if "latest" in self._failed:  # there may be space now
            self._name_latest(target)
        return target

    def latest(self) -> Path | None:
        """Return the newest checkpoint whose bytes verify; None if nothing was ever saved.

        Damaged ones are skipped, logged as warnings and listed in ``damaged``.

        Raises:
            CheckpointError: One cannot be read, or all are damaged or gone.
        """
        found, last = self._all(), self._last_saved()
        for path in found:
            if self._is_whole(path, again=True):
                if last is not None and path.stem < last and last not in self.damaged:
                    _log.warning("%s is gone: the newest checkpoint is %s", last, path)
                return path
        if found:
            newest = found[0].name
            raise CheckpointError(
                f"{self.folder}: every checkpoint is damaged ({newest}: "
                f"{self.damaged[newest]}): restore one, or choose another folder"
            )
        if last is not None:
            raise CheckpointError(
                f"{self.folder}: {last} was saved here and is gone: restore it, or choose another "
                "folder"
            )
        return None

    def mark_best(self, step: int, value: float) -> None:
        """Mark a saved checkpoint as the best so far; it is kept until another one is marked.

        Raises:
            CheckpointError: There is no checkpoint of this step, or the disk is full.
        """
        name = f"step{step:09d}"
        if not (self.folder / name / MANIFEST).is_file():
            raise CheckpointError(f"cannot mark {self.folder / name} as the best: it is not saved")
        try:
            text = json.dumps({"name": name, "step": step, "value": value}) + "\n"
            write_atomically(self.folder / "best.json", text, durable=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.folder / 'best.json'}: {error}") from error

    def best_value(self) -> float:
        """Return the value of the best checkpoint; infinity if none is marked, or it is not whole.

        Raises:
            CheckpointError: It cannot be read.
        """
        found = self.best()
        if found is None or found.name in self.damaged or find_damage(found, content=False):
            return math.inf
        value = _read_optional(self.folder / "best.json", lambda text: json.loads(text)["value"])
        return math.inf if value is None else float(value)

    def discard(self, step: int) -> None:
        """Remove the whole checkpoints up to a step, as another folder has a newer one."""
        found = self._all()
        if all(int(path.stem[4:]) <= step for path in found):  # then none is missed
            with self._tolerating(self.folder / "latest"):
                (self.folder / "latest").unlink(missing_ok=True)
        for path in found:
            if int(path.stem[4:]) <= step:
                with self._tolerating(path):
                    if self._is_whole(path):
                        self._remove(path)

    def best(self) -> Path | None:
        """Return the checkpoint marked last as the best; None if there is none."""
        name = self._best_name()
        return next((path for path in self._all() if path.stem == name), None)

    @staticmethod
    def load(path: Path, *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Load a checkpoint.

        Args:
            path: Folder of the checkpoint.
            check: Verify every byte first; :meth:`latest` has done so for what it returns.

        Returns:
            The tensors, mapped into memory and read from the disk when they are used, and the
            metadata.

        Raises:
            CheckpointError: There is no whole checkpoint at this path, or it cannot be read.
        """
        path = Path(path)
        problem = find_damage(path, content=check)
        if problem is not None:
            raise CheckpointError(f"cannot load checkpoint {path}: {problem}")
        try:
            meta = parse_json(read_text(path / META))
            if not isinstance(meta, dict):
                raise ValueError(f"{META} holds no settings, but {shown(meta)}")
            return read_safetensors(path / STATE), meta
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load checkpoint {path}: {error}") from error

    def _all(self) -> list[Path]:
        """List the checkpoints, newest first; a replaced one after its replacement."""
        try:
            names = os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError) as error:
            if self.folder.is_symlink():  # to a disk that is not mounted
                raise _unreadable(self.folder, error) from error
            return []
        except OSError as error:
            raise _unreadable(self.folder, error) from error
        found = [self.folder / name for name in names if re.fullmatch(r"step\d+(\.old)?", name)]
        return sorted(found, key=lambda p: (int(p.stem[4:]), p.suffix == ""), reverse=True)

    def _is_whole(self, path: Path, *, again: bool = False) -> bool:
        """Return whether a checkpoint is whole, verified once or ``again``; log what is not.

        Raises:
            CheckpointError: It cannot be read.
        """
        if path.name in self._verified and not again:
            return True
        problem = find_damage(path)
        if problem is None:
            self._verified.add(path.name)
            self.damaged.pop(path.name, None)
            return True
        if path.name not in self.damaged:
            _log.warning("skipping damaged checkpoint %s: %s", path, problem)
        self.damaged[path.name] = problem
        self._verified.discard(path.name)
        return False

    def _last_saved(self) -> str | None:
        """Return the name of the checkpoint that was saved last."""
        return _read_optional(self.folder / "latest", lambda text: text.strip() or None)

    def _best_name(self) -> str | None:
        name = _read_optional(self.folder / "best.json", lambda text: parse_json(text)["name"])
        return name if isinstance(name, str) else None

    def _sweep(self) -> None:
        """Remove what a killed save left behind."""
        for pattern in (".tmp-*", ".trash-*"):
            for path in self.folder.glob(pattern):
                with self._tolerating(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.folder.glob("step*.old"):
            target = self.folder / path.stem
            with self._tolerating(path):
                if target.exists() and not self._is_whole(target):
                    self._set_aside(target)
                if target.exists():
                    self._remove(path)
                else:  # killed between its two renames
                    os.rename(path, target)

    @contextlib.contextmanager
    def _tolerating(self, path: Path, what: str = "removed") -> Iterator[None]:
        """Go on after an error of the body, which cleans up; name the path, once."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            if path.name not in self._failed:
                reason = getattr(error, "strerror", None) or error
                _log.warning("%s is not %s, until a later save: %s", path, what, reason)
            self._failed.add(path.name)
        else:
            self._failed.discard(path.name)

    def _name_latest(self, path: Path) -> None:
        with self._tolerating(self.folder / "latest", "written"):
            write_atomically(self.folder / "latest", f"{path.name}\n", durable=True)

    def _prune(self, meta: Mapping[str, Any]) -> None:
        """Remove the oldest checkpoints, but for the best; only whole ones of this run."""
        self._sweep()
        best, spared = self._best_name(), self._spared | self.damaged.keys()
        counted = [path for path in self._all() if path.name not in spared]
        for path in counted[self.keep :]:
            if path.stem != best and self._may_remove(path, meta):
                with self._tolerating(path):
                    self._remove(path)

    def _may_remove(self, path: Path, meta: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint is whole and of the run that wrote ``meta``."""
        if path.name in self._verified:
            return True
        try:
            if not self._is_whole(path):
                return False
            if _same_run(parse_json(read_text(path / META)), meta):
                return True
            reason = "it is of other clips or of another model"
        except (OSError, CheckpointError) as error:
            reason = str(error)
        self._verified.discard(path.name)
        self._spared.add(path.name)
        _log.warning("checkpoint %s is not removed: %s", path, reason)
        return False

    def _set_aside(self, path: Path) -> None:
        """Rename a damaged checkpoint, of which parts may still be wanted."""
        taken = sum(1 for _ in self.folder.glob(f"{path.name}.damaged*"))
        os.rename(path, self.folder / f"{path.name}.damaged{taken or ''}")

    def _remove(self, path: Path) -> None:
        # Renamed first, which is atomic: half a checkpoint is never seen.
        trash = self._trash(path)
        os.rename(path, trash)
        self._verified.discard(path.name)
        with self._tolerating(trash):
            shutil.rmtree(trash)

    def _trash(self, path: Path) -> Path:
        """Return a free name for a checkpoint that is to be removed."""
        trash = self.folder / f".trash-{path.name}"
        return trash.with_name(f"{trash.name}-{uuid.uuid4().hex}") if trash.exists() else trash


def find_damage(path: Path, *, content: bool = True) -> str | None:
    """Describe what is wrong with a checkpoint; None if it is whole.

    Args:
        path: Folder of the checkpoint.
        content: Compare the hashes of the files too, not only their sizes.

    Raises:
        CheckpointError: It cannot be read, so that nobody can say.
    """
    try:
        files = parse_json(read_text(path / MANIFEST))["files"]
        for name in (STATE, META):
            size, expected = (path / name).stat().st_size, files[name]
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if content and _sha256(path / name) != expected["sha256"]:
                return f"{name} has another sha256 than when it was written"
    except FileNotFoundError as error:
        missing = Path(error.filename)
        if path.is_symlink() or missing.is_symlink():  # to a disk that is not mounted
            raise _unreadable(path, error) from error
        return f"{missing.name} is missing" if path.is_dir() else "no such folder"
    except NotADirectoryError:
        return "it is no folder"
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    return None


def write_files(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write state, metadata and, last of all, the manifest; each is flushed to the disk.

    Raises:
        OSError, safetensors.SafetensorError: One cannot be written.
    """
    save_tensors({k: t.contiguous() for k, t in tensors.items()}, folder / STATE)
    flush(folder / STATE)
    _write_json(folder / META, meta)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in (STATE, META)
    }
    _write_json(folder / MANIFEST, {"format": 1, "files": files})


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file: tensors on the CPU, mapped into memory.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged, or of a type of numbers that PyTorch has not.
    """
    try:
        return safetensors.torch.load_file(path)
    # What a damaged header makes of the reader; none of these is a mistake of ours.
    except (
        safetensors.SafetensorError, RuntimeError, LookupError, TypeError, AttributeError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path.name}: {one_line(error):.200}") from error


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file that others may read if the umask allows it.

    Raises:
        OSError, safetensors.SafetensorError: It cannot be written.
    """
    safetensors.torch.save_file(dict(tensors), path, metadata)
    use_default_mode(path)  # safetensors leaves 600


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    name = Path(error.filename).name if error.filename else path.name
    part = "" if name == path.name else f"{name}: "
    return CheckpointError(f"{path} cannot be read: {part}{error.strerror or error}")


def _read_optional(path: Path, parse: Callable[[str], T | None]) -> T | None:
    """Read a small file that is only ever replaced as a whole; None if there is none."""
    try:
        return parse(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: remove it") from error


def _same_run(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two checkpoints are of the same clips and the same model."""
    if one.get("clips") != other.get("clips"):
        return False
    configs = [meta.get("config", {}) for meta in (one, other)]
    for section in ("audio", "model"):
        a, b = (config.get(section, {}) for config in configs)
        if any(a[key] != b[key] for key in a.keys() & b.keys()):  # another version has other keys
            return False
    return True


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
