"""Data sets ready to train on: the demo's recordings, and any folder of audio.

Both end as the same files in an output folder::

    train.json  valid.json         pretraining, no overlap, exact duplicates dropped
    tasks/NAME_{train,eval}.json   labelled tasks; no evaluation clip is in train.json or valid.json
    flac/                          the clips, 16 kHz mono FLAC
    rejected.jsonl                 recordings that could not be used, and why
    report.json                    what was made; written last
    licences/                      copyright files of the demo's packages
"""

import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ssast.pipelines.batch import DataError
from ssast.pipelines.convert import Clip, Item, Recipe, name_hash
from ssast.pipelines.manifest import (
    AUDIO_SUFFIXES,
    audio_files,
    read_manifest,
    write_atomically,
    write_manifest,
)
from ssast.pipelines.packages import (
    OWN_AUDIO,
    UnavailableError,
    check_tools,
    copyright_file,
    download,
    licences,
    package_version,
    unpack,
)
from ssast.pipelines.prepare import (
    Rejected,
    Report,
    exclusive,
    prepare,
    split,
    without_duplicates,
)
from ssast.pipelines.tasks import DEMO_TASKS, Label, Task, divide

DEMO_PACKAGES = (
    "gcin-voice",  # Mandarin syllables, two speakers
    "klettres-data",  # letters and syllables in 20 languages
    "ktuberling-data",  # words in 24 languages
    "fillets-ng-data-nl",  # dialogue, two speakers
    "fillets-ng-data-cs",
    "flight-of-the-amazon-queen",  # English dialogue, many speakers
)
# Game speech is as loud as it was left; the ends of many clips are digital silence.
DEMO_RECIPE = Recipe(trim_db=60.0, level_rms=0.07)
SYNTHESISED = re.compile(r"fillets-ng/sound/elk/")
DEMO_VERSION = 1  # raise it when names, tasks or splits change
VALID_SHARE = 0.03


@dataclass(frozen=True)
class Prepared:
    """A data set on disk.

    Attributes:
        train: Manifest for pretraining.
        valid: Manifest of held-out clips.
        tasks: (training, evaluation) manifests by task.
        num_clips: Clips in ``train`` and ``valid``.
        hours: Their length.
    """

    train: Path
    valid: Path
    tasks: dict[str, tuple[Path, Path]]
    num_clips: int
    hours: float


def fetch_demo(
    out: Path,
    cache: Path,
    *,
    jobs: int | None = None,
    progress: bool = True,
    packages: Sequence[str] = DEMO_PACKAGES,
    log: Callable[[str], None] = print,
) -> Prepared:
    """Downloads and prepares a few hours of real speech, with labelled tasks.

    A run that was killed is continued, a finished one is only checked.

    Args:
        out: Output folder.
        cache: Folder that keeps the downloaded packages.
        jobs: Threads; the number of usable cores by default.
        progress: Show progress bars.
        packages: Debian packages.
        log: Gets one line for each package and task.

    Returns:
        Where the manifests are.

    Raises:
        DataError: No network, no apt, no package of these, or ``out`` cannot be written to.
    """
    out, cache = Path(out), Path(cache)
    settings = {
        "made_of": list(packages),
        "recipe": DEMO_RECIPE.digest(),
        "version": DEMO_VERSION,
    }
    with exclusive(out):
        done = finished(out, settings)
        if done is not None:
            log(f"{out}: {done.num_clips} clips, {done.hours:.1f} h are there already")
            return done
        check_tools()
        clips: list[Clip] = []
        rejected: list[Rejected] = []
        versions: dict[str, str] = {}
        with ThreadPoolExecutor(1, "download") as downloader:  # ahead of the conversion
            debs = {name: downloader.submit(download, name, cache) for name in packages}
            try:
                for name in packages:
                    try:
                        deb = debs[name].result()
                    except UnavailableError as error:
                        log(f"left out: {error}")
                        continue
                    report, licence = convert_package(name, deb, out, cache, jobs, progress)
                    versions[name] = package_version(deb)
                    clips += report.clips
                    rejected += report.rejected
                    log(
                        f"{name} {versions[name]}: {deb.stat().st_size / 2**20:.0f} MiB, "
                        f"{len(report.clips)} clips, {report.hours:.2f} h, licence {licence}"
                    )
            finally:
                for future in debs.values():
                    future.cancel()
        if not versions:
            raise DataError(f"none of the demo's packages is in this distribution; {OWN_AUDIO}")
        return publish(out, clips, rejected, DEMO_TASKS, settings, {"packages": versions}, log)


def convert_package(
    name: str, deb: Path, out: Path, cache: Path, jobs: int | None, progress: bool
) -> tuple[Report, str]:
    """Converts the recordings of a package, and keeps its copyright file.

    Args:
        name: Package.
        deb: Its file in the cache; downloaded again if it is damaged.
        out: Output folder.
        cache: Folder for packages.
        jobs: Threads.
        progress: Show a progress bar.

    Returns:
        (the clips, names of the licences).
    """
    folder = out / ".unpacked" / name
    try:
        try:
            unpack(deb, folder)
        except DataError:
            deb.unlink()
            unpack(download(name, cache), folder)
        licence = copyright_file(name, folder)
        text = licence.read_text(encoding="utf-8", errors="replace") if licence.exists() else ""
        write_atomically(out / "licences" / f"{name}.txt", text)
        items = list(package_items(name, folder))
        report = prepare(items, out, DEMO_RECIPE, jobs=jobs, progress=progress, title=name)
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)
    return report, ", ".join(licences(text))


def package_items(name: str, folder: Path) -> Iterator[Item]:
    """The recordings of an unpacked package, in the order of their names."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            path = Path(root, file)
            item_name = f"{name}/{path.relative_to(folder).as_posix()}"
            if path.is_symlink() or SYNTHESISED.search(item_name):
                continue
            if path.suffix.lower() in AUDIO_SUFFIXES:
                yield Item(item_name, path, name)
            elif file == "queen.1c":
                for member, data in queen_members(path.read_bytes()):
                    yield Item(f"{item_name}/{member}", data, name)


def queen_members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Speech of Flight of the Amazon Queen: MP3 members (``*.SB``) of its one archive.

    The archive opens with a 15 byte header and a table of 21 byte entries: name padded with zeros
    (12 bytes), bundle (1), offset (4, big endian), size (4). The table ends where no name stands.
    """
    place = 15
    while re.fullmatch(rb"[0-9A-Z_.$ ~\x00-]{12}", archive[place : place + 12]):
        name = archive[place : place + 12].rstrip(b"\0").decode("ascii")
        offset, size = struct.unpack(">II", archive[place + 13 : place + 21])
        place += 21
        if name.endswith(".SB"):
            yield name, archive[offset : offset + size]


def prepare_folder(
    source: Path,
    out: Path,
    *,
    jobs: int | None = None,
    progress: bool = True,
    clip_s: float = 10.0,
    min_s: float = 0.1,
    valid_share: float = VALID_SHARE,
    log: Callable[[str], None] = print,
) -> Prepared:
    """Prepares a user's audio: a folder, or a manifest (with labels: also a task ``labels``).

    Recordings that cannot be used are reported in ``rejected.jsonl``, and only fatal if no two
    clips are left. A run that was killed is continued; unchanged recordings are not done again.

    Args:
        source: A folder (with folders below it), or a manifest as :func:`read_manifest` takes it.
        out: Output folder.
        jobs: Threads; the number of usable cores by default.
        progress: Show a progress bar.
        clip_s: Longer recordings are cut into clips of this length.
        min_s: Shorter recordings are rejected.
        valid_share: Share of the recordings to hold out.
        log: Gets a few lines of summary.

    Returns:
        Where the manifests are.

    Raises:
        DataError: There is no audio in the folder, hardly any of it can be used, or ``out`` cannot
            be written to.
    """
    source, out = Path(source), Path(out)
    recipe = Recipe(clip_s=clip_s, min_s=min_s)
    if source.is_dir():
        paths: Sequence[str] = audio_files(source, leave_out=out)
        labels = None
        base = os.path.abspath(source)
    else:
        manifest = read_manifest(source)
        paths, labels = manifest.paths, manifest.labels
        base = os.path.abspath(source.parent)
    names = [os.path.relpath(path, base) for path in paths]
    items = [
        Item(name, Path(path), name_hash(name)[:2]) for name, path in zip(names, paths, strict=True)
    ]
    task = None
    if labels is not None:
        label_of = {n: Label(",".join(given), n) for n, given in zip(names, labels, strict=True)}
        task = Task("labels", f"the labels of {source}", label_of.get, 2, len(paths) * 10**6)
    with exclusive(out):
        report = prepare(items, out, recipe, jobs=jobs, progress=progress, title=source.name)
        if report.rejected:
            log(
                f"{len(report.rejected)} of {len(items)} recordings cannot be used, "
                f"see {out / 'rejected.jsonl'}; the first: {report.rejected[0].name}: "
                f"{report.rejected[0].reason}"
            )
        settings = {"made_of": str(source), "recipe": recipe.digest()}
        tasks = [task] if task else []
        return publish(out, report.clips, report.rejected, tasks, settings, {}, log, valid_share)


def publish(
    out: Path,
    clips: Iterable[Clip],
    rejected: Iterable[Rejected],
    tasks: Iterable[Task],
    settings: dict,
    facts: dict,
    log: Callable[[str], None],
    valid_share: float = VALID_SHARE,
) -> Prepared:
    """Writes the manifests, and last the report that says that all is done.

    Args:
        out: Output folder.
        clips: All clips.
        rejected: Recordings that cannot be used.
        tasks: The labelled tasks.
        settings: What identifies this data set, see :func:`finished`.
        facts: More for the report.
        log: Gets one line for each task and for the whole.
        valid_share: Share to hold out.

    Raises:
        DataError: Fewer than two clips are left.
    """
    lines = [json.dumps({"name": r.name, "reason": r.reason}) + "\n" for r in rejected]
    write_atomically(out / "rejected.jsonl", "".join(lines))
    (out / "report.json").unlink(missing_ok=True)
    all_clips = list(clips)
    unique = without_duplicates(all_clips)
    held: set[str] = set()
    task_files: dict[str, list[str]] = {}
    for task in tasks:
        train_part, eval_part = divide(task, unique)
        if not eval_part:
            log(f"task {task.name}: left out, too few labelled clips")
            continue
        held |= {clip.file for clip, _ in eval_part}
        task_files[task.name] = []
        for kind, part in (("train", train_part), ("eval", eval_part)):
            file = f"tasks/{task.name}_{kind}.json"
            labels = [label.split(",") for _, label in part]
            write_manifest(out / file, (f"../{clip.file}" for clip, _ in part), labels)
            task_files[task.name].append(file)
        log(
            f"task {task.name}: {task.what}; {len({label for _, label in eval_part})} classes, "
            f"{len(train_part)} + {len(eval_part)} clips"
        )
    rest = [clip for clip in unique if clip.file not in held]
    try:
        train, valid = split(rest, valid_share)
    except DataError as error:
        raise DataError(f"{settings['made_of']}: {error}; see {out / 'rejected.jsonl'}") from None
    write_manifest(out / "train.json", (clip.file for clip in train))
    write_manifest(out / "valid.json", (clip.file for clip in valid))
    hours = sum(clip.duration_s for clip in rest) / 3600
    report = {
        "settings": settings,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "num_train": len(train),
        "num_valid": len(valid),
        "num_held_for_tasks": len(held),
        "num_duplicates": len(all_clips) - len(unique),
        "num_rejected": len(lines),
        "hours": round(hours, 4),
        "tasks": task_files,
        **facts,
    }
    write_atomically(out / "report.json", json.dumps(report, indent=2) + "\n")
    log(f"{out}: {len(train)} clips to train on, {len(valid)} held out, {hours:.2f} h")
    done = finished(out, settings)
    assert done is not None
    return done


def finished(out: Path, settings: dict) -> Prepared | None:
    """The data set in ``out``, if it was made with these settings and every clip is there."""
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if report["settings"] != settings:
            return None
        tasks = {name: (out / files[0], out / files[1]) for name, files in report["tasks"].items()}
        manifests = [
            out / "train.json",
            out / "valid.json",
            *(f for t in tasks.values() for f in t),
        ]
        clips = {path for manifest in manifests for path in read_manifest(manifest).paths}
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # not finished, or tampered with
        return None
    if not all(map(os.path.isfile, clips)):
        return None
    count = report["num_train"] + report["num_valid"]
    return Prepared(out / "train.json", out / "valid.json", tasks, count, report["hours"])
