"""One reader of tables of clips, whatever their format."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

from ssast.pipelines.clips.columns import PLAIN, Columns, TableFormat, find_columns
from ssast.pipelines.clips.delimited import LISTS, SCP, open_delimited
from ssast.pipelines.clips.entries import (
    CLIP_KEY,
    PREPARED_KEY,
    Table,
    are_json_lines,
    json_entries,
    json_lines,
)
from ssast.pipelines.clips.parquet import open_parquet
from ssast.pipelines.errors import DataError

JSON, PARQUET = ".json", ".parquet"
JSON_LINES = (".jsonl", ".ndjson")
DELIMITED = (".csv", ".tsv", ".tab", ".psv", SCP, *LISTS)
SUFFIXES = (JSON, *JSON_LINES, *DELIMITED, PARQUET)


def is_table(path: Path) -> bool:
    """Return whether a file is a table of clips by the suffix of its name."""
    return path.suffix.lower() in SUFFIXES


def open_table(path: Path, table: TableFormat = PLAIN) -> Table:
    """Open a table of clips.

    Args:
        path: A file of one of :data:`SUFFIXES`.
        table: What is set of its format.

    Raises:
        DataError: It is not of this format, or does not say where its clips are.
        OSError: It cannot be read.
    """
    kind = path.suffix.lower()
    if kind == PARQUET:
        found = open_parquet(path, table)
    elif kind in DELIMITED:
        found = open_delimited(path, table)
    elif kind in JSON_LINES or are_json_lines(path, table.encoding):
        found = _with_columns(
            path, table, Table(Columns(None), json_lines(path, table.encoding), "JSON Lines")
        )
    else:
        besides, entries = json_entries(path, table.encoding)
        form = "JSON" if besides is not None else "JSON list"
        made = Table(Columns(None), entries, form, besides is not None, besides or {})
        found = _with_columns(path, table, made)
    if found.columns.wav is None:
        remedy = "data.columns={wav: NAME} names it"
        if {"supervisions", "recording"} <= set(found.columns.unused):
            remedy = "ssast data manifests lhotse makes a manifest of cuts"
        raise DataError(
            f"{path}: expected a column 'wav', 'path', 'file', ... of the clips, found "
            f"{list(found.columns.unused)!s:.200}; {remedy}"
        )
    return found


def _with_columns(path: Path, table: TableFormat, found: Table) -> Table:
    """Find the columns by the keys of the first entry."""
    first = next((part for part in found.entries if part.columns), None)
    if first is None:
        return replace(found, columns=Columns("wav"))
    entries = chain([first], found.entries)
    if PREPARED_KEY in found.besides:
        table = TableFormat({"wav": CLIP_KEY, **table.columns}, table.label_separator)
        if CLIP_KEY not in first.columns[0]:
            return replace(found, entries=entries, columns=Columns(CLIP_KEY))
    columns = find_columns(list(first.columns[0]), table, path)
    return replace(found, entries=entries, columns=columns)
