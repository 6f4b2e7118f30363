import io
import json
import re

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
    figure = draw()
    save_figure(study, "05_roc", figure, "ROC.", {"auc": np.float64(0.5)})
    assert (study.figures / "05_roc.png").read_bytes().startswith(b"\x89PNG")
    assert (study.figures / "05_roc.pdf").read_bytes().startswith(b"%PDF")
    record = json.loads((study.figures / "05_roc.json").read_text())
    assert record["numbers"] == {"auc": 0.5} and record["manifest_hash"] == "abc"
    assert record["caption"] == "ROC. Synthetic world."
    assert record["seeds"] == [0] and record["profile"] == "demo" and "commit" in record and "versions" in record
    assert record["command"] == "./run_all.sh --only figure:05_roc" and record["n"] is None
    assert study.saved == ["05_roc.png"] and not plt.fignum_exists(figure.number)


def test_record_says_how_many_from_where_and_which_command(tmp_path):
    def record(name, /, *, options=None, **study):
        one = open_study(resolved(tmp_path / name, **study))
        save_table(one, "t", TABLE, "Scores.", **options or {})
        return json.loads((one.tables / "t.json").read_text())

    tiny = record("a", name="tiny", options={"n": {"videos": 120}})
    assert tiny["n"] == {"videos": 120} and tiny["origin"] == "synthetic world"
    assert tiny["command"] == "./run_all.sh --profile tiny --only table:t"
    changed = record("b", seeds=3)
    assert changed["command"] == "./run_all.sh --profile data/work/demo/profile.yaml --only table:t"
    mixed = record("c", run="demo-x-1", **{"data.sets": ["ffpp=/y", "world=a", "folder=/x"]})
    assert mixed["caption"] == "Scores. Synthetic world and data set ffpp and your media."
    assert mixed["command"] == "./run_all.sh --profile data/work/demo-x-1/profile.yaml --only table:t"
    published = record("d", options={"origin": "published"})
    assert published["caption"] == "Scores." and published["origin"] == "published"


def test_record_names_the_seeds_behind_the_numbers(tmp_path):
    study = open_study(resolved(tmp_path, seeds=3))
    save_table(study, "all", TABLE, "Scores.")
    save_table(study, "first", TABLE, "Scores.", seeds=study.seeds[:1])
    save_figure(study, "none", draw(), "Scores.", {}, seeds=())
    paths = (study.tables / "all.json", study.tables / "first.json", study.figures / "none.json")
    assert [json.loads(path.read_text())["seeds"] for path in paths] == [[0, 1, 2], [0], []]


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
    assert r"d\% & --" in latex and r"a\textbar{}b\_c & 0.123" in latex and r"\textbf" not in latex
    assert r"\caption{AUC of 100 \% \& more. Synthetic world.}" in latex
    record = json.loads((study.tables / "09_auc.json").read_text())
    assert record["numbers"]["columns"] == list(TABLE.columns)
    assert record["numbers"]["rows"][1]["AUC"] is None
    assert study.saved == ["tables/09_auc.csv"]


def test_empty_table_keeps_its_columns(study):
    save_table(study, "t", TABLE.iloc[:0], "Failures")
    assert (study.tables / "t.csv").read_text() == "method,AUC,n,p,best\n"
    assert json.loads((study.tables / "t.json").read_text())["numbers"] == {"columns": list(TABLE.columns), "rows": []}


def test_bold_cells(study):
    bold = pd.DataFrame(False, TABLE.index, TABLE.columns)
    bold.loc[0, "AUC"] = bold.loc[1, "method"] = True
    save_table(study, "t", TABLE, "T", bold=bold)
    markdown = (study.tables / "t.md").read_text()
    assert re.findall(r"\*\*(.*?)\*\*", markdown) == ["0.123", "d%"]
    latex = (study.tables / "t.tex").read_text()
    assert re.findall(r"\\textbf\{(.*?)\} ", latex) == ["0.123", r"d\%"]
    assert json.loads((study.tables / "t.json").read_text())["numbers"]["bold"] == bold.to_numpy().tolist()
    assert "*" not in (study.tables / "t.csv").read_text()
    with pytest.raises(ValueError, match=r"shape \(2, 4\), the table t \(2, 5\)"):
        save_table(study, "t", TABLE, "T", bold=bold.drop(columns="n"))


def test_plotly_figure_opens_offline_and_has_a_still(study):
    save_figure(study, "00_map", go.Figure(go.Scatter(x=[1], y=[2])), "Map", {}, still=draw())
    html = (study.figures / "00_map.html").read_text()
    assert (study.figures / "00_map.png").read_bytes().startswith(b"\x89PNG")
    assert (study.figures / "00_map.pdf").read_bytes().startswith(b"%PDF")
    assert json.loads((study.figures / "00_map.json").read_text())["plotly"]["data"][0]["y"] == [2]
    assert 'src="plotly.min.js"' in html and (study.figures / "plotly.min.js").is_file()
    assert len(html) < 100_000 and study.saved == ["00_map.html"]


def test_other_objects_are_refused(study):
    with pytest.raises(TypeError, match="got ndarray"):
        save_figure(study, "x", np.zeros(3), "X", {})
    with pytest.raises(TypeError, match="matplotlib twin as still=; it got Figure with NoneType"):
        save_figure(study, "x", go.Figure(), "X", {})
    assert not study.saved and not list(study.figures.glob("x*"))


def test_shown():
    values = (None, float("nan"), 3, 0.5, 0.0, 12345.6, 1e-5, "x", np.float32(0.25), np.bool_(True))
    assert [shown(value) for value in values] == [
        "–", "–", "3", "0.500", "0.000", "1.23e+04", "1.00e-05", "x", "0.250", "True",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [object, "Int64"])
def test_counts_beside_a_missing_one_stay_whole(study, dtype):
    counts = pd.Series([24, None], dtype=dtype)
    path = save_table(study, "counts", pd.DataFrame({"n": counts, "auc": [0.5, np.nan]}), "Counts")
    assert path.read_text() == "n,auc\n24,0.5\n,\n"
    rows = json.loads(path.with_suffix(".json").read_text())["numbers"]["rows"]
    assert rows == [{"n": 24, "auc": 0.5}, {"n": None, "auc": None}] and type(rows[0]["n"]) is int
    assert "24.0" not in path.with_suffix(".md").read_text()
