"""The study's ablation: what each part of the detector earns, as a grid over seeds, beside published numbers.

A cell of the grid is a way to train the frame detector (on self-blends or on labelled fakes, with or without fusion of
scales and frequency branch); on the frozen features of each stand several heads. All are judged on the same frames of
the same videos, against the plain ConvNeXt with the mean of its frames' probabilities (`PLAIN`).
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
from unmask.evaluation import auc_difference, auc_interval, join, slices
from unmask.pairs import real_crops
from unmask.profile import Profile
from unmask.training import Run

# Video AUC in per cent on other data sets, trained on FF++. Protocols differ (frames, crops, compression), so the
# numbers of two rows are not to be compared closely: on one common protocol SBI alone moves by 4 to 15 points.
PUBLISHED = (
    ("SBI, EfficientNet-B4", "real FF++ raw", 93.18, 97.56, 72.42, 86.15, "Shiohara & Yamasaki, CVPR 2022"),
    ("SBI, EfficientNet-B4", "real FF++ c23", 92.87, 98.16, 71.96, 85.51, "released weights, project page"),
    ("FakeSTormer", "real FF++ c23", 92.4, 98.5, 74.6, 90.0, "Nguyen et al., 2025"),
    ("FTCN, temporal Transformer", "FF++ c23 with fakes", 86.9, None, None, None, "Zheng et al., ICCV 2021"),
    ("AltFreezing", "FF++ c23 with fakes", 89.5, None, None, None, "Wang et al., CVPR 2023"),
    ("TALL", "FF++ c23 with fakes", 90.8, None, 76.8, None, "Xu et al., ICCV 2023"),
    ("LSDA", "FF++ c23 with fakes", 91.1, None, 77.0, None, "Yan et al., CVPR 2024"),
)


@dataclass(frozen=True)
class Cell:
    """One way to train the frame detector: source sbi|fakes, fusion and frequency as in `ConvNeXt`."""

    source: str
    fusion: str
    frequency: str

    def __str__(self) -> str:
        return f"{self.source}-{self.fusion}-{self.frequency}"


PLAIN = Cell("sbi", "none", "none")


def published() -> pd.DataFrame:
    """PUBLISHED as a table: video AUC in per cent."""
    columns = ["method", "trained on", "Celeb-DF v2", "DFD", "DFDC", "DFDC preview", "reported in"]
    return pd.DataFrame(PUBLISHED, columns=columns)


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


def score_heads(
    profile: Profile,
    manifest: pd.DataFrame,
    crops: str | os.PathLike,
    checkpoint: Path,
    cell: Cell,
    seed: int,
    folder: Path,
) -> pd.DataFrame:
    """Score table of the test videos by every head of the profile on one frame detector: a row per video.

    crops: frames in a row, as chapter 06 leaves them. `detector` is the head, "logits" for the mean of the frame
    detector's own probabilities, and `variant` the cell. Heads and features are kept in `folder`.
    """
    keys, index = profile.ablation, _middle(read_index(crops), profile.ablation.frames)
    judged = index[index["item_id"].isin(manifest.loc[manifest["split"] == "test", "item_id"])]
    cache, tables = folder / "features", []
    test = features.of_crops(checkpoint, crops, judged, cache, profile.workers)
    learned = [head for head in keys.heads if head != "logits"]
    parts = [
        features.of_made_clips(
            checkpoint, crops, real_crops(index, manifest, split), cache, keys.frames, versions, seed,
            profile.sbi.recipe, profile.workers,
        )
        for split, versions in (("train", keys.versions), ("val", 1)) if learned
    ]  # fmt: skip
    for head in keys.heads:
        detector, card = None, base.read_checkpoint(checkpoint)[1]
        if head in learned:
            out = folder / f"{cell}-{seed}-{head}"
            config = temporal.head_config(head, profile) | {"frames": keys.frames}
            settings = CropStore(crops).settings()
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


def table(scores: pd.DataFrame, manifest: pd.DataFrame, level: float = 0.95, draws: int = 1000) -> pd.DataFrame:
    """AUC of every cell and head, and its paired difference to PLAIN with head logits, per data set and method.

    Intervals come from a bootstrap over groups, drawn alike for both; seeds are averaged within every draw. All are
    judged on the videos that all of them scored.
    """
    rows = []
    for where, part in slices(join(scores, manifest)).items():
        if where.reals != "all" or part["label"].nunique() < 2:
            continue
        keys = ["item_id", "label", "group_id"]
        wide = (
            part.pivot(index=keys, columns=["variant", "detector", "seed"], values="score").dropna().sort_index(axis=1)
        )
        labels, groups = (wide.index.get_level_values(name) for name in keys[1:])
        plain = wide[str(PLAIN), "logits"].to_numpy()
        for cell, head in dict.fromkeys(column[:2] for column in wide.columns):
            own = wide[cell, head].to_numpy()
            auc = auc_interval(labels, own, groups, level, draws)
            gain = auc_difference(labels, own, plain, groups, level, draws)
            numbers = dict(zip(("auc", "low", "high", "gain", "gain_low", "gain_high"), auc + gain, strict=True))
            parts = dict(zip(("source", "fusion", "frequency"), cell.split("-"), strict=True))
            counted = {"seeds": own.shape[1], "videos": len(wide)}
            rows.append({"dataset": where.dataset, "method": where.method, **parts, "head": head, **counted, **numbers})
    return pd.DataFrame(rows)
