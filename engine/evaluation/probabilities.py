"""Probabilities and the most likely classes, from logits."""

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, softmax


def probabilities(logits: np.ndarray, loss: str) -> np.ndarray:
    """Turn logits [..., C] into probabilities: softmax for ``ce``, sigmoid for ``bce``."""
    if loss == "ce":
        return softmax(logits, axis=-1)
    return expit(logits)


def top_classes(scores: np.ndarray, classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """Return the classes with the highest of some scores [C], and these scores."""
    order = np.argsort(-scores, kind="stable")[:count]
    return [(classes[i], float(scores[i])) for i in order]
