import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from unmask.profile import (
    ROOT,
    MissingInput,
    ProfileError,
    load_profile,
    open_study,
    parse_changes,
    plain,
    write_atomic,
)


@pytest.mark.parametrize("name", ["tables", "Tables", "report.html", "README.md", "world.png", "plotly.min.js"])
def test_names_that_figures_uses_are_no_runs(tmp_path, name):
    (tmp_path / f"{name}.yaml").write_text("seeds: 2\n")
    with pytest.raises(ProfileError, match=f"A run cannot be called '{name}'.*say `run: NAME` in {name}.yaml"):
        load_profile(tmp_path / f"{name}.yaml")
    (tmp_path / f"{name}.yaml").write_text(f"run: {name}-1\n")
    assert load_profile(tmp_path / f"{name}.yaml").run == f"{name}-1"


def resolved(tmp_path, name="demo", run=None, **changes):
    """A resolved profile file as the workflow writes it, in a root of its own."""
    profile = load_profile(name, changes)
    run = run or name
    path = tmp_path / "data" / "work" / run / "profile.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump({"name": name, "run": run, **profile.as_dict()}))
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    return path


@pytest.mark.parametrize("name", ["demo", "tiny", "paper"])
def test_every_profile_has_every_key(name):
    def keys(values, where=""):
        for key, value in values.items():
            yield from keys(value, f"{where}{key}.") if isinstance(value, dict) else [f"{where}{key}"]

    assert list(keys(load_profile(name).as_dict())) == list(keys(load_profile("demo").as_dict()))


SCHEMA = """
seed: 0
workers: 2
train: {epochs: 10, lr: 1.0e-3, name: auto}
crop: {align: false, sets: ["world=a"], inner: {size: 5}}
"""


@pytest.fixture
def root(tmp_path):
    """A root whose demo profile is SCHEMA, so that these tests do not move with the kit's own keys."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "demo.yaml").write_text(SCHEMA)
    return tmp_path


def test_attribute_access_and_changes(root):
    profile = load_profile("demo", {"train.epochs": 2, "seed": 3, "train.lr": 1, "crop.inner.size": 6}, root)
    assert profile.train.epochs == 2 and profile["train"]["epochs"] == 2 and profile.seed == 3
    assert profile.crop.inner.size == 6 and isinstance(profile.train.lr, float)
    assert load_profile("demo", root=root).train.epochs == 10, "changes must not leak into the next profile"
    with pytest.raises(AttributeError, match="train.epoch.*Did you mean epochs"):
        _ = profile.train.epoch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.epoch": 2}, "Unknown profile key train.epoch.*Did you mean epochs"),
        ({"training.epochs": 2}, "Unknown profile key training.*Did you mean train"),
        ({"train.epochs": 2.5}, "train.epochs must be a whole number"),
        ({"train.epochs": True}, "train.epochs must be a whole number"),
        ({"train.lr": "fast"}, "train.lr must be a number"),
        ({"crop.align": 1}, "crop.align must be true or false"),
        ({"train.name": 5}, "train.name must be text"),
        ({"crop.sets": "world=a"}, "crop.sets must be a list"),
        ({"crop.sets": [1]}, "every item of crop.sets must be text"),
        ({"train": 5}, "train is a group of keys.*train.epochs"),
        ({"train.epochs.x": 5}, "train.epochs must be a whole number"),
    ],
)
def test_wrong_changes_are_refused(root, changes, message):
    with pytest.raises(ProfileError, match=message):
        load_profile("demo", changes, root)


def test_own_profile_file_and_its_mistakes(root, tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("train: {epochs: 1, lr: 1e-4}\n")
    profile = load_profile(own, root=root)
    assert (profile.name, profile.run, profile.train.epochs, profile.train.lr) == ("mine", "mine", 1, 1e-4)
    own.write_text("train: {epohcs: 1}\n")
    with pytest.raises(ProfileError, match=r"train.epohcs \(in mine.yaml\)"):
        load_profile(own, root=root)
    own.write_text("a: [\n")
    with pytest.raises(ProfileError, match="not valid YAML"):
        load_profile(own, root=root)
    with pytest.raises(ProfileError, match="No profile named 'dmo'"):
        load_profile("dmo", root=root)


def test_command_line_settings_take_the_type_of_their_key(root):
    settings = ["train.epochs=2", "train.lr=1e-4", "crop.align=true", "train.name=off", "crop.sets=[folder=/x]"]
    profile = load_profile("demo", parse_changes(settings, root), root)
    assert profile.train.lr == 1e-4 and profile.crop.align is True
    assert profile.train.name == "off", "text stays text, though YAML reads off as false"
    assert list(profile.crop.sets) == ["folder=/x"]


def test_hash_follows_every_setting_but_speed(root):
    demo = load_profile("demo", root=root)
    assert load_profile("demo", {"workers": 9}, root).hash == demo.hash
    changed = load_profile("demo", {"train.epochs": 3}, root)
    assert changed.hash != demo.hash
    assert changed.subset_hash(["crop", "seed"]) == demo.subset_hash(["crop", "seed"])
    assert changed.subset_hash(["train"]) != demo.subset_hash(["train"])


def test_study_folders(tmp_path):
    demo, tiny = open_study("demo"), open_study("tiny")
    assert demo.figures == ROOT / "figures" and demo.tables == ROOT / "figures" / "tables"
    assert tiny.figures == ROOT / "figures" / "tiny" and tiny.work == ROOT / "data" / "work" / "tiny"
    path = resolved(tmp_path, "demo", "demo-holiday-1a2b3c", **{"data.sets": ["folder=/x"], "seeds": 3, "seed": 5})
    study = open_study(path)
    assert study.root == tmp_path and study.work == path.parent
    assert study.figures == tmp_path / "figures" / "demo-holiday-1a2b3c"
    assert study.seeds == [5, 6, 7]
    assert study.provenance["world"] is False and demo.provenance["world"] is True
    assert study.provenance["profile"] == "demo" and study.provenance["commit"] == "unknown"


def test_commit_is_the_clones_own(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert open_study(resolved(tmp_path / "unpacked")).provenance["commit"] == "unknown"
    commit = open_study(resolved(tmp_path, run="other")).provenance["commit"]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit == head


def test_playing_writes_to_scratch_and_reads_from_the_run(tmp_path):
    path = resolved(tmp_path)
    (path.parent / "manifest.parquet").touch()
    study = open_study(path, {"seed": 1})
    assert study.input("manifest.parquet") == path.parent / "manifest.parquet"
    assert study.figures.is_relative_to(path.parent / "scratch") and study.tables.is_relative_to(study.figures)
    assert study.results("05_convnext", {}) == path.parent / "scratch" / "results" / "05_convnext.json"
    assert study.output("checkpoints/x") == path.parent / "scratch" / "checkpoints" / "x"
    assert open_study(path).results("05_convnext", {}) == path.parent / "results" / "05_convnext.json"
    unchanged = open_study(path, playing=True)
    assert unchanged.output("x") == path.parent / "scratch" / "x" and unchanged.figures == study.figures


def test_missing_input_says_what_to_do(tmp_path):
    study = open_study(resolved(tmp_path))
    with pytest.raises(MissingInput, match=r"crops.parquet.*01_preprocessing leaves it.*--from 01"):
        study.input("crops/crops.parquet")


def test_models_folder_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("UNMASK_MODELS", raising=False)
    assert open_study().models == ROOT / "data" / "models"
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path))
    assert open_study().models == tmp_path


def test_results_hold_numbers_and_provenance(tmp_path):
    study = open_study(resolved(tmp_path))
    study.manifest_hash = "abc"
    numbers = {"auc": np.float32(0.5), "ci": np.array([0.1, np.nan]), "n": np.int64(3), "none": None}
    content = json.loads(study.results("05_convnext", numbers).read_text())
    assert content["numbers"] == {"auc": 0.5, "ci": [pytest.approx(0.1), None], "n": 3, "none": None}
    assert content["manifest_hash"] == "abc" and content["seeds"] == [0] and content["versions"]["numpy"]


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    path = write_atomic(tmp_path / "new" / "f.txt", "old")
    with pytest.raises(TypeError):
        write_atomic(path, 5)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["f.txt"]
    assert plain({1: (True, float("inf"))}) == {"1": [True, None]}


def test_root_is_found_from_the_working_directory_for_an_installed_package(tmp_path):
    package = tmp_path / "site" / "unmask"
    package.mkdir(parents=True)
    for name in ("__init__.py", "profile.py", "machine.py"):
        (package / name).write_text((ROOT / "lib" / "unmask" / name).read_text())
    command = [sys.executable, "-c", "from unmask.profile import ROOT; print(ROOT)"]
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run(command, cwd=ROOT / "notebooks", env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(ROOT)
    lost = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "run from a clone" in lost.stderr


def test_a_profile_can_be_changed_in_a_copy():
    profile = load_profile("tiny")
    other = profile.changed({"clip.frames": 7, "seeds": 2})
    assert (other.clip.frames, other.seeds, other.name, other.run) == (7, 2, profile.name, profile.run)
    assert profile.clip.frames != 7 and other.hash == load_profile("tiny", {"clip.frames": 7, "seeds": 2}).hash
    with pytest.raises(ProfileError, match="clip.frame"):
        profile.changed({"clip.frame": 7})
