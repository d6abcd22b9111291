"""The clock of a benchmark, on a GPU by events that are not there."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from ssast.benchmarks import device as benchmark_device
from ssast.benchmarks.device import CPU, add_device_option, find_device, timed, use_device
from ssast.engine.errors import ConfigError

GPU = torch.device("cuda", 0)


class Queue:
    """A GPU that takes 5 ms for each piece of work, after the host has queued it."""

    def __init__(self) -> None:
        self.ms, self.seen_ms, self.log = 0.0, 0.0, list[str]()

    def work(self) -> None:
        self.ms += 5.0

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=None)

        def record() -> None:
            event.at = self.ms
            self.log.append("record")

        def synchronize() -> None:
            self.seen_ms = event.at
            self.log.append("wait")

        event.record, event.synchronize = record, synchronize
        event.elapsed_time = lambda other: self._elapsed(event, other)
        return event

    def _elapsed(self, first: SimpleNamespace, last: SimpleNamespace) -> float:
        assert self.seen_ms >= last.at, "the time was read before it was known"
        return last.at - first.at


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: queue.log.append("idle"))
    return queue


def test_work_on_a_gpu_is_timed_by_events(queue: Queue) -> None:
    cpu_s, gpu_s = timed(queue.work, GPU, count=4)
    assert gpu_s == pytest.approx(5e-3) and 0 <= cpu_s < 1
    assert queue.log == ["idle", "record", "record", "wait"]


def test_work_on_a_cpu_is_timed_by_clocks(queue: Queue) -> None:
    calls: list[int] = []
    cpu_s, wall_s = timed(lambda: calls.append(1), count=3)
    assert len(calls) == 3 and cpu_s >= 0 and wall_s > 0 and not queue.log


@pytest.mark.parametrize(
    ("option", "gpus", "expected"),
    [
        ([], True, GPU),
        ([], False, CPU),
        (["--device", "cpu"], True, CPU),
        (["--device", "cuda"], True, GPU),
        (["--device", "cuda"], False, None),
    ],
)
def test_the_device_is_a_gpu_where_there_is_one(
    option: list[str], gpus: bool, expected: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    parser = argparse.ArgumentParser()
    add_device_option(parser)
    name = parser.parse_args(option).device
    if expected is None:
        with pytest.raises(ConfigError, match="--device cuda: this machine shows no GPU"):
            find_device(name)
    else:
        assert find_device(name) == expected


def test_a_process_of_the_cpu_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    monkeypatch.setattr(benchmark_device.os, "environ", environment)
    use_device(CPU)
    assert environment == {"CUDA_VISIBLE_DEVICES": ""}
