"""The index of a prepared folder, its lists and its report, out of the sidecars of the shards."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssast.pipelines.clips.paths import absolute
from ssast.pipelines.clips.remote import is_url
from ssast.pipelines.clips.shards import (
    INDEX,
    LABELS,
    OVERFLOWS,
    RECORDINGS,
    REJECTED,
    REPORT,
    SHARD,
    SIDECAR,
    WRONG_LENGTHS,
)
from ssast.pipelines.clips.sidecar import Sidecar
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically
from ssast.pipelines.locks import LOCK
from ssast.pipelines.text import parse_json

# the report says that the others are there
LISTS = (REJECTED, WRONG_LENGTHS, OVERFLOWS, INDEX, RECORDINGS, LABELS, REPORT)


def place_of(source: str | Path) -> str:
    """Return where a source is, in full."""
    return str(source) if is_url(source) else absolute(source)


def check_own(out: Path) -> None:
    """Check that a folder holds nothing that a preparation would replace but did not write.

    Without a report, that of a preparation which was killed has its lock.

    Raises:
        DataError: It holds something else.
    """
    report, shards = out / REPORT, (out / SHARD).parent
    others: list[Path] = []
    if report.exists():
        others = [] if "shards" in _read_report(out) else [report]
    elif not (out / LOCK).exists():
        others = sorted(shards.iterdir()) if shards.exists() else []
        others += [out / name for name in LISTS if (out / name).exists()]
    if others:
        raise DataError(f"{others[0]}: not of ssast data prepare: choose another output folder")


def check_source(out: Path, source: str | Path) -> None:
    """Check that a folder does not hold what was prepared of another source.

    Raises:
        DataError: It does.
    """
    place, before = place_of(source), _read_report(out).get("source")
    if before not in (None, place):
        raise DataError(
            f"{out}: holds what was prepared of {before}, and nothing of {place}: choose another "
            "folder, or remove it"
        )


def _read_report(out: Path) -> dict[str, Any]:
    """Return the report of a folder; an empty one if there is none, or it is none."""
    try:
        found = parse_json((out / REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_index(
    out: Path,
    source: str | Path,
    num_shards: int,
    settings: dict[str, Any],
    has_labels: bool,
    drop_duplicates: bool,
) -> dict[str, Any]:
    """Write everything but the shards; files that are up to date stay untouched.

    Args:
        out: The prepared folder; all shards are finished.
        source: Source of the recordings, for messages and the report; ``out`` if there is no one
            place.
        num_shards: Number of shards.
        settings: Settings, for the report.
        has_labels: Whether the source has labels.
        drop_duplicates: Leave clips out whose samples came before.

    Returns:
        The report.

    Raises:
        DataError: No clip is left.
        OSError: A file cannot be written.
    """
    rows: list[np.ndarray] = []
    digests: list[bytes] = []
    recordings: list[int] = []
    durations: list[float] = []
    labels: list[tuple[str, ...]] = []
    rejected: list[str] = []
    wrong_lengths: list[str] = []
    overflows: list[str] = []
    reasons: Counter[str] = Counter()
    rates: Counter[int] = Counter()
    size = num_recordings = num_groups = 0
    left_out_s = 0.0
    previous = group = None  # a recording or sample, whose parts may lie in several shards
    for number in range(num_shards):
        sidecar = Sidecar.read(out / SIDECAR.format(number))
        size += sidecar.size
        rows.append(
            np.array([(number, c["offset"], c["size"]) for c in sidecar.clips], np.int64).reshape(
                -1, 3
            )
        )
        for clip in sidecar.clips:
            if clip["name"] != previous:
                previous = clip["name"]
                num_recordings += 1
                rates[clip["source_hz"]] += 1
            if clip.get("sample", clip["name"]) != group:
                group = clip.get("sample", clip["name"])
                num_groups += 1
            left_out_s += clip.get("left_out_s", 0.0)
            if "found_s" in clip:
                text = {key: clip[key] for key in ("name", "stated_s", "found_s")}
                text["name"] += clip.get("segment", "")
                wrong_lengths.append(json.dumps(text) + "\n")
            if "peak" in clip:
                text = {key: clip[key] for key in ("name", "part", "peak")}
                overflows.append(json.dumps(text) + "\n")
            recordings.append(num_groups - 1)
            durations.append(clip["duration_s"])
            digests.append(bytes.fromhex(clip["digest"]))
            if has_labels:
                labels.append(tuple(clip.get("labels", ())))
        for line in sidecar.rejected:
            text = {"name": line["name"], "reason": line["rejected"]}
            rejected.append(json.dumps(text) + "\n")
            reasons[kind_of(line["rejected"])] += 1
    files: dict[str, bytes | None] = {REJECTED: "".join(rejected).encode()}
    if not durations:
        _replace(out, files)
        first = json.loads(rejected[0]) if rejected else {"name": "?", "reason": "?"}
        raise DataError(
            f"{source}: none of {len(rejected)} recordings can be used, see {out / REJECTED}; "
            f"the first: {first['name']!r}: {first['reason']}"
        )
    _, first_of = np.unique(np.array(digests, "S16"), return_index=True)
    kept = np.sort(first_of) if drop_duplicates else np.arange(len(durations))
    files[WRONG_LENGTHS] = "".join(wrong_lengths).encode() if wrong_lengths else None
    files[OVERFLOWS] = "".join(overflows).encode() if overflows else None
    files[INDEX] = _npy(np.concatenate(rows)[kept])
    files[RECORDINGS] = _npy(np.array(recordings, np.int64)[kept])
    files[LABELS] = None
    if has_labels:
        names = sorted({name for given in labels for name in given})
        number_of = {name: number for number, name in enumerate(names)}
        numbers = [[number_of[name] for name in labels[place]] for place in kept]
        files[LABELS] = json.dumps({"names": names, "clips": numbers}).encode()
    report = {
        **({} if str(source) == str(out) else {"source": place_of(source)}),
        "clips": len(kept),
        "hours": round(float(np.array(durations)[kept].sum()) / 3600, 4),
        "mib": round(size / 2**20, 1),
        "shards": num_shards,
        "recordings": num_recordings,
        "source_rates_hz": {str(rate): rates[rate] for rate in sorted(rates)},
        "num_rejected": len(rejected),
        "rejected": dict(sorted(reasons.items())),
        "wrong_lengths": len(wrong_lengths),
        "overflows": len(overflows),
        "left_out_s": round(left_out_s, 1),
        "duplicates": len(durations) - len(first_of),
        "settings": settings,
    }
    files[REPORT] = (json.dumps(report, indent=1) + "\n").encode()
    _replace(out, files)
    return report


def remove_others(out: Path, num_shards: int) -> None:
    """Remove files of an earlier run with other settings, or of a killed one."""
    wanted = {Path(kind.format(n)).name for n in range(num_shards) for kind in (SHARD, SIDECAR)}
    for path in (out / SHARD).parent.iterdir():
        if path.name not in wanted and is_numbered(path):
            path.unlink()


def is_numbered(path: Path) -> bool:
    """Return whether a file has the name of a shard, of its sidecar or of a part of one."""
    return path.name.removeprefix(".tmp-").split(".")[0].isdigit()


def remarks(report: dict[str, Any], out: Path) -> Iterator[str]:
    """Yield a line about each thing in a report that its reader must know, and where it stands.

    Args:
        report: The report.
        out: The prepared folder, or its URL.
    """
    settings = report["settings"]
    if report["num_rejected"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report["rejected"].items())
        yield f"{report['num_rejected']} recordings cannot be used ({reasons}): {out / REJECTED}"
    if report["wrong_lengths"]:
        yield (
            f"{report['wrong_lengths']} of {report['recordings']} recordings have headers or "
            f"segments that state another length, and were read to their ends: "
            f"{out / WRONG_LENGTHS}"
        )
    if report["overflows"]:
        kept = settings["recipe"]["is_float"]
        what = "kept" if kept else "scaled down to it: see --codec float"
        yield f"{report['overflows']} clips have peaks beyond full scale, {what}: {out / OVERFLOWS}"
    if report.get("left_out_s", 0) >= 1:
        yield (
            f"{report['left_out_s']:.0f} s of other recordings' windows are left out: they hold "
            "nothing but silence, or too little sound"
        )
    if report["duplicates"]:
        what = "left out" if settings["drop_duplicates"] else "kept: see --drop-duplicates"
        yield f"{report['duplicates']} clips are exact duplicates of others, {what}"


def kind_of(reason: str) -> str:
    """Reduce a reason to its kind, without what is particular to a recording."""
    return re.sub(r"[0-9.]+", "N", reason.partition(": ")[0])


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _replace(out: Path, files: dict[str, bytes | None]) -> None:
    """Write the files whose content changed, the report last."""

    def found(name: str) -> bytes | None:
        return (out / name).read_bytes() if (out / name).exists() else None

    changed = [name for name, data in files.items() if found(name) != data]
    if not changed:
        return
    (out / REPORT).unlink(missing_ok=True)
    for name, data in files.items():
        if data is None:
            (out / name).unlink(missing_ok=True)
        elif name in changed or name == REPORT:
            write_atomically(out / name, data, durable=True)
