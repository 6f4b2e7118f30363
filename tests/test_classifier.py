"""The classifier on pseudo-labels: it learns the texture and not the mistakes, and goes on after a kill."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_contrastive import CONFIG, OPTIONS, Killed, card, stripe_crops, weights

from unmask import contrastive, learning
from unmask.classifier import Options, clean, fit, small_loss
from unmask.contrastive import learn
from unmask.detectors.base import load_checkpoint
from unmask.scoring import score_table
from unmask.training import STATE, TrainingError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Index, store, 60 items to learn from and 20 others of which a fifth is mislabelled, 20 unseen; column `true`."""
    index, store, truth = stripe_crops(tmp_path_factory.mktemp("stripes"), 100)
    labels = truth.rename(columns={"label": "true"}).assign(confidence=1.0)
    wrong = np.random.default_rng(5).permutation(80)[:16]
    labels["label"] = labels["true"].where(~labels.index.isin(wrong), 1 - labels["true"])
    return index, store, labels[:60], labels[60:80], labels[80:]


@pytest.fixture(scope="module")
def stage2(data, tmp_path_factory):
    index, store, train, val, _ = data
    out = tmp_path_factory.mktemp("stage2")
    config = CONFIG | {"backbone": "test_resnet"}
    return learn(config, train, val, index, store, out, contrastive.Options(**OPTIONS | {"epochs": 1, "lr": 1e-4}))


@pytest.fixture
def run(data, stage2, tmp_path):
    """Fit into a folder by name; keywords change options."""
    index, store, train, val, _ = data

    def call(name="run", labels=train, val_labels=val, start=stage2, **options):
        return fit(start, labels, val_labels, index, store, tmp_path / name, Options(**OPTIONS | options))

    return call


def test_only_confident_items_are_learned_from():
    labels = pd.DataFrame({"item_id": ["a", "b", "c"], "label": [0, 1, 1], "confidence": [0.4, 0.5, 0.9]})
    assert clean(labels, 0.5)["item_id"].tolist() == ["b", "c"] and len(clean(labels, 0.0)) == 3


def test_the_small_loss_split_drops_the_upper_mode_and_never_more_than_half():
    rng = np.random.default_rng(0)
    losses = np.concatenate([rng.normal(0.2, 0.05, 80), rng.normal(2.0, 0.3, 20)])
    labels = np.arange(100) % 2
    stays = small_loss(losses, labels, seed=0)
    assert stays[:80].all() and not stays[80:].any()
    mostly = np.concatenate(
        [np.full(5, 0.1), rng.normal(2.0, 0.1, 15)]
    )  # of one label three in four are in the upper mode
    stays = small_loss(np.concatenate([mostly, np.full(20, 0.1)]), np.repeat([0, 1], 20), seed=0)
    assert stays[20:].all() and stays[:20].sum() == 10
    assert set(np.flatnonzero(stays[:20])) == set(np.argsort(mostly, kind="stable")[:10])
    assert small_loss(np.full(6, 0.7), np.arange(6) % 2, seed=0).all()
    wide = np.concatenate([[0.0], np.full(50, 0.5), rng.uniform(1, 9, 20)])
    assert small_loss(wide, np.arange(71) % 2, seed=0)[0], "the smallest loss is no sign of a wrong label"


def test_it_learns_the_texture_although_a_fifth_of_the_labels_is_wrong(run, data):
    index, store, train, _, unseen = data
    kept, true = [], learning._epoch

    def spy(run, *rest):
        kept.append(set(run.rows["item_id"].to_numpy()[run.train][run.labels >= 0]))
        return true(run, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "_epoch", spy)
        folder = run(epochs=8, lr=3e-3)
    detector, kept_card = load_checkpoint(folder)
    scores = score_table(detector, kept_card, store, index[index["item_id"].isin(unseen["item_id"])], "pseudo")
    clips = scores[scores["frame"] == -1].merge(unseen, on="item_id")
    assert len(clips) == 20 and roc_auc_score(clips["true"], clips["score"]) > 0.9
    wrong = set(train.loc[train["label"] != train["true"], "item_id"])
    dropped = set(train["item_id"]) - kept[-1]
    assert len(wrong) == 11 and len(dropped & wrong) >= 8 and len(dropped & wrong) > len(dropped) / 2
    history = kept_card["history"]
    assert len(kept[0]) == 60 and [entry["items_kept"] for entry in history[:-1]] == [len(k) for k in kept[1:]]
    assert [entry["kept"] for entry in history] == [3 * len(k) for k in kept]
    assert kept_card["detector"] == "embedding" and kept_card["preprocessing"]["size"] == 48


def test_the_start_is_stage_2_and_all_of_it_is_tuned(run, stage2):
    first, second = load_checkpoint(stage2)[0].state_dict(), load_checkpoint(run(epochs=1))[0].state_dict()
    for name, value in first.items():
        if value.is_floating_point() and "running" not in name:
            assert torch.allclose(value, second[name], atol=0.05), "one epoch at a small rate goes not far"
            assert torch.equal(value, second[name]) == name.startswith("projector"), name


def test_killed_and_resumed_equals_uninterrupted(run, monkeypatch, tmp_path):
    whole = run("whole", epochs=3)
    true, calls = learning._epoch, []

    def dying(*arguments):
        if len(calls) == 2:
            raise Killed
        calls.append(1)
        return true(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(learning, "_epoch", dying)
        run("cut", epochs=3)
    assert len(torch.load(tmp_path / "cut" / STATE, weights_only=True)["history"]) == 2
    cut = run("cut", epochs=3)
    assert weights(cut) == weights(whole) and card(cut) == card(whole)
    assert sorted(p.name for p in cut.iterdir()) == ["config.json", "epochs.json", "model.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(learning, "fit", lambda *a: pytest.fail("trained although nothing changed"))
        run("cut", epochs=3, loaders=1)
    assert card(run("cut", epochs=3, min_confidence=0.2))["training_key"] != card(whole)["training_key"]


def test_validation_is_the_balanced_cross_entropy_of_the_items(run, data):
    index, store, train, val, _ = data
    few = val[~((val["label"] == 1) & (np.arange(len(val)) > 6))]
    folder = run(epochs=1, val_labels=few)
    detector, kept = load_checkpoint(folder)
    table = score_table(detector, kept, store, index[index["item_id"].isin(few["item_id"])], "x")
    frames = table[table["frame"] >= 0].merge(few, on="item_id")
    right = np.where(frames["label"] == 1, frames["score"], 1 - frames["score"])
    items = frames.assign(loss=-np.log(right)).groupby("item_id").agg({"loss": "mean", "label": "first"})
    counts = items["label"].value_counts()
    assert counts[0] > counts[1] > 0
    expected = (items.loc[items["label"] == 0, "loss"].mean() + items.loc[items["label"] == 1, "loss"].mean()) / 2
    assert kept["history"][0]["val_loss"] == pytest.approx(expected, abs=1e-4)


def test_unsure_items_are_never_opened(run, data):
    train, val = data[2:4]
    unsure = train.assign(confidence=np.where(np.arange(60) % 3 == 0, 0.1, 0.9))
    folder = run(epochs=2, labels=unsure, val_labels=val[:0])
    assert card(folder)["history"][0]["kept"] == 3 * 40
    assert card(folder)["history"][0]["val_loss"] is None


def test_what_cannot_be_fitted_says_so(run, data, stage2, tmp_path):
    with pytest.raises(TrainingError, match="all alike"):
        run(min_confidence=1.1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((stage2 / "model.safetensors").read_bytes())
    (other / "config.json").write_text(json.dumps(card(stage2) | {"detector": "convnext"}))
    with pytest.raises(TrainingError, match="holds the detector convnext"):
        run(start=other)
