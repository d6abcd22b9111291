"""The audio stream: exact features, exact resume, and no bad file that stops it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import GOLDEN
from sounds import bestiary, tone, write, write_clips

from ssast.kernels.fbank import FbankSpec, fbank, fbank_reference, num_frames
from ssast.pipelines.clips.order import Weights, clips_at
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream import source
from ssast.pipelines.stream.batch import Batch
from ssast.pipelines.stream.graph import FbankThreads, mel_gains
from ssast.pipelines.stream.source import ClipSource
from ssast.pipelines.stream.stream import MAX_RECOVERIES, AudioStream, build_pipeline

CPU = torch.device("cpu")
SPEC = FbankSpec(num_frames=60, n_mels=32)
FIELDS = ("fbank", "num_frames", "clip_ids", "epochs", "valid")


def open_stream(paths: list[Path], **settings: Any) -> AudioStream:
    return AudioStream(paths, **{"spec": SPEC, "batch_size": 4, "device": CPU} | settings)


def take(paths: list[Path], count: int, **settings: Any) -> list[Batch]:
    with open_stream(paths, **settings) as stream:
        return [next(stream) for _ in range(count)]


def rows(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS}


def same(a: list[Batch], b: list[Batch]) -> bool:
    first, second = rows(a), rows(b)
    return all(torch.equal(first[name], second[name]) for name in FIELDS)


def oracle(path: Path, spec: FbankSpec) -> tuple[torch.Tensor, int]:
    """Features in float64 of what libsndfile decodes."""
    samples = torch.tensor(soundfile.read(path, dtype="float64")[0])[None, : spec.num_samples]
    samples = samples - samples.mean()
    length = samples.shape[1]
    return fbank_reference(samples, torch.tensor([length]), spec)[0], num_frames(length, spec)


def torn(path: Path) -> Path:
    """Cut a FLAC file in half: it looks well until it is decoded."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_clips(tmp_path_factory.mktemp("clips"), 14, samples=11000)


@pytest.mark.parametrize("fbank", ["torch", "dali"])
@pytest.mark.parametrize("n_mels", [128, 40, 3, 1])
def test_features_are_kaldis(tmp_path: Path, fbank: str, n_mels: int) -> None:
    spec = FbankSpec(num_frames=120, n_mels=n_mels)
    lengths = (400, 401, 559, 560, 9999, spec.num_samples - 1, spec.num_samples, 40000)
    clips = [
        write(tmp_path / f"{k}.{'flac' if k % 2 else 'wav'}", tone(n, seed=k), subtype="PCM_16")
        for k, n in enumerate(lengths)
    ]
    (batch,) = take(clips, 1, spec=spec, batch_size=len(clips), epochs=1, fbank=fbank)
    assert batch.fbank.shape == (len(clips), 120, n_mels) and batch.fbank.dtype == torch.float32
    assert batch.valid.all() and batch.valid.dtype == torch.bool
    assert batch.num_frames.dtype == batch.clip_ids.dtype == batch.epochs.dtype == torch.int64
    error = []
    for features, frames, path in zip(batch.fbank, batch.num_frames, clips, strict=True):
        expected, expected_frames = oracle(path, spec)
        assert frames == expected_frames
        assert (features[expected_frames:] == 0).all()
        error.append((features[:expected_frames] - expected[:expected_frames]).abs().flatten())
    all_errors = torch.cat(error).numpy()
    assert all_errors.mean() < 1e-5 and all_errors.max() < 5e-3
    assert np.quantile(all_errors, 0.999) < 3e-4


@pytest.mark.parametrize("fbank", ["torch", "dali"])
def test_an_offset_makes_no_difference(tmp_path: Path, fbank: str) -> None:
    """The published code removes a clip's mean first; here each window loses its own alone."""
    spec = FbankSpec(num_frames=50)
    clip = write(tmp_path / "a.wav", 0.5 + 0.1 * tone(spec.num_samples), subtype="PCM_16")
    (batch,) = take([clip], 1, spec=spec, batch_size=1, fbank=fbank)
    error = (batch.fbank[0] - oracle(clip, spec)[0]).abs()
    assert error.mean() < 1e-5 and error.max() < 5e-3


@pytest.mark.parametrize("fbank", ["torch", "dali"])
def test_published_features(tmp_path: Path, fbank: str) -> None:
    """From files to the numbers of the published code, at 8 and at 16 kHz."""
    golden = torch.load(GOLDEN / "fbank.pt", weights_only=True)
    for wave in golden["waves"]:
        rate_hz, expected = wave["sample_rate"], wave["fbank"]
        if rate_hz > 16000:
            continue
        path = tmp_path / f"{wave['name']}.wav"
        soundfile.write(path, wave["waveform_int16"][0].numpy(), rate_hz, subtype="PCM_16")
        spec = FbankSpec(rate_hz, num_frames=len(expected) + 10)
        (batch,) = take([path], 1, spec=spec, batch_size=1, epochs=1, fbank=fbank)
        assert batch.num_frames.tolist() == [len(expected)]
        error = (batch.fbank[0, : len(expected)] - expected).abs()
        assert error.mean() < 2e-5 and error.max() < 5e-3


def test_both_filterbanks_agree(paths: list[Path]) -> None:
    by_torch, by_dali = (rows(take(paths, 6, fbank=kind)) for kind in ("torch", "dali"))
    for name in FIELDS[1:]:
        assert torch.equal(by_torch[name], by_dali[name])
    torch.testing.assert_close(by_torch["fbank"], by_dali["fbank"], atol=5e-3, rtol=0)


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 44100, 48000])
def test_both_filterbanks_agree_at_any_rate(tmp_path: Path, rate_hz: int) -> None:
    """Also where a window is no whole number of hops and the FFT has another length."""
    clip = write(tmp_path / "a.wav", tone(rate_hz, rate_hz=rate_hz), rate_hz, subtype="PCM_16")
    spec = FbankSpec(rate_hz, num_frames=50, low_hz=30.0)
    settings = {"spec": spec, "batch_size": 1, "epochs": 1}
    by_torch, by_dali = (take([clip], 1, fbank=k, **settings)[0] for k in ("torch", "dali"))
    torch.testing.assert_close(by_torch.fbank, by_dali.fbank, atol=5e-3, rtol=0)


def test_waveforms_for_the_kernel(paths: list[Path]) -> None:
    """What a GPU gets with fbank="torch": padded waveforms, on which the kernel runs."""
    source = ClipSource(paths, SPEC, batch_size=4)
    pipeline = build_pipeline(
        source, SPEC, batch_size=4, num_threads=1, device_id=None, features="waveform"
    )
    waves, lengths, labels = (torch.from_dlpack(o.as_tensor()) for o in pipeline.run())
    assert waves.shape == (4, SPEC.num_samples) and lengths.shape == (4, 1)
    (batch,) = take(paths, 1)
    assert torch.equal(labels[:, 0], batch.clip_ids)
    assert torch.equal(fbank(waves, lengths[:, 0].long(), SPEC), batch.fbank)
    del pipeline
    source.close()


def test_gains_are_near_one() -> None:
    """The triangles are nearly the same; an error of the layout would show here."""
    for gains in mel_gains(FbankSpec()):
        assert gains.shape == (1, 257) and gains.dtype == np.float32
        assert 0.8 < np.median(gains[gains > 0]) < 1.2


def test_every_format_gives_the_same_features(tmp_path: Path) -> None:
    sound = np.round(tone(9000) * 32767).astype(np.int16)
    lossless = [
        write(tmp_path / name, samples, subtype=subtype)
        for name, samples, subtype in (
            ("a.wav", sound, "PCM_16"),
            ("a.flac", sound, "PCM_16"),
            ("b.flac", sound, "PCM_24"),
            ("b.wav", sound / np.float32(32768), "FLOAT"),
            ("a.aiff", sound, "PCM_16"),
            ("c.wav", np.stack([sound, sound], 1), "PCM_16"),
        )
    ]
    lossy = [write(tmp_path / name, sound) for name in ("a.mp3", "a.ogg")]
    (batch,) = take(lossless + lossy, 1, batch_size=8, epochs=1)
    assert batch.valid.all()
    for features in batch.fbank[1:6]:
        assert torch.equal(features, batch.fbank[0])
    for features in batch.fbank[6:, :50]:
        assert (features - batch.fbank[0, :50]).abs().median() < 0.5


def test_filterbanks_start_no_openmp_threads() -> None:
    def num_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threads = FbankThreads(FbankSpec(), batch_size=2, num_threads=2)
        try:
            started = num_threads()
            threads([tone(160000, seed=k) for k in range(2)])
            assert num_threads() == started
            assert torch.get_num_threads() == 2
        finally:
            threads.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad])
def test_a_stream_works_in_and_after_inference(paths: list[Path], inside: Any) -> None:
    expected = take(paths, 2)
    with inside():
        assert same(take(paths, 2), expected)
    assert same(take(paths, 2), expected)


def test_the_order_is_the_seeds(paths: list[Path]) -> None:
    batches = take(paths, 9, seed=3)
    ids, epochs = clips_at(np.arange(36), 14, 3)
    got = rows(batches)
    assert got["clip_ids"].tolist() == ids.tolist()
    assert got["epochs"].tolist() == epochs.tolist()
    assert got["valid"].all()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    start=st.integers(0, 40),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
)
def test_resume_anywhere_with_any_shape(
    paths: list[Path], start: int, batch_size: int, world_size: int
) -> None:
    """Ranks put back together give the one stream, bit for bit, from any position on."""
    count = 2 * batch_size * world_size
    with open_stream(paths, batch_size=1, start=start) as stream:
        whole = rows([next(stream) for _ in range(count)])
        assert stream.position == start + count
    for rank in range(world_size):
        part = rows(
            take(paths, 2, batch_size=batch_size, rank=rank, world_size=world_size, start=start)
        )
        mine = slice(rank, None, world_size)
        for name in FIELDS:
            assert torch.equal(part[name], whole[name][mine])


@pytest.mark.parametrize("fbank", ["torch", "dali"])
def test_resume_is_bit_identical(paths: list[Path], fbank: str) -> None:
    batches = take(paths, 10, fbank=fbank)
    with open_stream(paths, fbank=fbank) as stream:
        for _ in range(4):
            next(stream)
        position = stream.position
    assert position == 16
    assert same(take(paths, 6, fbank=fbank, start=position), batches[4:])


def test_batches_stay_as_they_are(paths: list[Path]) -> None:
    """A batch may be kept: no later one is written into its memory."""
    with open_stream(paths) as stream:
        kept = [next(stream) for _ in range(12)]
        copies = [batch.fbank.clone() for batch in kept]
        for _ in range(12):
            next(stream)
        assert all(torch.equal(b.fbank, c) for b, c in zip(kept, copies, strict=True))
    assert all(torch.equal(b.fbank, c) for b, c in zip(kept, copies, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_finite_pass_is_complete(paths: list[Path], world_size: int, epochs: int) -> None:
    seen = []
    for rank in range(world_size):
        with open_stream(paths, epochs=epochs, rank=rank, world_size=world_size) as stream:
            batches = list(stream)
            assert len(batches) == len(stream) == -(-14 * epochs // (4 * world_size))
            with pytest.raises(StopIteration):
                next(stream)
        got = rows(batches)
        assert got["valid"].sum() >= 14 * epochs // world_size
        assert (got["fbank"][~got["valid"]] == 0).all()
        assert (got["num_frames"][~got["valid"]] == 0).all()
        valid = got["valid"]
        pairs = zip(got["epochs"][valid].tolist(), got["clip_ids"][valid].tolist(), strict=True)
        seen += list(pairs)
    assert sorted(seen) == [(e, k) for e in range(epochs) for k in range(14)]


def test_a_finite_pass_from_its_middle_and_its_end(paths: list[Path]) -> None:
    with open_stream(paths, epochs=1, start=8) as stream:
        assert len(stream) == 2
        assert [b.clip_ids[b.valid].tolist() for b in stream] == [[8, 9, 10, 11], [12, 13]]
    with open_stream(paths, epochs=1, start=14) as stream:
        assert len(stream) == 0 and list(stream) == []


def test_an_endless_stream_has_no_length(paths: list[Path]) -> None:
    with open_stream(paths) as stream, pytest.raises(TypeError, match="endless"):
        len(stream)


@pytest.mark.parametrize("fbank", ["torch", "dali"])
def test_the_bestiary_does_not_stop_the_stream(
    paths: list[Path], tmp_path: Path, fbank: str
) -> None:
    beasts = bestiary(tmp_path)
    zoo = [*paths, *beasts, *paths]
    spec = FbankSpec(num_frames=200)
    reported: dict[int, tuple[str, str]] = {}

    def on_reject(clip_id: int, path: str, reason: str) -> None:
        assert clip_id not in reported
        reported[clip_id] = (path, reason)

    with open_stream(
        zoo, spec=spec, epochs=2, fbank=fbank, max_rejected=0.9, on_reject=on_reject
    ) as stream:
        got = rows(list(stream))
        assert stream.rejected == reported
    present = got["epochs"] < 2
    bad = set(range(14, 14 + len(beasts)))
    assert set(reported) == bad
    assert set(got["clip_ids"][present & ~got["valid"]].tolist()) == bad
    for clip_id, (path, reason) in reported.items():
        assert path == str(zoo[clip_id])
        assert "\n" not in reason
    good = present & got["valid"]
    fine = sorted(set(range(len(zoo))) - bad)
    assert sorted(got["clip_ids"][good].tolist()) == sorted(2 * fine)
    assert torch.isfinite(got["fbank"]).all()
    # the good ones are what they are without the others
    clean = rows(take(paths, 4, spec=spec, epochs=1, fbank=fbank))
    for clip_id, features in zip(got["clip_ids"][good], got["fbank"][good], strict=True):
        row = int(clip_id) if clip_id < 14 else int(clip_id) - 14 - len(beasts)
        assert torch.equal(features, clean["fbank"][row])


@pytest.mark.parametrize("place", range(12))
def test_a_torn_file_anywhere(tmp_path: Path, place: int) -> None:
    """DALI fails as a whole; the stream goes on as if the file had been known to be bad."""
    clips = write_clips(tmp_path, 12, samples=4000)
    clips[place] = torn(write(tmp_path / "torn.flac", tone(9000)))
    batches = take(clips, 9, batch_size=3, max_rejected=0.5)
    clips[place] = tmp_path / "missing.flac"
    assert same(batches, take(clips, 9, batch_size=3, max_rejected=0.5))


def test_many_torn_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After some failures of DALI's the clips are checked beforehand: said once, and no more."""
    clips = write_clips(tmp_path, 40, samples=4000)
    bad = list(range(0, 40, 2))
    for row in bad:
        clips[row] = torn(write(tmp_path / f"torn{row}.flac", tone(9000)))
    with open_stream(clips, epochs=1, max_rejected=0.9) as stream:
        got = rows(list(stream))
        assert stream._recoveries == MAX_RECOVERIES
    assert sorted(got["clip_ids"][~got["valid"]].tolist()) == bad
    assert len([r for r in caplog.records if "libsndfile" in r.message]) == 1


def test_resume_after_a_torn_file_is_bit_identical(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 12, samples=9000)
    torn(clips[4])
    batches = take(clips, 9, max_rejected=0.5)
    for done in (1, 3, 5):
        assert same(take(clips, 9 - done, start=4 * done, max_rejected=0.5), batches[done:])


def test_crops_and_weights_of_a_stream(tmp_path: Path) -> None:
    """Another part of a long recording in each epoch; the same after a resume, for any batches."""
    clips = write_clips(tmp_path, 6, samples=30000)
    settings = {"spec": FbankSpec(num_frames=40), "random_crop": True}
    got = rows(take(clips, 12, batch_size=3, **settings))
    by_clip = [got["fbank"][got["clip_ids"] == clip] for clip in range(6)]
    assert all(len(seen) == 6 and not torch.equal(seen[0], seen[1]) for seen in by_clip)
    again = rows(take(clips, 5, batch_size=6, start=6, **settings))
    assert torch.equal(again["fbank"], got["fbank"][6:36])
    weights = Weights(np.array([0.0, 1, 1, 1, 1, 2]))
    got = rows(take(clips, 12, batch_size=3, weights=weights, **settings))
    counts = torch.bincount(got["clip_ids"], minlength=6)
    assert counts.tolist() == [0, 6, 6, 6, 6, 12] and got["epochs"].tolist() == list(range(36))
    again = rows(take(clips, 5, batch_size=6, start=6, weights=weights, **settings))
    assert torch.equal(again["fbank"], got["fbank"][6:36])
    with pytest.raises(DataError, match="2 weights for 6 clips"):
        take(clips, 1, weights=Weights(np.ones(2)))


@pytest.mark.parametrize("fbank", ["torch", "dali"])
@pytest.mark.parametrize("kept", [0.4, 1.0])
def test_a_cache_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fbank: str, kept: float
) -> None:
    """All or some of the clips in memory; a bad one is not kept."""
    clips = [*write_clips(tmp_path, 10, samples=9000), tmp_path / "missing.wav"]
    reads: list[Path] = []
    real = source.read_clip

    def counted(path: Path, *args: Any, **settings: Any) -> Any:
        reads.append(path)
        return real(path, *args, **settings)

    monkeypatch.setattr(source, "read_clip", counted)
    spec = FbankSpec(num_frames=60)
    settings = {"spec": spec, "fbank": fbank, "max_rejected": 0.5, "batch_size": 4}
    without = take(clips, 22, **settings)  # 8 epochs
    every_time = len(reads)
    reads.clear()
    gib = kept * 10 * spec.num_frames * spec.n_mels * 4 / 2**30
    assert same(take(clips, 22, cache_gib=gib, **settings), without)
    # Read ahead, a clip may be asked for before it is there; the others are read every time.
    assert len(reads) < (1 - 0.6 * kept) * every_time
    with pytest.raises(DataError, match="exclude each other"):
        take(clips, 1, cache_gib=1.0, random_crop=True)


def test_too_many_rejected_clips(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 40, samples=4000)
    clips[7:10] = [tmp_path / f"missing{k}.wav" for k in range(3)]
    with open_stream(clips, epochs=2) as stream, pytest.raises(DataError) as caught:
        list(stream)
    text = str(caught.value)
    assert "6 of the first 52 clips" in text and "rejected.jsonl" in text and "\n" not in text
    assert text.count("missing") == 3 and "No such file or directory" in text
    assert len(take(clips, 20, epochs=2, max_rejected=0.12)) == 20


def test_a_bad_start_is_forgiven(tmp_path: Path) -> None:
    """All bad clips of a manifest may come first: what counts is their share of all of it."""
    clips = 100 * write_clips(tmp_path, 1, samples=4000)
    clips[1:5] = [tmp_path / "missing.wav"] * 4
    assert len(take(clips, 25, epochs=1)) == 25
    clips[50:52] = [tmp_path / "missing.wav"] * 2
    with pytest.raises(DataError, match="6 of the first 52 clips"):
        take(clips, 25, epochs=1)


def test_nothing_but_rejected_clips(tmp_path: Path) -> None:
    clips = [tmp_path / f"missing{k}.wav" for k in range(8)]
    with open_stream(clips) as stream, pytest.raises(DataError, match="4 of the first 4 clips"):
        next(stream)


def test_errors_that_no_clip_is_to_blame_for_are_raised(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of order")

    with open_stream(paths) as stream:
        next(stream)
        monkeypatch.setattr("ssast.pipelines.stream.graph.fbank_into", broken)
        with pytest.raises(RuntimeError, match="out of order"):
            for _ in range(5):
                next(stream)


def num_tasks(at_most: int = 0) -> int:
    """Threads of this process, those of libraries as well; the kernel forgets with a delay."""
    for _ in range(100):
        count = len(os.listdir("/proc/self/task"))
        if count <= at_most:
            break
        time.sleep(0.01)
    return count


@pytest.mark.parametrize("fbank", ["torch", "dali"])
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_close_leaves_no_thread(paths: list[Path], fbank: str, batches: int) -> None:
    take(paths, 1, fbank=fbank)  # what libraries start once and keep
    threads, tasks = threading.active_count(), num_tasks()
    stream = open_stream(paths, fbank=fbank, num_threads=3)
    for _ in range(batches):
        next(stream)
    assert num_tasks() > tasks
    stream.close()
    stream.close()
    assert threading.active_count() == threads
    assert num_tasks(at_most=tasks) <= tasks
    with pytest.raises(StopIteration):
        next(stream)


def test_torch_keeps_its_threads(paths: list[Path]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with open_stream(paths) as stream:
            next(stream)
            assert torch.get_num_threads() == 3
            seen = []
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert seen == [3]
    finally:
        torch.set_num_threads(before)


PROGRAM = """
import sys, torch
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.stream.stream import AudioStream
stream = AudioStream(sys.argv[1:], FbankSpec(), batch_size=2, device=torch.device("cpu"),
                     max_rejected=1.0)
for _ in range(4):
    batch = next(stream)
{end}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("raise SystemExit(3)", 3), ("del stream", 0)]
)
def test_a_program_that_does_not_close_ends(
    paths: list[Path], tmp_path: Path, end: str, status: int
) -> None:
    """Without a hang, and without a word on stdout, a torn file and all."""
    clips = [*map(str, paths[:5]), str(torn(write(tmp_path / "a.flac", tone(9000))))]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end), *clips],
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert done.stdout == "" and done.stderr == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": []}, "holds no clips"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"start": -1}, "start is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"epochs": 0}, "epochs is 0"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"read_ahead": -1}, "read_ahead is -1"),
        ({"fbank": "numpy"}, "fbank is 'numpy'"),
    ],
)
def test_wrong_settings(paths: list[Path], change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_stream(**{"paths": paths, **change})


def test_a_batch_moves(paths: list[Path]) -> None:
    (batch,) = take(paths, 1)
    assert len(batch) == 4 and batch.to(CPU) is batch
    meta = batch.to(torch.device("meta"))
    assert all(getattr(meta, name).is_meta for name in FIELDS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fbank", ["auto", "dali", "torch"])
def test_on_a_gpu(paths: list[Path], tmp_path: Path, fbank: str) -> None:
    clips = [*paths, torn(write(tmp_path / "a.flac", tone(9000))), tmp_path / "missing.wav"]
    spec = FbankSpec()
    expected = rows(take(clips, 12, spec=spec, max_rejected=0.5))
    with open_stream(
        clips, spec=spec, device=torch.device("cuda", 0), fbank=fbank, max_rejected=0.5
    ) as stream:
        batches = [next(stream) for _ in range(12)]
    got = rows(batches)
    for name in FIELDS:
        assert got[name].is_cuda
        if name != "fbank":
            assert torch.equal(got[name].cpu(), expected[name])
    torch.testing.assert_close(got["fbank"].cpu(), expected["fbank"], atol=5e-3, rtol=0)
