"""Latent targets in float64, clip by clip and clone by clone, with formulas and loops alone.

It uses nothing of the engine. Run as a program, it writes tests/golden/latent.json.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from paths import GOLDEN
from torch import Tensor

GROUPS = 16


@dataclass(frozen=True)
class Case:
    """A model and its input."""

    grid: tuple[int, int] = (4, 6)
    patch: tuple[int, int] = (16, 16)
    mean: float = -1.0
    std: float = 2.0
    width: int = 192
    heads: int = 3
    depth: int = 2
    decoder_depth: int = 2
    learned: bool = False
    dist: bool = False
    post: bool = True

    @property
    def extra(self) -> int:
        return 1 + self.dist

    @property
    def norm(self) -> str:
        return "embed_norm" if self.post else "norm"


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights, by the engine's names."""
    D, E = case.width, case.extra
    found = {
        "encoder.embed.weight": (D, 1, *case.patch),
        "encoder.embed.bias": (D,),
        "encoder.embed.cls_token": (1, 1, D),
        "encoder.embed.mask_embed": (1, 1, D),
        f"encoder.{case.norm}.weight": (D,),
        f"encoder.{case.norm}.bias": (D,),
        "decoder.proj.weight": (D, D),
        "decoder.proj.bias": (D,),
    }
    if case.dist:
        found["encoder.embed.dist_token"] = (1, 1, D)
    if case.learned:
        found["encoder.embed.pos_embed"] = (1, E + case.grid[0] * case.grid[1], D)
    for i in range(case.depth):
        for name, out, into in (
            ("attn.qkv", 3 * D, D),
            ("attn.proj", D, D),
            ("mlp.fc1", 4 * D, D),
            ("mlp.fc2", D, 4 * D),
        ):
            found[f"encoder.blocks.{i}.{name}.weight"] = (out, into)
            found[f"encoder.blocks.{i}.{name}.bias"] = (out,)
        for name in ("norm1", "norm2"):
            found[f"encoder.blocks.{i}.{name}.weight"] = (D,)
            found[f"encoder.blocks.{i}.{name}.bias"] = (D,)
    for i in range(case.decoder_depth):
        found[f"decoder.layers.{i}.conv.weight"] = (D, D // GROUPS, 3, 3)
        found[f"decoder.layers.{i}.conv.bias"] = (D,)
    return found


def numbers(shape: Sequence[int], seed: int) -> Tensor:
    """Numbers in (-1, 1) that look random: a formula of integers, the same on any machine."""
    i = torch.arange(math.prod(shape), dtype=torch.int64) + 1
    mixed = (i * i % 1_000_003 * 7919 + i * 104_729 + (seed + 1) * 15_485_863) % 2_147_483_647
    mixed = (mixed % 1_000_003) * (mixed % 999_983) % 1_000_033
    return (mixed.double() / 1_000_033 * 2 - 1).view(tuple(shape))


def weights(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep signals of a size of 1, in float64."""
    found = {}
    for number, (name, shape) in enumerate(sorted(shapes(case).items())):
        x = numbers(shape, 1000 * seed + number)
        if name.endswith("norm.weight") or ".norm1.weight" in name or ".norm2.weight" in name:
            found[name] = 1 + 0.2 * x
        elif len(shape) == 1:
            found[name] = 0.1 * x
        else:
            fan_in = 1 if "embed.weight" not in name and shape[0] == 1 else math.prod(shape[1:])
            found[name] = x * math.sqrt(3 / fan_in)
    return found


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def normed(x: Tensor, axis: int, eps: float) -> Tensor:
    """Mean 0 and variance 1 along an axis."""
    count = x.shape[axis]
    centred = x - x.sum(axis, keepdim=True) / count
    return centred / torch.sqrt((centred * centred).sum(axis, keepdim=True) / count + eps)


class Reference:
    """The model of a case with given weights; clips are [T, F], masks lists of ids."""

    def __init__(self, case: Case, weights: Mapping[str, Tensor]):
        self.case, self.weights = case, weights

    def position(self, patch_id: int) -> Tensor:
        """Position embedding of a patch, [D]."""
        case = self.case
        if case.learned:
            return self.weights["encoder.embed.pos_embed"][0, case.extra + patch_id]
        halves = []
        for x in divmod(patch_id, case.grid[1]):
            quarter = case.width // 4
            angles = [x / 10000 ** (i / quarter) for i in range(quarter)]
            halves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        return torch.tensor(halves, dtype=torch.float64)

    def token(self, clip: Tensor, patch_id: int) -> Tensor:
        """The embedded token of a patch, [D]."""
        case = self.case
        (f, t), (row, column) = case.patch, divmod(patch_id, case.grid[1])
        x = clip[column * t : (column + 1) * t, row * f : (row + 1) * f].T
        x = (x - case.mean) / (2 * case.std)
        weight, bias = self.weights["encoder.embed.weight"], self.weights["encoder.embed.bias"]
        return (weight[:, 0] * x).sum((1, 2)) + bias + self.position(patch_id)

    def extra_tokens(self) -> list[Tensor]:
        names = ["cls_token", "dist_token"][: self.case.extra]
        tokens = [self.weights[f"encoder.embed.{name}"][0, 0] for name in names]
        if self.case.learned:
            positions = self.weights["encoder.embed.pos_embed"][0]
            tokens = [token + positions[i] for i, token in enumerate(tokens)]
        return tokens

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return normed(x, 1, 1e-6) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, x: Tensor, name: str) -> Tensor:
        D, H = self.case.width, self.case.heads
        qkv, size, heads = self.linear(x, f"{name}.qkv"), D // H, []
        for h in range(H):
            q, k, v = (qkv[:, i * D + h * size : i * D + (h + 1) * size] for i in range(3))
            scores = torch.exp(q @ k.T / math.sqrt(size))
            heads.append(scores / scores.sum(1, keepdim=True) @ v)
        return self.linear(torch.cat(heads, 1), f"{name}.proj")

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(gelu(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def encode(self, tokens: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """States [L, D] after the last block, and the MLP output of each block."""
        x, outputs = torch.stack([*self.extra_tokens(), *tokens]), []
        if self.case.post:
            x = self.norm(x, f"encoder.{self.case.norm}")
        for i in range(self.case.depth):
            name = f"encoder.blocks.{i}"
            if self.case.post:
                x = self.norm(x + self.attention(x, f"{name}.attn"), f"{name}.norm1")
                outputs.append(self.mlp(x, f"{name}.mlp"))
                x = self.norm(x + outputs[-1], f"{name}.norm2")
            else:
                x = x + self.attention(self.norm(x, f"{name}.norm1"), f"{name}.attn")
                outputs.append(self.mlp(self.norm(x, f"{name}.norm2"), f"{name}.mlp"))
                x = x + outputs[-1]
        return x if self.case.post else self.norm(x, f"encoder.{self.case.norm}"), outputs

    def targets(self, clip: Tensor, columns: int) -> dict[int, Tensor]:
        """Targets [D] of the patches of the first columns, by id."""
        rows, width = self.case.grid
        ids = [row * width + column for row in range(rows) for column in range(columns)]
        _, outputs = self.encode([self.token(clip, i) for i in ids])
        whitened = [normed(output[self.case.extra :], 0, 1e-5) for output in outputs]
        mean = sum(whitened[1:], whitened[0]) / len(whitened)
        return dict(zip(ids, normed(mean, 1, 1e-5), strict=True))

    def decode(self, tokens: Mapping[int, Tensor], columns: int) -> dict[int, Tensor]:
        """Predictions [D] by patch, from what the decoder is given of each."""
        rows, width = self.case.grid
        x = torch.stack(
            [
                torch.stack([tokens[row * width + column] for column in range(columns)])
                for row in range(rows)
            ]
        )  # [rows, columns, D]
        size = self.case.width // GROUPS
        for layer in range(self.case.decoder_depth):
            weight = self.weights[f"decoder.layers.{layer}.conv.weight"]
            around = torch.zeros(rows + 2, columns + 2, self.case.width, dtype=torch.float64)
            around[1:-1, 1:-1] = x
            groups = []
            for g in range(GROUPS):
                channels = slice(g * size, (g + 1) * size)
                total = self.weights[f"decoder.layers.{layer}.conv.bias"][channels]
                for i in range(3):
                    for j in range(3):
                        shifted = around[i : i + rows, j : j + columns, channels]
                        total = total + shifted @ weight[channels, :, i, j].T
                groups.append(total)
            x = x + gelu(normed(torch.cat(groups, 2), 2, 1e-5))
        found = self.linear(x.flatten(0, 1), "decoder.proj")
        ids = [row * width + column for row in range(rows) for column in range(columns)]
        return dict(zip(ids, found, strict=True))

    def losses(
        self,
        teacher: "Reference",
        clip: Tensor,
        masks: Sequence[Sequence[int]],
        noise: Sequence[Tensor],
        columns: int | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a clip, its targets and the predictions of its first clone.

        Args:
            teacher: The model whose MLP outputs are the targets.
            clip: [T, F].
            masks: Masked ids of each clone.
            noise: [N, D] of each clone, what the decoder is given for masked patches.
            columns: Columns before the padding; all of them if None.
        """
        columns = columns or self.case.grid[1]
        with torch.no_grad():
            targets = teacher.targets(clip, columns)
        whole = sum(targets.values()) / len(targets)
        latent, cls, first = [], [], None
        for masked, fill in zip(masks, noise, strict=True):
            visible = [i for i in targets if i not in set(masked)]
            states, _ = self.encode([self.token(clip, i) for i in visible])
            extra, patches = states[: self.case.extra], states[self.case.extra :]
            given = {i: fill[i] for i in masked} | dict(zip(visible, patches, strict=True))
            predicted = self.decode(given, columns)
            errors = torch.stack([(predicted[i] - targets[i]) ** 2 for i in masked])
            latent.append(errors.sum() / errors.numel())
            cls.append((((extra.sum(0) / len(extra)) - whole) ** 2).sum() / self.case.width)
            first = first if first is not None else torch.stack([predicted[i] for i in masked])
        losses = {"latent_loss": sum(latent) / len(latent), "cls_loss": sum(cls) / len(cls)}
        return {
            "loss": losses["latent_loss"] + losses["cls_loss"],
            **losses,
            "targets": torch.stack(list(targets.values())),
            "predictions": first,
        }


def spread(rows: Sequence[Tensor]) -> float:
    """Standard deviation over the rows of clips [n, D], each clip with the same weight."""
    mean = sum(x.sum(0) / len(x) for x in rows) / len(rows)
    square = sum((x * x).sum(0) / len(x) for x in rows) / len(rows)
    return float(torch.sqrt(square - mean * mean).sum() / len(mean))


def decay(step: int, first: float, last: float, steps: int) -> float:
    return last if step >= steps else first + (last - first) * step / steps


def golden_inputs(case: Case) -> tuple[Tensor, list[list[list[int]]], list[Tensor]]:
    """Two clips [2, T, F], the masks of two clones of each, and their noise [2, N, D]."""
    rows, columns = case.grid
    frames, mels = columns * case.patch[1], rows * case.patch[0]
    order = [
        sorted(range(rows * columns), key=lambda i, c=c: (i * 37 + c * 11) % 53) for c in range(4)
    ]
    masks = [sorted(ids[: rows * columns * 3 // 4]) for ids in order]
    noise = [0.01 * numbers((2, rows * columns, case.width), 90 + b) for b in range(2)]
    return 3 * numbers((2, frames, mels), 77), [masks[:2], masks[2:]], noise


def golden() -> dict[str, object]:
    """The numbers of the first case: losses, spreads, and norms of gradients of their mean."""
    case = Case()
    clips, masks, noise = golden_inputs(case)
    own = {name: x.requires_grad_() for name, x in weights(case).items()}
    student, teacher = Reference(case, own), Reference(case, weights(case, seed=1))
    found = [student.losses(teacher, *given) for given in zip(clips, masks, noise, strict=True)]
    loss = sum(x["loss"] for x in found) / len(found)
    loss.backward()
    return {
        "losses": {
            name: [float(x[name].detach()) for x in found]
            for name in ("loss", "latent_loss", "cls_loss")
        },
        "target_std": spread([x["targets"] for x in found]),
        "prediction_std": spread([x["predictions"].detach() for x in found]),
        "targets": found[1]["targets"][5, ::24].tolist(),
        "predictions": found[1]["predictions"].detach()[5, ::24].tolist(),
        "gradient_norms": {
            name: float(x.grad.norm()) for name, x in own.items() if x.grad is not None
        },
        "decays": {str(s): decay(s, 0.9998, 0.99999, 100_000) for s in (0, 1, 50_000, 200_000)},
    }


if __name__ == "__main__":
    (GOLDEN / "latent.json").write_text(json.dumps(golden(), indent=1) + "\n")
