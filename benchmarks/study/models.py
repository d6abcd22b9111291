"""Models of ``ssast bench reproduce``: what is pretrained, and how."""

from dataclasses import dataclass
from typing import Literal

FAMILIES = ("patch", "frame")
COMPARISON = 0.1  # fraction of the pretraining steps for the comparison of the objectives
SHORT = 0.03  # and for each pretraining of an ablation
LATENT_MASKED = 307  # of 512: as in eat_demo
LATENT_ENCODER = ("model.positions=sincos", "model.extra_tokens=cls", "model.norm=post")


@dataclass(frozen=True)
class Model:
    """A model that is fine-tuned.

    Attributes:
        name: Name of its folders.
        what: Description.
        family: ``patch`` or ``frame``.
        share: Fraction of the plan's pretraining steps; 0: from scratch.
        num_masked: Masked patches, of 512.
        changes: Overrides of the published pretraining settings.
        tuned: Whether its learning rate is searched; else that of the patch model is used.
        replicated: Whether each seed of fine-tuning has a pretraining of its own.
        recipe: Recipe of its encoder and its objective.
        budget: What it has as much of as the patch model: pretraining steps, FLOPs or time.
        probed: Whether its layers are probed.
        untrained: Whether those of an untrained encoder like it are, too.
        step: Step of its pretraining whose kept weights it has; None: those at the end.
    """

    name: str
    what: str
    family: str = "patch"
    share: float = 1.0
    num_masked: int = 400
    changes: tuple[str, ...] = ()
    tuned: bool = True
    replicated: bool = False
    recipe: str = "demo"
    budget: Literal["steps", "flops", "time"] = "steps"
    probed: bool = False
    untrained: bool = False
    step: int | None = None

    def run(self, seed: int = 0) -> str:
        """Return the name of the pretraining that a seed of fine-tuning begins from."""
        name = self.name if self.step is None else self.name.removesuffix(f"-step{self.step}")
        return f"{name}-seed{seed}" if self.replicated and seed else name


def _ablation(name: str, what: str, *changes: str, num_masked: int = 400) -> Model:
    return Model(name, what, "patch", SHORT, num_masked, changes, tuned=False, replicated=True)


def _latent(
    name: str,
    what: str,
    budget: Literal["steps", "flops", "time"] = "steps",
    share: float = COMPARISON,
) -> Model:
    return Model(
        name,
        what,
        share=share,
        num_masked=LATENT_MASKED,
        changes=("train.batch_size=12", "optim.lr=1e-3"),  # each clip is seen under several masks
        recipe="eat_demo",
        budget=budget,
        probed=share > 0,
        untrained=budget == "flops",
    )


GROUPS: tuple[tuple[Model, ...], ...] = (
    (
        Model("patch", "patch, pretrained", probed=True, untrained=True),
        Model("patch-scratch", "patch, from scratch", share=0.0),
    ),
    (
        Model("frame", "frame, pretrained", "frame", probed=True, untrained=True),
        Model("frame-scratch", "frame, from scratch", "frame", 0.0),
    ),
    (
        Model("joint", "joint", share=COMPARISON, probed=True, untrained=True),
        Model(
            "joint-encoder",
            "joint, with the encoder of latent targets",
            share=COMPARISON,
            changes=LATENT_ENCODER,
            probed=True,
        ),
        _latent("latent-flops", "latent targets, as many FLOPs", "flops"),
        _latent("latent-time", "latent targets, as much time", "time"),
        _latent("latent-scratch", "encoder of latent targets, from scratch", share=0.0),
    ),
    (
        _ablation("short", "joint, 400 of 512 masked"),
        _ablation("generative", "generative only", "objective.kind=generative"),
        _ablation("discriminative", "discriminative only", "objective.kind=discriminative"),
        _ablation("masked-100", "100 of 512 masked", num_masked=100),
        _ablation("masked-250", "250 of 512 masked", num_masked=250),
    ),
)
MODELS = {model.name: model for group in GROUPS for model in group}
OBJECTIVES, ABLATIONS = GROUPS[2:]
JOINT, JOINT_ENCODER, *LATENT, LATENT_SCRATCH = OBJECTIVES
