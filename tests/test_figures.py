import io
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from test_profile import resolved

from unmask.figures import save_figure, save_table, shown, style
from unmask.profile import open_study

TABLE = pd.DataFrame(
    {
        "method": ["a|b_c", "d%"],
        "AUC": [0.123456789, np.nan],
        "n": np.array([7, 1_000_000]),
        "p": [1.5e-7, 0.0],
        "best": [True, False],
    }
)


@pytest.fixture
def study(tmp_path):
    return open_study(resolved(tmp_path))


def draw():
    style()
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1], label="chance")
    axes.legend()
    return figure


def test_figure_leaves_picture_print_and_numbers(study):
    study.manifest_hash = "abc"
    save_figure(study, "05_roc", draw(), "ROC.", {"auc": np.float64(0.5)})
    assert (study.figures / "05_roc.png").read_bytes().startswith(b"\x89PNG")
    assert (study.figures / "05_roc.pdf").read_bytes().startswith(b"%PDF")
    record = json.loads((study.figures / "05_roc.json").read_text())
    assert record["numbers"] == {"auc": 0.5} and record["manifest_hash"] == "abc"
    assert record["caption"] == "ROC. Synthetic world."
    assert record["seeds"] == [0] and record["profile"] == "demo" and "commit" in record and "versions" in record
    assert study.saved == ["05_roc.png"] and not plt.get_fignums()


def test_caption_of_real_media_stays_as_it_is(tmp_path):
    study = open_study(resolved(tmp_path, run="demo-x-1", **{"data.sets": ["folder=/x"]}))
    save_table(study, "t", TABLE, "Scores.")
    assert json.loads((study.tables / "t.json").read_text())["caption"] == "Scores."


def test_same_numbers_give_the_same_bytes(tmp_path):
    contents = []
    for copy in "ab":
        study = open_study(resolved(tmp_path / copy))
        save_figure(study, "f", draw(), "F", {})
        save_table(study, "t", TABLE, "T")
        contents.append({p.name: p.read_bytes() for p in study.figures.rglob("*") if p.is_file()})
    assert contents[0] == contents[1] and len(contents[0]) == 7
    assert b"CreationDate" not in contents[0]["f.pdf"], "a time would make every run differ"


def test_table_in_every_form(study):
    save_table(study, "09_auc", TABLE, "AUC of 100 % & more")
    csv = (study.tables / "09_auc.csv").read_text()
    assert csv.splitlines()[1] == "a|b_c,0.123457,7,1.5e-07,True"
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(csv)), TABLE, rtol=1e-5)
    markdown = (study.tables / "09_auc.md").read_text()
    assert r"a\|b_c" in markdown and "0.123 " in markdown and "1.50e-07" in markdown and "Synthetic world." in markdown
    latex = (study.tables / "09_auc.tex").read_text()
    assert r"d\%" in latex and r"b\_c" in latex and r"\caption{AUC of 100 \% \& more. Synthetic world.}" in latex
    record = json.loads((study.tables / "09_auc.json").read_text())
    assert record["numbers"]["columns"] == list(TABLE.columns)
    assert record["numbers"]["rows"][1]["AUC"] is None
    assert study.saved == ["tables/09_auc.csv"]


def test_empty_table_keeps_its_columns(study):
    save_table(study, "t", TABLE.iloc[:0], "Failures")
    assert (study.tables / "t.csv").read_text() == "method,AUC,n,p,best\n"
    assert json.loads((study.tables / "t.json").read_text())["numbers"] == {"columns": list(TABLE.columns), "rows": []}


def test_plotly_figure_opens_offline(study):
    save_figure(study, "00_map", go.Figure(go.Scatter(x=[1], y=[2])), "Map", {})
    html = (study.figures / "00_map.html").read_text()
    assert 'src="plotly.min.js"' in html and (study.figures / "plotly.min.js").is_file()
    assert len(html) < 100_000 and study.saved == ["00_map.html"]


def test_other_objects_are_refused(study):
    with pytest.raises(TypeError, match="not ndarray"):
        save_figure(study, "x", np.zeros(3), "X", {})


def test_shown():
    values = (None, float("nan"), 3, 0.5, 0.0, 12345.6, 1e-5, "x", np.float32(0.25), np.bool_(True))
    assert [shown(value) for value in values] == [
        "–", "–", "3", "0.500", "0.000", "1.23e+04", "1.00e-05", "x", "0.250", "True",
    ]  # fmt: skip
