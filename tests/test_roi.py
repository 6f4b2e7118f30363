"""Regions of a face: boxes, what moves them with a crop and a flip, and pooling against means taken in NumPy."""

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from unmask import hulls
from unmask.data.landmarks import CANONICAL_68
from unmask.detectors import roi

# Backbone maps of a 224 px picture, and the LaRE map.
SIDES = {"RN50 and ViT-B/16": 14, "ViT-L/14": 16, "ViT-B/32": 7, "LaRE": 32}
NAMES = [
    "chin", "right brow", "left brow", "nose bridge", "nose tip", "right eye", "left eye", "upper lip", "lower lip",
]  # fmt: skip


def ramp(size=224):
    """A picture float32[size,size,3] that says where a pixel is: x, y, and x + 2 y."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return np.stack([x, y, x + 2 * y], 2)


def block_means(picture, side):
    """Map float32[1,C,side,side] of the means of blocks of a picture [H,H,C]."""
    h, _, channels = picture.shape
    cells = picture.reshape(side, h // side, side, h // side, channels).mean((1, 3))
    return torch.from_numpy(cells.transpose(2, 0, 1).copy())[None]


def pixel_boxes(rng, count, size=224, border=16):
    """Boxes of whole pixels, of all sizes from 1 px, half the coarsest cell away from the border."""
    corners = np.sort(rng.integers(border, size - border, (count, 2, 2)), axis=1)
    corners[:, 1] += corners[:, 0] == corners[:, 1]
    return corners.reshape(count, 4)


def mean_inside(picture, box):
    x0, y0, x1, y1 = np.rint(box).astype(int)
    return picture[y0:y1, x0:x1].reshape(-1, picture.shape[2]).mean(0, dtype=np.float64)


def face(size=224, width=0.7):
    """A level face that fills `width` of the picture, float32[68,2]."""
    return (CANONICAL_68 * width * size / 2.3 + [0.5 * size, 0.36 * size]).astype(np.float32)


def each(maps, boxes):
    """Pooled values of every box alone, float[K,C]."""
    return roi.pool(maps.expand(len(boxes), -1, -1, -1), torch.as_tensor(boxes)[:, None].float(), 224)


@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
def test_pooling_gives_the_mean_inside_a_box_at_every_stride(side):
    picture, boxes = ramp(), pixel_boxes(np.random.default_rng(side), 60)
    maps = block_means(picture, side)
    expected = np.array([mean_inside(picture, box) for box in boxes])
    found = each(maps, boxes).numpy()
    assert np.abs(found - expected).max() < 0.01  # pixels
    # What a version without the scale, or half a cell beside, would have given.
    rois = torch.cat([torch.zeros(60, 1), torch.from_numpy(boxes).float()], 1)
    unscaled = roi_align(maps, rois, 1, 1.0, 14, aligned=True).flatten(1).numpy()
    beside = roi_align(maps, rois, 1, side / 224, 14, aligned=False).flatten(1).numpy()
    assert np.abs(unscaled - expected).max() > 50 and np.abs(beside - expected).max() > 3


@pytest.mark.parametrize("size", [112, 336])
def test_the_scale_follows_the_side_of_the_picture(size):
    picture = ramp(size)
    boxes = pixel_boxes(np.random.default_rng(1), 20, size)
    maps = block_means(picture, 14).expand(20, -1, -1, -1)
    found = roi.pool(maps, torch.from_numpy(boxes)[:, None].float(), size).numpy()
    np.testing.assert_allclose(found, [mean_inside(picture, box) for box in boxes], atol=0.01)


def test_pooling_is_the_integral_of_the_interpolated_map():
    """A map without order, read between the centres of its cells at 100 x 100 places of the box."""
    side = 14
    cells = np.random.default_rng(3).normal(1, 1, (side, side))
    box = np.array([37.0, 51.5, 181.0, 99.0])
    places = (np.arange(100) + 0.5) / 100
    total = 0.0
    for x in (box[0] + places * (box[2] - box[0])) * side / 224 - 0.5:
        for y in (box[1] + places * (box[3] - box[1])) * side / 224 - 0.5:
            i, j = int(y), int(x)
            top = cells[i, j] * (1 - x + j) + cells[i, j + 1] * (x - j)
            bottom = cells[i + 1, j] * (1 - x + j) + cells[i + 1, j + 1] * (x - j)
            total += top * (1 - y + i) + bottom * (y - i)
    found = roi.pool(torch.from_numpy(cells)[None, None], torch.from_numpy(box)[None, None], 224)
    assert found.item() == pytest.approx(total / 1e4, abs=0.02)
    assert abs(total / 1e4 - cells.mean()) > 0.05, "the mean of the whole map must not pass"


def test_absent_boxes_are_left_out_and_a_picture_without_any_gives_zeros():
    picture, boxes = ramp(), pixel_boxes(np.random.default_rng(2), 27).reshape(3, 9, 4).astype(np.float32)
    there = np.ones((3, 9), bool)
    there[1, [0, 4, 5]] = there[2] = False
    boxes[~there] = np.nan
    maps = (block_means(picture, 16) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)).requires_grad_()
    found = roi.pool(maps, torch.from_numpy(boxes), 224)
    for i in (0, 1):
        means = [mean_inside(picture, box) for box in boxes[i, there[i]]]
        np.testing.assert_allclose(found[i].detach().numpy(), (i + 1) * np.mean(means, axis=0), rtol=1e-4)
    assert torch.equal(found[2], torch.zeros(3))
    found.sum().backward()
    assert torch.isfinite(maps.grad).all() and maps.grad[0].abs().sum() > 0 and maps.grad[2].abs().sum() == 0
    alone = roi.pool(maps[1:2], torch.from_numpy(boxes[1:2]), 224)
    assert alone.shape == (1, 3) and torch.allclose(alone, found[1:2])


def test_the_nine_regions_of_a_face():
    parts = [
        range(0, 17), range(17, 22), range(22, 27), range(27, 31), range(31, 36), range(36, 42), range(42, 48),
        [48, 49, 50, 51, 52, 53, 54, 60, 61, 62, 63, 64], [48, 54, 55, 56, 57, 58, 59, 60, 64, 65, 66, 67],
    ]  # fmt: skip
    assert list(roi.REGIONS) == NAMES
    rng = np.random.default_rng(5)  # points anywhere, so that each is the outermost of its region some time
    cases = [(224, 5.0, rng.uniform(10, 210, (68, 2)).astype(np.float32)) for _ in range(40)]
    for size, margin, points in [*cases, (112, 2.5, face(112)), (448, 10.0, face(448))]:
        expected = []
        for part in parts:
            xs, ys = [points[i, 0] + 0.5 for i in part], [points[i, 1] + 0.5 for i in part]
            expected.append([min(xs) - margin, min(ys) - margin, max(xs) + margin, max(ys) + margin])
        found = roi.region_boxes(points, size)
        assert found.shape == (9, 4) and found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)
        with_forehead = np.concatenate([points, np.zeros((13, 2), np.float32)])
        assert torch.equal(roi.region_boxes(np.stack([with_forehead] * 2), size), torch.stack([found] * 2))
    right, left = (NAMES.index(f"{side} eye") for side in ("right", "left"))
    assert found[right, 0] < found[left, 0], "the subject's right is on the picture's left"


def test_boxes_end_at_the_picture_and_lost_points_leave_no_box():
    points = face() + [0, 90]  # the mouth and the chin leave the picture at its lower edge
    boxes = roi.region_boxes(points, 224)
    absent = dict(zip(NAMES, boxes.isnan().all(1).tolist(), strict=True))
    assert boxes[0, 3] == 224 and absent["lower lip"] and not absent["chin"] and not absent["right eye"]
    assert torch.equal(boxes.isnan().any(1), boxes.isnan().all(1))
    points = face()
    points[20] = np.nan
    assert roi.region_boxes(points, 224).isnan().any(1).tolist() == [name == "right brow" for name in NAMES]
    assert roi.region_boxes(np.full((68, 2), np.nan), 224).isnan().all()


@pytest.mark.parametrize("flip", [False, True])
def test_landmarks_go_where_the_picture_goes(flip):
    picture, points = ramp(), face()
    box = (20.4, 10.6, 204.3, 210.2)  # of no whole pixels, and not square
    moved = roi.Crop(box, 256, flip).landmarks(points)
    seen = hulls.crop(picture, np.array(box), 256)
    seen = seen[:, ::-1] if flip else seen
    assert moved.shape == (68, 2) and moved.dtype == np.float32
    for i, (x, y) in enumerate(moved):
        j, k = int(y), int(x)
        top = seen[j, k] * (1 - x + k) + seen[j, k + 1] * (x - k)
        bottom = seen[j + 1, k] * (1 - x + k) + seen[j + 1, k + 1] * (x - k)
        # The same point of the face; in the mirror image it has the number of its counterpart.
        old = hulls.flip(picture, points)[1][i] if flip else points[i]
        expected = (223 - old[0], old[1]) if flip else old
        np.testing.assert_allclose((top * (1 - y + j) + bottom * (y - j))[:2], expected, atol=0.05)


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_of_moved_landmarks_are_moved_boxes(flip):
    points, crop = face(), roi.Crop((0, 0, 224, 224), 448, flip)
    boxes = roi.region_boxes(points, 224)
    torch.testing.assert_close(roi.region_boxes(crop.landmarks(points), 448), crop.boxes(boxes), atol=1e-3, rtol=0)
    assert crop.boxes(boxes).dtype == torch.float32
    half = roi.Crop((0, 0, 112, 224), 224, flip).boxes(boxes)  # the picture's left half: the subject's right side
    eyes = {name: box.isnan().any().item() for name, box in zip(NAMES, half, strict=True) if "eye" in name}
    assert eyes == {"right eye": flip, "left eye": not flip}
    right, left = (crop.boxes(boxes)[NAMES.index(name), 0] for name in ("right eye", "left eye"))
    assert right < left, "in a mirror image too, the right eye is the one on the picture's left"


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("flip", [False, True])
def test_map_and_boxes_move_together(flip, side):
    """A map of the whole picture, moved and pooled in moved boxes, has the means of the moved picture there."""
    rng = np.random.default_rng(7)
    picture, box = ramp(), (70, 42, 182, 154)
    seen = hulls.crop(picture, np.array(box), 224)
    seen = seen[:, ::-1] if flip else seen
    boxes = pixel_boxes(rng, 9, 112, 12) + np.array([70, 42, 70, 42])
    crop = roi.Crop(box, 224, flip)
    maps, moved = block_means(picture, side), crop.boxes(torch.from_numpy(boxes).float())
    order = [0, 2, 1, 3, 4, 6, 5, 7, 8] if flip else range(9)
    expected = np.array([mean_inside(seen, b) for b in moved.numpy()])
    np.testing.assert_allclose(expected, [mean_inside(picture, boxes[i]) for i in order], atol=0.05)
    together = each(crop.maps(maps, 224, 224), moved).numpy()
    assert np.abs(together - expected).max() < 0.3  # pixels: a hair more at the crop's edge, read from outside it
    for other in (maps, roi.Crop(box, 224, not flip).maps(maps, 224, 224), crop.maps(maps, 224, 448)):
        assert np.abs(each(other, moved).numpy() - expected).max() > 10
    assert np.abs(each(crop.maps(maps, 224, 224), boxes).numpy() - expected).max() > 10


def test_a_crop_of_everything_changes_nothing_and_outside_the_edge_is_repeated():
    maps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = roi.Crop((0, 0, 96, 64), 64)
    torch.testing.assert_close(whole.maps(maps, 96, 64), maps)
    torch.testing.assert_close(roi.Crop((0, 0, 96, 64), 64, True).maps(maps, 96, 64), maps.flip(3))
    beyond = roi.Crop((-96, 0, 0, 64), 64).maps(maps, 96, 64)
    torch.testing.assert_close(beyond, maps[..., :1].expand(-1, -1, -1, 8))
    boxes = roi.region_boxes(face(64), 64)
    torch.testing.assert_close(roi.Crop((0, 0, 64, 64), 64).boxes(boxes), boxes)


def test_wrong_shapes_say_what_is_right():
    with pytest.raises(ValueError, match=r"shape \(5, 2\); pass faces as"):
        roi.region_boxes(np.zeros((5, 2)), 224)
    with pytest.raises(ValueError, match="maps are square"):
        roi.pool(torch.zeros(1, 3, 7, 14), torch.zeros(1, 9, 4), 224)
    with pytest.raises(ValueError, match="do not fit boxes"):
        roi.pool(torch.zeros(1, 3, 7, 7), torch.zeros(2, 9, 4), 224)
    with pytest.raises(ValueError, match="NaN"):
        roi.Crop((0, 0, 9, 9), 9).landmarks(np.full((68, 2), np.nan))
