"""The device of a test session: the CPU, or with ``pytest --device cuda`` a GPU.

A process has one, as DeepSpeed decides once and for all what it computes on. A session on a GPU
runs the tests that take the fixture ``device``, and those that are marked ``gpu``; one on the CPU
sees no GPU.
"""

import os

import pytest
import torch

CPU = torch.device("cpu")


def choose(name: str) -> None:
    """Hide all GPUs from this process and those it starts, or check that there is one."""
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this machine shows no GPU")


def current() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def same(found, expected, rel: float = 1e-3):
    """Whether numbers are the same: to the bit on the CPU, else but for rounding.

    Those of some GPU operations depend on the order in which threads add.

    Args:
        found: Numbers or tensors, or lists, tuples and dicts of them.
        expected: The same of another computation.
        rel: Relative error on a GPU, of tensors by their norms.
    """
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[key], expected[key], rel) for key in expected
        )
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(
            same(f, e, rel) for f, e in zip(found, expected, strict=True)
        )
    if isinstance(expected, torch.Tensor):
        if current() == CPU or not expected.is_floating_point():
            return torch.equal(found, expected)
        return bool((found - expected).norm() <= rel * expected.norm() + 1e-6)
    if current() == CPU or not isinstance(expected, float):
        return found == expected
    return found == pytest.approx(expected, rel=rel, abs=1e-6, nan_ok=True)
