"""Face crops on disk: uncompressed tar shards (WebDataset names), a Parquet index, and one row per item.

While a shard grows, `shards/NAME.tar.part` holds the pictures and `shards/NAME.jsonl`, the journal, gets one line per
finished item after the item's bytes have reached the disk. After a kill the tar is cut back to the last journalled
offset and writing goes on, so that an interrupted run leaves the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pandera.pandas as pa
import pyarrow
import pyarrow.parquet as pq

from unmask.data.journals import in_turn, lines, name_shards
from unmask.machine import writing

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
        "shard": pa.Column(str, pa.Check.str_matches(r"^crops-[0-9]+-of-[0-9]+\.tar\Z")),
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


# A table that lacks columns, or has others, raises the second even where one fault at a time is asked for.
SCHEMA_ERRORS = (pa.errors.SchemaError, pa.errors.SchemaErrors)

TABLES = ("crops.parquet", "items.parquet")
MOST_SHARDS = 10**5  # that a damaged settings.json may name
BLOCK = 2**14  # crops that are merged at a time: as Python's own objects they need some 5 kB each
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


class CropWriter:
    """The only writer of one shard (number `shard` of `of`) in the folder `out`; use as a context manager.

    `resume` first, then `add` items in their fixed order, then `finish`. Raises CropError if another process is
    writing the shard.
    """

    def __init__(self, out: str | os.PathLike, shard: int, of: int):
        folder = Path(out) / "shards"
        self.name = _shard_name(shard, of)
        self.tar, self.part = folder / f"{self.name}.tar", folder / f"{self.name}.tar.part"
        self.journal = folder / f"{self.name}.jsonl"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
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
                # Closing tries again to write what a full disk refused: not journalled, so it does not count.
                with contextlib.suppress(OSError):
                    file.close()

    def kept(self, keys: Sequence[tuple[str, str]]) -> Iterator[dict]:
        """The rows of the items that `resume` would keep."""
        if self.journal.exists():
            with open(self.journal, "rb") as journal:
                for key, (line, _) in zip(keys, lines(journal), strict=False):
                    if tuple(line["key"]) != tuple(key):
                        return
                    yield line["item"]

    def resume(self, keys: Sequence[tuple[str, str]], most: int | None = None) -> int:
        """Keep the finished items that are still the first of `keys` (item_id, fingerprint), at most `most`; returns
        how many.

        Everything after them is cut off. A complete, unchanged shard is left untouched.
        """
        if self.tar.exists() and not self.part.exists():
            stored = self.tar
        else:
            stored = self.part
        length = stored.stat().st_size if stored.exists() else 0
        kept, end, size = 0, 0, 0
        with open(self.journal, "a+b") as journal:
            journal.seek(0)
            found = lines(journal)
            for key, (line, more) in zip(keys[:most], found, strict=False):
                if tuple(line["key"]) != tuple(key) or line["end"] > length:
                    break
                kept, end, size = kept + 1, line["end"], size + more
            whole = kept == len(keys) and next(found, None) is None
        if stored is self.tar and stored.exists() and whole:
            return kept
        for table in TABLES:  # they would tell of crops that are about to change
            (self.tar.parents[1] / table).unlink(missing_ok=True)
        if stored is self.tar and stored.exists():
            os.replace(self.tar, self.part)
        with writing(self.part.parent):
            self._file = open(self.part, "r+b" if self.part.exists() else "w+b")
            self._file.truncate(end)
            self._file.seek(end)
            self._log = open(self.journal, "ab")
            self._log.truncate(size)
        return kept

    def add(self, key: tuple[str, str], item: Mapping, crops: Sequence[Mapping], encoding: str) -> None:
        """Append one item: its `items` row and its crops, each an index row without shard fields plus `data` bytes.

        Raises DiskError if the disk is full: the item then does not count, and a later `resume` does it again.
        """
        with writing(self.part.parent):
            self._append(key, item, crops, encoding)

    def _append(self, key: tuple[str, str], item: Mapping, crops: Sequence[Mapping], encoding: str) -> None:
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
        with writing(self.part.parent):
            self._file.write(b"\0" * 2 * tarfile.BLOCKSIZE)
            self._file.flush()
            os.fsync(self._file.fileno())
            os.fsync(self._log.fileno())
            os.replace(self.part, self.tar)


def write_table(df: pd.DataFrame, path: Path, schema: pa.DataFrameSchema) -> None:
    """Validate and write a table as Parquet, atomically."""
    write_blocks([df], path, schema)


def write_blocks(blocks: Iterable[pd.DataFrame], path: Path, schema: pa.DataFrameSchema) -> None:
    """`write_table` of a table that comes in parts, one at a time in memory; each is validated by itself."""
    arrow = pyarrow.schema([(c, _ARROW.get(str(t.dtype), pyarrow.string())) for c, t in schema.columns.items()])
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path.parent):
            with pq.ParquetWriter(part, arrow) as writer:
                for df in blocks:
                    writer.write_table(
                        pyarrow.Table.from_pandas(schema.validate(df), schema=arrow, preserve_index=False)
                    )
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


def read_shard(out: str | os.PathLike, shard: int, of: int) -> Iterator[dict]:
    """Journal lines of a complete shard, or none. A complete shard with no items gives none too."""
    name = _shard_name(shard, of)
    folder = Path(out) / "shards"
    if (folder / f"{name}.tar").exists():
        with open(folder / f"{name}.jsonl", "rb") as journal:
            yield from (line for line, _ in lines(journal))


class _Stale(Exception):
    """Shards that hold other items than the manifest, or what they were before: argument 0, a set."""


def _merged(out: Path, of: int, keys: Sequence[tuple[str, str]] | None, items: list[dict]) -> Iterator[pd.DataFrame]:
    """The crop index in blocks, while `items` fills with the items' rows. _Stale at the end if `keys` differ."""
    counts, stale, crops = [0] * of, set(), []
    for i, line in in_turn([out / "shards" / f"{_shard_name(i, of)}.jsonl" for i in range(of)]):
        place = i + counts[i] * of
        counts[i] += 1
        if keys is not None and not (place < len(keys) and tuple(keys[place]) == tuple(line["key"])):
            stale.add(i)
        items.append(line["item"])
        crops += line["crops"]
        if len(crops) >= BLOCK:
            yield to_table(crops, INDEX_SCHEMA)
            crops = []
    yield to_table(crops, INDEX_SCHEMA)
    if keys is not None:
        stale |= {i for i, count in enumerate(counts) if count != len(range(i, len(keys), of))}
    if stale:
        raise _Stale(stale)


def collate(out: str | os.PathLike, of: int, keys: Iterable[tuple[str, str]] | None = None) -> list[int]:
    """Once all `of` shards are complete, write crops.parquet and items.parquet in manifest order.

    Returns the shards that are still to do, none if the tables were written: those that are not complete and, if `keys`
    (read once all are complete) lists what the manifest's items are now, those made of another manifest or of files
    that have changed. Items were dealt to the shards in turn, and are gathered in turn again.
    """
    out, items = Path(out), []
    if missing := _missing(out, of):
        return missing
    try:
        keys = None if keys is None else list(keys)
        write_blocks(_merged(out, of, keys, items), out / TABLES[0], INDEX_SCHEMA)
    except _Stale as stale:
        return sorted(stale.args[0])
    write_table(to_table(items, ITEMS_SCHEMA), out / TABLES[1], ITEMS_SCHEMA)
    return []


def _missing(out: Path, of: int) -> list[int]:
    return [i for i in range(of) if not (out / "shards" / f"{_shard_name(i, of)}.tar").exists()]


def _what_is_missing(out: Path) -> str:
    """Which shards of a folder are not complete, as a sentence; "" where nothing tells."""
    try:
        of = int(json.loads((out / "settings.json").read_text(encoding="utf-8"))["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    missing = _missing(out, of) if 0 < of <= MOST_SHARDS else []
    return f" {name_shards(missing, of).capitalize()} is not complete." if missing else ""


def _present(path: Path) -> Path:
    if not path.is_file():
        missing = _what_is_missing(path.parent)
        raise CropError(f"There is no {path.name} in {path.parent}. Run the preprocessing to its end first.{missing}")
    return path


def _read_table(path: Path, schema: pa.DataFrameSchema) -> pd.DataFrame:
    _present(path)
    try:
        df = pq.read_table(path).to_pandas()
        for name, column in schema.columns.items():
            if str(column.dtype) == "str" and name in df:
                df[name] = df[name].astype("str")
        return schema.validate(df)
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, *SCHEMA_ERRORS) as error:
        raise CropError(f"{path.name} is damaged or of another version; run the preprocessing again.") from error


def read_index(out: str | os.PathLike) -> pd.DataFrame:
    """The crop index: one row per crop, in manifest and frame order. Raises CropError."""
    return _read_table(Path(out) / "crops.parquet", INDEX_SCHEMA)


def index_hash(out: str | os.PathLike) -> str:
    """SHA-256 of the crop index and of how the crops were made: another one for other faces. Raises CropError."""
    with open(_present(Path(out) / TABLES[0]), "rb") as file:
        index = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps([index, CropStore(out).settings()]).encode()).hexdigest()


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
            # No more than there is: for a size that damage made huge, so much memory would be asked for.
            most = os.fstat(self._files[shard]).st_size
            data = os.pread(self._files[shard], min(int(row["size"]), most), min(int(row["offset"]), most))
        except OSError as error:
            raise CropError(f"{shard} cannot be read; run the preprocessing again.") from error
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
        if picture is None or (check and hashlib.sha256(data).hexdigest() != row["sha256"]):
            raise CropError(f"A crop of item {row['item_id']} in {shard} is damaged; run the preprocessing again.")
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
