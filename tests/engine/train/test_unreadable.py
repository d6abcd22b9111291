"""Clips that cannot be read: one never ends a run, too many end it on all ranks together."""

import subprocess
import sys
from pathlib import Path

import pytest
from finetune_runs import load, make_sounds, manifest, plain_file
from runs import environment, lines, make_data, overrides, two_ranks, write_config

from ssast.engine.config import load_config
from ssast.engine.data.sampling import Partners
from ssast.engine.finetune import finetune
from ssast.engine.pretrain import pretrain
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.order import clips_at, rank_positions
from ssast.pipelines.errors import DataError

SETTINGS = {"train__batch_size": 2, "train__steps": 6, "train__save_every": 6}


def damage(folder: Path, rows: list[int]) -> list[str]:
    """Damage the clips of some rows of a folder's manifest; their paths."""
    paths = [str(path) for path in read_manifest(folder).paths]
    for row in rows:
        Path(paths[row]).write_bytes(b"no sound")
    return [paths[row] for row in rows]


def first_of(rank: int) -> int:
    """Row of the first training clip of a rank of two, of 10 clips with a micro-batch of 1."""
    return int(clips_at(rank_positions(0, 0, 1, rank, 2), 10, seed=0)[0][0])


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_bad_first_clip_does_not_end_a_run(split: str, tmp_path: Path) -> None:
    """Micro-batches of one clip: all of the first batch is bad."""
    data = make_data(tmp_path)
    row = int(clips_at(rank_positions(0, 0, 1, 0, 1), 10, seed=0)[0][0])
    (bad,) = damage(tmp_path / split, [row if split == "train" else 0])
    settings = overrides(**SETTINGS | {"train__accumulation_steps": 2})
    run = tmp_path / "run"
    config = load_config(write_config(tmp_path), [*settings, *data, f"run.folder={run}"])
    assert pretrain(config) == 0
    assert bad in (run / "rejected.jsonl").read_text()


def test_a_bad_first_partner_of_mixup_does_not_end_a_run(
    splits: dict[str, Path], tmp_path: Path
) -> None:
    paths = make_sounds(tmp_path / "sounds", 3, 8)
    row = int(Partners(paths, 10, 0, None).rows(rank_positions(0, 0, 1, 0, 1))[0])
    paths[row].write_bytes(b"no sound")
    train = manifest(tmp_path / "train.json", paths)
    config = load(plain_file(tmp_path), {**splits, "train": train}, tmp_path / "run",
                  finetune__mixup=1.0, finetune__epochs=1, train__batch_size=2,
                  train__accumulation_steps=2, data__max_rejected=1.0)  # fmt: skip
    assert finetune(config) == 0


@pytest.mark.slow
def test_two_ranks_go_on_after_a_bad_first_clip_of_one(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    damage(tmp_path / "train", [first_of(rank=1)])
    damage(tmp_path / "valid", [1])
    settings, run = overrides(**SETTINGS), tmp_path / "run"
    common = ("pretrain", write_config(tmp_path), *settings, *data, f"run.folder={run}")
    assert [status for status, _ in two_ranks(*common)] == [0, 0]
    assert lines(run, "train")[-1]["step"] == 6
    assert len((run / "rejected.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "valid"])
def test_two_ranks_end_with_one_message(split: str, tmp_path: Path) -> None:
    data = make_data(tmp_path)
    bad = damage(tmp_path / split, list(range(7)) if split == "train" else [0, 2])
    settings = overrides(**SETTINGS, data__max_rejected=0.2)
    run = f"run.folder={tmp_path / 'run'}"
    ended = two_ranks("pretrain", write_config(tmp_path), *settings, *data, run)
    assert [status for status, _ in ended] == [2, 2]
    # Before it rank 0 may have said that a step without a valid clip was skipped.
    message, other = (said.splitlines()[-1] for _, said in ended)
    assert message == other
    shown = "2 of the first 3 " if split == "valid" else ""
    assert f"{split}: {shown}" in message and "clips cannot be used (allowed: 20%)" in message
    assert sum(path in message for path in bad) >= 2


def test_too_many_end_a_run_of_one(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    damage(tmp_path / "train", [2, 5, 7])
    settings = overrides(**SETTINGS, data__max_rejected=0.2)
    run = f"run.folder={tmp_path / 'run'}"
    with pytest.raises(DataError, match=r"train: 3 of the first \d+ clips .*\(allowed: 20%\)"):
        pretrain(load_config(write_config(tmp_path), [*settings, *data, run]))


PROGRAM = """
import errno, sys
import subprocess
import sys
from pathlib import Path
import ssast.pipelines.audio.encoded as encoded
from ssast.engine.cli.main import main

real, until = encoded._read, Path(sys.argv[1])
def read(path, *rest):
    if until.exists() and "train" in str(path):
        raise OSError(errno.ESTALE, "Stale file handle")
    return real(path, *rest)
encoded._read = read
sys.exit(main(sys.argv[2:]))
"""


def test_storage_that_keeps_failing_ends_a_run_to_be_resumed(tmp_path: Path) -> None:
    data, down = make_data(tmp_path), tmp_path / "down"
    settings = [*overrides(**SETTINGS, data__retry_s=0.5), *data, f"run.folder={tmp_path / 'run'}"]
    arguments = [str(down), "pretrain", str(write_config(tmp_path)), *settings, "--resume"]
    program = [sys.executable, "-c", PROGRAM, *arguments]
    down.touch()
    done = subprocess.run(program, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 75
    assert "Stale file handle: storage has failed for 0.5" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run" / "rejected.jsonl").exists()
    down.unlink()
    done = subprocess.run(program, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
