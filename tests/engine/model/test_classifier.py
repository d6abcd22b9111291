import pytest
import torch
from golden_model import golden, pretraining_case

from ssast.engine.checkpoints.classifier import build_classifier, fill_encoder
from ssast.engine.config import from_plain
from ssast.engine.data.augment import Draw
from ssast.engine.data.token_dropping import keep_patches
from ssast.engine.finetune_settings import Finetune
from ssast.engine.model.classifier import (
    Classifier,
    LossClassifier,
    embed_clips,
    embed_kept,
    pool,
)
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio, Model
from ssast.kernels.attention import make_padding_mask


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


@pytest.mark.parametrize("pooling", ["avgtok", "cls"])
@pytest.mark.parametrize(
    ("options", "stride", "padded"),
    [
        ({}, None, True),
        ({}, (10, 10), False),
        ({"patch": (128, 2)}, None, True),
        ({"norm": "post", "extra_tokens": "cls", "positions": "sincos"}, None, True),
    ],
    ids=["patch", "stride", "frame", "post"],
)
def test_dropped_tokens_are_as_if_never_there(options, stride, padded, pooling):
    """Beside all tokens with an attention mask, values and gradients in float64."""
    torch.manual_seed(0)
    model = Model(size="tiny", depth=2, **options)
    audio = Audio(num_frames=64, ignore_padding=padded)
    encoder = SpectrogramTransformer(model, audio, stride).double()
    fbank = torch.randn(4, 64, 128, dtype=torch.float64)
    frames = torch.tensor([64, 40, 16, 50]) if padded else None
    rows, columns = encoder.embed.grid
    settings = Finetune(drop_tokens=0.3, drop_columns=1, drop_rows=min(2, rows - 1))
    draw = Draw(0, torch.arange(4), torch.arange(4))
    own = encoder.embed.valid_columns(frames)
    kept = keep_patches(draw, settings, encoder.embed.grid, own)
    is_kept = torch.zeros(4, rows * columns, dtype=torch.bool)
    for b in range(4):
        count = kept.ids.shape[1] if kept.num_valid is None else kept.num_valid[b]
        is_kept[b, kept.ids[b, :count]] = True
    assert 0 < is_kept.sum() < 4 * rows * columns

    E = encoder.num_extra_tokens
    tokens, _ = encoder.embed_tokens(fbank)
    mask = make_padding_mask(torch.cat((torch.ones(4, E, dtype=torch.bool), is_kept), 1))
    hidden = encoder.encode_tokens(tokens, mask)
    if pooling == "cls":
        want = hidden[:, :E].mean(1)
    else:
        want = torch.stack(
            [h[flags].mean(0) for h, flags in zip(hidden[:, E:], is_kept, strict=True)]
        )
    got = embed_kept(encoder, fbank, kept, pooling)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weights = torch.randn_like(got)
    named = [(n, p) for n, p in encoder.named_parameters() if p.requires_grad]
    results = [
        torch.autograd.grad((x * weights).sum(), [p for _, p in named], allow_unused=True)
        for x in (got, want)
    ]
    for (name, _), a, b in zip(named, *results, strict=True):
        if b is not None:
            assert (a - b).abs().max() <= 1e-11 * max(1.0, float(b.abs().max())), name


def test_a_full_clip_is_pooled_as_published():
    encoder, fbank = make(), torch.randn(2, 64, 128)
    full = embed_clips(encoder, fbank, num_frames=torch.tensor([64, 64]))
    torch.testing.assert_close(full, embed_clips(encoder, fbank))


def test_pooling_and_gradients():
    hidden = torch.randn(2, 34, 192)
    torch.testing.assert_close(pool(hidden, "cls", 2), (hidden[:, 0] + hidden[:, 1]) / 2)
    torch.testing.assert_close(pool(hidden, "cls", 1), hidden[:, 0])
    torch.testing.assert_close(pool(hidden, "avgtok", 2), hidden[:, 2:].mean(1))
    classifier = Classifier(make(), 5, "cls")
    logits = classifier(torch.randn(3, 64, 128))
    assert logits.shape == (3, 5)
    logits.sum().backward()
    assert classifier.encoder.embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["patch", "frame"])
def test_the_published_classifier_comes_out(kind):
    """Pretrained weights in another grid, a head: the published logits."""
    for case in golden(kind)["finetune"]:
        pretrained, _, _ = pretraining_case(kind, torch.float64)
        plain = {
            "model": {"size": "tiny", "depth": 2, "patch": list(pretrained.encoder.embed.patch)},
            "audio": {"num_frames": case["input_tdim"], "mean": 0.0, "std": 0.5},
        }
        for pooling in ("avgtok", "cls"):
            stride = [case["fstride"], case["tstride"]]
            config = from_plain({**plain, "finetune": {"stride": stride, "pooling": pooling}})
            classifier = build_classifier(config, case["label_dim"]).double()
            fill_encoder(classifier.encoder, pretrained.encoder)
            head = {name: value.double() for name, value in case["mlp_head"].items()}
            classifier.head.load_state_dict(head)
            logits, want = classifier(case["input"].double()), case[f"ft_{pooling}"]
            exact = 1e-8 if config.grid == (1, 150) else 1e-10
            assert (logits - want).abs().max() < exact * want.abs().max()


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_class_weights_are_factors_in_the_loss(loss):
    """They weigh the terms of the classes that a clip has, in training mode only."""
    torch.manual_seed(0)
    config = from_plain(
        {"model": {"size": "tiny", "depth": 1}, "audio": {"num_frames": 32}, "finetune": {}}
    )
    model = build_classifier(config, 3, LossClassifier)
    model.loss = loss
    fbank, targets = torch.randn(4, 32, 128), torch.eye(3)[[0, 1, 2, 1]]
    weights = torch.tensor([0.5, 2.0, 0.0])
    plain = model(fbank, targets)
    model.class_weights = weights
    weighted = model(fbank, targets)
    logits = plain["logits"]
    if loss == "ce":
        want = -(weights * targets * logits.log_softmax(1)).sum(1)
    else:
        terms = (
            weights * targets * logits.sigmoid().log() + (1 - targets) * (-logits).sigmoid().log()
        )
        want = -terms.mean(1)
    torch.testing.assert_close(weighted["loss"], want)
    assert model.eval()(fbank, targets)["loss"].equal(plain["loss"])
    assert "class_weights" not in model.state_dict()
