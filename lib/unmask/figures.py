"""Figures and tables in one house style, each with the numbers and the provenance it came from.

A figure NAME is NAME.png and NAME.pdf (matplotlib) or NAME.html (plotly) in the study's figure folder, a table is
tables/NAME.csv, .md and .tex; NAME.json lies beside it. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from unmask.profile import Study, write_atomic, write_json

# Colour-blind safe, and the same meaning everywhere.
COLOURS = {"real": "#0173b2", "fake": "#d55e00", "control": "#949494", "other": "#029e73"}
LATEX_ESCAPES = str.maketrans(
    {char: rf"\{char}" for char in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
)


def style() -> None:
    """Set the house style for seaborn and matplotlib."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=list(COLOURS.values()),
        rc={
            "figure.figsize": (6.4, 4.0),
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "pdf.fonttype": 42,  # text stays text
        },
    )


def save_figure(study: Study, name: str, fig: Any, caption: str, numbers: dict[str, Any]) -> Path:
    """Save a matplotlib figure (PNG and PDF) or a plotly one (HTML), with `numbers` in NAME.json; returns that path.

    Raises TypeError for any other kind of figure.
    """
    if isinstance(fig, Figure):
        for suffix, options in ((".png", {}), (".pdf", {"metadata": {"CreationDate": None}})):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=suffix[1:], bbox_inches="tight", **options)
            write_atomic(study.figures / f"{name}{suffix}", buffer.getvalue())
        plt.close(fig)
        saved = f"{name}.png"
    elif hasattr(fig, "to_html"):
        # One copy of plotly's own code for all figures, so that they open offline and stay small.
        from plotly.offline import get_plotlyjs

        script = study.figures / "plotly.min.js"
        if not script.is_file():
            write_atomic(script, get_plotlyjs())
        html = fig.to_html(include_plotlyjs="directory", div_id=name, config={"responsive": True})
        saved = f"{name}.html"
        write_atomic(study.figures / saved, html)
    else:
        raise TypeError(f"save_figure takes a matplotlib or a plotly figure, not {type(fig).__name__}.")
    study.saved.append(saved)
    return write_json(study.figures / f"{name}.json", _record(study, caption, numbers))


def save_table(study: Study, name: str, df: pd.DataFrame, caption: str) -> Path:
    """Save a table as tables/NAME.csv, .md, .tex and .json, all without its index; returns the CSV's path.

    CSV and JSON keep six significant digits, Markdown and LaTeX three decimals.
    """
    precise = df.map(lambda value: float(f"{value:.6g}") if _is_float(value) else value)
    columns = {"columns": [str(column) for column in df.columns]}
    record = _record(study, caption, {**columns, "rows": precise.to_dict(orient="records")})
    text = df.map(shown)
    layout = "".join("r" if pd.api.types.is_numeric_dtype(dtype) else "l" for dtype in df.dtypes)
    latex = text.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    contents = {
        ".csv": precise.to_csv(index=False, lineterminator="\n"),
        # A bar inside a Markdown cell would end it.
        ".md": text.map(lambda cell: cell.replace("|", r"\|")).to_markdown(index=False, disable_numparse=True)
        + f"\n\n{record['caption']}\n",
        ".tex": latex.to_latex(
            hrules=True,
            caption=record["caption"].translate(LATEX_ESCAPES),
            label=f"tab:{name}",
            column_format=layout,
            position_float="centering",
        ),
    }
    for suffix, content in contents.items():
        write_atomic(study.tables / f"{name}{suffix}", content)
    write_json(study.tables / f"{name}.json", record)
    study.saved.append(f"tables/{name}.csv")
    return study.tables / f"{name}.csv"


def shown(value: Any) -> str:
    """A table cell as a person reads it: numbers with three decimals, a dash for what is missing."""
    if value is None or value is pd.NA or (_is_float(value) and math.isnan(value)):
        return "–"
    if not _is_float(value):
        return str(value)
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _record(study: Study, caption: str, numbers: dict[str, Any]) -> dict[str, Any]:
    caption = caption.strip()
    if study.provenance["world"]:
        caption = f"{caption.rstrip('.')}. Synthetic world."
    return {
        "caption": caption,
        "numbers": numbers,
        "seeds": study.seeds,
        "manifest_hash": study.manifest_hash,
        **study.provenance,
    }


def _is_float(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, Integral)
