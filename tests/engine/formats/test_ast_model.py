"""The published interface against the numbers of the published code."""

from pathlib import Path

import pytest
import torch
from golden_model import NOISE, PATCHES, golden, whole_state

from ssast.engine.api import ASTModel, load_published, read_published, save_published
from ssast.engine.errors import CheckpointError
from ssast.kernels.masking import masks_from_ids
from ssast.kernels.patch_embed import cut_patches

KINDS = ["patch", "frame"]
kinds = pytest.mark.parametrize("kind", KINDS)
CASES = [(kind, n) for kind in KINDS for n in range(len(golden(kind)["finetune"]))]


def pretraining_model(kind: str) -> ASTModel:
    fshape, tshape = PATCHES[kind]
    model = ASTModel(
        fshape=fshape, tshape=tshape, fstride=fshape, tstride=tshape,
        input_fdim=128, input_tdim=golden(kind)["input_tdim"], model_size="tiny",
    )  # fmt: skip
    model.v.blocks = model.v.blocks[: golden(kind)["depth"]]  # as the published code allows
    torch.nn.DataParallel(model).load_state_dict(whole_state(kind), strict=True)
    return model.double()


def finetuning_model(kind: str, case: dict, path: Path) -> ASTModel:
    torch.save(golden(kind)["state_dict"], path)
    fshape, tshape = PATCHES[kind]
    return ASTModel(
        label_dim=case["label_dim"], fshape=fshape, tshape=tshape,
        fstride=case["fstride"], tstride=case["tstride"],
        input_fdim=128, input_tdim=case["input_tdim"], model_size="tiny224",
        pretrain_stage=False, load_pretrained_mdl_path=path,
    )  # fmt: skip


@pytest.mark.compatible("published SSAST code", "pretrain_mpc, pretrain_mpg: its numbers")
@kinds
def test_pretraining_tasks_equal_the_published_ones(kind):
    model, case = pretraining_model(kind), golden(kind)
    x, ids, expected = case["input"].double(), case["mask_ids"], case["expected"]
    ids = ids.flip(1)  # the order of the ids does not matter
    accuracy, nce = model(x, "pretrain_mpc", mask_patch=100, mask_ids=ids)
    mse = model(x, "pretrain_mpg", mask_patch=100, mask_ids=ids)
    assert nce.item() == pytest.approx(expected["nce"].item(), rel=1e-10)
    assert accuracy.item() == pytest.approx(expected["acc"].item(), rel=1e-10)
    assert mse.item() == pytest.approx(expected["mse"].item(), rel=1e-10)
    (nce + 10 * mse).backward()
    norms = expected["grad_norms"]["joint"]
    for name, parameter in model.named_parameters():
        if name in norms and name not in NOISE:
            assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=1e-10), name
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(norms)


@pytest.mark.compatible("published SSAST code", "ft_avgtok, ft_cls: its numbers")
@pytest.mark.parametrize(("kind", "number"), CASES)
def test_fine_tuning_tasks_equal_the_published_ones(kind, number, tmp_path):
    case = golden(kind)["finetune"][number]
    model = finetuning_model(kind, case, tmp_path / "pretrained.pth")
    model.mlp_head.load_state_dict(case["mlp_head"])
    model.double()
    assert [model.f_dim, model.t_dim] == case["grid_f_t"]
    x = case["input"].double().requires_grad_()
    # The published code interpolated in float32, over eight equal rows in the frame model.
    exact = 1e-8 if (model.f_dim, model.t_dim) == (1, 150) else 1e-10
    for task in ("ft_avgtok", "ft_cls"):
        logits, want = model(x, task=task), case[task]
        assert (logits - want).abs().max() < exact * want.abs().max()
    assert torch.autograd.grad(logits.sum(), x)[0].abs().sum() > 0  # as through the published one


def without_distillation(path: Path, **changed) -> ASTModel:
    """base_nokd with two blocks, to pretrain; also written to a file."""
    torch.manual_seed(0)
    model = ASTModel(**PATCH | {"model_size": "base_nokd", "input_tdim": 64} | changed)
    model.v.blocks = model.v.blocks[:2]
    torch.save(torch.nn.DataParallel(model).state_dict(), path)
    return model


def test_one_extra_token_is_base_without_distillation(tmp_path):
    """Names, shapes, positions, pooling: timm's plain DeiT, computed here step by step."""
    model = without_distillation(tmp_path / "a.pth").eval()
    state = model.state_dict()
    assert not [name for name in state if "dist" in name]
    assert state["v.pos_embed"].shape == (1, 1 + 32, 768) and model.cls_token_num == 1
    tuned = ASTModel(
        5, 16, 16, 10, 10, 128, 48, "base_nokd", False, tmp_path / "a.pth"
    ).eval()  # fmt: skip
    assert tuned.v.pos_embed.shape == (1, 1 + 12 * 4, 768)
    assert tuned.v.pos_embed[:, :1].equal(model.v.pos_embed[:, :1])
    x = torch.randn(2, 48, 128)
    patches = torch.nn.functional.conv2d(
        x.transpose(1, 2)[:, None], tuned.v.patch_embed.proj.weight, tuned.v.patch_embed.proj.bias,
        (10, 10),
    )  # fmt: skip
    tokens = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat((tuned.v.cls_token.expand(2, -1, -1), tokens), 1) + tuned.v.pos_embed
    hidden = tuned.v.norm(tuned.v.blocks[1](tuned.v.blocks[0](tokens)))
    with torch.no_grad():
        for task, pooled in (("ft_cls", hidden[:, 0]), ("ft_avgtok", hidden[:, 1:].mean(1))):
            torch.testing.assert_close(tuned(x, task), tuned.mlp_head(pooled))


def test_one_extra_token_pretrains(tmp_path):
    model = without_distillation(tmp_path / "a.pth")
    x, ids = torch.randn(2, 64, 128), torch.tensor([[1, 5, 9], [2, 3, 30]])
    accuracy, nce = model(x, "pretrain_mpc", mask_ids=ids)
    (nce + model(x, "pretrain_mpg", mask_ids=ids)).backward()
    assert model.v.cls_token.grad.abs().sum() > 0 and 0 <= accuracy <= 1
    for name, value in read_published(tmp_path / "a.pth").items():
        assert model.state_dict()[name].equal(value), name
    with pytest.raises(CheckpointError, match="model_size is base_nokd, expected base"):
        ASTModel(5, 16, 16, 10, 10, 128, 48, "base", False, tmp_path / "a.pth")
    ours, config = load_published(tmp_path / "a.pth")
    assert config.model.extra_tokens == "cls"
    with torch.no_grad():
        losses = ours(2 * config.audio.std * x + config.audio.mean, masks_from_ids(ids, 32))
    assert losses["infonce_loss"].mean() == pytest.approx(nce.item(), rel=1e-4)
    save_published(ours, tmp_path / "b.pth")
    again = ASTModel(5, 16, 16, 10, 10, 128, 48, "base_nokd", False, tmp_path / "b.pth")
    assert again.v.cls_token.equal(model.v.cls_token)
    assert read_published(tmp_path / "b.pth").keys() == model.state_dict().keys()


@pytest.mark.compatible("published SSAST code", "names and shapes of the state dict")
@kinds
def test_names_are_the_published_ones(kind, tmp_path):
    assert set(pretraining_model(kind).state_dict()) == {
        name.removeprefix("module.") for name in whole_state(kind)
    }
    model = finetuning_model(kind, golden(kind)["finetune"][0], tmp_path / "pretrained.pth")
    names = set(model.state_dict())
    assert {n for n in names if not n.startswith("v.")} == {
        f"mlp_head.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    assert model.v.patch_embed(torch.randn(2, 1, 128, model.input_tdim)).shape == (
        2, model.num_patches, 192,
    )  # fmt: skip
    for name in ("pos_embed", "cls_token", "dist_token", "norm", "blocks", "pos_drop"):
        assert hasattr(model.v, name)


def test_masks_are_drawn_from_the_generator_of_torch():
    model = pretraining_model("patch").float()
    x = torch.randn(3, 256, 128)
    losses = []
    for seed, cluster in ((0, True), (0, True), (1, True), (0, False)):
        torch.manual_seed(seed)
        with torch.no_grad():
            losses.append(model(x, "pretrain_mpg", cluster, 80).item())
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


@pytest.mark.compatible("published SSAST code", "visualize_mask")
@kinds
def test_visualize_mask_paints_the_masked_patches(kind):
    model, case = pretraining_model(kind), golden(kind)
    x, ids = case["input"].double(), case["mask_ids"].long()
    predicted, masked = model(x, "visualize_mask", mask_patch=100, mask_ids=ids)
    assert predicted.shape == masked.shape == (2, 1, 128, 256)
    patches, seen, hidden = (
        cut_patches(image, PATCHES[kind], PATCHES[kind])
        for image in (x, predicted.squeeze(1).transpose(1, 2), masked.squeeze(1).transpose(1, 2))
    )
    flags = torch.zeros(2, model.num_patches, dtype=torch.bool).scatter_(1, ids, True)
    assert hidden[flags].eq(99).all() and hidden[~flags].equal(patches[~flags])
    assert seen[~flags].equal(patches[~flags])
    marks = seen[flags]
    assert (marks == marks[:, :1]).all() and set(marks.unique().tolist()) <= {0.0, 99.0}
    accuracy, _ = model(x, "pretrain_mpc", mask_patch=100, mask_ids=ids)
    assert marks[:, 0].eq(99).double().mean().item() == pytest.approx(accuracy.item())


PATCH = {"fshape": 16, "tshape": 16, "fstride": 16, "tstride": 16, "model_size": "tiny"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_size": "basic"}, "model_size must be one of tiny, small, base.*, base_nokd"),
        ({"fstride": 10}, "may not overlap in pretraining: fstride, tstride must be .16, 16."),
        ({"load_pretrained_mdl_path": "a.pth"}, "must be None with pretrain_stage=True"),
        ({"pretrain_stage": False}, "must name a file with pretrain_stage=False"),
        ({"input_tdim": 15}, "no 16 x 16 patch fits into 128 x 15"),
        (
            {"pretrain_stage": False, "load_pretrained_mdl_path": "a.pth"},
            "a.pth: cannot be read: No such file",
        ),
    ],
)
def test_wrong_arguments_of_the_constructor(changed, message):
    with pytest.raises(ValueError, match=message):
        ASTModel(**PATCH | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_size": "base"}, "model_size is tiny, expected base"),
        (
            {"fshape": 128, "tshape": 2, "fstride": 128, "tstride": 2},
            "fshape x tshape is 16 x 16, expected 128 x 2",
        ),
    ],
)
def test_a_file_of_another_model_is_refused(changed, message, tmp_path):
    path = tmp_path / "patch.pth"
    torch.save(golden("patch")["state_dict"], path)
    with pytest.raises(ValueError, match=message):
        ASTModel(**PATCH | changed, pretrain_stage=False, load_pretrained_mdl_path=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "finetune"}, "task must be one of ft_avgtok, ft_cls"),
        ({"task": "ft_cls"}, "task 'ft_cls' needs a model with pretrain_stage=False"),
        ({"x": torch.zeros(1, 64, 128)}, r"x must be \[B, 256, 128\], got \[1, 64, 128\]"),
        ({"mask_ids": torch.zeros(2, 5)}, r"mask_ids must be \[1, M\], got \[2, 5\]"),
        ({"mask_ids": torch.zeros(1, 5)}, "distinct numbers from 0 to 127"),
        ({"mask_patch": 127}, "cover 1 to 126 patches, got"),
    ],
)
def test_wrong_arguments_of_a_task(arguments, message):
    model = pretraining_model("patch").float()
    with pytest.raises(ValueError, match=message):
        model(**{"x": torch.zeros(1, 256, 128), "task": "pretrain_mpc"} | arguments)
