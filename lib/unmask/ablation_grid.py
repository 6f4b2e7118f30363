"""The grid of the ablation: ways to train the frame detector, and heads over its frames, over the same seeds.

A cell of the grid is a way to train the frame detector (on self-blends or on labelled fakes, with or without fusion of
scales and frequency branch); on the frozen features of each stand several heads. All see the same frames of the same
videos; `unmask.ablation` judges them against the plain ConvNeXt with the mean of its frames' probabilities (`PLAIN`).
"""

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from unmask import features, temporal
from unmask.data.crops import CropStore, read_index
from unmask.detectors import base
from unmask.pairs import real_crops
from unmask.parallel import side_by_side
from unmask.profile import Profile
from unmask.training import Run


@dataclass(frozen=True)
class Cell:
    """One way to train the frame detector: source sbi|fakes, fusion and frequency as in `ConvNeXt`."""

    source: str
    fusion: str
    frequency: str

    def __str__(self) -> str:
        return f"{self.source}-{self.fusion}-{self.frequency}"


PLAIN = Cell("sbi", "none", "none")


def cells(profile: Profile, supervised: bool = True) -> list[Cell]:
    """The grid of the profile's `ablation` keys, with PLAIN as its first cell; unless `supervised` without fakes."""
    keys = profile.ablation
    sources = [source for source in keys.sources if supervised or source != "fakes"]
    grid = [Cell(*values) for values in itertools.product(sources, keys.fusions, keys.frequencies)]
    return [PLAIN, *(cell for cell in grid if cell != PLAIN)]


def spatial_runs(profile: Profile, seeds: Iterable[int], supervised: bool = True) -> dict[tuple[Cell, int], Run]:
    """The training of every one of `cells` and seed, for `training.train_runs`."""
    runs = {}
    for cell, seed in itertools.product(cells(profile, supervised), seeds):
        # A branch of frequencies, without places, can only join by attention; and no branch has nothing to join.
        join_by = {"none": "stem", "fft": "attention"}.get(cell.frequency, profile.convnext.join)
        config = {"fusion": cell.fusion, "frequency": cell.frequency, "join": join_by}
        options = {"source": cell.source, "epochs": profile.ablation.epochs}
        runs[cell, seed] = Run(seed, config=config, options=options)
    return runs


def score_runs(
    profile: Profile,
    manifest: pd.DataFrame,
    crops: str | os.PathLike,
    runs: Iterable[tuple[Cell, int]],
    folder: str | os.PathLike,
) -> pd.DataFrame:
    """`score_heads` of every cell and seed, whose frame detector is in `folder`/CELL-SEED, `side_by_side`."""
    tasks = [(profile, manifest, crops, Path(folder), cell, seed) for cell, seed in runs]
    return pd.concat(side_by_side(score_heads, tasks, profile.workers, "heads, runs"), ignore_index=True)


def score_heads(
    profile: Profile,
    manifest: pd.DataFrame,
    crops: str | os.PathLike,
    folder: Path,
    cell: Cell,
    seed: int,
) -> pd.DataFrame:
    """Score table of the test videos by every head of the profile on one frame detector, a row each.

    crops: frames in a row, as chapter 06 leaves them. `detector` is the head, "logits" for the mean of the frame
    detector's own probabilities, and `variant` the cell. Heads and features are kept in `folder`.
    """
    checkpoint = folder / f"{cell}-{seed}"
    keys, index = profile.ablation, _middle(read_index(crops), profile.ablation.frames)
    judged = index[index["item_id"].isin(manifest.loc[manifest["split"] == "test", "item_id"])]
    cache, tables = folder / "features", []
    test = features.of_crops(checkpoint, crops, judged, cache, workers=0)
    learned = [head for head in keys.heads if head != "logits"]
    parts = [
        features.of_made_clips(
            checkpoint, crops, real_crops(index, manifest, split), cache, keys.frames, versions, seed,
            profile.sbi.recipe, workers=0,
        )
        for split, versions in (("train", keys.versions), ("val", 1)) if learned
    ]  # fmt: skip
    below, settings = base.read_checkpoint(checkpoint)[1], CropStore(crops).settings()
    for head in keys.heads:
        detector, card = None, below
        if head in learned:
            out = folder / f"{cell}-{seed}-{head}"
            config = temporal.head_config(head, profile) | {"frames": keys.frames}
            temporal.fit(head, config, checkpoint, *parts, out, temporal.head_options(head, profile, seed), settings)
            detector, card = base.load_checkpoint(out)
        run = {"detector": head, "variant": str(cell), "seed": np.int32(seed), "checkpoint": card["sha256"][:12]}
        tables.append(temporal.score_features(detector, test).assign(**run).astype({"seed": "int32"}))
    return pd.concat(tables, ignore_index=True)


def _middle(index: pd.DataFrame, frames: int) -> pd.DataFrame:
    """The middle `frames` crops of every item."""
    index = index.sort_values(["item_id", "frame"], ignore_index=True)
    place = index.groupby("item_id").cumcount()
    start = (index.groupby("item_id")["frame"].transform("size") - frames).clip(lower=0) // 2
    return index[(place >= start) & (place < start + frames)].reset_index(drop=True)
