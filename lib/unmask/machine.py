"""What a machine may refuse, said in one sentence each: disks that cannot be written to, memory that runs out.

And the end of worker processes: they must not outlive the process that they work for.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AGAIN = "The same command then goes on from here."
_REFUSED = {
    errno.ENOSPC: "No space is left in {}: make room there.",
    errno.EDQUOT: "The quota of {} is used up: make room there.",
    errno.EROFS: "{} is read-only: mount it writable, or name another folder.",
    errno.EACCES: "{} may not be written to: change its permissions, or name another folder.",
    errno.EPERM: "{} may not be written to: change its permissions, or name another folder.",
    errno.ENOTDIR: "{} cannot be a folder, for a file is in its way: name another folder.",
    errno.EEXIST: "{} cannot be a folder, for a file is in its way: name another folder.",
    errno.ENOENT: "{} is not there: make the folder, or name another one.",
}
# What any other file may lack as well: they speak of the folder where it is none.
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
_POLL = 0.5  # seconds


class DiskError(OSError):
    """A folder cannot be written to; the message names it and says what to do."""


@contextmanager
def writing(folder: str | os.PathLike) -> Iterator[None]:
    """Turn the refusal of a disk into a DiskError that names `folder` and the remedy; other errors pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskError) or error.errno not in _REFUSED:
            raise
        if error.errno in _NO_FOLDER and os.path.isdir(folder):
            raise
        raise DiskError(f"{_REFUSED[error.errno].format(Path(folder).absolute())} {AGAIN}") from error


def check_writable(folder: str | os.PathLike) -> None:
    """Make the folder if it is missing, and raise DiskError if nothing can be written into it: before long work."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        try:
            probe.write_bytes(b"x")
        finally:
            probe.unlink(missing_ok=True)


def advice(kind: str, message: str) -> str:
    """What to do about an error of this class name and message if memory is its likely cause, else ""."""
    if kind in ("BrokenProcessPool", "TerminatedWorkerError"):
        return f"A worker process was killed, most often because memory ran out: fewer workers need less. {AGAIN}"
    full = kind in ("MemoryError", "_ArrayMemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in message
    return f"The memory was not enough: fewer workers or smaller batches need less. {AGAIN}" if full else ""


def end_with_parent() -> None:
    """End this worker process soon after its parent, however that ends; an initializer for pools of processes.

    The workers of a killed process would go on with what they have, beside the run that takes its place, and then
    wait for ever with all their memory.
    """
    parent = multiprocessing.parent_process().pid

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL)
        os._exit(1)

    threading.Thread(target=watch, name=end_with_parent.__name__, daemon=True).start()
