"""Containers made of mutated parts: what a checksum would hide from the reader is reached too."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping

from ssast.benchmarks.fuzzing.mutations import Files

PART = "//"  # between the name of a container and that of a part of it
BLOCK = 512  # bytes of a tar header


def packed(files: Mapping[str, bytes]) -> Files:
    """Return the files with each container made of its parts, with right checksums.

    ``a.pth//NAME`` are members of a ZIP archive as PyTorch writes it; ``a.safetensors//data`` goes
    behind ``a.safetensors//header.json``; the headers of ``a.tar//data`` get right checksums.
    """
    found = {name: data for name, data in files.items() if PART not in name}
    for container in sorted({name.split(PART)[0] for name in files if PART in name}):
        first = f"{container}{PART}"
        parts = {n.removeprefix(first): data for n, data in files.items() if n.startswith(first)}
        if container.endswith(".safetensors"):
            header = parts["header.json"]
            found[container] = len(header).to_bytes(8, "little") + header + parts["data"]
        elif container.endswith(".tar"):
            found[container] = with_checksums(parts["data"])
        else:
            found[container] = zipped(parts)
    return found


def unpacked(name: str, data: bytes) -> Files:
    """Return the parts of a container, for :func:`packed`."""
    if name.endswith(".safetensors"):
        end = 8 + int.from_bytes(data[:8], "little")
        parts = {"header.json": data[8:end], "data": data[end:]}
    elif name.endswith(".tar"):
        parts = {"data": data}
    else:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = {member: archive.read(member) for member in archive.namelist()}
    return {f"{name}{PART}{part}": content for part, content in parts.items()}


def zipped(parts: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a ZIP archive; the same bytes each time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in parts.items():
            info = zipfile.ZipInfo(name)  # with a date that does not change
            info.compress_type = compression
            archive.writestr(info, data)
    return buffer.getvalue()


def with_checksums(data: bytes) -> bytes:
    """Return a tar archive in which each header has the right checksum."""
    changed = bytearray(data)
    for at in range(0, len(data) - BLOCK + 1, BLOCK):
        header = changed[at : at + BLOCK]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    return bytes(changed)


def sealed(files: Mapping[str, bytes]) -> Files:
    """Return the files of checkpoints with the sizes and hashes that their manifests must have."""
    from ssast.engine.checkpoints.store import MANIFEST, META, STATE

    found = packed(files)
    for name in [name for name in found if name.rpartition("/")[2] == STATE]:
        folder = name[: -len(STATE)]
        hashes = {
            part: {
                "bytes": len(found[folder + part]),
                "sha256": hashlib.sha256(found[folder + part]).hexdigest(),
            }
            for part in (STATE, META)
        }
        if files.get(folder + MANIFEST) == b"":  # else the manifest itself was mutated
            found[folder + MANIFEST] = json.dumps({"format": 1, "files": hashes}).encode()
    return found
