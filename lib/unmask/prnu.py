"""Camera fingerprints: the noise residual of a picture, the sensor pattern that many residuals share, and matching.

A sensor's photo-response non-uniformity K multiplies the light, I = I0 (1 + K) + noise (Chen et al., IEEE TIFS 3(1),
2008). What a denoiser leaves of a picture therefore holds K I; averaged over frames it identifies the camera.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import norm

SIGMA = 5.0
LEVELS = 4
WINDOWS = (3, 5, 7, 9)
MIN_SIDE = 64
GREY = (0.299, 0.587, 0.114)
# Orthogonal Daubechies wavelet with 8 taps (Daubechies 1988, table 1), the scaling filter.
DB4 = (
    0.23037781330885523, 0.7148465705525415, 0.6308807679295904, -0.02798376941698385,
    -0.18703481171888114, 0.030841381835986965, 0.032883011666982945, -0.010597401784997278,
)  # fmt: skip
ROWS = 4  # rows that a wavelet filter makes at once
RESOLVED = 1e-10  # variance; a sensor's pattern has 1e-6 and more, rounding of a flat picture 1e-12 and less
BATCH_PIXELS = 2**20  # frames are denoised in batches of about this many pixels, which bounds the memory


@lru_cache
def _filters(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Filters of `_analyse` [4*ROWS,1,6+2*ROWS,8] and of `_synthesise` [4*ROWS,4,3+ROWS,4]; approximation first.

    Each makes ROWS rows of every band, or ROWS pairs of rows of a plane, at once: sixteen channels fill a vector of
    the processor, four leave most of it idle.
    """
    low = torch.tensor(DB4, dtype=dtype, device=device)
    high = low.flip(0) * torch.tensor([1.0, -1.0] * 4, dtype=dtype, device=device)
    bands = torch.stack([torch.outer(a, b) for a in (low, high) for b in (low, high)])  # [4,8,8]
    # The four phases of the doubled grid, each a plain convolution of the bands: [row phase, column phase, band, 4, 4].
    phases = bands.view(4, 4, 2, 4, 2).flip(1, 3).permute(2, 4, 0, 1, 3)
    analysis, synthesis = bands.new_zeros(4, ROWS, 6 + 2 * ROWS, 8), bands.new_zeros(ROWS, 2, 2, 4, 3 + ROWS, 4)
    for row in range(ROWS):
        analysis[:, row, 2 * row : 2 * row + 8] = bands
        synthesis[row, ..., row : row + 4, :] = phases
    return analysis.view(4 * ROWS, 1, -1, 8), synthesis.view(4 * ROWS, 4, -1, 4)


def _mirrored(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x[N,1,H,W] extended by half-sample symmetry, as far as filters of 8 taps and stride 2 reach; zeros to `rows`."""
    count, _, height, width = x.shape
    below, right = 6 + height % 2, 6 + width % 2
    out = x.new_empty(count, 1, rows, 6 + width + right)
    inner = out[..., 6 : 6 + height, :]
    inner[..., 6 : 6 + width] = x
    inner[..., :6] = x[..., :6].flip(-1)
    inner[..., 6 + width :] = x[..., width - right :].flip(-1)
    out[..., :6, :] = inner[..., :6, :].flip(-2)
    out[..., 6 + height : 6 + height + below, :] = inner[..., height - below :, :].flip(-2)
    out[..., 6 + height + below :, :] = 0
    return out


def _analyse(x: torch.Tensor, analysis: torch.Tensor) -> torch.Tensor:
    """One level of the wavelet transform: [N,1,H,W] to [N,4,h,(W+7)//2].

    The first (H+7)//2 of the h rows count; those below fill the last block of ROWS for `_synthesise`.
    """
    blocks = -(-x.shape[-2] // (2 * ROWS)) + 1
    bands = F.conv2d(_mirrored(x, 2 * ROWS * blocks + 6), analysis, stride=(2 * ROWS, 2))
    return bands.view(len(x), 4, ROWS, blocks, -1).transpose(2, 3).reshape(len(x), 4, ROWS * blocks, -1)


def _synthesise(bands: torch.Tensor, synthesis: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `_analyse`: [N,4,h,w] to [N,1,height,width]."""
    phases = F.conv2d(bands, synthesis, stride=(ROWS, 1))
    phases = phases.view(len(bands), 2 * ROWS, 2, -1, phases.shape[-1]).transpose(1, 3)  # [N,blocks,column,rows,w]
    plane = torch.stack([phases[:, :, 0], phases[:, :, 1]], -1)
    return plane.view(len(bands), 1, -1, 2 * phases.shape[-1])[..., :height, :width]


def _least_mean(energy: torch.Tensor) -> torch.Tensor:
    """Smallest local mean over the square WINDOWS.

    `energy` [N,C,H+8,W+8] is padded by four on every side; the answer is [N,C,H,W]. Sums grow from window to window,
    and the minimum runs along, so no stack of windows is ever held.
    """
    height, width = energy.shape[-2] - 8, energy.shape[-1] - 8

    def below(x: torch.Tensor, k: int) -> torch.Tensor:
        return x[..., k : k + height, :]

    rows = energy[..., 4 : 4 + width].clone()
    pairs, square, least = torch.empty_like(rows[..., 1:, :]), torch.empty_like(below(rows, 0)), None
    for r in range(1, 5):
        rows += energy[..., 4 - r : 4 - r + width]
        rows += energy[..., 4 + r : 4 + r + width]
        torch.add(rows[..., :-1, :], rows[..., 1:, :], out=pairs)
        torch.add(below(pairs, 4 - r), below(rows, 4 + r), out=square)
        for k in range(6 - r, 4 + r, 2):
            square += below(pairs, k)
        square *= 1 / (2 * r + 1) ** 2
        least = square.clone() if least is None else torch.minimum(least, square, out=least)
    return least


def _noise_share(energy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Wiener filter: the share noise / (variance + noise) of each coefficient, variance = max(energy - noise, 0).

    `energy` as in `_least_mean`.
    """
    return _least_mean(energy).clamp_(min=noise).reciprocal_().mul_(noise)


def _denoised_rest(planes: torch.Tensor, sigma: float) -> torch.Tensor:
    """What the wavelet-domain Wiener filter takes away from planes [N,H,W] in grey levels (Mihcak et al. 1999)."""
    x, noise, levels = planes.unsqueeze(1), planes.new_tensor(sigma**2), []
    analysis, synthesis = _filters(planes.dtype, planes.device)
    for _ in range(LEVELS):
        size = x.shape[-2:]
        bands = _analyse(x, analysis)
        x, details = (part[..., : (size[0] + 7) // 2, :] for part in (bands[:, :1], bands[:, 1:]))
        details *= _noise_share(F.pad(details.square(), (4, 4, 4, 4)), noise)
        levels.append((bands, x, size))
    rest = torch.zeros_like(x)
    for bands, approximation, size in reversed(levels):
        approximation.copy_(rest)
        rest = _synthesise(bands, synthesis, *size)
    return rest.squeeze(1)


def zero_mean(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Remove mean, row means and column means on each of the four parity grids of x[...,H,W], in place.

    That takes away what cameras of a kind share: the colour filter's and the encoder's linear patterns (Chen et al.
    2008, section IV-A). `mask` bool[...,H,W]: pixels that count; the others become 0.
    """
    if mask is None:  # all four grids in two products of rank two
        even, odd = (torch.arange(max(x.shape[-2:]), device=x.device) % 2 == k for k in (0, 1))
        parity = torch.stack([even, odd], -1).to(x.dtype)  # [.,2]
        down, across = parity[: x.shape[-2]], parity[: x.shape[-1]].T
        rows = torch.stack([x[..., 0::2].mean(-1), x[..., 1::2].mean(-1)], -1)  # [...,H,2]
        columns = torch.stack([x[..., 0::2, :].mean(-2), x[..., 1::2, :].mean(-2)], -2)  # [...,2,W]
        means = torch.stack([columns[..., 0::2].mean(-1), columns[..., 1::2].mean(-1)], -1)
        x -= rows @ across
        x -= down @ (columns - means @ across)
        return x
    for dy in (0, 1):
        for dx in (0, 1):
            part, keep = x[..., dy::2, dx::2], mask[..., dy::2, dx::2]
            for axes in ((-2, -1), *((-1,), (-2,)) * 5):  # beside a hole, rows and columns are not independent
                total = torch.where(keep, part, 0).sum(axes, keepdim=True)
                part -= total / keep.sum(axes, keepdim=True).clamp(min=1)
                part *= keep
    return x


def _whitened(x: torch.Tensor, noise: torch.Tensor, reference: bool) -> torch.Tensor:
    """Wiener filter in the Fourier domain: removes the peaks of periodic patterns from x[N,H,W]; noise [N,1,1,1].

    The reference works on the whole plane with windows that end at its border; otherwise half the plane is computed
    and windows go round, which differs in the four outermost frequencies only.
    """
    size = x.shape[-2:]
    spectrum = torch.fft.fft2(x, norm="ortho") if reference else torch.fft.rfft2(x, norm="ortho")
    count, height, width = spectrum.shape
    framed = x.new_zeros(count, 1, height + 8, width + 8)
    energy = framed[:, 0, 4:-4, 4:-4]
    energy.copy_((spectrum * spectrum.conj()).real)
    if not reference:  # |F(-u, v)| lies beyond the two ends of the half plane
        last = width - 1 + size[1] % 2
        for columns, to in (
            (energy[..., 1:5], framed[:, 0, 4:-4, :4]),
            (energy[..., last - 4 : last], framed[:, 0, 4:-4, -4:]),
        ):
            to.copy_(columns.flip(-2, -1).roll(1, -2))
        framed[..., :4, :] = framed[..., -8:-4, :]
        framed[..., -4:, :] = framed[..., 4:8, :]
    spectrum *= _noise_share(framed, noise).squeeze(1)
    if reference:
        return torch.fft.ifft2(spectrum, norm="ortho").real
    return torch.fft.irfft2(spectrum, s=size, norm="ortho")


def _cleaned(x: torch.Tensor, mask: torch.Tensor | None = None, reference: bool = False) -> torch.Tensor:
    """Zero mean and Wiener filter in the Fourier domain, for residuals and fingerprints [N,H,W]; changes x."""
    x = zero_mean(x, mask)
    pixels = x.shape[-2] * x.shape[-1] if mask is None else mask.sum((-2, -1), keepdim=True)
    noise = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).square() / (pixels - 1)
    x *= noise > RESOLVED  # less is rounding, which all flat pictures share
    x = _whitened(x, noise.unsqueeze(1).nan_to_num(0).clamp(min=1e-30), reference)
    return x if mask is None else x * mask


def _luma(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8[N,H,W,3] to grey levels [N,H,W]."""
    red, green, blue = GREY
    luma = images[..., 0].to(dtype).mul_(red)
    return luma.add_(images[..., 1], alpha=green).add_(images[..., 2], alpha=blue)


def _checked(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    batch = images[None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[-1] != 3 or batch.dtype != np.uint8:
        raise ValueError(f"Pictures are uint8[H,W,3] or uint8[N,H,W,3], not {images.dtype}{list(images.shape)}.")
    if min(batch.shape[1:3]) < MIN_SIDE:
        raise ValueError(f"A noise residual needs at least {MIN_SIDE} pixels on each side, not {batch.shape[1:3]}.")
    return batch


def _keep_memory() -> None:
    """Let the allocator keep what one batch frees for the next: fresh pages cost as much as the arithmetic on them.

    glibc returns the free top of its heap beyond twice the largest block that it has seen unmapped; one untouched block
    of 31 MiB, just below its limit, ends that. It costs microseconds and does nothing elsewhere.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _batches(count: int, pixels: int) -> Iterable[slice]:
    step = max(1, BATCH_PIXELS // pixels)
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def noise_residual(image: np.ndarray, sigma: float = SIGMA, reference: bool = False, device: str = "cpu") -> np.ndarray:
    """The noise residual of pictures: uint8[H,W,3] to float32[H,W], or a batch uint8[N,H,W,3] to float32[N,H,W].

    Wavelet Wiener filter (Mihcak, Kozintsev, Ramchandran, ICASSP 1999) with db4, 4 levels, windows of 3, 5, 7 and 9
    and noise `sigma` in grey levels; then zero mean on the parity grids and the Wiener filter in the Fourier domain
    (Chen et al. 2008). `reference=True` follows the published definition step by step: each colour by itself, grey
    afterwards, float64, symmetric extension, windows that end with zeros at a border. The default takes the luma first,
    in float32: much faster, and a few per cent apart. Raises ValueError for other shapes and pictures below MIN_SIDE
    pixels.
    """
    batch = _checked(image)
    _keep_memory()
    out = np.empty(batch.shape[:3], np.float32)
    for part in _batches(len(batch), batch.shape[1] * batch.shape[2]):
        frames = torch.from_numpy(np.ascontiguousarray(batch[part])).to(device)
        if reference:
            colours = frames.double().movedim(-1, 1)
            rest = _denoised_rest(colours.flatten(0, 1), sigma).view(colours.shape).movedim(1, -1)
            rest = rest @ torch.tensor(GREY, dtype=torch.float64, device=rest.device)
        else:
            rest = _denoised_rest(_luma(frames), sigma)
        out[part] = _cleaned(rest, reference=reference).float().cpu().numpy()
    return out[0] if np.ndim(image) == 3 else out


def _light(frames: torch.Tensor) -> torch.Tensor:
    """Grey levels [N,H,W] that carry the pattern: damped above 252, nothing where a colour is clipped flat."""
    luma = _luma(frames)
    light = torch.where(luma < 252, luma, 252 * torch.exp(-((luma - 252) ** 2) / 6))
    edge = F.pad(frames.movedim(-1, 1).float(), (1, 1, 1, 1), mode="replicate")
    centre = edge[..., 1:-1, 1:-1]
    same = [edge[..., 1 + dy : edge.shape[-2] - 1 + dy, 1 + dx : edge.shape[-1] - 1 + dx] == centre
            for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]  # fmt: skip
    clipped = (centre >= 250) & same[0] & same[1] & same[2] & same[3]
    return light.masked_fill_(clipped.any(1), 0)


class Accumulator:
    """Maximum-likelihood fingerprint K = sum(W I) / (sum(I^2) + 1) of frames that come one after the other.

    Chen et al. 2008, eq. 11. Memory is two planes per region, however many frames are added. A region is a set of
    pixels that is followed by itself, such as the face and the background; all share one denoising.
    """

    def __init__(self, height: int, width: int, regions: int = 1, sigma: float = SIGMA, device: str = "cpu"):
        self.sigma, self.device = sigma, device
        self.evidence = torch.zeros(regions, height, width, device=device)
        self.weight = torch.zeros_like(self.evidence)

    def add(self, images: np.ndarray, masks: np.ndarray | None = None, weights: np.ndarray | None = None) -> None:
        """Add frames uint8[N,H,W,3]; masks bool[N,H,W] or bool[N,regions,H,W], True = use; weights float[N] of frames.

        Raises ValueError for other shapes.
        """
        images = _checked(images)
        if images.shape[1:3] != self.weight.shape[1:]:
            raise ValueError(
                f"Frames of {images.shape[1:3]} do not fit a fingerprint of {tuple(self.weight.shape[1:])}."
            )
        count, (regions, height, width) = len(images), self.weight.shape
        if masks is not None and np.shape(masks) not in ((count, height, width), (count, regions, height, width)):
            raise ValueError(f"Masks of {np.shape(masks)} do not fit {count} frames.")
        if weights is not None and np.shape(weights) != (count,):
            raise ValueError(f"There are {count} frames, but weights of {np.shape(weights)}.")
        for part in _batches(len(images), images.shape[1] * images.shape[2]):
            frames = torch.from_numpy(np.ascontiguousarray(images[part])).to(self.device)
            rest, light = _denoised_rest(_luma(frames), self.sigma), _light(frames)
            parts = torch.stack([rest * light, light.square()], 1)  # [n,2,H,W]
            if weights is not None:
                parts *= torch.as_tensor(np.asarray(weights[part]), dtype=parts.dtype, device=self.device)[
                    :, None, None, None
                ]
            if masks is None:
                total = parts.sum(0, keepdim=True).expand(len(self.weight), -1, -1, -1)
            else:
                use = torch.from_numpy(np.ascontiguousarray(masks[part])).to(self.device)
                use = use.unsqueeze(1) if use.ndim == 3 else use
                total = torch.einsum("nrhw,nphw->rphw", use.to(parts.dtype), parts)
            self.evidence += total[:, 0]
            self.weight += total[:, 1]

    @property
    def valid(self) -> np.ndarray:
        """Pixels that any frame said something about, bool[regions,H,W]."""
        return (self.weight > 0).cpu().numpy()

    def fingerprints(self) -> np.ndarray:
        """float32[regions,H,W], relative to the light; zero mean, whitened, and 0 where no frame counted."""
        valid = self.weight > 0
        whole = bool(valid.all())
        return _cleaned(self.evidence / (self.weight + 1), None if whole else valid).cpu().numpy()


def fingerprint(
    images: Iterable[np.ndarray], masks: Iterable[np.ndarray] | None = None, sigma: float = SIGMA, device: str = "cpu"
) -> np.ndarray:
    """The camera fingerprint float32[H,W] of frames uint8[H,W,3] (an array or a stream), masks bool[H,W] True = use.

    See `Accumulator`, which it feeds one frame after the other. Raises ValueError for no frames or mixed sizes.
    """
    total: Accumulator | None = None
    pairs = ((image, None) for image in images) if masks is None else zip(images, masks, strict=True)
    for image, mask in pairs:
        total = total or Accumulator(*image.shape[:2], sigma=sigma, device=device)
        total.add(image[None], None if mask is None else np.asarray(mask, bool)[None])
    if total is None:
        raise ValueError("There is no frame to take a fingerprint from.")
    return total.fingerprints()[0]


def ncc(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Normalised cross-correlation of two patterns [H,W] at the same place, over `mask` bool[H,W] if given.

    Between patterns of different cameras it scatters about 0 with standard deviation 1/sqrt(pixels). 0 if either is
    constant. Raises ValueError for different shapes.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.shape != b.shape or (mask is not None and np.shape(mask) != a.shape):
        raise ValueError("Patterns and mask must have the same shape; pictures of other sizes cannot be compared.")
    x, y = (v.ravel() if mask is None else v[np.asarray(mask, bool)] for v in (a, b))
    if x.size == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else 0.0


@dataclass(frozen=True)
class Peak:
    """A correlation peak: its energy ratio `pce`, the `shift` (dy, dx) of b against a, the `false_alarm` rate."""

    pce: float
    shift: tuple[int, int]
    false_alarm: float


def correlation_peak(a: np.ndarray, b: np.ndarray, search: int = 0) -> Peak:
    """The highest correlation of two patterns [H,W] over circular shifts of up to `search` pixels, and its PCE.

    PCE = sign peak^2 / mean(c^2 outside the 11 x 11 pixels around the peak); P_FA = 1 - (1 - Q(sqrt PCE))^S for S
    shifts (Goljan, Fridrich, Filler, SPIE 7254, 2009). Aligned pictures should not be searched: every shift tried is
    another chance for noise. Raises ValueError for different shapes or patterns below MIN_SIDE pixels.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.shape != b.shape or min(a.shape) < 12:
        raise ValueError("PCE needs two patterns of the same shape, at least 12 pixels on each side.")
    height, width = a.shape
    product = np.fft.rfft2(b - b.mean()) * np.conj(np.fft.rfft2(a - a.mean()))
    surface = np.fft.irfft2(product, s=a.shape)
    dy, dx = (np.arange(-min(search, (n - 1) // 2), min(search, (n - 1) // 2) + 1) for n in (height, width))
    allowed = surface[np.ix_(dy % height, dx % width)]
    i, j = np.unravel_index(np.argmax(allowed), allowed.shape)
    peak, y, x = allowed[i, j], dy[i], dx[j]
    near = surface[np.ix_(np.arange(y - 5, y + 6) % height, np.arange(x - 5, x + 6) % width)]
    mean = (np.square(surface).sum() - np.square(near).sum()) / (surface.size - near.size)
    pce = float(np.sign(peak) * peak**2 / mean) if mean > 0 else 0.0
    miss = norm.logcdf(np.sqrt(pce)) if pce > 0 else np.log(0.5)
    return Peak(pce, (int(y), int(x)), float(-np.expm1(allowed.size * miss)))


def pce(a: np.ndarray, b: np.ndarray, search: int = 0) -> float:
    """Peak-to-correlation energy of two patterns [H,W], aligned unless `search` pixels; see `correlation_peak`.

    Above 50 to 60 two pictures are usually said to be of one camera.
    """
    return correlation_peak(a, b, search).pce
