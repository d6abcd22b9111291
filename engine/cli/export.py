"""``ssast export``, ``ssast embed`` and ``ssast weights``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ssast.engine.cli.imports import imports
from ssast.engine.cli.options import (
    NAMED,
    add_layer,
    add_missing_metadata,
    add_precision,
    add_quiet,
    add_table_format,
    add_weights,
    missing_metadata,
    table_format,
)
from ssast.engine.cli.status import FILES_STATUS, files_status
from ssast.pipelines.files import cache_folder, check_new
from ssast.pipelines.text import printable

FORMATS = {
    "published": ".pth file for the published SSAST code",
    "hf": "folder for from_pretrained of Hugging Face transformers",
    "onnx": "ONNX model with a dynamic batch size",
    "pt2": "torch.export program with a dynamic batch size",
    "weights": "folder with the fp16 weights of a pretraining run, for finetune --checkpoint",
}


def add_export_commands(commands: Any) -> None:
    """Add both commands to the subparsers of ``ssast``."""
    command = commands.add_parser(
        "export",
        help="convert a model to another format",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:10} {text}" for name, text in FORMATS.items()),
    )
    _add_model(command, classifier=True)
    command.add_argument("--to", required=True, choices=FORMATS, help="output format, see below")
    command.add_argument("out", metavar="OUT", type=Path, help="file or folder to write")
    command.add_argument(
        "--input",
        choices=("fbank", "waveform"),
        help="with --to onnx or pt2: what the model is fed, log-mel filterbanks or waveforms, with "
        "the filterbank inside (default: fbank)",
    )
    command.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="with --to hf: upload the folder as well, as a model on the Hugging Face hub",
    )
    command.set_defaults(run=_export)

    command = commands.add_parser(
        "embed", help="extract embeddings of recordings", epilog=FILES_STATUS
    )
    _add_model(command, classifier=False)
    command.add_argument("source", metavar="SOURCE", help="manifest, folder or audio file")
    command.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help=".npy (with a .csv of the rows) or .parquet",
    )
    command.add_argument(
        "--level",
        choices=("clip", "frame"),
        default="clip",
        help="one vector per clip or per frame (default: clip)",
    )
    add_layer(command)
    command.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="clips per batch (default: what suits the device)",
    )
    add_precision(command)
    add_quiet(command)
    add_table_format(command, labels=False)
    command.set_defaults(run=_embed)


def add_weights_command(commands: Any) -> None:
    """Add ``ssast weights`` to the subparsers of ``ssast``."""
    command = commands.add_parser(
        "weights", help="list the weights that can be had by name, or fetch some"
    )
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="weights to fetch; their paths are printed"
    )
    command.add_argument(
        "--mirror",
        metavar="URL",
        help="address of a folder that holds NAME.pth (default: $SSAST_MIRROR, else the authors')",
    )
    command.set_defaults(run=_weights)


def _weights(options: argparse.Namespace) -> int:
    from ssast.engine.errors import ConfigError
    from ssast.engine.formats.fetch import WEIGHTS, fetch_published
    from ssast.engine.formats.known_weights import PUBLISHED, ours

    known, own = PUBLISHED, ours()
    for name in options.names:
        if name not in known and name not in own:
            raise ConfigError(f"{name}: no weights of this name; ssast weights lists them")
    for name in options.names:
        print(own[name] if name in own else fetch_published(name, options.mirror))
    if options.names:
        return 0
    print(f"{'name':24} {'size':6} {'patch':6} {'masked':6} {'audio':6} {'speech':6} where")
    for name, path in own.items():
        print(f"{name:24} {'tiny':6} {'':6} {'':6} {'':6} {'':6} {path}")
    for name, weights in known.items():
        path = cache_folder(WEIGHTS) / f"{name}.pth"
        where = path if path.is_file() else weights.url
        shown = (weights.size, weights.patch, weights.num_masked, weights.audio, weights.speech)
        print(f"{name:24} {' '.join(f'{value!s:6}' for value in shown)} {where}")
    print("audio, speech: mean accuracy of fine-tuned models on the paper's tasks, in %")
    return 0


def _add_model(command: argparse.ArgumentParser, *, classifier: bool) -> None:
    command.add_argument(
        "model",
        metavar="CKPT",
        help=f"folder of a run, a checkpoint, a published .pth, a transformers folder, {NAMED}",
    )
    add_weights(command)
    add_missing_metadata(command, classifier=classifier)


def _open(options: argparse.Namespace) -> Any:
    from ssast.engine.formats.open import open_model

    return open_model(options.model, missing_metadata(options), options.weights)


def _export(options: argparse.Namespace) -> int:
    with imports():
        import torch

        from ssast.engine.checkpoints.weights import export_weights
        from ssast.engine.errors import ConfigError
        from ssast.engine.formats.huggingface import export_huggingface
        from ssast.engine.formats.open import as_classifier, open_raw, published_metadata
        from ssast.engine.formats.portable import save_onnx, save_program
        from ssast.engine.formats.published import save_published
        from ssast.engine.model.encoder import SpectrogramTransformer
        from ssast.engine.model.objective import PretrainingModel

    if options.push and options.to != "hf":
        raise ConfigError("--push is for --to hf")
    if options.push:
        from ssast.engine.formats.hub import check_push

        check_push(options.push)
    if options.input and options.to not in ("onnx", "pt2"):
        raise ConfigError("--input is for --to onnx and --to pt2")
    check_new([options.out], [options.model])
    loaded, out = _open(options), options.out
    # Both where there are two and nobody has chosen, in formats that can hold both.
    both = options.weights is None and options.to in ("weights", "hf")
    raw = open_raw(loaded) if both else None
    if options.to == "weights":
        if not isinstance(loaded.model, PretrainingModel) or loaded.step is None:
            raise ConfigError(f"{options.model}: expected a pretraining run for --to weights")
        given = (loaded.model, loaded.config, loaded.step, out, torch.float16)
        print(export_weights(*given, None if raw is None else raw.model))
        return 0
    bare, raw_bare = _without_heads(loaded), None if raw is None else _without_heads(raw)
    labels, names, loss = None, None, None
    if loaded.is_classifier:  # classes without names are numbered, as ssast predict does
        labels, names = as_classifier(loaded).classes, as_classifier(loaded).names
        loss = loaded.loss
    if options.to == "published":
        if isinstance(loaded.model, SpectrogramTransformer):
            raise ConfigError(f"{options.model}: a plain encoder has no published format")
        metadata, heads = published_metadata(loaded), loaded.imagenet_heads
        save_published(loaded.model, out, loaded.audio, metadata, heads)
    elif options.to == "hf":
        export_huggingface(bare, out, loaded.audio, labels, loss, names, raw_bare)
    else:
        save = save_onnx if options.to == "onnx" else save_program
        save(bare, out, loaded.audio, labels, loss, names, fed=options.input or "fbank")
    if loaded.audio.ignore_padding:
        print(
            "warning: audio.ignore_padding is not exported: outputs are the same only for clips of "
            f"{loaded.audio.num_frames} frames, without padding",
            file=sys.stderr,
        )
    print(out)
    if options.push:
        from ssast.engine.formats.hub import push_to_hub

        classes = loaded.num_classes if loaded.is_classifier else None
        own_code = (out / "modeling_ssast.py").is_file()
        print(push_to_hub(out, options.push, loaded.audio, num_classes=classes, own_code=own_code))
    return 0


def _without_heads(loaded: Any) -> Any:
    """Return a classifier as it is, and else the encoder alone."""
    return loaded.classifier if loaded.is_classifier else loaded.encoder


def _embed(options: argparse.Namespace) -> int:
    with imports():
        from ssast.engine.errors import ConfigError
        from ssast.engine.evaluation.embedding import embed_recordings
        from ssast.kernels.memory import keep_freed_memory

    keep_freed_memory()
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {options.batch_size}")
    loaded = _open(options)
    embedded = embed_recordings(
        loaded,
        options.source,
        options.out,
        level=options.level,
        layer=options.layer,
        batch_size=options.batch_size,
        precision=options.precision,
        table=table_format(options),
        progress=not options.quiet,
    )
    empty = "null" if embedded.listing == embedded.path else "NaN"
    for path, reason in embedded.rejected.items():
        print(f"cannot be read, its row is {empty}: {printable(path)}: {printable(reason)}")
    total = embedded.shape[0]
    print(
        f"{embedded.path}: {' x '.join(map(str, embedded.shape))}, {embedded.num_read} of {total} "
        f"clips; rows in {embedded.listing}"
    )
    return files_status(embedded.num_read, total)
