"""A backbone with two heads: unit vectors to compare frames by (contrastive learning), and the logit of "fake"."""

import torch
import torch.nn.functional as F
from torch import nn

from unmask.detectors.base import Detector, InputSpec, masked_mean, register
from unmask.detectors.convnext import ConvNeXt, timm_network


@register("embedding")
class Embedding(Detector):
    """Any timm backbone, frame by frame, with a projection head (Khosla et al., NeurIPS 2020, section 3) and one logit.

    backbone: a timm name; those that start with "convnext" are built as the detector ConvNeXt builds them.
    frequency: "srm" adds its noise branch, for a ConvNeXt only. pretrained: start from timm's weights. size: crop size
    in pixels. projection: length of the unit vectors. layer_scale: as in ConvNeXt. ValueError for what does not fit.
    """

    def __init__(
        self, backbone: str = "convnext_zepto_rms", frequency: str = "none", pretrained: bool = False, size: int = 96,
        projection: int = 128, layer_scale: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config = {"backbone": backbone, "frequency": frequency, "size": size, "projection": projection}
        self.input_spec = InputSpec(size)
        if backbone.startswith("convnext"):
            self.body = ConvNeXt(
                backbone, frequency=frequency, pretrained=pretrained, size=size, layer_scale=layer_scale
            )
            # Its own heads would be weights that nothing trains.
            self.body.head, self.body.boundary_head = nn.Identity(), nn.Identity()
            self.config["layer_scale"] = self.body.config["layer_scale"]
        elif frequency != "none" or layer_scale is not None:
            raise ValueError(f"frequency and layer_scale are for a ConvNeXt, not for '{backbone}'.")
        else:
            self.body = timm_network(backbone, pretrained=pretrained)
        width = self._width()
        # Frames of faces start so alike that without the normalisation all vectors collapse to one (as in SimCLR v2).
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, projection)
        )
        self.head = nn.Linear(width, 1)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def _width(self) -> int:
        """Length of the representation, found by trying: what timm calls it differs between families."""
        size = self.input_spec.size
        self.eval()
        try:
            return self._represent(torch.zeros(1, 3, size, size)).shape[1]
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"{self.config['backbone']} cannot take crops of {size} pixels: {error}") from error
        finally:
            self.train()

    def _represent(self, frames: torch.Tensor) -> torch.Tensor:
        """Normalised frames float[N,3,H,W] to the representation float[N,D]."""
        if isinstance(self.body, ConvNeXt):
            return self.body.features(frames.unsqueeze(1))
        return self.body(frames.contiguous(memory_format=torch.channels_last))

    def embed(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised frames float[N,3,H,W] to the representation float[N,D] and unit vectors float32[N,projection]."""
        features = self._represent(frames)
        return features, F.normalize(self.projector(features).float(), dim=1)

    def project(self, frames: torch.Tensor) -> torch.Tensor:
        """Normalised frames float[N,3,H,W] to unit vectors float32[N,projection]."""
        return self.embed(frames)[1]

    def features(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, t = clips.shape[:2]
        return masked_mean(self._represent(clips.flatten(0, 1)).view(b, t, -1), mask)

    def forward(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, t = clips.shape[:2]
        return masked_mean(self.head(self._represent(clips.flatten(0, 1))).view(b, t), mask)
