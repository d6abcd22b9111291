"""A run says once what of the spectrogram is in no patch."""

import torch
from finetune_runs import load
from hypothesis import given
from hypothesis import strategies as st

from ssast.engine.config import Audio, Config, Finetune, Model
from ssast.engine.finetune import finetune
from ssast.engine.train.run import outside_patches
from ssast.kernels.patch_embed import cut_patches

pairs = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(st.integers(6, 20), st.integers(6, 20), pairs, st.none() | pairs)
def test_bins_and_frames_in_no_patch_are_counted(bins, frames, patch, stride):
    config = Config(
        audio=Audio(n_mels=bins, num_frames=frames),
        model=Model(patch=patch),
        finetune=Finetune(stride=stride),
    )
    spectrogram = torch.zeros(1, frames, bins, requires_grad=True)
    cut_patches(spectrogram, patch, stride or patch).sum().backward()
    seen = spectrogram.grad[0] > 0
    unseen = [int((~seen.any(axis)).sum()) for axis in (0, 1)]
    expected = [
        f"{count} of {total} {name}"
        for count, total, name in zip(unseen, (bins, frames), ("mel bins", "frames"), strict=True)
        if count
    ]
    found = outside_patches(config)
    assert len(found) == bool(expected)
    assert not expected or found[0].startswith(" and ".join(expected) + " are in no patch")


def test_a_run_says_it(recipe, splits, checkpoint, tmp_path, capsys):
    config = load(recipe, splits, tmp_path / "run", finetune__epochs=1, finetune__stride=[10, 10])
    assert finetune(config, checkpoint) == 0
    line = "6 of 32 mel bins and 2 of 48 frames are in no patch (patches of 16 x 16, 10 x 10 apart)"
    printed = capsys.readouterr().out
    assert printed.count(line) == 1, printed
