"""The results of each machine: one JSON file under docs/performance/, which the page is made of."""

import json
import re
from pathlib import Path
from typing import Any, Protocol

from ssast.benchmarks.performance.store import MOST_OTHER, ResultStore, Scope
from ssast.engine.errors import ConfigError
from ssast.engine.settings import SIZES
from ssast.pipelines.files import write_atomically


class Results(Protocol):
    """Where the tables of a page take their results from."""

    @property
    def note(self) -> str:
        """What else is to be said of the results."""
        ...

    def read(self, section: str) -> dict[str, Any]:
        """Return the results of a section by key, as far as there are any."""
        ...


class Record:
    """The published results of one machine.

    Args:
        path: Its JSON file.

    Raises:
        ConfigError: The file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._content: dict[str, Any] = json.loads(path.read_text())
            self.machine: dict[str, Any] = self._content["machine"]
            self.scope = Scope(**self._content["scope"], sizes=self._sizes())
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged, delete it: {error!r}") from error

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Torch, commit, date and load of the measurements, the last ones last."""
        return self._content["measured"]

    @property
    def note(self) -> str:
        """What else is to be said of the results."""
        return self._content.get("note", "")

    def read(self, section: str) -> dict[str, Any]:
        """See :class:`Results`."""
        return self._content["sections"].get(section, {})

    def _sizes(self) -> tuple[str, ...]:
        return tuple(size for size in SIZES if f"step-{size}" in self._content["sections"])


def read_records(folder: Path) -> list[Record]:
    """Return the records of a folder, the one that was measured last at the end.

    Raises:
        ConfigError: A file is damaged.
    """
    records = [Record(path) for path in sorted(folder.glob("*.json"))]
    return sorted(records, key=lambda record: record.measured[-1]["date"])


def publish(store: ResultStore, folder: Path) -> Path:
    """Write the record of a machine from the files of its measurements, in place of an earlier one.

    Args:
        store: The measurements.
        folder: Folder of the records.

    Returns:
        Path of the record.

    Raises:
        ConfigError: Nothing is measured, a file is damaged, the files are of several machines, or
            other programs disturbed a case: such results are not published.
    """
    scope = store.scope()
    if scope is None:
        raise ConfigError(f"{store.folder}: no measurements of ssast bench performance there")
    if disturbed := store.disturbed():
        key, share = max(disturbed.items(), key=lambda item: item[1])
        raise ConfigError(
            f"{len(disturbed)} cases were disturbed by other programs, {key} most, which had "
            f"{share:.0%} of the machine (allowed: {MOST_OTHER:.0%}): the same command measures "
            "them again, once it is idle"
        )
    machines = store.machines()
    names = list(dict.fromkeys(machine["name"] for machine in machines))
    if len(names) > 1:
        raise ConfigError(
            f"{store.folder} was measured on {' and on '.join(names)}: measure each machine with "
            "an --out of its own"
        )
    facts = ("name", "cpu", "microarchitecture", "instructions", "cores")
    runs = [{key: m[key] for key in ("torch", "commit", "date", "load")} for m in machines]
    content = {
        "machine": {key: machines[0][key] for key in facts},
        "measured": sorted(runs, key=lambda run: run["date"]),
        "most_others": max(store.shares().values(), default=None),
        "scope": scope.case_settings(),
        "sections": {section: store.read(section) for section in store.sections()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem(names[0])}.json"
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path


def file_stem(name: str) -> str:
    """Return the file name of a machine's record, without its ending."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
