"""Fast float32 products: allowed only where they are exact, and only inside."""

import pytest
import torch

from ssast.kernels import matmul as module
from ssast.kernels.matmul import fast_matmul, is_exact, is_fast, onednn_is_faster

AMD = {"avx512_f": True, "cpu_name": "AMD EPYC"}


@pytest.fixture(autouse=True)
def forget():
    module._is_usable.cache_clear()
    yield
    module._is_usable.cache_clear()


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)


@pytest.mark.parametrize(
    ("cpu", "faster"),
    [
        (AMD, True),
        ({**AMD, "avx512_f": False}, False),
        ({**AMD, "cpu_name": "Intel(R) Xeon(R) Platinum"}, False),
        ({"avx512_f": True}, False),
        ({}, False),
    ],
)
def test_where_it_is_tried(monkeypatch: pytest.MonkeyPatch, cpu: dict, faster: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert onednn_is_faster() == faster


def test_the_setting_is_put_back() -> None:
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with pytest.raises(KeyError), fast_matmul() as fast:
        assert is_fast() == fast
        raise KeyError
    assert settings.fp32_precision == before and not is_fast()


def test_products_are_exact_inside() -> None:
    with fast_matmul():
        assert is_exact()


def test_a_library_that_rounds_is_not_used(amd, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = torch.Tensor.__matmul__

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            x, y = x.bfloat16().float(), y.bfloat16().float()
        return rounded(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert not is_exact()
    with fast_matmul() as fast:
        assert not fast and torch.backends.mkldnn.matmul.fp32_precision != "bf16"


def test_is_used_as_a_decorator() -> None:
    @fast_matmul()
    def inside() -> bool:
        return is_fast()

    with fast_matmul() as fast:
        pass
    assert [inside(), inside()] == [fast, fast]
