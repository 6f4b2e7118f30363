"""The whole study on one page: `python -m unmask.report PROFILE` writes report.html in the study's figure folder."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from unmask.data.manifest import ManifestError, manifest_hash, read_manifest
from unmask.figures import DPI, profile_option, shown
from unmask.profile import ProfileError, Study, open_study, write_atomic

QUESTION = "Is this face video real, and how would we know on data we never saw?"
LONG = 40  # rows from which a table is folded


def build_report(study: Study) -> Path:
    """Write report.html from the results, figures and tables that the chapters left; returns its path.

    Pictures, tables and interactive figures are inside the page, so it can be sent as one file and needs no network;
    executed notebooks are links. A chapter without results, and a figure that is gone, are named as missing.
    """
    environment = Environment(loader=PackageLoader("unmask"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    data = _data(study)
    media = {data["hash"]: data["media"]} if data else {}
    chapters = [_chapter(study, path, media) for path in sorted((study.root / "notebooks").glob("[0-9]*.ipynb"))]
    interactive = any(item["kind"] == "interactive" for chapter in chapters for item in chapter["items"] or [])
    environment.filters["code"] = _code
    page = environment.get_template("report.html.j2").render(
        question=QUESTION,
        data=data,
        option=profile_option(study),
        chapters=chapters,
        plotly=_plotly() if interactive else None,
        provenance=study.provenance,
        seeds=study.seeds,
        settings=json.dumps(study.profile.as_dict(), indent=2),
    )
    return write_atomic(study.figures / "report.html", page)


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def _data(study: Study) -> dict[str, Any] | None:
    """What the manifest holds: a row per set, split and kind, a column per method; None where there is none."""
    try:
        manifest = read_manifest(study.work / "manifest.parquet")
    except (ManifestError, OSError):
        return None
    by = ["dataset", "split", "kind"]
    order = {"train": 0, "val": 1, "test": 2}
    counts = manifest.pivot_table(index=by, columns="method", values="item_id", aggfunc="size", fill_value=0)
    counts = counts[["real", *(method for method in counts if method != "real")] if "real" in counts else [*counts]]
    counts.insert(0, "groups", manifest.groupby(by)["group_id"].nunique())
    counts = counts.reset_index().sort_values(by, key=lambda column: column.map(lambda value: order.get(value, value)))
    return {
        **_cells(counts.to_dict("records"), list(counts)),
        "media": len(manifest),
        "groups": manifest["group_id"].nunique(),
        "hash": manifest_hash(manifest),
    }


def _chapter(study: Study, notebook: Path, media: dict[str, int]) -> dict[str, Any]:
    stem = notebook.stem
    title, question = _opening(notebook)
    chapter = {"stem": stem, "number": stem.split("_")[0], "title": title, "question": question, "items": None}
    results = study.work / "results" / f"{stem}.json"
    if not results.is_file():
        return chapter
    content = json.loads(results.read_text(encoding="utf-8"))
    executed = study.work / "notebooks" / f"{stem}.ipynb"
    return {
        **chapter,
        "items": [_item(study, saved, media) for saved in content["saved"]],
        "ended": content["numbers"].get("ended"),
        "numbers": _flat(content["numbers"]),
        "manifest_hash": content["manifest_hash"],
        "commit": content["commit"],
        "notebook": os.path.relpath(executed, study.figures) if executed.is_file() else None,
    }


def _item(study: Study, saved: str, media: dict[str, int]) -> dict[str, Any]:
    path = study.figures / saved
    what = "table" if path.suffix == ".csv" else "figure"
    item = {"saved": saved, "name": path.stem, "what": what, "kind": "missing", "caption": ""}
    picture = path.with_suffix(".png")
    if not all(file.is_file() for file in (path, path.with_suffix(".json"), *([picture] if what == "figure" else []))):
        return item
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    item |= {"caption": record["caption"], "facts": _facts(record, media), "command": record.get("command")}
    if what == "table":
        numbers = record["numbers"]
        return {**item, "kind": "table", **_cells(numbers["rows"], numbers["columns"], numbers.get("bold"))}
    item |= _picture(picture)
    if "plotly" in record:
        # A script element knows no entities; JSON has an escape of its own for what could end it.
        return {**item, "kind": "interactive", "spec": Markup(json.dumps(record["plotly"]).replace("<", "\\u003c"))}
    return {**item, "kind": "picture"}


def _picture(path: Path) -> dict[str, Any]:
    """A PNG as text, with the size (CSS pixels) at which its letters are as large as the page's."""
    content = path.read_bytes()
    width, height = (round(pixels * 96 / DPI) for pixels in struct.unpack(">II", content[16:24]))
    return {"data": base64.b64encode(content).decode(), "width": width, "height": height}


def _cells(rows: list[dict[str, Any]], columns: list[str], bold: list[list[bool]] | None = None) -> dict[str, Any]:
    marks = bold or [[False] * len(columns)] * len(rows)
    texts = [
        [(shown(row[c]), mark) for c, mark in zip(columns, line, strict=True)]
        for row, line in zip(rows, marks, strict=True)
    ]
    values = {column: [row[column] for row in rows if row[column] is not None] for column in columns}
    numeric = [all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values[c]) for c in columns]
    return {
        "columns": list(zip(columns, numeric, strict=True)),
        "rows": texts,
        "numeric": numeric,
        "long": len(rows) > LONG,
    }


def _facts(record: dict[str, Any], media: dict[str, int]) -> str:
    """Where a figure's numbers come from, in one line; media: how many a manifest holds, by its hash."""
    n = ", ".join(f"{count} {of}" for of, count in (record.get("n") or {}).items())
    seeds = ", ".join(map(str, record["seeds"]))
    facts = [f"profile {record['profile']}", n and f"n = {n}", seeds and f"seeds {seeds}", record.get("origin")]
    if of := record["manifest_hash"]:
        facts.append(f"manifest {of[:12]}" + (f" of {media[of]} media" if of in media else ""))
    return " · ".join(fact for fact in [*facts, f"commit {record['commit'][:12]}"] if fact)


def _code(text: str) -> Markup:
    """Text in which `this` is code, as HTML."""
    return Markup("").join(Markup("<code>{}</code>").format(t) if i % 2 else t for i, t in enumerate(text.split("`")))


def _opening(notebook: Path) -> tuple[str, str]:
    """The notebook's first heading, or its name, and its question, or nothing."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    title = re.search(r"^# (.+)$", text, flags=re.M)
    question = re.search(r"^\*\*The question\.\*\*\s*(.+?)(?:\n\s*\n|\Z)", text, flags=re.M | re.S)
    plain = re.sub(r"[*`]", "", question[1]).replace("\n", " ").strip() if question else ""
    return title[1].strip() if title else notebook.stem, plain


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
