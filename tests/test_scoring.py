"""Scores of crops and of media files: one row per input whatever it is, and the same numbers by every road."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import tiny_clips
import torch
from conftest import SHARED, tiny_profile

from unmask import preprocessing, sbi, scoring
from unmask.data.crops import CropStore, read_index
from unmask.data.faces import build_locator
from unmask.data.journals import ShareError
from unmask.data.manifest import read_manifest
from unmask.data.video import read_frames
from unmask.data.world import generate
from unmask.detectors import base
from unmask.detectors.base import CheckpointError, InputSpec, load_checkpoint
from unmask.evaluation import ScoreError, read_scores, write_scores


@pytest.fixture(scope="module", autouse=True)
def weights():
    """YuNet where its weights are beside the repository; else the Haar cascade, which needs none."""
    with pytest.MonkeyPatch.context() as patch:
        if (SHARED / "data/models/face_detection_yunet.onnx").is_file():
            patch.setenv("UNMASK_MODELS", str(SHARED / "data/models"))
        yield


@pytest.fixture(scope="module")
def faces(tmp_path_factory, weights):
    """A clip and a picture in which the locator finds the face."""
    out = tmp_path_factory.mktemp("faces")
    spec = tiny_profile(world__size=160, world__frames=4, world__pairs_train=1, world__pairs_val=0).world
    world = generate(out, dict(spec) | {"pairs_test": 0, "pairs_b": 0}, seed=1)
    locator = build_locator(scoring.best_locator())
    found = {}
    for kind, path in zip(world["kind"], world["path"], strict=True):
        if all(locator.locate(frame) for frame in read_frames(out / path, 2).frames):
            found.setdefault(kind, out / path)
    return found["video"], found["image"]


@pytest.fixture
def media(tmp_path, faces):
    folder = tmp_path / "media"
    (folder / ".hidden").mkdir(parents=True)
    (folder / "inner").mkdir()
    clip, picture = faces
    for name in ("a good clip.mp4", "inner/größe, „ü“ 人.mp4", ".hidden/clip.mp4", ".clip.mp4"):
        shutil.copy(clip, folder / name)
    shutil.copy(clip, os.fsencode(folder) + b"/odd \xff name.mp4")
    shutil.copy(picture, folder / "picture.png")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video")
    return folder


def test_every_input_has_one_row(tmp_path, media, tiny_checkpoint):
    missing, nothing = tmp_path / "missing.mp4", tmp_path / "nothing"
    nothing.mkdir()
    out = tmp_path / "results/scores.csv"
    given = [missing, media, media / "picture.png", nothing]
    table = scoring.score_media(given, tiny_checkpoint, out).set_index("path")
    names = [
        "a good clip.mp4",
        "empty.mp4",
        "inner/größe, „ü“ 人.mp4",
        "odd \\udcff name.mp4",
        "picture.png",
        "text.mp4",
    ]
    assert table.index.tolist() == [str(missing), *(f"{media}/{name}" for name in names), str(nothing)]
    failed = {str(missing): "file not found", f"{media}/empty.mp4": "empty file", str(nothing): "a folder, not a file"}
    for path, reason in failed.items():
        assert table.loc[path, "reason"] == reason
    assert table.loc[f"{media}/text.mp4", "reason"] != ""
    assert set(table.index[table["status"] == "failed"]) == {*failed, f"{media}/text.mp4"}
    ok = table[table["status"] == "ok"]
    assert ok["score"].between(0, 1).all() and (ok["reason"] == "").all()
    assert table.loc[table["status"] == "failed", "score"].isna().all()
    clips = table.loc[[f"{media}/{name}" for name in (names[0], names[2], names[3])]]
    assert np.ptp(clips["score"]) < 1e-5 and (clips["faces"] == 2).all(), "copies of a clip score the same"
    written = pd.read_csv(out, keep_default_na=False)
    assert written["path"].tolist() == table.index.tolist()
    assert [float(s) if s else None for s in written["score"]] == pytest.approx(
        [None if np.isnan(s) else s for s in table["score"]], abs=1e-6
    )


def test_the_json_has_the_score_of_every_frame(tmp_path, media, tiny_checkpoint):
    table = scoring.score_media([media], tiny_checkpoint, tmp_path / "scores.csv")
    document = json.loads((tmp_path / "scores.json").read_text())
    assert document["locator"] == scoring.best_locator()
    assert document["sha256"] == json.loads((tiny_checkpoint / "config.json").read_text())["sha256"]
    assert [row["path"] for row in document["media"]] == table["path"].tolist()
    for row, status, score in zip(document["media"], table["status"], table["score"], strict=True):
        if status == "ok":
            assert len(row["frame_scores"]) == row["faces"]
            assert np.mean(list(row["frame_scores"].values())) == pytest.approx(score, abs=1e-6)
        else:
            assert row["score"] is None and row["frame_scores"] == {}


def test_nothing_but_failures_is_a_table_too(tmp_path, tiny_checkpoint):
    (tmp_path / "empty.mp4").touch()
    table = scoring.score_media([tmp_path / "empty.mp4"], tiny_checkpoint, tmp_path / "scores.csv")
    assert table["status"].tolist() == ["failed"] and table["score"].isna().all()
    assert (tmp_path / "scores.csv").read_text().count("\n") == 2


def test_folders_are_expanded_once_in_order_without_hidden_files(media, monkeypatch):
    monkeypatch.chdir(media)
    found = [os.fsencode(p) for p in scoring.expand(["text.mp4", ".", media / "empty.mp4", ".clip.mp4", "gone"])]
    assert found == [
        b"text.mp4", b"a good clip.mp4", b"empty.mp4", "inner/größe, „ü“ 人.mp4".encode(), b"odd \xff name.mp4",
        b"picture.png", b".clip.mp4", b"gone",
    ]  # fmt: skip


def test_what_cannot_be_scored_with_says_so(tmp_path, media, tiny_checkpoint):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        scoring.score_media([media], tmp_path, tmp_path / "scores.csv")
    with pytest.raises(ScoreError, match="would be overwritten"):
        scoring.score_media([media], tiny_checkpoint, tmp_path / "scores.json")
    card = json.loads((tiny_checkpoint / "config.json").read_text())
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    del card["preprocessing"]
    (tmp_path / "other/config.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="does not say how its crops were made"):
        scoring.score_media([media], tmp_path / "other", tmp_path / "scores.csv")
    assert not (tmp_path / "scores.csv").exists()


def test_crops_are_scored_alike_in_any_batch_and_order(tiny_crops, tiny_checkpoint):
    (detector, _), store, index = load_checkpoint(tiny_checkpoint), CropStore(tiny_crops), read_index(tiny_crops)
    index = index.iloc[:9]
    table = scoring.score_crops(detector, store, index, batch=4)
    mixed = scoring.score_crops(detector, store, index.sample(frac=1, random_state=0), batch=9)
    pd.testing.assert_frame_equal(table, mixed, rtol=1e-4)
    frames, clips = table[table["frame"] >= 0], table[table["frame"] == -1]
    assert len(frames) == 9 and len(clips) == index["item_id"].nunique()
    means = frames.groupby("item_id")["score"].mean()
    assert clips.set_index("item_id")["score"].to_dict() == pytest.approx(means.to_dict())
    row = index.iloc[3]
    points = np.asarray(row["landmarks"]).reshape(-1, 2)
    x0, y0, x1, y1 = points[:, 0].min(), points[:, 1].min(), points[:, 0].max(), points[:, 1].max()
    w, h = x1 - x0, y1 - y0
    face = sbi.crop(store.image(row), np.array([x0 - w / 8, y0 - h / 8, x1 + w / 8, y1 + h / 8]), 64)
    with torch.no_grad():
        logit = detector(detector.prepare(torch.from_numpy(face)[None, None]))
    own = frames[(frames["item_id"] == row["item_id"]) & (frames["frame"] == row["frame"])]["score"].item()
    assert own == pytest.approx(torch.sigmoid(logit).item(), rel=1e-4)


def test_the_score_table_follows_the_contract(tmp_path, tiny_world, tiny_crops, tiny_checkpoint):
    detector, card = load_checkpoint(tiny_checkpoint)
    table = scoring.score_table(detector, card, CropStore(tiny_crops), read_index(tiny_crops), "sbi")
    write_scores(table, tmp_path / "scores.parquet")
    again = read_scores(tmp_path / "scores.parquet")
    assert set(again["item_id"]) == set(read_manifest(tiny_world / "manifest.parquet")["item_id"])
    assert (again["detector"] == "convnext").all() and (again["seed"] == 0).all()
    assert (again["checkpoint"] == card["sha256"][:12]).all() and set(again["frame"]) > {-1}


def test_without_any_crop_the_score_table_is_empty(tiny_crops, tiny_checkpoint):
    detector, card = load_checkpoint(tiny_checkpoint)
    table = scoring.score_table(detector, card, CropStore(tiny_crops), read_index(tiny_crops).iloc[:0], "sbi")
    assert table.empty and "score" in table


def test_the_locator_is_the_best_whose_weights_are_here(monkeypatch, tmp_path):
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path))
    assert scoring.best_locator() == "haar"
    (tmp_path / "face_detection_yunet.onnx").touch()
    assert scoring.best_locator() == "yunet"


@pytest.fixture(scope="module")
def head(tmp_path_factory, tiny_checkpoint):
    """A GRU of random weights over windows of three frames, on the tiny checkpoint."""
    spatial, card = load_checkpoint(tiny_checkpoint)
    below = {"detector": card["detector"], "config": card["config"]}
    torch.manual_seed(2)
    detector = base.build("gru", spatial=below, frames=3, width=8)
    detector.adopt(spatial)
    detector.last.weight.data *= 50  # scores that differ
    preprocessing = card["preprocessing"] | {"frames": 4, "sampling": "dense"}
    return base.save_checkpoint(detector, tmp_path_factory.mktemp("gru"), preprocessing=preprocessing, seed=0)


def test_a_detector_of_clips_scores_clips_alone(head, dense_crops):
    """Four frames in windows of at most three: two and two; every window alone, then their mean."""
    (detector, _), store, index = load_checkpoint(head), CropStore(dense_crops), read_index(dense_crops)
    sizes = index.groupby("item_id").size()
    names = [*sizes.index[sizes == 4][:3], *sizes.index[sizes == 1][:2]]
    rows = index[index["item_id"].isin(names)]
    table = scoring.score_crops(detector, store, rows.sample(frac=1, random_state=1))
    assert table["item_id"].tolist() == sorted(names) and (table["frame"] == -1).all()
    for name, score in zip(table["item_id"], table["score"], strict=True):
        images = scoring.frame_images(store, rows[rows["item_id"] == name].sort_values("frame"), InputSpec(64))
        parts = [images[:2], images[2:]] if len(images) == 4 else [images]
        with torch.no_grad():
            logits = [detector(detector.prepare(torch.from_numpy(part)[None])).item() for part in parts]
        assert score == pytest.approx(np.mean([1 / (1 + np.exp(-x)) for x in logits]), abs=1e-5)
    assert table["score"].std() > 1e-3
    empty = scoring.score_crops(detector, store, index.iloc[:0])
    assert empty.empty and empty.columns.tolist() == table.columns.tolist()


@pytest.mark.parametrize(("count", "frames", "wanted"), [
    (0, 3, []), (1, 3, [[0, 0, 0]]), (2, 5, [[0, 0, 0, 1, 1]]), (3, 5, [[0, 0, 1, 2, 2]]), (3, 3, [[0, 1, 2]]),
    (4, 3, [[0, 1, 2], [1, 2, 3]]), (6, 3, [[0, 1, 2], [3, 4, 5]]), (8, 3, [[0, 1, 2], [2, 3, 4], [5, 6, 7]]),
])  # fmt: skip
def test_whole_windows_are_full_and_spread(count, frames, wanted):
    assert [window.tolist() for window in scoring.whole_windows(count, frames)] == wanted


@pytest.mark.parametrize("frames", [1, 2, 5, 12])
def test_whole_windows_leave_no_frame_out(frames):
    for count in range(1, 100):
        found = scoring.whole_windows(count, frames)
        assert {len(window) for window in found} == {frames} and len(found) == -(-count // frames)
        assert set(np.concatenate(found)) == set(range(count)) or count < frames
        assert all((np.diff(window) >= 0).all() for window in found)


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (6, [6]), (7, [4, 3]), (12, [6, 6]), (13, [5, 4, 4])])
def test_windows_hold_every_frame_once_and_are_alike(count, sizes):
    found = scoring.windows(count, 6)
    assert [len(w) for w in found] == sizes
    assert [i for w in found for i in w] == list(range(count))


def test_media_are_scored_by_a_detector_of_clips(tmp_path, media, head):
    table = scoring.score_media([media], head, tmp_path / "scores.csv").set_index("path")
    ok = table[table["status"] == "ok"]
    assert len(ok) == 4 and ok["score"].between(0, 1).all()
    assert (ok.loc[ok.index.str.endswith("mp4"), "faces"] == 4).all() and ok.loc[f"{media}/picture.png", "faces"] == 1
    assert table.loc[f"{media}/empty.mp4", "status"] == "failed"
    document = json.loads((tmp_path / "scores.json").read_text())
    assert all(row["frame_scores"] == {} for row in document["media"]), "single frames have no score"
    scored = {row["path"]: row["score"] for row in document["media"] if row["status"] == "ok"}
    assert scored == pytest.approx(ok["score"].to_dict(), abs=1e-6)


def test_a_native_detector_is_shown_unscaled_windows_in_the_middle_of_the_face(tiny_crops):
    store, rows = CropStore(tiny_crops), read_index(tiny_crops).iloc[:3]
    windows = scoring.frame_images(store, rows, InputSpec(24, native=True))
    for window, (_, row) in zip(windows, rows.iterrows(), strict=True):
        points = np.asarray(row["landmarks"], np.float32).reshape(-1, 2)
        middle = (points.min(0) + points.max(0)) / 2
        x, y = np.rint(middle - 12).astype(int)
        image = store.image(row)
        around = [image[y + dy : y + dy + 24, x + dx : x + dx + 24] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        assert any(np.array_equal(window, one) for one in around)


def test_a_still_cut_is_one_for_all_frames_of_a_clip(tiny_crops):
    store, rows = CropStore(tiny_crops), read_index(tiny_crops).iloc[:3].reset_index(drop=True)
    moved = [np.asarray(rows["landmarks"][0], np.float32) + shift for shift in (0, 2, 9)]  # the middle one decides
    rows = rows.assign(landmarks=[list(points) for points in moved])
    still = scoring.frame_images(store, rows, InputSpec(24, still=True))
    for k, image in enumerate(still):
        same = rows.iloc[[k]].assign(landmarks=[list(moved[1])])
        assert np.array_equal(image, scoring.frame_images(store, same, InputSpec(24))[0])
        if k != 1:
            assert not np.array_equal(image, scoring.frame_images(store, rows.iloc[[k]], InputSpec(24))[0])


def test_single_frames_are_cut_one_by_one_also_for_a_detector_of_still_clips(tiny_crops, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = base.build("d2st", backbone=tiny_clips.write(tmp_path), placement="last-1", frames=1).eval()
        detector.linear.weight.data += torch.randn(detector.linear.weight.shape)
    store, index = CropStore(tiny_crops), read_index(tiny_crops)
    together = scoring.score_crops(detector, store, index).set_index(["item_id", "frame"])["score"]
    for name, part in list(index.groupby("item_id"))[:3]:
        alone = scoring.score_crops(detector, store, part).set_index(["item_id", "frame"])["score"]
        assert alone.to_dict() == pytest.approx(together.loc[[name]].to_dict(), abs=1e-5)


@pytest.fixture
def few_at_once(monkeypatch):
    """Two media at a time; the paths that were scored since, in order."""
    monkeypatch.setattr(scoring, "AT_ONCE", 2)
    seen, rows = [], scoring._Job.rows
    monkeypatch.setattr(scoring._Job, "rows", lambda job, paths: seen.extend(paths) or rows(job, paths))
    return seen


def both(out):
    return out.read_bytes(), out.with_suffix(".json").read_bytes()


def test_shards_of_any_number_and_order_give_the_same_bytes(tmp_path, media, tiny_checkpoint, few_at_once, capsys):
    def score(name, **how):
        return scoring.score_media([media], tiny_checkpoint, tmp_path / name, workers=0, **how)

    whole = score("whole.csv")
    assert [path.name for path in tmp_path.glob(".*")] == [], "nothing is left beside the table"
    for of, order in ((2, (1, 0)), (9, range(9))):  # nine shards of six files: three have none
        out = tmp_path / f"{of}.csv"
        for i in order:
            assert not out.exists()
            part = score(out.name, shard=(i, of))
        assert len(part) == len(whole) and both(out) == both(tmp_path / "whole.csv")
        score(out.name, shard=(0, of))
        assert both(out) == both(tmp_path / "whole.csv"), "a shard twice does no harm"
    assert "Still to do: shard 0/2." in capsys.readouterr().err
    assert len(few_at_once) == 3 * len(whole), "and is not scored again"


def test_a_killed_call_goes_on_and_does_again_only_what_was_lost(tmp_path, media, tiny_checkpoint, few_at_once):
    out = media / "scores.csv"  # among the media, of which neither it nor what lies beside it is one
    scoring.score_media([media], tiny_checkpoint, out, workers=0)
    whole, count = both(out), len(few_at_once)
    few_at_once.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring.Journal, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scoring.score_media([media], tiny_checkpoint, out, workers=0)
    (journal,) = media.glob(".scores.csv.parts/*.part")
    journal.write_bytes(journal.read_bytes()[:-5])
    few_at_once.clear()
    scoring.score_media([media], tiny_checkpoint, out, workers=0)
    assert both(out) == whole and len(few_at_once) == 1 < count


def test_what_changed_since_is_scored_again(tmp_path, media, tiny_checkpoint, few_at_once):
    def score(shard):
        return scoring.score_media([media], tiny_checkpoint, tmp_path / "scores.csv", workers=0, shard=shard)

    score((0, 2))
    (media / "a good clip.mp4").write_text("no video any more")  # the first of all
    few_at_once.clear()
    score((1, 2))
    table = score((0, 2))
    assert len(few_at_once) == 6 and table["status"][0] == "failed"
    (media / "new.mp4").touch()
    assert len(score((0, 2))) == 4 < len(score((1, 2))) == 7, "a listing that grew: the other shard was stale"


def test_a_file_of_another_share_that_has_changed_is_noticed(tmp_path, media, tiny_checkpoint, capsys):
    def score(i):
        return scoring.score_media([media], tiny_checkpoint, tmp_path / "scores.csv", workers=0, shard=(i, 2))

    score(0)
    (media / "a good clip.mp4").write_text("no video any more")  # the first of all
    assert len(score(1)) == 3 and not (tmp_path / "scores.csv").exists()
    assert capsys.readouterr().err.endswith("Still to do: shard 0/2. The last of them writes "
                                            f"{tmp_path / 'scores.csv'}.\n")  # fmt: skip
    assert score(0)["status"][0] == "failed"


@pytest.mark.parametrize("key", ["config", "preprocessing"])
def test_rows_by_another_card_with_the_same_weights_do_not_count(tiny_checkpoint, key):
    detector, known = load_checkpoint(tiny_checkpoint)
    cards = known, dict(known), known | {key: known[key] | {"drop_path": 0.9, "frames": 3}}
    first, again, other = (scoring._Job(detector, card, "haar", 0, 30.0, None).stamp() for card in cards)
    assert first == again != other


def test_rows_by_an_export_for_another_number_of_frames_do_not_count(tiny_checkpoint):
    detector, card = load_checkpoint(tiny_checkpoint)
    given = {key: card[key] for key in ("detector", "preprocessing", "seed", "sha256")}
    cards = [given | {"format": "onnx", "frames": t, "input": detector.input_spec} for t in (4, 8)]
    first, second = (scoring._Job(detector, one, "haar", 0, 30.0, None).stamp() for one in cards)
    assert first != second


def test_rows_by_other_code_do_not_count(tiny_checkpoint, monkeypatch):
    job = scoring._Job(*load_checkpoint(tiny_checkpoint), "haar", 0, 30.0, None)
    before = job.stamp()
    monkeypatch.setattr(scoring, "SOURCES", scoring.SOURCES[1:])
    assert job.stamp() != before


def test_what_the_machine_made_fail_is_scored_again(tmp_path, media, tiny_checkpoint, few_at_once, monkeypatch):
    def score(name, **how):
        return scoring.score_media([media], tiny_checkpoint, tmp_path / name, workers=0, **how)

    score("whole.csv")
    real, unlucky = scoring.preprocess, ["a good clip.mp4", "picture.png"]

    def preprocess(manifest, *given, **how):
        items = real(manifest, *given, **how)
        names = [(manifest.parent / "media" / name).resolve().name for name in read_manifest(manifest)["path"]]
        items.loc[[name in unlucky for name in names], ["status", "reason"]] = "failed", preprocessing.DIED
        return items

    monkeypatch.setattr(scoring, "preprocess", preprocess)
    first = score("scores.csv", shard=(0, 2))
    assert first["reason"].tolist().count(preprocessing.DIED) == 2
    few_at_once.clear()
    score("scores.csv", shard=(0, 2))
    assert len(few_at_once) == 2, "those two are tried again, and in vain"
    unlucky.clear()
    few_at_once.clear()
    score("scores.csv", shard=(0, 2))
    score("scores.csv", shard=(1, 2))
    assert both(tmp_path / "scores.csv") == both(tmp_path / "whole.csv")


def test_a_journal_is_removed_while_nobody_else_may_write_it(tmp_path, media, tiny_checkpoint, monkeypatch):
    real, held = scoring.Journal.remove, []

    def remove(journal):
        with pytest.raises(ShareError):
            scoring.Journal(journal.path.parent, (0, 1), "")
        held.append((tmp_path / "scores.csv").exists())
        real(journal)

    monkeypatch.setattr(scoring.Journal, "remove", remove)
    scoring.score_media([media / "text.mp4"], tiny_checkpoint, tmp_path / "scores.csv", workers=0)
    assert held == [True] and not list(tmp_path.glob(".*"))


def test_the_score_of_an_item_does_not_depend_on_its_company(tiny_crops, tiny_checkpoint, head, dense_crops):
    for checkpoint, crops in ((tiny_checkpoint, tiny_crops), (head, dense_crops)):
        (detector, _), store, index = load_checkpoint(checkpoint), CropStore(crops), read_index(crops)
        some = index[index["item_id"].isin(index["item_id"].unique()[:5])]
        together = scoring.score_crops(detector, store, some, batch=None)
        alone = [scoring.score_crops(detector, store, part, batch=None) for _, part in some.groupby("item_id")]
        keys = ["item_id", "frame"]
        pd.testing.assert_frame_equal(
            together.sort_values(keys, ignore_index=True),
            pd.concat(alone).sort_values(keys, ignore_index=True), check_exact=True,
        )  # fmt: skip
