"""Data sets ready to train on: the demo's recordings, and any folder of audio.

Both end as the same files in an output folder::

    train.json  valid.json         pretraining, no overlap, exact duplicates dropped
    tasks/NAME_{train,eval}.json   labelled tasks; no evaluation clip is in train.json or valid.json
    flac/                          the clips, 16 kHz mono FLAC
    rejected.jsonl                 recordings that could not be used, and why
    report.json                    what was made; written last
    licences/                      copyright files of the demo's packages
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ssast.pipelines.audio.convert import Clip, Recipe, name_hash
from ssast.pipelines.audio.decode import Item
from ssast.pipelines.clips.manifest import AUDIO_SUFFIXES, audio_files, read_manifest
from ssast.pipelines.demo.archives import ARCHIVES, members
from ssast.pipelines.demo.flac_clips import Rejected, Report, prepare
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
from ssast.pipelines.demo.publish import (
    VALID_SHARE,
    Prepared,
    finished,
    publish,
    without_duplicates,
)
from ssast.pipelines.demo.sounds import STUDY_TASKS
from ssast.pipelines.demo.tasks import DEMO_TASKS, Label, Task, divide
from ssast.pipelines.errors import DataError, UnavailableError
from ssast.pipelines.files import exclusive, write_atomically

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
SYNTHESISED = re.compile(r"fillets-ng/sound/elk/|qabcs/abcs/\w+/sounds/|voices/festivoxmale/")
DEMO_VERSION = 2  # raise it when names, tasks or splits change


def fetch_demo(
    out: Path,
    cache: Path,
    *,
    jobs: int | None = None,
    progress: bool = True,
    packages: Sequence[str] = DEMO_PACKAGES,
    tasks: Sequence[Task] = DEMO_TASKS,
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
        tasks: The labelled tasks.
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
        facts = {"packages": versions}
        unheard = demo_evaluation(clips)
        return publish(out, clips, rejected, tasks, settings, facts, log, unheard=unheard)


def demo_evaluation(clips: Sequence[Clip]) -> list[Clip]:
    """What the demo's tasks evaluate on: no model of more recordings hears it in pretraining.

    With more recordings of a class, its task draws others, so these are not the same.
    """
    demo = [clip for clip in clips if clip.name.split("/")[0] in DEMO_PACKAGES]
    unique = without_duplicates(demo)
    return [clip for task in DEMO_TASKS for clip, _ in divide(task, unique)[1]]


def fetch_sounds(
    out: Path,
    cache: Path,
    *,
    jobs: int | None = None,
    progress: bool = True,
    log: Callable[[str], None] = print,
) -> Prepared:
    """Like :func:`fetch_demo`, with sounds of animals, things and drums, and tasks on them."""
    return fetch_demo(
        out,
        cache,
        jobs=jobs,
        progress=progress,
        packages=SOUND_PACKAGES,
        tasks=STUDY_TASKS,
        log=log,
    )


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
            if is_intact(deb):  # so it is the disk
                raise
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
            elif path.suffix in ARCHIVES:
                for member, data in members(path):
                    yield Item(f"{item_name}/{member}", data, name)


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
    if os.path.realpath(source) == os.path.realpath(out):
        raise DataError(f"{out}: the clips need a folder of their own, not that of the recordings")
    recipe = Recipe(clip_s=clip_s, min_s=min_s)
    if source.is_dir():
        paths: Sequence[str] = audio_files(source, leave_out=out)
        labels = None
        base = os.path.abspath(source)
    else:
        manifest = read_manifest(source)
        paths, labels = [str(path) for path in manifest.paths], manifest.labels
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
        report = prepare(items, out, recipe, jobs=jobs, progress=progress, title="clips")
        if report.rejected:
            log(
                f"{len(report.rejected)} of {len(items)} recordings cannot be used, "
                f"see {out / 'rejected.jsonl'}; the first: {report.rejected[0].name!r}: "
                f"{report.rejected[0].reason}"
            )
        settings = {"made_of": str(source), "recipe": recipe.digest()}
        tasks = [task] if task else []
        return publish(out, report.clips, report.rejected, tasks, settings, {}, log, valid_share)
