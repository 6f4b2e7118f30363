"""From a folder on disk to a manifest: one adapter per layout, all called through `index`."""

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from unmask import plugins
from unmask.data.adapters import celebdf, dfdc, dfdc_preview, ffiw, uadfv
from unmask.data.adapters_ffpp import deeperforensics, df40, dfd, ffpp
from unmask.data.manifest import DEFAULT_FRACTIONS, SPLITS, is_inside, read_manifest
from unmask.data.tree import DatasetError, Tree, kind_of, read_table, some

_LABELS = {"0": 0, "real": 0, "1": 1, "fake": 1}


def _folder_names(top: str, below: Path) -> dict[str, str]:
    """method and subject of a file from its place under real/ or fake/.

    The first sub-folder of fake/ names the method. Videos of the same name are taken to show the same subject
    (a fake and its original); so are all images of a sub-folder (frames of one clip).
    """
    folders = below.parts[:-1]
    clip = folders[-1] if folders and kind_of(below.name) == "image" else below.stem
    return {
        "method": "real" if top == "real" else (folders[0] if folders and folders[0] != "real" else "fake"),
        "subject": clip,
    }


def folder(tree: Tree) -> None:
    """Your own media: real/ and fake/ (with sub-folders), or a media.csv in ROOT that lists them and says more."""
    tree.fractions = DEFAULT_FRACTIONS
    files = {
        path.relative_to(tree.root): top
        for top in ("real", "fake")
        if (tree.root / top).is_dir()
        for path in tree.walk(tree.root / top)
    }
    if (tree.root / "media.csv").exists():
        _folder_csv(tree, {path.as_posix() for path in files})
        return
    for top in ("real", "fake"):
        if not (tree.root / top).is_dir():
            tree.note(f"folder missing (expected ROOT/{top}).")
    for path, top in files.items():
        names = _folder_names(top, path.relative_to(top))
        tree.add(path.as_posix(), "", int(top == "fake"), names["method"], subject=names["subject"])


def _folder_csv(tree: Tree, on_disk: set[str]) -> None:
    """Rows of media.csv: path, label; optionally method, group, split, subject, source, camera."""
    path, seen = tree.root / "media.csv", {}
    rows = read_table(path, "media.csv", ("path", "label"))
    for line, row in rows:
        where = f"media.csv at {path}, line {line}"
        name = Path(row["path"]).as_posix()
        if not is_inside(row["path"]):
            raise DatasetError(f"{where}: path {row['path']!r} must be relative and stay inside {tree.root}.")
        if name in seen:
            raise DatasetError(f"{where}: {name!r} is listed a second time (first in line {seen[name]}).")
        seen[name] = line
        if row["label"].lower() not in _LABELS:
            raise DatasetError(f"{where}: label must be 0, 1, real or fake, not {row['label']!r}.")
        if row.get("split", "") not in ("", *SPLITS):
            raise DatasetError(f"{where}: split must be train, val or test, not {row['split']!r}.")
        _folder_row(tree, name, row, _LABELS[row["label"].lower()], where)
    without = [line for line, row in rows if not row.get("split")]
    if without and len(without) < len(rows):
        raise DatasetError(
            f"media.csv at {path}: {len(without)} rows have no split (first in line {without[0]}); "
            "give every row one, or none."
        )
    missing = [name for name in seen if not os.path.isfile(tree.root / name)]
    if missing:
        tree.note(f"{len(missing)} of {len(seen)} files listed in media.csv are missing: {some(missing)}.")
    unlisted = on_disk - set(seen)
    if unlisted:
        tree.note(
            f"{len(unlisted)} files under real/ and fake/ are not in media.csv and were left out: {some(unlisted)}."
        )


def _folder_row(tree: Tree, name: str, row: dict[str, str], label: int, where: str) -> None:
    top, *below = Path(name).parts
    placed = bool(below) and top in ("real", "fake")
    guess = _folder_names(top, Path(*below)) if placed else _folder_names("real", Path(name))
    method = row.get("method") or ("fake" if guess["method"] == "real" else guess["method"])
    if label == 1 and method == "real":
        raise DatasetError(f"{where}: method 'real' on an item labelled fake.")
    group = row.get("group", "")
    tree.add(
        name,
        row.get("split", ""),
        label,
        method,
        subject=row.get("subject") or guess["subject"],
        source_id=row.get("source", ""),
        camera=row.get("camera", ""),
        group_id=f"{tree.dataset}:{group}" if group else "",
    )


def world(tree: Tree) -> None:
    """The kit's own generated world: ROOT/manifest.parquet, validated; its roots are made absolute."""
    df = read_manifest(tree.root / "manifest.parquet")
    if tree.dataset != "world":
        df["dataset"] = tree.dataset
    df["root"] = [str((tree.root / root).resolve()) for root in df["root"]]
    for row in df.drop(columns=["item_id", "kind"]).to_dict("records"):
        tree.add(**row)
    missing = [p for r, p in zip(df["root"], df["path"], strict=True) if not os.path.isfile(Path(r) / p)]
    if missing:
        tree.note(f"{len(missing)} of {len(df)} listed files are missing: {some(missing)}.")


# layout -> (adapter, what it looks for)
LAYOUTS: dict[str, tuple[Callable[..., None], str]] = {
    "folder": (folder, "files under real/ and fake/, or media.csv"),
    "ffpp": (ffpp, "original_sequences/, manipulated_sequences/ and splits/*.json"),
    "dfd": (dfd, "original_sequences/actors/ and manipulated_sequences/DeepFakeDetection/"),
    "celebdf1": (celebdf, "Celeb-real/, YouTube-real/ and Celeb-synthesis/"),
    "celebdf2": (celebdf, "Celeb-real/, YouTube-real/ and Celeb-synthesis/"),
    "uadfv": (uadfv, "real/0000.mp4 and fake/0000_fake.mp4"),
    "dfdc": (dfdc, "dfdc_train_part_*/metadata.json or labels.csv"),
    "dfdc-preview": (dfdc_preview, "dataset.json with original_videos/, method_A/ and method_B/"),
    "deeperforensics": (deeperforensics, "manipulated_videos/ and lists/splits/*.txt"),
    "ffiw": (ffiw, "source/val/ and target/val/"),
    "df40": (df40, "<method>/{ff,cdf,fake,real}/, below train/ and test/ if there are both"),
    "world": (world, "manifest.parquet"),
}


def register(name: str, expected: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: make an adapter known as a layout; `expected` says what it looks for, for the messages.

    An adapter takes a `Tree` (and options, by name, as texts) and adds the media that it finds below `tree.root`.
    DatasetError for a name that is taken.
    """

    def add(adapter: Callable[..., None]) -> Callable[..., None]:
        if name in LAYOUTS and LAYOUTS[name][0].__module__ != adapter.__module__:
            raise DatasetError(f"The layout {name!r} is one of {LAYOUTS[name][0].__module__}; choose another name.")
        LAYOUTS[name] = adapter, expected
        return adapter

    return add


def adapter_of(layout: str, options: Iterable[str]) -> tuple[Callable[..., None], str]:
    """The adapter of a layout and what it looks for. DatasetError for an unknown layout, or options not its own."""
    if layout not in LAYOUTS:
        plugins.load()
    if layout not in LAYOUTS:
        raise DatasetError(
            f"There is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}. One of your own is found if "
            f"{plugins.VARIABLE} names its file."
        )
    adapter, expected = LAYOUTS[layout]
    known = list(inspect.signature(adapter).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise DatasetError(
            f"Layout {layout} takes no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}."
        )
    return adapter, expected


def index(
    root: Path | str, layout: str, seed: int = 0, dataset: str = "", **options: str | Path | None
) -> tuple[pd.DataFrame, list[str]]:
    """Manifest of the data set at `root`, and notes: sentences that name what is missing or odd, with counts.

    layout: a key of LAYOUTS, or one that a file in UNMASK_PLUGINS registers. dataset: name in the manifest; default the
    layout's, for "folder" the folder's.
    options: `compression` for ffpp, dfd and deeperforensics; `ffpp_root` for deeperforensics.
    Media are never opened: empty or broken files get a row like any other, and fail in later steps.
    The result does not depend on the order in which the disk lists files.
    Raises DatasetError if the root is missing, nothing is found, or an official list is missing or malformed.
    """
    root = Path(root).absolute()
    adapter, expected = adapter_of(layout, options)
    if not root.is_dir():
        raise DatasetError(f"There is no folder {root}; layout {layout} looks there for {expected}.")
    tree = Tree(root, dataset or (root.name if layout == "folder" else layout))
    adapter(tree, **options)
    if not tree.rows:
        raise DatasetError(
            f"Nothing found in {root}; layout {layout} looks there for {expected}. " + " ".join(tree.notes)
        )
    return tree.frame(seed), tree.notes
