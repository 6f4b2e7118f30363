"""The fusion matrix: an image's features and its LaRE map, joined in one of ten ways, under one of two heads.

F0        the pooled feature alone
F1        a CNN over the LaRE map alone
F2c, F2s  pooled feature; MLP over the map
F3c, F3s  pooled feature; spatial attention, biased by the errors; channel gate
F4c       as F3c; mean over landmark regions
F5a       the same network as F3c, under the name it has beside F5b and F5c
F5b       as F3c, but the mean error asks, not the mean feature, and nothing is biased
F5c       as F3c, but with a second key from the errors and a second attention

c, and F5: concatenated; s: summed. Sums keep the width of CLIP's common space of pictures and texts; what is
concatenated leaves it, and texts need the text head's projection, once it is trained, to follow.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unmask.detectors import roi
from unmask.detectors.egre import LATENT, ChannelGate, CrossAttention, MapCNN, MapMLP, SpatialAttention, TwoKeyAttention

KINDS = ("F0", "F1", "F2c", "F2s", "F3c", "F3s", "F4c", "F5a", "F5b", "F5c")
HEADS = ("linear", "text")
SPATIAL = {"F5b": CrossAttention, "F5c": TwoKeyAttention}  # the other kinds from F3c on: SpatialAttention
SMALLEST_MAP = MapMLP.SIDE  # cells a side: also leaves the CNN's last batch norm more than one value of a lone map


@dataclass(frozen=True)
class FusionConfig:
    """One cell of the matrix and the shapes that it joins; ValueError for what is not in it.

    kind: one of KINDS; head: one of HEADS. image_dim: width of pooled features; map_channels, map_side: of feature
    maps; lare_side: of LaRE maps, in cells; image_size: side of the picture in pixels, whose boxes F4c takes;
    text_dim: width of text features. What a kind or head does not read may be None.
    """

    kind: str
    head: str = "linear"
    image_dim: int | None = None
    map_channels: int | None = None
    map_side: int | None = None
    lare_side: int | None = None
    image_size: int | None = None
    text_dim: int | None = None

    def __post_init__(self):
        if self.kind == "F4s":
            raise ValueError("There is no F4s: regions are pooled to stand beside the others; choose F4c or F3s.")
        if self.kind not in KINDS:
            raise ValueError(f"There is no fusion '{self.kind}'; known are {', '.join(KINDS)}.")
        if self.head not in HEADS:
            raise ValueError(f"A head is one of {', '.join(HEADS)}, not '{self.head}'.")
        for name in self.required():
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.kind} with a {self.head} head needs {name} as a whole number, not {value!r}.")
        if self.kind != "F0" and self.lare_side < SMALLEST_MAP:
            raise ValueError(f"LaRE maps need at least {SMALLEST_MAP} cells a side, not {self.lare_side}.")

    @property
    def reads_maps(self) -> bool:
        """Whether feature maps go in."""
        return self.kind not in ("F0", "F1", "F2c", "F2s")

    def required(self) -> list[str]:
        """The shapes that must be given."""
        names = [] if self.kind == "F1" else ["image_dim"]
        names += [] if self.kind == "F0" else ["lare_side"]
        names += ["map_channels", "map_side"] if self.reads_maps else []
        names += ["image_size"] if self.kind == "F4c" else []
        return names + (["text_dim"] if self.head == "text" else [])

    @property
    def dim(self) -> int:
        """Width D of the fused feature."""
        if self.kind == "F1":
            return MapCNN.WIDTHS[-1]
        if self.reads_maps and self.kind != "F3s":
            return self.map_channels * (4 if self.kind in ("F4c", "F5c") else 3)
        return self.image_dim * (2 if self.kind == "F2c" else 1)


class LinearHead(nn.Module):
    """Two logits, real and fake."""

    def __init__(self, dim: int):
        super().__init__()
        self.classes = nn.Linear(dim, 2)

    def forward(self, fused: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        """fused float[N,D] to float[N], the logit of fake less that of real."""
        real, fake = self.classes(fused).unbind(1)
        return fake - real


class TextHead(nn.Module):
    """Cosine of the fused feature with projected text features, times exp(logit_scale).

    As in CLIP (Radford et al., 2021, sections 2.3 and 2.5), where the scale starts alike. The projection starts as the
    identity where the widths are equal.
    """

    def __init__(self, text_dim: int, dim: int):
        super().__init__()
        self.project = nn.Linear(text_dim, dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if text_dim == dim:
            nn.init.eye_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    def forward(self, fused: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """fused float[N,D] and text of the prompts "real", "fake", float[2,text_dim] or, with prompts for every image,
        float[N,2,text_dim]: to float[N], the logit of fake less that of real."""
        cosines = F.cosine_similarity(fused.unsqueeze(1), self.project(text), dim=-1)
        real, fake = (self.logit_scale.exp() * cosines).unbind(1)
        return fake - real


class Fusion(nn.Module):
    """One cell of the fusion matrix, all of it trainable; inputs come from frozen models."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.config, kind = config, config.kind
        d, c = config.image_dim, config.map_channels
        if kind in ("F1", "F2c", "F2s"):
            self.map = MapCNN() if kind == "F1" else MapMLP(d)
        if config.reads_maps:
            self.spatial = SPATIAL.get(kind, SpatialAttention)(c, config.map_side)
            self.channel = ChannelGate(c)
        if kind == "F2s":
            self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)])
        elif kind == "F3s":
            self.spatial_project, self.channel_project = nn.Linear(c, d), nn.Linear(c, d)
        elif config.reads_maps:  # as published: RN50's features, as wide as its maps, go in as they are
            self.image_project = nn.Identity() if d == c else nn.Linear(d, c)
        text = config.head == "text"
        self.head = TextHead(config.text_dim, config.dim) if text else LinearHead(config.dim)

    def _check(self, **inputs: torch.Tensor | None) -> None:
        """ValueError unless every input that this cell reads is there, in its shape, for as many pictures."""
        c = self.config
        shapes = {
            "pooled": (c.image_dim,), "maps": (c.map_channels, c.map_side, c.map_side),
            "lare": (LATENT, c.lare_side, c.lare_side), "boxes": (len(roi.REGIONS), 4),
        }  # fmt: skip
        needs = {"pooled": "image_dim", "maps": "map_side", "lare": "lare_side", "boxes": "image_size"}
        read = [name for name in shapes if needs[name] in c.required()]
        for name in read:
            found = None if inputs[name] is None else tuple(inputs[name].shape)
            if found is None or found[1:] != shapes[name]:
                wanted = ", ".join(map(str, shapes[name]))
                raise ValueError(f"{c.kind} needs {name} of shape (N, {wanted}), not {found}.")
        if any(inputs[name].shape[0] != inputs[read[0]].shape[0] for name in read[1:]):
            raise ValueError(f"{' and '.join(read)} are not of the same number of pictures.")

    def fused(
        self,
        pooled: torch.Tensor | None,
        maps: torch.Tensor | None = None,
        lare: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The joined feature float[N,D], D = config.dim, not normalised: what the heads read, or a meta-net of prompts.

        pooled: float[N,image_dim]; maps: float[N,C,g,g]; lare: float[N,4,l,l]; boxes: float[N,9,4] in pixels of the
        picture, NaN where absent (`roi.region_boxes`). What the kind does not read may be None. ValueError for an input
        that is missing or of another shape.
        """
        self._check(pooled=pooled, maps=maps, lare=lare, boxes=boxes)
        kind = self.config.kind
        if kind == "F0":
            return pooled
        if kind == "F1":
            return self.map(lare)
        if kind == "F2c":
            return torch.cat([pooled, self.map(lare)], 1)
        if kind == "F2s":
            return self.norms[0](pooled) + self.norms[1](self.map(lare))
        spatial, channel = self.spatial(maps, lare), self.channel(maps, lare)
        if kind == "F3s":
            return pooled + self.spatial_project(spatial) + self.channel_project(channel)
        regions = [roi.pool(maps, boxes, self.config.image_size)] if kind == "F4c" else []
        return torch.cat([self.image_project(pooled), spatial, channel, *regions], 1)

    def forward(
        self,
        pooled: torch.Tensor | None,
        maps: torch.Tensor | None = None,
        lare: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits float[N], P(fake) = sigmoid. text: features of the prompts "real", "fake", float[2,text_dim] or
        float[N,2,text_dim], for the text head; other arguments and errors as in `fused`."""
        if self.config.head == "text" and (text is None or text.shape[-2:] != (2, self.config.text_dim)):
            found = None if text is None else tuple(text.shape)
            raise ValueError(f"A text head needs text of shape (2, {self.config.text_dim}), not {found}.")
        return self.head(self.fused(pooled, maps, lare, boxes), text)
