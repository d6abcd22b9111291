"""DeepSpeed's view of a GPU without data."""

import gc

from deepspeed.accelerator import get_accelerator

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
