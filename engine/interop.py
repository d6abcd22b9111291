"""Every door to other people's code, under one name.

The published code: its checkpoints in and out, and its model's interface, :class:`ASTModel`.
"""

from ssast.engine.published import ASTModel
from ssast.engine.published_state import (
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
    "detect_layout",
    "from_published",
    "load_published",
    "load_published_classifier",
    "published_name",
    "published_state",
    "read_published",
    "save_published",
    "to_published",
]
