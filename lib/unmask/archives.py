"""Runs kept elsewhere, as one zip each, and brought back: what a session that was lost goes on from."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

from unmask.profile import ROOT, figures_folder

DRIVE = "drive/MyDrive/unmask"
KEEPER, MINUTES = "unmask-keeper", 10.0


class ArchiveError(RuntimeError):
    """A run cannot be archived or restored; the message says why."""


def archive(run: str = "demo", folder: str | os.PathLike | None = None, root: Path = ROOT) -> Path:
    """Keep a run, its work folder and its figures, as FOLDER/run-RUN.zip (on Drive unless told); returns its path.

    The archive replaces an older one when it is whole, never before. Raises ArchiveError if there is no such run, or no
    Drive.
    """
    if not (root / "data" / "work" / run).is_dir() or run != Path(run).name:
        raise ArchiveError(f"There is no run {run!r} here; there are: {', '.join(runs(root)) or 'none'}.")
    folder = Path("/content", DRIVE) if folder is None else Path(folder)
    if not folder.parent.is_dir():
        raise ArchiveError(f"{folder.parent} is not there: set DRIVE = True in the first cell and run it again.")
    folder.mkdir(exist_ok=True)
    target = folder / f"run-{run}.zip"
    # Written here and copied in one go: Drive is a network's file system.
    with tempfile.TemporaryDirectory(dir=root / "data" / "work", prefix=".archive-") as scratch:
        local = Path(scratch) / target.name
        with zipfile.ZipFile(local, "w", strict_timestamps=False) as file:
            seen: set[Path] = set()
            while new := [path for path in _files(run, root) if path not in seen]:  # what came while this was written
                seen.update(new)
                for path in new:
                    with suppress(FileNotFoundError):  # replaced or deleted by what is running
                        file.write(path, path.relative_to(root))
        part = target.with_name(f"{target.name}.part")
        shutil.copyfile(local, part)
        os.replace(part, target)
    return target


def runs(root: Path = ROOT) -> list[str]:
    """The runs that this clone holds, sorted."""
    work = root / "data" / "work"
    found = sorted(path.name for path in work.iterdir() if path.is_dir()) if work.is_dir() else []
    return [name for name in found if not name.startswith(".")]


def _files(run: str, root: Path) -> list[Path]:
    """The files of a run, newest first: an index is written after what it names, so nothing that it names is missed."""
    figures = root / figures_folder(run)
    places = [root / "data" / "work" / run, *([figures / "tables"] if run == "demo" else [figures])]
    found = [path for place in places for path in place.rglob("*")]
    if run == "demo":  # the other runs have their folders beside its figures
        found += figures.glob("*")
    written = {path: when for path in found if (when := _written(path)) is not None}
    return sorted(written, key=written.get, reverse=True)


def _written(path: Path) -> int | None:
    if path.name.startswith(".") or path.is_symlink():  # a leading dot: a file that is being written
        return None
    try:
        facts = path.stat()
    except FileNotFoundError:  # replaced or deleted by what is running
        return None
    return facts.st_mtime_ns if stat.S_ISREG(facts.st_mode) else None


def restore(path: str | os.PathLike, root: Path = ROOT) -> bool:
    """Bring an archived run back; False, and nothing changed, if this clone has that run already.

    Figures that are here stay as they are. Raises ArchiveError for an archive that is damaged or whose files would lie
    outside the run's folders.
    """
    match = re.fullmatch(r"run-([A-Za-z0-9_-][A-Za-z0-9._-]*)\.zip", Path(path).name)
    if not match:
        raise ArchiveError(f"{Path(path).name} is no archive of a run: those are called run-RUN.zip.")
    run, work = match[1], root / "data" / "work"
    if (work / run).exists():
        return False
    work.mkdir(parents=True, exist_ok=True)
    inside = (PurePosixPath("data/work", run), PurePosixPath(figures_folder(run)))
    with tempfile.TemporaryDirectory(dir=work, prefix=".restore-") as scratch:
        try:
            with zipfile.ZipFile(path) as file:
                for name in file.namelist():
                    place = PurePosixPath(name)
                    if ".." in place.parts or "\\" in name or not any(place.is_relative_to(top) for top in inside):
                        raise ArchiveError(f"{Path(path).name} is refused: {name!r} lies outside the run {run}.")
                file.extractall(scratch)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ArchiveError(f"{Path(path).name} is damaged ({error}): delete it, or upload it again.") from None
        made = Path(scratch)
        (made / inside[0]).mkdir(parents=True, exist_ok=True)
        for figure in (made / "figures").rglob("*"):
            target = root / figure.relative_to(made)
            if figure.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(figure, target)
        os.replace(made / inside[0], work / run)  # last: until then the run is not here, and restoring starts anew
    return True


def keep(folder: Path, root: Path = ROOT, minutes: float = MINUTES) -> threading.Thread:
    """Archive every run that changed, now and again until the session ends; returns the thread, which is one only."""
    for thread in threading.enumerate():
        if thread.name == KEEPER:
            return thread
    known: dict[str, int] = {}
    thread = threading.Thread(target=_keep, args=(folder, root, minutes, known), name=KEEPER, daemon=True)
    thread.start()
    return thread


def _keep(folder: Path, root: Path, minutes: float, known: dict[str, int]) -> None:
    pause = threading.Event()
    while not pause.wait(60 * minutes):
        archive_changed(folder, root, known)


def archive_changed(folder: Path, root: Path, known: dict[str, int]) -> None:
    """Archive the runs whose state is not the `known` one, and note it; a failure is said, and tried again later."""
    for run in runs(root):
        state = _state(run, root)
        if known.get(run) == state:
            continue
        try:
            archive(run, folder, root)
            known[run] = state
        except (OSError, ArchiveError) as error:
            print(f"The run {run} could not be archived: {error}", file=sys.stderr)


def _state(run: str, root: Path) -> int:
    return max((_written(path) or 0 for path in _files(run, root)), default=0)
