"""What scripts call, hook and replace in the published model."""

import random

import pytest
import torch
from golden_model import golden, whole_state
from torch import nn

from ssast.engine.api import ASTModel
from ssast.kernels.masking import draw_masks

PATCH = {"fshape": 16, "tshape": 16, "fstride": 16, "tstride": 16, "model_size": "tiny"}


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    model = ASTModel(**PATCH, input_tdim=256)
    model.v.blocks = model.v.blocks[:2]
    model.load_state_dict({n.removeprefix("module."): t for n, t in whole_state("patch").items()})
    return model


@pytest.fixture
def tuned(tmp_path):
    torch.save(golden("patch")["state_dict"], tmp_path / "a.pth")
    path = tmp_path / "a.pth"
    return ASTModel(5, 16, 16, 10, 10, 128, 96, "tiny", False, path).eval()


@pytest.mark.compatible("published SSAST code", "mpc, mpg and the other methods that scripts call")
def test_methods_are_the_tasks(whole):
    x, ids = torch.randn(2, 256, 128), torch.tensor([[3, 9, 60], [1, 2, 126]])
    image = x.transpose(1, 2).unsqueeze(1)
    with torch.no_grad():
        assert whole.mpc(image, 3, True, mask_ids=ids) == whole(x, "pretrain_mpc", mask_ids=ids)
        assert whole.mpg(image, 3, True, mask_ids=ids) == whole(x, "pretrain_mpg", mask_ids=ids)
        shown = whole.mpc(image, 3, True, show_mask=True, mask_ids=ids)
        for found, want in zip(shown, whole(x, "visualize_mask", mask_ids=ids), strict=True):
            assert found.equal(want)
        torch.manual_seed(1)
        drawn = whole.mpg(image, mask_patch=20, cluster=True)
        torch.manual_seed(1)
        assert drawn == whole(x, "pretrain_mpg", True, 20)


@pytest.mark.parametrize("shape", [(16, 16, 10, 10, 998), (128, 2, 128, 1, 100)])
def test_get_shape_is_that_of_a_convolution(shape, whole):
    fshape, tshape, fstride, tstride, frames = shape
    projection = nn.Conv2d(1, 1, (fshape, tshape), (fstride, tstride))
    want = projection(torch.zeros(1, 1, 128, frames)).shape[2:]
    assert whole.get_shape(fstride, tstride, 128, frames, fshape, tshape) == tuple(want)


def test_unfolded_patches_are_the_targets(whole):
    x = torch.randn(1, 256, 128)
    patches = whole.unfold(x.transpose(1, 2).unsqueeze(1)).transpose(1, 2)
    assert patches.shape == (1, 128, 256)
    assert patches[0, 17].equal(x[0, 16:32, 16:32].T.flatten())


@pytest.mark.compatible("published SSAST code", "gen_maskid_patch, gen_maskid_frame, also replaced")
def test_mask_ids_of_clusters_are_distributed_as_those_of_a_batch(whole):
    """The published rule: C x C patches, the smallest ids, 0 and N - 1 never."""
    random.seed(0)
    count = torch.zeros(128)
    for _ in range(1000):
        ids = whole.gen_maskid_patch(128, 60)
        assert ids.dtype == torch.int64 and ids.shape == (60,)
        assert ids.equal(ids.unique()) and ids.min() > 0 and ids.max() < 127
        count[ids] += 1
    clips = torch.arange(4000)
    masks = draw_masks(clips, clips * 0, seed=1, kind="official", grid=(8, 16), num_masked=60)
    share = torch.bincount(masks.mask_ids.flatten().long(), minlength=128) / 4000
    assert (count / 1000 - share).abs().max() < 5.5 * (0.25 / 1000 + 0.25 / 4000) ** 0.5
    random.seed(3)
    again = whole.gen_maskid_patch(128, 60)
    random.seed(3)
    assert again.equal(whole.gen_maskid_patch(128, 60))
    with pytest.raises(ValueError, match="mask_size must be from 1 to 126 of 128 patches, got 127"):
        whole.gen_maskid_patch(128, 127)


def test_mask_ids_of_frames_are_distinct(whole):
    ids = whole.gen_maskid_frame(512, 400)
    assert ids.dtype == torch.int64 and len(ids.unique()) == 400 and ids.max() < 512


@pytest.mark.compatible("published SSAST code", "gen_maskid_patch, gen_maskid_frame, also replaced")
def test_masks_of_a_subclass_are_used(whole):
    class Own(ASTModel):
        def gen_maskid_patch(self, sequence_len=512, mask_size=100, cluster=3):
            return torch.arange(1, mask_size + 1)

    model = Own(**PATCH, input_tdim=256)
    model.v = whole.v
    model.load_state_dict(whole.state_dict())
    x, ids = torch.randn(2, 256, 128), torch.arange(1, 21).expand(2, -1)
    with torch.no_grad():
        assert model(x, "pretrain_mpg", True, 20) == whole(x, "pretrain_mpg", mask_ids=ids)


def eager_maps(model, x):
    """Attention maps, computed step by step from the weights."""
    maps, v = [], model.v
    tokens = torch.cat((v.extra_tokens.expand(len(x), -1, -1), v.patch_embed(x)), 1) + v.pos_embed
    for block in v.blocks:
        q, k, value = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, 3, 64)).unbind(2)
        maps.append((torch.einsum("bqhd,bkhd->bhqk", q, k) / 8).softmax(3))
        out = torch.einsum("bhqk,bkhd->bqhd", maps[-1], value).flatten(2)
        tokens = tokens + block.attn.proj(out)
        tokens = tokens + block.mlp(block.norm2(tokens))
    return maps


@pytest.mark.compatible("timm", "attn_drop sees the attention map")
@torch.no_grad()
def test_hooks_of_attn_drop_see_the_attention_map(tuned):
    x, seen = torch.randn(2, 96, 128), []
    want = tuned(x, "ft_avgtok")
    handles = [
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
        for block in tuned.v.blocks
    ]
    torch.testing.assert_close(tuned(x, "ft_avgtok"), want)
    T = 2 + 12 * 9
    maps = eager_maps(tuned, x.transpose(1, 2).unsqueeze(1))
    assert [m.shape for m in seen] == [(2, 3, T, T)] * 2
    for found, expected in zip(seen, maps, strict=True):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.sum(3), torch.ones(2, 3, T))
    for handle in handles:
        handle.remove()
    assert tuned(x, "ft_avgtok").equal(want) and len(seen) == 2


def test_a_dropout_in_place_of_attn_drop_drops(tuned):
    x = torch.randn(1, 96, 128)
    want = tuned(x, "ft_cls")
    tuned.v.blocks[0].attn.attn_drop.p = 0.5
    assert tuned(x, "ft_cls").equal(want)
    assert not tuned.train()(x, "ft_cls").allclose(want)
    tuned.eval().v.blocks[0].attn.attn_drop = nn.Threshold(2.0, 0.0)  # attends to nothing
    assert not tuned(x, "ft_cls").allclose(want)


@pytest.mark.compatible("timm", "every module of a block can be hooked")
@torch.no_grad()
def test_every_module_of_a_block_can_be_hooked(tuned):
    """Each is called once and returns one tensor of the shape that timm's has."""
    block, shapes = tuned.v.blocks[1], {}
    for name, module in block.named_modules():
        module.register_forward_hook(
            lambda module, args, out, name=name: shapes.setdefault(name, []).append(out.shape)
        )
    tuned(torch.randn(2, 96, 128), "ft_avgtok")
    T = 110
    wide = {"attn.qkv": (2, T, 576), "attn.attn_drop": (2, 3, T, T)}
    wide |= {f"mlp.{name}": (2, T, 768) for name in ("fc1", "act")}
    twice = {"drop_path": [(2, T, 192)] * 2, "mlp.drop": [(2, T, 768), (2, T, 192)]}
    assert set(shapes) == {
        "", "norm1", "attn", "attn.qkv", "attn.attn_drop", "attn.proj", "attn.proj_drop",
        "drop_path", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "mlp.drop",
    }  # fmt: skip
    for name, found in shapes.items():
        assert found == twice.get(name, [wide.get(name, (2, T, 192))]), name


@pytest.mark.compatible("published SSAST code", "replaced v.pos_embed, shorter inputs")
def test_other_positions_take_shorter_inputs(tuned, whole):
    """As scripts do that cut the position embedding themselves."""
    x, grid = torch.randn(2, 46, 128), (12, 4)
    extra, image = tuned.v.pos_embed[:, :2], tuned.v.pos_embed[:, 2:].unflatten(1, (12, 9))
    cut = torch.cat((extra, image[:, :, 2:6].flatten(1, 2)), 1)
    tuned.v.pos_embed = nn.Parameter(cut.detach())
    found = tuned(x, "ft_avgtok")
    v = tuned.v
    tokens = v.patch_embed(x.transpose(1, 2).unsqueeze(1))
    assert tokens.shape[1] == grid[0] * grid[1]
    hidden = v.encode(torch.cat((v.extra_tokens.expand(2, -1, -1), tokens), 1) + v.pos_embed)
    torch.testing.assert_close(found, tuned.mlp_head(hidden[:, 2:].mean(1)))
    found.sum().backward()
    assert tuned.v.pos_embed.grad.abs().sum() > 0
    message = r"x must be \[B, T, F\] of 48 patches, as v.pos_embed has, got \[2, 96, 128\]"
    with pytest.raises(ValueError, match=message):
        tuned(torch.randn(2, 96, 128), "ft_avgtok")
    kept, whole.v.pos_embed = whole.v.pos_embed, nn.Parameter(whole.v.pos_embed[:, : 2 + 8 * 4])
    short = whole(torch.randn(2, 64, 128), "pretrain_mpg", True, 10)
    assert short.isfinite() and short.requires_grad
    whole.v.pos_embed = kept
