"""``ssast bench continued``: its runs, and the table that is made of them."""

import json
from collections import Counter

from ssast.benchmarks.study.continued import (
    finetuning_runs,
    pretraining_runs,
    scores,
    write_first,
)
from ssast.benchmarks.study.tables import PLUS_MINUS
from ssast.engine.config import load_config
from ssast.engine.formats.open import load_pretrained
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.demo.corpora import SOUND_PACKAGES
from ssast.pipelines.demo.prompts import PROMPT_PACKAGES, prompt_label


def test_the_recordings_are_unheard_and_labelled_by_voice_and_prompt():
    assert not set(PROMPT_PACKAGES) & set(SOUND_PACKAGES)
    name = "asterisk-core-sounds-fr-wav/usr/share/asterisk/sounds/fr_CA_f_June/digits/7.wav"
    found = prompt_label(name)
    assert found is not None and (found.label, found.group) == ("fr_CA_f_June", "digits/7")
    assert prompt_label("klettres-data/usr/share/klettres/fr/alpha/a-0.ogg") is None


def test_a_few_labelled_clips_of_each_class(tmp_path):
    clips = [tmp_path / f"{number}.wav" for number in range(9)]
    labels = [(name,) for name in "abbabbbbb"]
    write_manifest(tmp_path / "all.json", clips, labels)
    few = read_manifest(write_first(tmp_path / "all.json", 2, tmp_path / "few.json"))
    assert Counter(few.labels) == {("a",): 2, ("b",): 2}


def test_the_runs_have_one_budget_and_the_table_what_came_out(tmp_path):
    before = pretraining_runs(tmp_path, tmp_path / "train.json", 7, ())
    clips = (tmp_path / "few.json", tmp_path / "test.json")
    after = finetuning_runs(before, tmp_path, clips, 2, 2, ())
    for run in (*before.values(), *(run for runs in after.values() for run in runs)):
        load_config(run.recipe, run.overrides)
    steps = {load_config(run.recipe, run.overrides).train.steps for run in before.values()}
    assert steps == {7}
    padding = [load_config(run.recipe, run.overrides).audio for run in before.values()]
    released = load_pretrained("tiny_patch")[1].audio
    assert padding[1].ignore_padding == released.ignore_padding
    assert [run.checkpoint for run in before.values()] == ["tiny_patch", None]
    assert "--checkpoint tiny_patch" in before["continued"].command
    for name, losses in {"continued": (3.5, 3.25), "fresh": (7.0, 4.5)}.items():
        before[name].folder.mkdir()
        rows = [
            {"step": step, "valid/loss": loss, "valid/pretext_accuracy": 0.25}
            for step, loss in zip((0, 7), losses, strict=True)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (before[name].folder / "metrics.jsonl").write_text(text)
    for run, score in zip(after["continued"], (0.5, 0.6), strict=True):
        (run.folder / "test").mkdir(parents=True)
        (run.folder / "test" / "metrics.json").write_text(json.dumps({"accuracy": score}))
    shown = scores(before, after)
    assert "| released | 3.500 | 25.0 |  |" in shown
    assert f"| continued | 3.250 | 25.0 | 55.0{PLUS_MINUS}7.1 |" in shown
    assert "| fresh | 4.500 | 25.0 |  |" in shown
