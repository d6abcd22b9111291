"""The benchmark of waiting runs steps in processes that wait in their own way, and reports."""

import shutil
import sys

import pytest

from ssast.benchmarks.training.waiting import PASSIVE, Load, Row, format_rows, measure
from ssast.engine.errors import ConfigError


def test_a_step_beside_a_busy_program() -> None:
    load = Load(clips=1, frames=32, threads=1)
    rows = [*measure([PASSIVE], load, [0, 1], rounds=2, steps=1)]
    assert [(row.way, row.competitors) for row in rows] == [(PASSIVE, 0), (PASSIVE, 1)]
    assert all(row.cpu_s > 0 and row.wall_s > 0 for row in rows)


def test_a_process_that_ends_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ConfigError, match="the process of 100 ended with 1"):
        next(measure(["100"], Load(), [0], rounds=1, steps=1))


def test_the_table_has_the_ratio_to_the_better_one() -> None:
    times = {"default": (0.5, 2.0), "passive": (1.0, 1.0), "2000": (0.6, 1.1)}
    rows = [Row(way, n, s, 2 * s) for way, found in times.items() for n, s in enumerate(found)]
    lines = format_rows(rows).splitlines()
    assert lines[1].split() == ["beside", "0", "beside", "1"]
    assert lines[-1].split() == ["2000", "0.600", "1.20", "1.200", "1.100", "1.10", "2.200"]
