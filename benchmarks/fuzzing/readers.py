"""The readers of files that a stranger may have made, each with its seeds."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ssast.benchmarks.fuzzing import seeds, sounds
from ssast.benchmarks.fuzzing.containers import packed, sealed
from ssast.benchmarks.fuzzing.reading import REFUSALS, Reader
from ssast.engine.errors import ConfigError
from ssast.pipelines.errors import DataError, UnusableError

MOST_CLIPS = 20  # of a data set that are read


def only(folder: Path) -> Path:
    """Return the one file of a folder."""
    (path,) = folder.iterdir()
    return path


def read_headers(folder: Path) -> None:
    """Find the length of a recording, of its bytes and within an archive."""
    from ssast.pipelines.audio.decode import Item, examine_item
    from ssast.pipelines.audio.headers import foreign_format
    from ssast.pipelines.audio.parts import Span

    path = only(folder)
    data = path.read_bytes()
    for content in (data, path, Span(path, 0, len(data))):
        known, head = examine_item(Item(path.name, content))
        foreign_format(head)
        if known is not None:
            known.note()
            if known.repair is not None:
                known.repair.applied(data)


def read_recording(folder: Path) -> None:
    """Decode a recording with libsndfile, as a file and within an archive."""
    from ssast.pipelines.audio.decode import Item, length_s, sndfile_blocks, to_mono
    from ssast.pipelines.audio.parts import Span

    path = only(folder)
    length_s(Item(path.name, path))
    for data in (path, Span(path, 0, path.stat().st_size)):
        for _ in to_mono(sndfile_blocks(Item(path.name, data))):
            pass


def read_foreign(folder: Path) -> None:
    """Convert a recording to clips, with ffmpeg where libsndfile does not know it."""
    from ssast.pipelines.audio.convert import Recipe, cut
    from ssast.pipelines.audio.decode import Item

    path = only(folder)
    for _ in cut(Item(path.name, path), Recipe(clip_s=0.1, min_s=0.01)):
        pass


def read_training_clip(folder: Path) -> None:
    """Read a clip for training, its start and another crop, and decode it here."""
    from ssast.kernels.fbank import FbankSpec
    from ssast.pipelines.audio.encoded import read_clip

    path, spec = only(folder), FbankSpec(num_frames=8)
    read_clip(str(path), spec)
    read_clip(str(path), spec, verify=True, crop=0.7)


def read_stream(folder: Path) -> None:
    """Read a clip and a good one through DALI, as training does."""
    import torch

    from ssast.kernels.fbank import FbankSpec
    from ssast.pipelines.stream.stream import AudioStream

    path, good = only(folder), folder / "good.wav"
    good.write_bytes(sounds.encoded("WAV", "PCM_16"))
    with AudioStream(
        (str(path), str(good)),
        FbankSpec(num_frames=12),
        batch_size=2,
        epochs=1,
        device=torch.device("cpu"),
        num_threads=1,
        read_ahead=0,
        max_rejected=1.0,
    ) as stream:
        batch = next(iter(stream))
        if not torch.isfinite(batch.fbank).all() or not batch.valid[1]:
            raise AssertionError("not finite, or the good clip is lost")
        for _, reason in stream.rejected.values():
            raise DataError(reason)


def read_archive(folder: Path) -> None:
    """Read the recordings of a tar archive, to prepare them and to train on them as they are."""
    from ssast.kernels.fbank import FbankSpec
    from ssast.pipelines.audio.decode import sndfile_blocks, to_mono
    from ssast.pipelines.audio.encoded import read_clip
    from ssast.pipelines.clips.manifest import read_manifest
    from ssast.pipelines.prepare.recordings import find_recordings, with_unique_names

    problem = None
    for recording in with_unique_names(find_recordings(only(folder), folder / "out"))[:50]:
        try:
            if recording.problem is not None:
                raise UnusableError(recording.problem)
            for _ in to_mono(sndfile_blocks(recording.item)):
                pass
        except UnusableError as error:
            problem = None if "link" in str(error) else error
    for clip in read_manifest(only(folder)).paths[:MOST_CLIPS]:
        read_clip(clip, FbankSpec(num_frames=8))
    if problem is not None:
        raise problem


def read_manifests(folder: Path) -> None:
    """Read a list of clips with its labels, or a table of classes."""
    from ssast.engine.data.labels import find_classes, read_labelled
    from ssast.pipelines.clips.manifest import read_manifest
    from ssast.pipelines.datasets.tables import class_table

    path = only(folder)
    if path.stem == "labels":
        class_table(path)
    elif read_manifest(path).labels is not None:
        read_labelled(str(path), find_classes(str(path), None), one_label=False)


def read_sound_table(folder: Path) -> None:
    """Read the recordings of a Parquet file, to prepare them."""
    from ssast.pipelines.audio.decode import Item, sndfile_blocks, to_mono
    from ssast.pipelines.prepare.parquet import read_cell
    from ssast.pipelines.prepare.recordings import find_recordings, with_unique_names

    for recording in with_unique_names(find_recordings(only(folder), folder / "out"))[:MOST_CLIPS]:
        if recording.problem is not None:
            raise UnusableError(recording.problem)
        assert recording.cell is not None
        for _ in to_mono(sndfile_blocks(Item(recording.item.name, read_cell(recording.cell)))):
            pass


def read_events(folder: Path) -> None:
    """Write manifests of marked events, and of windows with their labels."""
    from ssast.pipelines.datasets.annotations import Reading
    from ssast.pipelines.datasets.manifests import write_dataset

    name = "audacity" if (folder / "a.labels.txt").exists() else "raven"
    for out, reading in (("events", Reading()), ("windows", Reading(None, 0.05, None, "none"))):
        write_dataset(name, folder, folder / out, lambda line: None, reading)


def read_cuts(folder: Path) -> None:
    """Read cuts, whose files need not be there."""
    from ssast.pipelines.datasets.annotations import Reading
    from ssast.pipelines.datasets.cuts import read_lhotse

    read_lhotse(folder, Reading())


def read_configuration(folder: Path) -> None:
    """Read a configuration, and an accelerator's description."""
    from ssast.engine.config import dump_config, load_config
    from ssast.engine.monitoring.gpus import load_gpu

    path = only(folder)
    dump_config(load_config(path))
    with contextlib.suppress(ConfigError):
        load_gpu(str(path))


def read_prepared(folder: Path) -> None:
    """Open a prepared folder: index, labels, sidecars, the clips themselves; and check it."""
    from ssast.kernels.fbank import FbankSpec
    from ssast.pipelines.audio.encoded import read_clip
    from ssast.pipelines.clips.manifest import read_manifest
    from ssast.pipelines.clips.shards import ShardIndex
    from ssast.pipelines.prepare.check import check_data

    problems: list[Exception] = []

    def attempt(action: Callable[..., Any], *arguments: Any) -> None:
        try:
            action(*arguments)
        except REFUSALS as error:
            problems.append(error)

    for source in (folder / "data", folder / "picked.json"):
        attempt(read_manifest, source)
    attempt(partial(check_data, jobs=1, progress=False), folder / "data")
    index = ShardIndex(folder / "data")
    for action in (index.recordings, index.overlapping, index.without_duplicates, index.names):
        attempt(action)
    for row in range(min(len(index), MOST_CLIPS)):
        attempt(str, index[row])
        attempt(read_clip, index[row], FbankSpec(num_frames=8))
    if problems:
        raise problems[0]


def read_run(folder: Path) -> None:
    """Open a model out of a run, or exported weights."""
    from ssast.engine.checkpoints.store import Checkpoints
    from ssast.engine.formats.open import open_model

    open_model(folder / "run")
    found = Checkpoints(folder / "run/checkpoints")
    found.best()
    found.latest()


def read_weights(folder: Path) -> None:
    """Open a published model."""
    from ssast.engine.formats.open import MissingMetadata, open_model

    open_model(only(folder), MissingMetadata())


def read_transformers(folder: Path) -> None:
    """Open a folder of transformers."""
    from ssast.engine.formats.open import open_model

    open_model(folder)


READERS = {
    "headers": Reader("lengths by headers and frames", sounds.sound_files, read_headers, 40),
    "libsndfile": Reader("recordings, libsndfile", sounds.sound_files, read_recording, 40),
    "ffmpeg": Reader("recordings, ffmpeg", sounds.foreign_files, read_foreign, 10),
    "clips": Reader("clips while training", sounds.plain_files, read_training_clip, 20),
    "dali": Reader("clips through DALI", sounds.plain_files, read_stream, 8),
    "tar": Reader("tar archives of recordings", sounds.archives, read_archive, 20, packed),
    "shards": Reader("prepared folders", seeds.prepared_folders, read_prepared, 15, packed),
    "manifests": Reader("manifests, class tables", seeds.manifests, read_manifests, 20),
    "parquet": Reader("Parquet with sounds", seeds.sound_tables, read_sound_table, 10),
    "events": Reader("events of Raven and Audacity", seeds.event_tables, read_events, 10),
    "cuts": Reader("cuts of lhotse", seeds.cut_files, read_cuts, 10),
    "config": Reader("configurations", seeds.configurations, read_configuration, 10),
    "runs": Reader("runs and checkpoints", seeds.run_folders, read_run, 6, sealed),
    "weights": Reader("published weights", seeds.weight_files, read_weights, 7, packed),
    "transformers": Reader(
        "folders of transformers", seeds.transformers_folders, read_transformers, 4, packed
    ),
}
