"""Rules over frames against plain Python; validation alone chooses; what has no frames keeps its score."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from unmask.aggregation import RULES, aggregate, apply, choose
from unmask.data.manifest import COLUMNS


def media(split, labels, kind="video", prefix="v"):
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {"item_id": f"{prefix}{split}{i}", "kind": kind, "dataset": "set", "split": split, "label": label}
        | {"method": "swap" if label else "real", "group_id": f"{split}{i // 2}"}
        for i, label in enumerate(labels)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"label": "int8"})


def scored(manifest, draw, detector="net", seed=0, frames=6):
    """A row per frame and one for the clip that no rule gives (0.123)."""
    rows = []
    for item, label in zip(manifest["item_id"], manifest["label"], strict=True):
        values = draw(label, frames)
        rows += [(item, t, float(v), detector, "", seed, "") for t, v in enumerate(values)]
        rows.append((item, -1, 0.123, detector, "", seed, ""))
    columns = ["item_id", "frame", "score", "detector", "variant", "seed", "checkpoint"]
    return pd.DataFrame(rows, columns=columns).astype({"frame": "int32", "seed": "int32"})


@pytest.fixture
def world():
    """Fakes betray themselves in one frame of six, so that the maximum beats the mean."""
    rng = np.random.default_rng(0)
    manifest = pd.concat([media("val", [0, 1] * 20), media("test", [0, 1] * 10)], ignore_index=True)

    def draw(label, frames):
        values = rng.uniform(0.3, 0.7, frames)
        values[0] = 0.8 if label else values[0]
        return rng.permutation(values)

    return manifest, scored(manifest, draw)


@pytest.mark.parametrize("rule", list(RULES))
def test_rules_agree_with_plain_python(rule):
    rng = np.random.default_rng(1)
    for count in (1, 2, 4, 5, 9):
        values = rng.random(count)
        table = scored(media("test", [1]), lambda label, frames: values, frames=count)  # noqa: B023
        found = aggregate(table, rule)
        highest = sorted(values, reverse=True)
        take = {"mean": count, "max": 1, "top": max(1, -(-count // 4))}[rule]
        assert found["score"].item() == pytest.approx(sum(highest[:take]) / take)
        assert found["frame"].tolist() == [-1] and list(found.columns) == list(table.columns)


def test_the_rule_with_the_best_validation_auc_is_chosen(world):
    manifest, scores = world
    rules = choose(scores, manifest)
    assert rules["rule"].tolist() == list(RULES) and rules["videos"].tolist() == [40] * 3
    framed = scores[scores["frame"] >= 0].merge(manifest[["item_id", "label", "split"]], on="item_id")
    val = framed[framed["split"] == "val"].groupby("item_id").agg(label=("label", "first"), score=("score", "max"))
    expected = roc_auc_score(val["label"], val["score"])
    assert rules.set_index("rule")["val_auc"]["max"] == pytest.approx(expected)
    assert rules.loc[rules["chosen"], "rule"].tolist() == ["max"]


def test_test_scores_choose_nothing(world):
    manifest, scores = world
    before = choose(scores, manifest)
    test = manifest.loc[manifest["split"] == "test", "item_id"]
    changed = scores.assign(score=scores["score"].where(~scores["item_id"].isin(test), 0.5))
    turned = manifest.assign(label=manifest["label"].where(manifest["split"] != "test", 1 - manifest["label"]))
    pd.testing.assert_frame_equal(choose(changed, turned), before)


def test_one_rule_serves_all_seeds(world):
    manifest, scores = world
    second = scores.assign(seed=np.int32(1), score=1 - scores["score"])
    rules = choose(pd.concat([scores, second]), manifest)
    areas = [choose(part, manifest)["val_auc"] for part in (scores, second)]
    assert len(rules) == 3
    np.testing.assert_allclose(rules["val_auc"], np.mean(areas, axis=0))


def test_apply_replaces_the_videos_rows_and_no_other(world):
    manifest, scores = world
    pictures = media("test", [0, 1], "image", "p")
    manifest = pd.concat([manifest, pictures], ignore_index=True)
    of_pictures = scored(pictures, lambda label, frames: np.full(frames, 0.4), frames=1)
    clips = scores[scores["frame"] == -1].assign(detector="clips")
    everything = pd.concat([scores, of_pictures, clips], ignore_index=True)
    made = apply(everything, manifest, choose(everything, manifest))
    assert len(made) == len(everything)
    of_clips = made[made["frame"] == -1].set_index(["detector", "item_id"])["score"]
    frames = scores[scores["frame"] >= 0].groupby("item_id")["score"].max()
    np.testing.assert_allclose(of_clips["net"].loc[frames.index], frames)
    assert set(of_clips["net"].loc[pictures["item_id"]]) == {0.123} and set(of_clips["clips"]) == {0.123}


def test_without_both_classes_the_mean_is_chosen(world):
    manifest, scores = world
    manifest = manifest[(manifest["split"] == "test") | (manifest["label"] == 1)]
    rules = choose(scores[scores["item_id"].isin(manifest["item_id"])], manifest)
    assert rules.loc[rules["chosen"], "rule"].tolist() == ["mean"] and rules["val_auc"].isna().all()
