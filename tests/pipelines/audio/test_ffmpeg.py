"""What libsndfile cannot read goes through ffmpeg, which may open that one file alone."""

import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from prepared import prepared, rejected, samples_of
from sounds import tone, write

from ssast.pipelines.audio import decode, extents, ffmpeg
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.audio.decode import Item, read_blocks
from ssast.pipelines.audio.headers import foreign_format
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.errors import DataError, UnusableError

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
SECONDS = 2
HOSTILE = {
    "dash": """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
 mediaPresentationDuration="PT2S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>
<AdaptationSet mimeType="audio/mp4"><Representation id="1" bandwidth="1000">
<BaseURL>file://{secret}.mp4</BaseURL><SegmentBase/></Representation></AdaptationSet></Period></MPD>
""",
    "live": """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="dynamic"
 profiles="urn:mpeg:dash:profile:isoff-live:2011"
 availabilityStartTime="2020-01-01T00:00:00Z" minimumUpdatePeriod="PT2S"><Period>
<AdaptationSet mimeType="audio/mp4"><SegmentTemplate media="file://{secret}.mp4" duration="2"/>
<Representation id="1" bandwidth="1000"/></AdaptationSet></Period></MPD>
""",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:2,\nfile://{secret}.ts\n#EXT-X-ENDLIST\n",
    "hls_live": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:2,\nfile://{secret}.ts\n",
    "ffconcat": "ffconcat version 1.0\nfile {secret}.mp4\n",
    "relative": "ffconcat version 1.0\nfile secret.mp4\n",
    "concat": "file '{secret}.mp4'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 0.0.0.0\ns=x\nc=IN IP4 0.0.0.0\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "ffmetadata": ";FFMETADATA1\ntitle=a\n",
    "image": "P5 8 8 255\n" + "x" * 64,
    "subtitle": "1\n00:00:00,000 --> 00:00:02,000\nwords\n",
    "asx": '<ASX version="3"><ENTRY><REF HREF="file://{secret}.mp4"/></ENTRY></ASX>\n',
    "url": "[playlist]\nFile1={secret}.mp4\n",
}
CONTAINERS = {  # encoder and options by suffix, whether it is lossless
    "m4a": (("-c:a", "aac", "-b:a", "96k"), False),
    "mp4": (("-c:a", "aac", "-b:a", "96k", "-movflags", "+faststart"), False),
    "mov": (("-c:a", "pcm_s16le"), True),
    "3gp": (("-c:a", "aac", "-f", "3gp"), False),
    "aac": (("-c:a", "aac", "-f", "adts"), False),
    "wma": (("-c:a", "wmav2"), False),
    "webm": (("-c:a", "libopus"), False),
    "mka": (("-c:a", "flac"), True),
    "mkv": (("-c:a", "pcm_s16le"), True),
    "oga": (("-c:a", "flac", "-f", "ogg"), True),
    "ac3": (("-c:a", "ac3"), False),
    "wv": (("-c:a", "wavpack"), True),
    "tta": (("-c:a", "tta"), True),
    "avi": (("-c:a", "pcm_s16le"), True),
    "flv": (("-c:a", "aac", "-ar", "44100"), False),
    "spx": (("-c:a", "libspeex", "-f", "ogg"), False),
}


def convert(source: Path, target: Path, *options: str) -> Path:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", str(source), *options, str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this ffmpeg does not write it: {done.stderr.splitlines()[-1]}")
    return target


@needs_ffmpeg
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_containers_that_only_ffmpeg_reads(suffix: str, tmp_path: Path) -> None:
    """From a file, from an archive (with MP4's index behind the samples) and prepared."""
    options, lossless = CONTAINERS[suffix]
    wave = tone(SECONDS * 16000, seed=5)
    source = write(tmp_path / "source.wav", wave, subtype="PCM_16")
    folder = tmp_path / "in"
    folder.mkdir()
    path = convert(source, folder / f"a: \u00e4,'{suffix}.{suffix}", *options)
    with tarfile.open(folder / "t.tar", "w") as archive:
        archive.add(path, f"b.{suffix}")
    shutil.copy(path, folder / "wrong.wav")
    index = prepared(folder, tmp_path / "out", Recipe(clip_s=10.0))
    assert rejected(tmp_path / "out") == {} and len(index) == 3
    clips = [samples_of(index[number].read()) for number in range(3)]
    for clip in clips:
        np.testing.assert_array_equal(clip, clips[0])
    assert abs(len(clips[0]) / 16000 - SECONDS) <= (0 if lossless else 0.15)
    if lossless:
        np.testing.assert_allclose(clips[0] / 2**15, wave, atol=1e-4)
    else:
        got = np.abs(np.fft.rfft(clips[0][4000:20000]))[100:3000].reshape(-1, 100).sum(1)
        want = np.abs(np.fft.rfft(wave[4000:20000]))[100:3000].reshape(-1, 100).sum(1)
        assert np.corrcoef(got, want)[0, 1] > 0.8
    assert foreign_format(path.read_bytes()) is not None


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["m4a", "mkv", "oga", "wv", "webm", "wma", "avi", "flv", "tta"])
def test_half_a_container_is_no_whole_one(suffix: str, tmp_path: Path) -> None:
    options, _ = CONTAINERS[suffix]
    if suffix == "m4a":
        options = (*options, "-movflags", "+faststart")
    source = write(tmp_path / "source.wav", tone(10 * 16000), subtype="PCM_16")
    path = convert(source, tmp_path / f"a.{suffix}", *options)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UnusableError):
        list(read_blocks(Item(path.name, path)))


@needs_ffmpeg
@pytest.mark.parametrize("kind", HOSTILE)
def test_other_files_are_never_read(kind: str, tmp_path: Path) -> None:
    """Manifests, playlists, scripts under the name of a sound, also in an archive."""
    sound = write(tmp_path / "secret.wav", tone(32000), subtype="PCM_16")
    fragments = ("-c:a", "aac", "-movflags", "frag_keyframe+empty_moov+default_base_moof")
    convert(sound, tmp_path / "secret.mp4", *fragments)
    convert(sound, tmp_path / "secret.ts", "-c:a", "aac")
    folder = tmp_path / "in"
    folder.mkdir()
    text = HOSTILE[kind].replace("{secret}", str(tmp_path / "secret")).encode()
    names = [f"a.{suffix}" for suffix in ("m4a", "wav", "flac", "webm", "mp3", "ogg", "au")]
    for name in names:
        (folder / name).write_bytes(text)
    with tarfile.open(folder / "t.tar", "w") as archive:
        for name in names:
            archive.add(folder / name, name)
    begin = time.monotonic()
    with pytest.raises(DataError, match="none of 14 recordings can be used"):
        prepared(folder, tmp_path / "out")
    assert time.monotonic() - begin < 60
    found = rejected(tmp_path / "out")
    assert set(found) == {*names, *(f"t.tar/{name}" for name in names)}
    assert all(reason and "\n" not in reason for reason in found.values())
    if kind in ("dash", "live", "hls", "hls_live", "ffconcat", "relative", "sdp"):
        assert found["a.m4a"] == "cannot be decoded by ffmpeg: not a container of sound"


@needs_ffmpeg
def test_references_in_a_container_are_not_followed(tmp_path: Path) -> None:
    """An MP4 file may name another file that has its samples."""
    sound = write(tmp_path / "secret.wav", tone(32000), subtype="PCM_16")
    secret = convert(sound, tmp_path / "secret.mov", "-c:a", "pcm_s16le").read_bytes()
    url = f"file://{tmp_path}/secret.mov".encode() + b"\0"
    entry = (12 + len(url)).to_bytes(4, "big") + b"url \0\0\0\0" + url
    at = secret.find(b"dref") + 12  # behind version and number of entries
    old = int.from_bytes(secret[at : at + 4], "big")
    more = len(entry) - old
    data = bytearray(secret[:at] + entry + secret[at + old :])
    for name in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        place = data.rfind(name, 0, at) - 4
        size = int.from_bytes(data[place : place + 4], "big")
        data[place : place + 4] = (size + more).to_bytes(4, "big")
    box = data.find(b"mdat") + 4
    length = int.from_bytes(data[box - 8 : box - 4], "big") - 8
    data[box : box + length] = bytes(length)  # silence, should its own samples be read
    (tmp_path / "a.m4a").write_bytes(data)
    try:
        blocks = [block for block, _ in read_blocks(Item("a.m4a", tmp_path / "a.m4a"))]
    except UnusableError:
        return
    assert not np.concatenate(blocks).any()


FAKE = """#!{python}
import os, subprocess, sys, time
import numpy as np
out = sys.stdout.buffer
mode = open(sys.argv[sys.argv.index("-i") + 1].removeprefix("file:"), "rb").read(100).decode()
header = b".snd" + np.array([32, 2**32 - 1, 6, 16000, 1], ">u4").tobytes() + bytes(8)
if mode.startswith("endless"):
    out.write(header)
    while True:
        out.write(np.full(2**16, 0.1, ">f4").tobytes())
if mode.startswith("hangs"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open({pids!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
    out.write(header + np.full(2**12, 0.1, ">f4").tobytes())
    out.flush()
    time.sleep(600)
if mode.startswith("eats"):
    memory = np.ones(3 * 2**29)
    out.write(header + np.full(2**15, 0.1, ">f4").tobytes())
"""


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("mode", ["endless", "hangs", "eats"])
def test_limits(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound without end, a decoder that hangs with a child, and one that takes all memory."""
    program = tmp_path / "bin/ffmpeg"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable, pids=str(tmp_path / "pids")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(ffmpeg, "STALL_S", 2 if mode == "hangs" else 60)
    (tmp_path / "a.m4a").write_bytes(mode.encode().ljust(100))
    before = len(os.listdir("/proc/self/fd"))
    reason = {
        "endless": "gave more than 605 s of sound for its size",
        "hangs": "gave nothing for 2 s",
        "eats": "Unable to allocate",
    }[mode]
    with pytest.raises(UnusableError, match=f"cannot be decoded by ffmpeg: .*{reason}"):
        list(read_blocks(Item("a.m4a", tmp_path / "a.m4a")))
    assert len(os.listdir("/proc/self/fd")) == before
    if mode == "hangs":
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        until = time.monotonic() + 10
        while any(map(alive, pids)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(map(alive, pids))


def test_a_reader_that_stops_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin/ffmpeg"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable, pids=str(tmp_path / "pids")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "a.m4a").write_bytes(b"endless".ljust(100))
    started = []
    real = subprocess.Popen

    def note(*arguments: object, **more: object) -> object:
        started.append(real(*arguments, **more))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    blocks = read_blocks(Item("a.m4a", tmp_path / "a.m4a"))
    next(blocks)
    blocks.close()
    assert started[0].poll() is not None


def test_segments_of_what_ffmpeg_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of several blocks, also to the end and beyond it."""
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (4 * 16000, 2)).astype(np.float32)
    monkeypatch.setattr(decode, "ffmpeg_installed", lambda: True)
    monkeypatch.setattr(
        decode, "ffmpeg_blocks", lambda data: ((b, 16000) for b in np.split(sound, 4))
    )
    monkeypatch.setattr(extents, "_reported", False)  # by a test before, in the same process
    path = tmp_path / "a.m4a"
    path.write_bytes(bytes(4) + b"ftypM4A " + bytes(64))
    for begin_s, duration_s in ((0.5, math.inf), (0.0, 1.0), (0.9, 2.2), (1.0, 1.0), (2.5, 9.0)):
        segment = Segment(str(path), begin_s, duration_s)
        blocks = [block for block, _ in read_blocks(Item("a.m4a", path, segment))]
        last = round(min(4.0, begin_s + duration_s) * 16000)
        want = sound[round(begin_s * 16000) : last].mean(1)
        np.testing.assert_array_equal(np.concatenate(blocks), want)
    assert "[2.5-11.5 s]: reaches 7.50 s beyond the end" in caplog.text
    with pytest.raises(UnusableError, match="begins at 4 s, beyond the end of the recording, 4 s"):
        list(read_blocks(Item("a.m4a", path, Segment(str(path), 4.0, 1.0))))
