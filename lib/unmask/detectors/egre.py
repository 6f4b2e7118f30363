"""What latent reconstruction errors (LaRE) add to an image's features: error-guided refinement, and nets for the maps.

LaRE maps are float[N,4,l,l], feature maps float[N,C,g,g]. Error-guided refinement, spatial and by channel: Luo et al.,
LaRE^2, CVPR 2024, and the two-key form of their code. Layers are C wide here, where published code has 1024: for the
third stage of CLIP's RN50 and for ViT-L/14 both are the same.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

LATENT = 4  # channels of a LaRE map
HEADS, DEPTH = 8, 64


def tokens(maps: torch.Tensor) -> torch.Tensor:
    """The mean over all places, then every place: maps float[N,C,h,w] to float[N,1+h*w,C]."""
    places = maps.flatten(2).transpose(1, 2)
    return torch.cat([places.mean(1, keepdim=True), places], 1)


def positions(side: int, width: int) -> nn.Parameter:
    """Learned positions float[1+side*side,width] of `tokens`, drawn as those of CLIP's attention pooling are."""
    return nn.Parameter(torch.randn(1 + side * side, width) / width**0.5)


class QueryAttention(nn.Module):
    """Multi-head attention of one query, with dropout, residual connection and LayerNorm.

    keys: how many key sequences there are; their scores are added, and divided by sqrt(keys * DEPTH). No biases before
    the softmax: on the keys they would cancel in it.
    """

    def __init__(self, width: int, keys: int = 1, dropout: float = 0.1):
        super().__init__()
        self.query = nn.Linear(width, HEADS * DEPTH, bias=False)
        self.keys = nn.ModuleList(nn.Linear(width, HEADS * DEPTH, bias=False) for _ in range(keys))
        self.value = nn.Linear(width, HEADS * DEPTH, bias=False)
        self.out = nn.Linear(HEADS * DEPTH, width)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)

    def forward(
        self, query: torch.Tensor, keys: list[torch.Tensor], values: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """query float[N,C], keys and values float[N,L,C], bias of the scores float[N,HEADS,L]: to float[N,C]."""
        asked = self.query(query).unflatten(1, (HEADS, DEPTH))
        key = sum(layer(x) for layer, x in zip(self.keys, keys, strict=True)).unflatten(2, (HEADS, DEPTH))
        scores = torch.einsum("nhd,nlhd->nhl", asked, key) / (len(keys) * DEPTH) ** 0.5
        weights = (scores if bias is None else scores + bias).softmax(2)
        answer = torch.einsum("nhl,nlhd->nhd", weights, self.value(values).unflatten(2, (HEADS, DEPTH)))
        return self.norm(query + self.dropout(self.out(answer.flatten(1))))


class SpatialAttention(nn.Module):
    """The mean of a feature map asks all its places, and errors bias the scores: to float[N,C].

    Every head weighs the four error channels on its own; no bias there, which the softmax would cancel.
    """

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.positions = positions(side, channels)
        self.error_bias = nn.Conv2d(LATENT, HEADS, 1, bias=False)
        self.attention = QueryAttention(channels)

    def forward(self, maps: torch.Tensor, lare: torch.Tensor) -> torch.Tensor:
        x = tokens(maps) + self.positions
        bias = tokens(self.error_bias(F.adaptive_avg_pool2d(lare, maps.shape[-2:]))).transpose(1, 2)
        return self.attention(x[:, 0], [x], x, bias)


class CrossAttention(nn.Module):
    """The mean error asks all places of a feature map: to float[N,C].

    As in CLaRE's code, which has the layers 4-8-32-64-128-256-C as 1x1 convolutions before the mean: there are no
    activations between them, so they commute with it (and are together no more than one layer from 4 to C).
    """

    WIDTHS = (LATENT, 8, 32, 64, 128, 256)

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.positions = positions(side, channels)
        widths = (*self.WIDTHS, channels)
        self.embed = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)))
        self.attention = QueryAttention(channels)

    def forward(self, maps: torch.Tensor, lare: torch.Tensor) -> torch.Tensor:
        x = tokens(maps) + self.positions
        return self.attention(self.embed(lare.mean((2, 3))), [x], x)


class TwoKeyAttention(nn.Module):
    """Features and embedded errors give a key each; features ask and answer, then errors do: to float[N,2C]."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.positions = positions(side, channels)
        self.embed = nn.Conv2d(LATENT, channels, 1)
        self.image, self.error = QueryAttention(channels, keys=2), QueryAttention(channels, keys=2)

    def forward(self, maps: torch.Tensor, lare: torch.Tensor) -> torch.Tensor:
        x = tokens(maps) + self.positions
        e = tokens(self.embed(F.adaptive_avg_pool2d(lare, maps.shape[-2:]))) + self.positions
        return torch.cat([self.image(x[:, 0], [x, e], x), self.error(e[:, 0], [x, e], e)], 1)


class ChannelGate(nn.Module):
    """The mean error opens and closes the channels of the mean feature (squeeze and excitation): to float[N,C]."""

    def __init__(self, channels: int, hidden: int = 128):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(LATENT, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, maps: torch.Tensor, lare: torch.Tensor) -> torch.Tensor:
        return maps.mean((2, 3)) * self.gate(lare.mean((2, 3)))


class MapMLP(nn.Module):
    """A LaRE map averaged down to 8 x 8 and flattened, through a hidden layer: to float[N,width]."""

    SIDE = 8

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(LATENT * self.SIDE**2, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, lare: torch.Tensor) -> torch.Tensor:
        return self.layers(F.adaptive_avg_pool2d(lare, self.SIDE).flatten(1))


class MapCNN(nn.Module):
    """A LaRE map through a ResNet of three stages of two blocks (He et al., CVPR 2016, section 4.2): to float[N,64]."""

    WIDTHS = (16, 32, 64)

    def __init__(self):
        super().__init__()
        first = self.WIDTHS[0]
        stem = [nn.Conv2d(LATENT, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
        stages = [BasicBlock(first, first), BasicBlock(first, first)]
        for a, b in zip(self.WIDTHS[:-1], self.WIDTHS[1:], strict=True):
            shortcut = nn.Sequential(nn.Conv2d(a, b, 1, 2, bias=False), nn.BatchNorm2d(b))
            stages += [BasicBlock(a, b, 2, shortcut), BasicBlock(b, b)]
        self.layers = nn.Sequential(*stem, *stages)

    def forward(self, lare: torch.Tensor) -> torch.Tensor:
        return self.layers(lare).mean((2, 3))
