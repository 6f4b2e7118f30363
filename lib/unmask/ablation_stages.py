"""Ablation tables of the chapters without labels: stages, measurements of the first stage, clusters of cameras."""

import json

import numpy as np
import pandas as pd
from scipy.stats import t
from sklearn.metrics import adjusted_rand_score

from unmask.ablation_rows import COLUMNS, COUNTS, contest, judge, marks, missing_row, whole_numbers
from unmask.clustering import UNATTRIBUTED
from unmask.clustering import scores as cluster_scores
from unmask.contenders import Contender, ended
from unmask.data.manifest import read_manifest
from unmask.intervals import holm
from unmask.profile import Study
from unmask.unsupervised import FEATURES_FILE, LABELS_FILE
from unmask.unsupervised_judging import STAGES, feature_scores

CLUSTERS = "cameras/judged.parquet"  # item_id, recording, and the clusters of every method by its name
CUE = "camera cue"
CLUSTER_COLUMNS = [
    "arm", "media", "recordings", "cameras", "clusters", "unattributed", "ari", "low", "high", "nmi", "purity", "f1",
    "gain", "gain_low", "gain_high", "p", "p_holm", "best", "note",
]  # fmt: skip


def unsupervised(study: Study) -> pd.DataFrame:
    """Stages of detection without labels (chapter 03), against the first one's camera cue."""
    table = "unsupervised"
    arms = [Contender(stage, "03_unsupervised", table, table, variant) for variant, stage in STAGES.items()]
    return contest(study, arms, STAGES["cue"], table)


def features(study: Study) -> pd.DataFrame:
    """Each measurement of stage 1 alone, against the camera cue, on the videos that it labels: train and validation.

    They are measured again from what chapter 03 keeps. The published texture baseline is taken from its results as it
    is: its answers for single videos are not kept, so it takes part in no test.
    """
    folder, chapter = study.work / "unsupervised", "03_unsupervised"
    kept = all((folder / name).is_file() for name in (FEATURES_FILE, LABELS_FILE))
    if ended(study.work, chapter) or not kept:
        return missing_row(study.work, chapter).reindex(columns=COLUMNS)
    manifest, options = read_manifest(study.input("manifest.parquet", made_by="00_data")), study.profile.evaluate
    labels = pd.read_parquet(folder / LABELS_FILE)
    labels = labels[labels["split"] != "test"].set_index("item_id")
    part = pd.read_parquet(folder / FEATURES_FILE).set_index("item_id").loc[labels.index].reset_index()
    alone = {f"{name} alone": p for name, p in feature_scores(part, study.seeds[0]).items()}
    views = {CUE: labels["cue"], "traces": labels["traces"], "both": labels["p_fake"]}
    run = {"frame": -1, "variant": "", "seed": 0, "checkpoint": ""}
    scores = [pd.DataFrame({"item_id": labels.index, "score": np.asarray(p), "detector": name, **run})
              for name, p in (views | alone).items()]  # fmt: skip
    table = judge(pd.concat(scores, ignore_index=True), manifest, CUE, options.level, options.draws)
    table = pd.concat([table.assign(published="", note=""), _texture(study, chapter)], ignore_index=True)[COLUMNS]
    return whole_numbers(table, COUNTS)


def _texture(study: Study, chapter: str) -> pd.DataFrame:
    """The row of the published texture baseline, as the chapter's results have it; empty where they have none."""
    results = study.work / "results" / f"{chapter}.json"
    if not results.is_file():
        return pd.DataFrame(columns=COLUMNS)
    found = json.loads(results.read_text(encoding="utf-8"))["numbers"].get("pseudo_labels", [])
    rows = [row for row in found if row["by"].startswith("published baseline")]
    texts = {"method": "all", "best": "", "published": "", "note": "not paired"}
    kept = [{"arm": row["by"], "items": row["videos"], "seeds": 1, **{k: row[k] for k in ("auc", "low", "high")}}
            for row in rows]  # fmt: skip
    return pd.DataFrame(kept).assign(dataset="", **texts).reindex(columns=COLUMNS)


def clustering(study: Study) -> pd.DataFrame:
    """Ways to group media by camera (chapter 02) and their controls: ARI, NMI, purity and F1 against the true cameras.

    low, high: a t interval of ARI from a jackknife that leaves out one recording at a time (a forgery belongs to its
    original's recording). gain: ARI against the best method's, with an interval and p from the same jackknife; media of
    unknown camera do not count.
    """
    path, chapter = study.work / CLUSTERS, "02_camera_clustering"
    manifest = read_manifest(study.input("manifest.parquet", made_by="00_data")).set_index("item_id")
    if (manifest["camera"] == "").all():
        unknown = {"arm": "all", "note": "missing: the manifest does not know the cameras"}
        return pd.DataFrame([unknown]).reindex(columns=CLUSTER_COLUMNS)
    if ended(study.work, chapter) or not path.is_file():
        return missing_row(study.work, chapter).reindex(columns=CLUSTER_COLUMNS)
    found = pd.read_parquet(path)
    truth = manifest.loc[found["item_id"], "camera"].to_numpy()
    found, truth = found[truth != ""].reset_index(drop=True), truth[truth != ""]
    names, recordings = found.columns.drop(["item_id", "recording"]), found["recording"].to_numpy()
    aris = {name: leave_one_out(truth, found[name].to_numpy(), recordings) for name in names}
    rows = [{"arm": name, "media": len(truth), "recordings": len(set(recordings)),
             **cluster_scores(truth, found[name].to_numpy())} for name in names]  # fmt: skip
    table = pd.DataFrame(rows)
    best = table.loc[table["ari"].idxmax(), "arm"]
    level, limits = study.profile.evaluate.level, {}
    for name, ari in zip(names, table["ari"], strict=True):
        low, high, _ = jackknife(ari, aris[name], level)
        gain = ari - table["ari"].max()
        gain_low, gain_high, p = jackknife(gain, aris[name] - aris[best], level)
        limits[name] = {"low": max(low, -1.0), "high": min(high, 1.0), "gain": gain, "gain_low": gain_low,
                        "gain_high": gain_high, "p": p if name != best else np.nan}  # fmt: skip
    table = table.join(pd.DataFrame.from_dict(limits, orient="index"), on="arm")
    table["p_holm"] = holm(table["p"].to_numpy())
    table["best"] = marks(list(names), best, table.loc[table["arm"] != best, "p"], level)
    return table.assign(note="").reindex(columns=CLUSTER_COLUMNS)


def leave_one_out(truth: np.ndarray, clusters: np.ndarray, recordings: np.ndarray) -> np.ndarray:
    """ARI of clusters int[N] against truth str[N] without each recording in turn, float[R].

    An unattributed medium is a cluster of its own, as in `unmask.clustering.scores`.
    """
    alone = clusters == UNATTRIBUTED
    full = np.where(alone, clusters.max(initial=0) + 1 + np.arange(len(clusters)), clusters)
    kept = (recordings != recording for recording in np.unique(recordings))
    return np.array([adjusted_rand_score(truth[keep], full[keep]) for keep in kept])


def jackknife(value: float, without: np.ndarray, level: float) -> tuple[float, float, float]:
    """Interval of a figure and p of its being 0, from its values float[R] without each group in turn: (low, high, p).

    Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 11, with quantiles of t with R - 1 degrees of
    freedom. NaN with fewer than two groups.
    """
    count = len(without)
    if count < 2:
        return (float("nan"),) * 3
    error = np.sqrt((count - 1) / count * np.sum((without - without.mean()) ** 2))
    reach = t.ppf((1 + level) / 2, count - 1) * error
    if error == 0:
        return value, value, 1.0 if value == 0 else 0.0
    return value - reach, value + reach, 2 * float(t.sf(abs(value) / error, count - 1))
