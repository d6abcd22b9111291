"""Exit statuses of the ``ssast`` command; the module that documents them all is cli/main.py."""

import errno
import os
import select
import signal
import sys
from typing import TextIO

from ssast.pipelines.errors import PASSING
from ssast.pipelines.text import print_error

USER_ERROR = 2
SOME_UNREADABLE = 3
CLOSED_OUTPUT = 128 + signal.SIGPIPE

FILES_STATUS = (
    "exit status: 0 if all files could be read, 3 if only some could (the output covers these), "
    "2 if none could; a last line on stderr says how many could not"
)


def files_status(num_read: int, total: int) -> int:
    """Return the exit status of a command that has read files; say how many it could not."""
    if num_read == total:
        return 0
    if sys.stdout is not None:
        sys.stdout.flush()
    print_error(f"ssast: {total - num_read} of {total} files could not be read")
    return SOME_UNREADABLE if num_read else USER_ERROR


def os_error_status(error: OSError) -> int:
    """Return the exit status for an error of the system that nothing else has handled.

    That of SIGPIPE where nobody reads the output any more. The signal itself stays ignored: it
    would end a training run at any closed socket.
    """
    if error.errno == errno.EPIPE and (_is_closed(sys.stdout) or _is_closed(sys.stderr)):
        return CLOSED_OUTPUT
    passing = PASSING - {errno.EPIPE}  # a closed pipe will not open again
    return os.EX_TEMPFAIL if error.errno in passing else USER_ERROR


def discard_output() -> None:
    """Drop what is buffered for a standard output that cannot be written.

    Python would try again when it ends, and print a traceback.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _is_closed(stream: TextIO | None) -> bool:
    """Return whether a stream is a pipe that nobody reads."""
    try:
        descriptor = -1 if stream is None else stream.fileno()
    except (OSError, ValueError):  # a stream of Python's alone, or closed
        return False
    if descriptor < 0:
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def out_of_memory(error: Exception) -> tuple[str, int] | None:
    """Return message and exit status for an error that means a lack of memory; else None.

    The same run needs the same memory of a GPU when it is started again, while that of a machine
    depends on what else runs there.
    """
    reason = str(error).strip().partition("\n")[0]
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported here
        return f"{reason}: lower train.batch_size or raise train.accumulation_steps", USER_ERROR
    texts = (
        *("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory"),
        *("can't start new thread", "Resource temporarily unavailable"),  # Python's, a library's
    )
    if isinstance(error, MemoryError) or any(text in reason for text in texts):
        return f"this machine is out of memory ({reason or 'MemoryError'})", os.EX_TEMPFAIL
    return None
