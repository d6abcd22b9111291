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
    """The checkpoints of one run, on rank 0.

    Args:
        folder: Folder of the checkpoints, created at the first save.
        keep: Number of the newest checkpoints to keep; the best one is kept in addition.

    Attributes:
        damaged: Damaged checkpoints that :meth:`latest` skipped, with the reasons, by name.

    Raises:
        ValueError: ``keep`` is less than 1.
    """

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, found {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.damaged: dict[str, str] = {}

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, step: int) -> Path:
        """Write a checkpoint, make it the latest, and remove those no longer kept.

        A checkpoint of the same step is replaced. If this raises, the checkpoints from before the
        call are still there and whole.

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
        """Return the newest checkpoint of which every byte verifies; None if there is none.

        Damaged ones are skipped, logged as warnings and listed in ``damaged``.
        """
        for path in self._all():
            problem = find_damage(path)
            if problem is None:
                return path
            if path.name not in self.damaged:
                _log.warning("skipping damaged checkpoint %s: %s", path, problem)
            self.damaged[path.name] = problem
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
            CheckpointError: There is no whole checkpoint at this path.
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
        """List checkpoints with a manifest, newest first; a replaced one after its replacement."""
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
        """Remove what a killed save left behind."""
        for pattern in (".tmp-*", ".trash-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.folder.glob("step*.old"):
            if (self.folder / path.stem).exists():
                self._remove(path)
            else:  # killed between its two renames
                os.rename(path, self.folder / path.stem)

    def _prune(self) -> None:
        self._sweep()
        best = self._best_name()
        for path in self._all()[self.keep :]:
            if path.stem != best:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first, which is atomic: half a checkpoint is never seen.
        trash = self.folder / f".trash-{path.name}"
        os.rename(path, trash)
        shutil.rmtree(trash)


def find_damage(path: Path, *, content: bool = True) -> str | None:
    """Describe what is wrong with a checkpoint; None if it is whole.

    Args:
        path: Folder of the checkpoint.
        content: Compare the hashes of the files too, not only their sizes.
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
    """Write state, metadata and, last of all, the manifest; each is flushed to the disk.

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
