"""Check before a run starts that all ranks have the same configuration, code and clips."""

import hashlib
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ssast.engine.errors import ConfigError
from ssast.engine.parallel.ranks import World, gather_objects

PACKAGE = Path(__file__).resolve().parents[2]


def check_agreement(facts: Mapping[str, Any], world: World) -> None:
    """Compare facts between ranks. Collective.

    Args:
        facts: Facts of this rank, by name; nested mappings are compared key by key.
        world: This process's world.

    Raises:
        ConfigError: Ranks differ; raised on every rank, naming those that differ from most others.
    """
    descriptions = gather_objects((socket.gethostname(), _flat(facts)), world)
    problem = odd_ranks(descriptions)
    if problem is not None:
        raise ConfigError(problem)


def odd_ranks(descriptions: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """Return which rank differs from most others, in the first fact that is not the same for all.

    Args:
        descriptions: Machine and facts of each rank.
    """
    for name in dict.fromkeys(name for _, facts in descriptions for name in facts):
        values = [facts.get(name, "unknown") for _, facts in descriptions]
        common = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != common]
        if odd:
            host, value = descriptions[odd[0]][0], values[odd[0]]
            also = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
            return (
                f"the processes disagree: {name} is {value} on rank {odd[0]}{also}, machine "
                f"{host}, and {common} on {len(values) - len(odd)} of {len(values)}"
            )
    return None


@cache
def code_version() -> str:
    """Return a short hash of the sources of this package."""
    digest = hashlib.sha256()
    for folder in ("engine", "kernels", "pipelines"):
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            name = path.relative_to(PACKAGE).as_posix()
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value)
    return found
