import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from unmask.comparison import compare
from unmask.intervals import auc_difference, paired_p


def score_rows(head, variant, seed, scores):
    return pd.DataFrame({"item_id": list("abcdef"), "frame": -1, "score": scores, "detector": head, "variant": variant,
                         "seed": seed, "checkpoint": ""})  # fmt: skip


def videos(names="abcdef", dataset="world"):
    return pd.DataFrame(
        {
            "item_id": list(names),
            "kind": "video",
            "dataset": dataset,
            "split": "test",
            "label": [0, 0, 0, 1, 1, 1],
            "method": ["real"] * 3 + ["swap"] * 3,
            "group_id": list("123123"),
        }  # fmt: skip
    )


def plain_delong(fakes_and_reals, others):
    """DeLong's p by loops over the pairs of (fakes, reals) of two detectors, items taken for independent."""
    tables = [np.array([[(f > r) + (f == r) / 2 for r in reals] for f in fakes])
              for fakes, reals in (fakes_and_reals, others)]  # fmt: skip
    gains = tables[0] - tables[1]
    error = np.sqrt(sum(gains.mean(axis).var(ddof=1) / gains.shape[1 - axis] for axis in (0, 1)))
    return 2 * norm.sf(abs(gains.mean()) / error)


def test_a_video_is_never_judged_against_an_image():
    """A score that only tells videos from images, most fakes being videos, is chance in every row."""
    kinds = np.array(["video"] * 4 + ["image"] * 4 + ["video"] * 4)
    manifest = pd.DataFrame({
        "item_id": [f"i{k}" for k in range(12)], "kind": kinds, "dataset": "world", "split": "test",
        "label": [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1],
        "method": ["real", "real", "swap", "warp", "real", "real", "real", "swap", "swap", "warp", "swap", "warp"],
        "group_id": list("abcdabcdabcd"),
    })  # fmt: skip
    scores = manifest[["item_id"]].assign(frame=-1, score=np.where(kinds == "video", 0.9, 0.1), seed=0, checkpoint="")
    both = pd.concat([scores.assign(detector=name, variant="") for name in ("kind", "other")])
    table = compare(both, manifest, ("kind", ""), draws=20)
    assert table["auc"].tolist() == [0.5] * len(table)
    assert list(dict.fromkeys(table["method"])) == ["all", "swap", "warp", "swap (image)"]
    assert table.groupby("method")["items"].first().to_dict() == {"all": 8, "swap": 5, "warp": 5, "swap (image)": 4}
    images = manifest[manifest["kind"] == "image"]
    alone = compare(both[both["item_id"].isin(images["item_id"])], images, ("kind", ""), draws=20)
    assert set(alone["method"]) == {"swap"}, "without videos the name is the method's own"


def test_comparison_is_paired_and_averages_seeds():
    manifest = videos()
    good, bad = [0.1, 0.2, 0.3, 0.7, 0.8, 0.9], [0.5, 0.6, 0.7, 0.55, 0.65, 0.4]
    scores = pd.concat(
        [
            score_rows("mean", "in order", 0, bad),
            score_rows("mean", "in order", 1, good),
            score_rows("gru", "in order", 0, good),
            score_rows("gru", "in order", 1, good),
            score_rows("gru", "frozen", 0, bad),
            score_rows("gru", "frozen", 1, bad),
        ]  # fmt: skip
    )
    table = compare(scores, manifest, ("mean", "in order"), draws=50).set_index(["method", "detector", "variant"])
    low = 3 / 9  # of nine pairs the fake is higher in (.55, .5), (.65, .5), (.65, .6)
    expected = {("mean", "in order"): (low + 1) / 2, ("gru", "in order"): 1.0, ("gru", "frozen"): low}
    for key, auc in expected.items():
        row = table.loc[("swap", *key)]
        assert (row["auc"], row["gain"], row["items"], row["seeds"]) == pytest.approx((auc, auc - (low + 1) / 2, 6, 2))
    draws = dict(level=0.95, draws=50)
    both = np.stack([bad, good], 1)
    labels, groups = manifest["label"], manifest["group_id"]
    _, *interval = auc_difference(labels, np.stack([good, good], 1), both, groups, **draws)
    assert table.loc[("swap", "gru", "in order"), ["gain_low", "gain_high"]].tolist() == pytest.approx(interval)
    rows = table.loc["swap"]
    of_control = rows.loc[("mean", "in order"), ["p", "p_delong", "p_holm"]].astype(float)
    assert np.isnan(of_control).all(), "the control is not compared"
    for key, own in ((("gru", "in order"), good), (("gru", "frozen"), bad)):
        assert rows.loc[key, "p"] == paired_p(labels, np.stack([own, own], 1), both, groups)
    small, large = sorted(rows["p"].dropna())
    assert sorted(rows["p_holm"].dropna()) == pytest.approx([min(1, 2 * small), min(1, max(2 * small, large))])


def test_the_plain_delong_is_of_the_mean_scores_and_not_corrected():
    one, two, three = [0.1, 0.6, 0.3, 0.7, 0.2, 0.9], [0.5, 0.1, 0.7, 0.55, 0.65, 0.4], [0.4, 0.2, 0.5, 0.6, 0.3, 0.45]
    scores = [score_rows("ufd", "", 0, one), score_rows("ufd", "", 1, three), score_rows("gru", "", 0, two)]
    scores += [score_rows("gru", "", 1, three), score_rows("coop", "", 0, two), score_rows("coop", "", 1, two)]
    table = compare(pd.concat(scores), videos(), ("ufd", ""), draws=20).set_index("detector")
    mean = np.mean([one, three], 0)
    for name, own in (("gru", np.mean([two, three], 0)), ("coop", np.array(two))):
        expected = plain_delong((own[3:], own[:3]), (mean[3:], mean[:3]))
        assert 0 < expected < 1 and table.loc[name, "p_delong"] == pytest.approx(expected)


def test_where_the_control_is_missing_there_are_no_gains_and_the_rest_stays():
    manifest = pd.concat([videos(), videos("ghijkl", "other")], ignore_index=True)
    good, bad = [0.1, 0.2, 0.3, 0.7, 0.8, 0.9], [0.5, 0.6, 0.7, 0.55, 0.65, 0.4]
    both = [score_rows("ufd", "", 0, good), score_rows("gru", "", 0, bad)]
    alone = score_rows("gru", "", 0, good).assign(item_id=list("ghijkl"))
    complete = compare(pd.concat(both), manifest, ("ufd", ""), draws=20)
    table = compare(pd.concat([*both, alone]), manifest, ("ufd", ""), draws=20)
    pd.testing.assert_frame_equal(table[table["dataset"] == "world"].reset_index(drop=True), complete)
    (row,) = table[table["dataset"] == "other"].to_dict("records")
    assert (row["detector"], row["auc"], row["items"], row["seeds"]) == ("gru", 1, 6, 1) and 0 < row["low"] < 1
    assert np.isnan([row[name] for name in ("gain", "gain_low", "gain_high", "p", "p_delong", "p_holm")]).all()


def test_nothing_to_compare_is_an_empty_table_with_its_columns():
    manifest, scores = videos(), score_rows("ufd", "", 0, [0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
    full = compare(scores, manifest, ("ufd", ""), draws=20)
    for nothing in (scores[:0], scores[:3]):  # no scores; reals alone
        table = compare(nothing, manifest, ("ufd", ""), draws=20)
        assert table.empty and list(table.columns) == list(full.columns)
        assert (pd.concat([table, full]).dtypes == full.dtypes).all(), "it changes nothing that it stands beside"
        assert table[table["method"] == table.groupby("dataset")["method"].transform("first")].round(3).empty
