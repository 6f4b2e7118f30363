"""Intervals and tests of AUCs: against loops over all pairs, and on 500 made data sets each with a known truth."""

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from unmask import evaluation, intervals
from unmask.intervals import auc_difference, auc_interval, delong, holm, paired_p

SETS = 500


def wins(labels, scores):
    """A table of all pairs: 1 where the fake (row) has more than the real (column), 0.5 where they tie."""
    fakes, reals = scores[labels == 1], scores[labels == 0]
    return np.array([[1.0 if f > r else 0.5 if f == r else 0.0 for r in reals] for f in fakes])


def clustered(labels, tables, groups):
    """Mean AUC and Obuchowski's variance by loops over groups; tables: of `wins`, for each seed (negative: minus)."""
    table = np.sum(tables, axis=0)
    value = table.mean()
    fake_groups, real_groups = groups[labels == 1], groups[labels == 0]
    names = sorted(set(groups))
    fakes = [sum(row.mean() - value for row, g in zip(table, fake_groups, strict=True) if g == n) for n in names]
    reals = [sum(col.mean() - value for col, g in zip(table.T, real_groups, strict=True) if g == n) for n in names]
    a, b, g = len(set(fake_groups)), len(set(real_groups)), len(names)
    m, n = table.shape
    own = [a / max(a - 1, 0.5) * np.dot(fakes, fakes) / m**2, b / max(b - 1, 0.5) * np.dot(reals, reals) / n**2]
    both = 2 * g / max(g - 1, 0.5) * np.dot(fakes, reals) / (m * n)
    freedom = sum(own) ** 2 / (own[0] ** 2 / (a - 1) + own[1] ** 2 / (b - 1)) if min(a, b) > 1 and sum(own) else None
    return value, max(sum(own) + both, 0), freedom and min(max(freedom, 1), g - 1)


def redrawn(labels, columns, groups, signs, draws, seed):
    """(value, variance) of every draw of whole groups, each copy a group of its own; in the order of the module."""
    names, rng = sorted(set(groups)), np.random.default_rng(seed)
    chance = np.full(len(names), 1 / len(names))
    sizes = [200] * (draws // 200) + [draws % 200] * (draws % 200 > 0)
    for count in np.concatenate([rng.multinomial(len(names), chance, size=size) for size in sizes]):
        rows = [(i, (g, copy)) for g, k in zip(names, count, strict=True) for copy in range(k)
                for i in np.flatnonzero(groups == g)]  # fmt: skip
        index = np.array([i for i, _ in rows])
        copies = np.array([f"{g}-{copy}" for _, (g, copy) in rows])
        if len(set(labels[index])) == 2:
            tables = [sign * wins(labels[index], column[index]) for sign, column in zip(signs, columns, strict=True)]
            yield clustered(labels[index], tables, copies)[:2]


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_interval_is_that_of_a_plain_bootstrap_t(seeds):
    rng = np.random.default_rng(1)
    labels, groups = rng.integers(0, 2, 40), rng.integers(0, 9, 40).astype(str)
    if seeds == 2:
        labels = np.isin(groups, list("123")).astype(int)  # fakes in three groups, of their own
    scores = (rng.random((40, seeds)) + 0.25 * labels[:, None]).round(1)
    columns, signs = scores.T, [1 / seeds] * seeds
    value, variance, freedom = clustered(
        labels, [s * wins(labels, c) for s, c in zip(signs, columns, strict=True)], groups
    )
    odds, slope = np.log(value / (1 - value)), value * (1 - value)
    pivots = [(np.log(v / (1 - v)) - odds) / (np.sqrt(w) / (v * (1 - v)))
              for v, w in redrawn(labels, columns, groups, signs, 230, 7)]  # fmt: skip
    low, high = np.quantile(pivots, [0.05, 0.95])
    least = student.ppf(0.95, freedom)
    reach = np.array([-(high + least), least - low]) / 2 * np.sqrt(variance) / slope
    ends = odds + reach
    found = auc_interval(labels, scores, groups, level=0.9, draws=230, seed=7)
    assert found[0] == pytest.approx(np.mean([roc_auc_score(labels, c) for c in columns]))
    assert found == pytest.approx((value, *(1 / (1 + np.exp(-ends)))))


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_difference_is_that_of_a_plain_paired_bootstrap_t(seeds):
    rng = np.random.default_rng(4)
    labels, groups = np.tile([0, 1], 24), np.repeat(list("abcdefghijkl"), 4)
    if seeds == 2:
        groups = np.repeat(list("abc"), 16)  # some draws have one group alone, and no variance
    hard = rng.normal(size=(48, 1))
    one, other = (np.round(hard + 0.3 * rng.normal(size=(48, seeds)) + labels[:, None] * g, 1) for g in (1.0, 0.6))
    columns, signs = [*one.T, *other.T], [1 / seeds] * seeds + [-1 / seeds] * seeds
    value, variance, freedom = clustered(
        labels, [s * wins(labels, c) for s, c in zip(signs, columns, strict=True)], groups
    )
    pivots = [abs(v - value) / max(np.sqrt(w), 0.25 * np.sqrt(variance))
              for v, w in redrawn(labels, columns, groups, signs, 230, 7)]  # fmt: skip
    reach = np.quantile(pivots, 0.9) * np.sqrt(variance)
    given = (one[:, 0], other[:, 0]) if seeds == 1 else (one, other)
    found = auc_difference(labels, *given, groups, level=0.9, draws=230, seed=7)
    assert found == pytest.approx((value, value - reach, value + reach))
    _, low, high = auc_interval(labels, given[0], groups, level=0.9, draws=230, seed=7)
    assert found[2] - found[1] < high - low, "what is hard for both cancels"
    p = 2 * student.sf(abs(value) / np.sqrt(variance), freedom)
    assert paired_p(labels, *given, groups) == pytest.approx(p)


def test_the_auc_is_that_of_scikit_learn_ties_included():
    rng = np.random.default_rng(0)
    for digits in (1, 2, 8):
        for _ in range(10):
            labels = rng.permutation(np.r_[0, 1, rng.integers(0, 2, 30)])
            scores = rng.random(32).round(digits)
            assert auc_interval(labels, scores, np.arange(32), draws=2)[0] == pytest.approx(
                roc_auc_score(labels, scores)
            )


def test_a_missing_class_or_a_single_group_has_no_interval():
    assert np.isnan(auc_interval([1, 1], [0.1, 0.2], ["a", "b"])).all()
    assert np.isnan(auc_interval([], [], [])).all()
    auc, low, high = auc_interval([0, 1, 1], [0.1, 0.2, 0.05], ["a"] * 3)
    assert auc == 0.5 and np.isnan([low, high]).all()
    assert np.isnan(paired_p([1, 1], [0.1, 0.2], [0.3, 0.2], ["a", "b"]))
    assert np.isnan(paired_p([0, 0, 1], [0.1, 0.3, 0.2], [0.3, 0.1, 0.2], ["a", "b", "a"])), "one group of fakes"
    assert np.isnan(paired_p([], [], [], []))
    labels, scores, groups = [0, 0, 1, 1], [0.1, 0.6, 0.5, 0.9], list("abcd")
    for seed in range(20):  # a single draw, which may lack a class
        assert np.isfinite(auc_interval(labels, scores, groups, draws=1, seed=seed)).all()
        assert np.isfinite(auc_difference(labels, scores, scores[::-1], groups, draws=1, seed=seed)).all()


def test_perfect_detectors_are_not_certain():
    labels, groups = np.tile([0, 1], 10), np.arange(20)
    for sign, sure in ((1, 1.0), (-1, 0.0)):
        auc, low, high = auc_interval(labels, sign * (labels + groups / 100), groups)
        width = high - low
        assert auc == sure and sure in (low, high) and 0.1 < width < 0.5
    more = auc_interval(np.tile(labels, 5), np.tile(labels, 5), np.arange(100))
    assert more[0] == 1 and width > 1 - more[1] > 0.02, "more groups, more sure"
    together = auc_interval(np.tile(labels, 5), np.tile(labels, 5), np.tile(groups, 5))
    assert 1 - together[1] == pytest.approx(width), "five items of a person are one person"
    gain, low, high = auc_difference(labels, labels + groups / 100, labels - groups / 100, groups)
    assert gain == 0 and -0.5 < low < -0.1 and 0.1 < high < 0.5
    assert paired_p(labels, labels + groups / 100, labels - groups / 100, groups) == 1
    assert auc_interval(labels, np.ones(20), groups) == (0.5, 0.5, 0.5), "a constant is as good as chance for sure"
    auc, low, high = auc_interval([0, 0, 0, 1, 1], [1, 3, 5, 4, 2], list("abcdd"))
    assert auc == 0.5 and low < 0.2 and high > 0.8, "two fakes of one person say little"


def newcombe(auc, n_fake, n_real, level=0.95):
    """Interval of an AUC of independent items that do not vary, by trying every AUC: Newcombe 2006, method 5."""
    true, half = np.linspace(0, 1, 1_000_001), (n_fake + n_real) / 2 - 1
    variance = true * (1 - true) * (1 + half * (1 - true) / (2 - true) + half * true / (1 + true)) / (n_fake * n_real)
    inside = true[np.abs(auc - true) <= student.ppf((1 + level) / 2, n_fake + n_real - 1) * np.sqrt(variance)]
    return inside[0], inside[-1]


def test_groups_that_happen_not_to_vary_are_not_certain():
    labels, groups = np.array([0, 0, 1, 1] * 2), np.repeat(["a", "b"], 4)
    right, wrong = np.tile([1, 3, 2, 4], 2), np.tile([2, 4, 1, 3], 2)  # of four pairs each group has three, or one
    low, high = newcombe(0.75, 2, 2)
    assert auc_interval(labels, right, groups) == pytest.approx((0.75, low, high), abs=2e-6)
    least, most = newcombe(0.25, 2, 2)
    down, up = np.hypot(0.75 - low, most - 0.25), np.hypot(high - 0.75, 0.25 - least)
    expected = 0.5, max(-1, 0.5 - down), min(1, 0.5 + up)
    assert auc_difference(labels, right, wrong, groups) == pytest.approx(expected, abs=2e-6)
    equal = auc_difference(labels, right, np.tile([3, 1, 2, 4], 2), groups)
    assert equal[0] == 0 and equal[1] < -0.1 and equal[2] > 0.1, "equal AUCs by other pairs"
    assert auc_difference(labels, right, np.exp(right), groups) == (0, 0, 0), "the same order is the same AUC"


def test_a_perfect_detector_against_a_constant_is_not_certain():
    labels, scores, constant = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9]), np.full(4, 0.5)
    low, _ = newcombe(1, 2, 2)
    found = auc_difference(labels, scores, constant, range(4))
    assert found == pytest.approx((0.5, low - 0.5, 0.5), abs=2e-6)
    assert auc_difference(labels, constant, scores, range(4)) == pytest.approx((-0.5, -0.5, 0.5 - low), abs=2e-6)
    before = 1
    for n, other in ((2, 0.5), (2, -1), (5, 0.5), (6, -1), (40, 0.5)):
        labels = np.repeat([0, 1], n)
        scores = labels + np.arange(2 * n) / 100
        others = np.full(2 * n, other) if other > 0 else -scores
        p = paired_p(labels, scores, others, range(2 * n))
        assert 0 < p == pytest.approx(paired_p(labels, others, scores, range(2 * n)))
        end = newcombe(1, n, n, 1 - p)[0] - 0.5 if other > 0 else 1 - np.sqrt(2) * (1 - newcombe(1, n, n, 1 - p)[0])
        assert end == pytest.approx(0, abs=2e-6), "the interval of level 1 - p ends at 0"
        assert (p < 0.05) == (auc_difference(labels, scores, others, range(2 * n))[1] > 0)
        assert p < before or other < 0
        before = p if other > 0 else before
    assert before < 1e-6, "forty of each are enough"


def test_a_difference_to_itself_is_nothing_and_without_a_class_there_is_none():
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.3, 0.2])
    assert auc_difference(labels, scores, scores, list("aabb")) == (0, 0, 0)
    assert paired_p(labels, scores, scores, list("aabb")) == 1
    assert np.isnan(auc_difference([1, 1], [0.1, 0.2], [0.3, 0.2], ["a", "b"])).all()
    assert np.isnan(auc_difference([], [], [], [])).all()
    value, low, high = auc_difference([0, 1], [0.1, 0.2], [0.2, 0.1], ["a", "a"])
    assert value == 1 and np.isnan([low, high]).all(), "one group cannot be drawn anew"


@pytest.mark.parametrize("digits", [0, 1, 8])
def test_delong_is_that_of_loops_over_all_pairs(digits):
    rng = np.random.default_rng(digits)
    labels = rng.permutation(np.r_[np.zeros(17, int), np.ones(11, int)])
    one, other = ((rng.normal(size=28) + gain * labels).round(digits) for gain in (1.2, 0.5))
    tables = wins(labels, one), wins(labels, other)
    rows, cols = (np.array([t.mean(axis) for t in tables]) for axis in (1, 0))  # of each fake, of each real
    covariance = np.cov(rows) / 11 + np.cov(cols) / 17
    gain = tables[0].mean() - tables[1].mean()
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert delong(labels, one, other) == pytest.approx((gain, 2 * norm.sf(abs(gain) / error)))
    assert evaluation.delong is delong and evaluation.auc_interval is auc_interval
    assert delong(list(labels), list(one), list(one)) == (0, 1)
    assert delong([0, 0, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx((1, np.nan), nan_ok=True), "no variance"
    assert np.isnan(delong([1, 1], [0.1, 0.2], [0.2, 0.1])).all()
    assert delong([0, 1, 1], [1, 2, 3], [2, 1, 3])[0] == 0.5 and np.isnan(delong([0, 1, 1], [1, 2, 3], [2, 1, 3])[1])


def test_holm_by_hand():
    # In order: 0.01 x 4, 0.02 x 3, 0.03 x 2 (no less than 0.06), 0.9 x 1.
    assert holm([0.03, 0.01, np.nan, 0.9, 0.02]) == pytest.approx([0.06, 0.04, np.nan, 0.9, 0.06], nan_ok=True)
    assert holm([0.6, 0.7]).tolist() == [1, 1] and holm([]).tolist() == [] and np.isnan(holm([np.nan])).all()


def made(rng, groups, size, auc, shift, mixed, share=0.5, detectors=1):
    """Labels, scores [N,detectors] and groups; a group shifts its scores by N(0, shift); all have the same true AUC."""
    group = np.repeat(np.arange(groups), size)
    of_group = rng.permutation(np.arange(groups) < max(2, round(groups * share)))[group].astype(int)
    labels = (rng.random(len(group)) < share).astype(int) if mixed else of_group
    noise, shifts = rng.normal(size=(len(group), detectors + 1)), rng.normal(size=(groups, detectors + 1))
    noise += shift * shifts[group]
    common = noise[:, :1] if detectors > 1 else 0  # what is hard for both detectors
    scores = (noise[:, 1:] + common) / np.sqrt(1 + (detectors > 1))
    return labels, scores + labels[:, None] * norm.ppf(auc) * np.sqrt(2 * (1 + shift**2)), group


@pytest.mark.parametrize("world", [(20, 4, 0.75, 1, False), (30, 3, 0.9, 1, True), (60, 1, 0.9, 0, False, 1 / 6)])
def test_intervals_cover_the_true_auc(world):
    covered = {"groups": 0, "items": 0}
    for k in range(SETS):
        labels, scores, groups = made(np.random.default_rng([1, k]), *world)
        for unit, drawn in (("groups", groups), ("items", np.arange(len(labels)))):
            if unit == "groups" or world[0] == 20:
                _, low, high = auc_interval(labels, scores, drawn, draws=100, seed=k)
                covered[unit] += low <= world[2] <= high
    assert 0.92 <= covered["groups"] / SETS <= 0.98
    assert covered["items"] / SETS < 0.85, "items drawn one by one ignore that a group's scores rise and fall together"


def test_intervals_cover_the_true_difference():
    covered = 0
    for k in range(SETS):
        labels, scores, groups = made(np.random.default_rng([2, k]), 30, 3, 0.8, 1, True, detectors=2)
        _, low, high = auc_difference(labels, scores[:, 0], scores[:, 1], groups, draws=100, seed=k)
        covered += low <= 0 <= high
    assert 0.92 <= covered / SETS <= 0.98


def test_a_false_alarm_at_five_percent_is_one_in_twenty():
    alarms = dict.fromkeys(["delong", "paired, a class a group", "paired, both classes", "delong on groups"], 0)
    few = 0
    for k in range(SETS):
        labels, scores, groups = made(np.random.default_rng([3, k]), 100, 1, 0.8, 0, False, detectors=2)
        alarms["delong"] += delong(labels, *scores.T)[1] < 0.05
        labels, scores, groups = made(np.random.default_rng([4, k]), 30, 5, 0.75, 1.5, False, detectors=2)
        alarms["paired, a class a group"] += paired_p(labels, *scores.T, groups) < 0.05
        alarms["delong on groups"] += delong(labels, *scores.T)[1] < 0.05
        labels, scores, groups = made(np.random.default_rng([5, k]), 30, 5, 0.8, 1, True, detectors=2)
        alarms["paired, both classes"] += paired_p(labels, *scores.T, groups) < 0.05
        labels, scores, groups = made(np.random.default_rng([6, k]), 2, 4, 0.8, 1, True, detectors=2)
        few += paired_p(labels, *scores.T, groups) < 0.05
    assert alarms.pop("delong on groups") / SETS > 0.15, (
        "items are not independent: the test for items alarms too often"
    )
    assert all(0.03 <= n / SETS <= 0.07 for n in alarms.values()), alarms
    assert few / SETS <= 0.07, "two groups that happen not to vary are no proof"


@pytest.mark.parametrize("cells", [1, 100, 2**22])
def test_how_many_draws_are_made_at_a_time_changes_nothing(monkeypatch, cells):
    rng = np.random.default_rng(3)
    labels, groups = rng.integers(0, 2, 60), rng.integers(0, 12, 60)
    scores, others = (rng.random((60, 2)).round(1) + 0.2 * labels[:, None] for _ in range(2))
    whole = auc_interval(labels, scores, groups, draws=50), auc_difference(labels, scores, others, groups, draws=50)
    monkeypatch.setattr(intervals, "CELLS", cells)
    assert auc_interval(labels, scores, groups, draws=50) == whole[0], "to the last bit"
    assert auc_difference(labels, scores, others, groups, draws=50) == whole[1]


def test_groups_are_told_apart_as_text():
    labels, scores = [0, 1, 0, 1, 0, 1], [0.2, 0.9, 0.4, 0.3, 0.1, 0.8]
    as_text = auc_interval(labels, scores, ["1", "1", "2", "2", "10", "10"], draws=40)
    assert auc_interval(labels, scores, [1, 1, 2, 2, 10, 10], draws=40) == as_text
    assert auc_interval(labels, scores, np.array([1, "1", 2, "2", 10, 10], object), draws=40) == as_text
    odd = np.array([None, None, "None", np.nan, "nan", "z"], object)  # sorted as text: they are drawn by their places
    assert auc_interval(labels, scores, odd, draws=40) == auc_interval(labels, scores, odd.astype(str), draws=40)
