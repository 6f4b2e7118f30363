import base64
import json
import re

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from test_profile import resolved

from unmask.figures import save_figure, save_table
from unmask.profile import open_study
from unmask.report import QUESTION, build_report, main


@pytest.fixture
def path(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for stem, title in (("00_data", "# What is here"), ("05_convnext", "no heading")):
        cells = [nbformat.v4.new_code_cell("# not a heading"), nbformat.v4.new_markdown_cell(title)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / f"{stem}.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "notebooks" / "template.ipynb")
    return resolved(tmp_path)


@pytest.fixture
def study(path):
    study = open_study(path)
    save_figure(study, "00_grid", plt.figure(), "A <grid>", {})
    save_table(study, "00_counts", pd.DataFrame({"id": ["007"], "share": [0.5]}), "Counts")
    save_figure(study, "00_gone", plt.figure(), "Gone", {})
    (study.figures / "00_gone.png").unlink()
    study.results("00_data", {"media": {"real": 3, "share": 0.25}})
    executed = study.work / "notebooks" / "00_data.ipynb"
    executed.parent.mkdir()
    executed.touch()
    return study


def test_report_is_one_file_with_everything(study):
    page = build_report(study).read_text()
    picture = base64.b64encode((study.figures / "00_grid.png").read_bytes()).decode()
    assert QUESTION in page and f"data:image/png;base64,{picture}" in page
    assert "A &lt;grid&gt;. Synthetic world." in page and "<grid>" not in page
    assert '<td>007</td><td class="number">0.500</td>' in page
    assert "<th>media.share</th><td>0.250</td>" in page
    assert "What is here" in page and "template" not in page
    sources = re.findall(r'(?:src|href)="([^"#]*)"', page)
    assert [s for s in sources if not s.startswith("data:")] == ["../data/work/demo/notebooks/00_data.ipynb"]


def test_links_to_notebooks_resolve(study):
    page = build_report(study)
    link = re.search(r'href="([^"]*ipynb)"', page.read_text())[1]
    assert (page.parent / link).resolve().is_file()


def test_missing_chapters_and_figures_are_said(study):
    page = build_report(study).read_text()
    missing = re.findall(r'class="missing">(.*)', page)
    assert len(missing) == 3
    assert "the manifest" in missing[0] and "./run_all.sh --only figure:00_gone" in missing[1]
    assert "./run_all.sh --only 05" in missing[2]


def test_command(study, path, capsys):
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(study.figures / "report.html")
    assert main(["no-such-profile"]) == 2 and main([]) == 2


def test_settings_are_recorded(study):
    page = build_report(study).read_text()
    settings = re.search(r"<pre>(.*)</pre>", page, flags=re.S)[1].replace("&#34;", '"')
    assert json.loads(settings) == study.profile.as_dict()
