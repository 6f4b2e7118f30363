"""Rates, thresholds and calibration against scikit-learn, plain loops and cases made by hand."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from unmask.metrics import (
    balanced_threshold,
    calibration_error,
    equal_error_rate,
    partial_auc,
    recalls,
    reliability,
    tpr_at_fpr,
)


@pytest.mark.parametrize("max_fpr", [0.05, 0.1, 0.33, 1.0])
def test_the_partial_auc_is_that_of_scikit_learn_and_of_an_area_by_hand(max_fpr):
    rng = np.random.default_rng(2)
    for digits in (1, 8):
        labels = rng.permutation(np.r_[0, 1, rng.integers(0, 2, 70)])
        scores = (rng.random(72) + 0.4 * labels).round(digits)
        expected = roc_auc_score(labels, scores, max_fpr=None if max_fpr == 1 else max_fpr)
        assert partial_auc(labels, scores, max_fpr) == pytest.approx(expected)
    # Four reals, two fakes: the curve is (0, 1/2), then along to (1/4, 1/2), up to 1. Up to 0.1 the area is 0.05.
    found = partial_auc([1, 0, 1, 0, 0, 0], [6, 5, 4, 3, 2, 1], 0.1)
    assert found == pytest.approx(0.5 * (1 + (0.05 - 0.005) / (0.1 - 0.005)))
    assert partial_auc([0, 1], [0.2, 0.7]) == 1 and np.isnan(partial_auc([1, 1], [0.2, 0.7]))


def test_fakes_found_at_few_false_alarms_are_counted_and_not_interpolated():
    rng = np.random.default_rng(3)
    for digits in (1, 2, 8):
        labels = np.r_[np.zeros(100, int), np.ones(40, int)]
        scores = (rng.normal(size=140) + 1.5 * labels).round(digits)
        for fpr in (0, 0.01, 0.1, 1):
            found = [0.0]
            for t in np.unique(scores):
                if np.mean(scores[:100] >= t) <= fpr:
                    found.append(np.mean(scores[100:] >= t))
            assert tpr_at_fpr(labels, scores, fpr) == max(found)
    assert tpr_at_fpr([0, 1, 1], [0.5, 0.5, 0.9]) == 0.5 and tpr_at_fpr([0, 1], [0.9, 0.1]) == 0
    assert np.isnan(tpr_at_fpr([0, 0], [0.1, 0.2]))


def test_equal_error_rate_on_constructed_cases():
    assert equal_error_rate([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]) == 0
    assert equal_error_rate([0, 0, 1, 1], [0.8, 0.9, 0.1, 0.2]) == 1
    assert equal_error_rate([0, 1], [0.5, 0.5]) == pytest.approx(0.5)
    # One of four reals above the threshold and one of four fakes below it.
    assert equal_error_rate([0, 0, 0, 0, 1, 1, 1, 1], [1, 2, 3, 6, 4, 7, 8, 9]) == pytest.approx(0.25)
    # Two reals, three fakes: (0, 1/3) and (1/2, 1/3) are on the curve, and the diagonal is met at 1/3 in between.
    assert equal_error_rate([0, 0, 1, 1, 1], [1, 4, 3, 5, 6]) == pytest.approx(1 / 3)


def test_the_threshold_has_the_best_balanced_accuracy():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 50)
    scores = (rng.random(50) + 0.4 * labels).round(1)
    best = balanced_threshold(labels, scores)
    every = [balanced_accuracy_score(labels, scores >= t) for t in np.unique(scores)]
    assert (
        balanced_accuracy_score(labels, scores >= best)
        == max(every)
        == pytest.approx(np.mean(recalls(labels, scores, best)))
    )
    assert np.isnan(balanced_threshold([1, 1], [0.2, 0.3]))
    assert np.isnan(recalls([0, 1], [0.2, 0.3], float("nan"))).all(), "no threshold is not a threshold of infinity"


@pytest.mark.parametrize("bins", [1, 4, 10, 100])
def test_calibration_is_that_of_a_plain_loop_over_the_parts(bins):
    rng = np.random.default_rng(bins)
    scores = np.r_[rng.random(60) ** 2, 0, 1, 0.3, 0.29]  # the last ones lie on edges
    labels = (rng.random(64) < scores**2).astype(int)
    rows, error = [], 0
    for k in range(bins):
        low, high = k / bins, (k + 1) / bins
        own = [i for i, s in enumerate(scores) if low <= s < high or (s == 1 and k == bins - 1)]
        if own:
            mean, share = sum(scores[own]) / len(own), sum(labels[own]) / len(own)
            rows.append((low, high, mean, share, len(own)))
            error += abs(mean - share) * len(own) / 64
    table = reliability(labels, scores, bins)
    assert list(table.columns) == ["low", "high", "score", "fakes", "n"] and table["n"].sum() == 64
    np.testing.assert_allclose(table.to_numpy(float), rows, rtol=0, atol=1e-12)
    assert calibration_error(labels, scores, bins) == pytest.approx(error, abs=1e-12)
    assert calibration_error(1 - labels, 1 - scores, 1) == pytest.approx(calibration_error(labels, scores, 1))


def test_the_calibration_of_plain_cases():
    always = np.array([0, 0, 1, 1])
    assert calibration_error(always, always.astype(float)) == 0, "certain and right"
    assert calibration_error(1 - always, always.astype(float)) == 1, "certain and wrong"
    assert calibration_error(always, np.full(4, 0.5)) == 0, "half are fake, as it says"
    assert calibration_error(always, [0.1, 0.3, 0.9, 0.7]) == pytest.approx((0.1 + 0.3 + 0.1 + 0.3) / 4)
    assert reliability([0, 1], [0.05, 0.95]).loc[:, ["low", "high"]].to_numpy().tolist() == [[0, 0.1], [0.9, 1]]
    assert np.isnan(calibration_error([], []))
    for scores in ([0.2, 1.5], [-0.1, 0.2], [np.nan, 0.2]):
        with pytest.raises(ValueError, match="not all probabilities"):
            reliability([0, 1], scores)
