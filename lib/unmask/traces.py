"""Temporal-spatial traces of forgery in the face crops of one video: plain measurements, nothing learned, no label.

A generated or replaced face passes through other steps than the rest of its picture: resampling, a decoder, blending.
Most features therefore compare the face with a ring around it in the same frame, as a log ratio, so that light,
sensitivity and compression cancel as far as they touch both. The sign is not fixed: resampling takes noise away, a
generator may add some. Features of time depend on the spacing of the frames; compare videos sampled alike.

Zones follow the convex hull of the landmarks. Their limits are in units of the hull's inradius, so that they scale
with the face. Pixels at the ends of the grey scale, black padding among them, carry no noise and count for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy import fft, ndimage, stats

from unmask.data.crops import CropStore
from unmask.data.landmarks import fit_similarity
from unmask.hulls import check_face, hull_mask
from unmask.progress import track

FEATURES = {
    "noise": "high-pass residual energy, face against ring (log ratio)",
    "middle": "power at 0.16 to 0.28 cycles per pixel, face against ring (log ratio)",
    "rolloff": "power above 0.41 over power at 0.28 to 0.41 cycles per pixel, face against ring (log ratio)",
    "peak": "highest line of the face's spectrum above its surroundings (log ratio)",
    "chroma": "chroma residual energy, face against ring (log ratio)",
    "rim": "residual energy, rim of the face against its core (log ratio)",
    "lower": "residual energy, face below the nose against the rest of the face (log ratio)",
    "step": "residual energy, just inside against just outside the hull (log ratio)",
    "step_change": "mean absolute change of `step` between consecutive frames (log ratio)",
    "change": "energy of the difference of aligned consecutive frames, face against ring (log ratio)",
    "persistence": "correlation of the face's residual with that of the frame before, aligned (-1 to 1)",
    "jitter": "second difference of the landmarks without similarity motion, rms (outer eye corner distances)",
}
"""What each feature measures, with its unit in parentheses.

noise: Immerkaer, CVIU 1996 (the residual); Koopman et al., IMVIP 2018, for a face that lacks its camera's noise.
middle, rolloff: Durall et al., CVPR 2020, up-sampling leaves a wrong spectral fall-off.
peak: Zhang et al., WIFS 2019, and Frank et al., ICML 2020, up-sampling by zero insertion replicates the spectrum.
chroma: generators work in full-resolution RGB, cameras interpolate a mosaic and videos halve the chroma.
lower: Thies et al., SIGGRAPH 2019 (neural textures), and lip synchronisation redraw the part around the mouth only.
rim, step, step_change: a soft mask leaves the original's pixels at the rim of the face and its noise outside (Li et
al., CVPR 2020, Face X-ray); a mask laid anew in every frame makes that step unsteady.
change, persistence: skin detail moves with a real face; frames generated one by one redraw it.
jitter: Sun et al., CVPR 2021 (LRNet), frame-wise forgeries shake the geometry of the face.
"""

_ZONES = {"face": (0.15, 1.0), "core": (0.3, 1.0), "rim": (0.05, 0.2), "outside": (-0.2, -0.05), "ring": (-0.75, -0.15)}
_LOWER = slice(2, 15)  # jaw from cheek to cheek; the chord between passes about the base of the nose
_SECOND_DIFFERENCE = np.array([1, -2, 1], np.float32) / np.float32(np.sqrt(6))  # unit gain for white noise
_ROUNDING = 1 / 12  # variance of 8-bit rounding, grey levels squared: the floor of every energy
_CHROMA_SIGMA = 2.0  # px; videos carry chroma at half the resolution, so that nothing finer is there
_FEWEST_PIXELS = 64
_BLOCK, _STRIDE, _FEWEST_BLOCKS = 16, 4, 4  # px of the local spectra
_FREQUENCY = np.hypot(*np.meshgrid(fft.fftfreq(_BLOCK), fft.fftfreq(_BLOCK)))  # cycles per pixel
_BANDS = ((2.5, 4.5), (4.5, 6.5), (6.5, 8.5))  # cycles per block
_WINDOW = np.outer(*[np.hanning(_BLOCK + 2)[1:-1]] * 2).astype(np.float32)


@dataclass(frozen=True)
class _Frame:
    """One crop, prepared: points float32[K,2], luma, residual, colour (chroma energy) float32[S,S], zones bool[S,S]."""

    points: np.ndarray
    luma: np.ndarray
    residual: np.ndarray
    colour: np.ndarray
    zones: dict[str, np.ndarray]

    def ratio(self, energy: np.ndarray, zone: str, other: str) -> float:
        """Log ratio of the mean energies in two zones; NaN if one has too few pixels."""
        inside, outside = energy[self.zones[zone]], energy[self.zones[other]]
        if min(inside.size, outside.size) < _FEWEST_PIXELS:
            return np.nan
        return float(np.log((inside.mean() + _ROUNDING) / (outside.mean() + _ROUNDING)))


def _high_pass(luma: np.ndarray) -> np.ndarray:
    """Residual without edges along the axes and without slopes (Immerkaer 1996): white noise keeps its variance."""
    return cv2.sepFilter2D(luma, -1, _SECOND_DIFFERENCE, _SECOND_DIFFERENCE)


def _prepare(image: np.ndarray, landmarks: np.ndarray) -> _Frame:
    points = check_face(image, landmarks)
    luma, red, blue = cv2.split(cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2YCrCb))
    colour = sum((c - cv2.GaussianBlur(c, (0, 0), _CHROMA_SIGMA)) ** 2 for c in (red, blue))
    usable = cv2.erode(((luma > 2) & (luma < 253)).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    hull = hull_mask(points, luma.shape, "convex").astype(np.uint8)
    inward, outward = (cv2.distanceTransform(mask, cv2.DIST_L2, 5) for mask in (hull, 1 - hull))
    depth = (inward - outward) / max(float(inward.max()), 1.0)
    zones = {name: (depth > low) & (depth <= high) & usable for name, (low, high) in _ZONES.items()}
    lower = hull_mask(points[_LOWER], luma.shape, "convex") > 0
    zones |= {"lower": zones["face"] & lower, "upper": zones["face"] & ~lower}
    return _Frame(points, luma, _high_pass(luma), colour, zones)


def _spectrum(frames: Sequence[_Frame], zone: str) -> np.ndarray | None:
    """Log power float64[B,B] by Welch's method over the blocks that lie in a zone; None if these are too few."""
    total, count = np.zeros((_BLOCK, _BLOCK)), 0
    for frame in frames:
        luma, inside = (
            np.lib.stride_tricks.sliding_window_view(picture, (_BLOCK, _BLOCK))[::_STRIDE, ::_STRIDE]
            for picture in (frame.luma, frame.zones[zone])
        )
        blocks = luma[inside.mean((2, 3)) > 0.9]
        power = np.abs(fft.fft2((blocks - blocks.mean((1, 2), keepdims=True)) * _WINDOW)) ** 2
        total, count = total + power.sum(0, dtype=np.float64), count + len(blocks)
    return np.log(total / count + _ROUNDING * (_WINDOW**2).sum()) if count >= _FEWEST_BLOCKS else None


def _spectral(frames: Sequence[_Frame]) -> dict[str, float]:
    face, ring = _spectrum(frames, "face"), _spectrum(frames, "ring")
    found = {}
    if face is not None:
        # Below a quarter cycle natural spectra are too steep for a local median; up-sampling by 2 and 4 lies above.
        excess = face - ndimage.median_filter(face, 5, mode="wrap")
        found["peak"] = float(excess[_FREQUENCY >= 0.25].max())
    if face is not None and ring is not None:
        bands = [
            (face - ring)[(_FREQUENCY * _BLOCK >= low) & (_FREQUENCY * _BLOCK < high)].mean() for low, high in _BANDS
        ]
        found |= {"middle": float(bands[0]), "rolloff": float(bands[2] - bands[1])}
    return found


def _second_difference(values: np.ndarray, pts: np.ndarray) -> np.ndarray:
    """Twice the distance of points float[T,K,2] from the line through their neighbours in time: float[T-2,K,2]."""
    share = (pts[2:] - pts[1:-1]) / (pts[2:] - pts[:-2])
    share = share[:, None, None]
    return 2 * (values[1:-1] - share * values[:-2] - (1 - share) * values[2:])


def _jitter(landmarks: np.ndarray, pts: np.ndarray) -> float:
    shapes = landmarks[:, :68].astype(np.float64)  # forehead points are a function of the others
    maps = [fit_similarity(shape, shapes[0]) for shape in shapes]
    aligned = np.stack([shape @ m[:, :2].T + m[:, 2] for shape, m in zip(shapes, maps, strict=True)])
    eyes = np.linalg.norm((aligned[:, 45] - aligned[:, 36]).mean(0))
    return float(np.sqrt((_second_difference(aligned, pts) ** 2).sum(2).mean()) / eyes) if eyes > 0 else np.nan


def _pair(before: _Frame, after: _Frame) -> tuple[float, float]:
    """`change` and `persistence` of two consecutive frames, the later one brought onto the earlier by similarity."""
    motion = fit_similarity(before.points[:68], after.points[:68])
    luma, residual = (
        cv2.warpAffine(
            picture, motion, picture.shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        for picture in (after.luma, after.residual)
    )  # fmt: skip
    face = before.zones["face"]
    a, b = before.residual[face], residual[face]
    varies = a.size >= _FEWEST_PIXELS and a.std() > 0 and b.std() > 0
    return before.ratio((luma - before.luma) ** 2, "face", "ring"), np.corrcoef(a, b)[0, 1] if varies else np.nan


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that are numbers; NaN without any."""
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    return float(kept.mean()) if kept.size else np.nan


def _temporal(frames: Sequence[_Frame], steps: Sequence[float], pts: np.ndarray) -> dict[str, float]:
    pairs = [_pair(before, after) for before, after in zip(frames, frames[1:], strict=False)]
    found = {"step_change": _mean(np.abs(np.diff(steps)))}
    found |= {name: _mean([pair[i] for pair in pairs]) for i, name in enumerate(("change", "persistence"))}
    if len(frames) > 2 and (np.diff(pts) > 0).all():
        found["jitter"] = _jitter(np.stack([frame.points for frame in frames]), pts)
    return found


def video_traces(images: np.ndarray, landmarks: np.ndarray, pts: np.ndarray) -> dict[str, float]:
    """The FEATURES of one video, NaN where one cannot be had: in time for single pictures, in space for tight crops.

    images: uint8[T,S,S,3] RGB crops in order of time, with some background. landmarks: float[T,68 or 81,2] in crop
    pixels. pts: float[T], seconds; `jitter` needs three frames whose times increase. ValueError if the
    three do not fit each other or a face does not fit its crop (see `hulls.check_face`).
    """
    pts = np.asarray(pts, np.float64)
    if not len(images) == len(landmarks) == len(pts) or not len(pts):
        raise ValueError(f"{len(images)} images, {len(landmarks)} faces and {len(pts)} times; pass one of each a frame")
    frames = [_prepare(image, points) for image, points in zip(images, landmarks, strict=True)]
    steps = [frame.ratio(frame.residual**2, "rim", "outside") for frame in frames]
    found = {
        "noise": _mean([frame.ratio(frame.residual**2, "face", "ring") for frame in frames]),
        "chroma": _mean([frame.ratio(frame.colour, "face", "ring") for frame in frames]),
        "rim": _mean([frame.ratio(frame.residual**2, "rim", "core") for frame in frames]),
        "lower": _mean([frame.ratio(frame.residual**2, "lower", "upper") for frame in frames]),
        "step": _mean(steps),
        **_spectral(frames),
        **_temporal(frames, steps, pts),
    }
    return {name: found.get(name, np.nan) for name in FEATURES}


def steps(embeddings: np.ndarray) -> dict[str, float]:
    """How far an embedding moves from frame to frame: means over the consecutive pairs of float[T,D].

    spearman: rank correlation, ties at their mean rank; euclidean: distance; euclidean_unit: distance of the
    L2-normalised vectors. Pairs in which one is not defined (constant or zero vectors) do not count for it; NaN
    without pairs. Spearman over consecutive frames is the cue of Qiao et al., TPAMI 2024, stage 4.
    """
    vectors = np.asarray(embeddings, np.float64)
    if vectors.ndim != 2:
        raise ValueError(f"embeddings have shape {vectors.shape}; pass one vector a frame, [T, D]")
    if len(vectors) < 2:
        return dict.fromkeys(("spearman", "euclidean", "euclidean_unit"), np.nan)
    ranks = stats.rankdata(vectors, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ranks, unit = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (ranks, vectors))
    return {
        "spearman": _mean((ranks[1:] * ranks[:-1]).sum(1)),
        "euclidean": _mean(np.linalg.norm(np.diff(vectors, axis=0), axis=1)),
        "euclidean_unit": _mean(np.linalg.norm(np.diff(unit, axis=0), axis=1)),
    }


def _item(store: CropStore, rows: list[dict]) -> dict[str, float]:
    cv2.setNumThreads(1)
    landmarks = np.stack([np.asarray(row["landmarks"], np.float32).reshape(-1, 2) for row in rows])
    return video_traces(np.stack([store.image(row) for row in rows]), landmarks, [row["pts"] for row in rows])


def table(index: pd.DataFrame, store: CropStore, workers: int = 1) -> pd.DataFrame:
    """Columns item_id and FEATURES (float64), one row per item of a crop index, in the order of the index.

    `workers` processes; their number does not change the result. Raises CropError and what `video_traces` raises.
    """
    groups = {key: rows.sort_values("frame").to_dict("records") for key, rows in index.groupby("item_id", sort=False)}
    tasks = Parallel(n_jobs=workers, return_as="generator")(delayed(_item)(store, rows) for rows in groups.values())
    found = list(track(tasks, len(groups), "traces, items"))
    return pd.DataFrame(found, columns=list(FEATURES), dtype="float64").assign(item_id=list(groups))[
        ["item_id", *FEATURES]
    ]
