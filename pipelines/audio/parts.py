"""Parts of files, read in place."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

from ssast.pipelines.files import open_regular


@dataclass(frozen=True, slots=True)
class Span:
    """A file inside an uncompressed archive.

    Attributes:
        path: Path of the archive.
        offset: First byte of the file in the archive.
        size: Size of the file in bytes.
    """

    path: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A file in a column of a Parquet file.

    Attributes:
        path: Path of the Parquet file.
        column: The column, of structures with a field ``bytes``.
        group: Group of rows.
        row: Row in the group.
    """

    path: Path
    column: str
    group: int
    row: int


class SpanFile(io.RawIOBase):
    """A raw file object for part of an archive, or for a file with another header.

    libsndfile calls it from C and would swallow exceptions: a failed read looks like the end of the
    file, and its exception is kept in ``error``.

    Args:
        span: The part.
        header: Bytes that come before it.
    """

    def __init__(self, span: Span, header: bytes = b"") -> None:
        self.span, self.header, self.position = span, header, 0
        self.size = len(header) + span.size
        self.error: OSError | None = None
        self.file = open_regular(span.path)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read into the buffer; return the number of bytes, 0 at the end of the file."""
        wanted = min(len(buffer), max(0, self.size - self.position))
        if not wanted:
            return 0
        before = self.header[self.position : self.position + wanted]
        if before:
            buffer[: len(before)] = before
            self.position += len(before)
            return len(before)
        part = memoryview(buffer)[:wanted]
        offset = self.span.offset + self.position - len(self.header)
        try:
            done = os.preadv(self.file.fileno(), [part], offset)
        except OSError as error:
            self.error = error
            return 0
        self.position += done
        return done

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position in the file; return the new one."""
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the archive."""
        if not self.closed:
            self.file.close()
        super().close()
