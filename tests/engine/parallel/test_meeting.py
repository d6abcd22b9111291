"""Ranks of one attempt meet, in a store that has seen others."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from ssast.engine.parallel.meeting import agree_on_attempt

TIMEOUT_S = 20.0


@pytest.fixture
def stores():
    """Four clients of one store, as of ranks: a call of one may wait for another."""
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=TIMEOUT_S))
    others = [
        dist.TCPStore("127.0.0.1", first.port, timeout=timedelta(seconds=TIMEOUT_S))
        for _ in range(3)
    ]
    return [first, *others]


def meet(stores, timeout_s=TIMEOUT_S):
    with ThreadPoolExecutor(len(stores)) as pool:
        calls = [
            pool.submit(agree_on_attempt, store, rank, len(stores), timeout_s)
            for rank, store in reversed(list(enumerate(stores)))
        ]
        return [call.result() for call in calls]


def test_each_attempt_has_a_name_of_its_own(stores):
    names = [meet(stores) for _ in range(3)]
    assert [len(set(found)) for found in names] == [1, 1, 1]
    assert len({found[0] for found in names}) == 3


def test_a_rank_that_died_on_the_way_is_not_waited_for(stores):
    """Rank 1 said hello and was killed: the one that takes its place is heard, and hears."""
    stores[1].set("hello/1", "of the dead")
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(agree_on_attempt, stores[0], 0, 4, TIMEOUT_S)
        assert stores[1].get("attempt/of the dead")  # answered in vain
        others = [
            pool.submit(agree_on_attempt, stores[rank], rank, 4, TIMEOUT_S) for rank in (1, 2, 3)
        ]
        assert {call.result() for call in others} == {first.result()}


@pytest.mark.parametrize("present", [0, 1])
def test_a_rank_that_does_not_come_is_told(stores, present):
    with pytest.raises(dist.DistError, match=r"rank 1, 2, 3 did not come|[Tt]imed? ?out"):
        agree_on_attempt(stores[present], present, 4, 0.3)
