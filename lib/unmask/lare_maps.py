"""LaRE maps on disk: safetensors shards, which an interrupted run adds to, and at last an index with every input.

A shard holds `maps` float32[N,4,h,w] and, in its header, a row per picture: failures are rows without a map. Shards are
named `EXTRACTOR-KEY`, so that maps of another extractor are never taken for these.
"""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pandera.pandas as pa
import pyarrow
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from unmask.data.crops import SCHEMA_ERRORS, to_table, write_table
from unmask.profile import digest, write_atomic, write_json

INDEX, SHARDS, SETTINGS = "index.parquet", "shards", "settings.json"
SCHEMA = pa.DataFrameSchema(
    {
        "item_id": pa.Column(str),
        "frame": pa.Column("int32"),  # -1: the whole medium failed
        "pts": pa.Column("float64", nullable=True),
        "status": pa.Column(str, pa.Check.isin(["ok", "failed"])),
        "reason": pa.Column(str),
        "sha256": pa.Column(str),  # of the picture's pixels
        "extractor": pa.Column(str),
        "precision": pa.Column(str),
        "shard": pa.Column(str, pa.Check.str_matches(r"^([^/\\\0]+\.safetensors)?\Z")),
        "position": pa.Column("int32"),  # in the shard's maps; -1: there is no map
    },
    checks=pa.Check(lambda df: (df["status"] == "ok") == (df["position"] >= 0), error="a map for every ok, no other"),
    unique=["item_id", "frame"],
    strict=True,
    ordered=True,
)


class LareError(RuntimeError):
    """LaRE cannot be computed, or a map is not there; the message says what to do."""


def write_shard(folder: Path, extractor: str, maps: np.ndarray, rows: Sequence[dict]) -> None:
    """Write maps float32[N,4,h,w] and the rows of their pictures, whole or not at all.

    rows: the columns of SCHEMA but `extractor` and `shard`, and `source`, which stands for the medium's content.
    """
    header = {"rows": json.dumps(rows)}
    name = f"{extractor}-{digest([[row['item_id'], row['source'], row['frame']] for row in rows])}.safetensors"
    write_atomic(folder / SHARDS / name, save({"maps": np.ascontiguousarray(maps)}, header))


def kept(folder: Path, extractor: str) -> dict[tuple[str, str], list[dict]]:
    """The rows that shards of this extractor hold, of every (item_id, source)."""
    found: dict[tuple[str, str], list[dict]] = {}
    for path in sorted((folder / SHARDS).glob(f"{extractor}-*.safetensors")):
        items: dict[tuple[str, str], list[dict]] = {}
        for row in _header(path):
            row |= {"extractor": extractor, "shard": path.name}
            items.setdefault((row["item_id"], row["source"]), []).append(row)
        found |= items
    return found


def _header(path: Path) -> Iterator[dict]:
    try:
        with safe_open(path, "numpy") as file:
            yield from json.loads(file.metadata()["rows"])
    except SafetensorError:
        return  # damaged on the disk: made again


def others(folder: Path, extractor: str) -> list[Path]:
    """Shards that another extractor left in the folder."""
    return [p for p in sorted((folder / SHARDS).glob("*.safetensors")) if not p.name.startswith(f"{extractor}-")]


def write_index(folder: Path, rows: Sequence[dict]) -> pd.DataFrame:
    """Write the index of a folder of maps, atomically; returns it."""
    write_table(to_table(rows, SCHEMA), folder / INDEX, SCHEMA)
    return read_index(folder)


def write_settings(folder: Path, extractor: str, precision: str, settings: dict) -> None:
    """Write what the maps of a folder were made with: the extractor's key, its precision and its settings."""
    write_json(folder / SETTINGS, {"extractor": extractor, "precision": precision, "settings": settings})


def _settings(folder: Path) -> dict:
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LareError(f"{SETTINGS} in {folder} is missing or damaged; run `unmask lare` again.") from error


def require(folder: str | os.PathLike | None, extractor: str) -> None:
    """LareError unless a folder is given whose maps this extractor made."""
    if folder is None:
        raise LareError("This detector reads LaRE maps: make them by `unmask lare --crops` and give their folder.")
    if (made := _settings(Path(folder))["extractor"]) != extractor:
        raise LareError(f"The detector learned from maps of extractor {extractor}, those in {folder} are of {made}.")


def read_settings(folder: str | os.PathLike) -> dict:
    """What `write_settings` wrote, and `shape`, [C,h,w] of a map. Raises LareError where there is no map."""
    index, folder = read_index(folder), Path(folder)
    found = index[index["status"] == "ok"]
    if found.empty:
        raise LareError(f"None of the inputs of {folder} has a LaRE map.")
    return _settings(folder) | {"shape": list(read(folder, *found[["item_id", "frame"]].iloc[0]).shape)}


def read_index(folder: str | os.PathLike) -> pd.DataFrame:
    """A row per picture, and per medium that gave none (frame -1), in manifest and frame order. Raises LareError."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise LareError(f"There is no {INDEX} in {folder}. Run `unmask lare` to its end first.")
    try:
        df = pd.read_parquet(path)
        texts = [name for name, column in SCHEMA.columns.items() if str(column.dtype) == "str" and name in df]
        return SCHEMA.validate(df.astype(dict.fromkeys(texts, "str")))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, *SCHEMA_ERRORS) as error:
        raise LareError(f"{path} is damaged or of another version; run `unmask lare` again.") from error


@functools.lru_cache(maxsize=4)
def _places(folder: Path, written: int) -> dict[tuple[str, int], tuple[str, int, str]]:
    """Where maps are; `written`, the time stamp of the index, makes a new one known."""
    df = read_index(folder)
    places = zip(df["shard"], df["position"], df["reason"], strict=True)
    return dict(zip(zip(df["item_id"], df["frame"], strict=True), places, strict=True))


def read(folder: str | os.PathLike, item_id: str, frame: int) -> np.ndarray:
    """The map float32[4,h,w] of one picture. Raises LareError, with the reason, where there is none."""
    folder = Path(folder).absolute()
    written = (folder / INDEX).stat().st_mtime_ns if (folder / INDEX).is_file() else 0
    places = _places(folder, written)
    nowhere = places.get((item_id, -1), ("", -1, "it is not among the inputs"))
    shard, position, reason = places.get((item_id, frame), nowhere)
    if position < 0:
        raise LareError(f"Frame {frame} of item {item_id} has no LaRE map: {reason}.")
    try:
        with safe_open(folder / SHARDS / shard, "numpy") as file:
            return file.get_slice("maps")[position : position + 1][0]
    except (OSError, SafetensorError) as error:
        raise LareError(f"{shard} in {folder} is missing or damaged; run `unmask lare` again.") from error
