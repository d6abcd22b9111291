"""Decode with ffmpeg what libsndfile cannot: m4a, wma, webm, FLAC in Ogg, ...

A file is data, however it is named: ffmpeg may open it as a container of sound and as nothing else.
Playlists and manifests (DASH, HLS, concat, SDP, numbered images) would have it read other files of
this machine, or wait for a live stream. It gets a descriptor of the one file, which formats such as
MP4 can seek in, and bounds on memory, on waiting time and on the length of the sound.
"""

import contextlib
import io
import itertools
import os
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ssast.pipelines.audio.headers import MISSING_SHARE
from ssast.pipelines.audio.parts import Span
from ssast.pipelines.errors import UnusableError
from ssast.pipelines.files import open_regular

BLOCK_SAMPLES = 2**19  # of all channels together
MOST_CHANNELS = 1024
AU_FLOAT = 6  # 32 bits, big-endian
CONTAINERS = ",".join(  # demuxers that read one file, and sound out of it
    (
        *(
            "mov",
            "mp4",
            "m4a",
            "3gp",
            "3g2",
            "matroska",
            "webm",
            "asf",
            "ogg",
            "flac",
            "mp3",
            "aac",
        ),
        *("wav", "w64", "aiff", "caf", "au", "ac3", "eac3", "dts", "dtshd", "ape", "wv", "tta"),
        *(
            "tak",
            "amr",
            "amrnb",
            "amrwb",
            "rm",
            "avi",
            "flv",
            "mpeg",
            "mpegts",
            "nistsphere",
            "voc",
        ),
        *("mpc", "mpc8", "truehd", "mlp", "loas", "qcp", "dsf", "aac", "voc"),
    )
)
MEMORY_BYTES = 4 * 2**30  # address space of the process, of which its libraries take half a GiB
BLOCK_BYTES = 2**29  # of a single allocation
STALL_S = 60  # without a sample: a decoder that hangs
LEAST_BYTES_PER_S = 20  # of any recording, silence as well; sound without end is an attack
SLACK_S = 0.25  # between the length that a container states and what is in it: codecs' delays
MESSAGE_BYTES = 2**16
FREE_S = 600  # of sound, however small the file


def ffmpeg_installed() -> bool:
    """Return whether there is an ffmpeg program."""
    return shutil.which("ffmpeg") is not None


def ffmpeg_blocks(
    data: Path | Span | bytes, limit_s: float = float("inf")
) -> Generator[tuple[np.ndarray, int], None, None]:
    """Decode blocks of [S, channels] float32 with ffmpeg, at the recording's sample rate.

    Args:
        data: A file, a part of an archive, or the bytes of a file.
        limit_s: Most seconds of sound, if that is less than the size of the file allows.

    Raises:
        OSError: The file cannot be opened.
        UnusableError: ffmpeg is not installed, or cannot decode the recording to its end.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise UnusableError("libsndfile cannot decode it: install ffmpeg to read this format")
    with contextlib.ExitStack() as stack:
        if isinstance(data, bytes):
            file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            file.write(data)
            file.flush()
        else:
            path = data.path if isinstance(data, Span) else data
            file = stack.enter_context(open_regular(path))
        size, number = os.fstat(file.fileno()).st_size, file.fileno()
        # By its number: no name, whatever its characters, is a URL or an option to ffmpeg.
        url = f"file:/dev/fd/{number}"
        if isinstance(data, Span):
            size = data.size
            url = f"subfile,,start,{data.offset},end,{data.offset + size},,:/dev/fd/{number}"
        errors = stack.enter_context(tempfile.TemporaryFile())
        limit_s = min(limit_s, FREE_S + size / LEAST_BYTES_PER_S)
        process = start(program, url, number, errors)
        stack.callback(finish, process)
        yield from decoded(process, errors, limit_s)


def start(program: str, url: str, number: int, errors: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start ffmpeg on an open file, in a process group of its own."""
    # -xerror: a damaged frame is an error. No demuxer outside of the list, no other protocol.
    talking = ("-nostdin", "-nostats", "-hide_banner", "-v", "level+info")
    reading = ("-xerror", "-max_alloc", str(BLOCK_BYTES))
    only = ("-protocol_whitelist", "file,subfile", "-format_whitelist", CONTAINERS)
    writing = ("-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1")
    process = subprocess.Popen(
        [program, *talking, *reading, *only, "-vn", "-sn", "-dn", "-i", url, *writing],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        pass_fds=(number,),
        start_new_session=True,
    )
    if hasattr(resource, "prlimit"):  # Linux; from here, as a fork of threads must not run Python
        with contextlib.suppress(OSError):
            resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    return process


def finish(process: "subprocess.Popen[bytes]") -> None:
    """End the process with all that it has started."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.stdout is not None
    process.stdout.close()
    process.wait()


def decoded(
    process: "subprocess.Popen[bytes]", errors: IO[bytes], limit_s: float
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the blocks that a process writes, and check how it ends.

    Raises:
        UnusableError: It fails, hangs, or writes more than ``limit_s`` of sound.
    """
    assert process.stdout is not None
    failure = None
    seconds = 0.0
    try:
        for block, rate_hz in au_blocks(Impatient(process.stdout)):
            seconds += len(block) / max(1, rate_hz)
            if seconds > limit_s:
                raise UnusableError(f"gave more than {limit_s:.0f} s of sound for its size")
            yield block, rate_hz
    except UnusableError as error:
        failure = error
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)  # it may be about to say why
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    lines = messages(errors)
    why = None
    if any("not on whitelist" in line for line in lines):
        why = "not a container of sound"
    elif failure or status:
        marked = [line for line in lines if re.search(r"\[(error|fatal|panic)\]", line)]
        why = str(failure or f"status {status}")
        if lines and status != -signal.SIGKILL:
            why = plain((marked or lines)[-1])
    elif any("ended prematurely" in line for line in lines):
        why = "truncated: file ended prematurely"
    else:
        stated = stated_s(lines)
        if stated is not None and stated - seconds > max(SLACK_S, MISSING_SHARE * stated):
            why = f"truncated: {seconds:.2f} of {stated:.2f} s"
    if why is not None:
        raise UnusableError(f"cannot be decoded by ffmpeg: {why}")


def messages(errors: IO[bytes]) -> list[str]:
    """Return the first and the last lines that ffmpeg has written."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(0)
    text = errors.read(MESSAGE_BYTES)
    if size > MESSAGE_BYTES:
        errors.seek(max(MESSAGE_BYTES, size - MESSAGE_BYTES))
        text += errors.read(MESSAGE_BYTES)
    lines = text.decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def plain(line: str) -> str:
    """Return a message without names of modules, levels and the file's number."""
    line = re.sub(r"\[[^]]*\] *", "", line)
    return re.sub(r"(file|subfile)[:,]\S*/dev/fd/\d+: *", "", line).strip()


def stated_s(lines: list[str]) -> float | None:
    """Return the length in s that a container states; None if it is a guess or of other streams."""
    before = list(itertools.takewhile(lambda line: "Stream mapping:" not in line, lines))
    if sum("Stream #0:" in line for line in before) != 1:
        return None
    if any("Estimating duration" in line for line in before):
        return None
    for line in before:
        found = re.search(r"Duration: (\d+):(\d\d):(\d\d\.\d+)", line)
        if found:
            hours, minutes, seconds = found.groups()
            return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    return None


class Impatient(io.RawIOBase):
    """A pipe that fails if nothing comes for :data:`STALL_S`."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self.pipe = pipe

    def read(self, size: int = -1) -> bytes:
        """Read ``size`` bytes, fewer at the end.

        Raises:
            UnusableError: Nothing came for too long.
        """
        parts, wanted = [], size
        ready = select.poll()  # unlike select(), of descriptors above 1024 as well
        ready.register(self.pipe, select.POLLIN | select.POLLHUP)
        while wanted > 0:
            if not ready.poll(1000 * STALL_S):
                raise UnusableError(f"gave nothing for {STALL_S} s")
            data = os.read(self.pipe.fileno(), wanted)
            if not data:
                break
            parts.append(data)
            wanted -= len(data)
        return b"".join(parts)


def au_blocks(stream: Impatient) -> Iterator[tuple[np.ndarray, int]]:
    """Read blocks of [S, channels] float32 from an AU stream of 32 bit floats.

    Raises:
        UnusableError: The stream has another format, or ends in the middle of a sample.
    """
    header = stream.read(24)
    if len(header) < 24 or header[:4] != b".snd":
        raise UnusableError("gave no sound")
    start, _, encoding, rate_hz, channels = struct.unpack(">5I", header[4:])
    if encoding != AU_FLOAT or not 24 <= start < 2**20 or not 0 < channels <= MOST_CHANNELS:
        raise UnusableError("gave no sound")
    stream.read(start - 24)
    frame_bytes = 4 * channels
    block_bytes = max(1, BLOCK_SAMPLES // channels) * frame_bytes
    while data := stream.read(block_bytes):
        if len(data) % frame_bytes:
            raise UnusableError("broke off")
        yield np.frombuffer(data, ">f4").astype(np.float32).reshape(-1, channels), rate_hz
