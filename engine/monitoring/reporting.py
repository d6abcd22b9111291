"""Errors while reports and figures are made, which must not look like lost work."""

from collections.abc import Iterator
from contextlib import contextmanager

from ssast.engine.errors import ReportError


@contextmanager
def reporting(safe: str) -> Iterator[None]:
    """Raise a ReportError for whatever goes wrong in the body, which draws and writes reports.

    Args:
        safe: What is finished and safe all the same, and how the report is written again.
    """
    try:
        yield
    # A full disk, a font, a name that matplotlib cannot draw: none of it may look like lost work.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ReportError(f"the report could not be written: {reason}; {safe}") from error
