"""Recordings to shards of clips: in parallel, resumable, the same bytes whatever happens.

The recordings are sorted and dealt out to shards by their size, so what belongs in a shard depends
on the source alone. A shard is written to a temporary file by one thread and appears, and then its
sidecar, by renaming. A shard is finished if its sidecar has the digest of what it must be made of.
"""

import contextlib
import hashlib
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from ssast.pipelines.audio.convert import (
    Codec,
    Part,
    Recipe,
    SampleDigest,
    clip_stem,
    cut,
    encode,
)
from ssast.pipelines.audio.decode import length_s, suffix
from ssast.pipelines.audio.ffmpeg import ffmpeg_installed
from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.clips.folders import FFMPEG_SUFFIXES
from ssast.pipelines.clips.remote import as_path, is_url, on_disk
from ssast.pipelines.clips.segment import span_text
from ssast.pipelines.clips.shards import REPORT, SHARD, SIDECAR
from ssast.pipelines.clips.sidecar import BLOCK, Sidecar
from ssast.pipelines.cores import usable_cores
from ssast.pipelines.errors import DataError, UnusableError
from ssast.pipelines.files import replacing, write_atomically
from ssast.pipelines.locks import exclusive
from ssast.pipelines.prepare.index import check_source, remarks, remove_others, write_index
from ssast.pipelines.prepare.mirror import Mirror, local_folder
from ssast.pipelines.prepare.parquet import read_cell
from ssast.pipelines.prepare.recordings import Recording, find_recordings, with_unique_names
from ssast.pipelines.text import shows_progress

FORMAT = 4  # raise it when other bytes come out of the same recordings
STEM = 64  # characters of a recording's name in a clip's: a member's name has at most 100
PROBES = 64  # recordings whose headers are read to estimate how much will come out
FLAC_SHARE = 0.65  # bytes of 16 bit FLAC for one of samples, of speech and music with little noise
LOSSY_BYTES_PER_S = 16_000  # of a recording whose header only ffmpeg can read
LEAST_BYTES_PER_S = 500  # of any recording: a header that states more seconds is damaged


@dataclass(frozen=True)
class Packing:
    """Settings of shards.

    Attributes:
        recipe: Settings of the clips.
        codec: Codec of the clips; "float" goes with ``recipe.is_float``.
        shard_mib: MiB of recordings that go into a shard.
        drop_duplicates: Leave clips out of the index whose samples came before.
    """

    recipe: Recipe
    codec: Codec = "flac"
    shard_mib: float = 256
    drop_duplicates: bool = False

    def check(self) -> None:
        """Check that the settings are in range.

        Raises:
            DataError: For a setting out of range.
        """
        recipe = self.recipe
        for name, value in (
            ("clip-s", recipe.clip_s),
            ("hop-s", recipe.clip_s if recipe.hop_s is None else recipe.hop_s),
        ):
            if not 1 <= value * recipe.sample_rate_hz < 2**31:
                raise DataError(f"--{name} is {value:g}, expected a length in seconds above 0")
        if not 0 <= recipe.min_s <= recipe.clip_s:
            raise DataError(
                f"--min-s is {recipe.min_s:g}, expected 0 to --clip-s, {recipe.clip_s:g}"
            )
        if not 0 < self.shard_mib < 2**20:
            raise DataError(f"--shard-mib is {self.shard_mib:g}, expected a size above 0")
        if recipe.is_float != (self.codec == "float"):
            raise DataError(f"--codec is {self.codec}, expected float for clips of float samples")

    def settings(self) -> dict[str, Any]:
        """Return the settings for the report."""
        return asdict(self) | {"format": FORMAT}


def prepare_shards(
    source: str | Path,
    out: str | Path,
    packing: Packing,
    *,
    table: TableFormat = PLAIN,
    jobs: int | None = None,
    progress: bool = True,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Prepare recordings for training, as described in :mod:`ssast.pipelines.clips.shards`.

    Args:
        source: A folder, a manifest or a plain tar archive, see :func:`find_recordings`.
        out: Output folder; if it is a URL, nothing keeps two runs from writing to it at once.
        packing: The settings.
        table: What is set of the format of a manifest.
        jobs: Threads, each with a shard; the usable cores by default.
        progress: Show a progress bar on stderr, if that is a terminal.
        log: Gets a few lines of summary.

    Returns:
        The report.

    Raises:
        DataError: Wrong settings or source, no usable recording, too small a disk, or ``out``
            cannot be written to or holds something else.
    """
    source, out = as_path(source), as_path(out)
    packing.check()
    if jobs is not None and jobs < 1:
        raise DataError(f"--jobs is {jobs}, expected at least 1")
    with local_folder(out) as folder:
        recordings = find_recordings(source, folder, table)
        with exclusive(folder):
            mirror = Mirror(out, folder) if is_url(out) else None
            return pack_recordings(
                recordings, folder, packing, source, jobs, progress, log, mirror=mirror
            )


def pack_recordings(
    recordings: Sequence[Recording],
    folder: Path,
    packing: Packing,
    source: str | Path,
    jobs: int | None = None,
    progress: bool = True,
    log: Callable[[str], None] = print,
    *,
    mirror: Mirror | None = None,
) -> dict[str, Any]:
    """Pack recordings into shards, in the given order.

    Args:
        recordings: The recordings; later ones of equal names are numbered.
        folder: Output folder, which no other run writes to: see :func:`exclusive`.
        packing: The settings.
        source: Source of the recordings, for messages.
        jobs: Number of threads; that of the usable cores by default.
        progress: Show a progress bar on stderr, if that is a terminal.
        log: Gets a few lines of summary.
        mirror: Moves what is finished to a folder behind a URL.

    Returns:
        The report.

    Raises:
        DataError: No recording is usable, the disk is too small, or the folder has another source.
        OSError: A file cannot be written.
    """
    out = folder if mirror is None else mirror.remote
    groups = grouped(with_unique_names(recordings), round(packing.shard_mib * 2**20))
    digests = [digest(group, packing) for group in groups]
    missing = [n for n in range(len(groups)) if not is_finished(folder, n, digests[n])]
    if len(missing) == len(groups):
        check_source(out, source)
    if missing:
        if mirror is None:
            check_space(out, [item for n in missing for item in groups[n]], packing)
        else:
            mirror.reopen()
        (folder / REPORT).unlink(missing_ok=True)  # from here on unfinished
        work = [(n, groups[n], digests[n]) for n in missing]
        done = None if mirror is None else mirror.move
        make_shards(work, folder, packing, jobs or usable_cores(), progress, done)
    report = write_index(
        folder,
        source,
        len(groups),
        packing.settings(),
        any(recording.labels for recording in recordings),
        packing.drop_duplicates,
    )
    remove_others(folder, len(groups))  # now that no index speaks of them any more
    if mirror is not None:
        mirror.finish()
    log(
        f"{out}: {report['clips']} clips, {report['hours']:.2f} h in {len(groups)} shards, "
        f"{len(groups) - len(missing)} of them done before"
    )
    for line in remarks(report, out):
        log(line)
    return report


def grouped(recordings: Sequence[Recording], shard_bytes: int) -> list[list[Recording]]:
    """Group recordings into shards, in order; each shard gets at least one."""
    groups: list[list[Recording]] = []
    held = 0
    for recording in recordings:
        if not groups or held + recording.num_bytes > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(recording)
        held += recording.num_bytes + BLOCK  # so that nothing but empty files fills a shard too
    return groups


def digest(recordings: Sequence[Recording], packing: Packing) -> str:
    """Hash what a shard is made of: settings, names, signatures and labels."""
    kinds = {suffix(recording.item.name) for recording in recordings}
    helped = bool(kinds & FFMPEG_SUFFIXES) and ffmpeg_installed()
    made_of = hashlib.blake2b(digest_size=16)
    made_of.update(repr((FORMAT, packing.recipe.digest(), packing.codec, helped)).encode())
    for recording in recordings:
        parts = (recording.item.name, recording.signature, recording.labels)
        made_of.update(ascii(parts).encode())
    return made_of.hexdigest()


def is_finished(out: Path, number: int, wanted: str | None = None) -> bool:
    """Return whether a shard is there, in full and made of what is wanted.

    Args:
        out: The prepared folder.
        number: Number of the shard.
        wanted: Digest of what it must be made of; None for anything.
    """
    try:
        sidecar = Sidecar.read(out / SIDECAR.format(number))
        size = (out / SHARD.format(number)).stat().st_size
    except (OSError, DataError):
        return False
    as_wanted = wanted is None or (sidecar.digest == wanted and not sidecar.again)
    return as_wanted and sidecar.size == size and sidecar.is_whole()


def make_shards(
    work: Sequence[tuple[int, Sequence[Recording], str]],
    out: Path,
    packing: Packing,
    jobs: int,
    progress: bool,
    done: Callable[[int], None] | None = None,
) -> None:
    """Make shards in parallel.

    Args:
        work: (number, recordings, digest) of each.
        out: Output folder.
        packing: The settings.
        jobs: Threads.
        progress: Show a progress bar.
        done: Called with the number of each shard that is finished.

    Raises:
        OSError: A file cannot be written.
    """
    (out / SHARD).parent.mkdir(parents=True, exist_ok=True)
    total = sum(recording.num_bytes for _, group, _ in work for recording in group)
    stop, lock = threading.Event(), threading.Lock()
    so_far = {"clips": 0, "seconds": 0.0}
    with (
        tqdm(
            total=total,
            desc="prepare",
            unit="B",
            unit_scale=True,
            disable=not shows_progress(progress),
        ) as bar,
        ThreadPoolExecutor(jobs, "shard") as pool,
    ):

        def tick(num_bytes: int, clips: int, seconds: float) -> None:
            with lock:
                so_far["clips"] += clips
                so_far["seconds"] += seconds
                facts = f"{so_far['clips']} clips, {so_far['seconds'] / 3600:.2f} h"
                bar.set_postfix_str(facts, refresh=False)
                bar.update(num_bytes)

        def make(number: int, recordings: Sequence[Recording], made_of: str) -> None:
            make_shard(number, recordings, made_of, out, packing, tick, stop)
            if done is not None and not stop.is_set():
                done(number)

        futures = [pool.submit(make, *job) for job in work]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # after a failure, or an interrupt: the others shall not go on for minutes
            stop.set()
            for future in futures:
                future.cancel()
    for future in futures:
        if not future.cancelled():
            future.result()


def make_shard(
    number: int,
    recordings: Sequence[Recording],
    made_of: str,
    out: Path,
    packing: Packing,
    tick: Callable[[int, int, float], None],
    stop: threading.Event,
) -> None:
    """Make a shard and its sidecar; leave nothing behind if ``stop`` is set on the way.

    Raises:
        OSError: A file cannot be written.
    """
    shard, sidecar = out / SHARD.format(number), out / SIDECAR.format(number)
    clips: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    again = False
    with contextlib.suppress(CancelledError):
        with replacing(shard, durable=True) as temporary, open(temporary, "wb") as file:
            for recording in recordings:
                begin, num_before = file.tell(), len(clips)
                try:
                    if recording.problem is not None:
                        raise UnusableError(recording.problem)
                    for line in packed(recording, file, packing):
                        clips.append(line)
                        if stop.is_set():
                            raise CancelledError
                except UnusableError as error:
                    file.seek(begin)
                    file.truncate()
                    del clips[num_before:]
                    rejected.append({"name": recording.item.full_name, "rejected": str(error)})
                    again |= error.transient
                new = clips[num_before:]
                tick(recording.num_bytes, len(new), sum(clip["duration_s"] for clip in new))
                if stop.is_set():
                    raise CancelledError
            file.write(bytes(2 * BLOCK))
            size = file.tell()
            # Removed first: a sidecar describes the shard beside it, even after a loss of power.
            sidecar.unlink(missing_ok=True)
        text = Sidecar(made_of, size, clips, rejected, again).text()
        write_atomically(sidecar, text, durable=True)


def packed(recording: Recording, file: BinaryIO, packing: Packing) -> Iterator[dict[str, Any]]:
    """Append the clips of a recording to an open shard, and yields the sidecar's line of each.

    Raises:
        UnusableError: The recording cannot be used; what was appended must be cut off again.
        OSError: The shard cannot be written.
    """
    # Without dots: WebDataset takes what is before the first for the name of a sample.
    stem = clip_stem(recording.item.full_name, STEM).replace(".", "_")
    segment = recording.item.segment
    rate_hz = packing.recipe.sample_rate_hz
    for part, samples, source_hz, lengths, peak, left_out_s in fetched_and_cut(
        recording, packing.recipe
    ):
        data = encode(samples, rate_hz, packing.codec)
        member = tarfile.TarInfo(
            f"{stem}-{part:05d}.{'flac' if packing.codec == 'flac' else 'wav'}"
        )
        member.size = data.nbytes
        file.write(member.tobuf(tarfile.USTAR_FORMAT, "ascii"))
        offset = file.tell()
        file.write(data)
        file.write(bytes(-data.nbytes % BLOCK))
        line = {
            "file": member.name,
            "name": recording.item.name,
            "part": part,
            "duration_s": round(len(samples) / rate_hz, 4),
            "digest": SampleDigest().add(samples).text(),
            "offset": offset,
            "size": data.nbytes,
            "source_hz": source_hz,
        }
        if segment is not None:
            line["segment"] = span_text(segment.begin_s, segment.duration_s)
        line |= (lengths or {}) | ({} if peak is None else {"peak": round(peak, 4)})
        if left_out_s:
            line["left_out_s"] = round(left_out_s, 4)
        if recording.sample is not None:
            line["sample"] = recording.sample
        yield line | ({"labels": recording.labels} if recording.labels else {})


def fetched_and_cut(recording: Recording, recipe: Recipe) -> Iterator[Part]:
    """Yield the parts of a recording, see :func:`cut`; fetch it from a URL or a Parquet file.

    Raises:
        UnusableError: The recording cannot be used, or cannot be fetched now.
    """
    item = recording.item
    with contextlib.ExitStack() as stack:
        if is_url(item.data):
            try:
                item = replace(item, data=stack.enter_context(on_disk(item.data)))
            except OSError as error:
                why = f"cannot be fetched: {error.strerror or error}"
                raise UnusableError(why, transient=True) from error
        if recording.cell is not None:
            item = replace(item, data=read_cell(recording.cell))
        yield from cut(item, recipe)


def _is_file(recording: Recording) -> bool:
    """Return whether the header of a recording can be read before it is fetched."""
    return recording.cell is None and not is_url(recording.item.data)


def check_space(out: Path, recordings: Sequence[Recording], packing: Packing) -> None:
    """Estimate the size of the clips from the headers of some recordings.

    Raises:
        DataError: The disk has no room for that.
    """
    usable = [r for r in recordings if r.problem is None and _is_file(r)]
    seconds = num_bytes = 0.0
    for recording in usable[:: max(1, len(usable) // PROBES)]:
        length = length_s(recording.item)
        if suffix(recording.item.name) in FFMPEG_SUFFIXES:
            length = recording.num_bytes / LOSSY_BYTES_PER_S
        if length is not None:
            seconds += min(length, recording.num_bytes / LEAST_BYTES_PER_S)
            num_bytes += recording.num_bytes
    if not num_bytes:
        return
    seconds *= sum(recording.num_bytes for recording in usable) / num_bytes
    recipe = packing.recipe
    overlap = recipe.clip_s / (recipe.hop_s or recipe.clip_s)
    share = {"flac": FLAC_SHARE, "wav": 1.0, "float": 2.0}[packing.codec]
    needed = overlap * seconds * (2 * recipe.sample_rate_hz * share + 2 * BLOCK / recipe.clip_s)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"{out}: the clips need about {needed / 2**30:.1f} GiB, only {free / 2**30:.1f} GiB "
            "are free on this disk"
        )
