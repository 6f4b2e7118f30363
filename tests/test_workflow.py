"""The workflow on a small tree of its own: three trivial notebooks, real Snakemake, real papermill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from unmask.plan import Chapter, import_closure, notebook_modules, out_of_date
from unmask.profile import ROOT, load_profile
from unmask.workflow import CHAPTERS, make_plan, parse_options, study_profile

SCHEMA = """
seed: 0
seeds: 1
workers: 2
data: {sets: ["world=a"]}
preprocess: {locator: annotations}
alpha: {x: 1, wait: 0.0, broken: false}
beta: {y: 1}
"""
DRIVER = """
import sys
from pathlib import Path
from unmask.plan import Chapter
from unmask.workflow import main
chapters = [Chapter("00_first", keys=("alpha",)), Chapter("01_second", ("00_first",), ("beta",)), Chapter("02_other")]
sys.exit(main(sys.argv[1:], Path(__file__).parent, chapters))
"""
OPEN = "from unmask.profile import open_study\nstudy = open_study(profile, changes)"
FIRST = """import time
time.sleep(study.profile.alpha.wait)
if study.profile.alpha.broken:
    raise ValueError("the glass is broken")
study.results("00_first", {"x": study.profile.alpha.x})"""
SECOND = """study.input("results/00_first.json", made_by="00_first")
study.results("01_second", {"y": study.profile.beta.y})"""
OTHER = 'study.results("02_other", {})'


def notebook(*code, parameters='profile = "demo"\nchanges = {}'):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in code]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def make_tree(root):
    (root / "profiles").mkdir(parents=True)
    (root / "notebooks").mkdir()
    (root / "profiles" / "demo.yaml").write_text(SCHEMA)
    (root / "profiles" / "tiny.yaml").write_text("beta: {y: 2}\n")
    (root / "study.py").write_text(DRIVER)
    shutil.copy(ROOT / "Snakefile", root)
    for stem, code in (("00_first", FIRST), ("01_second", SECOND), ("02_other", OTHER)):
        nbformat.write(notebook(OPEN, code), root / "notebooks" / f"{stem}.ipynb")
    return root


def start(root, *options, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "study.py"), *options]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )


def run(root, *options):
    process = start(root, *options)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def ran(output):
    return set(re.findall(r"(\w+): done in", output))


def would_run(root, *options):
    code, output = run(root, "--dry-run", *options)
    assert code == 0, output
    return set(re.findall(r"would run (\w+):", output))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tree whose study was run once."""
    root = make_tree(tmp_path_factory.mktemp("kit") / "with space")
    code, output = run(root, "--jobs", "2")
    assert code == 0, output
    assert ran(output) == {"00_first", "01_second", "02_other"}
    assert "[3/3]" in output and "(the last one)" in output and "Done in" in output
    return root


@pytest.fixture
def tree(finished, tmp_path):
    """A copy of the finished tree, elsewhere: a run does not depend on where the clone is."""
    return shutil.copytree(finished, tmp_path / "copy")


def test_run_leaves_executed_copies_logs_results_and_report(finished):
    work = finished / "data" / "work" / "demo"
    for stem in ("00_first", "01_second", "02_other"):
        assert (work / "notebooks" / f"{stem}.ipynb").is_file()
        assert "Executing Cell" in (work / "logs" / f"{stem}.log").read_text()
        assert json.loads((work / "results" / f"{stem}.json").read_text())["fingerprint"]
    assert "00_first" in (finished / "figures" / "report.html").read_text()


def test_second_run_runs_nothing_and_is_quick(tree):
    before = (tree / "data/work/demo/profile.yaml").stat().st_mtime_ns
    begin = time.monotonic()
    code, output = run(tree)
    assert code == 0 and not ran(output) and "Nothing to run" in output
    assert time.monotonic() - begin < 20
    assert (tree / "data/work/demo/profile.yaml").stat().st_mtime_ns == before


def test_changed_key_reruns_only_its_chapter_and_dependants(tree):
    assert would_run(tree, "--set", "beta.y=5") == {"01_second"}
    assert would_run(tree, "--set", "alpha.x=2") == {"00_first", "01_second"}
    assert would_run(tree, "--set", "workers=7") == set()
    assert ran(run(tree, "--set", "alpha.x=9", "--only", "0")[1]) == {"00_first"}
    code, output = run(tree, "--set", "alpha.x=9")
    assert code == 0 and ran(output) == {"01_second"}
    assert would_run(tree, "--set", "alpha.x=9") == set()
    assert json.loads((tree / "data/work/demo/results/00_first.json").read_text())["numbers"] == {"x": 9}


def test_only_and_from_force(tree):
    assert would_run(tree, "--only", "02") == {"02_other"}
    assert would_run(tree, "--from", "1") == {"01_second", "02_other"}


def test_only_a_figure_runs_the_chapter_that_makes_it(tree):
    path = tree / "notebooks" / "02_other.ipynb"
    draw = 'from unmask.figures import save_table\nsave_table(study, "counts", table, "Counts")'
    nbformat.write(notebook(OPEN, draw, OTHER), path)
    assert would_run(tree, "--only", "table:counts") == {"02_other"}
    code, output = run(tree, "--only", "table:count")
    assert code == 2 and "No chapter makes table:count. The nearest: table:counts." in output


def test_results_overwritten_by_hand_are_made_again(tree):
    results = tree / "data/work/demo/results/02_other.json"
    content = json.loads(results.read_text())
    del content["fingerprint"]
    results.write_text(json.dumps(content))
    assert would_run(tree) == {"02_other"}


def test_list_and_dry_run_leave_everything_alone(tree):
    code, output = run(tree, "--list", "--set", "beta.y=8")
    assert code == 0
    assert [line.split()[1:3] for line in output.splitlines()] == [["done"], ["to", "run"], ["done"]]
    assert would_run(tree, "--set", "beta.y=8") == {"01_second"}
    assert would_run(tree) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "alpha.z=2"], "Unknown profile key alpha.z"),
        (["--set", "alfa.x=2"], "Did you mean alpha?"),
        (["--set", "alpha.x=many"], "alpha.x must be a whole number"),
        (["--set", "alpha.x"], "KEY=VALUE"),
        (["--profile", "dmo"], "there are demo, tiny"),
        (["--only", "44"], "No chapter 44"),
        (["--from", "44"], "No chapter from 44 on"),
        (["--from", "01_secon"], "No chapter 01_secon; there are"),
        (["--data", "nowhere"], "no such folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(finished, options, message):
    code, output = run(finished, *options)
    assert code == 2 and message in output and "started" not in output


def headless(path, work, *options):
    command = [sys.executable, "-m", "unmask.headless", str(path), "--work", str(work), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_mistyped_papermill_parameter_is_refused(finished, tmp_path):
    result = headless(finished / "notebooks" / "02_other.ipynb", tmp_path, "-p", "proflie", "demo")
    assert result.returncode == 1
    assert "no parameter proflie" in result.stdout and "profile" in result.stdout
    assert not list(tmp_path.iterdir())


def test_notebook_without_results_or_with_a_dead_kernel_fails(tmp_path):
    nbformat.write(notebook("x = 1"), tmp_path / "00_silent.ipynb")
    result = headless(tmp_path / "00_silent.ipynb", tmp_path / "work")
    assert result.returncode == 1 and "00_silent: left no" in result.stdout
    nbformat.write(notebook("import os; os._exit(3)"), tmp_path / "00_dead.ipynb")
    result = headless(tmp_path / "00_dead.ipynb", tmp_path / "work")
    assert result.returncode == 1 and "failed in cell 2/2" in result.stdout and "kernel died" in result.stdout


def test_a_chapter_that_ends_early_is_done_and_says_why(tmp_path):
    work = tmp_path / "data" / "work" / "demo"
    code = f"""from pathlib import Path
from unmask.profile import Study, load_profile
study = Study(load_profile("demo"), Path({str(tmp_path)!r}), False)
study.end("00_early", "there is no video")"""
    nbformat.write(notebook(code, "raise RuntimeError"), tmp_path / "00_early.ipynb")
    result = headless(tmp_path / "00_early.ipynb", work, "--fingerprint", "abc")
    assert result.returncode == 0 and "there is no video" in result.stdout
    kept = json.loads((work / "results" / "00_early.json").read_text())
    assert kept["numbers"] == {"ended": "there is no video"} and kept["fingerprint"] == "abc"


def test_failing_notebook_is_reported(tree):
    code, output = run(tree, "--set", "alpha.broken=true")
    assert code == 1
    assert "00_first: failed in cell 4/4 (In [4])" in output and "ValueError: the glass is broken" in output
    executed = "data/work/demo/notebooks/00_first.ipynb"
    assert f"executed copy: {executed}" in output and (tree / executed).is_file()
    assert not (tree / "data/work/demo/results/00_first.json").exists()
    assert would_run(tree) == {"00_first", "01_second"}


def test_killed_run_goes_on_and_a_second_run_is_refused(tree):
    results = tree / "data/work/demo/results"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    log = tree / "data/work/demo/logs/00_first.log"
    log.unlink()
    process = start(tree, "--set", "alpha.wait=60.0", start_new_session=True)
    while not (log.is_file() and "Executing Cell 4" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    code, output = run(tree)
    assert code == 2 and f"Another run is busy in this clone (process {process.pid})" in output
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list((tree / ".snakemake" / "locks").iterdir()), "the kill must leave Snakemake's lock for this test"
    code, output = run(tree)
    assert code == 0 and ran(output) == {"00_first", "01_second"}
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_a_run_whose_first_process_is_killed_alone_goes_on_to_its_end(tree):
    (tree / "data/work/demo/logs/00_first.log").unlink()
    process = start(tree, "--set", "alpha.wait=5.0")
    while not (tree / "data/work/demo/logs/00_first.log").is_file():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    code, output = run(tree, "--set", "alpha.wait=5.0")
    assert code == 2 and "is busy" in output and f"process {process.pid}" not in output and "unknown" not in output
    deadline = time.monotonic() + 120
    while code == 2 and time.monotonic() < deadline:
        time.sleep(1)
        code, output = run(tree, "--set", "alpha.wait=5.0")
    assert code == 0 and ran(output) == set(), output


def test_own_media_get_a_run_of_their_own(finished, tmp_path):
    media = tmp_path / "My Holiday"
    media.mkdir()
    profile = study_profile(parse_options(["--data", str(media)]), finished)
    assert profile.run.startswith("demo-my-holiday-") and profile.name == "demo"
    assert list(profile.data.sets) == [f"folder={media}"]
    assert profile.preprocess.locator == "yunet"
    chosen = study_profile(parse_options(["--data", str(media), "--set", "preprocess.locator=haar"]), finished)
    assert chosen.preprocess.locator == "haar"
    manifest = tmp_path / "manifest.parquet"
    manifest.touch()
    assert list(study_profile(parse_options(["--data", str(manifest)]), finished).data.sets) == [f"manifest={manifest}"]


def test_import_closure_follows_every_form_of_import(tmp_path):
    package = tmp_path / "lib" / "unmask"
    (package / "data").mkdir(parents=True)
    for name, code in {
        "__init__.py": "",
        "a.py": "from unmask import b\nimport numpy",
        "b.py": "def f():\n    from .data import world",
        "unused.py": "",
        "data/__init__.py": "",
        "data/world.py": "from ..c import thing",
        "c.py": "try:\n    pass\nexcept OSError:\n    if x:\n        pass\n    else:\n        from . import d",
        "d.py": "import unmask.a\nmatch x:\n    case 1:\n        with y:\n            import unmask.e",
        "e.py": "class A:\n    async def f(self):\n        for x in y:\n            import unmask.f",
        "f.py": "f = lambda: 1 if x else 2",
    }.items():
        (package / name).write_text(code)
    nbformat.write(notebook("%matplotlib inline\nfrom unmask.a import g"), tmp_path / "n.ipynb")
    found = {str(path.relative_to(package)) for path in notebook_modules(tmp_path / "n.ipynb", tmp_path)}
    assert found == {"__init__.py", "a.py", "b.py", "c.py", "d.py", "e.py", "f.py", "data/__init__.py", "data/world.py"}
    assert import_closure(["unmask.unused"], tmp_path / "lib") == [package / "__init__.py", package / "unused.py"]


def test_fingerprint_follows_code_but_not_speed(tmp_path):
    root = make_tree(tmp_path)
    module = root / "lib" / "unmask" / "thing.py"
    module.parent.mkdir(parents=True)
    module.write_text("x = 1")
    nbformat.write(notebook("import unmask.thing"), root / "notebooks" / "00_first.ipynb")
    chapters = [Chapter("00_first", keys=("alpha",)), Chapter("01_second", ("00_first",)), Chapter("02_other")]

    def fingerprints(**changes):
        profile = load_profile("demo", changes, root)
        return [step["fingerprint"] for step in make_plan(profile, chapters, root)["chapters"]]

    before = fingerprints()
    assert fingerprints(workers=9) == before
    module.write_text("x = 2")
    changed = fingerprints()
    assert [old != new for old, new in zip(before, changed, strict=True)] == [True, True, False]


def test_deleted_figure_makes_its_chapter_run_again(tmp_path):
    step = {"results": "results.json", "fingerprint": "f"}
    plan = {"figures": "figures"}
    (tmp_path / "figures" / "tables").mkdir(parents=True)
    saved = {"p.png": (".png", ".pdf", ".json"), "i.html": (".html", ".png", ".pdf", ".json"),
             "tables/p.csv": (".csv", ".md", ".tex", ".json")}  # fmt: skip
    files = [(tmp_path / "figures" / name).with_suffix(suffix) for name, ends in saved.items() for suffix in ends]
    for file in files:
        file.touch()
    (tmp_path / "results.json").write_text(json.dumps({"fingerprint": "f", "saved": [*saved]}))
    assert not out_of_date(step, plan, tmp_path)
    for file in files:
        file.unlink()
        assert out_of_date(step, plan, tmp_path), file.name
        file.touch()
    assert not out_of_date(step, plan, tmp_path)


def test_published_numbers_count_as_sources_where_they_are_read(tmp_path):
    root = make_tree(tmp_path)
    package = root / "lib" / "unmask"
    (package / "published").mkdir(parents=True)
    for name, text in (("published.py", "x = 1"), ("published/some.csv", "row\n"), ("thing.py", "x = 1")):
        (package / name).write_text(text)
    nbformat.write(notebook("from unmask import published"), root / "notebooks" / "00_first.ipynb")
    nbformat.write(notebook("import unmask.thing"), root / "notebooks" / "02_other.ipynb")
    chapters = [Chapter("00_first"), Chapter("02_other")]

    def steps():
        return make_plan(load_profile("demo", {}, root), chapters, root)["chapters"]

    before = steps()
    (package / "published" / "some.csv").write_text("other\n")
    changed = [old["fingerprint"] != new["fingerprint"] for old, new in zip(before, steps(), strict=True)]
    assert changed == [True, False] and "lib/unmask/published/some.csv" in before[0]["sources"]


def test_the_study_itself_is_declared_consistently():
    stems = [chapter.stem for chapter in CHAPTERS]
    assert stems == sorted(set(stems))
    schema = load_profile("demo")
    for position, chapter in enumerate(CHAPTERS):
        assert set(chapter.needs) <= set(stems[:position])
        assert set(chapter.keys) <= set(schema)
        assert "workers" not in chapter.keys
        assert Path(ROOT / "notebooks" / f"{chapter.stem}.ipynb").is_file()
