"""The configuration of a folder for transformers, out and in: config.json."""

from pathlib import Path
from typing import Any, Literal

from ssast.engine.config import Config, from_plain
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import SIZES, Audio, Model
from ssast.pipelines.text import shown

REMOTE_CODE = Path(__file__).with_name("modeling_ssast.py")
Loss = Literal["ce", "bce"]
CONFIG = "config.json"
STOCK, OWN = "audio-spectrogram-transformer", "ssast"
_FRAMES = {STOCK: "max_length", OWN: "num_frames"}  # the keys of the length of the input
PROBLEM_TYPES: dict[Loss, str] = {
    "ce": "single_label_classification",
    "bce": "multi_label_classification",
}
_PUBLISHED = {key: getattr(Model, key) for key in ("positions", "extra_tokens", "norm")}
_LABEL_IDS = "label_ids"  # ours: labels of the classes by their names, where the two differ


def model_config(model: Classifier | SpectrogramTransformer, audio: Audio) -> dict[str, Any]:
    """Return the configuration of a model, but for its classes."""
    encoder = model.encoder if isinstance(model, Classifier) else model
    patch, stride = encoder.embed.patch, encoder.embed.stride
    heads = {size.embed_dim: size.num_heads for size in SIZES.values()}
    config: dict[str, Any] = {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": heads[encoder.embed_dim],
        "num_mel_bins": audio.n_mels,
        "layer_norm_eps": encoder.blocks[0].get_submodule("norm1").eps,
        "dtype": "float32",
    }
    alone = not isinstance(model, Classifier)
    pooling = "avgtok" if alone else model.pooling  # what a new classifier begins with
    options = {key: getattr(encoder.settings, key) for key in _PUBLISHED}
    # A stock AST pools cls and dist; of an encoder alone nothing is pooled yet.
    stock = patch[0] == patch[1] and (alone or pooling == "cls") and options == _PUBLISHED
    if stock:
        config |= {
            "model_type": STOCK,
            "architectures": ["ASTModel"],
            _FRAMES[STOCK]: audio.num_frames,
            "patch_size": patch[0],
            "frequency_stride": stride[0],
            "time_stride": stride[1],
            "intermediate_size": 4 * encoder.embed_dim,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.02,
            "qkv_bias": True,
        }
    else:
        config |= {
            "model_type": OWN,
            "architectures": ["SsastModel"],
            _FRAMES[OWN]: audio.num_frames,
            "patch_shape": list(patch),
            "patch_stride": list(stride),
            "pooling": pooling,
            **options,
            "auto_map": {
                "AutoConfig": f"{REMOTE_CODE.stem}.SsastConfig",
                "AutoModel": f"{REMOTE_CODE.stem}.SsastModel",
                "AutoModelForAudioClassification": (
                    f"{REMOTE_CODE.stem}.SsastForAudioClassification"
                ),
            },
        }
    if isinstance(model, Classifier):
        config["architectures"] = [
            "ASTForAudioClassification" if stock else "SsastForAudioClassification"
        ]
        if not stock:
            config["head_layer_norm_eps"] = model.head[0].eps
    return config


def class_config(labels: list[str], names: list[str], loss: Loss | None) -> dict[str, Any]:
    """Return the part of a classifier's configuration that is about its classes."""
    found: dict[str, Any] = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if names != labels:
        found[_LABEL_IDS] = dict(zip(names, labels, strict=True))
    if loss is not None:
        found["problem_type"] = PROBLEM_TYPES[loss]
    return found


def find_classes(
    config: dict[str, Any], num_classes: int, folder: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels and the names of the classes of a folder."""
    found, ids = config.get("id2label", {}), config.get(_LABEL_IDS, {})
    for key, value in (("id2label", found), (_LABEL_IDS, ids)):
        if not isinstance(value, dict):
            raise CheckpointError(f"{folder / CONFIG}: {key} is {shown(value)}, expected names")
    names = tuple(str(found.get(str(i), f"LABEL_{i}")) for i in range(num_classes))
    # A head that was replaced since has other classes, and then no ids.
    known = set(names) == set(ids)
    return tuple(str(ids[name]) for name in names) if known else names, names


def find_loss(config: dict[str, Any], folder: Path) -> Loss | None:
    """Return the loss that a folder's ``problem_type`` stands for; None if it has none."""
    kind = config.get("problem_type")
    if kind is None:
        return None
    for loss, name in PROBLEM_TYPES.items():
        if kind == name:
            return loss
    known = " or ".join(PROBLEM_TYPES.values())
    raise CheckpointError(f"{folder / CONFIG}: problem_type is {shown(kind)}, expected {known}")


def find_epsilons(config: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Return the epsilons of the encoder's LayerNorms and of the head's."""
    eps = config.get("layer_norm_eps")
    found = (eps, config.get("head_layer_norm_eps", eps))
    if not all(isinstance(value, float) and 0 <= value < 1 for value in found):
        raise CheckpointError(f"{folder / CONFIG}: layer_norm_eps is {shown(found)}")
    return found  # type: ignore[return-value]  # floats, as has been checked


def find_settings(config: dict[str, Any], preprocessor: dict[str, Any], folder: Path) -> Config:
    """Return the settings that describe the model and its input.

    Raises:
        CheckpointError: A key is missing, or is none that our model has.
    """
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        sizes = {(s.embed_dim, s.num_heads): name for name, s in SIZES.items()}
        if not all(isinstance(n, int) for n in (width, heads)) or (width, heads) not in sizes:
            known = ", ".join(f"{w} with {h}" for w, h in sizes)
            raise CheckpointError(
                f"{folder / CONFIG}: hidden_size {shown(width)} with {shown(heads)} heads, "
                f"expected {known}"
            )
        if config["model_type"] == STOCK:
            expected = {"hidden_act": "gelu", "qkv_bias": True, "intermediate_size": 4 * width}
            for key, value in expected.items():
                if config[key] != value:
                    raise CheckpointError(
                        f"{folder / CONFIG}: {key} is {shown(config[key])}, expected {value!r}"
                    )
            patch = [config["patch_size"], config["patch_size"]]
            stride = [config["frequency_stride"], config["time_stride"]]
            pooling, options = "cls", _PUBLISHED
        else:
            patch, stride = config["patch_shape"], config["patch_stride"]
            pooling = config["pooling"]
            options = {key: config.get(key, usual) for key, usual in _PUBLISHED.items()}
        audio = {
            "sample_rate_hz": preprocessor["sampling_rate"],
            "channel": preprocessor.get("channel", "mean"),
            "n_mels": config["num_mel_bins"],
            "num_frames": config[_FRAMES[config["model_type"]]],
            "mean": preprocessor["mean"] if preprocessor["do_normalize"] else 0.0,
            "std": preprocessor["std"] if preprocessor["do_normalize"] else 0.5,
        }
        depth, size = config["num_hidden_layers"], sizes[width, heads]
    except KeyError as error:
        raise CheckpointError(f"{folder}: the key {error} is missing") from error
    model = {"size": size, "patch": patch, "depth": depth, **options}
    finetune = {"stride": stride, "pooling": pooling}
    try:
        return from_plain({"model": model, "audio": audio, "finetune": finetune})
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
