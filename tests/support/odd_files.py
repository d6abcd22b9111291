"""Whole audio files that are odd, written from scratch, and the table of their kinds.

Those whose headers misstate a length are in :mod:`lengths`.
"""

import struct
from collections.abc import Iterator

import numpy as np
from lengths import SAMPLES, encoded, flac_with_total, lying_files, sound

ROWS = (  # as docs/odd-files.md has them: kind, names of files (the first row counts), named
    ("a damaged chunk of peaks, texts or metadata, in front or behind", ("chunk_*",), "no"),
    ("FLAC whose comments, pictures, cue sheet or seek table are damaged", ("blocks_*",), "no"),
    ("MP3 with an ID3 tag that states a wrong size", ("tag_*",), "no"),
    ("FLAC that states 0 samples, as live encoders write it", ("FLAC_unknown*",), "no"),
    ("MP3 without a table of its frames", ("MP3_bare*",), "no"),
    ("AIFF whose `COMM` states another number of samples", ("AIFF_frames_*",), "no"),
    ("a header that states 0 bytes of samples", ("*_zero*",), "no"),
    (
        "a header that states the largest number, with or without a sign, or a little less",
        ("*_unknown*", "*_signed*", "*_sox*"),
        "no",
    ),
    ("a header whose size wrapped around at 4 GiB", ("*_wrapped*",), "yes"),
    ("a header that states half of the samples", ("*_half*",), "yes"),
    (
        "a header that states a few samples too many or too few, or an odd number of bytes",
        ("*_odd*", "*_plus*", "*_minus*", "*_header*", "*_byte_behind*"),
        "no",
    ),
    ("chunks behind the samples", ("*_list_behind*",), "no"),
)
# A chunk of each kind, as its standard has it.
RIFF_CHUNKS = {
    b"PEAK": struct.pack("<IIfI", 1, 0, 0.5, 100),
    b"LIST": b"INFOISFT" + struct.pack("<I", 4) + b"abc\0",
    b"bext": bytes(602),
    b"id3 ": b"ID3\x03\0\0\0\0\0\x0a" + bytes(10),
    b"cart": bytes(2048),
    b"fact": struct.pack("<I", 16000),
    b"cue ": struct.pack("<I", 0),
    b"smpl": bytes(36),
    b"iXML": b"<?xml metadata?>",
}
IFF_CHUNKS = {
    b"PEAK": struct.pack(">IIfI", 1, 0, 0.5, 100),
    b"MARK": struct.pack(">H", 0),
    b"INST": bytes(20),
    b"COMT": struct.pack(">H", 0),
    b"NAME": b"metadata",
    b"ID3 ": RIFF_CHUNKS[b"id3 "],
    b"APPL": b"stocabcd",
}
CAF_CHUNKS = {
    b"peak": struct.pack(">IfQ", 0, 0.5, 100),
    b"info": struct.pack(">I", 1) + b"artist\0data\0",
    b"strg": struct.pack(">I", 0),
    b"mark": struct.pack(">II", 0, 0),
    b"free": bytes(40),
}
DAMAGES = (
    *("none", "empty", "noise", "short", "size_0", "size_plus_2", "size_minus_2"),
    *("size_plus_1000", "size_largest", "size_signed", "no_padding", "cut_off"),
)
PLACES = ("before", "first", "behind")


def damaged_chunk(name: bytes, body: bytes, damage: str, form: str, align: int) -> bytes:
    """A chunk with a damage of :data:`DAMAGES`."""
    size, top = len(body), 2 ** (8 * struct.calcsize(form))
    if damage == "noise":
        body = np.random.default_rng(0).bytes(size)
    if damage in ("empty", "short"):
        body = body[: size // 2 if damage == "short" else 0]
        size = len(body)
    if damage == "no_padding" and size % 2 == 0:
        body, size = body + b"x", size + 1
    size = {
        "size_0": 0,
        "size_plus_2": size + 2,
        "size_minus_2": max(0, size - 2),
        "size_plus_1000": size + 1000,
        "size_largest": top - 1,
        "size_signed": top // 2,
    }.get(damage, size)
    padding = b"" if damage == "no_padding" else bytes(-len(body) % align)
    chunk = name + struct.pack(form, size) + body + padding
    return chunk[: 8 + len(body) // 2] if damage == "cut_off" else chunk


def bare(kind: str, subtype: str) -> tuple[bytes, int, bytes]:
    """A file without optional chunks, where its chunks start, and the name of the samples'."""
    data = encoded(kind, sound(), subtype)
    start, last = {"AIFF": (12, b"SSND"), "CAF": (8, b"data")}.get(kind, (12, b"data"))
    at = data.find(last)
    needed = {"WAV": 36, "CAF": 52, "AIFF": 38, "RF64": 96}[kind]
    if subtype == "FLOAT" and kind == "AIFF":
        needed = data.find(b"PEAK")
    return data[:needed] + data[at:], start, last


def damaged_files(kind: str, subtype: str = "PCM_16") -> Iterator[tuple[str, bytes]]:
    """Name and bytes of files of :func:`sound` with a damaged chunk, or one in an odd place."""
    whole, start, last = bare(kind, subtype)
    form, align, chunks = {
        "AIFF": (">I", 2, IFF_CHUNKS),
        "CAF": (">Q", 1, CAF_CHUNKS),
    }.get(kind, ("<I", 2, RIFF_CHUNKS))
    suffix = kind.lower()
    for name, body in chunks.items():
        for damage in DAMAGES:
            for place in PLACES:
                if damage == "cut_off" and place != "behind":
                    continue
                if place == "first" and kind in ("RF64", "CAF"):
                    continue  # ds64 and desc come first, by the standard
                at = {"before": whole.find(last), "first": start, "behind": len(whole)}[place]
                chunk = damaged_chunk(name, body, damage, form, align)
                text = name.decode().strip()
                yield (
                    f"{kind}_{subtype}_{text}_{damage}_{place}.{suffix}",
                    whole[:at] + chunk + whole[at:],
                )


def flac_block(kind: int, body: bytes, size: int | None = None) -> bytes:
    """A block of metadata."""
    return bytes([kind]) + (len(body) if size is None else size).to_bytes(3, "big") + body


def damaged_flac() -> Iterator[tuple[str, bytes]]:
    """FLAC files of :func:`sound` with damaged metadata, also of unknown length."""
    data = encoded("FLAC", sound())
    at = data.find(b"\xff\xf8", 42)
    body = struct.pack("<I", 4) + b"abcd" + struct.pack("<II", 1, 8) + b"TITLE=ab"
    for total in (SAMPLES, 0):
        head = b"fLaC\0" + flac_with_total(data, total)[5:42]
        for kind in (1, 2, 3, 4, 5, 6, 126):
            for name, size in (
                *(("none", None), ("size_plus_2", len(body) + 2), ("size_largest", 2**24 - 1)),
                *(("size_minus_2", len(body) - 2), ("size_0", 0)),
            ):
                block = flac_block(kind, body, size)
                rest = flac_block(0x81, bytes(20)) + data[at:]
                yield f"blocks_{total}_{kind}_{name}.flac", head + block + rest
                last = bytes([block[0] | 0x80]) + block[1:]
                yield f"blocks_{total}_{kind}_{name}_last.flac", head + last + data[at:]


def damaged_tags() -> Iterator[tuple[str, bytes]]:
    """MP3 files of :func:`sound` behind an ID3 tag of 100 bytes that states another size."""
    mp3 = encoded("MP3", sound(), "MPEG_LAYER_III")
    for name, size in (
        *(("none", 100), ("size_0", 0), ("size_largest", 2**28 - 1)),
        *(("size_plus_2", 102), ("size_minus_2", 98), ("size_plus_1000", 1100)),
    ):
        field = bytes(size >> 7 * k & 0x7F for k in (3, 2, 1, 0))
        yield f"tag_{name}.mp3", b"ID3\x03\0\0" + field + bytes(100) + mp3


def some_odd_files() -> dict[str, bytes]:
    """Files of all kinds by name: every way must read each of them whole."""
    files = lying_files()
    for kind in ("WAV", "AIFF", "CAF", "RF64"):
        chunks = list(damaged_files(kind))
        files |= {f"chunk_{name}": data for name, data in chunks[::19]}
    files |= dict(list(damaged_flac())[::7]) | dict(damaged_tags())
    return files
