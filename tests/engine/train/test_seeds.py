"""Random numbers of modules of others: each rank has its own, the same at the same step."""

import pytest
import torch

from ssast.engine.parallel.ranks import World
from ssast.engine.train.state import seed_rank


def drawn(seed: int, step: int, rank: int) -> list[float]:
    torch.manual_seed(0)  # as every rank does before it builds its weights
    seed_rank(seed, step, World(rank, rank, 4, "env", torch.device("cpu")))
    return torch.rand(4).tolist()


def test_ranks_draw_differently_and_again_the_same() -> None:
    found = {(seed, step, rank): drawn(seed, step, rank)
             for seed in (0, 1) for step in (0, 7) for rank in (1, 2, 3)}  # fmt: skip
    assert len({tuple(values) for values in found.values()}) == len(found)
    assert drawn(1, 7, 2) == found[1, 7, 2]


@pytest.mark.parametrize("step", [0, 7])
def test_rank_0_goes_on_with_what_the_checkpoint_has(step: int) -> None:
    found = drawn(3, step, 0)
    torch.manual_seed(0)
    assert found == torch.rand(4).tolist()
