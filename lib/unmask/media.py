"""Media that nobody has listed yet: found below folders, named for a table, put into a manifest of placeholders."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from unmask.data.faces import LocatorError, find_yunet
from unmask.data.manifest import COLUMNS, item_id
from unmask.data.tree import kind_of


def expand(media: Iterable[str | os.PathLike]) -> Iterator[Path]:
    """Files as they are, folders as all visible files below (an empty one as itself, to be reported), each once."""
    seen = set()
    for given in map(Path, media):
        below = sorted(p for p in given.rglob("*") if p.is_file() and not _hidden(p.relative_to(given)))
        for path in below or [given]:
            if (absolute := path.absolute()) not in seen:
                seen.add(absolute)
                yield path


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def best_locator() -> str:
    """The best face locator whose weights are here: yunet, else haar."""
    try:
        find_yunet()
    except LocatorError:
        return "haar"
    return "yunet"


def placeholder_manifest(paths: list[Path], links: Path) -> pd.DataFrame:
    """A manifest for media nobody labelled; label, method and split are only placeholders that nothing reads.

    Each medium is listed as a numbered link in `links`: a manifest cannot hold names that are not UTF-8, disks can.
    """
    rows = [dict.fromkeys(COLUMNS, "") for _ in paths]
    links.mkdir()
    for i, (row, path) in enumerate(zip(rows, paths, strict=True)):
        link = links / f"{i:06d}"
        link.symlink_to(path.absolute())
        identity = item_id("media", link.name)
        row |= {
            "item_id": identity, "root": links.name, "path": link.name, "dataset": "media", "split": "test", "label": 0,
            "kind": kind_of(path.name), "method": "real", "group_id": identity,
        }  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"label": "int8"})


def printable(path: Path) -> str:
    """The path as text that can be stored, whatever bytes its name has."""
    return str(path).encode("utf-8", "backslashreplace").decode()
