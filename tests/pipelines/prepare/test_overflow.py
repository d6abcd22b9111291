"""Peaks beyond full scale: scaled or kept as the user chooses, named, never clipped."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sounds import tone, write

from ssast.engine.cli.main import main
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.encoded import read_clip
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.prepare.check import check_data
from ssast.pipelines.stream.stream import AudioStream


@pytest.mark.parametrize("codec", ["flac", "wav", "float"])
def test_no_peak_is_clipped(codec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wave = tone(32000) * np.repeat([0.5, 6.0], 16000).astype(np.float32)
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/loud.wav", wave, subtype="FLOAT")
    write(tmp_path / "in/quiet.wav", 0.5 * tone(16000, seed=1), subtype="FLOAT")
    out = tmp_path / "out"
    assert main(["data", "prepare", str(tmp_path / "in"), str(out), "--clip-s", "1", "--codec",
                 codec]) == 0  # fmt: skip
    what = "kept" if codec == "float" else "scaled down to it: see --codec float"
    said = f"1 clips have peaks beyond full scale, {what}: {out}/overflows.jsonl"
    assert said in capsys.readouterr().out.splitlines()
    peak = float(np.abs(wave).max())
    (line,) = map(json.loads, (out / "overflows.jsonl").read_text().splitlines())
    assert line == {"name": "loud.wav", "part": 1, "peak": round(peak, 4)}
    assert json.loads((out / "report.json").read_text())["overflows"] == 1
    clips = read_clips(out)
    want = [wave[:16000], wave[16000:] / (1 if codec == "float" else peak)]
    for clip, expected in zip(clips[:2], want, strict=True):
        for data in (clip.read(), read_clip(clip, FbankSpec(num_frames=120)).tobytes()):
            got = soundfile.read(io.BytesIO(data), dtype="float32")[0]
            tolerance = 0 if codec == "float" else 1e-4
            np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    assert check_data(out, progress=False).problems == []
    with AudioStream(
        clips, FbankSpec(num_frames=98), batch_size=3, epochs=1, device=torch.device("cpu")
    ) as stream:
        (batch,) = list(stream)
        assert batch.valid.all() and torch.isfinite(batch.fbank).all()


def test_files_in_training_keep_their_levels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", 6 * tone(16000), subtype="FLOAT")
    data = read_clip(path, FbankSpec(num_frames=100)).tobytes()
    got = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    np.testing.assert_array_equal(got, 6 * tone(16000))


def test_silent_windows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wave = np.concatenate([tone(32000), np.zeros(48000, np.float32), tone(16000)])
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/a.wav", np.concatenate([wave, np.zeros(32000, np.float32)]))
    write(tmp_path / "in/b.wav", wave[:32000])
    folders = [str(tmp_path / "in"), str(tmp_path / "out")]
    assert main(["data", "prepare", *folders, "--clip-s", "1"]) == 0
    assert "5 s of other recordings' windows are left out: they hold" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/report.json").read_text())["left_out_s"] == 5
