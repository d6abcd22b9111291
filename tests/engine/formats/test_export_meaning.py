"""Exports mean what ``ssast predict`` says: names, probabilities and input, from every source."""

import functools
import hashlib
import json
import runpy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from paths import ROOT
from sounds import RATE_HZ, tone, write

from ssast.engine.api import save_published
from ssast.engine.checkpoints.classifier import save_chosen
from ssast.engine.cli.main import build_parser, main
from ssast.engine.cli.options import missing_metadata
from ssast.engine.config import from_plain, to_plain
from ssast.engine.evaluation.predict import predict
from ssast.engine.formats.huggingface import import_huggingface
from ssast.engine.formats.huggingface_config import find_classes
from ssast.engine.formats.open import LoadedModel, as_classifier, open_classifier, open_model
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.kernels.fbank import FbankSpec, fbank

LABELS = ("/m/0", "/m/1", "/m/2", "/m/3")
NAMES = ("tone 0", "tone 1, low", "\u00e9cho", "tone 3")
NUMBERS = ("0", "1", "2", "3")
METADATA = ("input", "audio", "labels", "label_ids", "activation", "problem_type")

# A file of the published code says nothing of its input and its classes: options do.
SOURCES = ("run", "hf", "published", "published code")
TARGETS = ("published", "hf", "onnx", "pt2")
LOSSES = ("ce", "bce")
NAMED = ("plain", "named")  # whether the classes have display names, or numbers, or a table


class Source(NamedTuple):
    """A model, how it is opened, and what predict says of the clips."""

    path: Path
    options: list[str]
    labels: tuple[str, ...]
    names: tuple[str, ...]
    scores: list[dict[str, float]]


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    """A clip that the model pads and one that it cuts, of 16 bits."""
    return [np.round(tone(count, seed=count) * 2**15) / 2**15 for count in (8_000, 12_000)]


@pytest.fixture(scope="module")
def clips(waves, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [
        write(folder / f"{i}.wav", wave, RATE_HZ, subtype="PCM_16") for i, wave in enumerate(waves)
    ]


def pooling_of(loss: str, named: str) -> str:
    """So that each loss, and each kind of names, comes with both."""
    return "cls" if (loss == "ce") == (named == "plain") else "avgtok"


def make_run(folder: Path, loss: str, pooling: str, names: tuple[str, ...]) -> Path:
    config = from_plain(
        {
            "model": {"size": "tiny", "depth": 1},
            "audio": {"num_frames": 64, "mean": -5.0, "std": 4.0},
            "finetune": {"stride": [10, 10], "pooling": pooling, "loss": loss},
        }
    )
    torch.manual_seed(1)
    encoder = SpectrogramTransformer(config.model, config.audio, (10, 10))
    classifier = Classifier(encoder, len(LABELS), pooling)
    with torch.no_grad():
        classifier.head[1].weight *= 20  # so that the classes are not equally likely
    weights = {f"weight/{name}": value for name, value in classifier.state_dict().items()}
    facts = {"names": list(names)}
    save_chosen(folder, weights, step=1, config=config, classes=LABELS, facts=facts)
    assert to_plain(open_model(folder).config) == to_plain(config)
    return folder


def make_code_file(folder: Path, run: Path, loss: str, named: str) -> tuple[Path, list[str]]:
    """A file as the published code writes it, and the options that say what it does not."""
    save_published(open_model(run).classifier, folder / "code.pth")
    options = ["--frames", "64", "--stride", "10", "10", "--mean", "-5", "--std", "4"]
    options += ["--pooling", pooling_of(loss, named), "--loss", loss]
    if named == "named":
        rows = [f'{i},{LABELS[i]},"{NAMES[i]}"' for i in range(4)]
        table = folder / "classes.csv"
        table.write_text("\n".join(["index,mid,display_name", *rows, ""]), encoding="utf-8")
        options += ["--labels", str(table)]
    return folder / "code.pth", options


def opened(path: Path, options: list[str]) -> LoadedModel:
    """As the command line opens it."""
    given = build_parser().parse_args(["predict", str(path), "x.wav", *options])
    return open_classifier(path, missing_metadata(given))


@pytest.fixture(scope="module")
def sources(clips, tmp_path_factory):
    """A function that makes a source, once."""

    @functools.cache
    def make(kind: str, loss: str, named: str) -> Source:
        folder = tmp_path_factory.mktemp("source")
        names = LABELS if named == "plain" else NAMES
        run = make_run(folder / "run", loss, pooling_of(loss, named), names)
        path, options, labels = run, [], LABELS
        if kind == "published code":
            path, options = make_code_file(folder, run, loss, named)
            labels, names = (NUMBERS, NUMBERS) if named == "plain" else (LABELS, NAMES)
        elif kind != "run":
            path = folder / kind
            assert main(["export", str(run), "--to", kind, str(path)]) == 0
        scores = [dict(clip.classes) for clip in predict(opened(path, options), clips)]
        assert all(set(clip) == set(names) for clip in scores)
        return Source(path, options, labels, names, scores)

    return make


@pytest.fixture(scope="module")
def traced_once():
    """Tracing a model takes seconds: one of the same weights and inputs is traced once."""
    traced = {}

    def once(trace):
        def traced_before(module, *inputs, **settings):
            digest = hashlib.sha256(repr(module).encode())  # its types and epsilons
            for name, value in module.state_dict().items():
                digest.update(name.encode() + value.numpy().tobytes())
            key = (trace, getattr(module, "model", module).pooling, digest.digest())
            if key not in traced:
                traced[key] = trace(module, *inputs, **settings)
            if trace is torch.onnx.export:
                traced[key].model.metadata_props.clear()
            return traced[key]

        return traced_before

    with pytest.MonkeyPatch.context() as patch:
        for place in (torch.onnx, torch.export):
            patch.setattr(place, "export", once(place.export))
        yield


def check_metadata(metadata: dict[str, str], source: Source, loss: str) -> None:
    """Check that it says all that a user must know, to feed the file and to read its output."""
    assert json.loads(metadata["audio"]) == {
        "sample_rate_hz": 16000, "n_mels": 128, "num_frames": 64, "num_samples": 63 * 160 + 400,
        "window": 400, "hop": 160, "n_fft": 512, "snip_edges": True, "window_type": "hanning",
        "channel": "mean", "preemphasis": 0.97, "low_hz": 20.0, "high_hz": 8000.0,
        "mel_floor": 2.0**-23,
        "mean": -5.0, "std": 4.0, "truncation_side": "right", "padding_side": "right",
        "padding_value": 0.0,
    }  # fmt: skip
    assert json.loads(metadata["label_ids"]) == list(source.labels)
    problem = {"ce": "single_label_classification", "bce": "multi_label_classification"}
    assert metadata["problem_type"] == problem[loss]


def by_onnx(out: Path, source: Source, loss: str, clips: list[Path]) -> list[dict[str, float]]:
    """Scores by name, as the example computes them, which knows nothing but the file."""
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    check_metadata(session.get_modelmeta().custom_metadata_map, source, loss)
    classify = runpy.run_path(str(ROOT / "examples" / "predict_onnx.py"))["classify"]
    return [classify(session, str(path)) for path in clips]


def by_program(
    out: Path, source: Source, loss: str, waves: list[np.ndarray]
) -> list[dict[str, float]]:
    """Scores by name of a program of torch.export, the clips in one batch."""
    metadata = dict.fromkeys(METADATA, "")
    run = torch.export.load(out, extra_files=metadata).module()
    check_metadata(metadata, source, loss)
    samples = torch.zeros(len(waves), max(map(len, waves)))
    for row, wave in zip(samples, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    counts, spec = torch.tensor([len(wave) for wave in waves]), FbankSpec(num_frames=64)
    fed = metadata["input"] == "waveform"
    with torch.no_grad():
        logits = run(samples, counts) if fed else run(fbank(samples, counts, spec))
    activation = {"softmax": lambda x: x.softmax(1), "sigmoid": torch.sigmoid}
    names, scores = json.loads(metadata["labels"]), activation[metadata["activation"]](logits)
    return [dict(zip(names, row, strict=True)) for row in scores.tolist()]


def by_transformers(out: Path, waves: list[np.ndarray]) -> list[dict[str, float]]:
    """Scores by name, from a pipeline of transformers."""
    classify = transformers.pipeline(
        "audio-classification", model=str(out), trust_remote_code=True, device="cpu"
    )
    lines = [classify(wave.astype(np.float32), top_k=len(LABELS)) for wave in waves]
    return [{line["label"]: line["score"] for line in found} for found in lines]


@pytest.mark.compatible("transformers", "export --to hf: what predict says")
@pytest.mark.compatible("ONNX Runtime", "export --to onnx: what predict says")
@pytest.mark.compatible("PyTorch", "torch.export (export --to pt2): what predict says")
@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_exports_say_what_predict_says(
    source, to, loss, named, sources, traced_once, waves, clips, tmp_path, modules
):
    made, out = sources(source, loss, named), tmp_path / "out"
    want = [pytest.approx(clip, abs=1e-3) for clip in made.scores]
    # The filterbank of one pooling, the waveforms of the other: each comes with all else.
    fed = "fbank" if pooling_of(loss, named) == "cls" else "waveform"
    given = ["--input", fed] if to in ("onnx", "pt2") else []
    assert main(["export", str(made.path), *made.options, "--to", to, str(out), *given]) == 0
    if to in ("published", "hf"):
        loaded = as_classifier(out)
        assert (loaded.classes, loaded.names, loaded.loss) == (made.labels, made.names, loss)
        found = [dict(clip.classes) for clip in predict(loaded, clips)]
        assert found == [pytest.approx(clip, abs=1e-5) for clip in made.scores]
    if to == "hf":
        assert by_transformers(out, waves) == want
    elif to == "onnx":
        assert by_onnx(out, made, loss, clips) == want
    elif to == "pt2":
        assert by_program(out, made, loss, waves) == want


def test_a_head_that_was_replaced_has_no_old_labels(tmp_path, modules):
    model = make_run(tmp_path / "run", "ce", "cls", NAMES)
    assert main(["export", str(model), "--to", "hf", str(tmp_path / "hf")]) == 0
    assert import_huggingface(tmp_path / "hf")[2:4] == (LABELS, NAMES)
    auto = transformers.AutoModelForAudioClassification
    fresh = {"num_labels": 3, "ignore_mismatched_sizes": True}
    auto.from_pretrained(tmp_path / "hf", **fresh).save_pretrained(tmp_path / "fresh")
    preprocessor = tmp_path / "hf" / "preprocessor_config.json"
    (tmp_path / "fresh" / preprocessor.name).write_bytes(preprocessor.read_bytes())
    numbered = ("LABEL_0", "LABEL_1", "LABEL_2")
    assert import_huggingface(tmp_path / "fresh")[2:4] == (numbered, numbered)
    # Of two classes with names that the old head had as well.
    config = json.loads((tmp_path / "fresh/config.json").read_text())
    config["id2label"] = {"0": NAMES[0], "1": NAMES[1]}
    assert find_classes(config, 2, tmp_path) == (NAMES[:2], NAMES[:2])
