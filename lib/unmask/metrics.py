"""Figures of a detector from its scores: rates, thresholds, calibration. Intervals are in `unmask.intervals`."""

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score, roc_curve


def partial_auc(labels, scores, max_fpr: float = 0.1) -> float:
    """Area under the ROC curve up to a false positive rate, standardised: 0.5 is chance, 1 perfect; NaN if a class is
    missing. McClish, Medical Decision Making 9 (1989), as scikit-learn's `roc_auc_score` has it."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    return float(roc_auc_score(labels, scores, max_fpr=max_fpr))


def tpr_at_fpr(labels, scores, fpr: float = 0.01) -> float:
    """Largest share of fakes found by a threshold that calls at most a share `fpr` of the reals fake; NaN if a class is
    missing. Nothing is interpolated: with fewer than 1 / fpr reals none of them may be called fake."""
    labels = np.asarray(labels)
    if len(np.unique(labels)) < 2:
        return float("nan")
    alarms, found, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(found[alarms <= fpr].max())


def equal_error_rate(labels, scores) -> float:
    """The error rate where false alarms are as frequent as misses, interpolated along the ROC curve."""
    fpr, tpr, _ = roc_curve(labels, scores)
    gap = fpr - (1 - tpr)
    i = int(np.argmax(gap >= 0))
    if gap[i] == 0 or i == 0:
        return float(fpr[i])
    share = -gap[i - 1] / (gap[i] - gap[i - 1])
    return float(fpr[i - 1] + share * (fpr[i] - fpr[i - 1]))


def balanced_threshold(labels, scores) -> float:
    """The threshold (fake if score >= threshold) of the best balanced accuracy; NaN if a class is missing."""
    labels = np.asarray(labels)
    if len(np.unique(labels)) < 2:
        return float("nan")
    fpr, tpr, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    return float(thresholds[1:][np.argmax((tpr - fpr)[1:])])


def recalls(labels, scores, threshold: float) -> tuple[float, float]:
    """Share of reals called real and of fakes called fake at a threshold; NaN if it, or the class, is missing."""
    if np.isnan(threshold):
        return float("nan"), float("nan")
    labels, fake = np.asarray(labels), np.asarray(scores) >= threshold
    return tuple(float(np.mean(fake[labels == c] == bool(c))) if (labels == c).any() else float("nan") for c in (0, 1))


def reliability(labels, scores, bins: int = 10) -> pd.DataFrame:
    """How often media of a score are fake: a row for each of `bins` equal parts of 0..1 that holds a score.

    labels: int[N], 1 = fake; scores: float[N], P(fake). Columns: low, high (a score of `high` is in the next part,
    except 1), score (mean), fakes (share) and n. ValueError for scores outside of 0..1.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, float)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("scores are not all probabilities, 0 to 1")
    edges = np.arange(bins + 1) / bins
    place = np.minimum(np.searchsorted(edges, scores, side="right") - 1, bins - 1)
    part = pd.DataFrame({"place": place, "score": scores, "fakes": labels == 1}).groupby("place")
    table = part.agg(score=("score", "mean"), fakes=("fakes", "mean"), n=("fakes", "size")).reset_index()
    low, high = edges[table["place"]], edges[table["place"] + 1]
    return table.drop(columns="place").assign(low=low, high=high)[["low", "high", "score", "fakes", "n"]]


def calibration_error(labels, scores, bins: int = 10) -> float:
    """Expected calibration error of P(fake): mean distance of the mean score from the share of fakes in the parts of
    `reliability`, weighted by their media; NaN without any. Guo et al., ICML 2017, section 2, on P(fake) instead of
    the confidence of the answer."""
    table = reliability(labels, scores, bins)
    if table.empty:
        return float("nan")
    return float(np.average((table["score"] - table["fakes"]).abs(), weights=table["n"]))
