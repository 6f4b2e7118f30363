import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from unmask.latex import LONG, PACKAGES, escape, table

NASTY = [
    "a_b & 50 % of $x$ #1 {y} ~ ^ \\ <p> | \"q\"", "[0.1, 0.9]", "* star", "– — − ± × ≤ ≥ → α β λ σ² Δ 30°",
    "Größe, né, Ø", "слово", "视频.mp4", "😀", "two\nlines", "bell \x07", "long " * 30, "",
]  # fmt: skip


def frame(rows, columns):
    numbers = np.random.default_rng(0).random((rows, columns))
    cells = pd.DataFrame(numbers, columns=[f"column {i}" for i in range(columns)]).map(lambda value: f"{value:.3f}")
    cells.insert(0, "which_one", [NASTY[i % len(NASTY)][:40] for i in range(rows)])
    return cells


def tex(cells, caption="A caption", bold=None):
    return table(cells, [False] + [True] * (cells.shape[1] - 1), caption, "tab:x", bold)


def test_escape():
    assert escape("50 % & a_b") == r"50 \% \& a\_b"
    assert escape("α≥0.5") == r"\ensuremath{\alpha}\ensuremath{\geq}0.5"
    assert escape("жé\x07") == "[U+0436]é[U+0007]"


def test_a_row_that_begins_with_a_bracket_is_not_an_option():
    lines = tex(pd.DataFrame({"interval": ["[0.1, 0.2]", "*"], "n": ["1", "2"]})).splitlines()
    assert r"{}[0.1, 0.2] & 1 \\" in lines and r"{}* & 2 \\" in lines


def test_columns_rules_and_bold():
    cells = pd.DataFrame({"what": ["x", "long text " * 9], "AUC": ["0.5", "0.75"]})
    bold = pd.DataFrame({"what": [False, False], "AUC": [False, True]})
    lines = tex(cells, "50 %", bold).splitlines()
    assert lines[0] == f"% {PACKAGES}" and r"\caption{50 \%}\label{tab:x}" in lines
    assert [line for line in lines if "tabular" in line][0].endswith(r"{>{\raggedright\arraybackslash}p{16em}r}")
    assert r"x & 0.5 \\" in lines and sum(line.endswith(r"\textbf{0.75} \\") for line in lines) == 1
    assert (
        lines.index(r"\toprule") < lines.index(r"what & AUC \\") < lines.index(r"\midrule") < lines.index(r"x & 0.5 \\")
    )


def test_long_tables_go_over_pages():
    assert r"\begin{table}" in tex(frame(LONG, 3)) and "longtable}{" not in tex(frame(LONG, 3))
    assert r"\begin{longtable}" in tex(frame(LONG + 1, 3)) and r"\begin{table}" not in tex(frame(LONG + 1, 3))
    sizes = [re.search(r"\\begingroup\\(\w+)", tex(frame(50, columns)))[1] for columns in (5, 6, 7, 8)]
    assert sizes == ["small", "footnotesize", "scriptsize", "tiny"]
    pieces = tex(frame(2 * LONG + 1, 20))
    assert pieces.count(r"\begin{tabular}") == 3 and pieces.count("A caption") == 1 and pieces.count("(continued)") == 2
    assert pieces.count(r" \\" + "\n") == 3 + 2 * LONG + 1


def compiled(folder, bodies):
    """pdflatex's log of a document on A4 with 16 cm of text, and its number of pages."""
    for name, body in bodies.items():
        (folder / f"{name}.tex").write_text(body, encoding="utf-8")
    inputs = "\n".join(rf"\input{{{name}}}\clearpage" for name in bodies)
    head = rf"\documentclass[a4paper]{{article}}\usepackage[margin=2.5cm]{{geometry}}{PACKAGES}"
    (folder / "all.tex").write_text(rf"{head}\begin{{document}}{inputs}\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=60)
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout, int(re.search(r"Output written on all.pdf \((\d+) page", result.stdout)[1])


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_tables_compile_and_stay_on_the_page(tmp_path):
    bold = pd.DataFrame(True, range(12), range(4))
    bodies = {
        "nasty": tex(pd.DataFrame({"text": NASTY, "a": NASTY[::-1], "b": "1", "c": "2"}), " ".join(NASTY[:9]), bold),
        "empty": tex(frame(3, 4).iloc[:0]),
        "wide": tex(frame(20, 25)),
        "wider": tex(frame(50, 25)),
        "names": tex(pd.DataFrame({"path": ["a_name/" * 30, "слово" * 12], "n": ["1", "2"]})),
        "long": tex(frame(150, 6), " ".join(NASTY[:9])),
        "long_and_wide": tex(frame(60, 9)),
    }
    log, pages = compiled(tmp_path, bodies)
    assert "Overfull" not in log, re.findall("Overfull.*", log)
    assert pages >= len(bodies) + 1
