"""A classifier on top of the encoder: mean of the tokens, LayerNorm, Linear."""

from typing import Literal

from torch import Tensor, nn

from ssast.engine.model import NUM_EXTRA_TOKENS, SpectrogramTransformer
from ssast.kernels.masking import no_masks


def pool(hidden: Tensor, pooling: Literal["avgtok", "cls"]) -> Tensor:
    """One vector a clip, [B, D], from hidden states [B, 2 + N, D].

    ``avgtok`` is the mean of the patch tokens (published default), ``cls`` that of cls and dist.
    """
    if pooling == "avgtok":
        return hidden[:, NUM_EXTRA_TOKENS:].mean(1)
    return hidden[:, :NUM_EXTRA_TOKENS].mean(1)


class Classifier(nn.Module):
    """Filterbanks [B, T, F] to logits [B, classes]."""

    def __init__(
        self,
        encoder: SpectrogramTransformer,
        num_classes: int,
        pooling: Literal["avgtok", "cls"] = "avgtok",
    ):
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.head = nn.Sequential(
            nn.LayerNorm(encoder.embed_dim), nn.Linear(encoder.embed_dim, num_classes)
        )

    def forward(self, fbank: Tensor) -> Tensor:
        """Logits [B, classes] of log-mel filterbanks [B, T, F] before normalisation."""
        return self.head(embed_clips(self.encoder, fbank, self.pooling))


def embed_clips(
    encoder: SpectrogramTransformer, fbank: Tensor, pooling: Literal["avgtok", "cls"] = "avgtok"
) -> Tensor:
    """One vector a clip, [B, D], of log-mel filterbanks [B, T, F] with nothing masked."""
    rows, columns = encoder.embed.grid
    masks = no_masks(len(fbank), rows * columns, fbank.device)
    hidden, _ = encoder(fbank, masks)
    return pool(hidden, pooling)
