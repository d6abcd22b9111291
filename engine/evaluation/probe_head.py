"""A linear head on frozen features, with layer weights and attentive pooling learned beside it.

The features of a clip are [L, T, D]: L layers, T columns. Each feature of each layer is
standardised over the training clips; the layers are summed with softmax weights, as SUPERB does
(Yang et al. 2021); the columns are averaged, or pooled by attention with a learned query; and the
result goes through a linear layer. All of it is trained together by L-BFGS on the cross entropy
over all clips, from zeros: equal weights, equal attention. Nothing is random.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

Pooling = Literal["mean", "attentive"]
MAX_ITERATIONS = 150


@dataclass(frozen=True)
class Features:
    """Features of n clips.

    Attributes:
        values: [n, L, T, D] float32, 0 after the end of each clip.
        counts: [n] valid columns of each clip, at least one.
    """

    values: np.ndarray
    counts: np.ndarray

    def take(self, rows: np.ndarray) -> "Features":
        """Return a copy of the features of some clips."""
        return Features(self.values[rows], self.counts[rows])

    def layer(self, number: int) -> "Features":
        """Return the features of one layer, as a view."""
        return Features(self.values[:, number : number + 1], self.counts)

    def mean(self) -> "Features":
        """Average the valid columns, to T = 1."""
        if self.values.shape[2] == 1:
            return self
        means = self.values.sum(2, keepdims=True) / self.counts[:, None, None, None]
        return Features(means.astype(np.float32), np.ones_like(self.counts))

    def valid(self) -> np.ndarray:
        """Return which columns are valid, [n, T] bool."""
        return np.arange(self.values.shape[2]) < self.counts[:, None]


@dataclass(frozen=True)
class Scaler:
    """Mean and standard deviation of each feature of each layer, [L, D] float32."""

    mean: np.ndarray
    std: np.ndarray

    @staticmethod
    def of(features: Features) -> "Scaler":
        """Measure them over the valid columns."""
        # Layer by layer: of all of them in float64 there could be too many.
        columns = (features.values[:, k][features.valid()] for k in range(len_layers(features)))
        moments = [(x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)) for x in columns]
        mean, std = (np.stack(part).astype(np.float32) for part in zip(*moments, strict=True))
        return Scaler(mean, np.where(std > 1e-10, std, 1).astype(np.float32))

    def apply(self, features: Features) -> Features:
        """Standardise features, in place."""
        features.values[...] -= self.mean[:, None]
        features.values[...] /= self.std[:, None]
        features.values[...] *= features.valid()[:, None, :, None]
        return features


def len_layers(features: Features) -> int:
    """Return the number of layers L."""
    return features.values.shape[1]


@dataclass(frozen=True)
class Head:
    """A trained head.

    Attributes:
        scaler: What standardises the features.
        layer_logits: [L], the softmax of which weighs the layers.
        query: [D], with which columns are pooled; zeros for their mean.
        weight: [C, D] of the linear layer.
        bias: [C].
    """

    scaler: Scaler
    layer_logits: Tensor
    query: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def layer_weights(self) -> tuple[float, ...]:
        """Weights of the layers, which sum to 1."""
        return tuple(self.layer_logits.softmax(0).tolist())

    @torch.no_grad()
    def predict(self, features: Features, batch_size: int = 256) -> np.ndarray:
        """Return the number of the most likely class of each clip, [n]."""
        found = []
        for first in range(0, len(features.counts), batch_size):
            rows = np.arange(first, min(first + batch_size, len(features.counts)))
            part = self.scaler.apply(features.take(rows))
            parameters = (self.layer_logits, self.query, self.weight, self.bias)
            found.append(_logits(*_tensors(part), *parameters).argmax(1).numpy())
        return np.concatenate(found)


def fit_head(
    features: Features, labels: np.ndarray, num_classes: int, c: float, pooling: Pooling
) -> Head:
    """Train a head.

    It minimises the mean cross entropy plus (|W|^2 + |q|^2 + |a|^2) / (2 c n), with the query q and
    the layer logits a, which for one layer and the mean is the multinomial logistic regression of
    scikit-learn with C = c.

    Args:
        features: Features of n clips, a copy: they are standardised in place.
        labels: [n] int64, the number of each clip's class.
        num_classes: Number of classes C.
        c: Inverse of the regularisation strength, as in scikit-learn.
        pooling: Pooling of the columns.
    """
    scaler = Scaler.of(features)
    values, valid = _tensors(scaler.apply(features))
    targets = torch.from_numpy(labels)
    layers, width = values.shape[1], values.shape[3]
    learned = {
        "layer_logits": (layers,) if layers > 1 else (0,),
        "query": (width,) if pooling == "attentive" else (0,),
        "weight": (num_classes, width),
        "bias": (num_classes,),
    }
    sizes = [int(np.prod(shape)) for shape in learned.values()]

    def parameters(flat: Tensor) -> list[Tensor]:
        parts = zip(flat.split(sizes), learned.values(), strict=True)
        found = [part.reshape(shape) for part, shape in parts]
        # What is not learned stays zero.
        found[0] = found[0] if layers > 1 else torch.zeros(1)
        found[1] = found[1] if pooling == "attentive" else torch.zeros(width)
        return found

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.from_numpy(point).float().requires_grad_()
        logits, query, weight, bias = parameters(flat)
        outputs = _logits(values, valid, logits, query, weight, bias)
        squares = sum(part.square().sum() for part in (logits, query, weight))
        penalty = squares / (2 * c * len(labels))
        total = torch.nn.functional.cross_entropy(outputs, targets) + penalty
        total.backward()
        assert flat.grad is not None
        return total.item(), flat.grad.double().numpy()

    with torch.enable_grad():
        limits = {"maxiter": MAX_ITERATIONS, "ftol": 1e-7, "gtol": 1e-5}
        start = np.zeros(sum(sizes))
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=limits)
    return Head(scaler, *parameters(torch.from_numpy(found.x).float()))


def _tensors(features: Features) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(features.values), torch.from_numpy(features.valid())


def _logits(
    values: Tensor,
    valid: Tensor,
    layer_logits: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Return the logits [n, C] of standardised features [n, L, T, D]."""
    if len(layer_logits) == 1:
        summed = values[:, 0]
    else:
        summed = torch.einsum("l,nltd->ntd", layer_logits.softmax(0), values)
    scores = (summed @ query / summed.shape[2] ** 0.5).masked_fill(~valid, -torch.inf)
    pooled = torch.einsum("nt,ntd->nd", scores.softmax(1), summed)
    return torch.nn.functional.linear(pooled, weight, bias)
