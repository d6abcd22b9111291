"""Attention against its definition, and the choice of its backend."""

import inspect
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from attention_cases import ROUNDING, SHAPES, assert_ignores_padding, queries_keys_values
from compare import DTYPES, REGIMES, assert_as_good_as_reference, random_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssast.kernels import attention as module
from ssast.kernels import linear
from ssast.kernels.attention import (
    Backend,
    attention,
    attention_backend,
    attention_reference,
    attention_trials,
    make_padding_mask,
    run_backend,
)
from ssast.kernels.linear import linear_chunks


def assert_good(shape: tuple[int, ...], regime: str, dtype: torch.dtype) -> None:
    assert_as_good_as_reference(
        attention,
        attention_reference,
        queries_keys_values(shape, regime),
        dtype,
        slack=5.0,
        rounding=ROUNDING[regime],
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, ...], regime: str, dtype: torch.dtype) -> None:
    assert_good(shape, regime, dtype)


def test_equals_the_definition_at_the_length_of_a_clip() -> None:
    assert_good((1, 514, 514, 2, 64), "unit", torch.float32)


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in queries_keys_values((1, 3, 4, 2, 3), "unit")]
    assert torch.autograd.gradcheck(attention, inputs)


def test_reads_one_packed_projection() -> None:
    """Queries, keys and values may be views of one tensor, as the model's are."""
    packed = random_inputs((2, 9, 3, 2, 8), regime="unit")[0].requires_grad_()
    views = packed.unbind(2)
    got, want = attention(*views), attention_reference(*views)
    torch.testing.assert_close(got, want)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(0)).double()
    (a,) = torch.autograd.grad(got, packed, upstream)
    (b,) = torch.autograd.grad(want, packed, upstream)
    torch.testing.assert_close(a, b)


# The parameters of flash-attn's functions as its source distribution 2.8.3 declares them.
DENSE = {
    2: "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs",
    3: "q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk "
    "softcap num_splits pack_gqa deterministic sm_margin",
}
RAGGED = {
    2: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal "
    "window_size softcap alibi_slopes deterministic return_attn_probs block_table",
    3: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k "
    "softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap "
    "num_splits pack_gqa deterministic sm_margin",
}
PACKED = {
    2: "qkv dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs",
    3: "qkv softmax_scale causal q_descale k_descale v_descale window_size attention_chunk softcap "
    "deterministic num_heads_q sm_margin",
}
MODULES = {2: "flash_attn", 3: "flash_attn_interface"}


def published(parameters: str, function):
    """A function that takes what the published one takes, the first ones by position."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [
            inspect.Parameter(
                p,
                kind,
                **({} if p in ("q", "k", "v", "qkv") or "seqlen" in p else {"default": None}),
            )
            for i, p in enumerate(parameters.split())
        ]
    )

    def call(*args, **kwargs):
        return function(**signature.bind(*args, **kwargs).arguments)

    return call


def ragged_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert queries[-1] == len(q) and keys[-1] == len(k) == len(v)
    clips = []
    for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True):
        assert b - a <= max_seqlen_q and d - c <= max_seqlen_k
        clips.append(attention_reference(q[None, a:b], k[None, c:d], v[None, c:d])[0])
    return torch.cat(clips)


@pytest.fixture(params=[(2, False), (3, False), (3, True)], ids=["2", "3", "3-with-logsumexp"])
def flash_attn(request, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """flash-attn by its published signatures, with the definition behind them."""
    version, with_logsumexp = request.param

    def dense(q, k, v):
        out = attention_reference(q, k, v)
        return (out, torch.zeros(())) if with_logsumexp else out

    fake = ModuleType(MODULES[version])
    fake.flash_attn_func = published(DENSE[version], dense)
    fake.flash_attn_qkvpacked_func = published(PACKED[version], lambda qkv: dense(*qkv.unbind(2)))
    fake.flash_attn_varlen_func = published(RAGGED[version], ragged_reference)
    monkeypatch.setitem(sys.modules, MODULES[version], fake)
    return f"flash-attn-{version}"


def test_padding_has_no_effect() -> None:
    assert_ignores_padding(attention)


def test_calls_flash_attn_as_published(flash_attn: Backend) -> None:
    q, k, v = queries_keys_values((2, 5, 9, 2, 8), "unit")
    torch.testing.assert_close(run_backend(flash_attn, q, k, v), attention_reference(q, k, v))
    assert_ignores_padding(lambda *args: run_backend(flash_attn, *args))


def test_what_one_layer_made_is_packed_without_a_copy(
    flash_attn: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor goes in, and one gradient comes out, of which the three are views."""
    seen = []
    package = sys.modules[MODULES[int(flash_attn[-1])]]
    packed = package.flash_attn_qkvpacked_func
    monkeypatch.setattr(
        package, "flash_attn_qkvpacked_func", lambda qkv: seen.append(qkv) or packed(qkv)
    )
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 6), (24, 6), (24,)))
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def run(project, attend):
        q, k, v = (t.unflatten(2, (2, 4)) for t in project(*leaves))
        out = attend(q, k, v)
        return q, k, v, torch.autograd.grad(out.square().sum(), leaves)

    *_, want = run(lambda *a: linear_chunks(*a, 3), attention_reference)
    joins = []
    monkeypatch.setattr(linear, "_join_chunks", lambda *a: joins.append(a))
    q, _, _, got = run(lambda *a: linear_chunks(*a, 3), lambda *a: run_backend(flash_attn, *a))
    assert seen[0].shape == (2, 5, 3, 2, 4) and seen[0].data_ptr() == q.data_ptr()
    assert not joins
    torch.testing.assert_close(got, want)
    run_backend(flash_attn, *(torch.randn(2, 5, 2, 4) for _ in range(3)))
    assert len(seen) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_flash_attn_refuses_second_derivatives(flash_attn: Backend, packed: bool) -> None:
    """Its own backward pass is no operation of PyTorch's: they would be without its terms."""
    one = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    q, k, v = one.unbind(2) if packed else [x.contiguous() for x in one.unbind(2)]
    loss = run_backend(flash_attn, q, k, v).sum()  # whose gradient is a constant
    (gradient,) = torch.autograd.grad(loss, one, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of flash-attn"):
        torch.autograd.grad(gradient.square().sum(), one)


def test_only_math_where_the_caller_wants_it() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert module.attention_backend(torch.device("cuda"), torch.bfloat16) == "math"
        assert module.attention_backend(torch.device("cpu"), torch.float32) == "math"
    assert module.attention_backend(torch.device("cpu"), torch.float32) != "math"


@pytest.mark.parametrize(
    ("arch", "half", "first"),
    [
        (80, True, "flash-attn-2"),
        (86, True, "flash-attn-2"),
        (90, True, "flash-attn-3"),
        (120, True, "cudnn"),
        (90, False, "efficient"),
    ],
)
def test_candidates(monkeypatch: pytest.MonkeyPatch, arch: int, half: bool, first: Backend) -> None:
    monkeypatch.setattr(module, "architecture", lambda device: arch)
    dtype = torch.bfloat16 if half else torch.float32
    candidates = module.candidates(torch.device("cuda"), dtype)
    assert candidates[0] == first and candidates[-1] == "math"


def test_a_candidate_is_tried_before_it_is_used(
    flash_attn: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing, refused or wrong: the next one is taken, and the reason is kept."""
    cpu = torch.device("cpu")
    assert module.rejection_reason(flash_attn, cpu, torch.bfloat16) == ""
    name = MODULES[int(flash_attn[-1])]
    right = sys.modules[name].flash_attn_qkvpacked_func

    def wrong(qkv):
        return right(qkv * 1.1)

    def refuses(qkv):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(sys.modules[name], "flash_attn_qkvpacked_func", wrong)
    assert "wrong at 514 tokens" in module.rejection_reason(flash_attn, cpu, torch.bfloat16)
    monkeypatch.setattr(sys.modules[name], "flash_attn_qkvpacked_func", refuses)
    reason = module.rejection_reason(flash_attn, cpu, torch.bfloat16)
    assert reason == "RuntimeError: no kernel image"
    monkeypatch.delattr(sys.modules[name], "flash_attn_qkvpacked_func")  # a folder of that name
    reason = module.rejection_reason(flash_attn, cpu, torch.bfloat16)
    assert reason.startswith("AttributeError: ")
    monkeypatch.setitem(sys.modules, name, None)
    assert "ModuleNotFoundError" in module.rejection_reason(flash_attn, cpu, torch.bfloat16)
    monkeypatch.setattr(module, "candidates", lambda *_: (flash_attn, "math"))
    attention_trials.cache_clear()
    trials = attention_trials(cpu, torch.bfloat16)
    attention_trials.cache_clear()
    assert list(trials) == [flash_attn, "math"] and trials["math"] == ""


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_candidates_are_tried_where_there_are_no_gradients(
    mode: type, device: torch.device
) -> None:
    """As in the first prediction on a GPU."""
    with mode():
        assert module.rejection_reason("math", device, torch.float32) == ""


def test_an_error_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(module, "run_backend", fails)
    cpu = torch.device("cpu")
    assert module.rejection_reason("math", cpu, torch.float32) == "AssertionError: "


def test_shapes_alone_need_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "candidates", lambda *_: ("blocked",))
    assert attention_backend(torch.device("meta"), torch.bfloat16) == "math"


def test_without_a_gpu() -> None:
    assert attention_backend(torch.device("cpu"), torch.float32) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    backend = attention_backend(device, dtype)
    assert attention_trials(device, dtype)[backend] == ""
    inputs = [x.to(device) for x in queries_keys_values((2, 514, 514, 3, 64), "unit")]
    assert_as_good_as_reference(attention, attention_reference, inputs, dtype, rounding=0.01)
    real = torch.arange(514, device=device) % 5 < torch.tensor([[5], [2]], device=device)
    q, k, v = (x.to(dtype) for x in inputs)
    want = attention_reference(*inputs, real)
    error = (
        attention(q, k, v, make_padding_mask(real)).double() - want
    ).abs().max() / want.abs().max()
    assert error < 0.01


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 5, 3, 8, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 9, 3, 8, device="cuda", dtype=torch.bfloat16)
        out = attention(q, k, k)
    assert tuple(out.shape) == (2, 5, 3, 8)
    assert out.device.type == "cuda" and out.dtype == torch.bfloat16


def test_compiles_without_a_graph_break() -> None:
    inputs = [x.requires_grad_() for x in queries_keys_values((2, 5, 9, 2, 8), "unit")]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(attention(*inputs).square().sum(), inputs)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
