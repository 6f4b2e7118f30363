"""What a run has to do: chapters, the files each depends on, and whether it is up to date."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from unmask.profile import Profile, digest, figures_folder

# What `unmask.figures` leaves beside a file that it names as saved.
BESIDE = {".png": (".pdf", ".json"), ".html": (".png", ".pdf", ".json"), ".csv": (".md", ".tex", ".json")}


class WorkflowError(RuntimeError):
    """The run cannot start; the message says what to change."""


@dataclass(frozen=True)
class Chapter:
    """A notebook of the study: `stem` such as 05_convnext, the chapters it `needs`, and the profile `keys` it reads.

    `keys` are top-level keys; a change of one reruns this chapter and those that need it. Keys that only a needed
    chapter reads are not repeated. `gpu` says that it computes with networks, so that on a cluster it asks for a GPU.
    """

    stem: str
    needs: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    gpu: bool = False

    @property
    def number(self) -> str:
        return self.stem.split("_")[0]

    @property
    def rule(self) -> str:
        return f"chapter_{self.stem}"


def notebook_modules(notebook: Path, root: Path) -> list[Path]:
    """The files of lib/unmask that a notebook's code imports, directly or through others, sorted."""
    return import_closure(list(_imports(notebook_code(notebook).body, package="")), root / "lib")


def notebook_code(notebook: Path) -> ast.Module:
    """All code of a notebook; WorkflowError if it is no Python."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    # IPython's own lines are not Python.
    code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))
    try:
        return ast.parse(code)
    except SyntaxError as error:
        raise WorkflowError(f"{notebook.name} has a syntax error: {error.msg}: {(error.text or '').strip()}") from None


def import_closure(names: Sequence[str], lib: Path) -> list[Path]:
    """The files under `lib` of these dotted names (modules, or names in modules) and of all that they import."""
    found: set[Path] = set()
    todo = list(names)
    while todo:
        parts = todo.pop().split(".")
        for depth in range(1, len(parts) + 1):
            stem = lib.joinpath(*parts[:depth])
            for path in (stem.with_suffix(".py"), stem / "__init__.py"):
                if path.is_file() and path not in found:
                    found.add(path)
                    package = ".".join(path.parent.relative_to(lib).parts)
                    todo += _imports_of(path.read_text(encoding="utf-8"), package)
    return sorted(found)


@cache  # chapters share most of their modules
def _imports_of(source: str, package: str) -> list[str]:
    return list(_imports(ast.parse(source).body, package))


def _imports(statements: Sequence[ast.AST], package: str) -> Iterator[str]:
    """What statements import from the kit, those inside functions and other blocks too."""
    for node in statements:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == "unmask")
        # Imports are never inside expressions, which are most of a syntax tree.
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, block, [])
            yield from _imports(inner if isinstance(inner, list) else [], package)


def make_plan(profile: Profile, chapters: Sequence[Chapter], root: Path) -> dict[str, Any]:
    """What the Snakefile needs to know for one run, with paths relative to the repository root.

    A chapter's fingerprint is a hash of its settings, the contents of its sources and the fingerprints of what it
    needs, so it changes exactly when the chapter has to run again.
    """
    work = Path("data/work") / profile.run
    figures = figures_folder(profile.run)
    steps: dict[str, dict[str, Any]] = {}
    for chapter in chapters:
        notebook = root / "notebooks" / f"{chapter.stem}.ipynb"
        if not notebook.is_file():
            raise WorkflowError(f"Chapter {chapter.stem} has no notebook: notebooks/{notebook.name} is missing.")
        modules = notebook_modules(notebook, root)
        sources = modules + _committed_weights(modules, root) + _published_numbers(modules, root)
        made_from = [profile.subset_hash(list(chapter.keys)), _content_hash(notebook, root)]
        made_from += [_content_hash(path, root) for path in sources]
        made_from += [steps[need]["fingerprint"] for need in chapter.needs]
        steps[chapter.stem] = {
            "stem": chapter.stem,
            "rule": chapter.rule,
            "notebook": str(notebook.relative_to(root)),
            "sources": [str(path.relative_to(root)) for path in sources],
            "needs": [steps[need]["results"] for need in chapter.needs],
            "results": str(work / "results" / f"{chapter.stem}.json"),
            "fingerprint": digest(made_from),
            "gpu": chapter.gpu,
        }
    for chapter in reversed(chapters):  # what most others wait for goes first
        waiting = [steps[other.stem]["priority"] for other in chapters if chapter.stem in other.needs]
        steps[chapter.stem]["priority"] = 1 + max(waiting, default=0)
    report_sources = [str(path.relative_to(root)) for path in import_closure(["unmask.report"], root / "lib")]
    return {
        "run": profile.run,
        "work": str(work),
        "figures": str(figures),
        "report": str(figures / "report.html"),
        "report_sources": report_sources,
        "chapters": list(steps.values()),
    }


def _committed_weights(modules: list[Path], root: Path) -> list[Path]:
    detectors = root / "lib" / "unmask" / "detectors"
    if not any(path.is_relative_to(detectors) for path in modules):
        return []
    return sorted((root / "lib").rglob("*.safetensors"))


def _published_numbers(modules: list[Path], root: Path) -> list[Path]:
    package = root / "lib" / "unmask"
    return sorted((package / "published").glob("*.csv")) if package / "published.py" in modules else []


def _content_hash(path: Path, root: Path) -> str:
    return f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def out_of_date(step: dict[str, Any], plan: dict[str, Any], root: Path) -> bool:
    """Whether a chapter must run although Snakemake may think it done.

    So it is when its results were not left by a headless run of the present sources and settings (a notebook run by
    hand overwrites them), or when a file of a figure or table that it saved was deleted.
    """
    path = root / step["results"]
    if not path.is_file():
        return True
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return True
    if results.get("fingerprint") != step["fingerprint"]:
        return True
    saved = [root / plan["figures"] / name for name in results.get("saved", [])]
    files = [path.with_suffix(suffix) for path in saved for suffix in (path.suffix, *BESIDE.get(path.suffix, ()))]
    return not all(path.is_file() for path in files)
