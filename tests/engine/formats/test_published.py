"""Published checkpoints in and out."""

import dataclasses
import pickle
import re

import pytest
import safetensors.torch
import torch
from golden_model import PATCHES, config, golden, whole_state

from ssast.engine.api import (
    ASTModel,
    detect_layout,
    load_published,
    load_published_classifier,
    open_model,
    published_metadata,
    published_state,
    read_published,
    save_published,
)
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import MSPM
from ssast.engine.settings import Audio, Model

kinds = pytest.mark.parametrize("kind", ["patch", "frame"])


def small_classifier(stride=(10, 10), pooling="avgtok"):
    torch.manual_seed(0)
    audio, model = Audio(num_frames=96), Model(size="tiny", depth=2)
    return Classifier(SpectrogramTransformer(model, audio, stride), 7, pooling).eval()


@pytest.mark.compatible("published SSAST code", "its files, in and out")
@kinds
def test_published_pretrained_file_goes_round(kind, tmp_path):
    """Every number of the file comes back, and the losses are the published ones."""
    state = {
        name: value.float() if value.is_floating_point() else value
        for name, value in whole_state(kind).items()
    }
    torch.save(state, tmp_path / "theirs.pth")
    model, settings = load_published(tmp_path / "theirs.pth", mean=0.0, std=0.5)
    assert settings.model == config(kind).model
    assert settings.audio == config(kind).audio
    save_published(model, tmp_path / "ours.pth", settings.audio)
    again = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert set(again) == set(state)
    for name, value in state.items():
        assert again[name].equal(value) and again[name].dtype == value.dtype, name


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_our_pretrained_model_goes_round(patch, tmp_path):
    settings = from_plain(
        {
            "model": {"size": "tiny", "depth": 2, "patch": list(patch)},
            "audio": {"num_frames": 100, "mean": -5.0, "std": 4.0},
            "objective": {"num_masked": 20, "mask": "random"},
        }
    )
    model = MSPM(settings).eval()
    save_published(model, tmp_path / "a" / "ours.pth", settings.audio)
    again, found = load_published(tmp_path / "a" / "ours.pth", mean=-5.0, std=4.0)
    assert (found.model, found.audio) == (settings.model, settings.audio)
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].equal(value), name


@pytest.mark.parametrize("pooling", ["avgtok", "cls"])
def test_our_classifier_goes_round_and_into_the_published_model(pooling, tmp_path):
    classifier, x = small_classifier(pooling=pooling), torch.randn(2, 96, 128)
    save_published(classifier, tmp_path / "tuned.pth")
    again = load_published_classifier(
        tmp_path / "tuned.pth", num_frames=96, stride=(10, 10), pooling=pooling
    )
    with torch.no_grad():
        assert again(x).equal(classifier(x))

    pretrained = MSPM(from_plain({"model": {"size": "tiny", "depth": 2}}))
    save_published(pretrained, tmp_path / "pretrained.pth")
    theirs = ASTModel(
        7, 16, 16, 10, 10, 128, 96, "tiny", False, tmp_path / "pretrained.pth"
    ).eval()  # fmt: skip
    state = torch.load(tmp_path / "tuned.pth", weights_only=True)
    torch.nn.DataParallel(theirs).load_state_dict(state, strict=True)
    normalised = classifier.encoder.embed.normalise(x)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(normalised, f"ft_{pooling}"), classifier(x), rtol=1e-5, atol=1e-5
        )


def test_golden_fine_tuned_model_from_a_file(tmp_path):
    """The published logits, of a file as the published code stores a fine-tuned model."""
    for kind in ("patch", "frame"):
        fshape, tshape = PATCHES[kind]
        torch.save(golden(kind)["state_dict"], tmp_path / "pretrained.pth")
        for case in golden(kind)["finetune"]:
            stride = (case["fstride"], case["tstride"])
            model = ASTModel(
                case["label_dim"], fshape, tshape, *stride, 128, case["input_tdim"], "tiny",
                False, tmp_path / "pretrained.pth",
            )  # fmt: skip
            model.mlp_head.load_state_dict(case["mlp_head"])
            torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "tuned.pth")
            classifier = load_published_classifier(
                tmp_path / "tuned.pth", num_frames=case["input_tdim"], stride=stride,
                pooling="cls", mean=0.0, std=0.5,
            )  # fmt: skip
            logits = classifier.double()(case["input"].double())
            want = case["ft_cls"]
            # Positions were interpolated in float32, see test_golden.
            exact = 1e-8 if classifier.encoder.embed.grid == (1, 150) else 1e-10
            assert (logits - want).abs().max() < exact * want.abs().max()


@pytest.mark.parametrize(
    ("size", "width", "depth"), [("small", 384, 12), ("base", 768, 12), ("large", 1024, 24)]
)
def test_size_and_patch_are_read_from_the_shapes(size, width, depth):
    with torch.device("meta"):
        model = MSPM(from_plain({"model": {"size": size, "patch": [128, 2]}}))
        state = {
            "v.patch_embed.proj.weight": model.encoder.embed.weight,
            "v.pos_embed": model.encoder.embed.pos_embed,
            "v.dist_token": model.encoder.embed.dist_token,
            **{f"v.{n}": p for n, p in model.encoder.named_parameters() if "blocks" in n},
        }
    layout = detect_layout(state)
    assert (layout.size, layout.depth, layout.patch) == (size, depth, (128, 2))
    assert layout.input is None and layout.num_classes is None and layout.num_patches == 512


class Payload:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_anything_but_tensors_is_refused_and_never_run(tmp_path):
    path, mark = tmp_path / "evil.pth", tmp_path / "mark"
    torch.save({"module.v.norm.weight": torch.ones(2), "x": Payload(mark)}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused: it holds Python objects"):
        read_published(path)
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(CheckpointError, match="refused"):
        read_published(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r"refused.*save model\.state_dict\(\)"):
        read_published(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"v.norm.weight": torch.ones(2), "epoch": 3}, "tensors and nothing else, found 'epoch'"),
        ({"state_dict": {"a": torch.ones(2)}}, "nothing else, found 'state_dict': (dict|Ord)"),
        ([torch.ones(2)], "expected a state dict, names to tensors, found list"),
        ({7: torch.ones(2)}, "nothing else, found 7: Tensor"),
    ],
)
def test_another_structure_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_published(tmp_path / "a.pth")
    assert "\n" not in str(caught.value) and "a.pth" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_one_line(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(CheckpointError, match=r"cannot be read|not a whole"):
        read_published(path)
    state = golden("patch")["state_dict"]
    if suffix == ".pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file({n: t.contiguous() for n, t in state.items()}, path)
    whole = path.read_bytes()
    assert len(read_published(path)) == len(state)
    generator = torch.Generator().manual_seed(0)
    noise = bytes(torch.randint(256, (5000,), generator=generator, dtype=torch.uint8).tolist())
    texts = (b"not a checkpoint\n" * 9, b"\x80\x02}q\x00.", b"PK\x03\x04" + noise)
    for content in (b"", whole[:100], whole[: len(whole) // 2], noise, *texts):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            detect_layout(read_published(path), path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)


def without(state, *names):
    return {n: t for n, t in state.items() if n not in {f"module.{name}" for name in names}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "v.norm.weight", "mask_embed"), "missing .*v.norm.weight.*nothing"),
        (lambda s: without(s, "v.pos_embed"), "no SSAST model: missing .'v.pos_embed'."),
        (lambda s: without(s, "v.dist_token"), "8 x 16 patches, but v.pos_embed has 129"),
        (lambda s: without(s, "p_input_fdim"), "expected a pretrained model, but it lacks p_input"),
        (
            lambda s: s | {"module.p_input_tdim": torch.tensor(512)},
            "128 x 512 inputs make 8 x 32 patches, but v.pos_embed has 128",
        ),
        (
            lambda s: s | {"module.v.norm.weight": torch.ones(9)},
            r"shapes that do not fit: encoder.norm.weight \[9\], expected \[192\]",
        ),
        (
            lambda s: s | {"module.v.patch_embed.proj.weight": torch.ones(100, 1, 16, 16)},
            "its width is 100, expected one of 192 .tiny.",
        ),
        (
            lambda s: s | {"module.v.patch_embed.proj.weight": torch.ones(192, 256)},
            r"expected v.patch_embed.proj.weight \[D, 1, f, t\].*found \[192, 256\]",
        ),
        (
            lambda s: without(s, "v.blocks.0.mlp.fc1.bias", "v.blocks.1.mlp.fc1.bias"),
            "missing .'v.blocks.0.mlp.fc1.bias', 'v.blocks.1.mlp.fc1.bias'.",
        ),
    ],
)
def test_every_wrong_name_and_shape_is_reported(change, message, tmp_path):
    torch.save(change(whole_state("patch")), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_published(tmp_path / "a.pth")
    assert "\n" not in str(caught.value) and "a.pth" in str(caught.value)


@pytest.mark.compatible("published SSAST code", "state dicts with unknown tensors: reported")
def test_tensors_that_the_model_does_not_have_are_reported(tmp_path, caplog):
    state = whole_state("patch")
    torch.save(state | {"module.v.extra": torch.ones(1)}, tmp_path / "a.pth")
    model, _ = load_published(tmp_path / "a.pth")
    assert f"{tmp_path}/a.pth: tensors that the model does not have: ['v.extra']" in caplog.text
    caplog.clear()
    torch.save(state, tmp_path / "a.pth")
    want, _ = load_published(tmp_path / "a.pth")
    assert not caplog.text
    assert all(p.equal(q) for p, q in zip(model.parameters(), want.parameters(), strict=True))


@pytest.mark.compatible("published SSAST code", "heads of ImageNet in its files are kept")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_of_imagenet_go_round(dtype, tmp_path):
    state, heads = whole_state("patch"), ("module.v.head.", "module.v.head_dist.")
    heads = {n: torch.randn(t.shape).to(dtype) for n, t in state.items() if n.startswith(heads)}
    assert len(heads) == 4
    torch.save(state | heads, tmp_path / "a.pth")
    assert main(["export", str(tmp_path / "a.pth"), "--to", "published", str(tmp_path / "b")]) == 0
    again = torch.load(tmp_path / "b", weights_only=True)
    assert all(again[n].dtype == dtype and again[n].equal(t) for n, t in heads.items())
    loaded = open_model(tmp_path / "b")
    without = published_state(loaded.model, loaded.audio)  # as that of a run
    assert not any(without[name].any() for name in heads)


def test_pretrained_and_fine_tuned_are_not_mixed_up(tmp_path):
    path = tmp_path / "a.pth"
    save_published(small_classifier(), path)
    with pytest.raises(CheckpointError, match=r"expected a pretrained model.*for 7 classes"):
        load_published(path)
    message = re.escape("with stride [16, 16] make 8 x 6 = 48 patches, but v.pos_embed has 108")
    with pytest.raises(CheckpointError, match=message):
        load_published_classifier(path, num_frames=96, stride=(16, 16))
    torch.save(whole_state("patch"), path)
    with pytest.raises(CheckpointError, match="expected a fine-tuned model, found no mlp_head"):
        load_published_classifier(path, num_frames=256, stride=(16, 16))


def test_what_is_known_of_the_input_is_stored(tmp_path, caplog):
    """By all who give it; classes and loss as well with the metadata of a model that was opened."""
    audio = Audio(num_frames=96, mean=-6.0, std=3.0, ignore_padding=True)
    torch.manual_seed(0)
    encoder = SpectrogramTransformer(Model(size="tiny", depth=1), audio, (10, 10))
    save_published(Classifier(encoder, 3, "cls"), tmp_path / "a.pth", audio)
    found = open_model(tmp_path / "a.pth")
    assert found.audio == audio and not found.assumed
    assert (found.encoder.embed.stride, found.classifier.pooling) == ((10, 10), "cls")
    assert "as stored in the file" in caplog.text
    given = {"audio": audio, "finetune": dataclasses.replace(found.config.finetune, loss="bce")}
    known = dataclasses.replace(
        found,
        config=dataclasses.replace(found.config, **given),
        classes=("a", "b", "c"),
        names=("A", "B", "C"),
    )
    save_published(known.model, tmp_path / "b.pth", audio, published_metadata(known))
    again = open_model(tmp_path / "b.pth")
    assert (again.classes, again.names, again.loss) == (known.classes, known.names, "bce")
    with pytest.raises(ConfigError, match="the heads of SSAST alone, got SpectrogramTransformer"):
        save_published(encoder, tmp_path / "c.pth", audio)


def test_a_fine_tuned_state_names_no_mask():
    names = set(published_state(small_classifier()))
    assert "module.mask_embed" not in names and "module.v.head_dist.weight" in names
