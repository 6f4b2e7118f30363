"""The grid of the ablation, its table against scikit-learn, and which frames the heads see."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from unmask import ablation
from unmask.ablation import PLAIN, Cell
from unmask.detectors import base
from unmask.profile import load_profile


def profile(**keys):
    return load_profile("demo", {f"ablation.{key}": value for key, value in keys.items()})


def test_the_grid_has_every_combination_once_and_the_plain_cell_first():
    grid = ablation.cells(profile(sources=["fakes", "sbi"], fusions=["topdown", "none"], frequencies=["srm", "none"]))
    assert grid[0] == PLAIN and len(grid) == len(set(grid)) == 8
    assert ablation.cells(profile(sources=["fakes"], fusions=["none"], frequencies=["srm"])) == [
        PLAIN,
        Cell("fakes", "none", "srm"),
    ], "without its yardstick no gain could be told"


def test_without_labelled_fakes_the_grid_learns_from_self_blends_alone():
    keys = profile(sources=["sbi", "fakes"], fusions=["none"], frequencies=["none", "srm"])
    assert ablation.cells(keys, supervised=False) == [PLAIN, Cell("sbi", "none", "srm")]
    assert {run.options["source"] for run in ablation.spatial_runs(keys, [0], supervised=False).values()} == {"sbi"}


def test_every_cell_can_be_built_and_trains_as_it_says():
    runs = ablation.spatial_runs(profile(frequencies=["none", "srm", "fad", "fft", "phase"], epochs=2), [3, 4])
    assert len(runs) == 2 * 2 * 5 * 2
    for (cell, seed), run in runs.items():
        assert run.seed == seed and not run.shuffle and run.options == {"source": cell.source, "epochs": 2}
        detector = base.build("convnext", backbone="convnext_zepto_rms", size=32, **run.config)
        assert detector.config["fusion"] == cell.fusion and detector.config["frequency"] == cell.frequency
        assert (detector.frequency is None) == (cell.frequency == "none")


@pytest.mark.parametrize("frames, expected", [(4, [2, 3, 4, 5]), (3, [2, 3, 4]), (99, list(range(8)))])
def test_the_heads_see_the_middle_of_every_clip(frames, expected):
    index = pd.DataFrame({"item_id": ["b"] * 8 + ["a"] * 2, "frame": [*range(8)[::-1], 5, 9]})
    chosen = ablation._middle(index, frames).groupby("item_id")["frame"].apply(sorted)
    assert list(chosen["b"]) == expected and list(chosen["a"]) == [5, 9]


def scores_of(rng, manifest, strength, cell, head):
    tables = []
    for seed in (0, 1):
        score = 1 / (1 + np.exp(-(strength * manifest["label"] + rng.normal(size=len(manifest)))))
        run = {"frame": -1, "score": score, "detector": head, "variant": str(cell), "seed": seed, "checkpoint": ""}
        tables.append(manifest[["item_id"]].assign(**run))
    return pd.concat(tables)


def test_the_table_is_the_mean_auc_of_seeds_and_its_paired_gain():
    rng = np.random.default_rng(0)
    manifest = pd.DataFrame({"item_id": [f"{i:03d}" for i in range(240)]})
    manifest["group_id"] = [f"g{i % 30}" for i in range(240)]
    manifest["label"] = (np.arange(240) % 3 > 0).astype(int)
    manifest["method"] = np.array(["real", "swap", "texture"])[np.arange(240) % 3]
    manifest = manifest.assign(dataset="world-a", split="test", kind="video")
    better = Cell("fakes", "topdown", "srm")
    scores = pd.concat(
        [scores_of(rng, manifest, 0.5, PLAIN, "logits"), scores_of(rng, manifest, 3.0, better, "gru")],
        ignore_index=True,
    )
    table = ablation.table(scores, manifest, draws=200).set_index(["method", "source", "head"])
    assert set(table.index.get_level_values("method")) == {"all", "swap", "texture"}
    for method in ("all", "swap"):
        chosen = manifest[manifest["method"].isin(["real", method]) | (method == "all")]

        def auc(head, chosen=chosen):
            own = scores[scores["detector"] == head].pivot(index="item_id", columns="seed", values="score")
            return np.mean([roc_auc_score(chosen["label"], own.loc[chosen["item_id"], seed]) for seed in (0, 1)])

        plain, row = table.loc[(method, "sbi", "logits")], table.loc[(method, "fakes", "gru")]
        assert row["auc"] == pytest.approx(auc("gru")) and plain["auc"] == pytest.approx(auc("logits"))
        assert row["gain"] == pytest.approx(auc("gru") - auc("logits")) and row["gain_low"] > 0
        assert plain["gain"] == plain["gain_low"] == plain["gain_high"] == 0
        assert (row["fusion"], row["frequency"], row["seeds"], row["items"]) == ("topdown", "srm", 2, len(chosen))


def test_published_numbers_carry_their_protocol_and_source():
    table = ablation.published()
    assert table[["method", "trained on", "reported in"]].ne("").all(axis=None)
    assert table["Celeb-DF v2"].between(50, 100).all()
