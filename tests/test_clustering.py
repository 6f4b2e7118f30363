"""Clustering by camera: matrices made from known cameras, metrics by hand, and the real cameras when they are here."""

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from unmask import prnu
from unmask.clustering import METHODS, chance, cluster, neighbours, refine, scores, similarity

EVERY = pytest.mark.parametrize("method", sorted(METHODS))


def symmetric_noise(count, level, rng):
    upper = np.triu(rng.normal(0, level, (count, count)), 1)
    return upper + upper.T


def matrix(truth, inside=0.2, across=0.0, noise=0.01, seed=0):
    """float32[N,N]: `inside` between media of one camera, `across` between cameras, chance on top; -1 = of no other."""
    truth = np.asarray(truth)
    same = (truth[:, None] == truth) & (truth >= 0)
    out = np.where(same, inside, across) + symmetric_noise(len(truth), noise, np.random.default_rng(seed))
    np.fill_diagonal(out, 1)
    return out.astype(np.float32)


def groups(*sizes, seed=0):
    """Labels of groups of the given sizes, in random order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def same_partition(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return len({*zip(a.tolist(), b.tolist(), strict=True)}) == len({*a.tolist()}) == len({*b.tolist()})


# Similarity


def patterns(count=11, shape=(6, 9), seed=0):
    return np.random.default_rng(seed).normal(0, 1, (count, *shape)).astype(np.float32)


@pytest.mark.parametrize(("tile", "depth"), [(1024, 2**16), (4, 10), (5, 54), (1, 1), (11, 53)])
def test_similarity_is_the_cosine_of_every_pair(tile, depth):
    x = patterns()
    before = x.copy()
    got = similarity(x, tile=tile, depth=depth)
    flat = x.reshape(11, -1).astype(float)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    assert got.dtype == np.float32 and got.shape == (11, 11)
    np.testing.assert_allclose(got, unit @ unit.T, atol=1e-6)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(("tile", "depth"), [(1024, 2**16), (4, 10), (3, 54), (1, 1)])
def test_similarity_with_masks_is_over_the_common_pixels(tile, depth):
    x = patterns(seed=1)
    valid = np.random.default_rng(2).random(x.shape) < 0.6
    valid[3] = False  # nothing to say
    valid[4], valid[5] = True, True
    valid[6].flat[:30], valid[6].flat[30:] = True, False
    valid[7].flat[:30], valid[7].flat[30:] = False, True  # no pixel in common with 6
    x *= valid
    got = similarity(x, valid, tile=tile, depth=depth)
    for i in range(11):
        for j in range(11):
            both = valid[i] & valid[j]
            a, b = x[i][both].astype(float), x[j][both].astype(float)
            size = np.sqrt((a @ a) * (b @ b))
            assert got[i, j] == pytest.approx(a @ b / size if size > 0 else 0, abs=1e-6)
    assert (got[3] == 0).all() and got[6, 7] == 0 and np.isfinite(got).all()
    # Fingerprints are a few thousandths of the light: the scale must not matter.
    np.testing.assert_allclose(similarity(x * np.float32(1e-4), valid, tile=tile, depth=depth), got, atol=1e-6)


def test_values_where_a_mask_is_false_do_not_count():
    x, valid = patterns(seed=3), np.random.default_rng(4).random((11, 6, 9)) < 0.6
    np.testing.assert_allclose(similarity(np.where(valid, x, 50), valid), similarity(x * valid, valid), atol=1e-6)


def test_masks_that_are_all_true_change_nothing():
    x = patterns()
    np.testing.assert_allclose(similarity(x, np.ones(x.shape, bool)), similarity(x), atol=1e-6)
    almost = np.ones(x.shape, bool)
    almost[0, 0, 0] = False
    np.testing.assert_allclose(similarity(x, almost)[1:, 1:], similarity(x)[1:, 1:], atol=1e-6)


def test_a_fingerprint_of_zeros_correlates_with_nothing():
    x = patterns()
    x[2] = 0
    got = similarity(x, tile=3)
    assert (got[2] == 0).all() and (got[:, 2] == 0).all() and np.isfinite(got).all()
    np.testing.assert_allclose(got.diagonal()[[0, 1, 3]], 1, atol=1e-6)


def test_similarity_takes_mapped_files_and_other_precisions(tmp_path):
    x = patterns()
    for dtype, tolerance in ((np.float64, 1e-6), (np.float16, 2e-3)):
        np.save(tmp_path / "x.npy", x.astype(dtype))
        got = similarity(np.load(tmp_path / "x.npy", mmap_mode="r"), tile=4, depth=7)
        np.testing.assert_allclose(got, similarity(x), atol=tolerance)


def test_similarity_agrees_with_ncc_on_fingerprints():
    rng = np.random.default_rng(5)
    x = rng.normal(0, 1, (4, 64, 64)).astype(np.float32)
    x -= x.mean((1, 2), keepdims=True)
    assert similarity(x)[0, 3] == pytest.approx(prnu.ncc(x[0], x[3]), abs=1e-6)


@pytest.mark.parametrize("tile", [1024, 4, 1, 11, 10])
def test_neighbours_are_those_of_the_full_matrix(tile):
    x = patterns(seed=6)
    full = similarity(x)
    np.fill_diagonal(full, -np.inf)
    order = np.argsort(-full, 1)[:, :3]
    index, value = neighbours(x, 3, tile=tile)
    np.testing.assert_array_equal(index, order)
    np.testing.assert_allclose(value, np.take_along_axis(full, order, 1), atol=1e-6)


def test_chance_is_measured_on_unrelated_pairs_only():
    truth = groups(20, 20, 20, 20, 20)
    assert chance(matrix(truth, noise=0.013)) == pytest.approx(0.013, rel=0.05)
    exact = np.array([[1, 0.5, -0.3], [0.5, 1, -0.4], [-0.3, -0.4, 1]])
    assert chance(exact) == pytest.approx(np.sqrt((0.09 + 0.16) / 2))
    assert chance(np.ones((4, 4))) == 0 and chance(np.ones((1, 1))) == 0


# Clusters


@EVERY
@pytest.mark.parametrize("sizes", [(20, 20, 20, 20), (40, 15, 6, 3, 2), (30, 30), (3, 3, 3), (5, 4, 3, 2, 2, 2)])
def test_separate_cameras_are_found(method, sizes):
    truth = groups(*sizes)
    labels = cluster(matrix(truth), method)
    assert labels.shape == truth.shape and np.issubdtype(labels.dtype, np.integer)
    assert same_partition(labels, truth)
    counts = np.bincount(labels)  # numbered by size
    assert counts.tolist() == sorted(sizes, reverse=True)


@EVERY
def test_clusters_of_one_size_are_numbered_by_their_first_member(method):
    labels = cluster(matrix([2, 2, 0, 1, 0, 1, 2, 1, 0], noise=0.005), method)
    assert labels.tolist() == [0, 0, 1, 2, 1, 2, 0, 2, 1]


@EVERY
@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_one_camera_is_one_cluster(method, count):
    labels = cluster(matrix(np.zeros(count, int), inside=0.3), method, noise=0.01)
    assert (labels == 0).all()


@EVERY
@pytest.mark.parametrize("count", [3, 40])
def test_one_camera_is_one_cluster_when_chance_cannot_be_measured(method, count):
    assert (cluster(matrix(np.zeros(count, int), inside=0.3), method) == 0).all()


@EVERY
@pytest.mark.parametrize("count", [2, 3, 10, 80])
def test_unrelated_media_are_unattributed(method, count):
    assert (cluster(matrix(np.full(count, -1)), method, noise=0.01) == -1).all()
    if count >= 10:  # too few pairs say little about chance
        assert (cluster(matrix(np.full(count, -1)), method) == -1).all()


@EVERY
def test_matrices_of_no_and_one_medium(method):
    assert cluster(np.empty((0, 0)), method).shape == (0,)
    assert cluster(np.ones((1, 1)), method).tolist() == [-1]
    assert cluster(np.eye(2), method, noise=0.01).tolist() == [-1, -1]
    assert cluster(np.eye(3), method, noise=0.01).tolist() == [-1, -1, -1]
    assert cluster(np.eye(5), method).tolist() == [-1] * 5


@EVERY
def test_media_of_no_camera_are_left_out(method):
    truth = np.array([0] * 12 + [1] * 8 + [-1] * 6)[np.random.default_rng(3).permutation(26)]
    labels = cluster(matrix(truth), method)
    assert (labels[truth == -1] == -1).all()
    assert same_partition(labels[truth >= 0], truth[truth >= 0])


@EVERY
@pytest.mark.parametrize("forms", [(4, 4, 4, 4), (6, 3, 2)])
def test_cameras_are_found_where_recordings_stand_out(method, forms):
    """Cuts of one recording agree at 0.8, media of one camera at 0.15: the camera is what counts."""
    camera = np.repeat(np.arange(len(forms)), [3 * n for n in forms])
    recording = np.repeat(np.arange(sum(forms)), 3)
    order = np.random.default_rng(1).permutation(len(camera))
    camera, recording = camera[order], recording[order]
    s = matrix(camera, inside=0.15)
    s[(recording[:, None] == recording) & ~np.eye(len(camera), dtype=bool)] += 0.65
    assert same_partition(cluster(s, method), camera)


@EVERY
def test_recordings_of_unlike_cameras_stay_apart(method):
    recording = groups(4, 4, 3, 3)
    assert same_partition(cluster(matrix(recording, inside=0.8), method), recording)
    # Nor does a weak pattern of their model, 5 %, join them, however certain it is.
    assert same_partition(cluster(matrix(recording, inside=0.8, across=0.04, noise=0.005), method), recording)


@EVERY
@pytest.mark.parametrize("others", [0, 2])
def test_a_weak_common_pattern_does_not_merge_two_cameras(method, others):
    """Cameras of one model share a few per cent of what media of one camera share; over 30 media that is certain."""
    truth = groups(*[30] * (2 + others))
    s = matrix(truth, noise=0.002)
    pair = (truth[:, None] < 2) & (truth < 2) & (truth[:, None] != truth)
    s[pair] += 0.03 * 0.2
    assert same_partition(cluster(s, method), truth)


@EVERY
def test_two_halves_of_one_camera_are_one(method):
    """A model's weak pattern is no bridge, but media of one camera under two settings, at 60 %, are one camera."""
    truth = groups(15, 15, 15, 15)
    s = matrix(truth // 2, inside=0.12)
    s[(truth[:, None] == truth) & ~np.eye(60, dtype=bool)] += 0.08
    assert same_partition(cluster(s, method), truth // 2)


@EVERY
def test_the_order_of_media_does_not_matter(method):
    truth = np.array([0] * 14 + [1] * 9 + [2] * 5 + [-1] * 3)
    s = matrix(truth)
    labels = cluster(s, method)
    order = np.random.default_rng(7).permutation(len(truth))
    assert same_partition(cluster(s[np.ix_(order, order)], method), labels[order])


@EVERY
def test_the_same_seed_gives_the_same_labels(method):
    s = matrix(groups(9, 8, 7, 3), inside=0.04)
    np.testing.assert_array_equal(cluster(s, method, seed=5), cluster(s, method, seed=5))


@EVERY
def test_clusters_do_not_depend_on_the_seed_or_precision_where_they_are_clear(method):
    truth = groups(12, 9, 7, 3)
    s = matrix(truth)
    for seed in range(3):
        assert same_partition(cluster(s.astype(np.float64), method, seed=seed), truth)


@EVERY
def test_entries_that_are_not_finite_count_as_nothing(method):
    truth = groups(12, 10, 8)
    s = matrix(truth)
    rng = np.random.default_rng(8)
    for value in (np.nan, np.inf, -np.inf):
        i, j = rng.integers(0, 30, (2, 8))
        s[i, j] = s[j, i] = value
    s[4, :] = s[:, 4] = np.nan  # a medium without any fingerprint
    labels = cluster(s, method)
    rest = np.arange(30) != 4
    assert labels[4] == -1 and same_partition(labels[rest], truth[rest])


@EVERY
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_matrix_without_a_finite_entry(method, value):
    assert cluster(np.full((6, 6), value), method).tolist() == [-1] * 6


@EVERY
def test_the_matrix_is_left_alone(method):
    s = matrix(groups(10, 8, 5))
    np.fill_diagonal(s, 0.7)
    before = s.copy()
    cluster(s, method)
    np.testing.assert_array_equal(s, before)
    s.setflags(write=False)
    cluster(s, method)


def test_what_is_not_a_square_matrix_or_a_method_is_refused():
    for wrong in (np.ones((3, 4)), np.ones(4), np.ones((2, 2, 2)), []):
        with pytest.raises(ValueError):
            cluster(wrong)
    with pytest.raises(ValueError, match="linkage"):
        cluster(np.eye(4), "dbscan")


# Refinement by itself


def test_refining_merges_what_was_split_and_drops_what_does_not_belong():
    truth = np.array([0] * 12 + [1] * 8 + [-1] * 4)
    s = matrix(truth)
    start = np.concatenate([np.arange(12) // 4, 3 + np.arange(8) // 2, [0, 1, 3, 5]])
    labels = refine(s.copy(), start, 0.01)
    assert labels.tolist() == truth.tolist()


def test_refining_moves_a_medium_to_its_camera():
    truth = np.array([0] * 20 + [1] * 15)
    start = truth.copy()
    start[[0, 22]] = 1, 0
    assert refine(matrix(truth), start, 0.01).tolist() == truth.tolist()


def test_refining_leaves_its_inputs_alone():
    truth = groups(6, 5)
    s, start = matrix(truth), truth.copy()
    np.fill_diagonal(s, 0.7)
    before = s.copy()
    refine(s, start, 0.01)
    np.testing.assert_array_equal(start, truth)
    np.testing.assert_array_equal(s, before)


# Scores


def test_scores_by_hand():
    """Pairs of one camera: 4; of one cluster: 4; of both: 2; all: 15. The unattributed `c` is alone in both."""
    got = scores(["a", "a", "a", "b", "b", "c"], np.array([0, 0, 1, 1, 1, -1]))
    assert got["precision"] == got["recall"] == got["f1"] == 0.5
    assert got["ari"] == pytest.approx((2 - 4 * 4 / 15) / (4 - 4 * 4 / 15))
    assert got["purity"] == pytest.approx((2 + 2 + 1) / 6)
    assert (got["clusters"], got["cameras"]) == (2, 3) and got["unattributed"] == pytest.approx(1 / 6)
    # H(camera) and H(cluster) are alike; I = 2 H - H(both), whose cells are 2, 1, 2, 1 of 6.
    entropy = -(3 / 6 * np.log(3 / 6) + 2 / 6 * np.log(2 / 6) + 1 / 6 * np.log(1 / 6))
    both = -(2 * 2 / 6 * np.log(2 / 6) + 2 * 1 / 6 * np.log(1 / 6))
    assert got["nmi"] == pytest.approx((2 * entropy - both) / entropy)


def test_unequal_precision_and_recall():
    """One cluster of all: every pair of a camera is found, 4 + 1 of 10 pairs are right... and the other way round."""
    lumped = scores(["a", "a", "a", "b", "b"], np.zeros(5, int))
    assert lumped["recall"] == 1 and lumped["precision"] == pytest.approx(4 / 10)
    assert lumped["purity"] == pytest.approx(3 / 5) and lumped["ari"] == 0
    assert lumped["f1"] == pytest.approx(2 * 0.4 / 1.4)
    split = scores(["a"] * 4, np.array([0, 0, 1, 1]))
    assert split["precision"] == 1 and split["recall"] == pytest.approx(2 / 6) and split["purity"] == 1


def test_every_unattributed_medium_is_a_cluster_of_its_own():
    truth = ["a", "a", "b", "b", "b"]
    got = scores(truth, np.array([-1, -1, 0, 0, -1]))
    alone = np.array([10, 11, 0, 0, 12])
    assert got["ari"] == pytest.approx(adjusted_rand_score(truth, alone))
    assert got["nmi"] == pytest.approx(normalized_mutual_info_score(truth, alone))
    assert got["precision"] == 1 and got["recall"] == pytest.approx(1 / 4) and got["purity"] == 1
    assert got["clusters"] == 1 and got["unattributed"] == pytest.approx(3 / 5)
    nobody = scores(truth, np.full(5, -1))
    assert nobody["precision"] == nobody["recall"] == nobody["f1"] == nobody["clusters"] == 0
    assert nobody["ari"] == 0 and nobody["unattributed"] == 1


def test_scores_equal_sklearn_and_do_not_depend_on_names():
    rng = np.random.default_rng(9)
    truth, labels = rng.integers(0, 5, 60), rng.integers(0, 4, 60)
    got = scores(truth, labels)
    assert got["ari"] == pytest.approx(adjusted_rand_score(truth, labels))
    assert got["nmi"] == pytest.approx(normalized_mutual_info_score(truth, labels))
    renamed = scores([f"camera {9 - t}" for t in truth], 3 - labels)
    assert renamed == pytest.approx(got)
    perfect = scores(truth, truth)
    assert all(perfect[key] == pytest.approx(1) for key in ("ari", "nmi", "purity", "precision", "recall", "f1"))


# Real cameras


@pytest.fixture(scope="module")
def flats(shared_data):
    """Residuals float32[N,512,512] of the sensor's centre, frame sizes and devices of the real flat fields."""
    folder = shared_data / "cameras"
    if not (folder / "cameras.csv").is_file():
        pytest.skip("pictures of real cameras (../shared/data/cameras) are not here")
    table = pd.read_csv(folder / "cameras.csv").query("kind == 'flat'")
    residuals, sizes = [], []
    for path in table.path:
        picture = cv2.imread(str(folder / path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        height, width = picture.shape[:2]
        top, left = (height - 512) // 2, (width - 512) // 2
        crop = cv2.cvtColor(picture[top : top + 512, left : left + 512], cv2.COLOR_BGR2RGB)
        residuals.append(prnu.noise_residual(crop))
        sizes.append(f"{height}x{width}")
    return np.stack(residuals), np.array(sizes), table.device.to_numpy()


@EVERY
def test_real_cameras_are_told_apart(flats, method):
    residuals, sizes, devices = flats
    assert len(set(sizes)) == 2 and len(set(devices)) == 3
    labels = np.full(len(devices), -1)
    for size in np.unique(sizes):
        here = sizes == size
        found = cluster(similarity(residuals[here]), method)
        assert adjusted_rand_score(devices[here], found) >= 0.95
        labels[here] = np.where(found < 0, -1, found + labels.max() + 1)
    got = scores(devices, labels)
    assert got["ari"] >= 0.95 and got["clusters"] == got["cameras"] == 3 and got["precision"] == 1


def test_real_cameras_lose_their_pattern_when_pictures_are_displaced(flats):
    """The pattern belongs to the pixel: two pixels away little of it is left, while the scene would hardly notice."""
    residuals, _, devices = flats
    for device in np.unique(devices):
        chosen = residuals[devices == device][:4]
        aligned, displaced = (
            [prnu.ncc(chosen[i], np.roll(chosen[j], shift, (0, 1))) for i in range(4) for j in range(i)]
            for shift in ((0, 0), (2, 3))
        )
        assert np.min(aligned) > 6 / 512 and abs(np.mean(displaced)) < np.mean(aligned) / 4
