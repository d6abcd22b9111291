"""Contents and origin of a shard, in a file beside it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssast.pipelines.clips.labels import is_name
from ssast.pipelines.clips.remote import as_os_error, is_url
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import open_regular
from ssast.pipelines.text import parse_json

BLOCK = 512  # bytes of a tar header; members begin at multiples of it
CLIP_FIELDS = {  # of a clip in a sidecar
    **dict.fromkeys(("file", "name", "digest"), str),
    **dict.fromkeys(("offset", "size", "part", "source_hz"), int),
    "duration_s": int | float,
}
NEEDED = {"file", "offset", "size", "digest"}


@dataclass(frozen=True)
class Sidecar:
    """Contents and origin of a shard.

    Attributes:
        digest: Digest of the settings and the recordings.
        size: Size of the shard in bytes.
        clips: ``file``, ``name`` of the recording, ``part``, ``duration_s``, ``digest`` of the
            samples, ``offset``, ``size``, ``source_hz`` and perhaps ``labels`` of each clip.
        rejected: ``name`` and ``rejected``, the reason, of each recording without clips.
        again: Whether storage failed for one of those, which is worth another attempt.
    """

    digest: str
    size: int
    clips: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    again: bool = False

    @staticmethod
    def read(path: Path) -> "Sidecar":
        """Read the sidecar of a shard.

        Raises:
            OSError: It cannot be read.
            DataError: It is damaged.
        """
        try:
            first, *lines = map(parse_json, read_small(path).splitlines())
            rejected = [line for line in lines if "rejected" in line]
            clips = [line for line in lines if "rejected" not in line]
            if not all(map(_is_clip, clips)):
                raise ValueError("a line without its fields")
            return Sidecar(first["digest"], int(first["size"]), clips, rejected, first["again"])
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"{path}: damaged: prepare the data again") from error

    def is_whole(self) -> bool:
        """Return whether no clip is missing: the last one ends where the archive does."""
        last = self.clips[-1]["offset"] + self.clips[-1]["size"] if self.clips else 0
        return last + -last % BLOCK + 2 * BLOCK == self.size

    def text(self) -> str:
        """Return the content of the file."""
        first = {"digest": self.digest, "size": self.size, "again": self.again}
        lines = [first, *self.clips, *self.rejected]
        return "".join(json.dumps(line) + "\n" for line in lines)


def _is_clip(line: dict[str, Any]) -> bool:
    """Return whether a line of a sidecar has the fields of a clip, each of its kind."""
    known = all(isinstance(line[key], kind) for key, kind in CLIP_FIELDS.items() if key in line)
    names = line.get("labels", [])
    return known and line.keys() >= NEEDED and isinstance(names, list) and all(map(is_name, names))


def read_small(path: Path) -> bytes:
    """Return the content of a small file of a prepared folder.

    Raises:
        OSError: It cannot be read, or is a pipe or a device.
    """
    if is_url(path):
        return as_os_error(path.read_bytes, str(path))
    with open_regular(path) as file:
        return file.read()
