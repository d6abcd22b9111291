"""The weights of a model are read once, whatever is done with it, and without training code."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from finetune_runs import make_sounds, manifest, overrides, pretrained_file

from ssast.engine.api import (
    CheckpointError,
    ConfigError,
    FinetuneEngine,
    MissingMetadata,
    UpstreamExpert,
    embed,
    export_huggingface,
    load_config,
    load_pretrained,
    open_model,
    predict,
    save_published,
)
from ssast.engine.checkpoints import store
from ssast.engine.checkpoints.classifier import build_classifier, save_chosen
from ssast.engine.checkpoints.store import STATE, Checkpoints
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain, to_plain
from ssast.engine.formats.open import as_classifier
from ssast.engine.model.objective import MSPM

PLAIN = {"model": {"size": "tiny", "depth": 1}, "audio": {"num_frames": 48}}
CLASSES = ("pitch0", "pitch1", "pitch2")


class Reads:
    """How often each file of weights was read, and how often hashed."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.loaded, self.hashed = Counter[Path](), Counter[Path]()
        for module, name, counter in (
            (torch, "load", self.loaded),
            (safetensors.torch, "load_file", self.loaded),
            (store, "_sha256", self.hashed),
        ):
            patch.setattr(module, name, self._counting(getattr(module, name), counter))

    def _counting(self, real, counter):
        def counting(path, *arguments, **options):
            counter[Path(path)] += 1
            return real(path, *arguments, **options)

        return counting

    def of(self, path: Path) -> int:
        """Of a file, or of the files in a folder."""
        hashed = [n for p, n in self.hashed.items() if p.name == STATE and p.is_relative_to(path)]
        assert all(number == 1 for number in hashed)
        return sum(number for p, number in self.loaded.items() if p.is_relative_to(path))


@pytest.fixture
def reads(monkeypatch):
    return Reads(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model of each kind that a path may hold."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = from_plain(PLAIN | {"finetune": {}})
    classifier = build_classifier(config, len(CLASSES)).eval()
    weights = {f"weight/{name}": value for name, value in classifier.state_dict().items()}
    found = {
        "finetuned": folder / "finetuned",
        "published": folder / "published.pth",
        "safetensors": folder / "published.safetensors",
        "transformers": folder / "transformers",
        "pretrained": folder / "pretrained",
        "file": pretrained_file(folder),
    }
    found["checkpoint"] = save_chosen(
        found["finetuned"], weights, step=3, config=config, classes=CLASSES, facts={}
    )
    save_published(classifier, found["published"])
    state = torch.load(found["published"], weights_only=True)
    safetensors.torch.save_file(state, found["safetensors"])
    export_huggingface(classifier, found["transformers"], config.audio, CLASSES)
    config = from_plain(PLAIN | {"objective": {"num_masked": 2}})
    weights = {f"weight/{name}": value for name, value in MSPM(config).state_dict().items()}
    checkpoints = Checkpoints(found["pretrained"] / "checkpoints")
    checkpoints.save(weights, {"config": to_plain(config)}, step=7)
    return found


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return manifest(folder / "clips.json", make_sounds(folder / "sounds", 3, 4))


TUNED = ["finetuned", "checkpoint", "published", "safetensors", "transformers"]
FILES = ("published", "safetensors")  # of a fine-tuned model


def options(kind: str) -> list[str]:
    return ["--frames", "48", "--stride", "16", "16"] if kind in FILES else []


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", [*TUNED, "pretrained", "file"])
def test_a_loaded_model_says_what_it_is(kind, models, reads):
    loaded = open_model(models[kind], MissingMetadata(48, (16, 16)) if kind in FILES else None)
    assert reads.of(models[kind]) == 1
    origins = {"transformers": "transformers", **dict.fromkeys((*FILES, "file"), "published")}
    assert (loaded.origin, loaded.path) == (origins.get(kind, "run"), models[kind])
    assert loaded.is_classifier == (kind in TUNED)
    assert loaded.step == {"finetuned": 3, "checkpoint": 3, "pretrained": 7}.get(kind)
    assert loaded.audio.num_frames == (64 if kind == "file" else 48)
    if kind in TUNED:
        assert loaded.classes == loaded.names == (() if kind in FILES else CLASSES)
        numbered = ("0", "1", "2") if kind in FILES else CLASSES
        assert as_classifier(loaded).names == numbered and loaded.num_classes == 3
    else:
        with pytest.raises(CheckpointError, match="expected a fine-tuned model, found a pretrain"):
            as_classifier(loaded)


@pytest.mark.parametrize("kind", TUNED)
def test_prediction_reads_once(kind, models, clips, reads, capsys):
    assert run("predict", models[kind], clips, *options(kind)) == 0
    assert reads.of(models[kind]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 12


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("finetuned", ["predict", "MODEL", "CLIPS", "--window-s", "0.2"]),
        ("finetuned", ["evaluate", "MODEL", "CLIPS"]),
        ("transformers", ["evaluate", "MODEL", "CLIPS"]),
        ("finetuned", ["evaluate", "MODEL", "CLIPS", "--probe"]),
        ("file", ["evaluate", "MODEL", "CLIPS", "--probe"]),
        ("finetuned", ["embed", "MODEL", "CLIPS", "--out", "OUT.npy"]),
        ("file", ["embed", "MODEL", "CLIPS", "--out", "OUT.npy"]),
        ("finetuned", ["export", "MODEL", "--to", "published", "OUT.pth"]),
        ("pretrained", ["export", "MODEL", "--to", "weights", "OUT"]),
        ("file", ["export", "MODEL", "--to", "hf", "OUT"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_every_command_reads_once(kind, arguments, models, clips, reads, tmp_path):
    words = {"MODEL": models[kind], "CLIPS": clips}
    given = [words.get(a, a.replace("OUT", str(tmp_path / "out"))) for a in arguments]
    assert run(*given) == 0
    assert reads.of(models[kind]) == 1


def test_python_reads_once(models, clips, reads):
    assert embed(models["pretrained"], np.zeros(8000, np.float32)).shape == (192,)
    assert reads.of(models["pretrained"]) == 1
    UpstreamExpert(models["file"])
    assert reads.of(models["file"]) == 1
    assert len(predict(models["finetuned"], [clips])) == 12
    assert reads.of(models["finetuned"]) == 1
    assert FinetuneEngine.from_checkpoint(models["transformers"]).evaluate(clips)
    assert reads.of(models["transformers"]) == 1


@pytest.mark.parametrize("kind", ["file", "pretrained"])
def test_fine_tuning_reads_its_beginning_once(kind, models, clips, reads, tmp_path):
    (tmp_path / "plain.yaml").write_text("finetune: {}\n")
    mels = 32 if kind == "file" else 128
    model = {"audio__n_mels": mels, "model__depth": 2 if kind == "file" else 1}
    given = overrides(finetune__epochs=1, data__valid_share=0.25, **model)
    plain = tmp_path / "plain.yaml"
    engine = FinetuneEngine.from_checkpoint(models[kind], 3, plain, given)
    engine.fit(clips, folder=tmp_path / "fit")
    assert reads.of(models[kind]) == 1
    assert load_config(tmp_path / "fit" / "config.yaml").finetune.checkpoint == str(models[kind])
    assert engine.trained.path == tmp_path / "fit"
    reads.loaded.clear(), reads.hashed.clear()
    assert run("finetune", plain, *given, "--checkpoint", models[kind], f"data.train={clips}",
               f"run.folder={tmp_path / 'run'}") == 0  # fmt: skip
    assert reads.of(models[kind]) == 1


def test_a_pretrained_model_is_told_from_others(models, tmp_path):
    model, config = load_pretrained(models["pretrained"])
    assert isinstance(model, MSPM) and config.audio.num_frames == 48
    for kind, message in (
        ("finetuned", "expected a pretrained model, found a fine-tuned one"),
        ("published", "expected a pretrained model, but it is fine-tuned, for 3 classes"),
        ("transformers", "expected a model with its pretraining heads, found none"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(models[kind])
    with pytest.raises(CheckpointError, match="expected a run, a checkpoint or a model, found not"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="leave out labels="):
        open_model(models["file"], MissingMetadata(labels="labels.csv"))
    with pytest.raises(ConfigError, match=r"knows its own settings and labels: leave out mean="):
        open_model(models["transformers"], MissingMetadata(mean=1.0, loss="bce"))


NO_TRAINING = """
import sys
from ssast.engine.api import FinetuneEngine, embed, open_model
from ssast.engine.cli.main import main

model, clip, out = sys.argv[1:]
open_model(model)
assert main(["predict", model, clip]) == 0
assert main(["predict", model, clip, "--window-s", "0.2"]) == 0
assert main(["embed", model, clip, "--out", out]) == 0
assert len(FinetuneEngine.from_checkpoint(model).predict([clip])) == 1
names = ("deepspeed", "matplotlib", "sklearn", "scipy", "torch._dynamo", "torch._inductor")
names += ("fsspec", "transformers", "pandas", "pyarrow")
names += ("ssast.engine.train", "ssast.engine.parallel")
print([name for name in sys.modules if name.startswith(names)])
"""


def test_opening_and_prediction_load_no_training_code(models, clips, tmp_path):
    clip = clips.parent / "sounds" / "0_0.wav"
    given = [str(models["finetuned"]), str(clip), str(tmp_path / "x.npy")]
    done = subprocess.run(
        [sys.executable, "-c", NO_TRAINING, *given], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
