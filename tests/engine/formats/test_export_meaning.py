"""Exports mean what ``ssast predict`` says: names, probabilities and input, from every source."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from sounds import RATE_HZ, tone, write

from ssast.engine.checkpoints.classifier import save_chosen
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain, to_plain
from ssast.engine.evaluation.predict import predict
from ssast.engine.formats.huggingface import import_huggingface
from ssast.engine.formats.open import open_model
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.kernels.fbank import FbankSpec, fbank

LABELS = ("/m/0", "/m/1", "/m/2", "/m/3")
NAMES = ("tone 0", "tone 1, low", "\u00e9cho", "tone 3")
SOURCES = ("run", "hf", "published")
METADATA = ("audio", "labels", "label_ids", "activation")


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    """A clip that the model pads and one that it cuts, of 16 bits."""
    return [np.round(tone(count, seed=count) * 2**15) / 2**15 for count in (8_000, 12_000)]


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


def spec_of(metadata: dict[str, str]) -> FbankSpec:
    """The filterbank that the metadata describe."""
    audio = json.loads(metadata["audio"])
    spec = FbankSpec(*(audio[key] for key in ("sample_rate_hz", "n_mels", "num_frames", "low_hz")))
    assert audio == {
        "sample_rate_hz": 16000, "n_mels": 128, "num_frames": 64, "window": spec.window,
        "hop": spec.hop, "n_fft": spec.n_fft, "window_type": "hanning", "preemphasis": 0.97,
        "low_hz": 20.0, "high_hz": 8000.0, "mean": -5.0, "std": 4.0,
    }  # fmt: skip
    return spec


def by_metadata(to: str, out: Path, waves: list[np.ndarray]) -> list[dict[str, float]]:
    """Scores by name, from what the file itself says."""
    if to == "pt2":
        metadata = dict.fromkeys(METADATA, "")
        run = torch.export.load(out, extra_files=metadata).module()
    else:
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        run = lambda x: torch.from_numpy(session.run(None, {"fbank": x.numpy()})[0])  # noqa: E731
    assert json.loads(metadata["label_ids"]) == list(LABELS)
    activation = {"softmax": lambda x: x.softmax(0), "sigmoid": torch.sigmoid}
    found = []
    for wave in waves:
        samples = torch.from_numpy(wave).float()[None]
        x = fbank(samples - samples.mean(), torch.tensor([len(wave)]), spec_of(metadata))
        with torch.no_grad():
            scores = activation[metadata["activation"]](run(x)[0])
        found.append(dict(zip(json.loads(metadata["labels"]), scores.tolist(), strict=True)))
    return found


def by_transformers(out: Path, waves: list[np.ndarray]) -> list[dict[str, float]]:
    """Scores by name, from a pipeline of transformers."""
    classify = transformers.pipeline(
        "audio-classification", model=str(out), trust_remote_code=True, device="cpu"
    )
    lines = [classify(wave.astype(np.float32), top_k=len(LABELS)) for wave in waves]
    return [{line["label"]: line["score"] for line in found} for found in lines]


CELLS = [  # source, target, loss, pooling, names
    *(("run", to, "ce", "cls", LABELS) for to in ("published", "hf", "onnx", "pt2")),
    *(("run", to, "bce", "avgtok", NAMES) for to in ("published", "hf", "onnx", "pt2")),
    ("run", "hf", "bce", "cls", NAMES),
    *(("hf", to, "bce", "cls", NAMES) for to in ("published", "pt2")),
    *(("hf", to, "ce", "avgtok", NAMES) for to in ("published", "hf")),
    *(("published", to, "bce", "avgtok", NAMES) for to in ("published", "hf", "pt2")),
]


@pytest.mark.parametrize(("source", "to", "loss", "pooling", "names"), CELLS)
def test_exports_say_what_predict_says(
    source, to, loss, pooling, names, waves, tmp_path, modules, capsys
):
    model = make_run(tmp_path / "run", loss, pooling, names)
    paths = [
        write(tmp_path / f"{i}.wav", wave, RATE_HZ, subtype="PCM_16")
        for i, wave in enumerate(waves)
    ]
    want = [dict(clip.classes) for clip in predict(model, paths)]
    assert all(set(clip) == set(names) for clip in want)
    if source != "run":
        assert main(["export", str(model), "--to", source, str(tmp_path / "source")]) == 0
        model = tmp_path / "source"
    out = tmp_path / "out"
    assert main(["export", str(model), "--to", to, str(out)]) == 0
    if to in ("published", "hf"):
        opened = open_model(out)
        assert (opened.classes, opened.names, opened.loss) == (LABELS, names, loss)
        assert [dict(clip.classes) for clip in predict(opened, paths)] == [
            pytest.approx(clip, abs=1e-5) for clip in want
        ]
    if to == "hf":
        found = by_transformers(out, waves)
    elif to != "published":
        found = by_metadata(to, out, waves)
    else:
        return
    assert found == [pytest.approx(clip, abs=1e-3) for clip in want]


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
