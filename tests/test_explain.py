"""Verdicts by hand-made voices, media judged by a small panel, and pages that hold everything."""

import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_profile
from PIL import Image
from scipy.special import expit, logit

from unmask import explain as explaining
from unmask import panel, verdicts
from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest, write_manifest
from unmask.data.video import encode
from unmask.detectors.base import load_checkpoint
from unmask.explain_pages import page_name
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
    fig = timeline(found[video])
    shown = {trace.name: trace for trace in fig.data}
    assert set(shown) == {"net", "plain <b> (no vote)"}
    np.testing.assert_allclose(shown["net"].y, found[video].scores["net"]["probability"])


def test_chapter_03s_judge_has_a_vote_and_brings_the_camera(findings, tiny_checkpoint, tmp_path, monkeypatch):
    df, _ = findings
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
    texts = [one.camera["text"] for one in found[:3]]
    assert "Camera 4" in texts[0] and "weaker" in texts[0] and "7.4 to 1 for fake" in texts[0]
    assert "Camera 2" in texts[1] and "2.7 to 1 for real" in texts[1] and "None of the known cameras" in texts[2]
