"""torch.export and ONNX, by the numbers of the model that they were made of."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from sounds import tone
from torch import nn

from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import CheckpointError
from ssast.engine.formats import portable
from ssast.engine.formats.portable import Portable, save_onnx, save_program
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio, Model
from ssast.kernels.fbank import fbank

AUDIO = Audio(num_frames=64, mean=-5.0, std=4.0)
OPTIONS = {"positions": "sincos", "extra_tokens": "cls", "norm": "post"}
CASES = {
    "patch": ((16, 16), (10, 10), "avgtok", {}),
    "frame": ((128, 2), (128, 1), "cls", {}),
    "encoder": ((16, 16), (16, 16), None, {}),
    "options": ((16, 16), (10, 10), "cls", OPTIONS),
}
LABELS = ["a", "b", "c", "d", "e"]


def make(case):
    torch.manual_seed(0)
    patch, stride, pooling, options = CASES[case]
    model = Model(size="tiny", depth=1, patch=patch, **options)
    encoder = SpectrogramTransformer(model, AUDIO, stride).eval()
    return encoder if pooling is None else Classifier(encoder, 5, pooling).eval()


@torch.no_grad()
def outputs(model, x):
    if isinstance(model, SpectrogramTransformer):
        return model(x, model.no_masks(len(x)))[0]
    return model(x)


def fbanks(B):
    return torch.randn(B, 64, 128, generator=torch.Generator().manual_seed(B)) * 4 - 5


@pytest.mark.compatible("ONNX Runtime", "export --to onnx: any batch size")
@pytest.mark.compatible("PyTorch", "torch.export (export --to pt2): any batch size")
@pytest.mark.parametrize("case", CASES)
def test_torch_export_and_onnx_have_the_same_numbers_for_any_batch(case, tmp_path):
    model = make(case)
    labels = LABELS if case == "patch" else None
    save_program(model, tmp_path / "new" / "model.pt2", AUDIO, labels)
    save_onnx(model, tmp_path / "model.onnx", AUDIO, labels)
    extra = {"labels": ""}
    program = torch.export.load(tmp_path / "new" / "model.pt2", extra_files=extra)
    run = program.module()
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert not (tmp_path / "model.onnx.data").exists()
    if labels is not None:
        assert json.loads(extra["labels"]) == labels
        assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == labels
    assert session.get_inputs()[0].shape == ["batch", 64, 128]
    for B in (1, 2, 7):
        x = fbanks(B)
        want = outputs(model, x)
        torch.testing.assert_close(run(x), want, rtol=1e-5, atol=1e-5)
        (found,) = session.run(["output"], {"fbank": x.numpy()})
        assert found.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-5, atol=1e-5)
    # Nothing of ours is left in the program: it runs without this package.
    assert not [n.target for n in program.graph.nodes if "ssast" in str(n.target)]


def mixture() -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [6, S] of 16 bits: cut, whole, of less than a window, and a tone beside silence."""
    longest = fbank_spec(AUDIO).num_samples
    counts = torch.tensor([longest + 5_000, longest, 4_321, 400, 399, 8_000])
    rows = [torch.from_numpy(tone(len_, seed=len_)) for len_ in counts[:5].tolist()]
    t = torch.arange(8_000) / 16_000
    rows.append(0.99 * torch.sin(2 * torch.pi * 440 * t) + 1e-4 * torch.from_numpy(tone(8_000)))
    clips = nn.utils.rnn.pad_sequence(rows, batch_first=True).clamp(-1, 1)
    return (clips * 2**15).round() / 2**15, counts


@pytest.mark.compatible("ONNX Runtime", "export --to onnx --input waveform: log-mel within 1e-3")
@pytest.mark.compatible("PyTorch", "export --to pt2 --input waveform: log-mel within 1e-3")
def test_the_filterbank_in_a_file_is_the_one_it_was_trained_with(tmp_path, monkeypatch):
    monkeypatch.setattr(portable, "Portable", lambda model: nn.Identity())  # the log-mel comes out
    save_onnx(make("encoder"), tmp_path / "a.onnx", AUDIO, fed="waveform")
    save_program(make("encoder"), tmp_path / "a.pt2", AUDIO, fed="waveform")
    clips, counts = mixture()
    clips[2, 5_000:] = 0.5  # beyond the clip's end
    program = torch.export.load(tmp_path / "a.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for rows in (slice(None), slice(3, 5), slice(5, 6)):
        x, n = clips[rows, : int(counts[rows].max())].contiguous(), counts[rows]
        want = fbank(x, n, fbank_spec(AUDIO))
        loud = want > -10
        given = {"waveform": x.numpy(), "num_samples": n.numpy()}
        for found in (program(x, n), torch.from_numpy(session.run(None, given)[0])):
            assert found.shape == want.shape and found.dtype == torch.float32
            assert found[want == 0].eq(0).all()
            torch.testing.assert_close(found[loud], want[loud], rtol=0, atol=1e-3)
            torch.testing.assert_close(found, want, rtol=0, atol=2e-2)


def test_weights_are_shared_and_gradients_flow():
    model = make("patch")
    x = fbanks(1).requires_grad_()
    shared = Portable(model)
    torch.testing.assert_close(shared(x), model(x.detach()), rtol=1e-5, atol=1e-5)
    shared(x).sum().backward()
    assert model.head[1].weight.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("save", [save_program, save_onnx])
def test_a_place_that_cannot_be_written(save, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file.model: cannot be written: "):
        save(make("encoder"), tmp_path / "file" / "model", AUDIO)


def test_weights_of_large_models_go_into_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("ssast.engine.formats.portable._bytes", lambda model: 3 * 10**9)
    model = make("patch")
    save_onnx(model, tmp_path / "model.onnx", AUDIO)
    assert (tmp_path / "model.onnx.data").stat().st_size > 10**6
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(["output"], {"fbank": fbanks(2).numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found), outputs(model, fbanks(2)), rtol=1e-5, atol=1e-5
    )
