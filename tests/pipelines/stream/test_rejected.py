"""Clips that cannot be read are replaced and reported; other errors stop the stream."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sounds import bad_files, tone, write, write_clips
from streams import open_stream, rows, same, take, torn

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream.rejected import Counts
from ssast.pipelines.stream.stream import MAX_RECOVERIES


@pytest.mark.parametrize("fbank", ["torch", "dali"])
def test_bad_files_do_not_stop_the_stream(paths: list[Path], tmp_path: Path, fbank: str) -> None:
    bad = bad_files(tmp_path)
    zoo = [*paths, *bad, *paths]
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
    bad = set(range(14, 14 + len(bad)))
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
        row = int(clip_id) if clip_id < 14 else int(clip_id) - 14 - len(bad)
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


def test_too_many_rejected_clips(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 40, samples=4000)
    clips[7:10] = [tmp_path / f"missing{k}.wav" for k in range(3)]
    with open_stream(clips, epochs=2) as stream, pytest.raises(DataError) as caught:
        list(stream)
    text = str(caught.value)
    assert "3 of the first 12 clips" in text and "rejected.jsonl" in text and "\n" not in text
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


def test_one_bad_file_never_ends_a_stream(tmp_path: Path) -> None:
    """Wherever it comes up, unless none is allowed."""
    clips = write_clips(tmp_path, 6, samples=4000)
    clips[0] = tmp_path / "missing.wav"
    assert len(take(clips, 12, epochs=2, batch_size=1)) == 12
    first = [int(batch.clip_ids[0]) for batch in take(clips, 6, batch_size=1)]
    clips[0], clips[first[0]] = clips[first[0]], clips[0]
    assert not take(clips, 6, batch_size=1)[0].valid.any()
    with pytest.raises(DataError, match=r"1 of the first 1 clips .*allowed: 0%"):
        take(clips, 6, batch_size=1, max_rejected=0.0)


def test_everything_allowed_never_ends_a_stream(tmp_path: Path) -> None:
    clips = [tmp_path / f"missing{k}.wav" for k in range(8)]
    assert len(take(clips, 8, epochs=2, batch_size=2, max_rejected=1.0)) == 8


def counts(seen: int, rejected: int, total: int = 10**6) -> Counts:
    return Counts(total, seen, rejected, files=rejected, shuffled=True)


def test_a_share_must_say_something() -> None:
    """A few bad files of few clips are chance; the same share of many is not."""
    for seen, rejected in ((1, 1), (2, 2), (3, 2), (20, 4), (1000, 60)):
        assert not counts(seen, rejected).too_many(0.05), (seen, rejected)
    for seen, rejected in ((4, 4), (20, 9), (1000, 100), (100_000, 5600)):
        assert counts(seen, rejected).too_many(0.05), (seen, rejected)
    assert counts(3, 3, total=59).too_many(0.05) and not counts(3, 3, total=60).too_many(0.05)
    assert not counts(10**6, 2, total=1).too_many(1.0)
    assert counts(1, 1, total=1).too_many(0.05)  # all there is


def test_false_alarms_are_rare() -> None:
    """Runs with the allowed share of bad files, looked at after each clip."""
    random = np.random.default_rng(0)
    ended = 0
    for _ in range(200):
        bad = np.cumsum(random.random(400) < 0.05)
        ended += any(counts(n, int(k)).too_many(0.05) for n, k in enumerate(bad, 1))
    assert ended <= 2


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
