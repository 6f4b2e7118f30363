"""Four families of face forgery for the synthetic world; each replaces the face only and returns its mask.

Every function takes the target's decoded frames uint8[T,H,W,3] and landmarks float32[T,81,2] and returns
`Forgery(frames, landmarks, mask)`: frames uint8[T,H,W,3] equal to the target outside the mask float32[T,H,W].
`difficulty` from 0 (coarse) to 1 (careful) sets resolution, colour match, feathering and jitter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

FACE = np.r_[0:17, 68:81]  # jaw line and forehead: the outline of the face
LOWER = np.r_[2:15, 31:36]  # jaw from cheek to cheek and the base of the nose
ALIGNED = 96  # pixels along a side of the aligned face used by the low-rank forgery


@dataclass(frozen=True)
class Forgery:
    frames: np.ndarray
    landmarks: np.ndarray
    mask: np.ndarray


def _mix(easy: float, hard: float, difficulty: float) -> float:
    return easy + difficulty * (hard - easy)


def soft_hull(points: np.ndarray, size: int, shrink: float, feather: float) -> np.ndarray:
    """Convex hull of the points, shrunk towards its centre and feathered with `feather` pixels; float32[size,size]."""
    centre = points.mean(0)
    hull = cv2.convexHull((centre + (points - centre) * shrink).astype(np.float32))
    mask = np.zeros((size, size), np.uint8)
    cv2.fillConvexPoly(mask, np.round(hull * 16).astype(np.int32), 255, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(mask, (0, 0), max(feather, 0.3)).astype(np.float32) / 255


def match_colour(image: np.ndarray, reference: np.ndarray, mask: np.ndarray, strength: float) -> np.ndarray:
    """Move mean and spread of each Lab channel inside the mask towards the reference (Reinhard et al., 2001).

    image, reference: float32[H,W,3] RGB 0..255; strength 1 matches fully, 0 leaves the image alone.
    """
    inside = mask > 0.5
    if inside.sum() < 16:
        return image
    lab, goal = (cv2.cvtColor(a / np.float32(255), cv2.COLOR_RGB2LAB) for a in (image, reference))
    mean, spread, goal_mean, goal_spread = (
        lab[inside].mean(0),
        lab[inside].std(0) + 1e-3,
        goal[inside].mean(0),
        goal[inside].std(0) + 1e-3,
    )
    matched = (lab - mean) * np.clip(goal_spread / spread, 0.5, 2) + goal_mean
    return 255 * cv2.cvtColor((lab + strength * (matched - lab)).astype(np.float32), cv2.COLOR_LAB2RGB)


def _resample(image: np.ndarray, factor: float, up: int = cv2.INTER_CUBIC) -> np.ndarray:
    """Down and up again: what a generator of lower resolution leaves of the detail."""
    h, w = image.shape[:2]
    small = cv2.resize(image, (max(4, round(w * factor)), max(4, round(h * factor))), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (w, h), interpolation=up)


def _paste(target: np.ndarray, face: np.ndarray, mask: np.ndarray) -> np.ndarray:
    blended = target + mask[..., None] * (np.clip(face, 0, 255) - target)
    return np.where(mask[..., None] > 0, np.round(blended), target).astype(np.uint8)


def _multiband(target: np.ndarray, face: np.ndarray, mask: np.ndarray, levels: int = 4) -> np.ndarray:
    """Laplacian-pyramid blend (Burt and Adelson, 1983), kept to where the mask is positive."""
    a, b, m = [target.astype(np.float32)], [np.clip(face, 0, 255).astype(np.float32)], [mask]
    for pyramid in (a, b, m):
        for _ in range(levels):
            pyramid.append(cv2.pyrDown(pyramid[-1]))
    out = a[-1] + m[-1][..., None] * (b[-1] - a[-1])
    for i in range(levels - 1, -1, -1):
        shape = a[i].shape[1::-1]
        detail = [p[i] - cv2.pyrUp(p[i + 1], dstsize=shape) for p in (a, b)]
        out = cv2.pyrUp(out, dstsize=shape) + detail[0] + m[i][..., None] * (detail[1] - detail[0])
    return np.where(mask[..., None] > 0, np.clip(np.round(out), 0, 255), target).astype(np.uint8)


def swap(frames, landmarks, source, source_landmarks, rng, difficulty=0.5, blend: str = "alpha") -> Forgery:
    """Face swap: warp the source's face onto the target's, transfer colour, blend with a feathered mask.

    source: uint8[S,H,W,3] with source_landmarks float32[S,81,2]. The frame of the source with the most similar mouth is
    used at each moment; the fit jitters from frame to frame, as frame-wise swaps do.
    """
    size = frames.shape[1]
    factor = _mix(0.35, 0.75, difficulty) * rng.uniform(0.85, 1.15)
    strength, shrink = _mix(0.5, 0.95, difficulty), rng.uniform(0.86, 0.98)
    feather, jitter = _mix(1.0, 4.0, difficulty) * rng.uniform(0.7, 1.3), _mix(1.2, 0.4, difficulty)
    opening, source_opening = (p[:, 66, 1] - p[:, 62, 1] for p in (landmarks, source_landmarks))
    out, masks = np.empty_like(frames), np.empty(frames.shape[:3], np.float32)
    for i, (frame, points) in enumerate(zip(frames, landmarks, strict=True)):
        best = int(np.argmin(np.abs(source_opening - opening[i])))
        goal = (points + rng.normal(0, jitter, 2) + rng.normal(0, 0.3 * jitter, points.shape)).astype(np.float32)
        warp, _ = cv2.estimateAffine2D(source_landmarks[best][:68], goal[:68], method=cv2.LMEDS)
        face = cv2.warpAffine(
            source[best].astype(np.float32), warp, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        masks[i] = soft_hull(points[FACE], size, shrink, feather)
        face = match_colour(_resample(face, factor), frame.astype(np.float32), masks[i], strength)
        out[i] = (_paste if blend == "alpha" else _multiband)(frame, face, masks[i])
    return Forgery(out, landmarks, masks)


def _displacement(points: np.ndarray, goal: np.ndarray, size: int, radius: float, grid: int = 40) -> np.ndarray:
    """Smooth backward flow float32[size,size,2] that carries `points` to `goal`: Gaussian means on a coarse grid."""
    axis = (np.arange(grid) + 0.5) * size / grid - 0.5
    nodes = np.stack(np.meshgrid(axis, axis), 2).reshape(-1, 1, 2)
    weight = np.exp(-((nodes - goal[None]) ** 2).sum(2) / (2 * radius**2))
    flow = weight @ (points - goal) / (weight.sum(1, keepdims=True) + 0.05)
    return cv2.resize(flow.reshape(grid, grid, 2).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)


def reenact(frames, landmarks, driver_landmarks, rng, difficulty=0.5) -> Forgery:
    """Reenactment: the target's face is warped to the expression of a driver, mouth and head turn included.

    driver_landmarks: float32[S,81,2]; its motion relative to its own mean shape is transplanted, scaled to the target.
    """
    count, size = frames.shape[:2]
    width = np.ptp(landmarks[..., 0], 1).mean()
    driver = driver_landmarks[np.arange(count) % len(driver_landmarks)]
    local = driver - driver[:, 27:31].mean(1, keepdims=True)
    motion = (local - local.mean(0)) * (width / np.ptp(driver[..., 0], 1).mean())
    own = landmarks - landmarks[:, 27:31].mean(1, keepdims=True)
    still = own.mean(0) + landmarks[:, 27:31].mean(1, keepdims=True)
    inner = np.r_[17:68]
    goal = landmarks.copy()
    goal[:, inner] = (still + 1.6 * motion)[:, inner] + rng.normal(0, _mix(0.8, 0.2, difficulty), (count, 1, 2))
    factor, feather = _mix(0.45, 0.85, difficulty), _mix(1.5, 4.0, difficulty)
    out, masks = np.empty_like(frames), np.empty(frames.shape[:3], np.float32)
    axis = np.arange(size, dtype=np.float32)
    pixels = np.stack(np.meshgrid(axis, axis), 2)
    for i, frame in enumerate(frames):
        flow = _displacement(landmarks[i], goal[i], size, 0.09 * width)
        face = cv2.remap(
            frame.astype(np.float32), pixels + flow, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        masks[i] = soft_hull(landmarks[i][FACE], size, 0.92, feather)
        out[i] = _paste(frame, _resample(face, factor), masks[i])
    return Forgery(out, goal.astype(np.float32), masks)


def texture(frames, landmarks, rng, difficulty=0.5) -> Forgery:
    """Neural texture: the lower face is redrawn by a low-rank linear autoencoder (PCA) of the clip's aligned faces."""
    size = frames.shape[1]
    rank = max(1, round(_mix(2, 6, difficulty)))
    template = landmarks.mean(0)
    template = (template - template.min(0)) / np.ptp(template, axis=0).max() * (0.9 * ALIGNED) + 0.05 * ALIGNED
    warps = [
        cv2.estimateAffinePartial2D(p[:68], template[:68].astype(np.float32), method=cv2.LMEDS)[0] for p in landmarks
    ]
    faces = np.stack(
        [
            cv2.warpAffine(f.astype(np.float32), w, (ALIGNED, ALIGNED), flags=cv2.INTER_AREA)
            for f, w in zip(frames, warps, strict=True)
        ]
    )
    flat = faces.reshape(len(faces), -1)
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh((flat - mean) @ (flat - mean).T)
    basis = vectors[:, np.argsort(values)[::-1][:rank]]
    decoded = (mean + basis @ (basis.T @ (flat - mean))).reshape(faces.shape)
    tint = rng.normal(0, _mix(3, 0.5, difficulty), 3)
    out, masks = np.empty_like(frames), np.empty(frames.shape[:3], np.float32)
    for i, frame in enumerate(frames):
        face = cv2.warpAffine(
            (decoded[i] + tint).astype(np.float32),
            warps[i],
            (size, size),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        masks[i] = soft_hull(landmarks[i][LOWER], size, 0.95, _mix(1.0, 3.0, difficulty))
        out[i] = _paste(frame, face, masks[i])
    return Forgery(out, landmarks, masks)


def upsample(latent: np.ndarray, size: int, uneven: float) -> np.ndarray:
    """Enlarge float32[h,w,3] as strided transposed convolutions do: zeros in between, then a kernel of uneven overlap.

    uneven: 0 is a clean interpolation; above it the four phases differ, which leaves the known checkerboard
    (Odena et al., Distill 2016).
    """
    kernel = np.array([1, 2, 1], np.float32) / 2
    kernel = np.outer(kernel, kernel)
    kernel[1, 1] *= 1 + uneven
    image = latent
    while image.shape[0] < size:
        wide = np.zeros((2 * image.shape[0], 2 * image.shape[1], 3), np.float32)
        wide[::2, ::2] = image
        image = cv2.filter2D(wide, -1, kernel, borderType=cv2.BORDER_REFLECT)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) if image.shape[0] != size else image


def synthesise(frames, landmarks, imagine: Callable[[int, int], np.ndarray], rng, difficulty=0.5) -> Forgery:
    """Whole-face synthesis: a face of nobody, drawn at low resolution and enlarged by a network-like up-sampler.

    imagine(i, side): the generator's picture for frame i as float32[side,side,3] RGB 0..255 covering the whole frame.
    """
    size = frames.shape[1]
    latent = size // 2
    uneven, feather = _mix(0.12, 0.03, difficulty) * rng.uniform(0.7, 1.3), _mix(1.5, 4.0, difficulty)
    out, masks = np.empty_like(frames), np.empty(frames.shape[:3], np.float32)
    for i, frame in enumerate(frames):
        face = upsample(imagine(i, latent), size, uneven)
        masks[i] = soft_hull(landmarks[i][FACE], size, 1.02, feather)
        out[i] = _paste(
            frame, match_colour(face, frame.astype(np.float32), masks[i], _mix(0.4, 0.8, difficulty)), masks[i]
        )
    return Forgery(out, landmarks, masks)
