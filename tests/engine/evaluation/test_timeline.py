"""Prediction window by window."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from finetune_runs import RATE_HZ, make_sounds, overrides
from shards import make_recordings, prepare
from sounds import tone, write

from ssast.engine.checkpoints.classifier import build_classifier, save_chosen
from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.evaluation import timeline
from ssast.engine.evaluation.timeline import SLICE, Windows, _columns
from ssast.engine.finetune import FinetuneEngine
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.errors import StorageError

SPEC = FbankSpec(n_mels=32, num_frames=48)
LONGEST_S = SPEC.num_samples / RATE_HZ


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A classifier as drawn."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "plain.yaml").write_text("finetune: {}\n")
    config = load_config(folder / "plain.yaml", overrides())
    torch.manual_seed(0)
    state = build_classifier(config, 3).state_dict()
    weights = {f"weight/{name}": value for name, value in state.items()}
    save_chosen(folder, weights, step=1, config=config, classes=["a", "b", "c"], facts={})
    return folder


@pytest.mark.parametrize("rate_hz", [RATE_HZ, 44100])
@pytest.mark.parametrize(
    ("count", "starts"),
    [
        (3000, [0]),
        (4800, [0]),
        (4801, [0, 1]),
        (9600, [0, 1600, 3200, 4800]),
        (10000, [0, 1600, 3200, 4800, 5200]),
    ],
)
def test_windows_cover_a_recording(count, starts, rate_hz, tmp_path):
    """All of it, the last one ending where the recording ends."""
    samples = np.repeat(tone(count), 1 if rate_hz == RATE_HZ else 3)[: count * rate_hz // RATE_HZ]
    path = write(tmp_path / "a.wav", samples, rate_hz, subtype="FLOAT")
    found = list(Windows(4800, 1600).cut(path, FbankSpec()))
    total = found[-1][0] + len(found[-1][1])
    assert abs(total - count) <= 1  # by the rounding of the resampler
    if rate_hz == RATE_HZ:
        assert [start for start, _ in found] == starts
        for start, window in found:
            np.testing.assert_array_equal(window, samples[start : start + 4800])


def test_a_short_clip_is_predicted_as_without_windows(run, tmp_path):
    engine = FinetuneEngine.from_checkpoint(run)
    (path, *_) = make_sounds(tmp_path, 1, 1)  # half a second
    samples, _ = soundfile.read(path, dtype="float32")
    short = write(tmp_path / "short.wav", samples[:6000], subtype="PCM_16")
    (plain,) = engine.predict([short])
    (found,) = engine.timelines([short])
    assert (found.starts_s.tolist(), found.ends_s.tolist()) == ([0.0], [6000 / RATE_HZ])
    assert dict(plain.classes) == pytest.approx(
        dict(zip(found.classes, found.probabilities[0], strict=True)), abs=1e-5
    )


def test_each_window_is_predicted_as_a_clip_of_its_own(run, tmp_path):
    engine = FinetuneEngine.from_checkpoint(run)
    parts = [soundfile.read(p, dtype="float32")[0] for p in make_sounds(tmp_path, 3, 1)]
    whole = write(tmp_path / "whole.wav", np.concatenate(parts), subtype="PCM_16")
    (found,) = engine.timelines([whole], 0.25, 0.25)
    assert found.starts_s.tolist() == [0, 0.25, 0.5, 0.75, 1.0, 1.25]
    for number, part in enumerate(np.concatenate(parts).reshape(6, 4000)):
        clip = write(tmp_path / f"part{number}.wav", part, subtype="PCM_16")
        (plain,) = engine.predict([clip])
        ours = dict(zip(found.classes, found.probabilities[number], strict=True))
        assert dict(plain.classes) == pytest.approx(ours, abs=1e-4)
    assert found.spectrogram.shape[1] == 32
    assert len(found.spectrogram) == 30  # a column each 50 ms
    assert np.isfinite(found.spectrogram).all()


def test_the_command_line_writes_lines_and_pictures(run, tmp_path, capsys):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "same.flac", tone(20000))
    (tmp_path / "bad.wav").write_text("no sound")
    out = tmp_path / "out"
    sources = [str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "bad.wav")]
    options = ["--window-s", "0.4", "--hop-s", "0.2", "--out", str(out), "--json"]
    assert main(["predict", str(run), *sources, *options]) == 3
    shown = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in (out / "windows.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in shown[: len(lines)]] == lines
    assert {path.name for path in out.iterdir()} == {"windows.jsonl", "same.png", "same-2.png"}
    first = [line for line in lines if line["path"].endswith("one/same.flac")]
    assert [line["start_s"] for line in first] == [0, 0.2, 0.4, 0.6, 0.8, 0.85]
    assert first[-1]["end_s"] == 1.25
    assert len(first[0]["classes"]) == 3
    assert "cannot be decoded" in lines[-1]["reason"]
    assert main(["predict", str(run), *sources, *options[:4]]) == 3
    assert "0.20-0.60 s  " in capsys.readouterr().out


def test_what_is_done_is_written_when_the_command_ends_early(run, tmp_path, monkeypatch):
    """The lines and the picture of a recording, before the next one begins."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.flac", tone(20000))
    blocks, out = timeline.read_blocks, tmp_path / "out"

    def read(item, *settings):
        if item.name.endswith("b.flac"):
            raise RuntimeError("killed")
        return blocks(item, *settings)

    monkeypatch.setattr(timeline, "read_blocks", read)
    with pytest.raises(RuntimeError, match="killed"):
        main(["predict", str(run), str(tmp_path / "in"), "--out", str(out)])
    lines = [json.loads(line) for line in (out / "windows.jsonl").read_text().splitlines()]
    assert lines[-1]["end_s"] == 1.25 and {Path(line["path"]).name for line in lines} == {"a.flac"}
    assert {path.name for path in out.iterdir()} == {"windows.jsonl", "a.png"}


def test_windows_of_segments_have_the_times_of_their_recording(run, tmp_path):
    """And its path, so that a table of windows finds the sound again."""
    path = write(tmp_path / "a.wav", tone(64000))
    write_manifest(
        tmp_path / "a.json", [Segment(str(path), 1.5, 1.0), Segment(str(path), 9.0, 1.0)]
    )
    out = tmp_path / "out"
    given = ["--window-s", "0.4", "--hop-s", "0.3", "--out", str(out)]
    assert main(["predict", str(run), str(tmp_path / "a.json"), *given]) == 3
    lines = [json.loads(line) for line in (out / "windows.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == {str(path)}
    times = [(line["start_s"], line["end_s"]) for line in lines[:-1]]
    assert times == [(1.5, 1.9), (1.8, 2.2), (2.1, 2.5)]
    assert lines[-1]["reason"].startswith("segment [9-10 s]: ")
    assert {path.name for path in out.iterdir()} == {"windows.jsonl", "a.png"}
    (found, _) = timeline.timelines(run, tmp_path / "a.json", 0.4, 0.3)
    whole = write(tmp_path / "part.wav", soundfile.read(path, dtype="float32")[0][24000:40000])
    (alone,) = timeline.timelines(run, whole, 0.4, 0.3)
    np.testing.assert_allclose(found.probabilities, alone.probabilities, atol=1e-4)


def test_a_damaged_clip_of_a_prepared_folder_costs_no_other(run, tmp_path, capsys):
    make_recordings(tmp_path / "in", 3)
    index = prepare(tmp_path / "in", tmp_path / "out", clip_s=1.0)
    assert len(index) == 9
    shard = Path(index[0].path)
    data = bytearray(shard.read_bytes())
    data[index[1].offset - 512 : index[1].offset] = bytes(512)
    shard.write_bytes(data[: index[8].offset + 9])
    assert main(["predict", str(run), str(tmp_path / "out"), "--hop-s", "0.4", "--json"]) == 3
    shown = capsys.readouterr()
    reasons = [json.loads(line).get("reason") for line in shown.out.splitlines()]
    assert shown.err.splitlines()[-1] == "ssast: 2 of 9 files could not be read"
    overwritten, truncated = (reason for reason in reasons if reason)
    assert "the shard was overwritten" in overwritten and "the shard is truncated" in truncated
    shard.unlink()
    assert main(["predict", str(run), str(tmp_path / "out"), "--hop-s", "0.2", "--json"]) == 2
    reasons = [json.loads(line)["reason"] for line in capsys.readouterr().out.splitlines()]
    assert reasons == 9 * ["cannot be read: No such file or directory"]


@pytest.mark.parametrize(
    ("window_s", "hop_s", "message"),
    [
        (10.0, None, f"--window-s must be between 0.025 and {LONGEST_S:g} s.*got 10"),
        (0.01, None, "--window-s must be between"),
        (0.3, 0.4, "--hop-s must be above 0 and at most 0.3, got 0.4"),
        (None, 0.0, "--hop-s must be above 0"),
    ],
)
def test_impossible_windows_are_refused(window_s, hop_s, message):
    with pytest.raises(ConfigError, match=message):
        Windows.from_seconds(SPEC, window_s, hop_s)


def test_storage_that_fails_is_not_the_fault_of_a_recording(monkeypatch):
    def fail(path):
        raise StorageError(f"{path}: storage kept failing")

    monkeypatch.setattr(timeline.Item, "of", fail)
    with pytest.raises(StorageError, match=r"a.wav: storage kept failing"):
        next(Windows.from_seconds(SPEC, None, None).cut("a.wav", SPEC))


def test_windows_are_as_long_as_the_input_by_default():
    cutting = Windows.from_seconds(SPEC, None, None)
    assert (cutting.length, cutting.hop) == (SPEC.num_samples, round(SPEC.num_samples / 2))


def test_a_column_of_the_spectrogram_is_of_all_its_frames():
    """Of two windows that begin within it, the one that has more of it counts."""
    frames = np.arange(40.0)[:, None]
    whole = _columns(frames, 0)
    assert [number for number, (_, held) in whole.items() if held != SLICE] == []
    part = _columns(frames[SLICE // 2 : 3 * SLICE], SLICE // 2)
    assert part[0][1] == SLICE - SLICE // 2 and part[1] == whole[1]
