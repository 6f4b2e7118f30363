from importlib import metadata

import pytest
from test_profile import resolved

from unmask import doctor
from unmask.doctor import checks, count_media
from unmask.profile import open_study


@pytest.fixture
def models(monkeypatch, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("UNMASK_MODELS", str(folder))
    return folder


def by_name(study):
    return {check.name: check for check in checks(study)}


def test_this_machine_can_run_the_demo(models, tmp_path):
    found = by_name(open_study(resolved(tmp_path / "root")))
    assert {"Python", "GPU", "precision", "H.264", "decord", "YuNet weights", "disk space", "cores"} <= set(found)
    assert found["H.264"].status == "ok", found["H.264"].line()
    assert found["YuNet weights"].status == "optional" and str(models) in found["YuNet weights"].detail
    assert found["data set world-a"].status == "ok"


def test_every_dependency_has_a_line(monkeypatch, tmp_path, models):
    requires = ["torch>=2", "no_such_package>=1", "other-one; extra == 'uniface'", "decord; sys_platform == 'linux'"]
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    found = by_name(open_study(resolved(tmp_path / "root")))
    assert found["torch"].status == "ok" and found["torch"].detail == metadata.version("torch")
    assert found["no_such_package"].status == "missing" and "constraints.txt" in found["no_such_package"].fix
    assert found["other-one"].status == "optional" and ".[uniface]" in found["other-one"].fix


def test_weights_are_missing_only_where_the_profile_needs_them(models, tmp_path):
    study = open_study(resolved(tmp_path / "root", **{"preprocess.locator": "yunet"}))
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
    found = by_name(open_study(resolved(root, run="x", **{"data.sets": sets})))
    assert found["data set folder=data/raw/Set One"].detail == "3 media"
    assert found["data/raw/Set One"].detail == "3 media" and count_media(raw) == 3
    assert found["data set ffpp=data/raw/none"].status == "missing"
    assert found[f"data set manifest={manifest}"].status == "ok"
    assert found[f"data set folder={root / 'profiles'}"].status == "missing"


def test_broken_codec_is_a_finding_not_a_crash(monkeypatch, tmp_path, models):
    def broken():
        raise ValueError("no encoder libx264")

    monkeypatch.setattr(doctor, "_h264_clip", broken)
    check = by_name(open_study(resolved(tmp_path / "root")))["H.264"]
    assert check.status == "missing" and "libx264" in check.detail and check.fix


def test_exit_code_and_one_line_each(monkeypatch, tmp_path, models, capsys):
    path = resolved(tmp_path / "root", run="x", **{"data.sets": ["ffpp=nowhere"]})
    assert doctor.main(str(path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(checks(open_study(path)))
    assert all(line.startswith(("[ok] ", "[missing] ", "[optional] ")) for line in lines)
    nothing_missing = [doctor.Check("a", "ok", "b"), doctor.Check("c", "optional", "d")]
    monkeypatch.setattr(doctor, "checks", lambda study: nothing_missing)
    assert doctor.main(str(path)) == 0
