"""Settings that a run takes from the checkpoint that it begins from.

The command line comes first, then the configuration file, then the checkpoint, then the defaults.
"""

from collections.abc import Mapping
from typing import Any

from ssast.engine.config import (
    OVERRIDE,
    Config,
    from_plain,
    masked_patches,
    num_patches,
    to_plain,
)
from ssast.engine.errors import CheckpointError
from ssast.engine.finetune_settings import Finetune
from ssast.engine.objective_settings import Objective, published_share, settings_of
from ssast.engine.settings import Audio, Model

AUDIO = ("sample_rate_hz", "channel", "n_mels", "num_frames", "mean", "std", "ignore_padding")
MODEL = ("backbone", "size", "patch", "depth", "positions", "extra_tokens", "norm")
USUAL = (None, False, "transformer", "learned", "cls_dist", "pre")  # not worth a word
# Weights cannot be resized along these.
SHAPES = tuple(f"model.{key}" for key in MODEL)


def adopt(
    config: Config,
    pretrained: Config,
    source: str,
    *,
    assumed: tuple[str, ...] = (),
) -> tuple[Config, list[str]]:
    """Take what nobody set from the checkpoint, and report where the settings are from.

    Continued pretraining takes the objective as well, and may have other mel bins.

    Args:
        config: Configuration of the run. Where it was not loaded from a file, what differs from
            the defaults counts as set.
        pretrained: Configuration of the checkpoint.
        source: Path of the checkpoint, for messages.
        assumed: Keys ``section.key`` that the checkpoint does not say, and has the defaults of.

    Returns:
        The configuration, and lines for the log.

    Raises:
        CheckpointError: Size, patch, depth or mel bins were set to others than the checkpoint has,
            or the configuration file has another sample rate.
    """
    plain, theirs = to_plain(config), to_plain(pretrained)
    taken, kept = dict[str, Any](), list[str]()
    for section, key in _keys(config, pretrained):
        name, value = f"{section}.{key}", theirs.get(section, {}).get(key)
        if name == "finetune.stride" and value == theirs["model"]["patch"]:
            value = None
        ours = plain[section][key]
        if not _is_set(config, name, ours):
            plain[section][key] = taken[name] = value
        elif ours != value:
            origin = _origin(config, name)
            _check(name, ours, value, origin, source, resizable=config.finetune is None)
            kept.append(f"{name} {_text(ours)} {origin}, the checkpoint has {_text(value)}")
    if "objective.num_masked" in taken:
        if pretrained.finetune is None:
            share = pretrained.objective.num_masked / _patches(theirs)
        else:  # a model without an objective
            share = published_share(plain["objective"]["kind"])
        plain["objective"]["num_masked"] = masked_patches(share, _patches(plain))
    adopted = from_plain(plain, config.stated)
    return adopted, _lines(plain, taken, kept, source, assumed)


def _keys(config: Config, pretrained: Config) -> list[tuple[str, str]]:
    measured = ("mean", "std") if config.audio.stats == "measure" else ()
    keys = [("model", key) for key in MODEL]
    keys += [("audio", key) for key in AUDIO if key not in measured]
    if config.finetune is not None:
        return [*keys, ("finetune", "stride")]
    ours, theirs = config.objective.kind, pretrained.objective.kind
    known = settings_of(ours if _is_set(config, "objective.kind", ours) else theirs)
    return keys + [("objective", key) for key in settings_of(theirs) if key in known]


def _is_set(config: Config, name: str, value: Any) -> bool:
    if config.stated is not None:
        return name in config.stated
    section, _, key = name.partition(".")
    defaults = {
        "audio": Audio(),
        "model": Model(),
        "objective": Objective(),
        "finetune": Finetune(),
    }
    return value != to_plain(defaults[section])[key]


def _origin(config: Config, name: str) -> str:
    if config.stated is None:
        return "in the configuration"
    origin = config.stated[name]
    return origin if origin == OVERRIDE else f"from {origin}"


def _check(name: str, ours: Any, theirs: Any, origin: str, source: str, *, resizable: bool) -> None:
    fixed = name in SHAPES or (name == "audio.n_mels" and not resizable)
    if fixed or (name == "audio.sample_rate_hz" and origin.startswith("from ")):
        raise CheckpointError(
            f"{source}: has {name} {theirs!r}, the configuration {ours!r}: "
            f"set {name}={_text(theirs)}, or use another checkpoint"
        )


def _patches(plain: Mapping[str, Any]) -> int:
    audio = plain["audio"]
    return num_patches(audio["n_mels"], audio["num_frames"], plain["model"]["patch"])


def _lines(
    plain: Mapping[str, Any],
    taken: Mapping[str, Any],
    kept: list[str],
    source: str,
    assumed: tuple[str, ...],
) -> list[str]:
    def shown(names: list[str], *usual: Any) -> str:
        parts = [name.partition(".") for name in names]
        parts = [part for part in parts if plain[part[0]][part[2]] not in (*USUAL, *usual)]
        return ", ".join(f"{key} {_text(plain[section][key])}" for section, _, key in parts)

    known = [name for name in taken if name not in assumed]
    unknown = [name for name in taken if name in assumed]
    lines = [f"from {source}: {shown(known, 'mean')}"] if known else []
    if unknown:
        lines.append(f"{source} does not say, so assumed: {shown(unknown)}")
    return lines + kept


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).replace(" ", "")
