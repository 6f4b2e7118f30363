"""Fingerprints of media: where the face is, what counts, failures as rows, going on after a stop, reading back."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import textured_frames
from PIL import Image
from test_video import rotate_mark

from unmask import fingerprints as fp
from unmask import prnu
from unmask.data.video import Clip, encode, read_frames
from unmask.preprocessing import crop_face

SETTINGS = fp.Settings(frames=3, crop=0, sigma=5.0)
# What a viewer does to the stored picture for each EXIF orientation (EXIF 2.3, table 6).
SHOW = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}  # fmt: skip


def square(left, top, side=24):
    """68 landmarks float32[68,2] whose hull is a square; LOWER spans its lower half."""
    points = np.full((68, 2), (left + side / 2, top + side / 2), np.float32)
    right, middle, bottom = left + side, top + side / 2, top + side
    points[[0, 1]], points[[15, 16]] = (left, top), (right, top)
    points[2:15], points[2], points[10], points[14] = (left, bottom), (left, middle), (right, bottom), (right, middle)
    return points


def clip_like(frames, indices, orientation=1):
    """A Clip of black frames [T,H,W]."""
    count, height, width = frames
    return Clip(np.zeros((count, height, width, 3), np.uint8), np.array(indices), np.zeros(count), "pyav", 25.0, width,
                height, 1.0, count, np.full(count, np.nan), orientation)  # fmt: skip


def boxed(mask):
    """(left, top, right, bottom) of the True pixels, inclusive."""
    y, x = np.nonzero(mask)
    return x.min(), y.min(), x.max(), y.max()


# Where the face is


@pytest.mark.parametrize("box", [(30.2, 20.7, 90.9, 81.4), (-12.4, 40.0, 51.2, 103.6), (10, 10, 170, 170)])
def test_face_hulls_invert_the_crop(box):
    frame = np.zeros((120, 160, 3), np.uint8)
    points = np.random.default_rng(0).uniform(20, 100, (81, 2))
    rows = []
    for number, moved in ((4, 0.0), (9, 3.3)):
        where = np.array(box, np.float64) + moved
        matrix = crop_face(frame, where, 64)[1]
        inside = (points + moved) @ matrix[:, :2].T + matrix[:, 2]
        rows.append({"item_id": "a", "frame": number, **dict(zip(("x0", "y0", "x1", "y1"), where, strict=True)),
                     "landmarks": inside.ravel().astype(np.float32)})  # fmt: skip
    found = fp.face_hulls(pd.DataFrame(rows[::-1]), 64)
    frames, hulls = found["a"]
    assert frames == (4, 9) and hulls.shape == (2, 68, 2)
    np.testing.assert_allclose(hulls[0], points[:68], atol=1e-3)
    np.testing.assert_allclose(hulls[1], points[:68] + 3.3, atol=1e-3)


def test_aligned_crops_tell_no_place():
    row = {"item_id": "a", "frame": 0, "x0": 0, "y0": 0, "x1": 9, "y1": 9, "landmarks": np.zeros(136, np.float32)}
    assert fp.face_hulls(pd.DataFrame([row]), 64, align=True) == {}


def test_masks_of_a_known_face():
    medium = fp.Medium("a", "a.mp4", (0,), square(40, 50)[None])
    background, face, lower = fp.region_masks(medium, clip_like((1, 120, 140), [0]))[0]
    assert boxed(face) == (40, 50, 64, 74) and face.sum() == 25**2
    assert boxed(lower) == (40, 62, 64, 74) and lower.sum() == 25 * 13
    # The centre is (52, 62); 12 pixels to each side become 16.2, and 0.35 of 24 is added above.
    left, top, right, bottom = boxed(~background)
    assert (left, top, right, bottom) == (36, 37, 68, 78)
    assert background[0, 0] and not (background & face).any()


def test_the_face_moves_in_a_straight_line_between_located_frames():
    medium = fp.Medium("a", "a.mp4", (2, 12), np.stack([square(20, 30), square(40, 50)]))
    masks = fp.region_masks(medium, clip_like((4, 120, 140), [0, 2, 7, 20]))
    assert [boxed(mask[1])[:2] for mask in masks] == [(20, 30), (20, 30), (30, 40), (40, 50)]


def test_masks_lie_in_the_crop():
    medium = fp.Medium("a", "a.mp4", (0,), square(40, 50)[None])
    masks = fp.region_masks(medium, clip_like((1, 60, 40), [0]), origin=(30, 20))
    assert boxed(masks[0, 1]) == (20, 20, 39, 44)


def test_without_a_face_all_is_background():
    masks = fp.region_masks(fp.Medium("a", "a.mp4"), clip_like((2, 64, 70), [0, 1]))
    assert masks[:, 0].all() and not masks[:, 1:].any()


@pytest.mark.parametrize("orientation", SHOW)
def test_masks_follow_the_mark_of_the_stored_picture(orientation):
    stored = (90, 140)
    shown = SHOW[orientation](np.zeros(stored)).shape
    medium = fp.Medium("a", "a.jpg", (0,), square(18, 33)[None])
    want = fp.region_masks(medium, clip_like((1, *shown), [0]))[0]
    clip = clip_like((1, *stored), [0], orientation)
    got = fp.region_masks(medium, clip)[0]
    for region in range(3):
        np.testing.assert_array_equal(SHOW[orientation](got[region]), want[region])


@pytest.mark.parametrize("orientation", SHOW)
@pytest.mark.parametrize("upright", [True, False])
def test_a_picture_tells_its_orientation(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = textured_frames(1, 70, 90)[0]
    for suffix in ("jpg", "png", "tif"):
        Image.fromarray(picture).save(path := tmp_path / f"marked.{suffix}", exif=exif)
        assert read_frames(path, 1, upright=upright).orientation == orientation
    Image.fromarray(picture).save(path := tmp_path / "plain.png")
    assert read_frames(path, 1).orientation == 1


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_faces_of_a_turned_video_are_masked_where_they_are(tmp_path, degrees):
    path = encode(tmp_path / "clip.mp4", textured_frames(4, 80, 120), crf=18)
    turned = rotate_mark(path, degrees)
    shown = read_frames(turned, 1).frames[0].shape[:2]
    medium = fp.Medium("turned", str(turned), (0,), square(10, 22)[None])
    rows = fp.extract([medium, fp.Medium("plain", str(path))], tmp_path / "out", SETTINGS)
    assert (rows["status"] == "ok").all() and set(rows["bucket"]) == {"120x80"}
    face = fp.read_patterns(tmp_path / "out", rows.iloc[:1], "face")[1][0]
    seen = np.rot90(face, -degrees // 90)  # the mark turns clockwise
    assert seen.shape == shown and boxed(seen) == (10, 22, 34, 46)
    assert rows["face"].tolist() == [25**2, 0]


def test_frame_weights_are_the_published_ones():
    got = fp.frame_weights(np.array([1, 11, 16, 18, 20, 33, 51, 60, 0, np.nan]))
    np.testing.assert_allclose(got, [1.64, 1.41, 1.0, 0.73, 0.46, 0.1, 0, 0, 1.64, 1.0])


# One row per medium


def still(path, seed=0, height=70, width=90):
    cv2.imwrite(str(path), textured_frames(1, height, width)[0] ^ np.uint8(seed))
    return path


@pytest.fixture
def media(tmp_path):
    """A video, a picture, and four that fail: missing, no medium, cut short, too small."""
    paths = {
        "video": encode(tmp_path / "video.mp4", textured_frames(6, 70, 90), crf=18), "still": still(tmp_path / "a.png"),
        "missing": tmp_path / "missing.mp4", "text": tmp_path / "text.mp4", "cut": tmp_path / "cut.png",
        "small": still(tmp_path / "small.png", height=63),
    }  # fmt: skip
    paths["text"].write_text("no video")
    paths["cut"].write_bytes(paths["still"].read_bytes()[:500])
    return [fp.Medium(name, str(path)) for name, path in paths.items()]


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were read since, in order."""
    calls = []
    true = fp.read_frames
    monkeypatch.setattr(fp, "read_frames", lambda path, *a, **k: calls.append(path) or true(path, *a, **k))
    return calls


def test_every_medium_gets_a_row(media, tmp_path):
    rows = fp.extract(media, tmp_path / "out", SETTINGS)
    assert list(rows.columns) == list(fp.COLUMNS)
    assert rows["item_id"].tolist() == ["video", "still", "missing", "text", "cut", "small"]
    assert rows["status"].tolist() == ["ok", "ok", *["failed"] * 4]
    assert rows["frames"].tolist() == [3, 1, 0, 0, 0, 0] and rows["bucket"].tolist() == ["90x70"] * 2 + [""] * 4
    assert (rows.loc[:1, "reason"] == "").all() and (rows.loc[2:, "reason"] != "").all()
    assert rows["reason"][2] == "file not found" and "64 pixels" in rows["reason"][5]
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors")} == {"video.safetensors", "still.safetensors"}


def test_fingerprints_are_those_of_the_frames(media, tmp_path):
    rows = fp.extract(media[:2], tmp_path / "out", SETTINGS)
    patterns, valid = fp.read_patterns(tmp_path / "out", rows)
    for pattern, medium in zip(patterns, media, strict=False):
        frames = read_frames(medium.path, 3).frames
        want = prnu.fingerprint(frames)
        assert np.abs(pattern - want).max() < 2e-3 * np.abs(want).max()
    scenes = fp.read_scenes(tmp_path / "out", rows)
    assert scenes.shape == (2, 16, 16, 3)
    for scene, medium in zip(scenes, media, strict=False):
        frames = read_frames(medium.path, 3).frames
        np.testing.assert_allclose(scene.mean((0, 1)), frames.mean((0, 1, 2)), atol=0.2)
    assert valid[1].mean() > 0.5


def test_a_second_call_decodes_nothing(media, tmp_path, decoded):
    first = fp.extract(media, tmp_path / "out", SETTINGS)
    assert decoded == [medium.path for medium in media]
    decoded.clear()
    pd.testing.assert_frame_equal(fp.extract(media, tmp_path / "out", SETTINGS), first)
    assert decoded == []
    fp.extract([*media[:1], fp.Medium("new", media[1].path)], tmp_path / "out", SETTINGS)
    assert decoded == [media[1].path]


def test_what_changed_is_done_again(media, tmp_path, decoded):
    media, out = media[:2], tmp_path / "out"
    fp.extract(media, out, SETTINGS)
    before = (out / "still.safetensors").read_bytes()
    decoded.clear()
    still(tmp_path / "a.png", seed=7)
    fp.extract(media, out, SETTINGS)
    assert decoded == [media[1].path] and (out / "still.safetensors").read_bytes() != before
    decoded.clear()
    face = fp.Medium("still", media[1].path, (0,), square(30, 30)[None])
    fp.extract([media[0], face], out, SETTINGS)
    assert decoded == [face.path]
    decoded.clear()
    fp.extract(media, out, fp.Settings(frames=2, crop=0, sigma=5.0))
    assert decoded == [medium.path for medium in media]


def test_a_lost_or_cut_fingerprint_is_made_again(media, tmp_path, decoded):
    media, out = media[:2], tmp_path / "out"
    rows = fp.extract(media, out, SETTINGS)
    before = (out / "video.safetensors").read_bytes(), (out / "still.safetensors").read_bytes()
    (out / "video.safetensors").unlink()
    (out / "still.safetensors").write_bytes(before[1][:-100])
    for _ in range(2):
        with pytest.raises(fp.FingerprintError, match="run the chapter again"):
            fp.read_patterns(out, rows)
        rows, before_rows = fp.extract(media, out, SETTINGS), rows
        assert ((out / "video.safetensors").read_bytes(), (out / "still.safetensors").read_bytes()) == before
        pd.testing.assert_frame_equal(rows.drop(columns="seconds"), before_rows.drop(columns="seconds"))
        (out / "video.safetensors").write_bytes(b"")


def test_a_medium_that_fails_now_leaves_no_old_fingerprint(media, tmp_path):
    out = tmp_path / "out"
    fp.extract(media[1:2], out, SETTINGS)
    (tmp_path / "a.png").write_text("gone")
    assert fp.extract(media[1:2], out, SETTINGS)["status"].tolist() == ["failed"]
    assert not (out / "still.safetensors").exists()
    still(tmp_path / "a.png")
    assert fp.extract(media[1:2], out, SETTINGS)["status"].tolist() == ["ok"]


def test_one_and_two_workers_leave_the_same_bytes(media, tmp_path):
    one, two = (fp.extract(media, tmp_path / str(n), SETTINGS, workers=n) for n in (1, 2))
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))
    for path in (tmp_path / "1").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_regions_are_read_by_name_and_leave_the_others_out(media, tmp_path):
    medium = fp.Medium("video", media[0].path, (0,), square(30, 25)[None])
    rows = fp.extract([medium], tmp_path / "out", SETTINGS)
    regions = {name: fp.read_patterns(tmp_path / "out", rows, name) for name in fp.REGIONS}
    for patterns, valid in regions.values():
        assert patterns.shape == valid.shape == (1, 70, 90) and (patterns[~valid] == 0).all()
        assert (patterns[valid] != 0).mean() > 0.9
    assert boxed(regions["face"][1][0]) == (30, 25, 54, 49) and boxed(regions["lower"][1][0]) == (30, 37, 54, 49)
    assert not (regions["background"][1] & regions["face"][1]).any()


def test_a_crop_is_the_centre_of_the_frame(media, tmp_path):
    rows = fp.extract(media[:1], tmp_path / "out", fp.Settings(frames=3, crop=66, sigma=5.0))
    assert rows.loc[0, ["height", "width", "bucket"]].tolist() == [66, 66, "90x70"]
    pattern = fp.read_patterns(tmp_path / "out", rows)[0][0]
    want = prnu.fingerprint(read_frames(media[0].path, 3).frames[:, 2:68, 12:78])
    assert np.abs(pattern - want).max() < 2e-3 * np.abs(want).max()


def test_notes_are_plain_json_and_rows_are_stored(media, tmp_path):
    rows = fp.extract(media, tmp_path / "out", SETTINGS)
    note = json.loads((tmp_path / "out" / "small.json").read_text())
    assert note["row"]["status"] == "failed"
    fp.write_rows(rows, tmp_path / "rows.parquet")
    back = pd.read_parquet(tmp_path / "rows.parquet")
    assert back.to_dict("records") == rows.to_dict("records")
