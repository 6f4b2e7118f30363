"""The lists of packages agree with each other, and the scripts with what they promise."""

import os
import re
import subprocess
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from unmask.profile import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]
CONSTRAINTS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in CONSTRAINTS}


def test_constraints_are_exact_versions_and_nothing_else():
    for line in CONSTRAINTS:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
    assert len(PINS) == len(CONSTRAINTS) and "unmask" not in PINS


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_inside_its_range(requirement):
    assert Version(PINS[canonicalize_name(requirement.name)]) in requirement.specifier


def test_conda_environment_has_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "python=3.11" in conda and "pip" in conda and environment["name"] == "unmask"
    assert pip[-1] == "-e ."
    listed = [Requirement(line) for line in pip[:-1]]
    assert {canonicalize_name(r.name) for r in listed} == {canonicalize_name(r.name) for r in DIRECT}
    for requirement in listed:
        assert str(requirement.specifier) == f"=={PINS[canonicalize_name(requirement.name)]}"
    markers = {canonicalize_name(r.name): str(r.marker) for r in DIRECT if r.marker}
    assert {canonicalize_name(r.name): str(r.marker) for r in listed if r.marker} == markers


def test_opencv_is_one_wheel_below_5():
    assert Version(metadata.version("opencv-python-headless")) < Version("5")
    others = {"opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"}
    assert not others & {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}


def test_ci_calls_the_tests_and_nothing_else():
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["exec ./run_tests.sh"]
    for script in ("run_all.sh", "run_tests.sh", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK)
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def shell(tmp_path, python3):
    """use_environment with a `python3` of ours on the PATH, in a folder that looks like a clone."""
    folder = tmp_path / "clone"
    (folder / "jobs").mkdir(parents=True)
    for name in ("jobs/environment.sh", "pyproject.toml", "constraints.txt"):
        (folder / name).write_text((ROOT / name).read_text())
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (programs / name).write_text(f"#!/bin/bash\n{python3}\n")
        (programs / name).chmod(0o755)
    command = "source jobs/environment.sh; use_environment; echo PATH=$PATH; echo PYTHONPATH=$PYTHONPATH"
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": "/mine"}
    result = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return folder, result


def test_active_environment_with_the_kit_is_used(tmp_path):
    folder, result = shell(tmp_path, "exit 0")
    assert result.returncode == 0 and ".venv" not in result.stdout
    assert f"PYTHONPATH={folder}/lib:/mine" in result.stdout and not (folder / ".venv").exists()


def test_otherwise_a_venv_is_made_once(tmp_path):
    venv = """case "$*" in
*metadata*) exit 1;;
*version_info*) exit 0;;
*hashlib*) cat >/dev/null; echo hash;;
"-m venv --clear .venv")
    mkdir -p .venv/bin
    printf '#!/bin/bash\\necho "$@" >>calls' >.venv/bin/python3
    chmod +x .venv/bin/python3;;
esac"""
    folder, result = shell(tmp_path, venv)
    assert result.returncode == 0, result.stderr
    assert f"PATH={folder}/.venv/bin:" in result.stdout and "Setting up .venv" in result.stderr
    assert (folder / "calls").read_text() == "-m pip install --quiet -c constraints.txt -e .\n"
    assert (folder / ".venv" / "installed").read_text() == "hash\n"


def test_too_old_a_python_is_said(tmp_path):
    _, result = shell(tmp_path, "exit 1")
    assert result.returncode == 1 and "Python 3.11 or newer is needed" in result.stderr
