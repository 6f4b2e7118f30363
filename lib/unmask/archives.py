"""Runs kept elsewhere, as one zip each, and brought back: what a session that was lost goes on from."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import threading
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath

from unmask.profile import ROOT, figures_folder, write_atomic

DRIVE = "drive/MyDrive/unmask"
KEEPER, MINUTES = "unmask-keeper", 10.0
# In a run's folder: who archives it from here, and which archive it was restored from.
ORIGIN = ".archived.json"

# What unpacking raises: NotADirectoryError and the like where a file is another's folder, RuntimeError for a password.
DAMAGED = (
    zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, NotADirectoryError, FileExistsError, IsADirectoryError
)  # fmt: skip


class ArchiveError(RuntimeError):
    """A run cannot be archived or restored; the message says why."""


def archive(run: str = "demo", folder: str | os.PathLike | None = None, root: Path = ROOT) -> Path:
    """Keep a run, its work folder and its figures, as FOLDER/run-RUN.zip (on Drive unless told); returns its path.

    The archive replaces an older one when it is whole, never before. An older one that was not written from this run's
    folder, and is not what the folder was restored from, is renamed to run-RUN.previous.zip, and that is said: it may
    be the better one. Raises ArchiveError if there is no such run, or no Drive.
    """
    if not (root / "data" / "work" / run).is_dir() or run != Path(run).name:
        raise ArchiveError(f"There is no run {run!r} here; there are: {', '.join(runs(root)) or 'none'}.")
    folder = Path("/content", DRIVE) if folder is None else Path(folder)
    if not folder.parent.is_dir():
        raise ArchiveError(f"{folder.parent} is not there: set DRIVE = True in the first cell and run it again.")
    folder.mkdir(exist_ok=True)
    target, origin = folder / f"run-{run}.zip", _origin(root / "data" / "work" / run)
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
            file.comment = f"{origin['author']} {secrets.token_hex(8)}".encode()
        part = target.with_name(f"{target.name}.part")
        shutil.copyfile(local, part)
        if target.exists() and _comment(target) != origin["restored"] and _author(target) != origin["author"]:
            aside = _set_aside(target)
            print(f"{target.name} was another session's: kept as {aside.name} (docs/colab.md).", file=sys.stderr)
        os.replace(part, target)
    return target


def _origin(work: Path) -> dict[str, str | None]:
    """Who archives the run of a work folder, one name for each folder, and the archive that it was `restored` from."""
    path = work / ORIGIN
    if not path.is_file():
        _write_origin(work, None)
    return json.loads(path.read_text(encoding="utf-8"))


def _write_origin(work: Path, restored: str | None) -> None:
    write_atomic(work / ORIGIN, json.dumps({"author": secrets.token_hex(8), "restored": restored}))


def _comment(path: Path) -> str:
    """The author of an archive and its own number; "" where it has none or is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.comment.decode(errors="replace")
    except zipfile.BadZipFile:
        return ""


def _author(path: Path) -> str:
    return _comment(path).partition(" ")[0]


def _set_aside(target: Path) -> Path:
    """Rename an archive; of an author whose older archive was set aside already, only the newer one is kept."""
    author = _author(target)
    for number in itertools.count(1):
        aside = target.with_name(f"{target.stem}.previous{'' if number == 1 else f'-{number}'}.zip")
        if not aside.exists() or (author and _author(aside) == author):
            os.replace(target, aside)
            return aside


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
    run, work = run_of(path), root / "data" / "work"
    if run is None:
        raise ArchiveError(f"{Path(path).name} is no archive of a run: those are called run-RUN.zip.")
    if (work / run).exists():
        return False
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix=".restore-") as scratch:
        try:
            with zipfile.ZipFile(path) as file:
                if outside := [name for name in file.namelist() if not _belongs(name, run)]:
                    raise ArchiveError(f"{Path(path).name} is refused: {outside[0]!r} lies outside the run {run}.")
                file.extractall(scratch)
        except ArchiveError:
            raise
        except DAMAGED as error:
            raise ArchiveError(f"{Path(path).name} is damaged ({error}): delete it, or upload it again.") from None
        made = Path(scratch)
        (made / "data" / "work" / run).mkdir(parents=True, exist_ok=True)
        _write_origin(made / "data" / "work" / run, _comment(Path(path)))
        for figure in (made / "figures").rglob("*"):
            target = root / figure.relative_to(made)
            if figure.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(figure, target)
        os.replace(
            made / "data" / "work" / run, work / run
        )  # last: until then the run is not here, and restoring starts anew
    return True


def run_of(path: str | os.PathLike) -> str | None:
    """The run whose archive has this name; None if it is no archive's, or that of one that was set aside."""
    match = re.fullmatch(r"run-([A-Za-z0-9_-][A-Za-z0-9._-]*)\.zip", Path(path).name)
    return None if match is None or re.search(r"\.previous(-\d+)?$", match[1]) else match[1]


def _belongs(name: str, run: str) -> bool:
    """Whether an archive of a run may hold this entry: what `_files` finds, or a folder of it."""
    place, work, figures = PurePosixPath(name), PurePosixPath("data/work", run), PurePosixPath(figures_folder(run))
    if ".." in place.parts or "\\" in name:
        return False
    if place in (work, figures):
        return name.endswith("/")
    if run == "demo" and place.is_relative_to(figures):  # the other runs have their folders beside its figures
        inner = place.relative_to(figures).parts
        return (inner[0] == "tables") == (len(inner) > 1 or name.endswith("/"))
    return place.is_relative_to(work) or place.is_relative_to(figures)


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
        try:
            state = _state(run, root)
            if known.get(run) != state:
                archive(run, folder, root)
                known[run] = state
        except (OSError, RuntimeError, ValueError, zipfile.LargeZipFile) as error:  # RuntimeError: zipfile's own, too
            print(f"The run {run} could not be archived: {error}", file=sys.stderr)


def _state(run: str, root: Path) -> int:
    return max((_written(path) or 0 for path in _files(run, root)), default=0)
