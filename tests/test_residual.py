"""The small residual network: shapes, what it cannot see, and a task that it learns in seconds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unmask.detectors import base


def test_shapes_and_one_logit_a_clip():
    detector = base.build("residual", size=64).eval()
    clips = torch.randn(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits, boundary = detector.with_boundary(clips[0])
    assert logits.shape == (3,) and boundary.shape == (3, 8, 8) and detector.features(clips).shape == (2, 64)
    torch.testing.assert_close(detector(clips)[0], logits.mean())
    mask = torch.tensor([[True, False, False]] * 2)
    torch.testing.assert_close(detector(clips, mask)[0], logits[0])
    assert detector.input_spec.native and base.cost(detector)["parameters"] < 100_000


def test_a_smooth_picture_says_nothing_whatever_its_brightness():
    detector = base.build("residual", size=64).eval()
    ramp = np.linspace(40, 200, 64)[None, :, None] * np.ones((64, 1, 3))
    pictures = torch.from_numpy(np.stack([np.full((64, 64, 3), 90.0), np.full((64, 64, 3), 180.0), ramp]))
    logits = detector(detector.prepare(pictures).unsqueeze(1))
    assert logits.max() - logits.min() < 0.02


def test_it_learns_a_difference_in_noise_within_seconds():
    rng = np.random.default_rng(0)

    def batch(count):
        noise = rng.normal(0, 4, (count, 32, 32, 3))
        labels = np.arange(count) % 2
        blurred = (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2)) / np.sqrt(3)
        pictures = np.where(labels[:, None, None, None] == 1, blurred, noise) + rng.uniform(60, 180, (count, 1, 1, 3))
        return torch.from_numpy(np.rint(pictures).clip(0, 255).astype(np.uint8)), torch.from_numpy(labels).float()

    torch.manual_seed(0)
    detector = base.build("residual", size=32).train()
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    for _ in range(30):
        pictures, labels = batch(16)
        loss = F.binary_cross_entropy_with_logits(detector.with_boundary(detector.prepare(pictures))[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pictures, labels = batch(64)
    with torch.no_grad():
        found = detector.eval()(detector.prepare(pictures).unsqueeze(1)) > 0
    assert (found == labels.bool()).float().mean() > 0.95


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        base.build("residual", size=100)
