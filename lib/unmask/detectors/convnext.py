"""ConvNeXt (Liu et al., CVPR 2022) frame by frame, with an optional frequency branch; clips are averaged."""

import timm
import torch
import torch.nn.functional as F
from torch import nn

from unmask.detectors.base import Detector, InputSpec, masked_mean, register

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


class SRMBranch(nn.Module):
    """Noise residuals through a small BatchNorm stem: grey levels float[N,3,H,W] in 0..255 to float[N,C,H/4,W/4].

    The residuals are truncated softly at +-`limit`. Normalising over the batch is what lets this branch learn from
    random weights within a few thousand images, where a patch stem stays at chance.
    """

    def __init__(self, channels: int, width: int = 24, limit: float = 6.0):
        super().__init__()
        self.limit = limit
        self.register_buffer("kernels", SRM.unsqueeze(1).repeat(3, 1, 1, 1), persistent=False)
        self.scale = nn.BatchNorm2d(9)
        layers = []
        for c_in, c_out, stride in ((9, width, 1), (width, width, 2), (width, channels, 2)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.stem = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        residual = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), self.kernels, groups=3)
        return self.stem(self.scale(self.limit * torch.tanh(residual / self.limit)))


@register("convnext")
class ConvNeXt(Detector):
    """Any timm ConvNeXt with one logit, and a head that locates the blending boundary.

    backbone: a timm name. frequency: "none" (RGB alone) or "srm" (an `SRMBranch` is added to the output of the stem).
    pretrained: start from timm's weights. size: crop size in pixels, a multiple of 32. drop_path: stochastic depth.
    layer_scale: start the blocks at timm's layer scale of 1e-6 instead of 1; by default only with pretrained weights,
    for it is made for 300 epochs, and short training from random weights never gets past it.
    """

    def __init__(
        self, backbone: str = "convnext_tiny", frequency: str = "srm", pretrained: bool = False, size: int = 224,
        drop_path: float = 0.0, layer_scale: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        if frequency not in ("none", "srm"):
            raise ValueError(f"frequency must be 'none' or 'srm', not '{frequency}'.")
        if size < 32 or size % 32:
            raise ValueError(f"ConvNeXt needs a crop size that is a multiple of 32, not {size}.")
        layer_scale = pretrained if layer_scale is None else layer_scale
        # A checkpoint brings its own weights, so it is rebuilt without asking for pretrained ones.
        self.config = {
            "backbone": backbone,
            "frequency": frequency,
            "size": size,
            "drop_path": drop_path,
            "layer_scale": layer_scale,
        }
        self.input_spec = InputSpec(size)
        # Not None, which timm drops from the options, to leave its 1e-6. The second version has no layer scale at all.
        options = {} if layer_scale or backbone.startswith("convnextv2") else {"ls_init_value": 1.0}
        self.backbone = timm.create_model(
            backbone, pretrained=pretrained, num_classes=0, drop_path_rate=drop_path, **options
        )
        widths = [stage["num_chs"] for stage in self.backbone.feature_info]
        self.frequency = SRMBranch(widths[0]) if frequency == "srm" else None
        self.head = nn.Linear(self.backbone.num_features, 1)
        self.boundary_head = nn.Conv2d(widths[1], 1, 1)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def _frames(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised frames float[N,3,H,W] to features float[N,D] and boundary logits float[N,H/8,W/8]."""
        frames = frames.contiguous(memory_format=torch.channels_last)
        net, x = self.backbone, self.backbone.stem(frames)
        if self.frequency is not None:
            mean, std = (frames.new_tensor(v).view(1, 3, 1, 1) for v in (self.input_spec.mean, self.input_spec.std))
            x = x + self.frequency(255 * (frames * std + mean))
        x = net.stages[1](net.stages[0](x))
        boundary = self.boundary_head(x).squeeze(1)
        x = net.norm_pre(net.stages[3](net.stages[2](x)))
        return net.forward_head(x), boundary

    def features(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, t = clips.shape[:2]
        return masked_mean(self._frames(clips.flatten(0, 1))[0].view(b, t, -1), mask)

    def forward(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, t = clips.shape[:2]
        return masked_mean(self.head(self._frames(clips.flatten(0, 1))[0]).view(b, t), mask)

    def with_boundary(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For training: frames float[N,3,H,W] to logits float[N] and boundary logits float[N,H/8,W/8]."""
        features, boundary = self._frames(frames)
        return self.head(features).squeeze(1), boundary
