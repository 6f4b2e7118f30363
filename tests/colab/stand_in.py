"""Notebooks as Colab would run them, on this machine: `python tests/colab/stand_in.py FOLDER --python python3.12`.

A fresh environment with the versions of runtime-2026.01.txt (several GB), a kernel that has `google.colab`, a folder
that plays /content, and one session after another, cell by cell through papermill, with profile tiny:

1. the kit uploaded as a zip, Drive mounted: chapters 00 and 01, archived
2. a new machine, the kit cloned, Drive mounted: chapter 05 goes on from the archive
3. a new machine without Drive: chapter 08, after `run_before` has run what it needs

Exit code 0 if every notebook ran and no package of the list changed. Needs the network, git and the kit's own
environment to run in; delete FOLDER afterwards.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import papermill

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PINS = HERE / "runtime-2026.01.txt"


def environment(folder: Path, python: str) -> Path:
    """The interpreter of a new environment with Colab's versions; made once."""
    interpreter = folder / "environment" / "bin" / "python"
    if not (folder / "ready").is_file():
        subprocess.run([python, "-m", "venv", str(folder / "environment")], check=True)
        install = [str(interpreter), "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r", str(PINS)]
        subprocess.run(install, check=True)
        (folder / "ready").touch()
    kernel = {"argv": [str(interpreter), str(HERE / "kernel.py"), "-f", "{connection_file}"]}
    kernel |= {"display_name": "Colab", "language": "python"}
    place = folder / "jupyter" / "kernels" / "colab"
    place.mkdir(parents=True, exist_ok=True)
    (place / "kernel.json").write_text(json.dumps(kernel))
    return interpreter


def versions(interpreter: Path) -> dict[str, str]:
    """Package to version, as pip sees the environment."""
    command = [str(interpreter), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {entry["name"]: entry["version"] for entry in listed}


def upload(target: Path) -> None:
    """The working tree as one would download it: all in one folder of a zip."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for name in filter(None, names):
            file.write(ROOT / name, f"unmask-main/{name}")


def session(folder: Path, name: str) -> Path:
    """An empty /content of a new machine."""
    content = folder / name / "content"
    content.mkdir(parents=True)
    return content


def run(stem: str, content: Path, repository: str = "", drive: bool = False, before: str = "", after: str = "") -> None:
    """Run a notebook of the working tree with profile tiny; `before` and `after` are a user's own cells around it."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for old, new in (('"/content"', f'"{content}"'), ('REPOSITORY = ""', f'REPOSITORY = "{repository}"')):
        assert old in first.source
        first.source = first.source.replace(old, new)
    first.source = first.source.replace("DRIVE = False", f"DRIVE = {drive}")
    if before:
        notebook.cells.insert(notebook.cells.index(first) + 1, nbformat.v4.new_code_cell(before))
    if after:
        notebook.cells.append(nbformat.v4.new_code_cell(after))
    opened = content / f"{stem}.ipynb"
    nbformat.write(notebook, opened)
    start = time.perf_counter()
    papermill.execute_notebook(
        opened, opened.with_suffix(".out.ipynb"), parameters={"profile": "tiny"}, kernel_name="colab", cwd=content,
        progress_bar=False,
    )  # fmt: skip
    said = nbformat.read(opened.with_suffix(".out.ipynb"), as_version=4)
    cell = next(cell for cell in said.cells if "colab" in cell.metadata.get("tags", []))
    print(f"{stem}: {time.perf_counter() - start:.0f} s")
    print(
        "".join(f"    {line}\n" for output in cell.outputs for line in output.get("text", "").splitlines()), flush=True
    )


def main() -> int:
    """Set up, run the three sessions, compare the packages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="python3.12", help="the interpreter of Colab's minor version")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    interpreter = environment(folder, options.python)
    drive = folder / "drive"
    drive.mkdir(exist_ok=True)
    os.environ |= {"STAND_IN_DRIVE": str(drive), "JUPYTER_PATH": str(folder / "jupyter"), "PYTHONPATH": str(HERE)}
    before = versions(interpreter)

    content = session(folder, "first")
    upload(content / "unmask.zip")
    run("00_data", content, drive=True)
    archive = f'from unmask import colab\n\ncolab.archive("tiny", "{content}/drive/MyDrive/unmask")'
    run("01_preprocessing", content, drive=True, after=archive)

    run("05_convnext", session(folder, "second"), repository=f"file://{ROOT}", drive=True)

    needs = 'from unmask import colab\n\ncolab.run_before("08", "tiny")'
    run("08_clip_d2st", session(folder, "third"), repository=f"file://{ROOT}", before=needs)

    after = versions(interpreter)
    changed = {name: (version, after.get(name)) for name, version in before.items() if after.get(name) != version}
    print(f"{len(before)} packages before, {len(after)} after; new:", *sorted(set(after) - set(before)))
    print("changed:", changed or "none")
    print({name: after[name] for name in ("torch", "torchvision", "numpy")})
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
