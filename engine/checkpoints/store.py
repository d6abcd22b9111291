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
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ssast.engine.errors import CheckpointError
from ssast.pipelines.files import flush, replacing, write_atomically

STATE, META, MANIFEST = "state.safetensors", "meta.json", "manifest.json"

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Used by rank 0 alone.

    Args:
        folder: created at the first save.
        keep: how many of the newest to keep; the best one is kept in addition.

    Attributes:
        damaged: name and reason of each checkpoint that `latest` passed over.

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, found {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.damaged: dict[str, str] = {}

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, step: int) -> Path:
        """Writes a checkpoint, makes it the latest and removes those no longer kept.

        A checkpoint of the same step is replaced. When this raises, what was there before the
        call is still there and whole.

        Args:
            tensors: by name, on the CPU.
            meta: what JSON can hold; tuples come back as lists.
            step: number of the checkpoint, at most nine digits.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        target = self.folder / f"step{step:09d}"
        try:
            self._sweep()
            with replacing(target, durable=True) as work:
                work.mkdir()
                write_files(work, tensors, {**meta, "step": step})
                if target.exists():  # never without a whole checkpoint, not even for a moment
                    os.rename(target, self.folder / f"{target.name}.old")
            write_atomically(self.folder / "latest", f"{target.name}\n", durable=True)
            self._prune()
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot write checkpoint {target}: {error}") from error
        return target

    def latest(self) -> Path | None:
        """The newest checkpoint whose manifest verifies, every byte of it; None if there is none.

        Damaged ones are logged as warnings and listed in `damaged`.
        """
        for path in self._all():
            problem = find_damage(path)
            if problem is None:
                return path
            if path.name not in self.damaged:
                _log.warning("passing over damaged checkpoint %s: %s", path, problem)
            self.damaged[path.name] = problem
        return None

    def mark_best(self, step: int, value: float) -> None:
        """Names a saved checkpoint the best so far; it is kept until another one is named.

        Raises:
            CheckpointError: there is no checkpoint of this step, or the disk is full.
        """
        name = f"step{step:09d}"
        if not (self.folder / name / MANIFEST).is_file():
            raise CheckpointError(f"cannot mark {self.folder / name} as the best: it is not saved")
        try:
            text = json.dumps({"name": name, "step": step, "value": value}) + "\n"
            write_atomically(self.folder / "best.json", text, durable=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.folder / 'best.json'}: {error}") from error

    def best(self) -> Path | None:
        """The checkpoint named last by `mark_best`; None if there is none."""
        name = self._best_name()
        return next((path for path in self._all() if path.stem == name), None)

    @staticmethod
    def load(path: Path, *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Reads a checkpoint.

        Args:
            path: its folder.
            check: verify every byte first; `latest` has done so for what it returns.

        Returns:
            The tensors, mapped into memory and read from the disk when they are used, and the
            meta data.

        Raises:
            CheckpointError: there is no whole checkpoint at this path.
        """
        path = Path(path)
        problem = find_damage(path, content=check)
        if problem is not None:
            raise CheckpointError(f"cannot load checkpoint {path}: {problem}")
        try:
            meta = json.loads((path / META).read_text(encoding="utf-8"))
            return safetensors.torch.load_file(path / STATE), meta
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot load checkpoint {path}: {error}") from error

    def _all(self) -> list[Path]:
        """Checkpoints with a manifest, newest first; a replaced one after its replacement."""
        found = [p for p in self.folder.glob("step*") if re.fullmatch(r"step\d+(\.old)?", p.name)]
        found = [p for p in found if (p / MANIFEST).is_file()]
        return sorted(found, key=lambda p: (int(p.stem[4:]), p.suffix == ""), reverse=True)

    def _best_name(self) -> str | None:
        try:
            name = json.loads((self.folder / "best.json").read_text(encoding="utf-8"))["name"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # never marked; the file itself is only ever replaced as a whole
        return name if isinstance(name, str) else None

    def _sweep(self) -> None:
        """Removes what a killed save left behind."""
        for pattern in (".tmp-*", ".trash-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.folder.glob("step*.old"):
            if (self.folder / path.stem).exists():
                self._remove(path)
            else:  # killed between its two renames
                os.rename(path, self.folder / path.stem)

    def _prune(self) -> None:
        """Keeps the newest and the best."""
        self._sweep()
        best = self._best_name()
        for path in self._all()[self.keep :]:
            if path.stem != best:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Out of sight in one operation first: half a checkpoint is never seen."""
        trash = self.folder / f".trash-{path.name}"
        os.rename(path, trash)
        shutil.rmtree(trash)


def find_damage(path: Path, *, content: bool = True) -> str | None:
    """What is wrong with a checkpoint folder; None if it is whole.

    Args:
        path: the folder.
        content: compare the hashes of the files too, not only their sizes.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name in (STATE, META):
            size, expected = (path / name).stat().st_size, files[name]
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if content and _sha256(path / name) != expected["sha256"]:
                return f"{name} has another sha256 than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if path.is_dir() else "no such folder"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    return None


def write_files(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write state, meta data and, last of all, the manifest; each is flushed to the disk.

    Raises:
        OSError, safetensors.SafetensorError: One cannot be written.
    """
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, folder / STATE)
    flush(folder / STATE)
    _write_json(folder / META, meta)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in (STATE, META)
    }
    _write_json(folder / MANIFEST, {"format": 1, "files": files})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
