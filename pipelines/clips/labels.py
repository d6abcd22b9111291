"""The labels of a clip: one name, several with separators between them, or a list."""

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, TypeGuard

from ssast.pipelines.clips.columns import LABEL_KEYS
from ssast.pipelines.clips.entries import Entries, Table
from ssast.pipelines.errors import DataError
from ssast.pipelines.text import parse_json, shown

log = logging.getLogger(__name__)

Names = tuple[str, ...]
_TEXT = r"""(?:'(?:[^'\\]|\\['"\\])*'|"(?:[^"\\]|\\['"\\])*")"""
LIST_LIKE = re.compile(r"\[\s*['\"\d].*\]", re.DOTALL)
ESCAPED = re.compile(r"""\\(['"\\])""")
PYTHON_LIST = re.compile(rf"\[\s*{_TEXT}(?:\s*,\s*{_TEXT})*\s*\]")  # as pandas writes a cell


class LabelReader:
    """The labels of the clips of a manifest, part by part.

    Args:
        source: The manifest, for messages.
        classes: Known names; see :func:`parse_labels`.
    """

    def __init__(self, source: str, classes: Collection[str] | None) -> None:
        self._source, self._classes = source, classes
        self._key: str | None = None
        self._others: tuple[str, ...] = ()  # keys of labels that no entry may have
        self._form = label_form(None, None)
        self._labels: list[Names] = []
        self._given: list[Any] = []  # what is parsed into them
        self._parsed: dict[str, tuple[str, Names]] = {}  # equal texts are kept once

    def begin(self, table: Table, separator: str | None) -> None:
        """Begin to read a table.

        Args:
            table: The table.
            separator: What separates labels in a text; None: what its form says.
        """
        columns = table.columns
        self._key = columns.labels
        self._others = LABEL_KEYS if "labels" not in columns.set_by_hand else ()
        published = table.published and columns.labels == LABEL_KEYS[0]
        self._form = label_form(columns.labels, separator or ("," if published else None))
        self._labels, self._given, self._parsed = [], [], {}

    def add(self, part: Entries) -> None:
        """Read the labels of more clips.

        Raises:
            DataError: A label is wrong, or some clips have labels and others have none.
        """
        for row, entry in enumerate(part.columns):
            if self._key is None:
                wrong = any(key in entry for key in self._others)
            else:
                wrong = self._key not in entry
            if wrong:
                raise DataError(
                    f"{self._source}: {part.where(row)}: expected all entries to have labels, or "
                    "none"
                )
            given: Any = None
            names: Names = ()
            if self._key is not None:
                try:
                    given, names = self._parse(entry[self._key])
                except ValueError as error:
                    raise DataError(
                        f"{self._source}: {part.where(row)}: {error}, found "
                        f"{shown(entry[self._key])}"
                    ) from error
            self._given.append(given)
            self._labels.append(names)

    def finish(self) -> tuple[Names, ...] | None:
        """Return the labels of all clips, None if they have none; warn of doubtful ones."""
        if self._key is None:
            return None
        if self._classes is None:
            found = doubtful(self._given, **self._form)
            if found is not None:
                message, count = found
                log.warning(
                    "%s: %d of %d clips: %s", self._source, count, len(self._given), message
                )
        return tuple(self._labels)

    def _parse(self, given: Any) -> tuple[Any, Names]:
        classes = self._classes or ()
        if not isinstance(given, str):
            return given, parse_labels(given, classes=classes, **self._form)
        if given not in self._parsed:
            self._parsed[given] = given, parse_labels(given, classes=classes, **self._form)
        return self._parsed[given]


def label_form(column: str | None, separator: str | None) -> dict[str, Any]:
    """Return how :func:`parse_labels` takes the texts of a column.

    Args:
        column: Name of the column: lists are expected in ``labels``.
        separator: What separates labels in a text, if that is known.
    """
    named = (column or "").strip().lower() == LABEL_KEYS[0]
    return {"separator": separator, "lists": named or separator is not None}


def parse_labels(
    given: Any,
    *,
    separator: str | None = ",",
    lists: bool = True,
    classes: Collection[str] = (),
) -> Names:
    """Return the labels of a clip, none for an empty text or list.

    Args:
        given: A whole number; a list of names and numbers, which are taken as they are; or a text.
        separator: What separates labels in a text; None: it is one label.
        lists: Whether a text may be a list, in JSON or as Python writes it.
        classes: Known names: one that holds separators is found before its parts are.

    Raises:
        ValueError: It is none of these, or a name is empty or not text.
    """
    if isinstance(given, str):
        listed = _listed(given) if lists else None
        if listed is None:
            return _split(given, separator, classes)
        given = listed
    elif _is_number(given):
        return (str(given),)
    names = [str(n) if _is_number(n) else n for n in given] if isinstance(given, list) else None
    if names is None or not all(map(is_name, names)):
        raise ValueError("expected labels: text, a whole number, or a list of them")
    return tuple(names)


def _is_number(given: Any) -> bool:
    return type(given) is int and abs(given) < 2**63


def format_labels(
    names: Sequence[str], classes: Collection[str] = (), separator: str | None = ","
) -> str:
    """Return a text from which :func:`parse_labels` reads the labels again, given these classes.

    Separators between the names, by default commas as in the published manifests; a JSON list where
    there is no separator, or a name would be read in another way.
    """
    text = (separator or "").join(names)
    parts = _split(text, separator, classes)
    if _listed(text) is None and parts == _split(text, separator, ()) == tuple(names):
        return text
    return json.dumps(list(names), ensure_ascii=False)


def is_name(name: Any) -> TypeGuard[str]:
    """Return whether this can be the name of a class: text that is not blank and can be written."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return False
    try:
        name.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half of a character, which a JSON escape can be
        return False
    return True


def doubtful(
    texts: Sequence[Any], *, separator: str | None, lists: bool = True
) -> tuple[str, int] | None:
    """Find texts whose separators may mean something else than they are taken for.

    Args:
        texts: What is given for each clip.
        separator: See :func:`parse_labels`.
        lists: See :func:`parse_labels`.

    Returns:
        A message, and the number of clips; None if there are none.
    """
    alone = Counter(t.strip() for t in texts if isinstance(t, str))
    given = {t: n for t, n in alone.items() if not (lists and _listed(t) is not None)}
    counts = Counter({t: n for t, n in given.items() if LIST_LIKE.fullmatch(t)})
    if counts:
        text = "{0}, not read as a list: those in a column 'labels' are, written ['a', 'b']"
    elif separator is not None:
        mark = f"{separator} "
        counts = Counter({t: n for t, n in given.items() if mark in t})
        text = "{0}, read as {1} labels: a name that holds commas goes into 'label', or in a list"
    else:
        names = frozenset(alone)
        separator = next((m for m in ",;|" if any(_is_split(t, m, names) for t in given)), ",")
        counts = Counter({t: n for t, n in given.items() if _is_split(t, separator, names)})
        text = f"{{0}}, read as one label: data.label_separator='{separator}' reads several"
    if not counts:
        return None
    first = next(iter(counts))
    return text.format(shown(first), len(_split(first, separator, ()))), counts.total()


def _is_split(text: str, mark: str, names: frozenset[str]) -> bool:
    """Return whether a text looks like several labels: they occur alone as well, or are a,b."""
    if mark not in text:
        return False
    return {*_split(text, mark, ())} <= names or (mark == "," and bool(re.search(r",\S", text)))


def _listed(text: str) -> list[Any] | None:
    """Return the names in a list, as JSON and Python write it; None if the text is no such list."""
    if not text.startswith("["):
        return None
    try:
        names = parse_json(text)
    except ValueError:
        if not PYTHON_LIST.fullmatch(text):  # a class may be called [noise]
            return None
        names = [ESCAPED.sub(r"\1", name[1:-1]) for name in re.findall(_TEXT, text)]
    return names if all(is_name(name) or _is_number(name) for name in names) else None


def _split(text: str, separator: str | None, classes: Collection[str]) -> Names:
    """Split at separators, but not inside of a known name; the longest name is found first."""
    parts = [text] if separator is None else text.split(separator)
    names: list[str] = []
    while parts:
        count = len(parts) if classes else 1
        while count > 1 and str(separator).join(parts[:count]).strip() not in classes:
            count -= 1
        name = str(separator).join(parts[:count]).strip()
        if name:
            names.append(name)
        del parts[:count]
    return tuple(names)
