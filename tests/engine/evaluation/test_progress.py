"""The progress bar of commands that read many files."""

import io
import sys
import time

import pytest

from ssast.engine.cli.main import main
from ssast.engine.evaluation import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    monkeypatch.setattr(progress, "DELAY_S", 0)
    return lambda made: monkeypatch.setattr(sys, "stderr", made) or made


@pytest.mark.parametrize("command", ["predict", "windows", "embed", "evaluate"])
def test_a_bar_is_shown_on_a_terminal_alone(command, finetuned, splits, tmp_path, stderr, capsys):
    """It has the number of clips, is removed at the end, and not shown if --quiet."""
    run, test = str(finetuned[0]), str(splits["test"])
    arguments = {
        "predict": ["predict", run, test],
        "windows": ["predict", run, test, "--window-s", "0.3", "--json"],
        "embed": ["embed", run, test, "--out", str(tmp_path / "0.npy")],
        "evaluate": ["evaluate", run, test],
    }[command]
    shown = []
    for number, (made, quiet) in enumerate(
        [(Terminal(), []), (Terminal(), ["--quiet"]), (io.StringIO(), [])]
    ):
        stderr(made)
        given = [a.replace("0.npy", f"{number}.npy") for a in arguments]
        assert main([*given, *quiet]) == 0
        shown.append(made.getvalue())
    assert "/9 [" in shown[0] and "clips" in shown[0]
    assert shown[0].rpartition("\n")[2].split("\r")[-2].isspace()  # its line is empty again
    assert shown[1:] == ["", ""]
    assert "/9 [" not in capsys.readouterr().out


def test_the_last_batch_may_be_filled_up_and_fast_work_shows_nothing(stderr, monkeypatch):
    made = stderr(Terminal())
    for _ in progress.with_progress(["abcd", "efgh", ""], 6, "read", True):
        time.sleep(0.15)  # longer than tqdm waits until it draws again
    assert "4/6" in made.getvalue() and "6/6" in made.getvalue()
    monkeypatch.setattr(progress, "DELAY_S", 60)
    made = stderr(Terminal())
    list(progress.with_progress(["abcd"], 4, "read", True))
    assert made.getvalue().strip() == ""
