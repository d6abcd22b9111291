"""The published model's interface, for scripts that were written for the published code.

Its constructor, tasks, attributes and names of parameters, on our operations: batched masks and
losses, and the project's attention. Import it in place of the published one:

    from ssast.engine.api import ASTModel
"""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssast.engine.checkpoints.weights import check_complete, check_tensors
from ssast.engine.errors import CheckpointError
from ssast.engine.formats.published import IMAGENET_HEADS, detect_layout, read_published
from ssast.engine.formats.timm_trunk import build_trunk
from ssast.engine.model.embedding import resize_pos_embed
from ssast.engine.settings import EXTRA_TOKENS, SIZES
from ssast.kernels.masking import Masks, draw_masks, masks_from_ids
from ssast.kernels.mspm_loss import info_nce, mse
from ssast.kernels.patch_embed import cut_patches, join_patches, patch_embed, patch_grid, take

# Names that versions of the published code have had for a size.
_ALIASES = {"tiny224": "tiny", "small224": "small", "base224": "base", "base384": "base"}
_ONE_TOKEN = "base_nokd"  # base without DeiT's distillation: cls alone, no dist, no second head
_PRETRAINING = ("mask_embed", "cpredlayer.", "gpredlayer.", "p_input_fdim", "p_input_tdim")
_SHOWN = 99.0  # what visualize_mask paints over a patch, as published
_TASKS = ("ft_avgtok", "ft_cls", "pretrain_mpc", "pretrain_mpg", "visualize_mask")


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
        extra_tokens = "cls" if model_size == _ONE_TOKEN else "cls_dist"
        self.cls_token_num = EXTRA_TOKENS[extra_tokens]
        self.num_patches = grid[0] * grid[1]
        self.original_embedding_dim = D = SIZES[size].embed_dim
        if load_pretrained_mdl_path is None:
            self.heads, self.depth = SIZES[size].num_heads, SIZES[size].depth
            self.p_f_dim, self.p_t_dim = grid
            self.v = build_trunk(size, None, patch, stride, shape, extra_tokens)
            # Parameters, so that the state dict has them; never trained.
            self.p_input_fdim = nn.Parameter(torch.tensor(input_fdim), requires_grad=False)
            self.p_input_tdim = nn.Parameter(torch.tensor(input_tdim), requires_grad=False)
            self.mask_embed = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, 1, D)))
            P = fshape * tshape
            self.cpredlayer = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, P))
            self.gpredlayer = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, P))
            # What scripts take from a model; nothing here needs it.
            self.unfold = nn.Unfold(patch, stride=stride)
            self.softmax, self.lsoftmax = nn.Softmax(dim=-1), nn.LogSoftmax(dim=-1)
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
        extra_tokens = "cls" if self.cls_token_num == 1 else "cls_dist"
        if (layout.size, layout.extra_tokens) != (size, extra_tokens):
            expected = _ONE_TOKEN if extra_tokens == "cls" else size
            found = _ONE_TOKEN if layout.extra_tokens == "cls" else layout.size
            raise CheckpointError(f"{path}: model_size is {found}, expected {expected}")
        if layout.patch != patch:
            raise CheckpointError(
                f"{path}: fshape x tshape is {layout.patch[0]} x {layout.patch[1]}, "
                f"expected {patch[0]} x {patch[1]}"
            )
        self.heads, self.depth = SIZES[size].num_heads, layout.depth
        self.p_f_dim, self.p_t_dim = old = patch_grid(*layout.input, patch, patch)
        self.v = build_trunk(size, layout.depth, patch, stride, shape, extra_tokens)
        own = {f"v.{name}" for name in self.v.state_dict()}
        weights = {name: value for name, value in state.items() if name in own}
        unused = (*IMAGENET_HEADS, *_PRETRAINING)
        needed = sorted(name for name in own if not name.startswith(IMAGENET_HEADS))
        check_complete(needed, [name for name in state if not name.startswith(unused)], path)
        pos_embed = weights["v.pos_embed"].float()
        new = (self.f_dim, self.t_dim)
        weights["v.pos_embed"] = resize_pos_embed(pos_embed, old, new, self.cls_token_num)
        check_tensors(self, weights, path)
        self.load_state_dict(weights, strict=False)  # but for ImageNet's heads: names are checked

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
        if x.ndim != 3:
            raise ValueError(self._wrong(x))
        image = x.transpose(1, 2).unsqueeze(1)
        if task == "ft_avgtok":
            return self.finetuningavgtok(image)
        if task == "ft_cls":
            return self.finetuningcls(image)
        if task == "pretrain_mpg":
            return self.mpg(image, mask_patch, cluster, mask_ids)
        return self.mpc(image, mask_patch, cluster, task == "visualize_mask", mask_ids)

    def finetuningavgtok(self, x: Tensor) -> Tensor:
        """Classify images [B, 1, F, T] by the mean of the patch tokens; logits [B, classes]."""
        return self.mlp_head(self._encode(x)[:, self.cls_token_num :].mean(1))

    def finetuningcls(self, x: Tensor) -> Tensor:
        """Classify images [B, 1, F, T] by the mean of cls and dist; logits [B, classes]."""
        return self.mlp_head(self._encode(x)[:, : self.cls_token_num].mean(1))

    def mpc(
        self,
        x: Tensor,
        mask_patch: int,
        cluster: bool,
        show_mask: bool = False,
        mask_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Identify the masked patches of images [B, 1, F, T].

        Args:
            x: Images [B, 1, F, T].
            mask_patch: See :meth:`forward`.
            cluster: See :meth:`forward`.
            show_mask: Return the two images of ``visualize_mask`` in place of the scores.
            mask_ids: See :meth:`forward`.

        Returns:
            Accuracy and InfoNCE loss.
        """
        spectrogram, masks = self._masked(x, mask_patch, cluster, mask_ids)
        targets, hidden = self._encode_masked(spectrogram, masks)
        predictions = self.cpredlayer(hidden)
        if show_mask:
            return self._paint(spectrogram, masks, targets, predictions)
        nce, accuracy = info_nce(targets, predictions)
        return accuracy.mean(), nce.mean()

    def mpg(
        self, input: Tensor, mask_patch: int, cluster: bool, mask_ids: Tensor | None = None
    ) -> Tensor:
        """Reconstruct the masked patches of images [B, 1, F, T]; the mean squared error.

        Args:
            input: Images [B, 1, F, T].
            mask_patch: See :meth:`forward`.
            cluster: See :meth:`forward`.
            mask_ids: See :meth:`forward`.
        """
        targets, hidden = self._encode_masked(*self._masked(input, mask_patch, cluster, mask_ids))
        return mse(targets, self.gpredlayer(hidden)).mean()

    def gen_maskid_patch(
        self, sequence_len: int = 512, mask_size: int = 100, cluster: int = 3
    ) -> Tensor:
        """Draw the ids [M] of clusters of masked patches for one clip, from Python's generator.

        :meth:`forward` draws all clips at once, from PyTorch's generator, unless a subclass or an
        assignment replaces this method.

        Args:
            sequence_len: Number of patches N.
            mask_size: Number of ids M.
            cluster: A cluster has C x C patches, C one of ``cluster`` numbers from 3 on.

        Raises:
            ValueError: There are fewer patches than can be masked: 0 and N - 1 never are.
        """
        if not 0 < mask_size < sequence_len - 1:
            raise ValueError(
                f"mask_size must be from 1 to {sequence_len - 2} of {sequence_len} patches, got "
                f"{mask_size}"
            )
        side = random.randrange(cluster) + 3
        steps = [self.p_t_dim * row + column for row in range(side) for column in range(side)]
        ids: set[int] = set()
        while len(ids) <= mask_size:
            start = random.randrange(sequence_len)
            ids.update(start + step for step in steps if 0 < start + step < sequence_len)
        return torch.tensor(sorted(ids)[:mask_size])

    def gen_maskid_frame(self, sequence_len: int = 512, mask_size: int = 100) -> Tensor:
        """Draw the ids [M] of single masked patches; see :meth:`gen_maskid_patch`."""
        return torch.tensor(random.sample(range(sequence_len), mask_size))

    def get_shape(
        self, fstride: int, tstride: int, input_fdim: int, input_tdim: int, fshape: int, tshape: int
    ) -> tuple[int, int]:
        """Return the rows and columns of patches of an input."""
        return patch_grid(input_fdim, input_tdim, (fshape, tshape), (fstride, tstride))

    def _grid(self, image: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patches, whose number is that of the positions."""
        projection = self.v.patch_embed.proj
        patch, stride = projection.kernel_size, projection.stride
        if image.ndim == 4 and image.shape[1] == 1:
            grid = patch_grid(image.shape[2], image.shape[3], patch, stride)
            own = image.shape[2] == self.input_fdim  # not time and frequency swapped
            if own and min(grid) > 0 and grid[0] * grid[1] == self._positions():
                return grid
        x = image.squeeze(1).transpose(1, 2) if image.ndim == 4 else image
        raise ValueError(self._wrong(x))

    def _positions(self) -> int:
        return self.v.pos_embed.shape[1] - self.cls_token_num

    def _wrong(self, x: Tensor) -> str:
        expected = f"[B, {self.input_tdim}, {self.input_fdim}]"
        if self._positions() != self.num_patches:
            expected = f"[B, T, F] of {self._positions()} patches, as v.pos_embed has"
        return f"x must be {expected}, got {list(x.shape)}"

    def _encode(self, image: Tensor) -> Tensor:
        v = self.v
        self._grid(image)
        extra = v.extra_tokens.expand(len(image), -1, -1)
        return v.encode(torch.cat((extra, v.patch_embed(image)), 1) + v.pos_embed)

    def _masked(
        self, image: Tensor, num_masked: int, cluster: bool, mask_ids: Tensor | None
    ) -> tuple[Tensor, Masks]:
        """Return filterbanks [B, T, F] and their masks."""
        grid, B = self._grid(image), len(image)
        N, device = grid[0] * grid[1], image.device
        spectrogram = image.squeeze(1).transpose(1, 2)
        if mask_ids is not None and (mask_ids.ndim != 2 or len(mask_ids) != B):
            raise ValueError(f"mask_ids must be [{B}, M], got {list(mask_ids.shape)}")
        draw = self.gen_maskid_patch if cluster else self.gen_maskid_frame
        own = (ASTModel.gen_maskid_patch, ASTModel.gen_maskid_frame)
        if mask_ids is None and getattr(draw, "__func__", None) not in own:  # a script's own masks
            mask_ids = torch.stack([draw(N, num_masked) for _ in range(B)])
        if mask_ids is not None:
            return spectrogram, masks_from_ids(mask_ids.to(device), N)
        clips = torch.randint(2**31, (B,))
        masks = draw_masks(
            clips.to(device),
            torch.zeros_like(clips, device=device),
            seed=int(torch.randint(2**31, ())),
            kind="official" if cluster else "random",
            grid=grid,
            num_masked=num_masked,
        )
        return spectrogram, masks

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
            stride=projection.stride,
        )
        return targets, take(v.encode(tokens), masks.mask_ids + self.cls_token_num)

    def _paint(
        self, x: Tensor, masks: Masks, targets: Tensor, predictions: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = (targets @ predictions.transpose(1, 2)).softmax(2)
        hit = scores.argmax(1) == torch.arange(scores.shape[1], device=x.device)  # as published
        patch, images = (self.fshape, self.tshape), []
        grid = patch_grid(x.shape[2], x.shape[1], patch, patch)
        for paint in (hit * _SHOWN, torch.full_like(scores[:, 0], _SHOWN)):
            patches = cut_patches(x, patch, patch).clone()
            ids = masks.mask_ids[..., None].expand(-1, -1, patches.shape[2])
            patches.scatter_(1, ids, paint[..., None].to(x.dtype).expand(ids.shape))
            image = torch.zeros_like(x)  # 0 beyond the last whole patch, as published
            whole = join_patches(patches, grid, patch)
            image[:, : whole.shape[1], : whole.shape[2]] = whole
            images.append(image.transpose(1, 2).unsqueeze(1))
        return images[0], images[1]
