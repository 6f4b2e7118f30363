"""Camera fingerprints: the residual against its definition, the fingerprint against a known sensor, matching against
numbers that follow from the patterns."""

import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.stats import norm

from unmask import prnu

GREY = np.array([0.299, 0.587, 0.114])


def relative_error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


def picture(height, width, seed=0):
    """uint8[H,W,3]: soft shapes, an edge, fine texture and noise of each colour's own."""
    rng = np.random.default_rng(seed)
    shapes = gaussian_filter(rng.normal(0, 1, (height, width, 3)), (6, 6, 0))
    texture = gaussian_filter(rng.normal(0, 1, (height, width)), 1)
    edge = np.where(np.add.outer(np.arange(height), 2 * np.arange(width)) > width, 30, 0)
    image = 120 + 25 * shapes / shapes.std() + (8 * texture / texture.std() + edge)[..., None]
    return np.rint(np.clip(image + rng.normal(0, 3, image.shape), 0, 255)).astype(np.uint8)


# The published definition, in float64 with PyWavelets and SciPy.


def shrink(x, noise, border="constant"):
    """x times noise / (v + noise), v the smallest local variance that the noise leaves."""
    means = [uniform_filter(x**2, w, mode=border, cval=0.0) for w in (3, 5, 7, 9)]
    return noise / (np.min([np.maximum(m - noise, 0) for m in means], axis=0) + noise)


def denoiser_rest(plane, sigma):
    pywt = pytest.importorskip("pywt", reason="PyWavelets, the independent wavelet transform, is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # four levels of a small picture reach beyond its border
        levels = pywt.wavedec2(np.asarray(plane, np.float64), "db4", level=4)
    kept = [tuple(x * shrink(x, sigma**2) for x in details) for details in levels[1:]]
    return pywt.waverec2([np.zeros_like(levels[0]), *kept], "db4")[: plane.shape[0], : plane.shape[1]]


def cleaned(x, border="constant"):
    x = x.copy()
    for grid in (x[i::2, j::2] for i in (0, 1) for j in (0, 1)):
        grid -= grid.mean()
        grid -= grid.mean(1, keepdims=True)
        grid -= grid.mean(0, keepdims=True)
    spectrum = np.fft.fft2(x)
    gain = shrink(np.abs(spectrum) / np.sqrt(x.size), x.std(ddof=1) ** 2, border)
    return np.fft.ifft2(spectrum * gain).real


def defined_residual(image, sigma):
    return cleaned(np.stack([denoiser_rest(image[..., c], sigma) for c in range(3)], -1) @ GREY)


@pytest.mark.parametrize("sigma", [2.0, 5.0])
@pytest.mark.parametrize("size", [(64, 64), (128, 96), (97, 131), (65, 150), (122, 111)])
def test_the_reference_residual_is_the_published_definition(size, sigma):
    image = picture(*size)
    got = prnu.noise_residual(image, sigma=sigma, reference=True)
    assert got.dtype == np.float32 and got.shape == size
    assert relative_error(got, defined_residual(image, sigma)) < 1e-4


@pytest.mark.parametrize("size", [(64, 64), (128, 96), (97, 131), (65, 150), (122, 111)])
def test_the_fast_residual_is_the_definition_on_luma(size):
    image = picture(*size, seed=1)
    got = prnu.noise_residual(image)
    rest = denoiser_rest(image @ GREY, 5.0)
    # Windows of the spectrum that go round instead of ending: the same numbers, and nearly those of the definition.
    assert relative_error(got, cleaned(rest, border="wrap")) < 1e-4
    assert relative_error(got, cleaned(rest)) < 0.15
    assert correlation(got, defined_residual(image, 5.0)) > 0.9


def test_fast_and_published_residual_nearly_agree_on_a_larger_picture():
    image = picture(384, 400, seed=2)
    assert correlation(prnu.noise_residual(image), prnu.noise_residual(image, reference=True)) > 0.9
    assert relative_error(prnu.noise_residual(image), cleaned(denoiser_rest(image @ GREY, 5.0))) < 0.05


@pytest.mark.parametrize("reference", [False, True])
def test_a_batch_equals_its_pictures(reference, monkeypatch):
    monkeypatch.setattr(prnu, "BATCH_PIXELS", 2 * 70 * 81)  # two pictures at a time, the last alone
    images = np.stack([picture(70, 81, seed) for seed in range(5)])
    before = images.copy()
    batch = prnu.noise_residual(images, reference=reference)
    assert batch.shape == (5, 70, 81) and batch.dtype == np.float32
    for image, residual in zip(images, batch, strict=True):
        np.testing.assert_allclose(prnu.noise_residual(image, reference=reference), residual, atol=1e-4)
    np.testing.assert_array_equal(images, before)


def test_pictures_may_be_views_and_read_only():
    image = picture(140, 160)
    turned = image[:, ::-1].transpose(1, 0, 2)
    turned.setflags(write=False)
    np.testing.assert_array_equal(prnu.noise_residual(turned), prnu.noise_residual(turned.copy()))


@pytest.mark.parametrize("reference", [False, True])
def test_a_flat_picture_leaves_nothing(reference):
    flat = np.full((96, 101, 3), 117, np.uint8)
    assert np.abs(prnu.noise_residual(flat, reference=reference)).max() < 1e-3


def test_flat_pictures_do_not_match_by_their_rounding():
    one, other = (np.full((2, 128, 128, 3), grey, np.uint8) for grey in (117, 60))
    assert abs(prnu.ncc(prnu.noise_residual(one[0]), prnu.noise_residual(other[0]))) < 5 / 128
    assert abs(prnu.ncc(prnu.fingerprint(one), prnu.fingerprint(other))) < 5 / 128


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64), np.uint8), np.zeros((64, 64, 1), np.uint8), np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32), np.zeros((1, 1, 64, 64, 3), np.uint8), np.zeros((63, 64, 3), np.uint8),
        np.zeros((2, 64, 63, 3), np.uint8),
    ],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)  # fmt: skip
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError):
        prnu.noise_residual(image)


# Zero mean


def parity_grids(x):
    return [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]


@pytest.mark.parametrize("shape", [(64, 64), (3, 65, 70), (2, 66, 71)])
def test_zero_mean_clears_rows_and_columns_of_every_parity_grid(shape):
    x = torch.from_numpy(np.random.default_rng(0).normal(3, 1, shape) + np.arange(shape[-1]))
    before = x.clone()
    prnu.zero_mean(x)
    for grid, was in zip(parity_grids(x), parity_grids(before), strict=True):
        assert grid.mean(-1).abs().max() < 1e-9 and grid.mean(-2).abs().max() < 1e-9
        # Only a row and a column term went: what is left has the same double differences.
        torch.testing.assert_close(grid.diff(dim=-1).diff(dim=-2), was.diff(dim=-1).diff(dim=-2))


def test_zero_mean_is_idempotent():
    x = prnu.zero_mean(torch.from_numpy(np.random.default_rng(1).normal(3, 1, (67, 80))))
    torch.testing.assert_close(prnu.zero_mean(x.clone()), x)


def test_zero_mean_with_a_mask_of_whole_rows_and_columns():
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(3, 1, (2, 70, 81)) + np.arange(81.0))
    mask = torch.zeros(2, 70, 81, dtype=torch.bool)
    mask[0, 10:53, 7:60] = True  # a window: rows and columns vanish at once, and equal those of the window alone
    mask[1] = True
    inside = prnu.zero_mean(x[0, 10:53, 7:60].clone())
    whole = prnu.zero_mean(x[1].clone())
    prnu.zero_mean(x, mask)
    assert (x[~mask] == 0).all()
    # The window starts at an even row and an odd column: its parity grids are those of the picture, named differently.
    torch.testing.assert_close(x[0, 10:53, 7:60], inside)
    torch.testing.assert_close(x[1], whole)


def holes():
    y, x = np.mgrid[:96, :101]
    return {
        "corner": ((y - 20) / 22) ** 2 + ((x - 70) / 25) ** 2 > 1,
        "disc": ((y - 48) / 40) ** 2 + ((x - 50) / 30) ** 2 <= 1,
        "scattered": np.random.default_rng(3).random((96, 101)) < 0.7,
    }


@pytest.mark.parametrize("hole", ["corner", "disc", "scattered"])
def test_zero_mean_with_a_mask_clears_rows_and_columns(hole):
    rng = np.random.default_rng(4)
    linear = rng.normal(0, 1, (96, 1)) + rng.normal(0, 1, 101) + np.add.outer(np.arange(96), np.arange(101)) / 30
    x, mask = torch.from_numpy(linear), torch.from_numpy(holes()[hole])
    before = float(x[mask].std())
    prnu.zero_mean(x, mask)
    assert (x[~mask] == 0).all()
    for grid, keep in zip(parity_grids(x), parity_grids(mask), strict=True):
        for axis in (-1, -2):
            assert (grid.sum(axis) / keep.sum(axis).clamp(min=1)).abs().max() < 0.01 * before
    assert x[mask].std() < 0.01 * before  # a sum of a row and a column term has nothing else


# Fingerprints

SIDE = 128


def sensor(seed=0, size=(SIDE, SIDE), strength=0.02):
    return np.random.default_rng(seed).normal(0, strength, size)


def exposures(pattern, count, noise, seed=0, low=150, high=190):
    """uint8[N,H,W,3]: smooth light, another slope in every frame, seen through a sensor; the colours are alike."""
    rng = np.random.default_rng(seed)
    height, width = pattern.shape
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)
    frames = []
    for _ in range(count):
        a = rng.random()
        light = low + (high - low) * (a * x + (1 - a) * y)
        seen = light * (1 + pattern) + rng.normal(0, noise, pattern.shape)
        frames.append(np.repeat(np.rint(np.clip(seen, 0, 255)).astype(np.uint8)[..., None], 3, axis=-1))
    return np.stack(frames)


def test_a_fingerprint_approaches_the_sensor_as_frames_are_added():
    pattern, light = sensor(), 170
    frames = exposures(pattern, 32, noise=4)
    found = []
    for count in (1, 4, 32):
        got = prnu.fingerprint(frames[:count], sigma=8)
        assert got.dtype == np.float32 and got.shape == pattern.shape
        found.append(correlation(got, pattern))
        # Averaging N frames divides the noise (and rounding, 1/12 grey level squared), not the pattern.
        expected = 1 / np.sqrt(1 + (16 + 1 / 12) / light**2 / count / pattern.var())
        # Below it, since 4 % of the pattern's energy is its own row and column means and whitening takes some more.
        assert expected - 0.06 < found[-1] < expected + 0.01
    assert found[0] + 0.1 < found[1] < found[2] - 0.02 and found[2] > 0.93


def test_the_amplitude_is_relative_to_the_light():
    pattern = sensor(1)
    for low, high in ((150, 190), (70, 90)):
        total = prnu.Accumulator(SIDE, SIDE)
        total.add(exposures(pattern, 24, noise=2, low=low, high=high))
        raw = (total.evidence / total.weight)[0].numpy()
        # Pattern and noise stay below sigma = 5 in every band, so that the denoiser leaves nearly all of them:
        # 1/256 of the energy lies in the approximation, and chance lifts local variances above sigma^2 here and there.
        assert 0.95 < (raw * pattern).sum() / (pattern**2).sum() < 1.01
        # Zero mean takes 2 * 2 * 128 of 128^2 degrees of freedom, 3 %; the Fourier filter some per cent where chance
        # lifts the least of its windows above the mean.
        slope = (total.fingerprints()[0] * pattern).sum() / (pattern**2).sum()
        assert 0.85 < slope < 0.98


def test_frames_count_by_the_square_of_their_light():
    # K = sum(W I) / sum(I^2): a frame of 160 tells four times as much as one of 80, and ten of each add up.
    one, other = sensor(1), sensor(2)
    frames = np.concatenate([exposures(one, 10, 1, low=160, high=161), exposures(other, 10, 1, low=80, high=81)])
    got = prnu.fingerprint(frames).ravel()
    shares = np.linalg.lstsq(np.stack([one.ravel(), other.ravel()], 1), got, rcond=None)[0]
    assert shares[0] / shares[1] == pytest.approx((160.5 / 80.5) ** 2, rel=0.08)


def test_another_sensor_does_not_match():
    frames = exposures(sensor(1), 16, noise=2)
    got = prnu.fingerprint(frames)
    assert abs(correlation(got, sensor(2))) < 5 / SIDE
    assert prnu.ncc(got, prnu.fingerprint(exposures(sensor(1), 16, noise=2, seed=9))) > 0.8
    assert abs(prnu.ncc(got, prnu.fingerprint(exposures(sensor(2), 16, noise=2, seed=9)))) < 5 / SIDE


def test_saturated_areas_tell_nothing():
    pattern = sensor(3)
    frames = exposures(pattern, 12, noise=3)
    frames[:, 40:80, 30:90] = 255
    total = prnu.Accumulator(SIDE, SIDE)
    total.add(frames)
    # The area's rim may have one neighbour that is not clipped; the interior is flat at 255.
    inside = np.zeros((SIDE, SIDE), bool)
    inside[41:79, 31:89] = True
    assert not total.valid[0][inside].any() and total.valid[0][:39].all() and total.valid[0][81:].all()
    got = total.fingerprints()[0]
    assert (got[inside] == 0).all()
    assert correlation(got[:36], pattern[:36]) > 0.9
    # One clipped colour is enough.
    red = exposures(pattern, 3, noise=3)
    red[:, 40:80, 30:90, 0] = 255
    total = prnu.Accumulator(SIDE, SIDE)
    total.add(red)
    assert not total.valid[0][inside].any() and total.valid[0][:39].all()


def test_bright_pixels_are_damped_but_texture_at_250_is_not_flat():
    frames = np.full((1, 64, 64, 3), 100, np.uint8)
    frames[0, :30:2, :30:2] = 254  # bright, single pixels: not flat
    frames[0, 34, :30], frames[0, :30, 34] = 254, 254  # lines: flat along themselves only
    frames[0, 40:, 40:] = 249  # flat, not clipped
    total = prnu.Accumulator(64, 64)
    total.add(frames)
    weight = total.weight[0].numpy()
    assert weight[50, 50] == pytest.approx(249**2, rel=1e-5) and weight[1, 1] == pytest.approx(1e4, rel=1e-5)
    for bright in (weight[2, 2], weight[34, 10], weight[10, 34]):
        assert 0 < bright < 254**2 * 0.9


def test_masked_areas_tell_nothing():
    wide = (96, 640)
    pattern = sensor(4, wide)
    frames = exposures(pattern, 6, noise=3)
    masks = np.ones((6, *wide), bool)
    masks[:, 20:70, :60] = False
    totals = []
    for fill in (None, "other"):
        seen = frames.copy()
        if fill:
            seen[:, 20:70, :60] = np.random.default_rng(5).integers(0, 256, seen[:, 20:70, :60].shape)
        totals.append(prnu.Accumulator(*wide))
        totals[-1].add(seen, masks)
    one, other = totals
    for total in totals:
        assert (total.evidence[0].numpy()[~masks[0]] == 0).all() and (total.fingerprints()[0][~masks[0]] == 0).all()
        np.testing.assert_array_equal(total.valid[0], masks[0])
    torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=0)
    # The coarsest wavelets reach 2 (8 - 1) (2^4 - 1) = 210 pixels, their windows 4 * 2^4 = 64 more; beyond, no change.
    np.testing.assert_allclose(one.evidence[0, :, 340:], other.evidence[0, :, 340:], atol=0.5)  # of about 170 * 4 * 6
    a, b = (total.fingerprints()[0] for total in totals)
    assert relative_error(b[:, 340:], a[:, 340:]) < 0.02
    # Near by, the denoiser sees the area, and only the part of it that the weights let through.
    assert correlation(a[:, 70:], b[:, 70:]) > 0.98


def test_a_stream_equals_one_batch(monkeypatch):
    frames = exposures(sensor(6), 7, noise=3)
    masks = np.random.default_rng(7).random((7, SIDE, SIDE)) < 0.8
    batch = prnu.Accumulator(SIDE, SIDE)
    batch.add(frames, masks)
    assert relative_error(prnu.fingerprint(iter(frames), iter(masks)), batch.fingerprints()[0]) < 1e-5
    monkeypatch.setattr(prnu, "BATCH_PIXELS", 3 * SIDE**2)
    parts = prnu.Accumulator(SIDE, SIDE)
    parts.add(frames, masks)
    assert relative_error(parts.fingerprints(), batch.fingerprints()) < 1e-5
    assert relative_error(parts.weight.numpy(), batch.weight.numpy()) < 1e-6


def test_a_weight_of_two_is_the_frame_twice():
    frames = exposures(sensor(8), 4, noise=3)
    weighted, repeated = prnu.Accumulator(SIDE, SIDE), prnu.Accumulator(SIDE, SIDE)
    weighted.add(frames, weights=np.array([2.0, 1.0, 0.0, 3.0]))
    repeated.add(frames[[0, 0, 1, 3, 3, 3]])
    assert relative_error(weighted.evidence.numpy(), repeated.evidence.numpy()) < 1e-5
    assert relative_error(weighted.fingerprints(), repeated.fingerprints()) < 1e-5


def test_weights_belong_to_their_frames_across_batches(monkeypatch):
    monkeypatch.setattr(prnu, "BATCH_PIXELS", 2 * SIDE**2)
    frames = exposures(sensor(8), 5, noise=3)
    masks = np.random.default_rng(1).random(frames.shape[:3]) < 0.5
    weighted, chosen = prnu.Accumulator(SIDE, SIDE), prnu.Accumulator(SIDE, SIDE)
    weighted.add(frames, masks, weights=np.array([0, 1, 0, 0, 1]))
    chosen.add(frames[[1, 4]], masks[[1, 4]])
    assert relative_error(weighted.evidence.numpy(), chosen.evidence.numpy()) < 1e-5


def test_regions_equal_accumulators_of_their_own():
    frames = exposures(sensor(9), 5, noise=3)
    masks = np.zeros((5, 2, SIDE, SIDE), bool)
    for i in range(5):
        masks[i, 1, 30 + i : 90 + i, 40:100] = True
    masks[:, 0] = ~masks[:, 1]
    masks[:, 0, 60:64] = False  # neither
    both = prnu.Accumulator(SIDE, SIDE, regions=2)
    both.add(frames, masks)
    assert both.fingerprints().shape == both.valid.shape == (2, SIDE, SIDE)
    for region in range(2):
        alone = prnu.Accumulator(SIDE, SIDE)
        alone.add(frames, masks[:, region])
        assert relative_error(both.fingerprints()[region], alone.fingerprints()[0]) < 1e-4
        np.testing.assert_array_equal(both.valid[region], alone.valid[0])
        np.testing.assert_array_equal(both.valid[region], masks[:, region].any(0))


def test_regions_without_masks_or_with_one_mask_all_get_it():
    frames = exposures(sensor(9), 2, noise=3)
    mask = np.random.default_rng(0).random((2, SIDE, SIDE)) < 0.5
    for masks in (None, mask):
        both, alone = prnu.Accumulator(SIDE, SIDE, regions=2), prnu.Accumulator(SIDE, SIDE)
        both.add(frames, masks)
        alone.add(frames, masks)
        for region in range(2):
            assert relative_error(both.evidence[region].numpy(), alone.evidence[0].numpy()) < 1e-5


def test_an_empty_region_is_zero():
    frames = exposures(sensor(9), 2, noise=3)
    masks = np.zeros((2, 2, SIDE, SIDE), bool)
    masks[:, 0] = True
    total = prnu.Accumulator(SIDE, SIDE, regions=2)
    total.add(frames, masks)
    got = total.fingerprints()
    assert np.isfinite(got).all() and (got[1] == 0).all() and not total.valid[1].any()
    alone = prnu.fingerprint(frames)
    assert relative_error(got[0], alone) < 0.05
    assert (prnu.Accumulator(SIDE, SIDE).fingerprints() == 0).all()


def test_adding_and_asking_leaves_inputs_and_state_alone():
    frames, masks = exposures(sensor(1), 3, noise=3), np.ones((3, SIDE, SIDE), bool)
    masks[:, :20] = False
    weights = np.array([1.0, 0.5, 2.0])
    before = frames.copy(), masks.copy(), weights.copy()
    total = prnu.Accumulator(SIDE, SIDE)
    total.add(frames, masks, weights)
    first = total.fingerprints().copy()
    np.testing.assert_array_equal(total.fingerprints(), first)
    for was, now in zip(before, (frames, masks, weights), strict=True):
        np.testing.assert_array_equal(now, was)


def test_fingerprints_refuse_what_does_not_fit():
    frames = exposures(sensor(1), 2, noise=3)
    with pytest.raises(ValueError, match="no frame"):
        prnu.fingerprint([])
    with pytest.raises(ValueError):
        prnu.fingerprint([frames[0], frames[1][:-2]])
    with pytest.raises(ValueError):
        prnu.fingerprint(frames, [np.ones((SIDE, SIDE), bool)])
    with pytest.raises(ValueError):
        prnu.Accumulator(SIDE, SIDE + 1).add(frames)


@pytest.mark.parametrize(
    "wrong",
    [
        {"masks": np.ones((2, SIDE, SIDE - 1), bool)}, {"masks": np.ones((1, SIDE, SIDE), bool)},
        {"masks": np.ones((3, SIDE, SIDE), bool)}, {"masks": np.ones((2, 3, SIDE, SIDE), bool)},
        {"masks": np.ones((SIDE, SIDE), bool)}, {"weights": np.ones(1)}, {"weights": np.ones(3)},
        {"weights": np.ones((2, 2))},
    ],
    ids=lambda wrong: " ".join(f"{key}{list(value.shape)}" for key, value in wrong.items()),
)  # fmt: skip
def test_masks_and_weights_of_other_shapes_are_refused(wrong):
    with pytest.raises(ValueError):
        prnu.Accumulator(SIDE, SIDE, regions=2).add(exposures(sensor(1), 2, noise=3), **wrong)


# Matching


def white(seed, shape=(80, 90)):
    return np.random.default_rng(seed).normal(0, 1, shape)


def test_ncc_of_a_pattern_with_itself_scaled_and_shifted_in_value():
    a, b = white(0), white(1)
    assert prnu.ncc(a, a) == pytest.approx(1) and prnu.ncc(a, -a) == pytest.approx(-1)
    assert prnu.ncc(3 * a - 7, -0.01 * b + 100) == pytest.approx(-prnu.ncc(a, b), abs=1e-9)
    assert prnu.ncc(a, b) == pytest.approx(correlation(a, b), abs=1e-12)
    assert prnu.ncc(a, np.full_like(a, 2.0)) == 0


def test_ncc_of_a_known_mixture():
    a, n = white(2, (200, 200)), white(3, (200, 200))
    for ratio in (0.5, 2, 5):
        assert prnu.ncc(a, a + ratio * n) == pytest.approx(1 / np.sqrt(1 + ratio**2), abs=4 / 200)


def test_ncc_by_chance_has_standard_deviation_one_by_root_of_pixels():
    values = np.array([prnu.ncc(white(i, (40, 50)), white(10_000 + i, (40, 50))) for i in range(500)])
    # The standard error of a standard deviation of 500 values is 3 %.
    assert values.std() * np.sqrt(2000) == pytest.approx(1, abs=0.13)
    assert abs(values.mean()) < 4 / np.sqrt(2000 * 500)


def test_ncc_looks_at_the_mask_only():
    a, b = white(4), white(5)
    mask = white(6) > 0.3
    b[mask] += 0.5 * a[mask]
    wild = np.where(mask, b, 1e6 * white(7))
    assert prnu.ncc(a, wild, mask) == pytest.approx(correlation(a[mask], b[mask]), abs=1e-12)
    assert prnu.ncc(a, b, mask.astype(np.uint8)) == pytest.approx(correlation(a[mask], b[mask]), abs=1e-12)
    assert prnu.ncc(a, b, np.zeros_like(mask)) == 0


def surface_pair(surface):
    """Two patterns whose circular correlation, by shift of the second against the first, is `surface` less its mean."""
    impulse = np.zeros_like(surface)
    impulse[0, 0] = 1
    return impulse, surface


def test_the_peak_is_found_at_its_shift():
    a = white(8)
    for shift in ((3, -4), (0, 6), (-6, -6), (6, 0), (0, 0)):
        b = np.roll(a, shift, (0, 1)) + white(9)
        found = prnu.correlation_peak(a, b, search=6)
        assert found.shift == shift and found.pce > 1000 and found.false_alarm < 1e-12
        assert prnu.correlation_peak(a, b).shift == (0, 0)
        assert (abs(prnu.pce(a, b)) < 20) is (shift != (0, 0))
    # Out of reach
    assert prnu.pce(a, np.roll(a, 8, 0), search=6) < 30


def test_a_search_beyond_half_the_picture_tries_every_shift_once():
    a = white(8, (13, 16))
    found = prnu.correlation_peak(a, np.roll(a, (-6, 7), (0, 1)), search=100)
    assert found.shift == (-6, 7)


def test_pce_equals_its_definition_by_brute_force():
    a, b = white(10, (14, 17)), white(11, (14, 17))
    b += 0.3 * np.roll(a, (2, -1), (0, 1))
    x, y = a - a.mean(), b - b.mean()
    surface = np.array([[(np.roll(x, (i, j), (0, 1)) * y).sum() for j in range(17)] for i in range(14)])
    inside = {(i, j): surface[i, j] for i in range(-3, 4) for j in range(-3, 4)}
    i, j = max(inside, key=inside.get)
    outside = np.ones((14, 17), bool)
    for di in range(-5, 6):
        for dj in range(-5, 6):
            outside[(i + di) % 14, (j + dj) % 17] = False
    found = prnu.correlation_peak(a, b, search=3)
    assert found.shift == (i, j)
    want = inside[i, j] ** 2 / np.mean(surface[outside] ** 2)
    assert found.pce == pytest.approx(want)
    assert found.false_alarm == pytest.approx(1 - (1 - norm.sf(np.sqrt(want))) ** 49)


def test_pce_of_a_known_amplitude():
    """Unit white patterns of d pixels and correlation r: the peak is r d, each other shift r times a value of the
    autocorrelation plus an independent part, of variance r^2 d + (1 - r^2) d = d in all. So PCE = r^2 d, and chance
    moves the peak by sqrt(d) about r d at most twice."""
    d, r = 256 * 250, 0.1
    found = []
    for seed in range(8):
        a, n = white(20 + seed, (256, 250)), white(40 + seed, (256, 250))
        found.append(prnu.pce(a, r * a + np.sqrt(1 - r**2) * n))
    assert np.mean(np.sqrt(found)) == pytest.approx(r * np.sqrt(d), abs=4 / np.sqrt(8))
    assert np.std(np.sqrt(found)) < 2.5


def test_the_excluded_zone_is_eleven_by_eleven():
    base = np.zeros((40, 50))
    base[20, 25], base[5, 5], base[5, 6] = 100, 10, -110  # mean zero
    outside = 40 * 50 - 121

    def at(*more):
        surface = base.copy()
        for (y, x), sign in more:
            surface[y, x] += 30 * sign
        a, b = surface_pair(np.roll(surface, (-20, -25), (0, 1)))
        return prnu.pce(a, b)

    assert at() == pytest.approx(100**2 * outside / (10**2 + 110**2))
    for dy, dx in ((5, 5), (-5, 5), (5, -5), (-5, -5), (0, 5), (-5, 0)):  # energy at five pixels is the peak's own
        assert at(((20 + dy, 25 + dx), 1), ((21, 25), -1)) == pytest.approx(at())
    for dy, dx in ((6, 0), (-6, 0), (0, 6), (0, -6), (6, 6), (-6, -6), (6, 5), (5, -6)):  # at six it counts
        want = 100**2 * outside / (10**2 + 110**2 + 30**2)
        assert at(((20 + dy, 25 + dx), 1), ((21, 25), -1)) == pytest.approx(want)


def test_a_peak_near_the_border_counts_as_one_in_the_middle():
    rng = np.random.default_rng(12)
    surface = rng.normal(0, 1, (40, 41))
    surface[20, 20] = 30
    values = []
    for shift in ((0, 0), (1, 0), (0, -1), (-2, 2), (5, -5), (-9, 9), (18, 18)):
        a, b = surface_pair(np.roll(surface, np.subtract(shift, 20), (0, 1)))
        found = prnu.correlation_peak(a, b, search=18)
        assert found.shift == shift
        values.append(found.pce)
    np.testing.assert_allclose(values, values[0], rtol=1e-9)


def test_opposite_patterns_have_a_negative_pce():
    a = white(13)
    assert prnu.pce(a, -a) == pytest.approx(-prnu.pce(a, a)) and prnu.pce(a, a) > 1000
    assert prnu.correlation_peak(a, -a).false_alarm >= 0.5
    # Neither scale nor offset matters; nothing correlates with a constant.
    assert prnu.pce(5 * a + 3, -2 * a - 9) == pytest.approx(prnu.pce(a, -a))
    assert prnu.pce(a, np.ones_like(a)) == 0


def test_every_shift_tried_adds_to_the_false_alarm():
    a, b = white(14), white(15)
    b += 0.06 * a
    aligned = prnu.correlation_peak(a, b)
    assert aligned.false_alarm == pytest.approx(norm.sf(np.sqrt(aligned.pce))) and aligned.pce > 4
    a, b = surface_pair(np.pad([[25.0]], ((0, 79), (0, 89))) + white(16))
    found = [prnu.correlation_peak(a, b, search=s) for s in (0, 1, 5, 20)]
    assert len({peak.shift for peak in found}) == 1 and len({round(peak.pce, 6) for peak in found}) == 1
    probability = norm.sf(np.sqrt(found[0].pce))
    for peak, tries in zip(found, (1, 9, 121, 1681), strict=True):
        # So small that a product would round to one.
        assert peak.false_alarm == pytest.approx(tries * probability, rel=1e-6) and probability < 1e-100


def test_false_alarms_happen_as_often_as_said():
    told = [prnu.correlation_peak(white(i, (32, 32)), white(9000 + i, (32, 32)), search=3).false_alarm
            for i in range(400)]  # fmt: skip
    # By chance the probability is even between 0 and 1: shares below 0.1 and 0.5, three standard errors.
    assert np.mean(np.array(told) < 0.1) == pytest.approx(0.1, abs=0.05)
    assert np.mean(np.array(told) < 0.5) == pytest.approx(0.5, abs=0.08)


def test_patterns_of_other_shapes_cannot_be_compared():
    a = white(17)
    for other in (a[:-1], a[:, :-2], a.T, a.ravel()):
        with pytest.raises(ValueError):
            prnu.ncc(a, other)
        with pytest.raises(ValueError):
            prnu.correlation_peak(a, other)
        with pytest.raises(ValueError):
            prnu.ncc(a, a, np.ones_like(other, bool))
    with pytest.raises(ValueError):
        prnu.pce(a[:11], a[:11])


def test_matching_leaves_its_inputs_alone():
    a, b, mask = white(18), white(19), white(20) > 0
    before = a.copy(), b.copy(), mask.copy()
    for x in (a, b, mask):
        x.setflags(write=False)
    prnu.ncc(a, b, mask), prnu.pce(a, b, search=4), prnu.ncc(a.astype(np.float32), b.astype(np.float32))
    for was, now in zip(before, (a, b, mask), strict=True):
        np.testing.assert_array_equal(now, was)
