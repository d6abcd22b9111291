"""Which channel of a recording is heard; apart from the filterbank, since readers need no torch."""

from typing import Literal

Channel = Literal["mean", "left", "right"]
