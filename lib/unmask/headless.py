"""Run one notebook without a front end, through papermill: `python -m unmask.headless NOTEBOOK --work WORK ...`.

The executed copy is WORK/notebooks/<stem>.ipynb, its output WORK/logs/<stem>.log. It counts as done only when every
cell ran and WORK/results/<stem>.json is there, which is then marked with the fingerprint of what made it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from unmask import jobstep
from unmask.machine import AGAIN, DiskError, advice, writing
from unmask.profile import ChapterEnds, write_json
from unmask.progress import MARK, clock

HEARTBEAT = 30.0


class HeadlessError(RuntimeError):
    """The notebook could not be run, or did not do what a chapter must."""


class Reporter:
    """Says which cell is running: when one starts (at most every 5 s), and every HEARTBEAT seconds."""

    def __init__(self, chapter: str, cells: int):
        self.chapter = chapter
        self.cells = cells
        self.cell = 0
        self.last_output = ""
        self.start = self.shown = time.monotonic()
        self.finished = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def cell_start(self, index: int) -> None:
        self.cell, self.last_output = index + 1, ""
        if time.monotonic() - self.shown >= 5:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        output = f"  {self.last_output[:90]}" if self.last_output else ""
        say(f"{self.chapter}: cell {self.cell}/{self.cells}, {self.elapsed()}{output}")

    def elapsed(self) -> str:
        return clock(time.monotonic() - self.start)

    def _beat(self) -> None:
        while not self.finished.wait(1.0):
            if time.monotonic() - self.shown >= HEARTBEAT:
                self.show()


class LastOutput(logging.Handler):
    """Keeps the notebook's last printed line for the reporter, so that a long cell shows its own progress."""

    def __init__(self, reporter: Reporter):
        super().__init__()
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines()
        if lines and not lines[-1].startswith(("Executing Cell", "Ending Cell")):
            self.reporter.last_output = lines[-1].strip()


class ReportingEngine(NBClientEngine):
    """papermill's own engine, telling the reporter about every cell."""

    reporter: Reporter

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        cell_start = nb_man.cell_start

        def reporting_cell_start(cell, cell_index=None, **inner):
            cls.reporter.cell_start(cell_index)
            return cell_start(cell, cell_index, **inner)

        nb_man.cell_start = reporting_cell_start
        return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


def say(text: str) -> None:
    """Print lines for the person at the terminal."""
    for line in text.splitlines():
        # In one piece: print writes the end of the line apart, and two jobs may share the terminal.
        sys.stdout.write(f"{MARK}{line}\n")
        sys.stdout.flush()


def check_parameters(notebook: Path, parameters: dict[str, str]) -> None:
    """Raise HeadlessError if the notebook's parameters cell does not have all these names (papermill only warns)."""
    known = papermill.inspect_notebook(str(notebook))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise HeadlessError(
            f"{notebook.name} has no parameter {', '.join(unknown)}. "
            f"Its parameters cell defines: {', '.join(known) or 'none'}."
        )


def run_notebook(notebook: Path, work: Path, parameters: dict[str, str], fingerprint: str) -> None:
    """Execute a chapter's notebook into `work` and mark its results JSON with `fingerprint`.

    Raises HeadlessError naming the cell, the error and the executed copy, and OSError where nothing can be written into
    `work`; the results JSON is then left unmarked.
    """
    check_parameters(notebook, parameters)
    chapter = notebook.stem
    executed, log, results = (
        work / folder / f"{chapter}{suffix}"
        for folder, suffix in (("notebooks", ".ipynb"), ("logs", ".log"), ("results", ".json"))
    )
    with writing(work):
        for path in (executed, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        results.unlink(missing_ok=True)
    _use_own_kernel()
    # papermill puts the parameters it was given into a cell of their own.
    cells = len(json.loads(notebook.read_text(encoding="utf-8"))["cells"]) + bool(parameters)
    reporter = Reporter(chapter, cells)
    say(f"{chapter}: started")
    try:
        with writing(work), _logged(log, reporter):
            _execute(notebook, executed, parameters, reporter)
    except PapermillExecutionError as error:
        if error.ename == ChapterEnds.__name__ and results.is_file():
            say(f"{chapter}: {error.evalue}")
            _mark(results, fingerprint)
            say(f"{chapter}: done in {reporter.elapsed()}")
            return
        if jobstep.stopping():
            raise HeadlessError(f"{chapter}: {error.evalue}") from None
        cell = f"cell {error.cell_index + 1}/{cells} (In [{error.exec_count}])"
        reason = f"{error.ename}: {error.evalue}\n{advice(error.ename, error.evalue)}"
        raise HeadlessError(_failure(reporter, cell, reason, executed, log)) from None
    except DeadKernelError:
        reason = f"The kernel died: most often the machine ran out of memory. A smaller profile needs less. {AGAIN}"
        raise HeadlessError(_failure(reporter, f"cell {reporter.cell}/{cells}", reason, executed, log)) from None
    finally:
        reporter.finished.set()
    if not results.is_file():
        raise HeadlessError(f"{chapter}: left no {results}; its last cell must call study.results({chapter!r}, ...).")
    _mark(results, fingerprint)
    say(f"{chapter}: done in {reporter.elapsed()}")


def _mark(results: Path, fingerprint: str) -> None:
    write_json(results, {**json.loads(results.read_text(encoding="utf-8")), "fingerprint": fingerprint})


def _failure(reporter: Reporter, cell: str, error: str, executed: Path, log: Path) -> str:
    lines = [f"{reporter.chapter}: failed in {cell} after {reporter.elapsed()}"]
    lines += [f"  {line}" for line in error.strip().splitlines()[:5]]
    return "\n".join([*lines, f"  executed copy: {executed}", f"  log: {log}"])


def _execute(notebook: Path, executed: Path, parameters: dict[str, str], reporter: Reporter) -> None:
    ReportingEngine.reporter = reporter
    papermill_engines.register("unmask", ReportingEngine)
    papermill.execute_notebook(
        notebook.resolve(),
        executed.resolve(),
        parameters=parameters,
        engine_name="unmask",
        kernel_name="python3",
        cwd=notebook.resolve().parent,
        progress_bar=False,
        log_output=True,
    )


class _logged:
    """Send papermill's log to a file, and the last line of it to the reporter."""

    def __init__(self, path: Path, reporter: Reporter):
        self.logger = logging.getLogger("papermill")
        self.handlers = [logging.FileHandler(path, mode="w", encoding="utf-8"), LastOutput(reporter)]
        self.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def __enter__(self):
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        for handler in self.handlers:
            self.logger.addHandler(handler)

    def __exit__(self, *exception):
        for handler in self.handlers:
            self.logger.removeHandler(handler)
            handler.close()


def _use_own_kernel() -> None:
    # A `python3` kernel that the user once installed elsewhere would otherwise shadow this environment's.
    own = os.path.join(sys.prefix, "share", "jupyter")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [own, os.environ.get("JUPYTER_PATH")]))


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 1 where the notebook failed or has no such parameter."""
    parser = argparse.ArgumentParser(prog="python -m unmask.headless", description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the run, data/work/<run>")
    parser.add_argument("--parameter", "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--fingerprint", default="", help="what the results are marked with")
    options = parser.parse_args(arguments)
    parameters = dict(options.parameter)
    # Relative to here, not to the notebook's folder, where it runs.
    if "profile" in parameters and Path(parameters["profile"]).is_file():
        parameters["profile"] = str(Path(parameters["profile"]).resolve())
    try:
        run_notebook(options.notebook, options.work, parameters, options.fingerprint)
    except HeadlessError as error:
        say(str(error))
        return 1
    except DiskError as error:
        say(f"{options.notebook.stem}: failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
