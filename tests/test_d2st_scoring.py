"""Looks at clips: alike where they must be, each against a plain pass of the pictures; and one threshold for two."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import tiny_clips
import torch
from torch.nn import functional as F

from unmask import d2st_scoring, prefixes
from unmask.clip_bank import Clips
from unmask.clip_training import Faces
from unmask.d2st_scoring import LOOKS, agreement, score
from unmask.data.crops import CropStore, read_index
from unmask.detectors import base


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A detector of three frames with noise on its adapters."""
    folder = tmp_path_factory.mktemp("checkpoint")
    name = tiny_clips.write(folder / "clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = base.build("d2st", backbone=name, placement="last-2", frames=3)
        for parameter in detector.adapters.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
        detector.linear.weight.data += torch.randn(detector.linear.weight.shape)
    return base.save_checkpoint(detector, folder / "kept", seed=7)


@pytest.fixture(scope="module")
def faces(tiny_world, dense_crops, tmp_path_factory):
    return Faces(tiny_world / "manifest.parquet", dense_crops, tmp_path_factory.mktemp("d2st-scoring"))


@pytest.fixture(scope="module")
def rows(dense_crops):
    """Some videos of four crops, one of which lost two, and some images."""
    index = read_index(dense_crops)
    counts = index.groupby("item_id").size()
    some = index[index["item_id"].isin([*counts.index[counts == 4][:4], *counts.index[counts == 1][:2]])]
    short = (some["item_id"] == counts.index[counts == 4][3]) & some["frame"].isin([0, 1])
    return some[~short]


@pytest.fixture(scope="module")
def found(checkpoint, faces, rows):
    """Scores in all looks, from tokens that are not rounded; a column per look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "of_clips", partial(prefixes.of_clips, precision="fp32"))
        return score(checkpoint, faces, rows, tuple(LOOKS))


@pytest.fixture(scope="module")
def wide(found):
    return found.pivot(index="item_id", columns="variant", values="score")


def test_the_table(found, checkpoint, rows):
    assert len(found) == 6 * len(LOOKS) and set(found["variant"]) == set(LOOKS)
    assert found.columns.tolist() == ["item_id", "frame", "score", "detector", "variant", "seed", "checkpoint"]
    assert set(found["frame"]) == {-1} and set(found["seed"]) == {7} and set(found["detector"]) == {"d2st"}
    assert set(found["checkpoint"]) == {base.read_checkpoint(checkpoint)[1]["sha256"][:12]}
    assert found["score"].between(0, 1).all() and set(found["item_id"]) == set(rows["item_id"])


def test_an_image_is_the_same_in_all_looks(wide, rows):
    counts = rows.groupby("item_id").size()
    images = wide.loc[counts.index[counts == 1]]
    assert len(images) == 2 and images["image"].std() > 1e-4
    for look in LOOKS:
        np.testing.assert_allclose(images[look], images["image"], atol=1e-6)
    videos = wide.loc[counts.index[counts > 1]]
    for look in set(LOOKS) - {"image", "frozen"}:
        assert (abs(videos[look] - videos["image"]) > 1e-4).any(), look


def test_a_frozen_clip_is_its_image(wide):
    np.testing.assert_allclose(wide["frozen"], wide["image"], atol=1e-5)


@torch.no_grad()
def test_every_look_is_what_the_detector_says_of_these_pictures(wide, checkpoint, faces, rows):
    detector, _ = base.load_checkpoint(checkpoint)
    bank = Clips(CropStore(faces.crops), rows.assign(label=0), 28, frames=3, versions=0)
    shuffled = []
    for i, item in enumerate(bank.table["item_id"]):
        images = detector.prepare(torch.from_numpy(bank.clip(i)["images"]))
        count = len(images)
        alone = [torch.sigmoid(detector(image[None, None])).item() for image in images]
        expected = {
            "image": alone[{3: 1, 2: 1, 1: 0}[count]],
            "frames": sum(alone) / count,
            "clip": torch.sigmoid(detector(images[None])).item(),
        }
        for look, value in expected.items():
            assert wide.loc[item, look] == pytest.approx(value, abs=1e-5), look
        if count == 3:
            orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
            each = [torch.sigmoid(detector(images[order][None])).item() for order in orders]
            near = np.flatnonzero(np.abs(np.array(each) - wide.loc[item, "shuffled"]) < 1e-6)
            assert len(near)
            shuffled.append(near[0])
    assert set(shuffled) - {0}, "some clip must be out of order"


def test_rounding_the_tokens_changes_little_and_the_items_that_go_along_nothing(found, checkpoint, faces, rows):
    table = score(checkpoint, faces, rows)
    assert set(table["variant"]) == {"image", "frames", "clip"}
    both = table.merge(found, on=["item_id", "variant"])
    assert len(both) == len(table) == 18
    np.testing.assert_allclose(both["score_x"], both["score_y"], atol=5e-3)
    others = rows[rows["item_id"] > rows["item_id"].min()]
    fewer = score(checkpoint, replace(faces, features=faces.features / "fewer"), others, ("clip", "shuffled"))
    assert fewer["variant"].tolist() == ["clip", "shuffled"] * 5
    again = score(checkpoint, faces, rows, ("shuffled", "clip")).merge(fewer, on=["item_id", "variant"])
    assert len(again) == 10
    np.testing.assert_allclose(again["score_x"], again["score_y"], atol=1e-6)


def test_an_unknown_look(checkpoint, faces, rows):
    with pytest.raises(KeyError, match="no look 'slowly'"):
        score(checkpoint, faces, rows, ("image", "slowly"))


def scores(seed, count=80):
    """Scores of media that were looked at twice, clips' being shifted, for two seeds."""
    rng, parts = np.random.default_rng(seed), []
    for run, look in ((0, "image"), (0, "clip"), (1, "image"), (1, "clip")):
        label = (np.arange(count) < 0.45 * count).astype(int)  # unequal, so that no two thresholds are equally good
        logits = rng.normal(label * 1.5 + (look == "clip") * (0.8 + run), 1.0)
        parts.append(pd.DataFrame({"label": label, "score": 1 / (1 + np.exp(-logits)), "variant": look, "seed": run}))
    return pd.concat(parts, ignore_index=True).sample(frac=1, random_state=seed)


def balanced(part, threshold):
    """Balanced accuracy of rows, fake from a threshold on, by counting."""
    right = {0: [], 1: []}
    for label, value in zip(part["label"], part["score"], strict=True):
        right[label].append((value >= threshold) == (label == 1))
    return sum(sum(hits) / len(hits) for hits in right.values()) / 2


def test_how_well_one_threshold_serves_both():
    val, test = scores(1), scores(2, 60)
    val = pd.concat([val, val.assign(variant="shuffled", score=0.5)])  # other looks are none of it
    table = agreement(val, pd.concat([test, test.assign(variant="frames", score=0.1)]))
    assert table[["seed", "modality"]].to_numpy().tolist() == [[s, m] for s in (0, 1) for m in ("image", "clip")]
    for row in table.itertuples():
        best, logits = {}, {}
        for look in ("image", "clip"):
            part = val[(val["seed"] == row.seed) & (val["variant"] == look)]
            best[look] = max(sorted(part["score"], reverse=True), key=lambda t, p=part: round(balanced(p, t), 9))
            logits[look] = np.log(best[look] / (1 - best[look]))
        other = {"image": "clip", "clip": "image"}[row.modality]
        part = test[(test["seed"] == row.seed) & (test["variant"] == row.modality)]
        assert row.threshold == pytest.approx(logits[row.modality])
        assert row.gap == pytest.approx(abs(logits["image"] - logits["clip"]))
        assert row.own == pytest.approx(balanced(part, best[row.modality]))
        assert row.other == pytest.approx(balanced(part, best[other]))
        ece = 0.0
        for low in range(10):
            bin_ = part[(part["score"] * 10).astype(int) == low]
            if len(bin_):
                ece += len(bin_) / len(part) * abs(bin_["score"].mean() - bin_["label"].mean())
        assert row.ece == pytest.approx(ece)
    assert (table["own"] != table["other"]).any() and (table["gap"] > 0.1).all()


def test_thresholds_at_the_ends_have_finite_logits():
    sure = pd.DataFrame(
        {"label": [0, 1] * 4, "score": [0.0, 1.0] * 4, "variant": ["image"] * 4 + ["clip"] * 4, "seed": 0}
    )
    table = agreement(sure, sure)
    assert np.isfinite(table["threshold"]).all() and (table["gap"] == 0).all() and (table["own"] == 1).all()
    assert [d2st_scoring._logit(p) for p in (0.0, 1.0)] == pytest.approx([np.log(1e-6), -np.log(1e-6)], rel=1e-5)


def test_the_head_sees_directions_alone(checkpoint):
    detector, _ = base.load_checkpoint(checkpoint)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(detector.head(5 * x), detector.head(x))
    expected = F.normalize(x, dim=1) @ detector.linear.weight[0] * 20**0.5 + detector.linear.bias
    torch.testing.assert_close(detector.head(x)[:, 0], expected)
