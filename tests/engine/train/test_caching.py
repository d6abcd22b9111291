"""One cache of filterbanks for all ranks of a machine, and what is said about it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_jobs import read_epochs, refusals
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankPool
from runs import lines, make_data, overrides, write_config

from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.pretrain import pretrain
from ssast.engine.train import caching
from ssast.engine.train.caching import expected_hits
from ssast.pipelines.clips.order import clips_at, rank_positions

CACHED = {"data__cache_gib": 1.0, "data__read_ahead": 1}


def simulated_hits(
    machines: list[int], num_clips: int, room: int, epochs: int, seed: int
) -> list[float]:
    """Hits of each epoch, for the machine of each rank: the ranks take a step together."""
    world_size, hits = len(machines), np.zeros(epochs)
    cached: list[set[int]] = [set() for _ in range(max(machines) + 1)]
    for iteration in range(epochs * num_clips // world_size):
        for rank, machine in enumerate(machines):
            positions = rank_positions(0, iteration, 1, rank, world_size)
            (clip,), (epoch,) = clips_at(positions, num_clips, seed)
            hits[epoch] += clip in cached[machine]
            if clip < room:
                cached[machine].add(int(clip))
    return (hits / num_clips).tolist()


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    kept=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_hits_are_as_expected(ranks: list[int], kept: float, seed: int) -> None:
    """On any machines; on one of them every clip is cached from the second epoch on."""
    machines = [m for m, count in enumerate(ranks) for _ in range(count)]
    num_clips = 48 * len(machines)
    found = simulated_hits(machines, num_clips, round(kept * num_clips), 4, seed)
    shares = np.array(ranks) / len(machines)
    for epochs in range(1, 5):
        expected = expected_hits(kept, shares, epochs)
        assert np.mean(found[:epochs]) == pytest.approx(expected, abs=0.08)
    assert expected_hits(kept, shares, 2.5) < expected_hits(kept, shares, 3)
    if len(ranks) == 1 and kept == 1.0:
        assert found == [0, 1, 1, 1]


@pytest.mark.parametrize("machine", ["one", "machine {}"])
def test_ranks_of_a_machine_read_each_clip_once(
    machine: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    data = make_data(tmp_path, num_train=32)
    common = (write_config(tmp_path), [*overrides(), *data, f"run.folder={tmp_path}"])
    cached = (common[0], [*overrides(**CACHED), *common[1][-3:]])
    without = two_ranks.run(read_epochs, *common, machine, 3)
    results = two_ranks.run(read_epochs, *cached, machine, 3)
    for ours, plain in zip(results, without, strict=True):
        assert torch.equal(ours["fbank"], plain["fbank"])
        assert plain["note"] is None and sum(plain["reads"]) >= 48
    first, _, third = np.sum([result["reads"] for result in results], axis=0)
    # The first epoch ends while the clips that begin the second one are read ahead.
    assert 32 <= first <= 56
    if machine == "one":
        assert third == 0
    else:  # a quarter, of two caches that hold half after the first epoch and 3/4 after the second
        assert 2 <= third <= 16
    assert ("on each of 2 machines" in results[0]["note"]) == (machine != "one")


def test_all_ranks_refuse_a_cache_that_one_cannot_have(two_ranks: RankPool, tmp_path: Path) -> None:
    given = (write_config(tmp_path), overrides(**CACHED), 1000)
    results = two_ranks.run(refusals, *given)
    assert results[0] == results[1]
    memory, sharing = results[0]
    assert memory == (
        "data.cache_gib 1: the cache of 1000 training clips takes 0.00573 GiB on each machine, but "
        "rank 0 finds 1e-06 GiB of free memory on its machine"
    )
    assert sharing.startswith("data.cache_gib: rank 1 cannot share the memory of rank 0 on its ")


def test_a_cached_run_is_the_run_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it says what to expect of the cache; one that does not fit ends before any work."""
    data, found = make_data(tmp_path), []
    for name, changed in (("plain", {}), ("cached", CACHED)):
        arguments = [*overrides(**changed, train__steps=6), *data, f"run.folder={tmp_path / name}"]
        assert pretrain(load_config(write_config(tmp_path), arguments)) == 0
        said = capsys.readouterr().out
        found.append([lines(tmp_path / name, split) for split in ("train", "valid")])
        assert ("of the training clips are cached" in said) == bool(changed)
    assert found[0] == found[1]
    assert (
        "filterbanks of 100% of the training clips are cached, 5.73e-05 of 1 GiB in memory; "
        "expected hits: 58% over 2.4 epochs, 100% in the second\n"
    ) in said
    monkeypatch.setattr(caching, "available_gib", lambda: 1e-6)
    arguments[-1] = f"run.folder={tmp_path / 'other'}"
    with pytest.raises(
        ConfigError, match=r"data.cache_gib 1: the cache of 10 training clips takes"
    ):
        pretrain(load_config(write_config(tmp_path), arguments))
    assert not (tmp_path / "other").exists()


def test_few_hits_are_warned_of(world, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A short run; a part of the set; many machines. With weights there is no expectation."""
    monkeypatch.setattr(caching, "machines_of", lambda world: ["a", "b"])
    world = replace(world, world_size=2)
    for changed, warned in (
        ({"train__steps": 24}, True),
        ({"train__steps": 2500}, False),
        ({"train__steps": 2500, "data__cache_gib": 0.0001}, True),
        ({"train__steps": 24, "data__sample_weights": "weights.txt"}, False),
    ):
        config = load_config("tiny_patch", overrides(**CACHED | changed))
        text = caching.describe_cache(config, world, 100, 0)
        assert text is not None and text.startswith("warning: ") == warned
        assert ("expected hits" in text) == ("data__sample_weights" not in changed)


def test_the_partners_of_mixup_are_said_to_be_read(world, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """The cache serves the training clips alone, however often it is asked."""
    monkeypatch.setattr(caching, "machines_of", lambda world: ["a"])
    said = "; mixup's partners, one for each clip, are read anew each time"
    for steps in ("train.steps=24", "train.steps=1", "finetune.balanced_sampling=true"):
        for mixup in (0.0, 0.5):
            changed = [steps, f"finetune.mixup={mixup}", "data.cache_gib=1"]
            text = caching.describe_cache(load_config("classifier", changed), world, 100, 0)
            assert text is not None and text.endswith(said) == (mixup > 0)
