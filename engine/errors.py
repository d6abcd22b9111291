"""What a user, a disk or another process may do wrong: errors whose message is for people."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the folder and the reason."""


class ConfigError(ValueError):
    """The configuration is wrong; the message names the key."""


class LostPeer(RuntimeError):
    """Another process of the run has ended, hangs or was never there; the message says which."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""
