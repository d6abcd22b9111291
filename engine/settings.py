"""Every setting of a run, its default, its range and what it means."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


def setting(default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """A field whose number, or whose numbers, must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class Size:
    """Width D, depth and number of attention heads of the transformer."""

    embed_dim: int
    depth: int
    num_heads: int


# tiny, small and base are DeiT's; large, huge and giant carry the same trunk further (ViT).
SIZES = {
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
    "giant": Size(1536, 40, 24),
}


@dataclass(frozen=True, kw_only=True)
class Audio:
    """From a waveform to the spectrogram that the model sees."""

    sample_rate_hz: int = setting(16000, 1000, 192000)
    n_mels: int = setting(128, 1, 1024)
    num_frames: int = setting(1024, 1)
    """Frames (10 ms each) of the input; longer clips are cut, shorter ones are zero-padded."""

    mean: float = -4.2677393
    """Mean of the log-mel filterbank over the training set."""

    std: float = setting(4.5689974, 1e-6)
    """Its standard deviation; the model sees (fbank - mean) / (2 std)."""

    ignore_padding: bool = False
    """Of clips shorter than ``num_frames``, mask, attend to, learn from and average only the whole
    patches before their end: the same numbers as if each clip were computed without padding. The
    published code treats padding as sound."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The spectrogram transformer."""

    size: Literal["tiny", "small", "base", "large", "huge", "giant"] = "base"
    patch: tuple[int, int] = setting((16, 16), 1)
    """Mel bins and frames of one patch: [16, 16] is the patch model, [128, 2] the frame model."""

    depth: int | None = setting(None, 1)
    """Number of blocks, where it is not the size's own."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Masked spectrogram patch modelling (MSPM)."""

    kind: Literal["joint", "discriminative", "generative"] = "joint"
    num_masked: int = setting(400, 2)
    """Patches hidden in each clip."""

    mask: Literal["official", "uniform", "random"] = "official"
    """Clusters as published, clusters that favour no position, or single random patches."""

    softmax_axis: Literal["official", "paper"] = "official"
    """InfoNCE over the predictions (published code) or over the targets (equation 1)."""

    two_pass: bool = False
    """A forward pass and a mask for each of the two losses, as the published code does."""

    mse_weight: float = setting(10.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the clips are and how they are read."""

    train: str | None = None
    """A manifest (JSON or CSV), a folder of audio files or of prepared shards, or the URL of such
    shards."""

    mix: Mapping[str, float] | None = setting(None, 1e-9, 1e9)
    """Several data sets instead of ``train``, each as it takes it, with the share of each:
    ``{/my/speech: 3, /my/sounds: 1}``. The shares are relative to each other, and say how many of
    the clips that are drawn are of a set, whatever its size: of an epoch of 100 clips, 75 and 25.
    An epoch draws as many clips as there are in all, and within a set each equally often."""

    valid: str | None = None
    """The held-out clips; without it a share of the training clips is held out."""

    valid_share: float = setting(0.02, 1e-6, 0.5)
    num_threads: int | None = setting(None, 1)
    """DALI's threads; the cores of the process if not given, at most 8."""

    read_ahead: int = setting(3, 1, 64)
    """Batches read ahead of the decoder."""

    fbank: Literal["auto", "torch", "dali"] = "auto"
    max_rejected: float = setting(0.05, 0.0, 1.0)
    """Largest share of clips that may be unreadable before the run stops."""

    weights: str | None = None
    """A text file with a number for each training clip, in the manifest's order: how often it comes
    up, relative to the others. All come up once in an epoch without it."""

    random_crop: bool = False
    """Of a recording longer than ``audio.num_frames``, train on another part in each epoch."""

    cache_gib: float = setting(0.0, 0.0)
    """Memory for filterbanks of training clips, which are then not computed again."""

    cache_folder: str | None = None
    """A folder on a fast disk for filterbanks of all clips instead, 0.5 MiB for 10 s: they are not
    computed again, in this run or in others with the same clips and ``audio`` settings."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its learning rate."""

    name: Literal["adam", "adamw"] = "adam"
    """Adam with L2 regularisation in the gradient, as published, or AdamW."""

    lr: float = setting(1e-4, 0.0)
    betas: tuple[float, float] = setting((0.95, 0.999), 0.0, 0.999999)
    eps: float = setting(1e-8, 0.0)
    weight_decay: float = setting(5e-7, 0.0)
    schedule: Literal["plateau", "cosine", "multistep", "constant"] = "plateau"
    warmup_steps: int = setting(1000, 0)
    decay_start: int = setting(10, 1)
    """Epochs at the full rate, where the schedule is multistep (in fine-tuning only)."""

    decay_every: int = setting(5, 1)
    """Epochs from one fall of the rate to the next."""

    decay_factor: float = setting(0.5, 0.0, 1.0)
    """What each fall leaves of the rate."""

    plateau_factor: float = setting(0.5, 0.0, 1.0)
    plateau_patience: int = setting(2, 0)
    """Validations without a better accuracy that are borne before the rate falls."""

    min_lr: float = setting(0.0, 0.0)
    """Where the cosine ends."""

    max_grad_norm: float | None = setting(None, 1e-12)


@dataclass(frozen=True, kw_only=True)
class Train:
    """The run."""

    steps: int = setting(800_000, 1)
    """Optimizer steps in all."""

    batch_size: int = setting(24, 1)
    """Clips of one optimizer step, over all processes and accumulated micro-steps."""

    accumulate: int = setting(1, 1)
    """Micro-steps of one optimizer step."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 weights and activations with fp32 master weights, or fp32; auto: bf16 on a GPU."""

    zero_stage: int = setting(1, 0, 3)
    """What DeepSpeed shards: 1 optimizer state, 2 also gradients, 3 also parameters."""

    offload: Literal["none", "cpu"] = "none"
    """Where the optimizer's state is kept and its step taken: on each rank's device, or in the main
    memory of its machine."""

    reduce_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of gradients on their way between ranks; auto: as they are computed."""

    checkpoint_every: int | None = setting(None, 1)
    """Every so many blocks, keep only the input of one and compute its inside again in the backward
    pass: less memory, more work. 1 does so in each block, none does not."""

    compile: bool = False
    """Compile each transformer block with torch.compile (needs a C++ compiler on a CPU)."""

    timeout_s: float = setting(600.0, 1.0)
    """Seconds without a step, a validated batch or a written checkpoint, or of waiting for another
    process, after which a process ends with status 75 instead of hanging."""

    max_skipped: int = setting(20, 1)
    """Steps in a row without a finite gradient (each is skipped) that end the run."""

    spike: float | None = setting(None, 1.0)
    """Go back to the last checkpoint, and over the clips since then, where the loss between two log
    lines exceeds the median of the last 20 lines by so many times the median deviation from it."""

    seed: int = setting(0, 0, 2**63 - 1)
    log_every: int = setting(10, 1)
    validate_every: int = setting(4000, 1)
    save_every: int = setting(4000, 1)
    keep: int = setting(3, 1)
    """Checkpoints kept, besides the best."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where the results go."""

    folder: str | None = None
    """runs/<name of the configuration> if not given."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A record of where the time of a step goes."""

    steps: int = setting(0, 0)
    """Steps of rank 0 that are recorded, from the sixth after the start on; the others are as fast
    as ever. The run's folder then has profile/trace.json, for chrome://tracing or Perfetto, and
    profile/table.json."""


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """A classifier on top of the encoder, trained on labelled clips."""

    checkpoint: str | None = None
    """Where the encoder's weights are from: a published file, or a pretraining run. Without one the
    model is trained from scratch."""

    folds: str | None = None
    """A folder with train_1.json, eval_1.json, train_2.json, ..., as ``ssast data manifests``
    writes it of ESC-50 and IEMOCAP: cross-validation, a run for each fold. Those of a recipe
    give way to ``data.train``."""

    fold_role: Literal["test", "valid"] = "test"
    """What the eval manifest of a fold is: test clips, looked at once, while a share of the
    training clips is held out (``data.valid_share``); or the held-out clips themselves, which the
    weights are chosen by."""

    labels: str | None = None
    """A CSV of the classes in their order (index, mid, display_name); the sorted names of the
    training labels if not given."""

    loss: Literal["ce", "bce"] = "ce"
    """Cross entropy for one label a clip, or binary cross entropy for each label by itself."""

    class_weights: str = "none"
    """Factors of the classes in the loss: ``none``, ``balanced`` (each the mean number of clips of
    a class over its own), or a text file with a number for each class, in their order. With bce
    they weigh the clips that have a class, not those that have it not."""

    metric: Literal["auto", "accuracy", "map"] = "auto"
    """What the best checkpoint is chosen by, on the held-out clips; auto: accuracy where every clip
    has one label, mean average precision otherwise."""

    pooling: Literal["avgtok", "cls"] = "avgtok"
    """Mean of the patch tokens, or of cls and dist."""

    stride: tuple[int, int] | None = setting(None, 1)
    """Mel bins and frames between two patches; the patch itself, without overlap, if not given."""

    freeze: Literal["none", "encoder"] = "none"
    """``encoder`` trains the head alone: a linear probe."""

    epochs: int = setting(25, 1)
    """Passes over the training clips; goes before ``train.steps``."""

    layer_decay: float = setting(1.0, 0.0, 1.0)
    """Each block learns this much slower than the one above it."""

    head_lr_scale: float = setting(1.0, 0.0)
    """Learning rate of the head, as a multiple of ``optim.lr``."""

    mixup: float = setting(0.0, 0.0, 1.0)
    """Share of the clips that are mixed with another one, in a proportion from Beta(10, 10)."""

    freq_mask: int = setting(0, 0)
    """Widest band of mel bins that SpecAugment hides in a clip."""

    time_mask: int = setting(0, 0)
    """Longest run of frames that SpecAugment hides in a clip."""

    noise: float = setting(0.0, 0.0)
    """Largest amplitude of the uniform noise added to the normalised spectrogram (published:
    0.1)."""

    roll: int = setting(0, 0)
    """Frames, at most, by which a clip is rolled to either side (published: 10)."""

    label_smoothing: float = setting(0.0, 0.0, 1.0)
    balanced: bool = False
    """Draw clips of rare classes more often, as many clips an epoch."""

    average_last: int = setting(0, 0)
    """Weights averaged over the ends of so many last epochs; they are kept if they do better on the
    held-out clips than the best epoch."""

    patience: int | None = setting(None, 1)
    """Epochs without a better metric after which training ends."""

    test: str | None = None
    """A manifest of clips that are looked at once, by the chosen weights, at the end."""

    allow_leakage: bool = False
    """Train although training, held-out and test clips share recordings."""
