"""ssast data look: what a data set holds, on a page that escapes all of its text."""

import json
import math
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lengths import encoded, sound, with_size
from prepared import prepared
from sounds import tone, write

from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.look import (
    listened,
    look_at,
    suggested_frames,
    suggested_share,
    suggestions,
)

NASTY = '<script>alert("x")</script> & $x^2$'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of three classes, one of them hostile, and one of each fault."""
    folder = tmp_path_factory.mktemp("look")
    labels = {}
    for k in range(12):
        name = f"{k:02d}.wav"
        write(folder / name, tone(8000 + 400 * k, seed=k), 16000 if k % 3 else 44100)
        labels[name] = "dog" if k < 9 else NASTY
    (folder / "copy.wav").write_bytes((folder / "01.wav").read_bytes())
    (folder / "half.wav").write_bytes(with_size(encoded("WAV", sound()), "WAV", 16000))
    write(folder / "float.wav", 4 * tone(9000), subtype="FLOAT")
    write(folder / "silent.wav", np.zeros(9000), subtype="PCM_16")
    stereo = np.stack([tone(9000), tone(9000)], 1)
    write(folder / "stereo.wav", stereo, subtype="PCM_16")
    (folder / "bad.wav").write_text("no sound")
    labels |= dict.fromkeys(("copy", "half", "float", "silent", "stereo", "bad"), "cat")
    entries = [{"wav": f"{Path(k).stem}.wav", "labels": [v]} for k, v in labels.items()]
    (folder / "all.json").write_text(json.dumps({"data": entries}))
    return folder


def test_the_page_and_the_configurations(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["data", "look", str(folder / "all.json"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("18 of 18 clips were listened to, 1 of them unusable")
    assert all(Path(line).is_file() for line in shown[1:]) and len(shown) == 8
    assert main(["data", "look", str(folder / "all.json"), "--out", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err
    page = (out / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(" in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []
    assert page.count("<img") == 4
    for text in (
        "all 18 clips",
        "1 of all clips is an exact copy of another",
        f"<td>{folder}/01.wav</td><td>{folder}/copy.wav</td>",
        f"<td>{folder}/bad.wav</td><td>cannot be decoded: Format not recognised</td>",
        f"<td>{folder}/half.wav</td><td>0.5 s</td><td>1 s</td>",
        f"<td>peaks above full scale</td><td>1</td><td>{folder}/float.wav</td>",
        f"<td>digital silence</td><td>1</td><td>{folder}/silent.wav</td>",
        "16000 (76 %), 44100 (24 %) Hz",
        "1 (94 %), 2 (6 %)",
    ):
        assert text in page, text
    config = load_config(out / "pretrain.yaml")
    assert config.data.train == str(folder / "all.json")
    assert config.audio.num_frames == 112  # of 1.03 s
    config = load_config(out / "finetune.yaml")
    assert config.finetune is not None and config.finetune.class_weights == "balanced"
    assert (config.finetune.loss, config.data.valid_share) == ("ce", 0.1)
    recipe = load_config("classifier")  # whose other settings it has
    assert replace(config.finetune, class_weights="none", metric="auto") == recipe.finetune
    assert (config.optim, config.train) == (recipe.optim, recipe.train)
    assert f"ssast finetune {out}/finetune.yaml --checkpoint runs/pretrain" in page


def test_every_source_and_a_draw_of_it(folder: Path, tmp_path: Path) -> None:
    index = prepared(folder / "all.json", tmp_path / "shards")
    found = look_at(tmp_path / "shards", jobs=2, progress=False)
    assert found.num_clips == len(index) == found.num_drawn and not found.bad
    assert set(found.counts or ()) == {"dog", "cat", NASTY}
    assert {one.rate_hz for one in found.heard} == {16000}
    assert found.copies is not None and [len(group) for group in found.copies] == [2]
    found = look_at(folder, max_clips=5, progress=False)
    assert (found.num_drawn, found.num_clips, found.counts) == (5, 18, None)
    assert "finetune" not in suggestions(found)
    entries = [{"wav": str(folder / "05.wav"), "begin": 0.1, "end": 0.3, "labels": "a,b"}] * 1
    (tmp_path / "parts.json").write_text(json.dumps({"data": entries}))
    found = look_at(tmp_path / "parts.json", progress=False)
    assert [one.seconds for one in found.heard] == [pytest.approx(0.2)]
    assert found.several and suggestions(found)["finetune"]["loss"] == "bce"
    assert found.names == [("a", "b")] and found.spectrograms[0][1].shape == (18, 128)


def test_a_table_whose_format_is_set(folder: Path, tmp_path: Path) -> None:
    """The configurations say it as well."""
    lines = [f"{folder}/{k:02d}.wav;kind {k % 2}" for k in range(1, 7)]
    (tmp_path / "all.csv").write_text("\n".join(["clip;species", *lines]))
    table = ["--columns", "wav=clip,labels=species", "--delimiter", ";"]
    out = tmp_path / "out"
    assert main(["data", "look", str(tmp_path / "all.csv"), "--out", str(out), *table]) == 0
    data = load_config(out / "finetune.yaml").data
    assert (data.columns, data.delimiter) == ({"wav": "clip", "labels": "species"}, ";")
    assert "&ldquo;kind 0&rdquo; has 3" in (out / "index.html").read_text()
    assert main(["data", "look", str(folder), "--out", str(out), "--max-clips", "9"]) == 0
    assert load_config(out / "pretrain.yaml").data.train == str(folder)
    assert not (out / "finetune.yaml").exists() and not (out / "classes.png").exists()


def test_what_is_heard(tmp_path: Path) -> None:
    samples = np.zeros(16000, np.float32)
    samples[8000:] = 0.5
    samples[-160:] = 1.0
    one = listened(str(write(tmp_path / "a.wav", samples, subtype="FLOAT")))
    rms = math.sqrt((7840 * 0.25 + 160) / 16000)
    assert one.level_db == pytest.approx(20 * math.log10(rms), abs=1e-4)
    assert (one.silent, one.clipped, one.peak) == (0.5, 0.01, 1.0)
    assert (one.seconds, one.rate_hz, one.channels, one.note) == (1.0, 16000, 1, None)
    assert suggested_frames([one]) == 112
    assert [suggested_share(n) for n in (10, 20_000, 200_000, 10**8)] == [0.1, 0.1, 0.01, 0.001]


def test_what_training_rejects_is_unusable(tmp_path: Path) -> None:
    """It can be decoded, and some of it be heard."""
    write(tmp_path / "a.wav", tone(9000))
    write(tmp_path / "short.wav", tone(100), subtype="PCM_16")
    loud = tone(9000)
    loud[77] = 1e30
    write(tmp_path / "loud.wav", loud, subtype="FLOAT")
    found = look_at(tmp_path, progress=False)
    assert [Path(str(one.clip)).name for one in found.heard] == ["a.wav"]
    assert [(Path(str(clip)).name, why) for clip, why in found.bad] == [
        ("loud.wav", "holds samples that are NaN, infinite or absurdly large"),
        ("short.wav", "too short: 100 samples, one window is 400"),
    ]


def test_nothing_to_look_at(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", 9) + b"WAVE")
    with pytest.raises(DataError, match=r"none of 1 clips can be used; the first: .*a\.wav: "):
        look_at(tmp_path, progress=False)
    with pytest.raises(DataError, match="--max-clips is 0, expected at least 1"):
        look_at(tmp_path, max_clips=0, progress=False)
