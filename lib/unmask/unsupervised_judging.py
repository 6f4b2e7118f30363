"""Where the truth enters chapter 03: what pseudo-labels, inter-frame steps and scores are worth.

Nothing that a stage leaves (`unmask.unsupervised`) comes from here. Every figure stands beside two others: the same
with the better of the two orientations ("oracle"), which only someone who knows the answers could choose, and the same
for answers that were shuffled.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.stats import ks_2samp, rankdata

from unmask import laws
from unmask.data.crops import CropStore
from unmask.evaluation import join
from unmask.intervals import auc_interval
from unmask.metrics import recalls
from unmask.pseudo_labels import AGREEMENT, CUE, single_feature, standardise
from unmask.published import read as read_published
from unmask.unsupervised import STEPS, TRACES

LABEL_COLUMNS = ["by", "videos", "balanced_accuracy", "oracle", "accuracy", "auc", "low", "high"]
STAGES = {
    "cue": "1: camera cue", "traces": "1: traces", "pseudo": "1: pseudo-label", "centroid": "2: nearer centre",
    "classifier": "3: network", "measured": "3: traces", "no-camera": "3: network and traces",
    "camera": "4: known cameras", "final": "4: final", "final-control": "control: final",
    "no-camera-control": "control: no camera",
}  # fmt: skip


def published() -> pd.DataFrame:
    """Published accuracies in per cent of these stages and of their baseline, a row per pair of data sets.

    They are what an improved re-implementation of Qiao et al. (TPAMI 46(7), 2024) reports of itself and, as its
    baseline, of the original; the paper's own tables were not to be had. The metric is not stated: 70.41 and 89.80 are
    69 and 88 of the 98 UADFV videos, so it is taken for accuracy over videos. The counts are its own. majority: the
    accuracy of always answering with the larger class.
    """
    table = read_published("unsupervised").rename(columns={"trained_on": "trained on", "tested_on": "tested on"})
    table["of"] = np.where(table["row"] == "", "baseline", "improved")
    keys = ["trained on", "tested on", "real", "fake", "majority"]
    wide = table.set_index([*keys, "of"])["value"].unstack().loc[table.set_index(keys).index.unique()]
    wide = wide.reset_index().rename_axis(columns=None).astype({"real": int, "fake": int})
    return wide[[*keys[:4], "baseline", "improved", "majority"]]


def feature_scores(features: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    """P(fake) float[N] by every measurement of stage 1 alone, turned as the cue says; a collection of FEATURES_FILE."""
    names = [*AGREEMENT, *TRACES]
    scaled = standardise(features[names], features["cluster"].to_numpy())
    guide = -scaled[CUE].to_numpy()
    return {name: single_feature(scaled[name].to_numpy(), guide, seed) for name in names}


def texture_scores(index: pd.DataFrame, store: CropStore, seed: int, workers: int = 1) -> pd.Series:
    """P(fake) by item_id of the published first stage (`unmask.laws`): share of its frames with little texture.

    Which of the two clusters is fake the published program does not say; here the one with less detail, after Matern et
    al., 2019. Items without a frame that shows open eyes and teeth are NaN.
    """
    rows = index.to_dict("records")
    found = Parallel(n_jobs=workers)(delayed(_energies)(store, row) for row in rows)
    table = pd.DataFrame(np.array(found).reshape(-1, len(laws.COLUMNS)), columns=list(laws.COLUMNS))
    table = pd.concat([index[["item_id", "frame"]].reset_index(drop=True), table], axis=1)
    if table[list(laws.COLUMNS)].notna().all(axis=1).sum() < 2:
        return pd.Series(np.nan, index=pd.Index(np.unique(index["item_id"]), name="item_id"))
    votes = laws.pseudo_labels(table, seed).set_index("item_id")
    return votes["agreement"].where(votes["label"] == 0, 1 - votes["agreement"])


def _energies(store: CropStore, row: dict) -> np.ndarray:
    found = laws.energies(store.image(row), np.asarray(row["landmarks"], np.float32).reshape(-1, 2))
    return np.full(len(laws.COLUMNS), np.nan) if found is None else found


def judge_labels(
    named: Mapping[str, np.ndarray], truth: np.ndarray, groups: np.ndarray, level: float = 0.95, draws: int = 1000
) -> pd.DataFrame:
    """One row for each P(fake) float[N] (called fake above 0.5) against truth int[N]; NaN says nothing and is left out.

    Columns: by, videos, balanced_accuracy, oracle (with the better orientation), accuracy, auc with its interval.
    """
    rows = []
    for name, p in named.items():
        said = ~np.isnan(p)
        p, true = np.asarray(p)[said], truth[said]
        row = {"by": name, "videos": len(p)}
        if len(p):
            balanced, accuracy = _agreement(p > 0.5, true[None])
            auc, low, high = auc_interval(true, p, groups[said], level, draws)
            row |= {**_turned(balanced), "accuracy": accuracy.mean(), "auc": auc, "low": low, "high": high}
        rows.append(row)
    return pd.DataFrame(rows, columns=LABEL_COLUMNS)


def guesses(p: np.ndarray, truth: np.ndarray, level: float = 0.95, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Two rows to put under `judge_labels`: P(fake) float[N] against shuffled truth, and always the larger class.

    Shuffled: means over the draws, low and high are the range of their AUC.
    """
    shuffled = _shuffles(truth, draws, seed)
    balanced, accuracy = _agreement(p > 0.5, shuffled)
    mean, low, high = shuffled_auc(p[:, None], truth, level, draws, seed)
    numbers = {"auc": mean, "low": low, "high": high}
    control = {"by": "control: shuffled truth", **_turned(balanced), "accuracy": accuracy.mean(), **numbers}
    share = truth.mean()
    always = {"balanced_accuracy": 0.5, "oracle": 0.5, "accuracy": max(share, 1 - share), "auc": 0.5}
    return pd.DataFrame([control, {"by": "always the larger class", **always}]).assign(videos=len(truth))


def _turned(balanced: np.ndarray) -> dict:
    return {"balanced_accuracy": balanced.mean(), "oracle": np.maximum(balanced, 1 - balanced).mean()}


def _shuffles(truth: np.ndarray, draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permuted(np.tile(truth, (draws, 1)), axis=1)


def _agreement(fake: np.ndarray, truths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Balanced accuracy and accuracy of calls bool[N] for each row of truths int[D,N]."""
    right = (truths == fake).astype(float)
    with np.errstate(invalid="ignore"):
        recall = [(right * (truths == c)).sum(1) / (truths == c).sum(1) for c in (0, 1)]
    return np.mean(recall, axis=0), right.mean(1)


def shuffled_auc(
    scores: np.ndarray, truth: np.ndarray, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """AUC of scores float[N,S] (mean over S seeds) for `draws` shuffles of truth int[N]: mean and the range it has."""
    fakes, count = int(truth.sum()), len(truth)
    if not 0 < fakes < count:
        return (float("nan"),) * 3
    ranks = rankdata(scores, axis=0).mean(1)
    sums = _shuffles(truth, draws, seed) @ ranks
    aucs = (sums - fakes * (fakes + 1) / 2) / (fakes * (count - fakes))
    return float(aucs.mean()), *map(float, np.quantile(aucs, [(1 - level) / 2, (1 + level) / 2]))


def judge_stages(
    scores: pd.DataFrame, manifest: pd.DataFrame, thresholds: Mapping[int, float], level: float = 0.95,
    draws: int = 1000,
) -> pd.DataFrame:  # fmt: skip
    """One row per variant of `unmask.unsupervised.score`: AUC over groups and seeds, and what stands beside it.

    oracle: max(AUC, 1 - AUC); shuffled and its range: AUC for shuffled truth; balanced_accuracy and the recalls of
    `final` at the thresholds of stage 3, by seed.
    """
    clips, rows = join(scores, manifest), []
    for variant, stage in STAGES.items():
        keys = ["item_id", "label", "group_id"]
        part = clips[clips["variant"] == variant]
        wide = part.pivot(index=keys, columns="seed", values="score").dropna().reset_index()
        seeds, truth = [c for c in wide.columns if c not in keys], wide["label"].to_numpy()
        values = wide[seeds].to_numpy(float)
        auc, low, high = auc_interval(truth, values, wide["group_id"], level, draws)
        shuffled = shuffled_auc(values, truth, level, draws)
        control = dict(zip(("shuffled", "shuffled_low", "shuffled_high"), shuffled, strict=True))
        row = {"stage": stage, "variant": variant, "videos": len(wide), "auc": auc, "low": low, "high": high}
        if variant == "final":
            recall = np.mean([recalls(truth, values[:, i], thresholds[s]) for i, s in enumerate(seeds)], axis=0)
            row |= {"balanced_accuracy": recall.mean(), "recall_real": recall[0], "recall_fake": recall[1]}
        rows.append(row | {"oracle": max(auc, 1 - auc), **control})
    return pd.DataFrame(rows)


def judge_steps(
    tables: Mapping[str, pd.DataFrame], truth: pd.Series, groups: pd.Series, level: float = 0.95, draws: int = 1000
) -> pd.DataFrame:
    """One row per backbone and inter-frame step: AUC of "larger is fake", Kolmogorov-Smirnov distance, who is larger.

    tables: `unmask.unsupervised.step_table` by backbone; truth and groups by item_id.
    """
    rows = []
    for backbone, table in tables.items():
        for name in STEPS:
            own = table[["item_id", name]].dropna()
            true = truth.loc[own["item_id"]].to_numpy()
            auc, low, high = auc_interval(true, own[name], groups.loc[own["item_id"]], level, draws)
            real, fake = (own.loc[true == c, name] for c in (0, 1))
            ks = float(ks_2samp(real, fake).statistic) if len(real) and len(fake) else float("nan")
            larger = "" if np.isnan(auc) else "fake" if auc > 0.5 else "real"
            numbers = {"auc": auc, "low": low, "high": high, "ks": ks, "larger": larger}
            rows.append({"backbone": backbone, "step": name, "videos": len(own), **numbers})
    return pd.DataFrame(rows)
