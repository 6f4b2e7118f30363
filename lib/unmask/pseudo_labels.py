"""Stage 1 of unsupervised detection: labels for videos from measurements alone, camera by camera. No true label enters.

The physical cue comes first: a filmed face carries the sensor pattern of its camera, a generated or warped one does
not. It splits the videos in two, and says which half is the fake one; other traces of forgery may then only second it.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GroupKFold

from unmask.clustering import SAME_RECORDING, UNATTRIBUTED

CUE = "face_ncc"
ORIENTATION = "the half whose faces agree less with their camera is called fake"
SECOND_CUE = "spearman"
SECOND_ORIENTATION = "where hardly a camera is known, the half whose frames agree more with their next is called fake"
KNOWN = 0.2  # share of the videos that must have the cue for it to decide
FEWEST = 5  # members below which a camera is too small to standardise in
CLIP = 8.0  # robust standard deviations beyond which a feature says no more
AGREEMENT = {
    "face_ncc": "correlation of the face's residual with the camera's fingerprint, without this recording",
    "face_z": "the same in standard deviations of chance, which grows with the size of the face",
    "delta": "face_z less that of the background (the difference of the original proposal)",
    "delta_ncc": "face_ncc less that of the background",
}


def recordings(similarity: np.ndarray) -> np.ndarray:
    """Which media are versions of one recording, int[N]: connected by residuals that share more than a sensor."""
    from scipy.sparse.csgraph import connected_components

    return connected_components(similarity > SAME_RECORDING, directed=False)[1]


def face_agreement(
    background: np.ndarray, background_valid: np.ndarray, face: np.ndarray, face_valid: np.ndarray,
    clusters: np.ndarray, recording: np.ndarray,
) -> pd.DataFrame:  # fmt: skip
    """How well the face of each video fits the camera of its cluster: a row per video with the columns of AGREEMENT.

    background, face: fingerprints float[N,H,W] of the two regions, valid: bool[N,H,W]; clusters int[N]; recording
    int[N] (`recordings`). The camera's fingerprint is the mean over the cluster's other recordings, faces included, for
    faces are often where no background ever is. NaN without a face, or with no other recording in the cluster.
    """
    count = len(background)
    bg, bg_keep, fc, fc_keep = (x.reshape(count, -1) for x in (background, background_valid, face, face_valid))
    table = pd.DataFrame(np.nan, index=range(count), columns=list(AGREEMENT))
    for cluster in np.unique(clusters[clusters != UNATTRIBUTED]):
        members = np.flatnonzero(clusters == cluster)
        whole = np.where(bg_keep[members], bg[members], fc[members]).astype(np.float32)
        total = whole.sum(0, dtype=np.float64)
        for take in np.unique(recording[members]):
            own = recording[members] == take
            if own.all():
                continue
            camera = total - whole[own].sum(0, dtype=np.float64)
            for i in members[own]:
                f, f_count = masked_ncc(fc[i], camera, fc_keep[i])
                b, b_count = masked_ncc(bg[i], camera, bg_keep[i])
                if f_count:
                    zf, zb = f * np.sqrt(f_count), b * np.sqrt(b_count)
                    table.loc[i] = {"face_ncc": f, "face_z": zf, "delta": zf - zb, "delta_ncc": f - b}
    return table


def masked_ncc(pattern: np.ndarray, camera: np.ndarray, keep: np.ndarray) -> tuple[float, int]:
    """Correlation of two patterns over the pixels of `keep` where the camera is known, and the number of those."""
    keep = keep & (camera != 0)
    x, y = pattern[keep].astype(np.float64), camera[keep]
    size = np.sqrt((x @ x) * (y @ y))
    return (float(x @ y / size), int(keep.sum())) if size > 0 else (0.0, 0)


def standardise(features: pd.DataFrame, clusters: np.ndarray) -> pd.DataFrame:
    """Every column less its median in units of its spread (MAD), within each camera; missing values become 0.

    That takes away what the camera, its codec and its scenes do to a feature. Unattributed media and cameras of fewer
    than FEWEST media are taken together.
    """
    sizes = pd.Series(clusters).map(pd.Series(clusters).value_counts())
    groups = np.where((clusters == UNATTRIBUTED) | (sizes.to_numpy() < FEWEST), UNATTRIBUTED, clusters)

    def robust(column: pd.Series) -> pd.Series:
        median, spread = robust_scale(column)
        return ((column - median) / spread).clip(-CLIP, CLIP)

    return features.groupby(groups).transform(robust).fillna(0.0)


def robust_scale(column: pd.Series) -> tuple[float, float]:
    """Median, and spread as the median absolute deviation in standard deviations; (0, 1) where there is none."""
    median = column.median()
    spread = 1.4826 * (column - median).abs().median()
    return (float(median), float(spread)) if spread > 0 else (float(np.nan_to_num(median)), 1.0)


def two_halves(values: np.ndarray, seed: int) -> np.ndarray:
    """P(upper half) float[N] of values float[N] under two Gaussians of one width, so that it rises with the value."""
    slope, intercept = two_halves_model(values, seed)
    return expit(slope * values + intercept)


def two_halves_model(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Slope and intercept of the log odds of the upper half (`two_halves`); (0, 0) where there is nothing to split."""
    if len(values) < 4 or np.ptp(values) == 0:
        return 0.0, 0.0
    mixture = GaussianMixture(2, covariance_type="tied", n_init=5, random_state=seed).fit(values[:, None])
    low, high = np.argsort(mixture.means_[:, 0])
    variance, means, weights = float(mixture.covariances_[0, 0]), mixture.means_[:, 0], mixture.weights_
    slope = (means[high] - means[low]) / variance
    return float(slope), float(np.log(weights[high] / weights[low]) - slope * (means[high] + means[low]) / 2)


def second_view(traces: np.ndarray, fake: np.ndarray, groups: Sequence, seed: int, folds: int = 5) -> np.ndarray:
    """P(fake) float[N] by traces float[N,D] that learn from the cue's P(fake) float[N]; judged on other recordings.

    Co-training of two views (Blum and Mitchell, COLT 1998): each video is judged by a logistic regression that saw
    neither it nor any version of its recording. 0.5 where there are too few recordings or only one half.
    """
    label, weight = (fake > 0.5).astype(int), np.abs(2 * fake - 1) + 1e-3
    count = min(folds, len(set(groups)))
    out = np.full(len(fake), 0.5)
    if count < 2:
        return out
    for train, test in GroupKFold(count).split(traces, label, groups):
        if len(set(label[train])) == 2:
            model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
            model.fit(traces[train], label[train], sample_weight=weight[train])
            out[test] = model.predict_proba(traces[test])[:, 1]
    return out


def pseudo_labels(
    features: pd.DataFrame, clusters: np.ndarray, recording: np.ndarray, traces: Sequence[str], seed: int
) -> pd.DataFrame:
    """Labels of N videos from features: columns label (1 = taken for a fake), p_fake, confidence, cue, traces, agree.

    features: a row per video with CUE and the columns that `traces` names. cue and traces are the two views' P(fake),
    p_fake their combination with equal weight, confidence |2 p_fake - 1|, agree whether neither view contradicts the
    other; one of 0.5, such as that of a missing CUE, contradicts nothing. Orientation is ORIENTATION, stated before
    anything was seen, or SECOND_ORIENTATION, that of the published baseline.
    """
    scaled = standardise(features, clusters)
    seen, second = features[CUE].notna().to_numpy(), list(traces)
    cue = np.full(len(features), 0.5)
    if seen.mean() >= KNOWN or SECOND_CUE not in features:
        cue[seen] = two_halves(-scaled[CUE].to_numpy()[seen], seed)
    else:
        seen = features[SECOND_CUE].notna().to_numpy()
        cue[seen] = two_halves(scaled[SECOND_CUE].to_numpy()[seen], seed)
        second = [name for name in traces if name != SECOND_CUE]  # else the second view would contain the first
    other = second_view(scaled[second].to_numpy(), cue, recording, seed)
    odds = (logit(np.clip(cue, 0.01, 0.99)) + logit(np.clip(other, 0.01, 0.99))) / 2
    p = expit(odds)
    return pd.DataFrame({
        "label": (p > 0.5).astype(int), "p_fake": p, "confidence": np.abs(2 * p - 1), "cue": cue, "traces": other,
        "agree": (cue - 0.5) * (other - 0.5) >= 0,
    })  # fmt: skip


def single_feature(values: np.ndarray, guide: np.ndarray, seed: int) -> np.ndarray:
    """P(fake) float[N] by one standardised feature float[N] alone, turned so that it goes with `guide` float[N]."""
    upper = two_halves(values, seed)
    together = np.cov(rankdata(values), rankdata(guide), bias=True)[0, 1]
    return upper if together >= 0 else 1 - upper
