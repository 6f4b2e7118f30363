"""Whole trainings side by side."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from unmask.machine import end_with_parent
from unmask.progress import track


def side_by_side(function: Callable, tasks: Sequence[tuple], workers: int, label: str) -> list:
    """function(*task) of every task, in order and with progress: in turns on a GPU, in `workers` processes on a CPU.

    function: one of a module, as other processes must find it.
    """
    processes = 1 if torch.cuda.is_available() else min(workers, len(tasks))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        return list(track(pool.map(_on_one_thread, [(function, task) for task in tasks]), len(tasks), label))


def in_turn(*calls: tuple[Callable, tuple]) -> list:
    """function(*arguments) of every call, one after another: a task for `side_by_side` of several parts."""
    return [function(*arguments) for function, arguments in calls]


def _on_one_thread(work: tuple[Callable, tuple]):
    function, arguments = work
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the number of threads changes sums: one, and `workers` never changes a result
    return function(*arguments)
