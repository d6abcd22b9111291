"""Engines in a program that goes on: a notebook, a thread, one run after the other."""

import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist
from finetune_runs import load, plain_file
from runs import make_data, overrides, write_config

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.finetune import FinetuneEngine
from ssast.engine.parallel.ranks import World, close_world
from ssast.engine.pretrain import PretrainEngine
from ssast.engine.train import stop as stopping
from ssast.engine.train import trainer
from ssast.engine.train.stop import Stop

WORLD = World(0, 0, 1, "single", torch.device("cpu"))


@pytest.fixture(params=["pretrain", "finetune"])
def case(request, tmp_path, splits):
    """An engine, and the clips that it is fitted to."""
    close_world()  # of a test before
    if request.param == "pretrain":
        train, valid = (given.partition("=")[2] for given in make_data(tmp_path))
        short = overrides(train__steps=3)
        return PretrainEngine.from_config(write_config(tmp_path), short), (train, valid)
    config = load(plain_file(tmp_path), splits, tmp_path / "unused", finetune__epochs=1)
    return FinetuneEngine(config), (splits["train"], splits["valid"])


def state():
    """What a run must leave as it was."""
    handlers = {number: signal.getsignal(number) for number in Stop.SIGNALS}
    threads = [thread for thread in threading.enumerate() if not thread.daemon]
    return dict(os.environ), handlers, dist.is_initialized(), threads


def test_fit_works_in_a_thread_and_again_and_leaves_nothing_behind(case, tmp_path):
    engine, clips = case
    before, caught = state(), []

    def fit():
        try:
            engine.fit(*clips, folder=tmp_path / "thread")
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert not caught and state() == before and not before[2]
    values = engine.evaluate(clips[1])
    engine.fit(*clips, folder=tmp_path / "again")
    assert state() == before
    assert engine.evaluate(clips[1]) == pytest.approx(values, rel=1e-6)


def test_an_interrupted_engine_has_a_checkpoint_and_goes_on(case, tmp_path, monkeypatch):
    engine, clips = case
    before, run, honest = state(), tmp_path / "run", trainer.train_step

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return honest(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"fit\(..., resume=True\) goes on"):
            engine.fit(*clips, folder=run)
    assert state() == before
    latest = Checkpoints(run / "checkpoints").latest()
    assert latest is not None and latest.name == "step000000001"
    engine.fit(*clips, folder=run, resume=True)
    assert engine.trained is not None and engine.evaluate(clips[1])["num_scored"] > 0


@pytest.mark.parametrize("notebook", [True, False])
def test_a_second_interrupt_acts_at_once(notebook, monkeypatch, request):
    """Without ending the kernel of a notebook."""
    monkeypatch.setattr(stopping, "in_notebook", lambda: notebook)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))
    before, stop = signal.getsignal(signal.SIGINT), Stop()
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(WORLD) and stop.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == (before if notebook else signal.SIG_DFL)
        if notebook:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
