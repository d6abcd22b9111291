"""Errors that the user, a disk or another process can cause; their messages are for people.

The ``ssast`` command prints each in one line. For audio and manifests see
:mod:`ssast.pipelines.errors`.
"""


class ConfigError(ValueError):
    """A wrong setting; the message names the key, what was found and what was expected."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file and the reason."""


class SaveError(CheckpointError):
    """A checkpoint that cannot be written since storage fails, which may work again later."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message gives the step and the reason."""


class ReportError(RuntimeError):
    """A report or a figure that cannot be written; the message says what is safe all the same."""


class LostPeer(RuntimeError):
    """Another process of the run has ended, hangs or never started; the message says which."""


class StopTraining(Exception):  # no error: a callback raises it, and it never leaves the run
    """A callback ends the run, for the reason that is its message."""


class Stopped(Exception):  # no error: it leaves a validation, and never the trainer
    """The run was asked to stop by a signal, in the middle of a validation."""
