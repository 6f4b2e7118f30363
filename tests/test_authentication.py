"""One video judged alone: the same answer in any company, a row for every input, and all stages on the command line.

Drawn faces are not always found, so the face is found here by where it was drawn on average.
"""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from test_unsupervised import SETTINGS, own_manifest, profile_of

from unmask import authentication, cli, preprocessing, unsupervised
from unmask.authentication import VERDICTS, authenticate
from unmask.data.faces import Face, LocatorError, bounding_box
from unmask.data.manifest import read_manifest, write_manifest
from unmask.detectors.base import CheckpointError
from unmask.unsupervised import STEPS, THRESHOLD_FILE, Judge

COLUMNS = ["path", "status", "verdict", "score", "centroid", "classifier", "measured", "no-camera", "camera", *STEPS,
           "filmed_by", "reason"]  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny_world):
    """The world's folder and its videos: the manifest by path."""
    rows = read_manifest(tiny_world / "manifest.parquet").query("kind == 'video' and dataset == 'world-a'")
    return tiny_world, rows.set_index("path")


@pytest.fixture(scope="module")
def points(world):
    """The mean of the landmarks of all videos, float32[68,2]."""
    folder, rows = world
    found = [np.load(folder / path)["landmarks"].mean(0)[:68] for path in rows["annotations"]]
    return np.mean(found, 0).astype(np.float32)


@pytest.fixture(autouse=True)
def located(monkeypatch, points):
    """Every frame of at least 64 pixels a side has a face at `points`, found in this process."""

    class Locator:
        name = "haar"
        hash = "drawn"

        def locate(self, frame, index=0):
            return [Face(bounding_box(points), 1.0, points)] if min(frame.shape[:2]) >= 64 else []

    build = preprocessing.build_locator
    monkeypatch.setattr(preprocessing, "build_locator", lambda name, **at: build(name, **at) if at else Locator())
    preprocessing._worker_locator.cache_clear()

    def here(*arguments, **options):
        return preprocessing.preprocess(*arguments, **options | {"workers": 0})

    monkeypatch.setattr(authentication, "preprocess", here)
    yield
    preprocessing._worker_locator.cache_clear()


@pytest.fixture(scope="module")
def model(tiny_world, tiny_crops, tmp_path_factory):
    """What stages 1 to 3 left; not to be changed."""
    out = tmp_path_factory.mktemp("model")
    for stage in (1, 2, 3):
        unsupervised.run_stage(stage, profile_of(), out, tiny_crops, tiny_world / "manifest.parquet", 0)
    return out


def judged(media, model, out, **options):
    return authenticate(media, model, out, profile_of(), 0, locator="haar", **options)


def test_every_input_has_one_row_in_its_order(world, model, tmp_path, make_clip):
    folder, rows = world
    clip = folder / rows.index[0]
    media = tmp_path / "media"
    media.mkdir()
    (media / "empty.mp4").touch()
    (media / "text.mp4").write_text("not a video")
    make_clip(media / "small.mp4", height=48, width=48)  # too small for a face
    shutil.copy(clip, media / "größe, „ü“ 人.mp4")
    table = judged([tmp_path / "gone.mp4", clip, media], model, tmp_path / "verdicts.csv")
    assert list(table) == COLUMNS
    names = ["empty.mp4", "größe, „ü“ 人.mp4", "small.mp4", "text.mp4"]
    assert table["path"].tolist() == [str(tmp_path / "gone.mp4"), str(clip), *(str(media / name) for name in names)]
    assert table["status"].tolist() == ["failed", "ok", "failed", "ok", "failed", "failed"]
    reasons = table["reason"].tolist()
    assert [reasons[i] for i in (0, 1, 2, 3, 4)] == ["file not found", "", "empty file", "", "no face found"]
    assert reasons[5] != "" and not any("\n" in reason for reason in reasons)
    failed = table[table["status"] == "failed"]
    assert (failed["verdict"] == "").all() and failed["score"].isna().all() and (failed["filmed_by"] == -1).sum() >= 3
    ok = table[table["status"] == "ok"].drop(columns="path").reset_index(drop=True)
    assert ok["verdict"].isin(VERDICTS).all() and ok["score"].between(0, 1).all()
    pd.testing.assert_frame_equal(ok.iloc[[0]], ok.iloc[[1]].set_axis([0]), atol=1e-6)
    written = pd.read_csv(tmp_path / "verdicts.csv", keep_default_na=False, na_values={"score": ""})
    assert list(written) == COLUMNS and written["path"].tolist() == table["path"].tolist()
    assert written["verdict"].tolist() == table["verdict"].tolist()
    assert np.allclose(written["score"], table["score"], atol=1e-6, equal_nan=True)


def test_alone_and_in_company_a_file_has_the_same_row(world, model, tmp_path):
    folder, rows = world
    media = [folder / path for path in rows.index[:12]]
    together = judged(media, model, tmp_path / "all.csv").set_index("path")
    assert together["score"].nunique() > 6
    lines = (tmp_path / "all.csv").read_text().splitlines()
    for k in (0, 7, 11):
        alone = judged([media[k]], model, tmp_path / "one.csv").set_index("path")
        pd.testing.assert_frame_equal(alone, together.loc[[str(media[k])]], atol=1e-6, rtol=1e-5)
        again = judged([media[k]], model, tmp_path / "again.csv")
        assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "one.csv").read_bytes() and len(again) == 1
        assert lines[0] == (tmp_path / "one.csv").read_text().splitlines()[0]
    shutil.copy(media[7], tmp_path / "renamed")
    other = judged([tmp_path / "renamed"], model, tmp_path / "other.csv")
    assert other["score"][0] == pytest.approx(together.loc[str(media[7]), "score"], abs=1e-6), "its name says nothing"


def test_the_camera_of_a_training_video_is_recognised(world, model, tmp_path):
    folder, rows = world
    clusters = pd.read_parquet(model / "cameras/clusters.parquet").set_index("item_id")
    own = rows[rows["split"] != "test"].assign(cluster=lambda part: part["item_id"].map(clusters["cluster"]))
    table = judged([folder / path for path in own.index], model, tmp_path / "verdicts.csv")
    attributed = own["cluster"].to_numpy() >= 0
    assert attributed.sum() > 10
    assert (table["filmed_by"].to_numpy() == own["cluster"].to_numpy())[attributed].mean() > 0.9


def test_the_threshold_decides_and_only_the_verdict(world, model, tmp_path):
    folder, rows = world
    shutil.copytree(model, tmp_path / "model")
    media, tables = [folder / path for path in rows.index[:6]], []
    path = tmp_path / "model/stage3-0" / THRESHOLD_FILE
    first = judged(media, model, tmp_path / "verdicts.csv")
    middle = first["score"].sort_values().iloc[3]
    for threshold in (0.0, middle, 1.01):
        path.write_text(json.dumps({"threshold": float(threshold)}))
        tables.append(judged(media, tmp_path / "model", tmp_path / "verdicts.csv"))
    assert set(tables[0]["verdict"]) == {"manipulated"} and set(tables[2]["verdict"]) == {"authentic"}
    assert ((tables[1]["verdict"] == "manipulated") == (first["score"] >= middle)).all()
    for table in tables:
        pd.testing.assert_frame_equal(table.drop(columns="verdict"), first.drop(columns="verdict"))


def test_nothing_but_failures_is_a_table_too(model, tmp_path, make_clip):
    (tmp_path / "empty.mp4").touch()
    small = make_clip(tmp_path / "small.mp4", height=48, width=48)
    for media in ([tmp_path / "empty.mp4"], [small], [small, tmp_path / "empty.mp4"]):
        table = judged(media, model, tmp_path / "verdicts.csv")
        assert list(table) == COLUMNS and len(table) == len(media)
        assert (table["status"] == "failed").all() and (table["verdict"] == "").all() and table["score"].isna().all()
        assert (table["reason"] != "").all() and (tmp_path / "verdicts.csv").read_text().count("\n") == len(media) + 1


def test_a_picture_is_judged_by_what_it_can_show(world, model, tmp_path):
    folder = world[0]
    pictures = read_manifest(folder / "manifest.parquet").query("kind == 'image' and dataset == 'world-a'")["path"]
    table = judged([folder / pictures.iloc[0]], model, tmp_path / "verdicts.csv")
    assert table["status"].tolist() == ["ok"] and table["score"].between(0, 1).all()
    assert table[list(STEPS)].isna().all(axis=None)


def test_frames_of_another_size_know_no_camera(model, tmp_path, make_clip):
    clip = make_clip(tmp_path / "other.mp4", height=120, width=160)
    table = judged([clip], model, tmp_path / "verdicts.csv")
    assert table["status"].tolist() == ["ok"] and table["filmed_by"].tolist() == [-1]
    assert table["camera"][0] == 0.5 and table["score"][0] == pytest.approx(table["no-camera"][0])


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("stage2-0/config.json", "run stage 2"), ("stage3-0/config.json", "run stage 3"),
        ("stage3-0/traces.json", "run stage 3"), ("stage3-0/threshold.json", "run stage 3"),
        ("cameras.json", "run stage 1"), ("cameras.safetensors", "run stage 1"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_whole_is_refused(world, model, tmp_path, gone, says):
    folder, rows = world
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / gone).unlink()
    with pytest.raises(CheckpointError, match=says):
        judged([folder / rows.index[0]], tmp_path / "model", tmp_path / "verdicts.csv")
    assert not (tmp_path / "verdicts.csv").exists()


def test_a_locator_that_does_not_exist_is_refused(world, model, tmp_path, monkeypatch):
    def missing(name):
        raise LocatorError("no such locator")

    monkeypatch.setattr(preprocessing, "build_locator", missing)
    with pytest.raises(LocatorError):
        judged([world[0] / world[1].index[0]], model, tmp_path / "verdicts.csv")


def test_its_scores_are_those_of_the_study(tiny_world, tiny_crops, model, tmp_path, monkeypatch):
    """With the same crops, a file and a video of the study get the same score."""
    manifest = read_manifest(tiny_world / "manifest.parquet")
    rows = manifest.query("kind == 'video' and split == 'test'").iloc[:4]
    clusters = pd.read_parquet(model / "cameras/clusters.parquet")
    items, fingerprints = rows["item_id"], model / "cameras/fingerprints"
    with monkeypatch.context() as patch:
        true = Judge.load.__func__
        patch.setattr(Judge, "load", classmethod(lambda cls, out, seed, control=False: true(cls, out, seed)))
        scores = unsupervised.score(tiny_crops, fingerprints, clusters, model, items, [0])
    scores = scores[scores["variant"] == "final"].set_index("item_id")["score"]

    def annotated(manifest_path, out, **options):
        listed = read_manifest(manifest_path)
        links = [str(tiny_world / path) for path in rows["annotations"]]
        for k, link in enumerate(links):
            (manifest_path.parent / "media" / f"{k}.npz").symlink_to(link)
        write_manifest(listed.assign(annotations=[f"{k}.npz" for k in range(len(listed))]), manifest_path)
        return preprocessing.preprocess(manifest_path, out, **options | {"workers": 0, "locator": "annotations"})

    monkeypatch.setattr(authentication, "preprocess", annotated)
    found = judged([tiny_world / path for path in rows["path"]], model, tmp_path / "verdicts.csv")
    assert found["reason"].tolist() == [""] * 4
    assert np.allclose(found["score"], scores.loc[items], atol=1e-5)


# ---- the command line


def test_all_stages_on_the_command_line(world, tiny_crops, model, tmp_path, capsys):
    folder, rows = world
    manifest = own_manifest(folder, tmp_path / "manifest.parquet")
    out, media = tmp_path / "out", [str(folder / path) for path in rows.index[:2]]
    common = ["--out", str(out), "--seed", "0", "--profile", "tiny", *SETTINGS]
    for stage, said in ((1, "taken for fakes"), (2, "stage2-0"), (3, "stage3-0")):
        given = ["--manifest", str(manifest)] if stage == 1 else []
        assert cli.main(["unsupervised", "--stage", str(stage), "--crops", str(tiny_crops), *given, *common]) == 0
        printed = capsys.readouterr().out
        assert said in printed and str(out) in printed
    last = ["--media", *media, "gone.mp4", "--scores", str(tmp_path / "v.csv"), "--locator", "haar", "--workers", "1"]
    assert cli.main(["unsupervised", "--stage", "4", *last, *common]) == 0
    printed = capsys.readouterr().out
    assert all(path in printed for path in [*media, "gone.mp4"])
    table = pd.read_csv(tmp_path / "v.csv")
    assert table["path"].tolist() == [*media, "gone.mp4"] and table["status"].tolist() == ["ok", "ok", "failed"]
    expected = judged([folder / path for path in rows.index[:2]], model, tmp_path / "expected.csv")
    assert np.allclose(table["score"][:2], expected["score"], atol=1e-5), "the same as in Python"
