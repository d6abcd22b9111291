"""Thousands of damaged files through a real stream: no crash, no hang, no wrong success."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import tone, write

COUNT = 2400
TIMEOUT_S = 300  # a hang, not slowness: it takes a quarter of a minute
FORMATS = [  # suffix, subtype, rate in Hz, channels
    ("wav", "PCM_16", 16000, 1),
    ("wav", "PCM_24", 16000, 1),
    ("wav", "FLOAT", 22050, 1),
    ("wav", "PCM_16", 16000, 2),
    ("flac", "PCM_16", 16000, 1),
    ("flac", "PCM_24", 44100, 2),
    ("ogg", "VORBIS", 16000, 1),
    ("aiff", "PCM_16", 8000, 1),
]

# In a process of its own: a crash would end the tests.
STREAM = """
import io, json, sys
import numpy as np, soundfile, soxr, torch
from ssast.kernels.fbank import FbankSpec, fbank_reference
from ssast.pipelines.audio.encoded import TAIL_S
from ssast.pipelines.audio.lengths import examine
from ssast.pipelines.stream.stream import AudioStream

paths = json.load(open(sys.argv[1]))
spec = FbankSpec(num_frames=48)


def expected(path):
    # What an independent decoder makes of the file.
    data = open(path, "rb").read()
    known = examine(lambda at, count: data[at : at + count], len(data))
    if known is not None and known.repair is not None:  # damage to the length alone
        data = known.repair.applied(data)
    # what comes after the part that counts may be missing
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        rate_hz = sound.samplerate
        wanted = spec.num_samples
        if rate_hz != spec.sample_rate_hz:  # and a little for the resampler's edge
            wanted = int((wanted / spec.sample_rate_hz + TAIL_S) * rate_hz)
        try:
            samples = sound.read(wanted, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:  # in a block with damage behind it; DALI reads all of it
            samples = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0][:wanted]
    samples = samples.mean(axis=1)
    if rate_hz != spec.sample_rate_hz:
        samples = soxr.resample(samples, rate_hz, spec.sample_rate_hz, quality="HQ")
    samples = samples[: spec.num_samples]
    wave = torch.from_numpy(samples)[None].double()
    wave = torch.nn.functional.pad(wave - wave.mean(), (0, spec.num_samples - len(samples)))
    return fbank_reference(wave, torch.tensor([len(samples)]), spec)[0]


seen, wrong, accepted = 0, [], 0
with AudioStream(
    paths, spec, batch_size=32, epochs=1, device=torch.device("cpu"), max_rejected=1.0
) as stream:
    for batch in stream:
        assert torch.isfinite(batch.fbank).all()
        for clip, valid, got in zip(batch.clip_ids.tolist(), batch.valid.tolist(), batch.fbank):
            seen += 1
            if not valid:
                assert not got.any()
                continue
            accepted += 1
            try:
                error = (got.double() - expected(paths[clip])).abs().max().item()
            except Exception as problem:
                error = repr(problem)
            if not isinstance(error, float) or not error < 0.05:
                wrong.append((paths[clip], error))
    reasons = sorted({reason for _, reason in stream.rejected.values()})
    rejected = len(stream.rejected)
print(json.dumps({"seen": seen, "accepted": accepted, "rejected": rejected, "wrong": wrong,
                  "reasons": reasons}))
"""


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """Some bytes changed, mostly of the header; sometimes cut, doubled or with a hole."""
    changed = bytearray(data)
    reach = 64 if random.random() < 0.7 else len(changed)
    for _ in range(random.integers(1, 6)):
        changed[random.integers(reach)] = random.choice(
            [0, 1, 0x7F, 0x80, 0xFF, random.integers(256)]
        )
    kind = random.random()
    at = int(random.integers(len(changed)))
    if kind < 0.15:
        return bytes(changed[:at])
    if kind < 0.25:
        return bytes(changed[:at] + changed[at + int(random.integers(1, 2000)) :])
    if kind < 0.3:
        return bytes(changed[:at] + changed)
    return bytes(changed)


@pytest.mark.slow
def test_damaged_files(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    originals = []
    for i, (suffix, subtype, rate_hz, channels) in enumerate(FORMATS):
        samples = np.stack([tone(rate_hz // 2, seed=i, rate_hz=rate_hz)] * channels, 1)
        path = write(tmp_path / f"{i}.{suffix}", samples, rate_hz, subtype=subtype)
        originals.append((path.read_bytes(), suffix))
    folder = tmp_path / "damaged"
    folder.mkdir()
    paths = []
    for i in range(COUNT):
        data, suffix = originals[i % len(originals)]
        paths.append(str(folder / f"{i:04d}.{suffix}"))
        Path(paths[-1]).write_bytes(damaged(data, random))
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", STREAM, str(tmp_path / "paths.json")],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"] == COUNT and found["accepted"] + found["rejected"] == COUNT
    assert found["accepted"] > COUNT // 10 and found["rejected"] > COUNT // 10
    assert found["wrong"] == []
    assert all(reason and "\n" not in reason for reason in found["reasons"])


def test_the_check_sees_a_wrong_success(tmp_path: Path) -> None:
    """The comparison that the fuzz test rests on: other samples, other features."""
    a, b = tone(8000, seed=1), tone(8000, seed=2)
    soundfile.write(tmp_path / "a.wav", a, 16000)
    (tmp_path / "paths.json").write_text(json.dumps([str(tmp_path / "a.wav")]))
    swap = f"soundfile.write(paths[0], np.load({str(tmp_path / 'b.npy')!r}), 16000)"
    np.save(tmp_path / "b.npy", b)
    program = STREAM.replace("for batch in stream:", f"for batch in stream:\n        {swap}")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "paths.json")],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout.splitlines()[-1])["wrong"]) == 1
