"""Sounds to be mutated: a fraction of a second in every format that is read, made from scratch."""

import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from ssast.benchmarks.fuzzing.containers import unpacked
from ssast.benchmarks.fuzzing.mutations import Files

RATE_HZ = 16000
FORMATS = {  # suffixes, and subtypes besides the default one
    "WAV": ("wav", ("PCM_24", "FLOAT", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610")),
    "WAVEX": ("wav", ("PCM_16",)),
    "RF64": ("rf64", ("PCM_16",)),
    "W64": ("w64", ("PCM_16", "IMA_ADPCM")),
    "AIFF": ("aiff", ("FLOAT", "ALAW")),
    "CAF": ("caf", ("PCM_24", "ALAC_16")),
    "AU": ("au", ("FLOAT", "ULAW")),
    "FLAC": ("flac", ("PCM_24",)),
    "OGG": ("ogg", ("OPUS",)),
    "MP3": ("mp3", ()),
    "NIST": ("sph", ()),
    "VOC": ("voc", ()),
}
CONTAINERS = {  # what ffmpeg alone reads: the encoder and its options by suffix
    "m4a": ("-c:a", "aac"),
    "mp4": ("-c:a", "aac", "-movflags", "+faststart"),
    "mov": ("-c:a", "pcm_s16le"),
    "aac": ("-c:a", "aac", "-f", "adts"),
    "wma": ("-c:a", "wmav2"),
    "webm": ("-c:a", "libopus"),
    "mka": ("-c:a", "flac"),
    "oga": ("-c:a", "flac", "-f", "ogg"),
    "ac3": ("-c:a", "ac3"),
    "wv": ("-c:a", "wavpack"),
    "tta": ("-c:a", "tta"),
    "avi": ("-c:a", "pcm_s16le"),
    "flv": ("-c:a", "aac", "-ar", "44100"),
}
HUNG_S = 60


def chirp(samples: int, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Return a chirp over noise, [S] float32."""
    times = np.arange(samples) / rate_hz
    noise = np.random.default_rng(samples).standard_normal(samples).clip(-4, 4)
    return (0.4 * np.sin(2 * np.pi * (300 + 900 * times) * times) + 0.1 * noise).astype(np.float32)


def encoded(format: str, subtype: str | None = None, channels: int = 1) -> bytes:
    """Return a file of 0.15 s in one of libsndfile's formats."""
    rate_hz = 48000 if subtype == "OPUS" else RATE_HZ
    sound = chirp(round(0.15 * rate_hz), rate_hz)
    samples = np.stack([sound] * channels, 1)
    with tempfile.NamedTemporaryFile() as file:  # an MP3 file is not whole if it is made in memory
        soundfile.write(file.name, samples, rate_hz, format=format, subtype=subtype)
        return Path(file.name).read_bytes()


def sound_files() -> list[Files]:
    """Return a file in each format that libsndfile reads here, and some of special form."""
    found: list[Files] = []
    for format, (suffix, subtypes) in FORMATS.items():
        for subtype in (None, *subtypes):
            found.append({f"clip.{suffix}": encoded(format, subtype)})
    found += [{"clip.wav": encoded(format, None, 2)} for format in ("WAV", "FLAC", "AIFF")]
    # What it would guess by the name, or take for the data of another file.
    found += [{f"clip.{suffix}": encoded("WAV")} for suffix in ("sd2", "vox", "gsm")]
    tag = b"ID3\x04\0\0\0\0\x02\0" + bytes(256)
    return [*found, {"clip.flac": tag + encoded("FLAC")}]


def plain_files() -> list[Files]:
    """Return the formats that DALI is given, and that are decoded for it."""
    kinds: list[tuple[str, str | None]] = [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT")]
    kinds += [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("AIFF", "PCM_16")]
    kinds += [("MP3", None)]
    return [{f"clip.{FORMATS[format][0]}": encoded(format, subtype)} for format, subtype in kinds]


def foreign_files() -> list[Files]:
    """Return files that ffmpeg alone reads; none where it is not installed."""
    program = shutil.which("ffmpeg")
    if program is None:
        return []
    found = []
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source.wav"
        source.write_bytes(encoded("WAV"))
        for suffix, options in CONTAINERS.items():
            target = Path(name) / f"clip.{suffix}"
            command = [program, "-nostdin", "-v", "error", "-i", str(source), "-bitexact"]
            done = subprocess.run(
                [*command, *options, str(target)], capture_output=True, timeout=HUNG_S
            )
            if done.returncode == 0:  # else this ffmpeg does not write it
                found.append({target.name: target.read_bytes()})
    return found


def archives() -> list[Files]:
    """Return tar archives of recordings: three dialects, long names, links, and its bytes alone."""
    found: list[Files] = []
    wav, flac = encoded("WAV"), encoded("FLAC")
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=dialect) as archive:
            names = ["a.wav", "b/c.flac", "long/" * 18 + "d.wav"]
            names += [] if dialect == tarfile.USTAR_FORMAT else ["\u00e4" * 120 + ".wav"]
            for name in names:
                member = tarfile.TarInfo(name)
                data = flac if name.endswith("flac") else wav
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("link.wav")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        found += [{"a.tar": buffer.getvalue()}, unpacked("a.tar", buffer.getvalue())]
    return found
