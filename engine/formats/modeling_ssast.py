"""SSAST for transformers' ``AutoModel``, in one file that stands alone.

``ssast export --to hf`` copies it beside the weights of the models that transformers' own AST
cannot hold: frame patches, and the mean of the patch tokens. Load such a folder with

    AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True)
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput


class SsastConfig(PretrainedConfig):
    """Sizes of the model; shapes and strides are (mel bins, frames)."""

    model_type = "ssast"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        patch_shape: tuple[int, int] = (128, 2),
        patch_stride: tuple[int, int] = (128, 2),
        num_mel_bins: int = 128,
        max_length: int = 1024,
        pooling: str = "avgtok",
        layer_norm_eps: float = 1e-6,
        head_layer_norm_eps: float = 1e-5,
        **kwargs: Any,
    ):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.patch_shape, self.patch_stride = list(patch_shape), list(patch_stride)
        self.num_mel_bins, self.max_length = num_mel_bins, max_length
        self.pooling = pooling
        self.layer_norm_eps, self.head_layer_norm_eps = layer_norm_eps, head_layer_norm_eps
        super().__init__(**kwargs)


class SsastEmbed(nn.Module):
    """Patch embedding: normalised filterbanks [B, T, F] to tokens [B, 2 + N, D]."""

    def __init__(self, config: SsastConfig):
        super().__init__()
        D, sizes = config.hidden_size, (config.num_mel_bins, config.max_length)
        shape, self.stride = config.patch_shape, tuple(config.patch_stride)
        rows, columns = (
            (size - patch) // step + 1
            for size, patch, step in zip(sizes, shape, self.stride, strict=True)
        )
        self.weight = nn.Parameter(torch.zeros(D, 1, *shape))
        self.bias = nn.Parameter(torch.zeros(D))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + rows * columns, D))

    def forward(self, x: Tensor) -> Tensor:
        """Embed [B, T, F] to [B, 2 + N, D], cls and dist first."""
        image = x.to(self.weight.dtype).transpose(1, 2).unsqueeze(1)
        patches = nn.functional.conv2d(image, self.weight, self.bias, self.stride)
        extra = (token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token))
        return torch.cat((*extra, patches.flatten(2).transpose(1, 2)), 1) + self.pos_embed


class SsastAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: SsastConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, D] to [B, L, D]."""
        heads = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(*heads.unbind())
        return self.proj(out.transpose(1, 2).flatten(2))


class SsastMlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: SsastConfig):
        super().__init__()
        D = config.hidden_size
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class SsastBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: SsastConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = SsastAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SsastMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, D] to [B, L, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SsastPreTrainedModel(PreTrainedModel):
    """Base class: loading, saving, initialisation."""

    config_class = SsastConfig
    base_model_prefix = "encoder"
    main_input_name = "input_values"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, SsastEmbed):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            for token in (module.cls_token, module.dist_token, module.pos_embed):
                nn.init.trunc_normal_(token, std=0.02)


class SsastModel(SsastPreTrainedModel):
    """The encoder: normalised filterbanks [B, T, F] to hidden states [B, 2 + N, D]."""

    def __init__(self, config: SsastConfig):
        super().__init__(config)
        self.embed = SsastEmbed(config)
        self.blocks = nn.ModuleList(SsastBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_init()

    def forward(
        self, input_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return hidden states, pooled ones, and on request those between the blocks."""
        x = self.embed(input_values)
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        last = self.norm(x)
        pooled = last[:, 2:].mean(1) if self.config.pooling == "avgtok" else last[:, :2].mean(1)
        wanted = output_hidden_states or self.config.output_hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=tuple(states) if wanted else None,
        )


class SsastForAudioClassification(SsastPreTrainedModel):
    """The encoder with a LayerNorm and a linear layer on its pooled hidden states."""

    def __init__(self, config: SsastConfig):
        super().__init__(config)
        self.encoder = SsastModel(config)
        self.head = nn.Sequential(
            nn.LayerNorm(config.hidden_size, config.head_layer_norm_eps),
            nn.Linear(config.hidden_size, config.num_labels),
        )
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return logits [B, classes], and for labels [B] or [B, classes] the cross entropy."""
        out = self.encoder(input_values, output_hidden_states=output_hidden_states)
        logits, loss = self.head(out.pooler_output), None
        if labels is not None and labels.ndim == 1:
            loss = nn.functional.cross_entropy(logits, labels)
        elif labels is not None:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
