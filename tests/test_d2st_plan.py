"""Batches of images and clips: even shares, nothing twice before everything once, and processes that share them."""

from collections import Counter
from itertools import product

import numpy as np
import pandas as pd
import pytest

from unmask.d2st_plan import Batch, batches, groups, judged, spaced

MADE = {"real": 0, "blend": 1, "varying": 1, "steady": 0}


def table(media=((0, "a", 4, 6), (0, "b", 4, 5), (0, "a", 1, 7), (1, "a", 4, 9), (1, "b", 3, 2), (1, "b", 1, 3))):
    """Clips of (label, data set, frames, number of media), with those that are made of the real ones."""
    rows = []
    for label, dataset, frames, number in media:
        for medium in range(number):
            item = f"{label}{dataset}{frames}-{medium}"
            kinds = {"medium": label} | ({} if label else MADE if frames > 1 else {"real": 0, "blend": 1})
            about = {"item_id": item, "version": 0, "dataset": dataset, "frames": frames}
            rows += [about | {"kind": kind, "label": k} for kind, k in kinds.items()]
    return pd.DataFrame(rows)


def numbers(plan, part):
    return [clip for batch in plan for clip, _ in getattr(batch, part)]


def counts(found, t, names):
    return Counter(t.loc[found, names].itertuples(index=False, name=None))


@pytest.mark.parametrize(
    "stage, part, size", [(1, "images", 16), (2, "clips", 16), (3, "clips", 16), (3, "images", 32)]
)
def test_every_batch_is_balanced(stage, part, size):
    t = table()
    plan = batches(t, stage, 64, 16, 0.5, 0, 0)
    assert len(plan) == 4
    for batch in plan:
        rows = t.loc[[clip for clip, _ in getattr(batch, part)]]
        assert len(rows) == size and rows["label"].sum() == size // 2
        for label in (0, 1):
            own = rows[rows["label"] == label]
            assert (own["kind"] == "medium").sum() == size // 4
            for origin in (own[own["kind"] == "medium"], own[own["kind"] != "medium"]):
                cells = counts(origin.index, t.assign(video=t["frames"] > 1), ["dataset", "video", "kind"])
                assert max(cells.values()) - min(cells.values()) <= 1


def test_over_an_epoch_all_data_sets_modalities_and_kinds_are_seen_alike():
    """Also those that have no place in a single batch."""
    t = table([(k, name, frames, 3) for k, name, frames in product((0, 1), "abcdefg", (1, 4))])
    for stage, part in ((1, "images"), (2, "clips"), (3, "clips"), (3, "images")):
        found = numbers(batches(t, stage, 336, 4, 0.5, 0, 0), part)
        cells = counts(found, t.assign(video=t["frames"] > 1), ["label", "dataset", "video", "kind"])
        per_label = 168 * (2 if part == "images" and stage == 3 else 1)
        kinds = 1 if part == "images" else 2  # made ones of a label
        modalities = 2 if part == "images" else 1
        assert len(cells) == 2 * 7 * modalities * (1 + kinds)
        for (_, _, _, kind), seen in cells.items():
            expected = per_label / 2 / 7 / modalities / (1 if kind == "medium" else kinds)
            assert abs(seen - expected) <= 1, kind


@pytest.mark.parametrize("stage, part", [(1, "images"), (2, "clips"), (3, "clips"), (3, "images")])
def test_every_clip_once_before_any_comes_again(stage, part):
    t = table()
    found = numbers(batches(t, stage, 104, 8, 0.5, 1, 2), part)
    seen = Counter(found)
    cells = t.assign(video=t["frames"] > 1).groupby(["label", "dataset", "video", "kind"]).indices
    used = 0
    for members in cells.values():
        often = [seen[clip] for clip in members]
        assert max(often) - min(often) <= 1
        used += max(often) > 0
    assert used and max(seen.values()) > 1, "the epoch must be longer than a cell"


def test_what_each_stage_learns_from():
    t = table()
    first, second, third = (batches(t, stage, 40, 8, 0.5, 0, 0) for stage in (1, 2, 3))
    assert all(not batch.clips and not batch.own and len(batch.images) == 8 for batch in first)
    assert all(not batch.images and not batch.own and len(batch.clips) == 8 for batch in second)
    lengths = t["frames"]
    for batch in (*first, *second, *third):
        assert all(t["kind"][clip] in ("medium", "real", "blend") for clip, _ in batch.images)
        assert all(0 <= at < lengths[clip] for clip, at in [*batch.images, *batch.own])
        assert all(at == -1 and lengths[clip] > 1 for clip, at in batch.clips)
        assert batch.units == [*batch.clips, *batch.own, *batch.images]
    assert {at for batch in first for _, at in batch.images} == {0, 1, 2, 3}
    assert {t["kind"][clip] for clip in numbers(second, "clips")} == {"medium", *MADE}
    for batch in third:
        assert [clip for clip, _ in batch.own] == [clip for clip, _ in batch.clips]
        assert (len(batch.own), len(batch.images)) == (8, 16)


def test_sizes():
    t = table()
    assert [len(b.clips) for b in batches(t, 2, 21, 8, 0.5, 0, 0)] == [7, 7, 7]
    odd = batches(t, 2, 7, 8, 0.5, 0, 0)[0]
    assert t.loc[[clip for clip, _ in odd.clips], "label"].tolist() == [0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("made, expected", [(0.0, 0), (0.25, 4), (1.0, 16)])
def test_the_share_of_made_ones(made, expected):
    t = table()
    found = numbers(batches(t, 2, 16, 16, made, 0, 0), "clips")
    assert (t.loc[found, "kind"] != "medium").sum() == expected


def test_without_media_of_a_label_or_without_made_ones():
    t = table([(0, "a", 4, 3)])  # no labelled fakes
    found = t.loc[numbers(batches(t, 2, 16, 8, 0.25, 0, 0), "clips")]
    assert set(found.loc[found["label"] == 1, "kind"]) == {"blend", "varying"}
    assert (found.loc[found["label"] == 0, "kind"] == "medium").mean() == 0.75
    plain = table()
    plain = plain[plain["kind"] == "medium"].reset_index(drop=True)
    assert plain.loc[numbers(batches(plain, 2, 16, 8, 0.5, 0, 0), "clips"), "label"].mean() == 0.5


def test_a_label_that_is_missing_is_named():
    reals = table([(0, "a", 4, 3)]).query("kind == 'medium'").reset_index(drop=True)
    with pytest.raises(ValueError, match="no fake ones"):
        batches(reals, 2, 8, 8, 0.5, 0, 0)
    images = table([(0, "a", 1, 3), (1, "a", 4, 3)])
    with pytest.raises(ValueError, match="no real ones"):
        batches(images, 2, 8, 8, 0.5, 0, 0)
    assert batches(images, 1, 8, 8, 0.5, 0, 0)


def test_seed_epoch_and_stage_decide():
    t = table()
    plan = batches(t, 3, 24, 8, 0.5, 5, 2)
    assert batches(t, 3, 24, 8, 0.5, 5, 2) == plan
    assert batches(t, 3, 24, 8, 0.5, 5, 3) != plan != batches(t, 3, 24, 8, 0.5, 6, 2)
    assert numbers(batches(t, 2, 24, 8, 0.5, 5, 2), "clips") != numbers(plan, "clips")


@pytest.mark.parametrize("of", [1, 2, 3])
def test_processes_share_a_batch_without_rest(of):
    t = table()
    lengths = t["frames"].to_numpy()
    for batch in batches(t, 3, 20, 10, 0.5, 0, 0):
        shares = [batch.share(rank, of, lengths) for rank in range(of)]
        for part in ("clips", "own", "images"):
            sizes = [len(getattr(share, part)) for share in shares]
            assert max(sizes) - min(sizes) <= 1
            both = [unit for share in shares for unit in getattr(share, part)]
            assert sorted(both) == sorted(getattr(batch, part))
        partner = dict(zip(batch.clips, batch.own, strict=True))
        for share in shares:
            own = [lengths[clip] for clip, _ in share.clips]
            assert own == sorted(own), "clips of a length follow each other"
            assert [clip for clip, _ in share.own] == [clip for clip, _ in share.clips]
            assert set(share.own) <= set(partner.values())
    assert any(len({lengths[c] for c, _ in b.clips}) > 1 for b in batches(t, 3, 20, 10, 0.5, 0, 0))
    two = Batch(clips=[(0, -1), (1, -1)]).share(0, of, np.array([3, 2]))
    assert two.clips == ([(1, -1), (0, -1)] if of == 1 else [(0, -1)]) and two.own == []


def test_what_a_stage_is_judged_by():
    t = pd.DataFrame({"kind": ["medium", "medium", "real", "varying", "steady"], "frames": [9, 1, 2, 9, 9]})
    images = [(0, 1), (0, 3), (0, 5), (0, 7), (1, 0), (2, 0), (2, 1)]
    clips = [(0, -1), (2, -1), (3, -1), (4, -1)]
    assert judged(t, 1) == images and judged(t, 2) == clips and judged(t, 3) == images + clips
    assert judged(t, 1, most=1) == [(0, 4), (1, 0), (2, 1)]
    assert spaced(3, 5).tolist() == [0, 1, 2] and spaced(8, 2).tolist() == [2, 6]


def test_units_of_one_length_go_together():
    lengths = np.array([4, 3, 4, 1, 3])
    units = [(0, -1), (1, -1), (2, 0), (3, 0), (2, -1), (4, -1), (0, 3), (1, 1), (1, 2)]
    found = list(groups(units, lengths, 5))
    assert found == [[(2, 0), (3, 0), (0, 3), (1, 1), (1, 2)], [(1, -1)], [(4, -1)], [(0, -1)], [(2, -1)]]
    assert list(groups(units, lengths, 8))[1:] == [[(1, -1), (4, -1)], [(0, -1), (2, -1)]]
    assert list(groups([(0, -1)], lengths, 2)) == [[(0, -1)]], "a clip is never cut"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_made_comes_with_its_twin(stage):
    t = table()
    for batch in batches(t, stage, 48, 16, 0.5, 3, 0):
        for units in (batch.clips, batch.images):
            made = [(clip, ts) for clip, ts in units if t.at[clip, "kind"] != "medium"]
            reals, fakes = ([u for u in made if t.at[u[0], "label"] == label] for label in (0, 1))
            assert len(reals) == len(fakes) == len(units) // 4
            for (real, t0), (fake, t1) in zip(reals, fakes, strict=True):
                assert t0 == t1 and t.at[real, "item_id"] == t.at[fake, "item_id"]
                kinds = t.at[real, "kind"], t.at[fake, "kind"]
                assert kinds in (("real", "blend"), ("steady", "varying"))
