"""What evaluation harnesses are given is what ``ssast embed`` writes of the same clips."""

import inspect
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from pages import example
from sounds import tone
from torch.utils.data import DataLoader

from ssast.engine.api import (
    ConfigError,
    DataError,
    LoadedModel,
    MissingMetadata,
    MtebEncoder,
    XaresEncoder,
    embed,
    embed_recordings,
    open_model,
    save_published,
)
from ssast.engine.config import from_plain
from ssast.engine.evaluation import hear
from ssast.engine.evaluation.harness import WaveformEncoder
from ssast.engine.evaluation.xares import check_decoding
from ssast.engine.formats.known_weights import ours
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer

SAMPLES = (6400, 10000, 2000, 400)  # of 10480, which fill the input
TASK = {"task_metadata": "toy", "hf_split": "test", "hf_subset": "default"}


def make(path, *, patch=(16, 16), stride=None, seed=0, pooling=None, **audio) -> LoadedModel:
    torch.manual_seed(seed)
    config = from_plain(
        {
            "model": {"size": "tiny", "depth": 1, "patch": list(patch)},
            "audio": {"num_frames": 64, "mean": -5.0, "std": 4.0} | audio,
            "objective": {"num_masked": 8, "mask": "random"},
        }
    )
    model = SpectrogramTransformer(config.model, config.audio, stride)
    if pooling is not None:
        model = Classifier(model, 3, pooling)
    return LoadedModel(model.eval(), config, path, "run")


KINDS = {
    "patch": {},
    "frame": {"patch": (128, 2)},
    "padding mask": {"ignore_padding": True},
    "overlap": {"stride": (10, 10)},
    "classifier": {"pooling": "cls"},
}


@pytest.fixture(scope="module", params=KINDS)
def loaded(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("m") / "a run.pth", **KINDS[request.param])


@pytest.fixture(scope="module")
def written(loaded, tmp_path_factory):
    """The waveforms, and what the command writes: per clip, per column."""
    folder = tmp_path_factory.mktemp("clips")
    waves = [tone(samples, seed=samples) for samples in SAMPLES]
    for number, wave in enumerate(waves):
        soundfile.write(folder / f"{number}.wav", wave, 16000, subtype="FLOAT")
    rows = {}
    for level in ("clip", "frame"):
        embed_recordings(loaded, folder, folder / f"{level}.npy", level=level)
        rows[level] = torch.from_numpy(np.load(folder / f"{level}.npy"))
    return waves, rows["clip"], rows["frame"]


def padded(waves) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(w) for w in waves], batch_first=True)


def close(found, want):
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)


@pytest.mark.compatible("X-ARES", "features of clips in a padded batch")
def test_xares_is_given_the_columns_of_each_clip(loaded, written):
    waves, _, frames = written
    found = XaresEncoder(loaded)(padded(waves))
    columns = frames.shape[1] - int(frames[1].isnan().all(-1).sum())
    assert found.shape == (4, columns, 192) and found.dtype == torch.float32
    close(found, frames[:, :columns].nan_to_num(0.0))


@pytest.mark.compatible("X-ARES", "check_audio_encoder")
def test_xares_asks_for_these(loaded):
    """Its check_audio_encoder: type, attributes and shapes; and it may be run in inference mode."""
    encoder = XaresEncoder(loaded)
    assert isinstance(encoder, torch.nn.Module) and type(encoder).__name__.endswith("Encoder")
    with torch.inference_mode():
        found = encoder(torch.randn(2, 50000))
    assert found.ndim == 3 and len(found) == 2 and found.shape[2] == encoder.output_dim == 192
    assert encoder.sampling_rate == 16000
    duration_ms = 50000 / encoder.sampling_rate * 1000
    assert abs(found.shape[1] - duration_ms / encoder.hop_size_in_ms) < 2


def test_xares_keeps_the_scores_of_models_apart(tmp_path):
    """By the name of the class, which a changed weight, input or head changes."""
    models = [
        make(tmp_path / "a"),
        make(tmp_path / "a", seed=1),
        make(tmp_path / "a", mean=-4.0),
        make(tmp_path / "a", pooling="cls"),
        make(tmp_path / "b c.pth"),
    ]
    names = [type(XaresEncoder(model)).__name__ for model in models]
    assert len(set(names)) == len(models)
    assert names[0] == type(XaresEncoder(make(tmp_path / "a"))).__name__
    assert names[-1].startswith("b_c_") and all(name.isidentifier() for name in names)


def test_a_model_from_elsewhere_has_one_name(tmp_path):
    """Such files have no mask token, which is drawn when they are opened and never used."""
    save_published(make(tmp_path, pooling="avgtok").model, tmp_path / "tuned.pth")
    metadata = MissingMetadata(num_frames=64, stride=(16, 16))
    names = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        names.add(WaveformEncoder(open_model(tmp_path / "tuned.pth", metadata)).fingerprint())
    assert len(names) == 1


def test_a_model_from_the_hub_has_its_name(tmp_path):
    loaded = make(tmp_path)
    snapshot = tmp_path / "models--me--mine/snapshots/0123abc"
    assert WaveformEncoder(replace(loaded, path=snapshot)).name == "me_mine"
    assert WaveformEncoder(replace(loaded, path=tmp_path / "runs/mine")).name == "mine"


def test_xares_pads_with_zeros_and_silence_is_embedded(loaded):
    encoder, wave = XaresEncoder(loaded), torch.from_numpy(tone(3000, seed=1))
    alone = encoder(wave[None])
    together = encoder(torch.stack([torch.cat([wave, torch.zeros(30000)]), torch.zeros(33000)]))
    close(together[:1, : alone.shape[1]], alone)
    assert not together[0, alone.shape[1] :].any() and together[1, 0].any()
    with pytest.raises(DataError, match="399 samples at 16000 Hz, expected at least 400"):
        encoder(torch.ones(1, 399))


def rows(waves, rate_hz=16000):
    return [{"audio": {"array": wave, "sampling_rate": rate_hz}, "label": 0} for wave in waves]


def loader(items) -> DataLoader:
    return DataLoader(items, batch_size=3)


@pytest.mark.compatible("MTEB", "encode: one vector a clip")
def test_mteb_is_given_one_vector_a_clip(loaded, written, device):
    waves, clips, frames = written
    found = MtebEncoder(loaded).encode(loader(rows(waves)), show_progress_bar=False, **TASK)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    close(torch.from_numpy(found), clips)
    means = torch.stack([row[~row.isnan().all(-1)].mean(0) for row in frames])
    over_time = MtebEncoder(loaded, pooling="time").encode(loader(rows(waves)), **TASK)
    close(torch.from_numpy(over_time), means)


def test_mteb_has_recordings_of_any_rate_and_length(tmp_path):
    loaded = make(tmp_path / "a")
    encoder = MtebEncoder(loaded)
    waves = {8000: tone(5000), 16000: tone(50000), 44100: np.stack([tone(9000)] * 2)}
    items = [rows([wave.astype(np.float64)], rate)[0] for rate, wave in waves.items()]
    found = encoder.encode(loader(items), **TASK)
    for vector, (rate, wave) in zip(found, waves.items(), strict=True):
        close(torch.from_numpy(vector), embed(loaded, wave.reshape(-1, wave.shape[-1])[0], rate))


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"text": "a", "label": 0}, ConfigError, "row 3: expected audio, found text, label"),
        (rows([tone(200)])[0], DataError, "toy default test, row 3: waveform: 200 samples at 16"),
        (rows([np.zeros(0)])[0], DataError, "row 3: waveform: 0 samples"),
        (rows([np.zeros(999, np.int16)])[0], DataError, r"row 3: .*got \[999\] torch.int16"),
        (rows([np.full(999, np.nan)])[0], DataError, "row 3: .*holds NaN"),
    ],
)
def test_mteb_is_told_which_row_cannot_be_embedded(row, error, message, tmp_path):
    items = [*rows([tone(500)] * 3), row]
    with pytest.raises(error, match=message):
        MtebEncoder(make(tmp_path / "a")).encode(loader(items), **TASK)


@pytest.mark.compatible("MTEB", "EncoderProtocol")
def test_mteb_asks_for_these(tmp_path):
    """Its EncoderProtocol: the parameters of encode, and similarities."""
    encoder = MtebEncoder(make(tmp_path / "a"))
    parameters = inspect.signature(encoder.encode).parameters.values()
    keywords = {"task_metadata", "hf_split", "hf_subset", "prompt_type"}
    assert next(iter(parameters)).name == "inputs"
    assert keywords <= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {"batch_size", "show_progress_bar", "precision"} <= {p.name for p in parameters}
    with pytest.raises(ConfigError, match="expected precision float32, found int8"):
        encoder.encode(loader(rows([tone(500)])), precision="int8", **TASK)
    a, b = np.random.default_rng(0).standard_normal((2, 5, 4))
    want = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    close(encoder.similarity(a, b).double(), torch.from_numpy(want))
    close(encoder.similarity_pairwise(a, torch.from_numpy(b)).double(), torch.tensor(want).diag())


@pytest.mark.compatible("HEAR", "scene and timestamp embeddings")
def test_hear_is_given_clips_and_columns(loaded, written):
    waves, clips, frames = written
    model = hear.HearModel(loaded)
    for wave, clip, columns in zip(waves, clips, frames, strict=True):
        audio = torch.from_numpy(wave)[None]
        close(hear.get_scene_embeddings(audio, model)[0], clip)
        found, stamps = hear.get_timestamp_embeddings(audio, model)
        close(found[0], columns[~columns.isnan().all(-1)])
        assert stamps.shape == found.shape[:2]


@pytest.mark.compatible("HEAR", "the checks of hear-validator 2021.0.2")
def test_hear_asks_for_these(loaded, monkeypatch):
    """The checks of hear-validator 2021.0.2."""
    monkeypatch.setattr(hear, "open_model", lambda path, metadata: loaded)
    model = hear.load_model("runs/mine")
    assert isinstance(model, torch.nn.Module) and model.sample_rate in (16000, 22050, 44100, 48000)
    assert type(model.scene_embedding_size) is type(model.timestamp_embedding_size) is int
    audio = torch.rand(16, 2 * model.sample_rate) * 2 - 1
    found, stamps = hear.get_timestamp_embeddings(audio, model)
    assert found.dtype == torch.float32 and len(found) == 16
    assert found.shape[:2] == stamps.shape and found.shape[2] == model.timestamp_embedding_size
    steps = stamps.diff()
    assert ((steps - steps.mean()).abs() < 1e-3).all() and steps[0, 0] == model.hop_ms
    audio = torch.rand(8, int(3.74 * model.sample_rate)) * 2 - 1
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.dtype == torch.float32 and scenes.shape == (8, model.scene_embedding_size)


@pytest.mark.parametrize(
    ("patch", "stride", "first", "hop"),
    [
        ((16, 16), None, 87.5, 160),
        ((128, 2), None, 17.5, 20),
        ((128, 4), None, 27.5, 40),
        ((16, 16), (10, 10), 87.5, 100),
    ],
)
def test_timestamps_are_where_a_sound_is(patch, stride, first, hop, tmp_path):
    """A click changes the embedding of its column most where no token attends to another."""
    loaded = make(tmp_path / "a", patch=patch, stride=stride)
    loaded.encoder.blocks = torch.nn.ModuleList()
    model = hear.HearModel(loaded)
    silence = torch.zeros(1, 40000)
    quiet, stamps = hear.get_timestamp_embeddings(silence, model)
    assert stamps[0, :2].tolist() == [first, first + hop]
    last = loaded.encoder.embed.grid[1] - 1  # of the first window
    for column in (1, last, last + 1, 2 * last + 3):
        audio = silence.clone()
        at = round(float(stamps[0, column]) * 16)
        audio[0, at : at + 2] = torch.tensor([1.0, -1.0])  # the mean is subtracted
        found, _ = hear.get_timestamp_embeddings(audio, model)
        change = (found - quiet).norm(dim=-1)[0]
        assert int(change.argmax()) == column


def test_hear_resamples_where_it_has_no_recordings_at_the_rate(tmp_path):
    loaded = make(tmp_path / "a", sample_rate_hz=8000)
    model, audio = hear.HearModel(loaded), torch.from_numpy(np.stack([tone(20000)] * 2))
    assert model.sample_rate == 16000
    close(hear.get_scene_embeddings(audio, model), embed(loaded, audio, 16000))
    rates = {16000: 16000, 22050: 22050, 32000: 44100, 48000: 48000, 96000: 48000}
    found = [hear.HearModel(make(tmp_path, sample_rate_hz=r)).sample_rate for r in rates]
    assert found == list(rates.values())


def test_hear_opens_what_the_loaders_open(tmp_path):
    save_published(make(tmp_path, pooling="avgtok").model, tmp_path / "tuned.pth")
    metadata = {"num_frames": 64, "stride": [16, 16]}
    model = hear.load_model(str(tmp_path / "tuned.pth"), "time", **metadata)
    assert model.loaded.is_classifier and model.pooling == "time"
    with pytest.raises(ConfigError, match="says neither how many frames"):
        hear.load_model(str(tmp_path / "tuned.pth"))
    with pytest.raises(
        ConfigError, match="frames: expected pooling, layer or one of num_frames, stride"
    ):
        hear.load_model(str(tmp_path / "tuned.pth"), frames=64)
    with pytest.raises(ConfigError, match="model_file_path is not set"):
        hear.load_model()
    with pytest.raises(ConfigError, match="pooling: expected model or time, found 'max'"):
        WaveformEncoder(make(tmp_path), pooling="max")


def test_xares_is_not_run_where_it_would_leave_out_all_clips(tmp_path, monkeypatch):
    """A torchaudio that cannot decode, as one without torchcodec."""
    (tmp_path / "torchaudio.py").write_text(
        "def load(path):\n    raise ImportError('TorchCodec is required')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # so that it is as it was afterwards
    del sys.modules["torchaudio"]
    with pytest.raises(ConfigError, match="install torchcodec and FFmpeg: TorchCodec is required"):
        check_decoding()
    monkeypatch.setitem(sys.modules, "xares", object())
    with pytest.raises(ConfigError, match="would leave out all clips"):
        XaresEncoder(make(tmp_path / "a"))


def test_the_page_has_what_xares_imports():
    """Its attr_from_py_path takes the only name that ends in Encoder; it is called."""
    names = example("harnesses.md", "X-ARES", ours()["tiny_patch"])
    (name,) = (name for name in names if name.endswith("Encoder"))
    encoder = names[name]()
    assert type(encoder).__name__ == f"tiny_patch_{encoder.fingerprint()}_Encoder"


def test_the_page_has_what_mteb_runs(monkeypatch):
    mteb = SimpleNamespace(get_tasks=list, evaluate=lambda model, tasks: (model, tasks))
    monkeypatch.setitem(sys.modules, "mteb", mteb)
    model, tasks = example("harnesses.md", "MTEB", ours()["tiny_patch"])["result"]
    assert isinstance(model, MtebEncoder) and tasks == ["BeijingOpera"]
