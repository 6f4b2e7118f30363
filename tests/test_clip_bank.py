"""The bank of clips: which clips there are, of which frames, and that nothing but the medium changes within one."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np
import pytest
from tiny_crops import face, write_crops

from unmask import clip_bank, clips
from unmask.clip_bank import Clips, positions
from unmask.data.crops import CropStore
from unmask.views import FIXED

SIDE, SIZE = 96, 40
MEDIA = {"a": (9, 0), "b": (9, 1), "c": (3, 0), "d": (1, 0), "e": (1, 1)}  # crops and label


def as_media(index, media=None):
    """Crop rows renamed into media of several crops, in order, with what is known of them."""
    names = [(name, k, label) for name, (count, label) in (media or MEDIA).items() for k in range(count)]
    rows = index.iloc[: len(names)].reset_index(drop=True)
    rows["item_id"], rows["frame"], rows["label"] = (list(part) for part in zip(*names, strict=True))
    return rows.assign(pts=rows["frame"] / 25, dataset="tiny", group_id=[f"group {name}" for name, *_ in names])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The store and rows of crops of noise, whose faces tremble."""
    folder, rng = tmp_path_factory.mktemp("crops"), np.random.default_rng(0)
    pictures = [cv2.resize(rng.integers(0, 256, (12, 12, 3), np.uint8), (SIDE, SIDE)) for _ in range(23)]
    index = write_crops(folder, pictures, [face(SIDE) + np.float32([k % 3, -(k % 2)]) for k in range(23)])
    return CropStore(folder), as_media(index)


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A real medium whose four crops are one picture, bright on the left, with landmarks that tremble."""
    folder = tmp_path_factory.mktemp("still")
    noise = np.random.default_rng(1).integers(0, 60, (SIDE, SIDE, 3))
    picture = (noise + np.linspace(190, 0, SIDE).reshape(1, -1, 1)).astype(np.uint8)
    shifts = np.float32([[0, 0], [2, 1], [0, 3], [1, 0]])
    index = write_crops(folder, [picture] * 4, [face(SIDE) + shift for shift in shifts])
    return CropStore(folder), as_media(index, {"a": (4, 0)}), picture, shifts


def test_which_clips_there_are(data):
    store, rows = data
    found = Clips(store, rows.sample(frac=1, random_state=0), SIZE, frames=4, versions=2)
    made = ["real", "blend", "varying", "steady"]
    expected = []
    for name, kinds in (("a", made), ("b", []), ("c", made), ("d", made[:2]), ("e", [])):
        expected += [(name, kind, version) for version in (0, 1) for kind in ["medium", *kinds]]
    table = found.table
    assert list(zip(table["item_id"], table["kind"], table["version"], strict=True)) == expected
    assert len(found) == len(expected) == 30
    lengths = table["item_id"].map({"a": 4, "b": 4, "c": 3, "d": 1, "e": 1})
    assert (table["frames"] == lengths).all() and set(table["dataset"]) == {"tiny"}
    assert (table["group_id"] == "group " + table["item_id"]).all()
    labels = [clips.LABELS.get(kind, MEDIA[name][1]) for name, kind, _ in expected]
    assert table["label"].tolist() == labels and {0, 1} == set(labels)
    assert (table["known"] == ~table["item_id"].isin(["b", "e"])).all(), "nobody says where a fake was blended"


def test_without_made_clips_and_the_view_of_evaluation(data):
    store, rows = data
    plain = Clips(store, rows.drop(columns=["dataset", "group_id"]), SIZE, 4, versions=3, blends=False).table
    assert set(plain["kind"]) == {"medium"} and len(plain) == 15 and not {"dataset", "group_id"} & set(plain)
    fixed = Clips(store, rows, SIZE, 4, versions=0).table
    assert fixed["item_id"].tolist() == list("abcde") and set(fixed["kind"]) == {"medium"}
    assert set(fixed["version"]) == {FIXED}
    assert fixed[["start", "end"]].to_numpy().tolist() == [[2, 5], [2, 5], [0, 2], [0, 0], [0, 0]]


def test_clips_of_one_frame_have_no_kinds_that_only_time_tells_apart(data):
    table = Clips(*data, SIZE, frames=1, versions=2).table
    assert set(table["frames"]) == {1} and set(table["kind"]) == {"medium", "real", "blend"}


def test_which_frames():
    even, odd = set(), set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        even.add(tuple(positions(11, 4, 2 * (seed % 3), rng).tolist()))
        odd.add(tuple(positions(11, 4, 2 * (seed % 3) + 1, rng).tolist()))
    rows = {tuple(range(start, start + 4)) for start in range(8)}
    seconds = {tuple(range(start, start + 7, 2)) for start in range(5)}
    assert even == rows | seconds, "in a row or every second one, from any place"
    for found in odd:
        assert all(11 * k // 4 <= at <= -(-11 * (k + 1) // 4) - 1 for k, at in enumerate(found)), "one of each part"
        assert set(np.diff(found)) <= {2, 3}
    assert len(odd) > 3
    assert positions(11, 4, FIXED, None).tolist() == [3, 4, 5, 6], "in a row in the middle"
    assert {tuple(positions(6, 4, 0, np.random.default_rng(s))) for s in range(60)} == {
        (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5)
    }, "too few crops for every second one"  # fmt: skip
    assert positions(4, 4, 0, None).tolist() == [0, 1, 2, 3] and positions(3, 4, 1, None).tolist() == [0, 1, 2]


def test_all_kinds_of_a_version_are_of_the_same_frames(data):
    table = Clips(*data, SIZE, frames=4, versions=6).table
    per_version = table.groupby(["item_id", "version"])[["start", "end"]].nunique()
    assert (per_version == 1).all(axis=None)
    dense = table[(table["item_id"] == "a") & (table["version"] % 2 == 0)]
    assert set(dense["end"] - dense["start"]) <= {3, 6}


def test_the_view_of_evaluation_is_cut_by_the_median_landmarks(still):
    store, rows, picture, shifts = still
    clip = Clips(store, rows, SIZE, frames=4, versions=0).clip(0)
    points = face(SIDE) + np.median(shifts, axis=0)
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    w, h = x1 - x0, y1 - y0
    left, top, right, bottom = np.rint([x0 - w / 8, y0 - h / 8, x1 + w / 8, y1 + h / 8]).astype(int)
    assert min(right - left, bottom - top) >= SIZE and min(left, top) >= 0
    expected = cv2.resize(picture[top:bottom, left:right], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    assert clip["images"].shape == (4, SIZE, SIZE, 3) and clip["images"].dtype == np.uint8
    assert all(np.array_equal(frame, expected) for frame in clip["images"])
    assert not clip["edges"].any() and clip["edges"].dtype == np.float32 and clip["known"] is True


def test_nothing_changes_within_a_clip_of_a_medium_that_stands_still(still):
    bank = Clips(*still[:2], SIZE, frames=4, versions=40, blends=False)
    seen, mirrored = set(), 0
    for i in range(40):
        images = bank.clip(i)["images"]
        assert (images == images[0]).all(), "one cut, flip, blur and compression for all frames"
        seen.add(images[0].tobytes())
        mirrored += images[0][:, : SIZE // 2].mean() < images[0][:, SIZE // 2 :].mean()
    assert len(seen) == 40 and 10 <= mirrored <= 30
    made = Clips(*still[:2], SIZE, frames=4, versions=3)
    for i, kind in enumerate(made.table["kind"]):
        if kind == "real":
            images = made.clip(i)["images"]
            assert (images == images[0]).all()


def test_blur_and_compression_are_drawn_once_a_clip(data, monkeypatch):
    drawn = []
    monkeypatch.setattr(clip_bank, "augment", lambda image, rng: drawn.append(rng.random()) or image)
    bank = Clips(*data, SIZE, frames=4, versions=5, blends=False)
    for i in np.flatnonzero(bank.table["item_id"].isin(["a", "b"])):
        bank.clip(i)
    assert len(drawn) == 40 and [len(set(drawn[k : k + 4])) for k in range(0, 40, 4)] == [1] * 10
    assert len(set(drawn)) == 10, "every medium and version has dice of its own"
    Clips(*data, SIZE, frames=4, versions=0).clip(0)
    assert len(drawn) == 40, "evaluation changes nothing"


def test_made_clips_are_those_of_the_frames_with_their_edges(data):
    store, rows = data
    bank = Clips(store, rows, SIZE, frames=4, versions=1)
    by_kind = {kind: bank.clip(i) for i, kind in enumerate(bank.table["kind"][:5])}
    for pair in clips.PAIRS:
        one, two = (by_kind[kind]["images"] for kind in pair)
        assert one.shape == two.shape == (4, SIZE, SIZE, 3) and not np.array_equal(one, two)
    assert not by_kind["real"]["edges"].any()
    for kind in ("blend", "varying", "steady"):
        edges = by_kind[kind]["edges"]
        assert edges.shape == (4, SIZE, SIZE) and edges.min() >= 0 and 0.5 < edges.max() <= 1
    assert np.array_equal(by_kind["varying"]["edges"][0], by_kind["steady"]["edges"][0])
    image = bank.clip(int(np.flatnonzero((bank.table["item_id"] == "d") & (bank.table["kind"] == "blend"))[0]))
    assert image["images"].shape == (1, SIZE, SIZE, 3) and image["edges"].max() > 0.5
    fake = bank.clip(int(np.flatnonzero(bank.table["item_id"] == "b")[0]))
    assert fake["known"] is False and not fake["edges"].any()


def digest(clip):
    return clip["images"].tobytes(), clip["edges"].tobytes(), clip["known"]


def test_a_clip_is_the_same_in_any_order_and_process(data):
    bank = Clips(*data, SIZE, frames=3, versions=2, seed=4)
    forwards = [digest(bank.clip(i)) for i in range(len(bank))]
    again = Clips(*data, SIZE, frames=3, versions=2, seed=4)
    assert [digest(again.clip(i)) for i in reversed(range(len(bank)))] == forwards[::-1]
    assert len(set(forwards)) == len(bank)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert [digest(clip) for clip in pool.map(bank.clip, range(12))] == forwards[:12]
    other = Clips(*data, SIZE, frames=3, versions=2, seed=5)
    assert all(digest(other.clip(i)) != forwards[i] for i in range(len(bank)))


def test_two_kinds_are_made_in_one_go_and_kept_by_this_process_alone(data, monkeypatch):
    calls, true = [], clips.make_clips_and_edges
    monkeypatch.setattr(clips, "make_clips_and_edges", lambda *given: calls.append(given) or true(*given))
    bank = Clips(*data, SIZE, frames=4, versions=2)
    assert bank.table["kind"].tolist()[:10] == ["medium", "real", "blend", "varying", "steady"] * 2
    for i in range(10):
        bank.clip(i)
    assert len(calls) == 4, "two pairs, two versions"
    assert len(pickle.dumps(bank.maker)) < 1000


def test_no_crops(data):
    with pytest.raises(ValueError, match="no crops"):
        Clips(data[0], data[1].iloc[:0], SIZE)


def test_nothing_global_is_drawn_from(data):
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    bank = Clips(*data, SIZE, frames=4)
    bank.clip(0), bank.clip(2)
    assert np.array_equal(np.random.get_state()[1], before)
