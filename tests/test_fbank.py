"""Kaldi filterbanks against the published numbers, float64 and edge cases."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssast.kernels.fbank import (
    FbankSpec,
    fbank,
    fbank_into,
    fbank_reference,
    mel_matrix,
    num_frames,
)

GOLDEN = torch.load(Path(__file__).parent / "golden" / "fbank.pt", weights_only=True)["waves"]
# float32 is this far from float64 wherever the spectrum has no deep nulls (log-mel units)
MEAN, P999, MAX = 1e-5, 3e-4, 5e-3


def errors(got: torch.Tensor, truth: torch.Tensor) -> tuple[float, float, float]:
    error = (got.double() - truth.double()).abs().flatten().numpy()
    return float(error.mean()), float(np.quantile(error, 0.999)), float(error.max())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("wave", GOLDEN, ids=lambda w: w["name"])
@pytest.mark.parametrize("path", ["op", "reference32", "reference64"])
def test_equals_the_published_features(wave: dict, path: str) -> None:
    clip = wave["waveform_int16"][:1].double() / 32768
    clip = clip - clip.mean()
    expected = wave["fbank"]
    spec = FbankSpec(wave["sample_rate"], num_frames=len(expected) + 5)
    length = torch.tensor([clip.shape[1]])
    assert num_frames(clip.shape[1], spec) == len(expected)
    if path == "op":
        got = fbank(clip.float(), length, spec)[0]
    else:
        got = fbank_reference(clip.float() if path == "reference32" else clip, length, spec)[0]
    assert got.dtype == (torch.float64 if path == "reference64" else torch.float32)
    assert (got[len(expected) :] == 0).all()
    mean, p999, worst = errors(got[: len(expected)], expected)
    if wave["name"].startswith("chirp"):  # its far sidelobes are rounding noise in float32
        assert mean < 1e-3 and worst < 0.1
    elif path == "reference64" and wave["float64"]:
        assert worst < 1e-6  # the golden numbers are stored as float32
    else:
        assert mean < MEAN and p999 < P999 and worst < MAX


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize("n_mels", [1, 3, 40, 80, 128])
def test_op_equals_float64(rate_hz: int, n_mels: int) -> None:
    spec = FbankSpec(rate_hz, n_mels=n_mels, num_frames=300)
    lengths = [spec.num_samples - 1, 0, 1, spec.window, spec.num_samples + 1000, 31 * spec.hop + 7]
    waves = noise(len(lengths), max(lengths))
    got = fbank(waves, torch.tensor(lengths), spec)
    truth = fbank_reference(waves.double(), torch.tensor(lengths), spec)
    mean, p999, worst = errors(got, truth)
    assert mean < MEAN and p999 < P999 and worst < MAX


def test_reference_is_kaldi_written_out() -> None:
    spec = FbankSpec(num_frames=4)
    wave = noise(1, 1000).double()
    mel = mel_matrix(spec)
    hann = np.array([0.5 - 0.5 * np.cos(2 * np.pi * k / 399) for k in range(400)])
    for t in range(4):
        x = wave[0].numpy()[160 * t : 160 * t + 400]
        x = x - x.mean()
        x = np.concatenate([x[:1] - 0.97 * x[:1], x[1:] - 0.97 * x[:-1]]) * hann
        power = np.abs(np.fft.rfft(x, 512)) ** 2
        expected = np.log(np.maximum(power @ mel, np.finfo(np.float32).eps))
        got = fbank_reference(wave, torch.tensor([1000]), spec)[0, t]
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


def test_mel_filters_are_kaldis() -> None:
    mel = mel_matrix(FbankSpec())
    assert mel.shape == (257, 128) and (mel[256] == 0).all() and (mel >= 0).all()
    assert (np.flatnonzero(mel.sum(0) == 0) == [3]).all()  # narrower than a bin of the FFT
    # between the first and the last centre the triangles of neighbours add up to 1
    np.testing.assert_allclose(mel[3:250].sum(1), 1.0, atol=1e-12)


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 401, 559, 560, 561])
def test_short_clips(samples: int) -> None:
    spec = FbankSpec(num_frames=8)
    got = fbank(noise(1, samples), torch.tensor([samples]), spec)[0]
    frames = max(0, (samples - 400) // 160 + 1) if samples >= 400 else 0
    assert num_frames(samples, spec) == frames
    assert (got[:frames] != 0).all() and (got[frames:] == 0).all()


def test_long_clips_are_cut_at_the_end() -> None:
    spec = FbankSpec(num_frames=10)
    wave = noise(1, 5000)
    whole = fbank(wave, torch.tensor([5000]), FbankSpec(num_frames=29))
    # Not to the bit: the products of fewer rows may add up in another order.
    cut = fbank(wave, torch.tensor([5000]), spec)
    torch.testing.assert_close(cut, whole[:, :10], rtol=1e-5, atol=1e-5)
    assert spec.num_samples == 1840 and num_frames(5000, spec) == 10


def test_what_lies_beyond_the_end_is_not_read() -> None:
    spec = FbankSpec(num_frames=40)
    wave = noise(2, 4000)
    clean = fbank(wave, torch.tensor([2000, 4000]), spec)
    wave[0, 2000:] = float("nan")
    assert torch.equal(fbank(wave, torch.tensor([2000, 4000]), spec), clean)
    lengths = torch.tensor([2000, 9999])  # a length past the tensor's end means its end
    assert torch.equal(fbank(wave, lengths, spec), clean)


def test_batch_rows_do_not_depend_on_each_other() -> None:
    spec = FbankSpec(num_frames=600)
    wave, lengths = noise(5, 100_000), torch.tensor([100_000, 400, 50_001, 0, 99_999])
    together = fbank(wave, lengths, spec)
    for row in range(5):
        assert torch.equal(
            fbank(wave[row : row + 1], lengths[row : row + 1], spec)[0], together[row]
        )


def test_memory_alignment_does_not_matter() -> None:
    """BLAS may take another path for another alignment; a clip's place in a batch must not."""
    spec = FbankSpec(num_frames=57, n_mels=23)
    wave = noise(9600)
    memory = torch.empty(40 * 57 * 23)
    places = [memory[7 * k :][: 57 * 23].view(57, 23) for k in range(40)]
    fbank_into(places[0], wave, spec)
    first = places[0].clone()
    for place in places:
        fbank_into(place, wave, spec)
        assert torch.equal(place, first)


def test_silence_is_the_floor() -> None:
    got = fbank(torch.zeros(1, 560), torch.tensor([560]), FbankSpec(num_frames=3))
    floor = float(np.log(np.finfo(np.float32).eps))
    torch.testing.assert_close(got[0, :2], torch.full((2, 128), floor))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 3000),
    st.integers(1, 20),
    st.integers(1, 128),
    st.sampled_from([1e-4, 1.0, 32768.0]),
)
def test_any_length_and_scale(samples: int, frames: int, n_mels: int, scale: float) -> None:
    spec = FbankSpec(8000, n_mels=n_mels, num_frames=frames)
    wave = noise(1, samples, seed=samples) * scale
    length = torch.tensor([samples])
    got = fbank(wave, length, spec)
    torch.testing.assert_close(
        got.double(), fbank_reference(wave.double(), length, spec), atol=5e-3, rtol=0
    )
    assert num_frames(length, spec).item() == num_frames(samples, spec)


def test_torch_library_contract() -> None:
    args = (noise(2, 2000), torch.tensor([2000, 900]), 16000, 64, 9, 20.0)
    torch.library.opcheck(torch.ops.ssast.fbank.default, args)


def test_compiles_in_one_graph() -> None:
    spec = FbankSpec(num_frames=9)
    wave, lengths = noise(2, 2000), torch.tensor([2000, 900])
    compiled = torch.compile(lambda w, n: fbank(w, n, spec) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(wave, lengths), fbank(wave, lengths, spec) * 2)


@pytest.mark.parametrize(
    ("waves", "lengths", "message"),
    [
        (torch.zeros(400), torch.tensor([400]), r"waveforms must be \[B, S\] float32"),
        (torch.zeros(1, 400).double(), torch.tensor([400]), "waveforms must be .* torch.float64"),
        (torch.zeros(2, 400), torch.tensor([400]), r"num_samples must be \[2\] int64, got \[1\]"),
        (torch.zeros(1, 400), torch.tensor([4.0]), "num_samples must be .* torch.float32"),
        (torch.zeros(1, 400, device="meta"), torch.tensor([400]), "num_samples is on cpu"),
    ],
)
def test_wrong_arguments(waves: torch.Tensor, lengths: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fbank(waves, lengths, FbankSpec())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_mels": 0}, "n_mels is 0"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"sample_rate_hz": 16}, "sample_rate_hz is 16"),
        ({"low_hz": 8000.0}, "low_hz is 8000.0"),
    ],
)
def test_wrong_settings(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FbankSpec(**setting)
