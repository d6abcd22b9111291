"""Fetch weights by name, from a web address or from the Hugging Face hub, once into a cache.

    SSAST-Base-Patch-400               published weights, see known_weights.py
    tiny_patch                         ours, in checkpoints/ of a clone
    https://host/file.pth#sha256=...   any file that can be opened
    hf:owner/name@revision             a model on the hub: what ``ssast export --to hf`` wrote

A download that breaks off is resumed, retried, and checked before it gets its name.
"""

import hashlib
import logging
import os
import re
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.hub import PREFIX, fetch_from_hub
from ssast.engine.formats.known_weights import PUBLISHED, ours
from ssast.pipelines.files import cache_folder, write_atomically
from ssast.pipelines.locks import in_turn
from ssast.pipelines.text import one_line, shows_progress

WEIGHTS: Final = "weights"  # folder in the cache
MIRROR = "SSAST_MIRROR"  # environment: address of a folder that holds NAME.pth
TRIES = 5
WAIT_S = 1.0  # before the second try, doubled before each further one
TIMEOUT_S = (10.0, 60.0)  # to connect, and between two pieces
PIECE = 1 << 16

_log = logging.getLogger(__name__)


def local_path(source: str | Path) -> Path:
    """Return where the weights of a source lie, which are fetched if need be.

    Args:
        source: A path, a name of :data:`PUBLISHED` or of ours, ``hf:owner/name`` or an address.
            A path that exists comes first.

    Raises:
        CheckpointError: They cannot be fetched, or have another checksum.
        ConfigError: The source is malformed.
    """
    text = str(source)
    if isinstance(source, Path) or Path(text).exists():
        return Path(text)
    if text.startswith(PREFIX):
        return fetch_from_hub(text)
    if text.startswith(("https://", "http://")):
        return _from_address(text)
    if text in PUBLISHED:
        return fetch_published(text)
    return ours().get(text, Path(text))


def fetch_published(name: str, mirror: str | None = None) -> Path:
    """Return the file of published weights, which is downloaded the first time.

    Args:
        name: A key of :data:`PUBLISHED`.
        mirror: Address of a folder that holds ``NAME.pth``; that in the environment if None.

    Raises:
        CheckpointError: See :func:`local_path`.
    """
    mirror = mirror or os.environ.get(MIRROR)
    url = f"{mirror.rstrip('/')}/{quote(name)}.pth" if mirror else PUBLISHED[name].url
    return _download(url, cache_folder(WEIGHTS) / f"{name}.pth", None)


def _from_address(text: str) -> Path:
    url, _, fragment = text.partition("#")
    sha256 = None
    if fragment:
        found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
        if found is None:
            raise ConfigError(f"{text}: expected #sha256= and 64 hexadecimal digits")
        sha256 = found[1].lower()
    name = Path(unquote(urlsplit(url).path)).name or "weights"
    # Two addresses may end alike.
    key = hashlib.sha256(url.encode()).hexdigest()[:12]
    return _download(url, cache_folder(WEIGHTS) / key / name, sha256)


def _download(url: str, path: Path, sha256: str | None) -> Path:
    """Return the file, which is downloaded if it is not there, and checked."""
    # It gets its name when it is whole: a cache that can only be read needs no lock.
    cached = path.is_file()
    if not cached:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The other ranks of a machine wait here for the first one.
            with in_turn(path.parent, "another process is downloading weights"):
                if not (cached := path.is_file()):
                    _fetch(url, path, sha256)
        except OSError as error:
            what = f"{path}: cannot be written: {error.strerror or error}"
            raise CheckpointError(what) from error
    if cached:  # what was just fetched is checked already
        _check(path, sha256)
    return path


def _check(path: Path, sha256: str | None) -> None:
    """Compare a file's checksum with the known one, else with that of the download."""
    record = path.with_name(f"{path.name}.sha256")
    recorded = record.read_text().strip() if record.is_file() else None
    expected = sha256 or recorded
    if expected is None:  # put there by hand
        return
    found = _digest(path)
    if found != expected:
        raise CheckpointError(
            f"{path}: has SHA-256 {found}, expected {expected}: remove it, to fetch it again"
        )


def _fetch(url: str, path: Path, sha256: str | None) -> None:
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
    part = path.with_name(f"{path.name}.part")
    try:
        pooch.retrieve(
            url,
            known_hash=f"sha256:{sha256}" if sha256 else None,
            fname=path.name,
            path=path.parent,
            downloader=_Resuming(part),
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; or put the file by hand where it is looked for: {path}"
        ) from error
    except ValueError as error:  # of pooch: another checksum
        raise CheckpointError(f"{url}: {one_line(error)}") from error
    found = _digest(path)
    write_atomically(path.with_name(f"{path.name}.sha256"), found + "\n")
    if sha256 is None:
        _log.warning("%s: no checksum is known; SHA-256 %s is recorded in the cache", url, found)


class _Resuming:
    """A downloader for pooch that goes on where a download broke off.

    Args:
        part: What is there so far, of this process or of one before.
    """

    def __init__(self, part: Path):
        self._part = part

    def __call__(self, url: str, output: str, _: Any) -> None:
        import requests

        for number in range(TRIES):
            if number:
                time.sleep(WAIT_S * 2 ** (number - 1))
            try:
                self._attempt(url)
                break
            except requests.HTTPError as error:
                status = error.response.status_code
                if status < 500 and status not in (408, 429):
                    raise CheckpointError(f"{url}: the server answers {status}") from error
                reason = f"the server answers {status}"
            except requests.RequestException as error:
                reason = f"{one_line(error):.200}"
        else:
            raise CheckpointError(f"{url}: cannot be fetched, {TRIES} times: {reason}")
        self._part.replace(output)

    def _attempt(self, url: str) -> None:
        import requests
        from tqdm.auto import tqdm

        have = self._part.stat().st_size if self._part.is_file() else 0
        # identity: the length and the range are those of the file, not of something compressed.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
            if answer.status_code == 416:  # the part is as long as the file, or longer
                self._part.unlink()
                raise requests.ConnectionError("the file is shorter than its part was")
            answer.raise_for_status()
            if answer.status_code != 206:
                have = 0  # the server sends all of it
            length = answer.headers.get("Content-Length")
            total = None if length is None else have + int(length)
            with (
                self._part.open("ab" if have else "wb") as file,
                tqdm(
                    total=total,
                    initial=have,
                    desc=self._part.name.removesuffix(".part"),
                    unit="B",
                    unit_scale=True,
                    disable=not shows_progress(),
                ) as bar,
            ):
                for piece in answer.iter_content(PIECE):
                    file.write(piece)
                    bar.update(len(piece))
                found = file.tell()
        if total is not None and found != total:
            raise requests.ConnectionError(f"{found} of {total} bytes came")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
