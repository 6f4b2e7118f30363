"""Clips made of real ones: labels, what differs between the kinds, and what must not."""

import cv2
import numpy as np
import pytest

from unmask import clips, sbi

ROUND = np.linspace(np.pi, -1.05, 6)
FACE = np.concatenate(
    [
        np.c_[np.linspace(20, 76, 17), 50 + 30 * np.sin(np.linspace(0, np.pi, 17))],  # jaw
        np.c_[np.r_[np.linspace(25, 44, 5), np.linspace(52, 71, 5)], np.full(10, 40)],  # brows
        np.c_[np.full(4, 48), np.linspace(44, 56, 4)], np.c_[np.linspace(42, 54, 5), np.full(5, 59)],  # nose
        *(c + 4 * np.c_[np.cos(ROUND), np.sin(ROUND) / 2] for c in ((35, 46), (61, 46))),  # eyes
        np.array([48, 68]) + np.c_[11 * np.cos(a := np.linspace(np.pi, -np.pi, 20)), 5 * np.sin(a)],  # mouth
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def still():
    """A clip in which nothing moves, and its landmarks."""
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(40, 210, (24, 24, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    return [image] * 5, [FACE] * 5


def change(clip):
    """Mean size of the change from frame to frame, grey levels."""
    return np.abs(np.diff(clip.astype(float), axis=0)).mean()


def test_nothing_changes_over_time_but_what_varies(still):
    made = [clips.make_clips(*still, np.random.default_rng(seed), 64, "intended") for seed in range(12)]
    for kinds in made:
        assert {k: v.shape for k, v in kinds.items()} == dict.fromkeys(clips.LABELS, (5, 64, 64, 3))
        assert change(kinds["real"]) == change(kinds["steady"]) == 0
        assert change(kinds["varying"]) > 0.05
        np.testing.assert_array_equal(kinds["varying"][0], kinds["steady"][0])
    assert clips.LABELS == {"real": 0, "steady": 0, "blend": 1, "varying": 1}


def test_a_single_frame_cannot_tell_varying_from_steady():
    """Offsets and brightness of a frame have one distribution in both kinds."""
    draws = [clips.clip_draws(np.random.default_rng(seed), 6, "intended") for seed in range(1500)]
    for read in (lambda d: np.hypot(*d.offset), lambda d: abs(d.flicker)):
        steady, varying = (np.array([read(d[kind][3]) for d in draws]) for kind in ("steady", "varying"))
        for share in (0.25, 0.5, 0.75, 0.95):
            assert np.quantile(varying, share) == pytest.approx(np.quantile(steady, share), rel=0.2, abs=1e-4)
    widths = np.array([[d.offset[0] for d in one["varying"]] for one in draws])
    moving = widths[np.abs(widths).max(1) > 0]
    assert 0.55 < len(moving) / len(draws) < 0.78, "two of three kinds of varying clips move"
    low, high = clips.JITTER
    assert moving.std() == pytest.approx(np.sqrt((high**3 - low**3) / 3 / (high - low)), rel=0.06)


def test_a_plain_copy_that_stands_still_changes_nothing(still):
    """Neither colours nor sharpness nor size of the copy differ from the face: only place and brightness do."""
    from dataclasses import replace

    draw = clips.clip_draws(np.random.default_rng(3), 2, "intended")["steady"][0]
    image, points = still[0][0], still[1][0]
    fake = sbi.blend(image, points, replace(draw, offset=(0.0, 0.0), flicker=0.0)).fake
    assert np.abs(fake.astype(int) - image).max() <= 1
    bright = sbi.blend(image, points, replace(draw, offset=(0.0, 0.0), flicker=0.1, ratio=1.0))
    inside = bright.mask > 0.99
    np.testing.assert_allclose(bright.fake[inside].astype(float) - image[inside], 25.5, atol=1)


def test_kinds_of_one_clip_are_alike_in_all_that_is_no_manipulation(still, monkeypatch):
    """Flip, colours, compression and crop: without the blending all kinds and frames are one picture."""
    monkeypatch.setattr(sbi, "blend", lambda image, *_: sbi.SelfBlend(image, image, None, None))
    seen = set()
    for seed in range(6):
        made = np.concatenate(list(clips.make_clips(*still, np.random.default_rng(seed), 64, "intended").values()))
        assert (made == made[0]).all()
        seen.add(made[0].tobytes())
    assert len(seen) == 6


def test_the_same_dice_give_the_same_clips(still):
    one, two, other = (clips.make_clips(*still, np.random.default_rng(s), 48, "intended") for s in (5, 5, 6))
    assert all(np.array_equal(one[k], two[k]) for k in one)
    assert not any(np.array_equal(one[k], other[k]) for k in one)


def test_with_edges_the_clips_are_the_same_where_the_face_keeps_still(still):
    plain = clips.make_clips(*still, np.random.default_rng(4), 48, "smooth")
    made, edges = clips.make_clips_and_edges(*still, np.random.default_rng(4), 48, "smooth")
    assert all(np.array_equal(made[kind], plain[kind]) for kind in clips.LABELS) and made.keys() == plain.keys()
    assert {kind: (part.shape, part.dtype) for kind, part in edges.items()} == dict.fromkeys(
        clips.LABELS, ((5, 48, 48), np.float32)
    )
    for pair in clips.PAIRS:
        alone, own = clips.make_clips_and_edges(*still, np.random.default_rng(4), 48, "smooth", [pair])
        assert set(alone) == set(own) == set(pair), "one pair alone, and still the same"
        assert all(np.array_equal(alone[k], made[k]) and np.array_equal(own[k], edges[k]) for k in pair)


def test_one_box_for_all_frames_however_the_landmarks_tremble(still):
    images, points = still[0], [FACE + np.float32([k % 3, -(k % 2)]) for k in range(5)]
    for seed in range(4):
        made, _ = clips.make_clips_and_edges(images, points, np.random.default_rng(seed), 48, "smooth")
        loose = clips.make_clips(images, points, np.random.default_rng(seed), 48, "smooth")
        assert change(made["real"]) == 0 < change(loose["real"])


def test_edges_are_cut_as_the_pictures_are(still, monkeypatch):
    """With pictures that show the mask itself, edges can be read off the pictures."""

    def masked(image, points, draw, recipe):
        return sbi.SelfBlend(image, image, image[..., 0] / np.float32(255), None)

    monkeypatch.setattr(sbi, "blend", masked)
    monkeypatch.setattr(sbi, "augment_pair", lambda real, fake, *_: (real, fake))
    square = np.zeros((96, 96, 3), np.uint8)
    square[40:70, 30:60] = 255
    images = [cv2.GaussianBlur(np.roll(square, 3 * t, 1), (0, 0), 4) for t in range(5)]
    for seed in range(4):
        made, edges = clips.make_clips_and_edges(images, still[1], np.random.default_rng(seed), 48, "smooth")
        assert not edges["real"].any()
        for kind in ("blend", "varying", "steady"):
            mask = made[kind][..., 0].astype(float) / 255
            np.testing.assert_allclose(edges[kind], 4 * mask * (1 - mask), atol=4 * 1.1 / 255)
            assert np.ptp(edges[kind]) > 0.9
