"""ST-Adapter, the plain neighbour of `d2st`: a bottleneck with a depthwise convolution over time.

Pan, Lin, Zhu, Shao and Li, "ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning", NeurIPS 2022, section
3.2: Linear, depthwise convolution with a kernel of 3 x 1 x 1, Linear, residual, without a nonlinearity. Different here:
- The class token is adapted like the patches, which a kernel of one patch allows. Published adapters stand before the
  attention, where the class token reads the patches afterwards; after the last block nothing would read them.
- The up-projection starts at zero, not the convolution: also an identity, as the adapter of `d2st` starts.
- Time is padded with its first and last frame, so that an image gives what it gives as a clip of itself.
"""

from collections.abc import Sequence

import torch
from torch import nn


class STAdapter(nn.Module):
    """dim: channels of a token; width: of the bottleneck; frames_max: the most frames of a clip."""

    def __init__(self, dim: int, width: int, frames_max: int = 32):
        super().__init__()
        self.frames_max = frames_max
        self.down = nn.Linear(dim, width)
        self.time = nn.Conv3d(width, width, (3, 1, 1), groups=width)
        self.up = nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of clips float[B,T,N,D], adapted: the same shape. ValueError for more frames than frames_max."""
        b, t = tokens.shape[:2]
        return self.adapt(tokens.flatten(0, 1), [(b, t)]).unflatten(0, (b, t))

    def adapt(self, frames: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Tokens of frames float[F,N,D], adapted: the same shape.

        shapes: (clips, frames of each) of groups of clips that follow one another, whose products add up to F.
        ValueError for more frames than frames_max.
        """
        longest = max(t for _, t in shapes)
        if longest > self.frames_max:
            raise ValueError(f"a clip has at most {self.frames_max} frames here, not {longest}")
        groups = self.down(frames).split([b * t for b, t in shapes])
        mixed = [self._over_time(group, *shape) for group, shape in zip(groups, shapes, strict=True)]
        return frames + self.up(torch.cat(mixed))

    def _over_time(self, x: torch.Tensor, b: int, t: int) -> torch.Tensor:
        """The convolution of the frames float[b*t,N,r] of b clips."""
        x = x.view(b, t, *x.shape[1:])
        padded = torch.cat([x[:, :1], x, x[:, -1:]], 1)
        # As the sum of three weighted frames, which keeps the layout: Conv3d takes several times as long for it.
        before, same, after = self.time.weight.view(-1, 3).unbind(1)
        return (padded[:, :-2] * before + x * same + padded[:, 2:] * after + self.time.bias).flatten(0, 1)


def matched(dim: int, parameters: int) -> int:
    """The width of the bottleneck whose STAdapter(dim, width) comes closest to a number of parameters; at least 1.

    There are width * (2 dim + 5) + dim: two matrices, three weights of the convolution, biases.
    """
    return max(1, round((parameters - dim) / (2 * dim + 5)))
