"""The whole of preprocessing on small clips with known landmarks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import moving_frames

from unmask import preprocessing
from unmask.data.crops import CropError, CropStore, read_index, read_items
from unmask.data.faces import LocatorError
from unmask.data.landmarks import CANONICAL_68, bounding_box, eye_angle, forehead
from unmask.data.manifest import item_id, write_manifest
from unmask.data.video import encode
from unmask.preprocessing import Item, Result, Settings, contact_sheet, crop_face, failures, preprocess


def manifest(folder: Path, names, annotated=True) -> Path:
    """A manifest of media in `folder`; each has NAME.npz as annotations."""
    rows = [{
        "item_id": item_id("t", name), "root": ".", "path": name, "kind": "video", "dataset": "t", "split": "train",
        "label": np.int8(0), "method": "real", "subject": "", "source_id": "", "group_id": name, "camera": "",
        "annotations": f"{name}.npz" if annotated else "",
    } for name in names]  # fmt: skip
    write_manifest(pd.DataFrame(rows).astype({"label": "int8"}), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def annotate(path: Path, frames: int, scale=8.0, centre=(60, 45), degrees=0.0):
    z = CANONICAL_68 @ [1, 1j] * np.exp(1j * np.radians(degrees)) * scale
    face = np.stack([z.real, z.imag], 1) + centre
    np.savez(path, landmarks=np.stack([face + [0.2 * t, 0] for t in range(frames)]).astype(np.float32))


@pytest.fixture
def world(tmp_path, make_clip):
    """Six clips, annotated, of which number 2 is not a video and number 4 has no face in its first half."""
    names = [f"clip {i}.mp4" for i in range(6)]
    for i, name in enumerate(names):
        make_clip(tmp_path / name, count=12 + i)
        annotate(tmp_path / f"{name}.npz", 12 + i)
    (tmp_path / names[2]).write_text("no video at all")
    landmarks = np.load(tmp_path / f"{names[4]}.npz")["landmarks"]
    landmarks[:8] = np.nan
    np.savez(tmp_path / f"{names[4]}.npz", landmarks=landmarks)
    return manifest(tmp_path, names)


def shards(out):
    return {p.name: p.read_bytes() for p in sorted(Path(out).glob("shards/*.tar"))}


def test_every_item_gets_a_row_and_crops_sit_on_the_face(world, tmp_path):
    items = preprocess(world, tmp_path / "out", frames=4, size=64, workers=0)
    assert items["status"].tolist() == ["ok", "ok", "failed", "ok", "ok", "ok"]
    assert items["reason"][2] == "not a readable picture or video"
    assert items["faces"].tolist() == [4, 4, 0, 4, 2, 4] and items["frames"].tolist() == [4, 4, 0, 4, 4, 4]
    index = read_index(tmp_path / "out")
    first = index.iloc[0]
    assert first["frame"] == 1 and first["pts"] == pytest.approx(0.04)
    goal = bounding_box(forehead(CANONICAL_68 * 8 + [60.2, 45]))
    side = (goal[2:] - goal[:2]).max()
    assert first["x1"] - first["x0"] == pytest.approx(1.6 * side, rel=1e-3)
    assert (first["x0"] + first["x1"]) / 2 == pytest.approx(60.2, abs=0.5)
    points = first["landmarks"].reshape(81, 2)
    assert np.abs(bounding_box(points)[[1, 3]] / 64 - [0.3 / 1.6, 1.3 / 1.6]).max() < 0.02
    assert failures(items).to_dict("list") == {
        "reason": ["not a readable picture or video"], "items": [1], "share": [pytest.approx(1 / 6)]}  # fmt: skip
    sheet = contact_sheet(CropStore(tmp_path / "out"), index.head(5), columns=3, cell=32)
    assert sheet.shape == (64, 96, 3) and (sheet[32:, 64:] == 255).all()


def test_crop_face_maps_points_and_pads_with_black():
    frame = np.zeros((60, 80, 3), np.uint8)
    frame[20:22, 30:32] = 255
    for angle in (0.0, 0.3):
        crop, matrix = crop_face(frame, np.array([-10.0, 0, 50, 60]), 120, angle)
        x, y = matrix[:, :2] @ [30.5, 20.5] + matrix[:, 2]
        bright = np.argwhere(crop[..., 0] > 128)
        assert np.abs(bright.mean(0) - [y, x]).max() < 0.6
        assert not crop[:, :15].any()
    small, matrix = crop_face(frame, np.array([0.0, 0, 60, 60]), 30)
    assert np.allclose(matrix @ [30.5, 20.5, 1], [15, 10])
    assert small[10, 15, 0] == 255 and small.astype(int).sum() == 255 * 3
    outside, _ = crop_face(frame, np.array([500.0, 500, 560, 560]), 16)
    assert not outside.any()


def test_alignment_levels_the_eyes(tmp_path, make_clip):
    make_clip(tmp_path / "a.mp4", count=4)
    annotate(tmp_path / "a.mp4.npz", 4, degrees=20)
    path = manifest(tmp_path, ["a.mp4"])
    for align, angle in ((False, 20), (True, 0)):
        preprocess(path, tmp_path / str(align), frames=1, align=align, workers=0)
        points = read_index(tmp_path / str(align))["landmarks"][0].reshape(81, 2)
        assert np.degrees(eye_angle(points)) == pytest.approx(angle, abs=0.1)
        assert np.abs(points.mean(0) - 80).max() < 16


def test_box_of_a_shrunk_clip_is_in_source_pixels(tmp_path, make_clip, monkeypatch):
    make_clip(tmp_path / "a.mp4", count=4, height=192, width=256)
    annotate(tmp_path / "a.mp4.npz", 4, scale=16, centre=(120, 90))
    path = manifest(tmp_path, ["a.mp4"])
    preprocess(path, tmp_path / "full", frames=2, workers=0)
    item = Item("0" * 16, str(tmp_path / "a.mp4"), str(tmp_path / "a.mp4.npz"))
    settings = Settings("annotations", "", 2, 160, 0.3, False, 30, "png", 1, max_side=128)
    full, small = read_index(tmp_path / "full"), preprocessing.process_item(item, settings).crops
    for row, crop in zip(full.to_dict("records"), small, strict=True):
        for side in ("x0", "y0", "x1", "y1"):
            assert row[side] == pytest.approx(crop[side], abs=0.1)
        assert np.abs(row["landmarks"] - crop["landmarks"]).max() < 2.5


def test_workers_and_shards_do_not_change_the_result(world, tmp_path):
    alone = preprocess(world, tmp_path / "alone", frames=3, size=48, workers=0)
    preprocess(world, tmp_path / "two", frames=3, size=48, workers=2)
    assert shards(tmp_path / "two") == shards(tmp_path / "alone")
    part = preprocess(world, tmp_path / "array", frames=3, size=48, shard=(1, 2), workers=0)
    assert part["item_id"].tolist() == alone["item_id"].tolist()[1::2]
    assert not (tmp_path / "array" / "items.parquet").exists()
    both = preprocess(world, tmp_path / "array", frames=3, size=48, shard=(0, 2), workers=0)
    pd.testing.assert_frame_equal(both.drop(columns="seconds"), alone.drop(columns="seconds"))
    assert read_index(tmp_path / "array")["sha256"].tolist() == read_index(tmp_path / "alone")["sha256"].tolist()


def test_what_an_array_made_is_gone_on_with_and_not_made_anew(world, tmp_path, monkeypatch, capsys):
    alone = preprocess(world, tmp_path / "alone", frames=3, size=48, workers=0)
    preprocess(world, tmp_path / "array", frames=3, size=48, shard=(1, 3), workers=0)
    work, real = [], preprocessing.process_item
    monkeypatch.setattr(preprocessing, "_run", lambda items, settings, workers: (
        work.append(item.item_id) or real(item, settings) for item in items))  # fmt: skip
    whole = preprocess(world, tmp_path / "array", frames=3, size=48, workers=0)
    assert work == [*alone["item_id"][0::3], *alone["item_id"][2::3]]
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), alone.drop(columns="seconds"))
    assert read_index(tmp_path / "array")["sha256"].tolist() == read_index(tmp_path / "alone")["sha256"].tolist()
    preprocess(world, tmp_path / "array", frames=3, size=48, workers=0)
    assert len(work) == 4 and "settings have changed" not in capsys.readouterr().err
    preprocess(world, tmp_path / "array", frames=2, size=48, workers=0)
    assert list(shards(tmp_path / "array")) == ["crops-00000-of-00001.tar"]


def test_rerun_does_nothing_but_changed_media_are_done_again(world, tmp_path, make_clip, monkeypatch):
    preprocess(world, tmp_path / "out", frames=2, workers=0)
    work = []
    real = preprocessing.process_item
    monkeypatch.setattr(preprocessing, "_run", lambda items, settings, workers: (
        work.append(item.media) or real(item, settings) for item in items))  # fmt: skip
    preprocess(world, tmp_path / "out", frames=2, workers=0)
    assert work == []
    before = shards(tmp_path / "out")
    encode(tmp_path / "clip 4.mp4", 255 - moving_frames(16))
    preprocess(world, tmp_path / "out", frames=2, workers=0)
    assert [Path(p).name for p in work] == ["clip 4.mp4", "clip 5.mp4"]
    assert shards(tmp_path / "out") != before


def test_changed_settings_discard_the_old_crops(world, tmp_path, capsys):
    preprocess(world, tmp_path / "out", frames=2, workers=0)
    preprocess(world, tmp_path / "out", frames=2, size=32, workers=0)
    assert "settings have changed" in capsys.readouterr().err
    preprocess(world, tmp_path / "fresh", frames=2, size=32, workers=0)
    assert shards(tmp_path / "out") == shards(tmp_path / "fresh")
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["size"] == 32
    preprocess(world, tmp_path / "out", frames=2, size=48, shard=(0, 3), workers=0)
    assert not (tmp_path / "out" / "crops.parquet").exists()


def test_another_number_of_shards_discards_nothing(world, tmp_path):
    how = {"frames": 2, "size": 32, "workers": 0}
    preprocess(world, tmp_path / "array", shard=(1, 3), **how)
    before = shards(tmp_path / "array")
    with pytest.raises(CropError, match="were made in 3 shares: give --shard I/3, leave --shard out, or delete"):
        preprocess(world, tmp_path / "array", shard=(0, 1), **how)
    assert before and shards(tmp_path / "array") == before
    preprocess(world, tmp_path / "whole", **how)
    with pytest.raises(CropError, match="were made without --shard: leave --shard out, or delete"):
        preprocess(world, tmp_path / "whole", shard=(0, 3), **how)
    assert len(read_items(tmp_path / "whole")) == 6


def test_a_medium_of_another_share_that_has_changed_is_noticed(world, tmp_path, capsys):
    how = {"frames": 2, "size": 32, "workers": 0}
    preprocess(world, tmp_path / "array", shard=(0, 2), **how)
    annotate(tmp_path / "clip 4.mp4.npz", 16)
    preprocess(world, tmp_path / "array", shard=(1, 2), **how)
    assert "Still to do: shard 0/2." in capsys.readouterr().err
    assert not (tmp_path / "array" / "items.parquet").exists()
    preprocess(world, tmp_path / "array", shard=(0, 2), **how)
    alone = preprocess(world, tmp_path / "alone", **how)
    pd.testing.assert_frame_equal(read_items(tmp_path / "array").drop(columns="seconds"), alone.drop(columns="seconds"))


@pytest.mark.parametrize("reason", preprocessing.OF_THE_MACHINE)
def test_what_the_machine_made_fail_is_tried_again(world, tmp_path, monkeypatch, reason):
    """Items 1, 3 and 5 are unlucky; 1 goes on to be, and keeps nothing from being kept."""
    unlucky, work, real = ["clip 1.mp4", "clip 3.mp4", "clip 5.mp4"], [], preprocessing.process_item

    def run(items, settings, workers):
        for item in items:
            name = Path(item.media).name
            work.append(name)
            yield preprocessing._failed(item, reason) if name in unlucky else real(item, settings)

    how = {"frames": 2, "size": 32, "workers": 0}
    whole = preprocess(world, tmp_path / "whole", **how)
    monkeypatch.setattr(preprocessing, "_run", run)
    first = preprocess(world, tmp_path / "out", **how)
    assert first["reason"].tolist()[1::2] == [reason] * 3
    before = shards(tmp_path / "out")
    work.clear()
    preprocess(world, tmp_path / "out", **how)
    assert work == unlucky and shards(tmp_path / "out") == before
    del unlucky[1:]
    work.clear()
    second = preprocess(world, tmp_path / "out", **how)
    assert work == ["clip 1.mp4", "clip 3.mp4", "clip 3.mp4", "clip 4.mp4", "clip 5.mp4"]
    assert second["reason"][1] == reason and second["reason"].tolist()[2:] == whole["reason"].tolist()[2:]
    del unlucky[:]
    preprocess(world, tmp_path / "out", **how)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_dense_sampling_is_told_to_whoever_repeats_it(world, tmp_path, capsys):
    items = preprocess(world, tmp_path / "out", frames=4, size=32, workers=0, sampling="dense", fps=12.5)
    assert items["frames"].tolist() == [4, 4, 0, 4, 4, 4]
    index = read_index(tmp_path / "out")
    first = index[index["item_id"] == items["item_id"][0]]  # twelve frames, 25 a second: the middle is 5.5
    assert first["frame"].tolist() == [2, 4, 6, 8] and np.allclose(first["pts"], [0.08, 0.16, 0.24, 0.32])
    told = CropStore(tmp_path / "out").settings()
    assert (told["frames"], told["sampling"], told["fps"]) == (4, "dense", 12.5)
    preprocess(world, tmp_path / "again", locator="annotations", workers=0, **told)
    assert shards(tmp_path / "again") == shards(tmp_path / "out")
    preprocess(world, tmp_path / "again", workers=0, **told | {"sampling": "uniform"})
    assert "settings have changed" in capsys.readouterr().err
    preprocess(world, tmp_path / "even", frames=4, size=32, workers=0)
    assert shards(tmp_path / "again") == shards(tmp_path / "even")


def test_crops_from_before_there_was_a_choice_are_kept(world, tmp_path, monkeypatch, capsys):
    preprocess(world, tmp_path / "out", frames=2, workers=0)
    path = tmp_path / "out" / "settings.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("sampling", "fps")}
    path.write_text(json.dumps(old))
    told = CropStore(tmp_path / "out").settings()
    assert (told["sampling"], told["fps"]) == ("uniform", 0)
    monkeypatch.setattr(preprocessing, "process_item", lambda *_: pytest.fail("done again"))
    preprocess(world, tmp_path / "out", frames=2, workers=0)
    assert capsys.readouterr().err == ""


def test_dead_worker_costs_only_its_item():
    items = [Item(f"{i:016x}", f"{i}", "") for i in range(6)]

    def work(item, settings):
        if item.media == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05 if item.media == "0" else 0)
        return Result({"item_id": item.item_id, "reason": ""}, [])

    results = list(preprocessing._run(items, None, 2, work))
    assert [r.row["item_id"] for r in results] == [i.item_id for i in items]
    assert [r.row["reason"] for r in results] == ["", "", "worker process died (killed or out of memory)", "", "", ""]
    assert list(preprocessing._run([], None, 2, work)) == []


def test_kill_and_rerun_gives_identical_shards(world, tmp_path):
    preprocess(world, tmp_path / "whole", frames=4, size=96, workers=0)
    code = ("import sys, time; from unmask import preprocessing as p\n"
            "real = p.process_item\n"
            "p._run = lambda items, settings, workers: (time.sleep(0.3) or real(i, settings) for i in items)\n"
            "p.preprocess(sys.argv[1], sys.argv[2], frames=4, size=96, workers=0)")  # fmt: skip
    package = str(Path(preprocessing.__file__).parents[1])
    process = subprocess.Popen([sys.executable, "-c", code, str(world), str(tmp_path / "out")],
                               env=os.environ | {"PYTHONPATH": package})  # fmt: skip
    journal = tmp_path / "out" / "shards" / "crops-00000-of-00001.jsonl"
    end = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "items.parquet").exists()
    preprocess(world, tmp_path / "out", frames=4, size=96, workers=0)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    pd.testing.assert_frame_equal(read_index(tmp_path / "out"), read_index(tmp_path / "whole"))
    assert len(read_items(tmp_path / "out")) == 6


def test_refusals_come_before_any_work(world, tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path))
    for error, options in ((LocatorError, {"locator": "yunet"}), (ValueError, {"encoding": "webp"}),
                           (ValueError, {"shard": (2, 2)}), (ValueError, {"sampling": "x"})):  # fmt: skip
        with pytest.raises(error):
            preprocess(world, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_annotations_are_reasons(world, tmp_path, capsys):
    (tmp_path / "clip 0.mp4.npz").unlink()
    (tmp_path / "clip 1.mp4.npz").write_bytes(b"x")
    reasons = preprocess(world, tmp_path / "out", frames=1, workers=0)["reason"]
    assert reasons[0] == "annotation file not found" and "not an .npz" in reasons[1]
    path = manifest(tmp_path, ["clip 3.mp4"], annotated=False)
    with pytest.raises(LocatorError, match="--locator yunet"):  # and what was cut by another locator stays
        preprocess(path, tmp_path / "out", frames=1, workers=0)
    assert "settings have changed" not in capsys.readouterr().err and len(read_index(tmp_path / "out"))


def test_jpeg_crops(world, tmp_path):
    preprocess(world, tmp_path / "png", frames=1, workers=0)
    preprocess(world, tmp_path / "jpg", frames=1, encoding="jpg", workers=0)
    png, jpg = (CropStore(tmp_path / e).image(read_index(tmp_path / e).iloc[0], check=True) for e in ("png", "jpg"))
    assert 0 < np.abs(png.astype(int) - jpg).mean() < 3
    assert cv2.PSNR(png, jpg) > 35
