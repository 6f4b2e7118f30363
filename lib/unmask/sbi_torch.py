"""Self-blended images in batches, on the processor or a GPU: `unmask.sbi.blend` for many faces at once.

The random choices are those of `sbi.draw_blend` and `sbi.draw_clip`, so one draw gives the same fake here and there, up
to rounding: OpenCV places pixels on a grid of 1/32 px when it warps, torch does not. Hull polygons are filled by OpenCV
on the processor (0.1 ms a face); all else runs on the device of the images. Made for a GPU: on one processor core
`sbi.blend` is several times faster, since it works only where there is a mask.

Resizing and blurring are separable and linear, so each is a pair of matrices, one per axis. A batch can then mix mask
sizes, kernels and kinds of interpolation, with exact borders.
"""

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from unmask import hulls, sbi

__all__ = ["blend_batch"]


def _like(values: Sequence, images: torch.Tensor) -> torch.Tensor:
    """float32 tensor of one value (number or array) a sample, on the device of the batch."""
    return torch.from_numpy(np.array(values, np.float32)).to(images.device)


# --- colours ---------------------------------------------------------------------------------------------------------


def _hue(pixels: torch.Tensor, value: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Hue as a multiple of `spread`, a sixth of the circle each: float32[N,H,W]."""
    red, green, blue = pixels.unbind(1)
    hue = torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    return torch.where(value == red, green - blue, hue)


def _from_hsv(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """RGB [N,3,H,W] of hue in sixths of the circle, saturation 0..1 and value, each [N,H,W]."""
    sector = (torch.tensor([5.0, 3.0, 1.0], device=hue.device)[:, None, None] + hue[:, None]) % 6
    part = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * part)


def _shift_hsv(pixels: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`sbi._shift_hsv` for pixels [N,3,H,W] by `shift` [N,3,1,1]."""
    value = pixels.amax(1)
    spread = value - pixels.amin(1)
    hue = _hue(pixels, value, spread) / spread.clamp(min=1e-9) + 6 * shift[:, 0]
    saturation = spread / value.clamp(min=1e-9) * (1 + shift[:, 1])
    return _from_hsv(hue % 6, saturation.clamp(max=1), (value * (1 + shift[:, 2])).clamp(max=255))


def _shift_hsv_8bit(pixels: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`sbi._shift_hsv_8bit` for pixels [N,3,H,W] by `shift` [N,3,1,1]: OpenCV's integers there, within 1 level back."""
    pixels = pixels.round()
    value = pixels.amax(1)
    spread = value - pixels.amin(1)

    def ratio(top: torch.Tensor, bottom: torch.Tensor, scale: int) -> torch.Tensor:
        return (top.int() * torch.round(scale * 4096 / bottom.clamp(min=1)).int() + 2048) >> 12

    hue = ((ratio(_hue(pixels, value, spread), spread, 30) % 180 + shift[:, 0]) % 180).floor()
    saturation = (ratio(spread, value, 255) + shift[:, 1]).clamp(0, 255).floor()
    value = (value + shift[:, 2]).clamp(0, 255).floor()
    return (_from_hsv(hue / 30, saturation / 255, value) + 1e-3).floor()  # OpenCV's vector code cuts off here too


def _recolour(pixels: torch.Tensor, colours: list[sbi.ColourDraw], eight_bit: bool) -> torch.Tensor:
    nothing = np.zeros(3)
    rgb = _like([nothing if c.rgb is None else c.rgb for c in colours], pixels)
    pixels = (pixels + rgb[:, :, None, None]).clamp(0, 255)
    turned = [i for i, c in enumerate(colours) if c.hsv is not None]
    if turned:
        shift = _like([colours[i].hsv for i in turned], pixels)[:, :, None, None]
        pixels[turned] = (_shift_hsv_8bit if eight_bit else _shift_hsv)(pixels[turned], shift)
    light = _like([nothing[:2] if c.contrast is None else c.contrast for c in colours], pixels)
    brightness, contrast = light[:, :, None, None, None].unbind(1)
    return (pixels * (1 + contrast) + 255 * brightness).clamp(0, 255)


def _transform(pixels: torch.Tensor, draws: Sequence[sbi.BlendDraw], recipe: sbi.Recipe) -> torch.Tensor:
    """Source-target transform: colours, then either lost resolution or sharpening. float32[N,3,H,W], 0..255."""
    pixels = _recolour(pixels, [d.colour for d in draws], recipe.single.eight_bit)
    result, size = torch.empty_like(pixels), pixels.shape[2:]
    for factor in {d.down_factor for d in draws}:
        chosen = [i for i, d in enumerate(draws) if d.down_factor == factor]
        part = pixels[chosen]
        if factor > 1 and recipe.down_range:
            for axis, side in zip((2, 3), size, strict=True):
                few = max(int(side / factor), 1)
                ends = (torch.tensor([float(n)], device=pixels.device) for n in (side, few))
                average = _resize(*ends, (few, side), torch.tensor([True], device=pixels.device))[0]
                part = torch.movedim(torch.movedim(part, axis, -1) @ average.T, -1, axis)
            part = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        elif factor > 1:
            small = [max(int(side / factor), 1) for side in size]
            rows, columns = (
                torch.tensor([k * side // few for k in range(few)], device=pixels.device)
                for side, few in zip(size, small, strict=True)
            )
            part = F.interpolate(part[:, :, rows][..., columns], size=size, mode="bilinear", align_corners=False)
        else:
            alpha, lightness = _like([draws[i].sharpen for i in chosen], pixels)[:, :, None, None, None].unbind(1)
            around = F.avg_pool2d(F.pad(part, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
            part = ((1 + alpha * (8 + lightness)) * part - 9 * alpha * around).clamp(0, 255)
        result[chosen] = part
    return result


# --- geometry --------------------------------------------------------------------------------------------------------


def _grid(x: torch.Tensor, y: torch.Tensor, size: tuple[int, int], corners: bool) -> torch.Tensor:
    """Sampling grid [N,...,2] for `grid_sample` from pixel positions in a picture of `size` (h, w)."""
    height, width = size
    if corners:
        return torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    return torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)


def _pixels(size: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = (torch.arange(side, dtype=torch.float32, device=device) for side in size)
    return x[None, None, :].expand(1, *size), y[None, :, None].expand(1, *size)


def _move(pictures: torch.Tensor, affine: torch.Tensor, padding: str) -> torch.Tensor:
    """Pictures [N,C,H,W] under the affine maps [N,2,3] from old to new positions (scale and shift only), bilinear."""
    size = pictures.shape[2:]
    x, y = _pixels(size, pictures.device)
    scale_x, scale_y, shift_x, shift_y = (affine[:, i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    grid = _grid(*torch.broadcast_tensors((x - shift_x) / scale_x, (y - shift_y) / scale_y), size, corners=True)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode=padding, align_corners=True)


@lru_cache(maxsize=4)
def _knot_blur(device: torch.device) -> torch.Tensor:
    """Matrix [KNOTS,KNOTS] that blurs one axis of the random field, with the amplitude that keeps its deviation 1."""
    sigma = hulls.KNOT_SIGMA
    side = round(8 * sigma + 1) | 1  # OpenCV's choice for floating point
    taps = cv2.getGaussianKernel(side, sigma)
    blur = cv2.sepFilter2D(np.eye(hulls.KNOTS), -1, np.ones(1), taps, borderType=cv2.BORDER_REFLECT)
    return torch.from_numpy(blur * np.sqrt(2 * np.sqrt(np.pi) * sigma)).float().to(device)


def _elastic(masks: torch.Tensor, noise: torch.Tensor, centre: torch.Tensor, std, sigma) -> torch.Tensor:
    """`hulls.elastic` for masks [N,1,H,W]; noise [N,2,KNOTS,KNOTS], centre [N,2] (x, y), std and sigma [N] in px."""
    size = masks.shape[2:]
    blur = _knot_blur(masks.device)
    field = std[:, None, None, None] * (blur @ noise @ blur.T)
    x, y = _pixels(size, masks.device)
    step, middle = (sigma / hulls.KNOT_SIGMA)[:, None, None], (hulls.KNOTS - 1) / 2
    knots = [(p - c[:, None, None]) / step + middle for p, c in zip((x, y), centre.unbind(1), strict=True)]
    knots = _grid(*torch.broadcast_tensors(*knots), (hulls.KNOTS, hulls.KNOTS), corners=False)
    bend = F.grid_sample(field, knots, mode="bicubic", padding_mode="reflection", align_corners=False)
    grid = _grid(x + bend[:, 0], y + bend[:, 1], size, corners=True)
    return F.grid_sample(masks, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


# --- softening -------------------------------------------------------------------------------------------------------


def _resize(old: torch.Tensor, new: torch.Tensor, shape: tuple[int, int], area: torch.Tensor | None) -> torch.Tensor:
    """Matrices [N, *shape] from `old` [N] to `new` [N] pixels: area averages where `area` [N], else bilinear."""
    i = torch.arange(shape[0], dtype=torch.float32, device=old.device)[None, :, None]
    j = torch.arange(shape[1], dtype=torch.float32, device=old.device)[None, None, :]
    old, new = old[:, None, None], new[:, None, None]
    factor = old / new
    centre = torch.minimum(((i + 0.5) * factor - 0.5).clamp(min=0), old - 1)
    weights = (1 - (centre - j).abs()).clamp(min=0)
    if area is not None:
        overlap = (torch.minimum((i + 1) * factor, j + 1) - torch.maximum(i * factor, j)).clamp(min=0) / factor
        weights = torch.where(area[:, None, None], overlap, weights)
    return weights * (i < new)


def _blur(sizes: list[int], kernels: list[int], sigmas: list[float], side: int, device: torch.device) -> torch.Tensor:
    """Matrices [N,side,side] that blur `sizes[n]` pixels with OpenCV's Gaussian taps, mirrored at their ends."""
    reach = max(kernels) // 2
    taps = np.zeros((len(sizes), 2 * reach + 1))
    for row, kernel, sigma in zip(taps, kernels, sigmas, strict=True):
        row[reach - kernel // 2 : reach + kernel // 2 + 1] = cv2.getGaussianKernel(kernel, sigma)[:, 0]
    taps = torch.from_numpy(taps).float().to(device)
    last = torch.tensor(sizes, device=device)[:, None, None] - 1
    rows = torch.arange(side, device=device)[None, :, None]
    period = (2 * last).clamp(min=1)
    index = (rows + torch.arange(-reach, reach + 1, device=device)) % period
    index = torch.minimum(index, period - index)
    weights = taps[:, None] * (rows <= last)
    return torch.zeros(len(sizes), side, side, device=device).scatter_add_(2, index, weights)


def _soften(masks: torch.Tensor, draws: Sequence[sbi.BlendDraw]) -> torch.Tensor:
    """`hulls.soften` for masks [N,1,H,W], each by its own draw; [N,H,W]."""
    device, size = masks.device, tuple(masks.shape[2:])
    shapes = [d.soft_shape for d in draws]
    canvas = max(max(shape) for shape in shapes)
    small = [list(column) for column in zip(*shapes, strict=True)]
    counts = [_like(side, masks) for side in small]
    sides = [torch.full_like(count, side) for count, side in zip(counts, size, strict=True)]
    shrinks = (sides[0] > counts[0]) & (sides[1] > counts[1])
    down = [_resize(old, new, (canvas, side), shrinks) for old, new, side in zip(sides, counts, size, strict=True)]
    up = [_resize(new, old, (side, canvas), None) for old, new, side in zip(sides, counts, size, strict=True)]
    first = [_blur(n, [d.erode_kernel for d in draws], [0] * len(draws), canvas, device) for n in small]
    again = [_blur(n, [d.blur_kernel for d in draws], [d.blur_sigma for d in draws], canvas, device) for n in small]

    def both(matrices: list[torch.Tensor], pictures: torch.Tensor) -> torch.Tensor:
        return matrices[0] @ pictures @ matrices[1].mT

    # What is missing to 1, not the mask itself: near zero it is exact in any arithmetic, TF32 included.
    missing = both(first, both(down, 1 - masks[:, 0]))
    inside = both(down, torch.ones_like(masks[:, 0])) > 0.5
    core = ((missing <= hulls.ERODE_TOLERANCE) & inside).float()
    thin = (core.sum((1, 2)) == 0)[:, None, None]
    soft = torch.where(thin, (1 - missing) * inside, both(again, core))
    peak = soft.amax((1, 2), keepdim=True)
    return both(up, soft / peak.clamp(min=1e-9)).clamp(max=1)


def _masks(images: torch.Tensor, points: list[np.ndarray], affine: torch.Tensor, draws, recipe) -> torch.Tensor:
    """Blend weights [N,H,W], 0..ratio; none is all zero."""
    shape = tuple(images.shape[1:3])
    filled = [
        hulls.hull_mask(face[:68] if d.first_68 else face, shape, d.hull) for face, d in zip(points, draws, strict=True)
    ]
    hull = torch.from_numpy(np.stack(filled)).to(images.device)[:, None]
    boxes = np.stack([hulls.face_box(face[:68]) for face in points])
    widths = boxes[:, 2:] - boxes[:, :2]
    zoom = 1.0 if recipe.elastic_face is None else widths.max(1) / recipe.elastic_face
    zoom = _like(np.broadcast_to(zoom, len(draws)), images)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + widths[:, :1] * np.array([d.offset for d in draws])
    noise = torch.from_numpy(np.stack([d.noise for d in draws])).to(images.device).permute(0, 3, 1, 2)
    moved = _move(hull, affine, "zeros")
    bent = _elastic(moved, noise, _like(centre, images), recipe.elastic_std * zoom, recipe.elastic_sigma * zoom)
    masks = _soften(bent, draws)
    lost = (masks.amax((1, 2)) == 0).nonzero()[:, 0].tolist()
    if lost:  # slivers of a face at the picture's edge were moved out of it
        masks[lost] = _soften(hull[lost], [draws[i] for i in lost])
        if (masks.amax((1, 2)) == 0).any():
            raise ValueError("no part of a face hull lies inside its image; skip it or crop around the face")
    return masks * _like([d.ratio for d in draws], images)[:, None, None]


@torch.no_grad()
def blend_batch(
    images: torch.Tensor,
    landmarks: torch.Tensor | np.ndarray,
    draws: Sequence[sbi.BlendDraw],
    recipe: str | sbi.Recipe = "intended",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Self-blends of a batch of faces (SBI, CVPR 2022, section 3): (fake, real, mask, boundary).

    images: uint8[N,H,W,3] RGB on any device, loose crops of one size. landmarks: float[N,68 or 81,2] in their pixels.
    draws: one a sample. Returns fake and real uint8[N,H,W,3], mask and boundary float32[N,H,W] on the same device, as
    `sbi.blend` gives them one by one, up to rounding; `fake` equals `real` exactly wherever `mask` is 0. ValueError if
    images, landmarks and draws do not fit each other.
    """
    recipe = sbi.find_recipe(recipe)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError("images must be a uint8 tensor [N, H, W, 3] in RGB order with at least one image")
    if not len(images) == len(landmarks) == len(draws):
        raise ValueError(f"{len(images)} images, {len(landmarks)} faces and {len(draws)} draws: give one each a sample")
    shape = tuple(images.shape[1:3])
    points = [hulls.check_fit(face, shape) for face in torch.as_tensor(landmarks).cpu().numpy()]
    affine = _like([sbi.affine(shape, d, face) for d, face in zip(draws, points, strict=True)], images)
    with torch.autocast(images.device.type, enabled=False):
        masks = _masks(images, points, affine, draws, recipe)
        pixels = images.permute(0, 3, 1, 2).float()
        altered = _transform(pixels, draws, recipe)
        from_source = torch.tensor([d.transform_source for d in draws], device=images.device)[:, None, None, None]
        source, real = torch.where(from_source, altered, pixels), torch.where(from_source, pixels, altered.round())
        flicker = _like([d.flicker for d in draws], images)[:, None, None, None]
        source = (_move(source, affine, "border") + 255 * flicker).clamp(0, 255)
        weight = masks[:, None]
        fake = (weight * source + (1 - weight) * real).clamp(0, 255).round()
    fake, real = (x.to(torch.uint8).permute(0, 2, 3, 1).contiguous() for x in (fake, real))
    return fake, real, masks, 4 * masks * (1 - masks)
