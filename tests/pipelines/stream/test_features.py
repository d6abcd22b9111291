"""The stream's filterbanks are Kaldi's, whatever computes them and whatever the format."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from paths import GOLDEN
from sounds import tone, write
from streams import FIELDS, SPEC, rows, take

from ssast.kernels.fbank import FbankSpec, fbank, fbank_reference, num_frames
from ssast.pipelines.stream.graph import FbankThreads, build_pipeline, mel_gains
from ssast.pipelines.stream.source import ClipSource


def oracle(path: Path, spec: FbankSpec) -> tuple[torch.Tensor, int]:
    """Features in float64 of what libsndfile decodes."""
    samples = torch.tensor(soundfile.read(path, dtype="float64")[0])[None, : spec.num_samples]
    samples = samples - samples.mean()
    length = samples.shape[1]
    return fbank_reference(samples, torch.tensor([length]), spec)[0], num_frames(length, spec)


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
