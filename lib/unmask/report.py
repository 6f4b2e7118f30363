"""The whole study on one page: `python -m unmask.report PROFILE` writes report.html in the study's figure folder."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from unmask.figures import shown
from unmask.profile import ProfileError, Study, open_study, write_atomic

QUESTION = "Is this face video real, and how would we know on data we never saw?"


def build_report(study: Study) -> Path:
    """Write report.html from the results, figures and tables that the chapters left; returns its path.

    Pictures and tables are inside the page, so it can be sent as one file; interactive figures and executed notebooks
    are links. A chapter without results, and a figure that is gone, are named as missing.
    """
    environment = Environment(loader=PackageLoader("unmask"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.j2").render(
        question=QUESTION,
        chapters=[_chapter(study, path) for path in sorted((study.root / "notebooks").glob("[0-9]*.ipynb"))],
        provenance=study.provenance,
        seeds=study.seeds,
        settings=json.dumps(study.profile.as_dict(), indent=2),
    )
    return write_atomic(study.figures / "report.html", page)


def _chapter(study: Study, notebook: Path) -> dict[str, Any]:
    stem = notebook.stem
    chapter = {"stem": stem, "number": stem.split("_")[0], "title": _title(notebook), "items": None}
    results = study.work / "results" / f"{stem}.json"
    if not results.is_file():
        return chapter
    content = json.loads(results.read_text(encoding="utf-8"))
    executed = study.work / "notebooks" / f"{stem}.ipynb"
    return {
        **chapter,
        "items": [_item(study, saved) for saved in content["saved"]],
        "numbers": _flat(content["numbers"]),
        "manifest_hash": content["manifest_hash"],
        "commit": content["commit"],
        "notebook": os.path.relpath(executed, study.figures) if executed.is_file() else None,
    }


def _item(study: Study, saved: str) -> dict[str, Any]:
    path = study.figures / saved
    item = {"saved": saved, "name": path.stem, "kind": "missing", "caption": ""}
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return item
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    item["caption"] = record["caption"]
    if path.suffix == ".png":
        return {**item, "kind": "picture", "data": base64.b64encode(path.read_bytes()).decode()}
    if path.suffix == ".csv":
        columns = record["numbers"]["columns"]
        rows = [[shown(row[column]) for column in columns] for row in record["numbers"]["rows"]]
        return {**item, "kind": "table", "columns": columns, "rows": rows}
    return {**item, "kind": "interactive"}


def _title(notebook: Path) -> str:
    """The notebook's first heading, or its name."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "markdown" else []:
            if line.startswith("# "):
                return line[2:].strip()
    return notebook.stem


def _flat(numbers: dict[str, Any], where: str = "") -> dict[str, str]:
    """Nested results as `a.b` to text; lists are left to the tables."""
    flat = {}
    for key, value in numbers.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{where}{key}.")
        elif not isinstance(value, list):
            flat[f"{where}{key}"] = shown(value)
    return flat


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: one argument, a profile's name or a resolved profile file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m unmask.report PROFILE", file=sys.stderr)
        return 2
    try:
        study = open_study(arguments[0])
    except ProfileError as error:
        print(error, file=sys.stderr)
        return 2
    print(build_report(study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
