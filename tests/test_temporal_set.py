"""Twins that only time tells apart: the same in every single frame, different over the clip."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp

from unmask.data import decoding, derived, faces, temporal_set
from unmask.data.landmarks import CANONICAL_68, forehead
from unmask.data.manifest import ManifestError, item_id, read_manifest, write_manifest
from unmask.data.temporal_set import draw, make, replace_face
from unmask.data.video import encode, read_frames
from unmask.preprocessing import preprocess

CENTRE, SCALE = (64, 50), 24.0
FACE = (forehead(CANONICAL_68) * SCALE + CENTRE).astype(np.float32)
INNER = (slice(42, 58), slice(56, 72))  # rows and columns well inside the face, also after a displacement
METHODS = ("real", "jitter", "flicker")


def draws(clips: int, frames: int) -> dict[str, np.ndarray]:
    """float[clips, frames, 3] of each twin: displacement x and y in widths of the face, gain."""
    drawn = [draw(np.random.default_rng(i), frames) for i in range(clips)]
    return {name: np.array([np.column_stack(one[name]) for one in drawn]) for name in ("steady", "jitter", "flicker")}


def test_single_frames_have_the_same_distribution_in_all_twins():
    found = draws(3000, 4)
    for name, values in found.items():
        length, angle = np.hypot(values[..., 0], values[..., 1]), np.arctan2(values[..., 1], values[..., 0])
        assert 0.01 <= length.min() < 0.0101 and 0.0199 < length.max() <= 0.02
        assert 0.97 <= values[..., 2].min() < 0.9701 and 1.0299 < values[..., 2].max() <= 1.03
        for t in range(4):  # Every frame of a clip, against another frame of independent steady clips.
            other = found["steady"][1500:, 3 - t]
            some = {"length": (length[:1500, t], np.hypot(*other.T[:2])), "gain": (values[:1500, t, 2], other[:, 2]),
                    "angle": (angle[:1500, t], np.arctan2(other[:, 1], other[:, 0]))}  # fmt: skip
            for what, (a, b) in some.items():
                assert ks_2samp(a, b).pvalue > 1e-3, (name, what, t)
            assert abs(np.corrcoef(values[:, t].T)[np.triu_indices(3, 1)]).max() < 0.06  # drawn independently


def test_only_the_order_of_time_tells_the_twins_apart():
    found = draws(2000, 6)
    for name, varied in (("steady", ()), ("jitter", (0, 1)), ("flicker", (2,))):
        values = found[name]
        for column, variance in enumerate((2.333e-4 / 2, 2.333e-4 / 2, 0.03**2 / 3)):  # of the distributions
            within = values[..., column].var(1, ddof=1).mean()
            follows = np.corrcoef(values[:, :-1, column].ravel(), values[:, 1:, column].ravel())[0, 1]
            if column in varied:
                # As if the frames were shuffled: each frame's draw says nothing of the next one's.
                assert within == pytest.approx(variance, rel=0.05) and abs(follows) < 0.04
            else:
                assert within < 1e-20 and follows == pytest.approx(1)
        assert np.array_equal(values[..., 2] if name == "jitter" else values[..., :2],
                              (found["steady"][..., 2] if name == "jitter" else found["steady"][..., :2]))  # fmt: skip


def test_the_face_is_a_moved_and_brightened_copy_and_nothing_else_changes():
    frame = np.random.default_rng(0).integers(20, 200, (110, 140, 3), np.uint8)
    width = np.ptp(FACE[:, 0])
    out = replace_face(frame, FACE, np.array([2.0, -1.0]), 1.1, width)
    rows, columns = INNER
    goal = 1.1 * frame[rows.start + 1 : rows.stop + 1, columns.start - 2 : columns.stop - 2]
    assert np.abs(out[INNER] - goal).max() <= 0.5 + 1e-3
    far = np.ones(frame.shape[:2], np.uint8)
    cv2.fillConvexPoly(far, cv2.convexHull(np.round(FACE).astype(np.int32)), 0)
    far = cv2.erode(far, np.ones((15, 15)))  # seven pixels, more than four times the feather
    assert np.array_equal(out[far > 0], frame[far > 0]) and far.mean() > 0.5
    edge = replace_face(frame, FACE - [70, 0], np.array([2.0, -1.0]), 1.1, width)
    assert np.array_equal(edge[:, 60:], frame[:, 60:]) and not np.array_equal(edge, frame)
    assert np.array_equal(replace_face(frame, FACE + 900, np.array([2.0, -1.0]), 1.1, width), frame)


def originals(folder: Path, count: int = 2, frames: int = 12, annotated: bool = True) -> Path:
    """A manifest of real videos with a face that stands still, a fake and a picture."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count + 2):
        name = f"{i}.mp4"
        noise = cv2.GaussianBlur(np.random.default_rng(i).normal(120, 60, (100 - i, 128)), (0, 0), 2)
        picture = np.repeat(np.clip(noise, 0, 255).astype(np.uint8)[..., None], 3, 2)
        encode(folder / name, [picture] * frames, crf=12, pix_fmt="yuv444p")
        points = np.repeat(FACE[None], frames, 0)
        points[3:4] = np.nan  # no face in one frame
        np.savez(folder / f"{name}.npz", landmarks=points)
        rows.append({
            "item_id": item_id("t", name), "root": ".", "path": name, "kind": "image" if i > count else "video",
            "dataset": "t", "split": "test", "label": int(i == count), "method": "swap" if i == count else "real",
            "subject": f"person {i}", "source_id": "x", "group_id": f"group {i}", "camera": "c",
            "annotations": f"{name}.npz" if annotated else "",
        })  # fmt: skip
    write_manifest(pd.DataFrame(rows).astype({"label": "int8"}), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_twins_are_written_as_drawn(tmp_path):
    path = make(originals(tmp_path / "a"), tmp_path / "out", seed=4)
    df = read_manifest(path)
    assert len(df) == 6 and set(df["dataset"]) == {"temporal"} and set(df["split"]) == {"test"}
    assert df["path"].is_monotonic_increasing and set(df["kind"]) == {"video"}
    for i in range(2):
        own = df[df["group_id"] == f"group {i}"].set_index("method")
        assert own["label"].to_dict() == {"real": 0, "jitter": 1, "flicker": 1}
        assert set(own["subject"]) == {f"person {i}"} and set(own["camera"]) == {"c"}
        # Odd heights lose a row, as H.264 demands.
        source = read_frames(tmp_path / "a" / f"{i}.mp4", 99).frames.astype(float)[:, : (100, 98)[i]]
        ratio, moved = {}, {}
        for method in METHODS:
            media = tmp_path / "out" / own.at[method, "path"]
            frames = read_frames(media, 99).frames.astype(float)
            assert frames.shape == source.shape and len(decoding.scan(str(media)).keys) == 12  # all are key frames
            assert np.abs(frames[:, :, :20] - source[:, :, :20]).mean() < 3
            assert np.abs(frames[3] - source[3]).mean() < 3
            inner = [np.delete(f[:, *INNER].mean(-1), 3, 0) for f in (frames, source)]
            ratio[method] = inner[0].mean((1, 2)) / inner[1].mean((1, 2))
            moved[method] = np.abs(np.diff(inner[0] - inner[1], axis=0)).mean()
        assert ratio["flicker"].std() > 0.01 and 0.95 < ratio["flicker"].min() and ratio["flicker"].max() < 1.05
        assert ratio["real"].std() < 0.006 and ratio["jitter"].std() < 0.006
        assert moved["jitter"] > 1.5 * moved["real"]
    items = preprocess(path, tmp_path / "crops", frames=99, size=32, workers=0)
    assert set(items["status"]) == {"ok"} and set(items["faces"]) == {11}


def test_any_number_of_workers_and_any_interruption_give_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(derived, "WORTH", 1)
    source = originals(tmp_path / "a", count=3, frames=4)
    make(source, tmp_path / "whole", workers=1)
    whole = contents(tmp_path / "whole")
    make(source, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == whole and len(whole) == 1 + 3 * (3 + 1 + 1)
    written, real = [], temporal_set.video.encode

    def dies(path, *arguments, **options):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(temporal_set.video, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.parquet").exists() and len(written) == 4
    monkeypatch.setattr(temporal_set.video, "encode", lambda p, *a, **o: written.append(p) or real(p, *a, **o))
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole and len(written) == 4 + 6  # the whole triplet stays as it was
    make(source, tmp_path / "out")
    assert len(written) == 10
    next((tmp_path / "out" / "videos").iterdir()).unlink()
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole and len(written) == 13


def test_what_changed_is_made_anew_and_nothing_foreign_is_touched(tmp_path):
    source, out = originals(tmp_path / "a", frames=4), tmp_path / "out"
    make(source, out)
    before = contents(out)
    (out / "videos" / "mine.mp4").write_bytes(b"keep")
    make(source, out, seed=1)
    after = contents(out)
    assert after.pop("videos/mine.mp4") == b"keep" and len(after) == len(before)
    assert not set(before.values()) & {v for k, v in after.items() if k.endswith(".mp4")}
    make(source, tmp_path / "fresh", seed=1)
    assert contents(tmp_path / "fresh") == after
    shutil.copy(tmp_path / "a" / "2.mp4", tmp_path / "a" / "1.mp4")  # another film
    make(source, out, seed=1)
    make(source, tmp_path / "other", seed=1)
    changed = contents(out)
    assert changed.pop("videos/mine.mp4") == b"keep"
    assert changed == contents(tmp_path / "other") and len({*changed.values()} - {*after.values()}) == 4  # part, twins
    with pytest.raises(ManifestError, match="no rows"):
        make(source, out, split="train")


def test_faces_are_searched_for_where_nobody_annotated_them(tmp_path, monkeypatch, capsys):
    class Always:
        def locate(self, frame, index=0):
            return [faces.Face(np.array([*FACE.min(0), *FACE.max(0)]), 1.0, FACE)]

    asked = []
    monkeypatch.setattr(faces, "build_locator", lambda name, **options: asked.append(name) or Always())
    source = originals(tmp_path / "a", frames=4, annotated=False)
    (tmp_path / "a" / "0.mp4").write_bytes(b"no video")
    df = read_manifest(make(source, tmp_path / "out", locator="named"))
    assert asked == ["named"] and set(df["group_id"]) == {"group 1"}
    assert capsys.readouterr().err == "1 of 2 real videos left out: not a readable picture or video.\n"
    kept = np.load(tmp_path / "out" / df["annotations"][0])["landmarks"]
    assert kept.shape == (4, 81, 2) and np.allclose(kept, FACE, atol=1e-3)


def test_real_world_videos_stay_in_their_split(tiny_world, tmp_path):
    world = read_manifest(tiny_world / "manifest.parquet")
    expected = world[(world["split"] == "val") & (world["method"] == "real") & (world["kind"] == "video")]
    df = read_manifest(make(tiny_world / "manifest.parquet", tmp_path, split="val"))
    assert len(df) == 3 * len(expected) > 0 and set(df["split"]) == {"val"}
    assert set(df["group_id"]) == set(expected["group_id"]) and set(df["subject"]) == set(expected["subject"])
