"""The fuzzer notices every kind of failure; a few hundred inputs of every reader have none."""

import json
from collections.abc import Iterator
from pathlib import Path

import bad_readers
import pytest

from ssast.benchmarks import fuzz
from ssast.benchmarks.fuzz import Fuzz, main, replay, shares
from ssast.benchmarks.fuzzing.reading import FAILURES, Limits, make_input
from ssast.benchmarks.fuzzing.worker import Worker

READERS = {"bad": bad_readers.BAD, "long": bad_readers.LONG, "none": bad_readers.MISSING}
SHORT = Limits(seconds=0.5, memory_mib=64.0, address_mib=1024.0)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    readers = {**READERS, "unreadable": bad_readers.UNREADABLE}
    worker = Worker(readers, tmp_path_factory.mktemp("work"), 0, SHORT)
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("text", "outcome", "detail"),
    [
        ("fine", "accepted", ""),
        ("refused", "refused", "DataError: no such size"),
        ("crash", "crash", "SIGSEGV: Fatal Python error: Segmentation fault"),
        ("hang", "hang", "no answer in 3 s"),
        ("memory", "memory", "MiB more at the peak"),
        ("claim", "memory", "MemoryError"),
        ("foreign", "error", "KeyError: 'size'"),
        ("endless message", "error", "a message of 50011 characters"),
        ("fine", "accepted", ""),
    ],
)
def test_every_failure_is_noticed(
    worker: Worker, tmp_path: Path, text: str, outcome: str, detail: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    found = worker.run("bad", tmp_path)
    assert found.outcome == outcome and detail in found.detail


def test_a_seed_that_is_refused_is_an_error(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="a seed of unreadable, a\\.json, is not read"):
        worker.run("unreadable", 0)


def test_a_run_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failures are kept and can be read again; the same inputs come again from the same seed."""
    monkeypatch.setattr(fuzz, "READERS", READERS)
    few, all_of_it = tmp_path / "few", tmp_path / "all"
    for out, counts in ((few, (20, 60)), (all_of_it, (60,))):
        for count in counts:
            run = Fuzz(out, 0, SHORT, {"long": count, "none": count})
            run.run("long")
            run.run("none")
            assert run.rows["long"].inputs == count and run.rows["none"].inputs == 0
    rows = [
        json.loads((out / fuzz.RESULTS).read_text())["rows"]["long"] for out in (few, all_of_it)
    ]
    assert rows[0]["error"] == rows[1]["error"] > 0 and rows[0]["accepted"] > 10
    kept = sorted(path.name for path in (few / "failures").iterdir())
    assert kept == sorted(path.name for path in (all_of_it / "failures").iterdir())
    assert replay(few / "failures" / kept[0], SHORT).detail.startswith("RuntimeError: too long")
    number = int(kept[0].rpartition("-")[2])
    assert f"long {number}: error: RuntimeError: too long" in capsys.readouterr().out
    files = make_input("long", bad_readers.LONG, bad_readers.seeds(), 0, number)
    assert files["a.json"] == (few / "failures" / kept[0] / fuzz.FILES / "a.json").read_bytes()
    lines = fuzz.table(run.rows).splitlines()
    assert "its program is not installed" in lines[3] and lines[-1].startswith("| all | 60 |")


def test_the_inputs_are_divided() -> None:
    counts = shares(fuzz.INPUTS, list(fuzz.READERS))
    assert sum(counts.values()) == 23_000 and min(counts.values()) >= 300


def test_no_reader_fails_on_a_few_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All readers in one process; the full number is for the command."""
    worker = Worker(fuzz.READERS, tmp_path, 1, Limits())
    try:
        for name, count in shares(150, list(fuzz.READERS)).items():
            if not fuzz.READERS[name].seeds():  # without ffmpeg
                continue
            for number in range(count):
                found = worker.run(name, number)
                assert found.outcome not in FAILURES, f"{name} {number}: {found}"
    finally:
        worker.close()
    with pytest.raises(SystemExit):
        main(["--readers", "nothing"])
    assert "invalid choice" in capsys.readouterr().err
