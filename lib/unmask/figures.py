"""Figures and tables in one house style, each with the numbers and the provenance it came from.

A figure NAME is NAME.png and NAME.pdf in the study's figure folder, and NAME.html where it is interactive; a table is
tables/NAME.csv, .md and .tex; NAME.json lies beside it. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from unmask import latex
from unmask.profile import Study, load_profile, write_atomic, write_json

# Colour-blind safe, and the same meaning everywhere.
COLOURS = {"real": "#0173b2", "fake": "#d55e00", "control": "#949494", "other": "#029e73"}
WORLD = "synthetic world"
DPI = 150  # of saved pictures


def style() -> None:
    """Set the house style for seaborn and matplotlib."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=list(COLOURS.values()),
        rc={
            "figure.figsize": (6.4, 4.0),
            "figure.dpi": 100,
            "savefig.dpi": DPI,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "pdf.fonttype": 42,  # text stays text
        },
    )


def save_figure(
    study: Study,
    name: str,
    fig: Any,
    caption: str,
    numbers: dict[str, Any],
    still: Figure | None = None,
    n: dict[str, int] | None = None,
    origin: str | None = None,
    seeds: Sequence[int] | None = None,
) -> Path:
    """Save a figure as PNG and PDF, with `numbers` in NAME.json; returns that path.

    fig: a matplotlib figure, or a plotly one with its matplotlib twin as `still` (saved as NAME.html besides). n: how
    many of what it shows, such as {"videos": 120}; origin: where its numbers come from, if not from the run's data
    sets ("published"); seeds: those behind its numbers, if not all of the study's. Raises TypeError for any other kind
    of figure, and for a plotly one without a still.
    """
    record = _record(study, "figure", name, caption, numbers, n, origin, seeds)
    picture, saved = fig, f"{name}.png"
    if hasattr(fig, "to_html"):
        picture, saved = still, f"{name}.html"
        record["plotly"] = json.loads(fig.to_json())
    if not isinstance(picture, Figure):
        raise TypeError(
            f"save_figure takes a matplotlib figure, or a plotly one with its matplotlib twin as still=; it got "
            f"{type(fig).__name__} with {type(still).__name__}."
        )
    if picture is not fig:
        _save_interactive(study, name, fig)
    for suffix, options in ((".png", {}), (".pdf", {"metadata": {"CreationDate": None}})):
        buffer = io.BytesIO()
        picture.savefig(buffer, format=suffix[1:], bbox_inches="tight", **options)
        write_atomic(study.figures / f"{name}{suffix}", buffer.getvalue())
    plt.close(picture)
    study.saved.append(saved)
    return write_json(study.figures / f"{name}.json", record)


def _save_interactive(study: Study, name: str, fig: Any) -> None:
    # One copy of plotly's own code for all figures, so that they open offline and stay small.
    from plotly.offline import get_plotlyjs

    script = study.figures / "plotly.min.js"
    if not script.is_file():
        write_atomic(script, get_plotlyjs())
    html = fig.to_html(include_plotlyjs="directory", div_id=name, config={"responsive": True})
    write_atomic(study.figures / f"{name}.html", html)


def save_table(
    study: Study,
    name: str,
    df: pd.DataFrame,
    caption: str,
    bold: pd.DataFrame | None = None,
    n: dict[str, int] | None = None,
    origin: str | None = None,
    seeds: Sequence[int] | None = None,
) -> Path:
    """Save a table as tables/NAME.csv, .md, .tex and .json, all without its index; returns the CSV's path.

    CSV and JSON keep six significant digits, Markdown and LaTeX three decimals. bold: bool, of the table's shape, the
    cells shown bold in Markdown, LaTeX and the report; n, origin and seeds as in `save_figure`. Raises ValueError if
    `bold` has another shape.
    """
    if bold is not None and bold.shape != df.shape:
        raise ValueError(f"bold has the shape {bold.shape}, the table {name} {df.shape}.")
    precise = pd.DataFrame({k: _precise(df.iloc[:, k]) for k in range(df.shape[1])}, df.index).set_axis(
        df.columns, axis=1
    )
    columns = [str(column) for column in df.columns]
    numbers: dict[str, Any] = {"columns": columns, "rows": precise.to_dict(orient="records")}
    if bold is not None:
        numbers["bold"] = bold.to_numpy(bool)
    record = _record(study, "table", name, caption, numbers, n, origin, seeds)
    # As objects: pandas 2 maps whole numbers beside a missing one as floats.
    text = df.astype(object).map(shown).set_axis(columns, axis=1)
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in df.dtypes]
    contents = {
        ".csv": precise.to_csv(index=False, lineterminator="\n"),
        ".md": _markdown(text, bold) + f"\n\n{record['caption']}\n",
        ".tex": latex.table(text, numeric, record["caption"], f"tab:{name}", bold),
    }
    for suffix, content in contents.items():
        write_atomic(study.tables / f"{name}{suffix}", content)
    write_json(study.tables / f"{name}.json", record)
    study.saved.append(f"tables/{name}.csv")
    return study.tables / f"{name}.csv"


def _markdown(text: pd.DataFrame, bold: pd.DataFrame | None) -> str:
    # A bar inside a cell would end it.
    text = text.map(lambda cell: cell.replace("|", r"\|"))
    if bold is not None:
        text = text.mask(bold.to_numpy(bool), "**" + text + "**")
    return text.to_markdown(index=False, disable_numparse=True)


def _precise(column: pd.Series) -> pd.Series:
    # As objects, lest a whole number beside a missing one become a float.
    values = [None if v is pd.NA else float(f"{v:.6g}") if _is_float(v) else v for v in column]
    return pd.Series(values, column.index, dtype=object)


def shown(value: Any) -> str:
    """A table cell as a person reads it: numbers with three decimals, a dash for what is missing."""
    if value is None or value is pd.NA or (_is_float(value) and math.isnan(value)):
        return "–"
    if not _is_float(value):
        return str(value)
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _record(
    study: Study,
    kind: str,
    name: str,
    caption: str,
    numbers: dict[str, Any],
    n: dict[str, int] | None,
    origin: str | None,
    seeds: Sequence[int] | None,
) -> dict[str, Any]:
    origin = origin or _origin(study)
    caption = caption.strip()
    if origin.startswith(WORLD):
        caption = f"{caption.rstrip('.')}. {origin.capitalize()}."
    return {
        "caption": caption,
        "numbers": numbers,
        "n": n,
        "origin": origin,
        "seeds": study.seeds if seeds is None else list(seeds),
        "manifest_hash": study.manifest_hash,
        "command": f"./run_all.sh{profile_option(study)} --only {kind}:{name}",
        **study.provenance,
    }


def _origin(study: Study) -> str:
    """Where the data of a run come from: the synthetic world, one's own media, published data sets, or several."""
    layouts = [entry.partition("=")[0] for entry in study.profile.data.sets]
    own = {"world": WORLD, "folder": "your media", "manifest": "your media"}
    origins = {own.get(layout, f"data set {layout}") for layout in layouts}
    return " and ".join(sorted(origins, key=lambda origin: (origin != WORLD, origin)))


def profile_option(study: Study) -> str:
    """What `./run_all.sh` has to be told of a run besides what to do: nothing for the demo, else ` --profile ...`."""
    if study.profile.name == study.profile.run:
        named = study.root / "profiles" / f"{study.profile.name}.yaml"
        if named.is_file() and load_profile(study.profile.name, root=study.root).hash == study.profile.hash:
            return "" if study.profile.name == "demo" else f" --profile {study.profile.name}"
    return f" --profile data/work/{study.profile.run}/profile.yaml"  # with --set, --data or a profile of one's own


def _is_float(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, Integral)
