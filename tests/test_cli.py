"""The command line from a world to a result table, and one line instead of a traceback for what a person can mend."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import SHARED, TINY

from unmask import cli
from unmask.data.crops import CropStore, read_index, read_items
from unmask.data.manifest import read_manifest
from unmask.detectors.base import load_checkpoint
from unmask.evaluation import write_scores
from unmask.scoring import score_table

# YuNet where its weights are beside the repository; else the Haar cascade, which needs none and finds fewer.
YUNET = (SHARED / "data/models/face_detection_yunet.onnx").is_file()
LOCATOR = "yunet" if YUNET else "haar"
SMALL = TINY | {
    "world.size": 160, "world.frames": 4, "world.pairs_train": 4, "world.pairs_val": 1, "world.pairs_test": 1,
    "world.pairs_b": 0, "preprocess.frames": 2, "preprocess.size": 96, "convnext.size": 32, "train.epochs": 1,
    "train.frames_per_clip": 2, "evaluate.draws": 50, "workers": 1,
}  # fmt: skip
SETTINGS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]


def unmask(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a world, your own media made of it (real/, fake/METHOD/), their manifest, crops and checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home := tmp_path_factory.mktemp("home"))
        if YUNET:
            patch.setenv("UNMASK_MODELS", str(SHARED / "data/models"))
        assert unmask("world", "world", "--profile", "demo", "--seed", "7", *SETTINGS) == 0
        for row in read_manifest("world/manifest.parquet").itertuples():
            folder = home / "media" / ("real" if row.label == 0 else f"fake/{row.method}")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(home / "world" / row.path, folder)
        assert unmask("index", "media", "--layout", "folder", "--out", "manifest.parquet") == 0
        crops = ("preprocess", "manifest.parquet", "crops", "--locator", LOCATOR, *SETTINGS)
        assert unmask(*crops, "--shard", "0/2") == 0
        assert not (home / "crops/crops.parquet").exists(), "half of the items is no result yet"
        assert unmask(*crops, "--shard", "1/2") == 0
        data = ("--manifest", "manifest.parquet", "--crops", "crops")
        train = ("train", "convnext", *data, "--out", "checkpoint", "--profile", "demo", "--seed", "0", *SETTINGS)
        assert unmask(*train) == 0
        yield home


def test_shards_of_the_preprocessing_make_one_whole(home):
    manifest, items = read_manifest(home / "manifest.parquet"), read_items(home / "crops")
    assert items["item_id"].tolist() == manifest["item_id"].tolist()
    assert (items["status"] == "ok").mean() > (0.9 if YUNET else 0.3)
    assert {p.name for p in (home / "crops/shards").glob("*.tar")} == {f"crops-0000{i}-of-00002.tar" for i in (0, 1)}
    assert manifest["method"].nunique() == 5 and (manifest["dataset"] == "media").all()


def test_media_are_scored_and_scores_evaluated(home, capsys):
    reals = sorted((home / "media/real").iterdir())
    given = [reals[0], home / "media/fake/swap", "absent.mp4"]
    assert unmask("score", *given, "--checkpoint", "checkpoint", "--out", "scores.csv") == 0
    table = pd.read_csv("scores.csv")
    assert len(table) == 2 + len(list((home / "media/fake/swap").iterdir()))
    assert table["status"].iloc[-1] == "failed" and table["reason"].iloc[-1] == "file not found"
    assert f"of {len(table)} scored: scores.csv" in capsys.readouterr().out
    assert (home / "scores.json").exists()

    detector, card = load_checkpoint("checkpoint")
    index, manifest = read_index("crops"), read_manifest("manifest.parquet")
    write_scores(score_table(detector, card, CropStore("crops"), index, "sbi"), "scores.parquet")
    evaluate = ("manifest.parquet", "--set", "evaluate.draws=50", "--out")
    assert unmask("evaluate", "scores.parquet", *evaluate, "table.csv") == 0
    rows = pd.read_csv("table.csv").query("level == 'video'").set_index(["method", "reals"])
    test = manifest[(manifest["split"] == "test") & manifest["item_id"].isin(index["item_id"])]
    videos = test[test["kind"] == "video"]
    assert rows.loc[("all", "all"), "n_fake"] == videos["label"].sum()
    assert rows.loc[("all", "all"), "n_real"] == (videos["label"] == 0).sum() > 0


def test_media_are_explained_by_a_panel(home, capsys):
    data = ("--manifest", "manifest.parquet", "--crops", "crops")
    assert unmask("panel", "checkpoint", *data, "--out", "panel.json", "--set", "evaluate.draws=50") == 0
    assert "real and" in capsys.readouterr().out
    swaps = sorted((home / "media/fake/swap").iterdir())[:2]
    explained = ("score", *swaps, "absent.mp4", "--explain", "--out", "pages", "--locator", LOCATOR)
    assert unmask(*explained, "--panel", "panel.json") == 0
    table = pd.read_csv("pages/verdicts.csv")
    assert [os.path.basename(p) for p in table["path"]] == [*(s.name for s in swaps), "absent.mp4"]
    assert table["reasons"].iloc[-1] == "file not found"
    assert {p.suffix for p in (home / "pages").iterdir()} == {".html", ".csv", ".json"}
    assert len(list((home / "pages").glob("*.html"))) == 4
    assert "A verdict is no proof." in capsys.readouterr().out
    assert unmask(*explained, "--checkpoint", "checkpoint") == 0
    assert "not calibrated" in capsys.readouterr().out
    table = pd.read_csv("pages/verdicts.csv")
    assert (table["verdict"] == "cannot tell").all() and table["probability"].isna().all()


def test_the_csv_that_score_writes_can_be_evaluated(home):
    assert unmask("score", "media", "--checkpoint", "checkpoint", "--out", "all.csv", "--locator", LOCATOR) == 0
    assert unmask("evaluate", "all.csv", "manifest.parquet", "--out", "media.csv") == 0
    from_media = pd.read_csv("media.csv").query("level == 'video'").set_index(["method", "reals"])
    detector, card = load_checkpoint("checkpoint")
    write_scores(score_table(detector, card, CropStore("crops"), read_index("crops"), "sbi"), "crops.parquet")
    assert unmask("evaluate", "crops.parquet", "manifest.parquet", "--out", "crops.csv") == 0
    from_crops = pd.read_csv("crops.csv").query("level == 'video'").set_index(["method", "reals"])
    columns = ["auc", "n_real", "n_fake", "coverage", "threshold"]
    np.testing.assert_allclose(from_media[columns], from_crops.loc[from_media.index, columns], atol=1e-3)


def test_a_world_can_be_written_in_the_layout_of_a_data_set(home, capsys):
    assert unmask("world", "world", "--seed", "7", *SETTINGS, "--layout", "ffpp") == 0
    assert "ffpp layout: world/ffpp" in capsys.readouterr().out
    assert unmask("index", "world/ffpp", "--layout", "ffpp", "--out", "ffpp.parquet") == 0
    assert "0 groups in more than one split; manifest: ffpp.parquet" in capsys.readouterr().out
    assert read_manifest("ffpp.parquet")["label"].sum() == 4 * 12


WRONG = {
    "world out --set train.epoch=2": "Unknown profile key train.epoch. Did you mean epochs?",
    "world out --set world.size=big": "world.size must be a whole number",
    "world out --set world.size=65": "world.size must be an even number",
    "world out --profile demi": "No profile named 'demi'",
    "index nowhere --layout folder --out m.parquet": "There is no folder",
    "index media --layout folders --out m.parquet": "There is no layout 'folders'",
    "preprocess nothing.parquet out": "There is no manifest at nothing.parquet",
    "train convnext --manifest nothing.parquet --crops crops --out ck": "There is no manifest at nothing.parquet",
    "train convnext --manifest manifest.parquet --crops nothing --out ck": "There is no crops.parquet in nothing",
    "train convnext --manifest manifest.parquet --crops crops --out ck --set convnext.size=50": "multiple of 32",
    "score media --checkpoint nothing --out s.csv": "nothing is not a checkpoint",
    "score media --checkpoint checkpoint --out s.json": "would be overwritten",
    "score media --checkpoint manifest.parquet --out s.csv": "was not written by `unmask export`",
    "score media --out s.csv": "give one --checkpoint",
    "score media --checkpoint checkpoint --checkpoint checkpoint --out s.csv": "give one --checkpoint",
    "score media --explain --out out --checkpoint nothing": "nothing is not a checkpoint",
    "score media --explain --out out --panel nothing.json": "There is no panel at nothing.json",
    "score media --explain --out out --panel scores.json": "not a panel of this version",
    "score media --explain --out out --panel p.json --checkpoint checkpoint": "Give --panel or --checkpoint",
    "score media --explain --out out --profile paper": "No panel of profile paper is here yet: ./run_all.sh",
    "score media --explain --out manifest.parquet --checkpoint checkpoint": "manifest.parquet",
    "panel checkpoint --manifest nothing.parquet --crops crops --out out": "There is no manifest at nothing.parquet",
    "panel checkpoint --manifest manifest.parquet --crops nothing --out out": "no readable settings.json",
    "export nothing --format pt2 --out out": "nothing is not a checkpoint",
    "export checkpoint --format pt2 --out out --clips crops": "--clips is what --verify compares on",
    "lare nothing.parquet --settings sd15-t200-e4-256 --out out": "There is no manifest at nothing.parquet",
    "lare manifest.parquet --settings sd15 --out out": "There are no settings 'sd15' for LaRE",
    "lare manifest.parquet --settings sd15-t200-e4-256 --model nowhere --out out": "There is no folder nowhere",
    "evaluate nothing.parquet manifest.parquet --out t.csv": "nothing.parquet cannot be read as a score table",
    "evaluate manifest.parquet manifest.parquet --out t.csv": "not a valid score table",
    "evaluate nothing.csv manifest.parquet --out t.csv": "columns path and score",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(home, capsys, line):
    capsys.readouterr()
    assert unmask(*line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("unmask: ") and WRONG[line] in said and said.count("\n") == 1
    assert not {p.name for p in home.iterdir()} & {"out", "ck", "s.csv", "t.csv", "m.parquet"}


@pytest.mark.parametrize("line", [
    "preprocess m.parquet out --shard 4/4", "preprocess m.parquet out --shard x", "score m --workers 0",
    "train resnet --manifest m --crops c --out o", "world", "export c --out o", "export c --format tflite --out o",
    "export c --format pt2 --out o --frames 0", "evaluate a b", "world out --seed seven", "",
])  # fmt: skip
def test_wrong_arguments_are_one_sentence_and_exit_code_2(capsys, line):
    with pytest.raises(SystemExit) as caught:
        unmask(*line.split())
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("unmask") and said.count("\n") == 1
    assert "--help` says more" in said


def test_a_fault_of_the_program_is_not_dressed_up(home, monkeypatch):
    monkeypatch.setattr("unmask.evaluation.evaluate_files", lambda *a, **k: [][0])
    with pytest.raises(IndexError):
        unmask("evaluate", "s.parquet", "m.parquet", "--out", "t.csv")


def test_as_a_program(home):
    def run(*arguments):
        command = [sys.executable, "-m", "unmask.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})

    usage = run("--help")
    assert usage.returncode == 0
    for command in ("doctor", "world", "index", "preprocess", "train", "score", "panel", "export", "evaluate"):
        assert f"\n    {command}" in usage.stdout
    wrong = run("score", "media", "--checkpoint", "nothing", "--out", "s.csv")
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.count("\n") == 1
