"""Training on a CLIP: what learns and what does not, validation alone chooses, a kill changes nothing."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny_clips
import torch
from conftest import tiny_profile
from test_lare import diffusion

from unmask import cli, clip_training, lare, views
from unmask.clip_scoring import score
from unmask.clip_training import Faces, FrozenInputs, Run, build, cached, labelled, train, train_all
from unmask.data.crops import CropStore, read_index, spread
from unmask.data.manifest import read_manifest, write_manifest
from unmask.detectors import base
from unmask.pairs import TrainingError
from unmask.scoring import score_crops, score_media


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return diffusion(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="module")
def faces(tiny_world, tiny_crops, model, tmp_path_factory):
    """The tiny world's faces with LaRE maps of 8 x 8 cells."""
    folder = tmp_path_factory.mktemp("clip-training")
    settings = lare.Settings(str(model), "", 200, 1, 64, "a b")
    lare.extract(tiny_world / "manifest.parquet", folder / "lare", settings, tiny_crops)
    return Faces(tiny_world / "manifest.parquet", tiny_crops, folder / "features", folder / "lare")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    clip = tiny_clips.write(tmp_path_factory.mktemp("clip"))
    return tiny_profile(clip__backbone=clip, clip__epochs=2, clip__frames=2, clip__versions=2)


def weights(folder):
    return base.read_checkpoint(folder)[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["ufd", "coop", "lntune", "clip-lare:F2c", "clip-lare:F4c-text"])
def test_everything_trainable_learns_and_nothing_else(name, profile, faces, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        before = {key: value.clone() for key, value in build(name, profile, faces.lare).named_parameters()}
    detector, card = base.load_checkpoint(train(name, profile, faces, tmp_path / "out", 3))
    trainable = {key for key, value in detector.named_parameters() if value.requires_grad}
    changed = {key for key, value in detector.named_parameters() if not torch.equal(value, before[key])}
    assert changed == trainable and trainable
    assert len(card["history"]) == 2 and card["seed"] == 3
    assert card["options"]["recipe"]["epochs"] == 2


def test_a_finished_training_is_not_done_again_unless_something_changed(profile, faces, tmp_path, monkeypatch):
    out = train("ufd", profile, faces, tmp_path / "out", 0)
    first = weights(out)
    with monkeypatch.context() as patch:
        patch.setattr(clip_training, "_fit", lambda *given: pytest.fail("trained again"))
        assert train("ufd", profile, faces, tmp_path / "out", 0) == out
    assert not same(first, weights(train("ufd", profile, faces, tmp_path / "out", 1)))


@pytest.mark.parametrize("name", ["ufd", "lntune", "clip-lare:F3c"])
def test_killed_and_resumed_equals_uninterrupted(name, profile, faces, tmp_path, monkeypatch):
    losses = {}  # falling, so that the weights of the last epoch are kept
    monkeypatch.setattr(
        clip_training, "_validate", lambda *given: {"val_loss": losses.setdefault(len(losses), -len(losses))}
    )
    whole = weights(train(name, profile, faces, tmp_path / "whole", 0))
    keep = clip_training.save_state

    def kill(path, state):
        keep(path, state)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(clip_training, "save_state", kill)
        with pytest.raises(Killed):
            train(name, profile, faces, tmp_path / "killed", 0)
    epochs = []
    plan = views.balanced_plan
    monkeypatch.setattr(clip_training, "balanced_plan", lambda *given: epochs.append(given[-1]) or plan(*given))
    assert same(whole, weights(train(name, profile, faces, tmp_path / "killed", 0)))
    assert epochs == [1]


def test_labels_of_the_test_split_reach_nothing(profile, faces, tmp_path):
    df = read_manifest(faces.manifest)
    test = df["split"] == "test"
    roots = [str((faces.manifest.parent / root).resolve()) for root in df["root"]]
    df = df.assign(root=roots, label=df["label"].where(~test, 1 - df["label"]).astype("int8"))
    df.loc[test, "method"] = np.where(df.loc[test, "label"] == 0, "real", "swap")
    write_manifest(df, tmp_path / "poisoned.parquet")
    poisoned = replace(faces, manifest=tmp_path / "poisoned.parquet")
    found = [weights(train("ufd", profile, one, tmp_path / str(k), 0)) for k, one in enumerate((faces, poisoned))]
    assert same(*found)


def test_the_epoch_with_the_lowest_validation_loss_is_kept(profile, faces, tmp_path, monkeypatch):
    losses, kept = iter([0.3, 0.9]), []
    keep = clip_training.save_state
    monkeypatch.setattr(clip_training, "save_state", lambda path, state: kept.append(state) or keep(path, state))
    monkeypatch.setattr(clip_training, "_validate", lambda *given: {"val_loss": next(losses), "val_auc": 0.5})
    out = train("ufd", profile, faces, tmp_path / "out", 0)
    first, second = ({name: value.clone() for name, value in state["best"].items()} for state in kept)
    assert same(weights(out), first) and same(first, second)


def test_neighbours_hold_all_training_frames_at_unit_length(profile, faces, tmp_path):
    detector = base.load_checkpoint(train("clip-nn", profile, faces, tmp_path / "out", 0))[0]
    counts = labelled(faces, "train", 2)["label"].value_counts()
    assert (len(detector.real), len(detector.fake)) == (counts[0], counts[1])
    assert torch.allclose(detector.fake.norm(dim=1), torch.ones(counts[1]))


def test_frozen_views_take_turns_with_the_epochs(profile, faces):
    rows = labelled(faces, "val", 2)
    detector = build("ufd", profile)
    found = cached(detector, faces, rows, 2, 0)
    inputs = FrozenInputs(detector, found, torch.device("cpu"))
    expected = detector.head(found.tensors["pooled"][[0, 0, 1], [0, 1, 1]].float()).squeeze(1)
    assert torch.equal(inputs.logits(detector, [(0, 0, 0), (3, 0, 0), (0, 1, 1)]), expected)


@pytest.mark.parametrize("name", ["ufd", "lntune", "clip-lare:F4c"])
def test_scores_of_cached_features_are_those_of_the_pictures(name, profile, faces, tmp_path):
    out = train(name, profile, faces, tmp_path / "out", 0)
    index = read_index(faces.crops)
    rows = index[index["item_id"].isin(index["item_id"].unique()[:5])]
    table = score(out, faces, rows).sort_values(["item_id", "frame"], ignore_index=True)
    plain = score_crops(base.load_checkpoint(out)[0], CropStore(faces.crops), rows, lare=faces.lare)
    plain = plain.sort_values(["item_id", "frame"], ignore_index=True)
    assert table[["item_id", "frame"]].equals(plain[["item_id", "frame"]])
    np.testing.assert_allclose(table["score"], plain["score"], atol=3e-3)
    assert plain["score"].std() > 0
    assert set(table["detector"]) == {name}


def test_a_detector_of_maps_scores_media_with_maps_made_alike(profile, faces, tiny_world, model, tmp_path):
    out = train("clip-lare:F2c", profile, faces, tmp_path / "out", 0)
    media = sorted((tiny_world / "world-a" / "videos").glob("*.mp4"))[:1]
    report = score_media([*media, tmp_path / "nothing.mp4"], out, tmp_path / "scores.csv", locator="haar")
    assert len(report) == 2 and report["status"].iloc[1] == "failed"
    other = diffusion(tmp_path / "other", seed=5)
    with pytest.raises(base.CheckpointError, match="another model"):
        score_media(media, out, tmp_path / "other.csv", locator="haar", model=other)


def test_maps_of_another_extractor_are_refused(profile, faces, model, tmp_path):
    out = train("clip-lare:F2c", profile, faces, tmp_path / "out", 0)
    settings = lare.Settings(str(model), "", 900, 1, 64, "a b")
    lare.extract(faces.manifest, tmp_path / "lare", settings, faces.crops)
    rows = read_index(faces.crops).head(2)
    for folder, said in ((tmp_path / "lare", "learned from maps"), (None, "unmask lare --crops")):
        with pytest.raises(lare.LareError, match=said):
            score(out, replace(faces, lare=folder), rows)
        with pytest.raises(lare.LareError, match=said):
            score_crops(base.load_checkpoint(out)[0], CropStore(faces.crops), rows, lare=folder)


def test_a_medium_without_a_finite_map_is_a_failure_and_not_the_end(profile, faces, tiny_world, tmp_path, monkeypatch):
    out = train("clip-lare:F2c", profile, faces, tmp_path / "out", 0)
    media = sorted((tiny_world / "world-a" / "videos").glob("*.mp4"))[:4]
    plain = score_media(media, out, tmp_path / "plain.csv", locator="haar")
    maps, bad = lare.Extractor.maps, []

    def spoil(self, pictures, batch):
        found = maps(self, pictures, batch)
        bad.append(len(found))
        found[:1] = np.nan
        return found

    monkeypatch.setattr(lare.Extractor, "maps", spoil)
    report = score_media(media, out, tmp_path / "scores.csv", locator="haar")
    seen = plain["status"] == "ok"
    if not seen.any():
        pytest.skip("the Haar cascade finds no face in these drawn videos")
    assert len(report) == 4 and sum(bad) and (report["score"].notna() == (report["status"] == "ok")).all()


def test_what_is_missing_is_said(profile, faces, tmp_path):
    with pytest.raises(TrainingError, match="--lare"):
        train("clip-lare:F4c", profile, replace(faces, lare=None), tmp_path / "out", 0)
    with pytest.raises(TrainingError, match="F4s"):
        train("clip-lare:F4s", profile, faces, tmp_path / "out", 0)
    with pytest.raises(TrainingError, match="published"):
        train("ufd", tiny_profile(clip__backbone=profile.clip.backbone, clip__recipe="mine"), faces, tmp_path, 0)


def test_a_checkpoint_of_another_clip_is_refused(profile, faces, tmp_path):
    out = train("ufd", profile, faces, tmp_path / "out", 0)
    tiny_clips.write(profile.clip.backbone.removeprefix("local-dir:") and tmp_path / "clip", seed=9)
    text = (out / base.CONFIG).read_text()
    (out / base.CONFIG).write_text(text.replace(profile.clip.backbone, f"local-dir:{tmp_path / 'clip'}"))
    with pytest.raises(base.CheckpointError, match="fingerprint"):
        base.load_checkpoint(out)


def test_side_by_side_is_one_after_another(profile, faces, tmp_path):
    runs = {tmp_path / "a" / name: Run(name, profile, faces, 0) for name in ("ufd", "clip-adapter")}
    train_all(runs, 2)
    for out, run in runs.items():
        assert same(weights(out), weights(train(run.name, profile, faces, tmp_path / "b" / run.name, 0)))


def test_frames_are_spread_evenly():
    index = pd.DataFrame({"item_id": ["a"] * 8 + ["b"] * 3 + ["c"], "frame": [*range(8), *range(3), 0]})
    found = spread(index.sample(frac=1, random_state=0), 4)
    assert found.groupby("item_id")["frame"].apply(list).to_dict() == {"a": [1, 3, 5, 7], "b": [0, 1, 2], "c": [0]}
    assert spread(index, 1).groupby("item_id")["frame"].apply(list).to_dict() == {"a": [4], "b": [1], "c": [0]}


@pytest.mark.parametrize("name, more", [("ufd", ()), ("clip-lare:F2c", ("--lare",))])
def test_command(name, more, profile, faces, tmp_path, capsys):
    arguments = ["train", name, "--profile", "tiny", "--manifest", str(faces.manifest), "--crops", str(faces.crops)]
    arguments += ["--set", f"clip.backbone={profile.clip.backbone}", "--features", str(faces.features)]
    arguments += [*more, *([str(faces.lare)] if more else []), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert base.load_checkpoint(tmp_path / "out")[0].name == name
    assert cli.main([*arguments[:1], "clip-lare:F4s", *arguments[2:]]) == 2
    assert "F4c" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "uf", *arguments[2:]])
    assert "clip-lare:KIND" in capsys.readouterr().err
    assert cli.main([*arguments, "--backbone", "ViT-L-14"]) == 2
    assert "clip.backbone" in capsys.readouterr().err
    if not more:
        assert cli.main([*arguments, "--lare", str(faces.lare)]) == 2


def test_the_profile_says_how_prompts_begin(profile):
    changed = tiny_profile(
        clip__backbone=profile.clip.backbone, clip__words="a photo of a", clip__position="front", clip__neighbours=3
    )
    coop, nearest = build("coop", changed), build("clip-nn", changed)
    assert (coop.prompts.length, coop.config["position"], nearest.config["k"]) == (4, "front", 3)
    assert build("coop", profile).prompts.length == profile.clip.context
