"""A test set that only time can tell apart: a face moved or brightened alike in all frames, or anew in each.

Of every real video three twins are written. In each frame the face is replaced by a copy of itself that is moved by a
displacement d and brightened by a gain g:

- `steady` (label 0): one d and one g, drawn once for the clip;
- `jitter` (label 1): d drawn anew for every frame from the same distribution, g the steady twin's;
- `flicker` (label 1): g drawn anew for every frame from the same distribution, d the steady twin's.

d and g are independent, so in any single frame of any twin the pair has the same distribution: by construction no
detector that judges frame by frame can tell the twins apart, only one that compares frames. That would not survive an
encoder that predicts frames from each other, since it spends more on a face that trembles; every frame is therefore
encoded on its own. All else is equal within a triplet: frames, mask, landmarks and encoder settings.

Limits: the steady twin is forged, too. Label 0 means "steady over time" here, and only scores within this set compare.
"""

import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from unmask.data import faces, forgeries, frames, manifest, video
from unmask.profile import digest, source_hash, write_atomic
from unmask.progress import track

DATASET = "temporal"
TWINS = {"steady": 0, "jitter": 1, "flicker": 1}
"""Label of each twin. In the manifest the steady twin's method is `real`, as a manifest demands of label 0."""
SHIFT = (0.01, 0.02)
"""Length of a displacement as a share of the face's width, uniform between these; its direction is uniform, too."""
GAIN = 0.03
"""Gains are uniform between 1 - GAIN and 1 + GAIN."""
SHRINK, FEATHER = 0.95, 0.03
"""The mask: the outline's hull, shrunk by this factor and blurred by this share of the face's width."""
CRF = 17
"""H.264 quality of all twins, each frame a key frame."""
LONGEST = 96
"""Frames of a twin at most, in a row from the middle of the original."""
MAX_SIDE = 1920
"""Pixels; larger originals are shrunk to this."""


def draw(rng: np.random.Generator, count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is done to the `count` frames of each twin: shifts float64[T,2] in widths of the face, gains float64[T]."""
    length, angle = rng.uniform(*SHIFT, count + 1), rng.uniform(0, 2 * np.pi, count + 1)
    shifts = length[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    gains = rng.uniform(1 - GAIN, 1 + GAIN, count + 1)
    # The first draw is for the whole clip, the others are for one frame each.
    still, even = np.repeat(shifts[:1], count, 0), np.repeat(gains[:1], count)
    return {"steady": (still, even), "jitter": (shifts[1:], even), "flicker": (still, gains[1:])}


def replace_face(frame: np.ndarray, points: np.ndarray, shift: np.ndarray, gain: float, width: float) -> np.ndarray:
    """The frame uint8[H,W,3] with its face replaced by a copy moved by `shift` (x, y in pixels) and times `gain`.

    points: float[81,2]; width: of the face, in pixels, for the feather. Unchanged where the mask is 0.
    """
    feather = FEATHER * width
    reach = 4 * feather + np.abs(shift).max() + 2
    x0, y0 = np.maximum(np.floor(points.min(0) - reach), 0).astype(int)
    x1, y1 = np.maximum(np.ceil(points.max(0) + reach), 1).astype(int)
    part = frame[y0:y1, x0:x1].astype(np.float32)
    if not part.size:
        return frame
    height, breadth = part.shape[:2]
    outline = (points - [x0, y0])[forgeries.FACE]
    mask = forgeries.soft_hull(outline, max(height, breadth), SHRINK, feather)[:height, :breadth, None]
    move = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float64)
    copy = cv2.warpAffine(part, move, (breadth, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    out = frame.copy()
    out[y0:y1, x0:x1] = np.clip(np.round(part + mask * (gain * copy - part)), 0, 255)
    return out


def twin(clip: np.ndarray, landmarks: np.ndarray, shifts: np.ndarray, gains: np.ndarray) -> Iterator[np.ndarray]:
    """Frames of a twin. clip: uint8[T,H,W,3]; landmarks: float[T,81,2], NaN without a face: such frames stay."""
    width = float(np.nanmedian(np.ptp(landmarks[..., 0], axis=1)))
    for frame, points, shift, gain in zip(clip, landmarks, shifts * width, gains, strict=True):
        yield replace_face(frame, points, shift, gain, width) if np.isfinite(points).all() else frame


def _read(row: dict, source: Path, locator: str) -> tuple[video.Clip, np.ndarray]:
    """The clip of a manifest row and landmarks float32[T,81,2] in its pixels. Raises MediaError or LocatorError."""
    clip = video.read_frames(manifest.media_path(row, source), LONGEST, max_side=MAX_SIDE, sampling="dense")
    if row["annotations"]:
        path = manifest.media_path(row, source, "annotations")
        finder = faces.build_locator(faces.AnnotationLocator.name, path=path, scale=clip.scale)
    else:
        finder = faces.build_locator(locator)
    found = [finder.locate(frame, int(i)) for frame, i in zip(clip.frames, clip.indices, strict=True)]
    points = faces.landmarks_of(faces.track(found))
    landmarks = np.stack([np.full((81, 2), np.nan, np.float32) if p is None else p for p in points])
    if np.isfinite(landmarks[:, 0, 0]).sum() < 2:
        raise frames.MediaError("fewer than two frames with a face")
    return clip, landmarks


def _forget(part: Path, out: Path) -> None:
    """Remove the twins that a part tells of, and the part."""
    if part.exists():
        for row in json.loads(part.read_text())["rows"]:
            for column in ("path", "annotations"):
                (out / row[column]).unlink(missing_ok=True)
        part.unlink()


def _make(row: dict, source: Path, out: Path, seed: int, locator: str) -> str:
    """Write the twins of one video; returns "" or why there are none. The part, last, tells that they are whole."""
    item = row["item_id"]
    part = out / ".parts" / f"{item}.json"
    media = [manifest.media_path(row, source, c) for c in ("path", "annotations") if row[c]]
    stamps = [(p.stat().st_size, p.stat().st_mtime_ns) for p in media if p.exists()]
    used = source_hash(forgeries, video, frames, faces, sys.modules[__name__])
    key = digest([row, stamps, seed, locator, used])
    if part.exists() and (kept := json.loads(part.read_text()))["key"] == key:
        if all((out / r[column]).exists() for r in kept["rows"] for column in ("path", "annotations")):
            return ""
    _forget(part, out)
    cv2.setNumThreads(1)
    try:
        clip, landmarks = _read(row, source, locator)
    except (frames.MediaError, faces.LocatorError) as error:
        return str(error)
    annotations, buffer = f"annotations/{item}.npz", io.BytesIO()
    np.savez_compressed(buffer, landmarks=landmarks.astype(np.float32))
    write_atomic(out / annotations, buffer.getvalue())
    height, width = (side // 2 * 2 for side in clip.frames.shape[1:3])  # as 4:2:0 demands
    pictures, rows = clip.frames[:, :height, :width], []
    for name, (shifts, gains) in draw(np.random.default_rng([seed, int(item, 16)]), len(pictures)).items():
        # The name is a hash, so neither it nor the order of the manifest tells the label.
        path = f"videos/{hashlib.sha256(f'{seed}/{item}/{name}'.encode()).hexdigest()[:12]}.mp4"
        video.encode(out / path, twin(pictures, landmarks, shifts, gains), clip.fps, CRF, gop=1, bframes=0)
        new = {"path": path, "dataset": DATASET, "item_id": manifest.item_id(DATASET, path), "root": ".",
               "label": TWINS[name], "method": name if TWINS[name] else "real", "annotations": annotations}  # fmt: skip
        rows.append(row | new)
    write_atomic(part, json.dumps({"key": key, "rows": rows}))
    return ""


def make(
    source: str | os.PathLike,
    out: str | os.PathLike,
    split: str = "test",
    seed: int = 0,
    workers: int = 1,
    locator: str = "yunet",
) -> Path:
    """Write the twins of all real videos of a split into the folder `out`; returns the path of their manifest.

    source: path of a manifest. Faces are where its annotations say, else where `locator` finds them. The new rows keep
    split, subject, group_id and camera; the annotations of a triplet are one file, so that crops are cut alike. The
    same seed gives the same bytes for any `workers`; an interrupted run goes on where it was, and media or settings
    that changed are done again. Videos without a readable face are left out and counted on stderr. Raises ManifestError
    for a broken manifest or if no video is left.
    """
    source, out = Path(source), Path(out)
    df = manifest.read_manifest(source)
    chosen = df[(df["split"] == split) & (df["label"] == 0) & (df["kind"] == "video")].to_dict("records")
    for folder in ("videos", "annotations", ".parts"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    tasks = Parallel(n_jobs=workers, return_as="generator")(
        delayed(_make)(row, source.absolute(), out, seed, locator) for row in chosen
    )
    faults = list(track(tasks, len(chosen), "temporal test set, videos"))
    for reason, count in Counter(filter(None, faults)).items():
        print(f"{count} of {len(chosen)} real videos left out: {reason}.", file=sys.stderr)
    parts = [out / ".parts" / f"{row['item_id']}.json" for row, why in zip(chosen, faults, strict=True) if not why]
    for old in set((out / ".parts").glob("*.json")) - set(parts):
        _forget(old, out)
    rows = [row for part in parts for row in json.loads(part.read_text())["rows"]]
    table = pd.DataFrame(rows, columns=list(manifest.COLUMNS)).astype({"label": "int8"})
    manifest.write_manifest(table.sort_values("path"), out / "manifest.parquet")
    return out / "manifest.parquet"
