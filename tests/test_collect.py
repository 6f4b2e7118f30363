"""The data sets of a profile joined to one manifest, and the whole road over two official layouts."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_profile

from unmask.data.collect import collect, media_sheet
from unmask.data.crops import CropStore, read_index
from unmask.data.layouts import write_layout
from unmask.data.manifest import manifest_hash, media_path, read_manifest, write_manifest
from unmask.data.tree import DatasetError
from unmask.data.world import generate
from unmask.detectors.base import load_checkpoint
from unmask.evaluation import evaluate_files, write_scores
from unmask.preprocessing import preprocess
from unmask.profile import load_profile
from unmask.scoring import score_table
from unmask.training import train_detector


@pytest.fixture(scope="module")
def root(tiny_world, tmp_path_factory):
    """A repository root with the tiny world under the names of three data sets."""
    root = tmp_path_factory.mktemp("root")
    for layout in ("ffpp", "celebdf2", "dfdc"):
        write_layout(tiny_world / "manifest.parquet", root / layout, layout)
    shutil.copytree(tiny_world, root / "mine")
    return root


def gather(root, *sets):
    return collect(tiny_profile(data__sets=list(sets)), root / "work", root)


def test_the_first_set_is_whole_and_of_the_others_only_the_test_split_is_used(root):
    manifest, notes = gather(root, "ffpp=ffpp", "celebdf2=celebdf2", "dfdc=dfdc")
    splits = manifest.groupby("dataset")["split"].agg(set).to_dict()
    assert splits == {"ffpp": {"train", "val", "test"}, "celebdf2": {"test"}, "dfdc": {"test"}}
    assert any(note.startswith("celebdf2: ") for note in notes)
    write_manifest(manifest, root / "work/manifest.parquet")
    again = read_manifest(root / "work/manifest.parquet")
    assert all(media_path(row, root / "work/manifest.parquet").is_file() for row in again.to_dict("records"))
    assert manifest_hash(again) == manifest_hash(gather(root, "ffpp=ffpp", "celebdf2=celebdf2", "dfdc=dfdc")[0])


def test_a_later_set_that_is_missing_is_left_out_with_a_note_but_not_the_first(root):
    manifest, notes = gather(root, "ffpp=ffpp", "celebdf2=data/raw/nowhere", "dfdc=dfdc")
    assert set(manifest["dataset"]) == {"ffpp", "dfdc"}
    assert [n for n in notes if n.startswith("celebdf2=data/raw/nowhere: left out. There is no folder")]
    for first in ("ffpp=nowhere", "manifest=nowhere.parquet"):
        with pytest.raises(DatasetError, match="nowhere"):
            gather(root, first, "dfdc=dfdc")


@pytest.mark.parametrize("entry", ["celebdf=celebdf2", "ffpp", "ffpp=", "=ffpp"])
def test_an_entry_that_names_no_layout_is_refused_in_any_place(root, entry):
    with pytest.raises(DatasetError, match=f"'{entry}' in data.sets is not LAYOUT=FOLDER, with folder, ffpp"):
        gather(root, "ffpp=ffpp", entry)


def test_a_set_named_twice_is_refused(root):
    with pytest.raises(DatasetError, match="media are in two of the data sets"):
        gather(root, "celebdf2=celebdf2", "celebdf2=celebdf2")


def test_a_set_without_a_test_split_is_noted(root):
    df = read_manifest(root / "mine/manifest.parquet")
    write_manifest(df[df["split"] == "train"], root / "mine/train.parquet")
    manifest, notes = gather(root, "ffpp=ffpp", "manifest=mine/train.parquet")
    assert set(manifest["dataset"]) == {"ffpp"} and any("has no test split" in note for note in notes)


def test_a_manifest_of_your_own_is_read_from_anywhere(root):
    manifest, notes = gather(root, "manifest=mine/manifest.parquet")
    own = read_manifest(root / "mine/manifest.parquet")
    assert notes == [] and manifest.drop(columns="root").equals(own.drop(columns="root"))
    assert all(media_path(row, root / "elsewhere.parquet").is_file() for row in manifest.to_dict("records"))
    lost = root / "mine" / own["path"].iloc[0]
    content = lost.read_bytes()
    lost.unlink()
    assert gather(root, "manifest=mine/manifest.parquet")[1] == [f"manifest: 1 of {len(own)} listed files are missing."]
    lost.write_bytes(content)


def test_the_world_is_made_in_the_work_folder(root, tiny_world):
    profile = tiny_profile(data__sets=["world=world"], seed=3)
    manifest, notes = collect(profile, root / "work", root)
    assert manifest.equals(read_manifest(tiny_world / "manifest.parquet").assign(root="world")) and notes == []
    assert all(media_path(row, root / "work/manifest.parquet").is_file() for row in manifest.to_dict("records"))


def test_the_sheet_shows_reals_above_fakes_and_passes_over_broken_files(tiny_world):
    manifest = read_manifest(tiny_world / "manifest.parquet")
    broken = manifest["path"].where(manifest.index % 2 == 0, "gone.mp4")
    sheet = media_sheet(manifest.assign(path=broken), tiny_world / "manifest.parquet", columns=3, cell=40)
    assert sheet.shape == (160, 120, 3) and (sheet.reshape(4, 40, 3, 40, 3).std((1, 3)).max(2) > 5).all()
    few = media_sheet(manifest[manifest["label"] == 1].iloc[:2], tiny_world / "manifest.parquet", columns=3, cell=40)
    assert (few[:80] == 255).all() and (few[80:120, :80] < 255).any() and (few[120:] == 255).all()


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """Profile `paper` on two drawn data sets under their official names, shrunk; its crops and its checkpoint.

    The locator is the Haar cascade: it needs no weights, and though it misses a third of the drawn faces (they become
    rows with a reason) it finds enough of them. YuNet, the profile's own, would find nearly all.
    """
    root = tmp_path_factory.mktemp("paper")
    spec = dict(tiny_profile(world__size=160, world__frames=4).world)
    generate(root / "one", spec | {"pairs_train": 3, "pairs_b": 0}, seed=5)
    generate(root / "two", spec | {"pairs_train": 0, "pairs_val": 0, "pairs_test": 0, "pairs_b": 3}, seed=6)
    write_layout(root / "one/manifest.parquet", root / "data/raw/FaceForensics++", "ffpp")
    write_layout(root / "two/manifest.parquet", root / "data/raw/Celeb-DF-v2", "celebdf2")
    small = {
        "workers": 1, "seeds": 1, "preprocess.locator": "haar", "preprocess.frames": 2, "preprocess.size": 96,
        "convnext.backbone": "convnext_zepto_rms", "convnext.pretrained": False, "convnext.size": 96,
        "train.epochs": 1, "train.batch": 4, "train.frames_per_clip": 2, "train.loaders": 0, "evaluate.draws": 50,
    }  # fmt: skip
    profile = load_profile("paper", small)
    manifest, notes = collect(profile, root / "work", root)
    path, crops = root / "work/manifest.parquet", root / "work/crops"
    write_manifest(manifest, path)
    items = preprocess(path, crops, workers=1, **profile.preprocess)
    checkpoint = train_detector("convnext", profile, path, crops, root / "work/convnext", profile.seed)
    detector, card = load_checkpoint(checkpoint)
    write_scores(score_table(detector, card, CropStore(crops), read_index(crops), "sbi"), root / "work/scores.parquet")
    table = evaluate_files(root / "work/scores.parquet", path, root / "work/table.csv", **profile.evaluate)
    return profile, manifest, items, notes, table, root


def test_the_paper_profile_runs_on_the_official_layouts(paper):
    profile, manifest, items, notes, table, root = paper
    assert profile.data.sets == ["ffpp=data/raw/FaceForensics++", "celebdf2=data/raw/Celeb-DF-v2"]
    assert manifest.groupby("dataset")["split"].agg(set).to_dict() == {
        "ffpp": {"train", "val", "test"}, "celebdf2": {"test"},
    }  # fmt: skip
    assert items["item_id"].tolist() == manifest["item_id"].tolist()
    assert set(items.loc[items["status"] == "failed", "reason"]) <= {"no face found"}
    assert (items["status"] == "ok").mean() > 0.4 and any("FaceShifter" in note for note in notes)
    rows = table[(table["level"] == "video") & (table["reals"] == "all")].set_index(["dataset", "method"])
    assert {d for d, _ in rows.index} == {"ffpp", "celebdf2"}
    methods = {m for d, m in rows.index if d == "ffpp"}
    assert methods == {"all", "FaceSwap", "Face2Face", "NeuralTextures", "Deepfakes"}
    assert rows[["auc", "threshold", "balanced_accuracy", "frames_per_video"]].notna().all().all()
    assert (rows["frames_per_video"] <= 2).all() and rows["coverage"].between(0.2, 1).all()
    assert len(pd.read_csv(root / "work/table.csv")) == len(table)


def test_the_paper_run_counts_what_was_found(paper):
    _, manifest, items, _, table, _ = paper
    found = manifest[items.set_index("item_id").loc[manifest["item_id"], "status"].eq("ok").to_numpy()]
    for dataset in ("ffpp", "celebdf2"):
        test = found[(found["dataset"] == dataset) & (found["split"] == "test") & (found["kind"] == "video")]
        rows = table[(table["dataset"] == dataset) & (table["level"] == "video") & (table["reals"] == "all")]
        largest = rows.iloc[np.argmax(rows["n_real"] + rows["n_fake"])]
        assert (largest["n_real"], largest["n_fake"]) == ((test["label"] == 0).sum(), (test["label"] == 1).sum())
