"""Devices, worlds of one and of two ranks; clips and a configuration for small runs."""

import sys
from collections.abc import Iterator
from pathlib import Path

import devices
import pytest
import torch
from compatibility import pytest_runtest_makereport  # noqa: F401  # a hook
from rank_pool import RankPool
from runs import make_data, write_config


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="see devices.py")


def pytest_configure(config):
    devices.choose(config.getoption("--device"))


def pytest_collection_modifyitems(config, items):
    """Leave out, on a GPU, what is not written for one."""
    if config.getoption("--device") == "cpu":
        return
    chosen = [i for i in items if "device" in i.fixturenames or i.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def device():
    """The device of the session: a test that takes it holds on a CPU and on a GPU."""
    return devices.current()


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
    if devices.current() != devices.CPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module", autouse=True)
def leave_world():
    """Leave the world that the tests of a module have joined: a ledger needs a process without."""
    yield
    if (ranks := sys.modules.get("ssast.engine.parallel.ranks")) is not None:
        ranks.close_world()


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


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> Iterator[Path]:
    """Where transformers copies model files to, instead of the home folder."""
    from transformers import dynamic_module_utils

    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))
        yield folder
