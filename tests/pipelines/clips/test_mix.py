"""Several data sets as one: shares, ranks, resumption, what is held out and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import lines, overrides, write_config
from sounds import tone, write, write_clips

from ssast.engine.config import Config, dump_config, load_config
from ssast.engine.data.clips import find_clips
from ssast.engine.errors import ConfigError
from ssast.engine.pretrain import pretrain
from ssast.engine.settings import Data
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.clips.mix import MixedClips, fingerprint
from ssast.pipelines.clips.order import clips_at, rank_positions
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.pack import Packing, prepare_shards

SETS = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=5)


def mixed(sets: list[tuple[int, float]]) -> MixedClips:
    parts = [[f"{number}/{row}" for row in range(size)] for number, (size, _) in enumerate(sets)]
    return MixedClips(parts, [share for _, share in sets])


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A folder of 12 files, a manifest of 5 others, and shards of 24 clips of 8 recordings."""
    for name, count in (("files", 12), ("listed", 5)):
        (tmp_path / name).mkdir()
        write_clips(tmp_path / name, count)
    (tmp_path / "long").mkdir()
    for number in range(8):
        write(tmp_path / f"long/{number}.wav", tone(24000, seed=number), subtype="PCM_16")
    recipe = Recipe(clip_s=0.5)
    prepare_shards(
        tmp_path / "long",
        tmp_path / "shards",
        Packing(recipe),
        progress=False,
        log=lambda line: None,
    )
    write_manifest(tmp_path / "m.json", sorted((tmp_path / "listed").iterdir()))
    return {name: tmp_path / name for name in ("files", "m.json", "shards")}


@settings(max_examples=60, deadline=None)
@given(sets=SETS, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_holds_each_set_as_its_share_says(
    sets: list[tuple[int, float]], seed: int, epoch: int
) -> None:
    clips = mixed(sets)
    count = len(clips)
    positions = epoch * count + np.arange(count)
    ids, _ = clips_at(positions, count, seed, clips.weights())
    often = np.bincount([int(clips[i].split("/")[0]) for i in ids], minlength=len(sets))
    shares = np.array([share for _, share in sets])
    assert (np.abs(often - count * shares / shares.sum()) < 1 + 1e-6).all()
    each = np.bincount(ids, minlength=count)
    for number, (size, _) in enumerate(sets):  # and within a set all alike
        own = [
            times for clip, times in zip(clips, each, strict=True) if clip.startswith(f"{number}/")
        ]
        assert len(own) == size and max(own) - min(own) <= 1


@settings(max_examples=40, deadline=None)
@given(
    sets=SETS,
    seed=st.integers(0, 1000),
    worlds=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    start=st.integers(0, 500),
)
def test_ranks_part_the_stream_exactly_and_any_number_of_them_alike(
    sets: list[tuple[int, float]], seed: int, worlds: tuple[int, int], start: int
) -> None:
    """60 batches' worth of draws from any position on: each once, in one order."""
    clips = mixed(sets)
    weights = clips.weights()
    streams = []
    for world_size in worlds:
        found: dict[int, tuple[int, int]] = {}
        for rank in range(world_size):
            for iteration in range(60):
                positions = rank_positions(start, iteration, 60 // world_size, rank, world_size)
                ids, draws = clips_at(positions, len(clips), seed, weights)
                assert not found.keys() & set(positions.tolist())
                found |= dict(zip(positions.tolist(), zip(ids, draws, strict=True), strict=True))
        streams.append(found)
    common = range(start, start + min(map(len, streams)))
    assert set(common) <= streams[0].keys() & streams[1].keys()
    assert all(streams[0][position] == streams[1][position] for position in common)


@settings(max_examples=40, deadline=None)
@given(sets=SETS)
def test_a_mix_is_a_sequence(sets: list[tuple[int, float]]) -> None:
    clips = mixed(sets)
    every = [f"{number}/{row}" for number, (size, _) in enumerate(sets) for row in range(size)]
    assert [clips[row] for row in range(len(clips))] == list(clips) == every
    assert [clips[row - len(clips)] for row in range(len(clips))] == every
    assert clips[1:-1] == every[1:-1] and len(clips.weights()) == len(every)
    for beyond in (len(clips), -len(clips) - 1):
        with pytest.raises(IndexError):
            clips[beyond]


def test_each_set_holds_out_its_own(folders: dict[str, Path]) -> None:
    mix = {str(path): 1.0 + number for number, path in enumerate(folders.values())}
    train, valid = find_clips(Config(data=Data(mix=mix, valid_share=0.2)))
    assert isinstance(train, MixedClips) and isinstance(valid, MixedClips)
    for name, own, held in zip(mix, train.parts, valid.parts, strict=True):
        alone = find_clips(Config(data=Data(train=name, valid_share=0.2)))
        assert (list(own), list(held)) == tuple(map(list, alone))
    assert [len(part) for part in valid.parts] == [2, 1, 6]
    with pytest.raises(DataError, match="both hold"):
        find_clips(Config(data=Data(mix=mix | {str(folders["files"].parent / "listed"): 1.0})))


def test_held_out_clips_that_are_given_are_in_no_set(folders: dict[str, Path]) -> None:
    """Neither the same files nor clips of the same recordings."""
    train = {str(folders[name]): 1.0 for name in ("files", "shards")}
    found = find_clips(Config(data=Data(mix=train, valid=str(folders["m.json"]))))
    assert tuple(map(len, found)) == (12 + 24, 5)
    found = find_clips(Config(data=Data(train=str(folders["files"]), valid=str(folders["shards"]))))
    assert tuple(map(len, found)) == (12, 24)
    some = folders["files"].parent / "some.json"
    write_manifest(some, sorted(folders["files"].iterdir())[3:5])
    for held, data in (
        (some, Data(mix=train, valid=str(some))),
        (some, Data(train=str(folders["files"]), valid=str(some))),
        (folders["shards"], Data(mix=train, valid=str(folders["shards"]))),
    ):
        with pytest.raises(
            DataError, match=rf"data\.(mix|train) .* and data\.valid {held} both hold"
        ):
            find_clips(Config(data=data))


def test_validating_on_the_training_clips_is_said(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    files = str(folders["files"])
    train, valid = find_clips(Config(data=Data(train=files, valid=files)))
    assert list(train) == list(valid)
    assert f"data.train and data.valid are both {files}: nothing is held out" in caplog.text


def test_what_a_fingerprint_depends_on(folders: dict[str, Path], tmp_path: Path) -> None:
    def of(**changed: float) -> str:
        mix = {"files": 1.0, "shards": 2.0} | changed
        paths = {str(folders[name]): share for name, share in mix.items()}
        return fingerprint(find_clips(Config(data=Data(mix=paths)))[0])

    first = of()
    assert first == of()
    assert len({first, of(shards=1.0), of(**{"m.json": 1.0})}) == 3
    for name in ("files", "shards"):
        folders[name] = folders[name].rename(tmp_path / f"moved_{name}")
    assert of() == first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{/a: 0}", r"data.mix must be between 1e-09 and 1e\+09, got 0.0"),
        ("{/a: .inf}", "data.mix must be between"),
        ("{/a:3}", r"data.mix\[/a:3\] must be a number, got None"),
        ("{/a: many}", r"data.mix\[/a\] must be a number, got 'many'"),
        ("[/a, /b]", "data.mix: expected a mapping of keys to values"),
        ("/a", "data.mix: expected a mapping of keys to values"),
    ],
)
def test_a_mix_must_give_a_share_to_each_path(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("tiny_patch", [f"data.mix={given}"])


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("tiny_patch", "data.train=/b", "data.mix and data.train exclude each other"),
        (
            "tiny_patch",
            "data.sample_weights=/b",
            "data.mix and data.sample_weights exclude each other",
        ),
        ("classifier", "data.train=null", "data.mix is for pretraining"),
    ],
)
def test_what_a_mix_does_not_go_with(recipe: str, more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, ["data.mix={/a: 1}", more])


def test_mistakes_in_the_data_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    write_manifest(tmp_path / "one.json", [tmp_path / "a.wav"])
    for mix, message in (
        ({}, "data.train is not set"),
        ({str(tmp_path / "nowhere"): 1.0}, "nowhere: expected a folder"),
        (
            {str(folders["files"]): 1.0, str(tmp_path / "one.json"): 1.0},
            "one.json: holds 1 recording, expected two or more: .*; set data.valid",
        ),
        ({str(folders["shards"]): 1.0, f"{folders['shards']}/.": 1.0}, "both hold"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            find_clips(Config(data=Data(mix=mix)))


@pytest.mark.slow
def test_a_run_trains_on_a_mix_and_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    """Stopped in the middle and resumed, it is the run that went through; with other shares not."""
    config = write_config(tmp_path)
    mix = json.dumps({str(folders["files"]): 1, str(folders["shards"]): 3})
    losses = []
    for run, steps in (("whole", [8]), ("parts", [3, 8])):
        for number, count in enumerate(steps):
            settings = overrides(train__steps=count, train__save_every=8, train__validate_every=8)
            arguments = [*settings, f"data.mix={mix}", f"run.folder={tmp_path / run}"]
            assert pretrain(load_config(config, arguments), resume=number > 0) == 0
        losses.append([(line["step"], line["loss"]) for line in lines(tmp_path / run, "train")])
    assert losses[0] == losses[1] and len(losses[0]) == 8
    stored = load_config(tmp_path / "whole/config.yaml")
    assert stored.data.mix == json.loads(mix) and dump_config(stored)
    arguments[-2] = f"data.mix={mix.replace(': 3', ': 2')}"
    with pytest.raises(ConfigError, match="lists other clips or shares"):
        pretrain(load_config(config, arguments), resume=True)
