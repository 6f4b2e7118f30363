import numpy as np
import pandas as pd
import pytest

from unmask.comparison import compare
from unmask.intervals import auc_difference, paired_p


def score_rows(head, variant, seed, scores):
    return pd.DataFrame({"item_id": list("abcdef"), "frame": -1, "score": scores, "detector": head, "variant": variant,
                         "seed": seed, "checkpoint": ""})  # fmt: skip


def test_comparison_is_paired_and_averages_seeds():
    manifest = pd.DataFrame(
        {
            "item_id": list("abcdef"),
            "kind": "video",
            "dataset": "world",
            "split": "test",
            "label": [0, 0, 0, 1, 1, 1],
            "method": ["real"] * 3 + ["swap"] * 3,
            "group_id": list("123123"),
        }  # fmt: skip
    )
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
    assert np.isnan(rows.loc[("mean", "in order"), ["p", "p_holm"]].astype(float)).all(), "the control is not compared"
    for key, own in ((("gru", "in order"), good), (("gru", "frozen"), bad)):
        assert rows.loc[key, "p"] == paired_p(labels, np.stack([own, own], 1), both, groups)
    small, large = sorted(rows["p"].dropna())
    assert sorted(rows["p_holm"].dropna()) == pytest.approx([min(1, 2 * small), min(1, max(2 * small, large))])
