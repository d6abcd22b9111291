"""Recordings of any format and length to 16 kHz mono FLAC clips, in parallel, resumable.

An index (``index.jsonl`` in the output folder) says what every recording became. A line is added
after its clips are written, and clips appear in one move, so a run may be killed at any point: the
next one takes up what is finished and ends with the same result.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ssast.pipelines.audio.convert import Clip, Recipe, convert
from ssast.pipelines.audio.decode import Item
from ssast.pipelines.errors import DataError, UnusableError
from ssast.pipelines.files import usable_cores

AHEAD = 8  # recordings in flight per thread


@dataclass(frozen=True)
class Rejected:
    """A recording that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What became of the recordings.

    Attributes:
        clips: The clips, in the order of the recordings and their parts.
        rejected: The recordings that gave none, in order.
        num_reused: Recordings that an earlier run had finished.
    """

    clips: tuple[Clip, ...]
    rejected: tuple[Rejected, ...]
    num_reused: int

    @property
    def hours(self) -> float:
        """Length of all clips together."""
        return sum(clip.duration_s for clip in self.clips) / 3600

    @property
    def size_mib(self) -> float:
        """Size of all clips together."""
        return sum(clip.num_bytes for clip in self.clips) / 2**20


def prepare(
    items: Iterable[Item],
    out: Path,
    recipe: Recipe,
    *,
    jobs: int | None = None,
    progress: bool = True,
    title: str = "prepare",
) -> Report:
    """Converts recordings to clips below ``out/flac``, and skips what is done already.

    Args:
        items: The recordings; may be produced on the way.
        out: Output folder.
        recipe: The settings. Recordings that were done with others are done again.
        jobs: Threads; the number of usable cores by default.
        progress: Show a progress bar on stderr, if that is a terminal.
        title: Its text.

    Returns:
        The clips and the rejected recordings.

    Raises:
        DataError: Two recordings have one name.
        OSError: A file cannot be written.
    """
    jobs = jobs or usable_cores()
    index = Index(out / "index.jsonl", recipe)
    entries: list[dict] = []
    num_reused = 0
    total = len(items) if isinstance(items, Sequence) else None
    with (
        index,
        ThreadPoolExecutor(jobs, "prepare") as pool,
        tqdm(total=total, desc=title, unit=" files", disable=None if progress else True) as bar,
    ):
        running: deque[tuple[int, Future[dict]]] = deque()

        def finish_first() -> None:
            place, future = running.popleft()
            entries[place] = future.result()
            index.add(entries[place])
            bar.update()

        try:
            for item, signature in signed(items):
                known = index.find(item.name, signature)
                if known is not None:
                    entries.append(known)
                    num_reused += 1
                    bar.update()
                    continue
                (out / "flac" / item.folder).mkdir(parents=True, exist_ok=True)
                entries.append({})
                job = pool.submit(entry_of, item, signature, out, recipe)
                running.append((len(entries) - 1, job))
                if len(running) >= AHEAD * jobs:
                    finish_first()
            while running:
                finish_first()
        finally:
            for _, future in running:
                future.cancel()
    clips = [Clip(**clip) for entry in entries for clip in entry.get("clips", ())]
    rejected = [Rejected(e["name"], e["rejected"]) for e in entries if "rejected" in e]
    return Report(tuple(clips), tuple(rejected), num_reused)


def signed(items: Iterable[Item]) -> Iterator[tuple[Item, str]]:
    """Adds its signature to each item, and checks that names are unique."""
    names: set[str] = set()
    for item in items:
        if item.name in names:
            raise DataError(f"{item.name}: two recordings have this name")
        names.add(item.name)
        try:
            yield item, item.signature()
        except OSError as error:
            yield item, f"unreadable: {error.strerror}"


def entry_of(item: Item, signature: str, out: Path, recipe: Recipe) -> dict:
    """Converts one recording; returns its line of the index."""
    entry: dict = {"name": item.name, "signature": signature, "recipe": recipe.digest()}
    if signature.startswith("unreadable"):
        return entry | {"rejected": signature}
    try:
        return entry | {"clips": [asdict(clip) for clip in convert(item, out, recipe)]}
    except UnusableError as error:
        return entry | {"rejected": str(error)}


class Index:
    """What recordings became, one JSON object a line; a later line replaces an earlier one."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        """Reads the index, without a last line that a killed run left unfinished.

        Args:
            path: The file; it need not exist.
            recipe: Entries of other settings are ignored.
        """
        self.path = path
        self.recipe = recipe.digest()
        self.entries: dict[str, dict] = {}
        text = path.read_bytes() if path.exists() else b""
        self.num_bytes = text.rfind(b"\n") + 1
        for number, line in enumerate(text[: self.num_bytes].splitlines(), 1):
            try:
                entry = json.loads(line)
                self.entries[entry["name"]] = entry
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path}: line {number} is damaged: delete this file") from error

    def __enter__(self) -> "Index":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab")
        self.file.truncate(self.num_bytes)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def find(self, name: str, signature: str) -> dict | None:
        """The entry of a recording, if it is unchanged and its clips are all there."""
        entry = self.entries.get(name)
        if entry is None or entry["signature"] != signature or entry["recipe"] != self.recipe:
            return None
        for clip in entry.get("clips", ()):
            try:
                if (self.path.parent / clip["file"]).stat().st_size != clip["num_bytes"]:
                    return None
            except FileNotFoundError:
                return None
        return entry

    def add(self, entry: dict) -> None:
        """Appends an entry, and removes clips of the one it replaces that it does not have."""
        old = {clip["file"] for clip in self.entries.get(entry["name"], {}).get("clips", ())}
        for file in old - {clip["file"] for clip in entry.get("clips", ())}:
            (self.path.parent / file).unlink(missing_ok=True)
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()
        self.entries[entry["name"]] = entry
