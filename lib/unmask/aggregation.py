"""From the scores of frames to the score of a video: by mean, maximum or the highest few, chosen on validation."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from unmask.evaluation import RUN, join
from unmask.intervals import auc_interval

TOP = 0.25  # share of the frames that "top" takes the mean of, at least one


def _top(scores: np.ndarray) -> float:
    count = max(int(np.ceil(TOP * len(scores))), 1)
    return float(np.sort(scores)[-count:].mean())


RULES: dict[str, Callable[[np.ndarray], float]] = {"mean": np.mean, "max": np.max, "top": _top}


def aggregate(frames: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Score table with a row (frame -1) per item and run of the frame rows given, by one of RULES.

    Rows of whole clips (frame -1) are left out. KeyError for an unknown rule.
    """
    keys = ["item_id", *RUN, "checkpoint"]
    made = frames[frames["frame"] >= 0].groupby(keys)["score"].agg(lambda scores: RULES[rule](scores.to_numpy()))
    made = made.reset_index()
    return made.assign(frame=np.int32(-1))[list(frames.columns)]


def choose(scores: pd.DataFrame, manifest: pd.DataFrame) -> pd.DataFrame:
    """AUC over the validation videos by detector and rule, the mean over seeds; `chosen` marks one rule of each.

    scores: a score table with frames. Only detectors with frames of validation videos have rows; of equal rules the
    first of RULES is chosen, and the mean where validation lacks a class.
    """
    rows = []
    known = join(scores, manifest)
    frames = known[(known["split"] == "val") & (known["kind"] == "video") & (known["frame"] >= 0)]
    for (detector, variant), part in frames.groupby(["detector", "variant"], sort=False):
        found = []
        for rule in RULES:
            clips = aggregate(part[scores.columns], rule).merge(manifest[["item_id", "label"]], on="item_id")
            wide = clips.pivot(index=["item_id", "label"], columns="seed", values="score").dropna().reset_index()
            # One group: the value alone is wanted.
            area = auc_interval(wide["label"], wide[part["seed"].unique()], np.zeros(len(wide)))[0]
            found.append({"detector": detector, "variant": variant, "rule": rule, "val_auc": area, "videos": len(wide)})
        areas = np.nan_to_num([row["val_auc"] for row in found], nan=-1.0)
        rows += [row | {"chosen": i == int(np.argmax(areas))} for i, row in enumerate(found)]
    columns = ["detector", "variant", "rule", "val_auc", "videos", "chosen"]
    return pd.DataFrame(rows, columns=columns).astype({"chosen": bool})


def apply(scores: pd.DataFrame, manifest: pd.DataFrame, rules: pd.DataFrame) -> pd.DataFrame:
    """The score table with the videos' own rows (frame -1) made anew by the chosen rule of `choose`.

    Detectors without a choice, and images, keep theirs.
    """
    videos = set(manifest.loc[manifest["kind"] == "video", "item_id"])
    tables, chosen = [], rules[rules["chosen"]].set_index(["detector", "variant"])["rule"]
    for run, part in scores.groupby(["detector", "variant"], sort=False):
        if run in chosen.index:
            of_videos = part["item_id"].isin(videos)
            framed = set(part.loc[part["frame"] >= 0, "item_id"])
            replaced = of_videos & (part["frame"] == -1) & part["item_id"].isin(framed)
            made = aggregate(part[of_videos], chosen[run])
            part = pd.concat([part[~replaced], made], ignore_index=True)
        tables.append(part)
    return pd.concat(tables, ignore_index=True).astype({"frame": "int32", "seed": "int32"})
