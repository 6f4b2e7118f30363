"""Which chapter makes which figure and table: `python -m unmask.catalogue` writes the list in figures/README.md."""

from __future__ import annotations

import ast
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.plan import Chapter, WorkflowError, notebook_code
from unmask.profile import ROOT, write_atomic

KINDS = {"save_figure": "figure", "save_table": "table"}
BEGIN = "<!-- made by `python -m unmask.catalogue` from the notebooks -->"


def saved_by(notebook: Path) -> list[str]:
    """What a notebook saves, in its order: `figure:NAME` and `table:NAME` of the calls that have a plain name."""
    calls = [node for node in ast.walk(notebook_code(notebook)) if isinstance(node, ast.Call)]
    found = {}
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        kind = KINDS.get(getattr(call.func, "id", getattr(call.func, "attr", "")))
        if kind and len(call.args) > 1 and isinstance(call.args[1], ast.Constant):
            found[f"{kind}:{call.args[1].value}"] = None
    return list(found)


def maker(what: str, plan: dict[str, Any], root: Path) -> str:
    """The stem of the chapter that makes `figure:NAME` or `table:NAME`: by the notebooks, else by the run's results.

    Raises WorkflowError with the nearest names where nothing makes it.
    """
    known: dict[str, str] = {}
    for step in plan["chapters"]:
        names = [*saved_by(root / step["notebook"]), *_saved_in(root / step["results"])]
        known = {name: step["stem"] for name in names} | known
    if what in known:
        return known[what]
    kind, _, name = what.partition(":")
    close = {other.partition(":")[2]: other for other in known if other.partition(":")[2] == name}  # the other kind
    of_kind = {other.partition(":")[2]: other for other in known if other.startswith(f"{kind}:")}
    nearest = list(close.values()) + [
        of_kind[n] for n in difflib.get_close_matches(name, list(of_kind), n=4, cutoff=0.4)
    ]
    hint = f"The nearest: {', '.join(nearest)}." if nearest else "figures/README.md lists them."
    raise WorkflowError(f"No chapter makes {what}. {hint}")


def _saved_in(results: Path) -> list[str]:
    try:
        saved = json.loads(results.read_text(encoding="utf-8")).get("saved", [])
    except (OSError, ValueError):
        return []
    return [f"{'table' if name.startswith('tables/') else 'figure'}:{Path(name).stem}" for name in saved]


def listing(chapters: Sequence[Chapter], root: Path) -> str:
    """The table of figures/README.md: a row per figure and table, with its chapter and the command that makes it."""
    rows = ["| what | chapter | command |", "|---|---|---|"]
    for chapter in chapters:
        for what in saved_by(root / "notebooks" / f"{chapter.stem}.ipynb"):
            kind, _, name = what.partition(":")
            link = f"[{chapter.stem}](../notebooks/{chapter.stem}.ipynb)"
            rows.append(f"| {kind} `{name}` | {link} | `./run_all.sh --only {what}` |")
    return "\n".join(rows)


def page(text: str, chapters: Sequence[Chapter], root: Path) -> str:
    """The README `text` with its list, which is all that follows the mark BEGIN, made anew."""
    return f"{text.partition(BEGIN)[0].rstrip()}\n\n{BEGIN}\n\n{listing(chapters, root)}\n"


def main() -> int:
    """Write the list in figures/README.md."""
    from unmask.workflow import CHAPTERS  # which imports this module

    path = ROOT / "figures" / "README.md"
    write_atomic(path, page(path.read_text(encoding="utf-8"), CHAPTERS, ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
