"""Objectives, backbones and metrics by name: ours, and those of other packages.

A package names its own in entry points, which are found once it is installed:

    [project.entry-points."ssast.objectives"]
    "my_package.denoising" = "my_package.objectives:Denoising"

A program can also register them: ``register_objective("denoising", Denoising)``.
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ssast.engine.errors import ConfigError
from ssast.engine.objective_settings import MSPM
from ssast.pipelines.text import one_line, shown


class Registry:
    """What a setting can name.

    Args:
        setting: Key of the setting, ``section.key``.
        group: Group of the entry points.
        built_in: Ours, by name: ``module:attribute``, imported when it is needed; "" where the name
            alone says what to do.
    """

    def __init__(self, setting: str, group: str, built_in: Mapping[str, str]):
        self.setting, self.group, self._built_in = setting, group, dict(built_in)
        self._registered: dict[str, Any] = {}

    def register(self, name: str, found: Any) -> None:
        """Add one under a name, in this process; it replaces one that was registered before.

        Raises:
            ConfigError: The name is one of ours.
        """
        if name in self._built_in:
            raise ConfigError(f"{self.setting}: {name!r} is built in: choose another name")
        self._registered[name] = found

    def names(self) -> list[str]:
        """Return all names, ours first."""
        return list(dict.fromkeys([*self._built_in, *self._registered, *sorted(self._installed())]))

    def is_built_in(self, name: str) -> bool:
        """Return whether a name is one of ours."""
        return name in self._built_in

    def check(self, name: str) -> None:
        """Check that there is something of this name; nothing is imported.

        Raises:
            ConfigError: There is not; the message lists the names.
        """
        # Packages are looked through only for a name that is not ours.
        if name in self._built_in or name in self._registered or name in self._installed():
            return
        known = self.names()
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        if "." in name and not near:
            hint = "; is the package installed that has it?"
        raise ConfigError(
            f"{self.setting} must be one of {', '.join(known)}, got {shown(name)}{hint}"
        )

    def check_elsewhere(self, name: str) -> None:
        """Check that another process finds what a name stands for.

        Raises:
            ConfigError: It is registered in this one alone.
        """
        if name in self._registered and name not in self._installed():
            raise ConfigError(
                f"{self.setting} {name!r} is registered in this process alone, expected one that "
                f"another process finds: name it in an entry point, {self.group}"
            )

    def load(self, name: str) -> Any:
        """Return what a name stands for.

        Raises:
            ConfigError: There is nothing of this name, or it cannot be imported.
        """
        self.check(name)
        if name in self._built_in:
            module, _, attribute = self._built_in[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name in self._registered:
            return self._registered[name]
        entry = self._installed()[name]
        try:
            return entry.load()
        except Exception as error:  # whatever another package's code raises
            raise ConfigError(
                f"{self.setting} {name!r}: {entry.value} cannot be imported: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error

    def _installed(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}


OBJECTIVES = Registry(
    "objective.kind",
    "ssast.objectives",
    {
        **dict.fromkeys(MSPM, "ssast.engine.model.objective:MSPM"),
        "latent": "ssast.engine.model.latent:Latent",
    },
)
BACKBONES = Registry(
    "model.backbone",
    "ssast.backbones",
    {"transformer": "ssast.engine.model.encoder:SpectrogramTransformer"},
)
METRICS = Registry(
    "finetune.metric", "ssast.metrics", dict.fromkeys(("auto", "accuracy", "map"), "")
)


def register_objective(name: str, model: type) -> None:
    """Let ``objective.kind`` name an objective, in this process.

    Args:
        name: Any name that is not built in.
        model: A subclass of :class:`~ssast.engine.model.objective.PretrainingModel`.

    Raises:
        ConfigError: The name is built in.
    """
    OBJECTIVES.register(name, model)


def register_backbone(name: str, encoder: type) -> None:
    """Let ``model.backbone`` name an encoder, in this process.

    Args:
        name: Any name that is not built in.
        encoder: A subclass of :class:`~ssast.engine.model.backbones.Backbone`.

    Raises:
        ConfigError: The name is built in.
    """
    BACKBONES.register(name, encoder)


def register_metric(name: str, metric: Callable[[Any, Any], float]) -> None:
    """Let ``finetune.metric`` name a metric, in this process.

    Args:
        name: Any name that is not built in.
        metric: Function of logits [n, C] and targets [n, C] of a split; the higher the better.

    Raises:
        ConfigError: The name is built in.
    """
    METRICS.register(name, metric)
