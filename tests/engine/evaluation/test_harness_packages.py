"""The harnesses themselves, where they are installed, on local clips.

X-ARES and s3prl need torchaudio, X-ARES and MTEB torchcodec. HEAR's tools need TensorFlow only to
tell its models from those of PyTorch: a stand-in does.
"""

import io
import json
import sys
import tarfile
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
from pages import example
from sounds import tone

from ssast.engine.api import MtebEncoder, XaresEncoder, embed, open_model, ssast_local
from ssast.engine.formats.known_weights import ours

MODEL = ours()["tiny_frame"]  # of 1.28 s
SPLITS = {"train": 8, "valid": 4, "test": 4}


@pytest.fixture(scope="module")
def loaded():
    return open_model(MODEL)


def make_clips(folder, count, *, seconds=None):
    """Clips of two classes, tones and noise, of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        samples = round(16000 * (seconds or 0.4 + 0.3 * (number % 4)))
        noise = np.random.default_rng(number).standard_normal(samples).astype(np.float32) * 0.1
        wave = noise if number % 2 else tone(samples, seed=number)
        paths.append(folder / f"{number:03d}.wav")
        soundfile.write(paths[-1], wave, 16000, subtype="FLOAT")
    return paths


def test_xares(loaded, tmp_path, monkeypatch):
    pytest.importorskip("xares")
    from xares.audio_encoder_checker import check_audio_encoder
    from xares.audiowebdataset import write_audio_tar
    from xares.task import TaskConfig, XaresTask

    encoder = XaresEncoder(loaded)
    assert check_audio_encoder(encoder)
    monkeypatch.chdir(tmp_path)
    for split, count in SPLITS.items():
        paths = [str(path) for path in make_clips(tmp_path / "clips" / split, count)]
        labels = [{"label": number % 2} for number in range(count)]
        (tmp_path / "env" / "toy").mkdir(parents=True, exist_ok=True)
        write_audio_tar(paths, labels, f"env/toy/{split}*.tar", num_shards=1)
    (tmp_path / "env" / "toy" / ".audio_tar_ready").touch()
    config = TaskConfig(
        name="toy",
        encoder=encoder,
        label_processor=lambda sample: sample["label"],
        output_dim=2,
        eval_weight=4,
        epochs=2,
        batch_size_encode=3,
        num_encoder_workers=0,
        do_knn=False,  # of ten neighbours
    )
    task = XaresTask(config)
    task.make_encoded_tar()
    score, weight = task.run_mlp()
    assert 0 <= score <= 1 and weight == 4
    (tar,) = (tmp_path / "env/toy/embeddings" / type(encoder).__name__).glob("*test*.tar")
    with tarfile.open(tar) as file:
        members = [member for member in file.getmembers() if member.name.endswith(".npy")]
        assert len(members) == SPLITS["test"]
        for member in members:
            found = np.load(io.BytesIO(file.extractfile(member).read()))
            path = tmp_path / "clips" / "test" / f"{member.name[:3]}.wav"
            want = embed(loaded, path, level="frame").numpy()
            np.testing.assert_allclose(found[: len(want)], want, rtol=1e-3, atol=1e-3)
            assert not found[len(want) :].any()


def test_mteb(loaded, tmp_path, monkeypatch):
    mteb = pytest.importorskip("mteb")
    datasets = pytest.importorskip("datasets")
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.models_protocols import EncoderProtocol

    class Toy(AbsTaskClassification):
        metadata = TaskMetadata(
            name="Toy",
            description="Tones and noise.",
            reference=None,
            dataset={"path": "local/toy", "revision": "1"},
            type="AudioClassification",
            category="a2c",
            modalities=["audio"],
            eval_splits=["test"],
            eval_langs=["zxx-Zxxx"],
            main_score="accuracy",
            date=("2026-01-01", "2026-01-02"),
            domains=["AudioScene"],
            task_subtypes=["Environment Sound Classification"],
            license="cc0-1.0",
            annotations_creators="derived",
            dialect=[],
            sample_creation="created",
            bibtex_citation="",
        )
        input_column_name = "audio"
        samples_per_label = 4
        n_experiments = 2

        def load_data(self, **kwargs):
            self.dataset = datasets.DatasetDict()
            for split in ("train", "test"):
                paths = make_clips(tmp_path / split, SPLITS[split])
                rows = {"audio": list(map(str, paths)), "label": [n % 2 for n in range(len(paths))]}
                table = datasets.Dataset.from_dict(rows)
                self.dataset[split] = table.cast_column("audio", datasets.Audio())
            self.data_loaded = True

    assert len(mteb.get_tasks(["BeijingOpera"])) == 1  # of the page
    assert mteb.get_benchmark("MAEB(v1, audio-only)").tasks
    encoder = MtebEncoder(loaded)
    assert isinstance(encoder, EncoderProtocol)
    seen = []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda *a, **k: seen.append(encode(*a, **k)) or seen[-1])
    cache = mteb.ResultCache(tmp_path / "cache")
    result = mteb.evaluate(encoder, Toy(), cache=cache, encode_kwargs={"batch_size": 3})
    assert result.model_name == "ssast/tiny_frame"
    assert result.model_revision == encoder.fingerprint()
    assert 0 < result.task_results[0].get_score() <= 1
    paths = sorted((tmp_path / "test").iterdir())
    want = torch.stack([embed(loaded, path) for path in paths]).numpy()
    np.testing.assert_allclose(seen[-1], want, rtol=1e-3, atol=1e-3)


@pytest.fixture
def tensorflow(monkeypatch):
    stand_in = ModuleType("tensorflow")
    stand_in.Module = type("Module", (), {})
    stand_in.test = type("test", (), {"is_gpu_available": lambda **_: torch.cuda.is_available()})
    monkeypatch.setitem(sys.modules, "tensorflow", stand_in)


@pytest.mark.parametrize("name", ["tiny_patch", "tiny_frame"])
@pytest.mark.filterwarnings("ignore:We suggest a interval:UserWarning")
def test_hear_validator(name, tensorflow, capsys):
    validate = pytest.importorskip("hearvalidator.validate")
    validate.ValidateModel("ssast.engine.evaluation.hear", str(ours()[name]))()
    assert "Checking get_scene_embeddings" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["scene", "event"])
def test_heareval_embeddings(kind, loaded, tensorflow, tmp_path):
    pytest.importorskip("heareval")
    runner = pytest.importorskip("heareval.embeddings.runner").runner
    task = tmp_path / "tasks" / "toy"
    for split in SPLITS:
        paths = make_clips(task / "16000" / split, 2, seconds=2)
        event = {"label": "a", "start": 300.0, "end": 1500.0}
        labels = [["a"] if kind == "scene" else [event]] * 2
        rows = dict(zip((path.name for path in paths), labels, strict=True))
        (task / f"{split}.json").write_text(json.dumps(rows))
    metadata = {"embedding_type": kind, "sample_duration": 2.0, "splits": list(SPLITS)}
    metadata["prediction_type"] = "multiclass" if kind == "scene" else "multilabel"
    (task / "task_metadata.json").write_text(json.dumps(metadata))
    (task / "labelvocabulary.csv").write_text("idx,label\n0,a\n")
    runner.callback(
        "ssast.engine.evaluation.hear",
        tasks_dir=str(tmp_path / "tasks"),
        task="all",
        embeddings_dir=str(tmp_path / "out"),
        model_options=json.dumps({"model_file_path": str(MODEL)}),
    )
    (out,) = (tmp_path / "out").glob("*/toy/test")
    for path in sorted((task / "16000" / "test").iterdir()):
        found = np.load(out / f"{path.name}.embedding.npy")
        want = embed(loaded, path, level="clip" if kind == "scene" else "frame").numpy()
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3)
        if kind == "event":
            stamps = json.loads((out / f"{path.name}.timestamps.json").read_text())
            labels = json.loads((out / f"{path.name}.target-labels.json").read_text())
            assert [stamps[0], stamps[1]] == [17.5, 37.5]
            inside = [stamp for stamp, names in zip(stamps, labels, strict=True) if names]
            assert inside == [stamp for stamp in stamps if 300 <= stamp <= 1500]


@pytest.mark.parametrize("settings", [{}, {"superb": False}, {"window_secs": 6.0}])
def test_s3prl(settings, monkeypatch):
    nn = pytest.importorskip("s3prl.nn")
    from s3prl import hub

    monkeypatch.setattr(hub, "ssast_local", ssast_local, raising=False)
    upstream = nn.S3PRLUpstream("ssast_local", str(MODEL), extra_conf=settings).eval()
    waves = torch.from_numpy(np.stack([tone(32000, seed=seed) for seed in range(2)]))
    with torch.no_grad():
        states, lengths = upstream(waves, torch.tensor([16000, 32000]))
        found, held = nn.Featurizer(upstream)(states, lengths)
    rate = upstream.downsample_rates[0]
    assert held.tolist() == [16000 // rate, 32000 // rate]
    assert found.shape == (2, 32000 // rate, 192) and found.isfinite().all()
    if settings == {"superb": False}:
        want = embed(MODEL, waves[1], level="frame")
        torch.testing.assert_close(states[-1][1, : len(want)], want, rtol=1e-3, atol=1e-3)


def test_the_page_has_what_s3prl_runs(monkeypatch):
    pytest.importorskip("s3prl.nn")
    from s3prl import hub

    monkeypatch.setattr(hub, "ssast_local", None, raising=False)  # removed at the end
    names = example("harnesses.md", "SUPERB", MODEL)
    assert names["featurizer"].output_size == 192 and names["upstream"].num_layers == 12
