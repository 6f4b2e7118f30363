"""The stages of unsupervised detection: no label reaches any of them, a kill changes nothing, poor data is survived."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, tiny_profile

from unmask import cli, learning, unsupervised
from unmask.camera_evidence import CameraEvidence
from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest, write_manifest
from unmask.detectors.base import CheckpointError, load_checkpoint
from unmask.evaluation import read_scores, write_scores
from unmask.training import STATE, TIMES, TrainingError
from unmask.unsupervised import FEATURES_FILE, LABELS_FILE, STEPS, THRESHOLD_FILE, TRACES, TRACES_FILE, stage_folder

NETWORK = {
    "unsupervised.backbone": "test_convnext", "unsupervised.frequency": "none", "unsupervised.init": "none",
    "unsupervised.size": 32, "unsupervised.batch": 8, "unsupervised.contrastive_epochs": 3,
    "unsupervised.classifier_epochs": 2, "unsupervised.confidence": 1.0, "workers": 1,
}  # fmt: skip
SETTINGS = [part for key, value in (TINY | NETWORK).items() for part in ("--set", f"{key}={value}")]


def profile_of(**changes):
    return tiny_profile(**{key.replace(".", "__"): value for key, value in NETWORK.items()} | changes)


class Killed(BaseException):
    pass


def own_manifest(world, path, change=lambda manifest: manifest):
    """The world's manifest, changed, in another place: its media are found by an absolute root."""
    manifest = change(read_manifest(world / "manifest.parquet").assign(root=str(world.resolve())))
    write_manifest(manifest, path)
    return path


def exchanged(manifest):
    """The labels and methods are dealt out anew among the media; they go together, as the schema wants."""
    order = np.random.default_rng(11).permutation(len(manifest))
    dealt = manifest[["label", "method"]].iloc[order].reset_index(drop=True)
    return manifest.reset_index(drop=True).assign(label=dealt["label"], method=dealt["method"])


def stages(profile, crops, manifest, out):
    """Stages 1 to 3 with their control, and the scores of all videos."""
    unsupervised.run_stage(1, profile, out, crops, manifest, 0)
    for control in (False, True):
        unsupervised.represent(profile, crops, out, 0, control)
        unsupervised.classify(profile, crops, out, 0, control)
    items = read_manifest(manifest)["item_id"]
    clusters = pd.read_parquet(out / "cameras/clusters.parquet")
    return unsupervised.score(crops, out / "cameras/fingerprints", clusters, out, items, [0])


@pytest.fixture(scope="module")
def study(tiny_world, tiny_crops, tmp_path_factory):
    """Profile, crops, manifest, the folder that all stages have filled (not to be changed), and the scores."""
    home = tmp_path_factory.mktemp("study")
    manifest = own_manifest(tiny_world, home / "manifest.parquet")
    scores = stages(profile := profile_of(), tiny_crops, manifest, home / "out")
    return profile, tiny_crops, manifest, home / "out", scores


def left(folder):
    """What the files below a folder say: bytes, but for the seconds that a step took."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != TIMES):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content = pd.read_parquet(path).drop(columns="seconds", errors="ignore").to_json(double_precision=15)
        elif path.parent.name == "fingerprints" and path.suffix == ".json":
            note = json.loads(content)
            note["row"].pop("seconds")
            content = json.dumps(note)
        found[str(path.relative_to(folder))] = content
    return found


def differing(a, b):
    """Names of the files that are not the same in both folders."""
    a, b = left(a), left(b)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def restart(study, tmp_path, change=lambda clusters: clusters):
    """A folder with the cameras of the study alone, their table changed; returns it and the table."""
    shutil.copytree(study[3] / "cameras", tmp_path / "out/cameras")
    clusters = change(pd.read_parquet(tmp_path / "out/cameras/clusters.parquet"))
    clusters.to_parquet(tmp_path / "out/cameras/clusters.parquet", index=False)
    return tmp_path / "out", clusters


# ---- no label


def test_the_study_is_no_empty_case(study):
    profile, crops, manifest, out, scores = study
    labels = pd.read_parquet(out / LABELS_FILE)
    sure = unsupervised.surest(labels, profile.unsupervised.confidence)
    assert (sure[sure["split"] != "test"].groupby("split")["label"].nunique() == 2).all(), sure
    names = {f"stage{s}-{c}0/{f}" for s, f in ((2, "model.safetensors"), (3, TRACES_FILE), (3, THRESHOLD_FILE))
             for c in ("", "control-")}  # fmt: skip
    names |= {FEATURES_FILE, LABELS_FILE, "cameras.safetensors", "cameras.json", "cameras/clusters.parquet"}
    assert names <= left(out).keys() and not list(out.rglob(STATE))
    assert 0 < json.loads((out / "stage3-0" / THRESHOLD_FILE).read_text())["threshold"] < 1


def test_no_label_reaches_any_step(study, tiny_world, tmp_path):
    profile, crops, manifest, out, scores = study
    other = own_manifest(tiny_world, tmp_path / "manifest.parquet", exchanged)
    a, b = read_manifest(manifest), read_manifest(other)
    assert 0.2 < (a["label"] != b["label"]).mean() < 0.8 and (a["method"] != b["method"]).mean() > 0.4
    again = stages(profile, crops, other, tmp_path / "out")
    assert differing(out, tmp_path / "out") == []
    pd.testing.assert_frame_equal(again, scores, check_exact=True)


def without_fakes(manifest, clusters, index):
    rows = VIDEOS(manifest, clusters, index)
    fake = set(manifest.loc[manifest["label"] == 1, "item_id"])
    return rows[~rows["item_id"].isin(fake) | (rows["split"] != "train")].reset_index(drop=True)


def reals_first(manifest, clusters, index):
    rows = VIDEOS(manifest, clusters, index)
    return rows.iloc[np.argsort(rows["item_id"].map(manifest.set_index("item_id")["label"]), kind="stable")]


def by_method(manifest, clusters, index):
    rows = VIDEOS(manifest, clusters, index)
    swaps = set(manifest.loc[manifest["method"] == "swap", "item_id"])
    return rows.assign(cluster=rows["cluster"].where(~rows["item_id"].isin(swaps), -1))


VIDEOS = unsupervised.videos


@pytest.mark.parametrize("leak", [without_fakes, reals_first, by_method])
def test_a_stage_that_reads_labels_is_caught(study, tiny_world, tmp_path, monkeypatch, leak):
    profile, crops, manifest, out, _ = study
    other = own_manifest(tiny_world, tmp_path / "manifest.parquet", exchanged)
    monkeypatch.setattr(unsupervised, "videos", leak)
    folders = []
    for k, path in enumerate((manifest, other)):
        (tmp_path / str(k)).mkdir()
        folders.append(restart(study, tmp_path / str(k))[0])
        unsupervised.run_stage(1, profile, folders[-1], crops, path, 0)
    assert {FEATURES_FILE, LABELS_FILE} <= set(differing(*folders))


def test_later_stages_open_no_manifest(study, tmp_path, monkeypatch):
    profile, crops, manifest, out, scores = study
    for name in (FEATURES_FILE, LABELS_FILE, "cameras.safetensors", "cameras.json"):
        (tmp_path / "out").mkdir(exist_ok=True)
        shutil.copy(out / name, tmp_path / "out")
    monkeypatch.setattr(unsupervised, "read_manifest", lambda *a: pytest.fail("a manifest was read"))
    monkeypatch.setattr("unmask.data.manifest.read_manifest", lambda *a: pytest.fail("a manifest was read"))
    for stage in (2, 3):
        unsupervised.run_stage(stage, profile, tmp_path / "out", crops, None, 0)
    same = [name for name in left(tmp_path / "out") if name.startswith("stage")]
    assert same and not set(same) & set(differing(out, tmp_path / "out"))
    table = pd.read_parquet(out / FEATURES_FILE)
    assert not {"label", "method"} & set(table.columns)


# ---- a kill


def test_killed_and_resumed_is_uninterrupted(study, tmp_path, monkeypatch):
    profile, crops, _, out, _ = study
    for name in (FEATURES_FILE, LABELS_FILE, "cameras.safetensors", "cameras.json"):
        shutil.copy(out / name, tmp_path)
    for stage, run in ((2, unsupervised.represent), (3, unsupervised.classify)):
        true, calls = learning._epoch, []

        def dying(*arguments, true=true, calls=calls):
            if calls:
                raise Killed
            calls.append(1)
            return true(*arguments)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(learning, "_epoch", dying)
            run(profile, crops, tmp_path, 0)
        folder, whole = stage_folder(tmp_path, stage, 0), stage_folder(out, stage, 0)
        assert not (folder / "config.json").exists()
        assert len(torch.load(folder / STATE, weights_only=True)["history"]) == 1
        assert run(profile, crops, tmp_path, 0) == folder
        histories = [json.loads((f / "config.json").read_text())["history"] for f in (folder, whole)]
        assert len(histories[0]) == (3, 2)[stage - 2]
        for ours, theirs in zip(*histories, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
        assert differing(folder, whole) == []


def test_stage_3_killed_after_its_network_ends_what_is_missing(study, tmp_path, monkeypatch):
    profile, crops, _, out, _ = study
    shutil.copytree(out, tmp_path / "out")
    for name in (TRACES_FILE, THRESHOLD_FILE):
        (tmp_path / "out/stage3-0" / name).unlink()
    monkeypatch.setattr(learning, "fit", lambda *a: pytest.fail("the network was trained again"))
    unsupervised.classify(profile, crops, tmp_path / "out", 0)
    assert differing(out, tmp_path / "out") == []


# ---- which videos are learned from


def table_of(groups):
    """Labels: (split, cluster, label, cues, agree) each."""
    rows = [(split, cluster, label, cue, agree) for split, cluster, label, cues, agree in groups for cue in cues]
    table = pd.DataFrame(rows, columns=["split", "cluster", "label", "cue", "agree"])
    return table.assign(item_id=[f"{i:03}" for i in range(len(table))], confidence=0.7)


def test_the_surest_of_every_camera_and_label():
    labels = table_of([
        ("train", 0, 1, np.linspace(0.55, 0.95, 10), True), ("train", 0, 0, np.linspace(0.45, 0.05, 4), True),
        ("train", 1, 1, np.linspace(0.501, 0.505, 6), True), ("val", 0, 1, np.linspace(0.6, 0.9, 3), True),
        ("train", -1, 0, [0.3], True), ("train", 0, 1, [0.999] * 5, False), ("test", 0, 0, [0.2, 0.1], True),
    ])  # fmt: skip
    found = unsupervised.surest(labels, 0.5)
    assert list(found) == ["item_id", "split", "label", "confidence"]
    expected = [*range(5, 10), 12, 13, *range(17, 20), 21, 22, 23, 30]
    assert found["item_id"].tolist() == [f"{i:03}" for i in expected]
    everything = unsupervised.surest(labels, 1.0)["item_id"].tolist()
    assert everything == [f"{i:03}" for i in range(len(labels)) if not 24 <= i < 29], "but not what disagrees"


@pytest.mark.parametrize("count", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_share_is_rounded_up_and_never_more(share, count):
    labels = table_of([("train", 0, 1, np.linspace(0.6, 0.9, count), True)])
    kept = unsupervised.surest(labels, share)["item_id"].tolist()
    assert kept == labels["item_id"].tolist()[count - -(-round(10 * share) * count // 10) :]


def test_the_control_has_exchanged_measurements_within_cameras():
    rng = np.random.default_rng(0)
    names = ["face_ncc", *TRACES]
    features = pd.DataFrame(rng.standard_normal((60, len(names))), columns=names).assign(
        item_id=[f"{i:03}" for i in range(60)], split=np.repeat(["train", "val", "test"], 20),
        cluster=np.arange(60) % 2, recording=np.arange(60),
    )  # fmt: skip
    features["face_ncc"] += 100 * features["cluster"]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        true = unsupervised.pseudo_labels
        patch.setattr(unsupervised, "pseudo_labels", lambda values, *a: seen.append(values) or true(values, *a))
        first = unsupervised.label_collection(features, 0, shuffled=True)
        assert unsupervised.label_collection(features, 0, shuffled=True).equals(first)
        unsupervised.label_collection(features, 1, shuffled=True)
    for moved, original in ((seen[0], features[:40]), (seen[1], features[40:])):
        for cluster in (0, 1):
            own = (original["cluster"] == cluster).to_numpy()
            a, b = moved[own].to_numpy(), original.loc[own, names].to_numpy()
            assert (a != b).any(1).mean() > 0.5 and sorted(map(tuple, a)) == sorted(map(tuple, b))
    assert not seen[0].equals(seen[4]), "another seed, another exchange"


def test_test_videos_are_labelled_apart():
    rng = np.random.default_rng(1)
    names = ["face_ncc", *TRACES]
    features = pd.DataFrame(rng.standard_normal((60, len(names))), columns=names).assign(
        item_id=[f"{i:03}" for i in range(60)], split=np.repeat(["train", "val", "test"], 20), cluster=0,
        recording=np.arange(60),
    )  # fmt: skip
    found = unsupervised.label_collection(features, 0)
    assert found["item_id"].tolist() == features["item_id"].tolist()
    wild = features.copy()
    wild.loc[wild["split"] == "test", names] *= 50
    again = unsupervised.label_collection(wild, 0)
    assert again[:40].equals(found[:40]), "nothing of the test videos reaches the others"
    only = unsupervised.label_collection(features[40:].reset_index(drop=True), 0)
    assert np.array_equal(only["p_fake"], found["p_fake"][40:])


# ---- scores


def test_the_scores_are_a_table_of_the_contract(study, tmp_path):
    *_, out, scores = study
    write_scores(scores, tmp_path / "scores.parquet")
    assert len(read_scores(tmp_path / "scores.parquet")) == len(scores)
    labels = pd.read_parquet(out / LABELS_FILE)
    variants = {"cue", "traces", "pseudo", "centroid", "classifier", "measured", "no-camera", "camera", "final",
                "final-control", "no-camera-control"}  # fmt: skip
    assert set(scores["variant"]) == variants and (scores["frame"] == -1).all() and scores["score"].between(0, 1).all()
    for variant, part in scores.groupby("variant"):
        assert sorted(part["item_id"]) == sorted(labels["item_id"]), variant
    checkpoint = json.loads((out / "stage3-0/config.json").read_text())["sha256"][:12]
    assert set(scores.loc[scores["variant"] == "final", "checkpoint"]) == {checkpoint}


def test_the_last_score_is_the_mean_of_what_is_known(study):
    scores = study[4].pivot(index="item_id", columns="variant", values="score")
    odds = np.log(scores / (1 - scores))
    assert np.allclose(odds["no-camera"], (odds["classifier"] + odds["measured"]) / 2, atol=1e-6)
    told = scores["camera"] != 0.5
    assert 0 < told.sum() < len(scores), "some cameras are known, others are not"
    mean = (odds["classifier"] + odds["measured"] + odds["camera"].where(told, 0)) / (2 + told)
    read = odds["camera"].abs() < 20  # beyond that a probability does not tell its odds
    assert np.allclose(odds["final"][read], mean[read], atol=1e-6) and (read & told).sum() > 3
    assert (np.sign(odds["final"]) == np.sign(mean)).all()


def test_nearer_to_the_centre_of_fakes_is_a_higher_score(study):
    _, crops, _, out, scores = study
    detector, card = load_checkpoint(stage_folder(out, 2, 0))
    index = read_index(crops).set_index("item_id", drop=False)
    scores = scores[scores["variant"] == "centroid"].set_index("item_id")["score"]
    for item in scores.index[::6]:
        units = unsupervised.embeddings(detector, CropStore(crops), index.loc[[item]], "projection")
        real, fake = (np.mean([unit @ np.array(centre) for unit in units]) for centre in card["centroids"])
        assert np.log(scores[item] / (1 - scores[item])) == pytest.approx(fake - real, abs=1e-5)
    assert scores.std() > 1e-3


def test_a_video_is_scored_alike_in_any_company(study):
    profile, crops, manifest, out, scores = study
    clusters = pd.read_parquet(out / "cameras/clusters.parquet")
    items = scores["item_id"].unique()[[3, 20]]
    few = unsupervised.score(crops, out / "cameras/fingerprints", clusters, out, pd.Series(items), [0])
    keys = ["variant", "item_id"]
    both = few.merge(scores, on=keys, suffixes=("", "_all"))
    alone = ~both["variant"].str.endswith("-control")  # the control exchanges what it knows among those it is given
    assert len(both) == len(few) and set(few["item_id"]) == set(items)
    assert np.allclose(both["score"][alone], both["score_all"][alone], atol=1e-6)


def test_a_video_that_stage_1_learned_from_does_not_speak_for_itself(study):
    *_, out, scores = study
    labels, features = (pd.read_parquet(out / name).set_index("item_id") for name in (LABELS_FILE, FEATURES_FILE))
    learned = labels.index[labels["split"] != "test"]
    told = scores[scores["variant"] == "camera"].set_index("item_id")["score"].loc[learned]
    cameras, clusters = CameraEvidence.load(out), pd.read_parquet(out / "cameras/clusters.parquet")
    # Its cue was measured against its camera's other recordings; the cameras' fingerprints of today hold its own.
    apart = cameras.logits(features.loc[learned])
    assert np.allclose(np.log(told / (1 - told)), apart, atol=1e-6)
    with_itself = cameras.table(out / "cameras/fingerprints", clusters[clusters["item_id"].isin(learned)])["logit"]
    assert (apart - with_itself.loc[learned]).abs().max() > 0.1


# ---- poor data


@pytest.fixture
def poor(study, tmp_path):
    """Label with changed cameras or manifest, then learn as far as that is possible: labels, and the error or None."""

    def run(cameras=lambda clusters: clusters, change=lambda manifest: manifest):
        profile, crops, manifest, *_ = study
        out, clusters = restart(study, tmp_path, cameras)
        changed = change(read_manifest(manifest))
        labels = unsupervised.label(profile, changed, clusters, out / "cameras/fingerprints", crops, out)
        CameraEvidence.load(out)
        try:
            unsupervised.represent(profile, crops, out, 0)
            unsupervised.classify(profile, crops, out, 0)
        except TrainingError as error:
            return labels, error, out
        items = changed["item_id"]
        scores = unsupervised.score(crops, out / "cameras/fingerprints", clusters, out, items, [0])
        assert scores.loc[~scores["variant"].str.endswith("control"), "score"].between(0, 1).all()
        return labels, None, out

    with pytest.MonkeyPatch.context() as patch:
        true = unsupervised.Judge.load.__func__
        patch.setattr(  # without the control, which would take as long again
            unsupervised.Judge, "load", classmethod(lambda cls, out, seed, control=False: true(cls, out, seed))
        )
        yield run


def test_one_camera(poor):
    labels, error, _ = poor(lambda clusters: clusters.assign(cluster=0))
    assert error is None and labels["label"].nunique() == 2 and set(labels["cluster"]) == {0}


def test_no_camera_is_found(poor):
    labels, error, out = poor(lambda clusters: clusters.assign(cluster=-1))
    assert error is None and set(labels["cluster"]) == {-1}
    steps = pd.read_parquet(out / FEATURES_FILE).set_index("item_id")["spearman"].loc[labels["item_id"]].to_numpy()
    train = (labels["split"] != "test").to_numpy()
    assert np.corrcoef(steps[train], labels["cue"][train])[0, 1] > 0.5, "frames that agree more are called fake"


def test_a_collection_without_fakes(poor):
    labels, error, _ = poor(change=lambda manifest: manifest[manifest["label"] == 0])
    assert 0 < len(labels) < 20 and (error is None or "\n" not in str(error))


def test_no_validation_split(poor):
    labels, error, out = poor(change=lambda manifest: manifest[manifest["split"] != "val"])
    assert error is None and set(labels["split"]) == {"train", "test"}
    assert json.loads((out / "stage3-0" / THRESHOLD_FILE).read_text())["threshold"] == 0.5
    history = json.loads((out / "stage2-0/config.json").read_text())["history"]
    assert all(entry["val_loss"] is None for entry in history)


def test_only_test_videos(poor):
    labels, error, _ = poor(change=lambda manifest: manifest[manifest["split"] == "test"])
    assert set(labels["split"]) == {"test"} and error is not None


def test_nothing_to_label_is_one_sentence(study, tmp_path):
    profile, crops, manifest, out, _ = study
    clusters = pd.read_parquet(out / "cameras/clusters.parquet")
    pictures = read_manifest(manifest).query("kind == 'image'")
    cases = [(pictures, clusters), (read_manifest(manifest), clusters.assign(status="failed"))]
    for listed, rows in cases:
        with pytest.raises(TrainingError, match=r"^[^\n]+$"):
            unsupervised.label(profile, listed, rows, out / "cameras/fingerprints", crops, tmp_path)


def test_videos_without_a_face_have_no_row(study, tmp_path, monkeypatch):
    profile, crops, manifest, out, scores = study
    index = read_index(crops)
    gone = scores["item_id"].unique()[:7]
    monkeypatch.setattr(unsupervised, "read_index", lambda path: index[~index["item_id"].isin(gone)])
    clusters = pd.read_parquet(out / "cameras/clusters.parquet")
    labels = unsupervised.label(
        profile, read_manifest(manifest), clusters, out / "cameras/fingerprints", crops, tmp_path
    )
    assert set(labels["item_id"]) == set(scores["item_id"]) - set(gone)
    items = read_manifest(manifest)["item_id"]
    again = unsupervised.score(crops, out / "cameras/fingerprints", clusters, out, items, [0])
    assert set(again.loc[again["variant"] == "final", "item_id"]) == set(scores["item_id"]) - set(gone)


def test_measurements_do_not_depend_on_the_number_of_processes(study):
    profile, crops, manifest, out, _ = study
    kept = pd.read_parquet(out / FEATURES_FILE)
    clusters = pd.read_parquet(out / "cameras/clusters.parquet")
    rows = unsupervised.videos(read_manifest(manifest), clusters, read_index(crops)).iloc[::4].reset_index(drop=True)
    detector = unsupervised.contrastive.starting_network(unsupervised.network(profile), "none", profile.seed)
    found = [unsupervised.measure(rows, out / "cameras/fingerprints", crops, detector, n) for n in (1, 2)]
    pd.testing.assert_frame_equal(*found, check_exact=True)
    traces = found[0].merge(kept, on="item_id", suffixes=("", "_all"))
    for name in TRACES:
        assert np.allclose(traces[name], traces[f"{name}_all"], atol=1e-5, equal_nan=True), name


def test_seeds_side_by_side_are_seeds_in_turn(study, tmp_path):
    profile, crops, _, out, _ = study
    together, in_turn = folders = tmp_path / "together", tmp_path / "in turn"
    for folder in folders:
        folder.mkdir()
        for name in (FEATURES_FILE, LABELS_FILE, "cameras.safetensors", "cameras.json"):
            shutil.copy(out / name, folder)
    unsupervised.learn(profile_of(workers=2), crops, together, [0, 1])
    runs, threads = [(seed, control) for seed in (0, 1) for control in (False, True)], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for run in runs:
            unsupervised.represent(profile, crops, in_turn, *run)
            unsupervised.classify(profile, crops, in_turn, *run)
    finally:
        torch.set_num_threads(threads)
    assert differing(together, in_turn) == []
    weights = [stage_folder(together, 3, *run) / "model.safetensors" for run in runs]
    assert len({path.read_bytes() for path in weights}) == 4


def test_embeddings_and_steps(study):
    _, crops, _, out, _ = study
    index = read_index(crops).iloc[:5]
    detector = load_checkpoint(stage_folder(out, 2, 0))[0]
    for what, norm in (("projection", True), ("features", False)):
        one, many = (unsupervised.embeddings(detector, CropStore(crops), index, what, batch) for batch in (1, 4))
        assert one.shape == many.shape and one.dtype == np.float32 and np.allclose(one, many, atol=1e-5)
        assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5) == norm
    vectors = np.array([[3.0, 4], [4, 3], [0, 1], [9, 9]])
    table = unsupervised.step_table(np.array(["b", "b", "a", "b"]), vectors)
    assert table["item_id"].tolist() == ["a", "b"] and list(table) == ["item_id", *STEPS]
    assert table["euclidean"][1] == pytest.approx((np.sqrt(2) + np.sqrt(61)) / 2) and np.isnan(table["euclidean"][0])


# ---- the command line


def unmask(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.mark.parametrize(
    ("stage", "given", "named"),
    [
        (1, [], ["--manifest", "--crops"]), (1, ["--manifest", "m"], ["--crops"]), (2, [], ["--crops"]),
        (3, [], ["--crops"]), (4, [], ["--media", "--scores"]), (4, ["--media", "x"], ["--scores"]),
    ],
)  # fmt: skip
def test_missing_options_are_one_line(tmp_path, capsys, stage, given, named):
    assert unmask("unsupervised", "--stage", stage, "--out", tmp_path, *given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(name in error for name in named) and f"Stage {stage}" in error


def test_a_stage_before_its_turn_names_the_one_that_is_missing(study, tmp_path, capsys):
    _, crops, manifest, out, _ = study
    (tmp_path / "labelled").mkdir()
    for name in (FEATURES_FILE, LABELS_FILE, "cameras.safetensors", "cameras.json"):
        shutil.copy(out / name, tmp_path / "labelled")
    shutil.copytree(out / "stage2-0", tmp_path / "learned/stage2-0")
    media = ("--media", tmp_path, "--scores", tmp_path / "verdicts.csv")
    for stage, folder, missing in ((2, "empty", 1), (3, "empty", 1), (3, "labelled", 2), (4, "labelled", 2),
                                   (4, "learned", 3)):  # fmt: skip
        options = media if stage == 4 else ("--crops", crops)
        assert unmask("unsupervised", "--stage", stage, "--out", tmp_path / folder, *options, *SETTINGS) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"run stage {missing} first" in error, (stage, folder, error)


def test_wrong_inputs_are_one_line(tmp_path, capsys, study):
    _, crops, manifest, *_ = study
    for options in (("--manifest", tmp_path / "none", "--crops", crops), ("--manifest", manifest, "--crops", tmp_path)):
        assert unmask("unsupervised", "--stage", 1, "--out", tmp_path / "out", *options, *SETTINGS) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        unmask("unsupervised", "--stage", 5, "--out", tmp_path)
    assert stopped.value.code == 2


def test_a_damaged_threshold_is_refused(study, tmp_path):
    shutil.copytree(study[3], tmp_path / "out")
    (tmp_path / "out/stage3-0" / THRESHOLD_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="run stage 3 again"):
        unsupervised.Judge.load(tmp_path / "out", 0)
