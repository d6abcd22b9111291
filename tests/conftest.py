"""Worlds of one and of two ranks."""

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def two_ranks():
    """Two processes of one world; they start with the first job."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture
def world():
    """This process as a world of its own."""
    from ssast.engine.distributed import close_world, init_world

    close_world()
    yield init_world(timeout_s=60)
    close_world()
