"""Worlds of one and of two ranks; clips and a configuration for small runs."""

import pytest
from rank_pool import RankPool
from runs import make_data, write_config


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The folder of the caches of this session, also for the programs that it starts."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSAST_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def two_ranks():
    """Two processes of one world; they start with the first job."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture
def world():
    """This process as a world of its own."""
    from ssast.engine.parallel.ranks import close_world, init_world

    close_world()
    yield init_world(timeout_s=60)
    close_world()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Overrides that point to a few clips, which no test may change."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))
