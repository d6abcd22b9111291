"""``ssast export`` and ``ssast embed``."""

import argparse
import sys
from pathlib import Path
from typing import Any

FORMATS = {
    "published": "a .pth file for the published code",
    "hf": "a folder for transformers' from_pretrained",
    "onnx": "an ONNX file, for any number of clips",
    "pt2": "a file of torch.export, for any number of clips",
    "weights": "of a pretraining run, what finetune --checkpoint needs: a folder, in float16",
}


def add_export_commands(commands: Any) -> None:
    """Adds ``export`` and ``embed`` to the commands of ``ssast``.

    Args:
        commands: What ``add_subparsers`` of the parser has returned.
    """
    command = commands.add_parser(
        "export",
        help="take a model elsewhere",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:10} {text}" for name, text in FORMATS.items()),
    )
    _add_model(command)
    command.add_argument("--to", required=True, choices=FORMATS, help="see below")
    command.add_argument("out", metavar="OUT", type=Path, help="the file or folder to write")
    command.set_defaults(run=_export)

    command = commands.add_parser("embed", help="write embeddings of recordings")
    _add_model(command)
    command.add_argument("source", metavar="SRC", help="a manifest, a folder or an audio file")
    command.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help=".npy, with a .csv, or .parquet"
    )
    command.add_argument(
        "--level", choices=("clip", "frame"), default="clip", help="one vector for each (clip)"
    )
    command.add_argument("--batch-size", type=int, default=16, help="clips at once (16)")
    command.set_defaults(run=_embed)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model",
        metavar="CKPT",
        type=Path,
        help="a run's folder, a checkpoint, a published file, or a folder of transformers",
    )
    add_unsaid(command)


def add_unsaid(command: argparse.ArgumentParser, *, classifier: bool = False) -> None:
    """Add options for what a published file does not say of its model."""
    unsaid = command.add_argument_group("of a published file, which does not say it")
    unsaid.add_argument("--frames", type=int, metavar="T", help="frames of its input")
    unsaid.add_argument("--stride", type=int, nargs=2, metavar=("F", "T"), help="of its patches")
    unsaid.add_argument("--pooling", choices=("avgtok", "cls"), default="avgtok", help="(avgtok)")
    unsaid.add_argument("--mean", type=float, help="of its filterbanks (AudioSet's)")
    unsaid.add_argument("--std", type=float, help="of its filterbanks (AudioSet's)")
    if classifier:
        unsaid.add_argument(
            "--loss", choices=("ce", "bce"), help="one class a clip, or several (ce)"
        )
        unsaid.add_argument(
            "--labels", type=Path, metavar="CSV", help="its classes: index,mid,display_name"
        )


def unsaid_of(options: argparse.Namespace) -> Any:
    """What these options say."""
    from ssast.engine.formats.open import Unsaid

    stride = None if options.stride is None else tuple(options.stride)
    loss = getattr(options, "loss", None)
    return Unsaid(options.frames, stride, options.pooling, options.mean, options.std, loss)


def _open(options: argparse.Namespace) -> Any:
    from ssast.engine.formats.open import open_model

    return open_model(options.model, unsaid_of(options))


def _export(options: argparse.Namespace) -> int:
    import torch

    from ssast.engine.checkpoints.pretrained import export_weights
    from ssast.engine.errors import ConfigError
    from ssast.engine.formats.huggingface import export_huggingface
    from ssast.engine.formats.portable import save_onnx, save_program
    from ssast.engine.formats.published import save_published
    from ssast.engine.model.encoder import SpectrogramTransformer
    from ssast.engine.model.objective import MSPM

    opened, out = _open(options), options.out
    if options.to == "weights":
        if not isinstance(opened.model, MSPM) or options.model.is_file():
            raise ConfigError(f"{options.model}: expected a pretraining run for --to weights")
        print(export_weights(options.model, out, torch.float16))
        return 0
    if options.to == "published":
        if isinstance(opened.model, SpectrogramTransformer):
            raise ConfigError(f"{options.model}: an encoder alone has no published form")
        save_published(opened.model, out, opened.audio)
    elif options.to == "hf":
        export_huggingface(opened.useful, out, opened.audio, opened.labels)
    else:
        save = save_onnx if options.to == "onnx" else save_program
        save(opened.useful, out, opened.audio, opened.labels)
    if opened.audio.ignore_padding:
        print(
            "note: audio.ignore_padding stays behind: what was exported takes padding for sound, "
            f"and has our numbers for clips of {opened.audio.num_frames} frames",
            file=sys.stderr,
        )
    print(out)
    return 0


def _embed(options: argparse.Namespace) -> int:
    from ssast.engine.errors import ConfigError
    from ssast.engine.evaluation.embedding import embed_recordings

    if options.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {options.batch_size}")
    opened = _open(options)
    embedded = embed_recordings(
        opened, options.source, options.out, level=options.level, batch_size=options.batch_size
    )
    empty = "null" if embedded.listing == embedded.path else "NaN"
    for path, reason in embedded.rejected.items():
        print(f"not read, its row is {empty}: {path}: {reason}")
    print(f"{embedded.path}: {' x '.join(map(str, embedded.shape))}; rows in {embedded.listing}")
    return 0
