"""Small copies of the data sets."""

from pathlib import Path

import pytest
from dataset_trees import TREES


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {name: tmp_path_factory.mktemp(name) for name in TREES}
    for name, make in TREES.items():
        make(roots[name])
    return roots
