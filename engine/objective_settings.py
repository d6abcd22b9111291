"""Settings of the pretraining objective: every key with its default, its range and its meaning.

The docstrings below the fields are what the settings page of the documentation shows.
"""

from dataclasses import dataclass
from typing import Literal

from ssast.engine.errors import ConfigError
from ssast.engine.settings import setting


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Pretraining objective: masked spectrogram patch modelling (MSPM)."""

    kind: str = "joint"
    """InfoNCE loss (`discriminative`), MSE loss of the reconstruction (`generative`), or their
    weighted sum (`joint`); or the name of an objective of your own."""

    num_masked: int = setting(400, 2)
    """Number of masked patches in each clip. Where a configuration file does not set it, the
    published share: 400 of 512 patches."""

    mask: Literal["official", "uniform", "random", "inverse_blocks"] = "official"
    """How masked patches are drawn: clusters as in the published code, clusters at uniformly
    distributed positions, single patches uniformly, or all but blocks of 5 x 5 visible patches
    (`inverse_blocks`, as in EAT)."""

    softmax_axis: Literal["official", "paper"] = "official"
    """Axis of the InfoNCE softmax: over the predictions (published code) or over the targets
    (equation 1 of the paper)."""

    two_pass: bool = False
    """Compute each of the two losses in a forward pass of its own, with its own mask, as the
    published code does; otherwise they share one."""

    mse_weight: float = setting(10.0, 0.0)
    """Weight of the MSE loss in the joint objective."""


def check_objective(objective: Objective, grid: tuple[int, int]) -> None:
    """Check what depends on more than one key of the objective, and on the grid of patches.

    Raises:
        ConfigError: Two keys exclude each other, or more patches are masked than there are.
    """
    rows, columns = grid
    # The published generator never masks the first and the last patch.
    most = rows * columns - (2 if objective.mask == "official" else 1)
    if objective.num_masked > most:
        raise ConfigError(
            f"objective.num_masked must be at most {most} of the {rows} x {columns} = "
            f"{rows * columns} patches, got {objective.num_masked}"
        )
    if objective.two_pass and objective.kind != "joint":
        raise ConfigError(f"objective.two_pass needs objective.kind joint, got {objective.kind!r}")
