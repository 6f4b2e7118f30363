"""The grid of the ablation: its cells, how each is trained, and which frames the heads see."""

import pandas as pd
import pytest

from unmask import ablation_grid
from unmask.ablation_grid import PLAIN, Cell
from unmask.detectors import base
from unmask.profile import load_profile


def profile(**keys):
    return load_profile("demo", {f"ablation.{key}": value for key, value in keys.items()})


def test_the_grid_has_every_combination_once_and_the_plain_cell_first():
    keys = profile(sources=["fakes", "sbi"], fusions=["topdown", "none"], frequencies=["srm", "none"])
    grid = ablation_grid.cells(keys)
    assert grid[0] == PLAIN and len(grid) == len(set(grid)) == 8
    assert ablation_grid.cells(profile(sources=["fakes"], fusions=["none"], frequencies=["srm"])) == [
        PLAIN,
        Cell("fakes", "none", "srm"),
    ], "without its yardstick no gain could be told"


def test_without_labelled_fakes_the_grid_learns_from_self_blends_alone():
    keys = profile(sources=["sbi", "fakes"], fusions=["none"], frequencies=["none", "srm"])
    assert ablation_grid.cells(keys, supervised=False) == [PLAIN, Cell("sbi", "none", "srm")]
    runs = ablation_grid.spatial_runs(keys, [0], supervised=False)
    assert {run.options["source"] for run in runs.values()} == {"sbi"}


def test_every_cell_can_be_built_and_trains_as_it_says():
    runs = ablation_grid.spatial_runs(profile(frequencies=["none", "srm", "fad", "fft", "phase"], epochs=2), [3, 4])
    assert len(runs) == 2 * 2 * 5 * 2
    for (cell, seed), run in runs.items():
        assert run.seed == seed and not run.shuffle and run.options == {"source": cell.source, "epochs": 2}
        detector = base.build("convnext", backbone="convnext_zepto_rms", size=32, **run.config)
        assert detector.config["fusion"] == cell.fusion and detector.config["frequency"] == cell.frequency
        assert (detector.frequency is None) == (cell.frequency == "none")


@pytest.mark.parametrize("frames, expected", [(4, [2, 3, 4, 5]), (3, [2, 3, 4]), (99, list(range(8)))])
def test_the_heads_see_the_middle_of_every_clip(frames, expected):
    index = pd.DataFrame({"item_id": ["b"] * 8 + ["a"] * 2, "frame": [*range(8)[::-1], 5, 9]})
    chosen = ablation_grid._middle(index, frames).groupby("item_id")["frame"].apply(sorted)
    assert list(chosen["b"]) == expected and list(chosen["a"]) == [5, 9]
