"""Losses of a pretrained model on clips that it was not trained on."""

from pathlib import Path

import torch

from ssast.engine.errors import CheckpointError
from ssast.engine.evaluation.predict import clips_at_once, default_device, on_device, one_pass
from ssast.engine.evaluation.progress import with_progress
from ssast.engine.formats.open import LoadedModel, open_model, open_raw
from ssast.engine.model.objective import PretrainingModel, with_masks
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.errors import DataError


@fast_matmul()
@torch.inference_mode()
def pretext_losses(
    model: LoadedModel | str | Path, source: str | Path, *, progress: bool = True
) -> dict[str, float]:
    """Compute the losses of a pretrained model as a validation of its run does.

    Args:
        model: A model with its pretraining heads, or the path of one.
        source: Clips, as ``data.valid`` takes them.
        progress: Show a progress bar on stderr, if that is a terminal.

    Returns:
        Means over the clips that can be read: ``loss`` and those of
        :meth:`~ssast.engine.model.objective.MSPM.forward`; and ``num_scored`` of ``num_clips``.

    Raises:
        CheckpointError: There is no model at the path, or it has no pretraining heads.
        DataError: The list of clips is wrong, or none can be read.
    """
    loaded = model if isinstance(model, LoadedModel) else open_model(model)
    paths, device = read_clips(source), default_device()
    module, totals, scored = on_device(_as_trained(loaded), device), dict[str, float](), 0
    if module.teacher is not None:
        on_device(module.teacher, device)
    with one_pass(paths, loaded.audio, device, batch_size=clips_at_once(loaded, device)) as batches:
        for batch in with_progress(batches, len(paths), "evaluate", progress):
            masks = module.held_out_masks(batch.clip_ids, batch.num_frames)
            valid = with_masks(batch.valid, masks)
            means = module.mean_losses(module(batch.fbank, *masks), valid)
            count = int(valid.sum())
            scored += count
            for name, value in means.items():
                totals[name] = totals.get(name, 0.0) + float(value) * count
    if not scored:
        raise DataError(f"{source}: none of {len(paths)} clips can be used, see ssast data check")
    values = {name: total / scored for name, total in totals.items()}
    return {"num_scored": scored, "num_clips": len(paths), **values}


def _as_trained(loaded: LoadedModel) -> PretrainingModel:
    """Return the model as a validation has it: of one with a teacher, raw weights beside averaged.

    Raises:
        CheckpointError: It has no pretraining heads, or a teacher and one kind of weights only.
    """
    if not isinstance(loaded.model, PretrainingModel):
        raise CheckpointError(f"{loaded.path}: expected a model with its pretraining heads")
    if not loaded.model.has_teacher:
        return loaded.model
    raw = open_raw(loaded)
    if raw is None or not isinstance(raw.model, PretrainingModel):
        raise CheckpointError(
            f"{loaded.path}: expected raw and averaged weights, which are student and teacher of "
            f"objective.kind {loaded.config.objective.kind!r}, found one kind"
        )
    teacher = raw.model.build_teacher()
    assert teacher is not None
    teacher.load_state_dict(loaded.encoder.state_dict())
    return raw.model
