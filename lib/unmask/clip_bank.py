"""A bank of clips to learn from: labelled media, images and videos alike, and fakes made of the real ones.

Every clip is decided by the seed, its medium and its version, so that any process can make it again. One cut, one flip
and one compression hold for all frames of a clip: what changes from frame to frame is the medium itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
import pandas as pd

from unmask import clips, sbi
from unmask.clip_views import augment
from unmask.data.crops import CropStore
from unmask.views import FIXED

MEDIUM = "medium"  # the kind of clip that shows a medium itself
STRIDES = (1, 2)  # of crops, in clips of crops in a row


@dataclass(frozen=True)
class Entry:
    """The plan of one clip: index rows of its frames, what to make of them, and which of several."""

    records: list[dict]
    kind: str
    version: int

    @property
    def label(self) -> int:
        return self.records[0]["label"] if self.kind == MEDIUM else clips.LABELS[self.kind]

    @property
    def known(self) -> bool:
        """Whether one knows where the clip was blended: not in a labelled fake."""
        return self.kind != MEDIUM or self.label == 0


@dataclass
class Maker:
    """Makes clips of entries. Two kinds are made together (`clips.PAIRS`); the last two are kept for the second."""

    store: CropStore
    size: int
    seed: int
    recipe: str
    _last: tuple = field(default=(None, None), repr=False, compare=False)

    def __getstate__(self) -> dict:
        return vars(self) | {"_last": (None, None)}

    def make(self, entry: Entry) -> dict:
        """images uint8[T,S,S,3] RGB, edges float32[T,S,S] (0 where nothing was blended, or nothing is known) and known
        bool. Raises CropError, and ValueError as `sbi.blend`."""
        cv2.setNumThreads(1)
        if entry.kind == MEDIUM:
            images = self._medium(entry)
            return {"images": images, "edges": np.zeros(images.shape[:3], np.float32), "known": entry.known}
        images, edges = self._made(entry)
        return {"images": images[entry.kind], "edges": edges[entry.kind], "known": True}

    def make_all(self, entries: list[Entry]) -> list[dict]:
        """The clips of entries; see `make`."""
        return [self.make(entry) for entry in entries]

    def _read(self, entry: Entry) -> tuple[list[np.ndarray], list[np.ndarray]]:
        points = [np.asarray(row["landmarks"], np.float32).reshape(-1, 2) for row in entry.records]
        return [self.store.image(row) for row in entry.records], points

    def _dice(self, entry: Entry, use: str) -> np.random.Generator:
        return sbi.sample_rng(self.seed, f"{entry.records[0]['item_id']} {use}", 0, entry.version)

    def _medium(self, entry: Entry) -> np.ndarray:
        images, points = self._read(entry)
        middle = np.median(points, axis=0)
        if entry.version == FIXED:
            box = sbi.crop_box(middle)
            return np.stack([sbi.crop(image, box, self.size) for image in images])
        rng = self._dice(entry, MEDIUM)
        box, mirrored, alike = sbi.crop_box(middle, rng), rng.random() < 0.5, int(rng.integers(2**63))
        frames = [sbi.crop(image, box, self.size) for image in images]
        if mirrored:
            frames = [cv2.flip(frame, 1) for frame in frames]
        return np.stack([augment(frame, np.random.default_rng(alike)) for frame in frames])

    def _made(self, entry: Entry) -> tuple[dict, dict]:
        (pair,) = (pair for pair in clips.PAIRS if entry.kind in pair)
        wanted = entry.records[0]["item_id"], entry.version, [row["frame"] for row in entry.records], pair
        key, made = self._last
        if key != wanted:
            images, points = self._read(entry)
            rng = self._dice(entry, "made")
            made = clips.make_clips_and_edges(images, points, rng, self.size, self.recipe, [pair])
            self._last = wanted, made
        return made


class Clips:
    """Clips of the media of index rows, which have a `label`, in a fixed order. ValueError if there are no rows.

    size: pixels a side. frames: in a clip, at most; a medium with fewer crops gives clips of all of them, and one with
    a single crop, an image, clips of one frame. versions: of every clip; the frames of even versions are crops in a
    row, or every second one, from a random place; those of odd ones are spread evenly over all crops. 0: the one view
    of evaluation, FIXED, of crops in a row in the middle. blends: make clips of real media, too, from the same frames:
    the kinds of `clips.LABELS` in `recipe`, or for one frame, which has no time, `real` and `blend`.

    table: a row per clip: item_id, kind ("medium": the medium itself), version, label, known (whether one knows where
    it was blended), dataset and group_id if the rows have them, frames (their number), start and end (numbers of the
    first and the last frame).
    """

    def __init__(
        self, store: CropStore, rows: pd.DataFrame, size: int, frames: int = 12, versions: int = 2, seed: int = 0,
        recipe: str = "smooth", blends: bool = True,
    ):  # fmt: skip
        if rows.empty:
            raise ValueError("there are no crops to make clips of")
        self.maker = Maker(store, size, seed, recipe)
        self.rows = rows.sort_values(["item_id", "frame"], ignore_index=True)
        self.frames, self.versions, self.blends = frames, versions, blends
        self.entries = list(self._plan())
        self.table = _table(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def clip(self, i: int) -> dict:
        """Clip number i; see `Maker.make`."""
        return self.maker.make(self.entries[i])

    def _plan(self) -> Iterator[Entry]:
        rows = self.rows.to_dict("records")
        for name, where in self.rows.groupby("item_id", sort=True).indices.items():
            records = [rows[i] for i in where]
            for version in range(self.versions) if self.versions else [FIXED]:
                rng = sbi.sample_rng(self.maker.seed, f"{name} frames", 0, version)
                used = [records[k] for k in positions(len(records), self.frames, version, rng)]
                yield Entry(used, MEDIUM, version)
                if self.blends and version != FIXED and used[0]["label"] == 0:
                    for pair in clips.PAIRS if len(used) > 1 else clips.PAIRS[:1]:
                        yield from (Entry(used, kind, version) for kind in pair)


def positions(count: int, frames: int, version: int, rng: np.random.Generator) -> np.ndarray:
    """Which of `count` crops in order make a clip of at most `frames`: int[T], rising. See `Clips`."""
    if count <= frames:
        return np.arange(count)
    if version == FIXED:
        return (count - frames) // 2 + np.arange(frames)
    if version % 2:
        return ((np.arange(frames) + rng.random()) * count / frames).astype(int)
    stride = int(rng.choice([step for step in STRIDES if (frames - 1) * step < count]))
    start = int(rng.integers(count - (frames - 1) * stride))
    return start + stride * np.arange(frames)


def _table(entries: list[Entry]) -> pd.DataFrame:
    kept = [name for name in ("dataset", "group_id") if name in entries[0].records[0]]
    return pd.DataFrame(
        [
            {"item_id": entry.records[0]["item_id"], "kind": entry.kind, "version": entry.version}
            | {"label": entry.label, "known": entry.known}
            | {name: entry.records[0][name] for name in kept}
            | {"frames": len(entry.records), "start": entry.records[0]["frame"], "end": entry.records[-1]["frame"]}
            for entry in entries
        ]
    )
