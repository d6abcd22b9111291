import math

import numpy as np
import pytest
import torch
from scipy import stats

from ssast.engine.data import augment
from ssast.engine.data.augment import Draw
from ssast.engine.data.labels import LabelledClips, targets_of
from ssast.engine.data.sampling import Partners, balanced_weights
from ssast.kernels.fbank import FbankSpec, fbank
from ssast.pipelines.clips.order import clips_at


def draw(count, *, seed=0, first=0, epoch=0):
    return Draw(seed, torch.arange(first, first + count), torch.full((count,), epoch))


def labelled(labels, num_classes):
    offsets = np.cumsum([0, *map(len, labels)])
    indices = np.array([i for clip in labels for i in clip])
    names = tuple(f"c{i}" for i in range(num_classes))
    return LabelledClips([f"{i}.wav" for i in range(len(labels))], names, indices, offsets, "test")


def augmented(draw, fbank):
    shaped = augment.spec_augment(fbank, draw, 8, 12, whole(fbank))
    noisy = augment.add_noise(shaped, draw, 0.5)
    return augment.roll(noisy, draw, 10, whole(fbank))


def whole(fbank):
    return torch.full((len(fbank),), fbank.shape[1])


def test_a_clip_is_augmented_the_same_in_any_batch():
    fbank = torch.randn(6, 40, 16)
    whole = augmented(draw(6), fbank)
    for row in range(6):
        alone = augmented(draw(1, first=row), fbank[row : row + 1])
        assert torch.equal(alone[0], whole[row])
    assert not torch.equal(augmented(draw(6, epoch=1), fbank), whole)
    assert not torch.equal(augmented(draw(6, seed=1), fbank), whole)


def test_uniform_numbers_are_uniform():
    numbers = draw(300).uniform(9, 50)
    assert numbers.shape == (300, 50) and numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.flatten(), "uniform").pvalue > 1e-3


def test_mixup_shares_follow_their_distribution():
    shares = augment.mixup_shares(draw(4000), 0.3)
    mixed = shares[shares < 1]
    assert len(mixed) / 4000 == pytest.approx(0.3, abs=0.03)
    assert stats.kstest(mixed, stats.beta(10, 10).cdf).pvalue > 1e-3
    assert (augment.mixup_shares(draw(50), 0.0) == 1).all()


def test_mixtures_have_the_power_of_mixed_sounds():
    """Against the mean over many pairs of random signals, mixed as samples."""
    generator = torch.Generator().manual_seed(0)
    a = 3.0 * torch.randn(200_000, generator=generator)
    b = 0.5 * torch.randn(200_000, generator=generator)
    for share in (0.2, 0.5, 0.9):
        want = (share * a + (1 - share) * b).square().mean().log()
        logs = [x.square().mean().log().view(1, 1, 1) for x in (a, b)]
        one = torch.ones(1, dtype=torch.int64)
        got = augment.mix(logs[0], one, logs[1], one, torch.tensor([share]))
        assert got.item() == pytest.approx(want.item(), abs=0.01)


def test_mixup_is_the_published_one_but_for_chance():
    """Waveforms mixed as published differ by less than by the sign of one, which nobody hears."""
    generator, length = torch.Generator().manual_seed(0), 16000
    spec = FbankSpec(num_frames=98)
    differences, signs = [], []
    for share in (0.35, 0.5, 0.65):
        a, b = 0.1 * torch.randn(2, length, generator=generator)
        b[1:] += b[:-1].clone()  # darker
        a, b = a - a.mean(), b - b.mean()
        waves = torch.stack([a, b, share * a + (1 - share) * b, share * a - (1 - share) * b])
        waves -= waves.mean(1, keepdim=True)
        one, other, published, flipped = fbank(waves, torch.full((4,), length), spec)
        frames = torch.tensor([98])
        mixed = augment.mix(one[None], frames, other[None], frames, torch.tensor([share]))[0]
        differences.append(published - mixed)
        signs.append(published - flipped)
    found, by_sign = torch.stack(differences), torch.stack(signs)
    assert abs(found.median()) < 0.05 and -0.25 < found.mean() < -0.05
    assert found.std() < 0.75 and found.std() < 0.6 * by_sign.std()


def test_mixtures_are_as_long_as_the_first_clip():
    fbank, other = torch.full((3, 10, 4), -3.0), torch.full((3, 10, 4), -5.0)
    frames, others = torch.tensor([6, 10, 6]), torch.tensor([10, 4, 10])
    for row in range(3):
        fbank[row, frames[row] :], other[row, others[row] :] = 0, 0
    share = torch.tensor([0.5, 0.5, 1.0])
    mixed = augment.mix(fbank, frames, other, others, share)
    assert (mixed[0, 6:] == 0).all()
    both = math.log(0.25 * math.exp(-3) + 0.25 * math.exp(-5))
    assert mixed[0, :6].flatten().tolist() == pytest.approx([both] * 24, abs=1e-5)
    assert mixed[1, 4:].flatten().tolist() == pytest.approx([-3 + 2 * math.log(0.5)] * 24, abs=1e-5)
    assert torch.equal(mixed[2], fbank[2])
    assert mixed.isfinite().all()
    targets = augment.mix_targets(torch.eye(3), torch.eye(3).roll(1, 0), share)
    assert targets.sum(1).tolist() == [1, 1, 1] and targets[2].tolist() == [0, 0, 1]


def test_spec_augment_hides_one_band_and_one_run():
    fbank = torch.ones(500, 30, 20)
    hidden = augment.spec_augment(fbank, draw(500), 8, 12, whole(fbank)) == 0
    bins, times = hidden.all(1), hidden.all(2)  # [B, F], [B, T]
    assert torch.equal(hidden, bins[:, None, :] | times[:, :, None])
    for flags, widest in ((bins, 8), (times, 12)):
        width = flags.sum(1)
        edges = (flags[:, 1:] != flags[:, :-1]).sum(1)
        assert (edges <= 2).all() and width.max() == widest - 1  # below the parameter, as published
        assert width.float().mean().item() == pytest.approx((widest - 1) / 2, abs=0.4)
        assert flags[:, 0].any() and flags[:, -2].any()
    shares = augment.spec_augment(fbank, draw(500), 8 / 20, 12 / 30, whole(fbank))
    assert torch.equal(shares == 0, hidden)
    assert torch.equal(augment.spec_augment(fbank, draw(500), 0, 0, whole(fbank)), fbank)


@pytest.mark.parametrize("mask", [12 / 30, 12])
def test_spec_augment_hides_of_a_short_clip_what_it_hides_of_a_long_one(mask):
    fbank = torch.ones(4000, 300, 20)
    frames = torch.tensor([30, 10] * 2000)
    hidden = (augment.spec_augment(fbank, draw(4000), 0, mask, frames) == 0).all(2)
    assert not hidden[0::2, 30:].any() and not hidden[1::2, 10:].any()
    widths = hidden.sum(1)
    assert widths[0::2].max() == 11 and widths[1::2].max() == (3 if mask < 1 else 9)
    assert hidden[1::2, 0].any() and hidden[1::2, 8].any()
    alone = augment.spec_augment(fbank[:, :30], draw(4000), 0, mask, frames.clamp(min=30))
    assert torch.equal(hidden[0::2, :30], (alone == 0).all(2)[0::2])


def test_noise_is_positive_and_bounded():
    fbank = torch.zeros(200, 20, 10)
    noise = augment.add_noise(fbank, draw(200), 0.8)
    assert noise.min() >= 0 and noise.max() < 0.8
    largest = noise.amax((1, 2))
    assert largest.mean().item() == pytest.approx(0.4, abs=0.05)


def test_rolling_keeps_the_frames_of_a_clip():
    fbank = torch.arange(400 * 30.0).view(400, 30, 1)
    frames = torch.tensor([30, 12] * 200)
    rolled = augment.roll(fbank, draw(400), 10, frames)
    shifts = set()
    for row in range(400):
        end = int(frames[row])
        assert torch.equal(rolled[row, end:], fbank[row, end:])
        shift = int((rolled[row, :end, 0] == fbank[row, 0, 0]).nonzero())
        assert torch.equal(rolled[row, :end], fbank[row, :end].roll(shift, 0))
        shifts.add(shift - 30 if end == 30 and shift > 15 else shift if end == 30 else 0)
    assert shifts == set(range(-10, 10))  # as published


def test_targets_of_several_labels():
    clips = labelled([(0,), (1, 2), (2,), (0, 1, 2)], 4)
    want = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 0]]
    assert clips.targets().tolist() == want
    rows = torch.tensor([3, 0, 3])
    assert targets_of(clips.table(), rows, 4).tolist() == [want[3], want[0], want[3]]
    empty = labelled([(), (1,), ()], 3)
    assert empty.targets().tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]] and not empty.single
    assert empty.take(np.array([0, 2])).targets().tolist() == [[0, 0, 0]] * 2
    part = clips.take(np.array([1, 3]))
    assert part.targets().tolist() == [want[1], want[3]] and part.paths == ["1.wav", "3.wav"]


def test_balanced_draws_show_each_class_as_often():
    clips = labelled([(0,)] * 90 + [(1,)] * 10, 2)
    rows, _ = clips_at(np.arange(1000), 100, 3, balanced_weights(clips))
    assert (rows >= 90).mean() == pytest.approx(0.5, abs=0.02)


def test_balanced_draws_take_clips_without_a_label_as_one_class_more():
    clips = labelled([(), *[(0,)] * 50, *[()] * 39, *[(0, 1)] * 9, ()], 3)
    rows, _ = clips_at(np.arange(4000), 100, 3, balanced_weights(clips))
    empty = np.diff(clips.offsets) == 0
    assert empty.sum() == 41 and empty[rows].mean() == pytest.approx(1 / 3, abs=0.02)
    assert (empty[rows] & (rows == 99)).sum() == pytest.approx(4000 / 3 / 41, abs=5)


def test_partners_depend_on_clip_and_epoch_alone():
    clips = labelled([(0,)] * 50, 2)
    partners = Partners(clips.paths, 200, 5, None)
    places = np.arange(200)
    rows, (ids, epochs) = partners.rows(places), clips_at(places, 50, 5)
    assert rows.min() >= 0 and len(set(rows[:50])) > 20
    assert partners[77] == clips.paths[rows[77]] and len(partners) == 200
    first = {int(i): int(r) for i, r, e in zip(ids, rows, epochs, strict=True) if e == 0}
    second = {int(i): int(r) for i, r, e in zip(ids, rows, epochs, strict=True) if e == 1}
    assert first != second
    with pytest.raises(IndexError):
        partners[200]
