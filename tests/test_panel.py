"""Panels: calibrations against scikit-learn and known odds, who has a vote, and files that are read strictly."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from unmask import panel
from unmask.detectors import base
from unmask.panel import PanelError


def drawn(n_real, n_fake, seed, slope=1.0, shift=0.0, per_group=1):
    """Labels, scores and groups: the right log odds are slope * those of the score + shift.

    Two normals of spread 1 at +-d/2 have the log odds d * x. Groups of one class each share 0.6 of the variance.
    """
    rng, d = np.random.default_rng(seed), 1.5
    labels = np.repeat([0, 1], [n_real, n_fake])
    groups = np.concatenate([np.arange(n) // per_group + 1000 * c for c, n in enumerate((n_real, n_fake))])
    noise = rng.normal(size=len(labels))
    if per_group > 1:
        noise = 0.6**0.5 * rng.normal(size=2000)[groups] + 0.4**0.5 * noise
    right = d * (np.where(labels == 1, d / 2, -d / 2) + noise)
    return labels, expit((right - shift) / slope), groups


@pytest.mark.parametrize("n_real,n_fake", [(3000, 3000), (5000, 700)])
def test_calibration_finds_the_odds_whatever_the_share_of_fakes(n_real, n_fake):
    labels, scores, _ = drawn(n_real, n_fake, 0, slope=0.5, shift=-1.2)
    slope, intercept = panel.calibrate(labels, scores)
    assert abs(slope - 0.5) < 0.04 and abs(intercept + 1.2) < 0.1


def test_calibration_is_a_logistic_regression_with_balanced_classes_on_smoothed_targets():
    labels, scores, _ = drawn(40, 17, 3)
    short = 1 / 19  # of the smaller class, 17
    x = np.tile(logit(scores), 2)[:, None]
    side = np.repeat([1, 0], len(labels))
    share = np.where(labels == 1, 1 - short, short)
    weight = np.concatenate([share, 1 - share]) / np.tile(np.where(labels == 1, 17, 40), 2) * 1000
    reference = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000).fit(x, side, weight)
    found = panel.calibrate(labels, scores)
    np.testing.assert_allclose(found, (reference.coef_[0, 0], reference.intercept_[0]), atol=1e-4)


def test_scores_that_say_nothing_or_the_opposite_get_even_odds():
    labels, scores, groups = drawn(50, 20, 1)
    assert panel.calibrate(labels, 1 - scores) == (0.0, 0.0)
    assert panel.calibrate(labels, np.full(70, 0.9)) == (0.0, 0.0)
    parted = panel.calibrate([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert 0 < parted[0] < 10, "classes that a score parts keep finite odds"
    assert all(np.isfinite(panel.calibrate([0, 1], [0.0, 1.0])))
    with pytest.raises(ValueError, match="real and fake"):
        panel.calibrate([1, 1], [0.2, 0.3])


@pytest.mark.parametrize("per_group,n_real,n_fake", [(1, 60, 60), (1, 100, 20), (6, 60, 60)])
def test_its_error_covers_the_truth(per_group, n_real, n_fake):
    """95 % intervals of the log odds at scores of 0.2 and 0.8, over 150 validation sets."""
    at, found = np.array([0.2, 0.8]), []
    for seed in range(150):
        labels, scores, groups = drawn(n_real, n_fake, seed, per_group=per_group)
        line = panel.calibrate(labels, scores)
        made = panel.Calibration(*line, *panel.uncertainty(labels, scores, groups, *line))
        found.append((made.log_odds(at), made.error(at)))
    odds, error = np.array(found).transpose(1, 0, 2)
    cover = (np.abs(odds - logit(at)) < 1.96 * error).mean(0)
    assert (cover > 0.88).all(), cover
    assert (np.median(error, 0) < 2 * odds.std(0)).all(), "far wider than the odds scatter"


def scored(*args, **kwargs):
    labels, scores, groups = drawn(*args, **kwargs)
    return pd.DataFrame({"label": labels, "score": scores, "group_id": groups.astype(str)})


@pytest.fixture
def home(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoints/one")
    return tmp_path


def test_a_panel_is_read_as_it_was_written_and_moves_with_its_folder(home):
    checkpoint = home / "checkpoints/one"
    one_class = scored(30, 30, 0).query("label == 1")
    members = {"good": (checkpoint, scored(60, 60, 0)), "guess": (checkpoint, scored(60, 60, 1)),
               "one class": (checkpoint, one_class), "unknown": (checkpoint, None)}  # fmt: skip
    members["guess"][1]["score"] = np.random.default_rng(0).random(120)
    written = panel.fit(members, home / "panel.json", locators=["yunet"], draws=200)
    assert "/" not in json.loads((home / "panel.json").read_text())["members"][0]["checkpoint"].split("checkpoints")[0]
    moved = home.parent / (home.name + "-moved")
    home.rename(moved)
    found = panel.read(moved / "panel.json")
    np.testing.assert_equal([vars(m) for m in found.members], [vars(m) for m in written.members])
    assert found.locators == ("yunet",) and found.folder(found.members[0]) == moved / "checkpoints/one"
    good, guess, one, unknown = found.members
    assert (good.n_real, good.n_fake, good.groups) == (60, 60, 120) and 0.7 < good.low < good.auc < good.high
    assert [m.votes for m in found.members] == [True, False, False, False]
    assert good.why_silent == "" and "not better than chance" in guess.why_silent
    assert all("not calibrated" in m.why_silent for m in (one, unknown))
    assert (one.n_real, one.n_fake) == (0, 30) and unknown.n_fake == 0 and np.isnan(unknown.auc)


def test_how_many_frames_and_pictures_a_calibration_rests_on(home):
    rows = scored(30, 30, 0)
    mixed = rows.assign(kind=["image"] * 40 + ["video"] * 20, frames=[1] * 40 + [3] * 18 + [2, np.nan])
    unscored = mixed.assign(score=rows["score"].where(mixed["frames"] == 1), frames=mixed["frames"].fillna(9))
    members = {"mixed": mixed, "all": rows, "unknown": rows.assign(frames=np.nan), "images": unscored}
    members = {name: (home / "checkpoints/one", table) for name, table in members.items()}
    panel.fit(members, home / "p.json", level=0.5, draws=50)
    found = panel.read(home / "p.json")
    assert [(m.frames, m.pictures) for m in found.members] == [(3, 40), (0, 0), (0, 0), (1, 40)] and found.level == 0.5


def test_one_group_leaves_no_interval_and_no_vote(home):
    rows = scored(30, 30, 0).assign(group_id="all")
    (found,) = panel.fit({"a": (home / "checkpoints/one", rows)}, home / "p.json", draws=50).members
    assert found.calibration and not found.votes and "too few groups" in found.why_silent


BROKEN = {
    "not JSON": lambda c: None,
    "another version": lambda c: c.update(version=1),
    "a key too many": lambda c: c["members"][0].update(weight=3.0),
    "a key too few": lambda c: c["members"][0].pop("threshold"),
    "text for a number": lambda c: c["members"][0].update(auc="0.9"),
    "true for a count": lambda c: c["members"][0].update(n_real=True),
    "a falling line": lambda c: c["members"][0]["calibration"].update(slope=-1.0),
    "no number": lambda c: c["members"][0]["calibration"].update(intercept=None),
    "frames below none": lambda c: c["members"][0].update(frames=-1),
    "no share": lambda c: c.update(level=95.0),
    "nobody": lambda c: c.update(members=[]),
    "twice": lambda c: c["members"].append(c["members"][0]),
    "a list": lambda c: c.update(members={"a": 1}),
    "stages without judge": lambda c: c.update(unsupervised={"folder": "u", "seed": 0, "settings": {}}),
    "another checkpoint": lambda c: c["members"][0].update(sha256="0" * 64),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_no_panel_is_refused(home, fault):
    path = home / "panel.json"
    panel.fit({"a": (home / "checkpoints/one", scored(30, 30, 0))}, path, draws=50)
    panel.read(path)
    content = json.loads(path.read_text())
    BROKEN[fault](content)
    path.write_text(json.dumps(content) if fault != "not JSON" else "{")
    with pytest.raises(PanelError):
        panel.read(path)


def test_missing_files_are_named(home):
    with pytest.raises(PanelError, match="There is no panel at"):
        panel.read(home / "nothing.json")
    panel.fit({"a": (home / "checkpoints/one", None)}, home / "panel.json")
    shutil.rmtree(home / "checkpoints")
    with pytest.raises(base.CheckpointError, match="not a checkpoint"):
        panel.read(home / "panel.json")


def test_validation_scores_are_those_of_the_split_by_the_right_crops(
    tiny_checkpoint, tiny_world, tiny_crops, dense_crops
):
    from unmask.data.manifest import read_manifest

    path = tiny_world / "manifest.parquet"
    found = panel.score_validation([tiny_checkpoint], path, [dense_crops, tiny_crops])
    folder, table = found[tiny_checkpoint.name]
    val = read_manifest(path).query("split == 'val'").set_index("item_id")
    assert folder == tiny_checkpoint and set(table["item_id"]) == set(val.index)
    assert (table["kind"].to_numpy() == val.loc[table["item_id"], "kind"]).all() and "frames" not in table
    assert (table["label"].to_numpy() == val.loc[table["item_id"], "label"]).all()
    with pytest.raises(PanelError, match="other crops"):
        panel.score_validation([tiny_checkpoint], path, [dense_crops])
    with pytest.raises(PanelError, match="Two checkpoints are named"):
        panel.score_validation([tiny_checkpoint, tiny_checkpoint], path, [tiny_crops])
