import pytest
import torch

from ssast.engine.model.classifier import Classifier, embed_clips, pool
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio, Model


def make(stride=None):
    torch.manual_seed(0)
    model, audio = Model(size="tiny", depth=1), Audio(num_frames=64)
    return SpectrogramTransformer(model, audio, stride).eval()


@pytest.mark.parametrize("stride", [None, (10, 10)], ids=str)
def test_padding_is_left_out_of_the_mean(stride):
    encoder = make(stride)
    fbank = torch.randn(4, 64, 128)
    num_frames = torch.tensor([64, 30, 1, 0])
    rows, columns = encoder.embed.grid
    hidden, _ = encoder(fbank, encoder.no_masks(4))
    given = embed_clips(encoder, fbank, num_frames=num_frames)
    for clip, frames in enumerate(num_frames.tolist()):
        starts = [t * encoder.embed.stride[1] for t in range(columns)]
        kept = [t for t, start in enumerate(starts) if start < max(frames, 1)]
        tokens = [hidden[clip, 2 + f * columns + t] for f in range(rows) for t in kept]
        torch.testing.assert_close(given[clip], torch.stack(tokens).mean(0))


def test_a_full_clip_is_pooled_as_published():
    encoder, fbank = make(), torch.randn(2, 64, 128)
    full = embed_clips(encoder, fbank, num_frames=torch.tensor([64, 64]))
    torch.testing.assert_close(full, embed_clips(encoder, fbank))


def test_pooling_and_gradients():
    hidden = torch.randn(2, 34, 192)
    torch.testing.assert_close(pool(hidden, "cls"), (hidden[:, 0] + hidden[:, 1]) / 2)
    torch.testing.assert_close(pool(hidden, "avgtok"), hidden[:, 2:].mean(1))
    classifier = Classifier(make(), 5, "cls")
    logits = classifier(torch.randn(3, 64, 128))
    assert logits.shape == (3, 5)
    logits.sum().backward()
    assert classifier.encoder.embed.weight.grad.abs().sum() > 0
