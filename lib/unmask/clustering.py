"""Group fingerprints by camera when nobody knows how many cameras there are: a similarity matrix in, labels out.

All that fingerprints of clusters could tell is in the matrix S of correlations between unit-length fingerprints: the
mean of S between two clusters, divided by the lengths of their mean fingerprints, is the correlation of those means. So
clusters are re-estimated, merged and compared without opening a fingerprint again.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from sklearn.metrics.cluster import contingency_matrix, pair_confusion_matrix

UNATTRIBUTED = -1
SIGNIFICANT = 6.0  # standard deviations of chance; even a million comparisons rarely reach it
# Residuals that agree more than this share more than a sensor: a forgery and its original, or two cuts of one video.
SAME_RECORDING = 0.5
# What clusters must show of what two halves of one camera would; two cameras of one model show a few per cent.
MERGE = 0.25
# Less is asked of clusters of a single recording, whose own agreement says too much, and once every item has been moved
# to where it fits: before that, a few misplaced items make two cameras look alike.
MERGE_UNKNOWN = 0.1


def similarity(
    patterns: np.ndarray, valid: np.ndarray | None = None, tile: int = 1024, depth: int = 2**16, device: str = "cpu"
) -> np.ndarray:
    """Correlation of every two fingerprints at the same place, float32[N,N].

    patterns: float[N,...], in memory or mapped from a file, of zero mean; valid: bool[N,...], pixels that count, and
    then each pair is compared where both do. Tiles of `tile` fingerprints and `depth` pixels, of the upper triangle
    alone, bound the memory beyond the answer to four such tiles (twelve with masks).
    """
    count = len(patterns)
    flat = patterns.reshape(count, -1)
    masks = None if valid is None or valid.all() else valid.reshape(count, -1)
    out = np.empty((count, count), np.float32)
    starts = range(0, count, tile)
    for i in starts:
        for j in range(i, count, tile):
            block = _tile(flat, masks, slice(i, i + tile), slice(j, j + tile), depth, device)
            out[i : i + tile, j : j + tile] = block
            out[j : j + tile, i : i + tile] = block.T
    return out if masks is not None else normalised(out)


def normalised(products: np.ndarray) -> np.ndarray:
    """Inner products to correlations, in place; a fingerprint of zeros correlates with nothing."""
    length = np.sqrt(products.diagonal())
    scale = np.divide(1, length, out=np.zeros_like(length), where=length > 0)
    products *= scale[:, None]
    products *= scale[None, :]
    return products


def _tile(flat, masks, rows: slice, columns: slice, depth: int, device: str) -> np.ndarray:
    """Inner products of two tiles, or with masks their correlations over the common pixels."""

    def part(array, which: slice, k: int) -> torch.Tensor:
        chunk = np.ascontiguousarray(array[which, k : k + depth])
        return torch.from_numpy(chunk).to(device, torch.float32)

    product = own = other = 0
    for k in range(0, flat.shape[1], depth):
        a = part(flat, rows, k)
        b = a if rows == columns else part(flat, columns, k)
        if masks is not None:
            keep_a = part(masks, rows, k)
            keep_b = keep_a if rows == columns else part(masks, columns, k)
            a, b = a * keep_a, b * keep_b
            own, other = own + a.square() @ keep_b.T, other + keep_a @ b.square().T
        product = product + a @ b.T
    if masks is not None:
        size = (own * other).sqrt()
        product = torch.where(size > 0, product / size.clamp(min=1e-30), 0)
    return product.cpu().numpy()


def neighbours(patterns: np.ndarray, top: int, tile: int = 1024, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """The `top` most similar others of every fingerprint: indices int[N,top] and correlations float32[N,top].

    For collections whose full matrix does not fit: one band of `tile` rows is held at a time.
    """
    flat = patterns.reshape(len(patterns), -1)
    unit = np.linalg.norm(flat, axis=1)
    best = np.empty((len(flat), top), int), np.empty((len(flat), top), np.float32)
    for i in range(0, len(flat), tile):
        rows = slice(i, i + tile)
        band = np.concatenate(
            [_tile(flat, None, rows, slice(j, j + tile), 2**16, device) for j in range(0, len(flat), tile)], 1
        )
        band /= np.maximum(np.outer(unit[rows], unit), 1e-30)
        np.fill_diagonal(band[:, i:], -np.inf)
        best[0][rows] = np.argsort(-band, axis=1, kind="stable")[:, :top]
        best[1][rows] = np.take_along_axis(band, best[0][rows], 1)
    return best


def chance(similarity: np.ndarray) -> float:
    """Standard deviation of the similarity of unrelated fingerprints, from the negative entries, which are all chance.

    Positive ones may be cameras. With no negative entry nothing is unrelated, and the answer is 0.
    """
    off = similarity[np.triu_indices(len(similarity), 1)]
    negative = off[off < 0]
    return float(np.sqrt(np.mean(np.square(negative, dtype=np.float64)))) if len(negative) else 0.0


def by_linkage(similarity: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Average linkage, cut where the silhouette is widest (the family of Caldelli et al., WIFS 2010)."""
    distance = np.clip(1 - similarity.astype(np.float64), 0, None)
    np.fill_diagonal(distance, 0)
    distance = (distance + distance.T) / 2
    tree = linkage(squareform(distance, checks=False), "average")
    count = len(similarity)
    tried = sorted({*range(2, min(count, 40)), *np.geomspace(2, count - 1, 40).astype(int)})
    cuts = [fcluster(tree, k, "maxclust") for k in tried]
    width = [silhouette_score(distance, cut, metric="precomputed") if 1 < cut.max() < count else -1.0 for cut in cuts]
    return cuts[int(np.argmax(width))]


def by_spectrum(similarity: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Spectral clustering of what exceeds chance; the number of clusters is where the Laplacian's eigenvalues jump."""
    affinity = np.clip(similarity.astype(np.float64) - 3 * noise, 0, None)
    affinity += 1e-6 * affinity.max()  # connected, as the embedding needs it
    np.fill_diagonal(affinity, affinity.max() if affinity.max() > 0 else 1)
    scale = 1 / np.sqrt(affinity.sum(1))
    values = np.sort(1 - np.linalg.eigvalsh(scale[:, None] * affinity * scale))
    most = max(2, min(len(values) - 1, 100, len(values) // 2))
    k = int(np.argmax(np.diff(values[: most + 1]))) + 1
    if k == 1:
        return np.zeros(len(values), int)
    return SpectralClustering(k, affinity="precomputed", random_state=seed).fit_predict(affinity)


def _correlation_clustering(weights: np.ndarray, order: np.ndarray, sweeps: int = 20) -> np.ndarray:
    """Labels that make the sum of `weights` inside clusters locally largest: each item moves where it gains most."""
    labels = np.arange(len(weights))
    for _ in range(sweeps):
        moved = False
        for i in order:
            gain = np.bincount(labels, weights[i], minlength=len(labels))
            gain[labels[i]] -= weights[i, i]
            best = int(np.argmax(gain))
            if gain[best] <= 0:  # better alone: in an empty cluster, or where it is alone already
                alone = np.bincount(labels, minlength=len(labels))
                alone[labels[i]] -= 1
                best = int(np.argmin(alone))
            if best != labels[i] and gain[best] > gain[labels[i]]:
                labels[i], moved = best, True
        if not moved:
            break
    return labels


def by_consensus(similarity: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Correlation clustering at several thresholds, and of how often two items meet (Marra et al., TIFS 2017)."""
    count = len(similarity)
    order = np.random.default_rng(seed).permutation(count)
    off = similarity[np.triu_indices(count, 1)]
    high = max(float(np.quantile(off, 0.99)), 4 * noise)
    together = np.zeros((count, count), np.float32)
    thresholds = np.linspace(2 * noise, high, 9)[:-1]
    for threshold in thresholds:
        labels = _correlation_clustering(similarity - threshold, order)
        together += labels[:, None] == labels[None]
    return _correlation_clustering(together / len(thresholds) - 0.5, order)


METHODS = {"linkage": by_linkage, "spectral": by_spectrum, "consensus": by_consensus}


def cluster(similarity: np.ndarray, method: str = "linkage", noise: float | None = None, seed: int = 0) -> np.ndarray:
    """Cameras of N media from their similarity float[N,N]: int[N] from 0 by size, -1 = unattributed.

    `method` makes the first partition: linkage, spectral or consensus; `refine` then merges, moves and drops. `noise`
    is the standard deviation of chance, estimated from the matrix if not given. Entries that are not finite count as 0.
    Raises ValueError for a matrix that is not square or an unknown method.
    """
    similarity = np.nan_to_num(np.asarray(similarity, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"A similarity matrix is square, not {similarity.shape}.")
    if method not in METHODS:
        raise ValueError(f"There is no clustering '{method}'; known are {', '.join(METHODS)}.")
    noise = chance(similarity) if noise is None else noise
    start = METHODS[method](similarity, noise, seed) if len(similarity) > 2 else np.arange(len(similarity))
    return refine(similarity, start, noise)


def refine(similarity: np.ndarray, labels: np.ndarray, noise: float, rounds: int = 10) -> np.ndarray:
    """Re-estimate, merge, attract and drop until nothing changes; labels as `cluster` gives them.

    Merge two clusters whose fingerprints agree as halves of one camera would; give every item to the cluster whose
    fingerprint (without the item) it fits best, if that is significant; leave the rest, and clusters of one, out.
    """
    similarity, labels = similarity.copy(), np.unique(labels, return_inverse=True)[1]
    for share in (MERGE, MERGE_UNKNOWN):
        for _ in range(rounds):
            before = labels
            labels = _attract(similarity, _merge(similarity, labels, noise, share), noise)
            if np.array_equal(before, labels):
                break
    return ranked(labels)


def _one_hot(labels: np.ndarray) -> np.ndarray:
    return (labels[:, None] == np.arange(labels.max(initial=-1) + 1)).astype(np.float32)


def ranked(labels: np.ndarray) -> np.ndarray:
    """Clusters numbered by size, then by first member; clusters of one are unattributed."""
    sizes = np.bincount(labels[labels >= 0], minlength=labels.max(initial=-1) + 1)
    first = [int(np.argmax(labels == k)) for k in range(len(sizes))]
    order = [k for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], first[k])) if sizes[k] > 1]
    place = np.full(len(sizes) + 1, UNATTRIBUTED)
    place[order] = np.arange(len(order))
    return place[labels]


def _sums(similarity: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sums of S between clusters [K,K] (inside: each pair once both ways), sizes [K], and inside, over pairs that are
    not one recording, sum [K] and number [K]."""
    member = _one_hot(labels)
    np.fill_diagonal(similarity, 0)
    total = member.T @ similarity @ member
    distinct = similarity <= SAME_RECORDING
    np.fill_diagonal(distinct, False)
    inside = ((similarity * distinct) @ member * member).sum(0), (distinct.astype(np.float32) @ member * member).sum(0)
    np.fill_diagonal(similarity, 1)
    return total.astype(np.float64), member.sum(0).astype(np.float64), *(x.astype(np.float64) for x in inside)


def _merge(similarity: np.ndarray, labels: np.ndarray, noise: float, share: float) -> np.ndarray:
    """Labels after merging the clusters that pass for one camera; unattributed items stay out."""
    total, size, inside, pairs = _sums(similarity, labels)
    into, _, _ = merged(total + np.diag(size), size, inside, pairs, noise, share)
    return np.append(into, UNATTRIBUTED)[labels]


def merged(
    total: np.ndarray, size: np.ndarray, inside: np.ndarray, pairs: np.ndarray, noise: float, share: float = MERGE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which clusters pass for one camera: the cluster int[K] into which each goes, and the new `inside` and `pairs`.

    total: float64[K,K], inner products of the sums of unit fingerprints; size: their numbers [K]; inside, pairs: sum
    and number [K] of known correlations inside a cluster between distinct recordings, counted both ways; noise:
    standard deviation of chance; share: of the agreement inside, that the agreement between must reach. Of the pairs
    that differ from chance and agree as halves of one camera would, the most alike goes first.
    """
    total, size, inside, pairs = (np.array(x, np.float64) for x in (total, size, inside, pairs))
    into, alive = np.arange(len(size)), size > 0

    def agreement(k: np.ndarray) -> np.ndarray:
        everything = (total[k, k] - size[k]) / np.maximum(size[k] * (size[k] - 1), 1)
        return np.clip(np.where(pairs[k] > 0, inside[k] / np.maximum(pairs[k], 1), everything), 0, None)

    def appeal(k: np.ndarray) -> np.ndarray:
        """Mean correlation of clusters k with each cluster, -inf where they may not merge."""
        mean = total[k] / np.maximum(np.outer(size[k], size), 1)
        z = total[k] / np.sqrt(np.maximum(np.outer(total[k, k], total.diagonal()), 1)) / max(noise, 1e-12)
        known = np.where(np.logical_and.outer(pairs[k] > 0, pairs > 0), share, MERGE_UNKNOWN)
        need = known * np.sqrt(np.outer(agreement(k), agreement(np.arange(len(size)))))
        may = (z > SIGNIFICANT) & (mean > need) & np.logical_and.outer(alive[k], alive)
        may[np.arange(len(k)), k] = False
        return np.where(may, mean, -np.inf)

    scores = appeal(np.arange(len(size)))
    while len(scores) and scores.max() > -np.inf:
        a, b = np.unravel_index(np.argmax(scores), scores.shape)
        cross, number = total[a, b], size[a] * size[b]
        if cross / number <= SAME_RECORDING:  # otherwise the two are one recording, which tells nothing of the camera
            inside[a], pairs[a] = inside[a] + inside[b] + 2 * cross, pairs[a] + pairs[b] + 2 * number
        into[into == b] = a
        total[a] += total[b]
        total[:, a] += total[:, b]
        size[a], alive[b] = size[a] + size[b], False
        scores[b] = scores[:, b] = -np.inf
        scores[a] = scores[:, a] = appeal(np.array([a]))[0]
    return into, inside, pairs


def _attract(similarity: np.ndarray, labels: np.ndarray, noise: float) -> np.ndarray:
    """Give every item to the cluster that it fits best without itself, or to none (-1)."""
    kept = np.unique(labels[labels >= 0], return_inverse=True)[1]
    tidy = np.full(len(labels), UNATTRIBUTED)
    tidy[labels >= 0] = kept
    if not len(kept):
        return tidy
    total, size, _, _ = _sums(similarity, tidy)
    member = _one_hot(tidy)
    fit = similarity @ member - member * similarity.diagonal()[:, None]
    others = size - member
    own = total.diagonal() / np.maximum(size * (size - 1), 1)
    length = np.sqrt(np.maximum(others + others * (others - 1) * np.clip(own, 0, None), 1))
    z = np.where(others > 0, fit / length, -np.inf) / max(noise, 1e-12)
    best = np.argmax(z, 1)
    return np.where(z[np.arange(len(z)), best] > SIGNIFICANT, best, UNATTRIBUTED)


def scores(truth: Sequence, labels: np.ndarray) -> dict[str, float]:
    """How well clusters match the cameras: ari, nmi, purity, pairwise precision, recall and f1, clusters, cameras,
    unattributed (share). Every unattributed item counts as a cluster of its own, in all but `clusters`.

    The Rand index is left out: it is high for any fine partition of many cameras.
    """
    truth = np.unique(np.asarray(truth).astype(str), return_inverse=True)[1]
    labels = np.asarray(labels)
    alone = labels == UNATTRIBUTED
    full = np.where(alone, labels.max(initial=0) + 1 + np.arange(len(labels)), labels)
    (_, wrong), (missed, right) = pair_confusion_matrix(truth, full)
    precision = right / (right + wrong) if right + wrong else 0.0
    recall = right / (right + missed) if right + missed else 0.0
    return {
        "ari": float(adjusted_rand_score(truth, full)), "nmi": float(normalized_mutual_info_score(truth, full)),
        "purity": float(contingency_matrix(truth, full).max(0).sum() / len(truth)),
        "precision": float(precision), "recall": float(recall),
        "f1": float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0,
        "clusters": len(set(labels[~alone])), "cameras": len(set(truth)), "unattributed": float(alone.mean()),
    }  # fmt: skip
