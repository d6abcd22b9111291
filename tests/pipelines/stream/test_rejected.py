"""Clips that cannot be read are replaced and reported; other errors stop the stream."""

from pathlib import Path

import pytest
import torch
from sounds import bad_files, tone, write, write_clips
from streams import open_stream, rows, same, take, torn

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.errors import DataError
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
