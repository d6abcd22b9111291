"""Imports of what a command needs, without the search for garbage that they would set off."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Keep the garbage collector off in a block of imports.

    Importing PyTorch and DALI makes a million objects, all of which stay: to look through them
    again and again takes a fifth of the time until a command begins.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
