"""Published checkpoints in and out.

The published code stores the state dict of a DataParallel model: ``module.v.*`` for the trunk with
timm's names, ``module.cpredlayer.*`` and ``module.gpredlayer.*`` for the two heads,
``module.mlp_head.*`` for a fine-tuned classifier, and two integers, ``p_input_fdim`` and
``p_input_tdim``.
"""

from torch import Tensor

# Ours -> published, without its "module."; the first prefix that fits counts.
_PREFIXES = {
    "encoder.embed.weight": "v.patch_embed.proj.weight",
    "encoder.embed.bias": "v.patch_embed.proj.bias",
    "encoder.embed.mask_embed": "mask_embed",
    "encoder.embed.": "v.",  # cls_token, dist_token, pos_embed
    "encoder.": "v.",  # blocks, norm
    "discriminative_head.": "cpredlayer.",
    "generative_head.": "gpredlayer.",
    "head.": "mlp_head.",
}
# ImageNet's heads, which no part of SSAST uses, and what the shapes say as well.
_IGNORED = ("v.head.", "v.head_dist.", "p_input_fdim", "p_input_tdim")


def published_name(name: str) -> str:
    """The published name, without ``module.``, of one of our parameters."""
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)


def from_published(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Weights under our names out of a published state dict.

    Args:
        state: Of a published model, with or without ``module.`` before the names.
        names: Parameters of ours that are wanted.

    Raises:
        ValueError: One is missing, or the state dict holds something that we do not know.
    """
    given = {name.removeprefix("module."): value for name, value in state.items()}
    wanted = {published_name(name): name for name in names}
    missing = [name for name in wanted if name not in given]
    surplus = [n for n in given if n not in wanted and not n.startswith(_IGNORED)]
    if missing or surplus:
        raise ValueError(
            f"not the state dict of this model: missing {missing or 'nothing'}, "
            f"unexpected {surplus or 'nothing'}"
        )
    return {ours: given[theirs] for theirs, ours in wanted.items()}


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as the published code's DataParallel model stores it."""
    return {f"module.{published_name(name)}": value for name, value in state.items()}
