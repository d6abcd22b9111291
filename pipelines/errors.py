"""Errors that audio, manifests and folders of the user can cause; their messages are for people.

Each message is one line that names the file, what was found and what was expected.
"""

import errno

TRANSIENT = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EMFILE, errno.ENFILE),
        *(errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE),
        *(errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ENOLINK),
    }
)
"""Error numbers of storage that may work again later."""

PASSING = TRANSIENT | {errno.ENOMEM}


class DataError(ValueError):
    """Audio, a manifest or a data folder that cannot be used."""


class BeyondEndError(DataError):
    """A segment that begins beyond the end of its recording."""


class ChainedError(DataError):
    """An Ogg file of several streams, one behind the other; libsndfile reads the first alone."""


class UnavailableError(DataError):
    """A package that the distribution does not have."""


class FolderInUse(DataError):
    """A folder in which another process writes; it will be free when that has ended."""


class StorageError(DataError):
    """Storage that kept failing; the files are not to blame, and it may work again later."""


def read_error(error: OSError, name: object) -> DataError:
    """Return the error to raise for what the system does not read."""
    return data_error(error, f"{name}: cannot be read: {error.strerror or error}")


def data_error(error: OSError, message: str) -> DataError:
    """Return the error to raise for one of the system: another, if it may pass by itself."""
    return (StorageError if error.errno in PASSING else DataError)(message)


class UnusableError(Exception):
    """A recording that cannot be used: it is left out and listed, the others go on.

    Args:
        reason: The message.
        transient: Whether the storage failed, not the recording: another attempt may succeed.
    """

    def __init__(self, reason: str, *, transient: bool = False) -> None:
        super().__init__(reason)
        self.transient = transient


class UnopenedError(UnusableError):
    """A recording that libsndfile does not open; nothing of it was decoded.

    Args:
        reason: The message.
        foreign: Whether it is of a format that ffmpeg reads.
    """

    def __init__(self, reason: str, foreign: bool) -> None:
        super().__init__(reason)
        self.foreign = foreign


class TooFewRecordings(DataError):
    """No recording can be held out while others are left to train on."""
