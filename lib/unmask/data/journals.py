"""Work that several jobs share: a journal of each share, and the rows of all of them together.

The job `I/N` does every N-th item from the I-th on. Its journal, `I-of-N.jsonl.part`, gets one line per finished item
after the item's row has reached the disk, and becomes `I-of-N.jsonl` when all are done. After a kill the same job goes
on after the last whole line.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO

from unmask.machine import writing

SLAB = 2**10  # lines that `in_turn` holds at a time


class ShareError(RuntimeError):
    """A share of some work is being done by another job; the message says what to do."""


def lines(file: Iterable[bytes]) -> Iterator[tuple[dict, int]]:
    """Lines of a journal, and bytes of each; a line that a kill spoilt, and what follows it, do not count."""
    for line in file:
        try:
            found = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return
        if not isinstance(found, dict):
            return
        yield found, len(line)


def in_turn(journals: Sequence[Path]) -> Iterator[tuple[int, dict]]:
    """Lines of all journals, one of each in turn, each with the number of its journal.

    Some are read at a time: all would not fit the memory, and a process may not have many files open.
    """
    places, some = [0] * len(journals), max(SLAB // len(journals), 1)
    while True:
        found = []
        for i, path in enumerate(journals):
            with open(path, "rb") as file:
                file.seek(places[i])
                slab = list(lines(islice(file, some)))
            places[i] += sum(size for _, size in slab)
            found.append([line for line, _ in slab])
        if not any(found):
            return
        for row in zip_longest(*found):
            yield from ((i, line) for i, line in enumerate(row) if line is not None)


def name_shards(numbers: Sequence[int], of: int) -> str:
    """Such as "shard 1/16, 5/16", as `--shard` takes them; the first eight."""
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"shard {', '.join(f'{number}/{of}' for number in numbers[:8])}{more}"


def path_of(folder: Path, shard: int, of: int) -> Path:
    """The journal of a complete share."""
    return folder / f"{shard:05d}-of-{of:05d}.jsonl"


def state_of(*paths: str | os.PathLike) -> str:
    """Sizes and times of the files among `paths` that there are: what changes when one of them does."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a name that no file can have
            stat = os.stat(path)
            found.append(f"{stat.st_size}:{stat.st_mtime_ns}")
    return " ".join(found)


def healed(reasons: Iterable[str], passing: Collection[str], again: Callable[[list[int]], Iterable[str]]) -> int | None:
    """The first row, told by its reason, that failed for a `passing` one and does not so when it is tried again; None
    without any.

    again: the new reasons of the rows at some positions, in turn.
    """
    unlucky = [i for i, reason in enumerate(reasons) if reason in passing]
    return next((i for i, reason in zip(unlucky, again(unlucky), strict=False) if reason not in passing), None)


def _locked(path: Path) -> IO | None:
    """The file open and locked, None if another process has it locked.

    `Journal.remove` may delete it between opening and locking, and a lock on a file without a name keeps nobody out.
    """
    while True:
        file = open(path, "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


class Journal:
    """The only writer of one share of some work in a folder; use as a context manager.

    `resume` first, then `add` rows in their fixed order, then `finish`. `stamp` says by what the rows were made: rows
    made by anything else are discarded. Raises ShareError if another process is writing the share.
    """

    def __init__(self, folder: str | os.PathLike, shard: tuple[int, int], stamp: str):
        self.stamp, self.path = stamp, path_of(Path(folder), *shard)
        self.part = self.path.with_suffix(".jsonl.part")
        with writing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path.with_suffix(".lock"))
        self._file = None
        if self._lock is None:
            name = name_shards(shard[:1], shard[1])
            raise ShareError(f"Another process is doing {name} of {self.path.parent}: wait, or stop it.")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                # Closing tries again to write what a full disk refused; `resume` does that row again.
                with contextlib.suppress(OSError):
                    file.close()

    def _stored(self) -> Path:
        return self.part if self.part.exists() or not self.path.exists() else self.path

    def kept(self, keys: Sequence[tuple[str, ...]]) -> Iterator[dict]:
        """The rows that `resume` would keep."""
        if not (stored := self._stored()).exists():
            return
        with open(stored, "rb") as file:
            found = lines(file)
            if next(found, ({}, 0))[0] == {"stamp": self.stamp}:
                for key, (line, _) in zip(keys, found, strict=False):
                    if tuple(line["key"]) != tuple(key):
                        return
                    yield line["row"]

    def resume(self, keys: Sequence[tuple[str, ...]], most: int | None = None) -> int:
        """Keep the rows whose keys are still the first of `keys`, at most `most`; returns how many. A complete share
        stays as it is.

        A key is the identity of an item and whatever else its row depends on.
        """
        stored, kept, end, whole = self._stored(), 0, 0, False
        if stored.exists():
            with open(stored, "rb") as file:
                found = lines(file)
                head, size = next(found, ({}, 0))
                if head == {"stamp": self.stamp}:
                    end = size
                    for key, (line, size) in zip(keys[:most], found, strict=False):
                        if tuple(line["key"]) != tuple(key):
                            break
                        kept, end = kept + 1, end + size
                    whole = kept == len(keys) and next(found, None) is None
        if stored is self.path and whole:
            return kept
        if stored is self.path:
            os.replace(self.path, self.part)
        with writing(self.path.parent):
            self._file = open(self.part, "ab")
            self._file.truncate(end)
        if end == 0:
            self._write([{"stamp": self.stamp}])
        return kept

    def add(self, rows: Iterable[tuple[tuple[str, ...], Mapping]]) -> None:
        """Append rows, each after its key; on return they are on the disk."""
        self._write({"key": list(key), "row": row} for key, row in rows)

    def _write(self, found: Iterable[Mapping]) -> None:
        text = b"".join(json.dumps(line).encode() + b"\n" for line in found)
        with writing(self.path.parent):
            self._file.write(text)
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Give the journal its final name. Does nothing for a share that was complete already."""
        if self._file is not None:
            os.replace(self.part, self.path)

    def remove(self) -> None:
        """Delete a journal that was read, and its folder if nothing else is in it; before the share is given free."""
        for path in (self.path, self.path.with_suffix(".lock")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


def gather(
    folder: str | os.PathLike, of: int, stamp: str, keys: Iterable[tuple[str, ...]]
) -> tuple[list[dict], list[int]]:
    """Rows of all shares in the order of the items, and the shares that are still to do; of either, one is empty.

    A share is to do if its journal is missing, made by something else than `stamp`, or has other keys than those that
    `keys`, which are read if no journal is missing, gives it.
    """
    journals = [path_of(Path(folder), i, of) for i in range(of)]
    stale = {i for i, path in enumerate(journals) if not path.exists()}
    if stale:
        return [], sorted(stale)
    keys, rows, counts = list(keys), [], [-1] * of  # -1: without its head yet
    for i, line in in_turn(journals):
        place = i + counts[i] * of
        counts[i] += 1
        if counts[i] == 0:
            stale |= set() if line == {"stamp": stamp} else {i}
        elif i not in stale:
            stale |= set() if place < len(keys) and tuple(line["key"]) == tuple(keys[place]) else {i}
            rows.append(line["row"])
    stale |= {i for i, count in enumerate(counts) if count != len(range(i, len(keys), of))}
    return ([], sorted(stale)) if stale else (rows, [])
