"""Where a detector looks: Grad-CAM, occlusion, and the picture of them."""

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


@torch.no_grad()
def occlusion(detector: Detector, clip: np.ndarray, cells: int = 6, batch: int = 64) -> np.ndarray:
    """By how much the log odds of "fake" fall when a part of a clip is blurred: float64[cells,cells].

    clip: uint8[T,S,S,3], not normalised; all its frames are blurred in the same place. Above 0: what is there speaks
    for fake, below 0 for real. Works for any detector of crops (Zeiler and Fergus, ECCV 2014, section 4.2); theirs is a
    grey square, whose edges a detector of blending edges would see, so here a Gaussian window fades into a blurred
    picture (standard deviations: half a cell, and a twelfth of the side).
    """
    where, size = next(detector.parameters()).device, clip.shape[1]
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), size / 12) for frame in clip]).astype(np.float32)
    at = (np.arange(size) + 0.5) * cells / size - np.arange(cells)[:, None] - 0.5  # cells from each cell's centre
    bumps = np.exp(-2 * at**2)
    windows = (bumps[:, None, :, None] * bumps[None, :, None, :]).reshape(-1, 1, size, size, 1)
    shown = [clip, *(np.rint(clip + window * (blurred - clip)).astype(np.uint8) for window in windows)]
    step, logits = max(batch // len(clip), 1), []
    for start in range(0, len(shown), step):
        clips = torch.from_numpy(np.stack(shown[start : start + step])).to(where)
        logits.append(detector(detector.prepare(clips)).double().cpu().numpy())
    found = np.concatenate(logits)
    return (found[0] - found[1:]).reshape(cells, cells)
