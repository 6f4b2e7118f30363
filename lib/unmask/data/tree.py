"""What the data set adapters share: safe listing of a folder tree, rows for the manifest, notes for the person."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from unmask.data.manifest import COLUMNS, ManifestError, assign_groups, is_inside, item_id, leakage, split_by_group

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
VAL_CUT = {"train": 0.9, "val": 0.1}


class DatasetError(ManifestError):
    """A data set is not where, or not what, it was said to be."""


def kind_of(path: str) -> str:
    """ "image" for the known image extensions, "video" for everything else."""
    return "image" if Path(path).suffix.lower() in IMAGE_SUFFIXES else "video"


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_text(path: Path, what: str) -> str:
    """Text of a small list file. Raises DatasetError that says what the file is and where it was expected."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"{what} not found: expected at {path}. Put it there; it comes with the data set.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{what} at {path} cannot be read as UTF-8 text: {error}.") from error


def read_json(path: Path, what: str, kind: type) -> Any:
    """JSON of a small list file whose top level must be `kind` (list or dict). Raises DatasetError."""
    try:
        value = json.loads(read_text(path, what))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(f"{what} at {path} is not valid JSON: {error}.") from error
    if not isinstance(value, kind):
        raise DatasetError(f"{what} at {path} must hold a JSON {'list' if kind is list else 'object'}.")
    return value


def read_table(path: Path, what: str, required: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Rows of a small CSV as (line number, stripped fields). Raises DatasetError on missing columns or ragged rows."""
    reader = csv.DictReader(io.StringIO(read_text(path, what), newline=""), strict=True)
    rows = []
    try:
        absent = [c for c in required if c not in (reader.fieldnames or [])]
        if absent:
            raise DatasetError(f"{what} at {path} has no column {', '.join(absent)}; the first line must name them.")
        for row in reader:
            if None in row or None in row.values():
                raise DatasetError(f"{what} at {path}, line {reader.line_num}: not {len(reader.fieldnames)} fields.")
            rows.append((reader.line_num, {k: v.strip() for k, v in row.items()}))
    except csv.Error as error:
        raise DatasetError(f"{what} at {path}, line {reader.line_num}: not valid CSV ({error}).") from error
    return rows


class Tree:
    """One data set below one root: adapters look into it, add rows and leave notes.

    Rows added with split "" have no official split; `fractions` says how they are divided by group
    (or by `unit`, a coarser unit such as a part of the release, where there are enough of those).
    """

    def __init__(self, root: Path, dataset: str) -> None:
        self.root, self.dataset = root, dataset
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.fractions: Mapping[str, float] = VAL_CUT

    def note(self, sentence: str) -> None:
        self.notes.append(f"{self.dataset}: {sentence}")

    def add(self, path: str, split: str, label: int, method: str, **ids: str) -> None:
        """Add one medium. ids: subject, source_id, group_id, camera, annotations, dataset, root, unit."""
        row = {"root": str(self.root), "dataset": self.dataset, **ids}
        row |= {"path": path, "split": split, "label": label, "method": "real" if label == 0 else method}
        self.rows.append(row)

    def entries(self, folder: Path) -> list[Path]:
        """Visible entries of a folder in name order; names that are not UTF-8 are noted and left out."""
        try:
            found = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        except OSError as error:
            self.note(f"folder {self.short(folder)} cannot be listed ({error.strerror}).")
            return []
        bad = [p for p in found if not _storable(p.name)]
        if bad:
            self.note(
                f"{len(bad)} names in {self.short(folder)} are not valid UTF-8 and were left out; rename them: "
                f"{some(repr(p.name) for p in bad)}."
            )
        return [p for p in found if _storable(p.name)]

    def short(self, path: Path) -> str:
        """Path as shown in notes: the part below the root."""
        relative = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.as_posix()
        return f"ROOT/{relative}" if relative != "." else "ROOT"

    def media(self, folder: Path) -> list[Path]:
        """Files of a folder in name order, unreadable ones and dead links too; pipes and sockets are noted."""
        return self._files(folder, self.entries(folder))

    def _files(self, folder: Path, entries: list[Path]) -> list[Path]:
        files = [p for p in entries if not os.path.isdir(p)]
        special = [p for p in files if os.path.exists(p) and not os.path.isfile(p)]
        if special:
            self.note(
                f"{len(special)} entries in {self.short(folder)} are not regular files and were left out: "
                f"{some(p.name for p in special)}."
            )
        return [p for p in files if p not in special]

    def walk(self, folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
        """All files below a folder, depth first in name order; linked folders are followed, but never in circles."""
        real = os.path.realpath(folder)
        if real in above:
            self.note(f"folder {self.short(folder)} links back to a folder above it and was not entered again.")
            return
        entries = self.entries(folder)
        yield from self._files(folder, entries)
        for child in entries:
            if os.path.isdir(child):
                yield from self.walk(child, above | {real})

    def clips(self, folder: str, what: str) -> dict[str, list[str]] | None:
        """Paths (relative to the root) of the files in a folder of the release, by stem; None, noted, if it is missing.

        Some tools move the files of a folder into a sub-folder `videos`; those count too.
        """
        here = self.root / folder
        if not here.is_dir():
            self.note(f"{what}: folder missing (expected ROOT/{folder}).")
            return None
        found: dict[str, list[str]] = {}
        for path in self.media(here) + (self.media(here / "videos") if (here / "videos").is_dir() else []):
            found.setdefault(path.stem, []).append(path.relative_to(self.root).as_posix())
        return found

    def match(self, found: Mapping[str, Any], wanted: Iterable[str], what: str) -> list[str]:
        """Names both found and wanted, sorted; the others are noted by number and name."""
        wanted = set(wanted)
        missing, extra = wanted - set(found), set(found) - wanted
        if missing:
            self.note(f"{what}: {len(missing)} of {len(wanted)} listed files not on disk: {some(missing)}.")
        if extra:
            self.note(f"{what}: {len(extra)} files are in no official list and were left out: {some(extra)}.")
        return sorted(wanted & set(found))

    def frame(self, seed: int) -> pd.DataFrame:
        """The manifest of all rows: sorted by path, grouped, split where the release does not split, leaks noted."""
        df = pd.DataFrame(self.rows)
        for column in ("subject", "source_id", "group_id", "camera", "annotations", "unit"):
            df[column] = df[column].fillna("") if column in df else ""
        bad = [p for p in df["path"] if not is_inside(p)]
        if bad:
            raise DatasetError(f"{self.dataset}: paths must stay inside the root: {some(map(repr, bad))}.")
        df["item_id"] = [item_id(d, p) for d, p in zip(df["dataset"], df["path"], strict=True)]
        df["kind"] = df["path"].map(kind_of)
        df["label"] = df["label"].astype("int8")
        df = df.sort_values(["dataset", "path"], ignore_index=True)
        given = df["group_id"]
        df["group_id"] = given.where(given != "", assign_groups(df)["group_id"])
        df = self._cut(df, seed)
        self._note_leaks(df)
        return df[list(COLUMNS)]

    def _cut(self, df: pd.DataFrame, seed: int) -> pd.DataFrame:
        pool = df[df["split"] == ""]
        if pool.empty:
            return df
        if (pool["unit"] != "").all():
            joined = assign_groups(pool.assign(subject=pool["unit"], source_id=pool["group_id"]))
            if joined["group_id"].nunique() >= len(self.fractions):
                pool = joined
        df.loc[pool.index, "split"] = split_by_group(pool, self.fractions, seed)["split"]
        for split in self.fractions:
            classes = set(df.loc[df["split"] == split, "label"])
            for label, name in ((0, "real"), (1, "fake")):
                if label not in classes:
                    self.note(f"split {split} has no {name} item: there are too few groups of that class.")
        return df

    def _note_leaks(self, df: pd.DataFrame) -> None:
        leaks = leakage(df)
        if len(leaks):
            items = int(df["group_id"].isin(leaks.index).sum())
            self.note(
                f"{len(leaks)} of {df['group_id'].nunique()} groups ({items} items) lie in more than one split: "
                f"{some(leaks.index)}."
            )


def _storable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
