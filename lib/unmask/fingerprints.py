"""Camera fingerprints of media: decoded, with the face kept apart from the background, one file per medium.

Every medium gets a row, failures too. Pixels stay in sensor geometry: nothing is turned, scaled or searched, and media
of another size or orientation never meet in one comparison.
"""

import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from safetensors import SafetensorError
from safetensors.numpy import load, save

from unmask import prnu
from unmask.data.frames import as_stored, crop_origin
from unmask.data.video import Clip, MediaError, read_frames
from unmask.profile import digest, source_hash, write_atomic
from unmask.progress import track

REGIONS = ("background", "face", "lower")  # lower: the face below the base of the nose, which most forgeries redraw
LOWER = slice(2, 15)  # of the 68 landmarks: the jaw from cheek to cheek
THUMBNAIL = 16  # pixels a side of the picture that stands for the scene
GROW = 1.35  # the background begins outside the face's hull enlarged by this factor about its centre
# Weight of a frame by its H.264 quantiser: the share of the pattern that survives (after Altinisik et al., 2019).
QP_WEIGHTS = ((1, 1.64), (11, 1.41), (16, 1.0), (20, 0.46), (23, 0.32), (26, 0.23), (28, 0.18), (32, 0.14), (33, 0.1),
              (42, 0.1), (51, 0.0))  # fmt: skip
SOURCE = source_hash(prnu, sys.modules[__name__])
COLUMNS = ("item_id", "path", "status", "reason", "bucket", "frames", "height", "width", "face", "seconds")


@dataclass(frozen=True)
class Settings:
    """How fingerprints are taken: the profile's `cameras` keys that matter here."""

    frames: int  # per video, evenly spaced
    crop: int  # the centre of the frame, pixels
    sigma: float  # of the denoiser, grey levels
    keyframes: bool = False  # I frames only
    qp_weighting: bool = False
    deadline: float = 60.0


@dataclass(frozen=True)
class Medium:
    """One medium: its path, and where its face is, `hulls` float32[T,K,2] in pixels of the displayed frames int[T]."""

    item_id: str
    path: str
    frames: tuple[int, ...] = ()
    hulls: np.ndarray | None = None


def face_hulls(
    index: pd.DataFrame, crop_size: int, align: bool = False
) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """Landmarks of a crop index in displayed source pixels: item_id -> (frames, float32[T,68,2]).

    `crop_size` is the side of a crop in pixels. Empty for aligned crops, which have been turned. Inverts the map of
    `unmask.preprocessing.crop_face`.
    """
    found = {}
    if align:
        return found
    for item, rows in index.sort_values(["item_id", "frame"]).groupby("item_id", sort=True):
        points = np.stack([np.asarray(p, np.float32).reshape(-1, 2)[:68] for p in rows["landmarks"]])
        origin = np.round(rows[["x0", "y0"]].to_numpy(np.float32))[:, None]
        side = np.round(rows["x1"].to_numpy(np.float32) - rows["x0"].to_numpy(np.float32))[:, None, None]
        found[item] = tuple(rows["frame"].tolist()), (points + 0.5) * side / crop_size - 0.5 + origin
    return found


def region_masks(medium: Medium, clip: Clip, origin: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Which pixels of each frame of `clip` belong to which of REGIONS, bool[T,3,H,W].

    The frames are as stored, `origin` (y, x) is the corner of their crop; faces are where they are when displayed.
    Between located frames the face moves in a straight line. Without a face all is background.
    """
    count, height, width = clip.frames.shape[:3]
    masks = np.zeros((count, len(REGIONS), height, width), bool)
    masks[:, 0] = True
    if medium.hulls is None:
        return masks
    flat = medium.hulls.reshape(len(medium.hulls), -1)
    between = np.stack([np.interp(clip.indices, medium.frames, column) for column in flat.T], 1)

    def filled(points: np.ndarray) -> np.ndarray:
        stored = as_stored(points, clip.orientation, clip.height, clip.width) - (origin[1], origin[0])
        plane = np.zeros((height, width), np.uint8)
        cv2.fillConvexPoly(plane, np.round(cv2.convexHull(stored.astype(np.float32))).astype(np.int32), 1)
        return plane.astype(bool)

    for mask, points in zip(masks, between.reshape(count, -1, 2), strict=True):
        hull = cv2.convexHull(points.astype(np.float32))[:, 0]
        centre = hull.mean(0)
        wide = centre + GROW * (hull - centre)
        wide[:, 1] -= np.where(wide[:, 1] < centre[1], 0.35 * np.ptp(hull[:, 1]), 0)  # landmarks end at the brows
        mask[0], mask[1], mask[2] = ~filled(wide), filled(points), filled(points[LOWER])
    return masks


def frame_weights(qp: np.ndarray) -> np.ndarray:
    """How much a frame of H.264 quantiser `qp` float[T] counts, float[T]; 1 where it is unknown."""
    steps, weights = zip(*QP_WEIGHTS, strict=True)
    return np.where(np.isnan(qp), 1.0, np.interp(np.nan_to_num(qp), steps, weights))


def process(medium: Medium, target: Path, settings: Settings) -> dict:
    """Take the fingerprints of one medium, write them to `target`, and return its row; failures become rows too."""
    start = time.monotonic()
    torch.set_num_threads(1)  # sums depend on it, so always one
    cv2.setNumThreads(1)
    row = dict.fromkeys(COLUMNS, 0) | {"item_id": medium.item_id, "path": medium.path, "reason": "", "bucket": ""}
    try:
        clip = read_frames(
            medium.path, settings.frames, settings.deadline,
            upright=False, crop=settings.crop or None, keyframes=settings.keyframes, qp=settings.qp_weighting,
        )  # fmt: skip
        height, width = clip.frames.shape[1:3]
        origin = crop_origin(clip.height, clip.width, settings.crop) if settings.crop else (0, 0)
        total = prnu.Accumulator(height, width, len(REGIONS), settings.sigma, best_device())
        weights = frame_weights(clip.qp) if settings.qp_weighting else None
        total.add(clip.frames, region_masks(medium, clip, origin), weights)
        patterns, valid = total.fingerprints(), total.valid
        scene = cv2.resize(clip.frames.mean(0, dtype=np.float32), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        parts = {"pattern": patterns.astype(np.float16), "valid": np.packbits(valid), "scene": scene.astype(np.float16)}
        write_atomic(target, save(parts))
        row |= {"status": "ok", "bucket": f"{clip.width}x{clip.height}", "frames": len(clip.frames)}
        row |= {"height": height, "width": width, "face": int(valid[1].sum())}
    except (MediaError, OSError, ValueError) as error:
        row |= {"status": "failed", "reason": str(error)}
    return row | {"seconds": round(time.monotonic() - start, 3)}


def best_device() -> str:
    """Where arrays are computed: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _stamp(medium: Medium, settings: Settings) -> str:
    """Changes with the file, the face and the settings, so that only changed media are processed again."""
    try:
        stat = os.stat(medium.path)
        size = [stat.st_size, stat.st_mtime_ns]
    except OSError:
        size = []
    face = "" if medium.hulls is None else hashlib.sha256(np.ascontiguousarray(medium.hulls).tobytes()).hexdigest()
    return digest([medium.path, size, list(medium.frames), face, asdict(settings), SOURCE])


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _keep(medium: Medium, out: Path, settings: Settings, stamp: str) -> dict:
    """`process`, unless the same medium was processed with the same settings before."""
    note, target = out / f"{medium.item_id}.json", out / f"{medium.item_id}.safetensors"
    if note.exists():
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["stamp"] == stamp and kept["bytes"] == _size(target):
            return kept["row"]
    target.unlink(missing_ok=True)
    row = process(medium, target, settings)
    # Last: a note means that the fingerprint is whole.
    write_atomic(note, json.dumps({"stamp": stamp, "bytes": _size(target), "row": row}))
    return row


def extract(media: Sequence[Medium], out: str | os.PathLike, settings: Settings, workers: int = 1) -> pd.DataFrame:
    """Fingerprints of all media in the folder `out`; returns one row per medium, in their order, failures too.

    Columns are COLUMNS; `bucket` is the frame size, and only media of one bucket may be compared. Stopped at any point,
    the same call goes on where it was. On a GPU the media are done in turn, on a CPU by `workers` processes.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = 1 if best_device() == "cuda" else workers
    tasks = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(_keep)(medium, out, settings, _stamp(medium, settings)) for medium in media
    )
    return pd.DataFrame(list(track(tasks, len(media), "fingerprints")), columns=list(COLUMNS))


class FingerprintError(RuntimeError):
    """Stored fingerprints cannot be used; the message says what to do."""


def _read(out: str | os.PathLike, item: str) -> dict[str, np.ndarray]:
    path = Path(out) / f"{item}.safetensors"
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise FingerprintError(f"The fingerprint {path.name} is missing or damaged; run the chapter again.") from error


def read_patterns(
    out: str | os.PathLike, rows: pd.DataFrame, region: str = "background"
) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints float32[N,H,W] of the `ok` rows of one bucket, and the pixels that count, bool[N,H,W].

    Raises FingerprintError if one is missing or damaged.
    """
    height, width = (int(rows[side].iloc[0]) for side in ("height", "width"))
    r = REGIONS.index(region)
    patterns = np.empty((len(rows), height, width), np.float32)
    valid = np.empty((len(rows), height, width), bool)
    for i, item in enumerate(rows["item_id"]):
        parts = _read(out, item)
        patterns[i] = parts["pattern"][r]
        valid[i] = np.unpackbits(parts["valid"], count=len(REGIONS) * height * width).reshape(-1, height, width)[r]
    return patterns, valid


def read_scenes(out: str | os.PathLike, rows: pd.DataFrame) -> np.ndarray:
    """The mean frame of every medium as a thumbnail in grey levels, float32[N,16,16,3]."""
    return np.stack([_read(out, item)["scene"] for item in rows["item_id"]]).astype(np.float32)


def write_rows(rows: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a table, such as that of `extract`, as Parquet, atomically."""
    buffer = io.BytesIO()
    rows.to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue())


def media_of(manifest: pd.DataFrame, paths: Sequence[str | os.PathLike], hulls: Mapping) -> list[Medium]:
    """The media of manifest rows, with their faces where `hulls` (see `face_hulls`) knows them."""
    return [
        Medium(item, str(path), *hulls.get(item, ((), None)))
        for item, path in zip(manifest["item_id"], paths, strict=True)
    ]
