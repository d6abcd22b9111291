"""The labels of a clip as text: one name, several with commas between them, or a JSON list."""

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, TypeGuard

from ssast.pipelines.clips.entries import LABEL_KEYS, Entries
from ssast.pipelines.errors import DataError
from ssast.pipelines.text import parse_json, shown

log = logging.getLogger(__name__)

Names = tuple[str, ...]


class LabelReader:
    """The labels of the clips of a manifest, part by part.

    Args:
        source: The manifest, for messages.
        classes: Known names; see :func:`parse_labels`.
    """

    def __init__(self, source: str, classes: Collection[str] | None) -> None:
        self._source, self._classes = source, classes
        self._key: str | None = None
        self._labels: list[Names] = []
        self._given: list[Any] = []  # what is parsed into them
        self._parsed: dict[str, tuple[str, Names]] = {}  # equal texts are kept once

    def add(self, part: Entries) -> None:
        """Read the labels of more clips.

        Raises:
            DataError: A label is wrong, or some clips have labels and others have none.
        """
        if not self._labels and part.columns:
            self._key = _label_key(part.columns[0])
        for row, entry in enumerate(part.columns):
            if _label_key(entry) != self._key:
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
            found = doubtful(self._given, several=self._several)
            if found is not None:
                message, count = found
                log.warning(
                    "%s: %d of %d clips: %s", self._source, count, len(self._given), message
                )
        return tuple(self._labels)

    @property
    def _several(self) -> bool:
        return self._key == LABEL_KEYS[0]

    def _parse(self, given: Any) -> tuple[Any, Names]:
        classes = self._classes or ()
        if not isinstance(given, str):
            return given, parse_labels(given, several=self._several, classes=classes)
        if given not in self._parsed:
            names = parse_labels(given, several=self._several, classes=classes)
            self._parsed[given] = given, names
        return self._parsed[given]


def _label_key(entry: dict[str, Any]) -> str | None:
    return next((key for key in LABEL_KEYS if key in entry), None)


def parse_labels(given: Any, *, several: bool = True, classes: Collection[str] = ()) -> Names:
    """Return the labels of a clip, none for an empty text or list.

    Args:
        given: A list of names, which are taken as they are; or a text.
        several: Whether commas in a text separate labels; otherwise it is one label.
        classes: Known names: one that holds commas is found before its parts are.

    Raises:
        ValueError: It is neither, or a name is empty or not text.
    """
    if isinstance(given, str) and several:
        names = _listed(given)
        if names is None:
            return _split(given, classes)
    elif isinstance(given, str):
        names = [given.strip()] if given.strip() else []
    else:
        names = given
    if not isinstance(names, list) or not all(map(is_name, names)):
        raise ValueError("expected comma-separated labels, or a list of them")
    return tuple(names)


def format_labels(names: Sequence[str], classes: Collection[str] = ()) -> str:
    """Return a text from which :func:`parse_labels` reads the labels again, given these classes.

    Commas between the names, as in the published manifests; a JSON list where a name would be read
    in another way.
    """
    text = ",".join(names)
    if _listed(text) is None and _split(text, classes) == _split(text, ()) == tuple(names):
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


def doubtful(texts: Sequence[Any], *, several: bool) -> tuple[str, int] | None:
    """Find texts whose commas may mean something else than they are taken for.

    Args:
        texts: What is given for each clip.
        several: See :func:`parse_labels`.

    Returns:
        A message, and the number of clips; None if there are none.
    """
    counts = Counter(t.strip() for t in texts if isinstance(t, str) and "," in t)
    if several:
        counts = Counter({t: n for t, n in counts.items() if ", " in t and _listed(t) is None})
        text = "{0}, read as {1} labels: a name that holds commas goes into 'label', or in a list"
    else:
        alone = {t.strip() for t in texts if isinstance(t, str)}
        counts = Counter(
            {t: n for t, n in counts.items() if re.search(r",\S", t) or {*_split(t, ())} <= alone}
        )
        text = "{0}, read as one label: several labels go into 'labels'"
    if not counts:
        return None
    first = next(iter(counts))
    return text.format(shown(first), len(_split(first, ()))), counts.total()


def _listed(text: str) -> list[Any] | None:
    """Return the names in a JSON list; None if the text is no such list."""
    if not text.startswith("["):
        return None
    try:
        names = parse_json(text)
    except ValueError:  # a class may be called [noise]
        return None
    return names if names and all(map(is_name, names)) else None


def _split(text: str, classes: Collection[str]) -> Names:
    """Split at commas, but not inside of a known name; the longest name is found first."""
    parts = text.split(",")
    names: list[str] = []
    while parts:
        count = len(parts) if classes else 1
        while count > 1 and ",".join(parts[:count]).strip() not in classes:
            count -= 1
        name = ",".join(parts[:count]).strip()
        if name:
            names.append(name)
        del parts[:count]
    return tuple(names)
