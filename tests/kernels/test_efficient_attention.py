"""Memory-efficient attention that writes its three gradients side by side."""

import pytest
import torch
from attention_cases import ROUNDING, queries_keys_values
from compare import DTYPES, REGIMES, assert_as_good_as_reference, random_inputs
from torch.utils.checkpoint import checkpoint

from ssast.engine.planning.recorder import Recorder
from ssast.kernels import linear
from ssast.kernels.attention import attention_reference, run_backend
from ssast.kernels.efficient_attention import _attention, efficient_attention
from ssast.kernels.linear import linear_chunks

SHAPES = [(2, 33, 33, 3, 64), (1, 1, 1, 1, 8), (1, 3, 3, 1, 5), (0, 4, 4, 2, 8)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, ...], regime: str, dtype: torch.dtype) -> None:
    assert_as_good_as_reference(
        efficient_attention,
        attention_reference,
        queries_keys_values(shape, regime),
        dtype,
        slack=5.0,
        rounding=ROUNDING[regime] if shape[0] else 0.0,
    )


def test_gradcheck_and_opcheck() -> None:
    inputs = [x.requires_grad_() for x in queries_keys_values((2, 4, 4, 2, 3), "unit")]
    assert torch.autograd.gradcheck(efficient_attention, inputs)
    torch.library.opcheck(_attention, inputs)


def test_compiles_without_a_graph_break() -> None:
    inputs = [x.requires_grad_() for x in queries_keys_values((2, 5, 5, 2, 8), "unit")]
    compiled = torch.compile(efficient_attention, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(attention_reference(*inputs).square().sum(), inputs)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    torch.testing.assert_close(got, want)


def projected(x, weight, bias, attend, **settings):
    """Attend to what one linear layer makes, in a recomputed part where ``settings`` are given."""

    def run(x):
        q, k, v = (t.unflatten(2, (2, 8)) for t in linear_chunks(x, weight, bias, 3))
        return attend(q, k, v)

    return checkpoint(run, x, **settings) if settings else run(x)


@pytest.mark.parametrize("settings", [{}, {"use_reentrant": False}], ids=["kept", "recomputed"])
def test_the_layer_before_it_reads_the_gradients_where_they_are(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, bool]
) -> None:
    inputs = [x.requires_grad_() for x in random_inputs((2, 5, 6), (48, 6), (48,), regime="unit")]
    want = projected(*inputs, attention_reference)
    wanted = torch.autograd.grad(want.square().sum(), inputs)
    monkeypatch.delattr(linear, "_join_chunks")
    got = projected(*inputs, lambda *qkv: run_backend("efficient", *qkv), **settings)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), inputs), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_gpu_runs_copies_no_gradient(dtype: torch.dtype) -> None:
    make = {"device": "meta", "dtype": dtype, "requires_grad": True}
    inputs = [torch.empty(*shape, **make) for shape in ((2, 40, 16), (48, 16), (48,))]
    with Recorder() as recorder:
        out = projected(*inputs, lambda *qkv: run_backend("efficient", *qkv))
        out.backward(torch.empty_like(out))
    launches = recorder.recording.launches
    names = [x.name for x in launches]
    assert names[1:3] == ["_efficient_attention_forward", "_efficient_attention_backward"]
    assert sorted({*names} - {*names[1:3]}) == ["addmm", "mm", "sum"]
    assert [x.flops for x in launches[1:3]] == [n * 2.0 * 2 * 2 * 40 * 40 * 8 for n in (2, 5)]
    assert launches[2].written == pytest.approx(3 * out.nbytes, abs=64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    inputs = [x.cuda() for x in queries_keys_values((2, 514, 514, 3, 64), "unit")]
    assert_as_good_as_reference(
        efficient_attention, attention_reference, inputs, dtype, rounding=0.01
    )
    monkeypatch.delattr(linear, "_join_chunks")
    inputs = [x.cuda() for x in random_inputs((2, 514, 16), (48, 16), (48,), regime="unit")]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    out = projected(*inputs, efficient_attention)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), inputs))
