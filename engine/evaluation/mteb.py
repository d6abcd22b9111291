"""The encoder that MTEB evaluates on tasks with audio.

    import mteb
    from ssast.engine.api import MtebEncoder

    mteb.evaluate(MtebEncoder("runs/mine"), mteb.get_tasks(["BeijingOpera"]))

MTEB itself is needed for the metadata alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssast.engine.errors import ConfigError
from ssast.engine.evaluation.features import load_waveforms
from ssast.engine.evaluation.harness import Pooling, WaveformEncoder
from ssast.engine.evaluation.predict import default_device
from ssast.engine.formats.open import LoadedModel
from ssast.pipelines.audio.decode import downmix
from ssast.pipelines.errors import DataError


class MtebEncoder(WaveformEncoder):
    """An encoder of MTEB (its ``EncoderProtocol``): one vector for each recording of a data set.

    Args:
        model: A loaded model, or what :func:`~ssast.engine.formats.open.open_model` opens.
        pooling: ``model`` as ``ssast embed``, or ``time``, the mean over time.
        layer: Layer whose hidden states are taken: its number, or ``last``.

    Raises:
        CheckpointError: There is no model.
        ConfigError: The pooling is unknown, or the model has no such layer.
    """

    def __init__(
        self,
        model: LoadedModel | str | Path,
        *,
        pooling: Pooling = "model",
        layer: int | Literal["last"] = "last",
    ):
        super().__init__(model, pooling=pooling, layer=layer)
        self.to(default_device())

    @property
    def mteb_model_meta(self) -> Any:
        """The ``ModelMeta`` under which MTEB keeps scores; its revision is a hash of the weights.

        Raises:
            ConfigError: MTEB is not installed.
        """
        try:
            from mteb.models import ModelMeta
        except ImportError as error:
            raise ConfigError('MTEB is not installed: pip install "mteb[audio]"') from error
        known = {
            "name": f"ssast/{self.name}",
            "revision": self.fingerprint(),
            "n_parameters": sum(p.numel() for p in self.encoder.parameters()),
            "embed_dim": self.embed_dim,
            "modalities": ["audio"],
            "framework": ["PyTorch"],
            "similarity_fn_name": "cosine",
            "use_instructions": False,
        }
        unknown = (
            *("loader", "release_date", "languages", "memory_usage_mb", "max_tokens", "license"),
            *("open_weights", "public_training_code", "public_training_data", "training_datasets"),
        )
        return ModelMeta(**dict.fromkeys(unknown), **known)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        show_progress_bar: bool = True,
        batch_size: int | None = None,
        precision: str = "float32",
    ) -> np.ndarray:
        """Embed the recordings of a data set.

        Args:
            inputs: ``DataLoader`` of rows with ``audio``: its ``array`` [S] or [C, S], floating
                point in [-1, 1], and its ``sampling_rate`` in Hz, from which it is resampled.
            task_metadata: Metadata of the task, of which the name is shown.
            hf_split: Split of the data set.
            hf_subset: Subset of the data set.
            prompt_type: Not used.
            show_progress_bar: Whether to show the number of batches.
            batch_size: Not used; that of ``inputs`` holds.
            precision: ``float32`` alone.

        Returns:
            [N, D] float32.

        Raises:
            ConfigError: The data set has no audio, or another precision is wanted.
            DataError: A recording is empty, shorter than one frame, or holds NaN.
        """
        from tqdm.auto import tqdm

        name = getattr(task_metadata, "name", task_metadata)
        if precision != "float32":
            raise ConfigError(f"{name}: expected precision float32, found {precision}")
        inputs.collate_fn = _rows
        vectors: list[Tensor] = []
        done = 0
        for rows in tqdm(inputs, desc=str(name), disable=not show_progress_bar):
            waves = [
                self._load(row, f"{name} {hf_subset} {hf_split}, row {done + number}")
                for number, row in enumerate(rows)
            ]
            vectors.append(self._embed(waves))
            done += len(rows)
        return torch.cat(vectors).numpy()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosine of all pairs of [N, D] and [M, D], [N, M]."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosine of each row of [N, D] with the same row of another [N, D], [N]."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(-1)

    def _load(self, row: Mapping[str, Any], name: str) -> Tensor:
        """Return the audio of a row, [S] at the sample rate of the model."""
        if "audio" not in row:
            raise ConfigError(f"{name}: expected audio, found {', '.join(row)}")
        audio = row["audio"]
        array = np.asarray(audio["array"])
        if array.ndim == 2:
            array = downmix(array.T, self.spec.channel)
        try:
            return load_waveforms(array, audio["sampling_rate"], self.spec)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    def _embed(self, waves: Sequence[Tensor]) -> Tensor:
        """Embed waveforms of any lengths, [B, D] on the CPU."""
        device = self.encoder.embed.weight.device
        lengths = torch.tensor([len(wave) for wave in waves], device=device)
        padded = nn.utils.rnn.pad_sequence(list(waves), batch_first=True).to(device)
        return self.clips(padded, lengths).cpu()


def _rows(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave the rows of a batch as they are: recordings have any length and sample rate."""
    return list(rows)


def _unit(embeddings: Any) -> Tensor:
    return functional.normalize(torch.as_tensor(embeddings, dtype=torch.float32), dim=-1)
