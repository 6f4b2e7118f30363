"""Three stages end to end: what changes in each, kills that change nothing, caches and processes that do neither."""

import json
import os
import socket
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny_clips
import torch
from accelerate import Accelerator
from conftest import tiny_profile
from torch import multiprocessing

from unmask import d2st_fitting, prefixes
from unmask import d2st_training as training
from unmask.clip_training import Faces
from unmask.d2st_fitting import Fitter
from unmask.d2st_training import Run, banks, build, new_accelerator, options_of, train
from unmask.data.manifest import read_manifest, write_manifest
from unmask.detectors import base
from unmask.pairs import TrainingError

STAGES = (1, 2, 3)
FEW = {
    "d2st__placement": "last-2", "d2st__frames": 4, "d2st__versions": 1, "d2st__samples": [16, 10, 10],
    "d2st__epochs": [2, 2, 2], "d2st__batch": [8, 5, 5], "d2st__mmd": 0.05,
}  # fmt: skip


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def faces(tiny_world, dense_crops, tmp_path_factory):
    return Faces(tiny_world / "manifest.parquet", dense_crops, tmp_path_factory.mktemp("d2st-training"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clips.write(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def profile(clip):
    return tiny_profile(clip__backbone=clip, **FEW)


def falling(patch):
    """Make validation losses fall, so that the weights of the last epoch are kept."""
    true, losses = Fitter.validate, []
    patch.setattr(Fitter, "validate", lambda one: true(one) | {"val_loss": -len(losses.append(0) or losses)})


@pytest.fixture(scope="module")
def kept(profile, faces, tmp_path_factory):
    """Folders of the checkpoints of all stages, each begun with the one before and kept after its last epoch."""
    found = {0: None}
    with pytest.MonkeyPatch.context() as patch:
        falling(patch)
        for stage in STAGES:
            run = Run("d2st", stage, profile, faces, 0, found[stage - 1])
            found[stage] = train(run, tmp_path_factory.mktemp("kept") / f"stage-{stage}")
    return found


def weights(folder):
    return base.read_checkpoint(folder)[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start(run):
    """The weights that a run begins with."""
    if run.init is not None:
        return weights(run.init)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        return build(run.name, run.profile).state_dict()


def certain(names):
    """Names without those of the keys' biases, which softmax cancels: rounding alone moves them."""
    return {name for name in names if not name.endswith(".key.bias")}


def moves(name, stage):
    """Whether a stage changes a weight, from the plan of the stages."""
    if name.startswith("linear."):
        return True
    inner = name.split(".", 2)[2]
    if stage == 3:
        return inner.startswith("up.") or (".out." in inner or ".norm." in inner) and "offsets" not in inner
    return stage == 2 or not inner.startswith(("paths.temporal.", "time."))


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_changes_its_own_weights_alone(stage, kept, profile, faces):
    before, after = start(Run("d2st", stage, profile, faces, 0, kept[stage - 1])), weights(kept[stage])
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert certain(changed) == certain(name for name in after if moves(name, stage))
    assert {name.split(".")[0] for name in after} == {"adapters", "linear"}
    detector, card = base.load_checkpoint(kept[stage])
    assert card["stage"] == stage and len(card["history"]) == 2 and card["seed"] == 0
    assert card["init"] == (base.read_checkpoint(kept[stage - 1])[1]["sha256"] if stage > 1 else "")
    assert card["options"]["terms"].keys() == card["history"][0].keys() & card["options"]["terms"].keys()
    assert not (kept[stage] / training.STATE).exists()
    seen = {name for name in card["history"][0] if name.startswith("val_")} - {"val_loss"}
    assert seen == {1: {"val_image_auc"}, 2: {"val_clip_auc", "val_time_auc"},
                    3: {"val_image_auc", "val_clip_auc", "val_time_auc"}}[stage]  # fmt: skip


def test_the_temporal_pathway_adds_nothing_before_stage_2(kept):
    images = tiny_clips.images(8).unflatten(0, (2, 4))
    for stage in (1, 2):
        detector = base.load_checkpoint(kept[stage])[0]
        plain = detector(images)
        for adapter in detector.adapters:
            for parameter in adapter.paths["temporal"].query.parameters():
                parameter.data += 1
            adapter.paths["temporal"].value.weight.data *= 3
        assert torch.equal(detector(images), plain) == (stage == 1)


def test_an_st_adapter_goes_the_same_way(profile, faces, tmp_path):
    init = None
    for stage in STAGES:
        run = Run("st-adapter", stage, profile, faces, 0, init)
        before, init = start(run), train(run, tmp_path / str(stage))
        after = weights(init)
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert certain(changed) == certain(name for name in after if moves(name, stage))


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_equals_uninterrupted(stage, kept, profile, faces, tmp_path, monkeypatch):
    falling(monkeypatch)
    run = Run("d2st", stage, profile, faces, 0, kept[stage - 1])
    whole = train(run, tmp_path / "whole")
    true, steps = Fitter._learn, []

    def learn(fitter, batch):
        if len(steps) == 3:  # in the middle of the second epoch
            raise Killed
        steps.append(batch)
        return true(fitter, batch)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Fitter, "_learn", learn)
        train(run, tmp_path / "cut")
    torch.manual_seed(99)  # whatever else a process did before
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Fitter, "_learn", lambda fitter, batch: steps.append(batch) or true(fitter, batch))
        patch.setattr(base, "save_checkpoint", lambda *given, **card: (_ for _ in ()).throw(Killed))
        train(run, tmp_path / "cut")
    assert len(steps) == 3 + 2, "the first epoch is not done again"
    monkeypatch.setattr(Fitter, "_learn", lambda *given: pytest.fail("trained again"))
    assert same(weights(train(run, tmp_path / "cut")), weights(whole))
    cards = [base.read_checkpoint(tmp_path / name)[1] for name in ("whole", "cut")]
    histories = [[{k: v for k, v in one.items() if k != "val_loss"} for one in card["history"]] for card in cards]
    assert histories[0] == histories[1] and cards[0]["training_key"] == cards[1]["training_key"]


def test_finished_and_unchanged_is_not_done_again(kept, profile, faces, monkeypatch):
    run = Run("d2st", 2, profile, faces, 0, kept[1])
    monkeypatch.setattr(Fitter, "run", lambda *given: (_ for _ in ()).throw(Killed))
    assert train(run, kept[2]) == kept[2]
    lr = profile.d2st.lr
    other = replace_terms(profile, lr=[lr[0], 2 * lr[1], lr[2]])
    for changed in (replace(run, profile=other), replace(run, seed=1)):
        with pytest.raises(Killed):
            train(changed, kept[2])
    assert train(Run("d2st", 1, other, faces, 0), kept[1]) == kept[1], "what another stage does is none of its business"


def fitter(stage, profile, faces, init=None, head=0.0):
    """A fitter of a stage, with noise on the adapters and, `head` times as much, on the head."""
    run = Run("d2st", stage, profile, faces, 0, init)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        detector = training._start(run)[0]
        for parameter in detector.adapters.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
        detector.linear.weight.data += head * 0.2 * torch.randn(detector.linear.weight.shape)
        own, state = new_accelerator(), faces.features / "none"
        return Fitter(own, detector, banks(run, detector, 0), options_of(run), state, "")


@pytest.mark.parametrize("stage", STAGES)
def test_cached_tokens_give_the_loss_of_live_ones(stage, kept, clip, faces, monkeypatch):
    cached, live = (tiny_profile(clip__backbone=clip, **FEW, d2st__cache=cache) for cache in (True, False))
    kinds = {"bf16": fitter(stage, cached, faces, kept[stage - 1])}
    with monkeypatch.context() as patch:
        patch.setattr(prefixes, "of_clips", partial(prefixes.of_clips, precision="fp32"))
        kinds["fp32"] = fitter(stage, cached, faces, kept[stage - 1])
    kinds["live"] = fitter(stage, live, faces, kept[stage - 1])
    assert [type(one.banks["train"]).__name__ for one in kinds.values()] == ["Prefixes", "Prefixes", "LivePrefixes"]
    for batch in kinds["live"].plan(0):
        with torch.no_grad():
            losses = {name: one.loss_of(batch)[0].item() for name, one in kinds.items()}
        assert losses["fp32"] == pytest.approx(losses["live"], abs=1e-5)
        assert losses["bf16"] == pytest.approx(losses["live"], abs=1e-3) and losses["bf16"] != losses["fp32"]


@torch.no_grad()
def test_the_loss_of_a_batch_is_that_of_its_units(kept, profile, faces):
    """Labels, kinds and pairs reach the losses in the order of the outputs, which a share sorts by length."""
    one = fitter(3, replace_terms(profile, agreement=1.0), faces, kept[2], head=2.0)
    table, detector = one.banks["train"].table, one.step.detector
    clips = {i: one.banks["train"].tokens([i])[0] for i in table.index}

    def logit(clip, t):
        frames = clips[clip] if t < 0 else clips[clip][t : t + 1]
        return detector.head(detector.embed(frames, [(1, len(frames))]).mean(0)[None]).item()

    for batch in one.plan(0):
        cross = {"image": [], "clip": []}
        for clip, t in batch.units:
            if t < 0 or table["kind"][clip] in ("medium", "real", "blend"):
                sign = 1 - 2 * table["label"][clip]
                cross["clip" if t < 0 else "image"].append(np.logaddexp(0, sign * logit(clip, t)))
        apart = []
        for (clip, _), (own, t) in zip(batch.clips, batch.own, strict=True):
            if clip == own and table["kind"][clip] in ("medium", "real", "blend"):
                p, q = (1 / (1 + np.exp(-logit(clip, at) / 2)) for at in (-1, t))
                apart.append(4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))))
        terms = one.loss_of(batch)[1]
        assert terms["image_ce"].item() == pytest.approx(np.mean(cross["image"]), abs=1e-5)
        assert terms["clip_ce"].item() == pytest.approx(np.mean(cross["clip"]), abs=1e-5)
        assert terms["agreement"].item() == pytest.approx(np.mean(apart), abs=1e-5) and np.mean(apart) > 1e-4


def replace_terms(profile, **terms):
    keys = {f"d2st__{name}": value for name, value in terms.items()}
    return tiny_profile(clip__backbone=profile.clip.backbone, **FEW | keys)


@torch.no_grad()
def test_edges_and_teachers_are_those_of_the_units(kept, profile, faces):
    one = fitter(1, profile, faces)
    table, bank = one.banks["train"].table, one.banks["train"]
    for batch in one.plan(0):
        facts = one._facts([batch])
        for k, (clip, t) in enumerate(batch.images):
            assert torch.equal(facts.edges[k], bank.edges([clip], 4)[0][0, t])
            assert facts.known[k] == (table["kind"][clip] != "medium" or table["label"][clip] == 0)
    two = fitter(2, profile, faces, kept[1])
    detector = two.step.detector
    for clip in table.index:
        tokens = two.banks["train"].tokens([clip])[0]
        alone = detector.head(detector.embed(tokens, [(len(tokens), 1)])).mean().item()
        carried = table["kind"][clip] in ("medium", "real", "blend") and table["frames"][clip] > 1
        assert two.teacher[clip].item() == pytest.approx(alone if carried else 0.0, abs=1e-5)
    assert fitter(2, replace_terms(profile, distillation=0.0), faces, kept[1]).teacher is None


def test_validation_is_that_of_its_units(kept, profile, faces):
    one = fitter(3, profile, faces, kept[2])
    table, detector = one.banks["val"].table, one.step.detector
    found = {"image": [], "clip": [], "time": []}
    with torch.no_grad():
        for clip, row in table.iterrows():
            tokens = one.banks["val"].tokens([clip])[0]
            carried = row["kind"] in ("medium", "real", "blend")
            alone = detector.head(detector.embed(tokens, [(len(tokens), 1)]))[:, 0].tolist()
            found["image"] += [(row["label"], z) for z in alone if carried]
            if row["frames"] > 1:
                both = row["label"], detector.head(detector.embed(tokens, [(1, 4)]).mean(0)[None]).item()
                found["clip"].append(both)
                found["time"] += [] if carried else [both]
    losses = []
    got = one.validate()
    for name, units in found.items():
        real, fake = ([z for label, z in units if label == k] for k in (0, 1))
        wins = np.mean([(b > a) + 0.5 * (b == a) for a in real for b in fake])
        assert got[f"val_{name}_auc"] == pytest.approx(wins, abs=1e-6)
        if name != "time":
            losses += [np.mean(np.logaddexp(0, real)), np.mean(np.logaddexp(0, -np.array(fake)))]
    assert got["val_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def recorded(monkeypatch):
    """Lists that fill with the rates and weights of every step."""
    true, found = Fitter._learn, []

    def learn(one, batch):
        out = true(one, batch)
        rates = {group["part"]: group["lr"] for group in one.optimizer.param_groups}
        found.append((rates, {name: value.clone() for name, value in one.step.state_dict().items()}))
        return out

    monkeypatch.setattr(Fitter, "_learn", learn)
    return found


@pytest.mark.parametrize("decay", [0.98, 0.2, 0.0])
def test_what_is_kept_is_the_average_over_the_steps(decay, profile, faces, tmp_path, monkeypatch):
    run = Run("d2st", 1, replace_terms(profile, ema=decay, epochs=[1, 1, 1]), faces, 0)
    average, steps = start(run), recorded(monkeypatch)
    out = weights(train(run, tmp_path))
    assert len(steps) == 2
    for n, (_, own) in enumerate(steps, 1):
        keep = min(decay, (1 + n) / (10 + n))
        average = {name: keep * value + (1 - keep) * own[f"detector.{name}"] for name, value in average.items()}
    for name, value in out.items():
        torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5)
    last = {name for name, value in out.items() if not torch.equal(value, steps[-1][1][f"detector.{name}"])}
    assert certain(last) == certain(name for name in out if decay and moves(name, 1))


def test_averaging_does_not_touch_what_is_trained(profile, faces, tmp_path, monkeypatch):
    steps = recorded(monkeypatch)
    for decay in (0.98, 0.0):
        train(Run("d2st", 1, replace_terms(profile, ema=decay), faces, 0), tmp_path / str(decay))
    assert len(steps) == 8
    assert all(same(a[1], b[1]) for a, b in zip(steps[:4], steps[4:], strict=True))


@pytest.mark.parametrize("even", [True, False])
def test_rates_warm_up_and_fall_and_offsets_of_the_spatial_pathway_wait(
    even, kept, profile, faces, tmp_path, monkeypatch
):
    steps = recorded(monkeypatch)
    changed = replace_terms(profile, lr=[1e-3, 4e-3, 1e-4], warmup=0.25, even_rates=even)  # one of four steps
    train(Run("d2st", 2, changed, faces, 0, kept[1]), tmp_path)
    full = {"temporal": 4e-3, "shared": 1e-3, "head": 1e-3, "spatial": 4e-4, "spatial offsets": 4e-4}
    full = dict.fromkeys(full, 4e-3) if even else full
    for k, (rates, _) in enumerate(steps):
        share = 1 if k == 0 else 0.5 * (1 + np.cos(np.pi * (k - 1) / 3))
        assert rates == pytest.approx({n: 0 if "offsets" in n and k < 2 else share * x for n, x in full.items()})
    first, last = steps[1][1], steps[3][1]
    before = weights(kept[1])
    waiting = {name for name, value in before.items() if torch.equal(first[f"detector.{name}"], value)}
    assert certain(waiting) == {name for name in before if "paths.spatial.offsets." in name}
    assert not certain(name for name, value in before.items() if torch.equal(last[f"detector.{name}"], value))


def test_no_decay_for_biases_norms_and_embeddings(profile, faces, clip, tmp_path, monkeypatch):
    one = fitter(1, replace_terms(profile, embedding=True), faces)
    names = {id(p): name for name, p in one.step.named_parameters()}
    for group in one.optimizer.param_groups:
        for p in group["params"]:
            free = names[id(p)].endswith((".bias", "embedding")) or ".norm." in names[id(p)]
            assert group["weight_decay"] == (0 if free else profile.d2st.weight_decay), names[id(p)]


def test_the_epoch_with_the_lowest_validation_loss_is_kept(profile, faces, tmp_path, monkeypatch):
    losses, seen = iter([0.3, 0.9]), []
    monkeypatch.setattr(Fitter, "validate", lambda one: seen.append(
        {k: v.clone() for k, v in one.step.state_dict().items()}) or {"val_loss": next(losses)})  # fmt: skip
    out = weights(train(Run("d2st", 1, profile, faces, 0), tmp_path))
    for name, value in out.items():
        assert torch.equal(value, seen[0][f"detector.{name}"])
    assert not torch.equal(out["linear.weight"], seen[1]["detector.linear.weight"])


def test_labels_of_the_test_split_reach_nothing(kept, profile, faces, tmp_path, monkeypatch):
    falling(monkeypatch)
    df = read_manifest(faces.manifest)
    test = df["split"] == "test"
    roots = [str((faces.manifest.parent / root).resolve()) for root in df["root"]]
    df = df.assign(root=roots, label=df["label"].where(~test, 1 - df["label"]).astype("int8"))
    df.loc[test, "method"] = np.where(df.loc[test, "label"] == 0, "real", "swap")
    write_manifest(df, tmp_path / "poisoned.parquet")
    poisoned, init = replace(faces, manifest=tmp_path / "poisoned.parquet"), None
    for stage in STAGES:
        init = train(Run("d2st", stage, profile, poisoned, 0, init), tmp_path / str(stage))
        assert same(weights(init), weights(kept[stage]))
        keys = [json.loads((folder / base.CONFIG).read_text())["training_key"] for folder in (init, kept[stage])]
        assert keys[0] == keys[1]


def test_where_a_stage_begins(kept, profile, faces, tmp_path):
    def begin(name="d2st", stage=2, init=None, **keys):
        train(Run(name, stage, replace_terms(profile, **keys), faces, 0, init), tmp_path / "out")

    with pytest.raises(TrainingError, match="Stage 2 begins where stage 1 ended: .* by --init"):
        begin()
    with pytest.raises(TrainingError, match="is not a checkpoint of stage 2 of d2st"):
        begin(stage=3, init=kept[1])
    with pytest.raises(TrainingError, match="is not a checkpoint of stage 1 of st-adapter"):
        begin("st-adapter", init=kept[1])
    with pytest.raises(base.CheckpointError, match="is not a checkpoint"):
        begin(init=tmp_path / "nothing")
    with pytest.raises(TrainingError, match="1, 2 and 3, not 4"):
        begin(stage=4)
    with pytest.raises(TrainingError, match="has d2st.frames=4, and the profile 3"):
        begin(init=kept[1], frames=3)
    with pytest.raises(TrainingError, match="has d2st.pathways"):
        begin(init=kept[1], pathways=["spatial"])
    with pytest.raises(TrainingError, match="cannot be built .* placement"):
        begin(stage=1, placement="last-9")
    with pytest.raises(TrainingError, match="Stage 1 begins with the CLIP alone"):
        begin(stage=1, init=kept[1])
    with pytest.raises(TrainingError, match="needs four frames, stage 1 learns from one"):
        begin(stage=1, mode="reference")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_learned_from_is_said(kept, profile, faces, monkeypatch):
    one = fitter(2, profile, faces, kept[1])
    table = one.banks["train"].table
    monkeypatch.setitem(one.banks, "train", replace(one.banks["train"], table=table[table["label"] == 0]))
    with pytest.raises(TrainingError, match="Stage 2 cannot learn .* no fake ones"):
        one.plan(0)
    monkeypatch.setitem(one.banks, "val", replace(one.banks["val"], table=one.banks["val"].table.query("frames == 1")))
    with pytest.raises(TrainingError, match="nothing to choose the epoch by"):
        one.validate()
    one = fitter(1, replace_terms(profile, batch=[1, 1, 1]), faces)
    monkeypatch.setattr(Fitter, "_processes", 2)
    with pytest.raises(TrainingError, match="d2st.batch is too small to be shared by 2"):
        one.plan(0)


def test_a_training_that_diverges_ends_with_a_sentence(profile, faces, tmp_path, monkeypatch):
    true = d2st_fitting.loss
    monkeypatch.setattr(d2st_fitting, "loss", lambda *given: (true(*given)[0] * float("nan"), {}))
    monkeypatch.setattr(Fitter, "judge", lambda *given: pytest.fail("went on"))
    with pytest.raises(TrainingError, match="d2st.lr"):
        train(Run("d2st", 1, profile, faces, 0), tmp_path)


def test_chains_side_by_side_share_what_is_computed_once(kept, profile, faces, tmp_path, monkeypatch):
    def one_after_another(function, tasks, workers, label):
        monkeypatch.setattr(prefixes, "_make_shard", lambda *given: pytest.fail("computed again"))
        return [function(*task) for task in tasks]

    falling(monkeypatch)
    monkeypatch.setattr(training, "side_by_side", one_after_another)
    fresh = replace(faces, features=tmp_path / "features")
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    chain = {first: Run("d2st", 1, profile, fresh, 0), second: Run("d2st", 2, profile, fresh, 0, first)}
    training.train_all([chain, {other: Run("st-adapter", 1, profile, fresh, 0)}], 0)
    assert same(weights(first), weights(kept[1])) and same(weights(second), weights(kept[2]))
    assert base.load_checkpoint(other)[0].name == "st-adapter"


def test_nothing_global_is_drawn_from(profile, faces, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(Run("d2st", 1, replace_terms(profile, epochs=[1, 1, 1]), faces, 0), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def _process(rank, port, runs, out):
    """One of two processes: trains, and leaves the losses of all steps."""
    about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in about.items()} | {"ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    true, losses = Fitter._learn, []
    Fitter._learn = lambda one, batch: losses.append(true(one, batch)) or losses[-1]
    for run, folder in runs:
        train(run, folder)
    assert Accelerator().num_processes == 2
    (out / f"{rank}.json").write_text(json.dumps(losses))


def test_two_processes_learn_as_one(profile, faces, kept, tmp_path, monkeypatch):
    """Batches of five, whose shares differ; the cache is computed by one of the two while the other waits."""
    keys = {"samples": [15, 10, 10], "batch": [5, 5, 5], "epochs": [1, 2, 1]}
    changed, true, alone = replace_terms(profile, **keys), Fitter._learn, []
    monkeypatch.setattr(Fitter, "_learn", lambda one, batch: alone.append(true(one, batch)) or alone[-1])
    for stage in STAGES:
        train(Run("d2st", stage, changed, faces, 0, kept[stage - 1]), tmp_path / f"one-{stage}")
    monkeypatch.undo()
    fresh = replace(faces, features=tmp_path / "features")
    runs = [(Run("d2st", s, changed, fresh, 0, kept[s - 1]), tmp_path / f"two-{s}") for s in STAGES]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    multiprocessing.spawn(_process, (port, runs, tmp_path), nprocs=2)
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert len(alone) == len(both[0]) == len(both[1]) == 3 + 2 * 2 + 2
    for expected, *got in zip(alone, *both, strict=True):
        assert got[0] == pytest.approx(expected, abs=1e-5) and got[1] == pytest.approx(expected, abs=1e-5)
    for stage in STAGES:
        one, two = (weights(tmp_path / f"{name}-{stage}") for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
