"""Pairs for training: decided by seed, epoch and crop; which media may meet in a pair."""

import numpy as np
import pandas as pd
import pytest
import torch

from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest
from unmask.pairs import LabelledPairs, SelfBlendPairs, TrainingError, batch_plan, fake_crops, real_crops, supervised


@pytest.fixture(scope="module")
def data(tiny_world, tiny_crops):
    return read_manifest(tiny_world / "manifest.parquet"), read_index(tiny_crops), CropStore(tiny_crops)


def test_an_epoch_draws_from_every_clip_and_no_crop_twice(data):
    manifest, index, _ = data
    rows = real_crops(index, manifest, "train")
    plans = [[crop for batch in batch_plan(rows, 0, 4, 2, epoch) for crop in batch] for epoch in (0, 0, 1)]
    assert plans[0] == plans[1] and [i for _, i in plans[0]] != [i for _, i in plans[2]]
    for plan, epoch in zip(plans, (0, 0, 1), strict=True):
        assert {e for e, _ in plan} == {epoch}
        drawn = rows.iloc[[i for _, i in plan]]
        assert not drawn.duplicated(["item_id", "frame"]).any()
        counts = drawn["item_id"].value_counts()
        assert (counts == rows["item_id"].value_counts().clip(upper=2).loc[counts.index]).all()
        assert set(counts.index) == set(rows["item_id"])
    single = batch_plan(rows, 0, 4, 1, 0)
    assert sum(map(len, single)) == rows["item_id"].nunique() and max(map(len, single)) == 4


def test_pairs_are_fixed_by_seed_epoch_and_crop(data):
    manifest, index, store = data
    rows = real_crops(index, manifest, "val")
    learn, judge = (SelfBlendPairs(store, rows, 64, 0, "intended", training) for training in (True, False))
    images, boundary = learn[0, 0]
    assert images.shape == (2, 64, 64, 3) and images.dtype == torch.uint8
    assert boundary.shape == (2, 8, 8) and not boundary[0].any() and 0 < boundary[1].max() <= 1 + 1e-6
    assert torch.equal(learn[0, 0][0], images) and not torch.equal(learn[1, 0][0], images)
    other = SelfBlendPairs(store, rows, 64, 1, "intended", True)
    assert not torch.equal(other[0, 0][0], images)
    real, fake = judge[0, 1][0]
    assert not torch.equal(real, fake) and torch.equal(judge[0, 1][0], torch.stack([real, fake]))


@pytest.fixture
def labelled(data):
    manifest, index, store = data

    def make(training=True, fakes=None, seed=0):
        rows, other = real_crops(index, manifest, "train"), fake_crops(index, manifest, "train")
        return LabelledPairs(store, rows, other if fakes is None else fakes(other), 64, seed, "intended", training)

    return make


class Spy:
    """A crop store that remembers whose crops were asked for."""

    def __init__(self, store):
        self.store, self.asked = store, []

    def image(self, row):
        self.asked.append(row["item_id"])
        return self.store.image(row)


def test_labelled_pairs_join_a_real_face_with_every_fake_of_its_group(data, labelled):
    manifest = data[0].set_index("item_id")
    pairs = labelled()
    pairs.store = Spy(pairs.store)
    met = set()
    for epoch in range(12):
        for i, row in enumerate(pairs.rows):
            pairs.store.asked.clear()
            images, edges = pairs[epoch, i]
            real, fake = pairs.store.asked
            assert real == row["item_id"] and images.shape == (2, 64, 64, 3) and not edges.any()
            assert (manifest.loc[[real, fake], "label"] == [0, 1]).all()
            assert (manifest.loc[[real, fake], "split"] == "train").all()
            assert manifest.loc[real, "group_id"] == manifest.loc[fake, "group_id"]
            assert manifest.loc[real, "subject"] == manifest.loc[fake, "subject"]
            met.add(fake)
    train_fakes = data[0].query("split == 'train' and label == 1")["item_id"]
    assert met == set(train_fakes)


def test_the_fake_frame_is_the_nearest_in_time_and_cut_alike(labelled):
    pairs = labelled()
    rng = np.random.default_rng(0)
    for row in pairs.rows:
        chosen = pairs.partner(row, rng)
        gaps = [abs(one["pts"] - row["pts"]) for one in pairs.media[chosen["item_id"]]]
        assert abs(chosen["pts"] - row["pts"]) == min(gaps)
    alone = pd.DataFrame([row for row in pairs.rows if row["item_id"] == pairs.rows[0]["item_id"]])
    itself = LabelledPairs(pairs.store, alone, alone, 64, 0, "intended", True)
    for epoch in range(4):
        real, fake = itself[epoch, 0][0]
        assert torch.equal(real, fake), "one picture on both sides: flip and crop are alike"


def test_a_subject_without_fakes_meets_those_of_its_group(labelled):
    pairs = labelled(fakes=lambda fakes: fakes.assign(subject="somebody"))
    for row in pairs.rows:
        assert pairs.partner(row, np.random.default_rng(0))["group_id"] == row["group_id"]


def test_a_group_without_fakes_meets_those_without_reals_else_any(labelled):
    rows = labelled().rows
    groups = sorted({row["group_id"] for row in rows})
    assert len(groups) > 1
    first = groups[0]
    pairs = labelled(fakes=lambda fakes: fakes[fakes["group_id"] != first])
    assert set(pairs.others) == set(pairs.media)
    moved = labelled(fakes=lambda fakes: fakes.assign(group_id=fakes["group_id"].replace({first: "nobody"})))
    assert {m["group_id"] for i in moved.others for m in moved.media[i]} == {"nobody"}


def test_labelled_pairs_are_fixed_by_seed_epoch_and_crop(labelled):
    learn, judge = labelled(), labelled(training=False)
    assert torch.equal(learn[3, 1][0], labelled()[3, 1][0])
    assert not torch.equal(learn[3, 1][0], learn[4, 1][0])
    assert not torch.equal(learn[3, 1][0], labelled(seed=1)[3, 1][0])
    assert torch.equal(judge[0, 1][0], judge[0, 1][0]) and judge[0, 1][0].dtype == torch.uint8


def test_a_split_without_fakes_says_so(data):
    manifest, index, _ = data
    assert supervised(index, manifest)
    for split in ("train", "val"):
        kept = manifest[(manifest["split"] != split) | (manifest["label"] == 0)]
        assert not supervised(index, kept) and not supervised(index[index["item_id"].isin(kept["item_id"])], manifest)
    with pytest.raises(TrainingError, match="no crop of a fake face in the val split"):
        fake_crops(index, manifest[(manifest["split"] != "val") | (manifest["label"] == 0)], "val")


def test_native_pairs_are_pixels_of_the_stored_crops(data, labelled):
    """Every window is found in the crop it comes from, mirrored or not: nothing was scaled."""
    manifest, index, store = data
    rows, fakes = real_crops(index, manifest, "train"), fake_crops(index, manifest, "train")
    pairs = LabelledPairs(store, rows, fakes, 32, 0, "intended", True, native=True)
    spy = Spy(pairs.store)
    pairs.store = spy
    by_item = index.set_index(["item_id", "frame"])
    for i in range(4):
        spy.asked.clear()
        images, _ = pairs[0, i]
        for picture, item in zip(images.numpy(), spy.asked, strict=True):
            crops = [store.image(row) for _, row in by_item.loc[item].iterrows()]
            assert any(contains(side, picture) for crop in crops for side in (crop, crop[:, ::-1]))
    blends = SelfBlendPairs(store, rows, 32, 0, "intended", False, native=True)
    real, fake = blends[0, 0][0].numpy()
    assert real.shape == fake.shape == (32, 32, 3) and (real != fake).any()


def contains(image, patch):
    windows = np.lib.stride_tricks.sliding_window_view(image, patch.shape)
    return (windows[:, :, 0] == patch).all((2, 3, 4)).any()
