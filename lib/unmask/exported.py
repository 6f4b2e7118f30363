"""Exported models as files: each holds a card that says what it is, under a fingerprint of the card and the model.

pt2 and TorchScript files are zip archives, and the card is one more of their extra files; an ONNX file ends with it, as
an entry of its metadata. PyTorch and ONNX Runtime find it there by the name `CARD`.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from unmask import __version__
from unmask.detectors.base import UNFIT, CheckpointError, InputSpec

CARD = "unmask.json"


def seal(content: bytes, card: dict) -> bytes:
    """The bytes of a model file with `card` in it, and in the card the kit's version and the fingerprint of both.

    content: as PyTorch or its ONNX exporter wrote it. The same content and card give the same bytes.
    """
    archive = None
    if _zipped(content):  # without the lines of source code that TorchScript notes beside its own
        archive = {name: value for name, value in _entries(content).items() if not name.endswith(".debug_pkl")}
    card = card | {"unmask": __version__}
    text = json.dumps(card | {"fingerprint": _fingerprint(card, content, archive)}, sort_keys=True).encode()
    if archive is None:
        return content + _metadata(text)
    root = next(iter(archive)).split("/")[0]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, value in (archive | {f"{root}/extra/{CARD}": text}).items():
            file.writestr(zipfile.ZipInfo(name), value)  # with a date that is always the same
    return out.getvalue()


def opened(path: str | Path) -> tuple[bytes, dict]:
    """The bytes of a file that `seal` made and its card, whose "input" is an InputSpec. Raises CheckpointError.

    Nothing in the file is run or built before its fingerprint is found right.
    """
    try:
        data = Path(path).read_bytes()
        content, archive, text = _parts(data)
        card = json.loads(text)
        fingerprint, version = card.pop("fingerprint"), card["unmask"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged or was not written by `unmask export`: it has no card that can be read."
        ) from error
    if _fingerprint(card, content, archive) != fingerprint:
        raise CheckpointError(
            f"{path} is refused by its fingerprint: model or card were changed after `unmask export`; export anew."
        )
    if version != __version__:
        raise CheckpointError(
            f"{path} was exported by Unmask {version}, and this is {__version__}, which may cut and scale faces "
            "otherwise; export the checkpoint anew."
        )
    try:
        return data, card | {"input": InputSpec(**_tuples(card["input"]))}
    except UNFIT as error:
        raise CheckpointError(f"{path} was not written by `unmask export`: {error}") from error


def _tuples(given: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _fingerprint(card: dict, content: memoryview | bytes, archive: dict[str, bytes] | None) -> str:
    """sha256 of a card and a model: of all bytes or, for an archive, of its entries, which may be packed otherwise."""
    found = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    parts = (
        [content] if archive is None else [part for name in sorted(archive) for part in (name.encode(), archive[name])]
    )
    for part in parts:
        found.update(hashlib.sha256(part).digest())  # each of one length, so that no two lists read alike
    return found.hexdigest()


def _zipped(data: bytes) -> bool:
    return data[:4] == b"PK\x03\x04"


def _entries(data: bytes) -> dict[str, bytes]:
    """The entries of an archive by name. ValueError for one that has a name twice."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        names = file.namelist()
        if len(set(names)) < len(names):  # readers differ in which of two they take
            raise ValueError("an entry is there twice")
        return {name: file.read(name) for name in names}


def _parts(data: bytes) -> tuple[memoryview, dict[str, bytes] | None, bytes]:
    """Model, entries of its archive if it is one, and text of the card. ValueError where there is no card."""
    if _zipped(data):
        archive = _entries(data)
        (name,) = [name for name in archive if name.endswith(f"/extra/{CARD}")]
        text = archive.pop(name)
        return memoryview(b""), archive, text
    key = _field(1, CARD.encode())
    at = data.rfind(key)
    start = at + len(key) + 1
    while data[start : start + 1] >= b"\x80":  # the length of the text, in bytes of seven bits
        start += 1
    text = data[start + 1 :]
    if at < 0 or not data.endswith(tail := _metadata(text)):
        raise ValueError("there is no card")
    return memoryview(data)[: -len(tail)], None, text


def _metadata(text: bytes) -> bytes:
    """An entry of `metadata_props` of ONNX's ModelProto, as protobuf writes it; it may follow all other fields."""
    return _field(14, _field(1, CARD.encode()) + _field(2, text))


def _field(number: int, value: bytes) -> bytes:
    """A field of bytes in protobuf's encoding: its number and type, the length in groups of seven bits, the bytes."""
    return bytes([number << 3 | 2, *_groups(len(value))]) + value


def _groups(length: int) -> Iterator[int]:
    while length > 0x7F:
        yield length & 0x7F | 0x80
        length >>= 7
    yield length
