"""The manifest of a study: the data sets that its profile names, indexed one after the other and joined."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from unmask.data.datasets import LAYOUTS, index
from unmask.data.manifest import ManifestError, is_inside, media_path, read_manifest
from unmask.data.tree import DatasetError
from unmask.data.video import MediaError, read_frames
from unmask.data.world import generate
from unmask.profile import Profile


def collect(profile: Profile, work: Path, root: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of all data sets in `profile.data.sets`, and notes on what is missing or odd.

    An entry is "layout=folder" (relative to the repository `root`), "manifest=file", or "world=folder": the synthetic
    world, made in that folder of `work` if need be. The first set is trained on; of the others only the test split is
    used. A later set that is missing is left out with a note. Raises DatasetError if the first one is missing, or an
    entry names no known layout.
    """
    tables, notes = [], []
    entries = [(entry, *entry.partition("=")[::2]) for entry in profile.data.sets]
    for entry, layout, place in entries:
        if layout == "world" and place and not is_inside(place):
            raise DatasetError(f"{entry!r} in data.sets: the world lies in a folder of the run's own, such as world=a.")
        if not place or layout not in {*LAYOUTS, "manifest"}:
            raise DatasetError(f"{entry!r} in data.sets is not LAYOUT=FOLDER, with {', '.join(LAYOUTS)} or manifest.")
    for position, (entry, layout, place) in enumerate(entries):
        try:
            found, remarks = _one(layout, place, profile, work, root)
        except DatasetError as error:
            if position == 0:
                raise
            notes.append(f"{entry}: left out. {error}")
            continue
        if position:
            found = found[found["split"] == "test"]
            if found.empty:
                notes.append(f"{entry}: it has no test split, so nothing of it is used.")
        notes += [f"{layout}: {remark}" for remark in remarks]
        tables.append(found)
    joined = pd.concat(tables, ignore_index=True)
    twice = joined["item_id"].duplicated()
    if twice.any():
        raise DatasetError(
            f"{int(twice.sum())} media are in two of the data sets {', '.join(profile.data.sets)}; name each set once."
        )
    return joined, notes


def _one(layout: str, place: str, profile: Profile, work: Path, root: Path) -> tuple[pd.DataFrame, list[str]]:
    if layout == "world":
        folder = work / place
        return generate(folder, dict(profile.world), profile.seed, profile.workers).assign(root=place), []
    path = root / place
    if layout == "manifest":
        try:
            df = read_manifest(path)
        except ManifestError as error:
            raise DatasetError(str(error)) from error
        roots = [str(path.parent.absolute() / r) for r in df["root"]]
        gone = sum(not media_path(row, path).exists() for row in df.to_dict("records"))
        return df.assign(root=roots), [f"{gone} of {len(df)} listed files are missing."] if gone else []
    return index(path, layout, profile.seed)


def media_sheet(manifest: pd.DataFrame, manifest_path: Path, columns: int = 6, cell: int = 160) -> np.ndarray:
    """A picture uint8[4*cell,columns*cell,3]: the middle frame of some reals (two rows) and some fakes (two rows).

    Media that cannot be decoded are passed over here; preprocessing reports them.
    """
    sheet = np.full((4 * cell, columns * cell, 3), 255, np.uint8)
    for label in (0, 1):
        part = manifest[manifest["label"] == label].sort_values("item_id")
        place = 0
        for row in part.to_dict("records"):
            if place == 2 * columns:
                break
            try:
                frames = read_frames(media_path(row, manifest_path), 3, max_side=2 * cell).frames
            except MediaError:
                continue
            frame = frames[len(frames) // 2]
            side = min(frame.shape[:2])
            y, x = (n // 2 - side // 2 for n in frame.shape[:2])
            top, left = cell * (2 * label + place // columns), cell * (place % columns)
            square = cv2.resize(frame[y : y + side, x : x + side], (cell, cell), interpolation=cv2.INTER_AREA)
            sheet[top : top + cell, left : left + cell] = square
            place += 1
    return sheet
