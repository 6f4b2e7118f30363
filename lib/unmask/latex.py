"""Tables as LaTeX that fits on its page: short ones are shrunk to the text's width, long ones go on over pages."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import pandas as pd

PACKAGES = r"\usepackage{array,booktabs,graphicx,longtable}"
LONG = 40  # rows; with a caption about a page
WRAP = 40  # characters from which a column of text is broken into lines
WRAPPED_WIDTH = 32  # characters a line of it holds
# For tables over pages, which cannot be scaled: sizes, and the mean width of a character (pt, measured on Computer
# Modern with digits in the majority). The text is taken to be 16 cm wide, as on A4 with margins of 2.5 cm.
SIZES = {"small": 4.8, "footnotesize": 4.4, "scriptsize": 4.1, "tiny": 3.5}
TEXT_WIDTH = 455.0
GAP = 3.0  # pt, on both sides of a cell

_ESCAPES = {char: rf"\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "\n": " ", "–": "--", "—": "---", "…": r"\dots{}",
    "‘": "`", "’": "'", "“": "``", "”": "''", "\N{NO-BREAK SPACE}": "~",
} | {
    char: rf"\ensuremath{{{command}}}"
    for char, command in {
        "−": "-", "±": r"\pm", "×": r"\times", "÷": r"\div", "·": r"\cdot", "≤": r"\leq", "≥": r"\geq", "≈": r"\approx",
        "≠": r"\neq", "→": r"\rightarrow", "←": r"\leftarrow", "↑": r"\uparrow", "↓": r"\downarrow", "∞": r"\infty",
        "°": r"^\circ", "²": "^2", "³": "^3", "µ": r"\mu", "√": r"\surd", "∈": r"\in", "Δ": r"\Delta", "Σ": r"\Sigma",
    }.items()
}  # fmt: skip
_LATIN = frozenset("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿ")


def escape(text: str) -> str:
    """Text for a LaTeX document in any usual encoding; a character that those lack becomes its code, [U+1F600]."""
    return "".join(_ESCAPES.get(char) or _plain(char) for char in text)


def _plain(char: str) -> str:
    if char.isprintable() and (char.isascii() or char in _LATIN):
        return char
    name = unicodedata.name(char, "").split()
    if name[:3] == ["GREEK", "SMALL", "LETTER"] and len(name) == 4 and name[3] not in ("OMICRON", "FINAL"):
        return rf"\ensuremath{{\{'lambda' if name[3] == 'LAMDA' else name[3].lower()}}}"
    return f"[U+{ord(char):04X}]"


def table(
    cells: pd.DataFrame, numeric: Sequence[bool], caption: str, label: str, bold: pd.DataFrame | None = None
) -> str:
    """A table of texts in booktabs style, its caption above; the first line says which packages it needs.

    Up to LONG rows it floats and is shrunk where it is wider than the text; beyond that it is a longtable in the
    largest size that fits, or several floating tables where none does. numeric: which columns are set to the right;
    bold: bool, of the shape of `cells`.
    """
    widths = [max([len(str(name)), *map(len, cells[name])]) for name in cells]
    wrapped = [width > WRAP and not number for width, number in zip(widths, numeric, strict=True)]
    widths = [WRAPPED_WIDTH if wrap else width for width, wrap in zip(widths, wrapped, strict=True)]
    columns = "".join(
        rf">{{\raggedright\arraybackslash}}p{{{0.5 * width:.0f}em}}" if wrap else "r" if number else "l"
        for width, wrap, number in zip(widths, wrapped, numeric, strict=True)
    )
    header = _line([str(name) for name in cells], wrapped)
    marks = [[False] * len(widths)] * len(cells) if bold is None else bold.to_numpy().tolist()
    rows = [_line(row, wrapped, mark) for row, mark in zip(cells.itertuples(index=False), marks, strict=True)]
    name = rf"\caption{{{escape(caption)}}}\label{{{label}}}"
    room = TEXT_WIDTH - 2 * GAP * len(widths)
    size = next((size for size, width in SIZES.items() if width * sum(widths) <= room), None)
    if len(rows) > LONG and size:
        lines = _over_pages(header, rows, columns, name, size)
    else:
        lines = _floating(header, rows[:LONG], columns, name)
        for start in range(LONG, len(rows), LONG):
            again = r"\addtocounter{table}{-1}\caption[]{(continued)}"
            lines += _floating(header, rows[start : start + LONG], columns, again)
    return "\n".join([f"% {PACKAGES}", *lines, ""])


def _line(texts: Sequence[str], wrapped: Sequence[bool], marks: Sequence[bool] | None = None) -> str:
    found = []
    for text, wrap, mark in zip(map(escape, texts), wrapped, marks or [False] * len(texts), strict=True):
        if wrap:  # names of files have no spaces to break at
            text = re.sub(r"(\\_|/|\])", r"\1\\allowbreak{}", text)
        found.append(rf"\textbf{{{text}}}" if mark else text)
    if found[0][:1] in ("[", "*"):
        found[0] = "{}" + found[0]  # else it were an option of the line's end before it
    return " & ".join(found) + r" \\"


def _floating(header: str, rows: list[str], columns: str, name: str) -> list[str]:
    fit = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    opened = [r"\begin{table}", r"\centering", name, fit, rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    return [*opened, header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]


def _over_pages(header: str, rows: list[str], columns: str, name: str, size: str) -> list[str]:
    opened = [rf"\begingroup\{size}\setlength{{\tabcolsep}}{{{GAP:g}pt}}", rf"\begin{{longtable}}{{{columns}}}"]
    head = [r"\toprule", header, r"\midrule"]
    body = [name + r" \\", *head, r"\endfirsthead", *head, r"\endhead", r"\bottomrule", r"\endfoot", *rows]
    return [*opened, *body, r"\end{longtable}", r"\endgroup"]
