"""Face crops on disk: uncompressed tar shards (WebDataset names), a Parquet index, and one row per item.

While a shard grows, `shards/NAME.tar.part` holds the pictures and `shards/NAME.jsonl`, the journal, gets one line per
finished item after the item's bytes have reached the disk. After a kill the tar is cut back to the last journalled
offset and writing goes on, so that an interrupted run leaves the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pandera.pandas as pa
import pyarrow
import pyarrow.parquet as pq

_ID = pa.Check.str_matches(r"^[0-9a-f]{16}\Z")
_NOT_NEGATIVE = pa.Check.ge(0)
INDEX_SCHEMA = pa.DataFrameSchema(
    {
        "item_id": pa.Column(str, _ID),
        "frame": pa.Column("int32", _NOT_NEGATIVE),
        "pts": pa.Column("float64"),
        **{name: pa.Column("float32") for name in ("x0", "y0", "x1", "y1")},
        "landmarks": pa.Column(
            object, pa.Check(lambda s: s.map(len).isin([136, 162]), error="must be 68 or 81 flattened points")
        ),
        "locator": pa.Column(str),
        "locator_hash": pa.Column(str),
        "shard": pa.Column(str),
        "offset": pa.Column("int64", _NOT_NEGATIVE),
        "size": pa.Column("int64", _NOT_NEGATIVE),
        "sha256": pa.Column(str),
    },
    strict=True,
    ordered=True,
)
ITEMS_SCHEMA = pa.DataFrameSchema(
    {
        "item_id": pa.Column(str, _ID, unique=True),
        "status": pa.Column(str, pa.Check.isin(["ok", "failed"])),
        "reason": pa.Column(str),
        "frames": pa.Column("int32", _NOT_NEGATIVE),
        "faces": pa.Column("int32", _NOT_NEGATIVE),
        "decoder": pa.Column(str),
        "seconds": pa.Column("float32", _NOT_NEGATIVE),
    },
    checks=pa.Check(lambda df: (df["status"] == "ok") == (df["reason"] == ""), error="only failed items have a reason"),
    strict=True,
    ordered=True,
)
_ARROW = {"object": pyarrow.list_(pyarrow.float32()), "int32": pyarrow.int32(), "int64": pyarrow.int64(),
          "float32": pyarrow.float32(), "float64": pyarrow.float64()}  # fmt: skip


SAMPLING_BEFORE = {"sampling": "uniform", "fps": 0.0}
"""How frames were chosen where a settings.json is silent: before there was a choice."""


class CropError(RuntimeError):
    """Crops are missing, damaged or in use; the message says what to do."""


def encode_crop(image: np.ndarray, encoding: str) -> bytes:
    """Encode uint8[S,S,3] RGB as `png` (lossless) or `jpg` (quality 95, 4:4:4)."""
    options = {
        "png": [cv2.IMWRITE_PNG_COMPRESSION, 1],
        "jpg": [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
    }
    if encoding not in options:
        raise ValueError(f"The encoding is 'png' or 'jpg', not '{encoding}'.")
    return cv2.imencode(f".{encoding}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options[encoding])[1].tobytes()


def _shard_name(shard: int, of: int) -> str:
    return f"crops-{shard:05d}-of-{of:05d}"


def _read_journal(path: Path) -> list[dict]:
    """Lines of a journal; a line cut off by a kill, and what follows it, do not count."""
    lines = []
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            lines.append(json.loads(line))
    return lines


class CropWriter:
    """The only writer of one shard (number `shard` of `of`) in the folder `out`; use as a context manager.

    `resume` first, then `add` items in their fixed order, then `finish`. Raises CropError if another process is
    writing the shard.
    """

    def __init__(self, out: str | os.PathLike, shard: int, of: int):
        folder = Path(out) / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        self.name = _shard_name(shard, of)
        self.tar, self.part = folder / f"{self.name}.tar", folder / f"{self.name}.tar.part"
        self.journal = folder / f"{self.name}.jsonl"
        self._lock = open(folder / f"{self.name}.lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise CropError(f"Another process is writing {self.name}; wait for it or stop it.") from error
        self._file = self._log = None

    def __enter__(self) -> CropWriter:
        return self

    def __exit__(self, *_) -> None:
        for file in (self._file, self._log, self._lock):
            if file is not None:
                file.close()

    def resume(self, keys: Sequence[tuple[str, str]]) -> int:
        """Keep the finished items that are still the first of `keys` (item_id, fingerprint); returns how many.

        Everything after them is cut off. A complete, unchanged shard is left untouched.
        """
        if self.tar.exists() and not self.part.exists():
            stored = self.tar
        else:
            stored = self.part
        length = stored.stat().st_size if stored.exists() else 0
        journal = _read_journal(self.journal)
        kept, end = 0, 0
        for line, key in zip(journal, keys, strict=False):
            if tuple(line["key"]) != tuple(key) or line["end"] > length:
                break
            kept, end = kept + 1, line["end"]
        if stored is self.tar and stored.exists() and kept == len(keys) == len(journal):
            return kept
        if stored is self.tar and stored.exists():
            os.replace(self.tar, self.part)
        self._file = open(self.part, "r+b" if self.part.exists() else "w+b")
        self._file.truncate(end)
        self._file.seek(end)
        text = b"".join(json.dumps(line).encode() + b"\n" for line in journal[:kept])
        temporary = self.journal.with_suffix(".jsonl.tmp")
        temporary.write_bytes(text)
        os.replace(temporary, self.journal)
        self._log = open(self.journal, "ab")
        return kept

    def add(self, key: tuple[str, str], item: Mapping, crops: Sequence[Mapping], encoding: str) -> None:
        """Append one item: its `items` row and its crops, each an index row without shard fields plus `data` bytes."""
        rows = []
        for crop in crops:
            data = crop["data"]
            info = tarfile.TarInfo(f"{item['item_id']}.{crop['frame']:06d}.{encoding}")
            info.size, info.mode = len(data), 0o644
            self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
            place = {"offset": self._file.tell(), "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            self._file.write(data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
            rows.append({k: v for k, v in crop.items() if k != "data"} | {"shard": f"{self.name}.tar"} | place)
        self._file.flush()
        os.fsync(self._file.fileno())
        line = {"key": list(key), "end": self._file.tell(), "item": dict(item), "crops": rows}
        self._log.write(json.dumps(line).encode() + b"\n")
        self._log.flush()

    def finish(self) -> None:
        """Close the archive and give it its final name. Does nothing for a shard that was complete already."""
        if self._file is None:
            return
        self._file.write(b"\0" * 2 * tarfile.BLOCKSIZE)
        self._file.flush()
        os.fsync(self._file.fileno())
        os.fsync(self._log.fileno())
        os.replace(self.part, self.tar)


def write_table(df: pd.DataFrame, path: Path, schema: pa.DataFrameSchema) -> None:
    """Validate and write a table as Parquet, atomically."""
    df = schema.validate(df)
    arrow = pyarrow.schema([(c, _ARROW.get(str(t.dtype), pyarrow.string())) for c, t in schema.columns.items()])
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        pq.write_table(pyarrow.Table.from_pandas(df, schema=arrow, preserve_index=False), part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def to_table(rows: Sequence[Mapping], schema: pa.DataFrameSchema) -> pd.DataFrame:
    """Rows to a DataFrame with the columns and types of `schema`."""
    kinds = {name: str(column.dtype) for name, column in schema.columns.items()}
    df = pd.DataFrame(list(rows), columns=list(kinds))
    for name, kind in kinds.items():
        if kind == "object":
            df[name] = pd.Series([np.asarray(v, np.float32) for v in df[name]], index=df.index, dtype=object)
        else:
            df[name] = df[name].astype(kind)
    return df


def read_shard(out: str | os.PathLike, shard: int, of: int) -> list[dict]:
    """Journal lines of a complete shard, or an empty list. A complete shard with no items gives an empty list too."""
    name = _shard_name(shard, of)
    folder = Path(out) / "shards"
    return _read_journal(folder / f"{name}.jsonl") if (folder / f"{name}.tar").exists() else []


def collate(out: str | os.PathLike, of: int) -> bool:
    """Once all `of` shards are complete, write crops.parquet and items.parquet in manifest order.

    Returns whether that was done. Items were dealt to the shards in turn, and are gathered in turn again.
    """
    out = Path(out)
    if not all((out / "shards" / f"{_shard_name(i, of)}.tar").exists() for i in range(of)):
        return False
    shards = [read_shard(out, i, of) for i in range(of)]
    lines = [shard[k] for k in range(max(map(len, shards))) for shard in shards if k < len(shard)]
    write_table(to_table([c for line in lines for c in line["crops"]], INDEX_SCHEMA), out / "crops.parquet",
                INDEX_SCHEMA)  # fmt: skip
    write_table(to_table([line["item"] for line in lines], ITEMS_SCHEMA), out / "items.parquet", ITEMS_SCHEMA)
    return True


def _read_table(path: Path, schema: pa.DataFrameSchema) -> pd.DataFrame:
    if not path.is_file():
        raise CropError(f"There is no {path.name} in {path.parent}. Run the preprocessing to its end first.")
    try:
        df = pq.read_table(path).to_pandas()
        for name, column in schema.columns.items():
            if str(column.dtype) == "str" and name in df:
                df[name] = df[name].astype("str")
        return schema.validate(df)
    except (pyarrow.ArrowException, OSError, pa.errors.SchemaError) as error:
        raise CropError(f"{path.name} is damaged or of another version; run the preprocessing again.") from error


def read_index(out: str | os.PathLike) -> pd.DataFrame:
    """The crop index: one row per crop, in manifest and frame order. Raises CropError."""
    return _read_table(Path(out) / "crops.parquet", INDEX_SCHEMA)


def read_items(out: str | os.PathLike) -> pd.DataFrame:
    """One row per item, failures too, in manifest order. Raises CropError."""
    return _read_table(Path(out) / "items.parquet", ITEMS_SCHEMA)


def spread(index: pd.DataFrame, frames: int) -> pd.DataFrame:
    """Index rows with at most `frames` of every item, in the middles of as many equal parts; by item and frame."""
    index = index.sort_values(["item_id", "frame"], ignore_index=True)
    parts = index.groupby("item_id", sort=True).indices.values()
    middles = [own[((np.arange(n := min(frames, len(own))) + 0.5) * len(own) / n).astype(int)] for own in parts]
    return index.iloc[np.concatenate(middles)].reset_index(drop=True) if middles else index


class CropStore:
    """Random access to the crops of a folder; safe to hand to data-loader workers."""

    def __init__(self, out: str | os.PathLike):
        self.out = Path(out)
        self._files: dict[str, int] = {}

    def __getstate__(self) -> dict:
        return {"out": self.out, "_files": {}}

    def __del__(self):
        for descriptor in self._files.values():
            os.close(descriptor)

    def settings(self) -> dict:
        """How the crops were made: frames, size, margin, align, encoding, sampling and fps. Raises CropError."""
        try:
            kept = SAMPLING_BEFORE | json.loads((self.out / "settings.json").read_text(encoding="utf-8"))
            return {key: kept[key] for key in ("frames", "size", "margin", "align", "encoding", "sampling", "fps")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CropError(f"{self.out} has no readable settings.json; run the preprocessing again.") from error

    def image(self, row, check: bool = False) -> np.ndarray:
        """The crop of one index row (Series, mapping or named tuple), uint8[S,S,3] RGB.

        Raises CropError if its shard is missing or damaged; `check` compares the sha256 too.
        """
        row = row._asdict() if hasattr(row, "_asdict") else row
        shard = row["shard"]
        try:
            if shard not in self._files:
                self._files[shard] = os.open(self.out / "shards" / shard, os.O_RDONLY)
            data = os.pread(self._files[shard], int(row["size"]), int(row["offset"]))
        except OSError as error:
            raise CropError(f"{shard} cannot be read; run the preprocessing again.") from error
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
        if picture is None or (check and hashlib.sha256(data).hexdigest() != row["sha256"]):
            raise CropError(f"A crop of item {row['item_id']} in {shard} is damaged; run the preprocessing again.")
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
