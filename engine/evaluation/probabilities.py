"""Probabilities and the classes that are chosen by them, from logits.

What ranks, thresholds or shows scores comes from here, and follows the loss of the training alone,
never how many labels the clips happen to have.
"""

from collections.abc import Sequence

import numpy as np
import torch

THRESHOLD = 0.5  # of a probability, above which a sigmoid chooses a class


def probabilities(logits: np.ndarray, loss: str) -> np.ndarray:
    """Turn logits [..., C] into probabilities: softmax for ``ce``, sigmoid for ``bce``."""
    given = torch.from_numpy(np.ascontiguousarray(logits))
    return (given.softmax(-1) if loss == "ce" else given.sigmoid()).numpy()


def chosen_classes(logits: np.ndarray, loss: str) -> np.ndarray:
    """Choose classes from logits [n, C], [n, C] bool.

    For ``ce`` the most likely one of each clip, for ``bce`` all above :data:`THRESHOLD`.
    """
    if loss == "ce":
        return logits.argmax(-1)[:, None] == np.arange(logits.shape[-1])
    return probabilities(logits, loss) > THRESHOLD


def top_classes(scores: np.ndarray, classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """Return the classes with the highest of some scores [C], and these scores."""
    order = np.argsort(-scores, kind="stable")[:count]
    return [(classes[i], float(scores[i])) for i in order]
