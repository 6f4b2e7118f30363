"""Locating, lifting and tracking faces."""

import hashlib
import shutil
import sys
import types

import cv2
import numpy as np
import pandas as pd
import pytest

from unmask.data import faces as module
from unmask.data.faces import Face, LocatorError, build_locator, track
from unmask.data.landmarks import (
    CANONICAL_68,
    MIRROR_68,
    bounding_box,
    eye_angle,
    fit_similarity,
    five_points,
    forehead,
    full_landmarks,
    lift,
    stabilised_box,
)
from unmask.data.video import read_frames


def face_at(x, y, size=40.0, score=0.9):
    points = (CANONICAL_68 * size / 3 + [x, y]).astype(np.float32)
    return Face(np.array([x - size / 2, y - size / 2, x + size / 2, y + size / 2], np.float32), score, points)


def similarity(points, scale, degrees, shift):
    turn = np.exp(1j * np.radians(degrees)) * scale
    z = (points @ [1, 1j]) * turn
    return np.stack([z.real, z.imag], 1) + shift


def test_canonical_face_is_a_face():
    assert np.array_equal(MIRROR_68[MIRROR_68], np.arange(68))
    assert np.allclose(CANONICAL_68[MIRROR_68] * [-1, 1], CANONICAL_68)
    right, left, nose, corner, other = five_points(CANONICAL_68)
    assert np.allclose(right, -left, atol=0.05) and left[0] - right[0] == pytest.approx(1, abs=0.02)
    assert nose[0] == 0 and corner[0] < 0 < other[0] and corner[1] > nose[1]
    jaw = CANONICAL_68[:17]
    assert (np.diff(jaw[:, 0]) > 0).all() and jaw[:, 1].argmax() == 8
    inside = [cv2.pointPolygonTest(forehead(CANONICAL_68)[[*range(17), *range(80, 67, -1)]], p, False) > 0
              for p in CANONICAL_68[17:].tolist()]  # fmt: skip
    assert all(inside)


@pytest.mark.parametrize("degrees", [0, 35, 170])
def test_lift_recovers_a_turned_face(degrees):
    goal = similarity(CANONICAL_68, 37.0, degrees, (200, 150))
    assert np.abs(lift(five_points(goal)) - goal).max() < 1e-3
    squashed = goal * [0.7, 1.0]
    assert np.abs(lift(five_points(squashed)) - squashed).max() < 1e-3


def test_lift_of_a_profile_stays_a_face():
    points = five_points(CANONICAL_68) * [0.05, 1.0] * 50 + 100
    lifted = lift(points)
    assert np.ptp(lifted[:, 0]) > 0.4 * np.ptp(lifted[:, 1])
    mirrored = lift(points[[1, 0, 2, 4, 3]] + 0.0)
    assert np.isfinite(mirrored).all() and mirrored.shape == (68, 2)


def test_similarity_fit_is_least_squares_and_never_mirrors():
    rng = np.random.default_rng(1)
    source = rng.normal(size=(20, 2))
    goal = similarity(source, 2.5, 40, (3, -7))
    matrix = fit_similarity(source, goal)
    assert np.allclose(source @ matrix[:, :2].T + matrix[:, 2], goal)
    assert np.linalg.det(fit_similarity(source, source * [-1, 1])[:, :2]) > 0


def test_forehead_runs_along_the_contour_from_image_left():
    face = forehead(CANONICAL_68 * 40 + 100)
    arc = face[68:]
    assert face.shape == (81, 2) and face.dtype == np.float32
    assert (np.diff(arc[:, 0]) > 0).all() and arc[:, 1].argmin() == 6
    assert arc[:, 1].max() < face[0, 1] and np.allclose(arc[:, 0] + arc[::-1, 0], 200, atol=1e-3)
    turned = forehead(similarity(CANONICAL_68, 40, 30, (0, 0)))
    assert np.allclose(turned, similarity(forehead(CANONICAL_68), 40, 30, (0, 0)), atol=1e-3)
    with pytest.raises(ValueError, match="5, 68 or 81"):
        full_landmarks(np.zeros((98, 2)))
    assert np.array_equal(full_landmarks(face), face)


def test_eye_angle():
    assert eye_angle(CANONICAL_68) == pytest.approx(0)
    assert np.degrees(eye_angle(similarity(CANONICAL_68, 20, 25, (5, 5)))) == pytest.approx(25)


def test_track_keeps_to_one_of_two_people():
    left = [face_at(50 + 3 * t, 100, 50) for t in range(8)]
    right = [face_at(250 - 3 * t, 100, 45) for t in range(8)]
    order = np.random.default_rng(0).permutation(8)
    frames = [[a, b] if order[t] % 2 else [b, a] for t, (a, b) in enumerate(zip(left, right, strict=True))]
    assert track(frames) == left
    frames[3] = [right[3]]  # missed for a frame: better none than the other person
    assert track(frames) == [*left[:3], None, *left[4:]]
    cut = [[f] for f in left[:5]] + [[face_at(400, 100, 50)] for _ in range(3)]  # another person after a cut
    assert track(cut) == [*left[:5], None, None, None]


def test_large_short_lived_object_does_not_win():
    person = [face_at(60, 60, 40) for _ in range(8)]
    thing = face_at(220, 120, 150, 0.95)
    frames = [[thing, p] if t in (2, 5) else [p] for t, p in enumerate(person)]
    assert track(frames) == person
    assert sum(f is thing for f in track([[thing]] * 5 + [[person[0]]] * 8)) == 5


def test_track_through_ten_faces_gaps_and_nothing():
    crowd = [[face_at(60 + 70 * (k % 5), 60 + 90 * (k // 5), 30 + (k == 7) * 8) for k in range(10)] for _ in range(6)]
    best = track(crowd)
    assert [f is row[7] for f, row in zip(best, crowd, strict=True)] == [True] * 6
    assert track([[], [], []]) == [None, None, None] and track([]) == []
    alone = face_at(50, 50)
    assert track([[], [alone], [], []]) == [None, alone, None, None]


def test_stabilised_box_is_square_steady_and_holds_the_face():
    rng = np.random.default_rng(3)
    base = forehead(CANONICAL_68 * 30 + 200)
    noisy = [base + rng.normal(0, 2, (1, 2)) + [0.2 * t, 0] for t in range(50)]
    noisy[10] = None
    boxes = stabilised_box(noisy, 0.3)
    assert boxes.dtype == np.float32 and np.isnan(boxes[10]).all()
    boxes = np.delete(boxes, 10, 0)
    raw = np.stack([bounding_box(p) for p in noisy if p is not None])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert np.allclose(sides, np.ptp(base, axis=0).max() * 1.6, rtol=1e-4)
    assert np.diff((boxes[:, 0] + boxes[:, 2]) / 2).std() < 0.4 * np.diff((raw[:, 0] + raw[:, 2]) / 2).std()
    assert (boxes[:, :2] <= raw[:, :2]).all() and (boxes[:, 2:] >= raw[:, 2:]).all()


def test_stabilised_box_does_not_smooth_frames_far_apart():
    places = [np.array([x, 0.0]) for x in (0, 80, 10, 120)]
    landmarks = [forehead(CANONICAL_68 * 30 + p) for p in places]
    boxes = stabilised_box(landmarks, 0.0, pts=np.arange(4.0))
    assert np.allclose(boxes[:, 0] - boxes[0, 0], [0, 80, 10, 120], atol=1e-3)
    assert np.isnan(stabilised_box([None, None], 0.3)).all()
    grown = stabilised_box([landmarks[0]] * 4 + [landmarks[0] * 3], 0.0, pts=np.arange(5.0))
    assert np.allclose(grown[4, 2] - grown[4, 0], np.ptp(landmarks[0] * 3, axis=0).max(), rtol=1e-3)


def test_annotations(tmp_path):
    landmarks = np.stack([CANONICAL_68 * 20 + 50, np.full((68, 2), np.nan), CANONICAL_68 * 20 + 60])
    np.savez(tmp_path / "a.npz", landmarks=landmarks.astype(np.float32))
    locator = build_locator("annotations", path=tmp_path / "a.npz", scale=0.5)
    frame = np.zeros((10, 10, 3), np.uint8)
    assert np.allclose(locator.locate(frame, 2)[0].points, landmarks[2] / 2, atol=1e-4)
    assert locator.locate(frame, 1) == [] and locator.locate(frame, 3) == []
    assert locator.hash == hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [None, b"", b"text", {"points": np.zeros(3)}, {"landmarks": np.zeros((4, 5, 2))},
                                     {"landmarks": np.array([{}], object)}])  # fmt: skip
def test_bad_annotations_are_refused(tmp_path, content):
    path = tmp_path / "a.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(LocatorError, match="annotat"):
        build_locator("annotations", path=path)


def test_missing_pieces_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path))
    with pytest.raises(LocatorError, match="opencv_zoo") as error:
        build_locator("yunet")
    assert str(tmp_path) in str(error.value) and "face_detection_yunet_2023mar.onnx" in str(error.value)
    (tmp_path / "face_detection_yunet.onnx").write_bytes(b"not a model")
    with pytest.warns(UserWarning, match="unknown sha256"), pytest.raises(LocatorError, match="download it again"):
        build_locator("yunet")
    monkeypatch.setitem(sys.modules, "uniface", None)
    with pytest.raises(LocatorError, match=r"unmask\[uniface\]"):
        build_locator("uniface")
    with pytest.raises(LocatorError, match="annotations, yunet, uniface, haar"):
        build_locator("magic")


def test_uniface_points_are_put_in_ibug_order(monkeypatch):
    points = np.random.default_rng(0).uniform(0, 100, (106, 2))
    found = types.SimpleNamespace(bbox=np.array([1, 2, 30, 40.0]), confidence=0.8)
    fake = types.SimpleNamespace(
        __version__="4.2.1",
        RetinaFace=lambda: types.SimpleNamespace(detect=lambda image: [found]),
        Landmark106=lambda: types.SimpleNamespace(get_landmarks=lambda image, box: points),
    )
    monkeypatch.setitem(sys.modules, "uniface", fake)
    (face,) = build_locator("uniface").locate(np.zeros((50, 50, 3), np.uint8))
    assert face.points.shape == (68, 2) and len(set(module.POINTS_106_TO_68.tolist())) == 68
    assert np.allclose(face.points[8], points[0], atol=1e-4) and face.score == 0.8  # 0 is the chin


def test_haar_is_quiet_on_an_empty_picture():
    locator = build_locator("haar")
    assert locator.locate(np.full((120, 160, 3), 90, np.uint8)) == [] and len(locator.hash) == 64


@pytest.fixture
def yunet(shared_data, monkeypatch):
    monkeypatch.setenv("UNMASK_MODELS", str(shared_data / "models"))
    return build_locator("yunet")


def test_yunet_finds_large_small_and_padded_faces(yunet, shared_data):
    frame = read_frames(shared_data / "media" / "real" / "634.mp4", 1).frames[0]
    (whole,) = yunet.locate(frame)
    x0, y0, x1, y1 = whole.box.astype(int)
    for scale in (4.0, 1.0, 0.08):
        picture = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        (found,) = yunet.locate(picture)
        assert np.abs(found.box / scale - whole.box).max() < 0.15 * (x1 - x0)
        assert np.abs(found.points / scale - whole.points).max() < 0.15 * (x1 - x0)
    tight = cv2.resize(frame[y0:y1, x0:x1], None, fx=4, fy=4)
    assert len(yunet.locate(tight)) == 1


def test_yunet_sees_nothing_in_tiny_pictures_whatever_came_before(yunet, shared_data):
    frame = read_frames(shared_data / "media" / "real" / "634.mp4", 1).frames[0]
    for k in range(8):
        yunet.locate(cv2.resize(frame, None, fx=1 + k % 3, fy=1 + k % 3))
        for shape in ((16, 16), (32, 20), (16, 300), (300, 16)):
            assert yunet.locate(np.zeros((*shape, 3), np.uint8)) == []


def test_yunet_finds_the_face_in_real_videos(yunet, shared_data):
    table = pd.read_csv(shared_data / "media" / "media.csv")
    found = [any(yunet.locate(f) for f in read_frames(shared_data / "media" / p, 1, max_side=1280).frames)
             for p in table["path"]]  # fmt: skip
    assert len(found) == 68 and np.mean(found) >= 0.95, table["path"][~np.array(found)].tolist()


def test_unknown_weights_only_warn(yunet, shared_data, tmp_path, monkeypatch):
    shutil.copy(shared_data / "models" / "face_detection_yunet.onnx", tmp_path)
    monkeypatch.setattr(module, "YUNET_SHA256", {})
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path))
    with pytest.warns(UserWarning, match="unknown sha256"):
        assert build_locator("yunet").hash == yunet.hash


def test_haar_on_a_real_face(shared_data):
    frame = read_frames(shared_data / "media" / "real" / "634.mp4", 1).frames[0]
    face = max(build_locator("haar").locate(frame), key=lambda f: f.score)
    assert np.linalg.norm((face.box[:2] + face.box[2:]) / 2 - [675, 225]) < 60
    assert np.ptp(face.points, axis=0).max() > 100
