import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from runs import make_data, overrides, write_config

from ssast.engine.config import from_plain, load_config
from ssast.engine.data.clips import find_clips
from ssast.engine.evaluation import reconstructions
from ssast.engine.evaluation.reconstructions import complete, draw_reconstructions, visualize
from ssast.engine.formats.open import load_pretrained
from ssast.engine.model.objective import MSPM
from ssast.engine.monitoring.curves import draw_curves
from ssast.engine.pretrain import pretrain
from ssast.kernels.masking import draw_masks
from ssast.pipelines.errors import DataError


def small(patch):
    return MSPM(
        from_plain(
            {
                "model": {"size": "tiny", "depth": 1, "patch": patch},
                "audio": {"num_frames": 70},
                "objective": {"num_masked": 9},
            }
        )
    )


@pytest.mark.parametrize("patch", [[16, 16], [128, 2]], ids=str)
@torch.no_grad()
def test_what_is_visible_stays_and_what_is_hidden_is_predicted(patch):
    model = small(patch)
    fbank = torch.randn(2, 70, 128) * 4 - 4
    clips = torch.arange(2)
    masks = draw_masks(clips, clips, seed=0, kind="random", grid=model.grid, num_masked=9)
    hidden, completed = complete(model, fbank, masks)
    frames = 70 // patch[1] * patch[1]
    assert hidden.shape == completed.shape == (2, frames, 128)
    original = ((fbank - model.encoder.embed.mean) / (2 * model.encoder.embed.std))[:, :frames]
    seen = ~hidden.isnan()
    assert int((~seen).sum()) == 2 * 9 * patch[0] * patch[1]
    torch.testing.assert_close(hidden[seen], original[seen])
    torch.testing.assert_close(completed[seen], original[seen])
    first = masks.mask_ids[0, 0].item()
    f, t = divmod(first, model.grid[1])
    block = completed[0, t * patch[1] : (t + 1) * patch[1], f * patch[0] : (f + 1) * patch[0]]
    predicted = model.reconstruct(fbank, masks)[0, 0].view(*patch)
    torch.testing.assert_close(block.T, predicted)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = make_data(folder)
    config = load_config(
        write_config(folder),
        [*overrides(train__steps=2), *data, f"run.folder={folder / 'run'}"],
    )
    pretrain(config)
    return folder / "run"


@pytest.fixture
def drawn(monkeypatch):
    """Titles of the clips that are drawn."""
    found = []

    def draw(model, batch, path, titles):
        found.extend(titles)
        assert len(batch) == len(titles) and batch.valid.all()
        return draw_reconstructions(model, batch, path, titles)

    monkeypatch.setattr(reconstructions, "draw_reconstructions", draw)
    return found


def test_pictures_of_a_run(run):
    pictures = visualize(run, num_clips=2)
    assert [path.name for path in pictures] == ["curves.png", "reconstructions.png"]
    for path in pictures:
        image = matplotlib.image.imread(path)
        assert image.shape[1] > 1000 and image.std() > 0.05


@pytest.mark.parametrize("num_clips", [2, 3, 4, 9])
def test_no_clip_is_drawn_twice(num_clips, run, drawn):
    """Also where there are fewer than are asked for."""
    held_out = find_clips(load_pretrained(run)[1])[1]
    visualize(run, num_clips)
    assert len(drawn) == len(set(drawn)) == min(num_clips, len(held_out))


def test_clips_that_cannot_be_read_are_not_drawn(run, drawn, caplog):
    """They are named with the reason; the last test that reads the clips of this run."""
    held_out = [Path(path) for path in find_clips(load_pretrained(run)[1])[1]]
    held_out[1].write_bytes(b"no sound")
    visualize(run)
    assert drawn == [path.name for path in (held_out[0], *held_out[2:])]
    (said,) = [line for line in caplog.messages if "drawn" in line]
    assert said.startswith(f"cannot be drawn: {held_out[1]}: ")
    for path in held_out:
        path.write_bytes(b"")
    message = f"none of the {len(held_out)} held-out clips to be drawn can be read: {held_out[0]}"
    with pytest.raises(DataError, match=message):
        visualize(run)


def test_curves_of_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert draw_curves(tmp_path).exists()
    line = json.dumps({"step": 1, "train/loss": 1.0, "train/lr": 0.1})
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 2, "tr')  # cut off by a kill
    assert draw_curves(tmp_path).exists()
