"""Regions of a face: nine boxes from its landmarks, moved along with the picture, and maps averaged inside them.

Boxes are x0, y0, x1, y1 in pixels of the picture, counted from its edge: 0 is the left edge of the first pixel, the
picture's side the right edge of the last one. Landmarks follow the kit's convention, where a whole number is the centre
of a pixel. A box that is not there is NaN throughout.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from unmask import hulls
from unmask.detectors.base import masked_mean

# The parts of the 68 iBUG points; right and left are the subject's.
REGIONS: dict[str, tuple[int, ...]] = {
    "chin": tuple(range(17)),
    "right brow": tuple(range(17, 22)),
    "left brow": tuple(range(22, 27)),
    "nose bridge": tuple(range(27, 31)),
    "nose tip": tuple(range(31, 36)),
    "right eye": tuple(range(36, 42)),
    "left eye": tuple(range(42, 48)),
    "upper lip": (*range(48, 55), *range(60, 65)),
    "lower lip": (48, *range(54, 61), *range(64, 68)),
}
MIRROR = (0, 2, 1, 3, 4, 6, 5, 7, 8)  # which region each one becomes in the mirror image
MARGIN = 5 / 224  # sides of the picture
SAMPLES = 14  # at least so many samples a side in each box, as published


def _within(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """The part of boxes float[...,4] inside a picture of `size` pixels a side; NaN for those with no part there."""
    boxes = boxes.clamp(0, size)
    there = (boxes[..., 2:] > boxes[..., :2]).all(-1, keepdim=True)
    return boxes.where(there, boxes.new_tensor(torch.nan))


def region_boxes(landmarks: np.ndarray | torch.Tensor, size: int) -> torch.Tensor:
    """Boxes float32[...,9,4] of REGIONS around landmarks float[...,68 or 81,2] of a picture of `size` pixels a side.

    A margin of 5 px in 224 is added on every side, and what leaves the picture is cut off; a region with a landmark
    that is NaN, or wholly outside the picture, is NaN. ValueError for other shapes. Regions and margin: the customary
    nine groups of the 68 points, as in CLaRE's code.
    """
    points = torch.as_tensor(landmarks, dtype=torch.float32)
    if points.ndim < 2 or points.shape[-2] not in (68, 81) or points.shape[-1] != 2:
        raise ValueError(f"landmarks have shape {tuple(points.shape)}; pass faces as [..., 68 or 81, 2]")
    groups = [points[..., list(part), :] + 0.5 for part in REGIONS.values()]
    corners = [torch.cat([g.amin(-2) - MARGIN * size, g.amax(-2) + MARGIN * size], -1) for g in groups]
    return _within(torch.stack(corners, -2), size)


@dataclass(frozen=True)
class Crop:
    """What was done to a picture, so that all that belongs to it is moved along: the rectangle `box` (x0, y0, x1, y1 in
    its pixels, rounded as `hulls.crop` does) was scaled to `size` pixels a side and then mirrored if `flip`."""

    box: tuple[float, float, float, float]
    size: int
    flip: bool = False

    def _corner_and_sides(self) -> tuple[np.ndarray, np.ndarray]:
        box = np.rint(np.asarray(self.box, np.float64))
        return box[:2], np.maximum(box[2:] - box[:2], 1)

    def landmarks(self, landmarks: np.ndarray) -> np.ndarray:
        """Landmarks float[68 or 81,2] of the picture in the crop, float32. ValueError for other shapes and for NaN."""
        corner, sides = self._corner_and_sides()
        points = (hulls.check_landmarks(landmarks) + 0.5 - corner) * self.size / sides - 0.5
        if self.flip:  # which renames the points too
            return hulls.flip(np.empty((self.size, self.size), np.uint8), points)[1]
        return points.astype(np.float32)

    def boxes(self, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes float[...,9,4] of the picture in the crop: right and left change places in a mirror image, what the
        crop cuts off is lost, and boxes outside it become NaN."""
        corner, sides = (boxes.new_tensor(np.tile(v, 2)) for v in self._corner_and_sides())
        moved = (boxes - corner) * self.size / sides
        if self.flip:
            x0, y0, x1, y1 = moved[..., list(MIRROR), :].unbind(-1)
            moved = torch.stack([self.size - x1, y0, self.size - x0, y1], -1)
        return _within(moved, self.size)

    def maps(self, maps: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Maps float[N,C,h,w] that span the picture of width x height pixels, cut, scaled back to h x w and mirrored.

        Read between their cells bilinearly; outside the picture, where `hulls.crop` repeats its edge, so do they.
        """
        (x0, y0), (across, down) = self._corner_and_sides()
        rows, columns = ((torch.arange(k, dtype=torch.float64) + 0.5) / k for k in maps.shape[-2:])
        columns = 1 - columns if self.flip else columns
        y, x = 2 * (y0 + rows * down) / height - 1, 2 * (x0 + columns * across) / width - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(maps)
        return F.grid_sample(maps, grid.expand(len(maps), -1, -1, -1), padding_mode="border", align_corners=False)


def pool(maps: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Mean of maps float[N,C,g,g] inside each box and then over the boxes float[N,K,4]: float[N,C].

    maps span pictures of `size` pixels a side, in whose pixels the boxes are: coordinates are scaled by g / size. NaN
    boxes are left out; a picture without any gives zeros. ValueError for maps that are not square, or not as many as
    there are pictures. RoIAlign: He et al., Mask R-CNN, ICCV 2017, section 3; aligned: a cell's value is its centre's.
    """
    if maps.shape[-1] != maps.shape[-2] or len(maps) != len(boxes):
        raise ValueError(f"maps of shape {tuple(maps.shape)} do not fit boxes {tuple(boxes.shape)}; maps are square")
    n, k = boxes.shape[:2]
    there, side = boxes.isfinite().all(-1), maps.shape[-1]
    which = torch.arange(n, device=boxes.device).repeat_interleave(k).to(boxes.dtype)
    rois = torch.cat([which.unsqueeze(1), boxes.masked_fill(~there.unsqueeze(2), 0).flatten(0, 1)], 1).to(maps.dtype)
    # One bin of many samples is the mean over a grid of bins, without that grid's memory.
    means = roi_align(maps, rois, 1, side / size, max(SAMPLES, side), aligned=True)
    return masked_mean(means.view(n, k, -1), there)
