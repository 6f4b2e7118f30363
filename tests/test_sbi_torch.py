"""The batched self-blend beside the one-by-one version: fixed draws, single steps, distributions, edges."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from scipy import stats
from test_sbi import cartoon, face, fixed_draw

from unmask import sbi, sbi_torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def batch(count, shape=(96, 112), points=81):
    """Pictures and landmarks of `count` faces, each at its own place."""
    landmarks = np.stack([face((shape[1] / 2 + i % 5, shape[0] * 0.53 - i % 3), 48 + i % 7) for i in range(count)])
    images = np.stack([cartoon(*shape, marks, seed) for seed, marks in enumerate(landmarks)])
    return images, landmarks[:, :points]


def one_by_one(images, landmarks, draws, recipe):
    results = [sbi.blend(*sample, recipe) for sample in zip(images, landmarks, draws, strict=True)]
    return [np.stack([getattr(r, name) for r in results]) for name in ("fake", "real", "mask", "boundary")]


def together(images, landmarks, draws, recipe, device="cpu"):
    result = sbi_torch.blend_batch(torch.from_numpy(images).to(device), landmarks, draws, recipe)
    assert all(part.device.type == device for part in result)
    return [part.cpu().numpy() for part in result]


def gap(one, other):
    return np.abs(one.astype(float) - other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", sbi.RECIPES)
@pytest.mark.parametrize(("shape", "points"), [((96, 112), 81), ((96, 112), 68), ((300, 270), 81)])
def test_same_draws_same_blend(device, recipe, shape, points):
    """Masks: mean gap under 1/1000, 99 % under 1/50; a pixel that erosion only just keeps may go either way.

    Pictures in grey levels: 99 % exact, mean under 0.05; where 8-bit HSV cuts off fractions, 99 % within 4.
    """
    images, landmarks = batch(32 if shape[0] < 200 else 12, shape, points)
    draws = [sbi.draw_blend(np.random.default_rng(seed), recipe) for seed in range(len(images))]
    ours = one_by_one(images, landmarks, draws, recipe)
    theirs = together(images, landmarks, draws, recipe, device)
    for name, a, b in zip(("fake", "real", "mask", "boundary"), ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
    exact = recipe == "intended"
    assert gap(ours[1], theirs[1]).max() <= (1 if exact else 6)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert gap(a, b).mean() < (0.05 if exact else 0.3) and np.quantile(gap(a, b), 0.99) <= (0 if exact else 4)
    assert gap(ours[2], theirs[2]).mean() < 1e-3 and np.quantile(gap(ours[2], theirs[2]), 0.99) < 0.02
    assert gap(ours[3], theirs[3]).mean() < 2e-3
    assert np.array_equal(theirs[0][theirs[2] == 0], theirs[1][theirs[2] == 0])
    assert 0 < theirs[2].max() <= 1 and theirs[2].min() == 0
    assert gap(*theirs[:2]).mean() > 0.1


@pytest.mark.parametrize(
    "change",
    [{"hull": kind} for kind in ("dfl_full", "extended", "components", "convex")]
    + [{"first_68": True}, {"ratio": 0.25}, {"translate": (0.03, -0.015), "scale": (0.95, 1 / 0.95)}]
    + [{"down_factor": 2}, {"down_factor": 4, "transform_source": False}, {"sharpen": (0.5, 1.0)}]
    + [{"soft_shape": (192, 256), "erode_kernel": 25, "blur_kernel": 25, "blur_sigma": 45}]
    + [{"offset": (0.08, -0.05), "flicker": 0.1}, {"flicker": -0.2}]
    + [{"colour": sbi.ColourDraw(np.array([20.0, -20, 7]), np.array([0.05, -0.3, 0.3]), np.array([0.1, -0.1]))}],
    ids=lambda change: " ".join(change),
)
def test_each_choice_alone_acts_as_one_by_one(change):
    images, landmarks = batch(4)
    draws = [replace(fixed_draw(down_factor=2), **change), fixed_draw(), fixed_draw(**change), fixed_draw(ratio=0.5)]
    ours, theirs = (run(images, landmarks, draws, "intended") for run in (one_by_one, together))
    assert gap(ours[0], theirs[0]).mean() < 0.05 and np.quantile(gap(ours[0], theirs[0]), 0.998) <= 3
    assert gap(ours[1], theirs[1]).max() <= 1 and gap(ours[2], theirs[2]).mean() < 1e-3


def test_a_mask_too_thin_to_erode_keeps_its_first_blur():
    """A face of 14 px in a picture of 200: softened at 192 px, a kernel of 25 removes all of it."""
    marks = face((100, 100), 14)
    image, draw = cartoon(200, 200), fixed_draw(soft_shape=(192, 193), erode_kernel=25, hull="components")
    images, landmarks = np.stack([image] * 2), np.stack([marks, face((100, 100), 90)])
    draws = [draw, replace(draw, ratio=0.75)]
    ours, theirs = (run(images, landmarks, draws, "intended") for run in (one_by_one, together))
    assert theirs[2][0].max() == pytest.approx(1, abs=0.02) and (theirs[2][0] > 0.5).sum() < 2 * 14**2
    assert gap(ours[2], theirs[2]).max() < 0.05


def test_faces_partly_outside_and_slivers_moved_out():
    marks = np.stack([face(centre, 62) for centre in ((-29.5, 64), (0, 60), (127, 127), (64, 140))])
    images = np.stack([cartoon()] * 4)
    draws = [fixed_draw(translate=(-0.03, 0))] * 4
    ours, theirs = (run(images, marks, draws, "intended") for run in (one_by_one, together))
    assert theirs[2].any(axis=(1, 2)).all()
    assert gap(ours[2], theirs[2]).mean() < 1e-3 and gap(ours[0], theirs[0]).mean() < 0.05


@pytest.mark.parametrize("area", [False, True])
def test_resizing_matrices_are_opencvs(area):
    picture = np.random.default_rng(0).random((230, 41)).astype(np.float32)
    way = cv2.INTER_AREA if area else cv2.INTER_LINEAR
    for new in (192, 201, 229) + (() if area else (231, 256, 500)):
        matrix = sbi_torch._resize(torch.tensor([230.0]), torch.tensor([float(new)]), (520, 230), torch.tensor([area]))
        result = (matrix[0] @ torch.from_numpy(picture)).numpy()
        np.testing.assert_allclose(result[:new], cv2.resize(picture, (41, new), interpolation=way), atol=1e-4)
        assert not result[new:].any()


def test_blurring_matrices_are_opencvs_with_its_borders():
    rng = np.random.default_rng(0)
    cases = [(256, 5, 0), (192, 25, 0), (201, 7, 0), (230, 25, 45), (12, 25, 5), (222, 9, 5)]
    matrices = sbi_torch._blur(*(list(column) for column in zip(*cases, strict=True)), 256, torch.device("cpu"))
    for matrix, (size, kernel, sigma) in zip(matrices, cases, strict=True):
        picture = rng.random((256, 30)).astype(np.float32)
        expected = cv2.GaussianBlur(picture[:size], (1, kernel), sigmaX=1, sigmaY=sigma or 0.15 * kernel + 0.35)
        if kernel > 7 or sigma:  # smaller kernels without a sigma come from OpenCV's table
            np.testing.assert_allclose((matrix @ torch.from_numpy(picture))[:size], expected, atol=1e-5)
        else:
            both = cv2.GaussianBlur(np.repeat(picture[:size, :1], 40, 1), (kernel, kernel), 0)[:, :1]
            np.testing.assert_allclose((matrix @ torch.from_numpy(picture))[:size, :1], both, atol=1e-5)
        assert not matrix[size:].any()


@pytest.mark.parametrize("recipe", sbi.RECIPES)
def test_equal_in_distribution(recipe):
    """400 draws each, other seeds: mask share and both changes have one distribution; the other recipe's differs."""
    images, landmarks = batch(1, (48, 56))
    images, landmarks = np.repeat(images, 400, 0), np.repeat(face((28, 26), 28)[None], 400, 0)

    def figures(run, seed, name):
        draws = [sbi.draw_blend(np.random.default_rng([seed, i]), name) for i in range(400)]
        parts = [run(images[:50], landmarks[:50], draws[k : k + 50], name) for k in range(0, 400, 50)]
        fake, real, mask = (np.concatenate([part[i] for part in parts]) for i in range(3))
        return mask.mean((1, 2)), gap(real, images).mean((1, 2, 3)), gap(fake, real).mean((1, 2, 3))

    other = "intended" if recipe == "faithful" else "faithful"
    ours, theirs = figures(one_by_one, 1, recipe), figures(together, 2, recipe)
    assert all(stats.ks_2samp(a, b).pvalue > 0.01 for a, b in zip(ours, theirs, strict=True))
    assert stats.ks_2samp(figures(one_by_one, 3, other)[2], theirs[2]).pvalue < 1e-3


def test_a_sample_does_not_depend_on_its_batch_nor_on_global_state():
    images, landmarks = batch(6)
    draws = [sbi.draw_blend(np.random.default_rng(seed)) for seed in range(6)]
    torch.manual_seed(0)
    state, before = torch.get_rng_state(), images.copy()
    whole = together(images, landmarks, draws, "intended")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = together(images[::-1].copy(), torch.from_numpy(landmarks[::-1].copy()), draws[::-1], "intended")
    alone = together(images[2:3], landmarks[2:3], draws[2:3], "intended")
    for a, b, c in zip(whole, again, alone, strict=True):
        assert gap(a, b[::-1]).max() < 1e-4 and gap(a[2:3], c).max() < 1e-4
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(images, before)


def test_clips_replay_in_one_batch():
    clip = sbi.draw_clip(np.random.default_rng(8), 6, drift=0.05, jitter=0.02, flicker=0.05)
    images, landmarks = np.stack([cartoon()] * 6), np.stack([face()] * 6)
    ours, theirs = (run(images, landmarks, clip, "intended") for run in (one_by_one, together))
    assert gap(ours[0], theirs[0]).mean() < 0.05
    assert all(gap(theirs[2][k], theirs[2][k + 1]).max() > 0.05 for k in range(5))


def test_errors_name_the_fix():
    images, landmarks = batch(2)
    draws, pictures = [fixed_draw()] * 2, torch.from_numpy(images)
    for arguments, words in (
        ((pictures.float(), landmarks, draws), "uint8"),
        ((pictures[0], landmarks, draws), "N, H, W"),
        ((pictures[:0], landmarks[:0], []), "at least one"),
        ((pictures, landmarks[:1], draws), "1 faces"),
        ((pictures, landmarks, draws[:1]), "1 draws"),
        ((pictures, landmarks + 500, draws), "own pixels"),
        ((pictures, landmarks[:, :5], draws), "68"),
        ((pictures, landmarks, draws, "published"), "intended"),
    ):
        with pytest.raises(ValueError, match=words):
            sbi_torch.blend_batch(*arguments)
