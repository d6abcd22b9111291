"""The public models under autocast, and the gradient of their input."""

import autocast_jobs
import pytest
import torch
from autocast_jobs import IDS, MODELS, build, clips, step
from torch.autograd import gradcheck
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssast.engine.model.classifier import embed_clips
from ssast.kernels.fbank import fbank
from ssast.kernels.masking import masks_from_ids
from ssast.kernels.mel import FbankSpec

# Relative errors that are allowed. CPUs with AVX512-FP16 add up float16 in float16.
HALF = {torch.bfloat16: 2e-2, torch.float16: 1e-2}
every_model = pytest.mark.parametrize("name", MODELS)
halves = pytest.mark.parametrize("dtype", HALF, ids=str)


def assert_near(results, exact, tolerance):
    for key, value in exact.items():
        if not key.endswith("accuracy"):
            error = (results[key].float() - value).abs().max()
            assert error <= tolerance * value.abs().max().clamp(min=1), (key, error)


def assert_same_direction(gradients, exact, tolerance):
    assert gradients.keys() == exact.keys()
    largest = max(g.norm() for g in exact.values())
    for key, value in exact.items():
        assert gradients[key].dtype == value.dtype == torch.float32
        error = (gradients[key] - value).norm()
        assert error <= 8 * tolerance * (value.norm() + 0.05 * largest), (key, error, value.norm())


@pytest.mark.compatible("PyTorch", "autocast in bf16 and fp16: every public model")
@halves
@every_model
def test_losses_are_near_those_of_float32(name, dtype):
    model, losses = build(name)
    exact, wanted = step(model, losses, clips(), None)
    results, gradients = step(model, losses, clips(), dtype)
    for key, value in results.items():
        assert value.isfinite().all()
        is_half = key == "logits" and name == "Classifier"
        assert value.dtype == (dtype if is_half else torch.float32), key
    assert any(not results[key].equal(exact[key]) for key in exact)  # autocast does something
    assert_near(results, exact, HALF[dtype])
    assert_same_direction(gradients, wanted, HALF[dtype])


@pytest.mark.parametrize("lengths", [None, torch.tensor([64, 40, 64, 17])], ids=["whole", "cut"])
def test_embeddings_are_means_in_float32(lengths):
    model, _ = build("Classifier")
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = model.encoder(clips(), model.encoder.no_masks(4))
        found = embed_clips(model.encoder, clips(), num_frames=lengths)
    exact = embed_clips(model.encoder, clips(), num_frames=lengths)
    assert hidden.dtype == found.dtype == torch.float32
    assert not found.equal(found.bfloat16().float())
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


def test_activation_checkpointing_under_autocast():
    model, losses = build("MSPM")
    want, wanted = step(model, losses, clips(), torch.bfloat16)
    model.encoder.activation_checkpoint_every = 1
    results, gradients = step(model, losses, clips(), torch.bfloat16)
    assert_near(results, want, 1e-2)  # the first sum of each block is rounded elsewhere
    assert_same_direction(gradients, wanted, 1e-2)


@every_model
def test_autocast_that_is_off_inside_changes_nothing(name):
    model, losses = build(name)
    exact, wanted = step(model, losses, clips(), None)

    def inside(model, fbank):
        with torch.autocast("cpu", enabled=False):
            return losses(model, fbank)

    results, gradients = step(model, inside, clips(), torch.bfloat16)
    assert all(results[key].equal(exact[key]) for key in exact)
    assert all(gradients[key].equal(wanted[key]) for key in wanted)


@pytest.mark.compatible("PyTorch", "autocast with torch.compile")
@pytest.mark.parametrize("name", ["MSPM", "MSPM options", "Classifier"])
def test_compiled_under_autocast(name):
    model, losses = build(name)
    want, wanted = step(model, losses, clips(), torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results, gradients = step(compiled, losses, clips(), torch.bfloat16)
    assert_near(results, want, 1e-2)
    gradients = {key.removeprefix("_orig_mod."): g for key, g in gradients.items()}
    assert_same_direction(gradients, wanted, HALF[torch.bfloat16])


@pytest.mark.compatible("PyTorch", "autocast with DDP and FSDP2 on two ranks")
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", ["MSPM", "Classifier"])
def test_two_ranks_under_autocast(two_ranks, name, kind):
    """Each on half of the clips: loss and gradients are the means of those of the halves."""
    dtype = torch.bfloat16
    model, losses = build(name)
    halves = [step(model, losses, clips()[i : i + 2], dtype) for i in (0, 2)]
    ranks = two_ranks.run(autocast_jobs.sharded, name, kind, dtype)
    for (loss, gradients), (results, _) in zip(ranks, halves, strict=True):
        assert loss == pytest.approx(results["loss"].item(), rel=1e-3)
        assert gradients.keys() == halves[0][1].keys()
        given = {key: torch.from_numpy(g) for key, g in gradients.items()}
        wanted = {key: (halves[0][1][key] + halves[1][1][key]) / 2 for key in given}
        assert_same_direction(given, wanted, 1e-3)


@pytest.mark.compatible("PyTorch", "gradients of spectrograms")
def test_the_gradient_of_the_spectrogram():
    model, _ = build("Classifier")
    model.double()
    fbank = clips()[:2].double().requires_grad_()
    assert gradcheck(lambda x: model(x), fbank, fast_mode=True)
    model.requires_grad_(False)
    (saliency,) = torch.autograd.grad(model(fbank)[0, 1], fbank)
    assert saliency[0].ne(0).all() and saliency[1].eq(0).all()


def test_the_gradient_of_the_spectrogram_in_pretraining():
    """Through the visible patches and through the targets."""
    model, _ = build("MSPM")
    model.double()
    masks = masks_from_ids(IDS[:2], 32)
    fbank = clips()[:2].double().requires_grad_()

    def loss(x):
        losses = model(x, masks)
        return losses["infonce_loss"] + losses["mse_loss"]

    assert gradcheck(loss, fbank, fast_mode=True)
    assert torch.autograd.grad(loss(fbank).sum(), fbank)[0].ne(0).all()


@pytest.mark.compatible("PyTorch", "gradients of waveforms, through fbank")
def test_the_gradient_of_the_waveform():
    model, _ = build("Classifier")
    spec = FbankSpec(num_frames=64)
    waves = 0.1 * torch.randn(2, spec.num_samples, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([spec.num_samples, 6000])
    features = fbank(waves, lengths, spec)
    asked = waves.clone().requires_grad_()
    torch.testing.assert_close(fbank(asked, lengths, spec), features, rtol=1e-4, atol=1e-3)
    loss = functional.cross_entropy(model(fbank(asked, lengths, spec)), torch.tensor([0, 1]))
    loss.backward()
    assert asked.grad is not None and asked.grad.isfinite().all()
    assert asked.grad[0].ne(0).any() and asked.grad[1, 6000:].eq(0).all()
    assert not fbank(waves, lengths, spec).requires_grad
    with torch.no_grad():
        assert fbank(asked, lengths, spec).equal(features)  # by the kernel


@pytest.mark.compatible("PyTorch", "second derivatives, with sdpa_kernel(SDPBackend.MATH)")
def test_a_gradient_penalty():
    """Of the norm of the spectrogram's gradient, against a difference of two gradients."""
    model, _ = build("Classifier")
    model.double()
    fbank = clips()[:1].double().requires_grad_()
    weight = model.encoder.blocks[0].mlp.fc1.weight

    def squared_norm():
        (gradient,) = torch.autograd.grad(model(fbank)[0, 1], fbank, create_graph=True)
        return gradient.square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        direction = torch.randn_like(weight)
        (got,) = torch.autograd.grad(squared_norm(), weight)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * 1e-5 * direction)
            values.append(squared_norm().item())
            with torch.no_grad():
                weight.sub_(sign * 1e-5 * direction)
    slope = (values[0] - values[1]) / 2e-5
    assert (got * direction).sum().item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.compatible("PyTorch", "torch.func: jvp, gradients of each clip by vmap")
def test_every_derivative_of_a_model():
    """torch.func over the whole classifier: jvp, vmap of per-sample gradients."""
    model, _ = build("Classifier")
    model.double()
    fbank, tangent = clips()[:2].double(), clips()[2:].double()
    value, slope = torch.func.jvp(model, (fbank,), (tangent,))
    step_size = 1e-6
    moved = (model(fbank + step_size * tangent) - model(fbank - step_size * tangent)) / 2e-6
    torch.testing.assert_close(value, model(fbank))
    torch.testing.assert_close(slope, moved, rtol=1e-5, atol=1e-7)
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def loss(parameters, clip):
        return torch.func.functional_call(model, parameters, clip[None])[0, 1]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, fbank)
    for i in range(2):
        want = torch.autograd.grad(
            model(fbank[i : i + 1])[0, 1], model.encoder.blocks[0].parameters()
        )
        names = [f"encoder.blocks.0.{key}" for key, _ in model.encoder.blocks[0].named_parameters()]
        for key, g in zip(names, want, strict=True):
            torch.testing.assert_close(each[key][i], g)
