"""Encoders by ``model.backbone``, and the base of those with blocks of one's own."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssast.engine.errors import ConfigError
from ssast.engine.model.embedding import SharedTokens
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.registry import BACKBONES
from ssast.engine.settings import Audio, Model
from ssast.kernels.attention import PaddingMask
from ssast.kernels.patch_embed import take


def build_encoder(
    model: Model, audio: Audio, stride: tuple[int, int] | None = None
) -> SpectrogramTransformer:
    """Build the encoder of a configuration with fresh weights.

    Args:
        model: Backbone, size and patch.
        audio: Settings of the input.
        stride: Patch stride in mel bins and frames; no overlap if None.

    Raises:
        ConfigError: ``model.backbone`` is not known, or is no encoder.
    """
    found = BACKBONES.load(model.backbone)
    if not (isinstance(found, type) and issubclass(found, SpectrogramTransformer)):
        raise ConfigError(
            f"model.backbone {model.backbone!r}: expected a subclass of Backbone, got {found!r}"
        )
    encoder = found(model, audio, stride)
    encoder.backbone = model.backbone
    return encoder


def check_transformer(encoder: SpectrogramTransformer, format_name: str) -> None:
    """Check that a format can hold an encoder.

    Raises:
        ConfigError: Its backbone is another one.
    """
    if encoder.backbone != "transformer":
        raise ConfigError(
            f"{format_name} holds the transformer of SSAST alone, got model.backbone "
            f"{encoder.backbone!r}"
        )


class Backbone(SpectrogramTransformer):
    """An encoder with blocks of one's own between SSAST's patch embedding and last norm.

    A subclass overrides :meth:`build_block`; in it ``self.embed.grid`` has the rows and columns of
    the patches, which follow the ``num_extra_tokens`` extra tokens row by row.
    """

    def __init__(self, model: Model, audio: Audio, stride: tuple[int, int] | None = None):
        if model.norm != "pre":
            raise ConfigError(
                f"model.norm: expected pre with a model.backbone of one's own, got {model.norm!r}"
            )
        super().__init__(model, audio, stride)

    def build_block(self, embed_dim: int, num_heads: int) -> nn.Module:
        """Build one block, called ``model.depth`` times.

        Its call is given tokens [B, E + N, D] and the keyword ``padding_mask`` (None, or which
        tokens are padding, for :func:`~ssast.kernels.attention.attention`), and returns tokens
        [B, E + N, D].
        """
        raise NotImplementedError

    def _encode(
        self,
        tokens: Tensor,
        padding_mask: PaddingMask | None,
        query_ids: Tensor | None = None,
        shared: SharedTokens | None = None,
        mlp_outputs: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Apply blocks and norm to all tokens, also where only those of ``query_ids`` are needed.

        Raises:
            ConfigError: ``mlp_outputs`` of blocks that may have no MLP.
        """
        if mlp_outputs:
            raise ConfigError(
                f"model.backbone {self.backbone!r}: the outputs of each block's MLP are those of "
                "the transformer alone"
            )
        every = self.activation_checkpoint_every if self.training else None
        for index, block in enumerate(self.blocks):
            if every and index % every == 0:
                tokens = checkpoint(block, tokens, use_reentrant=False, padding_mask=padding_mask)
            else:
                tokens = block(tokens, padding_mask=padding_mask)
        return self.norm(tokens if query_ids is None else take(tokens, query_ids)), []
