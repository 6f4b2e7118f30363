"""Face geometry: the 68 iBUG points, a canonical face to lift sparse points onto, the forehead, and stable boxes.

All points are (x, y) in pixels with y downwards. "Right" and "left" are the subject's: the right eye is on image left.
Five points are ordered right eye, left eye, nose tip, right mouth corner, left mouth corner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A symmetric mean face in units of the distance between the eye centres, origin between the eyes. Only the points
# on image left and on the mid-line are written down (index: x, y); the others are their mirror images. Proportions
# follow adult anthropometry (face width 2.2, eyes to chin 1.8 eye distances).
_HALF_FACE = {
    0: (-1.12, 0.02), 1: (-1.10, 0.33), 2: (-1.05, 0.63), 3: (-0.97, 0.93), 4: (-0.83, 1.20), 5: (-0.64, 1.44),
    6: (-0.42, 1.63), 7: (-0.20, 1.75), 8: (0.0, 1.80),
    17: (-0.92, -0.27), 18: (-0.76, -0.41), 19: (-0.57, -0.44), 20: (-0.38, -0.40), 21: (-0.20, -0.32),
    27: (0.0, -0.02), 28: (0.0, 0.20), 29: (0.0, 0.42), 30: (0.0, 0.63),
    31: (-0.25, 0.78), 32: (-0.13, 0.82), 33: (0.0, 0.85),
    36: (-0.72, 0.01), 37: (-0.60, -0.09), 38: (-0.41, -0.09), 39: (-0.27, 0.02), 40: (-0.41, 0.07), 41: (-0.59, 0.08),
    48: (-0.42, 1.12), 49: (-0.27, 1.04), 50: (-0.11, 1.00), 51: (0.0, 1.02),
    57: (0.0, 1.30), 58: (-0.12, 1.28), 59: (-0.28, 1.22),
    60: (-0.35, 1.12), 61: (-0.12, 1.09), 62: (0.0, 1.10), 66: (0.0, 1.17), 67: (-0.12, 1.16),
}  # fmt: skip

# MIRROR_68[i] is the point that i becomes when the picture is flipped left to right.
MIRROR_68 = np.array(
    [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, 35, 34, 33, 32, 31]
    + [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    + [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
)


def _canonical_face() -> np.ndarray:
    points = np.zeros((68, 2))
    for i, (x, y) in _HALF_FACE.items():
        points[i] = x, y
        points[MIRROR_68[i]] = -x, y
    return points


CANONICAL_68 = _canonical_face()


def five_points(landmarks: np.ndarray) -> np.ndarray:
    """Reduce 68 or 81 points float[K,2] to float64[5,2]: eye centres, nose tip, mouth corners."""
    lm = np.asarray(landmarks, np.float64)
    return np.stack([lm[36:42].mean(0), lm[42:48].mean(0), lm[30], lm[48], lm[54]])


def fit_affine(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least-squares affine map float64[2,3] that takes source points float[K,2] to target points float[K,2]."""
    homogeneous = np.column_stack([source, np.ones(len(source))])
    return np.linalg.lstsq(homogeneous, target, rcond=None)[0].T


def fit_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least-squares similarity float64[2,3] (rotation, scale, shift; no mirror image), Umeyama 1991.

    Written with complex numbers: target = a * source + b for one complex a, b.
    """
    s, t = (np.asarray(p, np.float64) @ np.array([1, 1j]) for p in (source, target))
    centred = s - s.mean()
    a = np.vdot(centred, t) / np.vdot(centred, centred)
    b = t.mean() - a * s.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def lift(points: np.ndarray) -> np.ndarray:
    """Lift 5 points float[5,2] to 68 float32[68,2] by fitting the canonical face to them.

    The fit is affine, so that a turned head gets a narrower face; where that would squash or mirror the face beyond
    what a head turn explains (stretch ratio above 2.5), a similarity is used.
    """
    points = np.asarray(points, np.float64)
    source = five_points(CANONICAL_68)
    matrix = fit_affine(source, points)
    stretch = np.linalg.svd(matrix[:, :2], compute_uv=False)
    if np.linalg.det(matrix[:, :2]) <= 0 or stretch[0] > 2.5 * stretch[1]:
        matrix = fit_similarity(source, points)
    return (CANONICAL_68 @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)


def forehead(landmarks: np.ndarray) -> np.ndarray:
    """Extend 68 points float[68,2] to 81 float32[81,2] with 13 points on the hairline.

    Points 68 to 80 run along the contour from the subject's right temple (image left) to the left one: half an
    ellipse over the jaw ends, as high above the brows as 0.9 of the distance from nose base to brows (the rule of
    thirds of the face).
    """
    lm = np.asarray(landmarks, np.float64)
    centre, half_width = (lm[0] + lm[16]) / 2, (lm[16] - lm[0]) / 2
    brows = (lm[19] + lm[24]) / 2
    height = brows + 0.9 * (brows - lm[33]) - centre
    angle = np.pi * np.arange(1, 14)[:, None] / 14
    arc = centre - np.cos(angle) * half_width + np.sin(angle) * height
    return np.concatenate([lm, arc]).astype(np.float32)


def full_landmarks(points: np.ndarray) -> np.ndarray:
    """Bring 5, 68 or 81 points float[K,2] to float32[81,2]. Raises ValueError for any other number."""
    points = np.asarray(points, np.float32)
    if points.shape == (5, 2):
        points = lift(points)
    if points.shape == (68, 2):
        points = forehead(points)
    if points.shape != (81, 2):
        raise ValueError(f"Faces need 5, 68 or 81 points (x, y); got an array of shape {points.shape}.")
    return points


def bounding_box(points: np.ndarray) -> np.ndarray:
    """Smallest box x0, y0, x1, y1 float32[4] around points float[K,2]."""
    return np.concatenate([points.min(0), points.max(0)]).astype(np.float32)


def eye_angle(landmarks: np.ndarray) -> float:
    """Angle in radians of the line between the eyes of 68 or 81 points; 0 is level, positive turns clockwise."""
    right, left = five_points(landmarks)[:2]
    return float(np.arctan2(left[1] - right[1], left[0] - right[0]))


def stabilised_box(
    landmarks: Sequence[np.ndarray | None], margin: float, pts: np.ndarray | None = None, sigma: float = 0.1
) -> np.ndarray:
    """Square face boxes float32[T,4] (x0, y0, x1, y1) that do not jitter; NaN where a frame has no landmarks.

    The side is the clip's median face size plus `margin` (a share of the face) on each side, larger only where a face
    would not fit. The centre is smoothed over time by a Gaussian of `sigma` seconds: neighbouring frames steady each
    other, frames a second apart keep their own centre. `pts` float[T] are the times; None means 25 frames per second.
    """
    boxes = np.full((len(landmarks), 4), np.nan, np.float32)
    found = np.array([i for i, lm in enumerate(landmarks) if lm is not None], int)
    if len(found) == 0:
        return boxes
    faces = np.stack([bounding_box(landmarks[i]) for i in found]).astype(np.float64)
    times = found / 25 if pts is None else np.asarray(pts, np.float64)[found]
    weights = np.exp(-0.5 * ((times[:, None] - times[None]) / sigma) ** 2)
    centres = weights @ ((faces[:, :2] + faces[:, 2:]) / 2) / weights.sum(1, keepdims=True)
    own = (faces[:, 2:] - faces[:, :2]).max(1)
    half = np.maximum(np.median(own) * (1 + 2 * margin), own)[:, None] / 2
    boxes[found] = np.concatenate([centres - half, centres + half], 1)
    return boxes
