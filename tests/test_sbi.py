"""Self-blending: every step re-derived by other means, ranges counted over many draws, edge cases."""

import colorsys
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from matplotlib.path import Path as Polygon
from scipy import ndimage, stats

from unmask import hulls, sbi

NO_COLOUR = sbi.ColourDraw(rgb=None, hsv=None, contrast=None)


def face(centre=(64.0, 68.0), side=64.0, points=81):
    """Canonical upright landmarks, jaw `side` px wide; symmetric about the centre column."""
    angle = np.linspace(0, np.pi, 17)
    jaw = np.c_[-0.5 * np.cos(angle), 0.75 * np.sin(angle) - 0.2]
    brow = np.c_[np.linspace(-0.42, -0.1, 5), [-0.28, -0.34, -0.36, -0.34, -0.30]]
    ridge = np.c_[np.zeros(4), np.linspace(-0.18, 0.08, 4)]
    base = np.c_[np.linspace(-0.1, 0.1, 5), [0.13, 0.15, 0.16, 0.15, 0.13]]
    eye = np.c_[[-0.34, -0.27, -0.2, -0.13, -0.2, -0.27], [-0.16, -0.2, -0.2, -0.15, -0.13, -0.13]]
    outer = np.c_[
        [-0.2, -0.12, -0.05, 0, 0.05, 0.12, 0.2, 0.12, 0.05, 0, -0.05, -0.12],
        [0.3, 0.26, 0.245, 0.255, 0.245, 0.26, 0.3, 0.35, 0.375, 0.38, 0.375, 0.35],
    ]
    inner = np.c_[[-0.16, -0.06, 0, 0.06, 0.16, 0.06, 0, -0.06], [0.3, 0.285, 0.29, 0.285, 0.3, 0.325, 0.33, 0.325]]
    other_eye = eye[[3, 2, 1, 0, 5, 4]] * [-1, 1]
    arc = np.linspace(np.pi, 2 * np.pi, 15)[1:-1]
    forehead = np.c_[0.5 * np.cos(arc), 0.45 * np.sin(arc) - 0.25]
    shape = np.vstack([jaw, brow, brow[::-1] * [-1, 1], ridge, base, eye, other_eye, outer, inner, forehead])
    return (shape[:points] * side + centre).astype(np.float32)


def cartoon(height=128, width=128, landmarks=None, seed=0):
    """Skin oval, eyes, mouth on a smooth random background, slightly blurred: uint8[H,W,3]."""
    landmarks = face((width / 2, height * 0.53), min(height, width) / 2) if landmarks is None else landmarks
    coarse = np.random.default_rng(seed).uniform(40, 210, (6, 6, 3)).astype(np.float32)
    image = np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255)
    parts = ((range(0, 81), (205, 160, 130)), (range(36, 42), (250, 250, 250)), (range(42, 48), (250, 250, 250)))
    for part, colour in (*parts, (range(48, 60), (180, 60, 70)), (range(27, 36), (190, 140, 115))):
        points = landmarks[[i for i in part if i < len(landmarks)]]
        cv2.fillConvexPoly(image, cv2.convexHull(np.rint(points).astype(np.int32)), colour)
    return np.rint(cv2.GaussianBlur(image, (0, 0), 1.5)).astype(np.uint8)


def fixed_draw(**changes):
    """A draw with every change switched off, apart from those given."""
    still = {"colour": NO_COLOUR, "down_factor": 1, "sharpen": (0.0, 1.0), "translate": (0, 0), "scale": (1, 1)}
    soft = {"soft_shape": (224, 200), "erode_kernel": 7, "blur_kernel": 9, "blur_sigma": 9, "ratio": 1.0}
    kind = {"first_68": False, "hull": "convex", "transform_source": True}
    return replace(sbi.draw_blend(np.random.default_rng(3)), **{**still, **soft, **kind, **changes})


# --- geometry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", hulls.HULLS)
@pytest.mark.parametrize("centre", [(64.3, 70.8), (8.0, 30.5)])
def test_hull_mask_is_the_union_of_its_polygons(kind, centre):
    mask = hulls.hull_mask(face(centre), (128, 120), kind)
    grid = np.stack(np.meshgrid(np.arange(120), np.arange(128)), -1).reshape(-1, 2)
    inside, near_edge = np.zeros(len(grid), bool), np.zeros(len(grid), bool)
    for polygon in hulls.hull_polygons(face(centre), kind):
        inside |= Polygon(polygon).contains_points(grid)
        distance = [cv2.pointPolygonTest(polygon, (float(x), float(y)), True) for x, y in grid]
        near_edge |= np.abs(distance) <= 1
    assert set(np.unique(mask)) == {0.0, 1.0}
    assert np.array_equal(mask.ravel()[~near_edge] > 0, inside[~near_edge])


def outlines(points, kind):
    """Groups of landmarks whose convex hulls make up each published mask, by the parts of the face they hold."""
    p = points.astype(np.float64)
    if kind == "convex":
        return [p]
    jaw, brows, bridge, nose, mouth, chin = p[:17], p[17:27], p[27:31], p[31:36], p[48:68], p[8:9]
    if kind == "dfl_full":
        return [np.vstack([jaw, mouth]), np.vstack([bridge, p[33:34]]),
                np.vstack([brows, p[[0, 16, 27, 33]]])]  # fmt: skip
    if kind == "extended":
        temples = [p[36] + (p[0] - p[36]) / 4, p[45] + (p[16] - p[45]) / 4]
        eyes = np.vstack([temples[0], p[36:40], p[42:46], temples[1]])
        brows = brows + (brows - eyes) / 2
    right, left = brows[:5], brows[5:]
    return [np.vstack(group) for group in (
        [jaw[:9], right[:1]], [jaw[8:], left[-1:]], [right[:3], chin], [left[2:], chin], [right[2:], left[:3], chin],
        [right, bridge[:1], nose, chin], [left, bridge[:1], nose, chin], [bridge, nose],
    )]  # fmt: skip


def plain_hull(points, shape, kind):
    """Union of filled convex hulls, corners to 1/16 px."""
    mask = np.zeros(shape, np.uint8)
    for group in outlines(points, kind):
        corners = cv2.convexHull(group.astype(np.float32))
        cv2.fillConvexPoly(mask, np.rint(corners * 16).astype(np.int32), 1, shift=4)
    return mask.astype(np.float32)


@pytest.mark.parametrize("kind", hulls.HULLS)
@pytest.mark.parametrize("points", [68, 81])
def test_hull_masks_are_the_published_ones(kind, points):
    for seed in range(20):
        marks = face((70, 66), 72, points) + np.random.default_rng(seed).normal(0, 1.5, (points, 2)).astype(np.float32)
        expected = plain_hull(marks, (140, 150), kind)
        assert np.abs(hulls.hull_mask(marks, (140, 150), kind) - expected).sum() <= 0.001 * expected.sum()


def test_hull_kinds_cover_what_their_names_say():
    points, shape = face((64, 70), 80), (160, 128)
    mask = {kind: hulls.hull_mask(points, shape, kind) > 0 for kind in hulls.HULLS}
    convex_68 = hulls.hull_mask(points[:68], shape, "convex") > 0
    assert (convex_68 <= mask["convex"]).all() and mask["convex"].sum() > 1.1 * convex_68.sum()
    assert (mask["components"] <= mask["extended"]).all() and mask["components"].sum() < mask["extended"].sum()
    assert mask["components"][int(points[57, 1]), int(points[57, 0])]
    inside_68 = cv2.dilate(convex_68.astype(np.uint8), np.ones((3, 3))) > 0
    assert (mask["components"] <= inside_68).all() and (mask["dfl_full"] <= inside_68).all()
    # Brows rise by half of their distance to the eye (middle brow point 19 stands over eye point 37).
    top = {kind: np.flatnonzero(mask[kind][:, int(points[19, 0])])[0] for kind in ("components", "extended")}
    assert top["components"] - top["extended"] == pytest.approx((points[37, 1] - points[19, 1]) / 2, abs=1.5)
    with pytest.raises(ValueError, match="dfl_full"):
        hulls.hull_mask(points, shape, "oval")


@pytest.mark.parametrize("points", [68, 81])
def test_flip_mirrors_and_renames(points):
    landmarks = np.rint(face((60, 68), points=points) * 4) / 4
    image = cartoon(128, 128, face((60, 68)))
    flipped, mirrored = sbi.flip(image, landmarks)
    assert np.array_equal(flipped, image[:, ::-1])
    again, back = sbi.flip(flipped, mirrored)
    assert np.array_equal(again, image) and np.array_equal(back, landmarks)
    # The canonical face is symmetric: mirrored landmarks are the same face about the mirrored centre.
    expected = face((127 - 60, 68), points=points)
    np.testing.assert_allclose(mirrored, expected, atol=0.3)
    assert mirrored[36, 0] < mirrored[45, 0] and mirrored[0, 0] < mirrored[16, 0]
    if points == 81:
        assert (np.diff(mirrored[68:, 0]) > 0).all()


def test_crop_box_expands_each_side_on_its_own():
    points = face((80, 90), 60)
    x0, y0, x1, y1 = hulls.face_box(points)
    width, height = x1 - x0, y1 - y0
    still = sbi.crop_box(points)
    np.testing.assert_allclose(still, [x0 - width / 8, y0 - height / 8, x1 + width / 8, y1 + height / 8], rtol=1e-5)
    rng = np.random.default_rng(0)
    shares = np.array([(sbi.crop_box(points, rng) - [x0, y0, x1, y1]) / [-width, -height, width, height]
                       for _ in range(1000)])  # fmt: skip
    assert shares.min() >= 0.0499 and shares.max() <= 0.2001
    assert (shares.min(axis=0) < 0.06).all() and (shares.max(axis=0) > 0.19).all()
    assert np.abs(np.corrcoef(shares.T) - np.eye(4)).max() < 0.12


def test_crop_averages_when_shrinking_repeats_edges_and_keeps_pixels():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    assert np.array_equal(sbi.crop(image, [10, 5, 30, 25], 20), image[5:25, 10:30])
    blocks = image[4:36, 8:40].reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    assert np.abs(sbi.crop(image, [8, 4, 40, 36], 8) - blocks).max() <= 0.51
    padded = np.pad(image, ((6, 0), (4, 0), (0, 0)), mode="edge")
    assert np.array_equal(sbi.crop(image, np.array([-4, -6, 16, 14.0]), 20), padded[:20, :20])
    for box in ([100, 5, 120, 25], [-1e6, -1e6, 1e6, 1e6]):
        with pytest.raises(ValueError, match="pixels"):
            sbi.crop(image, box, 20)


def test_loose_box_is_the_published_margin_clipped():
    points = face((300, 300), 100)
    x0, y0, x1, y1 = hulls.face_box(points[:68])
    box = sbi.loose_box(points, (600, 600))
    width, height = x1 - x0, y1 - y0
    expected = [x0 - width / 2, y0 - height, x1 + width / 2, y1 + 0.4 * height]
    np.testing.assert_allclose(box, expected, atol=2)
    assert sbi.loose_box(points, (310, 320))[2:] == (320, 310)


# --- mask and blend, re-derived ------------------------------------------------------------------------------------


def test_affine_of_source_matches_scipy():
    image = cartoon(120, 150)
    draw = fixed_draw(translate=(0.03, -0.015), scale=(0.95, 1 / 0.95))
    result = sbi.blend(image, face((75, 64), 60), draw)
    y, x = np.mgrid[:120, :150].astype(float)
    back_x = (x - 74.5 - 0.03 * 150) / 0.95 + 74.5
    back_y = (y - 59.5 + 0.015 * 120) * 0.95 + 59.5
    source = np.stack([ndimage.map_coordinates(image[..., c].astype(float), [back_y, back_x], order=1, mode="nearest")
                       for c in range(3)], -1)  # fmt: skip
    weight = result.mask[..., None].astype(float)
    assert (result.mask > 0.99).sum() > 500
    assert np.abs(result.fake - (weight * source + (1 - weight) * image)).max() <= 1.0
    assert np.abs(result.fake.astype(int) - image)[result.mask > 0.99].mean() > 1


def test_mask_follows_the_affine():
    points, shape = face((64, 64), 60), (128, 128)
    image = np.zeros((*shape, 3), np.uint8)
    rest = sbi.blend(image, points, fixed_draw()).mask
    moved = sbi.blend(image, points, fixed_draw(translate=(0.03, 0.015))).mask
    shift = np.subtract(ndimage.center_of_mass(moved), ndimage.center_of_mass(rest))
    np.testing.assert_allclose(shift, [0.015 * 128, 0.03 * 128], atol=0.3)


def test_forehead_is_left_out_on_demand_and_a_face_moved_outside_keeps_its_hull():
    image = cartoon()
    whole, part = (sbi.blend(image, face(), fixed_draw(first_68=flag)).mask.sum() for flag in (False, True))
    assert part < 0.9 * whole
    assert sbi.blend(image, face(points=68), fixed_draw()).mask.sum() == part
    sliver = sbi.blend(image, face((-29.5, 64), 62), fixed_draw(translate=(-0.03, 0))).mask
    assert sliver.any() and sliver[:, 60:].max() == 0


def test_soften_erodes_by_half_the_kernel_then_blurs():
    mask = hulls.hull_mask(face((100, 100), 110), (224, 200), "components")
    soft = hulls.soften(mask, (224, 200), erode_kernel=11, blur_kernel=15, blur_sigma=6)
    expected = ndimage.minimum_filter(mask, size=11, mode="mirror").astype(float)
    taps = np.exp(-(np.arange(-7, 8) ** 2) / (2 * 6.0**2))
    for axis in (0, 1):
        expected = ndimage.correlate1d(expected, taps / taps.sum(), axis=axis, mode="mirror")
    assert np.abs(soft - expected / expected.max()).max() < 1e-4


def test_soften_guards_empty_and_thin_masks():
    empty = hulls.soften(np.zeros((50, 60), np.float32), (200, 210), 25, 5, 5)
    assert not empty.any() and np.isfinite(empty).all()
    thin = np.zeros((50, 60), np.float32)
    thin[25, 20:40] = 1
    soft = hulls.soften(thin, (200, 210), 25, 5, 5)
    expected = cv2.GaussianBlur(cv2.resize(thin, (210, 200)), (25, 25), 0)
    np.testing.assert_allclose(soft, cv2.resize(expected / expected.max(), (60, 50)), atol=1e-5)
    dot = np.zeros((2000, 2000), np.float32)
    dot[1000, 1000] = 1
    assert hulls.soften(dot, (192, 192), 5, 5, 5).max() > 0


def measured_displacement(noise, side, std, sigma):
    """dx seen by a horizontal ramp, away from the picture's edge, where pixels from outside come in."""
    ramp = np.tile(np.arange(1, side + 1, dtype=np.float32), (side, 1))
    bent = hulls.elastic(ramp, noise, ((side - 1) / 2, (side - 1) / 2), std, sigma)
    return (bent - ramp)[12:-12, 12:-12]


def test_elastic_has_the_statistics_of_full_resolution_blurred_noise():
    rng = np.random.default_rng(0)
    recipe = sbi.RECIPES["faithful"]
    ours, plain = [], []
    for _ in range(6):
        noise = rng.standard_normal((hulls.KNOTS, hulls.KNOTS, 2), dtype=np.float32)
        ours.append(measured_displacement(noise, 380, recipe.elastic_std, recipe.elastic_sigma))
        plain.append((ndimage.gaussian_filter(rng.uniform(-1, 1, (380, 380)), 7) * 50)[12:-12, 12:-12])
    assert np.std(ours) == pytest.approx(np.std(plain), rel=0.08)
    assert np.std(ours) == pytest.approx(1.2, abs=0.12)
    assert np.mean(np.abs(ours).max(axis=(1, 2))) == pytest.approx(4.5, abs=0.6)
    for lag in (7, 14):
        together = [np.mean(np.array(f)[..., lag:] * np.array(f)[..., :-lag]) / np.var(f) for f in (ours, plain)]
        assert together[0] == pytest.approx(together[1], abs=0.06)
        assert together[0] == pytest.approx(np.exp(-(lag**2) / (4 * 7**2)), abs=0.06)


def cubic(positions, count):
    """Matrix [len(positions), count]: cubic convolution (Keys, 1981, a = -0.75) of knots repeated like a mirror."""
    nearest = np.floor(positions).astype(int)[:, None] + np.arange(-1, 3)
    far = np.abs(positions[:, None] - nearest)
    inner = (1.25 * far - 2.25) * far**2 + 1
    outer = -0.75 * (far**3 - 5 * far**2 + 8 * far - 4)
    folded = nearest % (2 * count)
    folded = np.minimum(folded, 2 * count - 1 - folded)
    matrix = np.zeros((len(positions), count))
    np.add.at(matrix, (np.arange(len(positions))[:, None], folded), np.where(far <= 1, inner, outer))
    return matrix


def plain_elastic(mask, noise, centre, std, sigma):
    """The displacement float64[2,H,W] (y, x) and the bent mask, by SciPy over the whole picture.

    The coarse field is white noise blurred by 1.75 knots, scaled to `std`, laid out with sigma / 1.75 px a knot.
    """
    rows, columns = ((np.arange(side) - middle) * 1.75 / sigma + 47.5
                     for side, middle in zip(mask.shape, centre[::-1], strict=True))  # fmt: skip
    field = [ndimage.gaussian_filter(noise[..., c].astype(float), 1.75) * std * 2 * np.sqrt(np.pi) * 1.75
             for c in (1, 0)]  # fmt: skip
    shift = np.array([cubic(rows, 96) @ part @ cubic(columns, 96).T for part in field])
    positions = np.indices(mask.shape) + shift
    return shift, ndimage.map_coordinates(mask.astype(float), positions, order=1)


@pytest.mark.parametrize(("std", "sigma"), [(1.164, 7.0), (0.6, 3.6), (2.3, 14.0)])
def test_elastic_field_and_bent_mask_match_scipy(std, sigma):
    """OpenCV rounds positions to 1/32 of a knot, then of a pixel: hundredths of a pixel at the mask's edge."""
    for seed in range(4):
        noise = np.random.default_rng(seed).standard_normal((96, 96, 2)).astype(np.float32)
        side, centre = int(24 * sigma), (11.5 * sigma, 12.3 * sigma)
        ramp = np.tile(np.arange(1, side + 1, dtype=np.float32), (side, 1))
        inner = np.index_exp[12:-12, 12:-12]
        for picture, axis in ((ramp, 1), (ramp.T.copy(), 0)):
            shift, _ = plain_elastic(picture, noise, centre, std, sigma)
            measured = (hulls.elastic(picture, noise, centre, std, sigma) - picture)[inner]
            assert np.abs(measured - shift[axis][inner]).max() < 0.03 * std + 1 / 32
            assert np.abs(measured - shift[axis][inner]).mean() < 0.01 * std + 1 / 128
        mask = plain_hull(face((side / 2, side / 2), side / 2), (side, side), "components")
        _, expected = plain_elastic(mask, noise, centre, std, sigma)
        bent = hulls.elastic(mask, noise, centre, std, sigma)
        assert np.abs(bent - expected).max() < 0.03 * std + 1 / 16 and np.abs(bent - expected).mean() < 0.001
        assert np.abs(mask - expected).mean() > 0.004


def test_elastic_grows_with_the_face_in_all_recipes_but_the_faithful(monkeypatch):
    used = []
    monkeypatch.setattr(sbi, "elastic", lambda mask, noise, centre, std, sigma: used.append((std, sigma)) or mask)
    for name in sbi.RECIPES:
        for side in (95, 190):  # widest extent of the canonical 68 points
            sbi.blend(np.zeros((400, 400, 3), np.uint8), face((200, 220), side), fixed_draw(), name)
    np.testing.assert_allclose(used, [(0.58, 3.5), (1.16, 7), *[(1.16, 7)] * 2, (0.58, 3.5), (1.16, 7)], rtol=0.01)


@pytest.mark.parametrize("recipe", sbi.RECIPES)
def test_blend_arithmetic_on_constant_colour(recipe):
    image = np.full((96, 96, 3), (120, 90, 60), np.uint8)
    colour = sbi.ColourDraw(rgb=np.array([10.0, -5.0, 2.0]), hsv=None, contrast=np.array([0.05, -0.1]))
    altered = ((np.array([120, 90, 60]) + [10, -5, 2]) * 0.9 + 0.05 * 255) * (1 - 0.3 + 0.3 * 0.8)
    for from_source in (True, False):
        draw = fixed_draw(colour=colour, sharpen=(0.3, 0.8), transform_source=from_source, ratio=0.5)
        result = sbi.blend(image, face((48, 52), 50), draw, recipe)
        source, target = (altered, image[0, 0]) if from_source else (image[0, 0], np.rint(altered))
        assert np.array_equal(result.real, np.broadcast_to(np.rint(target), image.shape))
        weight = result.mask[..., None]
        assert np.abs(result.fake - (weight * source + (1 - weight) * target)).max() <= 0.51
        assert result.mask.max() == pytest.approx(0.5, abs=0.01)
        np.testing.assert_allclose(result.boundary, 4 * result.mask * (1 - result.mask))
    draw = fixed_draw(colour=colour, down_factor=4, transform_source=False)
    assert np.abs(sbi.blend(image, face((48, 52), 50), draw, recipe).real[0, 0] - altered / 0.94).max() <= 0.51


@pytest.mark.parametrize("turn", [-0.05, 0.05])
def test_hsv_intended_matches_colorsys_and_wraps(turn):
    image = cartoon(64, 64, seed=4)
    image[:2, :2] = [[(255, 0, 4), (130, 130, 130)], [(0, 0, 0), (4, 0, 255)]]
    draw = fixed_draw(transform_source=False, colour=replace(NO_COLOUR, hsv=np.array([turn, 0.25, -0.2])))
    real = sbi.blend(image, face((32, 36), 32), draw).real
    for y in range(0, 64, 3):
        for x in range(0, 64, 3):
            for row, column in ((y, x), (y % 2, x % 2)):
                hue, saturation, value = colorsys.rgb_to_hsv(*(image[row, column] / 255.0))
                expected = colorsys.hsv_to_rgb((hue + turn) % 1, min(saturation * 1.25, 1), min(value * 0.8, 1))
                assert np.abs(real[row, column] / 255 - expected).max() <= 0.7 / 255


def test_hsv_faithful_cuts_off_fractions_of_eight_bit_units():
    image = cartoon(64, 64, seed=4)
    image[0, 0] = (200, 40, 40)  # hue 0
    draw = fixed_draw(transform_source=False, colour=replace(NO_COLOUR, hsv=np.array([-0.2, 0.3, -0.1])))
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(int)
    assert hsv[0, 0, 0] == 0 and hsv[..., 2].min() > 0
    expected = np.stack([(hsv[..., 0] - 1) % 180, hsv[..., 1], hsv[..., 2] - 1], -1).astype(np.uint8)
    real = sbi.blend(image, face((32, 36), 32), draw, "faithful").real
    assert np.array_equal(real, cv2.cvtColor(expected, cv2.COLOR_HSV2RGB))


def test_hsv_faithful_is_nearly_nothing_and_intended_is_not():
    image = cartoon(seed=2)
    change = {}
    for name, recipe in sbi.RECIPES.items():
        only_hsv = replace(recipe.single, p_rgb=0, p_contrast=0)
        quiet = replace(recipe, single=only_hsv, p_source=0, sharpen_alpha=(0, 0))
        results = [sbi.draw_blend(np.random.default_rng(seed), quiet) for seed in range(40)]
        reals = [sbi.blend(image, face(), replace(draw, down_factor=1), quiet).real for draw in results]
        change[name] = np.mean([np.abs(real.astype(int) - image).mean() for real in reals])
    assert 0.3 < change["faithful"] < 2.0
    assert change["intended"] > 8


def test_down_scaling_samples_nearest_and_returns_bilinear():
    image = cartoon(96, 128)
    draw = fixed_draw(transform_source=False, down_factor=4)
    small = image[::4, ::4].astype(float)
    rows, columns = ((np.arange(96) + 0.5) / 4 - 0.5, (np.arange(128) + 0.5) / 4 - 0.5)
    grid = np.meshgrid(rows, columns, indexing="ij")
    expected = np.stack([ndimage.map_coordinates(small[..., c], grid, order=1, mode="nearest") for c in range(3)], -1)
    assert np.abs(sbi.blend(image, face(), draw).real - expected).max() <= 1.0


# --- the whole generator against a plain one -------------------------------------------------------------------------


def plain_colours(image, colour, eight_bit):
    """RGB shift, HSV shift, contrast and brightness, picture by picture as the recipe names them; float64, 0..255."""
    pixels = image.astype(np.float64)
    if colour.rgb is not None:
        pixels = np.clip(pixels + colour.rgb, 0, 255)
    if colour.hsv is not None and eight_bit:
        hue, saturation, value = cv2.split(cv2.cvtColor(np.rint(pixels).astype(np.uint8), cv2.COLOR_RGB2HSV))
        planes = [(hue + colour.hsv[0]) % 180, *(np.clip(a + b, 0, 255) for a, b in
                  ((saturation, colour.hsv[1]), (value, colour.hsv[2])))]  # fmt: skip
        pixels = cv2.cvtColor(np.dstack(planes).astype(np.uint8), cv2.COLOR_HSV2RGB).astype(np.float64)
    elif colour.hsv is not None:
        hsv = rgb_to_hsv(pixels / 255)
        hsv[..., 0] = (hsv[..., 0] + colour.hsv[0]) % 1
        hsv[..., 1:] = np.minimum(hsv[..., 1:] * (1 + colour.hsv[1:]), 1)
        pixels = 255 * hsv_to_rgb(hsv)
    if colour.contrast is not None:
        brightness, contrast = colour.contrast
        pixels = np.clip(pixels * (1 + contrast) + 255 * brightness, 0, 255)
    return pixels


def plain_source_and_target(image, draw, eight_bit, averaged=False):
    """What is blended onto what, at full resolution and in the published order; the moved source is float."""
    height, width = image.shape[:2]
    altered = plain_colours(image, draw.colour, eight_bit)
    if draw.down_factor > 1 and averaged:
        few = (int(width / draw.down_factor), int(height / draw.down_factor))
        small = cv2.resize(altered, few, interpolation=cv2.INTER_AREA)
        altered = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    elif draw.down_factor > 1:
        few = (width // draw.down_factor, height // draw.down_factor)
        small = cv2.resize(altered, few, interpolation=cv2.INTER_NEAREST)
        if eight_bit:  # colours last: OpenCV's 8-bit HSV rounds by the place of a pixel in its vectors
            small = plain_colours(cv2.resize(image, few, interpolation=cv2.INTER_NEAREST), draw.colour, True)
        altered = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    else:
        alpha, lightness = draw.sharpen
        edges = np.full((3, 3), -1.0)
        edges[1, 1] = 8 + lightness
        kernel = (1 - alpha) * np.pad([[1.0]], 1) + alpha * edges
        altered = np.clip(ndimage.correlate(altered, kernel[..., None], mode="mirror"), 0, 255)
    source, target = (altered, image) if draw.transform_source else (image.astype(float), np.rint(altered))
    return cv2.warpAffine(source, plain_affine(image, draw), (width, height), borderMode=cv2.BORDER_REPLICATE), target


def plain_affine(image, draw):
    """To the centre, scale, back, then translate by a share of width and height."""
    height, width = image.shape[:2]

    def shift(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    centre = ((width - 1) / 2, (height - 1) / 2)
    moved = shift(draw.translate[0] * width, draw.translate[1] * height) @ shift(*centre)
    return (moved @ np.diag([*draw.scale, 1]) @ shift(-centre[0], -centre[1]))[:2]


def plain_mask(image, points, draw, name):
    """Hull, affine, SciPy's elastic field, erosion by what a blur leaves at 1, blur, ratio."""
    shape = image.shape[:2]
    hull = plain_hull(points[:68] if draw.first_68 else points, shape, draw.hull)
    moved = cv2.warpAffine(hull, plain_affine(image, draw), shape[::-1])
    low, high = points[:68].min(0), points[:68].max(0)
    zoom = 1 if name == "faithful" else (high - low).max() / 190
    _, bent = plain_elastic(
        moved, draw.noise, (low + high) / 2, 50 / np.sqrt(3) / (2 * np.sqrt(np.pi) * 7) * zoom, 7 * zoom
    )
    rows, columns = draw.soft_shape
    way = cv2.INTER_AREA if shape[0] > rows and shape[1] > columns else cv2.INTER_LINEAR
    small = cv2.resize(bent, (columns, rows), interpolation=way)
    core = (cv2.GaussianBlur(small, (draw.erode_kernel, draw.erode_kernel), 0) >= 1 - 1e-6).astype(float)
    assert core.any()
    soft = cv2.GaussianBlur(core, (draw.blur_kernel, draw.blur_kernel), draw.blur_sigma)
    return np.clip(cv2.resize(soft / soft.max(), shape[::-1]), 0, 1) * draw.ratio


@pytest.mark.parametrize("recipe", sbi.RECIPES)
@pytest.mark.parametrize(("shape", "points"), [((128, 150), 81), ((300, 280), 68)])
def test_random_blends_match_a_plain_version(recipe, shape, points):
    """Given its mask, each picture within 1 grey level everywhere; the mask, as it shows in the fake, in 99.9 %.

    A pixel that erosion only just keeps or drops in one of the two versions shows around it, hence not everywhere.
    Pictures are smooth, since OpenCV's warp places pixels on a grid of 1/32 px: a step of 32 levels is 1 level there.
    """
    far, total = 0, 0
    for seed in range(40):
        marks = face((shape[1] / 2 + 3, shape[0] * 0.54), shape[0] * 0.45, points)
        image = cv2.GaussianBlur(cartoon(*shape, marks, seed), (0, 0), 2)
        draw = sbi.draw_blend(np.random.default_rng(seed), recipe)
        result = sbi.blend(image, marks, draw, recipe)
        source, target = plain_source_and_target(image, draw, recipe == "faithful", recipe == "smooth")
        assert np.abs(result.real - target).max() <= 1
        target = result.real  # else a level lost to rounding would count twice
        weight = result.mask[..., None].astype(float)
        assert np.abs(result.fake - (weight * source + (1 - weight) * target)).max() <= 1
        assert np.array_equal(result.fake[result.mask == 0], result.real[result.mask == 0])
        mask = plain_mask(image, marks, draw, recipe)
        assert np.abs(result.mask - mask).mean() < 0.004
        gap = np.abs(result.fake - (mask[..., None] * source + (1 - mask[..., None]) * target))
        far, total = far + (gap > 1).sum(), total + gap.size
    assert far / total < 0.001


# --- draws ---------------------------------------------------------------------------------------------------------


SAMPLES = 2000


@pytest.fixture(scope="module", params=sbi.RECIPES)
def draws(request):
    """Recipe name and its draws; a seed per sample, as training takes them."""
    rngs = (sbi.sample_rng(11, "face", frame, 0) for frame in range(SAMPLES))
    return request.param, [sbi.draw_blend(rng, request.param) for rng in rngs]


def assert_shares(values, expected):
    """Every value of `expected` (value: probability) and no other occurs, within four standard errors."""
    counts = Counter(values)
    assert set(counts) == set(expected)
    for value, probability in expected.items():
        four_errors = 4 * np.sqrt(probability * (1 - probability) / len(values))
        assert counts[value] / len(values) == pytest.approx(probability, abs=four_errors), value


def assert_uniform(values, low, high, name):
    """Inside the range, up to its ends, and evenly so (Kolmogorov-Smirnov; fixed seeds, so no test fails by chance)."""
    values = np.array(values)
    assert low - 1e-9 <= values.min() and values.max() <= high + 1e-9, name
    assert values.min() < low + 0.02 * (high - low) and values.max() > high - 0.02 * (high - low), name
    assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3, name


def test_discrete_choices_have_their_probabilities(draws):
    recipe, draws = draws
    lost = [d.down_factor for d in draws]
    if recipe == "smooth":
        assert_uniform([factor for factor in lost if factor > 1], 1.2, 3.5, "averaged pixels")
        lost = [2 if factor > 1 else 1 for factor in lost]
    shares = {1: 0.5, 2: 0.5} if recipe == "smooth" else {1: 0.5, 2: 0.25, 4: 0.25}
    assert_shares(lost, shares)
    assert all(d.colour.hsv is not None and d.colour.contrast is not None for d in draws)
    sixth = 1 / 6
    for pick, expected in (
        (lambda d: d.first_68, {True: 0.25, False: 0.75}),
        (lambda d: d.transform_source, {True: 0.5, False: 0.5}),
        (lambda d: d.colour.rgb is not None, {True: 0.3, False: 0.7}),
        (lambda d: d.hull, dict.fromkeys(("dfl_full", "extended", "components", "convex"), 0.25)),
        (lambda d: d.ratio, {0.25: sixth, 0.5: sixth, 0.75: sixth, 1.0: 0.5}),
        (lambda d: d.erode_kernel, dict.fromkeys(range(5, 26, 2), 1 / 11)),
        (lambda d: d.blur_kernel, dict.fromkeys(range(5, 26, 2), 1 / 11)),
        (lambda d: d.blur_sigma, dict.fromkeys(range(5, 46), 1 / 41)),
        (lambda d: d.soft_shape[0], dict.fromkeys(range(192, 257), 1 / 65)),
        (lambda d: d.soft_shape[1], dict.fromkeys(range(192, 257), 1 / 65)),
    ):
        assert_shares([pick(d) for d in draws], expected)


def test_continuous_choices_fill_their_ranges_evenly(draws):
    recipe, draws = draws
    hue, rest = (0.3, 0.3) if recipe == "faithful" else (0.05, 0.3)
    columns = {
        "x": ([d.translate[0] for d in draws], -0.03, 0.03),
        "y": ([d.translate[1] for d in draws], -0.015, 0.015),
        "scale x": ([d.scale[0] for d in draws], 0.95, 1 / 0.95),
        "scale y": ([d.scale[1] for d in draws], 0.95, 1 / 0.95),
        "red": ([d.colour.rgb[0] for d in draws if d.colour.rgb is not None], -20, 20),
        "green": ([d.colour.rgb[1] for d in draws if d.colour.rgb is not None], -20, 20),
        "blue": ([d.colour.rgb[2] for d in draws if d.colour.rgb is not None], -20, 20),
        "hue": ([d.colour.hsv[0] for d in draws], -hue, hue),
        "saturation": ([d.colour.hsv[1] for d in draws], -rest, rest),
        "value": ([d.colour.hsv[2] for d in draws], -rest, rest),
        "brightness": ([d.colour.contrast[0] for d in draws], -0.1, 0.1),
        "contrast": ([d.colour.contrast[1] for d in draws], -0.1, 0.1),
        "alpha": ([d.sharpen[0] for d in draws], 0.2, 0.5),
        "lightness": ([d.sharpen[1] for d in draws], 0.5, 1.0),
    }
    for name, (values, low, high) in columns.items():
        assert_uniform(values, low, high, name)


def test_choices_do_not_depend_on_each_other(draws):
    """All numbers of a draw side by side: no pair correlates by more than 4.5 standard errors."""
    _, draws = draws
    rows = [[d.first_68, d.hull == "convex", d.transform_source, d.colour.rgb is not None, *d.colour.hsv,
             *d.colour.contrast, d.down_factor, *d.sharpen, *d.translate, *d.scale, *d.soft_shape, d.erode_kernel,
             d.blur_kernel, d.blur_sigma, d.ratio, *d.noise[40, 40], d.noise[40, 41, 0]] for d in draws]  # fmt: skip
    table = np.corrcoef(np.array(rows, float).T)
    assert np.abs(table - np.eye(len(table))).max() < 4.5 / np.sqrt(SAMPLES)


def test_elastic_noise_is_white_and_normal(draws):
    _, draws = draws
    assert stats.kstest([d.noise[5, 90, 1] for d in draws], "norm").pvalue > 1e-3
    field = draws[0].noise
    assert field.shape == (96, 96, 2) and field.dtype == np.float32
    assert stats.kstest(field.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(field[:, 1:].ravel(), field[:, :-1].ravel())[0, 1]) < 0.03
    assert len({d.noise.tobytes() for d in draws}) == SAMPLES


@pytest.mark.parametrize("recipe", sbi.RECIPES)
def test_pair_augmentation_draws_from_its_ranges(recipe, monkeypatch):
    seen, qualities = [], []
    monkeypatch.setattr(sbi, "_recolour", lambda image, draw, limits: seen.append(draw) or image)
    monkeypatch.setattr(sbi, "_jpeg", lambda image, quality: qualities.append(quality) or image)
    image, compressed = np.zeros((4, 4, 3), np.uint8), []
    for frame in range(SAMPLES):
        count = len(qualities)
        sbi.augment_pair(image, image, sbi.sample_rng(5, "pair", frame, 0), recipe)
        compressed.append(len(qualities) > count)
    assert all(a is b for a, b in zip(seen[::2], seen[1::2], strict=True)) and qualities[::2] == qualities[1::2]
    seen, qualities = seen[::2], qualities[::2]
    for pick in (lambda d: d.rgb, lambda d: d.hsv, lambda d: d.contrast):
        assert_shares([pick(d) is not None for d in seen], {True: 0.3, False: 0.7})
    assert_shares(compressed, {True: 0.5, False: 0.5})
    assert set(qualities) <= set(range(40, 101)) and len(set(qualities)) == 61
    assert stats.chisquare(list(Counter(qualities).values())).pvalue > 1e-3
    hue = 0.3 if recipe == "faithful" else 0.05
    for name, pick, bounds in (
        ("rgb", lambda d: d.rgb, (20, 20, 20)),
        ("hsv", lambda d: d.hsv, (hue, 0.3, 0.3)),
        ("contrast", lambda d: d.contrast, (0.3, 0.3)),
    ):
        columns = np.array([pick(d) for d in seen if pick(d) is not None]).T
        for column, bound in zip(columns, bounds, strict=True):
            assert_uniform(column, -bound, bound, name)


@pytest.mark.parametrize("recipe", sbi.RECIPES)
def test_flips_and_crops_of_pairs_have_their_shares(recipe, monkeypatch):
    """Which mirror and which final window 2,000 training pairs ask for; the blending itself is left out."""
    image, points = cartoon(48, 48), face((24, 26), 26)
    still, flips, boxes = sbi.SelfBlend(image, image, np.zeros((48, 48), np.float32), image[..., 0]), [], []
    flip, crop_box = sbi.flip, sbi.crop_box
    monkeypatch.setattr(sbi, "flip", lambda *a: flips.append(True) or flip(*a))

    def watched(marks, rng, side):
        assert side is None
        boxes.append((crop_box(marks, rng), hulls.face_box(marks)))
        return boxes[-1][0]

    monkeypatch.setattr(sbi, "crop_box", watched)
    monkeypatch.setattr(sbi, "blend", lambda *a: still)
    monkeypatch.setattr(sbi, "crop", lambda part, box, size: np.zeros((size, size)))
    monkeypatch.setattr(sbi, "_augment", lambda image, *a: image)
    flipped = []
    for frame in range(SAMPLES):
        count = len(flips)
        sbi.training_pair(image, points, sbi.sample_rng(2, "crop", frame, 0), 8, recipe)
        flipped.append(len(flips) > count)
    assert_shares(flipped, {True: 0.5, False: 0.5})
    shares = np.array([(box - tight) / np.repeat([np.subtract(tight[2:], tight[:2])], 2, 0).ravel() * [-1, -1, 1, 1]
                       for box, tight in boxes])  # fmt: skip
    assert shares.shape == (SAMPLES, 4)
    for column in shares.T:
        assert_uniform(np.clip(column, 0.05, 0.2), 0.05, 0.2, "crop")
        assert column.min() > 0.05 - 1e-5 and column.max() < 0.2 + 1e-5
    assert np.abs(np.corrcoef(np.c_[shares, flipped].T) - np.eye(5)).max() < 4.5 / np.sqrt(SAMPLES)


def test_thousand_small_blends_keep_their_promises():
    """Counts on the results themselves, both recipes: who was transformed, peak weights, outside and inside."""
    image, points = cartoon(48, 48), face((24, 26), 26)
    rng = np.random.default_rng(5)
    untouched, peaks, inside = [], [], []
    for number in range(1000):
        result = sbi.self_blend(image, points if number % 3 else points[:68], rng, list(sbi.RECIPES)[number % 3])
        outside = result.mask == 0
        assert np.array_equal(result.fake[outside], result.real[outside])
        assert np.isfinite(result.mask).all() and 0 < result.mask.max() <= 1 and result.mask.min() == 0
        np.testing.assert_allclose(result.boundary, 4 * result.mask * (1 - result.mask))
        untouched.append(np.array_equal(result.real, image))
        peaks.append(float(np.rint(result.mask.max() * 4) / 4))
        inside.append((result.fake != result.real)[result.mask > 0.9].any() or result.mask.max() < 0.9)
    assert np.mean(untouched) == pytest.approx(0.5, abs=0.063)
    assert Counter(peaks)[1.0] / 1000 == pytest.approx(0.5, abs=0.063)
    assert all(Counter(peaks)[ratio] / 1000 == pytest.approx(1 / 6, abs=0.05) for ratio in (0.25, 0.5, 0.75))
    assert all(inside)


def test_same_seed_same_bytes_and_replay_in_any_order():
    image, points = cartoon(), face()

    def sample(frame, epoch=0):
        return [a.tobytes() for a in sbi.training_pair(image, points, sbi.sample_rng(7, "0f", frame, epoch), 40)]

    forward = {frame: sample(frame) for frame in range(4)}
    assert all(sample(frame) == forward[frame] for frame in reversed(range(4)))
    assert len({pair[1] for pair in forward.values()}) == 4
    others = [sbi.sample_rng(8, "0f", 0, 0), sbi.sample_rng(7, "0e", 0, 0), sbi.sample_rng(7, "0f", 0, 1)]
    assert len({rng.random() for rng in [*others, sbi.sample_rng(7, "0f", 0, 0)]}) == 4


@pytest.mark.parametrize("recipe", sbi.RECIPES)
def test_randomness_used_does_not_depend_on_the_picture(recipe):
    """A clip is replayed by giving each frame the same generator: all steps must take the same draws."""
    pictures = [(cartoon(), face()), (cartoon(90, 140, face((70, 50), 30)), face((70, 50), 30, 68))]
    for seed in range(20):
        ends = []
        for image, points in pictures:
            rng = np.random.default_rng(seed)
            sbi.training_pair(image, points, rng, 32, recipe)
            ends.append(rng.random())
        assert ends[0] == ends[1]


# --- clips ---------------------------------------------------------------------------------------------------------


def same(one, other):
    """Two draws are equal in every field but position and brightness in a clip."""
    fields = [name for name in vars(one) if name not in ("offset", "flicker", "noise", "colour")]
    colours = zip(vars(one.colour).values(), vars(other.colour).values(), strict=True)
    return (
        all(getattr(one, name) == getattr(other, name) for name in fields)
        and np.array_equal(one.noise, other.noise)
        and all((a is None and b is None) or np.array_equal(a, b) for a, b in colours)
    )


def test_a_still_clip_repeats_one_draw_of_its_seed():
    clip = sbi.draw_clip(np.random.default_rng(4), 6, "faithful")
    assert len(clip) == 6 and all(same(draw, sbi.draw_blend(np.random.default_rng(4), "faithful")) for draw in clip)
    assert all(draw.offset == (0, 0) and draw.flicker == 0 for draw in clip)
    fakes = [sbi.blend(cartoon(), face(), draw, "faithful").fake for draw in clip]
    assert all(np.array_equal(fake, fakes[0]) for fake in fakes)


def test_motion_and_flicker_have_their_sizes_and_leave_all_else_alone():
    """2,000 frames. Blurring white noise with sigma 4 makes neighbours correlate as exp(-lag^2 / 4 sigma^2)."""
    sizes = {"drift": 0.03, "jitter": 0.02, "flicker": 0.05}
    for name, size in sizes.items():
        clip = sbi.draw_clip(np.random.default_rng(9), 2000, **{name: size})
        assert all(same(draw, clip[0]) for draw in clip) and same(clip[0], sbi.draw_blend(np.random.default_rng(9)))
        offsets, levels = np.array([draw.offset for draw in clip]), np.array([draw.flicker for draw in clip])
        moving, still = (levels[:, None], offsets) if name == "flicker" else (offsets, levels)
        assert not still.any()
        # Drift: about 2000 / (2 sqrt(pi) 4) = 141 independent values per axis, four errors of their deviation 24 %.
        np.testing.assert_allclose(moving.std(0), size, rtol=0.24 if name == "drift" else 0.07)
        for lag in (1, 4, 8):
            together = (moving[lag:] * moving[:-lag]).mean(0) / (moving**2).mean(0)
            expected = np.exp(-(lag**2) / (4 * 4**2)) if name == "drift" else 0
            np.testing.assert_allclose(together, expected, atol=0.25 if name == "drift" else 0.09)
    assert (
        abs(np.corrcoef(np.array([d.offset for d in sbi.draw_clip(np.random.default_rng(2), 2000, jitter=1)]).T)[0, 1])
        < 0.09
    )


def test_all_three_add_up_and_short_clips_move_as_long_ones():
    one, two = (sbi.draw_clip(np.random.default_rng(1), 8, **k) for k in ({"drift": 0.1}, {"jitter": 0.1}))
    both = sbi.draw_clip(np.random.default_rng(1), 8, drift=0.1, jitter=0.1, flicker=0.3)
    for a, b, c in zip(one, two, both, strict=True):
        np.testing.assert_allclose(np.add(a.offset, b.offset), c.offset)
    ends = np.array([[d.offset for d in sbi.draw_clip(np.random.default_rng(s), 4, drift=1.0)] for s in range(500)])
    np.testing.assert_allclose(ends.std(axis=0), 1, rtol=0.13)
    np.testing.assert_allclose(np.diff(ends, axis=1).std(), np.sqrt(2 - 2 * np.exp(-1 / 64)), rtol=0.13)


@pytest.mark.parametrize("recipe", sbi.RECIPES)
def test_offset_moves_copy_and_mask_by_the_width_of_the_face(recipe):
    """Half a picture's side more or less changes nothing: the unit is the face, not the picture."""
    for side in (160, 240):
        points = face((80, 84), 60)  # 68-point box is 60 px wide
        image = cartoon(side, side, points)
        rest = sbi.blend(image, points, fixed_draw(), recipe)
        moved = sbi.blend(image, points, fixed_draw(offset=(0.1, -0.05)), recipe)
        shift = np.subtract(ndimage.center_of_mass(moved.mask), ndimage.center_of_mass(rest.mask))
        np.testing.assert_allclose(shift, [-3, 6], atol=0.2)
        inner = np.index_exp[78:90, 78:90]
        assert rest.mask[inner].min() > 0.999 and moved.mask[inner].min() > 0.999
        assert np.abs(moved.fake[inner].astype(int) - image[81:93, 72:84]).max() <= 1
        outside = moved.mask == 0
        assert np.array_equal(moved.fake[outside], image[outside]) and np.array_equal(moved.real, image)


def test_flicker_brightens_the_copy_alone():
    image = np.full((96, 96, 3), (250, 90, 3), np.uint8)
    for level, copy in ((0.1, (255, 115.5, 28.5)), (-0.1, (224.5, 64.5, 0))):
        result = sbi.blend(image, face((48, 52), 50), fixed_draw(flicker=level, ratio=0.5))
        weight = result.mask[..., None]
        assert np.abs(result.fake - (weight * np.array(copy) + (1 - weight) * image)).max() <= 0.51
        assert np.array_equal(result.real, image)


def test_clips_say_what_they_need():
    for arguments in ({"frames": 0}, {"frames": 3, "drift": -0.1}, {"frames": 3, "flicker": np.nan}):
        with pytest.raises(ValueError, match="0 or more"):
            sbi.draw_clip(np.random.default_rng(0), **arguments)


# --- pairs and edges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sbi.RECIPES)
def test_augmentation_treats_both_images_alike(recipe):
    image = cartoon(32, 32)
    rng = np.random.default_rng(0)
    unchanged = 0
    for _ in range(400):
        left, right = sbi.augment_pair(image, image.copy(), rng, recipe)
        assert left.dtype == np.uint8 and np.array_equal(left, right)
        unchanged += np.array_equal(left, image)
    assert unchanged / 400 == pytest.approx(0.7**3 * 0.5, abs=4 * np.sqrt(0.17 * 0.83 / 400))


def test_jpeg_keeps_channel_order_and_quality_matters():
    image = cartoon(64, 64)
    still = replace(sbi.RECIPES["intended"].pair, p_rgb=0, p_hsv=0, p_contrast=0)
    error = {}
    for quality in (40, 100):
        recipe = replace(sbi.RECIPES["intended"], pair=still, p_jpeg=1, jpeg_quality=(quality, quality))
        left, _ = sbi.augment_pair(image, image, np.random.default_rng(0), recipe)
        error[quality] = np.abs(left.astype(int) - image).mean()
    assert 0 < error[100] < error[40] < 8


def test_training_pair_cuts_the_same_window_from_all_three():
    """Without JPEG, which mixes blocks, the resized pair is equal wherever the resized mask is 0."""
    image, points = cartoon(200, 260, face((120, 100), 70)), face((120, 100), 70)
    recipe = replace(sbi.RECIPES["intended"], p_jpeg=0)
    for seed in range(40):
        real, fake, mask = sbi.training_pair(image, points, np.random.default_rng(seed), 48, recipe)
        assert real.shape == fake.shape == (48, 48, 3) and real.dtype == fake.dtype == np.uint8
        assert mask.shape == (48, 48) and mask.dtype == np.float32 and 0.2 < mask.max() <= 1
        assert np.array_equal(real[mask == 0], fake[mask == 0]) and not np.array_equal(real, fake)


@pytest.mark.parametrize("recipe", sbi.RECIPES)
@pytest.mark.parametrize(("centre", "side"), [((120, 100), 70), ((3, 20), 60), ((250, 190), 90)])
def test_a_pair_is_as_if_the_whole_picture_were_augmented(recipe, centre, side):
    """Only blocks around the crop are compressed; not one pixel may show it.

    8-bit HSV is left out: OpenCV rounds or cuts off there by a pixel's place in its vectors, so by the picture's width.
    """
    points, base = face(centre, side), sbi.RECIPES[recipe]
    pair = replace(base.pair, p_hsv=0 if base.pair.eight_bit else 1)
    image, recipe = cartoon(200, 260, points), replace(base, p_jpeg=1, pair=pair)
    for seed in range(25):
        pair = sbi.training_pair(image, points, np.random.default_rng(seed), 48, recipe)
        rng = np.random.default_rng(seed)
        x0, y0, x1, y1 = sbi.loose_box(points, image.shape[:2])
        part, marks = image[y0:y1, x0:x1], points - np.float32([x0, y0])
        if rng.random() < 0.5:
            part, marks = sbi.flip(part, marks)
        sample = sbi.self_blend(part, marks, rng, recipe)
        whole = sbi.augment_pair(sample.real, sample.fake, rng, recipe)
        box = sbi.crop_box(marks, rng)
        assert all(np.array_equal(a, sbi.crop(b, box, 48)) for a, b in zip(pair, whole, strict=False))


def test_training_pair_flips_half_and_frames_the_face():
    """Left half black, right half white, no other change: the flip is seen in the result."""
    image = np.zeros((200, 200, 3), np.uint8)
    image[:, 100:] = 255
    off = {"p_rgb": 0, "p_hsv": 0, "p_contrast": 0}
    base = sbi.RECIPES["intended"]
    recipe = replace(base, single=replace(base.single, **off), pair=replace(base.pair, **off), p_jpeg=0)
    flipped = []
    for seed in range(300):
        real, _, _ = sbi.training_pair(image, face((99.5, 100), 60), np.random.default_rng(seed), 32, recipe)
        flipped.append(real[:, 0].mean() > real[:, -1].mean())
        edge = np.abs(np.diff(real[16, :, 0].astype(int))).argmax()
        assert 12 <= edge <= 19  # sides move out by 5 to 20 %
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("points", [68, 81])
@pytest.mark.parametrize("centre", [(0, 60), (60, -5), (127, 127), (-20, 64), (64, 140)])
def test_faces_partly_outside_still_blend(points, centre):
    image = cartoon()
    for seed in range(15):
        result = sbi.self_blend(image, face(centre, 60, points), np.random.default_rng(seed))
        assert result.mask.any() and np.isfinite(result.mask).all()
        assert np.array_equal(result.fake[result.mask == 0], result.real[result.mask == 0])
        real, fake, _ = sbi.training_pair(image, face(centre, 60, points), np.random.default_rng(seed), 32)
        assert real.shape == fake.shape == (32, 32, 3)


@pytest.mark.parametrize("recipe", sbi.RECIPES)
@pytest.mark.parametrize("shape", [(24, 20), (480, 640)])
def test_tiny_faces(recipe, shape):
    points = face((shape[1] / 2, shape[0] / 2), 8, 68)
    image = cartoon(*shape)
    for seed in range(10):
        result = sbi.self_blend(image, points, np.random.default_rng(seed), recipe)
        assert result.mask.any() and np.isfinite(result.mask).all()
        assert sbi.training_pair(image, points, np.random.default_rng(seed), 16, recipe)[2].any()


def test_errors_name_the_fix():
    image, points, rng = cartoon(), face(), np.random.default_rng(0)
    broken = points.copy()
    broken[3] = np.nan
    for bad_image, bad_points, words in (
        (image, points[:5], "68"),
        (image, np.zeros((0, 68, 2)), "one face"),
        (image, broken, "not found"),
        (image, points + 500, "own pixels"),
        (image, points * 40, "own pixels"),
        (image, np.ones((68, 2)), "skip"),
        (image.astype(np.float32), points, "uint8"),
        (image[..., 0], points, "RGB"),
    ):
        for call in (lambda a, b: sbi.self_blend(a, b, rng), lambda a, b: sbi.training_pair(a, b, rng, 32)):
            with pytest.raises(ValueError, match=words):
                call(bad_image, bad_points)
    with pytest.raises(ValueError, match="intended"):
        sbi.self_blend(image, points, rng, "published")


def test_inputs_are_left_alone():
    image, points = cartoon(), face()
    before = image.copy(), points.copy()
    for seed in range(8):
        result = sbi.self_blend(image, points, np.random.default_rng(seed))
        assert not np.shares_memory(result.real, image)
        sbi.training_pair(image, points, np.random.default_rng(seed), 32)
    assert np.array_equal(image, before[0]) and np.array_equal(points, before[1])
