"""The encoder in plain PyTorch, token by token as it is defined: the reference of its options.

It shares no code with the encoder, is fed its weights by name, and computes in their dtype.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ssast.engine.settings import Audio, Model


def plain_positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of each patch's row and column, [N, D] float64, number by number."""
    quarter = width // 4
    table = []
    for row in range(rows):
        for column in range(columns):
            values: list[float] = []
            for place in (row, column):
                angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
                values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            table.append(values)
    return torch.tensor(table, dtype=torch.float64)


def _norm(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _attention(weights: Mapping[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(0, 1)
        for part in _linear(weights, f"{name}.qkv", x).chunk(3, -1)
    )
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return _linear(weights, f"{name}.proj", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def plain_tokens(
    weights: Mapping[str, Tensor], model: Model, audio: Audio, clip: Tensor, masked: list[int]
) -> tuple[Tensor, Tensor]:
    """Tokens [E + N, D] of one clip [T, F] before any block, and its masked patches [M, P]."""
    height, width = model.patch
    rows, columns = audio.n_mels // height, audio.num_frames // width
    image = ((clip - audio.mean) / (2 * audio.std)).T
    patches = [
        image[r * height : (r + 1) * height, c * width : (c + 1) * width].flatten()
        for r in range(rows)
        for c in range(columns)
    ]
    kernel = weights["embed.weight"].flatten(1)
    tokens = [kernel @ patch + weights["embed.bias"] for patch in patches]
    for index in masked:
        tokens[index] = weights["embed.mask_embed"].flatten()
    extra = [weights["embed.cls_token"].flatten()]
    if model.extra_tokens == "cls_dist":
        extra.append(weights["embed.dist_token"].flatten())
    if model.positions == "learned":
        x = torch.stack([*extra, *tokens]) + weights["embed.pos_embed"][0]
    else:
        positions = plain_positions(rows, columns, kernel.shape[0]).to(kernel.dtype)
        x = torch.cat((torch.stack(extra), torch.stack(tokens) + positions))
    return x, torch.stack([patches[index] for index in masked]) if masked else clip.new_empty(0)


def plain_blocks(
    weights: Mapping[str, Tensor], model: Model, x: Tensor, heads: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Hidden states of the tokens [L, D] of one clip.

    Returns:
        The last hidden states, those before the first block and after each, and what the MLP of
        each block adds.
    """
    is_post = model.norm == "post"
    x = _norm(weights, "embed_norm", x) if is_post else x
    states, outputs = [x], []
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for block in (f"blocks.{index}" for index in range(depth)):

        def mlp(y: Tensor, block: str = block) -> Tensor:
            hidden = functional.gelu(_linear(weights, f"{block}.mlp.fc1", y))
            return _linear(weights, f"{block}.mlp.fc2", hidden)

        if is_post:
            update = _attention(weights, f"{block}.attn", x, heads)
            x = _norm(weights, f"{block}.norm1", x + update)
            outputs.append(mlp(x))
            x = _norm(weights, f"{block}.norm2", x + outputs[-1])
        else:
            y = _norm(weights, f"{block}.norm1", x)
            x = x + _attention(weights, f"{block}.attn", y, heads)
            outputs.append(mlp(_norm(weights, f"{block}.norm2", x)))
            x = x + outputs[-1]
        states.append(x)
    return (x if is_post else _norm(weights, "norm", x)), states, outputs
