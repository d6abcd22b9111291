"""Paths as tables give them: relative to the table, with ``~``, variables or ``file://``."""

import functools
import os
import re
from collections.abc import Iterable, Sequence
from urllib.parse import unquote, urlsplit

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})(?=/|$)")  # at the beginning alone
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
FILE_URL = re.compile(r"file:/|(?i:file)://")
# What is in paths between line breaks that os.path.normpath or resolve() may change; and in others.
UNUSUAL = ("//", "/\n", "/.", "\n.", "\n~", "\n$", "\nfile:/", "\0")


def are_plain(names: Sequence[str]) -> bool:
    """Return whether :func:`resolve` only puts the folder before these paths that are text."""
    text = "\n".join(("", *names, ""))
    return not any(mark in text for mark in UNUSUAL) and "" not in map(str.strip, names)


def resolve(name: str, folder: str, variables: set[str] | None = None) -> str:
    """Return the absolute path of a file that a table names.

    A ``~`` or a variable counts at the beginning alone, so that ``./~`` is a file of that name.

    Args:
        name: The path as given.
        folder: Absolute path of the table's folder.
        variables: Gets the environment variable that was put in, if any.

    Raises:
        ValueError: It is a URL, or a variable is not set; the message says so.
    """
    variable = None
    if FILE_URL.match(name):
        parts = urlsplit(name)
        if parts.netloc not in ("", "localhost"):
            raise ValueError("expected a file of this machine")
        name = unquote(parts.path, errors="surrogateescape")
    elif URL.match(name):
        raise ValueError(
            "expected a file: of what is behind URLs, prepared folders and shards are read"
        )
    elif name[:1] == "~":
        name, variable = os.path.expanduser(name), "HOME"
    elif found := VARIABLE.match(name):
        variable = found[1] or found[2]
        value = os.environ.get(variable)
        if value is None:
            raise ValueError(f"expected that the environment variable {variable} is set")
        name = value + name[found.end() :]
    if variable is not None and variables is not None:
        variables.add(variable)
    return absolute(os.path.join(folder, name))


def absolute(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a file, without ``..``.

    ``a/..`` is the folder above that which a link ``a`` leads to, as it is for the system.
    """
    if os.pardir not in os.fspath(path).split(os.sep):
        return os.path.abspath(path)
    text = os.path.join(os.getcwd(), path)
    folder, name = os.path.split(text)
    if name == os.pardir:
        return _folder(text)
    return os.path.normpath(os.path.join(_folder(folder), name))


@functools.lru_cache(maxsize=4096)
def _folder(path: str) -> str:
    plain, real = os.path.normpath(path), os.path.realpath(path)
    return plain if os.path.realpath(plain) == real else real


def values_of(variables: Iterable[str]) -> dict[str, str | None]:
    """Return the values of environment variables."""
    return {name: os.environ.get(name) for name in sorted(variables)}


def plain(name: str) -> str:
    """Return a path of a file from which :func:`resolve` makes the same file, whatever its name."""
    special = name[:1] in ("~", "$") or URL.match(name) or FILE_URL.match(name)
    return f"./{name}" if special else name
