"""Score tables to result tables: who may choose a threshold; what a result row counts."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from unmask import leaks
from unmask.data.manifest import COLUMNS, item_id, read_manifest, write_manifest
from unmask.evaluation import (
    ScoreError,
    auc_interval,
    evaluate,
    evaluate_files,
    join,
    read_scores,
    write_scores,
)
from unmask.metrics import balanced_threshold, calibration_error, tpr_at_fpr


def make_manifest(plan):
    """Rows from (split, dataset, method, group, kind, count) tuples; the label follows from the method."""
    rows = []
    for split, dataset, method, group, kind, count in plan:
        for _ in range(count):
            path = f"{len(rows):04d}.mp4"
            rows.append(
                dict.fromkeys(COLUMNS, "")
                | {"item_id": item_id(dataset, path), "root": ".", "path": path, "kind": kind, "dataset": dataset}
                | {"split": split, "label": int(method != "real"), "method": method, "group_id": str(group)}
            )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"label": "int8"})


def make_scores(manifest, seeds=(0,), frames=3, rng=None, digits=2, variant="plain"):
    """A score table with clips (mean) and frames; rounding makes ties."""
    rng = rng or np.random.default_rng(0)
    rows = []
    for seed in seeds:
        for row in manifest.to_dict("records"):
            own = np.clip(rng.normal(0.45 + 0.15 * row["label"], 0.2, frames), 0, 1).round(digits)
            rows += [
                (row["item_id"], f, s, seed) for f, s in zip((-1, *range(frames)), (own.mean(), *own), strict=True)
            ]
    df = pd.DataFrame(rows, columns=["item_id", "frame", "score", "seed"])
    df = df.assign(detector="d", variant=variant, checkpoint="c").astype({"frame": "int32", "seed": "int32"})
    return df[["item_id", "frame", "score", "detector", "variant", "seed", "checkpoint"]]


def study():
    """Two data sets, two methods, groups of two reals and one fake a method; `b` is for testing only."""
    plan = []
    for dataset, splits in (("a", ("train", "val", "test")), ("b", ("test",))):
        for split in splits:
            for group in range(6):
                name = f"{dataset}-{split}-{group}"
                plan += [(split, dataset, "real", name, "video", 2), (split, dataset, "swap", name, "video", 1)]
                plan += [(split, dataset, "reenact", name, "video", 1)] * (group % 2)
    return make_manifest(plan)


def only(table, **where):
    for key, value in where.items():
        table = table[table[key] == value]
    assert len(table) == 1
    return table.iloc[0]


@pytest.mark.parametrize("digits", [1, 2, 8])
def test_auc_and_ap_are_those_of_scikit_learn_ties_included(digits):
    rng = np.random.default_rng(digits)
    for _ in range(20):
        labels = rng.permutation(np.r_[0, 1, rng.integers(0, 2, 30)])
        scores = rng.random(32).round(digits)
        assert auc_interval(labels, scores, np.arange(32), draws=2)[0] == pytest.approx(roc_auc_score(labels, scores))
    manifest = study()
    scores = make_scores(manifest, digits=digits)
    row = only(evaluate(scores, manifest, draws=2), level="frame", dataset="a", method="all", reals="all")
    joined = scores.merge(manifest, on="item_id").query("frame >= 0 and split == 'test' and dataset == 'a'")
    assert row["auc"] == pytest.approx(roc_auc_score(joined["label"], joined["score"]))
    assert row["ap"] == pytest.approx(average_precision_score(joined["label"], joined["score"]))
    assert row["pauc"] == pytest.approx(roc_auc_score(joined["label"], joined["score"], max_fpr=0.1))
    assert row["tpr_at_1"] == tpr_at_fpr(joined["label"], joined["score"], 0.01)
    assert row["ece"] == calibration_error(joined["label"], joined["score"])


def test_the_threshold_comes_from_validation_alone():
    manifest = study()
    scores = make_scores(manifest)
    table = evaluate(scores, manifest, draws=2)
    row = only(table, level="video", dataset="a", method="all")
    split = scores["item_id"].map(manifest.set_index("item_id")["split"])
    val = scores[(split == "val") & (scores["frame"] == -1)].merge(manifest, on="item_id")
    assert row["threshold"] == balanced_threshold(val["label"], val["score"])
    reversed_test = scores.assign(score=scores["score"].where(split != "test", 1 - scores["score"]))
    other = evaluate(reversed_test, manifest, draws=2)
    assert (other["threshold"] == table["threshold"]).all()
    assert only(other, level="video", dataset="a", method="all")["balanced_accuracy"] != row["balanced_accuracy"]
    poisoned = manifest.copy()
    test = poisoned["split"] == "test"
    poisoned.loc[test, "label"] = 1 - poisoned.loc[test, "label"]
    turned = evaluate(scores, poisoned.assign(method=np.where(poisoned["label"], "swap", "real")), draws=2)
    assert set(turned["threshold"]) == set(table["threshold"])
    assert only(turned, level="video", dataset="a", reals="all")["auc"] == pytest.approx(1 - row["auc"])


def test_without_validation_scores_there_is_an_auc_but_no_accuracy():
    manifest = study()
    scores = make_scores(manifest[manifest["split"] == "test"])
    table = evaluate(scores, manifest, draws=2)
    assert table["auc"].notna().all()
    assert table[["threshold", "balanced_accuracy", "accuracy", "recall_real", "recall_fake"]].isna().all().all()


def test_rows_of_methods_and_of_matched_reals():
    manifest = study()
    table = evaluate(make_scores(manifest), manifest, draws=2).query("level == 'video' and dataset == 'b'")
    found = {(r.method, r.reals): (r.n_real, r.n_fake, r.groups) for r in table.itertuples()}
    # reenact exists in three of the six groups; swap in all, so that its matched reals are all reals.
    assert found == {
        ("all", "all"): (12, 9, 6), ("reenact", "all"): (12, 3, 6), ("reenact", "matched"): (6, 3, 3),
        ("swap", "all"): (12, 6, 6),
    }  # fmt: skip
    row = only(table, method="reenact", reals="all")
    assert row["majority"] == 12 / 15 and (table["coverage"] == 1).all()


def test_the_majority_baseline_and_accuracy_weigh_classes_by_their_size():
    manifest = make_manifest([(s, "a", m, f"{m}{i}", "video", 1) for s in ("val", "test")
                              for m, n in (("real", 2), ("swap", 6)) for i in range(n)])  # fmt: skip
    wrong_real = manifest.query("label == 0 and split == 'test'")["item_id"].iloc[0]
    scores = make_scores(manifest).assign(
        score=lambda d: d["item_id"].map(manifest.set_index("item_id")["label"]) * 0.9
    )
    scores.loc[scores["item_id"] == wrong_real, "score"] = 1.0
    row = only(evaluate(scores, manifest, draws=2), level="video")
    assert (row["majority"], row["accuracy"], row["balanced_accuracy"]) == (0.75, 7 / 8, 0.75)
    assert (row["recall_real"], row["recall_fake"]) == (0.5, 1.0)


def test_several_seeds_are_averaged_and_can_be_seen_apart():
    manifest = study()
    scores = make_scores(manifest, seeds=(4, 7))
    mean, each = evaluate(scores, manifest, draws=2), evaluate(scores, manifest, draws=2, seeds="each")
    where = {"level": "video", "dataset": "a", "method": "swap"}
    apart = [only(each, seed=s, **where) for s in (4, 7)]
    row = only(mean, **where)
    assert row["seeds"] == 2
    for figure in ("auc", "eer", "ap", "pauc", "tpr_at_1", "ece", "balanced_accuracy", "threshold"):
        assert row[figure] == pytest.approx(np.mean([r[figure] for r in apart]))
    assert apart[0]["threshold"] != apart[1]["threshold"], "every seed has its own threshold"


def test_items_without_a_score_lower_the_coverage():
    manifest = study()
    scores = make_scores(manifest, seeds=(0, 1))
    swaps = manifest.query("split == 'test' and dataset == 'a' and method == 'swap'")["item_id"]
    gone = scores[~((scores["item_id"] == swaps.iloc[0]) & (scores["seed"] == 1))]
    table = evaluate(gone, manifest, draws=2)
    row = only(table, level="video", dataset="a", method="swap")
    assert (row["coverage"], row["n_fake"]) == (17 / 18, 5), "an item that one seed lacks counts for none"
    assert only(table, level="video", dataset="b", method="swap")["coverage"] == 1
    reals = manifest.query("split == 'test' and dataset == 'a' and method == 'real'")
    lonely = reals.loc[reals["group_id"] == "a-test-1", "item_id"]
    table = evaluate(scores[~scores["item_id"].isin(lonely)], manifest, draws=2)
    assert only(table, level="video", dataset="a", method="reenact", reals="matched")["coverage"] == pytest.approx(
        6 / 9
    )


def test_a_seed_that_never_saw_a_data_set_does_not_count_there():
    manifest = study()
    scores = make_scores(manifest, seeds=(0, 1))
    b = scores["item_id"].isin(manifest.loc[manifest["dataset"] == "b", "item_id"])
    table = evaluate(scores[~(b & (scores["seed"] == 1))], manifest, draws=2)
    assert only(table, level="video", dataset="b", method="swap")["seeds"] == 1
    assert only(table, level="video", dataset="a", method="swap")["seeds"] == 2


def test_seeds_without_a_common_item_leave_empty_figures():
    manifest = make_manifest([("test", "a", m, f"{m}{i}", "video", 1) for m in ("real", "swap") for i in range(2)])
    scores = make_scores(manifest, seeds=(0, 1))
    half = scores["item_id"].isin(manifest["item_id"].iloc[[0, 2]]) == (scores["seed"] == 0)
    row = only(evaluate(scores[half], manifest, draws=2), level="video")
    assert row["coverage"] == 0 and np.isnan(row["auc"]) and np.isnan(row["majority"])


def test_images_are_a_level_of_their_own_and_frames_are_counted():
    plan = [(s, d, m, f"{d}{s}{i}", k, 1) for d in "ab" for s in ("val", "test") for i in range(3)
            for m in ("real", "swap") for k in ("video", "image")]  # fmt: skip
    manifest = make_manifest(plan)
    scores = make_scores(manifest, frames=8)
    kind, dataset = (scores["item_id"].map(manifest.set_index("item_id")[c]) for c in ("kind", "dataset"))
    most = {"image": 1, "video": 8}
    kept = scores[(scores["frame"] < kind.map(most)) & ((dataset == "a") | (scores["frame"] < 4))]
    table = evaluate(kept, manifest, draws=2).set_index(["dataset", "level"])
    order = [(d, level) for d in "ab" for level in ("frame", "video", "image")]
    assert table.loc[order, "frames_per_video"].tolist() == [8, 8, 1, 4, 4, 1]
    assert table.loc[order, "n_real"].tolist() == [24, 3, 3, 12, 3, 3]
    assert (table["coverage"] == 1).all()


def rows_changed(before, after):
    """Rows (by what they are of) in which any figure differs, and those that only one of the tables has."""
    keys = ["detector", "variant", "level", "dataset", "method", "reals"]
    a, b = (table.set_index(keys) for table in (before, after))
    both = a.index.intersection(b.index)
    differ = ~((a.loc[both] == b.loc[both]) | (a.loc[both].isna() & b.loc[both].isna())).all(axis=1)
    return set(both[differ]), set(a.index.symmetric_difference(b.index))


def test_one_changed_score_changes_the_rows_that_hold_it_and_no_other():
    manifest = study()
    scores = pd.concat([make_scores(manifest, variant="one"), make_scores(manifest, variant="two")])
    scores = scores.reset_index(drop=True)
    before = evaluate(scores, manifest, draws=50)
    held = manifest[(manifest["split"] == "test") & (manifest["dataset"] == "a") & (manifest["method"] == "swap")]
    place = (scores["item_id"] == held["item_id"].iloc[0]) & (scores["frame"] == 1) & (scores["variant"] == "two")
    changed = scores.assign(score=scores["score"].where(~place, 0.0))
    assert place.sum() == 1 and not changed["score"].equals(scores["score"])
    expected = {("d", "two", "frame", "a", method, reals) for method, reals in (("all", "all"), ("swap", "all"))}
    assert rows_changed(before, evaluate(changed, manifest, draws=50)) == (expected, set())


def test_a_changed_validation_score_moves_thresholds_alone():
    manifest = study()
    scores = make_scores(manifest)
    val = manifest[(manifest["split"] == "val") & (manifest["label"] == 1)]["item_id"]
    changed = scores.assign(score=scores["score"].where(~scores["item_id"].isin(val), 0.999))
    before, after = evaluate(scores, manifest, draws=50), evaluate(changed, manifest, draws=50)
    same = before.columns.drop(["threshold", "balanced_accuracy", "recall_real", "recall_fake", "accuracy"])
    pd.testing.assert_frame_equal(before[same], after[same])
    assert (before["threshold"] != after["threshold"]).all()


def test_without_a_detector_the_others_stay_as_they_are():
    manifest = study()
    scores = pd.concat([make_scores(manifest, variant="one"), make_scores(manifest, variant="two")])
    before = evaluate(scores, manifest, draws=50)
    after = evaluate(scores[scores["variant"] == "one"], manifest, draws=50)
    pd.testing.assert_frame_equal(before[before["variant"] == "one"].reset_index(drop=True), after)


def test_the_order_of_rows_changes_nothing():
    manifest = study()
    scores = make_scores(manifest, seeds=(0, 1))
    mixed = evaluate(scores.sample(frac=1, random_state=1), manifest.sample(frac=1, random_state=2), draws=50)
    pd.testing.assert_frame_equal(evaluate(scores, manifest, draws=50), mixed)


def test_foreign_and_malformed_scores_are_refused(tmp_path):
    manifest = study()
    scores = make_scores(manifest)
    with pytest.raises(ScoreError, match="1 scored items are not in the manifest"):
        evaluate(scores, manifest.iloc[1:])
    with pytest.raises(ScoreError, match="No score belongs to the test split"):
        evaluate(make_scores(manifest[manifest["split"] == "val"]), manifest)
    write_scores(scores, tmp_path / "good.parquet")
    pd.testing.assert_frame_equal(read_scores(tmp_path / "good.parquet"), scores)
    faults = {
        "score": scores.assign(score=scores["score"] + 1), "frame": scores.assign(frame=scores["frame"] - 1),
        "None": scores.drop(columns="variant"), "extra": scores.assign(extra=1), "item_id": pd.concat([scores, scores]),
        "seed": scores.astype({"seed": "int64"}),
    }  # fmt: skip
    for column, fault in faults.items():
        with pytest.raises(ScoreError, match=column) as caught:
            write_scores(fault, tmp_path / "bad.parquet")
        assert "\n" not in str(caught.value) and not (tmp_path / "bad.parquet").exists()
        fault.to_parquet(tmp_path / "foreign.parquet")
        with pytest.raises(ScoreError, match=column):
            read_scores(tmp_path / "foreign.parquet")
    with pytest.raises(ScoreError, match="score"):
        write_scores(scores.assign(score=np.nan), tmp_path / "bad.parquet")
    (tmp_path / "text.parquet").write_text("not a table")
    for name in ("text.parquet", "absent.parquet"):
        with pytest.raises(ScoreError, match="cannot be read"):
            read_scores(tmp_path / name)


def test_the_csv_of_scored_media_can_be_evaluated_too(tmp_path, monkeypatch):
    manifest = make_manifest([(s, "a", m, f"{m}{s}{i}", "video", 1) for s in ("val", "test")
                              for m in ("real", "swap") for i in range(3)])  # fmt: skip
    write_manifest(manifest.assign(root="media"), tmp_path / "manifest.parquet")
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"path": "media/" + manifest["path"], "status": "ok", "score": rng.random(12).round(3)})
    failed = pd.DataFrame({"path": ["media/readme.txt", "media/" + manifest["path"].iloc[-1]], "status": "failed"})
    table = pd.concat([rows.iloc[:-1], failed])
    table["path"] = np.where(np.arange(13) % 2, table["path"], str(tmp_path) + "/" + table["path"])
    table.to_csv(tmp_path / "scores.csv", index=False)
    monkeypatch.chdir(tmp_path)
    row = only(evaluate_files("scores.csv", "manifest.parquet", tmp_path / "table.csv", draws=2), level="video")
    test = (manifest["split"] == "test") & (np.arange(12) < 11)
    assert row["auc"] == pytest.approx(roc_auc_score(manifest.loc[test, "label"], rows.loc[test, "score"]))
    assert (row["coverage"], row["detector"]) == (5 / 6, "scores") and np.isnan(row["frames_per_video"])
    assert pd.read_csv(tmp_path / "table.csv")["auc"].iloc[0] == pytest.approx(row["auc"], abs=1e-4)
    rows.iloc[6:].to_csv(tmp_path / "test_only.csv", index=False)
    row = only(evaluate_files("test_only.csv", "manifest.parquet", tmp_path / "table.csv", draws=2), level="video")
    assert np.isnan(row["threshold"]) and np.isnan(row["balanced_accuracy"]) and row["auc"] > 0
    for name, text, fault in (
        ("other.csv", "path,score\nmedia/other.mp4,0.5\n", "media/other.mp4.*manifest that lists them"),
        ("nocolumn.csv", "path,probability\na,0.5\n", "columns path and score"),
        ("words.csv", f"path,score\nmedia/{manifest['path'].iloc[0]},high\n", "columns path and score"),
        ("beyond.csv", f"path,score\nmedia/{manifest['path'].iloc[0]},7\n", "not a valid score table"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ScoreError, match=fault):
            evaluate_files(name, "manifest.parquet", tmp_path / "table.csv")


def test_a_fact_that_tells_the_label_is_found(tiny_world):
    manifest = read_manifest(tiny_world / "manifest.parquet")
    facts = leaks.file_facts(manifest, tiny_world / "manifest.parquet")
    assert list(facts["item_id"]) == list(manifest["item_id"])
    assert set(facts["codec"]) == {"h264", "png"}
    assert (facts["pixels"] == 96 * 96).all() and set(facts["frames"]) == {5, 1}
    table = leaks.metadata_auc(facts, draws=20).set_index(["dataset", "kind", "fact"])
    assert (table.loc[("world-a", "video", ["pixels", "frames", "fps"]), "auc"] == 0.5).all()
    longer = facts.assign(frames=facts["frames"] + facts["label"])
    told = leaks.metadata_auc(longer, draws=20).set_index(["dataset", "kind", "fact"])
    assert (told.loc[(slice(None), slice(None), "frames"), "auc"] == 1).all()
    gone = manifest.assign(path=manifest["path"].where(manifest.index > 5, "gone.mp4"))
    assert leaks.file_facts(gone, tiny_world / "manifest.parquet")["pixels"].isna().any()
    assert leaks.metadata_auc(leaks.file_facts(manifest[:0], tiny_world / "manifest.parquet")).empty


def test_a_forest_on_the_files_alone_finds_a_leak_of_the_train_split_and_nothing_else(tiny_world):
    manifest = read_manifest(tiny_world / "manifest.parquet")
    facts = leaks.file_facts(manifest, tiny_world / "manifest.parquet")

    def auc(facts):
        scores = leaks.metadata_scores(facts)
        assert set(scores["item_id"]) == set(manifest.loc[manifest["split"] != "train", "item_id"])
        joined = join(scores, manifest).query("kind == 'video'")
        return auc_interval(joined["label"], joined["score"], joined["group_id"], draws=10)[0]

    assert auc(facts) == 0.5, "the world's files are alike"
    codec = facts["codec"].where(facts["label"] == 0, "vp9")
    assert auc(facts.assign(codec=codec)) == 1.0
    lost = facts.assign(codec=codec, label=facts["label"].where(facts["split"] != "train", 0))
    assert auc(lost) == 0.5, "nothing to learn from"
