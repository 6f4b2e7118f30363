"""Views for a CLIP: what is drawn and how often, and picture, boxes and LaRE map under one crop and one flip."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from tiny_crops import face, identity, write_crops, write_maps

from unmask import scoring, views
from unmask.clip_views import Views, augment
from unmask.data.crops import CropStore
from unmask.detectors.base import InputSpec
from unmask.lare_maps import LareError
from unmask.views import FIXED

SIDE, CELLS, SIZE = 128, 32, 112
SQUARE = (40, 48, 56, 60)  # x0, y0, x1, y1 in a stored crop, around the subject's right eye; whole cells of the map
RIGHT_EYE, LEFT_EYE = 5, 6


def noise(count, side, seed=0):
    """Pictures uint8[side,side,3] of coloured noise, fine and coarse."""
    rng = np.random.default_rng(seed)
    coarse = [cv2.resize(rng.uniform(0, 200, (6, 6, 3)), (side, side)) for _ in range(count)]
    return [(c + rng.uniform(0, 55, c.shape)).astype(np.uint8) for c in coarse]


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Four crops of noise, their landmarks apart from each other, and maps of noise."""
    folder = tmp_path_factory.mktemp("noise")
    points = [face(SIDE) + np.float32([k, -1.3 * k]) for k in range(4)]
    index = write_crops(folder / "crops", noise(4, SIDE), points)
    maps = np.random.default_rng(1).random((4, 4, CELLS, CELLS), np.float32)
    return folder / "crops", index, write_maps(folder / "maps", folder / "crops", maps)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """One dark crop with a bright square, its map with the same square, and an eye that is the square."""
    folder = tmp_path_factory.mktemp("marked")
    x0, y0, x1, y1 = SQUARE
    picture, maps = np.full((SIDE, SIDE, 3), 20, np.uint8), np.zeros((1, 4, CELLS, CELLS), np.float32)
    picture[y0:y1, x0:x1] = 240
    maps[0, :, y0 // 4 : y1 // 4, x0 // 4 : x1 // 4] = np.arange(1, 5).reshape(4, 1, 1)
    points = face(SIDE)
    # The centres of the square's corner pixels; the other points of the eye lie between them.
    points[36:42] = [(x0, y0), (x1 - 1, y1 - 1), (x1 - 1, y0), (x0, y1 - 1), (50, 50), (45, 52)]
    index = write_crops(folder / "crops", [picture], [points])
    return Views(CropStore(folder / "crops"), index, SIZE, 0, write_maps(folder / "maps", folder / "crops", maps))


@pytest.fixture
def drawn(monkeypatch):
    """What augmentation asks of the libraries: lists of sigmas and of qualities by library."""
    found = {"sigma": [], "opencv": [], "pillow": []}
    blur, encode, save = cv2.GaussianBlur, cv2.imencode, Image.Image.save

    def gaussian(image, kernel, sigma, **options):
        found["sigma"].append(sigma)
        return blur(image, kernel, sigma, **options)

    def encoded(ending, image, options):
        assert ending == ".jpg" and options[0] == cv2.IMWRITE_JPEG_QUALITY
        found["opencv"].append(options[1])
        return encode(ending, image, options)

    def saved(image, file, kind, quality):
        assert kind == "JPEG"
        found["pillow"].append(quality)
        return save(image, file, kind, quality=quality)

    monkeypatch.setattr(cv2, "GaussianBlur", gaussian)
    monkeypatch.setattr(cv2, "imencode", encoded)
    monkeypatch.setattr(Image.Image, "save", saved)
    return found


def test_blur_and_jpeg_are_drawn_as_published(drawn):
    picture, kinds, last = noise(1, 64)[0], [], (0, 0, 0)
    for seed in range(4000):
        augment(picture, np.random.default_rng(seed))
        counts = tuple(map(len, drawn.values()))
        kinds.append(tuple(np.subtract(counts, last).tolist()))
        last = counts
    share = {kind: kinds.count(kind) / 4000 for kind in set(kinds)}
    expected = {(b, o, p): 0.25 if o + p == 0 else 0.125 for b in (0, 1) for o, p in ((0, 0), (1, 0), (0, 1))}
    assert share.keys() == expected.keys(), "each at most once in a view"
    assert share == pytest.approx(expected, abs=0.025)
    sigma, quality = np.array(drawn["sigma"]), np.array(drawn["opencv"] + drawn["pillow"])
    largest = 3 * 64 / 256  # of a picture of 64 pixels
    assert 0 <= sigma.min() < 0.01 * largest and 0.99 * largest < sigma.max() <= largest
    assert sigma.mean() == pytest.approx(largest / 2, rel=0.04)
    assert sigma.std() == pytest.approx(largest / 12**0.5, rel=0.04)
    assert quality.dtype == int and set(quality.tolist()) == set(range(30, 101))
    assert quality.mean() == pytest.approx(65, abs=1.5)


def test_their_pixels_are_those_of_a_blur_and_of_jpeg(drawn):
    picture, kinds = noise(1, 96)[0], set()
    for seed in range(60):
        before = tuple(map(len, drawn.values()))
        found = augment(picture, np.random.default_rng(seed))
        blurred, opencv, pillow = np.subtract(tuple(map(len, drawn.values())), before).tolist()
        expected = picture.astype(float)
        if blurred:
            sigma = drawn["sigma"][-1]
            expected = gaussian_filter(expected, (sigma, sigma, 0), mode="reflect", truncate=4)
        if opencv or pillow:
            buffer = io.BytesIO()
            image = Image.fromarray(np.rint(expected).astype(np.uint8))
            image.save(buffer, "JPEG", quality=drawn["opencv" if opencv else "pillow"][-1])
            expected = np.asarray(Image.open(buffer)).astype(float)
        error = np.abs(found - expected)
        assert found.dtype == np.uint8 and found.shape == picture.shape
        assert error.mean() < (2 if blurred else 0.5), "JPEG makes more of what a blur rounds otherwise"
        assert opencv or pillow or error.max() <= (1.01 if blurred else 0)
        kinds.add((blurred, opencv, pillow))
    assert len(kinds) == 6


def test_views_to_learn_from_are_augmented_and_those_to_judge_by_are_not(crops, drawn):
    samples = Views(CropStore(crops[0]), crops[1], 48, seed=0)
    for i in range(len(samples)):
        samples[FIXED, i, 0]
    assert not any(drawn.values())
    for epoch in range(100):
        for i in range(len(samples)):
            samples[epoch, i, 0]
    assert len(drawn["sigma"]) / 400 == pytest.approx(0.5, abs=0.1)
    assert (len(drawn["opencv"]) + len(drawn["pillow"])) / 400 == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("size", [48, 112])
def test_the_fixed_view_is_the_picture_of_scoring(crops, size):
    folder, index, _ = crops
    expected = scoring.frame_images(CropStore(folder), index, InputSpec(size))
    for seed, copy in ((0, 0), (1, 2)):
        samples = Views(CropStore(folder), index, size, seed)
        found = torch.stack([samples[FIXED, i, copy]["image"] for i in range(len(samples))])
        assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), expected)


def test_views_belong_to_their_seed_epoch_row_and_copy_in_any_process(crops):
    folder, index, maps = crops
    samples = Views(CropStore(folder), index, 48, 3, maps)
    one, again = samples[1, 2, 0], Views(CropStore(folder), index.iloc[[2]], 48, 3, maps)[1, 0, 0]
    assert all(torch.equal(one[key], again[key]) for key in ("image", "boxes", "lare"))
    others = [samples[2, 2, 0], samples[1, 2, 1], Views(CropStore(folder), index, 48, 4, maps)[1, 2, 0]]
    for other in others:
        assert not torch.equal(other["boxes"], one["boxes"]) and not torch.equal(other["lare"], one["lare"])
    plan = [[(1, 2, 0), (0, 1, 0)], [(FIXED, 3, 0)]]
    batches = list(views.Loader(samples, 1)(plan))
    assert [len(batch["image"]) for batch in batches] == [2, 1]
    for batch, where in zip(batches, plan, strict=True):
        for k, one in enumerate(where):
            assert all(torch.equal(batch[key][k], value) for key, value in samples[one].items())


def extent(bright):
    """Edges x0, y0, x1, y1 of what is True in bool[H,W]."""
    y, x = np.nonzero(bright)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def centroid(values):
    """Mean place of values float[H,W], as shares of their width and height."""
    places = [(np.arange(n) + 0.5) / n for n in values.shape]
    return np.array([(values.sum(0) * places[1]).sum(), (values.sum(1) * places[0]).sum()]) / values.sum()


@pytest.mark.parametrize("epochs", [[FIXED], range(40)], ids=["fixed", "random"])
def test_crop_and_flip_move_picture_map_and_boxes_alike(marked, epochs):
    mirrored, margin, places = [], 5 / 224 * SIZE, []
    for epoch in epochs:
        sample = marked[epoch, 0, 0]
        image, cells, boxes = (sample[key].numpy() for key in ("image", "lare", "boxes"))
        bright = image.mean(2).astype(float) - 20
        bright[bright < 25] = 0  # ringing of JPEG
        place = centroid(bright)
        np.testing.assert_allclose(centroid(cells[0]), place, atol=0.3 / CELLS)
        for k in (1, 2, 3):
            np.testing.assert_allclose(cells[k], (k + 1) * cells[0], rtol=1e-5)
        flip = bool(place[0] > 0.5)
        covering = boxes[LEFT_EYE if flip else RIGHT_EYE]
        np.testing.assert_allclose(covering + [margin, margin, -margin, -margin], extent(bright > 110), atol=1.5)
        assert abs(boxes[RIGHT_EYE if flip else LEFT_EYE][0] / SIZE - place[0]) > 0.1, "the other eye is elsewhere"
        mirrored.append(flip)
        places.append(place)
    if epochs == [FIXED]:
        assert mirrored == [False]
    else:
        assert 10 <= sum(mirrored) <= 30 and np.ptp(np.array(places)[:, 1]) > 0.03


def test_boxes_of_the_fixed_view_are_those_of_its_landmarks(crops):
    folder, index, _ = crops
    found = Views(CropStore(folder), index, SIZE, 0)[FIXED, 1, 0]["boxes"]
    points = index["landmarks"].iloc[1].reshape(-1, 2)
    low, high = points.min(0), points.max(0)
    x0, y0 = np.round(low - 0.125 * (high - low))
    x1, y1 = np.round(high + 0.125 * (high - low))
    for k, part in ((1, range(17, 22)), (4, range(31, 36)), (6, range(42, 48))):
        x = [(points[j, 0] + 0.5 - x0) * SIZE / (x1 - x0) for j in part]
        y = [(points[j, 1] + 0.5 - y0) * SIZE / (y1 - y0) for j in part]
        expected = [min(x) - 2.5, min(y) - 2.5, max(x) + 2.5, max(y) + 2.5]
        np.testing.assert_allclose(found[k], expected, atol=1e-3)
    assert found.shape == (9, 4) and found.dtype == torch.float32


def test_a_missing_map_is_an_error_never_zeros(crops, tmp_path):
    folder, index, _ = crops
    ones = np.ones((4, 4, CELLS, CELLS), np.float32)
    partly = write_maps(tmp_path / "maps", folder, ones, failed=[2])
    item = identity(1)
    with pytest.raises(LareError, match=f"Frame 0 of item {item} has no LaRE map: the map is not finite"):
        Views(CropStore(folder), index, SIZE, 0, partly)
    with pytest.raises(LareError, match="not among the inputs"):
        Views(CropStore(folder), index.iloc[:1].assign(item_id="0" * 16), SIZE, 0, partly)
    with pytest.raises(LareError, match="no index.parquet"):
        Views(CropStore(folder), index, SIZE, 0, tmp_path)
    rest = Views(CropStore(folder), index.drop(2), SIZE, 0, partly)
    assert len(rest) == 3 and (rest[0, 0, 0]["lare"] == 1).all()
    next((partly / "shards").iterdir()).unlink()
    with pytest.raises(LareError, match="missing or damaged"):
        rest[0, 0, 0]
    assert "lare" not in Views(CropStore(folder), index, SIZE, 0)[0, 0, 0]


def test_a_map_of_another_picture_is_refused(crops, tmp_path):
    _, index, maps = crops
    again = write_crops(tmp_path / "crops", noise(4, SIDE, seed=9), [face(SIDE)] * 4)
    assert again["item_id"].tolist() == index["item_id"].tolist()
    samples = Views(CropStore(tmp_path / "crops"), again, SIZE, 0, maps)
    with pytest.raises(LareError, match="another picture"):
        samples[FIXED, 0, 0]


def test_sources_name_picture_extractor_and_precision(crops, tmp_path):
    folder, index, maps = crops
    found = Views(CropStore(folder), index, SIZE, 0, maps).sources
    assert len({one[0] for one in found}) == 4 and {one[1:] for one in found} == {("abcdef012345", "float32")}
    assert Views(CropStore(folder), index, SIZE, 0).sources == []
