"""What a command refuses before it does any work."""

import errno
import json
import os
from pathlib import Path

import pytest
from sounds import tone, write

from ssast.engine.cli.main import main
from ssast.engine.cli.status import files_status
from ssast.engine.config import finetune_settings, load_config
from ssast.engine.finetune import without_effect, without_layer_decay
from ssast.pipelines.errors import DataError, StorageError
from ssast.pipelines.locks import exclusive
from ssast.pipelines.text import print_error, shows_progress

REFUSED = {
    "predict RUN a.wav --top 0": "--top must be at least 1, got 0",
    "visualize RUN --clips -1": "--clips must be at least 1, got -1",
    "evaluate RUN a.csv --train b.csv": "--train is for --probe",
    "export RUN out --to hf --push nobody": "--push nobody: expected owner/name",
    "data stats SOUNDS --max-clips 0": "--max-clips is 0, expected a number in [1, inf]",
    "data stats SOUNDS --out TAKEN": "stats.json: exists already",
    "plan tiny_patch --price nan": "--price must be positive and finite, got nan",
    "plan tiny_patch --clips inf": "--clips must be positive and finite, got inf",
    "tune tiny_patch --seconds inf": "--seconds must be positive and finite, got inf",
    "tune tiny_patch data.train=gone.json": "data.train: gone.json is not in the working directory",
    "tune tiny_patch --out TAKEN/stats.json/x": "stats.json: cannot be written to",
    "data check SOUNDS --report TAKEN": "expected a file, found a folder",
    "data check SOUNDS --report TAKEN/stats.json/x": "stats.json: cannot be written to",
    "data check SOUNDS --report /dev/null": "/dev/null: exists already",
    "demo train.stepz=9": "train.stepz",
    "finetune classifier --frames 9": "--frames, --stride and the like are what",
    "plan tiny_patch --png notes.txt": "--png notes.txt: expected a name that ends in .png",
    "plan tiny_patch --png TAKEN/a.png": "a.png: exists already",
    "plan tiny_patch --png TAKEN/stats.json/b.png": "stats.json: cannot be written to",
    "predict RUN a.wav --out TAKEN/stats.json/x": "x: cannot be written to",
    "probe RUN --tasks SOUNDS --out TAKEN/stats.json/x": "x: cannot be written to",
    "pretrain tiny_patch optim.min_lr=1": "optim.min_lr must be at most 0.0005, got 1",
}


@pytest.mark.parametrize("command", REFUSED)
def test_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken, sounds = tmp_path / "taken", tmp_path / "sounds"
    for folder in (taken, sounds):
        folder.mkdir()
    (taken / "stats.json").write_text("{}")
    (taken / "a.png").write_text("")
    write(sounds / "a.wav", tone(8000))
    places = {"TAKEN": str(taken), "SOUNDS": str(sounds)}
    words = [
        "/".join(places.get(part, part) for part in word.split("/")) for word in command.split()
    ]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert REFUSED[command] in shown.err and not shown.out
    assert sorted(path.name for path in taken.iterdir()) == ["a.png", "stats.json"]


def test_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert (
        end.value.code == 0 and "ssast bench WHAT --help explains each" in capsys.readouterr().out
    )


def test_a_plan_of_a_fine_tuning_knows_no_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "esc50_patch", "--price", "2"]) == 0
    assert "of a fine-tuning: as many clips as there are" in capsys.readouterr().out
    assert main(["plan", "esc50_patch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu_hours"] is None
    assert main(["plan", "esc50_patch", "--clips", "4e5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 4e5


def test_other_recordings_into_a_prepared_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}.wav", tone(16000, seed=ord(name)))
    prepare = ["data", "prepare", str(tmp_path / "a"), str(tmp_path / "out"), "--jobs", "1"]
    assert main(prepare) == 0
    before = (tmp_path / "out/report.json").read_bytes()
    assert main([*prepare[:2], str(tmp_path / "b"), *prepare[3:]]) == 2
    said = f"out: holds what was prepared of {tmp_path / 'a'}, and nothing of {tmp_path / 'b'}"
    assert said in capsys.readouterr().err
    assert (tmp_path / "out/report.json").read_bytes() == before
    assert main([*prepare, "--clip-s", "0.5"]) == 0  # of the same recordings it is made anew


def test_a_probe_that_knows_its_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.wav", tone(16000, seed=ord(name)))
    (tmp_path / "all.csv").write_text("wav,label\na.wav,x\nb.wav,y\nc.wav,x\nd.wav,y\n")
    model = str(Path(__file__).parents[3] / "checkpoints/tiny_patch")
    manifest = str(tmp_path / "all.csv")
    assert main(["evaluate", model, manifest, "--probe", "--train", manifest]) == 2
    both = f"training clips {manifest} and evaluation clips {manifest} both hold {tmp_path}/a.wav"
    assert f"{both}: expected no recording in two data sets" in capsys.readouterr().err


def test_settings_of_pretraining_in_a_fine_tuning() -> None:
    given = ["data.train=x", "train.steps=5", "train.validate_every=1", "objective.kind=latent"]
    (line,) = without_effect(load_config("classifier", given))
    assert line.startswith("train.steps, train.validate_every, objective.kind: of pretraining, ")
    assert "not used; finetune.epochs says how long, and each ends with a validation" in line
    assert without_effect(load_config("classifier", given[:1])) == []


def test_the_layer_decay_of_a_recipe_is_for_pretrained_layers(tmp_path: Path) -> None:
    folder = f"run.folder={tmp_path}"
    left, (line,) = without_layer_decay(load_config("classifier", [folder]), begun=False)
    assert finetune_settings(left).layer_decay == 1.0 and "0.75 of classifier.yaml" in line
    for given in ("finetune.layer_decay=0.75", "finetune.checkpoint=x"):
        kept, lines = without_layer_decay(load_config("classifier", [folder, given]), begun=False)
        assert finetune_settings(kept).layer_decay == 0.75 and not lines
    # A run that was begun with it goes on with it, from its own file or from the recipe.
    stored = tmp_path / "config.yaml"
    for used in (0.75, 1.0):
        stored.write_text(f"finetune: {{layer_decay: {used}}}\n")
        for config in (load_config("classifier", [folder]), load_config(stored, [folder])):
            kept, _ = without_layer_decay(config, begun=True)
            assert finetune_settings(kept).layer_decay == used


@pytest.mark.parametrize("name", ["shards/00000.tar", "index.npy", "report.json"])
def test_prepare_leaves_the_users_own_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.wav", tone(16000))
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"of": "the user"}')
    prepare = ["data", "prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--jobs", "1"]
    assert main(prepare) == 2
    assert f"{mine}: not of ssast data prepare" in capsys.readouterr().err
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [mine]
    assert mine.read_text() == '{"of": "the user"}'
    mine.unlink()
    assert main(prepare) == 0
    (tmp_path / "out/report.json").unlink()  # as if it had been killed
    assert main([*prepare, "--clip-s", "0.5"]) == 0


def test_closed_streams_are_no_error(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.stderr", None)
    print_error("lost")
    assert not shows_progress()
    assert files_status(1, 2) == 3
    assert capsys.readouterr().out == "", "a message among the data"
    monkeypatch.setattr("sys.stdout", None)
    assert files_status(0, 2) == 2


def test_storage_that_fails_is_worth_another_attempt(tmp_path: Path) -> None:
    """And a full disk is not: what a batch system does follows from the status."""
    for number, kind in ((errno.EIO, StorageError), (errno.ENOSPC, DataError)):
        with pytest.raises(DataError) as caught, exclusive(tmp_path):
            raise OSError(number, os.strerror(number))
        assert type(caught.value) is kind
