"""Arrays in shards: whole after any kill, made once, in order."""

import numpy as np
import pandas as pd
import pytest
import torch

from unmask import shards


class Killed(BaseException):
    pass


LENGTHS = [2, 3, 1, 2]
ROWS = pd.DataFrame({"name": list("abcdefgh"), "number": np.arange(8)})


def maker(folder, made, die_at=None):
    """Writes shard k with the numbers of its rows; dies before shard `die_at`."""

    def make(work):
        k, (start, stop) = work
        if k == die_at:
            raise Killed
        made.append(k)
        numbers = np.arange(start, stop)
        shards.write(folder, k, {"number": numbers, "square": (numbers[:, None] ** [1, 2]).astype(np.float16)})

    return make


def fill(folder, made, die_at=None, rows=lambda: ROWS):
    edges = np.cumsum([0, *LENGTHS])
    works = list(enumerate(zip(edges[:-1], edges[1:], strict=True)))
    shards.fill(folder, works, maker(folder, made, die_at), rows, 0, "test")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_read_gives_the_index_and_all_shards_in_order(tmp_path):
    fill(tmp_path / "whole", [])
    rows, arrays = shards.read(tmp_path / "whole")
    pd.testing.assert_frame_equal(rows, ROWS)
    assert arrays["number"].tolist() == list(range(8)) and arrays["number"].dtype == np.int64
    assert arrays["square"].tolist() == [[n, n * n] for n in range(8)] and arrays["square"].dtype == np.float16


def test_killed_and_resumed_equals_uninterrupted_and_nothing_is_made_twice(tmp_path):
    fill(tmp_path / "whole", [])
    made = []
    for die_at in (1, 3):
        with pytest.raises(Killed):
            fill(tmp_path / "cut", made, die_at)
        assert not (tmp_path / "cut/index.parquet").exists()
    fill(tmp_path / "cut", made)
    assert made == [0, 1, 2, 3] and contents(tmp_path / "cut") == contents(tmp_path / "whole")
    fill(tmp_path / "cut", made, rows=lambda: (_ for _ in ()).throw(Killed))
    assert made == [0, 1, 2, 3], "a whole folder is left alone, and its index not made again"


def test_killed_while_the_index_is_made(tmp_path):
    made = []
    with pytest.raises(Killed):
        fill(tmp_path / "cut", made, rows=lambda: (_ for _ in ()).throw(Killed))
    assert len(contents(tmp_path / "cut")) == 4
    fill(tmp_path / "cut", made)
    assert made == [0, 1, 2, 3] and len(shards.read(tmp_path / "cut")[0]) == 8


def test_a_lost_shard_is_made_again(tmp_path):
    fill(tmp_path / "whole", made := [])
    before = contents(tmp_path / "whole")
    (tmp_path / "whole/00002.safetensors").unlink()
    fill(tmp_path / "whole", made)
    assert made == [0, 1, 2, 3, 2] and contents(tmp_path / "whole") == before


def test_no_work_at_all(tmp_path):
    shards.fill(tmp_path / "empty", [], maker(tmp_path, []), lambda: ROWS.iloc[:0], 0, "test")
    rows, arrays = shards.read(tmp_path / "empty")
    assert rows.empty and arrays == {}


@pytest.mark.parametrize("dies", [False, True])
def test_shards_are_made_on_one_thread_and_the_callers_number_comes_back(tmp_path, dies):
    before, seen = torch.get_num_threads(), []

    def make(work):
        seen.append(torch.get_num_threads())
        if dies:
            raise Killed

    torch.set_num_threads(2)
    try:
        with pytest.raises(Killed if dies else FileNotFoundError):
            shards.fill(tmp_path / "some", [0, 1], make, lambda: ROWS, 0, "test")
            (tmp_path / "some/00000.safetensors").open("rb")  # this `make` writes none
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
