import errno
import gc
import json
import os
import subprocess
import sys
from typing import get_args

import pytest
import torch
from runs import call, command, environment

from ssast.engine.cli.imports import imports
from ssast.engine.cli.main import main
from ssast.kernels.attention import Backend
from ssast.pipelines.cores import CHOSEN_BY

HEAVY = ("torch", "triton", "deepspeed", "matplotlib", "scipy", "sklearn")


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "ssast pretrain base_patch data.train=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "base_pach"], "no configuration 'base_pach'; did you mean base_patch?"),
        (["pretrain", "demo", "train.stepz=3"], "unknown key train.stepz"),
        (["pretrain", "base_patch"], "data.train is not set"),
        (["probe", "/nowhere", "--tasks", "/nowhere"], "/nowhere: no <task>_train.json"),
        (["visualize", "/nowhere"], "/nowhere: expected a run, a checkpoint or a model"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("ssast: error: ") and shown.err.count("\n") == 1
    assert message in shown.err


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (OSError(errno.EMFILE, "Too many open files", "a"), 75, "Too many open files: 'a'"),
        (OSError(errno.ENOSPC, "No space left", "a"), 2, "No space left: 'a'"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "Broken pipe"),
        (MemoryError(), 75, "this machine is out of memory (MemoryError)"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), 75, "out of memory ("),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), 2, "memory.: lower train.batch_size"),
    ],
    ids=str,
)
def test_what_the_machine_lacks_is_one_line(error, status, text, capsys, monkeypatch):
    def fail(options):
        raise error

    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr("ssast.engine.cli.main._pretrain", fail)
    monkeypatch.setattr(os, "_exit", end)  # without memory an orderly exit may hang
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["pretrain", "demo"]))
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert text in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [["weights"], ["--help"]])
def test_a_closed_pipe_ends_a_command_quietly(arguments, buffered):
    """As ``| head`` does; Python's own end would print a traceback and have status 120."""
    reader, writer = os.pipe()
    os.close(reader)
    unbuffered = {} if buffered else {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        command(*arguments),
        stdout=writer,
        stderr=subprocess.PIPE,
        env={k: v for k, v in environment().items() if k != "PYTHONUNBUFFERED"} | unbuffered,
        text=True,
        check=False,
    )
    os.close(writer)
    # argparse ignores that nobody reads its help, but in the first versions of Python 3.11
    expected = {0, 141} if arguments == ["--help"] and not buffered else {141}
    assert not done.stderr and done.returncode in expected


def test_a_full_disk_at_the_end_of_a_command_is_one_line():
    env = {k: v for k, v in environment().items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("weights"), stdout=full, stderr=subprocess.PIPE, env=env, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "ssast: error: [Errno 28] No space left on device\n"


def test_other_errors_of_a_program_keep_their_traceback(monkeypatch):
    def fail(options):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("ssast.engine.cli.main._pretrain", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["pretrain", "demo"])


def test_settings_may_stand_behind_an_option(capsys):
    for arguments in (
        ["pretrain", "base_patch", "--resume", "train.stepz=3"],
        ["pretrain", "--resume", "base_patch", "train.steps=3", "train.stepz=3"],
        ["pretrain", "base_patch", "train.steps=3", "--resume", "train.stepz=3"],
    ):
        assert main(arguments) == 2
        assert "unknown key train.stepz" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["pretrain", "demo", "--again"], ["env", "a=b"], ["visualize", "a", "b"], []]
)
def test_unknown_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: ssast" in capsys.readouterr().err


def test_the_deepspeed_launcher_s_argument_is_accepted(capsys):
    assert main(["--local_rank=0", "pretrain", "base_patch"]) == 2
    assert "data.train" in capsys.readouterr().err


@pytest.mark.slow
def test_env_runs_from_any_folder(tmp_path, monkeypatch):
    for name in CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    done = call("env", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["cores"] >= 1 and facts["cores_by"]
    assert facts["waiting"].startswith("GOMP_SPINCOUNT=2000 ")
    if "GOMP" in done.stderr:  # what torch's OpenMP says of itself
        assert "GOMP_SPINCOUNT = '2000'" in done.stderr
    assert facts["packages"]["ssast-engine"]
    assert facts["attention"] in get_args(Backend)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["data", "--help"], 0),
        (["nonsense"], 2),
        (["data", "manifests", "nonsense", "/x", "--out", "y"], 2),
        (["data", "prepare", "/nonsense", "y"], 2),
    ],
    ids=str,
)
def test_what_needs_no_tensors_answers_at_once(tmp_path, arguments, status):
    """No package is imported that takes seconds."""
    program = """if True:
        import sys
        from ssast.engine.cli.main import main

        try:
            status = main(sys.argv[2:])
        except SystemExit as error:
            status = error.code
        print(sorted(set(sys.argv[1].split(",")).intersection(sys.modules)), file=sys.stderr)
        sys.exit(status)
    """
    done = subprocess.run(
        [sys.executable, "-c", program, ",".join(HEAVY), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_prediction_on_a_cpu_imports_no_kernels():
    code = "import sys, ssast.engine.evaluation.predict, ssast.engine.formats.open; "
    code += "print(sorted({'triton', 'transformers', 'sklearn', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_imports_are_made_without_the_garbage_collector():
    for was_on in (True, False):
        (gc.enable if was_on else gc.disable)()
        try:
            with pytest.raises(ImportError), imports():
                assert not gc.isenabled()
                raise ImportError
            assert gc.isenabled() == was_on
        finally:
            gc.enable()


def test_only_what_a_process_begins_with_is_out_of_the_collectors_sight():
    frozen = gc.get_freeze_count()
    with imports():
        pass
    assert gc.get_freeze_count() == frozen  # PyTorch is there already
    code = """
import gc, sys, types
if sys.argv[1] == "before":
    sys.modules["torch"] = types.ModuleType("torch")
from ssast.engine.cli.imports import imports
with imports():
    pass
print(gc.get_freeze_count() > 1000, gc.isenabled())
"""
    for when, found in (("before", "False True"), ("within", "True True")):
        command = [sys.executable, "-c", code, when]
        assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == found
