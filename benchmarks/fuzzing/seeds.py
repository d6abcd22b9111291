"""Manifests, configurations, data folders and models to be mutated, made from scratch."""

import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from ssast.benchmarks.fuzzing.containers import unpacked
from ssast.benchmarks.fuzzing.mutations import Files
from ssast.benchmarks.fuzzing.sounds import encoded
from ssast.engine.checkpoints.store import MANIFEST, Checkpoints
from ssast.engine.checkpoints.weights import WEIGHT, export_weights
from ssast.engine.config import CONFIGS, Config, from_plain, to_plain
from ssast.engine.formats.huggingface import export_huggingface
from ssast.engine.formats.published import published_name, to_published
from ssast.engine.formats.weight_files import write_state
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import MSPM
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.prepare.pack import Packing, prepare_shards

CLASSES = ("dog", "Male speech, man speaking", "caf\u00e9")
TABLE = b'index,mid,display_name\n0,/m/1,Dog\n1,/m/2,"Speech, male"\n2,/m/3,Cat\n'
SMALL = {
    "model": {"size": "tiny", "depth": 1},
    "audio": {"n_mels": 32, "num_frames": 48},
    "objective": {"num_masked": 3, "mask": "uniform"},
}


def tree(folder: Path, files: Callable[[Path], object]) -> Files:
    """Return the files that a function writes below a folder."""
    files(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def within(write: Callable[[Path], object]) -> Files:
    """Return the files that a function writes into an empty folder."""
    with tempfile.TemporaryDirectory() as name:
        return tree(Path(name), write)


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"path": ["a.wav", "b.wav"], "labels": [["x"], ["y", "z"]]}), file)
    return file.getvalue()


def manifests() -> list[Files]:
    """Return lists of clips in each form, with and without labels."""
    published = {"data": [{"wav": f"{k}.wav", "labels": "dog,cat"} for k in range(4)]}
    lists = {"data": [{"wav": f"{k}.wav", "labels": ["a, b", "c"]} for k in range(3)]}
    plain = {"data": [{"path": f"/x/{k}.flac"} for k in range(3)]}
    csv = 'wav,labels\n1.wav,dog\n2.wav,"cat,dog"\n3.wav,\n'
    names = 'path,label\na.wav,"Male speech, man"\nb.wav,dog\n'
    return [
        {"clips.json": json.dumps(published, indent=1).encode()},
        {"clips.json": json.dumps(lists).encode()},
        {"clips.json": json.dumps(plain).encode()},
        {"clips.csv": csv.encode()},
        {"clips.csv": names.encode("utf-16")},
        {"labels.csv": TABLE},
        {"clips.tsv": b'path\tsentence\tcategory\na.wav\t"A," b\tdog\nb.wav\tc\tcat\n'},
        {"clips.csv": b"sep=;\nfile;class\n~/a.wav;Dog, big\n$HOME/b.wav;\xe9\n"},
        {"clips.json": json.dumps(["a.wav", {"wav": "b.wav"}]).encode()},
        {"clips.jsonl": b'{"audio": "a.wav", "label": "x"}\n{"audio": "b.wav", "label": ["y"]}\n'},
        {"clips.txt": b"a.wav\nfile:///b%20c.wav\n"},
        {"wav.scp": b"utt1 a.wav\nutt2 /b/c.flac\n"},
        {"clips.parquet": _parquet()},
    ]


def sound_tables() -> list[Files]:
    """Return Parquet files with sounds: as ``datasets`` saves them, and of bytes alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sound = encoded("WAV")
    info = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
    published = pa.table(
        {"audio": [{"bytes": sound, "path": f"{k}.wav"} for k in range(4)], "label": [0, 1, -1, 1]}
    ).replace_schema_metadata({"huggingface": json.dumps(info)})
    plain = pa.table({"sound": [{"bytes": sound}] * 3})
    found = []
    for table, compression, rows in ((published, "snappy", 2), (plain, "none", 3)):
        file = io.BytesIO()
        pq.write_table(table, file, compression=compression, row_group_size=rows)
        found.append({"a.parquet": file.getvalue()})
    return found


def event_tables() -> list[Files]:
    """Return tables of events beside their recordings: of Raven, and of Audacity."""
    head = b"Selection\tView\tBegin Time (s)\tEnd Time (s)\tSpecies\n"
    rows = b"1\tSpectrogram 1\t0.01\t0.05\twren\n2\tWaveform 1\t0.02\t0.1\tSpeech, male\n"
    files = b"Begin Time (s)\tEnd Time (s)\tBegin File\tFile Offset (s)\tSpecies\n"
    files += b"0.01\t0.05\ta.wav\t0.01\twren\n0.3\t0.35\tD:\\b.wav\t0\trobin\n"
    sounds = {name: encoded("WAV") for name in ("a.wav", "b.wav")}
    return [
        sounds | {"a.Table.1.selections.txt": head + rows},
        sounds | {"all.selections.txt": files},
        sounds | {"a.labels.txt": b"0.01\t0.05\twren\n\\\t500\t4000\n0.1\t0.1\tx\n0\t0.2\ty z\n"},
    ]


def cut_files() -> list[Files]:
    """Return cuts as lhotse writes them; none where it is not installed."""
    if importlib.util.find_spec("lhotse") is None:
        return []
    source = {"type": "file", "channels": [0], "source": "/x/a.wav"}
    recording = {"id": "a", "sources": [source], "sampling_rate": 16000, "num_samples": 160000}
    recording |= {"duration": 10.0, "channel_ids": [0]}
    event = {"id": "s", "recording_id": "a", "start": 0.5, "duration": 1, "channel": 0}
    event |= {"text": "hello", "speaker": "bo", "custom": {"label": ["wren", 7]}}
    cut = {"start": 0, "duration": 10.0, "channel": 0, "supervisions": [event]}
    cut |= {"recording": recording, "type": "MonoCut"}
    lines = [json.dumps({"id": f"a-{k}"} | cut) for k in range(3)]
    mixed = {"id": "m", "tracks": [{"cut": {"id": "x"} | cut, "type": "MonoCut", "offset": 0.0}]}
    lines.append(json.dumps(mixed | {"type": "MixedCut"}))
    return [{"cuts.jsonl": "\n".join(lines).encode()}]


def configurations() -> list[Files]:
    """Return the recipes, a configuration with anchors, and an accelerator's description."""
    recipes = [path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml"))]
    anchors = b"model: &m {size: tiny, patch: [16, 16]}\naudio:\n  num_frames: &f 48\n"
    anchors += b"  n_mels: 32\nobjective: {num_masked: 3}\nrun: {<<: {folder: x}}\n"
    return [{"run.yaml": text} for text in (*recipes, anchors)]


def prepared_folders() -> list[Files]:
    """Return a prepared folder of three recordings with labels, and clips picked from it."""

    def write(folder: Path) -> None:
        source = folder / "source"
        source.mkdir()
        names = []
        for number in range(3):
            names.append(source / f"{number}.wav")
            names[-1].write_bytes(encoded("WAV"))
        write_manifest(source / "clips.json", names, [["dog"], ["dog", "cat"], []])
        packing = Packing(Recipe(clip_s=0.1, min_s=0.03), shard_mib=0.01)
        data = folder / "data"
        prepare_shards(
            source / "clips.json", data, packing, jobs=1, progress=False, log=lambda line: None
        )
        clip = json.loads((data / "shards/00000.jsonl").read_text().splitlines()[1])["file"]
        picked = {"prepared": "data", "data": [{"clip": clip, "labels": "dog"}]}
        (folder / "picked.json").write_text(json.dumps(picked))

    files = {name: d for name, d in within(write).items() if not name.startswith("source/")}
    shard = next(name for name in sorted(files) if name.endswith(".tar"))
    others = {name: data for name, data in files.items() if name != shard}
    return [files, others | unpacked(shard, files[shard])]


def small_config(**more: object) -> Config:
    """Return a configuration of a model that is quick to open."""
    return from_plain(SMALL | more)


def small_models() -> tuple[MSPM, Classifier]:
    """Return a pretrained model and a classifier; the same weights each time."""
    torch.manual_seed(0)
    config = small_config()
    encoder = SpectrogramTransformer(config.model, config.audio)
    return MSPM(config), Classifier(encoder, len(CLASSES), "avgtok")


def run_folders() -> list[Files]:
    """Return a run with a checkpoint and exported weights; each with its hashes, and without."""
    model, classifier = small_models()
    finetune = small_config(finetune={})
    meta = {"config": to_plain(finetune), "classes": list(CLASSES), "names": list(CLASSES)}
    weights = {WEIGHT + name: value for name, value in classifier.state_dict().items()}

    def run(folder: Path) -> None:
        checkpoints = Checkpoints(folder / "run/checkpoints")
        checkpoints.save(weights, meta, step=7)
        checkpoints.mark_best(7, 0.5)

    def exported(folder: Path) -> None:
        export_weights(model, small_config(), 3, folder / "run", torch.float32)

    found = []
    for write in (run, exported):
        files = within(write)
        state = next(name for name in files if name.endswith(".safetensors"))
        manifest = next(name for name in files if name.endswith(MANIFEST))
        parts = {name: data for name, data in files.items() if name != state}
        found += [files, parts | unpacked(state, files[state]) | {manifest: b""}]
        found.append(files | {manifest: b""})
    return found


def weight_files() -> list[Files]:
    """Return published files, pretrained and fine-tuned: pickles of both forms, .safetensors."""
    model, classifier = small_models()
    audio = {"audio": SMALL["audio"], "stride": [16, 16], "classes": list(CLASSES)}
    pretrained = to_published(model.state_dict())
    frames = {"p_input_fdim": torch.tensor(32), "p_input_tdim": torch.tensor(48)}
    pretrained |= {f"module.{name}": value for name, value in frames.items()}
    finetuned = {
        f"module.{published_name(name)}": value
        for name, value in classifier.state_dict().items()
        if not name.endswith("mask_embed")
    }
    found = []
    for state, stored in ((pretrained, None), (finetuned, audio)):
        files = within(lambda f, s=state, m=stored: write_state(s, f / "a.pth", m))  # type: ignore[misc]
        found += [files, unpacked("a.pth", files["a.pth"])]
    old = io.BytesIO()
    torch.save(pretrained, old, _use_new_zipfile_serialization=False)
    found.append({"a.pth": old.getvalue()})
    tensors = {name: value.contiguous() for name, value in pretrained.items()}
    data = safetensors.torch.save(tensors)
    return [*found, {"a.safetensors": data}, unpacked("a.safetensors", data)]


def transformers_folders() -> list[Files]:
    """Return folders of transformers: a stock one, one with our own model file, an encoder."""
    _, classifier = small_models()
    config = small_config()
    torch.manual_seed(0)
    stock = Classifier(SpectrogramTransformer(config.model, config.audio), len(CLASSES), "cls")
    found = []
    for model in (stock, classifier, stock.encoder):
        labels = CLASSES if isinstance(model, Classifier) else None
        files = within(lambda f, m=model, n=labels: export_huggingface(m, f, config.audio, n))  # type: ignore[misc]
        files = {name: data for name, data in files.items() if not name.endswith(".py")}
        state = "model.safetensors"
        parts = {name: data for name, data in files.items() if name != state}
        found += [files, parts | unpacked(state, files[state])]
    return found
