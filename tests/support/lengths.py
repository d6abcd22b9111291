"""Whole audio files whose headers misstate their lengths, and truncated ones."""

import io
import struct

import numpy as np
import soundfile
from sounds import RATE_HZ, tone

SAMPLES = 16000
SIZE_FIELDS = {  # offset of the size of the samples, its format, what it counts beside them
    "WAV": (lambda d: d.find(b"data") + 4, "<I", 0),
    "WAVEX": (lambda d: d.find(b"data") + 4, "<I", 0),
    "RF64": (lambda d: d.find(b"ds64") + 16, "<Q", 0),
    "W64": (lambda d: d.find(b"data\xf3") + 16, "<Q", 24),
    "AIFF": (lambda d: d.find(b"SSND") + 4, ">I", 8),
    "CAF": (lambda d: d.find(b"data") + 4, ">Q", 4),
    "AU": (lambda d: 8, ">I", 0),
}
ID3V1 = b"TAG" + b"x" * 125
APE = b"APETAGEX" + struct.pack("<IIII8x", 2000, 1 + 31, 1, 0)  # its footer; 31 bytes before it


def sound(samples: int = SAMPLES) -> np.ndarray:
    return tone(samples, seed=3)


def encoded(
    kind: str, samples: np.ndarray, subtype: str | None = "PCM_16", **more: object
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE_HZ, format=kind, subtype=subtype, **more)
    return buffer.getvalue()


def id3v2(size: int) -> bytes:
    return b"ID3\x03\0\0" + bytes(size >> 7 * k & 0x7F for k in (3, 2, 1, 0)) + bytes(size)


def with_size(data: bytes, kind: str, value: int) -> bytes:
    find, form, _ = SIZE_FIELDS[kind]
    changed = bytearray(data)
    struct.pack_into(form, changed, find(data), value % 2 ** (8 * struct.calcsize(form)))
    return bytes(changed)


def flac_with_total(data: bytes, total: int) -> bytes:
    field = int.from_bytes(data[21:26], "big") >> 36 << 36 | total
    return data[:21] + field.to_bytes(5, "big") + data[26:]


def without_table(mp3: bytes) -> bytes:
    """An MP3 file without its first frame, which holds the table."""
    at = mp3.find(b"Info") if b"Info" in mp3[:100] else mp3.find(b"Xing")
    assert 0 < at < 100
    return mp3[mp3.find(mp3[:2], at) :]


def lying_files(samples: int = SAMPLES) -> dict[str, bytes]:
    """Files of :func:`sound` by name, none of which lacks more than a few samples."""
    files: dict[str, bytes] = {}
    true, wave = 2 * samples, sound(samples)
    for kind, (_, form, more) in SIZE_FIELDS.items():
        data = encoded(kind, wave)
        top = 2 ** (8 * struct.calcsize(form))
        suffix = kind.lower().replace("wavex", "wav")
        sizes = {
            "right": true + more,
            "zero": 0,
            "unknown": top - 1,
            "signed": top // 2 - 1,
            "odd": true + more + 1,
            "plus2": true + more + 2,
            "plus44": true + more + 44,
            "minus2": true + more - 2,
            "minus44": true + more - 44,
            "half": true // 2 + more,
            "wrapped": true + more - true // 16 * 15,
        }
        if form == "<I":  # what sox and ffmpeg write into a pipe
            sizes |= {"sox": 0x7FFFF000, "header": true + 44}
        for name, size in sizes.items():
            files[f"{kind}_{name}.{suffix}"] = with_size(data, kind, size)
    wav = encoded("WAV", wave)
    odd = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    files["WAV_list_behind.wav"] = wav + odd
    files["WAV_zero_everywhere.wav"] = with_size(wav[:4] + bytes(4) + wav[8:], "WAV", 0)
    files["WAV_byte_behind.wav"] = with_size(wav, "WAV", true + 1) + b"x"
    big = b"JUNK" + struct.pack("<I", 100_000) + bytes(100_000)
    files["WAV_zero_long_header.wav"] = (
        with_size(wav, "WAV", 0)[:12] + big + with_size(wav, "WAV", 0)[12:]
    )
    at = encoded("AIFF", wave).find(b"COMM") + 10
    for frames in (0, 2**32 - 1, samples // 2, 2 * samples):
        aiff = bytearray(encoded("AIFF", wave))
        struct.pack_into(">I", aiff, at, frames)
        files[f"AIFF_frames_{frames}.aiff"] = bytes(aiff)
    for subtype in ("FLOAT", "ULAW", "PCM_24"):
        data = encoded("WAV", wave, subtype)
        files[f"WAV_{subtype}_zero.wav"] = with_size(data, "WAV", 0)
    flac = encoded("FLAC", wave)
    for name, total in (("unknown", 0), ("plus2", samples + 2), ("half", samples // 2)):
        files[f"FLAC_{name}.flac"] = flac_with_total(flac, total)
        files[f"FLAC_{name}_tags.flac"] = id3v2(5000) + flac_with_total(flac, total) + ID3V1
    mp3 = encoded("MP3", wave, "MPEG_LAYER_III")
    bare = without_table(mp3)
    for name, before, body, behind in (
        ("with_table", b"", mp3, b""),
        ("with_table_tags", id3v2(50000), mp3, ID3V1),
        ("bare", b"", bare, b""),
        ("bare_tag", id3v2(4000), bare, b""),
        ("bare_cover", id3v2(300_000), bare, b""),
        ("bare_id3v1", b"", bare, ID3V1),
        ("bare_ape", id3v2(10), bare, bytes(31) + APE + ID3V1),
    ):
        files[f"MP3_{name}.mp3"] = before + body + behind
    return files


def truncated_files() -> dict[str, bytes]:
    """Files that lack a share of their samples."""
    files = {}
    for kind in SIZE_FIELDS:
        data = encoded(kind, sound())
        for name, kept in (("half", 0.5), ("most", 0.97)):
            suffix = kind.lower().replace("wavex", "wav")
            files[f"{kind}_{name}.{suffix}"] = data[: len(data) - int(2 * SAMPLES * (1 - kept))]
    files["FLAC_half.flac"] = encoded("FLAC", sound())[:12000]
    mp3 = encoded("MP3", sound(), "MPEG_LAYER_III")
    files["MP3_half.mp3"] = mp3[: len(mp3) // 2]
    ogg = encoded("OGG", sound(), "VORBIS")
    files["OGG_half.ogg"] = ogg[: len(ogg) // 2]
    return files
