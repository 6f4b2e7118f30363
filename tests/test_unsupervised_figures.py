"""Judging and figures of the unsupervised chapter: numbers against values derived by hand or by another way."""

import json
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from unmask import embedding_maps as maps
from unmask import laws
from unmask import unsupervised_figures as draw
from unmask import unsupervised_judging as judging
from unmask.figures import COLOURS
from unmask.unsupervised import STEPS, TRACES

TRUTH = np.array([0, 0, 0, 1, 1, 1, 1, 1])
GROUPS = np.array(list("aabbccdd"))


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_published_majorities_are_those_of_the_counts():
    table = judging.published().set_index(["trained on", "tested on"])
    assert table["majority"].round(1).tolist() == [50.0, 66.7, 84.8, 50.0]
    # Video accuracies of 98 videos: 69 and 88 of them.
    assert round(100 * 69 / 98, 2) == table.loc[("FF++", "UADFV"), "improved"]
    assert round(100 * 88 / 98, 2) == table.loc[("Celeb-DF-v2", "UADFV"), "improved"]


def test_judge_labels_against_scikit_learn():
    p = np.array([0.1, 0.6, 0.5, 0.9, 0.2, 0.7, 0.8, np.nan])
    row = judging.judge_labels({"x": p}, TRUTH, GROUPS, draws=50).iloc[0]
    called = p[:7] > 0.5
    assert row["videos"] == 7
    assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(TRUTH[:7], called))
    assert row["accuracy"] == pytest.approx(np.mean(called == TRUTH[:7]))
    assert row["auc"] == pytest.approx(roc_auc_score(TRUTH[:7], p[:7]))
    assert row["low"] <= row["auc"] <= row["high"]


def test_oracle_is_what_the_turned_answers_get():
    p = 1 - TRUTH * 0.9
    wrong = judging.judge_labels({"wrong": p}, TRUTH, GROUPS, draws=20).iloc[0]
    assert (wrong["balanced_accuracy"], wrong["oracle"], wrong["auc"]) == (0.0, 1.0, 0.0)


def test_nothing_said_at_all_is_a_row_without_numbers():
    row = judging.judge_labels({"mute": np.full(8, np.nan)}, TRUTH, GROUPS, draws=20).iloc[0]
    assert row["videos"] == 0 and np.isnan(row["balanced_accuracy"]) and np.isnan(row["auc"])


def test_guesses_are_at_chance_even_for_perfect_answers():
    shuffled, always = judging.guesses(TRUTH * 0.9, TRUTH, draws=4000).to_dict("records")
    assert shuffled["balanced_accuracy"] == pytest.approx(0.5, abs=0.02)
    assert shuffled["auc"] == pytest.approx(0.5, abs=0.02) and shuffled["low"] < 0.3 < 0.7 < shuffled["high"]
    assert shuffled["oracle"] > 0.55, "the better of two orientations wins something for nothing"
    assert (always["accuracy"], always["balanced_accuracy"]) == (5 / 8, 0.5)


def test_shuffled_auc_against_all_permutations():
    scores, truth = np.array([[0.1], [0.4], [0.4], [0.9], [0.7]]), np.array([0, 1, 0, 1, 1])
    every = [roc_auc_score(t, scores[:, 0]) for t in product((0, 1), repeat=5) if sum(t) == 3]
    mean, low, high = judging.shuffled_auc(scores, truth, draws=5000)
    assert mean == pytest.approx(np.mean(every), abs=0.02)
    assert (low, high) == pytest.approx((min(every), max(every)))
    assert np.isnan(judging.shuffled_auc(scores, np.ones(5, int))).all()


def test_shuffled_auc_of_seeds_is_of_their_mean():
    one = np.array([[0.1], [0.4], [0.3], [0.9]])
    opposite = np.hstack([one, -one])
    mean, low, high = judging.shuffled_auc(opposite, np.array([0, 1, 0, 1]), draws=200)
    assert (mean, low, high) == pytest.approx((0.5, 0.5, 0.5))


def collection(count=60, seed=0):
    """Features of two cameras of different scale in which the faces of `truth` agree less, and one trace rises."""
    rng = np.random.default_rng(seed)
    truth, cluster = np.arange(count) % 2, np.arange(count) // 2 % 2
    noise = {name: rng.normal(size=count) for name in [*judging.AGREEMENT, *TRACES]}
    table = pd.DataFrame(noise).assign(item_id=[f"v{i:02d}" for i in range(count)], cluster=cluster, split="train")
    table["face_ncc"] = (0.1 + 0.3 * cluster) * (5 * (1 - truth) + rng.normal(0, 0.5, count)) + cluster
    table["noise"], table["step"] = -6.0 * truth + noise["noise"], 6.0 * truth + noise["step"]
    return table, truth


def test_every_feature_is_turned_by_the_cue_and_not_by_the_truth():
    table, truth = collection()
    scores = judging.feature_scores(table, 0)
    assert set(scores) == {*judging.AGREEMENT, *TRACES}
    for name in ("face_ncc", "noise", "step"):
        assert roc_auc_score(truth, scores[name]) > 0.95, name
    turned = judging.feature_scores(table.assign(face_ncc=-table["face_ncc"]), 0)
    for name in ("face_ncc", "noise", "step"):
        assert roc_auc_score(truth, turned[name]) < 0.05, "the rule is stated beforehand, right or wrong"


class OneStore:
    def image(self, row):
        return row


def test_texture_calls_the_cluster_with_less_detail_fake(monkeypatch):
    level = {"a": [9.0, 9.1, 1.0], "b": [1.1, 0.9, 1.0], "c": [None, 9.0, 1.0], "d": [None, None, None]}
    index = pd.DataFrame(
        [(i, f, np.zeros(4)) for i in level for f in range(3)], columns=["item_id", "frame", "landmarks"]
    )

    def energies(row, landmarks):
        value = level[row["item_id"]][row["frame"]]
        return None if value is None else np.full(len(laws.COLUMNS), value)

    monkeypatch.setattr(laws, "energies", energies)
    found = judging.texture_scores(index, OneStore(), 0)
    assert found.drop("d").to_dict() == pytest.approx({"a": 1 / 3, "b": 1.0, "c": 0.5})
    assert np.isnan(found["d"])
    assert judging.texture_scores(index[index["item_id"] == "d"], OneStore(), 0).isna().all(), "no frame to cluster"


def score_rows(values, variant, seed):
    run = {"frame": -1, "score": values, "detector": "unsupervised", "variant": variant, "seed": seed, "checkpoint": ""}
    return pd.DataFrame({"item_id": [f"v{i}" for i in range(len(values))], **run})


MANIFEST = pd.DataFrame(
    {
        "item_id": [f"v{i}" for i in range(8)], "kind": "video", "dataset": "w", "split": "test", "label": TRUTH,
        "method": np.where(TRUTH, "swap", "real"), "group_id": GROUPS,
    }
)  # fmt: skip


def all_stages(seeds=(0, 1)):
    rng = np.random.default_rng(0)
    return pd.concat([score_rows(rng.random(8), name, seed) for name in judging.STAGES for seed in seeds])


def test_stages_over_seeds_with_the_kept_thresholds():
    scores = all_stages()
    limits = {0: 0.5, 1: 0.9}
    table = judging.judge_stages(scores, MANIFEST, limits, draws=50).set_index("variant")
    assert list(table.index) == list(judging.STAGES)
    final = scores[scores["variant"] == "final"].pivot(index="item_id", columns="seed", values="score")
    aucs = [roc_auc_score(TRUTH, final[s]) for s in (0, 1)]
    assert table.loc["final", "auc"] == pytest.approx(np.mean(aucs))
    assert table.loc["final", "oracle"] == pytest.approx(max(np.mean(aucs), 1 - np.mean(aucs)))
    expected = np.mean([balanced_accuracy_score(TRUTH, final[s] >= limits[s]) for s in (0, 1)])
    assert table.loc["final", "balanced_accuracy"] == pytest.approx(expected)
    assert table["balanced_accuracy"].notna().sum() == 1, "only the final score has a threshold"
    assert (table["shuffled"] - 0.5).abs().max() < 0.15


def test_stages_without_a_real_video_have_no_auc():
    table = judging.judge_stages(all_stages((0,)), MANIFEST.assign(label=1), {0: 0.5}, draws=20)
    assert table["auc"].isna().all() and table["shuffled"].isna().all()


def step_frame(real, fake):
    values = np.concatenate([real, fake])
    return pd.DataFrame({"item_id": [f"v{i}" for i in range(len(values))], **dict.fromkeys(STEPS, values)})


def test_steps_say_who_is_larger_and_how_far():
    truth, groups = (MANIFEST.set_index("item_id")[key] for key in ("label", "group_id"))
    tables = {
        "up": step_frame([0.0, 1, 2], [3.0, 4, 5, 6, 7]), "down": step_frame([9.0, 8, 7], [3.0, 4, np.nan, 6, 5])
    }  # fmt: skip
    found = judging.judge_steps(tables, truth, groups, draws=20).set_index(["backbone", "step"])
    assert len(found) == 2 * len(STEPS)
    up, down = found.loc[("up", "spearman")], found.loc[("down", "euclidean")]
    assert (up["auc"], up["ks"], up["larger"], up["videos"]) == (1.0, 1.0, "fake", 8)
    assert (down["auc"], down["ks"], down["larger"], down["videos"]) == (0.0, 1.0, "real", 7)
    same = judging.judge_steps({"x": step_frame([1.0] * 3, [1.0] * 5)}, truth, groups, draws=20)
    assert (same["auc"] == 0.5).all() and (same["ks"] == 0).all()


def blobs(count=30, apart=20.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return rng.normal(size=(count, 60)) + apart * labels[:, None] / np.sqrt(60), labels


def test_grouping_of_blobs_and_of_noise():
    points, labels = blobs()
    found = maps.grouping(maps.reduced(points, 0), labels, 0)
    assert found["purity"] == 1.0 and found["ari"] == 1.0 and found["silhouette"] > 0.3
    noise = maps.grouping(maps.reduced(blobs(400, apart=0)[0], 0), np.arange(400) // 2 % 2, 0)
    assert noise["purity"] == pytest.approx(0.5, abs=0.05) and abs(noise["ari"]) < 0.05
    # One label in ten: chance stays one half, because each label counts as much as the other.
    rare = maps.grouping(maps.reduced(blobs(400, apart=0)[0], 0), (np.arange(400) % 10 == 0).astype(int), 0)
    assert rare["purity"] == pytest.approx(0.5, abs=0.05)
    assert np.isnan(maps.grouping(points, np.zeros(30, int), 0)["purity"])


def test_reduced_keeps_distances_of_few_vectors():
    points = blobs(12)[0]
    found = maps.reduced(points, 0)
    assert found.shape == (12, 11)
    np.testing.assert_allclose(np.linalg.norm(found[0] - found[5]), np.linalg.norm(points[0] - points[5]), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_tsne_is_finite_and_repeats(count):
    points = maps.reduced(blobs(count)[0], 0)
    first, second = maps.tsne(points, 0), maps.tsne(points, 0)
    assert first.shape == (count, 2) and np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)


def stage_two(folder, count=24):
    """A stage-2 folder whose vectors part the odd items from the even ones after training only."""
    rng = np.random.default_rng(1)
    items, odd = [f"i{i:02d}" for i in range(count)], np.arange(count)[:, None] % 2
    noise = rng.normal(size=(2, count, 16)).astype(np.float32)
    vectors = {"first.features": noise[0], "last.features": noise[1] + 9 * odd.astype(np.float32)}
    save_file(vectors, folder / "embeddings.safetensors")
    (folder / "embeddings.json").write_text(json.dumps({"items": items, "frames": [0] * count}))
    known = pd.DataFrame({"truth": odd[:, 0], "pseudo": 1 - odd[:, 0], "method": "swap"}, index=items)
    return known.iloc[::-1]


def test_map_frames_before_and_after(tmp_path):
    table, numbers = maps.map_frames(tmp_path, stage_two(tmp_path), 0)
    assert table.groupby("when").size().to_dict() == {"before": 24, "after": 24}
    one = table[table["item_id"] == "i01"]
    assert (one["truth"] == "fake").all() and (one["pseudo"] == "real").all()
    purity = numbers.set_index(["when", "by"])["purity"]
    assert purity["before", "truth"] < 0.7 and purity["after", "truth"] == purity["after", "pseudo"] == 1.0


def test_maps_are_drawn_in_the_colours_of_the_kit(tmp_path):
    table, _ = maps.map_frames(tmp_path, stage_two(tmp_path), 0)
    fig = draw.draw_maps(table)
    assert [ax.get_title() for ax in fig.axes] == [
        "before training, by the truth", "after training, by the truth",
        "before training, by pseudo-label", "after training, by pseudo-label",
    ]  # fmt: skip
    drawn = sum(len(points.get_offsets()) for points in fig.axes[1].collections)
    assert drawn == 24
    interactive = draw.interactive_map(table)
    shown = {name for trace in interactive.data for name in np.asarray(trace.customdata)[:, 0]}
    assert shown == set(table["item_id"])
    assert {trace.marker.color for trace in interactive.data} == {COLOURS["real"], COLOURS["fake"]}


def test_halves_show_every_video_once():
    table, truth = collection()
    labels = pd.DataFrame({"cue": truth.astype(float)})
    table.loc[0, "cluster"] = -1
    left, right = draw.draw_halves(table, labels).axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0", "1", "none"]
    assert sum(len(points.get_offsets()) for points in left.collections) == len(table)
    assert sum(bar.get_height() for bar in right.patches) == len(table)


def test_training_curves_without_a_validation_loss():
    history = [{"epoch": e, "loss": 1.0 / (e + 1), "val_loss": None, "kept": 8 - e} for e in range(3)]
    fig = draw.draw_training({"seed 0": history, "rival": history}, {"seed 0": history})
    assert [line.get_ydata()[0] for line in fig.axes[2].lines] == [8, 8]
    assert len(fig.axes[1].lines) == 2 and np.isnan(fig.axes[0].lines[1].get_ydata()).all()


def test_steps_fill_two_rows_of_panels():
    truth = MANIFEST.set_index("item_id")["label"]
    tables = {"a": step_frame([0.0, 1, 2], [3.0, 4, 5, 6, 7]), "b": step_frame([np.nan] * 3, [np.nan] * 5)}
    fig = draw.draw_steps(tables, truth)
    assert len(fig.axes) == 2 * len(STEPS)
    assert sum(bar.get_height() for bar in fig.axes[0].patches) == pytest.approx(2), "shares of the reals, of the fakes"
    assert sum(bar.get_height() for bar in fig.axes[-1].patches) == 0


def test_stages_are_drawn_also_where_numbers_are_missing():
    for manifest in (MANIFEST, MANIFEST.assign(label=1)):
        _, ax = plt.subplots()
        draw.draw_stages(ax, judging.judge_stages(all_stages((0,)), manifest, {0: 0.5}, draws=20))
        assert [tick.get_text() for tick in ax.get_yticklabels()] == list(judging.STAGES.values())


def test_verdicts_name_the_reason_of_a_failure(tmp_path, make_clip):
    columns = ["path", "status", "verdict", "score", "reason"]
    rows = [
        (str(make_clip(tmp_path / "a.mp4")), "ok", "manipulated", 0.876, ""),
        (str(tmp_path / "gone.mp4"), "failed", "", np.nan, "no such file"),
    ]
    fig = draw.draw_verdicts(pd.DataFrame(rows, columns=columns), ["swap", "real"])
    assert [ax.get_title() for ax in fig.axes] == ["swap\nmanipulated, P(fake) 0.88", "real\nno such file"]
    assert [len(ax.images) for ax in fig.axes] == [1, 0]
