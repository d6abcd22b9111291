"""Read files of weights, and name what else is found in their place. No code in them is run."""

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssast.engine.checkpoints.store import read_safetensors
from ssast.engine.errors import CheckpointError
from ssast.pipelines.files import replacing
from ssast.pipelines.text import shown

# A key of the attribute ``_metadata`` that PyTorch gives to state dicts (versions of modules by
# prefix). load_state_dict reads the prefixes of its modules alone, so that strict loading by other
# code does not see it.
_METADATA_KEY = "ssast"
_AGAIN = "copy or download it again"
_MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights: run git lfs pull",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive: unpack it first",
    b"\x89HDF": "an HDF5 file, which holds no PyTorch weights",
    b"\x93NUMPY": "a NumPy array, not weights by name",
    b"GGUF": "a GGUF file, which holds no PyTorch weights",
    b"RIFF": "an audio or image file, not weights",
    b"fLaC": "an audio file, not weights",
    b"OggS": "an audio file, not weights",
    b"ID3": "an audio file, not weights",
    b"%PDF": "a PDF document, not weights",
    b"\x89PNG": "an image, not weights",
}


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict, ``.safetensors`` or a pickle of tensors alone, by content.

    Returns:
        Tensors on the CPU by name, and the metadata that :func:`write_state` stored, if any.

    Raises:
        CheckpointError: No such file, damaged, or it holds anything but tensors.
    """
    foreign = describe_foreign(path)
    if foreign is not None:
        raise CheckpointError(f"{path}: {foreign}")
    try:
        if path.suffix == ".safetensors" or _is_safetensors(path):
            state: Any = read_safetensors(path)
        else:
            state = _load_pickle(path)
    except pickle.UnpicklingError as error:
        # PyTorch's own text goes on to say how to switch the protection off.
        objects = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if not objects:
            raise CheckpointError(
                f"{path}: refused: no pickle of tensors alone, or damaged: save "
                f"model.state_dict(), or {_AGAIN}"
            ) from error
        raise CheckpointError(
            f"{path}: refused: it holds Python objects besides tensors ({', '.join(objects)}), "
            "which could run code: in the program that wrote it, save model.state_dict() alone"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes any of them of the readers
        raise CheckpointError(
            f"{path}: not a whole checkpoint file: cut short or damaged: {_AGAIN}"
        ) from error
    _check_names(state, path)
    _check_dense(state, path)
    metadata = getattr(state, "_metadata", None)
    stored = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
    return dict(state), stored if isinstance(stored, dict) else {}


def _load_pickle(path: Path) -> Any:
    """Load a pickle of tensors without taking memory for sizes that are stated in it alone.

    A ZIP archive is mapped into memory, so that no tensor can be larger than the file. In the form
    from before PyTorch 1.6 tensors are counted first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an unusual pickle protocol
        with open(path, "rb") as file:
            head = file.read(4)
        is_zip = head == b"PK\x03\x04"
        if not is_zip:
            if head[:1] != pickle.PROTO:
                raise pickle.UnpicklingError("no pickle of PyTorch's")
            from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds

            with FakeTensorMode():  # tensors with shapes, without memory
                state = torch.load(path, map_location="cpu", weights_only=True)
            _check_names(state, path)
            storages = [tensor.untyped_storage() for tensor in state.values()]
            if sum({s._cdata: s.nbytes() for s in storages}.values()) > path.stat().st_size:
                raise ValueError("tensors larger than the file")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def write_state(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a state dict that ``load_state_dict(strict=True)`` of any code takes.

    Args:
        state: Tensors by name.
        path: Path of the file, whose folder is created if need be.
        metadata: Plain values (JSON's), which :func:`read_state` returns.

    Raises:
        CheckpointError: It cannot be written.
    """
    content: Any = OrderedDict(state)
    if metadata is not None:
        content._metadata = OrderedDict({_METADATA_KEY: dict(metadata)})
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # PyTorch's archive writer hides an error of the disk behind one of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"{path}: cannot be written: {cause.strerror or cause}") from error


def describe_foreign(path: Path) -> str | None:
    """Describe a file that holds no weights, and what to do; None if it may hold some.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not head:
        return f"is empty: {_AGAIN}"
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f"is {kind}"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first"
    if head.startswith(b"PK"):
        return _describe_zip(path)
    text = _as_text(head)
    if text is None:
        return None
    if text.startswith("<"):
        return f"is a web page, not weights (a login or a quota?): {_AGAIN}"
    return f"is a text file, not weights: it begins with {text[:40]!r}"


def _describe_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:
        return None  # cut short or damaged: the reader says so
    names = [member.filename for member in members]
    if any(name.endswith("constants.pkl") for name in names):
        return "is a TorchScript program, not a state dict: save model.state_dict()"
    if any(name.endswith("data.pkl") for name in names):
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            return "is a compressed ZIP archive: save it again with torch.save"
        return None  # as torch.save writes it
    shown = ", ".join(names[:2]) or "nothing"
    return f"is a ZIP archive of other things ({shown}): unpack it, and name the file of weights"


def _as_text(head: bytes) -> str | None:
    """Return the first bytes of a file as text; None if they are none."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # a character cut in two at the end is none
            return None
        text = head[: error.start].decode(encoding, "ignore")
    return text.strip() if all(c.isprintable() or c.isspace() for c in text) else None


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins with the length of a JSON header and its brace."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _check_names(state: Any, path: Path) -> None:
    """Check that a state is a dict of tensors by name."""
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: expected a state dict, names to tensors, found {type(state).__name__}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = (
                f"expected tensors and nothing else, found {shown(name)}: {type(value).__name__}"
            )
            raise CheckpointError(f"{path}: {found}{_advice(state)}")


def _check_dense(state: Mapping[str, Tensor], path: Path) -> None:
    """Check that tensors have a number in memory for each of their elements."""
    for name, value in state.items():
        if not _is_dense(value):
            raise CheckpointError(
                f"{path}: {name:.200} is no plain tensor, or smaller than its shape: save copies "
                "of the tensors of model.state_dict()"
            )


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor has a number in memory for each of its elements.

    A few bytes may stand for terabytes otherwise, which the first copy would take.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _advice(state: Mapping[Any, Any]) -> str:
    """Say below which key of a training checkpoint its weights are."""
    for name, value in state.items():
        if isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values()):
            return f": save the weights below {shown(name)} alone, with torch.save"
    return ""
