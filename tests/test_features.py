"""The cache of frozen features: the detector's own numbers, computed once, whole after any kill."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load

from unmask import features, sbi
from unmask.data.crops import CropStore, read_index
from unmask.detectors import base

D = 64  # of test_convnext


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def rows(dense_crops):
    index = read_index(dense_crops)
    sizes = index.groupby("item_id").size()
    return index[index["item_id"].isin([*sizes.index[sizes == 4][:3], *sizes.index[sizes == 1][:2]])]


@pytest.fixture
def made(dense_crops, tiny_checkpoint, rows, tmp_path):
    """Features of made clips of two items in a folder by name; keywords change arguments."""

    def call(name="cache", **given):
        two = rows[rows["item_id"].isin(rows.groupby("item_id").size().nlargest(2).index)]
        keys = {"frames": 3, "versions": 2, "seed": 0, "workers": 0} | given
        return features.of_made_clips(tiny_checkpoint, dense_crops, two, tmp_path / name, **keys)

    return call


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()}


def test_they_are_the_detectors_own(dense_crops, tiny_checkpoint, rows, tmp_path):
    found = features.of_crops(tiny_checkpoint, dense_crops, rows.sample(frac=1, random_state=0), tmp_path, 0)
    ordered = rows.sort_values(["item_id", "frame"])
    assert found.rows[["item_id", "frame"]].to_numpy().tolist() == ordered[["item_id", "frame"]].to_numpy().tolist()
    assert (found.rows["label"] == -1).all(), "labels of what is judged are not looked up"
    detector, store = base.load_checkpoint(tiny_checkpoint)[0], CropStore(dense_crops)
    for i in (0, 3, len(ordered) - 1):
        row = ordered.iloc[i]
        box = sbi.crop_box(np.asarray(row["landmarks"], np.float32).reshape(-1, 2))
        image = sbi.crop(store.image(row), box, detector.input_spec.size)
        with torch.no_grad():
            x = detector.prepare(torch.from_numpy(image)[None, None])
            own, logit = detector.features(x)[0].numpy(), detector(x).item()
        np.testing.assert_allclose(found.features[i, :D].astype(float), own, atol=2e-3, rtol=1e-3)
        assert found.logits[i] == pytest.approx(logit, abs=1e-4)
        assert found.features[i, D:].astype(float).mean() == pytest.approx(image.mean() / 255 - 0.5, abs=0.02)
    assert found.features.dtype == np.float16 and found.logits.dtype == np.float32


def test_computed_once_and_again_only_for_other_inputs(made, monkeypatch, tiny_checkpoint, dense_crops, rows, tmp_path):
    first = made()
    monkeypatch.setattr(features, "_make_shard", lambda work: (_ for _ in ()).throw(Killed))
    again = made()
    assert again.name == first.name and np.array_equal(again.features, first.features)
    pd.testing.assert_frame_equal(again.rows, first.rows)
    for change in ({"seed": 1}, {"versions": 1}, {"frames": 2}, {"recipe": "faithful"}):
        with pytest.raises(Killed):
            made(**change)
    changed = rows.assign(sha256=["0" * 64, *rows["sha256"].iloc[1:]])
    for given in (rows, changed):
        with pytest.raises(Killed):
            features.of_crops(tiny_checkpoint, dense_crops, given, tmp_path / "cache", 0)
    assert len({path.name for path in (tmp_path / "cache").iterdir()}) == 7, "every input has a folder of its own"


def test_other_weights_other_features(made, tiny_checkpoint, dense_crops, rows, tmp_path):
    detector, card = base.load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        detector.head.bias += 1
    base.save_checkpoint(detector, tmp_path / "other", preprocessing=card["preprocessing"])
    one, two = (
        features.of_crops(c, dense_crops, rows, tmp_path / "f", 0) for c in (tiny_checkpoint, tmp_path / "other")
    )
    assert one.name[:12] != two.name[:12] == base.read_checkpoint(tmp_path / "other")[1]["sha256"][:12]
    np.testing.assert_allclose(two.logits, one.logits + 1, atol=1e-5)


def test_killed_and_resumed_equals_uninterrupted(made, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "SHARD", 1)
    made("whole")
    true, calls = features._make_shard, []

    def dying(work):
        if len(calls) == 2:
            raise Killed
        calls.append(work[1])
        true(work)

    with monkeypatch.context() as patch:
        patch.setattr(features, "_make_shard", dying)
        with pytest.raises(Killed):
            made("cut")
    assert not list((tmp_path / "cut").rglob("index.parquet"))
    with monkeypatch.context() as patch:
        patch.setattr(features, "_make_shard", lambda work: calls.append(work[1]) or true(work))
        made("cut")
    assert calls == [0, 1, 2, 3], "no shard is computed twice"
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole") and len(shards(tmp_path / "whole")) == 5


def test_processes_change_nothing(made, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "SHARD", 2)
    made("here")
    made("there", workers=2)
    assert shards(tmp_path / "here") == shards(tmp_path / "there")


def test_made_clips_have_all_kinds_and_at_most_the_frames_asked_for(made):
    found = made()
    sizes = found.rows.groupby(["item_id", "version", "kind", "label"]).size()
    assert len(sizes) == 2 * 2 * 4 and (sizes == 3).all()
    labels = found.rows.drop_duplicates("kind").set_index("kind")["label"].to_dict()
    assert labels == {"real": 0, "steady": 0, "blend": 1, "varying": 1}
    for _, part in found.rows.groupby(["item_id", "version", "kind"]):
        assert (np.diff(part["frame"]) == 1).all(), "frames in a row"
    one = {row["kind"]: where for row, where in found.items() if row["version"] == 1}
    assert not np.allclose(found.features[one["varying"][1:]], found.features[one["steady"][1:]], atol=1e-3)


def test_a_head_is_no_detector_of_single_frames(dense_crops, rows, tmp_path):
    spatial = {"detector": "convnext", "config": {"backbone": "test_convnext", "size": 32}}
    base.save_checkpoint(base.build("mean", spatial=spatial, frames=4), tmp_path / "head")
    with pytest.raises(base.CheckpointError, match="judges clips"):
        features.of_crops(tmp_path / "head", dense_crops, rows, tmp_path / "cache", 0)


def table(sizes):
    """Features whose value is the number of their frame, for items a, b, ... of these numbers of frames."""
    rows = [(name, 0, "crops", -1, t, 0.0, "") for name, size in zip("abc", sizes, strict=False) for t in range(size)]
    columns = ["item_id", "version", "kind", "label", "frame", "pts", "sha256"]
    number = np.arange(len(rows))
    return features.Features(
        np.repeat(number[:, None], 2, 1).astype(np.float16), number.astype(np.float32),
        pd.DataFrame(rows, columns=columns), "name",
    )  # fmt: skip


def test_clips_are_padded_and_long_ones_cut_into_like_windows():
    clips = table([2, 7, 1]).clips(4)
    assert clips.rows["item_id"].tolist() == ["a", "b", "b", "c"]
    expected = [[0, 1, 0, 0], [2, 3, 4, 5], [6, 7, 8, 0], [9, 0, 0, 0]]
    assert clips.features[..., 1].tolist() == expected and clips.logits.tolist() == expected
    assert clips.mask.sum(1).tolist() == [2, 4, 3, 1]
    assert clips.features.dtype == np.float32 and clips.mask.dtype == bool and len(clips) == 4


def test_shuffled_and_frozen_frames():
    whole = table([9, 6])
    shuffled, frozen = whole.clips(9, "shuffled"), whole.clips(9, "frozen")
    assert sorted(shuffled.logits[0]) == list(range(9)) and shuffled.logits[0].tolist() != list(range(9))
    assert sorted(shuffled.logits[1, :6]) == list(range(9, 15))
    assert shuffled.logits.tolist() == whole.clips(9, "shuffled").logits.tolist()
    assert shuffled.logits.tolist() != whole.clips(9, "shuffled", seed=1).logits.tolist()
    assert frozen.logits[0].tolist() == [4] * 9 and frozen.logits[1, :6].tolist() == [12] * 6
    with pytest.raises(ValueError, match="in order, shuffled or frozen"):
        whole.clips(9, "backwards")


def test_no_crop_at_all(dense_crops, tiny_checkpoint, rows, tmp_path):
    found = features.of_crops(tiny_checkpoint, dense_crops, rows.iloc[:0], tmp_path, 0)
    assert len(found.rows) == 0 and len(found.clips(4)) == 0


def test_a_shard_keeps_half_precision(made, tmp_path):
    made()
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    content = load(path.read_bytes())
    assert content["features"].dtype == np.float16 and content["logits"].shape == (48,)
