"""Kaldi filterbanks against the published numbers, float64 and edge cases."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_triton import on_triton
from paths import GOLDEN
from torch._subclasses.fake_tensor import FakeTensorMode

from ssast.kernels.fbank import (
    FbankSpec,
    _fbank,
    fbank,
    fbank_into,
    fbank_reference,
    mel_matrix,
    num_frames,
)
from ssast.kernels.fbank_kernel import _tables

REFERENCE = torch.load(GOLDEN / "fbank.pt", weights_only=True)["waves"]
# float32 is this far from float64 wherever the spectrum has no deep nulls (log-mel units)
MEAN, P999, MAX = 1e-5, 3e-4, 5e-3


Fbank = Callable[[torch.Tensor, torch.Tensor, FbankSpec], torch.Tensor]


@pytest.fixture(params=["torch", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture
def features(implementation: str) -> Iterator[Fbank]:
    """``fbank`` of tensors on the CPU by each implementation: torch's, and Triton's twice."""
    if implementation == "interpreted":
        with on_triton(_fbank, architecture=90):  # the largest blocks: the fewest steps
            yield fbank
    elif implementation == "cuda":
        yield lambda waves, lengths, spec: fbank(waves.cuda(), lengths.cuda(), spec).cpu()
    else:
        yield fbank


def errors(got: torch.Tensor, truth: torch.Tensor) -> tuple[float, float, float]:
    error = (got.double() - truth.double()).abs().flatten().numpy()
    return float(error.mean()), float(np.quantile(error, 0.999)), float(error.max())


def num_samples_of(frames: int, spec: FbankSpec) -> int:
    return (frames - 1) * spec.hop + spec.window


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def published(wave: dict) -> tuple[torch.Tensor, torch.Tensor, FbankSpec]:
    """Waveform [1, S] float64, its published features [T, F], a spec for a few frames more."""
    clip = wave["waveform_int16"][:1].double() / 32768
    clip = clip - clip.mean()
    expected = wave["fbank"]
    spec = FbankSpec(wave["sample_rate"], num_frames=len(expected) + 5)
    assert num_frames(clip.shape[1], spec) == len(expected)
    return clip, expected, spec


def assert_published(got: torch.Tensor, expected: torch.Tensor, wave: dict) -> None:
    assert (got[len(expected) :] == 0).all()
    mean, p999, worst = errors(got[: len(expected)], expected)
    if wave["name"].startswith("chirp"):  # its far sidelobes are rounding noise in float32
        assert mean < 1e-3 and worst < 0.1
    elif got.dtype == torch.float64 and wave["float64"]:
        assert worst < 1e-6  # the golden numbers are stored as float32
    else:
        assert mean < MEAN and p999 < P999 and worst < MAX


@pytest.mark.parametrize("wave", REFERENCE, ids=lambda w: w["name"])
def test_equals_the_published_features(wave: dict, implementation: str, features: Fbank) -> None:
    clip, expected, spec = published(wave)
    if implementation == "interpreted":  # one block of frames
        expected = expected[:50]
        spec = FbankSpec(wave["sample_rate"], num_frames=len(expected) + 5)
        clip = clip[:, : num_samples_of(len(expected), spec)]
    got = features(clip.float(), torch.tensor([clip.shape[1]]), spec)[0]
    assert got.dtype == torch.float32
    assert_published(got, expected, wave)


@pytest.mark.parametrize("wave", REFERENCE, ids=lambda w: w["name"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_equals_the_published_features(wave: dict, dtype: torch.dtype) -> None:
    clip, expected, spec = published(wave)
    got = fbank_reference(clip.to(dtype), torch.tensor([clip.shape[1]]), spec)[0]
    assert got.dtype == dtype
    assert_published(got, expected, wave)


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize("n_mels", [1, 3, 40, 80, 128])
def test_op_equals_float64(rate_hz: int, n_mels: int) -> None:
    assert_equals_float64(fbank, rate_hz, n_mels, frames=300)


# Odd windows (11025, 22050 Hz), the least rate; several blocks of frames (70, 130), of filters
# (128, 130: the last of them partly filled); the architectures whose blocks differ.
@pytest.mark.parametrize(
    ("rate_hz", "n_mels", "frames", "architecture"),
    [
        (1000, 5, 70, 80),
        (8000, 3, 130, 90),
        (8000, 130, 20, 80),
        (11025, 40, 20, 80),
        (16000, 128, 20, 80),
        (22050, 16, 5, 90),
    ],
)
def test_kernel_equals_float64(rate_hz: int, n_mels: int, frames: int, architecture: int) -> None:
    with on_triton(_fbank, architecture=architecture):
        assert_equals_float64(fbank, rate_hz, n_mels, frames)


@pytest.mark.gpu
@pytest.mark.parametrize("rate_hz", [1000, 8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("n_mels", [1, 3, 40, 80, 128, 256])
def test_a_gpu_equals_float64(rate_hz: int, n_mels: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert_equals_float64(
        lambda waves, lengths, spec: fbank(waves.cuda(), lengths.cuda(), spec).cpu(),
        rate_hz, n_mels, frames=300,
    )  # fmt: skip


def assert_equals_float64(features: Fbank, rate_hz: int, n_mels: int, frames: int) -> None:
    spec = FbankSpec(rate_hz, n_mels=n_mels, num_frames=frames)
    lengths = [num_samples_of(max(1, frames // 3), spec) + 7, 0, 1, spec.num_samples + 1000]
    waves = noise(len(lengths), max(lengths))
    truth = fbank_reference(waves.double(), torch.tensor(lengths), spec)
    got = features(waves, torch.tensor(lengths), spec)
    mean, p999, worst = errors(got, truth)
    assert mean < MEAN and p999 < P999 and worst < MAX
    assert ((got == 0) == (truth == 0)).all()


def sounds(num_samples: int) -> dict[str, torch.Tensor]:
    """Waveforms at 16 kHz, [2, S] float32."""
    times = torch.arange(num_samples, dtype=torch.float64).expand(2, -1) / 16000
    hz = torch.tensor([[437.3], [2811.7]])
    tone = 0.5 * torch.sin(2 * np.pi * hz * times)
    vowel = sum(
        0.3 / k * torch.sin(2 * np.pi * k * (0.3 * hz * times + 5 * torch.sin(3 * times)))
        for k in range(1, 15)
    )
    noises = noise(2, num_samples).double()
    waves = {
        "noise": noises,
        "int16": 32768 * noises,
        "quiet": 1e-3 * noises,
        "offset": 0.5 + 1e-2 * noises,
        "tone": tone,
        "tone_and_noise": tone + 1e-3 * noises,
        "chirp": 0.5 * torch.sin(2 * np.pi * hz * times * (1 + 4 * times)),
        "speech": vowel * (1 + torch.sin(12 * times)) + 1e-2 * noises,
    }
    return {name: wave.float() for name, wave in waves.items()}


@pytest.mark.parametrize("name", sounds(1))
def test_as_exact_as_the_definition(name: str, implementation: str, features: Fbank) -> None:
    """The largest error is that of bins with next to no power, which the logarithm magnifies."""
    spec = FbankSpec(num_frames=64 if implementation == "interpreted" else 600)
    waves = sounds(spec.num_samples)[name]
    lengths = torch.tensor([spec.num_samples, spec.num_samples])
    truth = fbank_reference(waves.double(), lengths, spec)
    rounding = torch.finfo(torch.float32).eps * truth.abs().max().item()
    own = errors(fbank_reference(waves, lengths, spec), truth)
    got = errors(features(waves, lengths, spec), truth)
    for error, allowed in zip(got, own, strict=True):
        assert error <= 2 * allowed + rounding


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
def test_short_clips(samples: int, features: Fbank) -> None:
    spec = FbankSpec(num_frames=8, n_mels=12)
    got = features(noise(1, samples), torch.tensor([samples]), spec)[0]
    frames = max(0, (samples - 400) // 160 + 1) if samples >= 400 else 0
    assert num_frames(samples, spec) == frames
    assert (got[:frames] != 0).all() and (got[frames:] == 0).all()


def test_long_clips_are_cut_at_the_end(features: Fbank) -> None:
    spec = FbankSpec(num_frames=10)
    wave = noise(1, 5000)
    whole = features(wave, torch.tensor([5000]), FbankSpec(num_frames=29))
    # Not to the bit: the products of fewer rows may add up in another order.
    cut = features(wave, torch.tensor([5000]), spec)
    torch.testing.assert_close(cut, whole[:, :10], rtol=1e-5, atol=1e-5)
    assert spec.num_samples == 1840 and num_frames(5000, spec) == 10


def test_what_lies_beyond_the_end_is_not_read(features: Fbank) -> None:
    spec = FbankSpec(num_frames=40, n_mels=40)
    wave = noise(2, 4000)
    clean = features(wave, torch.tensor([2000, 4000]), spec)
    wave[0, 2000:] = float("nan")
    assert torch.equal(features(wave, torch.tensor([2000, 4000]), spec), clean)
    lengths = torch.tensor([2000, 9999])  # a length past the tensor's end means its end
    assert torch.equal(features(wave, lengths, spec), clean)
    torch.testing.assert_close(fbank_reference(wave, lengths, spec), clean, rtol=0, atol=MAX)


def test_nan_in_a_clip_is_not_hidden(features: Fbank) -> None:
    """Else a broken clip would pass as a silent one."""
    wave = noise(1, 2000)
    wave[0, 400 + 3 * 160] = float("nan")  # the first sample after frame 3
    got = features(wave, torch.tensor([2000]), FbankSpec(num_frames=11, n_mels=20))[0]
    assert got[:4].isfinite().all() and got[7:].isfinite().all() and got[4:6].isnan().all()


def test_batch_rows_do_not_depend_on_each_other(implementation: str, features: Fbank) -> None:
    spec, samples = FbankSpec(num_frames=600), 100_000
    if implementation == "interpreted":
        spec, samples = FbankSpec(8000, num_frames=70, n_mels=9), 6000
    wave = noise(5, samples)
    lengths = torch.tensor([samples, spec.window, samples // 2 + 1, 0, samples - 1])
    together = features(wave, lengths, spec)
    for row in range(5):
        alone = features(wave[row : row + 1], lengths[row : row + 1], spec)[0]
        assert torch.equal(alone, together[row])


def test_empty_batch(features: Fbank) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    got = features(torch.zeros(0, 500), none, FbankSpec(num_frames=3, n_mels=5))
    assert got.shape == (0, 3, 5) and got.dtype == torch.float32


def test_strided_input(features: Fbank) -> None:
    spec = FbankSpec(8000, num_frames=12, n_mels=7)
    memory = noise(4, 2 * spec.num_samples)
    lengths = torch.tensor([[spec.num_samples, 0], [spec.window + 1, 0]])
    for wave in (
        memory[::2, 5 : 5 + spec.num_samples],
        memory[1::2, ::2],
        memory[:1].expand(2, -1),
    ):
        got = features(wave, lengths[:, 0], spec)
        want = features(wave.contiguous(), lengths[:, 0].contiguous(), spec)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


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


def test_silence_is_the_floor(features: Fbank) -> None:
    got = features(torch.zeros(1, 560), torch.tensor([560]), FbankSpec(num_frames=3))
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


def test_tables_outlive_inference_mode() -> None:
    args = noise(1, 500), torch.tensor([500]), FbankSpec(8000, num_frames=3, n_mels=5)
    _tables.cache_clear()
    with on_triton(_fbank):
        with torch.inference_mode():
            inside = fbank(*args)
        assert torch.equal(fbank(*args), inside)
    assert not any(table.is_inference() for table in _tables(args[2], torch.device("cpu")))


@pytest.mark.parametrize("rate_hz", [1000, 8000, 16000, 44100])
@pytest.mark.parametrize("n_mels", [1, 16, 65, 128, 257])
def test_tables_leave_out_no_bin_that_counts(rate_hz: int, n_mels: int) -> None:
    spec = FbankSpec(rate_hz, n_mels)
    tables = _tables(spec, torch.device("cpu"))
    mel = tables.mel.double().sum(0)
    np.testing.assert_allclose(mel[:n_mels].T, mel_matrix(spec)[:-1], atol=1e-7)
    assert (mel[n_mels:] == 0).all()
    for rows, (first, last) in zip(mel.chunk(len(tables.spans)), tables.spans, strict=True):
        assert (rows[:, :first] == 0).all() and (rows[:, last:] == 0).all()
        assert first == last or (rows[:, first].any() and rows[:, last - 1].any())


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode():
        waves = torch.empty(3, 900, device="cuda")
        lengths = torch.empty(3, dtype=torch.int64, device="cuda")
        got = fbank(waves, lengths, FbankSpec(num_frames=7, n_mels=5))
    assert got.shape == (3, 7, 5)
    assert got.device.type == "cuda" and got.dtype == torch.float32


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
