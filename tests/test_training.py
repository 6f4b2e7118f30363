"""Training: the same weights after a kill, from any number of loaders, and whatever the test split holds."""

import math

import numpy as np
import pytest
import torch

from unmask import training
from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest
from unmask.detectors.base import CheckpointError, load_checkpoint
from unmask.pairs import TrainingError, real_crops
from unmask.profile import load_profile
from unmask.training import Options, train

OPTIONS = {
    "seed": 0, "epochs": 2, "batch": 4, "frames_per_clip": 2, "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1,
    "ema": 0.0, "patience": 0, "boundary": 1.0, "recipe": "intended",
}  # fmt: skip
CONFIG = {"backbone": "test_convnext", "size": 32}


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def data(tiny_world, tiny_crops):
    return read_manifest(tiny_world / "manifest.parquet"), read_index(tiny_crops), CropStore(tiny_crops)


@pytest.fixture
def run(data, tmp_path):
    """Train into a folder by name; keywords change options, `config` the network, `data` what is trained on."""

    def call(name="run", config=None, data=data, **options):
        return train("convnext", CONFIG | (config or {}), *data, tmp_path / name, Options(**OPTIONS | options))

    return call


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def kill_at(monkeypatch, function, call):
    """Let `training.function` raise Killed at its n-th call (from 1)."""
    true, calls = getattr(training, function), []

    def dying(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return true(*arguments, **keywords)

    monkeypatch.setattr(training, function, dying)


@pytest.mark.parametrize("options", [{}, {"ema": 0.7}, {"shuffle": True}, {"source": "fakes"}, {"sam": 0.05}])
def test_killed_and_resumed_equals_uninterrupted(run, monkeypatch, tmp_path, options):
    config = {"drop_path": 0.4}  # noise, so that the random state counts
    whole = run("whole", config, epochs=4, **options)
    with monkeypatch.context() as patch:
        kill_at(patch, "validate", 3)
        with pytest.raises(Killed):
            run("cut", config, epochs=4, **options)
    state = torch.load(tmp_path / "cut" / training.STATE, weights_only=True)
    assert len(state["history"]) == 2 and not (tmp_path / "cut/config.json").exists()
    with monkeypatch.context() as patch:
        calls = []
        true = training._epoch
        patch.setattr(training, "_epoch", lambda *a: calls.append(1) or true(*a))
        cut = run("cut", config, epochs=4, **options)
    assert len(calls) == 2, "the first two epochs are not repeated"
    assert weights(cut) == weights(whole) and (cut / "config.json").read_text() == (whole / "config.json").read_text()
    assert sorted(p.name for p in cut.iterdir()) == ["config.json", "epochs.json", "model.safetensors"]


def test_training_time_leaves_out_the_pause_of_an_interrupted_one(tmp_path, monkeypatch):
    clock = iter([100.0, 110, 120, 9000, 9010, 5, 8])
    monkeypatch.setattr(training.time, "time", lambda: next(clock))
    assert np.isnan(training.seconds_of(tmp_path))
    for epochs in (1, 2, 3):
        training.save_state(tmp_path / training.STATE, {"history": [{}] * epochs})
    assert training.seconds_of(tmp_path) == 30
    for epochs in (4, 5):  # resumed after a night
        training.save_state(tmp_path / training.STATE, {"history": [{}] * epochs})
    assert training.seconds_of(tmp_path) == 50
    training.save_state(tmp_path / training.STATE, {"history": [{}]})  # another training in the same folder
    assert np.isnan(training.seconds_of(tmp_path))
    training.save_state(tmp_path / training.STATE, {"history": [{}, {}]})
    assert training.seconds_of(tmp_path) == 6


def test_killed_after_the_last_epoch_or_while_saving(run, monkeypatch):
    whole = run("whole")
    for where in ("save_checkpoint", "write_atomic"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if where == "save_checkpoint":
                patch.setattr(training.base, where, lambda *a, **k: (_ for _ in ()).throw(Killed))
            else:
                kill_at(patch, "save_state", 2)
            run(where)
        assert weights(run(where)) == weights(whole)


def test_two_runs_agree_another_seed_does_not_and_nothing_else_is_reseeded(run):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = weights(run("one", {"drop_path": 0.2}))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    np.random.seed(1)
    assert weights(run("two", {"drop_path": 0.2})) == one
    assert weights(run("three", {"drop_path": 0.2}, seed=1)) != one


def test_loader_processes_change_nothing(run):
    assert weights(run("here")) == weights(run("there", loaders=1))


def test_the_average_of_the_weights_is_what_is_validated_and_kept(run, monkeypatch):
    raw, shown = [], []
    epoch, validate = training._epoch, training.validate

    def spy_epoch(accelerator, parts, *rest):
        losses = epoch(accelerator, parts, *rest)
        raw.append(parts["detector"].state_dict()["head.weight"].clone())
        return losses

    def spy_validate(detector, loader):
        shown.append(detector.state_dict()["head.weight"].clone())
        return validate(detector, loader)

    monkeypatch.setattr(training, "_epoch", spy_epoch)
    monkeypatch.setattr(training, "validate", spy_validate)
    folder = run(ema=0.75, epochs=3, batch=100)  # one step an epoch
    expected = raw[0]
    for now, average in zip(raw, shown, strict=True):
        expected = 0.75 * expected + 0.25 * now
        torch.testing.assert_close(average, expected)
    detector, card = load_checkpoint(folder)
    best = min(range(3), key=lambda i: card["history"][i]["val_loss"])
    torch.testing.assert_close(detector.head.weight.detach(), shown[best])


@pytest.mark.parametrize("patience, epochs", [(1, 3), (2, 6), (3, 7), (0, 7)])
def test_patience_stops_and_the_best_epoch_is_kept(run, monkeypatch, patience, epochs):
    losses, shown = [0.9, 0.5, 0.5, 0.4, 0.6, 0.7, 0.8], []

    def scripted(detector, loader):
        shown.append(detector.state_dict()["head.weight"].clone())
        return {"val_auc": 0.5, "val_loss": losses[len(shown) - 1]}

    monkeypatch.setattr(training, "validate", scripted)
    detector, card = load_checkpoint(run(patience=patience, epochs=7))
    assert len(card["history"]) == len(shown) == epochs
    best = min(range(epochs), key=losses.__getitem__)
    assert torch.equal(detector.head.weight.detach(), shown[best])


@pytest.mark.parametrize("source", ["sbi", "fakes"])
def test_the_test_split_cannot_reach_the_checkpoint(run, data, source):
    manifest, index, store = data
    poisoned = manifest.copy()
    test = poisoned["split"] == "test"
    poisoned.loc[test, "label"] = 1 - poisoned.loc[test, "label"]
    poisoned["method"] = np.where(poisoned["label"] == 1, "poison", "real")
    poisoned["method"] = poisoned["method"].where(test, manifest["method"])
    assert (poisoned != manifest).sum().sum() == 2 * test.sum() > 0
    without = index[~index["item_id"].isin(manifest.loc[test, "item_id"])]
    assert 0 < len(without) < len(index)
    shuffled = without.sample(frac=1, random_state=0)
    clean, other = run("clean", source=source), run("poisoned", data=(poisoned, shuffled, store), source=source)
    assert weights(clean) == weights(other)
    assert (clean / "config.json").read_text() == (other / "config.json").read_text()


@pytest.mark.parametrize("source, labels", [("sbi", [0]), ("fakes", [0, 1])])
def test_no_test_face_is_ever_opened_and_a_fake_only_under_supervision(run, data, tiny_crops, source, labels):
    manifest, index, _ = data
    opened = set()

    class Watched(CropStore):
        def image(self, row, check=False):
            opened.add(row["item_id"])
            return super().image(row, check)

    run(data=(manifest, index, Watched(tiny_crops)), source=source, epochs=8)
    allowed = manifest[manifest["label"].isin(labels) & manifest["split"].isin(["train", "val"])]
    assert opened <= set(allowed["item_id"])
    assert set(allowed.query("label == 0")["item_id"]) <= opened
    assert any(manifest.set_index("item_id").loc[list(opened), "label"]) == (source == "fakes")


def test_the_last_epoch_is_kept_on_demand(run, monkeypatch):
    losses = iter([0.1, 0.5, 0.1, 0.5])
    seen = []

    def judge(detector, loader):
        seen.append({k: v.detach().clone() for k, v in detector.state_dict().items()})
        return {"val_auc": 0.5, "val_loss": next(losses)}

    monkeypatch.setattr(training, "validate", judge)
    for select, kept in (("best", 0), ("last", 3)):
        state = load_checkpoint(run(select, select=select))[0].state_dict()
        assert all(torch.equal(state[k], seen[kept][k]) for k in state), select
    with pytest.raises(TrainingError, match="best or last"):
        run("other", select="first")


def test_the_shuffled_control_flips_the_same_half_every_time():
    rows = [{"item_id": f"{i:016x}", "frame": f} for i in range(100) for f in range(10)]
    options = Options(**OPTIONS, shuffle=True)
    flipped = training._flips(rows, options)
    assert 0.45 < flipped.double().mean() < 0.55 and flipped.dtype == torch.bool
    order = np.random.default_rng(0).permutation(1000)
    assert torch.equal(training._flips([rows[i] for i in order], options), flipped[order])
    assert not torch.equal(training._flips(rows, Options(**OPTIONS | {"seed": 1}, shuffle=True)), flipped)
    assert not training._flips(rows, Options(**OPTIONS)).any()


def test_flipped_pairs_have_their_labels_exchanged():
    class Fixed:
        def prepare(self, images):
            return images

        def with_boundary(self, images):
            return torch.tensor([-2.0, 3.0]), torch.zeros(2, 4, 4)

    def loss(flipped, boundary):
        fixed = Fixed()
        batch = torch.zeros(1, 2, 8, 8, 3), torch.zeros(1, 2, 4, 4)
        return training._loss(fixed, fixed.with_boundary, *batch, boundary, torch.tensor([flipped])).item()

    def entropy(real, fake):  # softplus of the wrong sign
        return (math.log1p(math.exp(real)) + math.log1p(math.exp(-fake))) / 2

    assert loss(False, 0.0) == pytest.approx(entropy(-2, 3))
    assert loss(True, 0.0) == pytest.approx(entropy(2, -3))
    assert loss(False, 0.5) == pytest.approx(entropy(-2, 3) + 0.5 * math.log(2))


@pytest.mark.parametrize("options, expected", [({}, 0.7), ({"shuffle": True}, 0.0), ({"source": "fakes"}, 0.0)])
def test_the_boundary_is_taught_where_there_is_one_that_does_not_give_the_label_away(
    run, monkeypatch, options, expected
):
    true, seen = training._loss, set()

    def spy(detector, forward, images, edges, boundary, flipped):
        seen.add(boundary)
        return true(detector, forward, images, edges, boundary, flipped)

    monkeypatch.setattr(training, "_loss", spy)
    run(boundary=0.7, epochs=1, **options)
    assert seen == {expected}


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [training.schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert [training.schedule(s, 2, 0.0) for s in range(2)] == [1, 1] and training.schedule(0, 1, 0.1) == 1


def test_the_schedule_reaches_the_optimizer(run, monkeypatch):
    used, epoch = [], training._epoch

    def spy(accelerator, parts, *rest):
        used.append(parts["optimizer"].param_groups[0]["lr"])
        return epoch(accelerator, parts, *rest)

    monkeypatch.setattr(training, "_epoch", spy)
    run(epochs=4, batch=100, warmup=0.5)
    assert used == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])


def test_a_loss_that_is_no_number_stops_with_advice(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="lower train.lr"):
        patch.setattr(training, "validate", lambda *a: pytest.fail("the epoch went on"))
        run(lr=1e30, warmup=0.0)
    assert not (tmp_path / "run/config.json").exists()
    # Weights can also break in the last step, when only validation sees them.
    epoch = training._epoch

    def breaking(accelerator, parts, *rest):
        losses = epoch(accelerator, parts, *rest)
        torch.nn.init.constant_(parts["detector"].head.weight, float("nan"))
        return losses

    monkeypatch.setattr(training, "_epoch", breaking)
    with pytest.raises(TrainingError, match="lower train.lr"):
        run("last")


def test_a_finished_run_returns_at_once_and_any_change_trains_anew(run, data, monkeypatch):
    manifest, index, store = data
    folder = run(loaders=0)
    before, stamp = weights(folder), (folder / "config.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(training, "_fit", lambda *a: pytest.fail("trained although nothing changed"))
        run()
        run(loaders=1)
        shuffled = manifest.sample(frac=1, random_state=0), index.sample(frac=1, random_state=0), store
        run(data=shuffled)
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    seen = {before, weights(run(lr=2e-3))}
    seen.add(weights(run(config={"frequency": "none"})))
    seen.add(weights(run(shuffle=True)))
    fewer = index[index["item_id"] != real_crops(index, manifest, "train")["item_id"].iloc[0]]
    seen.add(weights(run(data=(manifest, fewer, store))))
    moved = index.assign(landmarks=[points + 1 for points in index["landmarks"]])
    seen.add(weights(run(data=(manifest, moved, store))))
    assert len(seen) == 6
    assert weights(run()) == before
    trained = []
    monkeypatch.setattr(training, "source_hash", lambda *modules: "other code")
    monkeypatch.setattr(training, "_fit", lambda *a: trained.append(1))
    run()
    assert trained


def test_training_can_start_from_the_weights_of_a_checkpoint(run, monkeypatch):
    first, started = run("first"), []

    def spy(accelerator, detector, *rest):
        started.append(detector.head.weight.detach().clone())
        return fit(accelerator, detector, *rest)

    fit = training._fit
    monkeypatch.setattr(training, "_fit", spy)
    head = load_checkpoint(first)[0].head.weight.detach()
    second = run("second", init=str(first))
    third = run("third", init=str(first), shuffle=True)
    assert torch.equal(started[0], head) and not torch.equal(started[1], head), "the control knows nothing"
    assert len({weights(folder) for folder in (first, second, third)}) == 3
    run("second", init=str(first))
    assert len(started) == 2, "unchanged"
    before = run("first", lr=2e-3)
    run("second", init=str(before))
    assert torch.equal(started[3], load_checkpoint(before)[0].head.weight.detach()), "other weights by the same name"


def test_weights_that_cannot_be_started_from_are_refused(run):
    first = run("first")
    with pytest.raises(TrainingError, match="another architecture; set train.init=none"):
        run("other", config={"backbone": "convnext_zepto_rms"}, init=str(first))
    with pytest.raises(TrainingError, match="another architecture; set train.init=none"):
        training._start("residual", {"size": 64}, Options(**OPTIONS | {"init": str(first)}))
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        run("other", init="convnext-nowhere")
    (first / "model.safetensors").write_bytes(b"x" * 64)
    with pytest.raises(CheckpointError, match="are not those"):
        run("other", init=str(first))


def test_the_weights_that_come_with_the_kit_fit_the_demo_profile():
    profile = load_profile("demo")
    options = Options(seed=0, recipe=profile.sbi.recipe, **profile.train)
    detector, kept = training._start("convnext", dict(profile.convnext), options), training._init_folder(options)
    detector.eval(), load_checkpoint(kept)
    assert kept.parent.name == "weights" and all(torch.isfinite(p).all() for p in detector.parameters())


def test_an_interrupted_run_with_other_options_is_not_resumed(run, monkeypatch):
    expected = weights(run("fresh", lr=5e-4))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "validate", 2)
        run("old", lr=1e-3)
    assert weights(run("old", lr=5e-4)) == expected


def test_what_cannot_be_trained_says_so(run, data):
    manifest, index, store = data
    with pytest.raises(TrainingError, match="no crop of a real face in the val split"):
        run(data=(manifest[manifest["split"] != "val"], index, store))
    with pytest.raises(TrainingError, match="`convnext` keys: .*multiple of 32"):
        run(config={"size": 50})
    with pytest.raises(TrainingError, match="`convnext` keys"):
        run(config={"backbone": "convnext_of_nowhere"})
