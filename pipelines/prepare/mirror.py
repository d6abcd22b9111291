"""Prepares shards for a folder behind a URL: made here, moved there one by one."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ssast.pipelines.clips.remote import as_os_error, is_url
from ssast.pipelines.clips.shards import REPORT, SHARD, SIDECAR
from ssast.pipelines.errors import DataError, read_error
from ssast.pipelines.locks import LOCK
from ssast.pipelines.prepare.index import LISTS, check_own, is_numbered


@contextlib.contextmanager
def local_folder(out: Path) -> Iterator[Path]:
    """Yield ``out``, or a temporary folder if that is behind a URL.

    Raises:
        DataError: ``out`` holds something that was not prepared.
    """
    try:
        check_own(out)
    except OSError as error:
        raise read_error(error, out) from error
    if not is_url(out):
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="ssast-prepare-") as folder:
        yield Path(folder)


class Mirror:
    """A local folder that looks like one behind a URL, but whose shards take up no room.

    A shard that is there already is a hole of its size here, and its sidecar a copy.

    Args:
        remote: The folder behind the URL.
        local: An empty folder.
    """

    def __init__(self, remote: Path, local: Path) -> None:
        self.remote, self._local = remote, local
        there = (remote / SHARD).parent
        (local / SHARD).parent.mkdir(parents=True)
        for path in there.iterdir() if there.exists() else ():
            copy = local / there.name / path.name
            if path.suffix == ".jsonl":
                copy.write_bytes(path.read_bytes())
            elif path.suffix == ".tar":
                copy.touch()
                os.truncate(copy, path.stat().st_size)

    def reopen(self) -> None:
        """Mark the data set as unfinished.

        Raises:
            DataError: Nothing can be written there.
        """
        try:
            (self.remote / REPORT).unlink(missing_ok=True)
            self.remote.mkdir(parents=True, exist_ok=True)
            (self.remote / LOCK).write_text("")  # for check_own, if this is killed
        except NotImplementedError as error:
            raise DataError(
                f"{self.remote}: a URL that cannot be written to: expected one as s3:// or gs://"
            ) from error

    def move(self, number: int) -> None:
        """Move a finished shard, then its sidecar."""
        shard, sidecar = SHARD.format(number), SIDECAR.format(number)
        (self.remote / sidecar).unlink(missing_ok=True)
        self._upload(shard)
        self._upload(sidecar)
        size = (self._local / shard).stat().st_size
        os.truncate(self._local / shard, 0)
        os.truncate(self._local / shard, size)

    def finish(self) -> None:
        """Move the lists, and remove shards of earlier runs."""
        self.reopen()
        for name in LISTS:
            if (self._local / name).exists():
                self._upload(name)
            else:
                (self.remote / name).unlink(missing_ok=True)
        folder = (self.remote / SHARD).parent
        for path in folder.iterdir():
            if is_numbered(path) and not (self._local / folder.name / path.name).exists():
                path.unlink()
        (self.remote / LOCK).unlink(missing_ok=True)

    def _upload(self, name: str) -> None:
        target = self.remote / name
        target.parent.mkdir(parents=True, exist_ok=True)
        system, path = target.fs, target.path  # type: ignore[attr-defined]
        as_os_error(lambda: system.put_file(str(self._local / name), path), str(target))
