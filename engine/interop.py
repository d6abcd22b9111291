"""Every door to other people's code, under one name.

The published code: its checkpoints in and out, and its model's interface, :class:`ASTModel`.
Folders of Hugging Face transformers. Whatever a path holds: :func:`open_model`. ONNX and
torch.export are in portable.py, s3prl in upstream.py.
"""

from ssast.engine.formats.ast_model import ASTModel
from ssast.engine.formats.huggingface import export_huggingface, import_huggingface
from ssast.engine.formats.open import Opened, Unsaid, open_model
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

__all__ = [
    "ASTModel",
    "Layout",
    "Opened",
    "Unsaid",
    "detect_layout",
    "export_huggingface",
    "from_published",
    "import_huggingface",
    "load_published",
    "load_published_classifier",
    "open_model",
    "published_name",
    "published_state",
    "read_published",
    "save_published",
    "to_published",
]
