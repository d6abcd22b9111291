"""The configuration of a run: nested frozen dataclasses, read from one YAML file.

    config = load_config("base_patch", ["data.train=clips.json", "train.steps=1000"])

An unknown key, a value of the wrong type and one out of range are errors that name the key, what
was found and what is expected.
"""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ssast.engine.errors import ConfigError
from ssast.engine.finetune_settings import Finetune
from ssast.engine.objective_settings import Objective, check_objective, published_share
from ssast.engine.registry import BACKBONES, METRICS, OBJECTIVES
from ssast.engine.settings import (
    EXTRA_TOKENS,
    Audio,
    Data,
    Model,
    Optim,
    Profile,
    Run,
    Train,
    check_optim,
)
from ssast.pipelines.errors import DataError
from ssast.pipelines.text import YAML_BYTES, one_line, parse_yaml, read_text, shown, with_home

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
Section = TypeVar("Section")
NULLS = ("", "~", "null", "Null", "NULL")  # of YAML
OVERRIDE = "on the command line"


def num_patches(n_mels: int, num_frames: int, patch: Sequence[int]) -> int:
    """Return the number of patches of an input that do not overlap."""
    return (n_mels // patch[0]) * (num_frames // patch[1])


def masked_patches(share: float, patches: int) -> int:
    """Return how many patches a share is; the published generator leaves out two at least."""
    return max(2, min(round(share * patches), patches - 2))


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration; each run stores it in its folder as config.yaml."""

    audio: Audio = field(default_factory=Audio)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    run: Run = field(default_factory=Run)
    profile: Profile = field(default_factory=Profile)
    finetune: Finetune | None = None
    """Settings of fine-tuning, which ignores ``objective``; null in pretraining."""

    stated: Mapping[str, str] | None = field(default=None, compare=False, repr=False)
    """Keys ``section.key`` that were set, and where: the name of the file, or :data:`OVERRIDE`;
    None if the configuration was not loaded from a file. No setting itself."""

    def __post_init__(self) -> None:
        """Check what depends on more than one key."""
        if self.train.zero_stage == 0:
            raise ConfigError(
                "train.zero_stage must be 1, 2 or 3, got 0: DeepSpeed's stage 0 starts bf16 runs "
                "with a false step and lets one NaN poison the weights; stage 1 costs no more"
            )
        if self.train.zero_stage == 3 and self.train.cuda_graphs is True:
            raise ConfigError(
                "train.cuda_graphs: true needs train.zero_stage 1 or 2: stage 3 gathers weights "
                "during the pass"
            )
        BACKBONES.check(self.model.backbone)
        if self.model.norm == "post" and self.model.backbone != "transformer":
            raise ConfigError(
                f"model.norm post is of model.backbone transformer, got {self.model.backbone!r}: "
                "its blocks have their own norms"
            )
        rows, columns = self.grid
        if rows < 1 or columns < 1:
            raise ConfigError(
                f"model.patch {list(self.model.patch)} does not fit into "
                f"audio.n_mels {self.audio.n_mels} x audio.num_frames {self.audio.num_frames}"
            )
        data, optim = self.data, self.optim
        stated = self.stated or {}
        check_optim(optim, [name for name, origin in stated.items() if origin == OVERRIDE])
        if data.mix is not None and (data.train is not None or data.sample_weights is not None):
            other = "train" if data.train is not None else "sample_weights"
            raise ConfigError(f"data.mix and data.{other} exclude each other: set one to null")
        if data.hop_s is not None and data.window_s is None:
            raise ConfigError("data.hop_s is between the windows of data.window_s, which is null")
        if (data.cache_gib > 0) + (data.cache_folder is not None) + data.random_crop > 1:
            raise ConfigError(
                "data.cache_gib, data.cache_folder and data.random_crop exclude each other: one "
                "place for filterbanks is enough, and a crop is used once"
            )
        if self.finetune is not None:
            window = "ssast data prepare --clip-s cuts labelled recordings, ssast data manifests "
            window += "--window-s those with marked events"
            for name, given, remedy in (
                ("train.checkpoint", self.train.checkpoint, "set finetune.checkpoint"),
                ("data.window_s", data.window_s, window),
                ("data.mix", data.mix, "name one labelled set, data.train"),
                ("train.spike_factor", self.train.spike_factor, "fine-tuning goes by epochs"),
            ):
                if given is not None:
                    raise ConfigError(f"{name} is for pretraining: {remedy}")
            self.finetune.check_grid(rows, columns)
            return
        OBJECTIVES.check(self.objective.kind)
        if self.optim.schedule == "multistep":
            raise ConfigError("optim.schedule multistep needs epochs: it is for fine-tuning alone")
        check_objective(self.objective, self.grid)
        if self.objective.kind == "latent" and self.optim.schedule == "plateau":
            raise ConfigError(
                "optim.schedule plateau follows the validation loss, which says little where "
                "targets move (objective.kind latent): use cosine or constant"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows (frequency) and columns (time) of the patch grid."""
        patch = self.model.patch
        rows, columns = (self.finetune and self.finetune.stride) or patch
        return (
            (self.audio.n_mels - patch[0]) // rows + 1,
            (self.audio.num_frames - patch[1]) // columns + 1,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of a clip in training: extra tokens, and the patches that are not dropped."""
        rows, columns = self.grid
        finetune = self.finetune
        patches = finetune.kept_patches(rows, columns, columns) if finetune else rows * columns
        return EXTRA_TOKENS[self.model.extra_tokens] + patches


def load_config(name: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Load a configuration and apply ``section.key=value`` overrides.

    The config.yaml of a run is of the folder that it lies in, from whatever working directory it is
    named and wherever the run was moved to: ``run.folder`` is that folder, unless overridden.

    Args:
        name: Path of a YAML file, or the name of one in configs/ without its extension.
        overrides: Settings that take precedence over the file's; their values are YAML.

    Raises:
        ConfigError: There is no such file, it is not YAML, or a key, type or value is wrong.
    """
    path = _find(name)
    try:
        raw = parse_yaml(read_text(path, YAML_BYTES))
    except DataError as error:
        raise ConfigError(str(error)) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {one_line(error)}") from error
    raw = _mapping({} if raw is None else raw, str(path))
    if is_of_run(path):
        run = _mapping(raw.get("run") or {}, "run")
        if not _is_folder(run.get("folder"), path.parent):
            raw["run"] = run | {"folder": str(path.parent)}
    stated = dict.fromkeys(_leaves(raw), path.name)
    for override in overrides:
        _override(raw, override)
        key = override.partition("=")[0].strip()
        named = [name for name in _leaves(raw) if f"{name}.".startswith(f"{key}.")]
        stated |= dict.fromkeys(named, OVERRIDE)
    if "objective.num_masked" not in stated and "finetune" not in raw:
        raw["objective"] = (raw.get("objective") or {}) | {"num_masked": _default_masked(raw)}
    config = replace(_build(Config, with_home(raw), ""), stated=stated)
    if config.finetune is not None:
        METRICS.check(config.finetune.metric)
    if config.run.folder is None:
        stem = path.parent.name if path.name == "config.yaml" else path.stem
        config = replace(config, run=replace(config.run, folder=str(Path("runs") / stem)))
    return config


def dump_config(config: Config | dict[str, Any]) -> str:
    """Return the configuration as YAML, from which ``load_config`` loads it again."""
    plain = to_plain(config) if isinstance(config, Config) else config
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    # PyYAML reads U+0085 as a line break, unless it is escaped.
    return text if "\x85" not in text else yaml.safe_dump(plain, sort_keys=False)


def to_plain(config: Any) -> dict[str, Any]:
    """Convert a configuration to nested dicts and lists, as YAML and JSON hold them."""
    plain: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(config, Config) and (value is None or key == "stated"):
            continue  # a pretraining run has no section finetune
        if dataclasses.is_dataclass(value):
            plain[key] = to_plain(value)
        else:
            plain[key] = list(value) if isinstance(value, tuple) else value
    return plain


def from_plain(raw: dict[str, Any], stated: Mapping[str, str] | None = None) -> Config:
    """Convert nested dicts and lists to a configuration, with every check."""
    return replace(_build(Config, raw, ""), stated=stated)


def section_from_plain(cls: type[Section], raw: Any, name: str) -> Section:
    """Convert a dict to the dataclass of one section, with every check."""
    return _build(cls, raw, f"{name}.")


def with_data(
    config: Config, train: str | Path, valid: str | Path | None, folder: str | Path | None
) -> Config:
    """Return the configuration of a run on other clips; in its own folder if ``folder`` is None."""
    data = replace(config.data, train=str(train), valid=None if valid is None else str(valid))
    run = config.run if folder is None else replace(config.run, folder=str(folder))
    stated = {**(config.stated or {}), "data.train": OVERRIDE, "data.valid": OVERRIDE}
    return replace(config, data=data, run=run, stated=stated)


def check_paths(config: Config) -> None:
    """Check that the relative paths of a configuration lead somewhere from the working directory.

    Raises:
        ConfigError: One does not: the run was perhaps begun in another directory.
    """
    data, finetune = config.data, config.finetune
    paths = [("data.train", data.train), ("data.valid", data.valid)]
    paths += [("data.mix", name) for name in data.mix or ()]
    paths += [("data.sample_weights", data.sample_weights)]
    if finetune is not None:
        keys = ("labels", "test", "folds")
        paths += [(f"finetune.{key}", getattr(finetune, key)) for key in keys]
    for key, path in paths:
        if path is None or "://" in path or Path(path).is_absolute() or Path(path).exists():
            continue
        how = "change to another directory, or give an absolute path"
        how = "ssast data demo makes it" if path.startswith("data/demo/") else how
        where = f"the working directory {Path.cwd()}, which relative paths start from"
        raise ConfigError(f"{key}: {path} is not in {where}: {how}")


def is_of_run(path: Path) -> bool:
    """Return whether a file is the configuration that a run stored in its folder."""
    written = ("environment.json", "metrics.jsonl", "checkpoints")
    return path.name == "config.yaml" and any((path.parent / name).exists() for name in written)


def _is_folder(named: object, folder: Path) -> bool:
    """Return whether what a configuration names is this folder."""
    is_path = isinstance(named, str) and named and "\0" not in named
    return bool(is_path) and folder.resolve() == Path(str(named)).resolve()


def _find(name: str | Path) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        hint = f", perhaps {path / 'config.yaml'}" if (path / "config.yaml").is_file() else ""
        raise ConfigError(f"{path}: no such configuration file{hint}")
    named = CONFIGS / f"{name}.yaml"
    if named.is_file():
        return named
    names = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    raise ConfigError(f"no configuration {str(name)!r}{_nearest(str(name), names)}")


def _override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not key or not all(sections):
        raise ConfigError(f"expected section.key=value, got {override!r}")
    literal = _takes_text(dotted.strip()) and not text.strip().startswith(("'", '"'))
    try:
        value = parse_yaml(text)
    except ValueError as error:
        if not literal:
            raise ConfigError(f"{dotted}: {text!r} is not YAML: {one_line(error)}") from error
        value = text
    if literal and (
        isinstance(value, str | dict | list) or (value is None and text.strip() not in NULLS)
    ):
        value = text.strip()  # in a path, " #" is no comment, and ": " makes no mapping
    node = raw
    for section in sections:
        below = node.get(section)
        node[section] = {} if below is None else _mapping(below, section)
        node = node[section]
    node[key] = value


def _default_masked(raw: Mapping[str, Any]) -> int:
    audio = _build(Audio, raw.get("audio") or {}, "audio.")
    model = _build(Model, raw.get("model") or {}, "model.")
    patches = num_patches(audio.n_mels, audio.num_frames, model.patch)
    objective = _mapping(raw.get("objective") or {}, "objective")
    return masked_patches(published_share(objective.get("kind")), patches)


def _leaves(raw: Mapping[str, Any]) -> list[str]:
    """Return the keys ``section.key`` of a mapping of sections."""
    return [
        f"{section}.{key}"
        for section, values in raw.items()
        for key in (values if isinstance(values, dict) else ())
    ]


def _takes_text(dotted: str) -> bool:
    """Return whether the value of a key ``section.key`` is text, such as a path."""
    section, _, key = dotted.partition(".")
    cls = sections().get(section)
    hint = typing.get_type_hints(cls).get(key) if dataclasses.is_dataclass(cls) else None
    return hint is str or str in typing.get_args(hint)


def _build(cls: Any, raw: Any, prefix: str) -> Any:
    raw = _mapping(raw, prefix.rstrip(".") or "the configuration")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "stated"}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in fields:
            key = key if isinstance(key, str) and len(key) < 100 else shown(key)
            known = [f"{prefix}{name}" for name in fields] if prefix else [*fields, *_all_keys()]
            raise ConfigError(f"unknown key {prefix}{key}{_nearest(f'{prefix}{key}', known)}")
        if value is None and dataclasses.is_dataclass(hints[key]):
            value = {}  # a section whose lines are all commented out
        values[key] = _convert(hints[key], value, f"{prefix}{key}")
        _check_range(values[key], fields[key], f"{prefix}{key}")
    return cls(**values)


def _convert(hint: Any, value: Any, key: str) -> Any:
    args = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    if typing.get_origin(hint) is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            known = [arg if isinstance(arg, str) else str(arg).lower() for arg in args]
            near = _nearest(value if isinstance(value, str) else shown(value), known)
            raise ConfigError(f"{key} must be one of {', '.join(known)}, got {shown(value)}{near}")
        return value
    if isinstance(hint, types.UnionType):  # every union in the settings is "X | None"
        inner = next(a for a in args if a is not type(None))
        return None if value is None else _convert(inner, value, key)
    if typing.get_origin(hint) is tuple and args[-1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} must be a list, got {shown(value)}")
        return tuple(_convert(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise ConfigError(f"{key} must be a list of {len(args)}, got {shown(value)}")
        return tuple(
            _convert(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if typing.get_origin(hint) is Mapping:  # its keys are the user's
        named = {
            name if isinstance(name, str) else shown(name): item
            for name, item in _mapping(value, key).items()
        }
        return {name: _convert(args[1], item, f"{key}[{name}]") for name, item in named.items()}
    if hint is float and isinstance(value, str):  # YAML 1.1 loads 1e-4, without a dot, as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not hint or not _is_plain(value):
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{key} must be {names[hint]}, got {shown(value)}")
    return value


def _is_plain(value: Any) -> bool:
    """Return whether a value can be used: no number without bounds, no text with a NUL."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return not isinstance(value, str) or "\0" not in value


def _check_range(value: Any, f: "dataclasses.Field[Any]", key: str) -> None:
    if isinstance(value, float) and not f.metadata and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {value!r}")
    if not f.metadata or value is None:
        return
    low, high = f.metadata["low"], f.metadata["high"]
    numbers = value.values() if isinstance(value, dict) else value
    for number in numbers if isinstance(value, tuple | dict) else (value,):
        if not low <= number <= high or number == math.inf:
            bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ConfigError(f"{key} must be {bounds}, got {shown(number)}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping of keys to values, got {shown(value)}")
    return value


def sections() -> dict[str, Any]:
    """Return the dataclasses of the sections of a configuration, by name."""
    hints = typing.get_type_hints(Config) | {"finetune": Finetune}
    return {name: hint for name, hint in hints.items() if name != "stated"}


def _all_keys() -> list[str]:
    return [f"{s}.{f.name}" for s, cls in sections().items() for f in dataclasses.fields(cls)]


def _nearest(name: str, known: Sequence[str]) -> str:
    by_last: dict[str, str] = {}  # so that "steps" finds train.steps
    for n in known:
        by_last.setdefault(n.rsplit(".", 1)[-1], n)
    near = difflib.get_close_matches(name, [*known, *by_last], n=1, cutoff=0.5)
    if near:
        return f"; did you mean {by_last.get(near[0], near[0])}?"
    return f"; known: {', '.join([n for n in known if '.' not in n] or known)}"


def finetune_settings(config: Config) -> Finetune:
    """Return the section ``finetune``.

    Raises:
        ConfigError: It is a configuration for pretraining.
    """
    if config.finetune is None:
        raise ConfigError(
            "this configuration has no section finetune: it is for ssast pretrain; see the "
            "recipes, such as classifier or esc50_patch"
        )
    return config.finetune
