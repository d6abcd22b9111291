"""ssast export and ssast embed, and what they open."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet
import pytest
import torch
from sounds import write_clips

from ssast.engine.api import load_published, load_published_classifier, save_published
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain, to_plain
from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.evaluation.embedding import embed_recordings
from ssast.engine.formats.huggingface import import_huggingface
from ssast.engine.formats.open import MissingMetadata, open_model
from ssast.engine.model.classifier import Classifier, embed_clips
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import MSPM
from ssast.kernels.fbank import fbank
from ssast.pipelines.audio.encoded import decode
from ssast.pipelines.errors import DataError

CONFIG = from_plain(
    {
        "model": {"size": "tiny", "depth": 1},
        "audio": {"num_frames": 64, "mean": -5.0, "std": 4.0},
        "objective": {"num_masked": 8},
    }
)
TUNED = ["--frames", "64", "--stride", "10", "10", "--mean", "-5", "--std", "4"]


@pytest.fixture
def run(tmp_path) -> Path:
    """A pretraining run with one checkpoint."""
    torch.manual_seed(0)
    state = MSPM(CONFIG).state_dict()
    weights = {f"weight/{name}": value for name, value in state.items()}
    meta = {"config": to_plain(CONFIG)}
    Checkpoints(tmp_path / "run" / "checkpoints").save(weights, meta, step=1)
    return tmp_path / "run"


def test_the_weights_of_a_run_alone(run, tmp_path, capsys):
    out = tmp_path / "weights"
    assert call(capsys, "export", run, "--to", "weights", out).strip() == str(out)
    ours, theirs = open_model(run).model, open_model(out).model
    assert open_model(out).audio == open_model(run).audio
    for (name, wanted), got in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=2**-11, atol=2**-24, msg=name)
    (out / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"state.safetensors has 0 bytes, expected"):
        open_model(out)


def test_only_a_pretraining_has_weights_to_export(tuned, tmp_path, capsys):
    arguments = ["export", str(tuned), "--to", "weights", str(tmp_path / "w"), *TUNED]
    assert main(arguments) == 2
    assert "tuned.pth: expected a pretraining run for --to weights" in capsys.readouterr().err


@pytest.fixture
def tuned(tmp_path) -> Path:
    """A published fine-tuned file."""
    save_published(make_classifier(), tmp_path / "tuned.pth")
    return tmp_path / "tuned.pth"


def make_classifier() -> Classifier:
    torch.manual_seed(1)
    encoder = SpectrogramTransformer(CONFIG.model, CONFIG.audio, (10, 10))
    return Classifier(encoder, 5).eval()


def call(capsys, *arguments: object, status: int = 0) -> str:
    assert main([str(a) for a in arguments]) == status
    return capsys.readouterr().out


def fbanks() -> torch.Tensor:
    return torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(0)) * 4 - 5


def test_a_run_to_published_and_back(run, tmp_path, capsys):
    assert (
        call(capsys, "export", run, "--to", "published", tmp_path / "a.pth")
        .strip()
        .endswith("a.pth")
    )
    model, config = load_published(tmp_path / "a.pth", mean=-5.0, std=4.0)
    assert (config.model, config.audio) == (CONFIG.model, CONFIG.audio)
    want = open_model(run).model.state_dict()
    assert all(model.state_dict()[name].equal(value) for name, value in want.items())


def test_every_door_leads_to_the_same_logits(tuned, tmp_path, capsys):
    x, classifier = fbanks(), make_classifier()
    with torch.no_grad():
        want = classifier(x)
    for to, name in (("hf", "hf"), ("onnx", "a.onnx"), ("pt2", "a.pt2"), ("published", "a.pth")):
        call(capsys, "export", tuned, *TUNED, "--to", to, tmp_path / name)
    ours, audio, *_ = import_huggingface(tmp_path / "hf")
    assert audio == CONFIG.audio
    published = load_published_classifier(
        tmp_path / "a.pth", num_frames=64, stride=(10, 10), mean=-5.0, std=4.0
    )
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "a.pt2").module()
    with torch.no_grad():
        assert ours(x).equal(want) and published(x).equal(want)
        assert open_model(tmp_path / "hf").model(x).equal(want)
        found = program(x), torch.from_numpy(session.run(None, {"fbank": x.numpy()})[0])
    for logits in found:
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)


def test_a_pretrained_run_exports_its_encoder(run, tmp_path, capsys):
    for to in ("hf", "pt2"):
        call(capsys, "export", run, "--to", to, tmp_path / to)
    encoder, x = open_model(run).encoder, fbanks()
    with torch.no_grad():
        want, _ = encoder(x, encoder.no_masks(3))
        torch.testing.assert_close(torch.export.load(tmp_path / "pt2").module()(x), want)
        found = open_model(tmp_path / "hf").encoder(x, encoder.no_masks(3))[0]
    assert found.equal(want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{nowhere}", "--to", "hf", "{out}"], "expected a run, a checkpoint or a model"),
        (["export", "{tuned}", "--to", "hf", "{out}"], "give --frames and --stride, such as"),
        (
            ["export", "{tuned}", "--frames", "64", "--stride", "16", "16", "--to", "hf", "{out}"],
            "make 8 x 4 = 32 patches, but v.pos_embed has 60",
        ),
        (
            ["export", "{run}", "--to", "hf", "{out}", "--input", "fbank"],
            "--input is for --to onnx",
        ),
        (["export", "{run}", "--frames", "9", "--to", "hf", "{out}"], "leave out num_frames=9"),
        (
            ["embed", "{run}", "{tuned}", "--out", "x.txt"],
            "x.txt: expected a name that ends in .npy or .parquet",
        ),
        (["embed", "{run}", "{nowhere}", "--out", "x.npy"], "expected a folder or a manifest"),
        (["embed", "{run}", "a", "--out", "x.npy", "--batch-size", "0"], "must be at least 1"),
        (["embed", "{run}", "{tuned}", "--out", "x.npy"], "none of its 1 clips can be read"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run, tuned, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"nowhere": tmp_path / "nowhere", "tuned": tuned, "run": run, "out": tmp_path / "out"}
    before = set(tmp_path.iterdir())
    assert main([a.format(**places) for a in arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_padding_that_is_ignored_is_said_to_stay_behind(tmp_path, capsys):
    plain = to_plain(CONFIG)
    config = from_plain(plain | {"audio": plain["audio"] | {"ignore_padding": True}})
    weights = {f"weight/{name}": value for name, value in MSPM(config).state_dict().items()}
    Checkpoints(tmp_path / "checkpoints").save(weights, {"config": to_plain(config)}, step=1)
    assert main(["export", str(tmp_path), "--to", "published", str(tmp_path / "a.pth")]) == 0
    assert "outputs are the same only for clips of 64 frames" in capsys.readouterr().err


def test_an_encoder_alone_has_no_published_form(run, tmp_path, capsys):
    call(capsys, "export", run, "--to", "hf", tmp_path / "hf")
    assert main(["export", str(tmp_path / "hf"), "--to", "published", str(tmp_path / "a")]) == 2
    assert "a plain encoder has no published format" in capsys.readouterr().err


def test_a_pretrained_file_needs_no_frames(run, tmp_path):
    model = open_model(run)
    save_published(model.model, tmp_path / "a.pth", model.audio)
    assert open_model(tmp_path / "a.pth", MissingMetadata(mean=-5.0, std=4.0)).audio == CONFIG.audio
    with pytest.raises(ConfigError, match="is pretrained, knows its frames"):
        open_model(tmp_path / "a.pth", MissingMetadata(num_frames=64))
    with pytest.raises(CheckpointError, match="no run with checkpoints"):
        (tmp_path / "empty").mkdir()
        open_model(tmp_path / "empty")


@pytest.fixture
def recordings(tmp_path) -> tuple[Path, list[Path]]:
    """A manifest of five clips, the third of which is no sound."""
    (tmp_path / "clips").mkdir()
    paths = write_clips(tmp_path / "clips", 5, samples=6_000)  # some end early
    paths[2].write_bytes(b"not a sound")
    manifest = tmp_path / "clips.json"
    manifest.write_text(json.dumps({"data": [{"wav": str(path)} for path in paths]}))
    return manifest, paths


def fbank_of(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    spec = fbank_spec(CONFIG.audio)
    samples = torch.from_numpy(decode(str(path), spec))
    samples = (samples - samples.mean())[None].float()
    count = torch.tensor([samples.shape[1]])
    frames = min(64, (samples.shape[1] - spec.window) // spec.hop + 1)
    return fbank(samples, count, spec), torch.tensor([frames])


@pytest.mark.parametrize("level", ["clip", "frame"])
def test_embeddings_are_those_of_the_encoder(level, run, recordings, tmp_path, capsys):
    manifest, paths = recordings
    out = tmp_path / "new" / "x.npy"
    given = ["--out", out, "--level", level, "--batch-size", 2]
    assert main([str(a) for a in ("embed", run, manifest, *given)]) == 3
    captured = capsys.readouterr()
    assert captured.err == "ssast: 1 of 5 files could not be read\n"
    shown = captured.out
    assert "192, 4 of 5 clips; rows in" in shown
    assert f"its row is NaN: {paths[2]}" in shown
    rows, encoder = np.load(out), open_model(run).encoder
    columns = encoder.embed.grid[1]
    assert rows.shape == ((5, 192) if level == "clip" else (5, columns, 192))
    assert rows.dtype == np.float32
    listing = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [line["path"] for line in listing] == [str(path) for path in paths]
    assert [line["row"] for line in listing] == list("01234")
    assert listing[2]["columns"] == "0" and np.isnan(rows[2]).all()
    for i in (0, 1, 3, 4):
        x, frames = fbank_of(paths[i])
        count = int(listing[i]["columns"])
        assert count == min(columns, -(-int(frames) // 16))
        with torch.no_grad():
            if level == "clip":
                want = embed_clips(encoder, x, num_frames=frames)[0]
                found = rows[i]
            else:
                hidden = encoder(x, encoder.no_masks(1))[0][0, 2:]
                want = hidden.unflatten(0, encoder.embed.grid).mean(0)[:count]
                assert np.isnan(rows[i][count:]).all()
                found = rows[i][:count]
        torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-3, atol=1e-3)
    assert not list(out.parent.glob(".tmp*"))


@pytest.mark.parametrize("level", ["clip", "frame"])
def test_parquet_holds_what_the_array_and_its_list_hold(level, run, recordings, tmp_path, capsys):
    manifest, paths = recordings
    for name in ("x.npy", "x.parquet"):
        shown = call(
            capsys, "embed", run, manifest, "--out", tmp_path / name, "--level", level,
            "--batch-size", 2, status=3,
        )  # fmt: skip
    assert f"its row is null: {paths[2]}" in shown and not (tmp_path / "x.parquet.csv").exists()
    want = np.load(tmp_path / "x.npy")
    counts = [int(row["columns"]) for row in csv.DictReader((tmp_path / "x.csv").open())]
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    found = table.to_pydict()
    assert found["path"] == list(map(str, paths)) and found["columns"] == counts
    assert found["embedding"][2] is None
    for i in (0, 1, 3, 4):
        rows = want[i] if level == "clip" else want[i][: counts[i]]
        assert np.array(found["embedding"][i], np.float32).tolist() == rows.tolist()
    assert not list(tmp_path.glob(".tmp*"))


def test_without_pyarrow_one_line_says_so(run, recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["embed", str(run), str(recordings[0]), "--out", str(tmp_path / "x.parquet")]) == 2
    assert 'pip install "ssast-engine[parquet]"' in capsys.readouterr().err
    assert not list(tmp_path.glob("*x.parquet"))


def test_one_file_and_a_classifier_of_cls(recordings, tmp_path):
    _, paths = recordings
    classifier = Classifier(make_classifier().encoder, 5, "cls").eval()
    save_published(classifier, tmp_path / "cls.pth")
    opened = open_model(tmp_path / "cls.pth", MissingMetadata(64, (10, 10), "cls", -5.0, 4.0))
    embedded = embed_recordings(opened, paths[0], tmp_path / "x.npy")
    assert embedded.shape == (1, 192) and not embedded.rejected
    x, frames = fbank_of(paths[0])
    with torch.no_grad():
        want = embed_clips(classifier.encoder, x, "cls", frames)
    torch.testing.assert_close(
        torch.from_numpy(np.load(tmp_path / "x.npy")), want, rtol=1e-3, atol=1e-3
    )


def test_nothing_is_left_of_a_failure(run, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    with pytest.raises(DataError, match=r"bad\.wav: none of its 1 clips can be read: "):
        embed_recordings(open_model(run), tmp_path / "bad.wav", tmp_path / "x.npy")
    assert not list(tmp_path.glob("*x.npy"))


@pytest.mark.parametrize("name", ["clips.npy", "other.npy", "x.parquet"])
def test_embeddings_overwrite_nothing(name, run, recordings, tmp_path, capsys):
    """Not the manifest, whose name the listing would have, nor any other file."""
    _, paths = recordings
    table = tmp_path / "clips.csv"
    table.write_text("wav\n" + "".join(f"{path}\n" for path in paths))
    (tmp_path / "other.csv").write_text("mine")
    (tmp_path / "x.parquet").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert main(["embed", str(run), str(table), "--out", str(tmp_path / name)]) == 2
    message = "is an input of this command" if name == "clips.npy" else "exists already"
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("to", ["published", "hf", "onnx", "pt2", "weights"])
def test_exports_overwrite_nothing(to, run, tmp_path, capsys):
    for out in (run, tmp_path / "mine"):
        if out != run:
            out.write_text("mine")
        assert main(["export", str(run), "--to", to, str(out)]) == 2
        shown = capsys.readouterr().err
        assert ("is an input" if out == run else "exists already") in shown
    assert (tmp_path / "mine").read_text() == "mine"
