"""Which frames of a medium are read, and which of their pixels: what pictures and videos have in common."""

from __future__ import annotations

import cv2
import numpy as np


class MediaError(RuntimeError):
    """A picture or video cannot be read; `reason` is one short sentence that stays the same for the same cause."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def spread(total: int, count: int) -> np.ndarray:
    """Indices int[min(count, total)] of frames spread evenly over `total`: the middles of `count` equal parts."""
    count = min(count, total)
    return ((np.arange(count) + 0.5) * total / max(count, 1)).astype(int)


def crop_origin(height: int, width: int, crop: int) -> tuple[int, int]:
    """Top and left of the centre crop of at most `crop` pixels a side, both even: the phase of a 2x2 Bayer cell."""
    return max(height - crop, 0) // 4 * 2, max(width - crop, 0) // 4 * 2


def fit(frame: np.ndarray, max_side: int | None = None, crop: int | None = None) -> np.ndarray:
    """Downscale uint8[H,W,3] to a long side of at most `max_side`, or cut it to its centre; contiguous.

    Frames that are smaller already stay as they are. A crop is a copy: a view would keep the whole frame in memory.
    """
    height, width = frame.shape[:2]
    if crop is not None:
        top, left = crop_origin(height, width, crop)
        return frame[top : top + crop, left : left + crop].copy()
    if max_side is None or max(height, width) <= max_side:
        return np.ascontiguousarray(frame)
    scale = max_side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
