"""Traces: each feature on pictures made so that its value is known, and what must leave it alone."""

import cv2
import numpy as np
import pandas as pd
import pytest
from matplotlib.path import Path as Polygon
from scipy import ndimage
from scipy.spatial import ConvexHull, distance
from scipy.stats import spearmanr

from unmask import traces
from unmask.data import crops
from unmask.data.landmarks import CANONICAL_68, full_landmarks

SIZE, FRAMES = 160, 6
PTS = np.arange(FRAMES) * 0.12
SIGMA = 6.0  # grey levels of the noise
FLOOR = 2 / 12  # variance of rounding, in the pictures and in the measure
QUARTER = np.log((SIGMA**2 / 4 + FLOOR) / (SIGMA**2 + FLOOR))  # half the noise, a quarter of the energy
TEMPORAL = ["step_change", "change", "persistence", "jitter"]


def face(scale=40.0, centre=(80.0, 70.0), points=81):
    """A frontal face whose eyes are `scale` px apart."""
    return full_landmarks(CANONICAL_68 * scale + centre)[:points]


def inside(points, size=SIZE, margin=0.0):
    """Convex hull of the points without a margin, given as a share of the hull's inradius: bool[S,S]."""
    hull = points[ConvexHull(points).vertices].astype(float)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).reshape(-1, 2)
    depth = ndimage.distance_transform_edt(Polygon(hull).contains_points(grid).reshape(size, size))
    return depth > margin * depth.max()


def background(size=SIZE):
    """Smooth grey slope, float64[S,S]."""
    return np.add.outer(np.linspace(100, 140, size), np.linspace(-10, 10, size))


def noise(seed, size=SIZE):
    return np.random.default_rng(seed).normal(0, SIGMA, (size, size))


def video(paint, frames=FRAMES):
    """uint8[T,S,S,3] of grey pictures paint(i) float[S,S] or colour pictures float[S,S,3]."""
    pictures = [np.asarray(paint(i)) for i in range(frames)]
    pictures = [np.repeat(p[..., None], 3, axis=2) if p.ndim == 2 else p for p in pictures]
    return np.rint(np.clip(pictures, 0, 255)).astype(np.uint8)


def measure(images, points=None, pts=None):
    points = face() if points is None else points
    landmarks = points if points.ndim == 3 else np.repeat(points[None], len(images), axis=0)
    return traces.video_traces(images, landmarks, PTS[: len(images)] if pts is None else pts)


FACE = inside(face())


@pytest.fixture(scope="module")
def plain():
    """The same fresh noise in face and ring: a picture from one piece."""
    return measure(video(lambda i: background() + noise(i)))


def test_a_picture_from_one_piece_shows_nothing(plain):
    assert list(plain) == list(traces.FEATURES)
    for name in ("noise", "middle", "rolloff", "chroma", "rim", "lower", "step", "change"):
        assert abs(plain[name]) < 0.12, name
    assert abs(plain["persistence"]) < 0.05 and plain["step_change"] < 0.15
    assert plain["jitter"] < 1e-5 and plain["peak"] < 0.6


@pytest.mark.parametrize("points", [68, 81])
def test_less_noise_inside_the_hull(points):
    mask = inside(face(points=points))
    found = measure(video(lambda i: background() + noise(i) * np.where(mask, 0.5, 1)), face(points=points))
    assert found["noise"] == pytest.approx(QUARTER, abs=0.08)
    assert found["step"] == pytest.approx(QUARTER, abs=0.08)
    assert found["change"] == pytest.approx(QUARTER, abs=0.08)
    assert abs(found["rim"]) < 0.1 and abs(found["lower"]) < 0.1
    # White noise is weaker at all frequencies alike.
    assert found["middle"] == pytest.approx(QUARTER, abs=0.15) and abs(found["rolloff"]) < 0.15


def test_a_mask_smaller_than_the_face_leaves_the_noise_at_its_rim():
    mask = inside(face(), margin=0.25)
    found = measure(video(lambda i: background() + noise(i) * np.where(mask, 0.5, 1)))
    assert found["rim"] == pytest.approx(-QUARTER, abs=0.1)
    assert abs(found["step"]) < 0.1 and found["noise"] < QUARTER / 2


@pytest.mark.parametrize("part", ["below", "above"])
def test_a_redrawn_mouth_region(part):
    rows, cheeks = np.arange(SIZE)[:, None], face()[2, 1]
    redrawn = FACE & ((rows > cheeks) if part == "below" else (rows < cheeks))
    found = measure(video(lambda i: background() + noise(i) * np.where(redrawn, 0.5, 1)))
    assert found["lower"] == pytest.approx(QUARTER if part == "below" else -QUARTER, abs=0.1)


def test_step_that_comes_and_goes():
    still = measure(video(lambda i: background() + noise(i) * np.where(FACE, 0.5, 1)))
    unsteady = measure(video(lambda i: background() + noise(i) * np.where(FACE & (i % 2 == 1), 0.5, 1)))
    assert still["step_change"] < 0.15
    assert unsteady["step_change"] == pytest.approx(-QUARTER, abs=0.1)
    assert unsteady["step"] == pytest.approx(QUARTER / 2, abs=0.08)


@pytest.mark.parametrize("sigma", [0.7, 1.5])
def test_a_resampled_face_loses_the_top_of_its_spectrum(sigma, plain):
    """Gaussian blur multiplies the power at frequency f by exp(-(2 pi sigma f)^2)."""

    def paint(i):
        picture = background() + 2 * noise(i)
        return np.where(FACE, cv2.GaussianBlur(picture, (0, 0), sigma), picture)

    found = measure(video(paint))
    assert found["middle"] < plain["middle"] - 0.5 * (2 * np.pi * sigma * 0.16) ** 2
    assert found["noise"] < -2
    if sigma == 0.7:  # stronger blur leaves nothing but rounding in both upper bands
        assert found["rolloff"] < -1


@pytest.mark.parametrize("period", [2, 3, 4])
def test_up_sampling_pattern_stands_out_as_a_peak(period, plain):
    pattern = 4 * np.cos(2 * np.pi * np.arange(SIZE) / period)
    within = measure(video(lambda i: background() + noise(i) + np.where(FACE, np.add.outer(pattern, pattern), 0)))
    around = measure(video(lambda i: background() + noise(i) + np.where(FACE, 0, np.add.outer(pattern, pattern))))
    assert within["peak"] > plain["peak"] + 1
    assert abs(around["peak"] - plain["peak"]) < 0.3


def test_strong_slopes_do_not_leak_into_the_spectrum(plain):
    """A face with shading that changes by several grey levels a pixel, as at the nose, has no more fine detail."""
    waves = 60 * np.cos(2 * np.pi * np.arange(SIZE) / 60)
    found = measure(video(lambda i: background() + noise(i) + np.where(FACE, waves, 0)))
    assert abs(found["middle"] - plain["middle"]) < 0.15 and abs(found["rolloff"] - plain["rolloff"]) < 0.1


@pytest.mark.parametrize("opposite", [(1, -0.299 / 0.587, 0), (0, -0.114 / 0.587, 1)])
def test_colour_noise_is_not_luma_noise(opposite, plain):
    """Colours that leave the luma alone, in red and in blue."""

    def paint(i):
        grey = (background() + noise(i))[..., None]
        speckle = cv2.GaussianBlur(noise(100 + i), (0, 0), 0.8)[..., None] * np.array(opposite)
        return grey + 3 * speckle * np.where(FACE, 1, 0.5)[..., None]

    found = measure(video(paint))
    assert found["chroma"] == pytest.approx(np.log(4), abs=0.15)
    assert abs(found["noise"] - plain["noise"]) < 0.1


def test_detail_drawn_anew_in_every_frame():
    fixed, texture = noise(0), noise(1)
    carried = measure(video(lambda i: background() + fixed))
    drawn = measure(video(lambda i: background() + np.where(FACE, noise(i), fixed)))
    around = measure(video(lambda i: background() + np.where(FACE, fixed, noise(i))))
    assert carried["change"] == 0 and carried["persistence"] == pytest.approx(1)
    # Two independent noises differ by twice their energy; nothing but the floor is left where nothing moves.
    expected = np.log((2 * SIGMA**2 + FLOOR + 1 / 12) / (1 / 12))
    assert drawn["change"] == pytest.approx(expected, abs=0.1) and abs(drawn["persistence"]) < 0.05
    assert around["change"] == pytest.approx(-expected, abs=0.1) and around["persistence"] == pytest.approx(1)
    half = measure(video(lambda i: background() + np.where(FACE, np.sqrt(0.5) * (noise(10 + i) + texture), fixed)))
    assert half["persistence"] == pytest.approx(0.5, abs=0.06)


def test_frames_are_aligned_by_the_face_before_they_are_compared():
    moves = np.array([[0, 0], [3, 1], [5, -2], [4, -4], [1, -3], [-2, 0]])
    texture = np.add.outer(np.zeros(SIZE), np.zeros(SIZE)) + 120 + 2 * noise(5)
    images = video(lambda i: np.roll(texture, moves[i][::-1], axis=(0, 1)))
    points = face() + moves[:, None].astype(np.float32)
    assert measure(images, points)["persistence"] > 0.99
    assert abs(measure(images, face())["persistence"]) < 0.1


def similarity(points, angle, scale, shift):
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (points - 80) @ turn.T + 80 + shift


def test_jitter_is_not_motion():
    rng = np.random.default_rng(3)
    poses = [(rng.normal(0, 0.1), rng.uniform(0.9, 1.1), rng.normal(0, 3, 2)) for _ in range(FRAMES)]
    images = video(lambda i: background() + noise(i))
    still = np.stack([similarity(face().astype(float), *pose) for pose in poses])
    assert measure(images, still)["jitter"] < 1e-5
    shaken = np.stack([similarity(face() + rng.normal(0, 0.5, (81, 2)), *pose) for pose in poses])
    # Variance of a second difference is 6 times that of a point; 4 of 136 degrees of freedom go to the similarity.
    expected = 0.5 * np.sqrt(12 * 132 / 136) / (1.44 * 40)
    assert measure(images, shaken)["jitter"] == pytest.approx(expected, rel=0.1)
    bigger = measure(images[:, :, :], 1.2 * (shaken - 80) + 80)["jitter"]
    assert bigger == pytest.approx(measure(images, shaken)["jitter"], rel=1e-4)


def test_jitter_reads_the_times():
    """A mouth that opens evenly does not jitter, however unevenly its frames were taken."""
    pts = np.array([0, 0.1, 0.5, 0.6, 1.1, 1.2])
    shapes = np.repeat(face()[None].astype(float), FRAMES, axis=0)
    shapes[:, 55:60, 1] += 2 * pts[:, None]
    images = video(lambda i: background() + noise(i))
    assert measure(images, shapes, pts)["jitter"] < 2e-4
    assert measure(images, shapes, PTS)["jitter"] > 2e-3


@pytest.mark.parametrize("change", ["shift", "double", "flip"])
def test_place_size_and_mirror_do_not_matter(change):
    size, points = SIZE, face()
    if change == "shift":
        points = face(centre=(73.0, 76.0))
    elif change == "double":
        size, points = 2 * SIZE, face(80.0, (160.0, 140.0))
    mask = inside(points, size)
    images = video(lambda i: background(size) + noise(i, size) * np.where(mask, 0.5, 1), 4)
    if change == "flip":
        images, mirror = images[:, :, ::-1], np.array([size - 1, 0], np.float32)
        points = np.abs(mirror - points)
    found = measure(images, points)
    for name in ("noise", "step", "change", "middle"):
        assert found[name] == pytest.approx(QUARTER, abs=0.15), name
    assert abs(found["rim"]) < 0.12 and abs(found["rolloff"]) < 0.2


def test_black_padding_does_not_count():
    mask = np.where(FACE, 0.5, 1)

    def paint(i):
        picture = background() + noise(i) * mask
        picture[:, :18] = 0
        picture[-12:] = 0
        return picture

    found = measure(video(paint))
    assert found["noise"] == pytest.approx(QUARTER, abs=0.1) and found["middle"] == pytest.approx(QUARTER, abs=0.2)


def test_what_cannot_be_had_is_nan():
    images = video(lambda i: background() + noise(i))
    one, two, same = measure(images[:1]), measure(images[:2]), measure(images, pts=[0, 0.1, 0.1, 0.2, 0.3, 0.4])
    assert {k for k, v in one.items() if np.isnan(v)} == set(TEMPORAL)
    assert {k for k, v in two.items() if np.isnan(v)} == {k for k, v in same.items() if np.isnan(v)}
    assert {k for k, v in two.items() if np.isnan(v)} == {"jitter"}
    tight = measure(images, face(110.0, (80.0, 50.0)))
    assert {k for k, v in tight.items() if np.isnan(v)} == {
        "noise", "middle", "rolloff", "chroma", "rim", "step", "step_change", "change",
    }  # fmt: skip
    black = measure(np.zeros_like(images))
    assert {k for k, v in black.items() if np.isfinite(v)} == {"jitter"}
    flat = measure(np.full_like(images, 128))
    assert np.isnan(flat.pop("persistence")) and not np.isnan(list(flat.values())).any()
    assert flat["noise"] == flat["chroma"] == flat["change"] == 0


def test_input_that_does_not_fit():
    images = video(lambda i: background() + noise(i))
    for wrong in (
        (images, face()[None], PTS),
        (images[:0], face()[None][:0], PTS[:0]),
        (images.astype(np.float32), np.repeat(face()[None], 6, 0), PTS),
        (images, np.full((6, 68, 2), np.nan), PTS),
        (images, np.repeat(face()[None] + 400, 6, 0), PTS),
    ):
        with pytest.raises(ValueError):
            traces.video_traces(*wrong)


def test_same_result_again_and_nothing_is_changed():
    images = video(lambda i: background() + noise(i), 3)
    landmarks, state = np.repeat(face()[None], 3, axis=0), np.random.get_state()[1].copy()
    copies = images.copy(), landmarks.copy()
    assert traces.video_traces(images, landmarks, PTS[:3]) == traces.video_traces(images, landmarks, PTS[:3])
    assert np.array_equal(images, copies[0]) and np.array_equal(landmarks, copies[1])
    assert np.array_equal(np.random.get_state()[1], state)


# --- table ----------------------------------------------------------------------------------------------------------


def test_table_has_a_row_per_item(tmp_path):
    lengths = {"b" * 16: 4, "a" * 16: 1, "c" * 16: 3}
    images = {key: video(lambda i, k=k: background() + noise(10 * k + i), n)
              for k, (key, n) in enumerate(lengths.items())}  # fmt: skip
    with crops.CropWriter(tmp_path, 0, 1) as writer:
        writer.resume([])
        for key, pictures in images.items():
            row = {"item_id": key, "status": "ok", "reason": "", "frames": len(pictures), "faces": len(pictures),
                   "decoder": "", "seconds": 0.0}  # fmt: skip
            rows = [{"item_id": key, "frame": 3 * i, "pts": PTS[i], "x0": 0.0, "y0": 0.0, "x1": 9.0, "y1": 9.0,
                     "landmarks": face().ravel().tolist(), "locator": "annotations", "locator_hash": "",
                     "data": crops.encode_crop(picture, "png")} for i, picture in enumerate(pictures)]  # fmt: skip
            writer.add((key, ""), row, rows, "png")
        writer.finish()
    crops.collate(tmp_path, 1)
    index, store = crops.read_index(tmp_path), crops.CropStore(tmp_path)
    found = traces.table(index, store, workers=2)
    assert list(found.columns) == ["item_id", *traces.FEATURES] and list(found["item_id"]) == list(lengths)
    for row in found.to_dict("records"):
        expected = measure(images[row["item_id"]])
        assert all(row[k] == pytest.approx(v, rel=1e-9, nan_ok=True) for k, v in expected.items())
    late_first = index.iloc[::-1]
    pd.testing.assert_frame_equal(
        traces.table(late_first, store).sort_values("item_id", ignore_index=True),
        found.sort_values("item_id", ignore_index=True),
    )
    empty = traces.table(index.iloc[:0], store)
    assert list(empty.columns) == list(found.columns) and empty.empty


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_steps_agree_with_pairwise_definitions(ties):
    rng = np.random.default_rng(1)
    vectors = rng.normal(0, 1, (9, 32)).astype(np.float32)
    if ties:
        vectors = np.round(vectors)
    pairs = list(zip(vectors[:-1].astype(float), vectors[1:].astype(float), strict=True))
    found = traces.steps(vectors)
    assert found["spearman"] == pytest.approx(np.mean([spearmanr(a, b).statistic for a, b in pairs]), abs=1e-12)
    assert found["euclidean"] == pytest.approx(np.mean([distance.euclidean(a, b) for a, b in pairs]), rel=1e-12)
    cosines = [1 - distance.cosine(a, b) for a, b in pairs]
    assert found["euclidean_unit"] == pytest.approx(np.mean(np.sqrt(2 - 2 * np.array(cosines))), rel=1e-9)


def test_steps_order_scale_and_gaps():
    rng = np.random.default_rng(2)
    walk = rng.normal(0, 1, (1, 64)) + 0.1 * np.cumsum(rng.normal(0, 1, (20, 64)), axis=0)
    slow, mixed, scaled = traces.steps(walk), traces.steps(walk[rng.permutation(20)]), traces.steps(7 * walk)
    assert slow["spearman"] > mixed["spearman"] and slow["euclidean"] < mixed["euclidean"]
    assert scaled["euclidean"] == pytest.approx(7 * slow["euclidean"])
    assert scaled["euclidean_unit"] == pytest.approx(slow["euclidean_unit"])
    assert traces.steps(np.exp(walk))["spearman"] == pytest.approx(slow["spearman"])
    for few in (walk[:1], walk[:0]):
        assert np.isnan(list(traces.steps(few).values())).all()
    holes = np.vstack([walk[:3], np.zeros((1, 64))])
    assert traces.steps(holes)["spearman"] == pytest.approx(traces.steps(walk[:3])["spearman"])
    assert traces.steps(holes)["euclidean_unit"] == pytest.approx(traces.steps(walk[:3])["euclidean_unit"])
    with pytest.raises(ValueError, match="one vector a frame"):
        traces.steps(walk[0])
