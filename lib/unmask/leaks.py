"""Shortcuts: what the file itself, without its face, tells about the label."""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier

from unmask.data.manifest import media_path
from unmask.data.video import MediaError, probe
from unmask.intervals import auc_interval
from unmask.progress import track

FACTS = ("pixels", "frames", "fps", "bits_per_pixel")


def file_facts(manifest: pd.DataFrame, manifest_path: Path) -> pd.DataFrame:
    """Frame size, length, rate, bits per pixel and codec of every medium; unreadable ones have missing values."""
    rows, keys = [], ("item_id", "dataset", "split", "kind", "label", "method", "group_id")
    for row in track(manifest.to_dict("records"), label="reading headers"):
        path = media_path(row, manifest_path)
        facts = dict.fromkeys(FACTS, np.nan) | {"codec": ""}
        try:
            info, size = probe(path), path.stat().st_size
        except (MediaError, OSError):
            pass  # the row stays, with missing facts: preprocessing reports why
        else:
            pixels = info.width * info.height
            facts = {"pixels": pixels, "frames": info.frames, "fps": info.fps, "codec": info.codec}
            facts["bits_per_pixel"] = 8 * size / max(1, pixels * max(1, info.frames))
        rows.append({**{k: row[k] for k in keys}, **facts})
    return pd.DataFrame(rows, columns=[*keys, *FACTS, "codec"])


def metadata_auc(facts: pd.DataFrame, draws: int = 1000, level: float = 0.95) -> pd.DataFrame:
    """AUC with its interval over groups of each single fact, taken as a detector, per data set and kind."""
    rows = []
    for (dataset, kind), part in facts.groupby(["dataset", "kind"], sort=True):
        for fact in FACTS:
            known = part.dropna(subset=[fact])
            if known["label"].nunique() == 2:
                auc, low, high = auc_interval(known["label"], known[fact], known["group_id"], level, draws)
                rows.append(
                    {
                        "dataset": dataset,
                        "kind": kind,
                        "fact": fact,
                        "n": len(known),
                        "auc": auc,
                        "low": low,
                        "high": high,
                    }
                )
    return pd.DataFrame(rows, columns=["dataset", "kind", "fact", "n", "auc", "low", "high"])


def metadata_scores(facts: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Score table of a detector that knows the file alone: a random forest on the facts of the train split.

    facts: as `file_facts` gives them for all splits. Scores all media but those of the train split; 0.5 for all where
    the train split does not have both classes.
    """
    known = facts[list(FACTS)].fillna(-1).join(pd.get_dummies(facts[["codec", "kind"]], dtype=float))
    train, rest = facts["split"] == "train", facts["split"] != "train"
    score = np.full(int(rest.sum()), 0.5)
    if facts.loc[train, "label"].nunique() == 2:
        forest = RandomForestClassifier(500, min_samples_leaf=2, random_state=seed)
        score = forest.fit(known[train], facts.loc[train, "label"]).predict_proba(known[rest])[:, 1]
    run = {"frame": -1, "score": score, "detector": "metadata", "variant": "file alone", "seed": seed, "checkpoint": ""}
    return facts.loc[rest, ["item_id"]].assign(**run).astype({"frame": "int32", "seed": "int32"}).reset_index(drop=True)
