"""Store of the study's runs that another machine can go on from: a tar of each run.

    plan.json                                the plan
    pretrain-MODEL.tar                       weights (safetensors, float16), settings, metrics
    finetune-MODEL-TASK-lr0.001-seed0.tar    settings, metrics, predictions
    probe-MODEL.tar                          scores
    claims/                                  locks: which process is at which run

Neither optimizer states nor the weights of classifiers are in it: a run that is not finished is
started again elsewhere. Of a pretraining that goes on, the weights kept so far are there.
"""

import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ssast.engine.checkpoints.store import MANIFEST, Checkpoints
from ssast.engine.checkpoints.weights import CHOSEN, export_weights
from ssast.engine.evaluation.layer_probe import REPORTS
from ssast.engine.formats.open import open_encoder
from ssast.engine.train.callbacks import Callback, RunState
from ssast.pipelines.errors import DataError, FolderInUse
from ssast.pipelines.files import replacing
from ssast.pipelines.locks import FolderLock

KEPT_STEPS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000)
LEFT_OUT = ("checkpoints", CHOSEN)
LAST = ("metrics.json", "pictures.txt", "diverged.txt", REPORTS)
"""Files that finished runs have; they are written last."""

# Python 3.11.3 and earlier have no filters.
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def weights_folder(run: Path, step: int | None) -> Path:
    """Return the folder of a pretraining's kept weights; step None: those of its end, the best."""
    return run / "weights" / ("final" if step is None else f"step{step}")


def keep_weights(source: Path, folder: Path) -> None:
    """Export the weights of a run or a checkpoint in float16; averaged ones where it has them."""
    loaded = open_encoder(source)
    with replacing(folder) as new:
        export_weights(loaded.model, loaded.config, loaded.step or 0, new, torch.float16)


class KeepWeights(Callback):
    """Keeps the weights at :data:`KEPT_STEPS`.

    Args:
        kept: Called after weights were kept.
    """

    def __init__(self, kept: Callable[[], None]):
        self._kept = kept

    def on_start(self, state: RunState) -> None:
        """Keep those of the latest checkpoint, where the run was stopped before it could."""
        latest = Checkpoints(state.folder / "checkpoints").latest()
        if latest is not None and state.rank == 0:
            self.on_checkpoint(state, latest)

    def on_checkpoint(self, state: RunState, path: Path) -> None:
        """Keep the weights of a checkpoint."""
        step = int(path.name[4:])
        folder = weights_folder(state.folder, step)
        if step in KEPT_STEPS and not (folder / MANIFEST).exists():
            keep_weights(path, folder)
            self._kept()


class Store:
    """Runs of a study that processes and machines share.

    Args:
        out: Folder of the runs of this process, which several processes may have.
        folder: Folder of the tars; None: the processes share ``out`` alone.
    """

    def __init__(self, out: Path, folder: Path | None = None):
        self.out, self.folder = out, folder

    @property
    def shared(self) -> Path:
        """Folder of the plan and of the claims."""
        return self.out if self.folder is None else self.folder

    @contextmanager
    def claim(self, run: Path) -> Iterator[bool]:
        """Claim a run while the body works on it; yield whether no other process has it.

        The claim of a process that died is taken over.
        """
        lock = FolderLock(self.shared / "claims" / self._name(run), "another process is at work")
        try:
            lock.acquire()
        except FolderInUse:
            yield False
            return
        with lock:
            yield True

    def put(self, run: Path) -> None:
        """Write a run to its tar, whole or not at all."""
        if self.folder is None or not run.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._tar(run)) as new, tarfile.open(new, "w") as tar:
            for path in sorted(run.rglob("*"), key=lambda path: (path.name in LAST, path)):
                parts = path.relative_to(run).parts
                hidden = any(part.startswith(".") for part in parts)
                if path.is_file() and not hidden and parts[0] not in LEFT_OUT:
                    tar.add(path, "/".join(parts))

    def has(self, run: Path) -> bool:
        """Return whether the store has a run as it is now, or does not keep any."""
        if self.folder is None:
            return True
        tar = self._tar(run)
        ends = [path.stat().st_mtime for path in run.rglob("*") if path.name in LAST]
        return tar.exists() and tar.stat().st_mtime >= max(ends, default=0.0)

    def put_weights(self, run: Path) -> None:
        """Write the kept weights alone of a pretraining that goes on."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._tar(run)) as new, tarfile.open(new, "w") as tar:
            tar.add(run / "weights", "weights")

    def fetch(self, run: Path) -> None:
        """Unpack a run of the store; files that are there are replaced.

        Raises:
            DataError: The tar is damaged.
        """
        if self.folder is None or not self._tar(run).exists():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        unpacked = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.out))
        try:
            with tarfile.open(self._tar(run)) as tar:
                members = [member for member in tar if member.isfile()]
                names = [member.name for member in members]
                if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
                    raise tarfile.TarError("a member leads out of it")
                tar.extractall(unpacked, members, **SAFELY)
            for name in names:
                (run / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(unpacked / name, run / name)
        except tarfile.TarError as error:
            raise DataError(
                f"{self._tar(run)}: damaged, expected the tar of a run: {error}"
            ) from error
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)

    def _name(self, run: Path) -> str:
        return "-".join(run.relative_to(self.out).parts)

    def _tar(self, run: Path) -> Path:
        return self.shared / f"{self._name(run)}.tar"
