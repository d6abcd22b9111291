"""A Griffe extension: Sphinx roles in docstrings become plain code, ``:class:`~a.B``` to `B`."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")


def plain(text: str) -> str:
    """Return the text with each role replaced by the name that it shows."""
    return ROLE.sub(lambda m: f"`{m[2].rsplit('.', 1)[-1] if m[1] else m[2]}`", text)


class Roles(griffe.Extension):
    """Rewrite the docstring of every object that Griffe reads."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the roles in the docstring of an object, if it has one."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
