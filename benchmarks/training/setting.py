"""What both sides of a benchmark of a training step compute."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import one_hot

from ssast.engine.config import Config, from_plain, load_config, masked_patches
from ssast.engine.objective_settings import published_share
from ssast.engine.planning.synthetic import NUM_CLASSES, noise
from ssast.engine.settings import Precision


@dataclass(frozen=True)
class Setting:
    """Size of what both sides compute."""

    size: str
    batch: int
    frames: int
    threads: int
    default_memory: bool  # leave the C library's allocator as it is in our process too
    finetune: bool = False  # instead of pretraining
    device: str = "cpu"
    precision: Precision = "fp32"
    objective: Literal["joint", "latent"] = "joint"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return self.device != "cpu"

    @property
    def with_engine(self) -> bool:
        """Whether our step is taken with DeepSpeed, not with plain PyTorch in its place."""
        # Only the engine averages the weights of a teacher.
        return self.on_gpu or self.objective == "latent"

    def config(self, *, two_pass: bool = False) -> Config:
        """Return the patch model's configuration, with the published share of masked patches.

        Args:
            two_pass: Of the joint objective, as the published code has it.
        """
        if self.finetune:
            return from_plain(
                {
                    "model": {"size": self.size},
                    "audio": {"num_frames": self.frames},
                    "train": {"precision": self.precision},
                    "finetune": {"stride": [10, 10], "loss": "bce"},
                }
            )
        num_masked = masked_patches(published_share(self.objective), 8 * (self.frames // 16))
        if self.objective == "latent":
            overrides = {
                "model.size": self.size,
                "audio.num_frames": self.frames,
                "train.precision": self.precision,
                "objective.num_masked": num_masked,
            }
            return load_config("eat_base", [f"{key}={value}" for key, value in overrides.items()])
        return from_plain(
            {
                "model": {"size": self.size},
                "audio": {"num_frames": self.frames},
                "train": {"precision": self.precision},
                "objective": {"num_masked": num_masked, "two_pass": two_pass},
            }
        )

    def fbank(self) -> torch.Tensor:
        """Return log-mel filterbanks [B, T, F]."""
        return noise(self.config(), self.batch)

    def targets(self) -> torch.Tensor:
        """Return targets [B, C], one class a clip."""
        return one_hot(torch.arange(self.batch) % NUM_CLASSES, NUM_CLASSES).float()
