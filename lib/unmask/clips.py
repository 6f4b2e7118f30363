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
    draws = clip_draws(rng, len(images), recipe)
    pictures, marks = _cut(images, points, bool(rng.random() < 0.5))
    alike, box = rng.integers(2**63, size=2)  # the same dice for every frame
    made = {kind: [] for kind in LABELS}
    for t, (picture, mark) in enumerate(zip(pictures, marks, strict=True)):
        blends = {kind: sbi.blend(picture, mark, frames[t], recipe) for kind, frames in draws.items()}
        frames = {"real": blends["blend"].real} | {kind: blend.fake for kind, blend in blends.items()}
        where = sbi.crop_box(mark, np.random.default_rng(box), side=size if native else None)
        for first, second in (("real", "blend"), ("varying", "steady")):
            pair = sbi.augment_pair(frames[first], frames[second], np.random.default_rng(alike), recipe)
            for kind, frame in zip((first, second), pair, strict=True):
                made[kind].append(sbi.crop(frame, where, size))
    return {kind: np.stack(frames) for kind, frames in made.items()}
