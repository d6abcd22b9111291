"""Mutations of files: of bytes, of sizes in headers, of words in a text and of values in JSON."""

import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Files = dict[str, bytes]  # content by name below a folder
Random = np.random.Generator

SIZES = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1)
BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)
HEADER = 128  # bytes at the start of a file that are mutated more often than the others
TEXTS = (".json", ".jsonl", ".csv", ".yaml", ".txt")
DEEP = 200_000  # brackets of one nested in the other
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\0", "\ud800", "..", "/etc/passwd", [], {}, [[]], [None]),
    *(0, -1, 1.5, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64, 10**400, -(2**63), 1e308),
    *(float("nan"), float("inf"), "1", "x" * 70_000, [0] * 1000),
)
ODD_TEXTS = (
    *("0", "-1", "1e999", "9" * 5000, ".nan", ".inf", "null", "true", "[]", "{}", '""', "'", '"'),
    *("\0", "\ufeff", "\u2028", "\x85", "\r", ",", ":", "- ", "? ", "&a ", "*a", "<<: *a", "%YAML"),
    *("!!python/object/apply:os.system ['true']", "!!binary x", "!!timestamp 2001-99-99"),
    *("2001-99-99", "1:2:3:4:5:6", "0x", "0o9", "=", "!!set", "!!omap", "!!float x", "!!int x"),
)


def mutated(
    files: Mapping[str, bytes], others: Sequence[Mapping[str, bytes]], random: Random
) -> Files:
    """Return files of which one is mutated, one to four times.

    Args:
        files: The files of a seed.
        others: The seeds from which parts may be taken.
        random: Generator of all choices.
    """
    found = dict(files)
    name = sorted(found)[random.integers(len(found))]
    data = found[name]
    for _ in range(random.choice([1, 1, 1, 2, 3, 4])):
        data = _mutation(name, random)(data, random)
    if random.random() < 0.03:
        other = others[int(random.integers(len(others)))]
        tail = other[sorted(other)[random.integers(len(other))]]
        data = data[: _place(data, random)] + tail[_place(tail, random) :]
    found[name] = data
    return found


def _mutation(name: str, random: Random) -> Callable[[bytes, Random], bytes]:
    is_json, is_text = name.endswith((".json", ".jsonl")), name.endswith(TEXTS)
    if is_json and random.random() < 0.6:
        return json_value
    kinds = [text_token, text_lines, nested, *_OF_BYTES] if is_text else _OF_BYTES
    if is_text and random.random() < 0.5:
        kinds = [text_token, text_token, text_lines, nested]
    return kinds[random.integers(len(kinds))]


def _place(data: bytes, random: Random) -> int:
    """Return a place in the data, in its header more often than elsewhere."""
    reach = min(len(data), HEADER) if random.random() < 0.6 else len(data)
    return int(random.integers(reach + 1))


def _span(data: bytes, random: Random) -> tuple[int, int]:
    start = _place(data, random)
    return start, min(len(data), start + int(2 ** random.uniform(0, 11)))


def flips(data: bytes, random: Random) -> bytes:
    """Flip a few bits, or set a few bytes to extreme values."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 8)):
        place = _place(data, random)
        if place < len(changed):
            odd = BYTES[random.integers(len(BYTES))]
            changed[place] = (
                changed[place] ^ 1 << random.integers(8) if random.random() < 0.5 else odd
            )
    return bytes(changed)


def size_field(data: bytes, random: Random) -> bytes:
    """Write an extreme size into the data, often behind the name of a chunk."""
    tags = [match.end() for match in re.finditer(rb"[A-Za-z0-9 ]{4}", data[:4096])]
    place = _place(data, random)
    if tags and random.random() < 0.6:
        place = tags[random.integers(len(tags))] - int(random.choice([0, 0, 0, 8]))
    kind = "<>"[random.integers(2)] + "HIIQ"[random.integers(4)]
    value = SIZES[random.integers(len(SIZES))]
    if random.random() < 0.3:
        value = len(data) + int(random.integers(-9, 9))
    field = struct.pack(kind, value % 2 ** (8 * struct.calcsize(kind)))
    place = max(0, place)
    return data[:place] + field + data[place + len(field) :]


def cut(data: bytes, random: Random) -> bytes:
    """Cut the end off."""
    return data[: _place(data, random)]


def removed(data: bytes, random: Random) -> bytes:
    """Remove a part."""
    start, end = _span(data, random)
    return data[:start] + data[end:]


def doubled(data: bytes, random: Random) -> bytes:
    """Repeat a part, twice or many times."""
    start, end = _span(data, random)
    return data[:end] + data[start:end] * int(random.choice([1, 2, 30])) + data[end:]


def swapped(data: bytes, random: Random) -> bytes:
    """Swap two parts."""
    (a, b), (c, d) = sorted((_span(data, random), _span(data, random)))
    b = min(b, c)
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def filled(data: bytes, random: Random) -> bytes:
    """Fill a part with one value, or with noise."""
    start, end = _span(data, random)
    noise = random.integers(256, size=end - start, dtype=np.uint8).tobytes()
    byte = bytes([BYTES[random.integers(len(BYTES))]])
    return data[:start] + (noise if random.random() < 0.5 else byte * (end - start)) + data[end:]


def inserted(data: bytes, random: Random) -> bytes:
    """Insert bytes, so that all that follows lies elsewhere."""
    place = _place(data, random)
    count = int(random.choice([1, 2, 4, 8, 512]))
    return data[:place] + random.integers(256, size=count, dtype=np.uint8).tobytes() + data[place:]


_OF_BYTES = [flips, flips, flips, size_field, size_field, size_field]
_OF_BYTES += [cut, removed, doubled, swapped, filled, inserted]


def text_token(data: bytes, random: Random) -> bytes:
    """Replace a word, a number or a sign of a text by an odd one, or insert it."""
    tokens = list(re.finditer(rb"[\w.+-]+|[^\w\s]", data))
    odd = ODD_TEXTS[random.integers(len(ODD_TEXTS))].encode("utf-8", "surrogatepass")
    if not tokens:
        return data + odd
    token = tokens[random.integers(len(tokens))]
    end = token.end() if random.random() < 0.7 else token.start()
    return data[: token.start()] + odd + data[end:]


def text_lines(data: bytes, random: Random) -> bytes:
    """Repeat, remove or indent a line of a text, or join two."""
    lines = data.splitlines(keepends=True) or [b""]
    at, kind = int(random.integers(len(lines))), random.integers(4)
    if kind == 0:
        lines[at] = lines[at] * int(random.choice([2, 2, 1000]))
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        lines[at] = bytes(random.choice([b" ", b"\t", b"   ", b"\xff"])) + lines[at]
    else:
        lines[at] = lines[at].rstrip()
    return b"".join(lines)


def nested(data: bytes, random: Random) -> bytes:
    """Insert brackets without end."""
    place = _place(data, random)
    sign = (b"[", b"{", b'{"a":', b"[{", b"- ", b"((")[random.integers(6)]
    return data[:place] + sign * int(random.choice([3, 900, DEEP // len(sign)])) + data[place:]


def json_value(data: bytes, random: Random) -> bytes:
    """Replace, remove or nest a value of JSON, in one of the lines if there are several."""
    lines = data.splitlines() or [b""]
    at = int(random.integers(len(lines)))
    for start, end in ((0, len(lines)), (at, at + 1)):
        try:
            content = json.loads(b"\n".join(lines[start:end]))
        except (ValueError, RecursionError):
            continue
        new = _replaced(content, random)
        try:
            text = json.dumps(new).encode()
        except RecursionError:
            continue
        return b"\n".join([*lines[:start], text, *lines[end:]])
    return text_token(data, random)


def _replaced(content: Any, random: Random) -> Any:
    """Return JSON in which one value is another."""
    if isinstance(content, dict | list) and content and random.random() < 0.85:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = keys[random.integers(len(keys))]
        if random.random() < 0.15:
            copy: Any = dict(content) if isinstance(content, dict) else list(content)
            del copy[key]
            return copy
        new = _replaced(content[key], random)
        if isinstance(content, dict):
            return content | {key: new}
        return [*content[:key], new, *content[key + 1 :]]
    kind = random.random()
    if kind < 0.1:
        return [content]
    if kind < 0.2 and isinstance(content, int | float):
        return content * int(random.choice([-1, 2, 1000, 10**12]))
    return ODD_VALUES[random.integers(len(ODD_VALUES))]
