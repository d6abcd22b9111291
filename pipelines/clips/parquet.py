"""Parquet files of paths and labels, by pyarrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssast.pipelines.clips.columns import TableFormat, find_columns
from ssast.pipelines.clips.entries import BLOCK_ROWS, Entries, Table
from ssast.pipelines.errors import DataError, UnavailableError
from ssast.pipelines.files import open_regular
from ssast.pipelines.text import one_line


def parquet_file(path: Path) -> Any:
    """Open a Parquet file: a ``pyarrow.parquet.ParquetFile``.

    Raises:
        UnavailableError: pyarrow is not installed.
        DataError: It is no Parquet file.
        OSError: It cannot be read.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UnavailableError(
            f"{path}: Parquet needs pyarrow: pip install 'ssast-engine[parquet]'"
        ) from error
    try:
        file = pq.ParquetFile(pa.PythonFile(open_regular(path)))
        assert file.schema_arrow is not None  # read here, with its errors
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path}: not a Parquet file: {one_line(error):.200}") from error
    return file


def sound_column(schema: Any) -> str | None:
    """Return the first column of sounds, structures with a field ``bytes``; None without one."""
    import pyarrow as pa

    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            kind = field.type.field("bytes").type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return str(field.name)
    return None


def open_parquet(path: Path, table: TableFormat) -> Table:
    """Open a Parquet file of paths; its rows are ``row 0``, ``row 1``, ...

    Raises:
        UnavailableError: pyarrow is not installed.
        DataError: It is no Parquet file, or its column of clips holds no text.
        OSError: It cannot be read.
    """
    file = parquet_file(path)
    import pyarrow as pa

    schema = file.schema_arrow
    sounds = sound_column(schema)
    if sounds is not None and "wav" not in table.columns:
        raise DataError(
            f"{path}: holds the sounds themselves, in the column {sounds!r}: ssast data prepare "
            "makes shards of them, with their labels"
        )
    columns = find_columns(schema.names, table, path)
    if columns.wav is not None:
        kind: Any = schema.field(columns.wav).type
        while pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"{path}: expected paths in the column {columns.wav!r}, found {kind!s:.80}; "
                "data.columns={wav: NAME} names another column"
            )

    def entries() -> Iterator[Entries]:
        done = 0
        try:
            for batch in file.iter_batches(BLOCK_ROWS, columns=list(columns.used)):
                rows = batch.to_pylist()
                if columns.labels is not None:  # null is what an empty cell of a CSV is
                    rows = [
                        row if row[columns.labels] is not None else row | {columns.labels: ""}
                        for row in rows
                    ]
                yield Entries(rows, range(done, done + len(rows)), "row")
                done += len(rows)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: damaged after row {done}: {one_line(error):.200}") from error

    return Table(columns, entries(), "Parquet")
