"""Precision of prediction and of embedding: fp32, or bf16 by autocast.

Under bf16, matmuls and attention have bf16 factors; the filterbank, softmax, LayerNorms, the
residual stream and pooled embeddings stay float32, and so do the weights of the model.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor

from ssast.engine.errors import ConfigError
from ssast.engine.model.classifier import Classifier, embed_clips
from ssast.engine.settings import Precision
from ssast.kernels.autocast import autocast_off
from ssast.kernels.matmul import multiplies_bf16

_log = logging.getLogger(__name__)


def autocast_in(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision.

    Args:
        precision: Of matmuls and attention. One warning says that the device has no bf16 matmul.
        device: Device of the model.

    Raises:
        ConfigError: The precision is unknown.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"precision: expected fp32 or bf16, found {precision!r}")
    if precision == "fp32":
        return nullcontext()
    _check_matmul(device)
    return torch.autocast(device.type, torch.bfloat16)


@cache
def _check_matmul(device: torch.device) -> None:
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = multiplies_bf16()
    if not native:
        kind = "GPU" if device.type == "cuda" else "CPU"
        _log.warning("precision bf16: this %s does not multiply bf16 natively: slower", kind)


def class_logits(classifier: Classifier, fbank: Tensor, num_frames: Tensor | None = None) -> Tensor:
    """Compute the logits [B, C] of filterbanks [B, T, F], float32 also under autocast.

    The head is small: rounding its factors would save nothing.

    Args:
        classifier: The classifier.
        fbank: [B, T, F] log-mel before normalisation.
        num_frames: [B], valid (unpadded) frames; None: all are valid.
    """
    embedded = embed_clips(classifier.encoder, fbank, classifier.pooling, num_frames)
    with autocast_off(fbank.device.type):
        return classifier.head(embedded)
