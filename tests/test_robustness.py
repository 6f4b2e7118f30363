"""Robustness: changed videos are judged as their crops are by other roads; kinds are kept; curves by plain counts."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_clips
import torch

from unmask import robustness, robustness_judging, scoring
from unmask.data.crops import CropError, CropStore, read_index
from unmask.data.frames import MediaError
from unmask.data.manifest import media_path, read_manifest, write_manifest
from unmask.data.video import encode, read_frames
from unmask.detectors import base
from unmask.evaluation import SCORES
from unmask.perturbations import LEVELS, perturbed_crops
from unmask.preprocessing import preprocess
from unmask.robustness import curves, draw, score, select

FRAMES = 3


@pytest.fixture(scope="module")
def panel(tiny_checkpoint, tmp_path_factory):
    """A detector of frames, a head on it and one of clips of three frames, with noise on what starts at 0."""
    out = tmp_path_factory.mktemp("panel")
    below, _ = base.load_checkpoint(tiny_checkpoint)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spatial = {"detector": below.name, "config": below.config}
        head = base.build("gru", spatial=spatial, frames=4, width=16)
        head.adopt(below)
        head.last.weight.data += torch.randn(head.last.weight.shape)
        clips = base.build("d2st", backbone=tiny_clips.write(out / "clip"), placement="last-2", frames=FRAMES)
        for parameter in [*clips.adapters.parameters(), clips.linear.weight]:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    base.save_checkpoint(head, out / "gru", seed=4)
    base.save_checkpoint(clips, out / "d2st", seed=5)
    return {"frames": tiny_checkpoint, "head": out / "gru", "d2st, whole": out / "d2st"}


@pytest.fixture(scope="module")
def manifest_path(tiny_world):
    return tiny_world / "manifest.parquet"


@pytest.fixture(scope="module")
def rows(manifest_path, dense_crops):
    return select(read_manifest(manifest_path), read_index(dense_crops), 6)


@pytest.fixture(scope="module")
def arguments(panel, manifest_path, dense_crops, rows):
    return {"panel": panel, "manifest": manifest_path, "crops": dense_crops, "rows": rows, "workers": 0}


@pytest.fixture(scope="module")
def kinds():
    return ["jpeg-30", "noise-16", "h264-40", "drop-50", "drop-90"]


@pytest.fixture(scope="module")
def found(arguments, kinds, tmp_path_factory):
    return score(**arguments, kinds=kinds, out=tmp_path_factory.mktemp("found"), frames=FRAMES)


def middle(rows, count=FRAMES):
    """The `count` rows in the middle of each video's."""
    parts = []
    for _, part in rows.sort_values("frame").groupby("item_id"):
        start = (len(part) - count) // 2
        parts.append(part.iloc[start : start + count])
    return pd.concat(parts)


def judged(folder, crops, rows):
    """P(fake) of videos by one detector, by item."""
    scores = scoring.score_crops(base.load_checkpoint(folder)[0], CropStore(crops), rows)
    return scores[scores["frame"] == -1].set_index("item_id")["score"].sort_index()


def of(found, name, kind):
    return found[(found["detector"] == name) & (found["variant"] == kind)].set_index("item_id")["score"].sort_index()


def test_the_table(found, panel, kinds, rows):
    SCORES.validate(found)
    assert len(found) == 6 * 3 * 6 and set(found["frame"]) == {-1} and set(found["item_id"]) == set(rows["item_id"])
    assert set(found["variant"]) == {"none", *kinds} and set(found["detector"]) == set(panel)
    for name, folder in panel.items():
        own, card = found[found["detector"] == name], base.read_checkpoint(folder)[1]
        assert set(own["seed"]) == {card["seed"]} and set(own["checkpoint"]) == {card["sha256"][:12]}


def test_videos_as_they_are_and_changed_pictures(found, panel, dense_crops, rows, tmp_path):
    """Against the crops that `perturbed_crops` makes on disk, judged as any others."""
    own = middle(rows)
    for kind in ("none", "jpeg-30", "noise-16"):
        crops = dense_crops if kind == "none" else perturbed_crops(dense_crops, own, tmp_path / kind, kind)
        for name, folder in panel.items():
            index = own if kind == "none" else read_index(crops)
            np.testing.assert_allclose(of(found, name, kind), judged(folder, crops, index), atol=1e-5)
            assert kind == "none" or (abs(of(found, name, kind) - of(found, name, "none")) > 1e-5).any()


def test_videos_are_really_encoded_anew(found, panel, manifest_path, dense_crops, rows, tmp_path):
    """Against a plain road: all frames at once, written by `encode`, with the annotations copied beside them."""
    listed = []
    for row in read_manifest(manifest_path).query("item_id in @rows.item_id").to_dict("records"):
        clip = read_frames(media_path(row, manifest_path), 100)
        row["path"] = encode(tmp_path / f"{row['item_id']}.mp4", clip.frames, clip.fps, crf=40).name
        source = media_path(row, manifest_path, "annotations")
        row["annotations"] = shutil.copy(source, tmp_path / f"{row['item_id']}.npz").name
        listed.append(row | {"root": "."})
    write_manifest(pd.DataFrame(listed).astype({"label": "int8"}), tmp_path / "manifest.parquet")
    settings = CropStore(dense_crops).settings()
    preprocess(tmp_path / "manifest.parquet", tmp_path / "crops", workers=0, **settings)
    index = read_index(tmp_path / "crops")
    for name, folder in panel.items():
        expected, anew = judged(folder, tmp_path / "crops", middle(index)), of(found, name, "h264-40")
        np.testing.assert_allclose(anew, expected, atol=1e-5)
        assert (abs(anew - of(found, name, "none")) > 1e-5).any()


def test_lost_frames_are_an_items_own_and_hang_on_the_seed(found, panel, arguments, dense_crops, rows, tmp_path):
    own = middle(rows)
    scores = scoring.score_crops(base.load_checkpoint(panel["frames"])[0], CropStore(dense_crops), own)
    single = {name: part["score"].tolist() for name, part in scores[scores["frame"] >= 0].groupby("item_id")}

    def left(table, kind, count):
        """Which frames explain each video's mean."""
        sets = {}
        for item, value in of(table, "frames", kind).items():
            means = {c: np.mean([single[item][i] for i in c]) for c in itertools.combinations(range(FRAMES), count)}
            sets[item] = min(means, key=lambda c, means=means: abs(means[c] - value))
            assert abs(means[sets[item]] - value) < 1e-5
        return sets

    half, most = left(found, "drop-50", 1), left(found, "drop-90", 1)  # of 3 frames, round(1.5) = 2 go
    assert half == most and len(set(half.values())) > 1
    again = score(**arguments, kinds=["drop-50"], out=tmp_path / "again", frames=FRAMES)
    other = score(**arguments, kinds=["drop-50"], out=tmp_path / "other", frames=FRAMES, seed=1)
    assert left(again, "drop-50", 1) == half != left(other, "drop-50", 1)


def test_what_a_head_shares_with_its_frames_is_computed_once(panel, arguments, tmp_path, monkeypatch):
    seen, whole = [], robustness_judging.frame_outputs

    def counted(spatial, frames):
        seen.append(len(frames))
        return whole(spatial, frames)

    monkeypatch.setattr(robustness_judging, "frame_outputs", counted)
    score(**arguments, kinds=[], out=tmp_path / "both", frames=FRAMES)
    assert seen == [FRAMES] * 6
    below, _ = base.load_checkpoint(panel["frames"])
    below.head.weight.data += 1
    other = base.save_checkpoint(below, tmp_path / "other", seed=0)
    changed = arguments | {"panel": {"head": panel["head"], "frames": other}}
    table = score(**changed, kinds=[], out=tmp_path / "apart", frames=FRAMES)
    expected = judged(other, arguments["crops"], middle(arguments["rows"]))
    np.testing.assert_allclose(of(table, "frames", "none"), expected, atol=1e-5)


def test_a_detector_of_clips_sees_as_many_frames_as_it_needs(panel, arguments, dense_crops, rows, tmp_path):
    table = score(**arguments, kinds=[], out=tmp_path, frames=1)
    for name, count in (("frames", 1), ("head", 1), ("d2st, whole", FRAMES)):
        expected = judged(panel[name], dense_crops, middle(rows, count))
        np.testing.assert_allclose(of(table, name, "none"), expected, atol=1e-5)


class Killed(BaseException):
    pass


def test_a_stopped_call_goes_on(arguments, kinds, found, tmp_path, monkeypatch):
    calls, deadly, whole = [], ["noise-16"], robustness.make

    def counted(task, rows, kind, path):
        calls.append(kind)
        if kind in deadly:
            raise Killed
        whole(task, rows, kind, path)

    monkeypatch.setattr(robustness, "make", counted)
    with pytest.raises(Killed):
        score(**arguments, kinds=kinds, out=tmp_path, frames=FRAMES)
    assert calls == ["h264-40", "none", "jpeg-30", "noise-16"] and len(list(tmp_path.glob("*.parquet"))) == 3
    calls.clear()
    deadly.clear()
    table = score(**arguments, kinds=kinds, out=tmp_path, frames=FRAMES)
    assert calls == ["noise-16", "drop-50", "drop-90"]
    pd.testing.assert_frame_equal(table, found)
    calls.clear()
    score(**arguments, kinds=kinds[::-1], out=tmp_path, frames=FRAMES)
    assert calls == []
    changes = [{"seed": 1}, {"frames": 2}, {"rows": arguments["rows"].iloc[3:]}]
    changes += [{"panel": {"frames": arguments["panel"]["frames"]}}]
    for change in changes:
        score(**({"kinds": ["jpeg-30"], "out": tmp_path, "frames": FRAMES} | arguments | change))
    assert calls == ["none", "jpeg-30"] * len(changes)


def test_an_interrupted_encoding_goes_on_and_leaves_nothing_behind(arguments, found, tmp_path, monkeypatch):
    calls, whole = [], robustness_judging.perturbations.recompress

    def until(source, target, crf):
        if len(calls) == 4:
            raise Killed
        calls.append(source)
        return whole(source, target, crf)

    with monkeypatch.context() as patch:
        patch.setattr(robustness_judging.perturbations, "recompress", until)
        with pytest.raises(Killed):
            score(**arguments, kinds=["h264-40"], out=tmp_path, frames=FRAMES)
        assert len(list(tmp_path.rglob("*.mp4"))) == 4 and not list(tmp_path.glob("*.parquet"))
        calls[:] = [None]  # room for three more, and there are two to do
        table = score(**arguments, kinds=["h264-40"], out=tmp_path, frames=FRAMES)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 2
    for name in arguments["panel"]:
        assert of(table, name, "h264-40").equals(of(found, name, "h264-40"))


def test_videos_that_cannot_be_encoded_are_left_out_and_counted(arguments, rows, tmp_path, monkeypatch, capsys):
    bad, whole = str(rows["item_id"].iloc[0]), robustness_judging.perturbations.recompress

    def fails(source, target, crf):
        if bad in Path(target).name:
            raise MediaError("cannot be encoded anew")
        return whole(source, target, crf)

    monkeypatch.setattr(robustness_judging.perturbations, "recompress", fails)
    table = score(**arguments, kinds=["h264-28"], out=tmp_path, frames=FRAMES)
    assert set(of(table, "frames", "none").index) - set(of(table, "frames", "h264-28").index) == {bad}
    assert "h264-28: 1 of 6 videos" in capsys.readouterr().err
    bad = ".mp4"
    with pytest.raises(CropError, match="None of the videos"):
        score(**arguments, kinds=["h264-34"], out=tmp_path, frames=FRAMES)


def test_processes_change_nothing(arguments, found, tmp_path):
    table = score(**arguments | {"workers": 2}, kinds=["jpeg-30"], out=tmp_path, frames=FRAMES)
    wanted = found[found["variant"].isin(["none", "jpeg-30"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(table.drop(columns="score"), wanted.drop(columns="score"))
    np.testing.assert_allclose(table["score"], wanted["score"], atol=1e-6)


def test_faults_are_named(arguments, tmp_path, monkeypatch):
    call = arguments | {"kinds": [], "out": tmp_path / "out", "frames": FRAMES}
    for kind in ("jpeg-31", "h264-5", "none", ""):
        with pytest.raises(ValueError, match="no perturbation.*jpeg-75.*h264-18.*drop-90"):
            score(**call | {"kinds": [kind]})
    with pytest.raises(ValueError, match="no video"):
        score(**call | {"rows": arguments["rows"].iloc[:0]})
    shutil.copytree(arguments["crops"], tmp_path / "crops")
    found = json.loads((tmp_path / "crops/settings.json").read_text())
    del found["locator"]
    (tmp_path / "crops/settings.json").write_text(json.dumps(found))
    with pytest.raises(CropError, match="does not say how"):
        score(**call | {"crops": tmp_path / "crops"})
    robustness_judging._load.cache_clear()
    monkeypatch.setattr(base.registered("gru"), "extras", ("lare",))
    with pytest.raises(ValueError, match="head reads more than pictures"):
        score(**call)
    robustness_judging._load.cache_clear()
    assert not list((tmp_path / "out").glob("*.parquet")) if (tmp_path / "out").exists() else True


# which videos


def listing(groups, methods=("real", "swap", "texture"), each=2):
    """A manifest of test videos and an index of five crops each; groups: data sets by group."""
    items = [
        {"item_id": f"{g}{m}{k}", "dataset": d, "group_id": g, "method": m, "label": int(m != "real"), "kind": "video",
         "split": "test"}
        for g, d in groups.items() for m in methods for k in range(each)
    ]  # fmt: skip
    manifest = pd.DataFrame(items)
    index = manifest[["item_id"]].merge(pd.DataFrame({"frame": range(5)}), how="cross")
    return manifest, index


def test_one_of_each_method_of_every_group():
    groups = {f"g{i}": "a" if i % 3 else "b" for i in range(9)}
    manifest, index = listing(groups)
    others = manifest.assign(item_id="x" + manifest["item_id"], split="val")
    images = manifest.assign(item_id="y" + manifest["item_id"], kind="image")
    everything = pd.concat([manifest, others, images]).sample(frac=1, random_state=0)
    crops = pd.concat([index.assign(item_id=before + index["item_id"]) for before in ("", "x", "y")])
    rows = select(everything, crops.sample(frac=1, random_state=1), 12)
    chosen = manifest[manifest["item_id"].isin(rows["item_id"])]
    assert len(chosen) == rows["item_id"].nunique() == 12 and len(rows) == 60
    assert chosen.groupby(["group_id", "method"]).size().eq(1).all() and chosen["group_id"].nunique() == 4
    assert chosen.drop_duplicates("group_id")["dataset"].value_counts().to_dict() == {"a": 2, "b": 2}
    assert rows["frame"].tolist() == [0, 1, 2, 3, 4] * 12 and rows["item_id"].is_monotonic_increasing
    pd.testing.assert_frame_equal(select(manifest, index, 12), rows)
    few = set(select(manifest, index, 6)["item_id"])
    assert few < set(rows["item_id"]) < set(select(manifest, index, 27)["item_id"])
    whole = select(manifest, index, 1000)
    assert set(whole["item_id"]) == set(manifest["item_id"])  # where there is room, the others too
    beyond = manifest[manifest["item_id"].isin(select(manifest, index, 30)["item_id"])]
    assert beyond.groupby(["group_id", "method"]).size().value_counts().to_dict() == {1: 24, 2: 3}


def test_videos_without_a_crop_are_not_chosen():
    manifest, index = listing({"g": "a"})
    gone = select(manifest, index, 3)["item_id"].unique()
    rest = select(manifest, index[~index["item_id"].isin(gone)], 3)["item_id"].unique()
    assert len(rest) == 3 and not set(rest) & set(gone)
    assert select(manifest, index.iloc[:0], 3).empty


# curves


def auc(labels, scores):
    """By counting pairs."""
    pairs = [(s > t) + 0.5 * (s == t) for s, a in zip(scores, labels, strict=True) if a == 1
             for t, b in zip(scores, labels, strict=True) if b == 0]  # fmt: skip
    return np.mean(pairs)


@pytest.fixture(scope="module")
def stressed():
    """Scores of two detectors on 24 videos of 8 groups; three videos did not survive h264-40."""
    manifest, _ = listing({f"g{i}": "a" for i in range(8)}, each=1)
    rng, tables = np.random.default_rng(0), []
    for detector, seeds in (("one", (0,)), ("two", (0, 1))):
        for kind, blur in (("none", 0.2), ("jpeg-95", 0.3), ("jpeg-30", 0.6), ("h264-40", 0.8)):
            own = manifest.iloc[3:] if kind == "h264-40" else manifest
            for seed in seeds:
                value = np.clip(0.5 + 0.3 * (own["label"] - 0.5) + blur * rng.normal(0, 0.5, len(own)), 0, 1)
                tables.append(pd.DataFrame({
                    "item_id": own["item_id"], "frame": -1, "score": value, "detector": detector, "variant": kind,
                    "seed": seed, "checkpoint": "c",
                }))  # fmt: skip
    return pd.concat(tables, ignore_index=True), manifest


def test_curves_count_pairs(stressed):
    scores, manifest = stressed
    table = curves(scores, manifest, draws=200)
    assert len(table) == 8 and table["detector"].unique().tolist() == ["one", "two"]
    known = manifest.set_index("item_id")["label"]
    for row in table.itertuples():
        kind = "none" if row.kind == "none" else f"{row.kind}-{row.level:g}"
        own = scores[(scores["detector"] == row.detector) & (scores["variant"] == kind)]
        clean = scores[(scores["detector"] == row.detector) & (scores["variant"] == "none")]
        clean = clean[clean["item_id"].isin(own["item_id"])]
        areas, before = (np.mean([auc(known[part["item_id"]], part["score"]) for _, part in some.groupby("seed")])
                         for some in (own, clean))  # fmt: skip
        assert row.items == own["item_id"].nunique() == (21 if kind == "h264-40" else 24)
        assert row.seeds == (1 if row.detector == "one" else 2)
        assert row.auc == pytest.approx(areas) and row.low <= row.auc <= row.high
        if kind == "none":
            assert np.isnan([row.level, row.change, row.change_low, row.change_high]).all()
        else:
            assert row.change == pytest.approx(areas - before) and row.change_low <= row.change <= row.change_high


def test_figure_shows_the_table(stressed):
    table = curves(*stressed, draws=50)
    fig = draw(table)
    shown = [ax for ax in fig.axes if ax.axison]
    assert [ax.get_title() for ax in shown] == ["JPEG, quality", "H.264, CRF"]
    jpeg = shown[0]
    assert [tick.get_text() for tick in jpeg.get_xticklabels()] == ["as is", "95", "30"]
    lines = [container.lines[0].get_ydata().astype(float) for container in jpeg.containers]
    for detector, line in zip(("one", "two"), lines, strict=True):
        own = table[table["detector"] == detector]
        wanted = [own[own["kind"] == "none"]["auc"].iloc[0]]
        wanted += [own[(own["kind"] == "jpeg") & (own["level"] == level)]["auc"].iloc[0] for level in (95, 30)]
        np.testing.assert_allclose(line, wanted)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["one", "two"]
    assert any(list(line.get_ydata()) == [0.5, 0.5] for line in jpeg.lines)


def test_every_kind_has_a_panel():
    rows = [{"detector": "d", "kind": "none", "level": np.nan, "auc": 0.9, "low": 0.8, "high": 1.0}]
    rows += [{"detector": "d", "kind": kind, "level": level, "auc": 0.7, "low": 0.6, "high": 0.8}
             for kind, levels in LEVELS.items() for level in levels]  # fmt: skip
    fig = draw(pd.DataFrame(rows))
    assert len([ax for ax in fig.axes if ax.axison]) == 6
    for ax, levels in zip(fig.axes, LEVELS.values(), strict=True):
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["as is", *(f"{level:g}" for level in levels)]
