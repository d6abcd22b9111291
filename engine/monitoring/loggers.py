"""Run logs beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

``run.loggers`` names them; rank 0 writes them. None can end a run: where one fails, the run says so
and goes on. Weights & Biases and Trackio read their own environment variables: ``WANDB_PROJECT``,
``WANDB_ENTITY``, ``WANDB_MODE=offline``, ``TRACKIO_SPACE_ID``, ``TRACKIO_DIR`` and so on.
"""

import contextlib
import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ssast.engine.config import Config, to_plain
from ssast.engine.errors import ConfigError
from ssast.pipelines.files import write_atomically
from ssast.pipelines.text import one_line

PROJECT = "ssast"  # where the logger's environment names no other
NETWORK_S = 60  # longest wait for a server, at the beginning and at the end of a run


class Logger(ABC):
    """One run log.

    Args:
        folder: The run's folder.
        config: Configuration of the run, which is logged with it.
    """

    package: ClassVar[str | None] = None  # beside those that are always installed
    title: ClassVar[str]
    is_local: ClassVar[bool] = False  # a failure is of the disk, and may pass

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.folder, self.config = folder, config

    @abstractmethod
    def open(self, step: int) -> None:
        """Begin the log, or go on with it after a step."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics, under the names of metrics.jsonl."""

    @abstractmethod
    def close(self) -> None:
        """Finish the log; :meth:`open` goes on with it."""


class TensorBoard(Logger):
    """Event files in ``tensorboard/``."""

    title = "TensorBoard"
    is_local = True
    _writer: Any = None

    def open(self, step: int) -> None:
        """See :class:`Logger`; events of later steps are hidden."""
        # Imported here: it takes a second, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See :class:`Logger`."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See :class:`Logger`."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class WandB(Logger):
    """A run of Weights & Biases, whose id is kept in ``wandb_id.txt``; local files in ``wandb/``.

    Its own steps only grow, while a resumed run takes some again: metrics are plotted against a
    value ``step`` instead.
    """

    package = "wandb"
    title = "Weights & Biases"
    _run: Any = None

    def open(self, step: int) -> None:
        """See :class:`Logger`."""
        import wandb

        kept = self.folder / "wandb_id.txt"
        run_id = kept.read_text(encoding="utf-8").strip() if kept.is_file() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or self.folder.resolve().name,
            id=run_id or os.environ.get("WANDB_RUN_ID"),
            resume="allow",
            reinit="create_new",  # the user's own run, if any, stays as it is
            dir=self.folder,
            config=dict(self.config),
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=NETWORK_S, finish_timeout=NETWORK_S
            ),
        )
        write_atomically(kept, f"{self._run.id}\n")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See :class:`Logger`."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """See :class:`Logger`; what is not sent yet is waited for, for a minute at most."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()


class Trackio(Logger):
    """A run of Trackio, whose name is kept in ``trackio_name.txt``."""

    package = "trackio"
    title = "Trackio"
    _run: Any = None

    def open(self, step: int) -> None:
        """See :class:`Logger`."""
        import trackio

        kept = self.folder / "trackio_name.txt"
        if kept.is_file():
            name = kept.read_text(encoding="utf-8").strip()
        else:  # Trackio resumes by name: two folders of one name are two runs
            name = f"{self.folder.resolve().name}-{os.urandom(3).hex()}"
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=PROJECT,
                name=name,
                resume="allow",
                config=dict(self.config),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        write_atomically(kept, f"{name}\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See :class:`Logger`."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """See :class:`Logger`."""
        run, self._run = self._run, None
        if run is not None:
            import trackio

            with contextlib.redirect_stdout(sys.stderr):
                trackio.finish()


LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_loggers(names: Iterable[str]) -> None:
    """Check that the packages of loggers are installed.

    Raises:
        ConfigError: One is not.
    """
    for name in names:
        package = LOGGERS[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"run.loggers: {name} needs the package {package}: "
                f'pip install "ssast-engine[{name}]"'
            )


def build_loggers(config: Config, folder: Path) -> list[Logger]:
    """Return the loggers of a run, which are not opened yet."""
    names = dict.fromkeys(config.run.loggers)
    return [LOGGERS[name](folder, to_plain(config)) for name in names]


class RunLogs:
    """The loggers of a run; what one of them raises is said, and raised no further.

    One that writes to a disk is tried again with the next metrics, one that needs a server is not.

    Args:
        loggers: The loggers.
        say: Prints a line.
    """

    def __init__(self, loggers: Sequence[Logger], say: Callable[[str], None]):
        self._closed, self._open, self._say = list(loggers), list[Logger](), say

    def open(self, step: int) -> None:
        """Open all that are closed, to go on after a step."""
        for logger in list(self._closed):
            try:
                logger.open(step)
            except Exception as error:
                self._failed(logger, f"{logger.title} cannot be opened", error)
            else:
                self._closed.remove(logger)
                self._open.append(logger)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics."""
        self.open(step - 1)
        for logger in list(self._open):
            try:
                logger.log(step, metrics)
            except Exception as error:
                self._failed(logger, f"step {step} is missing in {logger.title}", error)

    def close(self) -> None:
        """Close all; :meth:`open` opens them again."""
        for logger in list(self._open):
            try:
                logger.close()
            except Exception as error:
                what = f"{logger.title} cannot be finished, what it was sent last may be missing"
                self._say(f"{what}: {one_line(error)}")
            self._set_aside(logger)

    def _failed(self, logger: Logger, what: str, error: Exception) -> None:
        """Close a logger, which after an error takes nothing more; give up one on a network."""
        end = "" if logger.is_local else "; the run goes on without it"
        self._say(f"{what}: {one_line(error)}{end}")
        with contextlib.suppress(Exception):  # what could not be written was told of
            logger.close()
        self._set_aside(logger)
        if not logger.is_local:
            self._closed.remove(logger)

    def _set_aside(self, logger: Logger) -> None:
        if logger in self._open:
            self._open.remove(logger)
            self._closed.append(logger)
