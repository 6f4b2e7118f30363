"""What detectors cost: frames, multiply-adds, training of all that a detector stands on, the Pareto front."""

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_ablation import make_manifest, score_table
from test_profile import resolved

from unmask import ablation_cost
from unmask.ablation_cost import Costed
from unmask.contenders import Contender
from unmask.data.manifest import write_manifest
from unmask.detectors import base
from unmask.evaluation import write_scores
from unmask.profile import open_study


class Wall(base.Detector):
    """A small detector whose cost is known by hand: a 4 x 4 convolution with stride 4, from 3 to 5 channels."""

    name = "wall"

    def __init__(self, size=8, frames=1):
        super().__init__()
        self.config = {"size": size, "frames": frames}
        self.input_spec = base.InputSpec(size, frames=frames)
        self.convolution = torch.nn.Conv2d(3, 5, 4, stride=4)
        self.convolution.bias.requires_grad_(False)

    def forward(self, clips, mask=None):
        return self.convolution(clips.flatten(0, 1)).mean((1, 2, 3)).unflatten(0, clips.shape[:2]).mean(1)


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setitem(base._REGISTRY, "wall", Wall)
    study = open_study(resolved(tmp_path, **{"evaluate.draws": 20, "seeds": 2}))
    manifest = make_manifest()
    write_manifest(manifest, study.work / "manifest.parquet")
    scores = score_table(manifest, {("single", ""): 2.0, ("clip", ""): 1.0, ("whole", ""): 0.5})
    single = [scores[(scores["detector"] == "single") & (scores["frame"] == 3)].assign(frame=k) for k in range(7)]
    scores = pd.concat([scores[scores["frame"] == -1], *single]).astype({"frame": "int32"})
    write_scores(scores, study.output("scores/some.parquet"))
    for seed in study.seeds:
        for name, frames in (("single", 1), ("clip", 6), ("whole", 1)):
            base.save_checkpoint(Wall(frames=frames), study.output(f"checkpoints/{name}-{seed}"))
    return study


def costed(name):
    return Costed(Contender(name, "05_some", "some", name, checkpoint=f"checkpoints/{name}-{{seed}}"), "a note")


def test_a_detectors_price_is_that_of_all_frames_it_sees_of_a_video(study):
    both = (costed("single"), costed("clip"), costed("whole"), costed("gone"))
    table = ablation_cost.table(study, both).set_index("arm")
    frame = 3 * 4 * 4 * 5 * 2 * 2 / 1e9  # multiply-adds: inputs of a place x channels x places
    assert table.loc[["single", "clip", "whole"], "frames"].tolist() == [7, 6, study.profile.preprocess.frames]
    assert table["gflops"].tolist()[:3] == pytest.approx(
        [7 * frame, 6 * frame, study.profile.preprocess.frames * frame]
    )
    assert table.loc["clip", ["parameters", "trainable"]].tolist() == [3 * 16 * 5 + 5, 3 * 16 * 5]
    assert (table["frames_per_s"][:3] > 0).all() and table["note"].tolist()[0] == "a note"
    assert (
        "missing" in table.loc["gone", "note"]
        and table.loc["gone", "frames"] is None
        and not table.loc["gone", "front"]
    )


def test_the_auc_is_that_of_test_videos_of_the_home_set(study):
    first = ablation_cost.table(study, (costed("single"),)).iloc[0]
    assert (first["n_real"], first["n_fake"]) == (12, 24), "nothing is learned from: the test split's first"
    manifest = make_manifest().assign(split=lambda rows: rows["split"].replace("val", "train"))
    manifest["dataset"] = manifest["dataset"].mask(manifest["split"] == "train", "world-b")
    manifest = manifest.sort_values("split", kind="stable")  # the first rows are of the other data set
    write_manifest(manifest, study.work / "manifest.parquet")
    row = ablation_cost.table(study, (costed("single"),)).iloc[0]
    manifest = manifest.set_index("item_id")
    scores = pd.read_parquet(study.work / "scores/some.parquet")
    own = scores[(scores["detector"] == "single") & (scores["frame"] == -1)].join(manifest, on="item_id")
    own = own[(own["split"] == "test") & (own["dataset"] == "world-b")]
    expected = np.mean([roc_auc_score(part["label"], part["score"]) for _, part in own.groupby("seed")])
    assert (row["auc"], row["seeds"], row["n_real"], row["n_fake"]) == (pytest.approx(expected), 2, 8, 16)


def test_a_checkpoint_that_is_not_there_is_said_to_be_missing(study):
    for seed in study.seeds:
        (study.work / f"checkpoints/clip-{seed}/config.json").unlink()
    table = ablation_cost.table(study, (costed("clip"), costed("single"))).set_index("arm")
    assert table.loc["clip", "note"] == "missing: no checkpoint" and table.loc["single", "front"]


def test_the_front_is_what_nothing_beats_for_less():
    rng = np.random.default_rng(0)
    costs, values = rng.integers(0, 8, 40).astype(float), rng.integers(0, 8, 40).astype(float)
    costs[3] = values[5] = np.nan
    expected = []
    for c, v in zip(costs, values, strict=True):
        beaten = any((d <= c and w >= v) and (d < c or w > v) for d, w in zip(costs, values, strict=True))
        expected.append(not beaten and not np.isnan(c) and not np.isnan(v))
    assert ablation_cost.front(costs, values).tolist() == expected and any(expected)


def test_the_picture_shows_what_has_a_price_and_joins_the_front():
    table = pd.DataFrame({"arm": ["a", "b", "c", "d"], "gflops": [1.0, 10, 5, np.nan], "auc": [0.6, 0.9, 0.5, np.nan],
                          "low": [0.5, 0.8, np.nan, np.nan], "high": [0.7, 1, np.nan, np.nan],
                          "front": [True, True, False, False]})  # fmt: skip
    _, ax = plt.subplots()
    ablation_cost.draw(ax, table)
    assert [text.get_text() for text in ax.texts] == ["a", "c", "b"]
    assert any(line.get_xydata().tolist() == [[1, 0.6], [10, 0.9]] for line in ax.lines)
    plt.close()


def test_every_costed_detector_has_a_place_for_its_checkpoints():
    contenders = [one.contender for one in ablation_cost.COSTED]
    assert len({one.name for one in contenders}) == len(contenders)
    assert all("{seed}" in one.checkpoint for one in contenders)
    assert contenders[-1].checkpoint.format(seed=4) == "checkpoints/d2st/d2st-3-4"


def test_speed_counts_frames_of_the_fastest_try(monkeypatch):
    ticks = iter(np.cumsum([0.0, 1, 0, 4, 0, 2, 0, 3]))  # start and end of every try; the first is to warm up
    monkeypatch.setattr(ablation_cost.time, "perf_counter", lambda: next(ticks))
    assert ablation_cost.speed(Wall(frames=6).eval()) == 6 / 2


def test_training_time_is_that_of_all_a_detector_stands_on(study):
    def trained(name, ended):
        (study.work / f"checkpoints/{name}-{study.seeds[0]}/epochs.json").write_text(json.dumps(ended))

    trained("clip", [10.0, 12, 14, 100])  # four epochs of two seconds, and a pause
    trained("single", [5.0, 8])
    both = replace(costed("clip"), before=("checkpoints/single-{seed}",))
    untimed = replace(costed("clip"), before=("checkpoints/whole-{seed}",))
    gone = replace(costed("clip"), before=("checkpoints/gone-{seed}",))
    seconds = [ablation_cost.table(study, (one,))["train_s"].item() for one in (costed("clip"), both, untimed, gone)]
    assert seconds[:2] == [8, 14] and np.isnan(seconds[2:]).all()
