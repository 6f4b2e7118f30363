"""Laws' energies against closed forms and a plain reference; pseudo-labels on clusters known beforehand."""

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from sklearn.cluster import KMeans

from unmask import laws
from unmask.data.landmarks import CANONICAL_68

SIZE = 160
# Edges at 0 and 45 degrees, so that the pixels on and inside the outline are beyond dispute.
EYE = np.array([[0, 6], [6, 0], [18, 0], [24, 6], [18, 12], [6, 12]], np.float32)
EYES = ((40, 50), (96, 50))
LIPS = np.array([[0, 10], [10, 0], [20, 0], [30, 0], [40, 10], [30, 20], [20, 20], [10, 20]], np.float32)
MOUTH = (60, 110)


def face(mouth=20.0, eye=12.0):
    """68 points with eyes 24 px wide, `eye` px high, and inner lips 40 px wide, `mouth` px high."""
    points = (CANONICAL_68 * 40 + (80, 56)).astype(np.float32)
    points[36:42], points[42:48] = (EYE * [1, eye / 12] + corner for corner in EYES)
    points[60:68] = LIPS * [1, mouth / 20] + MOUTH
    return points


def eye_mask():
    y, x = np.mgrid[:SIZE, :SIZE]
    mask = np.zeros((SIZE, SIZE), bool)
    for left, top in EYES:
        dx, dy = np.abs(x - left - 12), np.abs(y - top - 6)
        mask |= (dx <= 12) & (dy <= 6) & (dx + dy <= 12)
    return mask


def rgb(grey):
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)


def with_teeth(grey):
    """The same picture with a dark mouth and a bright bar in it."""
    grey = grey.copy()
    grey[105:135, 55:105] = 40
    grey[112:118, 65:95] = 220
    return grey


def named(values):
    return dict(zip(laws.COLUMNS, values, strict=True))


def test_columns_are_nine_energies_of_two_parts():
    assert len(laws.COLUMNS) == 18 and len(set(laws.COLUMNS)) == 18
    assert [name.split("_")[0] for name in laws.COLUMNS] == ["eyes"] * 9 + ["teeth"] * 9


def test_energies_of_a_stripe_pattern_in_closed_form():
    """Period 4 along x: all four vectors answer with gain 4, only L lets the constant direction pass (gain 16).

    The mean of 15 columns of it is -1/15 of the pattern, so that subtracting it leaves 16/15.
    """
    amplitude = 20
    stripes = 100 + amplitude * np.tile([1, 1, -1, -1], SIZE // 4)[None] * np.ones((SIZE, 1))
    found = named(laws.energies(rgb(with_teeth(stripes)), face()))
    expected = amplitude * 16 * 4 * 16 / 15 / 2
    for pair in ("LE", "LS", "LR"):
        assert found[f"eyes_{pair}"] == pytest.approx(expected, rel=1e-4)
    for pair in ("ES", "ER", "SR", "SS", "RR", "EE"):
        assert found[f"eyes_{pair}"] == pytest.approx(0, abs=1e-2)


def test_energies_of_a_checkerboard_in_closed_form():
    """At the highest frequency only R answers, with gain 16 each way; the local mean is 1/225 of the pattern."""
    y, x = np.mgrid[:SIZE, :SIZE]
    found = named(laws.energies(rgb(with_teeth(100 + 20.0 * (-1) ** (x + y))), face()))
    assert found["eyes_RR"] == pytest.approx(20 * 256 * 224 / 225, rel=1e-4)
    for pair in ("LE", "LR", "ES", "LS", "ER", "SR", "SS", "EE"):
        assert found[f"eyes_{pair}"] == pytest.approx(0, abs=1e-2)


def test_energies_match_a_plain_double_precision_computation():
    grey = with_teeth(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE)).astype(float))
    found = named(laws.energies(rgb(grey), face()))
    vectors = {"L": [1, 4, 6, 4, 1], "E": [-1, -2, 0, 2, 1], "S": [-1, 0, 2, 0, -1], "R": [1, -4, 6, -4, 1]}
    flat = grey - ndimage.uniform_filter(grey, 15)
    mask = eye_mask()

    def energy(a, b):
        response = ndimage.convolve(flat, np.outer(vectors[a], vectors[b]).astype(float))
        return ndimage.uniform_filter(np.abs(response), 10)[mask].mean()

    for a, b in ("LE", "LR", "ES", "LS", "ER", "SR", "SS", "RR", "EE"):
        assert found[f"eyes_{a}{b}"] == pytest.approx((energy(a, b) + energy(b, a)) / 2, rel=1e-5)


def test_eight_bit_arithmetic_wraps():
    """Why float32: what the published 8-bit program does to a low-contrast texture (documentation by example)."""
    grey = (100 + np.random.default_rng(0).integers(-2, 3, (64, 64))).astype(np.uint8)
    wrapped = grey - cv2.blur(grey, (15, 15))
    true = grey.astype(np.float32) - cv2.blur(grey.astype(np.float32), (15, 15))
    assert np.abs(true).max() < 4
    assert wrapped.max() > 250  # one level below the mean became 255
    kernel = np.outer([1, 4, 6, 4, 1], [-1, -2, 0, 2, 1]).astype(np.float32)
    in_bytes, in_floats = (cv2.filter2D(picture, -1, kernel)[4:-4, 4:-4] for picture in (wrapped, true))
    assert np.isin(in_bytes, (0, 255)).mean() > 0.95  # saturated; no negative value is left for |.| to turn
    assert in_floats.min() < -20 and in_floats.max() > 20 and not np.isin(in_floats, (0, 255)).any()


def test_teeth_are_the_bright_part_and_have_a_fixed_scale():
    rng = np.random.default_rng(1)
    speckle = cv2.GaussianBlur(rng.normal(0, 60, (SIZE, SIZE)), (0, 0), 1.5)
    rows = np.arange(SIZE)[:, None] * np.ones(SIZE)
    upper = rows < 118
    base = np.where(upper, 200.0, 50.0)  # bright teeth in the upper half of the mouth
    on_teeth = named(laws.energies(rgb(np.clip(base + np.where(upper, speckle, 0), 0, 255)), face()))
    elsewhere = named(laws.energies(rgb(np.clip(base + np.where(rows > 123, speckle, 0), 0, 255)), face()))
    assert on_teeth["teeth_SS"] > 5 * elsewhere["teeth_SS"]
    waves = 40 * np.cos(2 * np.pi * np.arange(SIZE) / 8)  # 40 px a wave at the mouth's fixed size
    image = rgb(cv2.GaussianBlur(base + waves, (0, 0), 1.5))
    doubled = cv2.resize(image, (2 * SIZE, 2 * SIZE), interpolation=cv2.INTER_CUBIC)
    one, two = named(laws.energies(image, face())), named(laws.energies(doubled, 2 * face() + 0.5))
    for pair in ("LE", "LS"):
        assert two[f"teeth_{pair}"] == pytest.approx(one[f"teeth_{pair}"], rel=0.1)
        assert not two[f"eyes_{pair}"] == pytest.approx(one[f"eyes_{pair}"], rel=0.1)


def test_teeth_energies_at_the_fixed_size_in_closed_form():
    """A mouth 400 px wide is halved: stripes of period 8 px then have period 4. Teeth: the bright ones."""
    size = 10 * SIZE
    stripes = 100 + 20 * np.tile([1, 1, 1, 1, -1, -1, -1, -1], size // 8)[None] * np.ones((size, 1))
    found = named(laws.energies(rgb(stripes), 10 * face()))
    for pair in ("LE", "LS", "LR"):
        assert found[f"teeth_{pair}"] == pytest.approx(20 * 16 * 4 * 16 / 15 / 2, rel=1e-4)
    assert found["teeth_EE"] == pytest.approx(0, abs=1e-2)


def test_teeth_threshold_is_the_best_two_means():
    rng = np.random.default_rng(2)
    grey = np.where(rng.random((40, 60)) < 0.3, rng.normal(180, 25, (40, 60)), rng.normal(90, 30, (40, 60)))
    grey = np.rint(np.clip(grey, 0, 255)).astype(np.float32)
    mouth = np.zeros(grey.shape, bool)
    mouth[5:35, 5:55] = True
    model = KMeans(2, n_init=10, random_state=0).fit(grey[mouth][:, None])
    expected = np.zeros_like(mouth)
    expected[mouth] = model.labels_ == np.argmax(model.cluster_centers_)
    assert np.array_equal(laws._teeth(grey, mouth), expected)


@pytest.mark.parametrize(
    ("mouth", "eye", "usable"), [(6.2, 6.2, True), (5.8, 12, False), (20, 5.8, False), (20, 12, True)]
)
def test_gate_asks_for_open_eyes_and_mouth(mouth, eye, usable):
    """Limits: eyes 0.25 x 24 px = 6 px, inner lips 0.15 x 40 px = 6 px."""
    image = rgb(with_teeth(np.random.default_rng(0).integers(80, 120, (SIZE, SIZE)).astype(float)))
    gated = laws.energies(image, face(mouth, eye))
    assert (gated is not None) == usable
    free = laws.energies(image, face(mouth, eye), gate=False)
    assert free.shape == (18,) and free.dtype == np.float32
    assert gated is None or np.array_equal(gated, free)


def test_one_closed_eye_is_enough():
    points = face()
    points[42:48, 1] = 56
    assert laws.openness(points)[:2] == (pytest.approx(0.5), 0)
    assert laws.energies(rgb(with_teeth(np.full((SIZE, SIZE), 90.0))), points) is None


def test_nothing_to_measure():
    image = rgb(np.full((SIZE, SIZE), 90.0))
    assert laws.energies(image, face()) is None  # a mouth of one grey level
    small = face()
    small[36:48] = small[36:48].mean(0)
    assert laws.energies(rgb(with_teeth(image[..., 0].astype(float))), small, gate=False) is None
    spot = image.copy()
    spot[120, 80] = 255  # bright, but not 1 % of the mouth, which has some 700 px
    assert laws.energies(spot, face()) is None
    gone = face()
    gone[60:68] = gone[62]
    assert laws.energies(image, gone, gate=False) is None
    with pytest.raises(ValueError):
        laws.energies(image, face() + np.nan)


def frames(values):
    """Feature table from {item: [value or None per frame]}; every energy of a frame has about the same value."""
    rng = np.random.default_rng(4)
    rows = []
    for item, levels in values.items():
        for frame, level in enumerate(levels):
            energies = np.full(18, np.nan) if level is None else level + rng.normal(0, 0.5, 18)
            rows.append({"item_id": item, "frame": frame, **dict(zip(laws.COLUMNS, energies, strict=True))})
    return pd.DataFrame(rows)


def test_pseudo_labels_are_votes_of_frames():
    values = {"c": [10, 10, 90], "a": [90, 90, None, 90], "b": [None, None], "d": [10, 90], "e": [None, 10]}
    found = laws.pseudo_labels(frames(values), seed=0)
    assert found.to_dict("list") == {
        "item_id": ["a", "b", "c", "d", "e"],
        "label": [1, -1, 0, 0, 0],
        "agreement": [1.0, pytest.approx(np.nan, nan_ok=True), pytest.approx(2 / 3), 0.5, 1.0],
        "frames": [3, 0, 3, 2, 1],
    }
    assert found["label"].dtype == "int8" and found["frames"].dtype == "int32"


def test_pseudo_labels_do_not_depend_on_order_or_outer_randomness():
    rng = np.random.default_rng(5)
    table = frames({f"{i:02d}": list(rng.choice([20, 30, 60], 5)) for i in range(30)})
    state = np.random.get_state()[1].copy()
    found = laws.pseudo_labels(table, seed=3)
    assert np.array_equal(np.random.get_state()[1], state)
    pd.testing.assert_frame_equal(laws.pseudo_labels(table, seed=3), found)
    pd.testing.assert_frame_equal(laws.pseudo_labels(table.sample(frac=1, random_state=1), seed=3), found)


def test_pseudo_labels_without_groups_still_repeat():
    """Where nothing is there to cluster, the outcome depends on the start: the seed must fix it."""
    rng = np.random.default_rng(7)
    table = pd.DataFrame(rng.uniform(0, 1, (60, 18)), columns=laws.COLUMNS).assign(item_id=list(map(str, range(60))))
    for seed in range(3):
        first = laws.pseudo_labels(table, seed)
        for _ in range(3):
            pd.testing.assert_frame_equal(laws.pseudo_labels(table, seed), first)


def test_pseudo_labels_are_not_scaled():
    """As published: the energy with the largest numbers decides, not the one with the clearest groups."""
    rng = np.random.default_rng(6)
    table = frames({str(i): [0] for i in range(40)})
    table[laws.COLUMNS[0]] = np.r_[np.zeros(20), np.ones(20)]
    loud = rng.permutation(np.r_[rng.uniform(0, 400, 20), rng.uniform(600, 1000, 20)])
    table[laws.COLUMNS[1]] = loud
    found = laws.pseudo_labels(table, seed=0).set_index("item_id").loc[[str(i) for i in range(40)]]
    assert (found["label"].to_numpy() == (loud > 500)).all()


def test_pseudo_labels_need_two_frames():
    with pytest.raises(ValueError, match="1 frames"):
        laws.pseudo_labels(frames({"a": [10, None], "b": [None]}), seed=0)
