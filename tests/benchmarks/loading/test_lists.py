"""The benchmark of a start: every form of a list, first and later, and the leakage check."""

import re
from pathlib import Path

import pytest

from ssast.benchmarks.loading import lists


def test_a_start_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--kinds", "csv", "--clips", "300", "--ranks", "1", "--files", "5"]
    lists.main([*arguments, "--folder", str(tmp_path)])
    head, _, first, later, *checks = capsys.readouterr().out.splitlines()
    for line, what in ((first, "first"), (later, "later")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:4] == ["csv", "300", "1", what] and len(cells) == head.count("|") - 1
        assert all(float(cell) >= 0 for cell in cells[4:10])
    pattern = r"2 x 5 files, (\w+) start: .* (\d+) read, 0.0 MB of 3 MB"
    found = [re.findall(pattern, line) for line in checks]
    assert found == [[("first", "10")], [("later", "0")]]


@pytest.mark.parametrize("kind", lists.KINDS)
def test_lists_can_be_opened(tmp_path: Path, kind: str) -> None:
    from ssast.pipelines.clips.holdout import split_clips
    from ssast.pipelines.clips.manifest import read_clips

    clips = read_clips(lists.write_list(tmp_path, kind, 500))
    train, held = split_clips(clips, lists.VALID_SHARE)
    assert len(clips) == len(train) + len(held) == 500 and 0 < len(held) < 20
