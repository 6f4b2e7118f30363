"""Shortcuts: what the file itself, without its face, tells about the label."""

from pathlib import Path

import numpy as np
import pandas as pd

from unmask.data.manifest import media_path
from unmask.data.video import MediaError, probe
from unmask.evaluation import auc_interval
from unmask.progress import track

FACTS = ("pixels", "frames", "fps", "bits_per_pixel")


def file_facts(manifest: pd.DataFrame, manifest_path: Path) -> pd.DataFrame:
    """Frame size, length, rate and bits per pixel of every test medium; unreadable ones have missing values."""
    test = manifest[manifest["split"] == "test"]
    rows = []
    for row in track(test.to_dict("records"), label="reading headers"):
        path = media_path(row, manifest_path)
        facts = dict.fromkeys(FACTS, np.nan)
        try:
            info, size = probe(path), path.stat().st_size
        except (MediaError, OSError):
            pass  # the row stays, with missing facts: preprocessing reports why
        else:
            pixels = info.width * info.height
            facts = {"pixels": pixels, "frames": info.frames, "fps": info.fps}
            facts["bits_per_pixel"] = 8 * size / max(1, pixels * max(1, info.frames))
        rows.append({**{k: row[k] for k in ("item_id", "dataset", "kind", "label", "method", "group_id")}, **facts})
    return pd.DataFrame(rows)


def metadata_auc(facts: pd.DataFrame, draws: int = 1000, level: float = 0.95) -> pd.DataFrame:
    """AUC with its group-bootstrap interval of each single fact, taken as a detector, per data set and kind."""
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
