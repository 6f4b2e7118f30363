"""Contrastive learning: the loss by its formula, batches and feedback by counting, the same weights after a kill."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from unmask import contrastive, learning, views
from unmask.contrastive import Options, centres, confident, learn, supcon_loss
from unmask.data.crops import CropStore, CropWriter, collate, encode_crop, read_index
from unmask.detectors.base import InputSpec, load_checkpoint
from unmask.scoring import frame_images
from unmask.training import STATE, TrainingError

OPTIONS = {
    "seed": 0, "epochs": 2, "batch": 16, "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "frames_per_clip": 2,
}  # fmt: skip
CONFIG = {"backbone": "test_convnext", "size": 32, "projection": 16}


class Killed(BaseException):
    pass


def stripe_crops(out, count, frames=3, seed=0):
    """Crops of `count` items that are striped: across (label 0) or along (1); index, store, true labels in turn."""
    rng, points = np.random.default_rng(seed), np.stack(np.divmod(np.arange(68), 8)[::-1], 1) * (32 / 8) + 8
    truth = pd.DataFrame({"item_id": [f"{i:016x}" for i in range(count)], "label": np.arange(count) % 2})
    with CropWriter(out, 0, 1) as writer:
        writer.resume([])
        for item, label in zip(truth["item_id"], truth["label"], strict=True):
            colour, crops = rng.uniform(0.4, 1, 3), []
            for frame in range(frames):
                wave = np.sin(np.arange(48) * rng.uniform(0.5, 0.9) + rng.uniform(0, 6))
                image = 128 + 90 * np.tile(wave[:, None] if label == 0 else wave, (48, 1) if label else (1, 48))
                image = image[..., None] * colour + rng.normal(0, 12, (48, 48, 3))
                row = {"item_id": item, "frame": frame, "pts": frame / 25, "x0": 8.0, "y0": 8.0, "x1": 40.0, "y1": 40.0}
                row |= {"landmarks": points.ravel().tolist(), "locator": "annotations", "locator_hash": ""}
                crops.append(row | {"data": encode_crop(image.clip(0, 255).astype(np.uint8), "png")})
            done = {"item_id": item, "status": "ok", "reason": "", "frames": frames, "faces": frames, "decoder": "none"}
            writer.add((item, ""), done | {"seconds": 0.0}, crops, "png")
        writer.finish()
    collate(out, 1)
    settings = {"frames": frames, "size": 48, "margin": 0.3, "align": False, "encoding": "png"}
    (out / "settings.json").write_text(json.dumps(settings))
    return read_index(out), CropStore(out), truth


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Index, store, and pseudo-labels of 16 items to learn from and 8 others; 0 and 1 are stripes of two directions."""
    index, store, truth = stripe_crops(tmp_path_factory.mktemp("stripes"), 24)
    return index, store, truth[:16], truth[16:]


@pytest.fixture
def run(data, tmp_path):
    """Learn into a folder by name; keywords change options."""
    index, store, train, val = data

    def call(name="run", labels=train, val_labels=val, index=index, config=CONFIG, init="none", **options):
        return learn(config, labels, val_labels, index, store, tmp_path / name, Options(**OPTIONS | options), init)

    return call


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def card(folder):
    return json.loads((folder / "config.json").read_text())


# ---- the loss


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 1, 0], [0, 0, 1, 2, 3, 2], [0, 1, 2, 3, 4, 5]])
def test_supcon_is_its_formula(labels):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((6, 5))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    anchors = []
    for i in range(6):
        positives = [p for p in range(6) if p != i and labels[p] == labels[i]]
        below = sum(np.exp(z[i] @ z[a] / 0.2) for a in range(6) if a != i)
        if positives:
            anchors.append(-np.mean([np.log(np.exp(z[i] @ z[p] / 0.2) / below) for p in positives]))
    found = supcon_loss(torch.from_numpy(z), torch.tensor(labels), 0.2)
    assert found.item() == pytest.approx(np.mean(anchors) if anchors else 0, abs=1e-12)


def test_supcon_has_a_gradient_that_is_finite_and_digits_under_autocast():
    z = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        half = supcon_loss(z.requires_grad_(), labels, 0.07)
    assert half.item() == pytest.approx(supcon_loss(z.double(), labels, 0.07).item(), rel=1e-5)
    half.backward()
    assert torch.isfinite(z.grad).all() and z.grad.abs().sum() > 0


# ---- views and batches


def test_views_belong_to_their_sample_and_the_fixed_one_is_that_of_scoring(data):
    index, store, *_ = data
    samples = views.Views(store, index, 32, seed=3)
    first = samples[0, 5, 0]
    assert first.shape == (2, 32, 32, 3) and first.dtype == torch.uint8
    again = views.Views(store, index.iloc[[5]], 32, seed=3)[0, 0, 0]
    assert torch.equal(first, again), "its place in the table does not count"
    others = [samples[1, 5, 0], samples[0, 5, 1], views.Views(store, index, 32, seed=4)[0, 5, 0]]
    for a, b in zip([first, *others], [*others, first], strict=True):
        assert not torch.equal(a, b)
    assert not torch.equal(*first)
    fixed = torch.stack([samples[views.FIXED, i, 0][0] for i in range(4)])
    assert torch.equal(fixed, torch.from_numpy(frame_images(store, index.iloc[:4], InputSpec(32))))


def test_the_augmentation_keeps_its_promises():
    """Shares over many views of a picture whose colour and place can be read back."""
    side = 96
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    picture = torch.from_numpy(
        np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.full((side, side), 60, np.uint8)])
    )
    grey, mirrored, erased, count = 0, 0, 0, 600
    for seed in range(count):
        view = views.random_view(picture, np.random.default_rng(seed), 64)
        assert view.shape == (3, 64, 64) and view.dtype == torch.uint8
        patch = (view == torch.tensor(views.NEUTRAL, dtype=torch.uint8).view(3, 1, 1)).all(0)
        erased += patch.sum() > 60
        rest = view[:, ~patch].int()
        grey += bool((rest[0] == rest[1]).all() and (rest[1] == rest[2]).all())
        light = view.float().sum(0)
        mirrored += bool(light[:, :8].sum() > light[:, -8:].sum())
    assert abs(erased / count - 0.8) < 0.06 and abs(grey / count - 0.2) < 0.06 and 0.35 < mirrored / count < 0.65


def test_a_random_part_stays_inside_and_within_its_ranges():
    rng = np.random.default_rng(0)
    parts = np.array([views._random_part(rng, 100, (0.5, 1), (3 / 4, 4 / 3)) for _ in range(500)])
    top, left, height, width = parts.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 100).all() and (left + width <= 100).all()
    assert (height * width >= 4900).all() and (width / height > 0.73).all() and (width / height < 1.36).all()
    assert (height * width).std() > 500


def test_batches_are_balanced_and_the_smaller_label_is_repeated_with_new_views():
    items = np.repeat([f"{i:02}" for i in range(10)], 4)  # 7 items real, 2 fake, one left out
    labels = np.repeat([0] * 7 + [1] * 2 + [-1], 4)
    plan = views.balanced_plan(items, labels, 6, 3, seed=0, epoch=2)
    assert plan == views.balanced_plan(items, labels, 6, 3, seed=0, epoch=2)
    assert plan != views.balanced_plan(items, labels, 6, 3, seed=1, epoch=2)
    for batch in plan:
        drawn = labels[[i for _, i, _ in batch]]
        assert 0 < len(batch) <= 6 and (drawn == 0).sum() == (drawn == 1).sum() == len(batch) / 2
    samples = [sample for batch in plan for sample in batch]
    assert len(samples) == len(set(samples)) == 2 * 7 * 3 and {epoch for epoch, *_ in samples} == {2}
    table = pd.DataFrame(samples, columns=["epoch", "i", "copy"])
    table["item"], table["label"] = items[table["i"]], labels[table["i"]]
    assert (table[table["label"] == 0].groupby("item").size() == 3).all() and (
        table[table["label"] == 0]["copy"] == 0
    ).all()
    fakes = table[table["label"] == 1]
    assert set(fakes["copy"]) == {0, 1, 2, 3} and (fakes.groupby(["item", "copy"]).size() <= 3).all()


# ---- feedback


def blobs(sizes, rng, spread=0.2):
    """Unit vectors around -x and +x."""
    units = np.concatenate([rng.normal((sign, 0, 0), spread, (n, 3)) for sign, n in zip((-1, 1), sizes, strict=True)])
    return (units / np.linalg.norm(units, axis=1, keepdims=True)).astype(np.float32)


def test_feedback_keeps_the_fraction_nearest_and_repairs_labels():
    units = blobs((100, 60), np.random.default_rng(0))
    cluster = np.repeat([0, 1], [100, 60])
    items = np.array([f"{i:03}" for i in range(160)])
    labels = cluster.copy()
    labels[[3, 4, 110]] = 1 - labels[[3, 4, 110]]
    new, changed, refused = confident(units, items, labels, 0.5, seed=0)
    assert refused == "" and (new == 0).sum() == 50 and (new == 1).sum() == 30
    for c in (0, 1):
        mean = units[cluster == c].mean(0)
        cosine = units @ mean / np.linalg.norm(mean)
        nearest = np.argsort(-np.where(cluster == c, cosine, -9))[: 50 if c == 0 else 30]
        assert set(np.flatnonzero(new == c)) == set(nearest)
    assert changed == sum(new[i] >= 0 for i in (3, 4, 110))
    assert confident(units, items, 1 - labels, 0.5, seed=0)[0].tolist() == [1 - v if v >= 0 else v for v in new]


def test_the_frames_of_an_item_take_its_majority_and_a_tie_drops_it():
    units = blobs((30, 30), np.random.default_rng(1), spread=0.05)
    cluster = np.repeat([0, 1], 30)
    items = np.array([f"{i:02}" for i in range(60)])
    items[[0, 1, 30]], items[[2, 31]] = "majority", "tie"
    new, changed, refused = confident(units, items, cluster, 1.0, seed=0)
    assert refused == "" and new[[0, 1, 30]].tolist() == [0, 0, 0] and new[[2, 31]].tolist() == [-1, -1]
    rest = np.setdiff1d(np.arange(60), [0, 1, 30, 2, 31])
    assert (new[rest] == cluster[rest]).all()


def test_feedback_is_refused_when_a_cluster_is_tiny():
    units = blobs((98, 2), np.random.default_rng(0), spread=0.02)
    labels = np.repeat([0, 1], [98, 2])
    new, changed, refused = confident(units, np.arange(100).astype(str), labels, 0.5, seed=0)
    assert new is labels and changed == 0 and refused == "cluster 1 would hold 2 of 100 frames"


def test_feedback_is_refused_while_all_frames_look_alike():
    units = blobs((50, 50), np.random.default_rng(0)) * 0.02 + np.array([0, 0, 1], np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    labels = np.repeat([0, 1], 50)
    new, changed, refused = confident(units, np.arange(100).astype(str), labels, 0.5, seed=0)
    assert new is labels and changed == 0 and refused.startswith("the centres coincide (cosine 0.999")


def test_a_run_with_feedback_says_what_it_did(run, monkeypatch):
    history = card(run(epochs=4, feedback=2, keep=0.5))["history"]
    assert [entry["kept"] for entry in history[:2]] == [48, 48] and history[0]["changed"] == 0
    assert history[2]["kept"] == history[3]["kept"] <= 25 and "refused" not in history[1]
    monkeypatch.setattr(contrastive, "SMALLEST_CLUSTER", 0.9)
    history = card(run("refused", epochs=4, feedback=2, keep=0.5))["history"]
    assert [entry["kept"] for entry in history] == [48] * 4 and "would hold" in history[1]["refused"]


# ---- learning


def test_killed_and_resumed_equals_uninterrupted(run, monkeypatch, tmp_path):
    options = {"epochs": 4, "feedback": 2, "keep": 0.6}
    whole = run("whole", **options)
    for epoch in (1, 3):  # before and after the feedback
        true, calls = learning._epoch, []

        def dying(*arguments, last=epoch, true=true, calls=calls):
            if len(calls) == last:
                raise Killed
            calls.append(1)
            return true(*arguments)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(learning, "_epoch", dying)
            run(f"cut{epoch}", **options)
        state = torch.load(tmp_path / f"cut{epoch}" / STATE, weights_only=True)
        assert len(state["history"]) == epoch and not (tmp_path / f"cut{epoch}/config.json").exists()
        cut = run(f"cut{epoch}", **options)
        assert weights(cut) == weights(whole)
        for ours, theirs in zip(card(cut)["history"], card(whole)["history"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
        assert (cut / "embeddings.safetensors").read_bytes() == (whole / "embeddings.safetensors").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Killed):  # after the last epoch
        patch.setattr(learning.base, "save_checkpoint", lambda *a, **k: (_ for _ in ()).throw(Killed))
        run("late", **options)
    with monkeypatch.context() as patch:
        patch.setattr(learning, "_epoch", lambda *a: pytest.fail("an epoch was repeated"))
        assert weights(run("late", **options)) == weights(whole)
    files = ["config.json", "embeddings.json", "embeddings.safetensors", "epochs.json", "model.safetensors"]
    assert sorted(p.name for p in cut.iterdir()) == files


def test_a_finished_run_returns_at_once_and_any_change_learns_anew(run, data, monkeypatch):
    index, _, train, val = data
    folder = run()
    before = weights(folder)
    with monkeypatch.context() as patch:
        patch.setattr(learning, "fit", lambda *a: pytest.fail("learned although nothing changed"))
        run(loaders=1)
        run(labels=train.sample(frac=1, random_state=0), index=index.sample(frac=1, random_state=0))
    other = train.assign(label=[1 - train["label"].iloc[0], *train["label"].iloc[1:]])
    keys = {card(folder)["training_key"]}
    for change in ({"labels": other}, {"val_labels": val[:6]}, {"temperature": 0.1}, {"config": CONFIG | {"size": 48}}):
        keys.add(card(run(**change))["training_key"])
    assert len(keys) == 5
    assert weights(run()) == before


def test_loader_processes_and_global_random_states_change_nothing(run):
    one = weights(run("one"))
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()
    assert weights(run("two", loaders=1)) == one
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1][1]).all() and np.random.get_state()[2] == before[1][2]
    assert weights(run("three", seed=1)) != one


def test_what_is_left_in_the_folder(run, data):
    index, store, train, val = data
    folder = run(epochs=6, lr=3e-3)
    detector, kept = load_checkpoint(folder)
    rows = index.sort_values(["item_id", "frame"])
    names = json.loads((folder / "embeddings.json").read_text())
    assert names["items"] == sorted([*train["item_id"], *val["item_id"]]) and set(names["frames"]) == {1}
    pictures = load_file(folder / "embeddings.safetensors")
    middle = rows[rows["frame"] == 1]
    with torch.no_grad():
        view = detector.prepare(torch.from_numpy(frame_images(store, middle, InputSpec(32))))
        features, units = (part.numpy() for part in detector.embed(view))
    assert pictures["first.features"].shape == features.shape == pictures["last.features"].shape
    losses = [entry["val_loss"] for entry in kept["history"]]
    close = np.allclose(pictures["last.projection"], units, atol=1e-4)
    assert close == (np.argmin(losses) == 5), "the checkpoint is that of the lowest loss, the picture the last"
    assert not np.allclose(pictures["first.projection"], pictures["last.projection"], atol=0.1)
    assert losses[-1] < losses[0]
    own = dict(zip(train["item_id"], train["label"], strict=True))
    rows = rows[rows["item_id"].isin(own)]
    with torch.no_grad():
        units = detector.project(detector.prepare(torch.from_numpy(frame_images(store, rows, InputSpec(32))))).numpy()
    expected = centres(units, rows["item_id"].map(own).to_numpy())
    np.testing.assert_allclose(kept["centroids"], expected, atol=1e-4)
    assert np.linalg.norm(kept["centroids"], axis=1) == pytest.approx([1, 1])
    assert kept["options"]["temperature"] == 0.07 and "loaders" not in kept["options"]


@pytest.mark.parametrize("losses, chosen", [([0.5, 0.3, 0.3, 0.4], 1), ([None] * 4, 3)])
def test_the_epoch_is_chosen_without_true_labels(run, monkeypatch, data, losses, chosen):
    shown = []

    def scripted(self, run):
        shown.append(run.detector.projector[3].weight.detach().clone())
        return losses[len(shown) - 1]

    true = learning._epoch

    def spy(run, *rest):
        loss = true(run, *rest)
        if losses[0] is None:
            scripted(None, run)
        return loss

    monkeypatch.setattr(contrastive.Contrast, "validate", scripted)
    monkeypatch.setattr(learning, "_epoch", spy)
    val = data[3] if losses[0] else data[3][:0]
    detector, kept = load_checkpoint(run(epochs=4, val_labels=val))
    assert torch.equal(detector.projector[3].weight.detach(), shown[chosen])
    assert [entry["val_loss"] for entry in kept["history"]] == losses


def test_learning_can_start_from_a_checkpoint(run, monkeypatch):
    first, started = run("first"), []
    true = learning.fit

    def spy(run, *rest):
        started.append({k: v.detach().clone() for k, v in run.detector.state_dict().items()})
        return true(run, *rest)

    monkeypatch.setattr(learning, "fit", spy)
    run("second", init=str(first))
    assert all(torch.equal(v, started[0][k]) for k, v in load_checkpoint(first)[0].state_dict().items())
    kit = {"backbone": "convnext_zepto_rms", "frequency": "srm", "size": 96}
    monkeypatch.setattr(learning, "fit", lambda run, *a: (_ for _ in ()).throw(Killed(run)))
    with pytest.raises(Killed) as killed:
        run("third", config=kit, init="convnext-demo")
    kept = load_checkpoint(contrastive.init_folder("convnext-demo"))[0]
    body = killed.value.args[0].detector.body
    assert torch.equal(body.backbone.stem[0].weight, kept.backbone.stem[0].weight)
    with pytest.raises(TrainingError, match="another architecture"):
        run("fourth", init="convnext-demo")


def test_what_cannot_be_learned_says_so(run, data):
    train, val = data[2:]
    with pytest.raises(TrainingError, match="all alike"):
        run(labels=train.assign(label=1))
    with pytest.raises(TrainingError, match="give each to one"):
        run(val_labels=train[:4])
    with pytest.raises(TrainingError, match="one row per item"):
        run(labels=pd.concat([train, train[:1]]))
    with pytest.raises(TrainingError, match="0 .real. or 1 .fake."):
        run(labels=train.assign(label=2))
    with pytest.raises(TrainingError, match="cannot be built"):
        run(config={"backbone": "nothing"})
    with pytest.raises(TrainingError, match="lower the learning rate"):
        run(lr=1e30, warmup=0.0, epochs=3)
