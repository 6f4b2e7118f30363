"""Which frames of a medium are read, and which of their pixels: what pictures and videos have in common."""

from __future__ import annotations

import cv2
import numpy as np

SAMPLINGS = ("uniform", "dense")


class MediaError(RuntimeError):
    """A picture or video cannot be read; `reason` is one short sentence that stays the same for the same cause."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def spread(total: int, count: int) -> np.ndarray:
    """Indices int[min(count, total)] of frames spread evenly over `total`: the middles of `count` equal parts."""
    count = min(count, total)
    return ((np.arange(count) + 0.5) * total / max(count, 1)).astype(int)


def in_a_row(times: np.ndarray, count: int, fps: float = 0.0) -> np.ndarray:
    """Indices int[at most count] of successive frames at a fixed stride of `fps` frames per second, centred in time.

    `times` float[N] are the frames' time stamps in seconds, in display order. An `fps` of 0, or one not below the
    clip's own rate (the median interval's), takes every frame. Otherwise the first frame sets a grid of times and each
    point of it gets the frame nearest in time (of two the earlier), so that variable rates keep the stride in seconds
    and strides that are no whole number of frames do not drift. A frame is never taken twice, and a clip that is too
    short gives what it has: both leave fewer than `count`.
    """
    times = np.maximum.accumulate(np.asarray(times, np.float64))  # damaged files may go back in time
    total = len(times)
    if total < 2 or fps == 0 or fps * np.median(np.diff(times)) >= 1 - 1e-3:
        count = min(count, total)
        return (total - count) // 2 + np.arange(count)
    halves = (times[1:] + times[:-1]) / 2  # where the nearest frame changes
    # Containers may round time stamps to milliseconds: a tenth of a step short still counts as a whole step.
    count = min(count, int((times[-1] - times[0]) * fps + 0.1) + 1)
    middle = (times[0] + times[-1]) / 2
    first = np.searchsorted(halves, middle - (count - 1) / 2 / fps - 1e-6)
    return np.unique(np.searchsorted(halves, times[first] + np.arange(count) / fps - 1e-6))


def choose(times: np.ndarray, count: int, sampling: str = "uniform", fps: float = 0.0) -> np.ndarray:
    """Which frames are read of a clip whose frames have the time stamps `times`: `spread` or `in_a_row` (dense)."""
    return in_a_row(times, count, fps) if sampling == "dense" else spread(len(times), count)


def check_sampling(sampling: str, fps: float) -> None:
    """Raise ValueError for a way of sampling that does not exist or a negative rate."""
    if sampling not in SAMPLINGS or not 0 <= fps < float("inf"):
        raise ValueError(f"The sampling is {' or '.join(SAMPLINGS)} at 0 or more frames/s, not {sampling} at {fps}.")


def crop_origin(height: int, width: int, crop: int) -> tuple[int, int]:
    """Top and left of the centre crop of at most `crop` pixels a side, both even: the phase of a 2x2 Bayer cell."""
    return max(height - crop, 0) // 4 * 2, max(width - crop, 0) // 4 * 2


def as_stored(points: np.ndarray, orientation: int, height: int, width: int) -> np.ndarray:
    """Points float[...,2] (x, y) of a displayed picture, in pixels of the picture as stored.

    `orientation` is the EXIF mark (EXIF 2.3, table 6), height and width are those of the stored picture.
    """
    x, y = points[..., 0], points[..., 1]
    if orientation >= 5:  # the display has turned on its side
        x, y = y, x
    if orientation in (2, 3, 7, 8):
        x = width - 1 - x
    if orientation in (3, 4, 6, 7):
        y = height - 1 - y
    return np.stack([x, y], -1)


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
