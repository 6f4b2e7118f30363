"""Maps of what contrastive learning did to a fixed set of frames: before and after, with numbers that do not depend on
how the map is drawn."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.neighbors import NearestNeighbors

TIMES = {"first": "before", "last": "after"}
NAMES = {0: "real", 1: "fake"}
NEIGHBOURS = 10


def middle_frames(folder: str | os.PathLike) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Item ids str[N] and representations float32[N,D] of their middle frames at "first" and "last", from stage 2."""
    vectors = load((Path(folder) / "embeddings.safetensors").read_bytes())
    items = json.loads((Path(folder) / "embeddings.json").read_text(encoding="utf-8"))["items"]
    return np.array(items), {time: vectors[f"{time}.features"] for time in TIMES}


def reduced(vectors: np.ndarray, seed: int) -> np.ndarray:
    """The first 50 principal components of float[N,D]: float64[N,K]; of few vectors fewer, but two, be it of zeros."""
    count = min(50, len(vectors) - 1, vectors.shape[1])
    if count < 1:
        return np.zeros((len(vectors), 2))
    points = PCA(count, svd_solver="full", random_state=seed).fit_transform(vectors.astype(np.float64))
    return np.pad(points, ((0, 0), (0, max(0, 2 - count))))


def tsne(points: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE map float[N,2] of float[N,K], K > 1 (van der Maaten and Hinton, JMLR 2008); perplexity 30, or N / 4.

    Fewer than three points have no neighbourhoods to keep: their first two columns.
    """
    if len(points) < 3:
        return points[:, :2].astype(float)
    perplexity = min(30.0, len(points) / 4)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points).astype(float)


def grouping(points: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """How far float[N,K] keeps labels 0 and 1 apart: silhouette, purity, ari; NaN where one label is missing.

    purity: share of the NEIGHBOURS nearest others with the same label, averaged over the labels, so that chance is 0.5;
    ari: adjusted Rand index of k-means with two clusters.
    """
    if min(np.sum(labels == 0), np.sum(labels == 1)) < 2:
        return dict.fromkeys(("silhouette", "purity", "ari"), float("nan"))
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(points) - 1)).fit(points).kneighbors(return_distance=False)
    same = (labels[near] == labels[:, None]).mean(1)
    clusters = KMeans(2, n_init=10, random_state=seed).fit_predict(points)
    return {
        "silhouette": float(silhouette_score(points, labels)),
        "purity": float(np.mean([same[labels == c].mean() for c in (0, 1)])),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }


def map_frames(folder: str | os.PathLike, known: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Maps of the middle frames of a stage-2 folder before and after training, and how far each keeps labels apart.

    known: columns truth, pseudo (0, 1) and method, by item_id. Returns item_id, method, truth, pseudo ("real", "fake"),
    when, x, y; and when, by (truth or pseudo), silhouette, purity, ari. Needs three items.
    """
    items, vectors = middle_frames(folder)
    own = known.loc[items]
    named = {by: own[by].map(NAMES).to_numpy() for by in ("truth", "pseudo")}
    maps, numbers = [], []
    for time, when in TIMES.items():
        points = reduced(vectors[time], seed)
        x, y = tsne(points, seed).T
        columns = {"item_id": items, "method": own["method"].to_numpy(), **named, "when": when, "x": x, "y": y}
        maps.append(pd.DataFrame(columns))
        numbers += [{"when": when, "by": by, **grouping(points, own[by].to_numpy(), seed)} for by in named]
    return pd.concat(maps, ignore_index=True), pd.DataFrame(numbers)
