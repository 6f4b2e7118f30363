"""Tasks side by side: results in order, one thread each, errors passed on."""

import pytest
import torch

from unmask.parallel import in_turn, side_by_side


def threads_and(number):
    return torch.get_num_threads(), 1 / number


@pytest.mark.skipif(torch.cuda.is_available(), reason="in turns on a GPU, with its own threads")
def test_results_come_in_order_from_one_thread_each():
    assert side_by_side(threads_and, [(4,), (1,), (2,)], 2, "numbers") == [(1, 0.25), (1, 1.0), (1, 0.5)]
    with pytest.raises(ZeroDivisionError):
        side_by_side(threads_and, [(0,)], 2, "numbers")


def test_calls_in_turn():
    kept = []
    assert in_turn((kept.append, (3,)), (len, (kept,)), (kept.append, (4,)), (sum, (kept,))) == [None, 1, None, 7]
    assert in_turn() == []
