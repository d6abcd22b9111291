"""The published model's interface, for scripts that were written for the published code.

Its constructor, tasks, attributes and names of parameters, on our operations: batched masks and
losses, and the project's attention. Import it in place of the published one:

    from ssast.engine.api import ASTModel
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssast.engine.checkpoints.weights import check_names, check_shapes
from ssast.engine.errors import CheckpointError
from ssast.engine.formats.published import detect_layout, read_published
from ssast.engine.model.encoder import NUM_EXTRA_TOKENS, SpectrogramTransformer, resize_pos_embed
from ssast.engine.settings import SIZES, Audio, Model
from ssast.kernels.masking import Masks, draw_masks, masks_from_ids
from ssast.kernels.mspm_loss import info_nce, mse
from ssast.kernels.patch_embed import cut_patches, join_patches, patch_embed, patch_grid, take

# Names that versions of the published code have had for a size.
_ALIASES = {"tiny224": "tiny", "small224": "small", "base224": "base", "base384": "base"}
_ONE_TOKEN = "base_nokd"  # base without DeiT's distillation: cls alone, no dist, no second head
_IMAGENET_CLASSES = 1000
_SHOWN = 99.0  # what visualize_mask paints over a patch, as published
_TASKS = ("ft_avgtok", "ft_cls", "pretrain_mpc", "pretrain_mpg", "visualize_mask")


class PatchEmbed(nn.Module):
    """Patch embedding: images [B, 1, F, T] to tokens [B, N, D]."""

    def __init__(self, projection: nn.Conv2d, num_patches: int):
        super().__init__()
        self.proj, self.num_patches = projection, num_patches

    def forward(self, image: Tensor) -> Tensor:
        """Embed [B, 1, F, T] to [B, N, D]; gradients flow to the image."""
        return self.proj(image).flatten(2).transpose(1, 2)


class Trunk(nn.Module):
    """The transformer with timm's names and ImageNet's heads, which nothing uses.

    Args:
        encoder: Encoder whose parameters are shared.
        num_extra: Number of tokens before those of the patches: cls and dist, or cls alone.
    """

    def __init__(self, encoder: SpectrogramTransformer, num_extra: int = NUM_EXTRA_TOKENS):
        super().__init__()
        embed, width = encoder.embed, encoder.embed_dim
        projection = nn.Conv2d(1, width, embed.patch, stride=embed.stride)
        projection.weight, projection.bias = embed.weight, embed.bias
        self.patch_embed = PatchEmbed(projection, embed.grid[0] * embed.grid[1])
        self.cls_token, self.pos_embed = embed.cls_token, embed.pos_embed
        if num_extra == NUM_EXTRA_TOKENS:
            self.dist_token = embed.dist_token
        else:
            positions = torch.cat(
                (embed.pos_embed[:, :1], embed.pos_embed[:, NUM_EXTRA_TOKENS:]), 1
            )
            self.pos_embed = nn.Parameter(positions.detach())
        self.pos_drop = nn.Dropout(0.0)
        self.blocks, self.norm = encoder.blocks, encoder.norm
        self.head = nn.Linear(width, _IMAGENET_CLASSES)
        if num_extra == NUM_EXTRA_TOKENS:
            self.head_dist = nn.Linear(width, _IMAGENET_CLASSES)

    @property
    def extra_tokens(self) -> Tensor:
        """[1, E, D]: cls, and dist if there is one."""
        if hasattr(self, "dist_token"):
            return torch.cat((self.cls_token, self.dist_token), 1)
        return self.cls_token

    def encode(self, tokens: Tensor) -> Tensor:
        """Encode tokens that have their positions to hidden states [B, E + N, D]."""
        tokens = self.pos_drop(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class ASTModel(nn.Module):
    """The published model, to pretrain or to fine-tune.

    Args:
        label_dim: Number of classes of a fine-tuned model.
        fshape: Mel bins of a patch.
        tshape: Frames of a patch.
        fstride: Mel bins between two patches; ``fshape`` in pretraining.
        tstride: Frames between two patches; ``tshape`` in pretraining.
        input_fdim: Mel bins of the input.
        input_tdim: Frames of the input.
        model_size: One of tiny, small, base, base_nokd, large, huge, giant.
        pretrain_stage: Build a model to pretrain; False: one to fine-tune, from a file.
        load_pretrained_mdl_path: File of a pretrained model, to fine-tune.

    Raises:
        CheckpointError: The file is no pretrained model, or its size or patch is another. See
            :func:`~ssast.engine.formats.published.read_published`.
        ValueError: Arguments that are wrong or do not belong together.
    """

    def __init__(
        self,
        label_dim: int = 527,
        fshape: int = 128,
        tshape: int = 2,
        fstride: int = 128,
        tstride: int = 2,
        input_fdim: int = 128,
        input_tdim: int = 1024,
        model_size: str = "base",
        pretrain_stage: bool = True,
        load_pretrained_mdl_path: str | Path | None = None,
    ):
        super().__init__()
        size = "base" if model_size == _ONE_TOKEN else _ALIASES.get(model_size, model_size)
        if size not in SIZES:
            known = ", ".join((*SIZES, _ONE_TOKEN))
            raise ValueError(f"model_size must be one of {known}, got {model_size!r}")
        patch, stride, shape = (fshape, tshape), (fstride, tstride), (input_fdim, input_tdim)
        if pretrain_stage and load_pretrained_mdl_path is not None:
            raise ValueError(
                "load_pretrained_mdl_path must be None with pretrain_stage=True: pretraining "
                f"begins from scratch, got {str(load_pretrained_mdl_path)!r}"
            )
        if pretrain_stage and stride != patch:
            raise ValueError(
                f"patches may not overlap in pretraining: fstride, tstride must be {patch}, "
                f"got {stride}"
            )
        if not pretrain_stage and load_pretrained_mdl_path is None:
            raise ValueError("load_pretrained_mdl_path must name a file with pretrain_stage=False")
        grid = patch_grid(*shape, patch, stride)
        if min(*grid, *stride) < 1:
            raise ValueError(f"no {fshape} x {tshape} patch fits into {shape[0]} x {shape[1]}")
        self.fshape, self.tshape, self.fstride, self.tstride = *patch, *stride
        self.input_fdim, self.input_tdim = shape
        self.f_dim, self.t_dim = grid
        self.cls_token_num = 1 if model_size == _ONE_TOKEN else NUM_EXTRA_TOKENS
        self.num_patches = grid[0] * grid[1]
        self.original_embedding_dim = D = SIZES[size].embed_dim
        if load_pretrained_mdl_path is None:
            self.heads, self.depth = SIZES[size].num_heads, SIZES[size].depth
            self.p_f_dim, self.p_t_dim = grid
            self.v = _trunk(size, None, patch, stride, shape, self.cls_token_num)
            # Parameters, so that the state dict has them; never trained.
            self.p_input_fdim = nn.Parameter(torch.tensor(input_fdim), requires_grad=False)
            self.p_input_tdim = nn.Parameter(torch.tensor(input_tdim), requires_grad=False)
            self.mask_embed = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, 1, D)))
            P = fshape * tshape
            self.cpredlayer = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, P))
            self.gpredlayer = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, P))
        else:
            self._load(Path(load_pretrained_mdl_path), size, patch, stride, shape)
            self.mlp_head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, label_dim))

    def _load(
        self,
        path: Path,
        size: str,
        patch: tuple[int, int],
        stride: tuple[int, int],
        shape: tuple[int, int],
    ) -> None:
        """Load the trunk of a pretrained model, its positions cut or interpolated."""
        state = read_published(path)
        layout = detect_layout(state, path)
        if layout.input is None:
            raise CheckpointError(f"{path}: expected a pretrained model, p_input_fdim is missing")
        if (layout.size, layout.num_extra) != (size, self.cls_token_num):
            expected = size if self.cls_token_num == NUM_EXTRA_TOKENS else _ONE_TOKEN
            found = layout.size if layout.num_extra == NUM_EXTRA_TOKENS else _ONE_TOKEN
            raise CheckpointError(f"{path}: model_size is {found}, expected {expected}")
        if layout.patch != patch:
            raise CheckpointError(
                f"{path}: fshape x tshape is {layout.patch[0]} x {layout.patch[1]}, "
                f"expected {patch[0]} x {patch[1]}"
            )
        self.heads, self.depth = SIZES[size].num_heads, layout.depth
        self.p_f_dim, self.p_t_dim = old = patch_grid(*layout.input, patch, patch)
        self.v = _trunk(size, layout.depth, patch, stride, shape, layout.num_extra)
        weights = {n: t for n, t in state.items() if n.startswith("v.")}
        own = {f"v.{name}" for name in self.v.state_dict()}
        optional = {n for n in own if n.startswith(("v.head.", "v.head_dist."))}
        check_names(sorted(own - optional), sorted(set(weights) - optional), path)
        pos_embed = weights["v.pos_embed"].float()
        spare = NUM_EXTRA_TOKENS - self.cls_token_num  # filled up, for a function of two tokens
        pos_embed = nn.functional.pad(pos_embed, (0, 0, spare, 0))
        resized = resize_pos_embed(pos_embed, old, (self.f_dim, self.t_dim))
        weights["v.pos_embed"] = resized[:, spare:]
        check_shapes(self, weights, path)
        self.load_state_dict(weights, strict=False)  # but for the optional ones: names are checked

    def forward(
        self,
        x: Tensor,
        task: str,
        cluster: bool = True,
        mask_patch: int = 400,
        mask_ids: Tensor | None = None,
    ) -> Any:
        """Run a task on a batch.

        Args:
            x: [B, T, F] normalised filterbanks.
            task: ``ft_avgtok`` or ``ft_cls``: logits [B, classes] from the mean of the patch
                tokens, or of cls and dist. ``pretrain_mpc``: accuracy and InfoNCE loss.
                ``pretrain_mpg``: mean squared error. ``visualize_mask``: two images [B, 1, F, T]
                with the masked patches painted, 99 where one was identified and 0 where not; and
                99 everywhere.
            cluster: Mask clusters of patches, not single ones.
            mask_patch: Number of patches to mask.
            mask_ids: [B, M] ids of the patches to mask; drawn from PyTorch's generator if None.

        Raises:
            ValueError: An unknown task, one that this stage of the model has not, or a mask or an
                input that does not fit.
        """
        if task not in _TASKS:
            raise ValueError(f"task must be one of {', '.join(_TASKS)}, got {task!r}")
        needed = "mlp_head" if task.startswith("ft_") else "cpredlayer"
        if not hasattr(self, needed):
            other = needed == "cpredlayer"
            raise ValueError(f"task {task!r} needs a model with pretrain_stage={other}")
        patch, stride = (self.fshape, self.tshape), (self.fstride, self.tstride)
        if x.ndim != 3 or patch_grid(x.shape[2], x.shape[1], patch, stride) != (
            self.f_dim,
            self.t_dim,
        ):
            raise ValueError(
                f"x must be [B, {self.input_tdim}, {self.input_fdim}], got {list(x.shape)}"
            )
        if task == "ft_avgtok":
            return self.finetuningavgtok(x.transpose(1, 2).unsqueeze(1))
        if task == "ft_cls":
            return self.finetuningcls(x.transpose(1, 2).unsqueeze(1))
        masks = self._masks(len(x), cluster, mask_patch, mask_ids, x.device)
        targets, hidden = self._encode_masked(x, masks)
        if task == "pretrain_mpg":
            return mse(targets, self.gpredlayer(hidden)).mean()
        predictions = self.cpredlayer(hidden)
        if task == "pretrain_mpc":
            nce, accuracy = info_nce(targets, predictions)
            return accuracy.mean(), nce.mean()
        return self._paint(x, masks, targets, predictions)

    def finetuningavgtok(self, image: Tensor) -> Tensor:
        """Classify images [B, 1, F, T] by the mean of the patch tokens; logits [B, classes]."""
        return self.mlp_head(self._encode(image)[:, self.cls_token_num :].mean(1))

    def finetuningcls(self, image: Tensor) -> Tensor:
        """Classify images [B, 1, F, T] by the mean of cls and dist; logits [B, classes]."""
        return self.mlp_head(self._encode(image)[:, : self.cls_token_num].mean(1))

    def _encode(self, image: Tensor) -> Tensor:
        v = self.v
        extra = v.extra_tokens.expand(len(image), -1, -1)
        return v.encode(torch.cat((extra, v.patch_embed(image)), 1) + v.pos_embed)

    def _encode_masked(self, x: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """Return the masked patches [B, M, P], in ascending order, and their hidden states."""
        v, projection = self.v, self.v.patch_embed.proj
        assert projection.bias is not None
        tokens, targets = patch_embed(
            x,
            projection.weight,
            projection.bias,
            self.mask_embed.flatten(),
            v.pos_embed,
            v.extra_tokens,
            masks,
            mean=0.0,  # normalised already
            std=0.5,
            stride=(self.fstride, self.tstride),
        )
        return targets, take(v.encode(tokens), masks.mask_ids + self.cls_token_num)

    def _masks(
        self, B: int, cluster: bool, num_masked: int, mask_ids: Tensor | None, device: torch.device
    ) -> Masks:
        if mask_ids is not None:
            if mask_ids.ndim != 2 or len(mask_ids) != B:
                raise ValueError(f"mask_ids must be [{B}, M], got {list(mask_ids.shape)}")
            return masks_from_ids(mask_ids.to(device), self.num_patches)
        clips = torch.randint(2**31, (B,))
        return draw_masks(
            clips.to(device),
            torch.zeros_like(clips, device=device),
            seed=int(torch.randint(2**31, ())),
            kind="official" if cluster else "random",
            grid=(self.f_dim, self.t_dim),
            num_masked=num_masked,
        )

    def _paint(
        self, x: Tensor, masks: Masks, targets: Tensor, predictions: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = (targets @ predictions.transpose(1, 2)).softmax(2)
        hit = scores.argmax(1) == torch.arange(scores.shape[1], device=x.device)  # as published
        patch, grid, images = (self.fshape, self.tshape), (self.f_dim, self.t_dim), []
        for paint in (hit * _SHOWN, torch.full_like(scores[:, 0], _SHOWN)):
            patches = cut_patches(x, patch, patch).clone()
            ids = masks.mask_ids[..., None].expand(-1, -1, patches.shape[2])
            patches.scatter_(1, ids, paint[..., None].to(x.dtype).expand(ids.shape))
            image = torch.zeros_like(x)  # 0 beyond the last whole patch, as published
            whole = join_patches(patches, grid, patch)
            image[:, : whole.shape[1], : whole.shape[2]] = whole
            images.append(image.transpose(1, 2).unsqueeze(1))
        return images[0], images[1]


def _trunk(
    size: Any,
    depth: int | None,
    patch: tuple[int, int],
    stride: tuple[int, int],
    shape: tuple[int, int],
    num_extra: int,
) -> Trunk:
    model, audio = (
        Model(size=size, patch=patch, depth=depth),
        Audio(n_mels=shape[0], num_frames=shape[1]),
    )
    return Trunk(SpectrogramTransformer(model, audio, stride), num_extra)
