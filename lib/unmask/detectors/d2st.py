"""D2ST-Adapter: a bottleneck beside a block of a frozen ViT, with sparse attention over the space and time of a clip.

Pei et al., D2ST-Adapter: Disentangled-and-Deformable Spatio-Temporal Adapter for Few-shot Action Recognition, ICCV
2025. Two pathways attend from every token to a few points of the clip, whose places a small net shifts: the spatial one
samples space densely and time sparsely, the temporal one the other way round.

mode="reference" is the published layer. mode="aligned" has the same weights and corrects what depends on a clip's
length and on the map's size:

- Time is padded by repeating its ends and never by zeros, and points outside the clip read its border. So an image
  gives what the same image repeated T times gives, one frame is enough, and trailing frames count.
- Unshifted reference points stand on the centres of equal parts of the map; for T points over T frames, on the frames.
- The map that offsets are found from is padded by repetition until its windows cover it without a rest (published
  kernels leave out the last two rows and columns of 16x16). This keeps the kernels and their weights and adds points,
  (5, 3) a side instead of (4, 2); wider kernels would keep the points and change the weights.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

# Windows (time, height, width) from each of which a point is shifted, and their strides; as published.
WINDOWS = {"spatial": ((4, 5, 5), (4, 3, 3)), "temporal": ((1, 7, 7), (1, 7, 7))}
MODES, BACKENDS = ("aligned", "reference"), ("gather", "grid_sample")
GAIN = 20.0  # of the difference between frames, which is a small part of what a frame holds
POINTS = 256  # no axis has more reference points

Shapes = Sequence[tuple[int, int]]


def _repeat_ends(x: torch.Tensor, dim: int, before: int, after: int) -> torch.Tensor:
    """x with its first slice along `dim` repeated `before` times in front of it and its last one `after` times behind.

    As F.pad's "replicate", whose gradient on a GPU is not deterministic.
    """
    if not before and not after:
        return x
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([first] * before + [x] + [last] * after, dim)


def _kernel(conv: nn.Conv3d, maps: torch.Tensor) -> torch.Tensor:
    """The weight for maps float[B,T,H,W,C]: summed over time for a single frame, which would only be repeated."""
    return conv.weight.sum(2, keepdim=True) if maps.shape[1] == 1 else conv.weight


def sample_gather(values: torch.Tensor, places: torch.Tensor, border: bool) -> torch.Tensor:
    """Values float[B,T,H,W,G,c] read trilinearly at places float[B,G,n,3] (z,y,x in cells): float[B,G,n,c].

    Outside the map: its border, or zeros. The eight cells around each place are gathered by index, which exports
    everywhere and is deterministic on a GPU on demand; gradients reach values and places.
    """
    if not border:  # zeros outside are a border of zeros
        values, places = F.pad(values, (0, 0, 0, 0, 1, 1, 1, 1, 1, 1)), places + 1
    _, t, h, w, _, c = values.shape
    first, shares, steps = torch.zeros_like(places[..., 0]), [], []
    for place, size, step in zip(places.unbind(-1), (t, h, w), (h * w, w, 1), strict=True):
        if size > 1:
            place = place.clamp(0, size - 1)
            low = place.detach().floor().clamp(max=size - 2)
            first = torch.add(first, low, alpha=step)
            shares.append(place - low)
            steps.append(step)
    cells = first.long().clamp(0, t * h * w - 1 - sum(steps))  # for NaN, which has no cell
    for step in steps:
        cells = torch.stack([cells, cells + step], -1)
    flat = values.flatten(1, 3).transpose(1, 2)  # B,G,T*H*W,c
    read = flat.gather(2, cells.flatten(2).unsqueeze(3).expand(-1, -1, -1, c))
    read = read.to(places.dtype).unflatten(2, (-1, *[2] * len(steps)))
    for share in shares:
        share = share[(..., *[None] * (read.ndim - 4))]
        read = torch.lerp(read[:, :, :, 0], read[:, :, :, 1], share)
    return read.to(values.dtype)


def sample_grid(values: torch.Tensor, places: torch.Tensor, border: bool) -> torch.Tensor:
    """As `sample_gather`, by PyTorch's grid_sample."""
    b, t, h, w, g, c = values.shape
    unit = [2 * (axis + 0.5) / size - 1 for axis, size in zip(places.unbind(-1), (t, h, w), strict=True)]
    grid = torch.stack(unit[::-1], -1).flatten(0, 1)[:, None, None]  # x,y,z
    volume = values.permute(0, 4, 5, 1, 2, 3).flatten(0, 1).to(grid.dtype)
    read = F.grid_sample(volume, grid, padding_mode="border" if border else "zeros", align_corners=False)
    return read[:, :, 0, 0].transpose(1, 2).unflatten(0, (-1, g)).to(values.dtype)


class Pathway(nn.Module):
    """Anisotropic deformable attention, from all tokens of a clip to n points of its patches (paper, section 3).

    width: of tokens; groups: of channels, with points of their own, and heads of the attention; windows, strides: of
    the offset net. The residual is not added here.
    """

    def __init__(self, width: int, groups: int, windows: tuple, strides: tuple, aligned: bool, backend: str):
        super().__init__()
        self.groups, self.channels, self.windows, self.strides = groups, width // groups, windows, strides
        self.aligned, self.sample = aligned, sample_gather if backend == "gather" else sample_grid
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.offsets = nn.ModuleDict(
            {
                "conv": nn.Conv3d(self.channels, self.channels, windows, strides, groups=self.channels),
                "norm": nn.LayerNorm(self.channels),
                "to_offset": nn.Linear(self.channels, 3, bias=False),
            }
        )
        self.register_buffer("index", torch.arange(POINTS, dtype=torch.float32), persistent=False)

    def padded(self, maps: torch.Tensor) -> torch.Tensor:
        """Query maps float[B,T,H,W,r] so long and wide that windows cover them without a rest; time at its end only."""
        for axis, (window, stride) in enumerate(zip(self.windows, self.strides, strict=True)):
            if not axis and maps.shape[1] == 1:
                continue  # see `_kernel`
            size = maps.shape[axis + 1]
            lack = window + stride * max(0, math.ceil((size - window) / stride)) - size
            before = lack // 2 if axis else 0
            maps = _repeat_ends(maps, axis + 1, before, lack - before)
        return maps

    def places(self, queries: torch.Tensor) -> torch.Tensor:
        """Where each group reads, float[B,G,n,3]: z,y,x in patches, 0 = centre of the first; queries float[B,T,H,W,r].

        In float32 or better: bfloat16 knows places from 8 on to sixteenths of a patch.
        """
        g, net = self.groups, self.offsets
        maps = self.padded(queries) if self.aligned else queries
        # One kernel for all groups, repeated: so the maps need not be taken apart into groups.
        weight, bias = _kernel(net["conv"], maps).repeat(g, 1, 1, 1, 1), net["conv"].bias.repeat(g)
        found = F.conv3d(maps.movedim(4, 1), weight, bias, self.strides, groups=g * self.channels)
        found = F.gelu(net["norm"](found.movedim(1, 4).unflatten(4, (g, self.channels))))
        shift = net["to_offset"](found)
        shift = shift.to(torch.promote_types(shift.dtype, torch.float32)).tanh().movedim(4, 1)  # B,G,T',H',W',3
        return torch.stack([self._axis(shift, axis, queries.shape[axis + 1]) for axis in range(3)], -1).flatten(2, 4)

    def _axis(self, shift: torch.Tensor, axis: int, size: int) -> torch.Tensor:
        """Coordinates on one axis of `size` patches, float[B,G,T',H',W'], from shifts in -1..1."""
        n = shift.shape[axis + 2]
        # Between -1 and 1, the points are 2(i + 0.5)/n - 1 and shifted by up to min(1, 2/n); the map's ends are the
        # edges of its cells, or the centres of the outermost ones.
        span, start = (size, -0.5) if self.aligned else (size - 1, 0)
        centres = (self.index[:n].to(shift.dtype) + 0.5) * (span / n) + start
        return torch.add(
            centres.view([-1 if i == axis else 1 for i in range(3)]), shift[..., axis], alpha=min(0.5, 1 / n) * span
        )

    def points(self, x: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normed tokens and queries float[B,T,1+H*W,r]: places float[B,G,n,3], keys and values float[B,G,n,c]."""
        side = math.isqrt(x.shape[2] - 1)
        maps = x[:, :, 1:].unflatten(2, (side, side))
        places = self.places(queries[:, :, 1:].unflatten(2, (side, side)))
        read = self.sample(maps.unflatten(4, (self.groups, self.channels)), places, self.aligned)
        read = read.transpose(1, 2).flatten(2)  # B,n,r
        return places, self._heads(self.key(read)), self._heads(self.value(read))

    def look(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `D2STAdapter.look`, of the bottleneck's tokens float[B,T,1+H*W,r]."""
        x = self.norm(x)
        queries = self.query(x)
        places, keys, _ = self.points(x, queries)
        scores = self._heads(queries.flatten(1, 2)) @ keys.transpose(2, 3) / math.sqrt(self.channels)
        return places, scores.softmax(3).unflatten(2, (x.shape[1], -1))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """float[B,L,r] to float[B,G,L,c]."""
        return x.unflatten(2, (self.groups, self.channels)).transpose(1, 2)

    def forward(self, frames: torch.Tensor, shapes: Shapes) -> torch.Tensor:
        """Tokens of frames float[F,1+H*W,r] to what the attention adds to them; shapes as in `D2STAdapter.adapt`."""
        x = self.norm(frames)
        found = []
        for part, queries in zip(_clips(x, shapes), _clips(self.query(x), shapes), strict=True):
            _, keys, values = self.points(part, queries)
            read = F.scaled_dot_product_attention(self._heads(queries.flatten(1, 2)), keys, values)
            found.append(read.transpose(1, 2).flatten(2).reshape(-1, x.shape[1], x.shape[2]))
        return self.out(_joined(found))


def _clips(frames: torch.Tensor, shapes: Shapes) -> list[torch.Tensor]:
    """Frames float[F,...] as the groups of clips float[B,T,...] that stand one after another in them."""
    parts = [frames] if len(shapes) == 1 else frames.split([b * t for b, t in shapes])
    return [part.unflatten(0, (-1, t)) for part, (_, t) in zip(parts, shapes, strict=True)]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class D2STAdapter(nn.Module):
    """The adapter, which adds nothing at first: its last layer starts at zero (paper, section 3).

    dim: of tokens; frames_max: the longest clip; mode, see the module; backend: of the sampling, "gather" or
    "grid_sample", which agree; ratio: of the bottleneck's width to dim; groups: of channels in the attention; pathways:
    "spatial", "temporal" or both (without one, the bottleneck's tokens take its place); embedding: an embedding of the
    frame's place in the clip enters (for ablation: an image is then no longer a still clip); differences: share of the
    channels that start as `start_with_differences` says. Modes and back ends share their weights. The published layer
    has GELUs behind both linear layers, which its figure does not show, and a bias of keys, which softmax cancels.
    ValueError for what does not fit.
    """

    def __init__(
        self, dim: int, frames_max: int = 32, mode: str = "aligned", backend: str = "gather", ratio: float = 0.25,
        groups: int = 4, pathways: Sequence[str] = ("spatial", "temporal"), embedding: bool = False,
        differences: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        width = int(dim * ratio)
        if mode not in MODES or backend not in BACKENDS:
            raise ValueError(f"mode {mode!r} is one of {MODES}, backend {backend!r} one of {BACKENDS}")
        if not pathways or not set(pathways) <= set(WINDOWS):
            raise ValueError(f"pathways {tuple(pathways)!r} are one or both of {tuple(WINDOWS)}")
        if width < 1 or width % groups:
            raise ValueError(f"a bottleneck of {width} channels cannot be shared out among {groups} groups")
        self.frames_max, self.aligned = frames_max, mode == "aligned"
        self.down = nn.Linear(dim, width)
        self.positional = nn.Conv3d(width, width, 3, groups=width)
        self.paths = nn.ModuleDict(
            {
                name: Pathway(width, groups, *WINDOWS[name], self.aligned, backend)
                for name in WINDOWS
                if name in pathways
            }
        )
        self.up = nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.embedding = nn.Parameter(torch.zeros(frames_max, dim)) if embedding else None
        self.start_with_differences(int(width * differences) // 2)

    @torch.no_grad()
    def start_with_differences(self, pairs: int) -> None:
        """Let the first channels, two by two, be GAIN times what changes from the frame before to the frame after, and
        the opposite: the GELU behind them makes its size of that.

        Not in the publication: from a random start, size of change takes thousands of steps to be found. The output
        is still nothing, and in "aligned" mode a still clip has no change.
        """
        for module in (self.down, self.positional):
            module.weight[1 : 2 * pairs : 2] = module.weight[0 : 2 * pairs : 2]
            module.bias[1 : 2 * pairs : 2] = module.bias[0 : 2 * pairs : 2]
        filters, signs = self.positional.weight[: 2 * pairs, 0], torch.tensor([1.0, -1.0]).repeat(pairs)
        filters.zero_()
        filters[:, 1, 1, 1] = -1  # takes away the channel itself, which the convolution is added to
        filters[:, 2, 1, 1], filters[:, 0, 1, 1] = GAIN * signs, -GAIN * signs
        self.positional.bias[: 2 * pairs] = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of clips float[B,T,1+H*W,D], class token first, H = W, to the same shape.

        ValueError for a map that is not square, for more than `frames_max` frames, and in reference mode for clips of
        fewer than 4 frames and maps smaller than 7x7, which the published windows do not fit in.
        """
        b, t = tokens.shape[:2]
        return self.adapt(tokens.flatten(0, 1), [(b, t)]).unflatten(0, (-1, t))

    def adapt(self, frames: torch.Tensor, shapes: Shapes) -> torch.Tensor:
        """As `forward` for clips of several lengths at once, without padding: tokens of their frames float[F,1+H*W,D].

        shapes: (B_k, T_k) of each group of clips of one length, one after another; F is the sum of B_k * T_k.
        """
        x = self._bottleneck(frames, shapes)
        both = x  # the mean of the pathways' outputs, each of which has x added
        for path in self.paths.values():
            both = torch.add(both, path(x, shapes), alpha=0.5)
        return frames + F.gelu(self.up(F.gelu(both)))

    @torch.no_grad()
    def look(self, tokens: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What each pathway reads of clips float[B,T,1+H*W,D], for pictures: its places float[B,groups,n,3], z,y,x in
        patches with 0 for the centre of the first, and its attention float[B,groups,T,1+H*W,n], whose rows sum to 1."""
        b, t = tokens.shape[:2]
        x = self._bottleneck(tokens.flatten(0, 1), [(b, t)])
        return {name: path.look(x.unflatten(0, (-1, t))) for name, path in self.paths.items()}

    def _bottleneck(self, frames: torch.Tensor, shapes: Shapes) -> torch.Tensor:
        """Tokens float[F,1+H*W,D] to float[F,1+H*W,r], the patches with what the positional convolution adds."""
        self._check(frames.shape[1], shapes)
        if self.embedding is not None:
            places = [self.embedding[:t].expand(b, -1, -1).flatten(0, 1) for b, t in shapes]
            frames = frames + _joined(places).unsqueeze(1)
        x = F.gelu(self.down(frames))
        side, conv = math.isqrt(x.shape[1] - 1), self.positional
        added = []
        for part in _clips(x[:, 1:], shapes):
            maps = part.unflatten(2, (side, side))
            if self.aligned and part.shape[1] > 1:
                maps = _repeat_ends(maps, 1, 1, 1)
            padding = (0 if self.aligned else 1, 1, 1)
            found = F.conv3d(maps.movedim(4, 1), _kernel(conv, maps), conv.bias, padding=padding, groups=conv.groups)
            added.append(found.movedim(1, 4).flatten(2, 3).flatten(0, 1))
        return x + F.pad(_joined(added), (0, 0, 1, 0))  # nothing for the class token

    def _check(self, tokens: int, shapes: Shapes) -> None:
        side = math.isqrt(tokens - 1)
        if tokens < 2 or side * side != tokens - 1:
            raise ValueError(f"{tokens} tokens are not a class token and a square map of patches")
        frames = [t for _, t in shapes]
        if max(frames) > self.frames_max:
            raise ValueError(f"a clip has at most {self.frames_max} frames here, not {max(frames)}")
        if not self.aligned and (min(frames) < 4 or side < 7):
            raise ValueError(
                f"clips of {min(frames)} frames of {side}x{side} patches are too small for the published layer, whose "
                'offset nets need 4 frames of 7x7: take mode="aligned", which pads by repetition'
            )
