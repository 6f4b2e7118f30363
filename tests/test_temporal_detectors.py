"""Temporal heads: padding never matters, order matters where it should, the detector below stays as it is."""

import numpy as np
import pytest
import torch

from unmask.detectors import base
from unmask.detectors.temporal import GRID, HEADS, THUMB, frame_outputs, motion

SPATIAL = {"detector": "convnext", "config": {"backbone": "test_convnext", "size": 32}}
FRAMES = 6


def build(name, **config):
    torch.manual_seed(1)
    return base.build(name, spatial=SPATIAL, frames=FRAMES, **config).eval()


def outputs(detector, clips=3, frames=FRAMES, seed=0):
    """Random outputs of frames: features of unit size, thumbnails of a few grey levels around the middle."""
    rng = torch.Generator().manual_seed(seed)
    pooled = torch.randn(clips, frames, detector.pooled, generator=rng)
    return torch.cat([pooled, 0.02 * torch.randn(clips, frames, THUMB * THUMB, generator=rng)], 2)


every_head = pytest.mark.parametrize("name", HEADS)
both = pytest.mark.parametrize("differences", [False, True])


@every_head
@both
def test_padding_never_matters(name, differences):
    detector = build(name, differences=differences)
    x = outputs(detector)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1]]).bool()
    alone = torch.cat([detector.head(clip[keep].unsqueeze(0)) for clip, keep in zip(x, mask, strict=True)])
    torch.testing.assert_close(detector.head(x, mask), alone, atol=1e-5, rtol=0)
    for rubbish in (1e6, float("nan"), float("inf")):
        assert torch.equal(detector.head(x.masked_fill(~mask.unsqueeze(2), rubbish), mask), detector.head(x, mask))
    assert not torch.allclose(detector.head(x)[1:], detector.head(x, mask)[1:]), "what is not padding does matter"


@every_head
def test_one_frame_is_a_clip_and_none_or_too_many_are_not(name):
    detector = build(name)
    assert torch.isfinite(detector.head(outputs(detector, 2, 1))).all()
    assert detector(torch.randn(2, 1, 3, 32, 32)).shape == (2,)
    with pytest.raises(ValueError, match="at least one frame"):
        detector.head(outputs(detector, 2), torch.tensor([[True] * FRAMES, [False] * FRAMES]))
    with pytest.raises(ValueError, match="at most 6 frames"):
        detector.head(outputs(detector, 2, FRAMES + 1))


@pytest.mark.parametrize(
    ("name", "differences", "notices"),
    [("mean", False, False), ("mean", True, True), ("gru", False, True), ("transformer", False, True)],
)
def test_only_the_control_knows_no_order(name, differences, notices):
    detector = build(name, differences=differences)
    x = outputs(detector)
    shuffled = x[:, [3, 0, 5, 1, 4, 2]]
    change = (detector.head(shuffled) - detector.head(x)).abs()
    assert (change > 1e-4).all() if notices else (change < 1e-6).all()


@every_head
def test_without_differences_thumbnails_are_not_seen_and_with_them_only_their_changes(name):
    x = outputs(build(name))
    brighter, changed = x.clone(), x.clone()
    brighter[..., -THUMB * THUMB :] += 0.1
    changed[:, 2, -THUMB * THUMB :] += 0.1
    blind, seeing = build(name, differences=False), build(name, differences=True)
    assert torch.equal(blind.head(changed), blind.head(x))
    torch.testing.assert_close(seeing.head(brighter), seeing.head(x), atol=1e-4, rtol=0)
    assert not torch.allclose(seeing.head(changed), seeing.head(x), atol=1e-3)


def test_motion_is_counted_in_grey_levels_per_cell():
    rng = np.random.default_rng(0)
    frames = rng.random((3, THUMB, THUMB))
    steps = np.diff(255 * frames, axis=0).reshape(2, GRID, THUMB // GRID, GRID, THUMB // GRID)
    moves, brightens = np.abs(steps).mean((2, 4)), np.abs(steps.mean((2, 4)))
    expected = np.concatenate([moves.reshape(2, -1), brightens.reshape(2, -1)], 1)
    padded = torch.tensor(np.concatenate([frames, np.zeros((1, THUMB, THUMB))])).view(1, 4, -1)
    found = motion(padded, torch.tensor([[True, True, True, False]]))[0].numpy()
    np.testing.assert_allclose(found, np.concatenate([0 * expected[:1], expected, 0 * expected[:1]]), atol=1e-9)


def test_outputs_of_frames_are_the_detectors_own():
    spatial = base.build("convnext", **SPATIAL["config"]).eval()
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    frames = spatial.prepare(images)
    with torch.no_grad():
        found, logits = frame_outputs(spatial, frames)
        torch.testing.assert_close(found[:, : -THUMB * THUMB], spatial.features(frames.unsqueeze(1)))
        torch.testing.assert_close(logits, spatial(frames.unsqueeze(1)))
    grey = images.double().mean(3) / 255 - 0.5
    torch.testing.assert_close(found[:, -THUMB * THUMB :].mean(1).double(), grey.mean((1, 2)), atol=2e-2, rtol=0)
    corner = found[:, -THUMB * THUMB].double()  # 32 / 24 px: the first cell spans pixels 0 and 1
    torch.testing.assert_close(corner, grey[:, :2, :2].mean((1, 2)), atol=1e-5, rtol=0)


@every_head
def test_pictures_give_what_their_outputs_give(name):
    detector = build(name)
    clips = torch.randn(2, 4, 3, 32, 32)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        each = torch.stack([frame_outputs(detector.spatial, clip)[0] for clip in clips])
        torch.testing.assert_close(detector(clips, mask), detector.head(each, mask), atol=1e-5, rtol=0)
        clips[~mask] = float("nan")
        assert torch.isfinite(detector(clips, mask)).all()
        assert detector.features(clips, mask).shape == (2, detector.last.in_features)


@every_head
def test_training_leaves_the_detector_below_alone(name):
    detector = build(name).train()
    before = {k: v.clone() for k, v in detector.spatial.state_dict().items()}
    optimizer = torch.optim.AdamW(detector.trainable_parameters(), lr=0.1, weight_decay=0.1)
    torch.nn.functional.softplus(detector(torch.randn(2, 3, 3, 32, 32))).sum().backward()
    optimizer.step()
    after = detector.spatial.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "neither weights nor statistics of normalisation"
    names = {k for k, p in detector.named_parameters() if p.requires_grad}
    assert names and not any(k.startswith("spatial") for k in names)
    assert set(detector.head_state()) == names | {k for k, _ in detector.named_buffers() if k[:8] != "spatial."}


@every_head
def test_a_checkpoint_holds_head_and_detector(name, tmp_path):
    detector, spatial = build(name), base.build("convnext", **SPATIAL["config"])
    detector.adopt(spatial)
    base.save_checkpoint(detector, tmp_path / name)
    again, _ = base.load_checkpoint(tmp_path / name)
    clips = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(clips), detector(clips))
    assert all(torch.equal(v, again.spatial.state_dict()[k]) for k, v in spatial.state_dict().items())
    assert again.input_spec.frames == FRAMES and again.input_spec.size == 32
