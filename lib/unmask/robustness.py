"""How detectors stand up to what happens to media on their way: AUC over levels of compression, blur, noise and loss.

The test videos of `select` are judged as they are and after each of the kinds of `unmask.perturbations`. Pictures are
changed as they are read, but for H.264: those videos are encoded anew as a whole and their faces cut as the study does.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from unmask import perturbations, preprocessing, robustness_judging, sbi, scoring
from unmask.data import video
from unmask.detectors import base, temporal
from unmask.evaluation import join, read_scores
from unmask.figures import COLOURS
from unmask.intervals import auc_difference, auc_interval
from unmask.pairs import fingerprint
from unmask.parallel import side_by_side
from unmask.perturbations import KINDS, LEVELS, VIDEO_KINDS
from unmask.profile import digest, source_hash
from unmask.robustness_judging import Task, level_of, make, settings

CLEAN = "none"
_TITLES = {
    "jpeg": "JPEG, quality", "h264": "H.264, CRF", "blur": "blur, pixels of 256", "resize": "resize, share of sides",
    "noise": "noise, grey levels", "drop": "frames lost, %",
}  # fmt: skip


def select(manifest: pd.DataFrame, index: pd.DataFrame, videos: int) -> pd.DataFrame:
    """Index rows of the test videos to perturb.

    Of every group one real and one fake of each method, at most `videos` in all; only if that leaves room, a second of
    each. Which, and which groups come first, hangs on their names alone; data sets take turns. Videos without a crop
    are not chosen. Give a manifest of one data set to stay with it.
    """
    some = manifest[(manifest["split"] == "test") & (manifest["kind"] == "video")]
    some = some[some["item_id"].isin(index["item_id"])]
    some = some.assign(order=[_hash(name) for name in some["item_id"]]).sort_values("order")
    some["round"] = some.groupby(["group_id", "method"]).cumcount()
    groups = some.drop_duplicates("group_id")[["group_id", "dataset"]]
    groups = groups.assign(order=[_hash(name) for name in groups["group_id"]]).sort_values("order")
    groups["turn"] = groups.groupby("dataset").cumcount()
    groups = groups.sort_values(["turn", "dataset"])["group_id"].tolist()
    some["place"] = some["group_id"].map({name: place for place, name in enumerate(groups)})
    chosen = some.sort_values(["round", "place", "label", "method"]).head(videos)
    rows = index[index["item_id"].isin(chosen["item_id"])]
    return rows.sort_values(["item_id", "frame"], ignore_index=True)


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def score(
    panel: Mapping[str, str | os.PathLike],
    manifest: str | os.PathLike,
    crops: str | os.PathLike,
    rows: pd.DataFrame,
    kinds: Iterable[str],
    out: str | os.PathLike,
    frames: int,
    seed: int = 0,
    workers: int = 1,
) -> pd.DataFrame:
    """Score table of videos as they are (variant "none") and after every kind of change (variant: the kind).

    panel: folders of checkpoints by the name that the table gives them; any that judge single frames or clips and need
    nothing but the picture. rows: of the index of `crops`, which `preprocess` cut from the media of `manifest`. kinds:
    of `perturbations.KINDS` and `VIDEO_KINDS`. frames: in the middle of a video's crops, that a detector sees at most;
    one that needs clips of more sees as many as it needs. Lost frames are lost from these. seed: of noise and losses.

    The table has a row per video (frame -1). One that shows no face any more, or cannot be encoded anew, has none for
    that kind, and is counted on stderr.

    `out` keeps a table per kind, so that a call that was stopped goes on; one of other checkpoints, rows or code is
    made anew. workers: processes, 0 is this one; never changes a score. ValueError for an unknown kind and for a
    detector that reads more than pictures; CheckpointError, CropError and ManifestError for what is damaged.
    """
    if rows.empty:
        raise ValueError("There is no video to perturb.")
    kinds = [CLEAN, *kinds]
    if unknown := [kind for kind in kinds[1:] if kind not in KINDS + VIDEO_KINDS]:
        raise ValueError(f"There is no perturbation {unknown[0]!r}; choose of {', '.join(KINDS + VIDEO_KINDS)}.")
    cards = {name: base.read_checkpoint(folder)[1] for name, folder in panel.items()}
    own = tuple((name, str(folder), cards[name]["sha256"]) for name, folder in panel.items())
    rows = rows.sort_values(["item_id", "frame"], ignore_index=True)
    task = Task(own, str(manifest), str(crops), frames, seed)
    modules = {base.module(card["detector"]) for card in cards.values()} | {
        sys.modules[__name__], robustness_judging, perturbations, preprocessing, scoring, sbi, base, temporal, video,
    }  # fmt: skip
    source = source_hash(*sorted(modules, key=lambda module: module.__name__))
    facts = [[(name, sha) for name, _, sha in own], fingerprint(rows), settings(crops), frames, seed, source]
    paths = {kind: Path(out) / f"{kind}-{digest([kind, *facts])}.parquet" for kind in kinds}
    # H.264 takes longest, so it does not come last.
    todo = sorted((kind for kind in paths if not paths[kind].exists()), key=lambda kind: not kind.startswith("h264"))
    tasks = [(task, rows, kind, paths[kind]) for kind in todo]
    if workers and tasks:
        side_by_side(make, tasks, workers, "robustness, kinds")
    else:
        for one in tasks:
            make(*one)
    return pd.concat([read_scores(path) for path in paths.values()], ignore_index=True)


def curves(scores: pd.DataFrame, manifest: pd.DataFrame, level: float = 0.95, draws: int = 1000) -> pd.DataFrame:
    """AUC of every detector after every kind of change, and the paired change from the same videos as they were.

    scores: of `score`, all data sets together. Columns detector, kind (jpeg, h264, ..., "none" for the videos as they
    are), level (NaN for those), items (that were scored), seeds; auc, low, high; change, change_low, change_high (NaN
    for "none"), seeds averaged; NaN where a class is missing. level, draws: of the intervals, over groups.
    """
    keys, columns = ["item_id", "label", "group_id"], ["detector", "variant", "seed"]
    wide = join(scores, manifest).pivot(index=keys, columns=columns, values="score").sort_index(axis=1)
    rows = []
    for detector, variant in dict.fromkeys(zip(scores["detector"], scores["variant"], strict=True)):
        own = wide[detector, variant].dropna()
        clean = wide[detector, CLEAN].reindex(own.index).dropna()
        labels, groups = (own.index.get_level_values(name).to_numpy() for name in keys[1:])
        auc = auc_interval(labels, own.to_numpy(), groups, level, draws)
        change = (np.nan,) * 3
        if variant != CLEAN:
            paired = own.loc[clean.index]
            labels, groups = (paired.index.get_level_values(name).to_numpy() for name in keys[1:])
            change = auc_difference(labels, paired.to_numpy(), clean.to_numpy(), groups, level, draws)
        about = {"detector": detector, "kind": variant.partition("-")[0], "items": len(own), "seeds": own.shape[1]}
        about["level"] = np.nan if variant == CLEAN else level_of(variant)
        names = ("auc", "low", "high", "change", "change_low", "change_high")
        rows.append(about | dict(zip(names, auc + change, strict=True)))
    order = ["detector", "kind", "level", "items", "seeds", "auc", "low", "high", "change", "change_low", "change_high"]
    return pd.DataFrame(rows, columns=order)


def draw(table: pd.DataFrame) -> Figure:
    """The curves of `curves`: a panel for each kind, a line with intervals for each detector, the worst on the right.

    The leftmost points are the videos as they are; the dashed line is chance.
    """
    kinds = [kind for kind in LEVELS if kind in set(table["kind"])]
    across = min(len(kinds), 3)
    down = -(-len(kinds) // across)
    fig, axes = plt.subplots(down, across, figsize=(3.6 * across, 2.7 * down), sharey=True, squeeze=False)
    for ax in axes.flat[len(kinds) :]:
        ax.set_axis_off()
    for ax, kind in zip(axes.flat, kinds, strict=False):
        own = table[table["kind"] == kind]
        shown = sorted(set(own["level"]), reverse=LEVELS[kind][0] > LEVELS[kind][-1])
        for k, (detector, part) in enumerate(table.groupby("detector", sort=False)):
            line = pd.concat([part[part["kind"] == CLEAN], own[own["detector"] == detector]]).set_index("level")
            line = line.reindex([np.nan, *shown])
            x = np.arange(len(line)) + 0.08 * (k - (table["detector"].nunique() - 1) / 2)
            error = [line["auc"] - line["low"], line["high"] - line["auc"]]
            ax.errorbar(x, line["auc"], yerr=error, marker="o", markersize=4, capsize=2, linewidth=1.5, label=detector)
        ax.axhline(0.5, color=COLOURS["control"], linestyle="--")
        ax.set(title=_TITLES[kind], ylim=(0, 1.02))
        ax.set_xticks(range(len(shown) + 1), ["as is", *(f"{value:g}" for value in shown)])
    for ax in axes[:, 0]:
        ax.set_ylabel("AUC")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(labels))
    fig.tight_layout()
    return fig
