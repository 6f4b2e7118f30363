"""Face landmarks as geometry: checks, mirror image, crop rectangles, hull masks and their softening.

Points follow iBUG 68 (jaw 0-16, brows 17-26, nose 27-35, eyes 36-47, mouth 48-67), optionally followed by 13 forehead
points (68-80) that run from the temple on the image's left to the one on its right. A coordinate (x, y) is the centre
of the pixel `image[y, x]`.
"""

import cv2
import numpy as np

HULLS = ("dfl_full", "extended", "components", "convex")

_JAW, _BROWS, _MOUTH = range(0, 17), range(17, 27), range(48, 68)
_NOSE_BASE = range(31, 36)
_DFL_FULL = ((*_JAW, *_MOUTH), (*range(27, 31), 33), (*_BROWS, 0, 16, 27, 33))
# Convex pieces that together follow the concave outline between brows and jaw; 8 is the chin.
_COMPONENTS = (
    (*range(0, 9), 17),
    (*range(8, 17), 26),
    (17, 18, 19, 8),
    (24, 25, 26, 8),
    (*range(19, 25), 8),
    (*range(17, 22), 27, *_NOSE_BASE, 8),
    (*range(22, 27), 27, *_NOSE_BASE, 8),
    (*range(27, 31), *_NOSE_BASE),
)
_MIRROR_68 = (
    *range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1),
    45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
    *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1),
)  # fmt: skip
_MIRROR = {68: np.array(_MIRROR_68), 81: np.array((*_MIRROR_68, *range(80, 67, -1)))}

KNOTS = 96  # side of the coarse random field for `elastic`; at 4 px a knot it spans 384 px
KNOT_SIGMA = 1.75  # its smoothness in knots: the published 7 px at 4 px a knot
ERODE_TOLERANCE = 1e-6  # below the corner tap of the largest erosion kernel (1.8e-6), above float32 rounding (2.4e-7)
_SUBPIXEL_BITS = 4
_SMALLEST_FACE = 4.0  # px
_LARGEST_FACE = 4.0  # image sides
_LARGEST_CROP = 16.0  # image sides: keeps a wrong box from filling the memory


def check_landmarks(landmarks: np.ndarray) -> np.ndarray:
    """Landmarks as a fresh float32[68 or 81, 2] array; ValueError for any other shape or a value that is not finite."""
    points = np.array(landmarks, dtype=np.float32)
    if points.shape not in ((68, 2), (81, 2)):
        raise ValueError(
            f"landmarks have shape {points.shape}; pass one face as [68, 2] (iBUG) or [81, 2] (with the forehead)"
        )
    if not np.isfinite(points).all():
        raise ValueError("landmarks contain NaN or infinite values; drop frames whose face was not found")
    return points


def check_face(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Check a uint8[H,W,3] image together with its landmarks; returns them as float32.

    A face may leave the image, but must overlap it, measure at least 4 px and at most four times the image's side;
    ValueError otherwise.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError("image must be a uint8 array [H, W, 3] in RGB order; convert it first")
    return check_fit(landmarks, image.shape[:2])


def check_fit(landmarks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The part of `check_face` that needs no image, only its `shape` = (H, W)."""
    points = check_landmarks(landmarks)
    height, width = shape
    x0, y0, x1, y1 = face_box(points[:68])
    side = max(x1 - x0, y1 - y0)
    if min(x1 - x0, y1 - y0) < _SMALLEST_FACE:
        raise ValueError(f"the face measures under {_SMALLEST_FACE:.0f} px across; skip it or use a larger picture")
    if x1 < 0 or y1 < 0 or x0 > width - 1 or y0 > height - 1 or side > _LARGEST_FACE * max(height, width):
        raise ValueError(f"landmarks do not belong to this {width}x{height} image; give them in its own pixels")
    return points


def face_box(landmarks: np.ndarray) -> np.ndarray:
    """Bounding box float32[4] (x0, y0, x1, y1) of all points given, in pixels."""
    return np.concatenate([landmarks.min(axis=0), landmarks.max(axis=0)])


def flip(image: np.ndarray, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror an image [H,W,...] left to right, with its landmarks renamed so that left and right stay correct.

    Returns the flipped image and float32[68 or 81, 2]. Raises ValueError for other landmark shapes.
    """
    points = check_landmarks(landmarks)
    points[:, 0] = image.shape[1] - 1 - points[:, 0]
    return cv2.flip(image, 1), points[_MIRROR[len(points)]]


def _raise_brows(points: np.ndarray) -> np.ndarray:
    """Lift each brow point by half its distance to the eye below it; the outermost pairs with the temple side."""
    raised = points[:68].copy()
    right = np.vstack([0.75 * points[36] + 0.25 * points[0], points[36:40]])
    left = np.vstack([points[42:46], 0.75 * points[45] + 0.25 * points[16]])
    raised[17:27] += 0.5 * (points[17:27] - np.vstack([right, left]))
    return raised


def hull_polygons(landmarks: np.ndarray, kind: str) -> list[np.ndarray]:
    """Convex polygons (float32[N,2], pixels) whose union is the hull `kind`, one of HULLS.

    Only "convex" uses forehead points. Source: the four face masks of Face X-ray (Li et al., CVPR 2020), which SBI
    (Shiohara & Yamasaki, CVPR 2022) draws from. Raises ValueError for an unknown kind.
    """
    if kind == "convex":
        groups = [landmarks]
    elif kind == "dfl_full":
        groups = [landmarks[list(part)] for part in _DFL_FULL]
    elif kind in ("components", "extended"):
        points = _raise_brows(landmarks) if kind == "extended" else landmarks
        groups = [points[list(part)] for part in _COMPONENTS]
    else:
        raise ValueError(f"unknown hull {kind!r}; choose one of {', '.join(HULLS)}")
    return [cv2.convexHull(np.ascontiguousarray(group, np.float32))[:, 0] for group in groups]


def hull_mask(landmarks: np.ndarray, shape: tuple[int, int], kind: str) -> np.ndarray:
    """Binary hull mask float32[H,W] (0 or 1) of one face; parts outside `shape` = (H, W) are cut off."""
    mask = np.zeros(shape, np.uint8)
    for polygon in hull_polygons(landmarks, kind):
        fixed_point = np.rint(polygon * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        cv2.fillConvexPoly(mask, fixed_point, 1, lineType=cv2.LINE_8, shift=_SUBPIXEL_BITS)
    return mask.astype(np.float32)


def loose_box(landmarks: np.ndarray, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole-pixel rectangle (x0, y0, x1, y1) for the crop that self-blending works in, clipped to `shape` = (H, W).

    Around the 68-point box of width w and height h: w/2 more on the left and right, h above, 0.4 h below (SBI's
    published preprocessing).
    """
    x0, y0, x1, y1 = face_box(landmarks[:68]).tolist()
    width, height = x1 - x0, y1 - y0
    return (
        max(int(np.floor(x0 - width / 2)), 0),
        max(int(np.floor(y0 - height)), 0),
        min(int(np.ceil(x1 + width / 2)) + 1, shape[1]),
        min(int(np.ceil(y1 + 0.4 * height)) + 1, shape[0]),
    )


def crop_box(
    landmarks: np.ndarray, rng: np.random.Generator | None = None, margin: float = 0.25, side: int | None = None
) -> np.ndarray:
    """Final crop rectangle float32[4] (x0, y0, x1, y1) in pixels around the box of all landmarks.

    With `rng` (training) every side moves out on its own by U(.2, .8) x `margin` of the box's width or height; without
    (evaluation) by half of `margin`. May leave the image: `crop` pads. With `side` the box is a square of so many whole
    pixels instead, in the middle of the other one, so that `crop` to that size keeps every pixel as it is.
    """
    box = face_box(check_landmarks(landmarks))
    share = np.full(4, 0.5, np.float32) if rng is None else rng.uniform(0.2, 0.8, 4).astype(np.float32)
    width, height = box[2] - box[0], box[3] - box[1]
    box = box + share * margin * np.array([-width, -height, width, height], np.float32)
    if side is None:
        return box
    corner = np.rint((box[:2] + box[2:] - side) / 2)
    return np.concatenate([corner, corner + side]).astype(np.float32)


def crop(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Cut `box` (x0, y0, x1, y1, pixels, rounded) out of an image [H,W] or [H,W,C] and scale it to [size,size,...].

    Edge pixels are repeated where the box leaves the image. Area interpolation where both sides shrink, linear
    otherwise. ValueError if the box misses the image or is far larger than it.
    """
    height, width = image.shape[:2]
    x0, y0, x1, y1 = np.rint(box).astype(int)
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    inner = image[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    if inner.size == 0 or max(x1 - x0, y1 - y0) > _LARGEST_CROP * max(height, width):
        raise ValueError(f"crop box {[x0, y0, x1, y1]} does not fit a {width}x{height} image; give it in its pixels")
    borders = (max(-y0, 0), max(y1 - height, 0), max(-x0, 0), max(x1 - width, 0))
    patch = cv2.copyMakeBorder(inner, *borders, cv2.BORDER_REPLICATE)
    shrinks = min(x1 - x0, y1 - y0) >= size
    return cv2.resize(patch, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def support(mask: np.ndarray, margin: int = 0) -> tuple[int, int, int, int]:
    """Smallest window (x0, y0, x1, y1) with all of mask > 0, plus `margin` px, within the picture."""
    x, y, width, height = cv2.boundingRect((mask > 0).view(np.uint8))
    rows, columns = mask.shape
    return max(x - margin, 0), max(y - margin, 0), min(x + width + margin, columns), min(y + height + margin, rows)


def _displacement(noise: np.ndarray, corner: np.ndarray, size: tuple[int, int], std: float, step: float) -> np.ndarray:
    """Noise [KNOTS,KNOTS,2], smoothed and laid out from pixel `corner` with a knot every `step` px: float32[h,w,2]."""
    amplitude = std * 2 * np.sqrt(np.pi) * KNOT_SIGMA  # undoes what the blur takes from the standard deviation
    field = cv2.GaussianBlur(noise * np.float32(amplitude), (0, 0), KNOT_SIGMA, borderType=cv2.BORDER_REFLECT)
    to_pixels = np.column_stack([np.eye(2) * step, corner])
    return cv2.warpAffine(field, to_pixels, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def elastic(mask: np.ndarray, noise: np.ndarray, centre: np.ndarray, std: float, sigma: float) -> np.ndarray:
    """Bend a mask float32[H,W] by a smooth random displacement around the pixel `centre` (x, y).

    noise: float32[KNOTS,KNOTS,2], standard normal. std, sigma: standard deviation and smoothness of the displacement
    in px. Equals blurring white noise at full resolution (Simard et al., 2003), but draws it on a coarse grid.
    """
    window = x0, y0, x1, y1 = support(mask, margin=int(np.ceil(6 * std)) + 1)
    step = sigma / KNOT_SIGMA
    corner = np.subtract(centre, step * (KNOTS - 1) / 2) - window[:2]
    positions = _displacement(noise, corner, (x1 - x0, y1 - y0), std, step)
    positions += np.stack(np.meshgrid(np.arange(x0, x1), np.arange(y0, y1)), axis=-1).astype(np.float32)
    bent = np.zeros_like(mask)
    bent[y0:y1, x0:x1] = cv2.remap(mask, positions, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return bent


def soften(
    mask: np.ndarray, soft_shape: tuple[int, int], erode_kernel: int, blur_kernel: int, blur_sigma: float
) -> np.ndarray:
    """Resize to `soft_shape` (h, w), blur, erode by thresholding, blur, normalise, resize back: float32[H,W] in 0..1.

    Kernels are odd sides in px of the resized mask. A mask too thin to survive erosion keeps its first blur. The
    result is all zero only if `mask` is.
    """
    height, width = mask.shape
    rows, columns = soft_shape
    shrinks = height > rows and width > columns
    small = cv2.resize(mask, (columns, rows), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    soft = cv2.GaussianBlur(small, (erode_kernel, erode_kernel), 0)
    core = (soft >= 1 - ERODE_TOLERANCE).astype(np.float32)
    if core.any():
        soft = cv2.GaussianBlur(core, (blur_kernel, blur_kernel), blur_sigma)
    peak = soft.max()
    if peak == 0:
        return np.zeros_like(mask)
    return np.minimum(cv2.resize(soft / peak, (width, height)), 1)
