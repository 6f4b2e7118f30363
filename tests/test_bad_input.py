"""Bad media: each gives a row with a reason, or a right result; nothing crashes or hangs."""

import builtins
import os
import time

import av
import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import moving_frames, textured_frames
from PIL import Image
from test_video import rotate_mark, write_vfr

from unmask import explain, panel, preprocessing
from unmask.data.crops import read_index
from unmask.data.faces import Face
from unmask.data.landmarks import CANONICAL_68
from unmask.data.manifest import item_id, write_manifest
from unmask.data.video import encode, read_frames
from unmask.preprocessing import Item, Settings, preprocess, process_item

DEADLINE = 10.0


class SquareLocator:
    """A stand-in for a face detector that needs no weights: white squares are faces."""

    name, hash = "squares", "0" * 64

    def locate(self, frame, index=0):
        white = cv2.inRange(frame, (215, 215, 215), (255, 255, 255))
        _, _, stats, _ = cv2.connectedComponentsWithStats(white)
        faces = []
        for x, y, w, h, area in stats[1:]:
            if area > 0.7 * w * h and min(w, h) > 4:
                points = CANONICAL_68 * w / 3 + [x + w / 2, y + h / 2]
                faces.append(Face(np.array([x, y, x + w, y + h], np.float32), 0.9, points.astype(np.float32)))
        return faces


@pytest.fixture(autouse=True, scope="module")
def squares(tiny_checkpoint):  # which is made before, with the real locators
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, "build_locator", lambda name, **_: SquareLocator())
        preprocessing._worker_locator.cache_clear()
        yield
    preprocessing._worker_locator.cache_clear()


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def no_frames(path):
    """A valid container with a video stream of length zero."""
    with av.open(str(path), "w", options={"movflags": "+empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


def pictures(folder):
    rgb = moving_frames(1, 120, 160)[0]
    alpha = np.dstack([rgb, np.full((120, 160), 255, np.uint8)])
    Image.fromarray(alpha).save(folder / "alpha.png")
    Image.fromarray((rgb[..., 0].astype(np.uint16) << 8) + 9).save(folder / "deep.png")
    Image.fromarray(rgb).convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    shots = [Image.fromarray(f) for f in moving_frames(5, 120, 160)]
    shots[0].save(folder / "moving.gif", save_all=True, append_images=shots[1:], duration=80)
    Image.fromarray(rgb).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(rgb).save(folder / "png named.mp4", format="png")


def videos(folder):
    good = encode(folder / "good.mp4", textured_frames(24, 120, 160), gop=4)
    data = good.read_bytes()
    for share in (30, 90):
        (folder / f"cut {share}.mp4").write_bytes(data[: len(data) * share // 100])
    (folder / "headless.mp4").write_bytes(data[len(data) // 2 :])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("This is no film.\n" * 50)
    (folder / "folder.mp4").mkdir()
    no_frames(folder / "no frames.mp4")
    audio_only(folder / "audio.mp4")
    encode(folder / "one.mp4", moving_frames(1, 120, 160))
    encode(folder / "tiny.mp4", moving_frames(4, 8, 8))
    encode(folder / "8k.mp4", (np.kron(f, np.ones((36, 36, 1), np.uint8)) for f in moving_frames(2, 120, 216)),
           preset="ultrafast")  # fmt: skip
    encode(folder / "empty room.mp4", np.full((6, 96, 128, 3), 90, np.uint8))
    encode(folder / "ten.mp4", moving_frames(12, 200, 400, squares=10))
    rotate_mark(good, 90)
    write_vfr(folder / "vfr.mp4", [0, 40, 80, 400, 1000, 2000])
    (folder / "dir a").mkdir()
    (folder / "dir b").mkdir()
    for name in ("dir a/same.mp4", "dir b/same.mp4", "naïve  film (1) 视频 ü.mp4"):
        (folder / name).write_bytes(data)


OK = {"good.mp4": 4, "cut 90.mp4": 4, "cut 30.mp4": 4, "one.mp4": 1, "8k.mp4": 2, "ten.mp4": 4, "turned90.mp4": 4,
      "vfr.mp4": 4, "dir a/same.mp4": 4, "dir b/same.mp4": 4, "naïve  film (1) 视频 ü.mp4": 4,
      "alpha.png": 1, "deep.png": 1,
      "cmyk.jpg": 1, "moving.gif": 4, "whole.png": 1, "png named.mp4": 1}  # fmt: skip
FAILED = {
    "empty.mp4": "empty file",
    "text.mp4": "not a readable picture or video",
    "headless.mp4": "not a readable picture or video",
    "no frames.mp4": "no decodable frame",
    "audio.mp4": "no video stream",
    "tiny.mp4": "frame smaller than 16 pixels",
    "empty room.mp4": "no face found",
    "folder.mp4": "a folder, not a file",
    "missing.mp4": "file not found",
    "half.png": "damaged picture",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    pictures(folder)
    videos(folder)
    names = [*OK, *FAILED]
    rows = pd.DataFrame({"item_id": [item_id("t", n) for n in names], "root": ".", "path": names, "kind": "video",
                         "dataset": "t", "split": "test", "label": 0, "method": "real", "subject": "",
                         "source_id": "", "group_id": names, "camera": "", "annotations": ""})  # fmt: skip
    write_manifest(rows.astype({"label": "int8"}), folder / "manifest.parquet")
    items = preprocess(folder / "manifest.parquet", folder / "out", locator="squares", frames=4, size=32,
                       deadline=DEADLINE, workers=0)  # fmt: skip
    assert items["item_id"].tolist() == rows["item_id"].tolist()
    return folder, items.assign(name=names).set_index("name"), read_index(folder / "out")


@pytest.mark.parametrize("name", OK)
def test_odd_but_usable(run, name):
    _, items, index = run
    row = items.loc[name]
    assert (row["status"], row["reason"]) == ("ok", "")
    assert row["faces"] == (index["item_id"] == row["item_id"]).sum()
    assert row["faces"] == OK[name]
    assert row["seconds"] < DEADLINE + 2


@pytest.mark.parametrize("name", FAILED)
def test_unusable_has_its_reason(run, name):
    _, items, index = run
    row = items.loc[name]
    assert (row["status"], row["reason"], row["faces"]) == ("failed", FAILED[name], 0)
    assert not (index["item_id"] == row["item_id"]).any()


def crops_of(run, name):
    _, items, index = run
    return index[index["item_id"] == items.loc[name, "item_id"]]


def test_cut_clips_come_from_pyav_and_are_spread(run):
    _, items, _ = run
    assert items.loc["cut 90.mp4", "decoder"] == "pyav" and items.loc["good.mp4", "decoder"] == "decord"
    assert crops_of(run, "cut 90.mp4")["frame"].iloc[-1] > 12


def test_8k_boxes_are_in_source_pixels(run):
    row = crops_of(run, "8k.mp4").iloc[0]
    assert 4320 * 0.25 < row["x1"] - row["x0"] < 4320 and row["x1"] > 1920


def test_turned_clip_has_its_face_where_it_is_shown(run):
    upright, turned = crops_of(run, "good.mp4").iloc[0], crops_of(run, "turned90.mp4").iloc[0]
    centre = [(r["x0"] + r["x1"]) / 2 for r in (upright, turned)] + [(r["y0"] + r["y1"]) / 2 for r in (upright, turned)]
    # 160 x 120 turned clockwise: x' = 120 - y; the stand-in's face stands upright in both, off its square by 0.1 side.
    assert abs(centre[1] - (120 - centre[2])) < 15 and abs(centre[3] - centre[0]) < 15


def test_times_of_variable_rate(run):
    assert crops_of(run, "vfr.mp4")["frame"].tolist() == [0, 2, 3, 5]
    assert np.allclose(np.diff(crops_of(run, "vfr.mp4")["pts"]), [0.08, 0.32, 1.6], atol=0.01)


def test_ten_faces_keep_to_one(run):
    boxes = crops_of(run, "ten.mp4")
    assert np.ptp(boxes["x0"]) < 20 and np.ptp(boxes["y0"]) < 10


def test_pixels_of_a_16_bit_picture(run):
    frame = read_frames(run[0] / "deep.png", 1).frames[0]
    assert np.array_equal(frame[..., 0], moving_frames(1, 120, 160)[0][..., 0])


def test_unreadable_permission(run, monkeypatch):
    """Root can read everything, so the refusal of the operating system is imitated."""

    def refuse(path, *args, **kwargs):
        if str(path).endswith("good.mp4"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    real = builtins.open
    monkeypatch.setattr(builtins, "open", refuse)
    row = process_item(Item("0" * 16, str(run[0] / "good.mp4"), ""), SETTINGS).row
    assert (row["status"], row["reason"]) == ("failed", "permission denied")


SETTINGS = Settings("squares", "", 2, 32, 0.3, False, DEADLINE, "png", 1)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A copy with flipped bits, a cut-out, a cut-off end, or swapped blocks."""
    out = bytearray(data)
    kind = rng.integers(4)
    a, b = sorted(rng.integers(0, len(out), 2).tolist())
    if kind == 0:
        for place in rng.integers(0, len(out), int(rng.integers(1, 30))):
            out[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del out[a : min(b, a + 200)]
    elif kind == 2:
        del out[b:]
    else:
        out[a:b] = rng.integers(0, 256, b - a, dtype=np.uint8).tobytes()[: b - a]
    return bytes(out)


def test_300_damaged_copies(tmp_path):
    data = encode(tmp_path / "good.mp4", textured_frames(8, 48, 64), gop=4).read_bytes()
    rng, rows, slowest = np.random.default_rng(2024), [], 0.0
    for i in range(300):
        path = tmp_path / "copy.mp4"
        path.write_bytes(damaged(data, rng))
        start = time.monotonic()
        rows.append(process_item(Item(f"{i:016x}", str(path), ""), SETTINGS).row)
        slowest = max(slowest, time.monotonic() - start)
    table = pd.DataFrame(rows)
    assert len(table) == 300 and table["item_id"].is_unique
    assert (table.loc[table["status"] == "failed", "reason"] != "").all()
    assert not table["reason"].str.contains("internal|crashed|deadline").any(), table["reason"].value_counts().to_dict()
    assert slowest < DEADLINE + 2
    assert 0.1 < (table["status"] == "ok").mean() < 0.9


def test_all_of_it_is_explained(run, squares, monkeypatch, tmp_path, tiny_checkpoint):
    """A row and a page for each, and no verdict where there is nothing to judge by."""
    folder, _, _ = run
    monkeypatch.setattr(explain, "best_locator", lambda: "squares")
    judges = panel.uncalibrated([tiny_checkpoint])
    names = [*OK, *FAILED]
    table = explain.explain([folder / name for name in names], judges, tmp_path / "out", workers=0, deadline=DEADLINE)
    # A folder is what lies in it: this one is empty and stands for itself.
    assert [os.path.relpath(path, folder) for path in table["path"]] == names
    table = table.set_axis(names)
    assert (table["verdict"] == "cannot tell").all() and (table["reasons"] != "").all()
    assert (table.loc[list(OK), "status"] == "ok").all() and (table.loc[list(FAILED), "status"] == "failed").all()
    assert table.loc[list(FAILED), "reasons"].to_dict() == FAILED
    assert "too short: 1 frames" in table.loc["one.mp4", "reasons"]
    assert "too short" not in table.loc["whole.png", "reasons"]
    assert table["page"].is_unique and all((tmp_path / "out" / page).is_file() for page in table["page"])
