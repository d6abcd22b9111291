"""Hostile and strange configurations, files of weights, runs and folders of transformers."""

import hashlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ssast.benchmarks.fuzzing import seeds
from ssast.benchmarks.fuzzing.containers import packed, sealed, unpacked
from ssast.benchmarks.fuzzing.mutations import Files
from ssast.benchmarks.fuzzing.reading import memory_mib, write_files
from ssast.engine.config import load_config
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.open import open_model
from ssast.engine.formats.weight_files import read_state
from ssast.engine.monitoring.gpus import load_gpu
from ssast.pipelines.text import YAML_NODES, parse_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join([f'*{chr(97 + k)}'] * 10)}]\n" for k in range(20)
)
YAML = {
    "aliases of aliases": (LAUGHS, f"stands for more than {YAML_NODES} values"),
    "merged aliases": (
        "a: &a {k0: 1}\n"
        + "".join(f"b{k}: &b{k} {{<<: [*a, *{'a' if not k else f'b{k - 1}'}]}}\n" for k in range(9))
        + "run: *b8",
        "unknown key",
    ),
    "an alias of itself": ("a: &a [*a]", "stands for itself"),
    "no such alias": ("a: *b", "stands for itself, or for nothing"),
    "deep": ("[" * 100_000, "nested more than 50 deep"),
    "deep lists": ("- " * 50_000 + "x", "nested more than 50 deep"),
    "deep mappings": ("{a: " * 10_000, "nested more than 50 deep"),
    "code": ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "no date": ("run: {folder: 2001-99-99}", "month must be in 1..12"),
    "no timestamp": ("a: !!timestamp x", "cannot be read"),
    "no number": ("a: !!int x", "cannot be read"),
    "no truth": ("a: !!bool x", "cannot be read"),
    "long number": (f"train: {{steps: {'9' * 5000}}}", "cannot be read as YAML"),
    "long base 16": (f"train: {{steps: 0x{'f' * 9000}}}", "train.steps must be"),
    "long base 60": (f"train: {{steps: {'1:' * 50_000}1}}", "a word of 100001 characters"),
    "NaN": ("audio: {mean: .nan}", "audio.mean must be a finite number, got nan"),
    "infinity": ("optim: {lr: .inf}", "optim.lr must be"),
    "too large for a float": (f"audio: {{mean: {'9' * 400}}}", "audio.mean must be a number"),
    "NUL": ('data: {train: "a\\0b"}', "data.train must be a string"),
    "odd key": ("? [1, 2]\n: 3", "cannot be read as YAML"),
    "long key": (f"? {'x' * 2000}\n: 3", "unknown key 'xxx"),
    "long value": (f"model: {{size: {'x' * 9000}}}", "model.size must be one of"),
    "wide value": (f"model: {{size: [{'1, ' * 2000}]}}", "model.size must be one of"),
    "too wide": (f"model: {{size: [{'1, ' * 20_000}]}}", f"more than {YAML_NODES} values"),
    "too long": ("#" * 2**21, "2097152 bytes, expected at most 1048576"),
    "bytes": ("\xff\xfe\xfd", "not UTF"),
    "a set": ("!!set {model, audio}", "expected a mapping"),
    "frames of years": (f"audio: {{num_frames: {2**62}}}", "audio.num_frames must be between"),
    "blocks without end": (f"model: {{depth: {2**62}}}", "model.depth must be between"),
}


@pytest.mark.parametrize("kind", YAML)
def test_configurations(kind: str, tmp_path: Path) -> None:
    """One short line each."""
    text, message = YAML[kind]
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert len(str(caught.value)) < 700 + len(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        load_gpu(str(path))


def test_plain_yaml_is_read() -> None:
    """Anchors, merges and depth within bounds."""
    text = "a: &a {b: 1}\nc: {<<: *a, d: [[[1.5]]]}\ne: *a\n"
    assert parse_yaml(text) == {"a": {"b": 1}, "c": {"b": 1, "d": [[[1.5]]]}, "e": {"b": 1}}
    assert parse_yaml("") is None and parse_yaml("# nothing") is None


def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="no such configuration"):
        load_config(tmp_path / "a.yaml")


def saved(state: Any, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def compressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(data))
    with source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return buffer.getvalue()


def claiming(data: bytes, elements: int) -> bytes:
    """A file in which the storage of ``a`` has other sizes than are in it: [elements, 8]."""
    parts = unpacked("a.pth", data)
    name = next(name for name in parts if name.endswith("data.pkl"))
    number = b"\x8a\x08" + (8 * elements).to_bytes(8, "little")
    rows = b"\x8a\x08" + elements.to_bytes(8, "little")
    changed = (
        parts[name].replace(b"K@tq", number + b"tq", 1).replace(b"K\x08K\x08", rows + b"K\x08", 1)
    )
    assert changed != parts[name]
    return packed(parts | {name: changed})["a.pth"]


def tiny_files() -> dict[str, tuple[bytes, str]]:
    state = {"a": torch.arange(64.0).reshape(8, 8)}
    whole = saved(state)
    old = saved(state, _use_new_zipfile_serialization=False)
    rows = b"\x8a\x08" + (2**40).to_bytes(8, "little")
    zeros = {"a": torch.zeros(1).expand(2**20, 2**20)}
    gigabyte = compressed(saved({"a": torch.zeros(2**24)}))
    assert len(gigabyte) < 2**18
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    odd = json.dumps({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}})
    plain = "no plain tensor, or smaller than its shape"
    damaged = "not a whole checkpoint file"
    return {
        "compressed": (gigabyte, "compressed ZIP archive"),
        "stride 0": (saved(zeros), plain),
        "sparse": (saved({"a": torch.eye(3).to_sparse()}), f"{plain}|{damaged}"),
        "quantised": (
            saved({"a": torch.quantize_per_tensor(torch.zeros(8), 1.0, 0, torch.qint8)}),
            f"{plain}|{damaged}|refused",
        ),
        "meta": (saved({"a": torch.zeros(2**40, device="meta")}), plain),
        "more than is stored": (claiming(whole, 2**10), damaged),
        "terabytes": (claiming(whole, 2**40), damaged),
        "old, terabytes": (old.replace(b"K\x08K\x08", rows + b"K\x08", 1), damaged),
        "safetensors, terabytes": (
            len(header).to_bytes(8, "little") + header.encode() + bytes(64),
            damaged,
        ),
        "safetensors, header": ((2**40).to_bytes(8, "little") + b"{" + bytes(64), damaged),
        "safetensors, type": (len(odd).to_bytes(8, "little") + odd.encode() + b"0", damaged),
        "deep names": (saved({(((("a",) * 9,) * 9,) * 9,) * 9: torch.zeros(1)}), "found"),
        "code": (pickle.dumps({"a": os.system}), "refused"),
    }


TINY = tiny_files()


@pytest.mark.parametrize("kind", TINY)
def test_weights_that_claim_more_than_they_hold(kind: str, tmp_path: Path) -> None:
    content, message = TINY[kind]
    path = tmp_path / ("a.safetensors" if kind.startswith("safetensors") else "a.pth")
    path.write_bytes(content)
    before = memory_mib("VmHWM")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state(path)
    assert len(str(caught.value)) < 500 + len(str(path))
    assert memory_mib("VmHWM") - before < 128 or kind == "old, terabytes"  # imports


def test_views_of_one_tensor_and_the_old_form_are_read(tmp_path: Path) -> None:
    state = {"a": torch.arange(64.0).reshape(8, 8)}
    state["b"] = state["a"].t()
    state["c"] = state["a"][2:4]
    for old in (False, True):
        (tmp_path / "a.pth").write_bytes(saved(state, _use_new_zipfile_serialization=not old))
        found, _ = read_state(tmp_path / "a.pth")
        assert all(found[name].equal(value) for name, value in state.items())


@pytest.fixture(scope="module")
def exported() -> Files:
    """Exported weights of a small model, in parts, without their hashes."""
    return next(files for files in seeds.run_folders() if files.get("run/manifest.json") == b"")


@pytest.fixture(scope="module")
def stock() -> Files:
    return seeds.transformers_folders()[0]


GIANT = {"size": "giant", "depth": 40, "patch": [16, 16]}
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another size": ({"model": GIANT}, "missing .* and 4|shapes that do not fit"),
    "frames": ({"audio": {"n_mels": 32, "num_frames": 2**20}}, "shapes that do not fit"),
    "blocks": ({"model": {"size": "tiny", "depth": 256}}, "missing .* more"),
    "no settings": ({"model": 5}, "its settings are damaged"),
    "unknown": ({"modle": {}}, "its settings are damaged: unknown key modle"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_runs_that_claim_a_larger_model(kind: str, exported: Files, tmp_path: Path) -> None:
    """With the right hashes: no memory is taken for what is not there."""
    change, message = SETTINGS[kind]
    files = dict(exported)
    meta = json.loads(files["run/meta.json"])
    meta["config"] |= change
    write_files(tmp_path, sealed(files | {"run/meta.json": json.dumps(meta).encode()}))
    before = memory_mib("VmHWM")
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path / "run")
    assert memory_mib("VmHWM") - before < 128


@pytest.mark.parametrize(
    "meta",
    ["[" * 100_000, "[]", "{}", '{"config": {}, "step": "x"}', '{"step": 1, "classes": "abc"}'],
)
def test_metadata_of_a_wrong_shape(meta: str, exported: Files, tmp_path: Path) -> None:
    files = dict(exported)
    write_files(tmp_path, sealed(files | {"run/meta.json": meta.encode()}))
    with pytest.raises(CheckpointError):
        open_model(tmp_path / "run")


TRANSFORMERS: dict[str, Any] = {
    "max_length": 2**62,
    "num_hidden_layers": 2**40,
    "num_mel_bins": "128",
    "patch_size": [16],
    "time_stride": 0,
    "hidden_size": {"a": 1},
    "num_attention_heads": [3],
    "layer_norm_eps": "1e-6",
    "id2label": [1],
    "label_ids": [1],
    "hidden_act": ["gelu"] * 10**5,
    "problem_type": ["x"] * 10**5,
    "model_type": [],
}


@pytest.mark.parametrize("key", TRANSFORMERS)
def test_folders_of_transformers(key: str, stock: Files, tmp_path: Path) -> None:
    files = dict(stock)
    config = json.loads(files["config.json"]) | {key: TRANSFORMERS[key]}
    write_files(tmp_path, files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(CheckpointError) as caught:
        open_model(tmp_path)
    assert len(str(caught.value)) < 700 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("p_input_tdim", torch.tensor(2**40)),
        ("p_input_fdim", torch.ones(3)),
        ("p_input_fdim", torch.tensor(float("nan"))),
        ("v.blocks.99999999.norm1.weight", torch.ones(192)),
        ("v.blocks.x.norm1.weight", torch.ones(192)),
        ("v.patch_embed.proj.weight", torch.ones(1536, 1, 16, 16)),
        ("mlp_head.1.weight", torch.tensor(3.0)),
    ],
)
def test_published_files(name: str, value: torch.Tensor, tmp_path: Path) -> None:
    model, _ = seeds.small_models()
    from ssast.engine.formats.published import published_state

    torch.save(published_state(model) | {f"module.{name}": value}, tmp_path / "a.pth")
    before = memory_mib("VmHWM")
    with pytest.raises(CheckpointError):
        open_model(tmp_path / "a.pth")
    assert memory_mib("VmHWM") - before < 64


def test_a_manifest_with_right_hashes_of_other_files(exported: Files, tmp_path: Path) -> None:
    """A checkpoint is what its manifest says; a manifest of another shape is damage."""
    files = sealed(exported)
    for text in (
        b"[]",
        b'{"files": 5}',
        b'{"files": {"state.safetensors": []}}',
        b"\xff",
        b"[" * 10**5,
    ):
        write_files(tmp_path, files | {"run/manifest.json": text})
        with pytest.raises(CheckpointError, match="manifest"):
            open_model(tmp_path / "run")
    assert hashlib.sha256(files["run/meta.json"]).hexdigest() in files["run/manifest.json"].decode()
