"""The data benchmark: all loaders compute the same, and the output can be read."""

import json
from pathlib import Path

import pytest
import soundfile
import torch

from ssast.benchmarks.loading.data import main, write_clips, write_shards
from ssast.benchmarks.loading.loaders import plain_fbank, plain_loaders
from ssast.kernels.fbank import FbankSpec, fbank_reference


def test_the_plain_loaders_are_kaldi_too(tmp_path: Path) -> None:
    spec = FbankSpec(num_frames=150)
    for path in write_clips(tmp_path, 2, seconds=1.3):
        samples = torch.tensor(soundfile.read(path, dtype="float32")[0])
        centred = (samples - samples.mean()).double()[None]
        expected = fbank_reference(centred, torch.tensor([len(samples)]), spec)[0]
        found = [plain_fbank(samples, spec)]
        found += [compute(path, spec) for compute in plain_loaders()[0].values()]
        for features in found:
            error = (features - expected).abs()
            assert error.mean() < 1e-5 and error.max() < 5e-3


def test_the_loaders_that_are_missing_are_named() -> None:
    found, missing = plain_loaders()
    assert next(iter(found)) == "soundfile" and len(found) + len(missing) == 3
    assert all(line.startswith("not compared with torch") and "\n" not in line for line in missing)


def test_shards_hold_the_same_clips_in_the_same_order(tmp_path: Path) -> None:
    paths = write_clips(tmp_path, 4, seconds=1.0)
    paths = [paths[row] for row in (2, 0, 1, 2)]
    for path, clip in zip(paths, write_shards(tmp_path, paths, "flac"), strict=True):
        (tmp_path / "one.flac").write_bytes(clip.read())
        wanted, found = (soundfile.read(p, dtype="int16")[0] for p in (path, tmp_path / "one.flac"))
        assert (wanted == found).all()


@pytest.mark.slow
def test_a_short_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_clips(tmp_path, 3, seconds=2.0)
    settings = ["--clips", "8", "--rounds", "1", "--batch-size", "4", "--data", str(tmp_path)]
    assert main([*settings, "--shards", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["clips"] == 8 and result["ratio"] > 0 and result["decode_ratio"] > 0
    assert result["max_difference"] < 5e-3
    assert set(result["stages_cpu_ms"]) == {"files", "shards"}
    for source, stages in result["stages_cpu_ms"].items():
        assert sum(stages.values()) == pytest.approx(result["cpu_ms"][source])
        fed = result["clips_per_s"]["16 cores"][source]
        assert fed == pytest.approx(16e3 / result["cpu_ms"][source])
    assert all(ms > 0 for ms in (*result["cpu_ms"].values(), *result["wall_ms"].values()))


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
