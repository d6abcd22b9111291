"""SSAST for transformers' ``AutoModel``, in one file that stands alone.

``ssast export --to hf`` copies it beside the weights of the models that transformers' own AST
cannot hold: frame patches, the mean of the patch tokens, fixed positions, one extra token,
post-norm blocks. Load such a folder with

    AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True)
"""

from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple


class SsastConfig(PretrainedConfig):
    """Sizes of the model; shapes and strides are (mel bins, frames).

    The length is ``num_frames``: transformers takes a ``max_length``, as AST calls it, for a
    setting of text generation and refuses to save it.
    """

    model_type = "ssast"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        patch_shape: tuple[int, int] = (128, 2),
        patch_stride: tuple[int, int] = (128, 2),
        num_mel_bins: int = 128,
        num_frames: int = 1024,
        pooling: str = "avgtok",
        positions: str = "learned",
        extra_tokens: str = "cls_dist",
        norm: str = "pre",
        layer_norm_eps: float = 1e-6,
        head_layer_norm_eps: float = 1e-5,
        **kwargs: Any,
    ):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.patch_shape, self.patch_stride = list(patch_shape), list(patch_stride)
        self.num_mel_bins, self.num_frames = num_mel_bins, num_frames
        self.pooling, self.positions = pooling, positions
        self.extra_tokens, self.norm = extra_tokens, norm
        self.layer_norm_eps, self.head_layer_norm_eps = layer_norm_eps, head_layer_norm_eps
        super().__init__(**kwargs)


@lru_cache(maxsize=4)
def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return fixed positions [N, D] float64: sines and cosines of the row, then of the column."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (
        torch.cat((angles.sin(), angles.cos()), 1)
        for angles in (torch.outer(torch.arange(n).double(), omega) for n in (rows, columns))
    )
    pairs = row[:, None].expand(-1, columns, -1), column.expand(rows, -1, -1)
    return torch.cat(pairs, 2).flatten(0, 1)


class SsastEmbed(nn.Module):
    """Patch embedding: normalised filterbanks [B, T, F] to tokens [B, E + N, D]."""

    def __init__(self, config: SsastConfig):
        super().__init__()
        D, sizes = config.hidden_size, (config.num_mel_bins, config.num_frames)
        self.input_shape = (config.num_frames, config.num_mel_bins)
        shape, self.stride = config.patch_shape, tuple(config.patch_stride)
        self.grid = rows, columns = tuple(
            (size - patch) // step + 1
            for size, patch, step in zip(sizes, shape, self.stride, strict=True)
        )
        self.weight = nn.Parameter(torch.zeros(D, 1, *shape))
        self.bias = nn.Parameter(torch.zeros(D))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.dist_token, self.pos_embed, self.num_extra = None, None, 1
        if config.extra_tokens == "cls_dist":
            self.dist_token, self.num_extra = nn.Parameter(torch.zeros(1, 1, D)), 2
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, self.num_extra + rows * columns, D))

    def extra_tokens(self) -> list[Tensor]:
        """Return the tokens before the patches, each [1, 1, D]: cls, and dist if there is one."""
        return [token for token in (self.cls_token, self.dist_token) if token is not None]

    def forward(self, x: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Embed [B, T, F] to [B, E + N, D], extra tokens first.

        Raises:
            ValueError: Another number of mel bins than the configuration's; of frames too, if the
                positions are not to be those of another length.
        """
        frames, mel_bins = self.input_shape
        resized = interpolate_pos_encoding and x.ndim == 3 and x.shape[1] >= self.weight.shape[3]
        if tuple(x.shape[1:]) != (x.shape[1] if resized else frames, mel_bins):
            raise ValueError(
                f"input_values: expected [batch, {frames}, {mel_bins}], got {list(x.shape)}; "
                "interpolate_pos_encoding=True allows other numbers of frames"
            )
        image = x.to(self.weight.dtype).transpose(1, 2).unsqueeze(1)
        patches = nn.functional.conv2d(image, self.weight, self.bias, self.stride)
        extra = (token.expand(len(x), -1, -1) for token in self.extra_tokens())
        tokens = torch.cat((*extra, patches.flatten(2).transpose(1, 2)), 1)
        return tokens + self.interpolate_pos_encoding(patches.shape[3])

    def interpolate_pos_encoding(self, columns: int) -> Tensor:
        """Return the position embeddings [1, E + N, D] of another number of columns of patches.

        Of learned ones, as in the published fine-tuning, the middle ones of fewer columns, and
        those of more by linear interpolation. Fixed ones are those of the grid.
        """
        rows, found = self.grid
        if self.pos_embed is None:
            fixed = sincos_positions(rows, columns, self.weight.shape[0]).to(self.weight)
            return nn.functional.pad(fixed, (0, 0, self.num_extra, 0))[None]
        if columns == found:
            return self.pos_embed
        extra, image = self.pos_embed.tensor_split([self.num_extra], 1)
        image = image.transpose(1, 2).unflatten(2, self.grid)
        if columns < found:
            image = image.narrow(3, found // 2 - columns // 2, columns)
        else:
            image = nn.functional.interpolate(image, (rows, columns), mode="bilinear")
        return torch.cat((extra, image.flatten(2).transpose(1, 2)), 1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, L, H, D / H] and the attention weights [B, H, L, L]."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(-1, dtype=torch.float32)
    weights = weights.to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class SsastAttention(nn.Module):
    """Multi-head self-attention, by the implementation that ``attn_implementation`` names."""

    is_causal = False  # read by transformers' implementations

    def __init__(self, config: SsastConfig):
        super().__init__()
        D = config.hidden_size
        self.config, self.num_heads = config, config.num_attention_heads
        self.scaling = (D // self.num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map [B, L, D] to [B, L, D], and to the weights [B, H, L, L] if eager."""
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        out, weights = attend(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            None,
            scaling=self.scaling,
            dropout=0.0,
        )
        return self.proj(out.flatten(2)), weights


class SsastMlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: SsastConfig):
        super().__init__()
        D = config.hidden_size
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class SsastBlock(GradientCheckpointingLayer):
    """One transformer block, pre-norm or post-norm."""

    def __init__(self, config: SsastConfig):
        super().__init__()
        self.is_post_norm = config.norm == "post"
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = SsastAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SsastMlp(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map [B, L, D] to [B, L, D], and to the attention weights."""
        if self.is_post_norm:
            out, weights = self.attn(x)
            x = self.norm1(x + out)
            return self.norm2(x + self.mlp(x)), weights
        out, weights = self.attn(self.norm1(x))
        x = x + out
        return x + self.mlp(self.norm2(x)), weights


class SsastPreTrainedModel(PreTrainedModel):
    """Base class: loading, saving, initialisation."""

    config_class = SsastConfig
    base_model_prefix = "encoder"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SsastEmbed", "SsastBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers guesses it from words in the source, others in each version

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, SsastEmbed):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            nn.init.zeros_(module.bias)
            for token in (*module.extra_tokens(), module.pos_embed):
                if token is not None:
                    nn.init.trunc_normal_(token, std=0.02)


class SsastModel(SsastPreTrainedModel):
    """The encoder: normalised filterbanks [B, T, F] to hidden states [B, E + N, D]."""

    def __init__(self, config: SsastConfig):
        super().__init__(config)
        self.embed = SsastEmbed(config)
        self.blocks = nn.ModuleList(SsastBlock(config) for _ in range(config.num_hidden_layers))
        norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        is_post_norm = config.norm == "post"
        self.embed_norm = norm if is_post_norm else nn.Identity()
        self.norm = nn.Identity() if is_post_norm else norm
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch embedding."""
        return self.embed

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Return hidden states and pooled ones; on request those between the blocks, and weights.

        With ``interpolate_pos_encoding`` the input may have another number of frames.

        Raises:
            ValueError: Attention weights of an implementation that has none, or a wrong shape.
        """
        wants_states = _chosen(output_hidden_states, self.config.output_hidden_states)
        wants_attentions = _chosen(output_attentions, self.config.output_attentions)
        if wants_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                "output_attentions: expected attn_implementation='eager', found "
                f"{self.config._attn_implementation!r}, which does not return the weights"
            )
        x = self.embed_norm(self.embed(input_values, interpolate_pos_encoding))
        states, attentions = [x], []
        for block in self.blocks:
            x, weights = block(x)
            states.append(x)
            attentions.append(weights)
        last = self.norm(x)
        extra, patches = last.tensor_split([self.embed.num_extra], 1)
        pooled = (patches if self.config.pooling == "avgtok" else extra).mean(1)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=tuple(states) if wants_states else None,
            attentions=tuple(attentions) if wants_attentions else None,
        )


class SsastForAudioClassification(SsastPreTrainedModel):
    """The encoder with a LayerNorm and a linear layer on its pooled hidden states."""

    # So that Trainer divides the loss by its steps of gradient accumulation, whatever the loss.
    accepts_loss_kwargs = False

    def __init__(self, config: SsastConfig):
        super().__init__(config)
        self.encoder = SsastModel(config)
        self.head = nn.Sequential(
            nn.LayerNorm(config.hidden_size, config.head_layer_norm_eps),
            nn.Linear(config.hidden_size, config.num_labels),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return logits [B, classes], and the loss of ``problem_type`` where labels are given.

        Labels are class numbers [B], or targets [B, classes]. Without a ``problem_type`` these
        mean the cross entropy and the binary cross entropy.
        """
        out = self.encoder(
            input_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
        )
        logits, loss = self.head(out.pooler_output), None
        if labels is not None:
            labels = labels.to(logits.dtype) if labels.ndim == 2 else labels
            loss = self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


def _chosen(given: bool | None, default: bool) -> bool:
    return default if given is None else given
