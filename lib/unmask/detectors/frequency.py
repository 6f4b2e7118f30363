"""Frequency branches of a ConvNeXt, chosen by name, and the ways in which they join it."""

import math

import torch
import torch.nn.functional as F
from torch import nn

# Three high-pass kernels of the spatial rich model (Fridrich and Kodovsky, IEEE TIFS 2012), as used by
# Zhou et al., CVPR 2018; with their divisors.
SRM = torch.tensor(
    [
        [[0, 0, 0, 0, 0], [0, -1, 2, -1, 0], [0, 2, -4, 2, 0], [0, -1, 2, -1, 0], [0, 0, 0, 0, 0]],
        [[-1, 2, -2, 2, -1], [2, -6, 8, -6, 2], [-2, 8, -12, 8, -2], [2, -6, 8, -6, 2], [-1, 2, -2, 2, -1]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, -2, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    ],
    dtype=torch.float32,
) / torch.tensor([4.0, 12.0, 2.0]).view(3, 1, 1)


class Branch(nn.Module):
    """A fixed `transform` of the crop, then a small BatchNorm stem: float[N,3,H,W] grey levels to float[N,C,H/4,W/4].

    channels: C. size: H = W in pixels. Normalising over the batch is what lets a branch learn from random weights
    within a few thousand images, where a patch stem stays at chance.
    """

    maps: int

    def __init__(self, channels: int, size: int, width: int = 24):
        super().__init__()
        self.scale = nn.BatchNorm2d(self.maps)
        layers = []
        for c_in, c_out, stride in ((self.maps, width, 1), (width, width, 2), (width, channels, 2)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        # One channel alone has no memory format, so that of the weights decides what follows.
        self.stem = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def transform(self, images: torch.Tensor) -> torch.Tensor:
        """float32[N,3,H,W] in 0..255 to the signal, float32[N,maps,H,W]."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # In full precision: kernels rounded to bf16 no longer sum to zero, and the FFT is not made for it at all.
        with torch.autocast(images.device.type, enabled=False):
            signal = self.transform(images.float())
        return self.stem(self.scale(signal.contiguous(memory_format=torch.channels_last)))


class SRMBranch(Branch):
    """Noise residuals of three high-pass filters for every colour, truncated softly at +-`limit` grey levels."""

    maps, limit = 9, 6.0

    def __init__(self, channels: int, size: int):
        super().__init__(channels, size)
        self.register_buffer("kernels", SRM.unsqueeze(1).repeat(3, 1, 1, 1), persistent=False)

    def transform(self, images: torch.Tensor) -> torch.Tensor:
        residual = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), self.kernels, groups=3)
        return self.limit * torch.tanh(residual / self.limit)


class FADBranch(Branch):
    """Bands of the crop's DCT, back as pictures: low, middle, high and all, of three colours each.

    Frequency-aware decomposition of F3Net (Qian et al., ECCV 2020, section 3.1): the band of coefficient (i, j) is that
    of i + j, with limits at S/2.82 and S/2; a learned tanh(W/2) is added to every mask. W starts at 0, not at noise:
    at grey levels 5 % of the low frequencies would drown all of the high ones.
    """

    maps = 12

    def __init__(self, channels: int, size: int):
        super().__init__(channels, size)
        place = torch.arange(size, dtype=torch.float64)
        dct = torch.cos(math.pi / size * place[:, None] * (place + 0.5)) * math.sqrt(2 / size)
        dct[0] /= math.sqrt(2)
        order = place[:, None] + place
        low, high = order < size / 2.82, order >= size / 2
        bands = torch.stack([low, ~low & ~high, high, torch.ones_like(low)])
        self.register_buffer("dct", dct.float(), persistent=False)
        self.register_buffer("bands", bands.float(), persistent=False)
        self.masks = nn.Parameter(torch.zeros(4, size, size))

    def transform(self, images: torch.Tensor) -> torch.Tensor:
        spectrum = self.dct @ images @ self.dct.T
        masked = spectrum.unsqueeze(1) * (self.bands + torch.tanh(self.masks / 2)).unsqueeze(1)
        return (self.dct.T @ masked @ self.dct).flatten(1, 2)


class FFTBranch(Branch):
    """Log amplitude of the 2-D FFT, log(1 + |F|) with an orthonormal F and frequency 0 in the middle.

    Its rows and columns are frequencies, not places, so it cannot be added to a picture's map: it joins by attention,
    where every place may look at every frequency, which the keys' positions tell apart.
    """

    maps = 3

    def transform(self, images: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.fft.fftshift(torch.fft.fft2(images, norm="ortho"), dim=(-2, -1)).abs())


class PhaseBranch(Branch):
    """The luma of the crop with all amplitudes 1, so that only its phase speaks (SPSL, Liu et al., CVPR 2021)."""

    maps = 1

    def transform(self, images: torch.Tensor) -> torch.Tensor:
        luma = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return torch.fft.irfft2(torch.sgn(torch.fft.rfft2(luma)), s=luma.shape[-2:], norm="ortho")


BRANCHES: dict[str, type[Branch]] = {"srm": SRMBranch, "fad": FADBranch, "fft": FFTBranch, "phase": PhaseBranch}


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights and bias of zero: what it adds to a network is nothing until it has learned."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class StemJoin(nn.Module):
    """Adds the branch, projected, to the output of the stem (stride 4): float[N,C,H,W] and the same, to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.project = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return x + self.project(branch)


def deepen(widths: list[int]) -> nn.Sequential:
    """From the branch's stride 4 to stride 16, where the map has widths[2] channels."""
    layers = []
    for c_in, c_out in zip(widths[:2], widths[1:3], strict=True):
        layers += [nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


class ConcatJoin(nn.Module):
    """Both maps side by side at stride 16, projected back and added: float[N,widths[2],H/16,W/16] stays one."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.down = deepen(widths)
        self.project = zeroed(nn.Conv2d(2 * widths[2], widths[2], 1))

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return x + self.project(torch.cat([x, self.down(branch)], 1))


def positions(side: int, width: int) -> torch.Tensor:
    """Fixed sine-cosine positions of a square grid, float32[side*side,width] (Vaswani et al., 2017, in two axes)."""
    rates = 10000 ** (-torch.arange(width // 4) / (width / 4))
    angles = torch.arange(side)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis.expand(side, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class AttentionJoin(nn.Module):
    """Cross-attention at stride 16: the picture asks, the branch answers; float[N,widths[2],H/16,W/16] stays one.

    One residual layer of multi-head attention, normalised first, without a feed-forward part; heads of
    gcd(width, 32) channels. Positions are added to queries and keys, since their order says nothing of place.
    """

    def __init__(self, widths: list[int], size: int):
        super().__init__()
        width = widths[2]
        self.heads = width // math.gcd(width, 32)
        self.down = deepen(widths)
        self.norm_query, self.norm_key = nn.LayerNorm(width), nn.LayerNorm(width)
        # No bias on the keys: it would move all scores of a query alike, and the softmax not at all.
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.value, self.project = nn.Linear(width, width), zeroed(nn.Linear(width, width))
        self.register_buffer("positions", positions(size // 16, width), persistent=False)

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        asking = self.norm_query(x.flatten(2).transpose(1, 2))
        told = self.norm_key(self.down(branch).flatten(2).transpose(1, 2))
        query, key = self.query(asking + self.positions), self.key(told + self.positions)
        split = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, self.value(told)))
        answer = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return x + self.project(answer).transpose(1, 2).unflatten(2, x.shape[-2:])
