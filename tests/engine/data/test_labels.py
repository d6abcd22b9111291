"""Labelled clips and the weights of their classes."""

import numpy as np
import pytest

from ssast.engine.data.labels import LabelledClips, class_weights


def test_balanced_class_weights():
    labels = manifest_of(["a", "b", "b", "b"])
    assert class_weights("balanced", labels).tolist() == pytest.approx([2.0, 2 / 3])
    assert class_weights("none", labels) is None


def manifest_of(names):
    classes = tuple(sorted(set(names)))
    numbers = np.array([classes.index(name) for name in names])
    paths = [f"{i}.wav" for i in range(len(names))]
    return LabelledClips(paths, classes, numbers, np.arange(len(names) + 1), "here")
