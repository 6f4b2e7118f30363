import shutil
import sys
from importlib import metadata

import pytest
from test_profile import resolved

from unmask import doctor
from unmask.doctor import checks, count_media
from unmask.profile import ROOT, open_study


def kit(root, *arguments, **more):
    path = resolved(root, *arguments, **more)
    shutil.copy(ROOT / "pyproject.toml", root)
    return path


@pytest.fixture
def models(monkeypatch, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("UNMASK_MODELS", str(folder))
    return folder


def by_name(study):
    return {check.name: check for check in checks(study)}


def test_this_machine_can_run_the_demo(models, tmp_path):
    path = kit(tmp_path / "root", **{"data.sets": ["world=w"]})
    found = by_name(open_study(path))
    assert {"Python", "GPU", "precision", "H.264", "decord", "YuNet weights", "disk space", "cores"} <= set(found)
    assert found["H.264"].status == "ok", found["H.264"].line()
    assert found["YuNet weights"].status == "optional" and str(models) in found["YuNet weights"].detail
    assert found["data set w"].status == "ok" and "not made yet" in found["data set w"].detail
    (path.parent / "w").mkdir()
    (path.parent / "w" / "a.mp4").touch()
    assert "1 media" in by_name(open_study(path))["data set w"].detail


def test_every_dependency_has_a_line(models, tmp_path):
    study = open_study(kit(tmp_path / "root"))
    (study.root / "pyproject.toml").write_text(
        "[project]\ndependencies = ['numpy>=2', 'no_such_package>=1', 'pandas<1', 'decord>=0.6; x']\n"
        "optional-dependencies = {uniface = ['other-one>=4']}\n"
    )
    found = by_name(study)
    assert found["numpy"].status == "ok" and found["numpy"].detail == metadata.version("numpy")
    assert found["no_such_package"].status == "missing" and "constraints.txt" in found["no_such_package"].fix
    assert found["pandas"].status == "missing" and "<1 is needed" in found["pandas"].detail
    assert found["other-one"].status == "optional" and ".[uniface]" in found["other-one"].fix


def test_nothing_is_missing_where_the_tests_run(models, tmp_path):
    missing = [check.line() for check in checks(open_study(kit(tmp_path / "root"))) if check.status == "missing"]
    assert missing == []


def test_weights_are_missing_only_where_the_profile_needs_them(models, tmp_path):
    study = open_study(kit(tmp_path / "root", **{"preprocess.locator": "yunet"}))
    assert by_name(study)["YuNet weights"].status == "missing"
    (models / "face_detection_yunet.onnx").touch()
    assert by_name(study)["YuNet weights"].status == "ok"


def test_data_sets_are_counted(models, tmp_path):
    root = tmp_path / "root"
    raw = root / "data" / "raw" / "Set One"
    (raw / "real").mkdir(parents=True)
    for name in ("a.mp4", "b.MP4", "c.png", "notes.txt"):
        (raw / "real" / name).touch()
    manifest = tmp_path / "m.parquet"
    manifest.touch()
    sets = ["folder=data/raw/Set One", "ffpp=data/raw/none", f"manifest={manifest}", f"folder={root / 'profiles'}"]
    found = by_name(open_study(kit(root, run="x", **{"data.sets": sets})))
    assert found["data set folder=data/raw/Set One"].detail == "3 media"
    assert found["data/raw/Set One"].detail == "3 media" and count_media(raw) == 3
    assert found["data set ffpp=data/raw/none"].status == "missing"
    assert found[f"data set manifest={manifest}"].status == "ok"
    assert found[f"data set folder={root / 'profiles'}"].status == "missing"


def test_broken_codec_is_a_finding_not_a_crash(monkeypatch, tmp_path, models):
    def broken():
        raise ValueError("no encoder libx264")

    monkeypatch.setattr(doctor, "_h264_clip", broken)
    check = by_name(open_study(kit(tmp_path / "root")))["H.264"]
    assert check.status == "missing" and "libx264" in check.detail and check.fix


def test_without_pytorch_the_rest_is_still_said(monkeypatch, tmp_path, models):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = by_name(open_study(kit(tmp_path / "root")))
    assert "does not load" in found["GPU"].detail and found["cores"].status == "ok"


def test_exit_code_and_one_line_each(monkeypatch, tmp_path, models, capsys):
    path = kit(tmp_path / "root", run="x", **{"data.sets": ["ffpp=nowhere"]})
    assert doctor.main(str(path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(checks(open_study(path)))
    assert all(line.startswith(("[ok] ", "[missing] ", "[optional] ")) for line in lines)
    nothing_missing = [doctor.Check("a", "ok", "b"), doctor.Check("c", "optional", "d")]
    monkeypatch.setattr(doctor, "checks", lambda study: nothing_missing)
    assert doctor.main(str(path)) == 0
