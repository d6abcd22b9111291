"""Predictions and metrics of a trained classifier, also where files are bad."""

import json
from fnmatch import fnmatch
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from finetune_runs import manifest
from odd_files import ROWS, some_odd_files

from ssast.engine.cli.main import main
from ssast.engine.evaluation import predict
from ssast.engine.evaluation.evaluate import evaluate
from ssast.engine.evaluation.predict import find_files
from ssast.engine.finetune import FinetuneEngine
from ssast.engine.formats.open import open_model
from ssast.pipelines.errors import DataError


def test_predict_and_evaluate_from_the_command_line(device, finetuned, splits, capsys):
    folder = splits["test"].parent / "test"
    bad = folder / "9_bad.wav"
    bad.write_text("no audio")
    assert main(["predict", str(finetuned[0]), str(folder), "--json"]) == 3
    bad.unlink()
    shown = capsys.readouterr()
    assert shown.err == "ssast: 1 of 10 files could not be read\n"
    found = [json.loads(line) for line in shown.out.splitlines()]
    assert len(found) == 10
    assert found[-1]["classes"] == [] and found[-1]["reason"]
    for line in found[:-1]:
        assert sum(p for _, p in line["classes"]) == pytest.approx(1.0)
    assert main(["evaluate", str(finetuned[0]), str(splits["test"])]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    want = json.loads((finetuned[0] / "test" / "metrics.json").read_text())
    assert float(shown["accuracy"]) == pytest.approx(want["accuracy"], abs=1e-4)
    right = sum(line["classes"][0][0][-1] == line["path"].rpartition("/")[2][0]
                for line in found[:-1])  # fmt: skip
    assert want["accuracy"] == pytest.approx(right / 9)


@pytest.mark.parametrize("windows", [[], ["--window-s", "0.3"]])
def test_the_status_says_whether_files_could_be_read(
    device, windows, finetuned, splits, tmp_path, capsys, monkeypatch
):
    """Wherever they are missing, broken, empty or of another kind; and of ``embed`` likewise."""
    good = sorted((splits["test"].parent / "test").glob("*.wav"))[:2]
    (tmp_path / "broken.wav").write_bytes(good[0].read_bytes()[:30])
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.flac").write_text("no audio")
    bad = [tmp_path / name for name in ("missing.wav", "broken.wav", "empty.wav", "text.flac")]
    for count in (1, 4):
        assert main(["predict", *map(str, [finetuned[0], *bad[:count]]), *windows]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"ssast: {count} of {count} files could not be read"
    assert main(["predict", *map(str, [finetuned[0], *bad, *good]), *windows]) == 3
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "ssast: 4 of 6 files could not be read"
    assert "%" in shown.out.splitlines()[-1]
    assert main(["predict", *map(str, [finetuned[0], *good]), *windows]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["predict", "evaluate", "embed"])
def test_clips_longer_than_the_input_are_counted_once(command, finetuned, splits, tmp_path, caplog):
    """Of 8,000 samples the last 80 fill no frame: nothing is lost of such a clip."""
    paths = []
    for number, extra in enumerate((0, 79, 80, 8000)):  # at 16 kHz, and the longest at 32 kHz
        path = tmp_path / "sounds" / f"{number % 3}_{extra}.wav"
        path.parent.mkdir(exist_ok=True)
        rate_hz = 32000 if extra == 8000 else 16000
        noise = np.random.default_rng(number).standard_normal((8000 + extra) * rate_hz // 16000)
        soundfile.write(path, 0.1 * noise, rate_hz)
        paths.append(path)
    source = {"evaluate": manifest(tmp_path / "a.json", paths)}.get(command, tmp_path / "sounds")
    more = {"embed": ["--out", str(tmp_path / "a.npy")]}.get(command, [])
    assert main([command, str(finetuned[0]), str(source), *more]) == 0
    (said,) = [line for line in caplog.messages if "longer" in line]
    assert said.startswith("2 of 4 clips are longer than the model's input of 0.495 s: only their")


def test_what_predict_is_given(splits, tmp_path):
    folder = splits["test"].parent / "test"
    clips = sorted(map(str, folder.glob("*.wav")))
    assert find_files([folder]) == find_files([f"file://{folder}"]) == clips
    assert find_files([splits["test"]]) == clips
    assert find_files([clips[1], "none.wav"]) == [clips[1], "none.wav"]
    with pytest.raises(DataError, match="no files: expected audio files"):
        find_files([])


@pytest.mark.parametrize("bad", [[0], [0, 1], [2, 3, 4], [0, 1, 2, 3, 4], [4]])
def test_bad_files_stop_no_prediction(device, bad, finetuned, splits, tmp_path, monkeypatch):
    """However many there are, and wherever; two at a time."""
    monkeypatch.setattr(predict, "BATCH", 2)
    engine = FinetuneEngine.from_checkpoint(finetuned[0])
    good = sorted((splits["test"].parent / "test").glob("*.wav"))[:5]
    want = engine.predict(good)
    paths = [tmp_path / f"{i}.wav" if i in bad else path for i, path in enumerate(good)]
    for i in bad[1:]:
        paths[i].touch()
    for i, found in enumerate(engine.predict(paths)):
        assert (found.reason is not None) == (i in bad) == (not found.classes)
        if i not in bad:
            assert dict(found.classes) == pytest.approx(dict(want[i].classes), abs=1e-5)
    if len(bad) == 5:
        clips = manifest(tmp_path / "bad.json", paths, ["pitch0"] * 5)
        with pytest.raises(DataError, match=r"bad\.json: none of its 5 clips can be read"):
            engine.evaluate(clips)


def test_odd_but_whole_files_are_predicted(device, finetuned, tmp_path):
    """Headers that lie and damaged metadata cost no sound: one file of each of every kind."""
    files, kinds = some_odd_files(), {}
    for name, data in files.items():
        for kind, patterns, _ in ROWS:
            if any(fnmatch(name, pattern) for pattern in patterns):
                path = tmp_path / name
                path.write_bytes(data)
                kinds.setdefault((kind, path.suffix), path)
                break
    engine = FinetuneEngine.from_checkpoint(finetuned[0])
    for found in engine.predict([str(path) for path in kinds.values()]):
        assert found.reason is None and found.classes


@pytest.mark.parametrize(("grid", "most"), [((12, 101), 3), ((8, 8), 32), ((128, 1024), 1)])
def test_batches_on_a_cpu_are_as_many_tokens_as_its_caches_hold(grid, most):
    embed = SimpleNamespace(grid=grid)
    loaded = SimpleNamespace(encoder=SimpleNamespace(embed=embed))
    assert predict.clips_at_once(loaded, torch.device("cpu")) == most
    assert predict.clips_at_once(loaded, torch.device("cuda")) == predict.BATCH


def test_rows_that_fill_up_a_batch_are_not_computed(finetuned, splits, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 3)
    loaded = open_model(finetuned[0])
    rows = []
    loaded.classifier.head.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    predict.predict(loaded, [*(splits["test"].parent / "test").glob("*.wav")][:4], progress=False)
    assert sum(rows) == 4


def test_one_source_alone(finetuned, splits):
    path = find_files([splits["test"]])[0]
    assert find_files(str(path)) == find_files([path]) == [path]
    assert len(predict.predict(finetuned[0], path)) == 1


def test_results_of_an_evaluation_from_python(finetuned, splits, tmp_path, monkeypatch):
    """Their folder may be text, and is tried before any clip is read."""
    engine = FinetuneEngine.from_checkpoint(finetuned[0])
    for number, score in enumerate((engine.evaluate, partial(evaluate, finetuned[0]))):
        values = score(splits["test"], str(tmp_path / str(number)))
        written = json.loads((tmp_path / str(number) / "metrics.json").read_text())
        assert written == pytest.approx(values)
        monkeypatch.setattr("ssast.engine.evaluation.evaluate.score_clips", None)
        with pytest.raises(DataError, match=r"metrics\.json: cannot be written to"):
            score(splits["test"], str(tmp_path / "0" / "metrics.json"))
        monkeypatch.undo()


def test_a_model_that_moved_can_be_trained(finetuned, monkeypatch):
    """Weights that are moved in inference mode could not be."""
    loaded = open_model(finetuned[0])
    moved = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved(self, torch.float64))
    with torch.inference_mode():
        predict.on_device(loaded.classifier, torch.device("cpu"))
    assert not any(weight.is_inference() for weight in loaded.model.parameters())
