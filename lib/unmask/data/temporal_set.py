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

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from unmask.data import derived, forgeries, video
from unmask.profile import source_hash

DATASET = "temporal"
TWINS = {"steady": 0, "jitter": 1, "flicker": 1}
"""Label of each twin. In the manifest the steady twin's method is `real`, as a manifest demands of label 0."""
SHIFT = (0.01, 0.02)
"""Length of a displacement as a share of the face's width, uniform between these; its direction is uniform, too."""
GAIN = 0.03
"""Gains are uniform between 1 - GAIN and 1 + GAIN."""
SHRINK, FEATHER = 0.95, 0.03
"""The mask: the outline's hull, shrunk by this factor and blurred by this share of the face's width."""
ENCODING = {"crf": 17, "gop": 1, "bframes": 0}
"""Of all twins; each frame is a key frame."""


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


def _twins(seed: int, item: str, clip: video.Clip, landmarks: np.ndarray) -> derived.Twins:
    for name, (shifts, gains) in draw(np.random.default_rng([seed, int(item, 16)]), len(clip.frames)).items():
        yield name, TWINS[name], twin(clip.frames, landmarks, shifts, gains)


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
    code = source_hash(forgeries, sys.modules[__name__])
    recipe = derived.Recipe(DATASET, partial(_twins, seed), code, ENCODING, seed, locator)
    return derived.make(Path(source), Path(out), recipe, (split,), workers, "temporal test set")
