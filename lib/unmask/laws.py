"""Pseudo-labels from the texture of eyes and teeth: the first stage of the published unsupervised baseline.

Qiao et al., TPAMI 46(7), 2024, doi 10.1109/TPAMI.2024.3356814, after Matern et al., WACVW 2019 (eyes and teeth of
forgeries lack detail), with the texture energies of Laws, 1980. The published program computes in 8-bit whole numbers,
in which subtracting the local mean wraps round and every response is cut to 0..255; here all of it is float32, as the
method means it.
"""

import cv2
import numpy as np
import pandas as pd
from sklearn.cluster import KMeans

from unmask.hulls import check_face

_VECTORS = {"L": (1, 4, 6, 4, 1), "E": (-1, -2, 0, 2, 1), "S": (-1, 0, 2, 0, -1), "R": (1, -4, 6, -4, 1)}
_PAIRS = ("LE", "LR", "ES", "LS", "ER", "SR", "SS", "RR", "EE")
COLUMNS = tuple(f"{part}_{pair}" for part in ("eyes", "teeth") for pair in _PAIRS)
"""Names of the 18 energies, in order."""

_EYES, _INNER_LIPS = (range(36, 42), range(42, 48)), range(60, 68)
_EYE_OPEN, _MOUTH_OPEN = 0.25, 0.15  # height / width
_LOCAL_MEAN, _AVERAGE = 15, 10  # px
_MOUTH_SIDE = 200  # px
_CONTEXT = 16  # px around the mouth: more than the filters reach, so that no border enters the energies
_SMALLEST_EYES = 10  # px in both masks together
_SMALLEST_TEETH = 0.01  # of the mouth


def openness(landmarks: np.ndarray) -> tuple[float, float, float]:
    """Height over width of right eye, left eye and inner lips of float[68 or 81,2]; 0 where a width is 0."""

    def ratio(left: int, right: int, upper: list[int], lower: list[int]) -> float:
        width = np.linalg.norm(landmarks[right] - landmarks[left])
        height = np.linalg.norm(landmarks[upper] - landmarks[lower], axis=1).mean()
        return float(height / width) if width else 0.0

    return (
        ratio(36, 39, [37, 38], [41, 40]),
        ratio(42, 45, [43, 44], [47, 46]),
        ratio(60, 64, [61, 62, 63], [67, 66, 65]),
    )


def _hulls(shape: tuple[int, int], parts: list[np.ndarray]) -> np.ndarray:
    """Union of the convex hulls of point sets float[N,2], bool[H,W]."""
    mask = np.zeros(shape, np.uint8)
    for points in parts:
        cv2.fillConvexPoly(mask, cv2.convexHull(np.rint(points).astype(np.int32)), 1)
    return mask > 0


def _texture(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The nine energies float32[9] of grey float32[H,W], averaged over the mask."""
    flat = grey - cv2.blur(grey, (_LOCAL_MEAN, _LOCAL_MEAN))

    def energy(rows: str, columns: str) -> float:
        kernels = (np.array(_VECTORS[name], np.float32) for name in (columns, rows))
        response = np.abs(cv2.sepFilter2D(flat, cv2.CV_32F, *kernels))
        return float(cv2.blur(response, (_AVERAGE, _AVERAGE))[mask].mean(dtype=np.float64))

    return np.array([(energy(a, b) + energy(b, a)) / 2 for a, b in _PAIRS], np.float32)


def _mouth(grey: np.ndarray, lips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mouth at its fixed size, with context: grey float32[h,w] and its mask bool[h,w]."""
    low, high = lips.min(0), lips.max(0)
    zoom = _MOUTH_SIDE / float((high - low).max())
    size = np.ceil((high - low) * zoom).astype(int) + 2 * _CONTEXT
    matrix = np.column_stack([np.eye(2) * zoom, _CONTEXT - low * zoom])
    flags, border = cv2.INTER_LINEAR, cv2.BORDER_REPLICATE
    picture = cv2.warpAffine(grey, matrix, tuple(int(n) for n in size), flags=flags, borderMode=border)
    return picture, _hulls(picture.shape, [lips * zoom + matrix[:, 2]])


def _teeth(grey: np.ndarray, mouth: np.ndarray) -> np.ndarray:
    """The brighter of two grey clusters in the mouth, bool[h,w]; empty if the mouth has one grey level only.

    Otsu's threshold maximises the variance between the classes, which is what k-means with k=2 looks for in one
    dimension: it gives the best clustering there is, and no seed is needed.
    """
    levels = np.rint(grey).astype(np.uint8)
    values = levels[mouth]
    if values.size == 0 or values.min() == values.max():
        return np.zeros_like(mouth)
    threshold, _ = cv2.threshold(values[None], 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return mouth & (levels > threshold)


def energies(image: np.ndarray, landmarks: np.ndarray, gate: bool = True) -> np.ndarray | None:
    """Laws' energies float32[18] (COLUMNS, grey levels) of eyes and teeth in uint8[H,W,3] RGB; None without them.

    landmarks: float[68 or 81,2] in its pixels. With `gate` a frame counts only if both eyes are open (height over width
    above 0.25) and the mouth too (inner lips above 0.15). Without teeth (brighter group under 1 % of the mouth) or with
    less than 10 px of eyes there is nothing to measure either. ValueError as in `hulls.check_face`.
    """
    points = check_face(image, landmarks)
    right, left, mouth = openness(points)
    if gate and not (min(right, left) > _EYE_OPEN and mouth > _MOUTH_OPEN):
        return None
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    eyes = _hulls(grey.shape, [points[list(eye)] for eye in _EYES])
    lips = points[list(_INNER_LIPS)]
    if eyes.sum() < _SMALLEST_EYES or not np.ptp(lips, axis=0).any():
        return None
    picture, inside = _mouth(grey, lips)
    teeth = _teeth(picture, inside)
    if not teeth.any() or teeth.sum() < _SMALLEST_TEETH * inside.sum():
        return None
    return np.concatenate([_texture(grey, eyes), _texture(picture, teeth)])


def pseudo_labels(features: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Cluster frames in two, vote per video: item_id, label int8, agreement float64, frames int32, in order of item_id.

    features: item_id, frame and COLUMNS, a row of NaN for a frame that `energies` could not use. k-means (k=2) on the
    unscaled energies, as published. The labels are clusters, not real and fake: 0 has the lower mean energy. agreement
    is the share of usable frames (`frames`) with the video's label; a tie goes to cluster 0 with agreement 0.5. Videos
    without a usable frame get label -1 and agreement NaN. ValueError if fewer than two frames can be used.
    """
    usable = features[list(COLUMNS)].notna().all(axis=1)
    values = features.loc[usable, list(COLUMNS)].to_numpy(np.float64)
    if len(values) < 2:
        raise ValueError(f"{len(values)} frames with eyes and teeth; clustering needs two, compute energies ungated")
    model = KMeans(2, n_init=10, random_state=seed).fit(values)
    high = model.labels_ == np.argmax(model.cluster_centers_.mean(axis=1))
    votes = features.loc[usable, ["item_id"]].assign(high=high).groupby("item_id")["high"].agg(["mean", "size"])
    votes = votes.reindex(np.unique(features["item_id"]))
    share = votes["mean"].to_numpy(np.float64)
    return pd.DataFrame(
        {
            "item_id": votes.index,
            "label": np.where(np.isnan(share), -1, share > 0.5).astype("int8"),
            "agreement": np.maximum(share, 1 - share),
            "frames": votes["size"].fillna(0).to_numpy().astype("int32"),
        }
    )
