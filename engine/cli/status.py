"""Exit statuses of the ``ssast`` command; the module that documents them all is cli/main.py."""

import sys

USER_ERROR = 2
SOME_UNREADABLE = 3

FILES_STATUS = (
    "exit status: 0 if all files could be read, 3 if only some could (the output covers these), "
    "2 if none could; a last line on stderr says how many could not"
)


def files_status(num_read: int, total: int) -> int:
    """Return the exit status of a command that has read files; say how many it could not."""
    if num_read == total:
        return 0
    sys.stdout.flush()
    print(f"ssast: {total - num_read} of {total} files could not be read", file=sys.stderr)
    return SOME_UNREADABLE if num_read else USER_ERROR
