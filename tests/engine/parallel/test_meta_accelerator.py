"""DeepSpeed's view of a GPU without data."""

import gc

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import build_shm_op

from ssast.engine.parallel.meta_accelerator import meta_accelerator


def test_an_engine_that_was_dropped_before_is_not_heard():
    class Dropped:
        """Waits for its device when it is collected, as DeepSpeed's engine does."""

        def __init__(self):
            self.itself = self

        def __del__(self):
            get_accelerator().synchronize()

    waits = []
    gc.disable()
    try:
        Dropped()
        with meta_accelerator(waits.append):
            gc.collect()
            assert waits == []
            get_accelerator().synchronize()
    finally:
        gc.enable()
    assert waits == ["all work of the device is awaited"]


@pytest.mark.parametrize("cpu", [False, True])
def test_no_collectives_of_cpus_are_compiled(cpu):
    with meta_accelerator(lambda where: None, cpu=cpu):
        assert build_shm_op() is None
        assert get_accelerator().create_op_builder("ShareMemCommBuilder") is None
