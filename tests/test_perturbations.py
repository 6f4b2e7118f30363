"""Perturbed pictures against plain arithmetic and another JPEG library; crop folders of them: same rows, never half.

And videos: encoded anew with every frame in its place, or with frames lost.
"""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import moving_frames
from PIL import Image
from test_video import rotate_mark

from unmask import lare, perturbations
from unmask.data.crops import CropError, CropStore, read_index, read_items
from unmask.data.frames import MediaError
from unmask.data.video import encode, probe, read_frames
from unmask.detectors import base
from unmask.perturbations import KINDS, LEVELS, VIDEO_KINDS, kept, perturb, perturbed_crops, recompress
from unmask.scoring import score_crops


def picture(height=128, width=96, seed=0):
    """Smooth blobs with some grain, so that every kind has something to spoil."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([128 + 80 * np.sin(x / (5 + c) + y / (7 - c)) for c in range(3)], -1)
    return np.clip(waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_size_and_the_given_picture(kind):
    image = picture()
    before = image.copy()
    changed = perturb(image, kind, rng())
    assert changed.shape == image.shape and changed.dtype == np.uint8
    assert np.array_equal(image, before) and not np.array_equal(changed, before)
    assert np.array_equal(changed, perturb(image, kind, rng()))


def test_kinds_of_one_sort_grow_worse():
    image = picture().astype(float)
    error = {kind: np.square(perturb(picture(), kind, rng()) - image).mean() for kind in KINDS}
    assert error["jpeg-75"] < error["jpeg-50"] < error["jpeg-30"]
    assert error["resize-0.5"] < error["resize-0.25"] and error["blur-1"] < error["blur-2"]


@pytest.mark.parametrize("quality", [75, 50, 30])
def test_jpeg_is_that_of_another_library(quality):
    image = picture()
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    expected = np.asarray(Image.open(file)).astype(int)
    assert np.abs(perturb(image, f"jpeg-{quality}", rng()) - expected).mean() < 1
    for other in {75, 50, 30} - {quality}:
        assert np.abs(perturb(image, f"jpeg-{other}", rng()) - expected).mean() > 1.5


@pytest.mark.parametrize(("kind", "step"), [("resize-0.5", 2), ("resize-0.25", 4)])
def test_resize_averages_areas_and_comes_back_by_bicubic(kind, step):
    image = picture()
    means = np.floor(image.reshape(128 // step, step, 96 // step, step, 3).mean((1, 3)) + 0.5)
    weights = cubic(128, step), cubic(96, step)
    expected = np.einsum("yi,xj,ijc->yxc", *weights, means).clip(0, 255)
    off = np.abs(perturb(image, kind, rng()) - expected)
    assert off.max() <= 2 and off.mean() < 0.4  # its weights are rounded to 1/2048


def cubic(side, step, a=-0.75):
    """Weights float[side, side/step] of Keys' interpolation between the centres of the small picture's pixels."""
    table = np.zeros((side, side // step))
    for i in range(side):
        centre = (i + 0.5) / step - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - j)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            table[i, min(max(j, 0), side // step - 1)] += near if d <= 1 else far if d < 2 else 0
    return table


@pytest.mark.parametrize(("kind", "side", "sigma"), [("blur-1", 256, 1), ("blur-2", 256, 2), ("blur-2", 128, 1)])
def test_blur_is_a_gaussian_scaled_to_the_shorter_side(kind, side, sigma):
    dot = np.zeros((side, side + 40, 3), np.uint8)
    dot[60:80, 60:80] = 255  # rows and columns 60..79
    changed = perturb(dot, kind, rng())[..., 0] / 255
    offsets = np.arange(-12, 13)
    bell = np.exp(-(offsets**2) / (2 * sigma**2))
    edge = np.convolve((np.arange(side) >= 60) & (np.arange(side) < 80), bell / bell.sum(), "same")
    np.testing.assert_allclose(changed[:, 70], edge * changed[70, 70], atol=0.02)
    np.testing.assert_allclose(changed[70, :side], edge * changed[70, 70], atol=0.02)


def test_noise_has_four_grey_levels_no_bias_and_stays_in_range():
    grey = np.full((200, 200, 3), 100, np.uint8)
    noise = perturb(grey, "noise-4", rng()).astype(float) - 100
    assert abs(noise.mean()) < 0.05 and 3.9 < noise.std() < 4.1
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02
    white = perturb(np.full_like(grey, 255), "noise-4", rng())
    assert white.min() > 200  # nothing wraps round to black
    assert not np.array_equal(perturb(grey, "noise-4", rng(1)) - 100, noise)


@pytest.mark.parametrize("kind", ["jpeg-20", "jpeg", "", "sharpen-1", "blur-1.0"])
def test_an_unknown_kind_is_refused_with_the_known_ones(kind, tmp_path):
    for call in (lambda: perturb(picture(), kind, rng()),
                 lambda: perturbed_crops(tmp_path, pd.DataFrame(), tmp_path / "out", kind)):  # fmt: skip
        with pytest.raises(ValueError, match="jpeg-75.*resize-0.25.*noise-4"):
            call()
    assert list(tmp_path.iterdir()) == []


# folders


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.suffix != ".lock"}  # fmt: skip


@pytest.fixture
def some_rows(tiny_crops):
    """Both crops of four items, one crop of a fifth, with a column that an index does not have."""
    index = read_index(tiny_crops)
    pairs = index[index.groupby("item_id")["frame"].transform("size") == 2]
    ids = pairs["item_id"].unique()
    rows = pairs[pairs["item_id"].isin(ids[[1, 2, 4, 5]])]
    return pd.concat([rows, pairs[pairs["item_id"] == ids[6]].iloc[:1]]).assign(label=1).iloc[::-1]


def test_folder_has_the_rows_with_perturbed_pictures(tiny_crops, some_rows, tmp_path):
    out = perturbed_crops(tiny_crops, some_rows, tmp_path / "a" / "jpeg", "jpeg-30")
    assert out == tmp_path / "a" / "jpeg" and [p.name for p in out.parent.iterdir()] == ["jpeg"]
    index, source, store = read_index(out), read_index(tiny_crops), CropStore(out)
    place = ["shard", "offset", "size", "sha256"]
    chosen = source[source.index.isin(some_rows.index)].reset_index(drop=True)
    pd.testing.assert_frame_equal(index.drop(columns=place), chosen.drop(columns=place))
    for row, before in zip(index.to_dict("records"), chosen.to_dict("records"), strict=True):
        original = CropStore(tiny_crops).image(before)
        assert np.array_equal(store.image(row, check=True), perturb(original, "jpeg-30", rng()))
        assert not np.array_equal(store.image(row), original)
    items = read_items(tiny_crops).set_index("item_id").loc[chosen["item_id"].unique()].reset_index()
    wanted = items.assign(faces=chosen.groupby("item_id", sort=False).size().to_numpy("int32"))
    pd.testing.assert_frame_equal(read_items(out), wanted)
    assert wanted["faces"].tolist() == [2, 2, 2, 2, 1]
    assert store.settings() == CropStore(tiny_crops).settings() | {"encoding": "png"}


def test_noise_is_a_crops_own_and_hangs_on_the_seed(tiny_crops, some_rows, tmp_path):
    whole = perturbed_crops(tiny_crops, some_rows, tmp_path / "whole", "noise-4", seed=1)
    part = perturbed_crops(tiny_crops, some_rows.iloc[[1, 2, 5]], tmp_path / "part", "noise-4", seed=1)
    other = perturbed_crops(tiny_crops, some_rows.iloc[[1, 2, 5]], tmp_path / "other", "noise-4", seed=2)
    pictures = {}
    for folder in (whole, part, other):
        pictures[folder] = {
            (r["item_id"], r["frame"]): CropStore(folder).image(r) for r in read_index(folder).to_dict("records")
        }
    for key, image in pictures[part].items():
        assert np.array_equal(image, pictures[whole][key]) and not np.array_equal(image, pictures[other][key])
    source = {(r["item_id"], r["frame"]): r for r in some_rows.to_dict("records")}
    noises = [image.astype(int) - CropStore(tiny_crops).image(source[key]) for key, image in pictures[part].items()]
    assert len(noises) == 3 and some_rows.iloc[[1, 2, 5]]["item_id"].nunique() == 2
    assert not any(np.array_equal(noises[a], noises[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


class MeanColour:
    """Stands in for a diffusion model: the map of a picture is its mean colour."""

    key, precision = "0" * 12, "float32"

    def __init__(self, settings):
        pass

    def maps(self, pictures, batch):
        means = [[*image.mean((0, 1)), 0] for image in pictures]
        return np.array(means, np.float32).reshape(-1, 4, 1, 1)


def test_readers_take_it_like_any_other(tiny_crops, tiny_checkpoint, tiny_world, some_rows, tmp_path, monkeypatch):
    out = perturbed_crops(tiny_crops, some_rows, tmp_path / "noise", "noise-4")
    detector, _ = base.load_checkpoint(tiny_checkpoint)
    index = read_index(out)
    before, after = (score_crops(detector, CropStore(f), i) for f, i in ((tiny_crops, some_rows), (out, index)))
    assert before[["item_id", "frame"]].equals(after[["item_id", "frame"]])
    assert not np.allclose(before["score"], after["score"])
    monkeypatch.setattr(lare, "Extractor", MeanColour)
    settings = lare.Settings("none", "", timestep=1, ensemble=1, side=8)
    maps = lare.extract(tiny_world / "manifest.parquet", tmp_path / "maps", settings, out)
    assert (maps["status"] == "ok").sum() == 9 and set(maps["reason"]) == {"", "not among the crops"}
    for row in index.to_dict("records"):
        mean = CropStore(out).image(row).mean((0, 1))
        kept = lare.read(tmp_path / "maps", row["item_id"], row["frame"])
        np.testing.assert_allclose(kept[:3, 0, 0], mean, rtol=1e-5)


def test_same_call_changes_nothing_and_another_replaces(tiny_crops, some_rows, tmp_path, monkeypatch):
    out = perturbed_crops(tiny_crops, some_rows, tmp_path / "out", "noise-4")
    first = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(perturbations, "perturb", lambda *_: pytest.fail("made again"))
        perturbed_crops(tiny_crops, some_rows.iloc[::-1], out, "noise-4")
    assert contents(out) == first
    for change in ({"kind": "jpeg-50"}, {"seed": 1}, {"rows": some_rows.iloc[1:]}):
        arguments = {"rows": some_rows, "kind": "noise-4", "seed": 0} | change
        perturbed_crops(tiny_crops, out=out, **arguments)
        fresh = perturbed_crops(tiny_crops, out=tmp_path / f"fresh-{len(list(tmp_path.iterdir()))}", **arguments)
        assert contents(out) == contents(fresh) != first
    moved = some_rows.assign(landmarks=[np.asarray(p) + 1 for p in some_rows["landmarks"]])
    perturbed_crops(tiny_crops, moved, out, "noise-4")
    one = moved.iloc[0]
    found = read_index(out)
    found = found[(found["item_id"] == one["item_id"]) & (found["frame"] == one["frame"])].iloc[0]
    np.testing.assert_allclose(found["landmarks"], one["landmarks"])


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("after", "seed"), [(0, 0), (3, 0), (8, 0), (3, 1)])
def test_killed_and_resumed_is_the_same_and_never_half(tiny_crops, some_rows, tmp_path, monkeypatch, after, seed):
    """Killed with one seed, called again with seed 0: what another seed has begun is not gone on with."""
    whole = contents(perturbed_crops(tiny_crops, some_rows, tmp_path / "whole", "noise-4"))
    old = contents(perturbed_crops(tiny_crops, some_rows, tmp_path / "out", "jpeg-75"))
    calls = []

    def until(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return perturb(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(perturbations, "perturb", until)
        with pytest.raises(Killed):
            perturbed_crops(tiny_crops, some_rows, tmp_path / "out", "noise-4", seed)
    assert contents(tmp_path / "out") == old
    calls.clear()
    monkeypatch.setattr(perturbations, "perturb", lambda *a: (calls.append(1), perturb(*a))[1])
    perturbed_crops(tiny_crops, some_rows, tmp_path / "out", "noise-4")
    assert contents(tmp_path / "out") == whole
    assert len(calls) == (9 if seed else 9 - after // 2 * 2)  # every finished item has two crops
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_killed_while_it_replaces_leaves_none_and_the_next_call_finishes(tiny_crops, some_rows, tmp_path, monkeypatch):
    whole = contents(perturbed_crops(tiny_crops, some_rows, tmp_path / "whole", "noise-4"))
    out = perturbed_crops(tiny_crops, some_rows, tmp_path / "out", "jpeg-75")
    rename = perturbations.os.replace

    def kill(source, target):
        if target == out:
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(perturbations.os, "replace", kill)
        with pytest.raises(Killed):
            perturbed_crops(tiny_crops, some_rows, out, "noise-4")
    assert not out.exists()
    perturbed_crops(tiny_crops, some_rows, out, "noise-4")
    assert contents(out) == whole and sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_what_is_not_its_own_is_left_alone(tiny_crops, some_rows, tmp_path):
    shutil.copytree(tiny_crops, tmp_path / "crops")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")
    for out in (tmp_path / "crops", tmp_path / "mine"):
        before = contents(out)
        with pytest.raises(CropError, match="something else"):
            perturbed_crops(tmp_path / "crops", some_rows, out, "blur-1")
        assert contents(out) == before
    own = perturbed_crops(tiny_crops, some_rows, tmp_path / "own", "blur-1")
    with pytest.raises(CropError, match="something else"):  # onto itself
        perturbed_crops(own, read_index(own), own, "jpeg-50")
    stranger = some_rows.assign(item_id="0" * 16)
    with pytest.raises(CropError, match="1 items of the given rows are not in"):
        perturbed_crops(tiny_crops, stranger, tmp_path / "new", "blur-1")
    (tmp_path / "empty").mkdir()
    assert len(read_index(perturbed_crops(tiny_crops, some_rows, tmp_path / "empty", "blur-1"))) == 9


def test_damaged_crops_are_not_taken_on(tiny_crops, some_rows, tmp_path):
    shutil.copytree(tiny_crops, tmp_path / "crops")
    row = some_rows.iloc[3]
    tar = tmp_path / "crops" / "shards" / row["shard"]
    data = bytearray(tar.read_bytes())
    data[row["offset"] + row["size"] - 3] ^= 255
    tar.write_bytes(data)
    with pytest.raises(CropError, match="damaged"):
        perturbed_crops(tmp_path / "crops", some_rows, tmp_path / "out", "blur-1")
    assert not (tmp_path / "out").exists()
    made = perturbed_crops(tiny_crops, some_rows, tmp_path / "out", "blur-1")
    next((made / "shards").glob("*.tar")).unlink()  # someone made room
    perturbed_crops(tiny_crops, some_rows, made, "blur-1")
    assert CropStore(made).image(read_index(made).iloc[0]).shape[2] == 3
    assert json.loads((made / "settings.json").read_text())["perturbation"]["kind"] == "blur-1"


# videos


@pytest.fixture
def film(tmp_path, make_clip):
    """A clip of 24 frames that tell their time, 96 x 128 pixels."""
    return make_clip(tmp_path / "film.mp4", crf=10)


def test_levels_grow_worse_and_are_all_known():
    for name in ("jpeg", "resize", "blur", "noise"):
        errors = [np.square(perturb(picture(), f"{name}-{level:g}", rng()) - picture().astype(float)).mean()
                  for level in LEVELS[name]]  # fmt: skip
        assert len(errors) == 5 and errors == sorted(errors) and errors[0] > 0, name
    assert set(VIDEO_KINDS) == {f"h264-{c}" for c in (18, 23, 28, 34, 40)} | {f"drop-{p}" for p in (10, 25, 50, 75, 90)}
    assert len(KINDS) == 21 and not set(KINDS) & set(VIDEO_KINDS)


def test_recompressed_videos_keep_every_frame_and_have_coarser_ones(film, tmp_path):
    source, sizes, errors = read_frames(film, 100), [], []
    for crf in LEVELS["h264"]:
        out = recompress(film, tmp_path / f"{crf}.mp4", crf)
        found = read_frames(out, 100, qp=True)
        assert probe(out).codec == "h264" and found.fps == source.fps
        assert len(found.frames) == 24 and np.array_equal(found.indices, source.indices)
        np.testing.assert_allclose(found.pts - found.pts[0], source.pts - source.pts[0], atol=1e-4)
        # CRF sets the quantiser of an average frame; key frames have less, B-frames more
        assert crf - 6 < found.qp.mean() < crf + 5
        away = np.abs(found.frames[:, None].astype(float) - source.frames[None].astype(float)).mean((2, 3, 4))
        # coarse frames may look like the one before, never like one far away
        assert np.abs(away.argmin(1) - np.arange(24)).max() <= (crf > 23) + (crf > 34)
        errors.append(np.diag(away).mean())
        sizes.append(out.stat().st_size)
    assert errors == sorted(errors) and sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[-1]
    assert recompress(film, tmp_path / "again.mp4", 40).read_bytes() == (tmp_path / "40.mp4").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_recompressed_videos_stand_upright_and_have_even_sides(tmp_path):
    frames = moving_frames(8, 95, 127)
    odd = encode(tmp_path / "odd.mp4", frames, crf=10, pix_fmt="yuv444p")
    found = read_frames(recompress(odd, tmp_path / "even.mp4", 18), 100).frames
    assert found.shape == (8, 94, 126, 3) and np.abs(found - frames[:, :94, :126].astype(float)).mean() < 6
    turned = rotate_mark(encode(tmp_path / "turned.mp4", moving_frames(8), crf=10), 90)
    shown = read_frames(turned, 100).frames
    found = read_frames(recompress(turned, tmp_path / "upright.mp4", 18), 100)
    assert found.orientation == 1 and found.frames.shape == shown.shape == (8, 128, 96, 3)
    assert np.abs(found.frames - shown.astype(float)).mean() < 6


def test_what_is_no_video_is_not_encoded(tmp_path, film):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    for name in ("text.mp4", "cut.mp4", "missing.mp4"):
        try:
            recompress(tmp_path / name, tmp_path / "out.mp4", 23)
        except MediaError:
            assert not (tmp_path / "out.mp4").exists()
        else:  # of a file that ends early, what there is
            assert name == "cut.mp4" and 0 < len(read_frames(tmp_path / "out.mp4", 100).frames) < 24
    assert not list(tmp_path.glob(".*"))


def test_lost_frames_are_counted_and_hold_each_other():
    left = {p: kept(12, p, rng(3)).tolist() for p in (0, *LEVELS["drop"], 100)}
    assert {p: len(found) for p, found in left.items()} == {0: 12, 10: 11, 25: 9, 50: 6, 75: 3, 90: 1, 100: 1}
    for found in left.values():
        assert found == sorted(set(found)) and set(found) <= set(range(12))
    order = list(left.values())
    assert all(set(less) <= set(more) for more, less in zip(order, order[1:], strict=False))
    assert kept(1, 90, rng()).tolist() == [0] and left[0] == list(range(12))
    counts = np.zeros(12)
    for seed in range(600):
        counts[kept(12, 50, rng(seed))] += 1
    assert 240 < counts.min() and counts.max() < 360  # every frame is lost about as often
