"""Where a detector looks: Grad-CAM, and the picture of it."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from unmask.detectors.base import Detector


def grad_cam(detector: Detector, clips: torch.Tensor, layer: nn.Module | None = None) -> torch.Tensor:
    """What speaks for "fake" in every frame: normalised clips float[B,T,3,H,W] to float32[B,T,H,W], 0 or more.

    The maps of `layer` (float[N,C,h,w]; by default the last stage of a ConvNeXt), weighted by the mean gradient of the
    frame's logit, summed, cut at 0, and enlarged linearly (Selvaraju et al., ICCV 2017, equations 1 and 2). Not scaled,
    so that frames compare. Runs in evaluation mode and leaves the detector and its gradients as they were.
    """
    layer = detector.backbone.stages[-1] if layer is None else layer
    seen, training = [], detector.training

    def leaf(_, __, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hook = layer.register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            # A clip of one frame each: nothing of another frame, nor the length of the clip, in the gradient.
            logits = detector.eval()(clips.flatten(0, 1).unsqueeze(1))
            (gradient,) = torch.autograd.grad(logits.sum(), seen)
    finally:
        hook.remove()
        detector.train(training)
    maps = seen[0].detach().float()
    heat = (maps * gradient.float().mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    enlarged = F.interpolate(heat, clips.shape[-2:], mode="bilinear", align_corners=False)
    return enlarged.view(*clips.shape[:2], *clips.shape[-2:])


def overlay(images: np.ndarray, heat: np.ndarray, strength: float = 0.5) -> np.ndarray:
    """Pictures uint8[...,H,W,3] under their maps float[...,H,W], red where they are largest: uint8[...,H,W,3].

    The largest value of all maps given is the top of the scale, so that the frames of one call compare.
    """
    heat = np.asarray(heat, np.float32)
    levels = np.rint(255 * heat / max(heat.max(), np.finfo(np.float32).tiny)).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    return np.rint((1 - strength) * images + strength * colours[:, 0][levels]).astype(np.uint8)
