"""The ablation tables against scikit-learn, what they depend on, what they say of what is missing, and their files."""

import hashlib
import json

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from test_profile import resolved

from unmask import ablation, ablation_rows, ablation_stages, published
from unmask.cli import main
from unmask.data.manifest import read_manifest, write_manifest
from unmask.evaluation import read_scores, write_scores
from unmask.figures import COLOURS, save_figure
from unmask.profile import ROOT, ProfileError, open_study
from unmask.pseudo_labels import AGREEMENT
from unmask.unsupervised import FEATURES_FILE, LABELS_FILE, TRACES

OTHERS = ["ablation_fusion", "ablation_d2st"]  # one is made of the score table of ablation_prompts, one of another


def make_manifest(groups=12):
    rows = []
    for dataset, split, count in (("world-a", "val", 4), ("world-a", "test", groups), ("world-b", "test", 8)):
        for group in range(count):
            for label, method in ((0, "real"), (1, "swap"), (1, "texture")):
                path = f"{dataset}-{split}-{group}-{method}.mp4"
                rows.append(
                    {"item_id": hashlib.sha256(path.encode()).hexdigest()[:16], "root": "media", "path": path,
                     "kind": "video", "dataset": dataset, "split": split, "label": label, "method": method,
                     "subject": f"{dataset}{split}{group}", "source_id": "", "group_id": f"{dataset}-{split}-{group}",
                     "camera": f"c{group % 3}", "annotations": ""}
                )  # fmt: skip
    return pd.DataFrame(rows).astype({"label": "int8"})


def score_table(manifest, strengths, seeds=(0, 1), rng=0):
    """Scores of all media by (detector, variant) of `strengths`, and of one frame that nothing should look at."""
    rng, tables = np.random.default_rng(rng), []
    for (detector, variant), strength in strengths.items():
        for seed in seeds:
            logit = strength * manifest["label"] + rng.normal(size=len(manifest))
            own = pd.DataFrame({"item_id": manifest["item_id"], "frame": -1, "score": 1 / (1 + np.exp(-logit))})
            frame = own.assign(frame=3, score=1 - own["score"])
            run = {"detector": detector, "variant": variant, "seed": seed, "checkpoint": ""}
            tables.append(pd.concat([own, frame]).assign(**run))
    return pd.concat(tables, ignore_index=True).astype({"frame": "int32", "seed": "int32"})


@pytest.fixture
def study(tmp_path):
    changes = {
        "evaluate.draws": 20, "ablation.sources": ["fakes"], "ablation.fusions": ["none"],
        "ablation.frequencies": ["srm"], "ablation.heads": ["logits", "gru"],
        "clip.detectors": ["ufd", "lntune", "coop"], "clip.fusions": ["F0", "F3c"],
        "clip.heads": ["linear", "text"], "d2st.arms": ["d2st", "st-adapter", "last-1"], "seeds": 2,
    }  # fmt: skip
    study = open_study(resolved(tmp_path, **changes))
    manifest = make_manifest()
    write_manifest(manifest, study.work / "manifest.parquet")
    cells = ["sbi-none-none", "fakes-none-srm"]
    clip = ["ufd", "lntune", "coop", "lare-error", *(f"clip-lare:F{k}{t}" for k in ("0", "3c") for t in ("", "-text"))]
    adapted = {("lntune", "frames"): 1.0, ("ufd", "frames"): 0.5, ("last-1, stage 2", "clip"): 1.5}
    adapted |= {(f"{name}, stage {k}", look): k for name, k in (("d2st", 1), ("d2st", 2), ("d2st", 3), ("unaligned", 3))
                for look in ("frames", "clip")}  # fmt: skip
    given = {
        "unsupervised": {("unsupervised", variant): k / 4 for k, variant in enumerate(ablation_stages.STAGES)},
        "ablation": {(head, cell): k + (head == "gru") for head in ("logits", "gru") for k, cell in enumerate(cells)},
        "clip": {(name, ""): 0.5 * k for k, name in enumerate(clip)},
        "clip_d2st": adapted | {("st-adapter, stage 2", "clip"): 2.0},
    }
    for k, (name, strengths) in enumerate(given.items()):
        path = study.output(f"scores/{name}.parquet")
        write_scores(score_table(manifest, strengths, rng=k), path)
    return study


def test_cells_are_mean_aucs_over_seeds_of_test_media_with_their_counts(study):
    manifest = read_manifest(study.work / "manifest.parquet").set_index("item_id")
    table = ablation.make(study, "ablation_prompts").set_index(["dataset", "arm"])
    scores = read_scores(study.work / "scores/clip.parquet")
    assert list(table.loc["world-a"].index) == ["ufd", "lntune", "coop"], "the profile's order"

    def auc(name, dataset):
        part = scores[(scores["detector"] == name) & (scores["frame"] == -1)].join(manifest, on="item_id")
        part = part[(part["split"] == "test") & (part["dataset"] == dataset)]
        return np.mean([roc_auc_score(own["label"], own["score"]) for _, own in part.groupby("seed")])

    for (dataset, arm), row in table.iterrows():
        assert row["auc"] == pytest.approx(auc(arm, dataset)), (dataset, arm)
        assert row["gain"] == pytest.approx(auc(arm, dataset) - auc("ufd", dataset), abs=1e-12)
        groups = 12 if dataset == "world-a" else 8
        assert (row["seeds"], row["items"], row["n_real"], row["n_fake"]) == (2, 3 * groups, groups, 2 * groups)
        assert row["majority"] == pytest.approx(2 / 3) and row["low"] <= row["auc"] <= row["high"]
    assert set(table["method"]) == {"all"}


def test_the_grid_is_judged_by_forgery_too_and_names_its_parts(study):
    table = ablation.make(study, "ablation_sbi")
    assert set(table["method"]) == {"all", "swap", "texture"} and len(table) == 2 * 3 * 4
    row = table.set_index(["dataset", "method", "source", "head"]).loc[("world-b", "swap", "fakes", "gru")]
    assert (row["fusion"], row["frequency"], row["items"], row["n_real"], row["n_fake"]) == ("none", "srm", 16, 8, 8)
    plain = table[(table["arm"] == "sbi-none-none logits") & (table["method"] == "all")]
    assert (
        (plain["gain"] == 0).all()
        and plain["published"].tolist()[0].startswith("SBI")
        and not plain.iloc[1]["published"]
    )


def test_every_arm_of_the_adapters_has_its_row_whatever_the_profile_adds(study):
    arms = ablation.make(study, "ablation_d2st")["arm"].unique()
    assert {"last-1, stage 2, clip", "unaligned, stage 3, frames", "lntune, frames"} <= set(arms) and len(arms) == 12


def change_one(study, name, detector, item_id, change):
    """Change the score of one medium by one detector of seed 0."""
    path = study.work / f"scores/{name}.parquet"
    scores = read_scores(path)
    where = (scores["detector"] == detector) & (scores["item_id"] == item_id) & (scores["frame"] == -1)
    where &= scores["seed"] == 0
    assert where.sum() == 1
    scores.loc[where, "score"] = change(scores.loc[where, "score"])
    write_scores(scores, path)


def tables(study, names):
    return {name: ablation.make(study, name) for name in names}


def test_one_changed_score_changes_the_cells_that_depend_on_it_and_no_other(study):
    manifest, before = read_manifest(study.work / "manifest.parquet"), tables(study, ["ablation_prompts", *OTHERS])
    fakes = manifest[(manifest["label"] == 1) & (manifest["dataset"] == "world-a")]
    change_one(study, "clip", "coop", fakes.loc[fakes["split"] == "val", "item_id"].iloc[0], lambda s: 1 - s)
    validated = ablation.make(study, "ablation_prompts")
    pd.testing.assert_frame_equal(validated, before["ablation_prompts"])  # validation media never count
    change_one(study, "clip", "coop", fakes.loc[fakes["split"] == "test", "item_id"].iloc[0], lambda s: 0 * s)
    after = tables(study, before)
    for name in OTHERS:
        pd.testing.assert_frame_equal(after[name], before[name])
    old, new = before["ablation_prompts"], after["ablation_prompts"]
    own = (old["arm"] == "coop") & (old["dataset"] == "world-a")
    assert own.sum() == 1
    for column in old:
        changed = ~((old[column] == new[column]) | (old[column].isna() & new[column].isna()))
        if column in ("auc", "low", "high", "gain", "gain_low", "gain_high", "p"):
            assert not changed[~own].any() and (changed[own].all() or column not in ("auc", "gain")), column
        elif column not in ("p_holm", "best"):  # these answer to all rivals together
            assert not changed.any(), column


def test_a_detector_without_scores_says_so_and_the_others_stay(study):
    before = ablation.make(study, "ablation_prompts").set_index(["dataset", "arm"])
    path = study.work / "scores/clip.parquet"
    scores = read_scores(path)
    write_scores(scores[scores["detector"] != "lntune"], path)
    table = ablation.make(study, "ablation_prompts")
    (gone,) = table[table["arm"] == "lntune"].to_dict("records")
    assert gone["note"].startswith("missing") and np.isnan(gone["auc"]) and gone["items"] is None
    left = table[table["arm"] != "lntune"].set_index(["dataset", "arm"])
    for column in ("auc", "low", "high", "gain", "p"):
        pd.testing.assert_series_equal(left[column], before.loc[left.index, column])
    write_scores(scores[scores["detector"] != "ufd"], path)
    table = ablation.make(study, "ablation_prompts")
    assert table["gain"].isna().all() and table["p_holm"].isna().all(), "without the control no gain can be told"
    assert table.loc[table["arm"] == "coop", "auc"].tolist() == before.loc[(slice(None), "coop"), "auc"].tolist()


def test_a_chapter_without_scores_is_one_row_and_other_tables_do_not_mind(study):
    before = tables(study, ["ablation_unsupervised", "ablation_d2st"])
    (study.work / "scores/clip.parquet").unlink()
    (study.work / "results").mkdir()
    (study.work / "results/07_clip_prompts.json").write_text(json.dumps({"numbers": {"ended": "No fakes."}}))
    for name in ("ablation_prompts", "ablation_fusion"):
        (row,) = ablation.make(study, name).to_dict("records")
        assert (row["arm"], row["note"]) == ("all", "missing: No fakes.") and np.isnan(row["auc"])
    for name, table in tables(study, before).items():
        pd.testing.assert_frame_equal(table, before[name])
    for name in ("ablation_prompts", "ablation_features", "ablation_clustering", "ablation_cost", "ablation_published"):
        ablation.save_table(study, name)  # of chapters that left nothing at all
        assert (study.tables / f"{name}.tex").is_file()


def test_the_best_is_marked_with_what_no_paired_test_shows_to_be_worse():
    manifest = make_manifest(groups=40)
    test = manifest[(manifest["split"] == "test") & (manifest["dataset"] == "world-a")].reset_index(drop=True)
    scores = score_table(test, {("good", ""): 4.0, ("guess", ""): 0.0, ("fair", ""): 1.0})
    twin = scores[scores["detector"] == "good"].assign(detector="twin")
    ups = twin["item_id"] == test.loc[test["label"] == 1, "item_id"].iloc[0]
    twin.loc[ups, "score"] = 0.999  # one more fake on top: no worse than good, and by as much as nothing better
    table = ablation_rows.judge(pd.concat([scores, twin]), test, "guess", draws=200).set_index("arm")
    assert table["auc"].idxmax() in ("twin", "good")
    assert sorted(table.loc[["good", "twin"], "best"]) == ["=", "best"]
    assert table.loc[["guess", "fair"], "best"].tolist() == ["", ""]
    bold = ablation.bold(table.reset_index())
    assert bold.sum().sum() == 1 and bold.loc[table["best"].tolist().index("best"), "auc"]


def test_media_of_one_class_alone_give_no_table_but_no_error():
    manifest = make_manifest()
    reals = manifest[(manifest["split"] == "test") & (manifest["label"] == 0)]
    assert ablation_rows.judge(score_table(reals, {("a", ""): 1.0, ("b", ""): 1.0}), reals, "a", draws=20).empty
    both = manifest[(manifest["split"] == "test") & (manifest["dataset"] == "world-b")]
    scores = score_table(both, {("a", ""): 1.0, ("b", ""): 1.0})
    fakes = both.loc[both["label"] == 1, "item_id"]
    scores = scores[~((scores["detector"] == "b") & scores["item_id"].isin(fakes))]
    table = ablation_rows.judge(scores, both, "a", draws=20)
    assert table["auc"].isna().all() and (table["best"] == "").all()


def test_saved_tables_are_the_chapters_files_and_the_command_makes_them_again(study, capsys, monkeypatch):
    monkeypatch.setattr("unmask.ablation_cost.COSTED", ())
    ablation.save_table(study, "ablation_prompts")
    files = [study.tables / f"ablation_prompts{suffix}" for suffix in (".csv", ".md", ".tex", ".json")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    assert main(["table", "ablation_prompts", "--profile", str(study.work / "profile.yaml")]) == 0
    assert [file.read_bytes() for file in files] == before
    assert "lntune" in capsys.readouterr().out
    record = json.loads(files[3].read_text())
    assert record["n"] == {"media": 60} and np.sum(record["numbers"]["bold"]) == 2
    assert main(["table", "ablation_prompt", "--profile", str(study.work / "profile.yaml")]) == 2
    assert "ablation_prompts" in capsys.readouterr().err
    with pytest.raises(ProfileError, match="ablation_cost"):
        ablation.make(study, "")


def test_clusters_are_judged_by_recording_with_a_jackknife(study):
    manifest = read_manifest(study.work / "manifest.parquet")
    rng = np.random.default_rng(0)
    truth = manifest["camera"].str[1:].astype(int).to_numpy()
    recording = np.unique(manifest["group_id"], return_inverse=True)[1]
    noisy = np.where(rng.random(len(truth)) < 0.2, rng.integers(0, 3, len(truth)), truth)
    lost = np.where(np.arange(len(truth)) % 9 == 0, -1, truth)
    found = {"right": truth + 5, "noisy": noisy, "lost": lost, "control: random": rng.integers(0, 3, len(truth))}
    (study.work / "cameras").mkdir()
    pd.DataFrame({"item_id": manifest["item_id"], "recording": recording, **found}).to_parquet(
        study.work / ablation_stages.CLUSTERS
    )
    table = ablation.make(study, "ablation_clustering").set_index("arm")
    alone = np.where(lost == -1, 100 + np.arange(len(lost)), lost)
    for name, labels in (("noisy", noisy), ("lost", alone)):
        row, ari = table.loc[name], adjusted_rand_score(truth, labels)
        without = []
        for one in range(recording.max() + 1):
            keep = recording != one
            without.append(adjusted_rand_score(truth[keep], labels[keep]))
        error = np.sqrt((len(without) - 1) * np.var(without))
        reach = 2.0687 * error  # t, 23 degrees of freedom
        assert row["ari"] == pytest.approx(ari) and row["recordings"] == 24
        assert row["low"] == pytest.approx(ari - reach, abs=1e-4)
        assert row["high"] == pytest.approx(min(ari + reach, 1), abs=1e-4)
        assert row["gain"] == pytest.approx(ari - 1) and row["p"] < 0.05
    assert table["best"].tolist() == ["best", "", "", ""] and np.isnan(table.loc["right", "p"])
    study.results("02_camera_clustering", {"ended": "No face."})
    assert ablation.make(study, "ablation_clustering")["note"].tolist() == ["missing: No face."], "of an earlier run"
    assert table.loc["right", ["low", "high"]].tolist() == [1, 1]


def test_measurements_are_judged_on_the_videos_that_they_label(study):
    chapter = "03_unsupervised"
    assert "left no results" in ablation.make(study, "ablation_features")["note"].iloc[0]
    manifest = read_manifest(study.work / "manifest.parquet")
    manifest.loc[manifest["dataset"] == "world-a", "split"] = "train"
    manifest.loc[manifest["group_id"] == "world-a-test-0", "split"] = "test"
    write_manifest(manifest, study.work / "manifest.parquet")
    part, rng = manifest[manifest["dataset"] == "world-a"].reset_index(drop=True), np.random.default_rng(1)
    strong = part["label"] + 0.7 * rng.normal(size=len(part))
    values = {name: rng.normal(size=len(part)) for name in (*AGREEMENT, *TRACES)} | {"face_ncc": -strong}
    labels = {"cue": 1 / (1 + np.exp(-strong)), "traces": rng.random(len(part)), "p_fake": rng.random(len(part))}
    folder = study.output(f"unsupervised/{FEATURES_FILE}").parent
    about = part[["item_id", "split"]].assign(cluster=0)
    about.assign(**values).to_parquet(folder / FEATURES_FILE)
    about.assign(**labels).sample(frac=1, random_state=0).to_parquet(folder / LABELS_FILE)
    baseline = {"by": "published baseline (texture)", "videos": 30, "auc": 0.6, "low": 0.5, "high": 0.7}
    study.results(chapter, {"pseudo_labels": [baseline, baseline | {"by": "cue"}]})
    table = ablation.make(study, "ablation_features").set_index("arm")
    judged = part["split"] != "test"
    assert (~judged).sum() == 3
    for name, key in (("camera cue", "cue"), ("traces", "traces"), ("both", "p_fake")):
        assert table.loc[name, "auc"] == pytest.approx(roc_auc_score(part["label"][judged], labels[key][judged])), name
    assert table.loc["camera cue", "items"] == judged.sum() and len(table) == 3 + len(AGREEMENT) + len(TRACES) + 1
    last = table.iloc[-1]
    assert (last.name, last["items"], last["auc"], last["note"]) == (baseline["by"], 30, 0.6, "not paired")
    assert np.isnan(last["p"]) and last["n_real"] is None
    study.results(chapter, {"ended": "No video."})
    assert ablation.make(study, "ablation_features")["note"].tolist() == ["missing: No video."], "of an earlier run"


def test_published_numbers_stand_beside_and_in_a_table_of_their_own(study):
    table = ablation.make(study, "ablation_published")
    assert set(table["table"]) == set(published.names()) and table["source"].ne("").all()
    biased = table[(table["tested_on"] == "Celeb-DF-v2") & (table["value"] == 85.88)].iloc[0]
    assert biased["majority"] == pytest.approx(100 * 5600 / 6600), "so nearly chance"
    prompts = ablation.make(study, "ablation_prompts")
    assert "98.54" in prompts.loc[prompts["arm"] == "coop", "published"].iloc[0]
    assert (prompts["published"] != "").sum() == 2 and prompts["auc"].max() <= 1


def test_every_counterpart_is_an_arm_of_its_table(tmp_path, monkeypatch):
    arms = {}

    def contest(study, found, control, counterparts, **_):
        arms[counterparts] = {arm.name for arm in found}
        return pd.DataFrame(columns=ablation_rows.COLUMNS)

    for module in (ablation, ablation_stages):
        monkeypatch.setattr(module, "contest", contest)
    study = open_study(resolved(tmp_path, "paper"))
    for name in published.names():
        ablation.make(study, f"ablation_{name}")
        rows = set(published.read(name)["row"]) - {""}
        assert rows and rows <= arms[name], f"{name}: {sorted(rows - arms[name])}"


def test_the_stages_have_their_published_counterpart_beside(study):
    table = ablation.make(study, "ablation_unsupervised")
    beside = table[table["published"] != ""]
    assert beside["arm"].tolist() == ["4: final"] and "85.88 Celeb-DF-v2" in beside["published"].iloc[0]


def test_tables_name_the_seeds_behind_them(study):
    for name, seeds in (("ablation_prompts", [0, 1]), ("ablation_features", [0]), ("ablation_published", [])):
        ablation.save_table(study, name)
        assert json.loads((study.tables / f"{name}.json").read_text())["seeds"] == seeds, name


@pytest.mark.parametrize("grid", [True, False])
def test_chapter_10_draws_the_grid_and_goes_on_without_one(study, grid):
    if not grid:
        (study.work / "scores/ablation.parquet").unlink()
    cells = [cell.source for cell in nbformat.read(ROOT / "notebooks/10_ablation.ipynb", 4).cells]
    start = next(k for k, source in enumerate(cells) if source.startswith("table = ablation.save_table"))
    names = {"study": study, "ablation": ablation, "plt": plt, "sns": sns, "COLOURS": COLOURS,
             "save_figure": save_figure, "display": lambda *_: None}  # fmt: skip
    for source in cells[start : start + 3]:
        exec(source, names)
    assert [(study.figures / f"ablation_{name}.png").is_file() for name in ("gain", "families")] == [grid, grid]
    plt.close("all")
