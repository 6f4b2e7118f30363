"""Progress that reads well both in a notebook and in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

INTERVAL = 30.0
"""Seconds between two lines of a headless run."""
MARK = ">> "
"""Begins the lines of a headless job that are for the person at the terminal; run_all.sh shows only these."""


def in_notebook() -> bool:
    """Whether a person's notebook shows this process, so that a widget can be drawn.

    A kernel under papermill or nbconvert looks the same from inside, but for its history: nbclient starts it with one
    that is kept in memory.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or type(shell).__name__ == "TerminalInteractiveShell":
        return False
    return not any(argument.startswith("--HistoryManager.hist_file") for argument in sys.argv)


def track(iterable: Iterable[Item], total: int | None = None, label: str = "") -> Iterator[Item]:
    """Yield the items of `iterable` and show how far it is.

    A tqdm widget in a notebook; elsewhere a line `label k/n, rate, ETA` on stderr every INTERVAL seconds, and none
    for loops that end sooner. `total` is needed only where `len(iterable)` does not tell.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if in_notebook():
        from tqdm.auto import tqdm

        yield from tqdm(iterable, total=total, desc=label)
        return
    start = shown = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        finished = done == total and shown > start
        if now - shown >= INTERVAL or finished:
            print(progress_line(label, done, total, now - start), file=sys.stderr, flush=True)
            shown = now


def progress_line(label: str, done: int, total: int | None, seconds: float) -> str:
    """One line of progress after `done` items in `seconds`: `label k/n, rate, ETA`."""
    rate = done / seconds if seconds > 0 else float("inf")
    speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    head = f"{label} {done}" if label else str(done)
    if total is None:
        return f"{head}, {speed}"
    return f"{head}/{total}, {speed}, ETA {clock((total - done) / rate)}"


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
