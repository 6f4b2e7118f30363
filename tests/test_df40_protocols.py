"""Protocol P3 of DF40: what is counted of its eight sets, and its figures against plain loops and scikit-learn."""

import hashlib
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score
from test_layouts import make_world
from trees import make_celebdf, make_ffpp, put, said

from unmask.data.adapters_ffpp import df40_empty_folders, df40_place
from unmask.data.datasets import index
from unmask.data.df40_protocols import P3, content_hashes, evaluate_p3, p3, published
from unmask.data.layouts import write_layout
from unmask.data.manifest import write_manifest
from unmask.evaluation import ScoreError
from unmask.metrics import equal_error_rate

EIGHT = ["heygen", "MidJourney", "whichfaceisreal", "stargan", "starganv2", "styleclip", "e4e", "CollabDiff"]


def make_p3(root):
    """The eight sets as they were released: see DF40's issues 29 and 41 for HeyGen, CollabDiff and e4e."""
    put(root, *(f"test/heygen/fake/{n}.mp4" for n in "abc"))
    put(
        root, *(f"test/heygen/real/frames/{n}/{f:03d}.png" for n in "ab" for f in range(3)), "test/heygen/real/lone.png"
    )
    for name in ("MidJourney", "whichisreal", "stargan"):
        put(root, *(f"test/{name}/{c}/{n:05d}.jpg" for c, k in (("real", 4), ("fake", 6)) for n in range(k)))
    put(root, *(f"test/styleclip/{c}/batch{b}/{n}.png" for c in ("real", "fake") for b in range(2) for n in range(3)))
    put(root, *(f"test/e4e/ff/{i}/{f:05d}.jpg" for i in ("953", "974") for f in range(4)))
    put(root, *(f"test/e4e/cdf/{k}/inversions/{n:05d}.jpg" for k in ("Celeb-real", "YouTube-real") for n in range(2)))
    put(root, "test/e4e/ff/latents.pt", *(f"test/CollabDiff/fake/{n}.png" for n in range(5)))
    return root


def row(table, name):
    return table.set_index("set").loc[name]


def test_adapter_yields_the_sets_with_their_frames_and_clips(tmp_path):
    df, notes = index(make_p3(tmp_path), "df40")
    assert set(df.loc[df["label"] == 1, "method"]) == set(EIGHT) - {"starganv2"} and set(df["split"]) == {"test"}
    places = {path: df40_place(path) for path in df["path"]}
    assert places["test/heygen/real/frames/a/001.png"] == ("heygen", "real", ("a",))
    assert places["test/heygen/fake/a.mp4"] == ("heygen", "fake", ())
    assert places["test/whichisreal/fake/00003.jpg"] == ("whichfaceisreal", "fake", ())
    assert places["test/e4e/ff/953/00001.jpg"] == ("e4e", "ff", ("953",))
    assert places["test/e4e/cdf/Celeb-real/inversions/00001.jpg"] == ("e4e", "cdf", ())
    assert df40_place("fomm/ff/frames/071_054/0.png") == ("fomm", "ff", ("071_054",))
    assert df40_place("real/e4e/ff/0.png") is None and df40_place("e4e/masks/0.png") is None
    frames = df[df["path"].str.startswith("test/heygen/real/frames/a/")]
    assert frames["source_id"].unique().tolist() == ["df40:heygen/a"] and frames["group_id"].nunique() == 1
    inverted = df[df["path"].str.startswith("test/e4e/ff/953/")]
    assert set(inverted["subject"]) == set(inverted["source_id"]) == {"ffpp:953"} and len(inverted) == 4
    assert not said(notes, "test e4e: folder missing") and said(notes, "test CollabDiff: folder missing", "real")


def test_adapter_counts_empty_folders(tmp_path):
    make_p3(tmp_path)
    for folder in (
        "test/heygen/real/frames/d",
        "test/heygen/real/frames/c",
        "test/heygen/real/masks/a",
        "test/e4e/ff/001",
    ):
        (tmp_path / folder).mkdir(parents=True)
    _, notes = index(tmp_path, "df40")
    assert said(notes, "test heygen: 2 folders in ROOT/test/heygen/real are empty: frames/c, frames/d.")
    assert said(notes, "test e4e: 1 folders in ROOT/test/e4e/ff are empty: 001.")
    assert df40_empty_folders(tmp_path / "test/stargan/real") == []
    (tmp_path / "test/stargan/real" / "odd\udcff").mkdir()
    assert df40_empty_folders(tmp_path / "test/stargan/real") == ["odd\\udcff"]


def test_p3_counts_items_clips_and_single_pictures(tmp_path):
    df, _ = index(make_p3(tmp_path), "df40")
    table, notes = p3(df)
    assert table["set"].tolist() == EIGHT == list(P3)
    counts = table.set_index("set")[["fakes", "reals", "clips", "singles", "judged"]].T.to_dict("list")
    assert counts == {
        "heygen": [3, 7, 5, 1, "clip"], "MidJourney": [6, 4, 0, 10, "frame"], "whichfaceisreal": [6, 4, 0, 10, "frame"],
        "stargan": [6, 4, 0, 10, "frame"], "starganv2": [0, 0, 0, 0, ""], "styleclip": [6, 6, 0, 12, "frame"],
        "e4e": [12, 0, 2, 4, ""], "CollabDiff": [5, 0, 0, 5, ""],
    }  # fmt: skip
    assert said(notes, "starganv2: set absent") and said(notes, "CollabDiff: no reals, and none to stand in")
    assert said(notes, "e4e: no reals, and none to stand in")
    assert said(notes, "heygen: reals and fakes differ in kind of file") and len(notes) == 4
    assert (table.loc[table["holes"] == "", "set"]).tolist() == [
        "MidJourney",
        "whichfaceisreal",
        "stargan",
        "styleclip",
    ]
    assert "same fakes in train and test" in row(table, "e4e")["known"]


def test_reals_of_the_source_stand_in(tmp_path):
    df40, _ = index(make_p3(tmp_path / "df40"), "df40")
    ffpp, _ = index(make_ffpp(tmp_path / "ffpp"), "ffpp")
    celebdf, _ = index(make_celebdf(tmp_path / "celebdf"), "celebdf2")
    both, notes = p3(pd.concat([df40, ffpp, celebdf], ignore_index=True))
    # Test reals: 953 and 974 of FF++; one of Celeb-real and one of YouTube-real.
    assert row(both, "e4e")[["fakes", "reals", "clips", "judged"]].tolist() == [12, 4, 6, "clip"]
    assert said(notes, "e4e: no reals; those of Celeb-DF and FaceForensics++ stand in.")
    assert row(both, "CollabDiff")[["reals", "stands_in", "judged"]].tolist() == [
        4,
        "Celeb-DF and FaceForensics++",
        "frame",
    ]
    assert said(notes, "CollabDiff: no reals; those of Celeb-DF and FaceForensics++ stand in, though", "CelebA")
    assert row(both, "heygen")[["reals", "stands_in"]].tolist() == [7, ""]
    one, notes = p3(pd.concat([df40, ffpp], ignore_index=True))
    assert row(one, "e4e")[["fakes", "reals", "clips"]].tolist() == [8, 2, 4]
    assert said(notes, "e4e: no reals; those of FaceForensics++ stand in.")
    assert said(notes, "e4e: 4 fakes left out: no reals of their source.")
    inverted = df40[~df40["path"].str.startswith("test/e4e/cdf")]
    only, notes = p3(pd.concat([inverted, ffpp, celebdf], ignore_index=True))
    assert row(only, "e4e")[["fakes", "reals"]].tolist() == [8, 2]  # Celeb-DF's reals are not theirs
    train = pd.concat([df40, ffpp.assign(split="train")], ignore_index=True)
    assert said(p3(train)[1], "e4e: no reals, and none to stand in")


def test_missing_classes_empty_folders_and_train_copies(tmp_path):
    make_p3(tmp_path)
    shutil.rmtree(tmp_path / "test/stargan/fake")
    shutil.rmtree(tmp_path / "test/heygen/real/frames")
    shutil.rmtree(tmp_path / "test/whichisreal")
    (tmp_path / "test/styleclip/fake/batch9").mkdir()
    put(tmp_path, *(f"train/whichisreal/{c}/{n}.jpg" for c in ("real", "fake") for n in range(3)))
    df, _ = index(tmp_path, "df40")
    write_manifest(df, tmp_path / "manifest.parquet")
    table, notes = p3(df, tmp_path / "manifest.parquet")
    assert said(notes, "stargan: no fakes.") and row(table, "stargan")[["reals", "judged"]].tolist() == [4, ""]
    assert said(notes, "heygen: no clips in both classes") and row(table, "heygen")["judged"] == "frame"
    assert said(notes, "whichfaceisreal: no test items") and row(table, "whichfaceisreal")["fakes"] == 0
    assert said(notes, "styleclip: 1 empty folders: fake/batch9.")
    assert not said(p3(df)[1], "styleclip")


def test_duplicates_between_splits_by_content(tmp_path):
    make_p3(tmp_path)
    for path, content in {
        "test/e4e/ff/953/00000.jpg": b"one",
        "train/e4e/ff/071/00000.jpg": b"one",
        "train/e4e/ff/054/00000.jpg": b"one",
        "test/e4e/ff/953/00001.jpg": b"two",
        "train/e4e/ff/071/00001.jpg": b"three",
        "train/e4e/ff/087/0.jpg": b"four",
    }.items():
        put(tmp_path, path, content=content)
    df, _ = index(tmp_path, "df40")
    write_manifest(df, tmp_path / "manifest.parquet")
    (tmp_path / "train/e4e/ff/087/0.jpg").unlink()
    hashes = content_hashes(df, tmp_path / "manifest.parquet")
    e4e = df[df["method"] == "e4e"]
    assert set(hashes) == set(e4e.loc[~e4e["path"].str.contains("/087/"), "item_id"])
    first = e4e.set_index("path").loc["train/e4e/ff/071/00001.jpg", "item_id"]
    assert hashes[first] == hashlib.sha256(b"three").hexdigest()
    table, notes = p3(df, hashes=hashes)
    assert said(notes, "e4e: 1 files lie in more than one split.") and row(table, "e4e")["fakes"] == 12
    assert not said(p3(df)[1], "more than one split")


def test_world_in_df40s_layout_has_midjourney_as_videos(tmp_path):
    write_layout(make_world(tmp_path / "world"), tmp_path / "df40", "df40")
    table, notes = p3(index(tmp_path / "df40", "df40")[0])
    # Two test people: two real clips each, one synthesis as a clip and one as a picture.
    assert row(table, "MidJourney")[["fakes", "reals", "clips", "singles", "judged"]].tolist() == [2, 4, 5, 1, "clip"]
    assert sum("set absent" in note for note in notes) == 7


def test_published_figures():
    table = published()
    assert table["set"].tolist() == EIGHT and table["source"].str.len().min() > 0
    assert row(table, "e4e")[["ap", "accuracy", "oracle_accuracy"]].isna().all()
    assert row(table, "CollabDiff")[["ap", "accuracy", "oracle_accuracy"]].tolist() == pytest.approx(
        [0.611, 0.53, 0.621]
    )
    assert table.drop(columns=["set", "detector", "source"]).notna().all(axis=1).sum() == 7


# figures


def make_scores(df, seeds=(0, 1), frames=3, detector="d"):
    """Scores of every item, and of `frames` frames of a video or of the picture."""
    rng, rows = np.random.default_rng(0), []
    for seed in seeds:
        for item in df.to_dict("records"):
            own = rng.normal(0.4 + 0.2 * item["label"], 0.25, frames if item["kind"] == "video" else 1).clip(0, 1)
            rows += [(item["item_id"], f, s, seed) for f, s in enumerate(own)] + [
                (item["item_id"], -1, own.mean(), seed)
            ]
    table = pd.DataFrame(rows, columns=["item_id", "frame", "score", "seed"]).astype(
        {"frame": "int32", "seed": "int32"}
    )
    return table.assign(detector=detector, variant="plain", checkpoint="c")


@pytest.fixture
def everything(tmp_path):
    """DF40 with FF++'s reals."""
    df40, _ = index(make_p3(tmp_path / "df40"), "df40")
    return pd.concat([df40, index(make_ffpp(tmp_path / "ffpp"), "ffpp")[0]], ignore_index=True)


def picked(scores, df, where):
    """Labels and scores of the single frames of items whose path contains one of `where`, by seed."""
    ids = df.loc[df["path"].map(lambda p: any(w in p for w in where)), ["item_id", "label", "path"]]
    rows = scores[scores["frame"] >= 0].merge(ids, on="item_id")
    return {seed: part for seed, part in rows.groupby("seed")}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("stargan", ["test/stargan/"]),
        ("heygen", ["test/heygen/"]),
        ("styleclip", ["test/styleclip/"]),
        ("e4e", ["test/e4e/ff/", "youtube/c23/videos/953", "youtube/c23/videos/974"]),
        ("CollabDiff", ["CollabDiff", "youtube/c23/videos/953", "youtube/c23/videos/974"]),
    ],
)
def test_frame_figures(everything, name, where):
    scores = make_scores(everything)
    found = row(evaluate_p3(scores, everything, draws=50, threshold=0.45), name)
    parts = picked(scores, everything, where).values()
    mean = {
        "auc": np.mean([roc_auc_score(p["label"], p["score"]) for p in parts]),
        "ap": np.mean([average_precision_score(p["label"], p["score"]) for p in parts]),
        "eer": np.mean([equal_error_rate(p["label"], p["score"]) for p in parts]),
        "balanced_accuracy": np.mean([balanced_accuracy_score(p["label"], p["score"] >= 0.45) for p in parts]),
    }
    assert found[list(mean)].astype(float).to_dict() == pytest.approx(mean)
    part = list(parts)[0]
    assert found[["n_real", "n_fake"]].tolist() == [(part["label"] == 0).sum(), part["label"].sum()]
    assert found["coverage"] == 1 and found["threshold"] == 0.45 and found["low"] <= found["auc"] <= found["high"]


def test_clip_figures_only_where_there_are_clips(everything):
    scores = make_scores(everything, seeds=(0,))
    table = evaluate_p3(scores, everything, draws=50)
    assert table["set"].tolist() == EIGHT
    item = scores[scores["frame"] == -1].set_index("item_id")["score"]
    clips = {}
    for one in everything.to_dict("records"):
        path = one["path"]
        if path.startswith("test/heygen/fake/"):
            clips.setdefault(("heygen", 1, path), []).append(item[one["item_id"]])
        if path.startswith("test/heygen/real/frames/"):
            clips.setdefault(("heygen", 0, path[:-7]), []).append(item[one["item_id"]])
        if path.startswith("test/e4e/ff/"):
            clips.setdefault(("e4e", 1, path[:15]), []).append(item[one["item_id"]])
        if "original" in path and one["split"] == "test":
            clips.setdefault(("e4e", 0, path), []).append(item[one["item_id"]])
    for name, counts in (("heygen", [2, 3]), ("e4e", [2, 2])):
        own = [(label, np.mean(values)) for (which, label, _), values in clips.items() if which == name]
        found = row(table, name)
        assert found["video_auc"] == pytest.approx(roc_auc_score(*zip(*own, strict=True)))
        assert found[["clips_real", "clips_fake"]].tolist() == counts and found["reason"] == ""
    flat = row(table, "MidJourney")
    assert np.isnan(flat["video_auc"]) and flat["clips_real"] == 0 and not np.isnan(flat["auc"])
    assert flat["reason"] == "video: single pictures, no videos"
    assert row(table, "starganv2")["reason"] == "no fakes and no reals to judge"
    assert row(table, "e4e")["stands_in"] == "FaceForensics++" and row(table, "heygen")["stands_in"] == ""


def test_what_has_no_scores_has_no_figures(everything):
    scores = make_scores(everything, seeds=(0, 1))
    ids = everything.set_index("path")["item_id"]
    lost = ids[ids.index.str.startswith("test/MidJourney/fake/")]
    gone = scores["item_id"].isin(lost.iloc[:2]) & (scores["seed"] == 1)
    gone |= scores["item_id"].isin(ids[ids.index.str.startswith("test/stargan/real")])
    table = evaluate_p3(scores[~gone], everything, draws=50)
    assert row(table, "MidJourney")["coverage"] == pytest.approx(0.8) and row(table, "MidJourney")["n_fake"] == 4
    assert np.isnan(row(table, "stargan")["auc"]) and row(table, "stargan")["n_fake"] == 6
    assert row(table, "stargan")["reason"].startswith("frame: no scores of single frames in both classes")
    # A detector of clips has no scores for the frames of videos; pictures it judges as clips of one.
    videos = everything.loc[everything["kind"] == "video", "item_id"]
    of_clips = scores[(scores["frame"] == -1) | ~scores["item_id"].isin(videos)]
    found = row(evaluate_p3(of_clips, everything, draws=50), "heygen")
    assert np.isnan(found["auc"]) and not np.isnan(found["video_auc"]) and "single frames" in found["reason"]
    bare = evaluate_p3(scores[scores["item_id"].isin(ids[ids.index.str.startswith("original")])], everything, draws=50)
    assert bare["auc"].isna().all() and (bare["reason"] != "").all()
    with pytest.raises(ScoreError, match="not in the manifest"):
        evaluate_p3(scores.assign(item_id="f" * 16), everything)


def test_detectors_have_rows_of_their_own_and_training_rows_count_for_nothing(everything):
    scores = pd.concat([make_scores(everything), make_scores(everything, detector="a").assign(score=0.5)])
    table = evaluate_p3(scores, everything, draws=50)
    assert table.groupby("detector").size().to_dict() == {"a": 8, "d": 8}
    constant = table[(table["detector"] == "a") & table["auc"].notna()]
    assert (constant["auc"] == 0.5).all() and (constant["balanced_accuracy"] == 0.5).all()
    half = everything["path"].str.contains("MidJourney/fake/0000[0-2]")
    table = evaluate_p3(scores, everything.assign(split=everything["split"].mask(half, "train")), draws=50)
    assert set(table.loc[table["set"] == "MidJourney", "n_fake"]) == {3}
