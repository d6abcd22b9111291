"""The data benchmark: both loaders compute the same, and the output can be read."""

import json
from pathlib import Path

import pytest
import soundfile
import torch

from ssast.benchmarks.data import main, plain_fbank, write_clips
from ssast.kernels.fbank import FbankSpec, fbank_reference


def test_the_plain_loader_is_kaldi_too(tmp_path: Path) -> None:
    spec = FbankSpec(num_frames=150)
    for path in write_clips(tmp_path, 2, seconds=1.3):
        samples = torch.tensor(soundfile.read(path, dtype="float32")[0])
        centred = (samples - samples.mean()).double()[None]
        expected = fbank_reference(centred, torch.tensor([len(samples)]), spec)[0]
        error = (plain_fbank(samples, spec) - expected).abs()
        assert error.mean() < 1e-5 and error.max() < 5e-3


@pytest.mark.slow
def test_a_short_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_clips(tmp_path, 3, seconds=2.0)
    settings = ["--clips", "8", "--rounds", "1", "--batch-size", "4", "--data", str(tmp_path)]
    assert main([*settings, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["clips"] == 8 and result["ratio"] > 0 and result["decode_ratio"] > 0
    assert result["max_difference"] < 5e-3


@pytest.mark.slow
def test_every_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = ["--clips", "4", "--rounds", "1", "--batch-size", "4", "--seconds", "1"]
    picture = tmp_path / "data.png"
    assert main([*settings, "--kinds", "flac", "wav", "ogg", "--plot", str(picture)]) == 0
    table = capsys.readouterr().out
    for kind in ("flac", "wav", "ogg"):
        assert f"{kind}, 1 s, 4 clips" in table
    assert table.count("CPU ms by stage") == 3 and picture.stat().st_size > 5000


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--data", str(tmp_path)])
