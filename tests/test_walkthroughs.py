"""Walk-throughs of the documentation: their commands as they stand, on less sound and few steps."""

import json
import re
import shlex
from pathlib import Path

import pytest
from paths import ROOT

from ssast.engine.cli.main import main

FEWER = {
    "pretrain": ["train.steps=3", "train.batch_size=4", "data.valid_share=0.15"],
    "finetune": ["finetune.epochs=1"],
}


def test_from_raven_tables_to_a_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/bioacoustics.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code, to_raven = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    for long, short in (("60 * rate_hz", "12 * rate_hz"), ("< 58", "< 10")):
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, "field.py", "exec"), {})
    lines = [line.strip() for line in page.splitlines() if line.startswith("    ssast ")]
    assert len(lines) == 5
    shown = {}
    for line in lines:
        arguments = shlex.split(line)[1:]
        assert main([*arguments, *FEWER.get(arguments[0], [])]) == 0, line
        shown[arguments[0], arguments[1]] = capsys.readouterr().out
    assert "1 recordings have no table" in shown["data", "manifests"]
    assert "3 labels, 0 problems" in shown["data", "check"]
    entries = json.loads(Path("events/clips.json").read_text())["data"]
    assert {entry["labels"] for entry in entries} == {"quiet", "triller", "whistler"}
    assert {entry["duration"] for entry in entries} == {1.28}
    found = [json.loads(line) for line in Path("found/windows.jsonl").read_text().splitlines()]
    assert found[0]["path"].endswith("night_7.flac") and len(found) > 10
    assert list(Path("found").glob("*.png"))
    assert "score >= 0.5" in to_raven  # after so few steps
    exec(compile(to_raven.replace("score >= 0.5", "True"), "to_raven.py", "exec"), {})
    made = Path("found/night_7.found.txt")
    source = tmp_path / "back"
    source.mkdir()
    (source / made.name).write_text(made.read_text())
    (source / "night_7.flac").symlink_to(tmp_path / "field/night_7.flac")
    assert main(["data", "manifests", "raven", str(source), "--out", "again"]) == 0
    back = json.loads(Path("again/clips.json").read_text())["data"]
    assert len(back) == len(found) and back[0]["duration"] == 1.28
