"""Columns of tables that are set by hand: in a configuration, and on a command line."""

import json
from pathlib import Path

import pytest
from sounds import tone, write

from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.data.clips import find_clips
from ssast.engine.data.labels import find_classes
from ssast.engine.data.splits import find_splits
from ssast.engine.errors import ConfigError
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.errors import DataError

COLUMNS = "data.columns={wav: clip, labels: species}"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of 8 clips of two species, some of both."""
    rows = ["clip;species;label"]
    for number in range(8):
        write(tmp_path / f"{number}.wav", tone(8000, seed=number), subtype="PCM_16")
        rows.append(f"{number}.wav;{'wren' if number % 2 else 'tit|wren'};none")
    path = tmp_path / "birds.csv"
    path.write_text("\n".join(rows), encoding="utf-16")
    return path


def test_settings_reach_each_manifest(table: Path) -> None:
    named = [f"data.train={table}", COLUMNS, "data.valid_share=0.25"]
    assert sum(map(len, find_clips(load_config("base_patch", named)))) == 8
    named += ["data.label_separator='|'", "finetune.loss=bce", "finetune.allow_leakage=true"]
    config = load_config("classifier", [*named, f"data.valid={table}", f"finetune.test={table}"])
    splits = find_splits(config)
    assert splits.classes == ("tit", "wren") and splits.test is not None
    assert splits.train.counts().tolist() == splits.test.counts().tolist() == [4, 8]
    with pytest.raises(DataError, match=r"data.columns=\{wav: NAME\} names the column"):
        find_clips(load_config("base_patch", named[:1]))
    with pytest.raises(DataError, match=r"has no labels, fine-tuning needs them; data.columns="):
        find_splits(load_config("classifier", [named[0], 'data.columns={wav: clip, labels: ""}']))
    with pytest.raises(ConfigError, match=r"data.columns: expected some of wav, labels"):
        find_clips(load_config("base_patch", [named[0], "data.columns={path: clip}"]))


def test_a_separator_that_was_forgotten_is_named(table: Path) -> None:
    classes = table.with_name("classes.csv")
    classes.write_text("index,mid,display_name\n0,tit,Tit\n1,wren,Wren\n")
    named = [f"data.train={table}", COLUMNS, f"finetune.labels={classes}"]
    with pytest.raises(DataError, match=r"unknown label 'tit\|wren'.*data.label_separator='\|'"):
        find_splits(load_config("classifier", named))


def test_options_of_commands(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--columns", "wav=clip,labels=species", "--label-separator", "|"]
    assert main(["data", "check", str(table), *options]) == 0
    assert "8 clips, 0.00 h, 2 labels, 0 problems" in capsys.readouterr().out
    out = table.parent / "out"
    assert main(["data", "prepare", str(table), str(out), *options]) == 0
    labels = read_manifest(out).labels or ()
    assert sorted(labels) == [("tit", "wren")] * 4 + [("wren",)] * 4
    assert main(["data", "check", str(table), "--columns", "clip"]) != 0
    assert "--columns: expected ROLE=NAME,..., found 'clip'" in capsys.readouterr().err
    listed = [{"audio_filepath": f"{number}.wav"} for number in range(8)]
    lines = table.with_suffix(".jsonl")
    lines.write_text("".join(f"{json.dumps(entry)}\n" for entry in listed))
    assert main(["data", "check", str(lines)]) == 0
    assert ": 8 clips, 0.00 h, 0 problems" in capsys.readouterr().out


def test_classes_that_look_alike(tmp_path, caplog):
    for other, warned in (("cafe\u0301", True), ("cafe", False)):
        table = tmp_path / f"{warned}.csv"
        table.write_text(f"wav,label\na.wav,caf\u00e9\nb.wav,{other}\n", encoding="utf-8")
        caplog.clear()
        assert len(find_classes(str(table), None)) == 2
        assert ("1 classes are two for how their characters are composed" in caplog.text) == warned
