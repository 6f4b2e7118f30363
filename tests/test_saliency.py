"""Grad-CAM where the answer is known by construction, and against the chain rule for every variant of ConvNeXt."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from unmask.detectors import base
from unmask.detectors.base import Detector, InputSpec, masked_mean
from unmask.saliency import grad_cam, occlusion, overlay


class Known(Detector):
    """logit = 2 * mean of (red, averaged over 8 x 8 pixels) - 3 * mean of green: only red speaks for "fake"."""

    def __init__(self):
        super().__init__()
        self.input_spec = InputSpec(32)
        self.pool, self.norm = nn.AvgPool2d(8), nn.BatchNorm2d(3, affine=False)
        self.weight = nn.Parameter(torch.tensor([2.0, -3.0, 0.0]))
        self.backbone = SimpleNamespace(stages=[self.norm, self.pool])

    def forward(self, clips, mask=None):
        b, t = clips.shape[:2]
        self.norm(clips.flatten(0, 1))  # so that the running statistics would show a pass in training mode
        return masked_mean((self.pool(clips.flatten(0, 1)).mean((2, 3)) @ self.weight).view(b, t), mask)


def test_only_the_region_that_drives_the_logit_lights_up():
    detector, clips = Known().train(), torch.zeros(2, 3, 3, 32, 32)
    clips[:, :, 0, 8:16, 16:24] = 1.0  # red, one cell
    clips[:, :, 1, 24:, :8] = 1.0  # green, another
    clips[1, 2, 0] *= 2
    heat = grad_cam(detector, clips)
    assert heat.shape == (2, 3, 32, 32) and heat.dtype == torch.float32 and not heat.requires_grad
    # The slope of a red cell is 2/16 and it holds 1; between cell centres, 8 pixels apart, the map falls linearly.
    fall = [np.maximum(0, 1 - np.abs(np.arange(32) + 0.5 - centre) / 8) for centre in (12, 20)]
    np.testing.assert_allclose(heat[0, 0].numpy(), 2 / 16 * np.outer(*fall), atol=1e-6)
    torch.testing.assert_close(heat[0], heat[0, :1].expand(3, 32, 32))
    torch.testing.assert_close(heat[1, 2], 2 * heat[0, 0])
    # Nothing of the detector has changed.
    assert detector.training and detector.weight.grad is None and detector.norm.num_batches_tracked == 0
    assert not detector.pool._forward_hooks


def test_evidence_against_fake_is_dark_and_layers_can_be_chosen():
    detector, clips = Known().eval(), torch.zeros(1, 1, 3, 32, 32)
    clips[:, :, 1] = 1.0
    assert grad_cam(detector, clips).max() == 0
    with torch.no_grad():
        detector.weight.copy_(torch.tensor([0.0, 5.0, 0.0]))
    torch.testing.assert_close(grad_cam(detector, clips, detector.pool), torch.full((1, 1, 32, 32), 5 / 16))
    assert not detector.training


VARIANTS = [("none", "none", "stem"), ("topdown", "srm", "stem"), ("none", "fft", "attention")]
VARIANTS += [("topdown", name, join) for name in ("srm", "fad", "phase") for join in ("concat", "attention")]


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_grad_cam_of_a_convnext_is_its_definition(variant):
    torch.manual_seed(0)
    options = dict(zip(("fusion", "frequency", "join"), variant, strict=True))
    detector = base.build("convnext", backbone="test_convnext", size=64, **options).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    clips = torch.randn(2, 2, 3, 64, 64)
    heat = grad_cam(detector, clips)
    assert heat.shape == (2, 2, 64, 64) and torch.isfinite(heat).all()
    # The logit's slope along every channel of the last map, by finite differences: alpha is that slope over the area.
    stage, shift = detector.backbone.stages[-1], torch.zeros(64)
    kept = []
    hook = stage.register_forward_hook(lambda _, __, out: kept.append(out) or out + shift.view(1, -1, 1, 1))
    with torch.no_grad():
        frame, slopes = clips[1:, 1:], []
        for channel in range(64):
            sides = []
            for step in (1e-2, -1e-2):
                shift.zero_()[channel] = step
                sides.append(detector(frame))
            slopes.append((sides[0] - sides[1]).item() / 2e-2)
    hook.remove()
    coarse = torch.einsum("c,chw->hw", torch.tensor(slopes) / 4, kept[0][0]).relu().numpy()
    assert coarse.shape == (2, 2)
    corners = heat[1, 1][::63, ::63].numpy()  # enlargement keeps the corners
    np.testing.assert_allclose(corners, coarse, rtol=0.02, atol=1e-2 * max(coarse.max(), 1e-3))
    assert all(p.grad is None for p in detector.parameters())


def test_overlay_is_red_where_the_map_is_largest_and_one_call_has_one_scale():
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    heat = np.zeros((2, 4, 4), np.float32)
    heat[0, 1, 1], heat[1, 2, 2] = 4.0, 2.0
    out = overlay(images, heat)
    assert out.shape == images.shape and out.dtype == np.uint8
    hot, half, cold = out[0, 1, 1].astype(int), out[1, 2, 2].astype(int), out[0, 0, 0].astype(int)
    assert hot[0] > hot[1] + 30 and hot[0] > hot[2] + 30
    assert half[1] == max(half) and not np.array_equal(half, hot) and not np.array_equal(cold, hot)
    assert np.array_equal(overlay(images, heat, strength=0.0), images)
    assert np.array_equal(overlay(images[0], 0 * heat[0]), np.broadcast_to(cold, (4, 4, 3)))
    assert np.array_equal(overlay(images[1], heat[1])[2, 2], hot)


class Bright(base.Detector):
    """A detector that adds up the red of two places of every frame: the first for fake, the second for real."""

    def __init__(self):
        super().__init__()
        self.input_spec = base.InputSpec(size=48, mean=(0, 0, 0), std=(1, 1, 1), frames=2)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, clips, mask=None):
        red = clips[:, :, 0].mean(1)
        return self.scale * (red[:, 4:8, 20:24].sum((1, 2)) - 2 * red[:, 36:40, 4:8].sum((1, 2)))


def test_occlusion_finds_what_speaks_for_fake_and_for_real():
    clip = np.zeros((2, 48, 48, 3), np.uint8)
    clip[:, 4:8, 20:24, 0] = clip[:, 36:40, 4:8, 0] = 255
    found = occlusion(Bright(), clip, cells=6)  # cells of 8 pixels: rows 0 and 4, columns 2 and 0
    assert found.shape == (6, 6) and np.unravel_index(found.argmax(), (6, 6)) == (0, 2)
    assert np.unravel_index(found.argmin(), (6, 6)) == (4, 0)
    # Blurring takes nearly all of 16 pixels' red where the window is 1, and counts twice for real.
    assert 8 < found.max() < 16 and -32 < found.min() < -16
    assert np.abs(found[:, 4:]).max() < 0.5
    np.testing.assert_allclose(occlusion(Bright(), clip, cells=6, batch=3), found)
