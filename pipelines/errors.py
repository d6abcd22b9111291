"""The error for audio, manifests and folders that are not as they should be."""


class DataError(ValueError):
    """Something is wrong with the audio or the manifest; one line that names the culprit."""
