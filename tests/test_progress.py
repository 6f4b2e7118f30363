import nbformat
import papermill
import pytest

from unmask import progress
from unmask.progress import clock, progress_line, track


@pytest.fixture
def slow_clock(monkeypatch):
    """Every look at the clock finds it ten seconds later."""
    ticks = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))


def test_headless_prints_a_line_every_30_seconds(slow_clock, capsys):
    assert list(track(range(7), label="train")) == list(range(7))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train 3/7, 10.0 s each, ETA 0:40",
        "train 6/7, 10.0 s each, ETA 0:10",
        "train 7/7, 10.0 s each, ETA 0:00",
    ]


def test_short_loops_print_nothing(capsys):
    assert list(track((x for x in "abc"), total=3, label="short")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_unknown_total_and_early_exit(slow_clock, capsys):
    items = track(iter("abcdef"), label="stream")
    for _, item in zip(range(4), items, strict=False):
        last = item
    assert last == "d" and capsys.readouterr().err == "stream 3, 10.0 s each\n"


def test_exceptions_pass_through(slow_clock):
    with pytest.raises(ValueError, match="inside"):
        for item in track(range(3)):
            if item == 1:
                raise ValueError("inside")


def test_line_and_clock():
    assert progress_line("x", 100, 300, 2.0) == "x 100/300, 50.0/s, ETA 0:04"
    assert progress_line("", 0, 5, 0.0) == "0/5, inf/s, ETA 0:00"
    assert [clock(59.6), clock(61), clock(3723)] == ["1:00", "1:01", "1:02:03"]


def test_under_papermill_there_is_no_widget(tmp_path):
    code = "from unmask.progress import in_notebook\nprint(get_ipython() is not None, in_notebook())"
    cells = [nbformat.v4.new_code_cell(code)]
    notebook = nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    nbformat.write(notebook, tmp_path / "in.ipynb")
    executed = papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False
    )
    assert executed.cells[0].outputs[0].text.strip() == "True False"


def test_in_a_front_end_there_is_a_widget(monkeypatch):
    class ZMQInteractiveShell:
        pass

    import IPython

    monkeypatch.setattr(IPython, "get_ipython", ZMQInteractiveShell)
    monkeypatch.setattr(progress.sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert progress.in_notebook()
    monkeypatch.setattr(progress.sys, "argv", ["ipykernel_launcher.py", "--HistoryManager.hist_file=:memory:"])
    assert not progress.in_notebook()
