"""Training of heads: the same weights after a kill, no fake and no test item read, scores as from the pictures."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, tiny_profile
from sklearn.metrics import roc_auc_score

from unmask import cli, features, scoring, temporal
from unmask.commands import training as commands
from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest, write_manifest
from unmask.detectors import base
from unmask.detectors.temporal import HEADS
from unmask.pairs import TrainingError
from unmask.training import VARIANTS

EPOCHS = 3


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def run(tiny_world, dense_crops, tiny_checkpoint, tmp_path, cache):
    """Train a head into a folder by name; keywords change what `train_head` is given, `profile` keys of the profile."""

    def call(folder="run", head="gru", seed=0, profile=(), **given):
        keys = {"temporal.epochs": EPOCHS, "temporal.batch": 5, "temporal.dropout": 0.3} | dict(profile)
        keys = {k.replace(".", "__"): v for k, v in keys.items()}
        paths = {"manifest": tiny_world / "manifest.parquet", "crops": dense_crops, "backbone": tiny_checkpoint}
        return temporal.train_head(
            head, tiny_profile(**keys), out=tmp_path / folder, seed=seed, **paths | {"cache": cache} | given
        )

    return call


@pytest.fixture(scope="module")
def judged(dense_crops, tiny_world, tiny_checkpoint, cache):
    """Features of the test items."""
    manifest, index = read_manifest(tiny_world / "manifest.parquet"), read_index(dense_crops)
    rows = index[index["item_id"].isin(manifest.loc[manifest["split"] == "test", "item_id"])]
    return features.of_crops(tiny_checkpoint, dense_crops, rows, cache, 0)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("head", ["mean", "gru", "transformer"])
def test_killed_and_resumed_equals_uninterrupted(run, monkeypatch, tmp_path, head):
    whole = run("whole", head)
    true, calls = temporal.validate, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == EPOCHS:
            raise Killed
        return true(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(temporal, "validate", dying)
        with pytest.raises(Killed):
            run("cut", head)
    assert len(torch.load(tmp_path / "cut/last.pt", weights_only=True)["history"]) == EPOCHS - 1
    with monkeypatch.context() as patch:
        patch.setattr(temporal, "validate", lambda *a: calls.append(1) or true(*a))
        cut = run("cut", head)
    assert len(calls) == EPOCHS + 1, "the first epochs are not repeated"
    assert weights(cut) == weights(whole) and (cut / "config.json").read_text() == (whole / "config.json").read_text()
    assert sorted(p.name for p in cut.iterdir()) == ["config.json", "epochs.json", "model.safetensors"]


def test_two_runs_agree_another_seed_does_not_and_nothing_else_is_reseeded(run):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = run("one")
    assert torch.equal(torch.get_rng_state(), before)
    assert weights(run("two")) == weights(one) != weights(run("three", seed=1))


def test_finished_it_returns_at_once_and_changed_it_trains_anew(run, monkeypatch):
    run()
    monkeypatch.setattr(temporal, "_epochs", lambda *a: (_ for _ in ()).throw(Killed))
    run()
    for change in ({"seed": 1}, {"profile": {"temporal.lr": 0.1}}, {"config": {"differences": False}}):
        with pytest.raises(Killed):
            run(**change)


def test_no_fake_and_no_test_item_is_read_and_test_labels_reach_nothing(
    run, monkeypatch, tiny_world, tmp_path, dense_crops
):
    manifest = read_manifest(tiny_world / "manifest.parquet")
    seen, true = set(), CropStore.image
    with monkeypatch.context() as patch:
        patch.setattr(CropStore, "image", lambda store, row, **k: seen.add(row["item_id"]) or true(store, row, **k))
        clean = run("clean", cache=tmp_path / "own")
    allowed = manifest[(manifest["label"] == 0) & (manifest["split"] != "test") & (manifest["kind"] == "video")]
    assert seen == set(allowed["item_id"])
    poisoned = manifest.assign(root=str(tiny_world))
    test = poisoned["split"] == "test"
    poisoned.loc[test, "label"] = 1 - poisoned.loc[test, "label"]
    poisoned.loc[test, "method"] = np.where(poisoned.loc[test, "label"] == 0, "real", "swap")
    write_manifest(poisoned.astype({"label": "int8"}), tmp_path / "poisoned.parquet")
    assert weights(run("poisoned", manifest=tmp_path / "poisoned.parquet", cache=tmp_path / "other")) == weights(clean)


def test_the_kept_epoch_is_the_one_with_the_lowest_validation_loss(run, monkeypatch):
    losses, states, true = iter([0.7, 0.3, 0.5]), [], temporal.validate

    def spy(detector, clips):
        states.append({k: v.clone() for k, v in detector.head_state().items()})
        return true(detector, clips) | {"val_loss": next(losses)}

    monkeypatch.setattr(temporal, "validate", spy)
    detector, card = base.load_checkpoint(run())
    assert [h["val_loss"] for h in card["history"]] == [0.7, 0.3, 0.5]
    assert all(torch.equal(v, states[1][k]) for k, v in detector.head_state().items())


def test_validation_figures(run, monkeypatch):
    _, card = base.load_checkpoint(run(profile={"temporal.epochs": 1}))
    clips = features.Clips(
        np.zeros((4, 2, 1), np.float32), np.zeros((4, 2), np.float32), np.ones((4, 2), bool),
        pd.DataFrame({"kind": ["real", "blend", "steady", "varying"], "label": [0, 1, 0, 1]}),
    )  # fmt: skip
    logits = np.array([-1.0, 0.5, 2.0, 1.0])
    monkeypatch.setattr(temporal, "logits_of", lambda *a: logits)
    found = temporal.validate(None, clips)
    p = 1 / (1 + np.exp(-logits))
    loss = -np.mean([np.log(1 - p[0]), np.log(p[1]), np.log(1 - p[2]), np.log(p[3])])
    assert found == pytest.approx({"val_loss": loss, "val_auc": 0.5, "val_time_auc": 0.0})
    assert set(card["history"][0]) == {"epoch", "loss", *found}


def test_the_frozen_part_is_the_backbone_and_the_card_says_how_crops_were_made(run, tiny_checkpoint):
    detector, card = base.load_checkpoint(run())
    spatial, below = base.load_checkpoint(tiny_checkpoint)
    assert all(torch.equal(v, detector.spatial.state_dict()[k]) for k, v in spatial.state_dict().items())
    assert card["backbone"] == below["sha256"] and card["seed"] == 0
    assert (card["preprocessing"]["sampling"], card["preprocessing"]["frames"]) == ("dense", 4)


@pytest.mark.parametrize("head", ["mean", "gru", "transformer"])
def test_cached_features_score_as_pictures_do(run, judged, dense_crops, head):
    detector, _ = base.load_checkpoint(run(head=head, profile={"temporal.frames": 3}))
    index = read_index(dense_crops)
    index = index[index["item_id"].isin(judged.rows["item_id"])]
    direct = scoring.score_crops(detector, CropStore(dense_crops), index)
    cached = temporal.score_features(detector, judged)
    assert direct["item_id"].tolist() == cached["item_id"].tolist() and (cached["frame"] == -1).all()
    assert np.abs(direct["score"] - cached["score"]).max() < 1e-3
    assert direct["score"].std() > 0, "scores that are all alike would agree whatever they are"


def test_mean_pooling_of_logits_is_the_frozen_detector(judged, tiny_checkpoint, dense_crops):
    detector, _ = base.load_checkpoint(tiny_checkpoint)
    index = read_index(dense_crops)
    own = scoring.score_crops(detector, CropStore(dense_crops), index[index["item_id"].isin(judged.rows["item_id"])])
    own = own[own["frame"] == -1].set_index("item_id")["score"]
    pooled = temporal.score_features(None, judged)
    np.testing.assert_allclose(pooled["score"], own.loc[pooled["item_id"]], atol=1e-5)
    shuffled = temporal.score_features(None, judged, "shuffled")
    np.testing.assert_allclose(shuffled["score"], pooled["score"], atol=1e-12)


def test_heads_learn_what_changes_over_time(tiny_checkpoint, tmp_path):
    """Features that only differ in how they move: a head tells them apart, pooled features cannot."""
    width = 64 + 24 * 24

    def drawn(clips, seed):
        rng = np.random.default_rng(seed)
        kinds = np.tile(["steady", "varying"], clips // 2)
        still = np.repeat(rng.normal(size=(clips, 1, width)), 4, 1)
        moving = rng.normal(size=(clips, 4, width))
        x = np.where((kinds == "varying")[:, None, None], moving, still)
        x[..., 64:] *= 0.02
        rows = [(f"{i:04d}", 0, k, int(k == "varying"), t, 0.0, "") for i, k in enumerate(kinds) for t in range(4)]
        columns = ["item_id", "version", "kind", "label", "frame", "pts", "sha256"]
        number = np.zeros(len(rows), np.float32)
        table = pd.DataFrame(rows, columns=columns)
        return features.Features(x.reshape(-1, width).astype(np.float16), number, table, f"{clips}-{seed}")

    train, val = drawn(160, 1), drawn(80, 2)
    options = temporal.Options(seed=0, epochs=12, batch=16, lr=1e-3, weight_decay=0.05, warmup=0.1)
    found = {}
    for head, config in {"mean": {}, "gru": {"width": 32}, "transformer": {"width": 32}}.items():
        out = temporal.fit(head, {"frames": 4} | config, tiny_checkpoint, train, val, tmp_path / head, options, {})
        detector, _ = base.load_checkpoint(out)
        for order in ("in order", "frozen"):
            scores = temporal.score_features(detector, val, order)["score"]
            found[head, order] = roc_auc_score(val.rows.drop_duplicates("item_id")["label"], scores)
    assert found["gru", "in order"] > 0.95 and found["transformer", "in order"] > 0.95
    assert all(0.3 < found[key] < 0.7 for key in found if key[0] == "mean" or key[1] == "frozen")


def test_what_cannot_be_trained_says_so(run, tmp_path, tiny_world):
    with pytest.raises(TrainingError, match="cannot be built.*divisible"):
        run(head="transformer", profile={"temporal.heads": 5})
    with pytest.raises(base.CheckpointError, match="is not a checkpoint"):
        run(backbone=tmp_path)
    manifest = read_manifest(tiny_world / "manifest.parquet").assign(root=str(tiny_world))
    write_manifest(manifest[(manifest["kind"] == "image") | (manifest["label"] == 1)], tmp_path / "images.parquet")
    with pytest.raises(TrainingError, match="heads learn from videos"):
        run(manifest=tmp_path / "images.parquet")
    with pytest.raises(TrainingError, match="no longer a number"):
        run(profile={"temporal.lr": float("inf")})


def test_features_lie_beside_the_crops_unless_told(run, dense_crops, tmp_path):
    crops = tmp_path / "crops"
    crops.symlink_to(dense_crops)
    out = run(crops=crops, cache=None)
    assert (tmp_path / "features").is_dir() and json.loads((out / "config.json").read_text())["detector"] == "gru"


def test_the_command_line_trains_heads(tiny_world, dense_crops, tiny_checkpoint, cache, tmp_path, capsys, run):
    settings = [f"{k}={v}" for k, v in (TINY | {"temporal.epochs": EPOCHS, "temporal.batch": 5}).items()]
    settings = [part for setting in [*settings, "temporal.dropout=0.3", "workers=1"] for part in ("--set", setting)]
    data = ["--manifest", tiny_world / "manifest.parquet", "--crops", dense_crops, "--profile", "tiny", *settings]

    def train(*arguments):
        return cli.main([str(part) for part in ["train", *arguments, *data]])

    given = ["--backbone", tiny_checkpoint, "--features", cache]
    assert train("gru", "--out", tmp_path / "ck", *given) == 0
    assert weights(tmp_path / "ck") == weights(run())
    assert train("gru", "--out", tmp_path / "no") == 2
    assert "gru is a head over clips: name the detector below it by --backbone" in capsys.readouterr().err
    assert train("convnext", "--out", tmp_path / "no", *given) == 2
    assert "--backbone is for mean, gru, transformer" in capsys.readouterr().err
    assert train("gru", "--out", tmp_path / "no", "--backbone", tmp_path / "ck", "--features", cache) == 2
    assert "judges clips" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_the_command_line_names_what_there_is():
    assert set(commands.HEADS) == set(HEADS) <= set(base.names()) and tuple(commands.VARIANTS) == tuple(VARIANTS)
