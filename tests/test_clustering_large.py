"""Two-stage clustering against made cameras; merging, attraction and reduction against figures worked out by hand."""

import numpy as np
import pytest
import torch

from unmask import clustering, clustering_large
from unmask.clustering_large import _Cameras, cluster_large, merged, sketch

VALUES = 2048


def fingerprints(sizes, alone=0, correlation=0.15, values=VALUES, seed=0):
    """Noise plus the pattern of a camera, so that two of one camera correlate as told; and the true cameras."""
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), len(sizes) + np.arange(alone)])
    truth = rng.permutation(truth)
    cameras = np.zeros((len(sizes) + alone, values), np.float32)
    cameras[: len(sizes)] = rng.standard_normal((len(sizes), values))
    share = np.sqrt(correlation / (1 - correlation))
    return (rng.standard_normal((len(truth), values)) + share * cameras[truth]).astype(np.float32), truth


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


SIZES = (400, 280, 190, 130, 90, 70, 55, 45, 35, 25, 18, 12)


@pytest.fixture(scope="module")
def made():
    return fingerprints(SIZES, alone=150)


@pytest.fixture(scope="module")
def labels(made):
    return cluster_large(made[0], chunk=300)


class TestUnequalCameras:
    """1500 media: 12 cameras of 12 to 400, and 150 media of no camera; subsets of 300."""

    def test_cameras_are_found_and_numbered_by_size(self, made, labels):
        _, truth = made
        assert sorted(set(labels)) == list(range(-1, len(SIZES)))
        for k in range(len(SIZES)):
            assert (labels[truth == k] == k).mean() > 0.98

    def test_media_of_no_camera_stay_out(self, made, labels):
        assert (labels[made[1] >= len(SIZES)] == -1).mean() > 0.98

    def test_agrees_with_one_matrix(self, made, labels):
        whole = clustering.cluster(clustering.similarity(made[0]))
        assert (whole == labels).mean() > 0.98

    def test_a_half_precision_file_gives_the_same_every_time(self, made, labels, tmp_path):
        file = np.memmap(tmp_path / "patterns", np.float16, "w+", shape=(1500, 32, 64))
        file[:] = made[0].reshape(file.shape)
        first = cluster_large(file, chunk=300)
        np.testing.assert_array_equal(first, cluster_large(file, chunk=300))
        assert (first == labels).mean() > 0.995

    def test_another_order_of_subsets_finds_the_same(self, made, labels):
        assert (labels == cluster_large(made[0], chunk=300, seed=1)).mean() > 0.98

    def test_small_cameras_gather_in_the_last_subset(self, made, labels, monkeypatch):
        monkeypatch.setattr(clustering_large, "_linked", lambda cameras, left, *_: left[:0])  # no search for pairs
        assert set(cluster_large(made[0], chunk=300)) == set(labels)

    def test_reads_bands(self, made, labels, monkeypatch):
        most = []

        class Watched(np.ndarray):
            def __getitem__(self, key):
                part = super().__getitem__(key)
                most.append(part.size)
                return part

        monkeypatch.setattr(clustering_large, "BAND_VALUES", 50 * VALUES)
        found = cluster_large(made[0].view(Watched), chunk=300)
        assert 20 * VALUES < max(most) <= 50 * VALUES
        assert (labels == found).mean() > 0.98


def test_weak_media_come_to_cameras_that_grew_later():
    """Whoever found no camera in its subset is asked again: 6 standard deviations (and 5 % more) from all cameras."""
    patterns, _ = fingerprints(SIZES, alone=150, correlation=0.04)
    labels = cluster_large(patterns, chunk=200)
    x = unit(patterns)
    cameras = unit(np.stack([x[labels == k].sum(0) for k in range(labels.max() + 1)]))
    assert len(cameras) >= 8
    z = (x[labels == -1] @ cameras.T).max(1) * np.sqrt(VALUES)
    assert (z > 6.3).sum() <= 2


def test_up_to_a_chunk_is_one_matrix():
    patterns, _ = fingerprints([9, 7, 5], alone=4)
    expected = clustering.cluster(clustering.similarity(patterns))
    np.testing.assert_array_equal(cluster_large(patterns, chunk=25), expected)


def test_more_cameras_than_a_subset_shows():
    """200 cameras of 4, 60 at a time: a subset holds hardly three of one, so pairs must bring them together."""
    patterns, truth = fingerprints([4] * 200, correlation=0.25)
    scores = clustering.scores(truth, cluster_large(patterns, chunk=60, compressed=1024))
    assert scores["recall"] > 0.9 and scores["precision"] > 0.95


def test_nothing_in_common_is_unattributed():
    patterns, _ = fingerprints([], alone=400)
    assert (cluster_large(patterns, chunk=100) == -1).mean() > 0.99


def test_broken_fingerprints_are_unattributed():
    patterns, truth = fingerprints([60, 60])
    patterns[3], patterns[70, 5] = 0, np.nan
    parts = clustering_large._unit(patterns, np.array([3, 70, 71]), "cpu").numpy()
    np.testing.assert_allclose(np.linalg.norm(parts, axis=1), [0, 0, 1], rtol=1e-5)
    labels = cluster_large(patterns, chunk=50)
    assert labels[3] == labels[70] == -1
    whole = np.delete(np.arange(120), [3, 70])
    assert clustering.scores(truth[whole], labels[whole])["ari"] == 1


@pytest.mark.parametrize("wrong", [{"patterns": np.zeros(8)}, {"chunk": 2}, {"compressed": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError):
        cluster_large(**{"patterns": np.zeros((8, 64)), "chunk": 4, "compressed": 16} | wrong)


def test_an_item_moves_to_its_camera_and_the_sums_follow():
    patterns, truth = fingerprints([12, 10], alone=1)
    wrong = np.flatnonzero(truth == 0)[0]
    labels = np.where(truth == 2, 0, truth)  # the one of no camera sits in camera 0
    labels[wrong] = 1
    cameras = _Cameras(patterns, VALUES**-0.5, 0, "cpu")
    cameras.labels[:] = labels
    sums = np.stack([unit(patterns)[labels == k].sum(0) for k in (0, 1)])
    cameras.sums, cameras.size = torch.from_numpy(sums), np.array([12.0, 11.0])
    rows = np.random.default_rng(0).permutation(23)
    np.testing.assert_array_equal(cameras.attract(rows), np.flatnonzero(truth == 2))
    np.testing.assert_array_equal(cameras.labels, np.where(truth == 2, -1, truth))
    np.testing.assert_array_equal(cameras.size, [12, 10])
    expected = np.stack([unit(patterns)[truth == k].sum(0) for k in (0, 1)])
    np.testing.assert_allclose(cameras.sums.numpy(), expected, atol=1e-5)


def test_an_item_is_compared_with_its_cluster_without_itself():
    """Two at correlation 0.65 and noise 0.1: 6.5 for each other, where their sum of length sqrt(3.3) would say 3.6."""
    patterns = np.zeros((2, 16), np.float32)
    patterns[:, :2] = [[1, 0], [0.65, np.sqrt(1 - 0.65**2)]]
    cameras = _Cameras(patterns, 0.1, 0, "cpu")
    cameras.labels[:], cameras.sums, cameras.size = 0, torch.from_numpy(patterns.sum(0, keepdims=True)), np.array([2.0])
    assert len(cameras.attract(np.arange(2))) == 0


def test_what_is_found_joins_what_is_known():
    """Camera 0 is known from 12 of its media; 8 others of it, three of them one recording, turn up with camera 1."""
    patterns, truth = fingerprints([20, 6], correlation=0.3)
    mine = np.flatnonzero(truth == 0)
    rng = np.random.default_rng(1)
    patterns[mine[-2:]] = patterns[mine[-3]] + 0.2 * rng.standard_normal((2, VALUES))
    cameras = _Cameras(patterns, VALUES**-0.5, 0, "cpu")
    cameras.discover(mine[:12])
    cameras.discover(np.setdiff1d(np.arange(26), mine[:12]))
    assert len(cameras.sums) == 2
    np.testing.assert_array_equal(cameras.labels, truth)
    expected = np.stack([unit(patterns)[truth == k].sum(0) for k in (0, 1)])
    np.testing.assert_allclose(cameras.sums.numpy(), expected, atol=1e-5)
    # Both ways: all pairs inside, but the three of the one recording.
    np.testing.assert_array_equal(cameras.pairs, [20 * 19 - 6, 6 * 5])
    same = np.isin(np.arange(26), mine[-3:])
    within = (unit(patterns) @ unit(patterns).T) * ~np.eye(26, dtype=bool) * ~np.outer(same, same)
    np.testing.assert_allclose(
        cameras.inside, [within[np.ix_(truth == k, truth == k)].sum() for k in (0, 1)], rtol=1e-4
    )


def inner_products(size, within, between):
    """Inner products of sums of unit vectors whose correlations are known."""
    total = np.outer(size, size) * np.asarray(between, float)
    np.fill_diagonal(total, size + size * (size - 1) * within)
    return total


class TestMerging:
    """Sums of `size` unit fingerprints; noise 0.01."""

    SIZE = np.array([10.0, 20.0, 30.0])
    PAIRS = SIZE * (SIZE - 1)

    def run(self, within, between, known=(True, True, True)):
        within, pairs = np.asarray(within), self.PAIRS * np.asarray(known)
        return merged(inner_products(self.SIZE, within, between), self.SIZE, within * pairs, pairs, 0.01)

    def test_halves_of_a_camera_merge_and_another_of_its_model_does_not(self):
        """0.08 inside and between; to the third 0.01: z = 10 * 30 * 0.01 / sqrt(17.2 * 99.6) / 0.01 = 7.2, but 0.01 is
        an eighth of 0.08."""
        into, inside, pairs = self.run([0.08] * 3, [[0, 0.08, 0.01], [0.08, 0, 0.01], [0.01, 0.01, 0]])
        assert into[0] == into[1] != into[2]
        assert pairs[into[0]] == 30 * 29
        assert inside[into[0]] == pytest.approx(0.08 * 30 * 29)

    def test_what_may_be_chance_does_not_merge(self):
        """Mean 0.005: 10 * 20 * 0.005 / sqrt((10 + 90 * 0.01) * (20 + 380 * 0.01)) / 0.01 = 6.2. Mean 0.004: 5.0."""
        for agreement, merges in ((0.005, True), (0.004, False)):
            into, _, _ = self.run([0.01, 0.01, 0], [[0, agreement, 0], [agreement, 0, 0], [0, 0, 0]])
            assert (into[0] == into[1]) == merges

    def test_one_recording_says_nothing_of_its_camera(self):
        """The first is all one recording, 0.9 inside: 0.05 is over a tenth of sqrt(0.9 * 0.1), but under a quarter."""
        between = [[0, 0.05, 0], [0.05, 0, 0], [0, 0, 0]]
        into, inside, pairs = self.run([0.9, 0.1, 0], between, known=(False, True, True))
        assert into[0] == into[1]
        assert pairs[into[0]] == 20 * 19 + 2 * 10 * 20
        assert inside[into[0]] == pytest.approx(0.1 * 20 * 19 + 0.05 * 2 * 10 * 20)
        into, _, _ = self.run([0.9, 0.1, 0], [[0, 0.025, 0], [0.025, 0, 0], [0, 0, 0]], known=(False, True, True))
        assert into[0] != into[1]

    def test_nothing(self):
        into, _, _ = merged(np.zeros((0, 0)), np.zeros(0), np.zeros(0), np.zeros(0), 0.01)
        assert len(into) == 0


class TestSketch:
    def test_by_hand(self):
        signs = torch.tensor([1.0, -1, 1, 1, -1])
        reduced = sketch(torch.tensor([[1.0, 2, 3, 4, 5]]), signs, 2)  # 1 + 3 - 5 and -2 + 4
        assert reduced.tolist() == [[-1.0, 2.0]]

    def test_keeps_correlations_up_to_their_scatter(self):
        patterns, _ = fingerprints([60], correlation=0.3, values=4096)
        x = torch.from_numpy(unit(patterns))
        signs = torch.from_numpy(np.random.default_rng(1).choice([-1.0, 1.0], 4096).astype(np.float32))
        small = sketch(x, signs, 256)
        off = np.triu_indices(60, 1)
        error = (small @ small.T - x @ x.T).numpy()[off]
        assert abs(error.mean()) < 0.02
        assert error.std() == pytest.approx(1 / 16, rel=0.2)
