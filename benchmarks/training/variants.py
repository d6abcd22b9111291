"""Training steps between the published one and ours: each adds one change to the one before.

    published step -> one pass -> no loops -> ... -> what ``ssast pretrain`` does

Those that change the model are small subclasses of the published one; all of them compute the same
losses, but for rounding, from the same weights and masks.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ssast.benchmarks.device import CPU
from ssast.benchmarks.training.baseline import Baseline, published_optimizer
from ssast.benchmarks.training.ours import OurStep
from ssast.benchmarks.training.setting import Setting
from ssast.benchmarks.training.step import STEPS_OF_A_RUN
from ssast.engine.config import Config
from ssast.engine.model.objective import MSPM
from ssast.engine.settings import Precision
from ssast.engine.train.optim import build_optimizer
from ssast.kernels import attention
from ssast.kernels.masking import draw_masks
from ssast.kernels.matmul import fast_matmul, is_fast
from ssast.kernels.memory import keep_freed_memory
from ssast.kernels.mspm_loss import info_nce, mse
from ssast.kernels.patch_embed import cut_patches, take

Mark = Callable[[str], None]
Step = Callable[..., float]
"""``step(mask_ids, mark)`` trains once and returns the loss.

``mask_ids`` [B, M], if given, take the place of the masks that are drawn all the same; ``mark`` is
told the parts of the step, those of :data:`ssast.engine.monitoring.profiling.PARTS`.
"""


class SharedPass(Baseline):
    """One mask and one forward pass for both losses, as the paper has it."""

    def losses(
        self, x: Tensor, first: Tensor | None = None, second: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the published losses, with the first mask alone."""
        first = self.draw_masks(len(x)) if first is None else first
        encoded = self.encode(x, first)
        nce, accuracy = self.discriminative_loss(*encoded, first)
        mse = self.generative_loss(*encoded, first)
        losses = {"infonce_loss": nce, "mse_loss": mse, "pretext_accuracy": accuracy}
        return {"loss": nce + 10 * mse, **losses}


class Batched(SharedPass):
    """No Python loop over clips: masks, gathering, heads and losses of all at once."""

    drawn = 0

    def draw_masks(self, batch_size: int) -> Tensor:
        """Draw a new mask for each clip, [B, M] int64."""
        self.drawn += 1
        clips = torch.arange(batch_size, device=self.mask_embed.device)
        return draw_masks(
            clips,
            torch.full_like(clips, self.drawn),
            seed=0,
            kind="official",
            grid=self.grid,
            num_masked=self.num_masked,
        ).mask_ids

    def encode(self, x: Tensor, mask_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode as the published code does; masked patches are projected too."""
        projection = self.v.patch_embed.proj
        tokens = projection(x.unsqueeze(1).transpose(2, 3)).flatten(2).transpose(1, 2)
        masked = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=x.device)
        masked.scatter_(1, mask_ids, True)
        tokens = torch.where(masked[..., None], self.mask_embed, tokens)
        patches = cut_patches(x, projection.kernel_size, projection.stride)
        return self.v.encode(tokens), take(patches, mask_ids)

    def discriminative_loss(
        self, hidden: Tensor, targets: Tensor, mask_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute InfoNCE loss and pretext accuracy with our kernel."""
        nce, accuracy = info_nce(targets, self.cpredlayer(take(hidden, mask_ids + 2)))
        return nce.mean(), accuracy.mean()

    def generative_loss(self, hidden: Tensor, targets: Tensor, mask_ids: Tensor) -> Tensor:
        """Compute the MSE loss with our kernel."""
        return mse(targets, self.gpredlayer(take(hidden, mask_ids + 2))).mean()


@dataclass(frozen=True)
class Variant:
    """A training step, and the settings of the process that it runs in.

    Attributes:
        title: What it adds to the one before.
        needs: What a machine must have for it to differ from the one before.
        model: The published one, one of its subclasses, or ours.
        fused_adam: One operation for all weights, instead of many for each.
        fused_attention: scaled_dot_product_attention, whose probabilities are not in memory.
        keep_memory: Freed memory stays with the process.
        fast_matmul: Float32 matmul by the fastest library that is exact.
        blocked_attention: Our own attention by this matmul, where it is the fastest.
        engine: The step is that of ``ssast pretrain``: DeepSpeed's, on one rank.
        compiled: As ``train.compile``.
        precision: As ``train.precision``.
        tried: Compiled, or launched as CUDA graphs, as trials at the start of a run choose.
    """

    title: str
    needs: Literal["", "oneDNN", "blocked", "allocator", "compiler", "bf16", "gpu"] = ""
    model: type[Baseline] | type[MSPM] = Baseline
    fused_adam: bool = False
    fused_attention: bool = False
    keep_memory: bool = False
    fast_matmul: bool = False
    blocked_attention: bool = False
    engine: bool = False
    compiled: bool = False
    precision: Precision = "fp32"
    tried: bool = False

    @property
    def num_passes(self) -> int:
        """Forward passes of a step."""
        return 2 if self.model is Baseline else 1

    @property
    def dtype(self) -> torch.dtype:
        """Data type of weights and activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @contextmanager
    def prepared(self, device: torch.device = CPU) -> Iterator[str]:
        """Apply the settings of the process inside; nothing may have been computed before.

        Yields why the variant cannot run on this device; empty if it can.
        """
        if self.keep_memory and device == CPU:
            keep_freed_memory()
        with ExitStack() as stack:
            if self.fast_matmul:
                stack.enter_context(fast_matmul())
            if not self.blocked_attention and device == CPU:
                stack.enter_context(patch.object(attention, "candidates", _sdpa_alone))
            yield LACKING[self.needs](device) if self.needs else ""

    def config(self, setting: Setting) -> Config:
        """Return the configuration of one process."""
        config = setting.config()
        train = replace(
            config.train,
            compile="auto" if self.tried else self.compiled,
            cuda_graphs="auto" if self.tried else False,
            precision=self.precision,
        )
        return replace(config, train=train)

    def build(self, setting: Setting) -> Step:
        """Build the step, with fresh weights that are the same for all variants."""
        torch.manual_seed(0)
        config = self.config(setting)
        if issubclass(self.model, Baseline):
            return self._published_step(setting, config, self.model(config, MSPM(config)))
        device = torch.device(setting.device)
        step = OurStep(config, setting.fbank(), deepspeed=self.engine, device=device)
        torch.set_num_threads(setting.threads)  # DeepSpeed sets them as well
        if self.tried:
            step.start_execution(STEPS_OF_A_RUN)
        return step

    def _published_step(self, setting: Setting, config: Config, model: Baseline) -> Step:
        device = torch.device(setting.device)
        model.to(device)
        if self.fused_attention:
            for block in model.v.blocks:
                block.attn.attend = nn.functional.scaled_dot_product_attention  # type: ignore[union-attr]
        optimizer = (
            build_optimizer(model, config.optim) if self.fused_adam else published_optimizer(model)
        )
        # The published data loader normalises before the step.
        x = ((setting.fbank() - config.audio.mean) / (2 * config.audio.std)).to(device)

        def step(mask_ids: Tensor | None = None, mark: Mark = lambda part: None) -> float:
            masks = [model.draw_masks(len(x)) for _ in range(self.num_passes)]
            if mask_ids is not None:
                masks = [mask_ids] * self.num_passes
            loss = model.losses(x, *masks)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        return step


def check_mask_ids(setting: Setting) -> Tensor:
    """Draw the masks that all variants are compared on, [B, M]."""
    model = MSPM(setting.config())
    clips = torch.arange(setting.batch)  # the same on every device
    masks = model.draw_masks(clips, torch.zeros_like(clips))[0]
    return masks.mask_ids.to(setting.device)


def _sdpa_alone(device: torch.device, dtype: torch.dtype) -> tuple[attention.Backend, ...]:
    return ("sdpa",)


def _lacks_bf16(device: torch.device) -> str:
    if device != CPU or torch.cpu.get_capabilities().get("avx512_bf16"):
        return ""
    return "the CPU has no bf16 matmul (AVX512-BF16)"


def _lacks_blocked(device: torch.device) -> str:
    if device == CPU and attention.candidates(CPU, torch.float32) == ("blocked",):
        return ""
    return "scaled_dot_product_attention is as fast here"


LACKING: dict[str, Callable[[torch.device], str]] = {
    "oneDNN": lambda device: (
        "" if is_fast() and device == CPU else "no library has a faster matmul here"
    ),
    "blocked": _lacks_blocked,
    "allocator": lambda device: "" if device == CPU else "PyTorch keeps the memory of a GPU",
    "compiler": lambda device: (
        "" if device != CPU or shutil.which("g++") else "there is no C++ compiler (g++)"
    ),
    "bf16": _lacks_bf16,
    "gpu": lambda device: "there is no GPU" if device == CPU else "",
}
"""Why a device lacks something, under a variant's settings; empty if it has it."""


def _chain() -> dict[str, Variant]:
    """Return the variants by name, in the order in which each adds to the one before."""
    changes: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("published", "published step", {}),
        ("shared pass", "one forward pass for both losses", {"model": SharedPass}),
        ("batched", "no Python loop over clips", {"model": Batched}),
        ("fused adam", "fused Adam", {"fused_adam": True}),
        ("sdpa", "scaled_dot_product_attention", {"fused_attention": True}),
        ("flop cuts", "only what the losses need is computed", {"model": MSPM}),
        ("kept memory", "freed memory kept", {"keep_memory": True, "needs": "allocator"}),
        ("fast matmul", "fp32 matmul by AVX-512", {"fast_matmul": True, "needs": "oneDNN"}),
        ("blocked", "blocked attention", {"blocked_attention": True, "needs": "blocked"}),
        ("engine", "DeepSpeed: what ssast pretrain does", {"engine": True}),
    )
    chain: dict[str, Variant] = {}
    last = Variant("")
    for name, title, change in changes:
        chain[name] = last = replace(last, **{"needs": "", "title": title, **change})
    return chain


VARIANTS = _chain()
DEFAULT = VARIANTS["engine"]
"""What ``ssast pretrain`` does."""

OPTIONS = {
    "compiled": replace(DEFAULT, title="train.compile=true", needs="compiler", compiled=True),
    "bf16": replace(DEFAULT, title="train.precision=bf16", needs="bf16", precision="bf16"),
    "tried": replace(
        DEFAULT,
        title="bf16, compiled or as CUDA graphs by trial",
        needs="gpu",
        precision="bf16",
        tried=True,
    ),
}
"""Optional settings; each is added to the default."""


def label(variant: Variant) -> str:
    """Return the label of a variant, in a line below the one it adds to."""
    if variant == VARIANTS["published"]:
        return variant.title
    return f"{'with' if variant in OPTIONS.values() else '+'} {variant.title}"
