"""``make gpu``: its parts, what becomes of one that fails, and the page."""

import json
import sys

import pytest
from paths import ROOT

from ssast.benchmarks.gpu import session
from ssast.benchmarks.gpu.page import write_page
from ssast.benchmarks.gpu.parts import BATCHES, Part, parts
from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError


def python(name, code, limit_s=30.0, folder=None):
    return Part(name, f"What is {name}?", (sys.executable, "-c", code), limit_s, folder)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a session of given parts; returns its status, results and page."""

    def run(*given, arguments=()):
        monkeypatch.setattr(session, "parts", lambda *_: list(given))
        out = tmp_path / "out"
        status = session.main(["--device", "cpu", "--data", "x", "--out", str(out), *arguments])
        results = json.loads((out / session.RESULTS).read_text())
        return status, results, (out / "gpu.md").read_text()

    return run


def test_a_part_that_fails_is_reported_and_the_next_one_is_run(run, tmp_path):
    picture = tmp_path / "run" / "curves.png"
    picture.parent.mkdir()
    picture.write_bytes(b"png")
    code = r"print('50 clips/s\r100 clips/s\n\x1b[31mred\x1b[0m')"
    bad = python("bad", "print('oh'); raise SystemExit(3)")
    status, results, page = run(bad, python("good", code, folder=picture.parent))
    assert status == 1
    assert (results["bad"]["status"], results["good"]["status"]) == (3, 0)
    assert "| [bad](#bad) | failed: 3 |" in page and "    oh\n" in page
    assert "    100 clips/s\n    red\n" in page
    assert "![good](gpu/good-curves.png)" in page
    assert (tmp_path / "out" / "gpu" / "good-curves.png").is_file()


def test_what_is_done_is_kept_and_what_failed_is_tried_again(run, tmp_path):
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x')"
    failing = python("bad", "raise SystemExit(1)")
    assert run(python("good", code), failing)[0] == 1
    assert run(python("good", code), python("bad", "pass"))[0] == 0
    assert count.read_text() == "x"


def test_a_part_that_hangs_is_stopped_with_its_children(run, tmp_path):
    child = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', {!r}])"
    mark = tmp_path / "mark"
    slow = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    status, results, _ = run(python("slow", child.format(slow), limit_s=1.0))
    assert status == 1 and results["slow"]["status"] == "stopped after 1 s"
    assert not mark.exists()


def test_a_session_ends_in_time(run):
    status, results, page = run(python("late", "pass"), arguments=["--budget-s", "0"])
    assert status == 1 and "the time is over" in results["late"]["status"]
    assert "failed: left out, the time is over" in page


def test_parts_are_named(run):
    with pytest.raises(ConfigError, match=r"--only nothing: expected some of \['good'\]"):
        run(python("good", "pass"), arguments=["--only", "nothing"])


def test_no_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "gpu"]) == 2
    assert "make gpu DEVICE=cpu is a dry run" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "num_gpus"), [("cuda", 1), ("cuda", 8), ("cpu", 0)])
def test_each_run_has_a_valid_configuration(device, num_gpus, tmp_path):
    """So that none of the rented minutes is lost to a misspelt setting."""
    found = parts(device, num_gpus, tmp_path, tmp_path / "clips")
    assert len({part.name for part in found}) == len(found)
    assert sum(part.limit_s for part in found if "scaling" not in part.name) < 2 * session.BUDGET_S
    runs = [part for part in found if part.folder is not None]
    for part in runs:
        arguments = part.command[part.command.index("pretrain") + 1 :]
        config = load_config(arguments[0], arguments[1:])
        assert config.run.folder == str(part.folder)
    scaling = [part.name for part in runs if part.name.startswith("scaling")]
    assert len(scaling) == (4 if num_gpus == 8 else 0)
    assert BATCHES["base"] >= 64  # 32k tokens of 514


def test_an_empty_session_has_a_page(tmp_path):
    assert write_page(tmp_path, tmp_path, [], {}).read_text().startswith("# On a GPU")


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path, monkeypatch):
    """The command that rented machines run, with the same parts, small."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "gpu"
    status = session.main(["--device", "cpu", "--out", str(out)])
    results = json.loads((out / session.RESULTS).read_text())
    assert status == 0, results
    page = (out / "gpu.md").read_text()
    assert "failed" not in page.partition("##")[0] and "![run-demo]" in page
