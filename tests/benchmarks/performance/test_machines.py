"""Machines side by side: how they are named, their records, the README's table, prediction."""

import json

import pytest
from paths import ROOT

from ssast.benchmarks.loading.data import write_clips
from ssast.benchmarks.performance import plain_loop, prediction
from ssast.benchmarks.performance.comparison import (
    MARKS,
    machines,
    marked,
    predictions,
    readme_block,
    side_by_side,
)
from ssast.benchmarks.performance.machine import processor
from ssast.benchmarks.performance.others import OtherWork
from ssast.benchmarks.performance.records import Record, file_stem, publish, read_records
from ssast.benchmarks.performance.store import ResultStore, Scope
from ssast.engine.cli.main import main
from ssast.engine.errors import ConfigError

CPUINFO = """processor\t: 0
vendor_id\t: {vendor}
cpu family\t: {family}
model\t\t: {model}
model name\t: {name}
flags\t\t: fpu {flags}

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "flags", "found"),
    [
        ("AuthenticAMD", 25, 17, "AMD EPYC", "avx2 avx512f avx512_bf16",
         ("AMD EPYC", "Zen 4", ["avx2", "avx512f", "avx512_bf16"])),
        ("AuthenticAMD", 26, 2, "AMD EPYC", "avx2", ("AMD EPYC", "Zen 5", ["avx2"])),
        ("AuthenticAMD", 25, 33, "AMD Ryzen 9 5900X 12-Core Processor", "avx2",
         ("AMD Ryzen 9 5900X", "Zen 3", ["avx2"])),
        ("AuthenticAMD", 99, 0, "AMD New", "", ("AMD New", None, [])),
        ("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "amx_bf16",
         ("Intel Xeon Platinum 8481C CPU", None, ["amx_bf16"])),
    ],
)  # fmt: skip
def test_a_processor_is_named(vendor, family, model, name, flags, found):
    text = CPUINFO.format(vendor=vendor, family=family, model=model, name=name, flags=flags)
    keys = ("cpu", "microarchitecture", "instructions")
    assert processor(text) == dict(zip(keys, found, strict=True))


def machine(name: str, date: str, commit: str = "abc") -> dict:
    facts = {"cpu": "x", "microarchitecture": None, "instructions": [], "cores": 2, "load": 0.0}
    return {"name": name, "torch": "2.0", "commit": commit, "date": date, **facts}


def loaded(seconds: float) -> dict:
    return {"clips": 11, "start_cpu_s": 2.0, "start_wall_s": 1.0, "cpu_s": 2.0 + 20 * seconds,
            "wall_s": 1.0 + 10 * seconds}  # fmt: skip


@pytest.fixture
def idle(monkeypatch):
    """Whatever else runs on the machine of the tests is no disturbance."""
    monkeypatch.setattr(OtherWork, "share", 0.0)


def test_machines_have_a_column_each_and_the_last_one_comes_last(tmp_path, idle):
    for name, date, ours in (
        ("B, 2 cores", "2026-02-01", 0.5),
        ("A (R) 9, 4 cores", "2026-03-01", 0.25),
    ):
        store = ResultStore(tmp_path / name)
        results = {
            "tiny: ssast predict": loaded(ours),
            "tiny: predict by a loop, batch 1": loaded(1.0),
            "tiny: ssast predict, bf16": loaded(0.2),
        }
        cases = {key: lambda value=value: value for key, value in results.items()}
        store.measure("predict", cases, Scope(), machine(name, date))
        publish(store, tmp_path / "docs")
    records = read_records(tmp_path / "docs")
    assert [record.path.name for record in records] == ["b-2-cores.json", "a-r-9-4-cores.json"]
    lines = side_by_side(records)
    assert lines[0] == "|  | B, 2 cores | A (R) 9, 4 cores |"
    # (1 + 10) / (1 + 5) with start-up, 10 / 5 without
    assert "| tiny: ssast predict, against batch 1 | 1.83 (2.00) | 3.14 (4.00) |" in lines
    assert "| B, 2 cores |  | 2.0 | abc | 2026-02-01 | 0.00 |" in machines(records)
    assert "| tiny: ssast predict, bf16, against batch 1 | 3.67 (5.00) | 3.67 (5.00) |" in lines
    row, _ = (line for line in predictions(records[0]) if "ssast" in line)
    assert row == "| tiny: ssast predict | 11 | 2.00 | 1.00 | 1.83 | 2.00 | 1.00 |"
    assert len(readme_block(records).splitlines()) == 4  # no step was measured


def test_records_of_several_machines_are_not_mixed(tmp_path, idle):
    store = ResultStore(tmp_path)
    for name in "ab":
        store.measure("loader", {name: lambda: 1}, Scope(), machine(name, "2026-01-01"))
    with pytest.raises(ConfigError, match="was measured on a and on b: measure each machine with"):
        publish(store, tmp_path / "docs")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad.json is damaged, delete it: KeyError"):
        Record(tmp_path / "bad.json")


def test_the_readme_and_the_page_show_the_records():
    records = read_records(ROOT / "docs" / "performance")
    assert [record.path.stem for record in records] == [
        file_stem(r.machine["name"]) for r in records
    ]
    how = "run ssast bench performance --page"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert marked(readme)[1] == readme_block(records), f"README.md: {how}"
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for lines in (machines(records), side_by_side(records)):
        assert "\n".join(lines) in page, f"docs/performance.md: {how}"
    assert f"## In detail: {records[-1].machine['name']}" in page
    with pytest.raises(ConfigError, match="once each, in this order"):
        marked("".join(reversed(MARKS)))


def test_prediction_is_compared_with_what_computes_the_same(tmp_path, capsys):
    model, clips = tmp_path / "model", tmp_path / "clips"
    clips.mkdir()
    prediction.save_model(model, "tiny")
    (path,) = write_clips(clips, 1, seconds=0.5)
    capsys.readouterr()
    plain_loop.main(str(model), str(clips), "1")
    theirs = capsys.readouterr().out
    assert main(["predict", str(model), str(path), "--json"]) == 0
    for name, probability in json.loads(capsys.readouterr().out)["classes"]:
        assert f"('{name}', {probability:.3f}"[:-1] in theirs
    assert theirs.startswith(f"{path} (")


def test_a_process_is_timed_and_may_not_fail(monkeypatch: pytest.MonkeyPatch):
    cpu_s, wall_s = prediction._timed(
        Scope(threads=1), ["timeit", "-n1", "-r1", "sum(range(9**7))"]
    )
    assert cpu_s > 0.02 and wall_s > 0.02
    with pytest.raises(ConfigError, match=r"ended with 1: .*no_such_module"):
        prediction._timed(Scope(), ["no_such_module"])
    keys = list(prediction.prediction_cases(Scope(("tiny", "base"))))
    assert keys[:2] == ["tiny: ssast predict", "tiny: predict by a loop, batch 1"]
    assert "base: embed by a loop, batch 8" in keys
    for native in (True, False):
        monkeypatch.setattr(prediction, "multiplies_bf16", lambda native=native: native)
        cases = prediction.prediction_cases(Scope(("tiny",)))
        assert len(cases) == (8 if native else 6)
    monkeypatch.setattr(prediction, "multiplies_bf16", lambda: True)
    case = prediction.prediction_cases(Scope(("tiny",)))["tiny: ssast embed, bf16"]
    ran = []
    monkeypatch.setattr(prediction, "_timed", lambda scope, given: ran.append(given) or (1.0, 1.0))
    monkeypatch.setattr(prediction, "save_model", lambda *given: None)
    monkeypatch.setattr(prediction, "write_clips", lambda *given: None)
    assert case()["clips"] == 32
    assert all(given[-2:] == ["--precision", "bf16"] for given in ran) and len(ran) == 3
