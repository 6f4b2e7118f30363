"""Every command of the README is run, in its order, on small media of the names that it uses (see `commands`)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from commands import NOT_RUN, SMALL, YUNET, commands, drawn_media, mentions, pages, run_page
from conftest import SHARED

from unmask import cli, workflow
from unmask.data.crops import read_items
from unmask.data.manifest import read_manifest
from unmask.detectors.base import load_checkpoint
from unmask.profile import ROOT

README = ROOT / "README.md"
COMMANDS = [command for command in commands(README) if command not in NOT_RUN]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder in which the commands ran, and what became of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home := tmp_path_factory.mktemp("readme"))
        if YUNET:
            patch.setenv("UNMASK_MODELS", str(SHARED / "data/models"))
        # The study whose panel `--explain` takes where none is named: this one, in the working directory.
        patch.setattr("unmask.profile.ROOT", home)
        settings = SMALL | {"world.pairs_train": 4, "world.pairs_val": 1, "world.pairs_test": 1, "world.pairs_b": 0}
        words = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        assert cli.main(["world", "world", "--profile", "tiny", "--seed", "7", *words]) == 0
        first = list(drawn_media(home / "world", home / "my_media"))[0]
        shutil.copy(first, home / "clip.mp4")

        def finish_study():
            """What a finished study leaves of its panel."""
            data = ["--manifest", "manifest.parquet", "--crops", "crops", "--set", "evaluate.draws=50"]
            assert cli.main(["panel", "checkpoint", *data, "--out", "data/work/tiny/panel.json"]) == 0

        yield home, run_page(README, patch, {"unmask score clip.mp4 --explain --out verdicts": finish_study})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_ends_well(home, command):
    ran = home[1][command]
    assert ran.code == 0, ran.said


def test_the_commands_leave_what_the_readme_says(home):
    home = home[0]
    manifest, items = read_manifest(home / "manifest.parquet"), read_items(home / "crops")
    assert manifest["dataset"].eq("my_media").all() and len(items) == len(manifest) == 12 * 5
    assert (items["status"] == "ok").mean() > (0.9 if YUNET else 0.3)
    scores = pd.read_csv(home / "scores.csv")
    assert len(scores) == 1, "the last command to write it scored one clip"
    assert scores["status"].eq("ok").all() or not YUNET, "Haar may miss a drawn face"
    assert {p.name for p in (home / "verdicts").glob("*.html")} >= {"index.html"}
    kinds = {"checkpoint": "convnext", "residual": "residual", "gru": "gru", "ufd": "ufd", "d2st-3": "d2st"}
    assert {name: load_checkpoint(home / name)[0].name for name in kinds} == kinds
    assert set(pd.read_csv(home / "clusters.csv").columns) >= {"path", "cluster"}
    assert (home / "verdict.csv").is_file() and (home / "maps").is_dir()


def test_a_dry_run_of_the_study_names_chapters(home):
    said = home[1]["./run_all.sh --list"].said
    assert "00_data" in said and "11_authenticate" in said
    assert "05_convnext" in home[1]["./run_all.sh --only 05"].said
    assert "09_cross_dataset" in home[1]["./run_all.sh --only figure:results_auc"].said


def test_a_command_that_is_named_in_a_sentence_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    known = cli.build_parser()._subparsers._group_actions[0].choices
    for command in {command for page in pages() for command in mentions(page)} - set(NOT_RUN):
        program, *words = command.split()
        if program == "unmask" and words:
            assert words[0] in known, command
            assert {word for word in words if word.startswith("--")} <= set(known[words[0]]._option_string_actions), (
                command
            )
        elif program == "nbdime":
            subprocess.run([sys.executable, "-m", "nbdime", *words], check=True)
            assert "jupyternotebook" in Path(".git/config").read_text()
        else:
            assert program in ("unmask", "./run_all.sh"), f"nobody knows how to check: {command}"
            if words:
                workflow.parse_options(words)


def test_the_list_of_what_is_not_run_has_reasons_and_nothing_that_vanished():
    known = {command for page in pages() for command in commands(page) + mentions(page)}
    assert set(NOT_RUN) <= known and all(NOT_RUN.values())
    assert len(COMMANDS) > 30
