"""Chapter 1: from media to face crops. Decode, locate, track, align, crop; one row per item, whatever happens."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from joblib.externals.loky import ProcessPoolExecutor

from unmask.data.crops import (
    ITEMS_SCHEMA,
    MOST_SHARDS,
    SAMPLING_BEFORE,
    CropError,
    CropStore,
    CropWriter,
    collate,
    encode_crop,
    read_items,
    read_shard,
    to_table,
)
from unmask.data.decoding import TOO_LARGE
from unmask.data.faces import AnnotationLocator, FaceLocator, LocatorError, build_locator, landmarks_of, track
from unmask.data.frames import check_sampling
from unmask.data.journals import healed, name_shards, state_of
from unmask.data.landmarks import eye_angle, stabilised_box
from unmask.data.manifest import ManifestError, media_path, read_manifest
from unmask.data.video import Clip, MediaError, read_frames
from unmask.machine import end_with_parent, writing
from unmask.profile import write_atomic
from unmask.progress import track as progress

MIN_SIDE = 16  # pixels; less is no picture of a face
MAX_SIDE = 1920  # pixels; larger frames are shrunk as they are decoded
DEATHS = 2  # of workers that the same item may cost: one may be an accident
DIED = "worker process died (killed or out of memory)"
OF_THE_MACHINE = (DIED, TOO_LARGE, "decoder crashed (SIGKILL)")
"""Reasons that another time, or another machine, may not have: items that failed so are tried again."""
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


@dataclass(frozen=True)
class Settings:
    """All that decides what the crops look like; kept in settings.json beside them. `shards` is their number."""

    locator: str
    locator_hash: str
    frames: int
    size: int
    margin: float
    align: bool
    deadline: float
    encoding: str
    shards: int
    max_side: int = MAX_SIDE
    version: int = 1
    sampling: str = "uniform"
    fps: float = 0.0


@dataclass(frozen=True)
class Item:
    """One medium to process: `media` and `annotations` are paths ("" if none); `fault` is a reason not to try."""

    item_id: str
    media: str
    annotations: str
    fault: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Identity and fingerprint: sizes and times of the files, so that changed media are processed again."""
        return self.item_id, state_of(*filter(None, (self.media, self.annotations)))


@dataclass(frozen=True)
class Result:
    """What `process_item` returns: the item's row and its crops (index columns but the shard's, and `data`)."""

    row: dict
    crops: list[dict]


class _Reject(Exception):
    """An item that cannot be used; the message is the reason."""


def crop_face(frame: np.ndarray, box: np.ndarray, size: int, angle: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Cut a square box float[4] out of uint8[H,W,3], turned by `angle` radians about its centre, resized to `size`.

    Returns the crop uint8[size,size,3] and the map float64[2,3] from frame to crop pixels. Parts of the box outside
    the frame are black. Shrinking averages areas, so nothing aliases.
    """
    x0, y0 = np.round(box[:2]).astype(int)
    side = max(int(round(float(box[2] - box[0]))), 1)
    if angle:
        centre = (x0 + (side - 1) / 2, y0 + (side - 1) / 2)
        turn = cv2.getRotationMatrix2D(centre, np.degrees(angle), 1.0)
        turn[:, 2] -= x0, y0
        cut = cv2.warpAffine(frame, turn, (side, side), flags=cv2.INTER_LINEAR)
    else:
        turn = np.array([[1.0, 0, -x0], [0, 1.0, -y0]])
        cut = np.zeros((side, side, 3), np.uint8)
        height, width = frame.shape[:2]
        left, top, right, bottom = max(x0, 0), max(y0, 0), min(x0 + side, width), min(y0 + side, height)
        if left < right and top < bottom:
            cut[top - y0 : bottom - y0, left - x0 : right - x0] = frame[top:bottom, left:right]
    zoom = size / side
    crop = cv2.resize(cut, (size, size), interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)
    # Pixel centres are whole numbers: crop = (frame + 0.5) * zoom - 0.5.
    turn = turn * zoom
    turn[:, 2] += 0.5 * zoom - 0.5
    return crop, turn


@lru_cache(maxsize=1)
def _worker_locator(name: str) -> FaceLocator:
    return build_locator(name)


def _locator_for(item: Item, name: str, clip: Clip) -> FaceLocator:
    if name != AnnotationLocator.name:
        return _worker_locator(name)
    if not item.annotations:
        raise _Reject("no annotations in the manifest")
    return build_locator(name, path=item.annotations, scale=clip.scale)


def _crops(item: Item, clip: Clip, settings: Settings) -> list[dict]:
    """Locate, track and cut one clip."""
    locator = _locator_for(item, settings.locator, clip)
    found = [locator.locate(frame, int(i)) for frame, i in zip(clip.frames, clip.indices, strict=True)]
    landmarks = landmarks_of(track(found))
    boxes = stabilised_box(landmarks, settings.margin, clip.pts)
    crops = []
    for t, points in enumerate(landmarks):
        if points is None:
            continue
        angle = eye_angle(points) if settings.align else 0.0
        image, matrix = crop_face(clip.frames[t], boxes[t], settings.size, angle)
        x0, y0, x1, y1 = (boxes[t] / clip.scale).tolist()
        inside = points.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]
        crops.append({
            "item_id": item.item_id, "frame": int(clip.indices[t]), "pts": float(clip.pts[t]),
            "x0": x0, "y0": y0, "x1": x1, "y1": y1, "landmarks": inside.round(3).ravel().tolist(),
            "locator": locator.name, "locator_hash": locator.hash, "data": encode_crop(image, settings.encoding),
        })  # fmt: skip
    return crops


def process_item(item: Item, settings: Settings) -> Result:
    """Process one item; a pure function of the files and settings. Failures become a row with a reason."""
    start = time.monotonic()
    row = {"item_id": item.item_id, "status": "failed", "reason": item.fault, "frames": 0, "faces": 0, "decoder": ""}
    crops: list[dict] = []
    try:
        if item.fault:
            raise _Reject(item.fault)
        sampling = {"sampling": settings.sampling, "fps": settings.fps}
        clip = read_frames(item.media, settings.frames, settings.deadline, settings.max_side, **sampling)
        row |= {"frames": len(clip.frames), "decoder": clip.decoder}
        if min(clip.width, clip.height) < MIN_SIDE:
            raise _Reject(f"frame smaller than {MIN_SIDE} pixels")
        crops = _crops(item, clip, settings)
        if not crops:
            raise _Reject("no face found")
        row |= {"status": "ok", "faces": len(crops)}
    except (MediaError, LocatorError, _Reject) as error:
        row["reason"] = str(error)
    except MemoryError:
        row["reason"], crops = TOO_LARGE, []
    except Exception as error:  # The unit of work ends here: one odd item must not end a run of thousands.
        row["reason"] = f"internal error: {type(error).__name__}: {error}"[:200]
        crops = []
    return Result(row | {"seconds": round(time.monotonic() - start, 4)}, crops)


def _failed(item: Item, reason: str) -> Result:
    row = {"item_id": item.item_id, "status": "failed", "reason": reason, "frames": 0, "faces": 0, "decoder": ""}
    return Result(row | {"seconds": 0.0}, [])


def _start_worker() -> None:
    end_with_parent()
    cv2.setNumThreads(1)


class _Worker:
    """A process that does one item at a time, started anew when it has died."""

    def __init__(self):
        self.pool: ProcessPoolExecutor | None = None

    def submit(self, work: Callable, item: Item, settings: Settings) -> Future:
        if self.pool is not None:
            try:
                return self.pool.submit(work, item, settings)
            except BrokenProcessPool:  # killed while it had nothing to do
                self.discard()
        self.pool = ProcessPoolExecutor(1, initializer=_start_worker, env=_ONE_THREAD)
        return self.pool.submit(work, item, settings)

    def discard(self) -> None:
        self.pool.shutdown(wait=False)
        self.pool = None

    def stop(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(kill_workers=True)


def _run(items: list[Item], settings: Settings, workers: int, work: Callable = process_item) -> Iterator[Result]:
    """Results in the order of `items`, from `workers` processes (0: in this one).

    Each process is a pool of its own with one item at a time, so that a death names the item that caused it and
    costs no other; the item is tried again in a new process, and failed after DEATHS of them. At most 16 items per
    worker run ahead of the first unfinished one.
    """
    if workers == 0:
        yield from (work(item, settings) for item in items)
        return
    all_workers = [_Worker() for _ in range(min(workers, len(items)))]
    running: dict[Future, tuple[_Worker, int]] = {}
    ready: dict[int, Result] = {}
    deaths: Counter[int] = Counter()
    idle, again, head, following = list(all_workers), [], 0, 0
    try:
        while head < len(items):
            while idle and (again or following < min(len(items), head + 16 * workers)):
                if not again:
                    again.append(following)
                    following += 1
                worker, i = idle.pop(), again.pop()
                running[worker.submit(work, items[i], settings)] = worker, i
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, i = running.pop(future)
                idle.append(worker)
                try:
                    ready[i] = future.result()
                except BrokenProcessPool:
                    worker.discard()
                    deaths[i] += 1
                    if deaths[i] < DEATHS:
                        again.append(i)
                    else:
                        ready[i] = _failed(items[i], DIED)
            while head in ready:
                yield ready.pop(head)
                head += 1
    finally:
        for worker in all_workers:
            worker.stop()


def _items(manifest: pd.DataFrame, manifest_path: Path) -> list[Item]:
    items = []
    for row in manifest.to_dict("records"):
        fault = media = annotations = ""
        try:
            media = str(media_path(row, manifest_path).absolute())
            if row["annotations"]:
                annotations = str(media_path(row, manifest_path, "annotations").absolute())
        except ManifestError as error:
            fault = str(error)
        items.append(Item(row["item_id"], media, annotations, fault))
    return items


def _holds(path: Path, settings: Settings) -> bool:
    """Whether a settings.json says the same, sampling as it was before there was a choice included."""
    try:
        return SAMPLING_BEFORE | json.loads(path.read_text(encoding="utf-8")) == asdict(settings)
    except (OSError, ValueError, TypeError):
        return False


def _prepare(out: Path, settings: Settings) -> None:
    """Make the folder fit the settings: crops made with other settings are discarded, never mixed.

    CropError if nothing but the number of shards is another: what an array did is not lost by a mistyped number.
    """
    path, wanted = out / "settings.json", json.dumps(asdict(settings), indent=1, sort_keys=True) + "\n"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "settings.lock", "w")
    # Jobs of one array start together: only the first may discard, the others find its settings.
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _holds(path, settings):
            return
        old = [p for p in (out / "shards").glob("crops-*") if not p.name.endswith(".lock")]
        old += [p for p in (out / "crops.parquet", out / "items.parquet") if p.exists()]
        if old and (made := _shards_of(path, settings)):
            how, give = (f"in {made} shares", f"give --shard I/{made}, ") if made > 1 else ("without --shard", "")
            raise CropError(f"The crops in {out} were made {how}: {give}leave --shard out, or delete the folder.")
        if old:
            print(f"The settings have changed: discarding the earlier crops in {out.name}.", file=sys.stderr)
        for file in old:
            file.unlink()
        write_atomic(path, wanted)


def preprocess(
    manifest_path: str | os.PathLike,
    out: str | os.PathLike,
    locator: str = "annotations",
    frames: int = 8,
    size: int = 160,
    margin: float = 0.3,
    align: bool = False,
    deadline: float = 30.0,
    encoding: str = "png",
    shard: tuple[int, int] | None = None,
    workers: int = 2,
    sampling: str = "uniform",
    fps: float = 0.0,
) -> pd.DataFrame:
    """Cut face crops of all items of a manifest into the folder `out`; returns their items table.

    `frames` per item, spread over the clip (`sampling="uniform"`) or in a row in its middle (`"dense"`, at `fps` frames
    per second, 0 for every frame; see `unmask.data.video.read_frames`); crops of `size` pixels with `margin` (share of
    the face) on each side; `deadline` seconds of decoding per item. `shard=(i, n)` does every n-th item from the i-th
    on, for job arrays; the call that completes the last shard writes crops.parquet and items.parquet, others return
    their own rows and name the shards that are still to do. Without it everything is done, in the shards that an array
    has left in `out`, if any. Stopped at any point, the same call goes on where it was.
    `workers=0` runs in this process. Every item gets a row; raises LocatorError if the locator cannot work at all,
    ManifestError for a broken manifest.
    """
    manifest_path, out = Path(manifest_path), Path(out)
    if shard and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"Shard {shard[0]} of {shard[1]} does not exist; shards count from 0.")
    encode_crop(np.zeros((1, 1, 3), np.uint8), encoding)
    check_sampling(sampling, fps)
    stamp = "" if locator == AnnotationLocator.name else build_locator(locator).hash
    fps = fps if sampling == "dense" else 0.0  # which uniform sampling does not ask for
    settings = Settings(locator, stamp, frames, size, margin, align, deadline, encoding, 1, sampling=sampling, fps=fps)
    settings = replace(settings, shards=shard[1] if shard else _shards_of(out / "settings.json", settings) or 1)
    listed = read_manifest(manifest_path)
    if locator == AnnotationLocator.name and not listed["annotations"].any():
        raise LocatorError("No medium of this manifest has annotations of faces: let --locator yunet find them.")
    _prepare(out, settings)
    numbers = [shard[0]] if shard else range(settings.shards)
    own = {}
    for number in numbers:
        own |= _fill(out, number, _items(listed.iloc[number :: settings.shards], manifest_path), settings, workers)
    now = ((i.item_id, own[i.item_id]) if i.item_id in own else i.key for i in _items(listed, manifest_path))
    to_do = collate(out, settings.shards, now)
    if not to_do:
        return read_items(out)
    print(f"Still to do: {name_shards(to_do, settings.shards)}. The last of them writes the tables.", file=sys.stderr)
    rows = [line["item"] for number in numbers for line in read_shard(out, number, settings.shards)]
    return to_table(rows, ITEMS_SCHEMA)


def _shards_of(path: Path, settings: Settings) -> int | None:
    """In how many shards the crops of this settings.json were made, None if they are not those of `settings`."""
    try:
        made = SAMPLING_BEFORE | json.loads(path.read_text(encoding="utf-8"))
        same = made == asdict(replace(settings, shards=made["shards"])) and 0 < made["shards"] <= MOST_SHARDS
        return made["shards"] if same else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _fill(out: Path, number: int, items: list[Item], settings: Settings, workers: int) -> dict[str, str]:
    """Process the items of one shard that it lacks; returns the keys of all of them."""

    def again(some: list[int]) -> Iterator[str]:
        return (result.row["reason"] for result in _run([items[i] for i in some], settings, workers))

    with CropWriter(out, number, settings.shards) as writer:
        keys = [item.key for item in items]
        reasons = (row["reason"] for row in writer.kept(keys))
        done = writer.resume(keys, healed(reasons, OF_THE_MACHINE, again))
        for i, result in enumerate(progress(_run(items[done:], settings, workers), len(items) - done, "preprocessing")):
            writer.add(keys[done + i], result.row, result.crops, settings.encoding)
        writer.finish()
    return dict(keys)


def failures(items: pd.DataFrame) -> pd.DataFrame:
    """Failed items by reason: columns `reason`, `items` (count) and `share` of all items, most frequent first."""
    counts = items.loc[items["status"] == "failed", "reason"].value_counts()
    table = pd.DataFrame({"reason": counts.index.astype("str"), "items": counts.to_numpy()})
    return table.assign(share=table["items"] / max(len(items), 1))


def contact_sheet(store: CropStore, index: pd.DataFrame, columns: int = 8, cell: int = 96) -> np.ndarray:
    """The crops of `index` in reading order as one picture uint8[rows*cell, columns*cell, 3] RGB."""
    rows = max(-(-len(index) // columns), 1)
    sheet = np.full((rows * cell, columns * cell, 3), 255, np.uint8)
    for k, (_, row) in enumerate(index.iterrows()):
        y, x = cell * (k // columns), cell * (k % columns)
        sheet[y : y + cell, x : x + cell] = cv2.resize(store.image(row), (cell, cell), interpolation=cv2.INTER_AREA)
    return sheet
