"""Where things of the repository are."""

from pathlib import Path

SUPPORT = Path(__file__).parent
GOLDEN = SUPPORT.parent / "golden"
ROOT = SUPPORT.parents[1]
