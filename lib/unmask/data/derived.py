"""Test sets made of real videos: of each one several twins, which differ in one thing that a recipe says.

What the twins of a video are is told by `.parts/ITEM.json`, written last, so that a part that exists is whole. An
interrupted run goes on after it; one whose media, recipe or code changed is made anew, its old twins removed.
"""

import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from unmask.data import faces, frames, manifest, video
from unmask.profile import digest, source_hash, write_atomic
from unmask.progress import track

LONGEST = 96
"""Frames of a twin at most, in a row from the middle of the original."""
WORTH = 8
"""Videos that are worth the seconds which a process takes to start."""
MAX_SIDE = 1920
"""Pixels; larger originals are shrunk to this."""

Twins = Iterable[tuple[str, int, Iterable[np.ndarray]]]
"""Name, label and frames uint8[H,W,3] of each twin."""


@dataclass(frozen=True)
class Recipe:
    """How twins are made. It travels to other processes, so `twins` is a function of a module or a `partial` of one.

    dataset: their data set's name, `{}` standing for the original's. twins(item_id, clip, landmarks float32[T,81,2],
    NaN without a face): what to write of an original; the clip's sides are even. key: all that shapes the twins besides
    the other fields, the original and this module, the source code included. encoding: what `video.encode` takes.
    `locator` finds faces that nobody annotated; `frames` of an original are read at most.
    """

    dataset: str
    twins: Callable[[str, video.Clip, np.ndarray], Twins]
    key: str
    encoding: dict
    seed: int
    locator: str
    frames: int = LONGEST


def _read(row: dict, source: Path, recipe: Recipe) -> tuple[video.Clip, np.ndarray]:
    """The clip of a manifest row and landmarks float32[T,81,2] in its pixels. Raises MediaError or LocatorError."""
    clip = video.read_frames(manifest.media_path(row, source), recipe.frames, max_side=MAX_SIDE, sampling="dense")
    if row["annotations"]:
        path = manifest.media_path(row, source, "annotations")
        finder = faces.build_locator(faces.AnnotationLocator.name, path=path, scale=clip.scale)
    else:
        finder = faces.build_locator(recipe.locator)
    found = [finder.locate(frame, int(i)) for frame, i in zip(clip.frames, clip.indices, strict=True)]
    points = faces.landmarks_of(faces.track(found))
    landmarks = np.stack([np.full((81, 2), np.nan, np.float32) if p is None else p for p in points])
    if np.isfinite(landmarks[:, 0, 0]).sum() < 2:
        raise frames.MediaError("fewer than two frames with a face")
    height, width = (side // 2 * 2 for side in clip.frames.shape[1:3])  # as 4:2:0 demands
    return replace(clip, frames=clip.frames[:, :height, :width]), landmarks


def _forget(part: Path, out: Path) -> None:
    """Remove the twins that a part tells of, and the part."""
    if part.exists():
        for row in json.loads(part.read_text())["rows"]:
            for column in ("path", "annotations"):
                (out / row[column]).unlink(missing_ok=True)
        part.unlink()


def _make(row: dict, source: Path, out: Path, recipe: Recipe) -> str:
    """Write the twins of one video; returns "" or why there are none. The part, last, tells that they are whole."""
    item = row["item_id"]
    part = out / ".parts" / f"{item}.json"
    media = [manifest.media_path(row, source, c) for c in ("path", "annotations") if row[c]]
    stamps = [(p.stat().st_size, p.stat().st_mtime_ns) for p in media if p.exists()]
    settings = [recipe.dataset, recipe.key, recipe.encoding, recipe.seed, recipe.locator, recipe.frames]
    key = digest([row, stamps, settings, source_hash(video, frames, faces, sys.modules[__name__])])
    if part.exists() and (kept := json.loads(part.read_text()))["key"] == key:
        if all((out / r[column]).exists() for r in kept["rows"] for column in ("path", "annotations")):
            return ""
    _forget(part, out)
    cv2.setNumThreads(1)
    try:
        clip, landmarks = _read(row, source, recipe)
    except (frames.MediaError, faces.LocatorError) as error:
        return str(error)
    annotations, buffer = f"annotations/{item}.npz", io.BytesIO()
    np.savez_compressed(buffer, landmarks=landmarks.astype(np.float32))
    write_atomic(out / annotations, buffer.getvalue())
    rows, dataset = [], recipe.dataset.format(row["dataset"])
    for name, label, pictures in recipe.twins(item, clip, landmarks):
        # The name is a hash, so neither it nor the order of the manifest tells the label.
        path = f"videos/{hashlib.sha256(f'{recipe.seed}/{item}/{name}'.encode()).hexdigest()[:12]}.mp4"
        video.encode(out / path, pictures, clip.fps, **recipe.encoding)
        new = {"path": path, "dataset": dataset, "item_id": manifest.item_id(dataset, path), "root": ".",
               "label": label, "method": name if label else "real", "annotations": annotations}  # fmt: skip
        rows.append(row | new)
    write_atomic(part, json.dumps({"key": key, "rows": rows}))
    return ""


def make(source: Path, out: Path, recipe: Recipe, splits: Collection[str], workers: int, label: str) -> Path:
    """Write the twins of all real videos of these splits into the folder `out`; returns the path of their manifest.

    source: path of a manifest. Faces are where its annotations say, else where the recipe's locator finds them. The new
    rows keep split, subject, group_id and camera; the annotations of an original's twins are one file, so that crops
    are cut alike. Videos without a readable face are left out and counted on stderr. `label` says in the progress what
    is made. Raises ManifestError for a broken manifest or if no video is left.
    """
    df = manifest.read_manifest(source)
    chosen = df[df["split"].isin(splits) & (df["label"] == 0) & (df["kind"] == "video")].to_dict("records")
    for folder in ("videos", "annotations", ".parts"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    processes = min(workers, -(-len(chosen) // WORTH))
    tasks = Parallel(n_jobs=max(processes, 1), return_as="generator")(
        delayed(_make)(row, source.absolute(), out, recipe) for row in chosen
    )
    faults = list(track(tasks, len(chosen), f"{label}, videos"))
    for reason, count in Counter(filter(None, faults)).items():
        print(f"{count} of {len(chosen)} real videos left out: {reason}.", file=sys.stderr)
    parts = [out / ".parts" / f"{row['item_id']}.json" for row, why in zip(chosen, faults, strict=True) if not why]
    for old in set((out / ".parts").glob("*.json")) - set(parts):
        _forget(old, out)
    rows = [row for part in parts for row in json.loads(part.read_text())["rows"]]
    table = pd.DataFrame(rows, columns=list(manifest.COLUMNS)).astype({"label": "int8"})
    manifest.write_manifest(table.sort_values("path"), out / "manifest.parquet")
    return out / "manifest.parquet"
