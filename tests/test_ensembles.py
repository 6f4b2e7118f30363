"""Ensembles are fitted on validation alone, gain where members complement each other, and leave nobody out."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from test_aggregation import media

from unmask.ensembles import best_alone, best_first, combine, ensembles, log_odds

NAMES = {"ensemble, all", "ensemble, chosen", "ensemble, stacked"}


def table(manifest, detector, values, seed=0):
    rows = pd.DataFrame({"item_id": manifest["item_id"], "frame": -1, "score": 1 / (1 + np.exp(-values))})
    rows = rows.assign(detector=detector, variant="", seed=seed, checkpoint="")
    return rows.astype({"frame": "int32", "seed": "int32"})


@pytest.fixture
def world():
    """Two detectors with independent errors, one that guesses."""
    rng = np.random.default_rng(0)
    manifest = pd.concat([media("val", [0, 1] * 100), media("test", [0, 1] * 200)], ignore_index=True)
    signal = manifest["label"].to_numpy() * 1.2
    draws = {"one": signal, "two": signal, "guess": 0 * signal}
    tables = [table(manifest, name, mean + rng.normal(size=len(signal))) for name, mean in draws.items()]
    return manifest, pd.concat(tables, ignore_index=True)


def test_an_ensemble_of_independent_detectors_beats_the_best_of_them(world):
    manifest, scores = world
    made, members = ensembles(scores, manifest, [0])
    assert set(made["detector"]) == NAMES and len(made) == 3 * len(manifest)
    assert made["score"].between(0, 1).all()
    alone = best_alone(scores, manifest)
    made = pd.concat([made, scores[scores["detector"] == alone]])
    judged = made.merge(manifest[manifest["split"] == "test"][["item_id", "label"]], on="item_id")
    areas = {name: roc_auc_score(p["label"], p["score"]) for name, p in judged.groupby("detector")}
    assert areas["ensemble, chosen"] > areas[alone] + 0.03
    assert areas["ensemble, stacked"] > areas[alone] + 0.03
    chosen = members.set_index("ensemble")["members"]["chosen"].split(", ")
    assert set(chosen[:2]) == {"one", "two"}


def test_test_labels_and_scores_fit_nothing(world):
    manifest, scores = world
    made, members = ensembles(scores, manifest, [0])
    turned = manifest.assign(label=manifest["label"].where(manifest["split"] != "test", 1 - manifest["label"]))
    again, same = ensembles(scores, turned, [0])
    pd.testing.assert_frame_equal(again, made)
    pd.testing.assert_frame_equal(same, members)
    held_out = manifest.loc[manifest["split"] == "test", "item_id"]
    noisy = scores.assign(score=scores["score"].where(~scores["item_id"].isin(held_out.iloc[:50]), 0.5))
    others = lambda t: t[~t["item_id"].isin(held_out.iloc[:50])].reset_index(drop=True)  # noqa: E731
    pd.testing.assert_frame_equal(others(ensembles(noisy, manifest, [0])[0]), others(made))


def test_all_is_the_mean_of_calibrated_log_odds_of_those_who_scored(world):
    manifest, scores = world
    silent = manifest.loc[manifest["split"] == "test", "item_id"].iloc[0]
    scores = scores[(scores["item_id"] != silent) | (scores["detector"] == "one")]
    odds = log_odds(scores, manifest, 0)
    labels = manifest[manifest["split"] == "val"].set_index("item_id")["label"]
    found = combine(odds, labels)[0]["all"]
    assert odds.loc[silent].notna().sum() == 1
    assert found[silent] == pytest.approx(1 / (1 + np.exp(-odds.loc[silent, "one"])))
    other = manifest["item_id"].iloc[0]
    assert found[other] == pytest.approx(1 / (1 + np.exp(-sum(odds.loc[other]) / 3)))


def test_best_first_begins_with_the_best_alone(world):
    manifest, scores = world
    labels = manifest[manifest["split"] == "val"].set_index("item_id")["label"]
    val = log_odds(scores, manifest, 0).loc[labels.index]
    areas = {name: roc_auc_score(labels, val[name]) for name in val}
    order = best_first(val, labels.to_numpy())
    assert order[0] == max(areas, key=areas.get)
    pairs = {name: roc_auc_score(labels, val[order[0]] + val[name]) for name in val if name != order[0]}
    assert order[1] == max(pairs, key=pairs.get)


def test_a_detector_without_the_seed_is_taken_with_its_first(world):
    manifest, scores = world
    more = pd.concat([scores, scores[scores["detector"] == "one"].assign(seed=np.int32(1))])
    odds = [log_odds(more, manifest, seed) for seed in (0, 1)]
    pd.testing.assert_series_equal(odds[0]["two"], odds[1]["two"])


def test_fewer_than_two_detectors_make_no_ensemble(world):
    manifest, scores = world
    made, members = ensembles(scores[scores["detector"] == "one"], manifest, [0])
    assert made.empty and members.empty and list(made.columns) == list(scores.columns)


def test_the_yardstick_is_the_best_on_validation_of_those_who_judged_every_test_set(world):
    manifest, scores = world
    labels = manifest[manifest["split"] == "val"].set_index("item_id")["label"]
    val = scores[scores["item_id"].isin(labels.index)]
    areas = {name: roc_auc_score(labels.loc[part["item_id"]], part["score"]) for name, part in val.groupby("detector")}
    first, second = sorted(areas, key=areas.get)[::-1][:2]
    assert best_alone(scores, manifest) == first
    elsewhere = media("test", [0, 1], prefix="b").assign(dataset="other")
    both = pd.concat([manifest, elsewhere], ignore_index=True)
    others = [table(elsewhere, name, np.zeros(2)) for name in areas if name != first]
    assert best_alone(pd.concat([scores, *others]), both) == second
    assert best_alone(scores, manifest.assign(label=manifest["label"].where(manifest["split"] != "val", 0))) is None


def test_a_medium_that_no_member_scored_has_no_row(world):
    manifest, scores = world
    silent = manifest.loc[manifest["split"] == "test", "item_id"].iloc[0]
    made = ensembles(scores[scores["item_id"] != silent], manifest, [0])[0]
    assert silent not in set(made["item_id"]) and len(made) == 3 * (len(manifest) - 1)
