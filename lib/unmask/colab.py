"""Google Colab: a session made ready for the notebooks without touching its PyTorch, and runs kept on Drive.

The first cell of every notebook brings the kit into the session and calls `setup`; elsewhere it does nothing. Before
`setup` has installed what is missing, this module may import no more than Colab itself brings.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from unmask.archives import DRIVE, MINUTES, archive, keep, restore, run_of
from unmask.profile import ROOT

KEPT = ("torch", "torchvision", "numpy")
# The front end is Colab's own, and the kernel that runs these lines is part of it.
FRONT_END = {"jupyterlab", "ipykernel", "ipywidgets", "nbdime", "snakemake"}
__all__ = ["ColabError", "archive", "device", "install_missing", "restore", "run_before", "setup"]


class ColabError(RuntimeError):
    """The session cannot be made ready; the message says what to do."""


def setup(content: str | os.PathLike = "/content", drive: bool = False, root: Path = ROOT) -> None:
    """Make this session ready: install what the kit lacks, name the device, and with `drive` keep the runs there.

    With `drive`, Google Drive is mounted below `content`, runs archived in MyDrive/unmask that are not here are
    restored, and from then on every run that changed is archived there every ten minutes. Without it, archives that
    were uploaded to `content` are. Raises ColabError where the session's packages are too old for the kit or pip fails,
    ArchiveError for a damaged archive.
    """
    added = install_missing(root)
    print("installed:", ", ".join(added) or "nothing, all is here")
    print(
        "untouched:", ", ".join(f"{name} {version}" for name, version in sorted(_installed().items()) if name in KEPT)
    )
    lib, inherited = str(root / "lib"), os.environ.get("PYTHONPATH", "")
    if lib not in inherited.split(os.pathsep):  # for the processes that decode, train and run other notebooks
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [lib, inherited]))
    print(device())
    folder = _mounted(Path(content)) if drive else Path(content)
    for path in sorted(folder.glob("run-*.zip")):
        if run_of(path) is None:  # a browser's second download, or an archive that was set aside
            print(f"{path.name}: skipped; to have it restored, call it run-RUN.zip, RUN being the run that it holds")
        else:
            print(f"{path.name}:", "restored" if restore(path, root) else "left alone, that run is here already")
    if drive:
        keep(folder, root)
        print(f"Runs are archived to {folder} every {MINUTES:.0f} minutes, and by unmask.colab.archive(run).")
    else:
        print("What is made here ends with this session; DRIVE = True keeps it.")


def requirements(root: Path = ROOT) -> list[Requirement]:
    """What the notebooks need: the kit's dependencies that apply here, without the front end."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    return [r for r in wanted if (not r.marker or r.marker.evaluate()) and canonicalize_name(r.name) not in FRONT_END]


def install_missing(root: Path = ROOT) -> list[str]:
    """Install what is not here yet, or too old, and leave every other package as it is; returns what was asked for.

    Raises ColabError if that cannot be: pip fails, or torch, torchvision or numpy is out of the kit's range.
    """
    before = _installed()
    names = {r: canonicalize_name(r.name) for r in requirements(root)}
    wanted = [r for r in names if not r.specifier.contains(before.get(names[r], "0"), prereleases=True)]
    if old := [f"{r} (here: {before[names[r]]})" for r in wanted if names[r] in KEPT and names[r] in before]:
        raise ColabError(f"The kit needs {', '.join(old)}. Choose a newer runtime: Runtime > Change runtime type.")
    if not wanted:
        return []
    replaced = {names[r] for r in wanted}
    # Everything here stays as it is: Colab's packages are built to fit each other, and some are loaded already.
    pins = [f"{name}=={version}" for name, version in before.items() if name not in replaced]
    _pip_install([f"{r.name}{r.specifier}" for r in wanted], pins)
    importlib.invalidate_caches()
    after = _installed()
    if changed := [
        f"{name} {before[name]} -> {after.get(name)}" for name in KEPT if before.get(name) != after.get(name)
    ]:
        raise ColabError(
            f"Installing replaced {', '.join(changed)}: Runtime > Disconnect and delete runtime, run again."
        )
    return sorted(f"{names[r]} {after[names[r]]}" for r in wanted)


def _installed() -> dict[str, str]:
    """Version by canonical name of what Python would import; system packages with odd versions are left out."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.version
        try:
            Version(version)
        except (InvalidVersion, TypeError):
            continue
        if name:
            found.setdefault(canonicalize_name(name), version)  # the first on the path is the one that counts
    return found


def _pip_install(wanted: list[str], pins: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", "--constraint", str(constraints)]
        result = subprocess.run(
            [*command, *wanted], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    if result.returncode != 0:
        raise ColabError(
            f"pip could not install {', '.join(wanted)} beside this session's packages:\n{result.stdout[-1500:]}\n"
            "Run the cell again if the network failed; else choose another runtime version (docs/colab.md)."
        )


def device() -> str:
    """The GPU and the precision that trainings will use, in words."""
    import torch

    from unmask.training import precision

    computes = {"bf16": "bfloat16", "no": "float32"}[precision()]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"device: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB; trains in {computes}"
    return f"device: processor, trains in {computes}; for a GPU: Runtime > Change runtime type, and run this cell again"


def run_before(chapter: str, profile: str = "demo", root: Path = ROOT) -> list[str]:
    """Run, without a front end, the chapters that `chapter` (its number or stem) needs and that left no results yet.

    Each notebook on Colab has a session of its own, so that what earlier ones left is not there. Returns the stems of
    those that ran; raises ColabError when one fails, WorkflowError or ProfileError for an unknown chapter or profile.
    """
    from unmask.plan import make_plan
    from unmask.profile import load_profile
    from unmask.workflow import CHAPTERS, select

    plan = make_plan(load_profile(profile, root=root), CHAPTERS, root)
    needed, ran = set(select(CHAPTERS, chapter).needs), []
    for other in reversed(CHAPTERS):  # they are in order, so one pass from the end meets every need
        needed |= set(other.needs) if other.stem in needed else set()
    for step in plan["chapters"]:
        if step["stem"] in needed and not (root / step["results"]).is_file():
            command = [sys.executable, "-m", "unmask.headless", step["notebook"], "--work", plan["work"]]
            command += ["-p", "profile", profile, "--fingerprint", step["fingerprint"]]
            if subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL).returncode != 0:
                raise ColabError(f"{step['stem']} failed; open that notebook and run it to see where.")
            ran.append(step["stem"])
    return ran


def _mounted(content: Path) -> Path:
    from google.colab import drive

    drive.mount(str(content / "drive"))
    folder = content / DRIVE
    folder.mkdir(parents=True, exist_ok=True)
    return folder
