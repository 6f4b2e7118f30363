"""ConvNeXt (Liu et al., CVPR 2022) frame by frame, with optional fusion and frequency branch; clips are averaged."""

import re

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from unmask.detectors.base import Detector, InputSpec, masked_mean, register
from unmask.detectors.frequency import BRANCHES, AttentionJoin, ConcatJoin, StemJoin, zeroed

FUSIONS, JOINS = ("none", "topdown"), ("stem", "concat", "attention")


class TopDown(nn.Module):
    """Features of several scales: maps float[N,widths[i],H_i,W_i], fine to coarse, to float[N,features].

    Feature pyramid (Lin et al., CVPR 2017): every map is normalised and projected to `width` channels, the coarser
    level is added to it, and the averages of all levels go through LayerNorm and a linear layer. The depthwise
    convolution and GELU on every level are needed: averages commute with all the rest, and without them the pyramid
    would be a linear function of the separate averages.
    """

    def __init__(self, widths: list[int], width: int, features: int):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Sequential(LayerNorm2d(w), nn.Conv2d(w, width, 1)) for w in widths)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.GELU()) for _ in widths
        )
        self.norm = nn.LayerNorm(width * len(widths))
        self.project = zeroed(nn.Linear(width * len(widths), features))

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2, mode="nearest")
        means = [smooth(x).mean((2, 3)) for smooth, x in zip(self.smooth, levels, strict=True)]
        return self.project(self.norm(torch.cat(means, 1)))


def check(fusion: str, frequency: str, join: str, size: int) -> None:
    """ValueError that says what to change, if the options of ConvNeXt do not fit together."""
    choices = {"fusion": (fusion, FUSIONS), "frequency": (frequency, ("none", *BRANCHES)), "join": (join, JOINS)}
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not '{value}'.")
    if frequency == "none" and join != "stem":
        raise ValueError(
            f"join='{join}' has nothing to join: set frequency to one of {', '.join(BRANCHES)}, or join to stem."
        )
    if frequency == "fft" and join != "attention":
        raise ValueError(f"frequency='fft' has no places where join='{join}' could add it: set join to attention.")
    if size < 32 or size % 32:
        raise ValueError(f"ConvNeXt needs a crop size that is a multiple of 32, not {size}.")


def timm_network(name: str, **options) -> nn.Module:
    """A network that timm knows by `name`, without its classifier; `options` as timm's. ValueError for any other."""
    # timm also takes folders and repositories (local-dir:, hf-hub:), and of those, in older versions, pickled weights.
    if not re.fullmatch(r"\w+(\.\w+)?", name) or not timm.is_model(name):
        raise ValueError(f"timm has no network named '{name}'; `timm.list_models()` lists what it has.")
    return timm.create_model(name, num_classes=0, **options)


@register("convnext")
class ConvNeXt(Detector):
    """Any timm ConvNeXt with one logit, and a head that locates the blending boundary.

    backbone: a timm name. fusion: "topdown" adds features of strides 8 to 32 (`TopDown`) to those of the last stage.
    frequency: a branch of `frequency.BRANCHES`, or "none". join: where it enters: "stem" (added at stride 4), "concat"
    or "attention" (after the stage of stride 16). pretrained: start from timm's weights. size: crop size in pixels, a
    multiple of 32. drop_path: stochastic depth. native: see `InputSpec`. layer_scale: start the blocks at timm's layer
    scale of 1e-6 instead of 1; by default only with pretrained weights, for it is made for 300 epochs, and short
    training from random weights never gets past it. ValueError for options that do not fit together.

    All variants share their names of parameters, and what one adds to another starts at zero (except SRM at the stem),
    so that the weights of one start another.
    """

    def __init__(
        self, backbone: str = "convnext_tiny", fusion: str = "none", frequency: str = "srm", join: str = "stem",
        pretrained: bool = False, size: int = 224, drop_path: float = 0.0, layer_scale: bool | None = None,
        native: bool = False,
    ):  # fmt: skip
        super().__init__()
        check(fusion, frequency, join, size)
        layer_scale = pretrained if layer_scale is None else layer_scale
        # A checkpoint brings its own weights, so it is rebuilt without asking for pretrained ones.
        self.config = {
            "backbone": backbone, "fusion": fusion, "frequency": frequency, "join": join, "size": size,
            "drop_path": drop_path, "layer_scale": layer_scale, "native": native,
        }  # fmt: skip
        self.input_spec = InputSpec(size, native=native)
        # Not None, which timm drops from the options, to leave its 1e-6. The second version has no layer scale at all.
        options = {} if layer_scale or backbone.startswith("convnextv2") else {"ls_init_value": 1.0}
        self.backbone = timm_network(backbone, pretrained=pretrained, drop_path_rate=drop_path, **options)
        widths = [stage["num_chs"] for stage in self.backbone.feature_info]
        self.frequency = None if frequency == "none" else BRANCHES[frequency](widths[0], size)
        self.head = nn.Linear(self.backbone.num_features, 1)
        self.boundary_head = nn.Conv2d(widths[1], 1, 1)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        # Last, so that the same seed gives all variants the same parts in common.
        self.join = self._new_join(widths)
        self.fusion = None
        if fusion == "topdown":
            self.fusion = TopDown(widths[1:], min(256, widths[3]), self.backbone.num_features)

    def _new_join(self, widths: list[int]) -> nn.Module | None:
        """The module that the configuration's `join` names; None where nothing is joined or SRM is simply added."""
        if self.config["join"] == "concat":
            return ConcatJoin(widths)
        if self.config["join"] == "attention":
            return AttentionJoin(widths, self.config["size"])
        return None if self.config["frequency"] in ("none", "srm") else StemJoin(widths[0])

    def _branch(self, frames: torch.Tensor) -> torch.Tensor:
        """What the frequency branch sees in normalised frames float[N,3,H,W]: float[N,C,H/4,W/4]."""
        mean, std = (frames.new_tensor(v).view(1, 3, 1, 1) for v in (self.input_spec.mean, self.input_spec.std))
        return self.frequency(255 * (frames * std + mean))

    def _frames(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised frames float[N,3,H,W] to features float[N,D] and boundary logits float[N,H/8,W/8]."""
        frames = frames.contiguous(memory_format=torch.channels_last)
        net, at_stem = self.backbone, self.config["join"] == "stem"
        branch = None if self.frequency is None else self._branch(frames)
        x = net.stem(frames)
        if branch is not None and at_stem:
            x = x + branch if self.join is None else self.join(x, branch)
        fine = net.stages[1](net.stages[0](x))
        middle = net.stages[2](fine)
        if branch is not None and not at_stem:
            middle = self.join(middle, branch)
        last = net.norm_pre(net.stages[3](middle))
        features = net.forward_head(last)
        if self.fusion is not None:
            features = features + self.fusion([fine, middle, last])
        return features, self.boundary_head(fine).squeeze(1)

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
