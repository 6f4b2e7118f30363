"""Colab: the notebooks' first cell, what is installed beside Colab's packages, and runs kept in archives."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from unmask import archives, colab
from unmask.archives import ArchiveError, archive, archive_changed, restore
from unmask.colab import ColabError
from unmask.explain import keep_uploads
from unmask.profile import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STAND_IN = ROOT / "tests" / "colab"
PINS = [line for line in (STAND_IN / "runtime-2026.01.txt").read_text().splitlines() if not line.startswith("#")]
RUNTIME = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in PINS}


def first_cell(path: Path) -> str:
    return next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


CELL = first_cell(NOTEBOOKS[0])


def test_every_notebook_begins_with_the_same_cell_before_its_parameters():
    assert len(NOTEBOOKS) == 13
    for path in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert cells[0].source == CELL and "colab" in cells[0].metadata.tags
        assert "parameters" in cells[1].metadata.tags
    assert 'REPOSITORY = ""' in CELL and "DRIVE = False" in CELL


# The cell, run as a session of its own. The kit that it finds is a small one, whose `setup` says how it was called.

SETUP = "import json\ndef setup(content, drive):\n    print(json.dumps([__file__, str(content), drive]))\n"


def kit(folder: Path) -> Path:
    for name, text in (("lib/unmask/__init__.py", ""), ("lib/unmask/colab.py", SETUP), ("profiles/demo.yaml", "")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def zipped(folder: Path, target: Path, top: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, top + str(path.relative_to(folder)))
    return target


def run_cell(content: Path, repository: str = "", drive: bool = False, inside: bool = True):
    """Exit code, what setup said of its call ([file, content, drive]) and the error's last line."""
    content.mkdir(exist_ok=True)
    code = CELL.replace('"/content"', repr(str(content))).replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    code = code.replace("DRIVE = False", f"DRIVE = {drive}")
    (content.parent / "cell.py").write_text(("import google.colab\n" if inside else "") + code)
    # -P: an empty directory's name must not be importable by accident.
    command = [sys.executable, "-P", str(content.parent / "cell.py")]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(STAND_IN), "HOME": str(content.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=content)
    said = json.loads(result.stdout) if result.stdout else None
    return result.returncode, said, (result.stderr.strip().splitlines() or [""])[-1]


def expected(content: Path, drive: bool = False, name: str = "unmask") -> list:
    return [str(content / name / "lib" / "unmask" / "colab.py"), str(content), drive]


def test_cell_does_nothing_outside_colab(tmp_path, monkeypatch):
    zipped(kit(tmp_path / "kit"), (tmp_path / "unmask.zip"))
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran a program"))
    before, names = list(sys.path), {}
    exec(CELL.replace("/content", str(tmp_path)).replace('REPOSITORY = ""', 'REPOSITORY = "x"'), names)
    assert sys.path == before and sorted(path.name for path in tmp_path.iterdir()) == ["kit", "unmask.zip"]
    assert set(names) - {"__builtins__"} == {"sys", "REPOSITORY", "DRIVE"}


def test_cell_uses_a_kit_that_is_there_and_asks_nobody(tmp_path):
    content = tmp_path / "content"
    kit(content / "my-kit")
    assert run_cell(content, "file:///nowhere", drive=True) == (0, expected(content, True, "my-kit"), "")


@pytest.mark.parametrize("top", ["", "unmask-main/", "a/b/"])
def test_cell_unpacks_an_upload_whatever_folder_it_holds(tmp_path, top):
    content = tmp_path / "content"
    content.mkdir()
    zipped(kit(tmp_path / "kit"), content / "unmask-main.zip", top)
    assert run_cell(content) == (0, expected(content), "")
    assert run_cell(content) == (0, expected(content), "")  # the cell run again


def test_cell_takes_no_unpacking_that_was_cut_short_for_a_kit(tmp_path):
    content = tmp_path / "content"
    (kit(content / ".unmask") / "lib/unmask/colab.py").unlink()
    zipped(kit(tmp_path / "kit"), content / "unmask.zip")
    assert run_cell(content) == (0, expected(content), "")


@pytest.mark.parametrize("name", ["../outside.py", "unmask-main/../../outside.py", "/tmp/outside.py"])
def test_cell_refuses_an_upload_that_leaves_its_folder(tmp_path, name):
    content = tmp_path / "content"
    content.mkdir()
    upload = zipped(kit(tmp_path / "kit"), content / "unmask.zip", "unmask-main/")
    with zipfile.ZipFile(upload, "a") as file:
        file.writestr(name, "evil")
    code, said, error = run_cell(content)
    assert code == 1 and said is None and "is refused" in error and name in error
    assert [path.name for path in content.iterdir()] == ["unmask.zip"]


def test_cell_says_what_is_no_kit(tmp_path):
    content = tmp_path / "content"
    content.mkdir()
    zipped(STAND_IN, content / "unmask.zip")
    assert "is not the kit" in run_cell(content)[2]
    (content / "unmask.zip").write_bytes(b"PK")
    assert "BadZipFile" in run_cell(content)[2]
    (content / "unmask.zip").unlink()
    code, _, error = run_cell(content)
    assert code == 1 and "fill in REPOSITORY" in error and "unmask.zip" in error


def test_cell_clones_the_repository(tmp_path):
    source, content = kit(tmp_path / "source"), tmp_path / "content"
    git = ["git", "-C", str(source), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "kit"]):
        subprocess.run([*git, *command], check=True)
    assert run_cell(content, f"file://{source}") == (0, expected(content), "")


@pytest.mark.parametrize("repository", ["file:///nowhere/at/all", "--upload-pack=touch made", "x; touch made", "$(id)"])
def test_cell_says_that_it_could_not_clone_and_runs_nothing(tmp_path, repository):
    code, said, error = run_cell(tmp_path / "content", repository)
    assert code == 1 and said is None and "made" not in [path.name for path in tmp_path.rglob("*")]
    assert run_cell(tmp_path / "content", "")[2].startswith("FileNotFoundError")


# Installing


@pytest.fixture
def pip(monkeypatch):
    """pip as a function: it gets what to install and the pins, and says what then is installed."""
    state = {"installed": dict(RUNTIME), "calls": []}

    def install(wanted, pins):
        state["calls"].append((wanted, pins))
        names = [canonicalize_name(Requirement(text).name) for text in wanted]
        state["installed"] = state["installed"] | dict.fromkeys(names, "99") | state.get("surprise", {})

    monkeypatch.setattr(colab, "_installed", lambda: state["installed"])
    monkeypatch.setattr(colab, "_pip_install", install)
    return state


def test_on_colabs_packages_only_what_is_absent_is_asked_for(pip):
    added = colab.install_missing()
    ((wanted, pins),) = pip["calls"]
    asked = {canonicalize_name(Requirement(text).name) for text in wanted}
    assert {"open-clip-torch", "onnx", "onnxscript", "onnxruntime", "av", "pandera", "papermill"} <= asked
    assert not asked & set(RUNTIME), "a package that Colab brings is out of the kit's range"
    assert not asked & {"torch", "numpy", "jupyterlab", "ipykernel", "snakemake", "nbdime", "unmask"}
    assert sorted(pins) == sorted(f"{name}=={version}" for name, version in RUNTIME.items())
    assert {text.split()[0] for text in added} == asked
    assert colab.install_missing() == [] and len(pip["calls"]) == 1


def test_a_package_out_of_range_is_replaced_but_never_torch_or_numpy(pip):
    pip["installed"] |= {"seaborn": "0.11.0"}
    assert "seaborn 99" in colab.install_missing()
    assert not any(pin.startswith("seaborn==") for pin in pip["calls"][0][1])
    for name in ("torch", "torchvision", "numpy"):
        pip["installed"] |= RUNTIME | {name: "0.1"}
        with pytest.raises(ColabError, match=rf"needs {name}>=.*here: 0\.1.*newer runtime"):
            colab.install_missing()
    assert len(pip["calls"]) == 1


@pytest.mark.parametrize("name", ["torch", "torchvision", "numpy"])
def test_a_torch_that_pip_replaced_all_the_same_is_an_error(pip, name):
    pip["surprise"] = {name: "3.0"}
    with pytest.raises(ColabError, match=rf"replaced {name} {RUNTIME[name]} -> 3\.0.*delete runtime"):
        colab.install_missing()


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    info = f"{name}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_pip_keeps_to_the_pins(tmp_path, monkeypatch):
    here = metadata.version("six")
    wheel(tmp_path, "unmask_probe", "1.0", "six<1")
    wheel(tmp_path, "six", "0.9")
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_DRY_RUN", "1")):
        monkeypatch.setenv(name, value)
    colab._pip_install(["unmask-probe"], [])  # pip itself would replace six
    with pytest.raises(ColabError, match=r"could not install unmask-probe(.|\n)*six(.|\n)*runtime version"):
        colab._pip_install(["unmask-probe"], [f"six=={here}"])


def test_front_end_names_are_dependencies_of_the_kit():
    project = colab.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert named >= colab.FRONT_END
    assert {canonicalize_name(r.name) for r in colab.requirements()} >= {"torch", "numpy", "papermill"}


def test_importing_the_module_needs_no_more_than_colab_has():
    # pandera, av, ... are installed by setup, which is in this module.
    code = "import sys, unmask.colab; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "lib")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    third = set(found.stdout.split()) - set(sys.stdlib_module_names)
    third = {name for name in third if not name.startswith("_")} - {"unmask", "cython_runtime"}
    assert third <= {"yaml", "packaging"}, third


# Archives


def study(root: Path, run: str = "tiny") -> Path:
    figures = root / ("figures" if run == "demo" else f"figures/{run}")
    names = [f"data/work/{run}/crops/shard-00000.tar", f"data/work/{run}/results/00_data.json"]
    for path in (*(root / name for name in names), figures / "a.png", figures / "tables" / "a.csv"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{run} {path.name}")
    return root


def content_of(root: Path) -> dict[str, str]:
    found = (path for path in root.rglob("*") if path.is_file() and path.name != archives.ORIGIN)
    return {str(path.relative_to(root)): path.read_text() for path in found}


@pytest.mark.parametrize("run", ["tiny", "demo", "demo-my-media-1a2b3c"])
def test_a_run_comes_back_as_it_was(tmp_path, run):
    root = study(tmp_path / "old", run)
    (root / "data/work" / run / ".half.json.x").write_text("half")
    (root / "data/work" / run / "link").symlink_to("/etc/passwd")
    if run == "demo":
        study(root, "tiny")  # beside it, and no part of it
    path = archive(run, tmp_path, root)
    assert path == tmp_path / f"run-{run}.zip"
    assert restore(path, tmp_path / "new")
    assert content_of(tmp_path / "new") == content_of(study(tmp_path / "wanted", run))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old", f"run-{run}.zip", "wanted"]
    assert [p.name for p in (root / "data" / "work").iterdir() if p.name.startswith(".")] == []


def test_restoring_replaces_nothing(tmp_path):
    path = archive("tiny", tmp_path, study(tmp_path / "old"))
    figure = tmp_path / "new/figures/tiny/a.png"
    figure.parent.mkdir(parents=True)
    figure.write_text("mine")
    assert restore(path, tmp_path / "new") and figure.read_text() == "mine"
    (tmp_path / "new/data/work/tiny/results/00_data.json").write_text("newer")
    before = content_of(tmp_path / "new")
    assert not restore(path, tmp_path / "new") and content_of(tmp_path / "new") == before


def test_an_archive_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    root = study(tmp_path / "old")
    path = archive("tiny", tmp_path, root)
    before = path.read_bytes()
    (root / "data/work/tiny/more").write_text("more")

    def full(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:50])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(archives.shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space"):
            archive("tiny", tmp_path, root)
    assert path.read_bytes() == before
    with zipfile.ZipFile(archive("tiny", tmp_path, root)) as file:
        assert "data/work/tiny/more" in file.namelist()


def test_what_names_a_file_is_read_before_it(tmp_path, monkeypatch):
    root = study(tmp_path / "old")
    work = root / "data/work/tiny"
    (work / "crops/index.parquet").write_text("index")
    for age, name in enumerate(["crops/index.parquet", "crops/shard-00000.tar", "results/00_data.json"]):
        os.utime(work / name, (2e9 - age, 2e9 - age))
    write, late = zipfile.ZipFile.write, work / "crops/shard-00001.tar"

    def busy(self, *arguments):  # something else makes files meanwhile
        if not late.exists():
            late.write_text("late")
            (root / "figures/tiny/a.png").unlink()
        return write(self, *arguments)

    monkeypatch.setattr(zipfile.ZipFile, "write", busy)
    with zipfile.ZipFile(archive("tiny", tmp_path, root)) as file:
        names = [name.removeprefix("data/work/tiny/") for name in file.namelist()]
    assert names[:3] == ["crops/index.parquet", "crops/shard-00000.tar", "results/00_data.json"]
    assert names[-1] == "crops/shard-00001.tar" and "figures/tiny/a.png" not in names


def test_a_restore_that_was_cut_short_starts_anew(tmp_path, monkeypatch):
    path, new = archive("tiny", tmp_path, study(tmp_path / "old")), tmp_path / "new"
    replace = os.replace

    def cut(source, target):
        if Path(target) == new / "data/work/tiny":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            restore(path, new)
    assert archives.runs(new) == []
    assert restore(path, new) and content_of(new) == content_of(study(tmp_path / "wanted"))


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "x", "data/work/tiny/../../../x", "data/work/other/x", "figures/x", "lib/unmask/cli.py", "C:\\x",
     "figures/tiny/..\\..\\x", "data/work/tinyx/x", "data/work/tiny", "figures/tiny"],
)  # fmt: skip
def test_an_archive_cannot_write_elsewhere(tmp_path, name):
    path = archive("tiny", tmp_path, study(tmp_path / "old"))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, "evil")
    with pytest.raises(ArchiveError, match="is refused.*outside the run tiny"):
        restore(path, tmp_path / "new")
    assert content_of(tmp_path / "new") == {}


@pytest.mark.parametrize("name", ["figures/tiny/a.png", "figures/tiny/tables/a.csv", "figures/tiny/", "figures/tables"])
def test_the_demos_archive_writes_no_other_runs_figures(tmp_path, name):
    path = archive("demo", tmp_path, study(tmp_path / "old", "demo"))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, "evil")
    with pytest.raises(ArchiveError, match=f"'{name}' lies outside the run demo"):
        restore(path, tmp_path / "new")
    assert content_of(tmp_path / "new") == {}


def test_an_archive_that_was_packed_anew_has_folders_too(tmp_path):
    old = study(tmp_path / "old", "demo")
    with zipfile.ZipFile(tmp_path / "run-demo.zip", "w") as file:
        for folder in ("data/work/demo", "data/work/demo/crops", "figures", "figures/tables"):
            file.write(old / folder, folder)
        for name in content_of(old):
            file.write(old / name, name)
    assert restore(tmp_path / "run-demo.zip", tmp_path / "new")
    assert content_of(tmp_path / "new") == content_of(old)


def test_a_file_where_another_entry_needs_a_folder_is_an_error_of_the_archive(tmp_path):
    path = archive("tiny", tmp_path, study(tmp_path / "old"))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("data/work/tiny/crops", "a file")
    with pytest.raises(ArchiveError, match="run-tiny.zip is damaged"):
        restore(path, tmp_path / "new")
    assert content_of(tmp_path / "new") == {}


def test_an_archive_with_a_password_is_an_error_of_the_archive(tmp_path):
    path = archive("tiny", tmp_path, study(tmp_path / "old"))
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the first entry's flags: encrypted
        data[data.index(signature) + place] |= 1
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match="run-tiny.zip is damaged.*password"):
        restore(path, tmp_path / "new")


def names_on(drive: Path) -> list[str]:
    return sorted(path.name for path in drive.iterdir())


def held(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_a_run_that_was_begun_before_drive_was_set_replaces_no_archive(tmp_path, capsys):
    drive, lesser = tmp_path / "drive", study(tmp_path / "lesser")
    drive.mkdir()
    good = study(tmp_path / "good")
    (good / "data/work/tiny/results/05_convnext.json").write_text("hours of work")
    before = held(archive("tiny", drive, good))
    archive("tiny", drive, lesser)
    said = capsys.readouterr().err
    assert "run-tiny.zip was another session's: kept as run-tiny.previous.zip" in said
    assert names_on(drive) == ["run-tiny.previous.zip", "run-tiny.zip"]
    assert held(drive / "run-tiny.previous.zip") == before and held(drive / "run-tiny.zip") != before
    archive("tiny", drive, lesser)
    assert names_on(drive) == ["run-tiny.previous.zip", "run-tiny.zip"] and not capsys.readouterr().err
    shutil.rmtree(lesser)  # and begun once more
    archive("tiny", drive, study(lesser))
    assert names_on(drive) == ["run-tiny.previous-2.zip", "run-tiny.previous.zip", "run-tiny.zip"]
    assert held(drive / "run-tiny.previous.zip") == before


def test_a_session_that_was_lost_goes_on_with_its_archive(tmp_path, capsys):
    drive = tmp_path / "drive"
    drive.mkdir()
    restore(archive("tiny", drive, study(tmp_path / "old")), tmp_path / "new")
    (tmp_path / "new/data/work/tiny/more").write_text("more")
    archive("tiny", drive, tmp_path / "new")
    assert names_on(drive) == ["run-tiny.zip"] and "data/work/tiny/more" in held(drive / "run-tiny.zip")
    assert not capsys.readouterr().err


def test_two_sessions_at_once_keep_the_last_of_both(tmp_path):
    drive, one, two = tmp_path / "drive", study(tmp_path / "one"), tmp_path / "two"
    drive.mkdir()
    restore(archive("tiny", drive, one), two)
    for turn in range(3):  # the second writes upon what it restored, the first finds what it did not write, ...
        for root in (two, one):
            (root / "data/work/tiny/of").write_text(f"{root.name} {turn}")
            archive("tiny", drive, root)
    kept = {name: held(drive / name)["data/work/tiny/of"].decode() for name in names_on(drive)}
    assert kept == {"run-tiny.previous.zip": "two 2", "run-tiny.previous-2.zip": "one 1", "run-tiny.zip": "one 2"}


def test_an_archive_that_cannot_be_read_is_not_replaced_either(tmp_path):
    (tmp_path / "run-tiny.zip").write_bytes(b"PK of another")
    archive("tiny", tmp_path, study(tmp_path / "old"))
    assert (tmp_path / "run-tiny.previous.zip").read_bytes() == b"PK of another"


def test_a_link_in_an_archive_is_no_link_afterwards(tmp_path):
    path = archive("tiny", tmp_path, study(tmp_path / "old"))
    link = zipfile.ZipInfo("data/work/tiny/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link, "/etc/passwd")
    restore(path, tmp_path / "new")
    assert not (tmp_path / "new/data/work/tiny/link").is_symlink()


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b.replace(b"tiny a", b"tinyXa")]
)
def test_a_damaged_archive_is_refused_whole(tmp_path, damage):
    path = archive("tiny", tmp_path, study(tmp_path / "old"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArchiveError, match="run-tiny.zip is damaged"):
        restore(path, tmp_path / "new")
    assert content_of(tmp_path / "new") == {}


def test_errors_say_what_to_do(tmp_path):
    root = study(tmp_path / "old")
    with pytest.raises(ArchiveError, match="no run 'demo' here; there are: tiny"):
        archive("demo", tmp_path, root)
    with pytest.raises(ArchiveError, match="no run '../work/tiny'"):
        archive("../work/tiny", tmp_path, root)
    with pytest.raises(ArchiveError, match="DRIVE = True"):
        archive("tiny", tmp_path / "drive" / "MyDrive" / "unmask", root)
    with pytest.raises(ArchiveError, match="called run-RUN.zip"):
        restore(tmp_path / "run-.zip", root)


def test_changed_runs_are_archived_and_others_not(tmp_path, capsys):
    root, known = study(tmp_path / "old"), {}
    archive_changed(tmp_path, root, known)
    path = tmp_path / "run-tiny.zip"
    path.unlink()
    archive_changed(tmp_path, root, known)
    assert not path.exists(), "nothing changed"
    changed = root / "data/work/tiny/results/00_data.json"
    os.utime(changed, (2e9, 2e9))
    archive_changed(tmp_path / "no" / "drive", root, known)
    assert "tiny could not be archived" in capsys.readouterr().err
    archive_changed(tmp_path, root, known)
    assert path.exists()


@pytest.mark.parametrize(
    "error", [RuntimeError("File size too large"), OSError(5, "gone"), zipfile.LargeZipFile("4 GB")]
)
@pytest.mark.parametrize("step", ["_state", "archive"])
def test_the_keeper_lives_on_and_says_what_failed(tmp_path, monkeypatch, capsys, step, error):
    root, known = study(tmp_path / "old"), {}

    def fails(*arguments):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(archives, step, fails)
        archive_changed(tmp_path, root, known)
    assert f"tiny could not be archived: {error}" in capsys.readouterr().err
    archive_changed(tmp_path, root, known)
    assert (tmp_path / "run-tiny.zip").exists()


def test_there_is_one_keeper(tmp_path):
    first = archives.keep(tmp_path, study(tmp_path / "old"), minutes=1e5)
    assert first.daemon and archives.keep(tmp_path, tmp_path, minutes=1e5) is first
    assert [thread.name for thread in threading.enumerate()].count(archives.KEEPER) == 1


# The session


def test_setup_mounts_drive_only_if_asked(tmp_path, monkeypatch, capsys):
    content, drive, root = tmp_path / "content", tmp_path / "drive", tmp_path / "root"
    (drive / "unmask").mkdir(parents=True)
    content.mkdir()
    archive("tiny", drive / "unmask", study(tmp_path / "old"))
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setenv("STAND_IN_DRIVE", str(drive))
    monkeypatch.setenv("PYTHONPATH", "/mine")
    kept = []
    monkeypatch.setattr(colab, "keep", lambda *arguments: kept.append(arguments))
    monkeypatch.setattr(colab, "install_missing", lambda root: ["av 18"])
    colab.setup(content, root=root)
    said = capsys.readouterr().out
    assert "installed: av 18" in said and f"torch {metadata.version('torch')}" in said and "device: " in said
    assert "DRIVE = True keeps it" in said and not (content / "drive").exists() and archives.runs(root) == []
    colab.setup(content, drive=True, root=root)
    assert "run-tiny.zip: restored" in capsys.readouterr().out and archives.runs(root) == ["tiny"]
    assert kept == [(content / "drive/MyDrive/unmask", root)]
    colab.setup(content, drive=True, root=root)
    assert "run-tiny.zip: left alone" in capsys.readouterr().out
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(root / "lib"), "/mine"]


def test_setup_restores_an_uploaded_archive(tmp_path, monkeypatch, capsys):
    archive("tiny", tmp_path, study(tmp_path / "old"))
    monkeypatch.setattr(colab, "install_missing", lambda root: [])
    monkeypatch.setenv("PYTHONPATH", "")
    colab.setup(tmp_path, root=tmp_path / "root")
    assert archives.runs(tmp_path / "root") == ["tiny"]


def test_setup_skips_what_is_not_called_as_an_archive_is(tmp_path, monkeypatch, capsys):
    archive("demo", tmp_path, study(tmp_path / "old", "demo"))
    shutil.copy(tmp_path / "run-demo.zip", tmp_path / "run-demo (1).zip")
    shutil.copy(tmp_path / "run-demo.zip", tmp_path / "run-tiny.previous.zip")
    shutil.copy(tmp_path / "run-demo.zip", tmp_path / "run-tiny.previous-2.zip")
    monkeypatch.setattr(colab, "install_missing", lambda root: [])
    monkeypatch.setenv("PYTHONPATH", "")
    colab.setup(tmp_path, root=tmp_path / "root")
    said = capsys.readouterr().out
    assert archives.runs(tmp_path / "root") == ["demo"] and "run-demo.zip: restored" in said
    assert [line.split(":")[0] for line in said.splitlines() if "skipped" in line] == [
        "run-demo (1).zip", "run-tiny.previous-2.zip", "run-tiny.previous.zip"
    ]  # fmt: skip


def test_device_names_the_gpu_and_what_it_computes_in(monkeypatch):
    from types import SimpleNamespace

    import torch

    from unmask import training

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device: processor" in colab.device() and "Change runtime type" in colab.device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=15 * 2**30))
    for name, words in (("no", "float32"), ("bf16", "bfloat16")):
        monkeypatch.setattr(training, "precision", lambda name=name: name)
        assert colab.device() == f"device: Tesla T4, 15 GiB; trains in {words}"


def test_chapters_that_another_needs_are_run_once_in_order(tmp_path, monkeypatch):
    for name in ("lib", "notebooks", "profiles"):
        (tmp_path / name).symlink_to(ROOT / name)
    results, ran = tmp_path / "data/work/tiny/results", []
    results.mkdir(parents=True)
    (results / "00_data.json").write_text("{}")

    def headless(command, cwd, **more):
        assert cwd == tmp_path and command[1:3] == ["-m", "unmask.headless"] and "tiny" in command
        ran.append(Path(command[3]).stem)
        return subprocess.CompletedProcess(command, int(ran[-1] == "07_clip_prompts"))

    monkeypatch.setattr(subprocess, "run", headless)
    with pytest.raises(ColabError, match="07_clip_prompts failed"):
        colab.run_before("8", "tiny", tmp_path)
    assert ran == ["01_preprocessing", "07_clip_prompts"]
    ran.clear()
    assert colab.run_before("06_temporal", "tiny", tmp_path) == ran == ["01_preprocessing", "05_convnext"]


def test_uploads_of_colabs_older_widgets(tmp_path):
    value = {"a.mp4": {"metadata": {"name": "a.mp4"}, "content": b"1"}, "../b.mp4": {"metadata": {}, "content": b"2"}}
    kept = keep_uploads(value, tmp_path)
    assert [(path.name, path.read_bytes()) for path in kept] == [("a.mp4", b"1"), ("b.mp4", b"2")]
    assert all(path.resolve().is_relative_to(tmp_path) for path in kept)
