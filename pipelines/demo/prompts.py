"""Recordings that no released model has heard: prompts of a telephone exchange, in six voices.

Speech of 8 kHz in Debian packages, for measuring what continued pretraining brings.
"""

import re

from ssast.pipelines.demo.tasks import Label, Task

PROMPT_PACKAGES = (
    "asterisk-core-sounds-en-wav",
    "asterisk-core-sounds-es-wav",
    "asterisk-core-sounds-fr-wav",
    "asterisk-core-sounds-it-wav",
    "asterisk-core-sounds-ru-wav",
    "asterisk-prompt-it-menardi-wav",
)
_PROMPT = re.compile(r"^asterisk-.*/sounds/([^/]+)/(.+)\.wav$")


def prompt_label(name: str) -> Label | None:
    """Return language and voice of a recording (``fr_CA_f_June``), grouped by what is said."""
    match = _PROMPT.search(name)
    return Label(match[1], match[2]) if match else None


PROMPT_TASKS = (
    Task("prompts", "who says an unseen prompt", prompt_label, 40, 300, first_part=True),
)
