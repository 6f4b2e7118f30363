"""Self-blended images: a fake made from one real face by blending it with a slightly altered copy of itself.

Shiohara & Yamasaki, "Detecting Deepfakes with Self-Blended Images", CVPR 2022, written anew from the description.
Every sample is a set of draws (`draw_blend`) applied to a picture (`blend`). The draws never depend on the picture,
so one seed gives the same manipulation on every frame of a clip, and `sample_rng` replays any sample.

Choices where paper, published code and robustness differ:
- HSV. The published limits of 0.3 meet an 8-bit library function that counts in grey levels, which leaves nearly
  nothing ("faithful"). "intended" reads 0.3 as a share: saturation and value are scaled by 1 +- 0.3, so that grey
  stays grey and black stays black; hue turns by 0.3 of the 60 degrees between neighbouring primaries and secondaries
  (0.05 of the circle), since 0.3 of the whole circle would paint green and violet faces. Hue wraps round.
- Lost resolution. Published: every second or fourth pixel, enlarged linearly; that leaves aliases, which no generator
  makes. "smooth" is "intended" but for this step: averages over 1.2 to 3.5 pixels, enlarged linearly, as a face that
  was made small and pasted large. It is the kit's own, and what the demo trains with.
- Elastic deformation bends the mask only. "faithful" bends by pixels (published alpha 50, sigma 7: a displacement of
  1.16 px standard deviation, 1.25 with the edges, whatever the face's size); "intended" scales displacement and
  smoothness with the face, equal to the published values for a face of 190 px, as in a loose crop of 380 px.
- The affine transform repeats edge pixels in the source where it reaches outside the picture.
- A hull that erosion would remove altogether is blended with its soft, un-eroded mask instead.
"""

import hashlib
from dataclasses import dataclass, replace

import cv2
import numpy as np

from unmask.hulls import (
    HULLS,
    KNOTS,
    check_face,
    crop,
    crop_box,
    elastic,
    face_box,
    flip,
    hull_mask,
    loose_box,
    soften,
    support,
)

__all__ = [
    "RECIPES", "BlendDraw", "ColourDraw", "ColourRange", "Recipe", "SelfBlend", "augment_pair", "blend", "crop",
    "crop_box", "draw_blend", "draw_clip", "flip", "loose_box", "sample_rng", "self_blend", "training_pair",
]  # fmt: skip


@dataclass(frozen=True)
class ColourRange:
    """Half-widths of uniform colour draws and the probability of each of the three steps.

    rgb: grey levels per channel. hue: share of the circle; saturation, value: relative change; but all three are 8-bit
    HSV units where `eight_bit` is set. brightness: share of 255. contrast: relative change.
    """

    hue: float
    saturation: float
    value: float
    brightness: float
    contrast: float
    p_hsv: float
    p_contrast: float
    eight_bit: bool
    rgb: float = 20.0
    p_rgb: float = 0.3


@dataclass(frozen=True)
class Recipe:
    """Ranges of one way to self-blend. Fields in px are at the picture's own resolution unless said otherwise."""

    single: ColourRange  # source or target, inside self_blend
    pair: ColourRange  # both images alike, in augment_pair
    elastic_face: float | None  # face side in px at which the two fields below hold; None: at any size
    elastic_std: float = 50 / np.sqrt(3) / (2 * np.sqrt(np.pi) * 7)  # uniform noise * 50, blurred with sigma 7
    elastic_sigma: float = 7.0
    p_first_68: float = 0.25
    p_source: float = 0.5
    down_factors: tuple[int, ...] = (2, 4)  # every n-th pixel
    down_range: tuple[float, float] | None = None  # averages over so many pixels instead
    sharpen_alpha: tuple[float, float] = (0.2, 0.5)
    sharpen_lightness: tuple[float, float] = (0.5, 1.0)
    translate: tuple[float, float] = (0.03, 0.015)  # share of width, height
    scale: tuple[float, float] = (0.95, 1 / 0.95)
    soft_side: tuple[int, int] = (192, 256)  # mask is softened at this size, px
    soft_kernel: tuple[int, int] = (5, 25)  # odd
    soft_sigma: tuple[int, int] = (5, 45)
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)
    jpeg_quality: tuple[int, int] = (40, 100)
    p_jpeg: float = 0.5


def _colours(hue: float, eight_bit: bool) -> tuple[ColourRange, ColourRange]:
    return (
        ColourRange(hue, 0.3, 0.3, brightness=0.1, contrast=0.1, p_hsv=1.0, p_contrast=1.0, eight_bit=eight_bit),
        ColourRange(hue, 0.3, 0.3, brightness=0.3, contrast=0.3, p_hsv=0.3, p_contrast=0.3, eight_bit=eight_bit),
    )


RECIPES = {
    "intended": Recipe(*_colours(hue=0.05, eight_bit=False), elastic_face=190.0),
    "faithful": Recipe(*_colours(hue=0.3, eight_bit=True), elastic_face=None),
    "smooth": Recipe(*_colours(hue=0.05, eight_bit=False), elastic_face=190.0, down_range=(1.2, 3.5)),
}


_BLOCK = 16  # px: side of the blocks that JPEG compresses, colours at half resolution included
_DRIFT_SIGMA = 4.0  # frames: smoothness of the drift in a clip


@dataclass(frozen=True)
class ColourDraw:
    """One colour change; None stands for a step that is left out."""

    rgb: np.ndarray | None
    hsv: np.ndarray | None
    contrast: np.ndarray | None  # brightness, contrast


@dataclass(frozen=True)
class BlendDraw:
    """All random choices of one self-blend, in `Recipe` units."""

    first_68: bool
    hull: str
    transform_source: bool
    colour: ColourDraw
    down_factor: float  # 1: sharpen instead
    sharpen: tuple[float, float]  # alpha, lightness
    translate: tuple[float, float]
    scale: tuple[float, float]
    noise: np.ndarray  # float32[96,96,2], standard normal
    soft_shape: tuple[int, int]  # height, width
    erode_kernel: int
    blur_kernel: int
    blur_sigma: int
    ratio: float
    offset: tuple[float, float] = (0.0, 0.0)  # of copy and mask, share of the face's width; clips only
    flicker: float = 0.0  # added brightness of the copy, share of 255; clips only


@dataclass(frozen=True)
class SelfBlend:
    """Result of `self_blend`: `fake`, `real` uint8[H,W,3] RGB; `mask` (blend weight) and `boundary` float32[H,W]."""

    fake: np.ndarray
    real: np.ndarray
    mask: np.ndarray
    boundary: np.ndarray


def sample_rng(seed: int, item_id: str, frame: int, epoch: int) -> np.random.Generator:
    """Generator that belongs to one sample alone, so that it can be replayed in any process and order.

    Give every frame of a clip the same `frame` to repeat one manipulation over the clip.
    """
    digest = hashlib.sha256(f"{int(seed)} {int(frame)} {int(epoch)} {item_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def find_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by its name, or as given. ValueError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; choose one of {', '.join(RECIPES)}, or pass a Recipe")
    return RECIPES[recipe]


def _draw_colour(rng: np.random.Generator, limits: ColourRange) -> ColourDraw:
    use = rng.random(3) < (limits.p_rgb, limits.p_hsv, limits.p_contrast)
    unit = rng.uniform(-1, 1, 8)
    rgb = unit[:3] * limits.rgb
    hsv = unit[3:6] * (limits.hue, limits.saturation, limits.value)
    contrast = unit[6:] * (limits.brightness, limits.contrast)
    return ColourDraw(rgb if use[0] else None, hsv if use[1] else None, contrast if use[2] else None)


def draw_blend(rng: np.random.Generator, recipe: str | Recipe = "intended") -> BlendDraw:
    """All random choices of one self-blend. ValueError for an unknown recipe name."""
    recipe = find_recipe(recipe)

    def odd() -> int:
        low, high = recipe.soft_kernel
        return int(rng.integers(low // 2, high // 2 + 1)) * 2 + 1

    def whole(bounds: tuple[int, int]) -> int:
        return int(rng.integers(bounds[0], bounds[1] + 1))

    factor = rng.uniform(*recipe.down_range) if recipe.down_range else int(rng.choice(recipe.down_factors))
    return BlendDraw(
        first_68=bool(rng.random() < recipe.p_first_68),
        hull=str(rng.choice(HULLS)),
        transform_source=bool(rng.random() < recipe.p_source),
        colour=_draw_colour(rng, recipe.single),
        down_factor=factor if rng.random() < 0.5 else 1,
        sharpen=(rng.uniform(*recipe.sharpen_alpha), rng.uniform(*recipe.sharpen_lightness)),
        translate=tuple(rng.uniform(-1, 1, 2) * recipe.translate),
        scale=tuple(rng.uniform(*recipe.scale, 2)),
        noise=rng.standard_normal((KNOTS, KNOTS, 2), dtype=np.float32),
        soft_shape=(whole(recipe.soft_side), whole(recipe.soft_side)),
        erode_kernel=odd(),
        blur_kernel=odd(),
        blur_sigma=whole(recipe.soft_sigma),
        ratio=float(rng.choice(recipe.ratios)),
    )


def draw_clip(
    rng: np.random.Generator,
    frames: int,
    recipe: str | Recipe = "intended",
    drift: float = 0.0,
    jitter: float = 0.0,
    flicker: float = 0.0,
) -> list[BlendDraw]:
    """One self-blend for all `frames` of a clip (self-blended video; idea of FakeSTormer, 2025): a draw per frame.

    Only position and brightness of the blended copy differ between the frames; each is normally distributed with the
    standard deviation given. drift: smooth motion, share of the face's width and per axis (its speed is drift / 5.7 a
    frame). jitter: the same, but independent in every frame. flicker: brightness, share of 255, independent in every
    frame. All 0: the same draw on every frame. A flip is the caller's: once for the whole clip. The dice fall alike
    whatever the three are, so the same seed gives the same blend with and without them. ValueError for a negative or
    infinite value or less than one frame.
    """
    if frames < 1 or not all(np.isfinite(size) and size >= 0 for size in (drift, jitter, flicker)):
        raise ValueError("a clip needs at least one frame, and drift, jitter and flicker must be 0 or more")
    base = draw_blend(rng, recipe)
    # White noise blurred in time, taken where the blur is whole, so that the motion is alike at all frames.
    reach = int(4 * _DRIFT_SIGMA)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _DRIFT_SIGMA) ** 2)
    taps /= np.sqrt((taps**2).sum())
    white = rng.standard_normal((2, frames + 2 * reach))
    smooth = np.stack([np.convolve(axis, taps, "valid") for axis in white], axis=1)
    offsets = drift * smooth + jitter * rng.standard_normal((frames, 2))
    levels = flicker * rng.standard_normal(frames)
    return [
        replace(base, offset=(float(x), float(y)), flicker=float(level))
        for (x, y), level in zip(offsets, levels, strict=True)
    ]


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return cv2.convertScaleAbs(pixels)  # rounds and cuts off at 255; there is nothing below 0


def _shift_hsv_8bit(pixels: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Add `shift` in 8-bit HSV units (hue 0..179) and cut off the fraction, as 8-bit colour libraries do."""
    levels = np.arange(256, dtype=np.float32)
    table = np.stack([(levels + shift[0]) % 180, *(np.clip(levels + step, 0, 255) for step in shift[1:])], axis=-1)
    hsv = cv2.cvtColor(_to_uint8(pixels), cv2.COLOR_RGB2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, table.astype(np.uint8)[None]), cv2.COLOR_HSV2RGB).astype(np.float32)


def _shift_hsv(pixels: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Turn the hue by a share of the circle, scale saturation and value by 1 + shift. float32, 0..255."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    # One pass over the pixels; OpenCV takes a hue of 360 and more as turned round, but not one below 0.
    hsv = cv2.transform(hsv, np.column_stack([np.diag([1, 1 + shift[1], 1 + shift[2]]), [360 * (shift[0] % 1), 0, 0]]))
    return cv2.cvtColor(cv2.min(hsv, (720.0, 1.0, 255.0, 0.0)), cv2.COLOR_HSV2RGB)


def _recolour(image: np.ndarray, draw: ColourDraw, limits: ColourRange) -> np.ndarray:
    """RGB shift, HSV shift, brightness and contrast of uint8[H,W,3]; float32[H,W,3], 0..255."""
    pixels = image.astype(np.float32)
    if draw.rgb is not None:
        pixels += draw.rgb.astype(np.float32)
        np.clip(pixels, 0, 255, out=pixels)
    if draw.hsv is not None:
        pixels = (_shift_hsv_8bit if limits.eight_bit else _shift_hsv)(pixels, draw.hsv)
    if draw.contrast is not None:
        brightness, contrast = draw.contrast
        pixels *= np.float32(1 + contrast)
        pixels += np.float32(255 * brightness)
        np.clip(pixels, 0, 255, out=pixels)
    return pixels


def _transform(image: np.ndarray, draw: BlendDraw, recipe: Recipe) -> np.ndarray:
    """Source-target transform: colours, then either lost resolution or sharpening. uint8 in, float32[H,W,3] out."""
    height, width = image.shape[:2]
    small = (max(int(width / draw.down_factor), 1), max(int(height / draw.down_factor), 1))
    if draw.down_factor > 1 and recipe.down_range:
        pixels = cv2.resize(_recolour(image, draw.colour, recipe.single), small, interpolation=cv2.INTER_AREA)
        return cv2.resize(pixels, (width, height))
    if draw.down_factor > 1:
        # Nearest-neighbour sampling and colour changes of single pixels commute: sample first, there is less to do.
        image = cv2.resize(image, small, interpolation=cv2.INTER_NEAREST)
        return cv2.resize(_recolour(image, draw.colour, recipe.single), (width, height))
    alpha, lightness = draw.sharpen
    kernel = np.full((3, 3), -alpha, np.float32)
    kernel[1, 1] = 1 - alpha + alpha * (8 + lightness)
    return np.clip(cv2.filter2D(_recolour(image, draw.colour, recipe.single), -1, kernel), 0, 255)


def _clip_offset(draw: BlendDraw, points: np.ndarray) -> np.ndarray:
    """float64[2], px: where the blended copy stands in this frame of a clip."""
    return np.multiply(draw.offset, np.ptp(points[:68, 0]))


def affine(shape: tuple[int, int], draw: BlendDraw, points: np.ndarray) -> np.ndarray:
    """float64[2,3]: scale about the picture's centre, then translate; maps old pixel positions to new ones."""
    height, width = shape
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = centre - np.multiply(draw.scale, centre) + np.multiply(draw.translate, (width, height))
    offset += _clip_offset(draw, points)
    return np.column_stack([np.diag(draw.scale), offset])


def _mask(points: np.ndarray, shape: tuple[int, int], draw: BlendDraw, recipe: Recipe) -> np.ndarray:
    """Blend weight float32[H,W], 0..ratio, of one face; never all zero."""
    box = face_box(points[:68])
    zoom = 1.0 if recipe.elastic_face is None else float(max(box[2:] - box[:2])) / recipe.elastic_face
    softness = (draw.soft_shape, draw.erode_kernel, draw.blur_kernel, draw.blur_sigma)
    hull = hull_mask(points[:68] if draw.first_68 else points, shape, draw.hull)
    moved = cv2.warpAffine(hull, affine(shape, draw, points), shape[::-1])
    centre = (box[:2] + box[2:]) / 2 + _clip_offset(draw, points)  # the bent outline moves along
    bent = elastic(moved, draw.noise, centre, recipe.elastic_std * zoom, recipe.elastic_sigma * zoom)
    mask = soften(bent, *softness)
    if not mask.any():  # a sliver of a face at the picture's edge was moved out of it
        mask = soften(hull, *softness)
    if not mask.any():
        raise ValueError("no part of the face hull lies inside the image; skip this frame or crop around the face")
    return mask * np.float32(draw.ratio)


def blend(image: np.ndarray, landmarks: np.ndarray, draw: BlendDraw, recipe: str | Recipe = "intended") -> SelfBlend:
    """Apply fixed random choices to one face; `self_blend` without the dice. Same arguments, result and errors."""
    recipe = find_recipe(recipe)
    points = check_face(image, landmarks)
    shape = image.shape[:2]
    mask = _mask(points, shape, draw, recipe)
    altered = _transform(image, draw, recipe)
    source, real = (altered, image.copy()) if draw.transform_source else (image, _to_uint8(altered))
    x0, y0, x1, y1 = support(mask)
    move = affine(shape, draw, points)
    move[:, 2] -= x0, y0
    moved = cv2.warpAffine(
        source.astype(np.float32), move, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    if draw.flicker:
        moved = np.clip(moved + np.float32(255 * draw.flicker), 0, 255)
    target = real[y0:y1, x0:x1]
    moved -= target
    moved *= mask[y0:y1, x0:x1, None]
    moved += target
    fake = real.copy()
    fake[y0:y1, x0:x1] = _to_uint8(moved)
    return SelfBlend(fake, real, mask, 4 * mask * (1 - mask))


def self_blend(
    image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator, recipe: str | Recipe = "intended"
) -> SelfBlend:
    """Blend a face with an altered copy of itself (SBI, CVPR 2022, section 3).

    image: uint8[H,W,3] RGB, a loose crop around the face (see `loose_box`): moves and softening are relative to its
    sides. landmarks: float[68 or 81, 2] in its pixels. `real` is the image itself or, in half of the samples, its
    colour-altered copy; `fake` equals `real` exactly wherever `mask` is 0. ValueError if image and landmarks do not
    fit each other.
    """
    return blend(image, landmarks, draw_blend(rng, recipe), recipe)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _draw_augmentation(rng: np.random.Generator, recipe: Recipe) -> tuple[ColourDraw, int | None]:
    """Colours and JPEG quality, None for no compression."""
    draw = _draw_colour(rng, recipe.pair)
    compress = rng.random() < recipe.p_jpeg
    quality = int(rng.integers(recipe.jpeg_quality[0], recipe.jpeg_quality[1] + 1))
    return draw, quality if compress else None


def _augment(image: np.ndarray, draw: ColourDraw, quality: int | None, recipe: Recipe) -> np.ndarray:
    image = _to_uint8(_recolour(image, draw, recipe.pair))
    return image if quality is None else _jpeg(image, quality)


def augment_pair(
    real: np.ndarray, fake: np.ndarray, rng: np.random.Generator, recipe: str | Recipe = "intended"
) -> tuple[np.ndarray, np.ndarray]:
    """Training augmentation with the same parameters on both images uint8[H,W,3]: colours, then JPEG compression."""
    recipe = find_recipe(recipe)
    draw, quality = _draw_augmentation(rng, recipe)
    return _augment(real, draw, quality, recipe), _augment(fake, draw, quality, recipe)


def _around(box: np.ndarray, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the whole JPEG blocks around a crop box, and one block more, which colours bleed into."""
    low = np.maximum(box[:2].astype(int) // _BLOCK - 1, 0) * _BLOCK
    high = (box[2:].astype(int) // _BLOCK + 2) * _BLOCK
    x, y = (slice(min(a, side - 1), max(b, 1)) for a, b, side in zip(low, high, shape[::-1], strict=True))
    return y, x


def training_pair(
    image: np.ndarray,
    landmarks: np.ndarray,
    rng: np.random.Generator,
    size: int,
    recipe: str | Recipe = "intended",
    native: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One training sample from one real face: (real, fake uint8[size,size,3], mask float32[size,size]).

    image: uint8[H,W,3] RGB frame or crop; landmarks float[68 or 81, 2] in its pixels. Loose crop, flip (p=.5),
    self-blend, the same augmentation on both, the same final crop on all three: the face scaled to `size`, or if
    `native` a window of `size` pixels at its own resolution. ValueError as in `self_blend`.
    """
    recipe = find_recipe(recipe)
    points = check_face(image, landmarks)
    x0, y0, x1, y1 = loose_box(points, image.shape[:2])
    image, points = image[y0:y1, x0:x1], points - np.array([x0, y0], np.float32)
    if rng.random() < 0.5:
        image, points = flip(image, points)
    sample = self_blend(image, points, rng, recipe)
    augmentation = _draw_augmentation(rng, recipe)
    box = np.rint(crop_box(points, rng, side=size if native else None))
    mask = np.minimum(crop(sample.mask, box, size), 1)  # area averages of 1 may round to just above
    # Pixels that the crop leaves out need no augmentation; whole blocks keep the compression as it was.
    rows, columns = _around(box, image.shape[:2])
    inner = box - np.array([columns.start, rows.start] * 2)
    real, fake = (_augment(part[rows, columns], *augmentation, recipe) for part in (sample.real, sample.fake))
    return crop(real, inner, size), crop(fake, inner, size), mask
