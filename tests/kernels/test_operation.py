"""What runs for a call of an operation: the kernel, or the implementation in plain torch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef

from ssast.kernels.operation import custom_op


def _doubled(x: Tensor, y: Tensor, factor: float, bias: Tensor | None = None) -> Tensor:
    out = x * 2 + 0 * y.to(x.dtype)
    return out if bias is None else out + bias


def _kernel(x: Tensor, y: Tensor, *rest: object) -> Tensor:
    return torch.full_like(x, 7)


def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


@pytest.fixture(scope="module")
def operation() -> Iterator[CustomOpDef]:
    yield custom_op("of_a_test", _doubled, cpu=_kernel, fake=_fake, autocast="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_runs_for_floats_of_up_to_32_bits(
    operation: CustomOpDef, dtype: torch.dtype
) -> None:
    x = torch.ones(3, dtype=dtype)
    assert operation(x, x, 1.0).tolist() == [7, 7, 7]
    assert operation(x, x, 1.0, x).tolist() == [7, 7, 7]


def test_float64_goes_through_torch(operation: CustomOpDef) -> None:
    x = torch.ones(3)
    assert operation(x.double(), x, 1.0).tolist() == [2, 2, 2]
    assert operation(x, x.double(), 1.0).tolist() == [2, 2, 2]
    assert operation(x, x, 1.0, x.double()).tolist() == [3, 3, 3]


def test_an_empty_batch_goes_through_torch() -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("the kernel ran")

    operation = custom_op("of_a_test_too", _doubled, cpu=refuse, fake=_fake, autocast="none")
    for shape in ((0, 3), (3, 0)):
        empty = torch.ones(shape)
        assert operation(empty, empty, 1.0).shape == shape
    with pytest.raises(AssertionError, match="the kernel ran"):
        operation(torch.ones(3), torch.ones(3), 1.0)


def test_the_schema_is_that_of_the_implementation(operation: CustomOpDef) -> None:
    schema = str(operation._opoverload._schema)
    assert schema == (
        "ssast::of_a_test(Tensor x, Tensor y, float factor, Tensor? bias=None) -> Tensor"
    )
    torch.library.opcheck(operation, (torch.ones(3, dtype=torch.float64), torch.ones(3), 1.0))
