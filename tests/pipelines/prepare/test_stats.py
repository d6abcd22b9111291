"""ssast data stats: equal to numpy on all clips, honest about its error on some."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sounds import tone, write

from ssast.engine.cli.main import main
from ssast.kernels.fbank import FbankSpec, fbank_reference
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.clips.mix import MixedClips
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.pack import Packing, prepare_shards
from ssast.pipelines.prepare.stats import estimate, measure, write_stats

SPEC = FbankSpec(num_frames=60, n_mels=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Clips shorter and longer than 60 frames (9840 samples), of different loudness."""
    (tmp_path / "in").mkdir()
    for k in range(23):
        sound = tone(4000 + 700 * k, seed=k) * 0.9**k
        write(tmp_path / f"in/{k:02d}.wav", sound, subtype="PCM_16")
    return tmp_path / "in"


def reference(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-mel with its padding, [n, T, F], and the frames of each, in float64."""
    rows, lengths = [], []
    for path in sorted(folder.glob("*.wav")):
        samples, _ = soundfile.read(path)
        samples = samples[: SPEC.num_samples]
        padded = torch.zeros(1, SPEC.num_samples, dtype=torch.float64)
        padded[0, : len(samples)] = torch.from_numpy(samples)
        rows.append(fbank_reference(padded, torch.tensor([len(samples)]), SPEC)[0].numpy())
        lengths.append((len(samples) - 400) // 160 + 1)
    return np.stack(rows), np.array(lengths)


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("seed", [0, 5])
def test_equal_to_numpy(folder: Path, padding: bool, seed: int) -> None:
    stats = measure(
        folder, spec=SPEC, padding=padding, seed=seed, batch_size=4, precision=0, progress=False
    )
    values, lengths = reference(folder)
    assert lengths.min() < 60 == lengths.max()
    wanted = values if padding else values[np.arange(60) < lengths[:, None]]
    assert stats.mean == pytest.approx(wanted.mean(), abs=1e-5)
    assert stats.std == pytest.approx(wanted.std(), abs=1e-5)
    assert (stats.mean_error, stats.std_error) == (0.0, 0.0)  # all clips: nothing is estimated
    assert (stats.num_clips, stats.num_total, stats.num_rejected) == (23, 23, 0)
    assert stats.histogram.sum() == wanted.size
    assert stats.seconds_per_clip == pytest.approx(lengths.mean() / 100)


def test_shards_give_the_same(folder: Path, tmp_path: Path) -> None:
    packing = Packing(Recipe(), shard_mib=0.1)
    prepare_shards(folder, tmp_path / "out", packing, progress=False, log=lambda line: None)
    loose = measure(folder, spec=SPEC, progress=False)
    shards = measure(tmp_path / "out", spec=SPEC, progress=False)
    # Of the quietest clips the power is near the floor, where a rounded sample counts.
    assert shards.mean == pytest.approx(loose.mean, abs=2e-3)
    assert shards.std == pytest.approx(loose.std, abs=2e-3)


def test_a_part_is_the_same_part_again(folder: Path) -> None:
    parts = [
        measure(folder, spec=SPEC, share=0.4, seed=3, batch_size=size, progress=False)
        for size in (1, 4, 16)
    ]
    assert {part.num_clips for part in parts} == {10}
    for part in parts[1:]:
        assert part.mean == pytest.approx(parts[0].mean, abs=1e-12)
        assert part.mean_error == pytest.approx(parts[0].mean_error, rel=1e-9) and part.mean_error
    other = measure(folder, spec=SPEC, share=0.4, seed=4, progress=False)
    assert other.mean != parts[0].mean
    assert measure(folder, spec=SPEC, max_clips=7, progress=False).num_clips == 7


@pytest.mark.parametrize("k", [256, 600])
def test_the_intervals_hold_what_they_promise(k: int) -> None:
    """Of 2000 samples of clips with different lengths and levels, 95 % contain the truth."""
    rng = np.random.default_rng(k)
    num_total = 1000
    counts = rng.integers(100, 1000, num_total).astype(float)
    level = rng.normal(-4, 2, num_total) + counts / 500
    spread = rng.gamma(5, 0.8, num_total)
    sums, squares = counts * level, counts * (level**2 + spread**2)
    mean, _, std, _ = estimate(counts, sums, squares, num_total)
    hits = np.zeros(2)
    for _ in range(2000):
        some = rng.choice(num_total, k, replace=False)
        m, m_error, s, s_error = estimate(counts[some], sums[some], squares[some], num_total)
        hits += abs(m - mean) <= m_error, abs(s - std) <= s_error
    assert ((hits / 2000 > 0.93) & (hits / 2000 < 0.97)).all()


def test_estimates_at_the_edges() -> None:
    one = np.ones(1)
    assert estimate(one, one, one, 1) == (1.0, 0.0, 0.0, 0.0)
    assert estimate(one, one, 2 * one, 5)[1::2] == (math.inf, math.inf)
    assert estimate(np.ones(3), np.ones(3), np.ones(3), 9) == (1.0, 0.0, 0.0, 0.0)


def test_it_stops_early(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for k in range(700):
        write(tmp_path / f"in/{k}.wav", tone(1200, seed=k), subtype="PCM_16")
    spec = FbankSpec(num_frames=6, n_mels=16)
    early = measure(tmp_path / "in", spec=spec, precision=0.05, progress=False)
    whole = measure(tmp_path / "in", spec=spec, precision=0, progress=False)
    assert 256 <= early.num_clips < 600 and whole.num_clips == 700
    assert max(early.mean_error, early.std_error) <= 0.05 * early.std
    assert abs(early.mean - whole.mean) <= 1.5 * early.mean_error
    assert abs(early.std - whole.std) <= 1.5 * early.std_error


def test_bad_clips_do_not_count(folder: Path) -> None:
    alone = measure(folder, spec=SPEC, precision=0, progress=False)
    for k in range(9):
        (folder / f"bad{k}.wav").write_bytes(b"no sound")
    mixed = measure(folder, spec=SPEC, precision=0, progress=False)
    assert (mixed.num_clips, mixed.num_rejected) == (23, 9)
    assert (mixed.mean, mixed.std) == pytest.approx((alone.mean, alone.std), abs=1e-12)
    assert mixed.mean_error == 0.0


def test_command_and_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--num-frames", "60", "--n-mels", "32", "--out", str(tmp_path / "stats")]
    assert main(["data", "stats", str(folder), *settings]) == 0
    lines = capsys.readouterr().out.splitlines()
    values, _ = reference(folder)
    assert lines[-1] == f"audio.mean={values.mean():.4f} audio.std={values.std():.4f}"
    facts = json.loads((tmp_path / "stats/stats.json").read_text())
    assert facts["mean"] == pytest.approx(values.mean(), abs=1e-5)
    assert sum(facts["histogram"]) == values.size == 23 * 60 * 32
    assert len(facts["edges"]) == len(facts["histogram"]) + 1
    assert (tmp_path / "stats/stats.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--share", "0"], "--share is 0, expected"),
        (["--share", "2"], "--share is 2, expected"),
        (["--max-clips", "-1"], "--max-clips is -1, expected"),
        (["--precision", "-1"], "--precision is -1, expected"),
        (["--num-frames", "0"], "num_frames is 0"),
        (["--jobs", "0"], "num_threads is 0"),
    ],
)
def test_wrong_settings(
    folder: Path, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stats", str(folder), *settings]) == 2
    assert message in capsys.readouterr().err


def test_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    with pytest.raises(DataError, match=r"none of 1 clips can be used"):
        measure(tmp_path, spec=SPEC, progress=False)


def test_pictures_of_one_silent_clip(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.zeros(8000, np.float32), subtype="PCM_16")
    assert write_stats(measure(tmp_path, spec=SPEC, progress=False), tmp_path / "out")


def test_a_mix_is_drawn_with_repeats(folder: Path) -> None:
    """So that as many draws as there are clips have not heard all of them."""
    clips = read_clips(folder)
    mixed = MixedClips([clips[:3], clips[3:]], [1.0, 1.0])  # type: ignore[list-item]
    stats = measure(folder, clips=mixed, spec=SPEC, precision=0, progress=False)
    assert stats.num_clips == 23 and stats.mean_error > 0 and stats.std_error > 0
    assert measure(folder, spec=SPEC, precision=0, progress=False).mean_error == 0
