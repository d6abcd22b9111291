"""Headers that misstate a length: where the samples are there they count, on every way to them."""

import io
import json
import os
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lengths import (
    SAMPLES,
    encoded,
    flac_with_total,
    id3v2,
    lying_files,
    sound,
    truncated_files,
    with_size,
    without_table,
)
from odd_files import some_odd_files
from prepared import prepared, rejected, samples_of
from sounds import write

from ssast.kernels.fbank import FbankSpec, num_frames
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.audio.decode import Item, length_s, read_blocks, sndfile_blocks
from ssast.pipelines.audio.encoded import read_clip
from ssast.pipelines.audio.lengths import examine
from ssast.pipelines.audio.parts import Span
from ssast.pipelines.errors import DataError, UnopenedError, UnusableError
from ssast.pipelines.prepare.check import check_data, is_report
from ssast.pipelines.stream.stream import AudioStream

LONG = 60000  # samples: too many bytes to be read at once when a clip of 20 frames is wanted
FEW = 22  # samples that a header of 44 bytes can hide
DELAY = 2 * 1152  # samples that an MP3 encoder may add
FILES = {SAMPLES: lying_files(), LONG: lying_files(LONG)}
NAMES = [(samples, name) for samples, files in FILES.items() for name in files]


def assert_same(got: np.ndarray, samples: int, name: str, most: int | None = None) -> None:
    """Check that ``got`` is the sound that went in, or its first ``most`` samples."""
    want = sound(samples)[:most]
    if name.startswith("MP3"):
        assert most is not None or 0 <= len(got) - len(want) <= DELAY
        lags = np.correlate(got[:4000].astype(np.float64), want[1000:3000])
        lag = int(lags.argmax()) - 1000
        assert 0 <= lag <= DELAY
        got, want = got[lag:], want[: len(got) - lag]
        got = got[: len(want)]
        assert np.corrcoef(got, want)[0, 1] > 0.9
        return
    assert 0 <= len(want) - len(got) <= FEW
    tolerance = 0.02 if "ULAW" in name else 1e-4
    np.testing.assert_allclose(got, want[: len(got)], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("samples", "name"), NAMES)
def test_all_samples_are_decoded(samples: int, name: str, tmp_path: Path) -> None:
    """From a file, from an archive and from memory, as prepare and predict --window-s do."""
    data = FILES[samples][name]
    path = tmp_path / name
    path.write_bytes(data)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(path, name)
    with tarfile.open(tmp_path / "a.tar") as archive:
        (member,) = archive.getmembers()
    span = Span(tmp_path / "a.tar", member.offset_data, member.size)
    found = []
    for source in (path, span, data):
        blocks = list(read_blocks(Item(name, source)))
        assert {rate for _, rate in blocks} == {16000}
        found.append(np.concatenate([block for block, _ in blocks]))
        assert length_s(Item(name, source)) == pytest.approx(len(found[-1]) / 16000, abs=1 / 16000)
    assert_same(found[0], samples, name)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize(("samples", "name"), NAMES)
def test_clips_for_training_are_whole(samples: int, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[samples][name])
    whole = FbankSpec(num_frames=400)
    for verify in (False, True):
        got = soundfile.read(io.BytesIO(read_clip(path, whole, verify=verify)), dtype="float32")[0]
        assert_same(got, samples, name)
    short = FbankSpec(num_frames=20)
    start = soundfile.read(io.BytesIO(read_clip(path, short)), dtype="float32")[0]
    np.testing.assert_array_equal(start[: short.num_samples], got[: short.num_samples])
    end = soundfile.read(io.BytesIO(read_clip(path, short, crop=0.99999)), dtype="float32")[0]
    assert len(end) == short.num_samples
    if not name.startswith("MP3"):  # of which a decoder that starts in the middle makes others
        np.testing.assert_array_equal(end, got[-len(end) :])


def test_every_way_reads_all_of_them(tmp_path: Path) -> None:
    """Training, check and prepare: none is rejected, and the report names both lengths."""
    folder, files = tmp_path / "in", some_odd_files()
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    paths = tuple(str(folder / name) for name in sorted(files))
    spec = FbankSpec(num_frames=120)
    with AudioStream(
        paths, spec, batch_size=16, epochs=1, device=torch.device("cpu"), max_rejected=0.0
    ) as stream:
        batches = list(stream)
        assert not stream.rejected
    frames = torch.cat([batch.num_frames[batch.valid] for batch in batches]).tolist()
    assert len(frames) == len(paths)
    least = int(num_frames(torch.tensor([SAMPLES - FEW]), spec))
    assert all(least <= count <= least + DELAY // 160 + 2 for count in frames)
    report = tmp_path / "check.jsonl"
    found = check_data(folder, report=report, progress=False)
    assert found.problems == []
    index = prepared(folder, tmp_path / "out", Recipe(clip_s=10.0))
    assert rejected(tmp_path / "out") == {}
    assert len(index) == len(files)
    text = (tmp_path / "out/wrong_lengths.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    noted = {line["name"]: line for line in lines}
    expected = {n for n in files if n.split("_", 1)[1].startswith(("half", "wrapped"))}
    assert set(noted) == expected == {Path(note.where).name for note in found.wrong_lengths}
    where = str(folder / "WAV_half.wav")
    line = {"where": where, "note": "its header states 0.5 s, it holds 1 s"}
    assert line in [json.loads(text) for text in report.read_text().splitlines()]
    assert is_report(report)
    assert noted["WAV_half.wav"] == {"name": "WAV_half.wav", "stated_s": 0.5, "found_s": 1.0}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["wrong_lengths"] == len(expected)
    for number in range(len(index)):
        got = samples_of(index[number].read()).astype(np.float32) / 2**15
        assert abs(len(got) - SAMPLES) <= DELAY


@pytest.mark.parametrize("name", truncated_files())
def test_a_missing_share_makes_a_file_truncated(name: str, tmp_path: Path) -> None:
    data = truncated_files()[name]
    path = tmp_path / name
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(UnusableError, match="truncated: "):
            list(read_blocks(Item(name, source)))
    for frames in (20, 400):
        with pytest.raises(DataError, match="truncated: "):
            read_clip(path, FbankSpec(num_frames=frames))
    (problem,) = check_data(tmp_path, progress=False).problems
    assert problem.problem.startswith("truncated: ")


@pytest.mark.parametrize("missing", [0, 60, 100])
@pytest.mark.parametrize("samples", [2000, 16000])
def test_what_may_be_missing(missing: int, samples: int, tmp_path: Path) -> None:
    """A few samples, or less than 1 %."""
    data = encoded("WAV", sound(samples))
    (tmp_path / "a.wav").write_bytes(data[: len(data) - 2 * missing])
    if missing == 100 and samples == 2000:
        with pytest.raises(DataError, match="truncated: 3800 of 4000 bytes of samples"):
            read_clip(tmp_path / "a.wav", FbankSpec(num_frames=200))
    else:
        read_clip(tmp_path / "a.wav", FbankSpec(num_frames=200))


@pytest.mark.parametrize("field", ["wrapped", "unknown", "zero"])
def test_a_wav_file_of_more_than_4_gib(field: str, tmp_path: Path) -> None:
    """A sparse one: its length is found, and libsndfile is told of it."""
    num_bytes = 2**32 + 2 * SAMPLES
    path = tmp_path / "big.wav"
    wav = encoded("WAV", sound())
    size = {"wrapped": num_bytes % 2**32, "unknown": 2**32 - 1, "zero": 0}[field]
    path.write_bytes(with_size(wav, "WAV", size))
    os.truncate(path, 44 + num_bytes)
    assert length_s(Item("big.wav", path)) == num_bytes / 2 / 16000
    spec = FbankSpec(num_frames=20)
    got = soundfile.read(io.BytesIO(read_clip(path, spec)), dtype="float32")[0]
    np.testing.assert_allclose(got, sound()[: len(got)], atol=1e-4)
    assert not soundfile.read(io.BytesIO(read_clip(path, spec, crop=0.9)))[0].any()
    with open(path, "rb") as file:
        known = examine(lambda at, count: os.pread(file.fileno(), count, at), 44 + num_bytes)
    assert known is not None and known.found == num_bytes // 2


def test_chunks_behind_the_samples_are_no_sound(tmp_path: Path) -> None:
    wav = encoded("WAV", sound())
    for behind in (
        b"LIST" + struct.pack("<I", 20000) + bytes(20000),
        b"id3 " + struct.pack("<I", 4001) + bytes(4002) + b"bext" + struct.pack("<I", 0),
    ):
        for data in (wav + behind, with_size(wav[:44], "WAV", 0) + behind):
            read = lambda at, count, data=data: data[at : at + count]  # noqa: E731
            known = examine(read, len(data))
            assert known is not None and known.repair is None
            assert known.found == (SAMPLES if len(data) > 44 + 2 * SAMPLES else 0)


def loud_then_quiet(seconds: int = 10) -> np.ndarray:
    """Sound whose first frames need a high bit rate and its others a low one."""
    rng = np.random.default_rng(0)
    wave = 0.002 * np.sin(np.arange(16000 * seconds) / 7)
    wave[:16000] = rng.uniform(-0.9, 0.9, 16000)
    return wave.astype(np.float32)


def vbr() -> bytes:
    return encoded(
        "MP3",
        loud_then_quiet(),
        "MPEG_LAYER_III",
        bitrate_mode="VARIABLE",
        compression_level=0.1,
    )


def with_vbri(mp3: bytes, frames: int) -> bytes:
    """The table of Fraunhofer's encoder in place of the other one."""
    at = mp3.find(b"Info") if b"Info" in mp3[:100] else mp3.find(b"Xing")
    length = mp3.find(mp3[:2], at)
    table = b"VBRI" + struct.pack(">HHHII", 1, 0, 0, len(mp3), frames)
    return (mp3[:4] + bytes(32) + table).ljust(length, b"\0")[:length] + mp3[length:]


@pytest.mark.parametrize("kind", ["none", "tag", "vbri", "joined", "wrong"])
def test_mp3_of_variable_bit_rate(kind: str, tmp_path: Path) -> None:
    """What lies behind a guessed length is read as well."""
    mp3 = vbr()
    at = mp3.find(b"Xing")
    seconds = 20 if kind == "joined" else 10
    data = {
        "none": without_table(mp3),
        "tag": id3v2(20000) + without_table(mp3),
        "vbri": with_vbri(mp3, 280),
        "joined": mp3 + mp3,
        "wrong": mp3[: at + 7] + b"\x01" + struct.pack(">I", 50) + mp3[at + 12 :],
    }[kind]
    path = tmp_path / "a.mp3"
    path.write_bytes(data)
    got = np.concatenate([block for block, _ in read_blocks(Item("a.mp3", path))])
    assert len(got) / 16000 == pytest.approx(seconds, abs=0.3)
    assert np.abs(got[:12000]).max() > 0.3
    assert 0.001 < np.abs(got[-16000:-4000]).max() < 0.01
    for spec in (FbankSpec(num_frames=50), FbankSpec(num_frames=2100)):
        clip = soundfile.read(io.BytesIO(read_clip(path, spec, crop=0.999)))[0]
        assert len(clip) == min(spec.num_samples, len(got))


def test_flac_breaking_off_in_its_last_frame(tmp_path: Path) -> None:
    """Of unknown length: the frames that are whole. Of known length: truncated."""
    flac = encoded("FLAC", sound(LONG))
    cut = flac[:-3000]
    (tmp_path / "a.flac").write_bytes(flac_with_total(cut, 0))
    (tmp_path / "b.flac").write_bytes(cut)
    got = np.concatenate([b for b, _ in read_blocks(Item("a.flac", tmp_path / "a.flac"))])
    assert LONG - 8192 < len(got) < LONG
    np.testing.assert_allclose(got, sound(LONG)[: len(got)], atol=1e-4)
    with pytest.raises(UnusableError, match=r"truncated|cannot be decoded"):
        list(read_blocks(Item("b.flac", tmp_path / "b.flac")))
    with pytest.raises(DataError, match=r"truncated|cannot be decoded"):
        read_clip(tmp_path / "b.flac", FbankSpec(num_frames=400), verify=True)


def test_flac_with_blocks_of_other_kinds(tmp_path: Path) -> None:
    """Bits, channels, a last block that is as long as the others, and one of a few samples."""
    for samples in (4096, 4097, 4112, 8192, 20000):
        for subtype in ("PCM_S8", "PCM_24"):
            for channels in (1, 2):
                wave = np.repeat(sound(samples)[:, None], channels, axis=1)
                data = flac_with_total(encoded("FLAC", wave, subtype), 0)
                known = examine(lambda at, count, d=data: d[at : at + count], len(data))
                assert known is not None and known.found == samples


def test_a_whole_file_is_handed_on_as_it_is(tmp_path: Path) -> None:
    for suffix in ("wav", "flac"):
        path = write(tmp_path / f"a.{suffix}", sound(), subtype="PCM_16")
        assert read_clip(path, FbankSpec(num_frames=200)).tobytes() == path.read_bytes()


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_of_several_streams(subtype: str, tmp_path: Path) -> None:
    """libsndfile reads the first and says nothing of the others."""
    links = [encoded("OGG", sound(LONG // count), subtype) for count in (1, 2)]
    (tmp_path / "one.ogg").write_bytes(links[0])
    list(read_blocks(Item("one.ogg", tmp_path / "one.ogg")))
    path = tmp_path / "a.ogg"
    path.write_bytes(b"".join(links))
    said = "several Ogg streams one behind"
    with pytest.raises(DataError, match=said):
        read_clip(path, FbankSpec())
    with pytest.raises(UnopenedError, match=said):
        list(sndfile_blocks(Item("", path)))
    if shutil.which("ffmpeg"):
        got = np.concatenate([block for block, _ in read_blocks(Item("a.ogg", path))])
        assert abs(len(got) - 1.5 * LONG) < 2000
