"""The public face of the project: everything that a Python user needs, in one place.

    from ssast.engine import api

    api.pretrain(api.load_config("base_patch", ["data.train=/my/recordings"]))
    engine = api.FinetuneEngine.from_checkpoint("runs/base_patch", num_classes=50)
    engine.fit("train.json", "valid.json", folder="runs/mine")
    api.predict("runs/mine", ["dog.wav"])
    api.embed("runs/mine", waveform)

Importing this module is cheap: each name is imported from its home when it is first used.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

_HOMES = {
    # Training
    "Config": "ssast.engine.config",
    "load_config": "ssast.engine.config",
    "pretrain": "ssast.engine.pretrain",
    "PretrainEngine": "ssast.engine.pretrain",
    "finetune": "ssast.engine.finetune",
    "FinetuneEngine": "ssast.engine.finetune",
    "cross_validate": "ssast.engine.folds",
    "Callback": "ssast.engine.train.callbacks",
    "RunState": "ssast.engine.train.callbacks",
    # Models from anywhere, and what they are for
    "LoadedModel": "ssast.engine.formats.open",
    "MissingMetadata": "ssast.engine.formats.open",
    "open_model": "ssast.engine.formats.open",
    "open_classifier": "ssast.engine.formats.open",
    "load_pretrained": "ssast.engine.formats.open",
    "published_metadata": "ssast.engine.formats.open",
    "Prediction": "ssast.engine.evaluation.predict",
    "predict": "ssast.engine.evaluation.predict",
    "Timeline": "ssast.engine.evaluation.timeline",
    "timelines": "ssast.engine.evaluation.timeline",
    "evaluate": "ssast.engine.evaluation.evaluate",
    "pretext_losses": "ssast.engine.evaluation.pretext",
    "embed": "ssast.engine.evaluation.features",
    "embed_recordings": "ssast.engine.evaluation.embedding",
    "visualize": "ssast.engine.evaluation.reconstructions",
    "MtebEncoder": "ssast.engine.evaluation.mteb",
    "XaresEncoder": "ssast.engine.evaluation.xares",
    # Modules, for loops of your own
    "MSPM": "ssast.engine.model.objective",
    "PretrainingModel": "ssast.engine.model.objective",
    "Backbone": "ssast.engine.model.backbones",
    "SpectrogramTransformer": "ssast.engine.model.encoder",
    "Classifier": "ssast.engine.model.classifier",
    # Names that settings know
    "register_objective": "ssast.engine.registry",
    "register_backbone": "ssast.engine.registry",
    "register_metric": "ssast.engine.registry",
    # The published code
    "ASTModel": "ssast.engine.formats.ast_model",
    "Layout": "ssast.engine.formats.published",
    "detect_layout": "ssast.engine.formats.published",
    "from_published": "ssast.engine.formats.published",
    "to_published": "ssast.engine.formats.published",
    "load_published": "ssast.engine.formats.published",
    "load_published_classifier": "ssast.engine.formats.published",
    "published_name": "ssast.engine.formats.published",
    "published_state": "ssast.engine.formats.published",
    "read_published": "ssast.engine.formats.published",
    "save_published": "ssast.engine.formats.published",
    # Other tools: transformers, ONNX, torch.export, s3prl
    "export_huggingface": "ssast.engine.formats.huggingface",
    "import_huggingface": "ssast.engine.formats.huggingface",
    "save_onnx": "ssast.engine.formats.portable",
    "save_program": "ssast.engine.formats.portable",
    "UpstreamExpert": "ssast.engine.formats.s3prl",
    "UpstreamSettings": "ssast.engine.formats.s3prl",
    "ssast_frame_base": "ssast.engine.formats.s3prl",
    "ssast_frame_tiny": "ssast.engine.formats.s3prl",
    "ssast_local": "ssast.engine.formats.s3prl",
    "ssast_patch_base": "ssast.engine.formats.s3prl",
    "ssast_patch_small": "ssast.engine.formats.s3prl",
    "ssast_patch_tiny": "ssast.engine.formats.s3prl",
    # Operations
    "FbankSpec": "ssast.kernels.mel",
    "fbank": "ssast.kernels.fbank",
    "Masks": "ssast.kernels.masking",
    "draw_masks": "ssast.kernels.masking",
    "patch_embed": "ssast.kernels.patch_embed",
    "attention": "ssast.kernels.attention",
    "info_nce": "ssast.kernels.mspm_loss",
    "mse": "ssast.kernels.mspm_loss",
    "fast_matmul": "ssast.kernels.matmul",
    # Errors
    "CheckpointError": "ssast.engine.errors",
    "ConfigError": "ssast.engine.errors",
    "LostPeer": "ssast.engine.errors",
    "ReportError": "ssast.engine.errors",
    "StopTraining": "ssast.engine.errors",
    "TrainingError": "ssast.engine.errors",
    "DataError": "ssast.pipelines.errors",
    # Data
    "TableFormat": "ssast.pipelines.clips.columns",
}

if TYPE_CHECKING:  # the same names, for editors and type checkers
    # ruff: noqa: F401
    from ssast.engine.config import Config, load_config
    from ssast.engine.errors import (
        CheckpointError,
        ConfigError,
        LostPeer,
        ReportError,
        StopTraining,
        TrainingError,
    )
    from ssast.engine.evaluation.embedding import embed_recordings
    from ssast.engine.evaluation.evaluate import evaluate
    from ssast.engine.evaluation.features import embed
    from ssast.engine.evaluation.mteb import MtebEncoder
    from ssast.engine.evaluation.predict import Prediction, predict
    from ssast.engine.evaluation.pretext import pretext_losses
    from ssast.engine.evaluation.reconstructions import visualize
    from ssast.engine.evaluation.timeline import Timeline, timelines
    from ssast.engine.evaluation.xares import XaresEncoder
    from ssast.engine.finetune import FinetuneEngine, finetune
    from ssast.engine.folds import cross_validate
    from ssast.engine.formats.ast_model import ASTModel
    from ssast.engine.formats.huggingface import export_huggingface, import_huggingface
    from ssast.engine.formats.open import (
        LoadedModel,
        MissingMetadata,
        load_pretrained,
        open_classifier,
        open_model,
        published_metadata,
    )
    from ssast.engine.formats.portable import save_onnx, save_program
    from ssast.engine.formats.published import (
        Layout,
        detect_layout,
        from_published,
        load_published,
        load_published_classifier,
        published_name,
        published_state,
        read_published,
        save_published,
        to_published,
    )
    from ssast.engine.formats.s3prl import (
        UpstreamExpert,
        UpstreamSettings,
        ssast_frame_base,
        ssast_frame_tiny,
        ssast_local,
        ssast_patch_base,
        ssast_patch_small,
        ssast_patch_tiny,
    )
    from ssast.engine.model.backbones import Backbone
    from ssast.engine.model.classifier import Classifier
    from ssast.engine.model.encoder import SpectrogramTransformer
    from ssast.engine.model.objective import MSPM, PretrainingModel
    from ssast.engine.pretrain import PretrainEngine, pretrain
    from ssast.engine.registry import register_backbone, register_metric, register_objective
    from ssast.engine.train.callbacks import Callback, RunState
    from ssast.kernels.attention import attention
    from ssast.kernels.fbank import fbank
    from ssast.kernels.masking import Masks, draw_masks
    from ssast.kernels.matmul import fast_matmul
    from ssast.kernels.mel import FbankSpec
    from ssast.kernels.mspm_loss import info_nce, mse
    from ssast.kernels.patch_embed import patch_embed
    from ssast.pipelines.clips.columns import TableFormat
    from ssast.pipelines.errors import DataError
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = found  # the next time this function is not asked
        return found

    def __dir__() -> list[str]:
        return sorted(__all__)

    # Not for type checkers, which take the imports above for all there is.
    __all__ = [*_HOMES, "__version__"]

__version__ = version("ssast-engine")
