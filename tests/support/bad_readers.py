"""Readers that fail in every way on some input, for the fuzzer to notice."""

import os
import signal
import time
from pathlib import Path

from ssast.benchmarks.fuzzing.reading import Reader
from ssast.pipelines.errors import DataError


def seeds() -> list[dict[str, bytes]]:
    return [{"a.json": b'{"size": 1}'}]


def refused_seeds() -> list[dict[str, bytes]]:
    return [{"a.json": b"refused"}]


def none() -> list[dict[str, bytes]]:
    return []


def read(folder: Path) -> None:
    """What a file asks for."""
    text = (folder / "a.json").read_text(errors="replace")
    if text == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "hang":
        time.sleep(60)
    if text == "memory":
        bytearray(b"x") * (120 * 2**20)
    if text == "claim":
        try:
            bytearray(2**45)
        except MemoryError as error:
            raise DataError("damaged") from error
    if text == "foreign":
        raise KeyError("size")
    if text == "endless message":
        raise DataError("x" * 50_000)
    if text == "refused":
        raise DataError("no such size")


BAD = Reader("bad", seeds, read)
UNREADABLE = Reader("unreadable", refused_seeds, read)


def fails_on_long(folder: Path) -> None:
    """A reader that is wrong for a mutation that comes up often."""
    if len((folder / "a.json").read_bytes()) > 1000:
        raise RuntimeError("too long for this reader")


LONG = Reader("long", seeds, fails_on_long)
MISSING = Reader("missing", none, read)
