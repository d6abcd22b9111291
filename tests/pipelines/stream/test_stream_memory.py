"""A stream that runs for long needs no more memory than one that has just begun."""

import subprocess
import sys
from pathlib import Path

import pytest
from sounds import write_clips

PROGRAM = """
import gc, sys, torch
from pathlib import Path
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.stream.stream import AudioStream

def resident_mib():
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

paths = [*sorted(Path(sys.argv[1]).glob("*")), Path(sys.argv[1]) / "missing.wav"]
with AudioStream(
    paths, FbankSpec(num_frames=48), batch_size=4, device=torch.device("cpu"), max_rejected=0.5
) as stream:
    for number, batch in enumerate(stream, 1):
        if number == 1000:
            early = resident_mib()
        if number == 5000:
            print(early, resident_mib())
            break
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_5000_batches(tmp_path: Path) -> None:
    write_clips(tmp_path, 20, samples=8000)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    early, late = map(float, subprocess.check_output(command, text=True, timeout=300).split())
    assert late < early + 10, f"{early:.1f} MiB after 1000 batches, {late:.1f} MiB after 5000"
