"""A small BatchNorm network on high-pass residuals: it learns from a few dozen videos, where larger ones memorise."""

import torch
from torch import nn

from unmask.detectors.base import Detector, InputSpec, masked_mean, register
from unmask.detectors.frequency import SRMBranch


@register("residual")
class Residual(Detector):
    """Noise residuals (SRM, `SRMBranch`), four strided convolutions with BatchNorm, the mean over places, one logit.

    Everything it sees is finer than a few pixels, so it wants windows that nothing has scaled (`InputSpec.native`).
    size: crop size in pixels, a multiple of 8. width: channels of the first stage. dropout: before the last layer.
    ValueError for other sizes.
    """

    def __init__(self, size: int = 144, width: int = 32, dropout: float = 0.2, native: bool = True):
        super().__init__()
        if size < 32 or size % 8:
            raise ValueError(f"A residual network needs a crop size that is a multiple of 8, from 32 on, not {size}.")
        self.config = {"size": size, "width": width, "dropout": dropout, "native": native}
        self.input_spec = InputSpec(size, native=native)
        self.frequency = SRMBranch(width, size)
        self.fine, self.coarse = (
            nn.Sequential(nn.Conv2d(k * width // 2, (k + 1) * width // 2, 3, 2, 1, bias=False),
                          nn.BatchNorm2d((k + 1) * width // 2), nn.ReLU())
            for k in (2, 3)
        )  # fmt: skip
        self.boundary_head = nn.Conv2d(3 * width // 2, 1, 1)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(2 * width, 1)

    def _frames(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised frames float[N,3,H,W] to features float[N,D] and boundary logits float[N,H/8,W/8]."""
        # In full precision: the differences that count are smaller than what bf16 keeps.
        with torch.autocast(frames.device.type, enabled=False):
            mean, std = (frames.new_tensor(v).view(1, 3, 1, 1) for v in (self.input_spec.mean, self.input_spec.std))
            fine = self.fine(self.frequency(255 * (frames.float() * std + mean)))
            return self.coarse(fine).mean((2, 3)), self.boundary_head(fine).squeeze(1)

    def features(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, t = clips.shape[:2]
        return masked_mean(self._frames(clips.flatten(0, 1))[0].view(b, t, -1), mask)

    def forward(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, t = clips.shape[:2]
        return masked_mean(self.head(self.dropout(self._frames(clips.flatten(0, 1))[0])).view(b, t), mask)

    def with_boundary(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For training: frames float[N,3,H,W] to logits float[N] and boundary logits float[N,H/8,W/8]."""
        features, boundary = self._frames(frames)
        return self.head(self.dropout(features)).squeeze(1), boundary
