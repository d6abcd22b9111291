"""The demo's data sets: recordings out of Debian packages, prepared as any others, and its tasks.

The output folder is a prepared folder (see :mod:`ssast.pipelines.clips.shards`) that also holds::

    train.json                     clips for pretraining; no evaluation clip of a task is in it
    tasks/NAME_{train,eval}.json   labelled tasks
    licences/                      copyright files of the packages
    demo.json                      what was made; written last
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.folders import AUDIO_SUFFIXES
from ssast.pipelines.demo.archives import ARCHIVES, members
from ssast.pipelines.demo.packages import (
    OWN_AUDIO,
    check_tools,
    copyright_file,
    download,
    is_intact,
    licences,
    package_version,
    unpack,
)
from ssast.pipelines.demo.publish import FACTS, TASKS, TRAIN, DemoData, finished, publish
from ssast.pipelines.demo.sounds import STUDY_TASKS
from ssast.pipelines.demo.tasks import DEMO_TASKS, Clip, Task, divide
from ssast.pipelines.errors import DataError, UnavailableError
from ssast.pipelines.files import cache_folder, check_new, write_atomically
from ssast.pipelines.locks import LOCK, exclusive
from ssast.pipelines.prepare.index import check_own
from ssast.pipelines.prepare.pack import Packing, pack_recordings
from ssast.pipelines.prepare.recordings import Recording, file_recording

DEMO_PACKAGES = (
    "gcin-voice",  # Mandarin syllables, two speakers
    "klettres-data",  # letters and syllables in 20 languages
    "ktuberling-data",  # words in 24 languages
    "fillets-ng-data-nl",  # dialogue, two speakers
    "fillets-ng-data-cs",
    "flight-of-the-amazon-queen",  # English dialogue, many speakers
)
SOUND_PACKAGES = (
    *DEMO_PACKAGES,
    "tuxpaint-stamps-default",  # animals and things; their descriptions in eleven languages
    "hydrogen-drumkits",
    "sonic-pi-samples",  # drums, instruments, noises
    "qabcs-data",  # animals, instruments
    "scratch",  # all kinds of sounds
    "bucklespring-data",  # the keys of a keyboard
    "lincity-ng-data",  # machines, vehicles
    "minetest-data",  # steps, tools, doors
    "ufoai-sound",  # steps, shots, screams, machines
    "openarena-data",
    "freedoom",
    "lugaru-data",
    "scorched3d-data",
)
# Game speech is as loud as it was left; the ends of many clips are digital silence.
DEMO_RECIPE = Recipe(trim_db=60.0, level_rms=0.07)
SHARD_MIB = 16  # small ones, so that there is work for every core
SYNTHESISED = re.compile(r"fillets-ng/sound/elk/|qabcs/abcs/\w+/sounds/|voices/festivoxmale/")
DEMO_VERSION = 3  # raise it when names, tasks or splits change


def fetch_demo(
    out: Path,
    cache: Path | None = None,
    *,
    jobs: int | None = None,
    progress: bool = True,
    packages: Sequence[str] = DEMO_PACKAGES,
    tasks: Sequence[Task] = DEMO_TASKS,
    log: Callable[[str], None] = print,
) -> DemoData:
    """Download and prepare a few hours of real speech, with labelled tasks.

    A run that was killed goes on where it was; a finished one is only checked.

    Args:
        out: Output folder.
        cache: Folder that keeps the downloaded packages; ``packages`` in the cache if None.
        jobs: Number of threads; that of the usable cores by default.
        progress: Show a progress bar.
        packages: Debian packages.
        tasks: The labelled tasks.
        log: Called with one line for each package and task.

    Raises:
        DataError: No network, no apt, no package of these, or ``out`` cannot be written to.
    """
    out = Path(out)
    cache = cache_folder("packages") if cache is None else Path(cache).expanduser()
    packing = Packing(DEMO_RECIPE, shard_mib=SHARD_MIB, drop_duplicates=True)
    settings = {
        "made_of": list(packages),
        "recipe": DEMO_RECIPE.digest(),
        "version": DEMO_VERSION,
    }
    check_own(out)
    if not (out / LOCK).exists() and finished(out, settings) is None:  # no run was killed here
        check_new(out / name for name in (FACTS, TRAIN, TASKS))
    with exclusive(out):
        done = finished(out, settings)
        if done is not None:
            log(f"{out}: {done.num_clips} clips, {done.hours:.1f} h are there already")
            return done
        (out / FACTS).unlink(missing_ok=True)  # from here on unfinished
        check_tools()
        unpacked = out / ".unpacked"
        try:
            recordings, versions = find_recordings(packages, unpacked, out, cache, log)
            pack_recordings(recordings, out, packing, out, jobs, progress, log)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
        return publish(out, tasks, settings, {"packages": versions}, log, excluded=demo_evaluation)


def fetch_sounds(
    out: Path,
    cache: Path | None = None,
    *,
    jobs: int | None = None,
    progress: bool = True,
    log: Callable[[str], None] = print,
) -> DemoData:
    """Do as :func:`fetch_demo`, with sounds of animals, things and drums, and tasks on them."""
    return fetch_demo(
        out,
        cache,
        jobs=jobs,
        progress=progress,
        packages=SOUND_PACKAGES,
        tasks=STUDY_TASKS,
        log=log,
    )


def demo_evaluation(clips: Sequence[Clip]) -> list[Clip]:
    """Return what the demo's tasks evaluate on: no model of more recordings may train on it.

    With more recordings of a class, its task draws others, so these are not the same.
    """
    demo = [clip for clip in clips if clip.name.partition("/")[0] in DEMO_PACKAGES]
    return [clip for task in DEMO_TASKS for clip, _ in divide(task, demo)[1]]


def find_recordings(
    packages: Sequence[str],
    unpacked: Path,
    out: Path,
    cache: Path,
    log: Callable[[str], None],
) -> tuple[list[Recording], dict[str, str]]:
    """Download and unpack packages, and keep their copyright files.

    Args:
        packages: Names of the packages.
        unpacked: Folder for what is unpacked.
        out: Folder whose ``licences/`` gets the copyright files.
        cache: Folder that keeps the downloaded packages.
        log: Called with one line for each package.

    Returns:
        The recordings, package by package; and the version of each package.

    Raises:
        DataError: No network, or the distribution has none of the packages.
    """
    recordings: list[Recording] = []
    versions: dict[str, str] = {}
    with ThreadPoolExecutor(1, "download") as downloader:  # while the one before is unpacked
        debs = {name: downloader.submit(download, name, cache) for name in packages}
        try:
            for name, future in debs.items():
                try:
                    deb = future.result()
                except UnavailableError as error:
                    log(f"left out: {error}")
                    continue
                folder = unpacked / name
                unpack_whole(name, deb, folder, cache)
                licence = copyright_file(name, folder)
                text = licence.read_text("utf-8", "replace") if licence.exists() else ""
                write_atomically(out / "licences" / f"{name}.txt", text)
                found = list(package_recordings(name, folder))
                recordings += found
                versions[name] = package_version(deb)
                log(
                    f"{name} {versions[name]}: {deb.stat().st_size / 2**20:.0f} MiB, "
                    f"{len(found)} recordings, licence {', '.join(licences(text))}"
                )
        finally:
            for future in debs.values():
                future.cancel()
    if not versions:
        raise DataError(f"none of the demo's packages is in this distribution; {OWN_AUDIO}")
    return recordings, versions


def unpack_whole(name: str, deb: Path, folder: Path, cache: Path) -> None:
    """Unpack a package; download it again if its file is damaged."""
    try:
        unpack(deb, folder)
    except DataError:
        if is_intact(deb):  # so it is the disk
            raise
        deb.unlink()
        unpack(download(name, cache), folder)


def package_recordings(name: str, folder: Path) -> Iterator[Recording]:
    """Yield the recordings of an unpacked package, in the order of their names.

    Those inside the archives of games become files; all other files are removed.
    """
    for root, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            path = Path(root, file)
            item_name = f"{name}/{path.relative_to(folder).as_posix()}"
            if not path.is_symlink() and not SYNTHESISED.search(item_name):
                if path.suffix.lower() in AUDIO_SUFFIXES:
                    yield file_recording(item_name, path)
                    continue
                if path.suffix in ARCHIVES:
                    yield from archive_recordings(item_name, path)
            path.unlink()  # most of a game is no sound


def archive_recordings(name: str, archive: Path) -> Iterator[Recording]:
    """Yield the recordings of a game's archive, as files in a folder beside it."""
    folder = archive.with_name(f".{archive.name}")
    changed = archive.stat().st_mtime_ns
    for number, (member, data) in enumerate(members(archive)):
        folder.mkdir(exist_ok=True)
        path = folder / str(number)
        path.write_bytes(data)
        os.utime(path, ns=(changed, changed))  # when it is unpacked again, it is the same
        yield file_recording(f"{name}/{member}", path)
