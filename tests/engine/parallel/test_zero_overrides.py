"""What is done in place of slow parts of DeepSpeed changes no bit."""

import pytest
import torch
from toy import build_engine, clips, loss_of, train

from ssast.engine.parallel import deepspeed_engine, zero_overrides


def trained(world, **settings):
    """Return the weights and moments of three steps, and the losses and gradient norms."""
    engine = build_engine(world, **settings)
    losses, norms = [], []
    for step in range(3):
        losses += train(engine, [step])
        norms.append(float(engine.grad_norm))
    state, _ = engine.state()
    engine.close()
    return state, losses, norms


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_numbers_are_those_of_deepspeed(
    device, world, monkeypatch, stage, precision, accumulate
):
    settings = {"stage": stage, "precision": precision, "accumulate": accumulate, "clip": 0.5}
    state, losses, norms = trained(world, **settings)
    monkeypatch.setattr(
        deepspeed_engine, "replace_slow_parts", lambda zero, _: zero_overrides._take_norm_once(zero)
    )
    expected, expected_losses, expected_norms = trained(world, **settings)
    assert (losses, norms) == (expected_losses, expected_norms)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradients_of_one_rank_are_those_of_autograd_and_no_copies(
    device, world, stage, precision
):
    engine = build_engine(world, stage=stage, precision=precision)
    written: list[int] = []

    def note(gradient):  # what a hook returns takes the place of the gradient
        written.append(gradient.data_ptr())

    for param in engine.module.parameters():
        if param.requires_grad:
            param.register_hook(note)
    x, y = (tensor.to(device) for tensor in clips(0))
    engine.backward(loss_of(engine(x), y))
    groups = engine._zero.averaged_gradients.values()
    kept = [gradient.data_ptr() for group in groups for gradient in group]
    engine.close()
    assert written and set(written) <= set(kept)  # and zeros that fill up a group
