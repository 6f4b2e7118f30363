"""Heads over the frames of a clip, on the frozen features of a detector of single frames: mean, GRU, Transformer.

The recurrent head follows the common recipe of LayerNorm, a linear layer, a bidirectional GRU and pooling by mean and
maximum; the Transformer reads frame tokens behind a CLS token, as FTCN's does (Zheng et al., ICCV 2021, section 3.3).
`mean` is the control: the mean of a clip's features is the same in any order of its frames.

Pooled features hardly notice a face that moves by a pixel, so every frame also leaves a grey thumbnail, from which a
head with `differences` reads how much the picture changed where. Thumbnails enter as differences only.
"""

import torch
import torch.nn.functional as F
from torch import nn

from unmask.detectors import base
from unmask.detectors.base import Detector, InputSpec, masked_mean, register

HEADS = ("mean", "gru", "transformer")
THUMB, GRID = 24, 6


def compact(values: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The frames that count, moved to the front in their order: float[B,T,D] with zeros behind, and bool[B,T].

    Padding may stand anywhere and hold anything. ValueError for a clip without a frame.
    """
    if mask is None:
        return values, torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    if not mask.any(1).all():
        raise ValueError("every clip needs at least one frame")
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    mask = mask.gather(1, order)
    values = values.gather(1, order.unsqueeze(2).expand(-1, -1, values.shape[2]))
    return values.masked_fill(~mask.unsqueeze(2), 0), mask


def changes(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The change from the frame before, x[t] - x[t-1], float[B,T,D]; 0 for the first frame and padding."""
    step = (values[:, 1:] - values[:, :-1]) * mask[:, 1:].unsqueeze(2)
    return torch.cat([torch.zeros_like(values[:, :1]), step], 1)


def motion(thumbnails: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How much the picture changed from the frame before, in grey levels: float[B,T,2*GRID*GRID].

    thumbnails: float[B,T,THUMB*THUMB]. In each cell of a grid, the mean size of the change (what moves) and the size of
    the mean change (what gets brighter or darker).
    """
    b, t = mask.shape
    step = 255 * changes(thumbnails, mask).view(b * t, 1, THUMB, THUMB)
    cells = torch.cat([F.avg_pool2d(step.abs(), THUMB // GRID), F.avg_pool2d(step, THUMB // GRID).abs()], 1)
    return cells.view(b, t, -1)


def frame_outputs(spatial: Detector, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What heads know of normalised frames float[N,3,H,W]: float[N,D+THUMB*THUMB], and the detector's logits float[N].

    The pooled features of a detector of single frames, whose layer `head` makes logits of them, and behind them the
    frame in grey, 0..1 less 0.5 (so that float16 keeps a tenth of a grey level), averaged down to THUMB pixels a side.
    """
    features = spatial.features(frames.unsqueeze(1))
    mean, std = (frames.new_tensor(v).view(1, 3, 1, 1) for v in (spatial.input_spec.mean, spatial.input_spec.std))
    grey = (frames * std + mean).mean(1, keepdim=True) - 0.5
    thumbnails = F.adaptive_avg_pool2d(grey, THUMB).flatten(1)
    return torch.cat([features, thumbnails], 1), spatial.head(features).squeeze(1)


class Temporal(Detector):
    """A frozen detector of single frames and a head that is trained on its features.

    spatial: {"detector": name, "config": arguments} of that detector; its weights are set by `adopt` or come with the
    checkpoint, and stay as they are in training. frames: the most that a clip has. differences: the size of the
    features' `changes` and `motion` go into the head too. Subclasses implement `represent` and have the layer `last`.
    """

    def __init__(self, spatial: dict, frames: int, differences: bool):
        super().__init__()
        self.spatial = base.rebuild(spatial["detector"], spatial["config"]).requires_grad_(False).eval()
        spec = self.spatial.input_spec
        self.config = {
            "spatial": {"detector": self.spatial.name, "config": self.spatial.config},
            "frames": frames,
            "differences": differences,
        }
        self.input_spec = InputSpec(spec.size, spec.mean, spec.std, frames, spec.native)
        with torch.no_grad():  # found by trying: detectors name it differently
            self.pooled = self.spatial.features(torch.zeros(1, 1, 3, spec.size, spec.size)).shape[1]
        self.norm = nn.LayerNorm(self.pooled)
        self.depth = 2 * (self.pooled + GRID * GRID) if differences else self.pooled  # of a token

    def adopt(self, spatial: Detector) -> None:
        """Take over the weights of a trained detector of the same configuration."""
        self.spatial.load_state_dict(spatial.state_dict())

    def train(self, mode: bool = True) -> "Temporal":
        """Training mode for the head alone: the statistics of the frozen part must not move."""
        super().train(mode)
        self.spatial.eval()
        return self

    def head_state(self) -> dict[str, torch.Tensor]:
        """The weights that training changes, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("spatial.")}

    def tokens(self, features: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`frame_outputs` float[B,T,...] to what a head reads of each frame, float[B,T,depth], and mask bool[B,T]; the
        frames that count come first."""
        if features.shape[1] > self.input_spec.frames:
            raise ValueError(f"a clip has at most {self.input_spec.frames} frames here, not {features.shape[1]}")
        features, mask = compact(features, mask)
        pooled, thumbnails = features[..., : self.pooled], features[..., self.pooled :]
        x = self.norm(pooled)
        if self.config["differences"]:
            x = torch.cat([x, changes(x, mask).abs(), motion(thumbnails, mask)], 2)
        return x, mask

    def represent(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Outputs of frames float[B,T,D+THUMB*THUMB], mask bool[B,T], to what the last layer reads, float[B,R]."""
        raise NotImplementedError

    def head(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float[B] from outputs of frames float[B,T,D+THUMB*THUMB]; mask bool[B,T], True = use the frame.

        What stands in padding frames never matters. ValueError for more frames than the head has, or for none.
        """
        return self.last(self.represent(features, mask)).squeeze(1)

    @torch.no_grad()
    def frame_features(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`frame_outputs` float[B,T,...] of normalised clips float[B,T,3,H,W]; zeros where the mask is False."""
        if mask is None:  # not a mask of ones: torch.export has to know how many frames are looked at
            return frame_outputs(self.spatial, clips.flatten(0, 1))[0].unflatten(0, clips.shape[:2])
        found = frame_outputs(self.spatial, clips[mask])[0]
        return found.new_zeros(*mask.shape, found.shape[1]).masked_scatter(mask.unsqueeze(2), found)

    def features(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.represent(self.frame_features(clips, mask), mask)

    def forward(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.frame_features(clips, mask), mask)


def _last(width: int) -> nn.Linear:
    layer = nn.Linear(width, 1)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _inputs(depth: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(depth, width), nn.GELU(), nn.Dropout(dropout))


@register("mean")
class Mean(Temporal):
    """The mean of the frames' features, then a linear layer: the control that knows no time, unless `differences`."""

    def __init__(self, spatial: dict, frames: int = 16, differences: bool = False):
        super().__init__(spatial, frames, differences)
        self.last = _last(self.depth)

    def represent(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return masked_mean(*self.tokens(features, mask))


@register("gru")
class GRU(Temporal):
    """A bidirectional GRU; mean and maximum over time. width: both directions together; layers: of the GRU."""

    def __init__(
        self, spatial: dict, frames: int = 16, differences: bool = True, width: int = 256, layers: int = 1,
        dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__(spatial, frames, differences)
        self.config |= {"width": width, "layers": layers, "dropout": dropout}
        self.inputs = _inputs(self.depth, width, dropout)
        between = dropout if layers > 1 else 0.0
        self.gru = nn.GRU(width, width // 2, layers, batch_first=True, bidirectional=True, dropout=between)
        self.last = _last(2 * width)

    def represent(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x, keep = self.tokens(features, mask)
        x = self.inputs(x)
        if mask is not None:  # packed, so that the backward direction starts at the clip's own end
            x = nn.utils.rnn.pack_padded_sequence(x, keep.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        x, _ = self.gru(x)
        if mask is not None:
            x, _ = nn.utils.rnn.pad_packed_sequence(x, batch_first=True, total_length=keep.shape[1])
        peak = x.masked_fill(~keep.unsqueeze(2), -torch.inf).amax(1)
        return torch.cat([masked_mean(x, keep), peak], 1)


@register("transformer")
class Transformer(Temporal):
    """A Transformer encoder with learned positions, read at its CLS token. width: of its tokens; layers: their number;
    heads: of the attention, a divisor of width."""

    def __init__(
        self, spatial: dict, frames: int = 16, differences: bool = True, width: int = 256, layers: int = 2,
        heads: int = 4, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__(spatial, frames, differences)
        self.config |= {"width": width, "layers": layers, "heads": heads, "dropout": dropout}
        self.inputs = _inputs(self.depth, width, dropout)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, frames, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.last = _last(width)

    def represent(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x, mask = self.tokens(features, mask)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), self.inputs(x) + self.positions[:, : x.shape[1]]], 1)
        padding = torch.cat([mask.new_zeros(x.shape[0], 1), ~mask], 1)
        return self.encoder(x, src_key_padding_mask=padding)[:, 0]
