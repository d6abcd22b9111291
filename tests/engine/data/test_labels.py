"""Labelled clips and the weights of their classes."""

import dataclasses

import numpy as np
import pytest

from ssast.engine.data.labels import (
    LabelledClips,
    class_weights,
    read_labelled,
    warn_of_empty_classes,
)
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.errors import DataError


def test_balanced_class_weights():
    labels = manifest_of(["a", "b", "b", "b"])
    assert class_weights("balanced", labels).tolist() == pytest.approx([2.0, 2 / 3])
    assert class_weights("none", labels) is None


def test_a_class_without_clips_is_named_and_has_no_weight(caplog):
    train = dataclasses.replace(manifest_of(["a", "b", "b", "b"]), classes=("a", "b", "none"))
    warn_of_empty_classes(train)
    assert "here: 1 of 3 classes have no training clip (none): " in caplog.text
    assert class_weights("balanced", train).tolist() == pytest.approx([2.0, 2 / 3, 1.0])
    caplog.clear()
    warn_of_empty_classes(manifest_of(["a", "b"]))
    assert not caplog.records


def test_clips_without_a_label(tmp_path):
    write_manifest(tmp_path / "m.json", ["a.wav", "b.wav"], [["dog"], []])
    clips = read_labelled(str(tmp_path / "m.json"), ["cat", "dog"], one_label=False)
    assert clips.labels() == [[1], []]
    with pytest.raises(DataError, match=r"b\.wav has no label, .*finetune.loss=bce"):
        read_labelled(str(tmp_path / "m.json"), ["cat", "dog"], one_label=True)
    write_manifest(tmp_path / "m.json", ["a.wav"], [[]])
    assert len(read_labelled(str(tmp_path / "m.json"), ["dog"], one_label=False).indices) == 0


def manifest_of(names):
    classes = tuple(sorted(set(names)))
    numbers = np.array([classes.index(name) for name in names])
    paths = [f"{i}.wav" for i in range(len(names))]
    return LabelledClips(paths, classes, numbers, np.arange(len(names) + 1), "here")
