import base64
import json
import re

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from test_profile import resolved

from unmask.data.manifest import COLUMNS, manifest_hash, write_manifest
from unmask.figures import save_figure, save_table
from unmask.profile import open_study
from unmask.report import QUESTION, build_report, main


@pytest.fixture
def path(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for stem, title in (("00_data", "# What is here"), ("05_convnext", "no heading")):
        cells = [nbformat.v4.new_code_cell("# not a heading"), nbformat.v4.new_markdown_cell(title)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / f"{stem}.ipynb")
    first = nbformat.read(tmp_path / "notebooks" / "00_data.ipynb", 4)
    first.cells[1].source += "\n\n**The question.** *Which `media`\nare here?* And more.\n\nModules: many."
    nbformat.write(first, tmp_path / "notebooks" / "00_data.ipynb")
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


def manifest():
    """Three real videos and one fake in the split test, a real image in train."""
    rows = [("video", "test", 0, "real")] * 3 + [("video", "test", 1, "swap"), ("image", "train", 0, "real")]
    rows = pd.DataFrame(rows, columns=["kind", "split", "label", "method"]).astype({"label": "int8"})
    rows["item_id"] = [f"{i:016x}" for i in range(5)]
    rows["path"] = [f"{i}.mp4" for i in range(5)]
    rows["group_id"] = ["a", "a", "b", "b", "c"]
    return rows.assign(root="/r", dataset="set", subject="", source_id="", camera="", annotations="")[list(COLUMNS)]


def test_commands_name_the_run(tmp_path):
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "notebooks" / "00_data.ipynb")
    page = build_report(open_study(resolved(tmp_path, "tiny"))).read_text()
    assert page.count("<code>./run_all.sh --profile tiny --only 00</code>") == 2


def test_data_and_captions_say_how_many(study):
    write_manifest(manifest(), study.work / "manifest.parquet")
    study.manifest_hash = manifest_hash(manifest())
    save_figure(study, "more", plt.figure(), "Of `this` & that", {}, n={"videos": 4})
    study.results("00_data", {})
    page = build_report(study).read_text()
    assert "5 media in 3 groups" in page
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr><td>set.*?</tr>", page)]
    assert rows == [["set", "train", "image", "1", "1", "0"], ["set", "test", "video", "2", "3", "1"]]
    assert '<p class="question">Which media are here? And more.</p>' in page
    caption = re.search(r"<figcaption>Of <code>this</code> &amp; that. Synthetic world.<small>(.*?)</small>", page)[1]
    assert "profile demo · n = 4 videos · seeds 0 · synthetic world · manifest " in caption
    assert f"{study.manifest_hash[:12]} of 5 media" in caption
    assert "<code>./run_all.sh --only figure:more</code>" in caption


def test_long_tables_are_folded_and_bold_cells_bold(study):
    table = pd.DataFrame({"n": range(41)})
    save_table(study, "long", table, "Long", bold=table == 7)
    save_table(study, "short", table.iloc[:40], "Short")
    study.results("00_data", {})
    page = build_report(study).read_text()
    folded = re.findall(r'<details class="fold"><summary>Table of 41 rows.*?</details>', page, flags=re.S)
    assert len(folded) == 1 and folded[0].count("<tr>") == 42 and page.count('class="fold"') == 1
    assert re.findall("<b>(.*?)</b>", folded[0]) == ["7"]


def test_interactive_figures_are_inside_with_their_still(study):
    bars = go.Figure(go.Bar(x=["</script>"], y=[2]))
    save_figure(study, "bars", bars, "Bars", {}, still=plt.figure())
    save_figure(study, "more_bars", bars, "Bars", {}, still=plt.figure())
    assert get_plotlyjs() not in build_report(study).read_text(), "these results know of no interactive figure"
    study.results("00_data", {})
    page = build_report(study).read_text()
    assert page.count(get_plotlyjs()) == 1
    page = page.replace(get_plotlyjs(), "")
    specs = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.S)
    assert len(specs) == 2 and json.loads(specs[0])["data"][0]["x"] == ["</script>"]
    still = base64.b64encode((study.figures / "bars.png").read_bytes()).decode()
    assert f"data:image/png;base64,{still}" in page
    assert not re.search(r'(?:src|href)="(?!data:|#|\.\./data/work)', page)


def test_chapter_that_ended_early_says_why(study):
    study.results("00_data", {"ended": "there is no video"})
    assert "This chapter ended early: there is no video" in build_report(study).read_text()


def test_command(study, path, capsys):
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(study.figures / "report.html")
    assert main(["no-such-profile"]) == 2 and main([]) == 2


def test_settings_are_recorded(study):
    page = build_report(study).read_text()
    settings = re.search(r"<pre>(.*)</pre>", page, flags=re.S)[1].replace("&#34;", '"')
    assert json.loads(settings) == study.profile.as_dict()
