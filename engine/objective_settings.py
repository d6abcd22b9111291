"""Settings of the pretraining objective: every key with its default, its range and its meaning.

The docstrings below the fields are what the settings page of the documentation shows.
"""

from dataclasses import dataclass
from typing import Literal

from ssast.engine.errors import ConfigError
from ssast.engine.settings import setting


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Pretraining objective: masked spectrogram patch modelling (MSPM) or latent targets (EAT)."""

    kind: str = "joint"
    """InfoNCE loss (`discriminative`), MSE loss of the reconstruction (`generative`), or their
    weighted sum (`joint`); `latent`: MSE loss of what an EMA teacher makes of the whole clip, as in
    EAT; or the name of an objective of your own."""

    num_masked: int = setting(400, 2)
    """Number of masked patches in each clip. Where a configuration file does not set it, the
    published share: 400 of 512 patches, with `latent` 410."""

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

    clones: int = setting(16, 1, 64)
    """latent: number of masks of a clip in a step, each with a forward pass of the student, for one
    of the teacher."""

    decoder_depth: int = setting(6, 1, 64)
    """latent: number of convolutional layers of the decoder."""

    teacher_decay: tuple[float, float] = setting((0.9998, 0.99999), 0.0, 0.9999999)
    """latent: decay of the exponential moving average (EMA) of the encoder's weights, the teacher:
    at the first step and after `teacher_decay_steps`, linear in between. The average reaches back
    over some 1 / (1 - decay) steps: shorter runs need smaller ones."""

    teacher_decay_steps: int = setting(100_000, 1)
    """latent: optimizer steps over which the decay rises."""

    min_target_std: float = setting(0.1, 0.0)
    """latent: the run ends when the targets of all patches become alike (collapse): when their
    standard deviation over the patches of a batch, averaged over channels, is below this in
    `collapse_reports` log lines in a row after the warm-up. 0: never."""

    min_prediction_std: float = setting(0.01, 0.0)
    """latent: the same of the predictions."""

    collapse_reports: int = setting(5, 1)
    """latent: number of log lines in a row that show a collapse before the run ends."""


MSPM = ("joint", "discriminative", "generative")
OF_ALL = ("kind", "num_masked", "mask")
OF_MSPM = ("softmax_axis", "two_pass", "mse_weight")
OF_GUARD = ("min_target_std", "min_prediction_std", "collapse_reports")
OF_LATENT = ("clones", "decoder_depth", "teacher_decay", "teacher_decay_steps", *OF_GUARD)


def settings_of(kind: str) -> tuple[str, ...]:
    """Return the keys of the section that an objective uses; all of them if it is not ours."""
    if kind == "latent":
        return OF_ALL + OF_LATENT
    return OF_ALL + OF_MSPM if kind in MSPM else OF_ALL + OF_MSPM + OF_LATENT


def published_share(kind: object) -> float:
    """Return the share of the patches that the published recipe of an objective masks."""
    return (410 if kind == "latent" else 400) / 512


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
    for name, default in vars(Objective()).items():
        if name not in settings_of(objective.kind) and getattr(objective, name) != default:
            kinds = "latent" if name in OF_LATENT else ", ".join(MSPM)
            raise ConfigError(
                f"objective.{name} is for objective.kind {kinds}, got {objective.kind!r}"
            )
    first, last = objective.teacher_decay
    if first > last:
        raise ConfigError(f"objective.teacher_decay must not fall, got [{first:g}, {last:g}]")
