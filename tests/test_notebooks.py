"""Every notebook: clean as committed, and runs with profile tiny without its sources changing."""

import ast
import os
import subprocess
import sys

import nbformat
import pytest
from nbdime import diff_notebooks
from nbdime.diffing.notebooks import (
    reset_notebook_differ,
    set_notebook_diff_ignores,
    set_notebook_diff_targets,
)
from test_profile import resolved

from unmask.profile import ROOT
from unmask.workflow import CHAPTERS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST_FUNCTION = 8


def read(path):
    return nbformat.read(path, as_version=4)


def source_changes(before, after):
    """nbdime's diff of two notebooks' sources: outputs, metadata and ids are left out."""
    # Cell ids and execution counts are reported even with details off, unless they are ignored by path.
    set_notebook_diff_targets(sources=True, outputs=False, attachments=True, metadata=False, details=False)
    set_notebook_diff_ignores({"/cells/*": ["execution_count", "id"]})
    try:
        return diff_notebooks(before, after)
    finally:
        reset_notebook_differ()


def without_injected_cell(notebook):
    cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    assert len(cells) == len(notebook.cells) - 1
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def python(*arguments, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, **more)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code), "clear the outputs before committing"
    assert all(cell.execution_count is None for cell in code), "clear the outputs before committing"
    assert notebook.metadata.kernelspec.name == "python3"
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = [node.targets[0].id for node in ast.parse(parameters.source).body if isinstance(node, ast.Assign)]
    assert names[:2] == ["profile", "changes"]
    assert 'profile = "demo"\nchanges = {}' in parameters.source, "a notebook is committed with the demo's parameters"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_defines_nothing_long(path):
    for cell in read(path).cells:
        if cell.cell_type != "code":
            continue
        code = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
        for node in ast.walk(ast.parse(code)):
            assert not isinstance(node, ast.ClassDef), f"class {node.name} belongs in lib/unmask"
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines: it belongs in lib/unmask"


def test_template_runs_and_its_sources_stay(tmp_path):
    source = ROOT / "notebooks" / "template.ipynb"
    profile = resolved(tmp_path, "tiny")
    work = profile.parent
    result = python("-m", "unmask.headless", str(source), "--work", str(work), "-p", "profile", str(profile))
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "figures" / "tiny" / "template_guess_range.png").is_file()
    assert (tmp_path / "figures" / "tiny" / "tables" / "template_guess.csv").is_file()
    executed = without_injected_cell(read(work / "notebooks" / "template.ipynb"))
    assert any(cell.get("outputs") for cell in executed.cells)
    assert source_changes(read(source), executed) == []
    executed.cells[-1].source += "\n# changed"
    assert source_changes(read(source), executed) != [], "the comparison must see a change"


@pytest.fixture(scope="module")
def study():
    """The whole study with profile tiny, through the workflow, into data/work/tiny."""
    result = python("-m", "unmask.workflow", "--profile", "tiny", "--jobs", "2")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    return ROOT / "data" / "work" / "tiny"


@pytest.mark.parametrize("stem", [chapter.stem for chapter in CHAPTERS])
def test_chapter_runs_with_profile_tiny_and_its_sources_stay(study, stem):
    assert (study / "results" / f"{stem}.json").is_file()
    executed = without_injected_cell(read(study / "notebooks" / f"{stem}.ipynb"))
    assert source_changes(read(ROOT / "notebooks" / f"{stem}.ipynb"), executed) == []


def test_study_leaves_its_report(study):
    page = (ROOT / "figures" / "tiny" / "report.html").read_text()
    assert 'class="missing"' not in page
    assert all(f'id="{chapter.stem}"' in page for chapter in CHAPTERS)


def test_every_numbered_notebook_is_a_chapter():
    numbered = [path.stem for path in NOTEBOOKS if path.stem[0].isdigit()]
    assert numbered == [chapter.stem for chapter in CHAPTERS]
