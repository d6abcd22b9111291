"""Tar archives of others: written by webdataset, indexed once, trained on, predicted, prepared."""

import io
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fsspec.implementations.memory import MemoryFileSystem
from sounds import tone

from ssast.engine.config import Config
from ssast.engine.data.clips import find_clips
from ssast.engine.data.labels import find_classes, read_labelled
from ssast.engine.evaluation import predict
from ssast.engine.settings import Data
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.audio.encoded import read_clip
from ssast.pipelines.clips import tar_index
from ssast.pipelines.clips.manifest import read_clips, read_manifest
from ssast.pipelines.clips.members import LONGEST_LABEL, parse_sample
from ssast.pipelines.clips.mix import fingerprint, is_remote, select
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.clips.tars import TarClip, TarIndex, find_files
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.check import check_data
from ssast.pipelines.prepare.pack import Packing, prepare_shards
from ssast.pipelines.stream.stream import AudioStream

SPEC = FbankSpec(num_frames=20)


def flac(seed: int, samples: int = 4000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(samples, seed=seed), 16000, format="FLAC")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **settings) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def old(path: Path) -> Path:
    """Make a file one that was not just changed, so that its index is kept."""
    os.utime(path, (1e9, 1e9))
    return path


def webdataset_tars(folder: Path, count: int = 3, each: int = 4) -> list[Path]:
    """Archives as webdataset writes them: FLAC with a class in JSON."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for n in range(count):
        path = folder / f"shard-{n:06d}.tar"
        with webdataset.TarWriter(str(path)) as writer:
            for k in range(each):
                seed = n * each + k
                label = {"label": ("cat", "dog, loud")[seed % 2], "text": "a caption"}
                writer.write({"__key__": f"a/{k:04d}", "flac": flac(seed), "json": label})
        paths.append(old(path))
    return paths


def test_archives_of_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All names for them give the same clips with their labels; each is opened once a machine."""
    paths = webdataset_tars(tmp_path / "in")
    opened: list[str] = []
    open_tar = tar_index.open_tar
    monkeypatch.setattr(
        tar_index, "open_tar", lambda path: (opened.append(path), open_tar(path))[1]
    )
    monkeypatch.chdir(tmp_path)
    names = ["in/shard-{000000..000002}.tar", f"{tmp_path}/in/*.tar", "in", Path("in")]
    for name in names:
        manifest = read_manifest(name)
        assert [str(clip) for clip in manifest.paths] == [
            f"{path}: a/{k:04d}.flac" for path in paths for k in range(4)
        ]
        assert manifest.labels == tuple((("cat", "dog, loud")[n % 2],) for n in range(12))
        for row, clip in enumerate(manifest.paths):
            assert isinstance(clip, TarClip) and clip.read() == flac(row)
        assert fingerprint(read_clips(name)) == fingerprint(manifest.paths)
    assert sorted(opened) == sorted(map(str, paths))
    assert find_classes("in", None) == ("cat", "dog, loud")
    assert len(read_labelled("in", ("cat", "dog, loud"), one_label=True).paths) == 12
    assert list(map(str, predict.find_files(["in/*.tar"]))) == list(map(str, read_clips("in")))


def test_they_stream_and_hold_out_like_shards(tmp_path: Path) -> None:
    """A shuffled epoch reads each clip once; one that starts in the middle goes on alike."""
    webdataset_tars(tmp_path / "in")
    config = Config(data=Data(train=str(tmp_path / "in/*.tar"), valid_share=0.25))
    train, held = find_clips(config)
    assert isinstance(train, TarIndex) and (len(train), len(held)) == (9, 3)
    assert not set(map(str, train)) & set(map(str, held))

    def batches(start: int, count: int) -> list[tuple[list[int], torch.Tensor]]:
        with AudioStream(
            train, SPEC, batch_size=3, start=start, device=torch.device("cpu"), num_threads=1
        ) as stream:
            found = iter(stream)
            return [
                (b.clip_ids.tolist(), b.fbank.clone()) for b in (next(found) for _ in range(count))
            ]

    whole = batches(0, 5)
    assert sorted(n for ids, _ in whole[:3] for n in ids) == list(range(9))
    for (ids, fbank), (again, same) in zip(whole[3:], batches(9, 2), strict=True):
        assert ids == again and torch.equal(fbank, same)


LABELS = [
    (".json", b'{"label": "a, b"}', ("a, b",)),
    (".json", b'{"labels": ["a", "b", "a"], "label": "c"}', ("a", "b")),
    (".json", b'{"cls": 7}', ("7",)),
    (".json", b"3", ("3",)),
    (".json", b'["x", 4]', ("x", "4")),
    (".json", b'{"text": "a caption"}', None),
    (".cls", b"12\n", ("12",)),
    (".cls", b"\xef\xbb\xbfdog", ("dog",)),
    (".txt", b"one\r\n\r\ntwo, three\n", ("one", "two, three")),
    (".txt", b"", ()),
]


@pytest.mark.parametrize(("kind", "data", "labels"), LABELS)
def test_labels(kind: str, data: bytes, labels: tuple[str, ...] | None) -> None:
    assert parse_sample(kind, data) == labels


def test_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labels come before or after their sound; what is not used is named once."""
    sound = flac(0)
    long = "d" * 150 + "/\u00fc\udcff.flac"
    bad = tarfile.TarInfo("link.flac")
    bad.type, bad.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        ("0.cls", b"3"), ("0.left.flac", sound), ("0.right.flac", sound),
        ("1.flac", sound), ("1.txt", b"words"), ("1.json", b'{"class": "bird"}'),
        ("2.16k.flac", sound), ("2.16k.txt", b"own"), ("2.txt", b"other"),
        ("3.flac", sound), ("3.pyd", pickle.dumps(print)), ("3.pth", b"x"), ("3.jpg", b"x"),
        ("4.flac", sound), ("4.json", b"{"), ("5.flac", b""), ("6.mp4", sound),
        ("7.flac", sound), ("7.cls", b"x" * (LONGEST_LABEL + 1)), ("._1.flac", b"x"),
        (long, sound), ("../8.flac", sound),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as archive:
        archive.addfile(bad)
    with caplog.at_level(logging.INFO, "ssast"):
        manifest = read_manifest(old(path))
        read_manifest(path)
    found = dict(zip((c.member for c in manifest.paths), manifest.labels or (), strict=True))  # type: ignore[union-attr]
    assert found == {
        "0.left.flac": ("3",), "0.right.flac": ("3",), "1.flac": ("bird",), "2.16k.flac": ("own",),
        "3.flac": (), long: (),
    }  # fmt: skip
    assert isinstance(manifest.paths, TarIndex)
    assert manifest.paths.recordings().tolist() == [0, 0, 1, 2, 3, 4]
    assert all(clip.read() == sound for clip in manifest.paths)
    info, left_out, problems = (record.getMessage() for record in caplog.records)
    assert (
        "6 sounds in 1 archives, labels: 2 from .cls, 1 from .json, 1 from .txt, 2 sounds" in info
    )
    assert "1 .jpg, 1 .mp4, 1 .pth, 1 .pyd (ssast data prepare" in left_out
    assert "5 of 11 sounds cannot be used" in problems and "4.json" in problems


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_tar(kind: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("b/c.flac", flac(1))], format=kind)
    [clip] = read_clips(str(path))
    assert read_clip(clip, SPEC).tobytes() == flac(1)
    data = path.read_bytes()
    assert isinstance(clip, TarClip)
    path.write_bytes(data[: clip.offset + 10])
    with pytest.raises(DataError, match=r"a\.tar: b/c\.flac: the shard is truncated"):
        read_clip(clip, SPEC)
    path.write_bytes(bytes(512) + data)
    with pytest.raises(DataError, match=r"b/c\.flac: the shard was overwritten"):
        read_clip(clip, SPEC)


def test_an_archive_that_changed_is_indexed_again(tmp_path: Path) -> None:
    path = old(write_tar(tmp_path / "a.tar", [("0.flac", flac(0))]))
    assert len(read_clips(path)) == 1
    write_tar(path, [("0.flac", flac(0)), ("1.flac", flac(1))])
    assert len(read_clips(path)) == 2
    os.utime(path, (1.1e9, 1.1e9))
    assert len(read_clips(path)) == 2


def test_a_second_start_reads_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill, or when archives are added."""
    for n in range(4):
        old(write_tar(tmp_path / f"in/{n}.tar", [(f"{n}.flac", flac(n))]))
    opened: list[str] = []
    open_tar, fails = tar_index.open_tar, [True]

    def failing(path: str) -> Any:
        opened.append(Path(path).name)
        if path.endswith("3.tar") and fails:
            raise OSError(fails.pop() and 13, "Permission denied")
        return open_tar(path)

    monkeypatch.setattr(tar_index, "open_tar", failing)
    with pytest.raises(DataError, match=r"3\.tar: cannot be read: Permission denied"):
        read_clips(tmp_path / "in")
    assert sorted(opened) == ["0.tar", "1.tar", "2.tar", "3.tar"]
    assert len(read_clips(tmp_path / "in")) == 4 and opened[4:] == ["3.tar"]
    old(write_tar(tmp_path / "in/4.tar", [("4.flac", flac(4))]))
    opened.clear()
    assert len(read_clips(tmp_path / "in")) == 5 and opened == ["4.tar"]


def test_names_of_archives(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-1", "{c}"):
        write_tar(tmp_path / f"{name}.tar", [])
    one = lambda text: [Path(path).stem for path in find_files(tmp_path / text)]  # noqa: E731
    assert one("a-{08..10}.tar") == ["a-08", "a-09", "a-10"] == one("a-{10..08}.tar")
    assert one("{a-09,b-{1..1}}.tar") == ["a-09", "b-1"]
    assert one("{a,b}-*.tar") == ["a-08", "a-09", "a-10", "b-1"]
    assert one("{c}.tar") == ["{c}"] and one("a-1?.tar") == ["a-10"]
    with pytest.raises(DataError, match=r"x\*\.tar: there is no such archive"):
        one("x*.tar")
    with pytest.raises(DataError, match="more than 100000 archives"):
        one("{0..99999999999}-{0..99999999999}.tar")
    with pytest.raises(DataError, match=r"a-11\.tar: there is no such archive \(and 1 more\)"):
        read_clips(tmp_path / "a-{10..12}.tar")
    with pytest.raises(DataError, match="no sounds that can be read"):
        read_clips(tmp_path / "b-1.tar")
    with pytest.raises(DataError, match="compressed archive cannot be read in place: unpack it"):
        read_clips("a.tar.gz")
    (tmp_path / "z.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(DataError, match=r"z\.tar: a compressed archive"):
        read_clips(tmp_path / "z.tar")


def test_prepare_keeps_their_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = webdataset_tars(tmp_path / "in")
    write_tar(tmp_path / "in/more.tar", [("x.flac", flac(99)), ("x.cls", b"owl"), ("x.pth", b"")])
    packing = Packing(Recipe(clip_s=0.5, min_s=0.1))
    for source, count in (("in", 13), (f"in/shard-{{000000..{len(paths) - 1:06d}}}.tar", 12)):
        out = tmp_path / f"out{count}"
        prepare_shards(
            tmp_path / source, out, packing, jobs=1, progress=False, log=lambda line: None
        )
        found = read_manifest(out).labels
        assert found is not None and sorted(found)[:7] == [("cat",)] * 6 + [("dog, loud",)]
        assert len(found) == count and (("owl",) in found) == (count == 13)
    assert "left out are members that are no sounds and no labels: 1 .pth" in caplog.text
    result = check_data(tmp_path / "in", jobs=1, progress=False)
    assert (result.num_clips, result.problems) == (13, []) and "owl" in result.labels


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> MemoryFileSystem:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return MemoryFileSystem()


def test_archives_behind_urls(
    tmp_path: Path, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges are read, never a whole archive; the same clips as on a disk, and the same stream."""
    rest = [(f"{k}.flac", flac(k, 40000)) for k in range(6)] + [("5.json", b'{"label": "a"}')]
    paths = [write_tar(tmp_path / f"in/{n}.tar", rest[n:]) for n in range(2)]
    monkeypatch.setattr(tar_index, "WINDOW_BYTES", 4096)
    for path in paths:
        bucket.pipe_file(f"/b/{path.name}", path.read_bytes())
    asked: list[int] = []
    get, fails = MemoryFileSystem.cat_file, [1]

    def cat_file(self: Any, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        if fails and fails.pop():
            raise RuntimeError("503 slow down")
        asked.append(end - start)
        return get(self, path, start=start, end=end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    here = read_manifest(tmp_path / "in")
    for name in ("memory://b/{0..1}.tar", "memory://b/*.tar", "memory://b"):
        there = read_manifest(name)
        assert there.labels == here.labels and is_remote(there.paths)
        assert fingerprint(there.paths) == fingerprint(here.paths)
    assert max(asked) <= 4096 and sum(asked) < sum(path.stat().st_size for path in paths)
    for one, other in zip(here.paths, there.paths, strict=True):
        assert isinstance(one, TarClip) and isinstance(other, TarClip)
        assert one.read() == other.read() and one.member == other.member
    assert len(select(there.paths, np.array([0, 3]))) == 2
    with pytest.raises(DataError, match="not there"):
        read_clips("memory://empty")
    with pytest.raises(DataError, match=r"memory://b/2\.tar: cannot be read"):
        read_clips("memory://b/{1..2}.tar")
    whole = lambda self, path, **_: get(self, path)  # noqa: E731
    monkeypatch.setattr(MemoryFileSystem, "cat_file", whole)
    with pytest.raises(DataError, match="does not serve ranges of bytes"):
        read_clip(there.paths[0], SPEC)


def test_a_damaged_archive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{k}.flac", flac(k)) for k in range(3)])
    data = bytearray(path.read_bytes())
    at = data.index(b"2.flac")
    data[at : at + 512] = os.urandom(512)
    path.write_bytes(data)
    assert len(read_clips(path)) == 2
    assert "damaged archive" in caplog.text and "1 of 3 sounds" in caplog.text


def test_webdataset_reads_prepared_shards(tmp_path: Path) -> None:
    """Each clip is a sample of its own, whatever dots its recording has in its name."""
    webdataset = pytest.importorskip("webdataset")
    write_tar(tmp_path / "in/a.tar", [(f"a.{n}.x.flac", flac(n, 20000)) for n in range(3)])
    packing = Packing(Recipe(clip_s=0.5, min_s=0.1))
    prepare_shards(tmp_path / "in", tmp_path / "out", packing, progress=False, log=lambda _: None)
    index = read_clips(tmp_path / "out")
    shards = str(tmp_path / "out/shards/{00000..00000}.tar")
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(samples) == len(index) == 9
    assert [sample["flac"] for sample in samples] == [clip.read() for clip in index]  # type: ignore[union-attr]


def test_an_archive_behind_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As ``cat`` joins them: what tar itself would not read either is said."""
    a, b = (write_tar(tmp_path / f"{n}.tar", [(f"{n}.flac", flac(k))]) for k, n in enumerate("ab"))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(a.read_bytes() + bytes(2**17) + b.read_bytes())
    at = a.stat().st_size + 2**17
    said = f"another archive begins at byte {at} of {joined.stat().st_size}: what follows is lost"
    assert len(read_clips(joined)) == 1 and said in caplog.text
    caplog.clear()
    a.write_bytes(a.read_bytes() + bytes(2**17))
    assert len(read_clips(a)) == 1 and not caplog.text


@pytest.mark.parametrize("order", ["aabb", "abba"])
def test_sounds_of_a_sample_stay_together(order: str, tmp_path: Path) -> None:
    members = [(f"{key}.mic{order[:n].count(key)}.flac", flac(n)) for n, key in enumerate(order)]
    path = write_tar(tmp_path / "a.tar", members)
    clips = read_clips(path)
    assert isinstance(clips, TarIndex)
    assert clips.recordings().tolist() == ["ab".index(key) for key in order]
    prepare_shards(path, tmp_path / "out", Packing(Recipe(clip_s=0.1)), jobs=1, progress=False)
    found = ShardIndex(tmp_path / "out").recordings()
    assert found.tolist() == [0] * 4 + [1] * 4  # of two clips each
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["recordings"] == 4
