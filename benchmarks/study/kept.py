"""Runs that a benchmark finds in its folder, and keeps if they had the same settings."""

from pathlib import Path

from ssast.engine.config import OVERRIDE, Config, load_config
from ssast.engine.errors import ConfigError
from ssast.engine.train.inputs import differences


def check_kept(config: Config) -> None:
    """Check that a run in ``run.folder``, if there is one, has the settings given now.

    The others are those of the recipe, some of which a run replaces by what it finds.

    Args:
        config: The configuration, of a recipe and overrides.

    Raises:
        ConfigError: A setting differs, or the run's config.yaml is damaged.
    """
    saved = Path(config.run.folder or "") / "config.yaml"
    if not saved.exists():
        return
    for name, (before, now) in differences(load_config(saved), config).items():
        if (config.stated or {}).get(name) == OVERRIDE and name != "run.folder":
            raise ConfigError(f"{saved} has {name} {before!r}, got {now!r}: choose another --out")
