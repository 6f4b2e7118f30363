import json

import nbformat
import pytest

from unmask.catalogue import BEGIN, listing, maker, page, saved_by
from unmask.plan import Chapter, WorkflowError
from unmask.profile import ROOT
from unmask.workflow import CHAPTERS

CELLS = (
    'fig = draw()\nsave_figure(study, "b_map", fig, "B")\nif fig:\n    save_table(study, "b_map", df, "B", n={})',
    '%matplotlib inline\nfor name in names:\n    save_table(study, name, df, "dynamic")\n'
    'figures.save_figure(study, "a", fig, "A")',
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for stem, cells in (("00_one", CELLS), ("01_two", ['save_figure(study, "two_bars", fig, "T")'])):
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbformat.write(made, tmp_path / "notebooks" / f"{stem}.ipynb")
    return tmp_path


def plan():
    return {
        "chapters": [
            {"stem": stem, "notebook": f"notebooks/{stem}.ipynb", "results": f"{stem}.json"}
            for stem in ("00_one", "01_two")
        ]
    }


def test_saved_by_reads_plain_names_in_their_order(root):
    assert saved_by(root / "notebooks" / "00_one.ipynb") == ["figure:b_map", "table:b_map", "figure:a"]


def test_maker(root):
    assert maker("figure:two_bars", plan(), root) == "01_two"
    assert maker("table:b_map", plan(), root) == "00_one"
    (root / "01_two.json").write_text(json.dumps({"saved": ["tables/dynamic_one.csv", "deep.html"]}))
    assert maker("table:dynamic_one", plan(), root) == "01_two"
    assert maker("figure:deep", plan(), root) == "01_two"


@pytest.mark.parametrize(
    ("what", "nearest"),
    [
        ("figure:two_bar", "The nearest: figure:two_bars."),
        ("table:two_bars", "The nearest: figure:two_bars."),
        ("figure:zzzzzz", "figures/README.md lists them."),
    ],
)
def test_unknown_names_list_the_nearest(root, what, nearest):
    with pytest.raises(WorkflowError, match=f"No chapter makes {what}. {nearest}"):
        maker(what, plan(), root)


def test_page_keeps_what_is_above_the_mark(root):
    chapters = [Chapter("00_one"), Chapter("01_two")]
    text = page(f"# figures\n\n{BEGIN}\nold", chapters, root)
    assert text == page(text, chapters, root) == f"# figures\n\n{BEGIN}\n\n{listing(chapters, root)}\n"
    row = "| figure `two_bars` | [01_two](../notebooks/01_two.ipynb) | `./run_all.sh --only figure:two_bars` |"
    assert row in text and text.count("\n| ") == 1 + 4


def test_the_list_of_figures_is_current():
    text = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    assert text == page(text, CHAPTERS, ROOT), "python -m unmask.catalogue writes it anew"
