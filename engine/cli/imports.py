"""Imports of what a command needs, without the search for garbage that they would set off."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Keep the garbage collector off in a block of imports, and what they made out of its sight.

    Importing PyTorch and DALI makes a million objects, all of which stay: to look through them
    again and again takes a fifth of the time until a command begins, and as much when it ends. In
    a process that had PyTorch before, there may be garbage, and nothing is kept out of sight.
    """
    was_on, are_first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if are_first:
            gc.freeze()
        if was_on:
            gc.enable()
