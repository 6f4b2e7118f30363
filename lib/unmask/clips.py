"""Clips for heads that learn without fakes: real clips, and fakes made of them whose blending changes over time.

Self-blended video (the idea of FakeSTormer, Nguyen et al., 2025) in four kinds, all from one real clip and alike in
flip, colours, compression and crop:

- `real` (0): the clip, with the source-target transform of `blend` where that falls on the whole picture.
- `blend` (1): one self-blend replayed on all frames; it may drift, jitter and flicker. What shows is the blending.
- `varying` (1): a plain copy of the face, neither recoloured nor rescaled, that jitters, flickers or both.
- `steady` (0): the same copy as it stands in the first frame of `varying`, on all frames. A single frame cannot tell
  the two apart, so what separates them is time alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unmask import sbi

LABELS = {"real": 0, "blend": 1, "varying": 1, "steady": 0}
PAIRS = (("real", "blend"), ("varying", "steady"))
"""Kinds that differ in nothing but the manipulation."""
DRIFT = (0.0, 0.03)  # standard deviations, share of the face's width; see `sbi.draw_clip`
JITTER = (0.005, 0.03)
FLICKER = (0.004, 0.04)  # share of 255
STEADY_BLENDS = 0.5  # of the clips of kind `blend` have no jitter, and as many no flicker


def clip_draws(rng: np.random.Generator, frames: int, recipe: str) -> dict[str, list[sbi.BlendDraw]]:
    """A draw for every frame of the kinds `blend`, `varying` and `steady`."""
    drift, jitter, flicker = (rng.uniform(*limits) for limits in (DRIFT, JITTER, FLICKER))
    still, calm = rng.random(2) < STEADY_BLENDS
    blend = sbi.draw_clip(rng, frames, recipe, drift, 0.0 if still else jitter, 0.0 if calm else flicker)
    moves, blinks = ((1, 0), (0, 1), (1, 1))[rng.integers(3)]
    varying = [
        replace(
            draw,
            colour=sbi.ColourDraw(None, None, None),
            down_factor=1,
            sharpen=(0.0, 0.0),
            translate=(0.0, 0.0),
            scale=(1.0, 1.0),
        )  # fmt: skip
        for draw in sbi.draw_clip(rng, frames, recipe, jitter=moves * jitter, flicker=blinks * flicker)
    ]
    return {"blend": blend, "varying": varying, "steady": varying[:1] * frames}


def _cut(images: Sequence[np.ndarray], points: Sequence[np.ndarray], flip: bool) -> tuple[list, list]:
    """One loose crop for the whole clip, mirrored or not: pictures and landmarks."""
    boxes = np.array([sbi.loose_box(p, image.shape[:2]) for p, image in zip(points, images, strict=True)])
    (x0, y0), (x1, y1) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    cut = [
        (image[y0:y1, x0:x1], np.asarray(p, np.float32) - np.float32([x0, y0]))
        for image, p in zip(images, points, strict=True)
    ]
    pictures, marks = zip(*(sbi.flip(*one) if flip else one for one in cut), strict=True)
    return list(pictures), list(marks)


def _blended(
    images: Sequence[np.ndarray],
    points: Sequence[np.ndarray],
    rng: np.random.Generator,
    recipe: str,
    pairs: Sequence[tuple[str, str]],
) -> tuple[list[dict], list[np.ndarray], int]:
    """What the kinds of `pairs` show in each frame before the final crop, (picture, blending mask or None) by kind; the
    frames' landmarks; and the dice of the crop."""
    draws = clip_draws(rng, len(images), recipe)
    pictures, marks = _cut(images, points, bool(rng.random() < 0.5))
    alike, box = rng.integers(2**63, size=2)  # the same dice for every frame
    made = []
    for t, (picture, mark) in enumerate(zip(pictures, marks, strict=True)):
        wanted = {kind for pair in pairs for kind in pair} - {"real"}
        blends = {kind: sbi.blend(picture, mark, draws[kind][t], recipe) for kind in sorted(wanted)}
        frames = {kind: (blend.fake, blend.mask) for kind, blend in blends.items()}
        if "blend" in blends:
            frames["real"] = blends["blend"].real, None
        for pair in pairs:
            changed = sbi.augment_pair(*(frames[kind][0] for kind in pair), np.random.default_rng(alike), recipe)
            for kind, frame in zip(pair, changed, strict=True):
                frames[kind] = frame, frames[kind][1]
        made.append(frames)
    return made, marks, int(box)


def make_clips(
    images: Sequence[np.ndarray],
    points: Sequence[np.ndarray],
    rng: np.random.Generator,
    size: int,
    recipe: str,
    native: bool = False,
) -> dict[str, np.ndarray]:
    """The four kinds of LABELS, uint8[T,size,size,3] each, from the crops uint8[H,W,3] of one real clip.

    points: landmarks float[68 or 81, 2] of each crop, in its pixels. ValueError as in `sbi.blend`.
    """
    made, marks, dice = _blended(images, points, rng, recipe, PAIRS)
    side = size if native else None
    boxes = [sbi.crop_box(mark, np.random.default_rng(dice), side=side) for mark in marks]
    return {
        kind: np.stack([sbi.crop(frames[kind][0], box, size) for frames, box in zip(made, boxes, strict=True)])
        for kind in LABELS
    }


def make_clips_and_edges(
    images: Sequence[np.ndarray],
    points: Sequence[np.ndarray],
    rng: np.random.Generator,
    size: int,
    recipe: str,
    pairs: Sequence[tuple[str, str]] = PAIRS,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The kinds of `pairs` as `make_clips` makes them, but cut by one box for all frames (that of the median
    landmarks), and where each was blended: edges float32[T,size,size] by kind, 4m(1-m) of the mask m in the same cut.

    pairs: of PAIRS; leaving one out does not change the other. Edges of `real` are 0. ValueError as in `sbi.blend`.
    """
    made, marks, dice = _blended(images, points, rng, recipe, pairs)
    box = sbi.crop_box(np.median(marks, axis=0), np.random.default_rng(dice))
    pictures, edges = {}, {}
    for kind in (kind for pair in pairs for kind in pair):
        pictures[kind] = np.stack([sbi.crop(frames[kind][0], box, size) for frames in made])
        if kind == "real":
            edges[kind] = np.zeros(pictures[kind].shape[:3], np.float32)
            continue
        masks = np.stack([sbi.crop(frames[kind][1], box, size) for frames in made])
        masks = np.minimum(masks, 1)  # area averages of 1 may round to just above
        edges[kind] = 4 * masks * (1 - masks)
    return pictures, edges
