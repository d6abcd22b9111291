"""Paths as tables give them: relative to the table, with ``~``, variables or ``file://``."""

import os
import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})(?=/|$)")  # at the beginning alone
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# What resolve() does more to than to put the folder before: //, a/../b, ~/a, $X/a, s3://a, file:a.
# Names that hold line breaks may match as well.
UNUSUAL = re.compile(r"//|/\.{0,2}$|/\.{1,2}/|^\.{1,2}(?:/|$)|^[~$]|^file:", re.MULTILINE | re.I)


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
    if name[:5].lower() == "file:" and name[5:6] == "/":
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
    return os.path.normpath(os.path.join(folder, name))


def values_of(variables: Iterable[str]) -> dict[str, str | None]:
    """Return the values of environment variables."""
    return {name: os.environ.get(name) for name in sorted(variables)}


def plain(name: str) -> str:
    """Return a path of a file from which :func:`resolve` makes the same file, whatever its name."""
    return f"./{name}" if name[:1] in ("~", "$") or URL.match(name) or _is_file_url(name) else name


def _is_file_url(name: str) -> bool:
    return name[:6].lower() == "file:/"
