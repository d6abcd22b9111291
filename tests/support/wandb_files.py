"""Read what Weights & Biases keeps of an offline run: records of Protocol Buffers in a LevelDB log.

https://github.com/google/leveldb/blob/main/doc/log_format.md, after a header of 7 bytes.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32768
FULL, LAST = 1, 4  # kinds of chunks that end a record


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        if BLOCK - place % BLOCK < HEADER:  # too small for another chunk
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
            parts = b""


def offline_runs(folder: Path) -> list[tuple[str, list[dict[str, float]]]]:
    """Return the id and the logged values of each offline run below a folder, oldest first."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        run_id, values = "", []
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                run_id = record.run.run_id
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                values.append({name: v for name, v in row.items() if not name.startswith("_")})
        found.append((run_id, values))
    return found
