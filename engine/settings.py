"""Settings of a run: every key with its default, its range and its meaning.

The docstrings below the fields are what the settings page of the documentation shows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ssast.engine.errors import ConfigError

Precision = Literal["fp32", "bf16"]  # of matmuls and attention
Switch = Literal["auto", True, False]  # auto: where a trial shows that it is right and faster


def setting(default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """Return a field whose number, or whose numbers, must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class Size:
    """Width, depth and number of attention heads of the transformer."""

    embed_dim: int
    depth: int
    num_heads: int


MOST_FRAMES = 2**20  # of 10 ms: 2.9 hours

# tiny, small and base are those of DeiT; large, huge and giant those of ViT and its followers.
SIZES = {
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
    "giant": Size(1536, 40, 24),
}

EXTRA_TOKENS = {"cls_dist": 2, "cls": 1}
"""Number of tokens before the patches, by ``model.extra_tokens``."""


@dataclass(frozen=True, kw_only=True)
class Audio:
    """Log-mel filterbank features, the input of the model."""

    sample_rate_hz: int = setting(16000, 1000, 192000)
    """Sample rate in Hz; recordings with another one are resampled."""

    channel: Literal["mean", "left", "right"] = "mean"
    """What is heard of a recording with several channels: the mean of all of them, the first
    (`left`, as in the published code) or the second (`right`). A recording of one channel is taken
    as it is; so are prepared shards, whose channel `ssast data prepare --channel` has chosen."""

    n_mels: int = setting(128, 1, 1024)
    """Number of mel bins."""

    num_frames: int = setting(1024, 1, MOST_FRAMES)
    """Input length in frames of 10 ms; longer clips are cut, shorter ones are zero-padded."""

    mean: float = -4.2677393
    """Mean of the log-mel filterbank features over the training set; `ssast data stats` measures
    it."""

    std: float = setting(4.5689974, 1e-6)
    """Standard deviation of the same; the model sees (fbank - mean) / (2 std)."""

    stats: Literal["given", "measure"] = "given"
    """`measure`: measure `mean` and `std` on the training clips before the run, as
    `ssast data stats` does."""

    ignore_padding: bool = False
    """Use a padding mask: masking, attention, losses and pooling leave out the patches beyond the
    end of a clip that is shorter than `num_frames`, with the same result as without padding. The
    published code has no padding mask."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The spectrogram transformer."""

    size: Literal["tiny", "small", "base", "large", "huge", "giant"] = "base"
    """Width, depth and number of attention heads: 192/12/3, 384/12/6, 768/12/12, 1024/24/16,
    1280/32/16, 1536/40/24."""

    patch: tuple[int, int] = setting((16, 16), 1)
    """Patch size in mel bins and frames: [16, 16] is the patch model, [128, 2] the frame model."""

    backbone: str = "transformer"
    """The blocks of the encoder: `transformer` as published, or the name of a backbone of your
    own."""

    depth: int | None = setting(None, 1, 256)
    """Number of transformer blocks; null: that of the size."""

    positions: Literal["learned", "sincos"] = "learned"
    """Position embedding of the patches: learned, or fixed sines and cosines of row and column,
    which are computed for any input length and never trained."""

    extra_tokens: Literal["cls_dist", "cls"] = "cls_dist"
    """Tokens before the patches: cls and distillation token as published, or cls alone."""

    norm: Literal["pre", "post"] = "pre"
    """Place of the LayerNorms: before attention and MLP and after the last block, as published; or
    after each residual addition, and one before the first block."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data sets, and how clips are read."""

    train: str | None = None
    """Training clips: a manifest (CSV, TSV, JSON, JSON Lines, Parquet, a list of paths), a folder
    of audio files or of prepared shards, or the URL of such shards."""

    columns: Mapping[str, str] | None = None
    """Columns of manifests by what they hold, such as `{wav: clip, labels: species}`, also `begin`,
    `end` and `duration`; `""`: not used. Columns without names are `"1"`, `"2"`, ...; null: told by
    the names in use."""

    label_separator: str | None = None
    """What separates several labels in the text of a manifest, such as `;`. null: a comma in the
    published JSON, nothing elsewhere."""

    delimiter: str | None = None
    """What separates the columns of a manifest: `,`, `;`, `tab`, ...; null: found out."""

    encoding: str | None = None
    """Encoding of the text of manifests, such as `cp1252`; null: UTF-8 or what a byte order mark
    says, and Western European (cp1252) for what is no UTF-8."""

    mix: Mapping[str, float] | None = setting(None, 1e-9, 1e9)
    """A mixture of data sets instead of `train`: each data set with its sampling weight, such as
    `{/my/speech: 3, /my/sounds: 1}`. Weights are relative: here 75 % of the clips drawn are speech,
    however large the two sets are. An epoch draws as many clips as all sets hold, and within a set
    each clip equally often."""

    window_s: float | None = setting(None, 0.01)
    """Pretraining: length in s of the windows that recordings are cut into, each of them a clip
    that is read by seeking; null: a recording is one clip, of which `audio.num_frames` are read."""

    hop_s: float | None = setting(None, 0.01)
    """Time in s between the starts of two windows; null: `window_s`."""

    valid: str | None = None
    """Validation clips, in the same forms as `train`; null: `valid_share` of the training clips is
    held out."""

    valid_share: float = setting(0.02, 1e-6, 0.5)
    """Fraction of the training clips that is held out for validation where `valid` is null."""

    valid_clips: int | None = setting(None, 1)
    """Largest number of clips in a validation during training: a fixed draw of the held-out ones,
    of each class or set of a mix its share. The others stay held out, and the final metrics of
    fine-tuning are of all. null: all of them."""

    num_threads: int | None = setting(None, 1)
    """Number of DALI threads per process; null: the cores of the process, at most 8."""

    read_ahead: int = setting(3, 1, 64)
    """Number of batches whose files are read before they are decoded."""

    fbank_backend: Literal["auto", "torch", "dali"] = "auto"
    """What computes the filterbank features: the project's own kernels (`torch`) or DALI's
    operators (`dali`); auto: dali on a GPU, torch on a CPU."""

    max_rejected: float = setting(0.05, 0.0, 1.0)
    """Largest fraction of unreadable clips. The run ends when the data certainly hold more, or when
    a larger fraction of the clips so far can hardly be chance; never for one clip, unless this is
    0; never at all if it is 1."""

    retry_s: float = setting(300.0, 0.0)
    """Time in s for which reading is tried again while storage fails (network errors, EIO, stale
    file handles), at most 80 % of `train.timeout_s`. Then the run ends with exit status 75, to be
    resumed; the clips do not count as unreadable."""

    sample_weights: str | None = None
    """A text file with one sampling weight per training clip, in the order of the manifest; null:
    each clip is drawn once per epoch."""

    random_crop: bool = False
    """Train on another random crop in each epoch of recordings longer than `audio.num_frames`;
    otherwise on their beginning."""

    cache_gib: float = setting(0.0, 0.0)
    """Size in GiB, on each machine, of a cache in memory for the features of training clips, which
    its ranks share. On one machine a clip is computed once; of M machines, each has computed
    1 - (1 - 1/M)^(e - 1) of the clips before epoch e."""

    cache_folder: str | None = None
    """A folder on a fast disk where the features of all clips are cached, 0.5 MiB per 10 s; later
    runs with the same clips and `audio` settings share it."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw"] = "adam"
    """Adam with L2 regularisation, as published, or AdamW."""

    lr: float = setting(1e-4, 0.0)
    """Peak learning rate."""

    betas: tuple[float, float] = setting((0.95, 0.999), 0.0, 0.999999)
    """Decay rates of the two moment estimates."""

    eps: float = setting(1e-8, 0.0)
    """Term added to the denominator of Adam's update."""

    weight_decay: float = setting(5e-7, 0.0)
    """Weight decay; L2 penalty of adam."""

    schedule: Literal["plateau", "cosine", "multistep", "constant"] = "plateau"
    """Learning-rate schedule after the warm-up; multistep is for fine-tuning. A key of another
    schedule is an error on the command line; a recipe may hold it."""

    warmup_steps: float = setting(1000, 0)
    """Optimizer steps of linear warm-up; a number below 1 is a fraction of the run's steps."""

    decay_start: int = setting(10, 1)
    """multistep: number of epochs before the first decay."""

    decay_every: int = setting(5, 1)
    """multistep: epochs between decays."""

    decay_factor: float = setting(0.5, 0.0, 1.0)
    """multistep: factor of each decay."""

    plateau_factor: float = setting(0.5, 0.0, 1.0)
    """plateau: factor of each decay."""

    plateau_patience: int = setting(2, 0)
    """plateau: validations without improvement before the learning rate is decayed."""

    min_lr: float = setting(0.0, 0.0)
    """cosine: learning rate of the last step."""

    max_grad_norm: float | None = setting(None, 1e-12)
    """Gradients are clipped to this global norm; null: no clipping."""


SCHEDULE_OF = {
    "min_lr": "cosine",
    **dict.fromkeys(("decay_start", "decay_every", "decay_factor"), "multistep"),
    **dict.fromkeys(("plateau_factor", "plateau_patience"), "plateau"),
}


def check_optim(optim: Optim, given: Sequence[str]) -> None:
    """Check what depends on more than one key of the section.

    Args:
        optim: The section.
        given: Keys ``section.key`` that the user set; a recipe may hold those of other schedules.

    Raises:
        ConfigError: The learning rate would rise, or a key is of a schedule that is not chosen.
    """
    if optim.min_lr > optim.lr:
        raise ConfigError(f"optim.min_lr must be at most {optim.lr}, got {optim.min_lr}")
    for key, schedule in SCHEDULE_OF.items():
        unused = optim.schedule != schedule and getattr(optim, key) != getattr(Optim(), key)
        if unused and f"optim.{key}" in given:
            raise ConfigError(
                f"optim.{key} is for optim.schedule {schedule}, got {optim.schedule!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Train:
    """The training loop."""

    checkpoint: str | None = None
    """Weights that pretraining continues from: a run, or a published model; null: from scratch.
    Fine-tuning has `finetune.checkpoint`."""

    steps: int = setting(800_000, 1)
    """Total number of optimizer steps; fine-tuning has `finetune.epochs` instead."""

    batch_size: int = setting(24, 1)
    """Global batch size: clips per optimizer step, over all ranks and micro-batches."""

    accumulation_steps: int = setting(1, 1)
    """Gradient accumulation: number of micro-batches per optimizer step."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: bf16 weights and activations, fp32 master weights. auto: bf16 on a GPU; on a CPU that
    multiplies bf16 natively (AVX512-BF16, AMX) where a trial at the start is faster with the loss
    and the gradients of fp32, and the run is long enough to repay it; else fp32. A resumed run
    keeps what it had."""

    zero_stage: int = setting(1, 0, 3)
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also parameters."""

    offload: Literal["none", "cpu"] = "none"
    """Where optimizer states are kept and updated: on the device, or offloaded to the CPU."""

    reduce_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Data type of the gradient reduction; auto: that of the gradients."""

    ema: float | None = setting(None, 1e-6, 0.999999)
    """Decay of an exponential moving average (EMA) of the weights, such as 0.9999, which is updated
    after each optimizer step, in fp32, and is sharded like the optimizer states: 4 bytes a weight.
    At step t it is min(ema, (1 + t) / (10 + t)). Validations report raw and averaged weights; the
    averaged ones choose the best checkpoint and are what it is opened with. null: no average."""

    activation_checkpoint_every: int | None = setting(None, 1)
    """Activation checkpointing of every n-th transformer block: its activations are recomputed in
    the backward pass, which saves memory and costs time. 1: all blocks; null: none."""

    compile: Switch = "auto"
    """Compile each transformer block with torch.compile. auto: on a GPU, where a trial at the start
    gives the gradients of the eager pass in less time and the run is long enough to repay it; not
    on a CPU (there, true needs a C++ compiler)."""

    cuda_graphs: Switch = "auto"
    """Launch the forward and the backward pass of a micro-batch as CUDA graphs, instead of kernel
    by kernel. auto: on a GPU, where a trial gives the gradients of the eager pass in less time;
    true: it is an error where that does not work."""

    timeout_s: float = setting(600.0, 1.0)
    """Time limit in s for one training step, validation batch or checkpoint, and for waiting for
    other ranks; a process that exceeds it is ended with exit status 75."""

    max_skipped_steps: int = setting(20, 1)
    """Number of consecutive steps skipped for non-finite gradients after which the run fails."""

    spike_factor: float | None = setting(None, 1.0)
    """Loss-spike detection: when the logged loss exceeds the median of the last 20 by this many
    median absolute deviations, go back to the last checkpoint and skip the clips since then; null:
    no detection."""

    seed: int = setting(0, 0, 2**63 - 1)
    """Random seed of weights, masks, clip order and augmentation."""

    log_every: int = setting(10, 1)
    """Steps between log lines; several GPUs look for a request to stop as often."""

    validate_every: int = setting(4000, 1)
    """Steps between validations; fine-tuning validates after each epoch."""

    save_every: int = setting(4000, 1)
    """Steps between checkpoints; fine-tuning also saves after each epoch that is the best so
    far."""

    keep_checkpoints: int = setting(3, 1)
    """Number of latest checkpoints to keep, besides the best."""

    max_failed_saves: int = setting(3, 1)
    """Number of consecutive checkpoints that cannot be written after which the run ends."""

    fallback_folder: str | None = None
    """A folder on another disk, to which the state is written when a run ends since its checkpoint
    cannot be written to the run folder; `--resume` with the same setting takes it up; null:
    none."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Output of the run."""

    folder: str | None = None
    """Output folder; null: runs/<name of the configuration>."""

    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Run logs beside metrics.jsonl, such as `[tensorboard, wandb]`: TensorBoard, Weights & Biases
    (needs `pip install "ssast-engine[wandb]"`), Trackio (`ssast-engine[trackio]`)."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Profiling of training steps."""

    steps: int = setting(0, 0)
    """Number of steps to profile on rank 0, from the sixth step on; profile/trace.json (for
    Perfetto or chrome://tracing) and profile/table.json are written to the run folder. 0: no
    profiling."""
