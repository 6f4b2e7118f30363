"""Ensembles of detectors: calibrated on validation, put together on validation, judged on test like any other.

Every member's score becomes log odds by its own calibration (`unmask.calibration.calibrate`); a member that did not
score a medium has no word on it. Give media of one kind, for images and videos are scored on scales of their own.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from unmask.calibration import calibrate, logit
from unmask.evaluation import join

MOST = 4  # members of the chosen ensemble
STRENGTH = 0.1  # C of the stacked regression: few validation media bear few weights


def best_alone(scores: pd.DataFrame, manifest: pd.DataFrame) -> str | None:
    """The detector with the highest AUC on validation media, the mean over seeds: a yardstick chosen without test.

    Only those take part that scored media of every test set that any of them scored. None where validation lacks a
    class.
    """
    known = join(scores[scores["frame"] == -1], manifest)
    sets = known[known["split"] == "test"].groupby("detector")["dataset"].agg(set)
    everything = set().union(*sets)
    areas = {}
    for detector, part in known[known["split"] == "val"].groupby("detector", sort=False):
        if part["label"].nunique() == 2 and sets.get(detector) == everything:
            areas[detector] = np.mean([roc_auc_score(own["label"], own["score"]) for _, own in part.groupby("seed")])
    return max(areas, key=areas.get, default=None)


def log_odds(scores: pd.DataFrame, manifest: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Calibrated log odds of validation and test media: index item_id, a column per detector, NaN without a score.

    A detector without this seed is taken with its first. One whose validation scores lack a class has no column.
    """
    known = join(scores[scores["frame"] == -1], manifest)
    known = known[known["split"].isin(["val", "test"])]
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
    """P(fake) of the rows of `log_odds` by ensemble, and the members of each.

    A row on which no member spoke is left out. labels: of the validation rows alone, by item_id. "all" is the mean of
    all, "chosen" that of `best_first`, "stacked" an L2-regularised logistic regression on all of them, in which no word
    counts as log odds of 0.
    """
    val = table.loc[labels.index]
    stack = LogisticRegression(C=STRENGTH, class_weight="balanced").fit(val.fillna(0.0), labels)
    members = {"all": list(table.columns), "chosen": best_first(val, labels.to_numpy()), "stacked": list(table.columns)}
    found = {name: expit(table[members[name]].mean(axis=1).dropna()) for name in ("all", "chosen")}
    heard = table.dropna(how="all").fillna(0.0)
    found["stacked"] = pd.Series(stack.predict_proba(heard)[:, 1], index=heard.index)
    return found, members


def ensembles(scores: pd.DataFrame, manifest: pd.DataFrame, seeds: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score table of the ensembles (`detector` "ensemble, NAME"), and their members: seed, ensemble, members, val_auc.

    scores: of detectors that are no controls, `detector` being their name. Both are empty where fewer than two can be
    calibrated. The validation AUC is of the media that chose and fitted: too high by design, and shown to say so.
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
            own = val[val.index.isin(values.index)]
            area = roc_auc_score(own, values.loc[own.index])
            rows.append({"seed": seed, "ensemble": name, "members": ", ".join(members[name]), "val_auc": area})
            run = {"frame": -1, "detector": f"ensemble, {name}", "variant": "", "seed": seed, "checkpoint": ""}
            tables.append(values.rename("score").rename_axis("item_id").reset_index().assign(**run))
    columns = list(scores.columns)
    made = pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    return (
        made.astype({"frame": "int32", "seed": "int32"}),
        pd.DataFrame(rows, columns=["seed", "ensemble", "members", "val_auc"]),
    )
