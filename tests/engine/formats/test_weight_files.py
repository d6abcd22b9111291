"""What lies where weights are expected: each kind is one plain sentence."""

import argparse
import io
import pickle
import tarfile
import zipfile

import pytest
import safetensors.torch
import torch
from rank_jobs import small_files

from ssast.engine.cli.main import main
from ssast.engine.config import from_plain
from ssast.engine.errors import CheckpointError
from ssast.engine.evaluation.embedding import NumpyWriter
from ssast.engine.formats.portable import save_program
from ssast.engine.formats.published import save_published
from ssast.engine.formats.weight_files import read_state, write_state
from ssast.engine.model.objective import MSPM

WEIGHTS = {"a": torch.arange(3.0), "b": torch.zeros(2, 2)}


class Payload:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return buffer.getvalue()


def scripted():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
FOREIGN = {
    "nothing": (b"", "is empty: copy or download it again"),
    "html": (b"<!DOCTYPE html><html>quota exceeded</html>", "is a web page, not weights"),
    "html after a line": (b"\xef\xbb\xbf\n  <html>" + b"x" * 999, "is a web page, not weights"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is a web page, not weights"),
    "lfs": (POINTER, "is a Git LFS pointer, not the weights: run git lfs pull"),
    "text": (b"Not Found", "is a text file, not weights: it begins with 'Not Found'"),
    "json": (b'{"message": "Bad credentials"}', "is a text file, not weights: it begins with "),
    "utf-8": (("\u00e9" * 400 + "x").encode(), "is a text file, not weights"),
    "utf-16": (("quota exceeded\n" * 50).encode("utf-16"), "is a text file, not weights"),
    "zip": (zipped(readme="hello"), r"is a ZIP archive of other things \(readme\): unpack it"),
    "npz": (zipped(**{"a.npy": "x"}), r"ZIP archive of other things \(a\.npy\)"),
    "torchscript": (scripted(), "is a TorchScript program, not a state dict: save model"),
    "tar": (tarred(), "is a tar archive: unpack it first"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "is a gzip archive: unpack it first"),
    "audio": (b"RIFF\x24\x00\x00\x00WAVEfmt ", "is an audio or image file, not weights"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_file_of_weights_is_called_by_its_name(kind, suffix, tmp_path):
    path, (content, message) = tmp_path / f"a{suffix}", FOREIGN[kind]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state(path)
    assert str(caught.value).startswith(f"{path}: is a") or kind == "nothing"
    assert "\n" not in str(caught.value)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


LEGACY = {"_use_new_zipfile_serialization": False}
ARGUMENTS = {"model": WEIGHTS, "args": argparse.Namespace(lr=1)}
WRAPPED = {
    "AudioMAE": (saved(ARGUMENTS), r"objects besides tensors \(argparse\.Namespace\)"),
    "AudioMAE, legacy": (saved(ARGUMENTS, **LEGACY), r"besides tensors \(argparse\.Namespace\)"),
    "whole module": (saved(torch.nn.Linear(1, 1)), r"\(torch\.nn\.modules\.linear\.Linear\)"),
    "plain pickle": (pickle.dumps(ARGUMENTS | {"model": 1}), r"besides tensors|no pickle of ten"),
    "Lightning": (
        saved({"epoch": 3, "state_dict": WEIGHTS, "callbacks": {}}),
        "found 'epoch': int: save the weights below 'state_dict' alone",
    ),
    "model": (saved({"model": WEIGHTS}), "found 'model': dict: save the weights below 'model'"),
    "optimizer": (saved({"lr": 0.1}), "expected tensors and nothing else, found 'lr': float$"),
    "tensor": (saved(torch.zeros(2)), "expected a state dict, names to tensors, found Tensor"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_among_other_things_are_refused_plainly(kind, tmp_path):
    path, (content, message) = tmp_path / "a.pth", WRAPPED[kind]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state(path)
    text = str(caught.value)
    # Nothing of PyTorch's own text, which says how to switch its protection off.
    assert not any(word in text for word in ("\n", "\x1b", "weights_only", "options", "trust"))
    assert len(text) < 250 + len(str(path))


def test_no_code_is_run(tmp_path):
    path, mark = tmp_path / "evil.pth", tmp_path / "mark"
    for content in (saved({"x": Payload(mark)}), pickle.dumps(Payload(mark))):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="refused"):
            read_state(path)
    assert not mark.exists()


def test_the_content_counts_not_the_suffix(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "a.pth")
    state, metadata = read_state(tmp_path / "a.pth")
    assert metadata == {} and all(state[name].equal(value) for name, value in WEIGHTS.items())


def test_metadata_is_seen_by_us_alone(tmp_path):
    """Strict loading by other code takes the file, and plain values come back."""
    theirs = torch.nn.DataParallel(torch.nn.Linear(2, 2))
    stored = {"audio": {"mean": -6.5}, "stride": [10, 10], "classes": ["a", "\u00e9"], "x": None}
    write_state(theirs.state_dict(), tmp_path / "a.pth", stored)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert content.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(content, strict=True)
    assert read_state(tmp_path / "a.pth")[1] == stored


def test_metadata_of_others_is_left_alone(tmp_path):
    state = torch.nn.Linear(2, 2).state_dict()
    for metadata in (None, {"ssast": 3}, [1]):
        state._metadata = metadata
        torch.save(state, tmp_path / "a.pth")
        assert read_state(tmp_path / "a.pth")[1] == {}


def test_every_command_says_it(tmp_path, capsys):
    """Also of weights in a folder of transformers."""
    for path in (tmp_path / "a.pth", tmp_path / "hf/model.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(POINTER)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "hf" / name).write_text('{"model_type": "ssast"}')
    for model in ("a.pth", "hf"):
        for command in (["predict", tmp_path / model, "a.wav"], ["embed", tmp_path / model, "a.wav",
                        "--out", tmp_path / "x.npy"]):  # fmt: skip
            assert main(list(map(str, command))) == 2
            assert "is a Git LFS pointer, not the weights: run git" in capsys.readouterr().err


@pytest.mark.parametrize("format_name", ["published", "pt2", "npy"])
def test_a_disk_that_fills_up_is_named(format_name, tmp_path):
    """PyTorch's writer hides that behind an error of its own; a sparse file ends in a signal."""
    config = from_plain({"model": {"size": "tiny", "depth": 1}, "audio": {"num_frames": 32},
                         "objective": {"num_masked": 4}})  # fmt: skip
    model, path = MSPM(config), tmp_path / f"x.{format_name}"
    with small_files(4096), pytest.raises((CheckpointError, OSError), match="too large"):
        if format_name == "npy":
            NumpyWriter(path, (10**6, 16))
        elif format_name == "pt2":
            save_program(model.encoder, path, config.audio)
        else:
            save_published(model, path)
    assert [p.name for p in tmp_path.iterdir() if p.name != "x.npy"] == []
