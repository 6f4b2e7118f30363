"""Verdicts by hand-made voices, media judged by a small panel, and pages that hold everything."""

import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import ipywidgets
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import tiny_profile
from PIL import Image
from scipy.special import expit, logit
from test_profile import resolved

from unmask import explain as explaining
from unmask import panel, preprocessing, verdicts
from unmask.data.crops import CropStore, read_index
from unmask.data.faces import Face
from unmask.data.landmarks import CANONICAL_68
from unmask.data.manifest import read_manifest, write_manifest
from unmask.data.video import encode
from unmask.detectors.base import load_checkpoint
from unmask.explain_pages import page_name
from unmask.profile import ROOT
from unmask.scoring import score_crops
from unmask.verdicts import Voice, decide

GOOD = {"picture": False, "total": 100, "frames": 8, "faces": 8, "face": 120.0, "qp": 20.0, "bits": None, "jpeg": None}


def voices(*odds, error=0.2, silent=""):
    return [Voice(f"d{i}", float(expit(z)), z, error, silent) for i, z in enumerate(odds)]


def test_a_verdict_is_the_mean_of_the_votes_log_odds():
    found = decide(GOOD, [*voices(3.0, 1.0), *voices(-9.0, silent="not calibrated")])
    assert found.verdict == "fake" and found.votes == 2 and found.agreement == 1 and found.reasons == ()
    np.testing.assert_allclose((found.probability, found.low, found.high), expit([2.0, 2 - 0.392, 2 + 0.392]))
    assert decide(GOOD, voices(-3.0, -1.0)).verdict == "real"
    assert "disagree" in decide(GOOD, voices(5.0, 5.0, -1.0)).reasons[0], "a third is against"
    assert decide(GOOD, voices(5.0, 5.0, 5.0, -1.0)).verdict == "fake", "a quarter is"
    mixed = decide(GOOD, voices(4.0, 4.0, -0.5))
    assert mixed.verdict == "fake" and mixed.agreement == pytest.approx(2 / 3)


@pytest.mark.parametrize("changes,reason", [
    ({"total": 5}, "too short: 5 frames"), ({"faces": 3}, "too few frames with a face: 3 of 8"),
    ({"face": 30.0}, "face too small: 30 pixels"), ({"qp": 41.0}, "too compressed: H.264 quantiser 41"),
    ({"qp": None, "bits": 0.002}, "too compressed: 0.0020 bits"),
    ({"picture": True, "total": 1, "qp": None, "jpeg": 12.0}, "too compressed: JPEG quality 12"),
])  # fmt: skip
def test_bad_ground_gives_no_verdict_however_sure_the_votes(changes, reason):
    found = decide(GOOD | changes, voices(5.0, 5.0))
    assert found.verdict == "cannot tell" and len(found.reasons) == 1 and found.reasons[0].startswith(reason)
    assert found.probability > 0.99


@pytest.mark.parametrize("said,reason", [
    (voices(3.0, -2.0), "the detectors disagree: 1 say fake, 1 say real"), (voices(0.5, 0.4), "too near to even"),
    (voices(2.0, error=1.5), "too uncertain: P(fake) is 0.88"), (voices(2.0, error=math.nan), "too uncertain"),
    (voices(4.0, silent="not calibrated"), "no detector here is calibrated"),
])  # fmt: skip
def test_votes_that_decide_nothing(said, reason):
    found = decide(GOOD, said)
    assert found.verdict == "cannot tell" and any(r.startswith(reason) for r in found.reasons)


def test_at_the_limits_a_verdict_stands():
    at = {"total": 8, "faces": 4, "face": 40.0, "qp": 38.0}
    assert verdicts.quality(GOOD | at) == []
    assert verdicts.quality(GOOD | {"qp": None, "face": None, "total": None, "frames": 0, "faces": 0}) == []
    assert verdicts.quality(GOOD | {"picture": True, "total": 1, "jpeg": 30.0}) == []


def test_limits_say_where_a_verdict_stands():
    told = {name: limit.stands for name, limit in verdicts.LIMITS.items()}
    assert told == {
        "frames": "at least 8", "share": "at least 0.5", "face": "at least 40", "qp": "at most 38",
        "bits": "at least 0.01", "jpeg": "at least 30", "odds": "at least 2", "against": "below 0.333",
    }  # fmt: skip


@pytest.mark.parametrize("quality", [20, 30, 50, 77, 95])
def test_jpeg_quality_is_the_one_it_was_saved_with(tmp_path, quality):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", quality=quality)
    assert abs(explaining.jpeg_quality(tmp_path / "a.jpg") - quality) < 1.5
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    assert [explaining.jpeg_quality(tmp_path / name) for name in ("a.png", "b.jpg", "none")] == [None] * 3


def test_names_of_pages_are_safe():
    assert page_name(3, "/x/clip.mp4") == "0003-clip.mp4.html"
    for name in ("../../etc/pass wd", "a/<b>&\"'.mp4", "视频 ü.mp4", ".hidden", "", "x" * 300, "new\nline"):
        page = page_name(1, name)
        assert re.fullmatch(r"0001-[A-Za-z0-9_][A-Za-z0-9._-]{0,60}\.html", page), page


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_checkpoint, tiny_world, tiny_crops):
    """A panel of one ConvNeXt whose validation scores are made up, its calibration with them."""
    home = tmp_path_factory.mktemp("panel")
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    scores = expit(rng.normal(np.where(labels == 1, 1.5, -1.5)))
    rows = pd.DataFrame({"label": labels, "score": scores, "group_id": np.arange(200).astype(str)})
    return panel.fit({"net": (tiny_checkpoint, rows), "plain <b>": (tiny_checkpoint, None)}, home / "p.json", draws=50)


@pytest.fixture(scope="module")
def findings(made, tiny_world, tmp_path_factory):
    """The rows of five media, an image of each class among them, and what is found."""
    df, folder = read_manifest(tiny_world / "manifest.parquet"), tmp_path_factory.mktemp("w")
    df = df.groupby(["kind", "label"], sort=False).head(2).head(5).reset_index(drop=True)
    df["root"] = [str(tiny_world / root) for root in df["root"]]
    write_manifest(df, folder / "m.parquet")
    return df, explaining.judge(folder / "m.parquet", made, folder, "annotations", workers=0)


def test_every_medium_is_scored_as_by_the_detector_alone_and_calibrated(findings, made, tiny_crops, tiny_checkpoint):
    df, found = findings
    detector, card = load_checkpoint(tiny_checkpoint)
    scores = score_crops(detector, CropStore(tiny_crops), read_index(tiny_crops))
    expected = scores[scores["frame"] == -1].set_index("item_id")["score"]
    line = made.members[0].calibration
    assert len(found) == len(df)
    for item, one in zip(df["item_id"], found, strict=True):
        net, plain = one.voices
        assert net.score == pytest.approx(expected[item], abs=1e-5) and plain.score == net.score
        assert net.log_odds == pytest.approx(line.slope * logit(net.score) + line.intercept, abs=1e-6)
        assert not net.silent and "not calibrated" in plain.silent and one.verdict.votes == 1
        table = one.scores["net"]
        frames = scores[(scores["item_id"] == item) & (scores["frame"] >= 0)].set_index("frame")["score"]
        np.testing.assert_allclose(table["score"], frames.loc[table["first"]], atol=1e-5)
        (region, _) = one.regions
        strongest = frames.idxmax()
        assert region.times[0] == pytest.approx(table.set_index("first").loc[strongest, "start"])
        assert region.map.shape == (explaining.CELLS,) * 2 and np.isfinite(region.map).all()


def test_as_many_frames_judge_as_the_calibration_rests_on(findings, tiny_checkpoint, tiny_crops, tmp_path):
    df = findings[0].query("kind == 'video'").head(2)
    rows = pd.DataFrame({"label": [0, 1], "score": [0.2, 0.8], "group_id": ["a", "b"], "frames": [1, 1]})
    few = panel.fit({"net": (tiny_checkpoint, rows)}, tmp_path / "p.json", draws=50)
    write_manifest(df, tmp_path / "m.parquet")
    found = explaining.judge(tmp_path / "m.parquet", few, tmp_path / "w", "annotations", workers=0)
    scores = score_crops(load_checkpoint(tiny_checkpoint)[0], CropStore(tiny_crops), read_index(tiny_crops))
    for item, one in zip(df["item_id"], found, strict=True):
        own = scores[(scores["item_id"] == item) & (scores["frame"] >= 0)].sort_values("frame")["score"]
        assert len(own) == 2 and one.voices[0].score == pytest.approx(own.iloc[1], abs=1e-5)
        assert len(one.scores["net"]) == 1 and abs(own.iloc[1] - own.mean()) > 1e-4


def test_facts_are_those_of_the_media(findings):
    df, found = findings
    for row, one in zip(df.itertuples(), found, strict=True):
        facts = one.facts
        assert (facts["width"], facts["height"]) == (96, 96) and facts["picture"] == (row.kind == "image")
        assert facts["total"] == (1 if row.kind == "image" else 5)
        if row.kind == "video":
            assert 5 < facts["qp"] < 40 and facts["seconds"] == pytest.approx(0.2)
            assert any(reason.startswith("too short") for reason in one.verdict.reasons)
        assert 20 < facts["face"] < 96


def test_labels_are_not_read(made, findings, tmp_path):
    df, found = findings
    turned = df.assign(label=1 - df["label"]).astype({"label": "int8"}).head(2)
    turned["method"] = np.where(turned["label"] == 0, "real", "swap")
    write_manifest(turned, tmp_path / "m.parquet")
    again = explaining.judge(tmp_path / "m.parquet", made, tmp_path / "w", "annotations", workers=0)
    for one, before in zip(again, found, strict=False):
        assert one.verdict.verdict == before.verdict.verdict
        assert one.verdict.probability == pytest.approx(before.verdict.probability, abs=1e-5)


def test_examples_are_of_the_manifests_first_data_set(tiny_world, tmp_path):
    df = read_manifest(tiny_world / "manifest.parquet")
    last = df[df["dataset"] == df["dataset"].iloc[-1]]
    assert last["dataset"].iloc[0] > df["dataset"].iloc[0]
    for name, rows in {"turned": df[::-1], "as it is": df}.items():
        write_manifest(rows.reset_index(drop=True), tmp_path / f"{name}.parquet")
        found = explaining.examples(tmp_path / f"{name}.parquet", tmp_path / "examples.parquet")
        assert set(found["dataset"]) == {rows["dataset"].iloc[0]} and found["method"].is_unique and len(found) > 2
        assert set(found["kind"]) == {"video"} and set(found["split"]) == {"test"}
    write_manifest(df[df["split"] == "train"].reset_index(drop=True), tmp_path / "train.parquet")
    assert explaining.examples(tmp_path / "train.parquet", tmp_path / "none.parquet").empty


def test_uploads_are_kept_apart_whatever_they_are_called(tmp_path):
    names = ["a.mp4", "a.mp4", "..", ".", "", "../../b.mp4", "x/..", "/etc/passwd"]
    kept = explaining.keep_uploads([{"name": n, "content": memoryview(f"{i}".encode())} for i, n in enumerate(names)],
                                   tmp_path / "uploads")  # fmt: skip
    assert [path.read_text() for path in kept] == [str(i) for i in range(len(names))]
    assert [path.name for path in kept] == ["a.mp4"] * 2 + ["medium"] * 3 + ["b.mp4", "medium", "passwd"]
    assert all(path.resolve().is_relative_to(tmp_path / "uploads") for path in kept)


class Middle:
    """A stand-in for a face detector that needs no weights: the face is in the middle."""

    name, hash = "middle", "0" * 64

    def locate(self, frame, index=0):
        centre, w = np.array(frame.shape[1::-1]) / 2, frame.shape[1] / 2
        box = np.array([*centre - w / 2, *centre + w / 2], np.float32)
        return [Face(box, 0.9, (CANONICAL_68 * w / 3 + centre).astype(np.float32))]


def test_chapter_11_keeps_your_media_apart_from_the_study(tiny_world, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "build_locator", lambda name, **_: Middle())
    preprocessing._worker_locator.cache_clear()
    path = resolved(tmp_path, "tiny", workers=0)
    work, media = path.parent, tmp_path / "at home"
    df = read_manifest(tiny_world / "manifest.parquet")
    write_manifest(df.assign(root=[str(tiny_world / root) for root in df["root"]]), work / "manifest.parquet")
    rows = pd.DataFrame({"label": [0, 1], "score": [0.2, 0.8], "group_id": ["a", "b"]})
    panel.fit({"net": (tiny_checkpoint, rows)}, work / "panel.json", draws=50)
    media.mkdir()
    video = df[df["kind"] == "video"].iloc[0]
    shutil.copy(tiny_world / video["root"] / video["path"], media / "my film.mp4")
    shutil.copy(media / "my film.mp4", os.fsencode(media) + b"/\xff.mp4")
    upload = {"name": "upload.mp4", "content": (media / "my film.mp4").read_bytes()}
    monkeypatch.setattr(ipywidgets, "FileUpload", lambda **_: SimpleNamespace(value=[upload]))
    monkeypatch.setattr("IPython.display.display", lambda *_: None)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)  # the stand-in of other tests
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    cells = nbformat.read(ROOT / "notebooks/11_authenticate.ipynb", 4).cells
    given, names = {"profile": str(path), "changes": {}, "media": [str(media)]}, {}
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        exec(cell.source, names)
        names.update(given if "parameters" in cell.metadata.get("tags", []) else {})
    preprocessing._worker_locator.cache_clear()
    left = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    own = [p for p in left if not p.is_relative_to(work / "scratch")]
    assert {p.stem for p in own} == {"authentication_panel"}
    figures, tables = work / "scratch/figures", work / "scratch/figures/tables"
    assert {p.stem for p in figures.glob("*.png")} == {f"authentication_{x}" for x in ("timeline", "votes", "regions")}
    assert sorted(pd.read_csv(tables / "authentication.csv")["path"]) == ["\\udcff.mp4", "my film.mp4", "upload.mp4"]
    record = json.loads((tables / "authentication.json").read_text())
    assert record["origin"] == "your media" and "ynthetic world" not in record["caption"]
    assert record["n"] == {"media": 3} and record["seeds"] == [0]
    assert json.loads((work / "scratch/results/11_authenticate.json").read_text())["numbers"]["media"] == 3
    assert not [
        p for p in left - set(own) if str(tmp_path).encode() in p.read_bytes() or b"/uploads/" in p.read_bytes()
    ]


def test_a_page_and_a_row_for_every_input(made, tiny_world, tmp_path):
    df = read_manifest(tiny_world / "manifest.parquet")
    folder = tmp_path / "media"
    (folder / "in").mkdir(parents=True)
    shutil.copy(tiny_world / df.loc[0, "root"] / df.loc[0, "path"], folder / "in/<b>film & co.mp4")
    encode(folder / "grey.mp4", np.full((6, 96, 128, 3), 90, np.uint8))
    (folder / "text.mp4").write_text("This is no film.\n" * 50)
    table = explaining.explain([folder, "absent.mp4"], made, tmp_path / "out", "haar", workers=0)
    assert len(table) == 4 and table["path"].iloc[-1] == "absent.mp4"
    assert list(table["reasons"])[2:] == ["not a readable picture or video", "file not found"]
    assert (table["verdict"].iloc[[0, 2, 3]] == "cannot tell").all()
    written = pd.read_csv(tmp_path / "out/verdicts.csv")
    assert written["path"].tolist() == table["path"].tolist() and set(written["status"]) <= {"ok", "failed"}
    whole = json.loads((tmp_path / "out/verdicts.json").read_text())
    assert len(whole["media"]) == 4 and "no proof" in whole["warning"]
    for row in table.itertuples():
        page = (tmp_path / "out" / row.page).read_text()
        assert (
            "no proof" in page and "<b>film" not in page and not re.search(r'(src|href)="(?!data:|index\.html)', page)
        )
        own = json.loads((tmp_path / "out" / row.page).with_suffix(".json").read_text())
        assert own["path"] == row.path and own["verdict"] == row.verdict and own["panel"][0]["name"] == "net"
    index = (tmp_path / "out/index.html").read_text()
    assert all(page in index for page in table["page"])


def test_pages_of_judged_media_hold_their_pictures_and_reasons(findings, made, tmp_path):
    from unmask.explain_figures import timeline
    from unmask.explain_pages import write_pages

    df, found = findings
    video = next(i for i, kind in enumerate(df["kind"]) if kind == "video")
    table = write_pages([found[video]], ["x.mp4"], made, tmp_path, "haar")
    page = (tmp_path / table["page"][0]).read_text()
    assert page.count('src="data:image/png;base64,') == 3 and "too short: 5 frames" in page
    assert "not calibrated" in page and "plain &lt;b&gt;" in page and "Camera" not in page and "no cameras" in page
    assert "calibrated on videos alone" not in page
    (name,) = write_pages(found[:1], ["x.png"], made, tmp_path / "picture", "haar")["page"]
    page = (tmp_path / "picture" / name).read_text()
    assert df["kind"][0] == "image" and "calibrated on videos alone: net." in page
    fig = timeline(found[video])
    shown = {trace.name: trace for trace in fig.data}
    assert set(shown) == {"net", "plain <b> (no vote)"}
    np.testing.assert_allclose(shown["net"].y, found[video].scores["net"]["probability"])


def test_chapter_03s_judge_has_a_vote_and_brings_the_camera(tiny_world, tiny_checkpoint, tmp_path, monkeypatch):
    df = read_manifest(tiny_world / "manifest.parquet")
    df["root"] = [str(tiny_world / root) for root in df["root"]]
    videos, images = df[df["kind"] == "video"], df[df["kind"] == "image"]
    df = pd.concat([videos[:2], images[:1], videos[2:4]], ignore_index=True)
    shutil.copytree(tiny_checkpoint, tmp_path / "stages/stage3-7")
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 50)
    scores = expit(rng.normal(np.where(labels == 1, 1.5, -1.5)))
    rows = pd.DataFrame({"label": labels, "score": scores, "group_id": np.arange(100).astype(str)})
    stages = tmp_path / "stages", 7, tiny_profile(cameras__crop=64), rows
    panel.fit({}, tmp_path / "p.json", unsupervised=stages, draws=50)
    judges = panel.read(tmp_path / "p.json")
    assert [one.name for one in judges.members] == [panel.JUDGE] and judges.members[0].votes

    items, asked = df["item_id"], []
    said = pd.DataFrame({"final": [0.9, 0.2, 0.7]}, index=items[:3])
    cameras = pd.DataFrame({"camera": [4, 2, -1, 3], "logit": [2.0, -1.0, 0.0, 0.0]}, index=items[:4])
    monkeypatch.setattr("unmask.unsupervised.Judge.load", lambda folder, seed: (str(folder), seed))
    monkeypatch.setattr("unmask.authentication.judge_crops", lambda *given: asked.append(given) or (said, cameras))
    write_manifest(df, tmp_path / "m.parquet")
    found = explaining.judge(tmp_path / "m.parquet", judges, tmp_path / "w", "annotations", workers=0)

    (given,) = asked
    assert given[0] == (str(tmp_path / "stages"), 7) and given[5].cameras.crop == 64
    line = judges.members[0].calibration
    assert found[0].verdict.probability == pytest.approx(expit(line.slope * logit(0.9) + line.intercept))
    assert [one.status for one in found] == ["ok"] * 3 + ["failed"] * 2
    assert found[2].facts["picture"] and found[2].voices[0].silent == "judges videos, and this is a picture"
    assert found[2].voices[0].score == 0.7 and found[2].verdict.votes == 0 and found[0].verdict.votes == 1
    texts = [one.camera["text"] for one in found[:3]]
    assert "Camera 4" in texts[0] and "weaker" in texts[0] and "7.4 to 1 for fake" in texts[0]
    assert "Camera 2" in texts[1] and "2.7 to 1 for real" in texts[1] and "None of the known cameras" in texts[2]
