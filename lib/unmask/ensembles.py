"""Ensembles of detectors: calibrated on validation, put together on validation, judged on test like any other.

Every member's score becomes log odds by its own calibration (`unmask.panel.calibrate`); a member that did not score a
video has no word on it. Videos only: validation has too few images to calibrate on.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from unmask.evaluation import join
from unmask.panel import calibrate, logit

MOST = 4  # members of the chosen ensemble
STRENGTH = 0.1  # C of the stacked regression: few validation videos bear few weights


def log_odds(scores: pd.DataFrame, manifest: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Calibrated log odds of the validation and test videos: index item_id, a column per detector, NaN without a score.

    A detector without this seed is taken with its first. One whose validation scores lack a class has no column.
    """
    known = join(scores[scores["frame"] == -1], manifest)
    known = known[(known["kind"] == "video") & known["split"].isin(["val", "test"])]
    columns = {}
    for detector, part in known.groupby("detector", sort=False):
        seeds = part["seed"].unique()
        part = part[part["seed"] == (seed if seed in seeds else seeds.min())].set_index("item_id")
        val = part[part["split"] == "val"]
        if val["label"].nunique() == 2:
            slope, intercept = calibrate(val["label"].to_numpy(), val["score"].to_numpy())
            columns[detector] = pd.Series(slope * logit(part["score"]) + intercept, index=part.index)
    return pd.DataFrame(columns)


def best_first(val: pd.DataFrame, labels: np.ndarray) -> list[str]:
    """Members in the order in which they raise the validation AUC of their mean most, at most MOST; the first is the
    best alone. Forward selection as in Caruana et al., ICML 2004, section 2, without replacement."""
    chosen, best = [], -np.inf
    while len(chosen) < min(MOST, val.shape[1]):
        areas = {name: _auc(labels, val[[*chosen, name]].mean(axis=1)) for name in val.columns if name not in chosen}
        name = max(areas, key=areas.get)
        if areas[name] <= best:
            break
        chosen, best = [*chosen, name], areas[name]
    return chosen


def _auc(labels: np.ndarray, values: pd.Series) -> float:
    return roc_auc_score(labels, values.fillna(0.0))


def combine(table: pd.DataFrame, labels: pd.Series) -> tuple[dict[str, pd.Series], dict[str, list[str]]]:
    """P(fake) of every row of `log_odds` by ensemble, and the members of each.

    labels: of the validation rows alone, by item_id. "best alone" is the reference that an ensemble must beat, "all"
    the mean of all, "chosen" the mean of `best_first`, "stacked" an L2-regularised logistic regression on all of them,
    in which no word counts as log odds of 0.
    """
    val = table.loc[labels.index]
    order = best_first(val, labels.to_numpy())
    stack = LogisticRegression(C=STRENGTH, class_weight="balanced").fit(val.fillna(0.0), labels)
    members = {"best alone": order[:1], "all": list(table.columns), "chosen": order, "stacked": list(table.columns)}
    found = {name: _sigmoid(table[of].mean(axis=1).fillna(0.0)) for name, of in members.items() if name != "stacked"}
    found["stacked"] = pd.Series(stack.predict_proba(table.fillna(0.0))[:, 1], index=table.index)
    return found, members


def _sigmoid(values: pd.Series) -> pd.Series:
    return 1 / (1 + np.exp(-values.clip(-30, 30)))


def ensembles(scores: pd.DataFrame, manifest: pd.DataFrame, seeds: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score table of the ensembles (`detector` "ensemble, NAME"), and their members: seed, ensemble, members, val_auc.

    scores: of detectors that are no controls, `detector` being their name. Both are empty where fewer than two can be
    calibrated. The validation AUC is of the videos that chose and fitted: too high by design, and shown to say so.
    """
    rows, tables = [], []
    labels = manifest[manifest["split"] == "val"].set_index("item_id")["label"]
    for seed in seeds:
        table = log_odds(scores, manifest, seed)
        if table.shape[1] < 2:
            continue
        val = labels[labels.index.isin(table.index)]
        found, members = combine(table, val)
        for name, values in found.items():
            area = roc_auc_score(val, values.loc[val.index])
            rows.append({"seed": seed, "ensemble": name, "members": ", ".join(members[name]), "val_auc": area})
            run = {"frame": -1, "detector": f"ensemble, {name}", "variant": "", "seed": seed, "checkpoint": ""}
            tables.append(values.rename("score").rename_axis("item_id").reset_index().assign(**run))
    columns = list(scores.columns)
    made = pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    return (
        made.astype({"frame": "int32", "seed": "int32"}),
        pd.DataFrame(rows, columns=["seed", "ensemble", "members", "val_auc"]),
    )
