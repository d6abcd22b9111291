"""A small run that is disturbed: its data, its disk, its processes, and what it has saved."""

import contextlib
import itertools
import json
import logging
import os
import re
import signal
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

from ssast.benchmarks.faults.disk import Disk
from ssast.benchmarks.faults.processes import Ranks, Switches, until
from ssast.benchmarks.loading.data import write_clips
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.errors import CheckpointError
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.prepare.pack import Packing, prepare_shards

TIMEOUT_S, RETRY_S = 10.0, 4.0
NUM_TRAIN, NUM_VALID = 10, 2
DISK_MIB = 96
Losses = dict[tuple[str, int], float]
LIMIT_S = 60.0  # what has not happened by then never will
SETTINGS = (
    "model.size=tiny",
    "model.depth=1",
    "audio.n_mels=32",
    "audio.num_frames=48",
    "objective.num_masked=3",
    "objective.mask=uniform",
    "optim.warmup_steps=2",
    "train.batch_size=4",
    "train.log_every=1",
    "train.save_every=4",
    "train.validate_every=30",
    f"train.timeout_s={TIMEOUT_S}",
    f"data.retry_s={RETRY_S}",
    "data.num_threads=1",
)


@dataclass(frozen=True)
class Data:
    """The clips of a run.

    Attributes:
        manifest: The training clips: a manifest of audio files, or the folder of the shards.
        valid: Folder of the validation clips.
        files: Audio files or shards that hold the training clips.
    """

    manifest: Path
    valid: Path
    files: tuple[Path, ...]

    @property
    def arguments(self) -> list[str]:
        """The settings that name them."""
        return [f"data.train={self.manifest}", f"data.valid={self.valid}"]


def make_data(folder: Path, *, sharded: bool) -> Data:
    """Write synthetic clips, as files or in shards of about three clips."""
    for name, count in (("train", NUM_TRAIN), ("valid", NUM_VALID)):
        (folder / name).mkdir(parents=True)
        write_clips(folder / name, count, seconds=0.6, kind="wav")
    paths = sorted((folder / "train").iterdir())
    manifest = folder / "train.json"
    if not sharded:
        write_manifest(manifest, paths)
        return Data(manifest, folder / "valid", tuple(paths))
    packing = Packing(Recipe(clip_s=1.0, min_s=0.0), "wav", shard_mib=0.06)
    prepare_shards(folder / "train", folder / "shards", packing, progress=False, log=lambda _: None)
    shards = tuple(sorted((folder / "shards").rglob("*.tar")))
    return Data(folder / "shards", folder / "valid", shards)


class Trial:
    """One run on a disk of its own, from its first step to its last, over many faults.

    Args:
        folder: For the disk and the logs; it is made.
        context: The fork server.
        data: The clips.
        world_size: Number of ranks.
        settings: Settings of the run, beside :data:`SETTINGS` and the data.

    Attributes:
        run: Folder of the run.
        ranks: Processes of the last attempt; None before the first.
        kept: Step of the newest whole checkpoint that was seen; 0 if none.
        unlogged: Steps that could not be logged when a run ended, as it said.
    """

    def __init__(
        self,
        folder: Path,
        context: ForkServerContext,
        data: Data,
        world_size: int,
        settings: Sequence[str],
    ) -> None:
        folder.mkdir()
        self.folder, self.data, self.world_size = folder, data, world_size
        self._context, self._settings = context, settings
        self.disk = Disk(folder / "disk", DISK_MIB)
        self.run = self.disk.folder / "run"
        self.checkpoints = self.run / "checkpoints"
        (folder / "logs").mkdir()
        (folder / "empty.yaml").write_text("{}\n")
        self.switches = Switches(folder / "switches")
        self.ranks: Ranks | None = None
        self.kept = 0
        self.unlogged = set[int]()

    def close(self) -> None:
        """End the processes and unmount the disk."""
        if self.ranks is not None:
            self.ranks.send(signal.SIGKILL)
            self.ranks.wait(LIMIT_S)
        self.disk.close()

    def start(self, *, stdout: str | None = None, world_size: int | None = None) -> Ranks:
        """Start processes that train on, beside those that run."""
        arguments = [
            "pretrain",
            str(self.folder / "empty.yaml"),
            *SETTINGS,
            *self.data.arguments,
            *self._settings,
            f"run.folder={self.run}",
            f"train.fallback_folder={self.folder / 'fallback'}",
            "--resume",
        ]
        return Ranks(
            self._context,
            world_size or self.world_size,
            arguments,
            self.folder / "logs",
            self.switches.path,
            stdout=stdout,
        )

    def launch(self, *, stdout: str | None = None) -> Ranks:
        """Start the next attempt."""
        self.ranks = self.start(stdout=stdout)
        return self.ranks

    @property
    def running(self) -> bool:
        """Whether all ranks of the last attempt run."""
        return self.ranks is not None and not self.ranks.ended

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.ranks is not None and all(status == 0 for status in self.ranks.statuses)

    def last_step(self) -> int:
        """Return the last training step that was logged; 0 if none."""
        points = scalars(read_metrics(self.run / "metrics.jsonl"), "train/loss")
        return points[-1][0] if points else 0

    def saving(self) -> bool:
        """Return whether a checkpoint is being written."""
        with contextlib.suppress(OSError):
            return any(name.startswith(".tmp-") for name in os.listdir(self.checkpoints))
        return False

    def newest(self) -> int:
        """Return the step of the newest whole checkpoint; 0 if there is none."""
        logging.disable()  # it warns of what was damaged on purpose
        try:
            found = Checkpoints(self.checkpoints).latest()
        except CheckpointError:
            return 0
        finally:
            logging.disable(logging.NOTSET)
        return int(found.stem[4:]) if found else 0

    def lost(self) -> int:
        """Look at the checkpoints; return how many steps were lost of those saved before."""
        newest, kept = self.newest(), self.kept
        self.kept = newest
        return max(0, kept - newest)

    def losses(self) -> Losses:
        """Return each loss that was logged, by metric and step."""
        lines = read_metrics(self.run / "metrics.jsonl")
        return {
            (name, step): loss
            for name in ("train/loss", "valid/loss")
            for step, loss in scalars(lines, name)
        }

    def advances(self, ranks: Ranks, limit_s: float = LIMIT_S) -> bool:
        """Wait for another training step and then for a new checkpoint, or the end of the run."""
        step = self.last_step()
        until(lambda: ranks.ended or self.last_step() > step, limit_s)
        newest = self._latest_name()
        saved = until(lambda: ranks.ended or self._latest_name() != newest, limit_s)
        if ranks.ended:
            until(lambda: ranks.all_ended, limit_s)
            return self.finished
        return saved is not None

    def _latest_name(self) -> str:
        with contextlib.suppress(OSError):
            return (self.checkpoints / "latest").read_text()
        return ""


def said(ranks: Ranks, pattern: str) -> bool:
    """Return whether the processes have printed text that matches a pattern."""
    return re.search(pattern, ranks.output()) is not None


def first_difference(ours: Losses, whole: Losses, unlogged: Collection[int]) -> int | None:
    """Return the first step at which losses differ or are missing; None if all are the same.

    Args:
        ours: Losses of a disturbed run.
        whole: Those of an undisturbed one.
        unlogged: Steps whose losses may be missing.
    """
    differ = [key[1] for key in ours.keys() & whole.keys() if ours[key] != whole[key]]
    missing = [key[1] for key in ours.keys() ^ whole.keys() if key[1] not in unlogged]
    return min(differ + missing, default=None)


@contextlib.contextmanager
def vanished(files: Sequence[Path]) -> Iterator[None]:
    """Let files be gone inside."""
    for path in files:
        path.rename(_aside(path))
    try:
        yield
    finally:
        for path in files:
            _aside(path).rename(path)


def _aside(path: Path) -> Path:
    return path.with_suffix(".aside")


def shuffled_manifests(manifest: Path) -> Iterator[str]:
    """Yield the text of a manifest again and again, its clips turned round every other time."""
    content = json.loads(manifest.read_text())
    for order in itertools.cycle((-1, 1)):
        yield json.dumps(content | {"data": content["data"][::order]}) + "\n"
