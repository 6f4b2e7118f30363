"""Computed arrays in a folder: safetensors shards, which an interrupted run adds to, and at last an index.

A shard is `00000.safetensors`, `00001.safetensors`, ...; its arrays have a row for each row of its part of the index,
in order. `index.parquet` is written last: a folder with an index is whole.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow
import torch
from safetensors import safe_open
from safetensors.numpy import save

from unmask.machine import end_with_parent, writing
from unmask.profile import write_atomic
from unmask.progress import track

INDEX = "index.parquet"


def path_of(folder: Path, number: int) -> Path:
    """The file of one shard."""
    return folder / f"{number:05d}.safetensors"


def write(folder: Path, number: int, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of one shard, whole or not at all."""
    write_atomic(path_of(folder, number), save({key: np.ascontiguousarray(value) for key, value in arrays.items()}))


def read(folder: Path, names: Collection[str] | None = None) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The index of a whole folder and its arrays (those of `names` alone, if given), all shards together; of no shard,
    no arrays."""
    rows = pd.read_parquet(folder / INDEX)
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for path in sorted(folder.glob("*.safetensors")):  # one at a time: all of them beside the result fill the memory
        with safe_open(path, "numpy") as file:
            part = {key: file.get_tensor(key) for key in file.keys() if names is None or key in names}  # noqa: SIM118
        stop = start + max(map(len, part.values()))
        for key, values in part.items():
            if key not in arrays:
                arrays[key] = np.empty((len(rows), *values.shape[1:]), values.dtype)
            arrays[key][start:stop] = values
        start = stop
    return rows, arrays


def fill(
    folder: Path, works: Sequence, make: Callable, rows: Callable[[], pd.DataFrame], workers: int, label: str
) -> None:
    """Make the shards that a folder lacks, and then its index if that is missing.

    make: called with works[k], calls `write` with number k. rows: the index. workers: processes that `make` runs in,
    which must be a function of a module then; 0 is this one, as it always is where there is a GPU. label: of progress.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [work for k, work in enumerate(works) if not path_of(folder, k).exists()]
    for _ in track(_run(make, missing, workers), len(missing), label):
        pass
    if not (folder / INDEX).exists():
        buffer = pyarrow.BufferOutputStream()
        rows().to_parquet(buffer, index=False)
        write_atomic(folder / INDEX, buffer.getvalue().to_pybytes())


def _run(make: Callable, works: Sequence, workers: int) -> Iterator[None]:
    """Make shards in this process or in others; one thread each, since the number of threads changes sums."""
    if torch.cuda.is_available() or workers == 0 or len(works) < 2:
        with _one_thread():
            yield from map(make, works)
        return
    with ProcessPoolExecutor(min(workers, len(works)), multiprocessing.get_context("spawn"), _start_worker) as pool:
        yield from pool.map(make, works)


def _start_worker() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
