"""Cluster by camera where the similarity matrix of all fingerprints cannot be held: 100 000 media and more.

Random subsets are clustered by themselves; the fingerprints of their clusters are merged across subsets and attract
what belongs to them (after Lin and Li, IEEE TIFS 12(4), 2017; Khan and Bianchi, 2019). What a known camera explains is
not clustered again, so later subsets are made of what is left, where small cameras are dense. Only what is left of all
subsets is compared pair by pair, in a reduced dimension, and every decision falls at full resolution.
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import norm

from unmask import clustering
from unmask.clustering import SAME_RECORDING, SIGNIFICANT, UNATTRIBUTED, merged

BAND_VALUES = 2**25  # values of fingerprints that are read at a time
TILE = 2048
SAMPLE = 256  # fingerprints whose similarities tell what chance is
# Chance pairs that an unattributed item may have in the search for candidates. Above one, chance would link everything.
CHANCE_LINKS = 0.1


def cluster_large(
    patterns: np.ndarray, chunk: int = 2000, compressed: int = 4096, seed: int = 0, device: str = "cpu"
) -> np.ndarray:
    """Cameras of N media from their fingerprints: int[N] from 0 by size, -1 = unattributed, as `clustering.cluster`.

    patterns: float[N,...], in memory or mapped from a file, of zero mean and on common pixels; read in bands. `chunk`
    fingerprints are clustered at a time; up to that many give what `clustering.cluster` gives. What no camera attracts
    is reduced to `compressed` values each for the search for pairs (at least as many as it has: not reduced).

    Beyond `patterns`, with K clusters, D values each, and M items that are left for the search for pairs, memory is
    about 8 K D + 4 M compressed + 60 chunk^2 + 12 BAND_VALUES bytes. Operations: 4 N K D to attract, at most
    2 chunk N D to cluster (chunk D times what is not attracted) and M^2 compressed to search. A camera is found where
    three of its media meet in a subset, or stand out pair by pair with a correlation of about 5 / sqrt(compressed).
    Raises ValueError for a wrong shape or size.
    """
    if np.ndim(patterns) < 2 or chunk < 3 or compressed < 1:
        raise ValueError("Clustering needs fingerprints [N,...], a chunk of 3 or more and 1 or more compressed values.")
    flat = patterns.reshape(len(patterns), -1)
    if len(flat) <= chunk:
        return clustering.cluster(_similarity(flat, np.arange(len(flat)), device), seed=seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(flat))
    noise = clustering.chance(_similarity(flat, order[:SAMPLE], device))
    cameras = _Cameras(flat, max(noise, flat.shape[1] ** -0.5), seed, device)
    waiting = np.empty(0, int)
    for part in _split(order, min(chunk, cameras.band)):
        waiting = np.concatenate([waiting, cameras.attract(part)])
        if len(waiting) >= chunk:
            cameras.discover(waiting[:chunk])
            waiting = waiting[chunk:]
    cameras.discover(cameras.attract(waiting))
    left = cameras.attract(np.flatnonzero(cameras.labels < 0))
    for part in _split(_linked(cameras, left, compressed, rng), chunk):
        cameras.discover(cameras.attract(part))
    cameras.attract(np.arange(len(flat)))
    return clustering.ranked(cameras.labels)


def _split(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def _unit(flat: np.ndarray, rows: np.ndarray, device: str) -> torch.Tensor:
    """Fingerprints of unit length, float32[n,D]; zeros where there is no pattern or one that is not finite."""
    x = torch.from_numpy(np.ascontiguousarray(flat[rows])).to(device, torch.float32)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(length.isfinite() & (length > 0), x / length, 0)


def _similarity(flat: np.ndarray, rows: np.ndarray, device: str) -> np.ndarray:
    """Correlations of some fingerprints, float32[n,n]; reads bands of pixels, so that not all of them are held."""
    depth, total = max(1, BAND_VALUES // max(1, len(rows))), torch.zeros(len(rows), len(rows), device=device)
    for k in range(0, flat.shape[1], depth):
        part = torch.from_numpy(np.ascontiguousarray(flat[rows, k : k + depth])).to(device, torch.float32)
        total += part @ part.T
    return clustering.normalised(total.cpu().numpy())


def sketch(x: torch.Tensor, signs: torch.Tensor, d: int) -> torch.Tensor:
    """Count sketch of x float32[n,D] to [n,d]: every d-th value, each with its sign in `signs` float32[D], added up.

    Inner products keep their mean, and those of unit vectors scatter by 1/sqrt(d) more (Charikar et al., 2002; here the
    buckets are fixed, because fingerprints spread their energy evenly).
    """
    x = torch.nn.functional.pad(x * signs, (0, -x.shape[1] % d))
    return x.view(len(x), -1, d).sum(1)


class _Cameras:
    """The clusters so far: sums of their unit fingerprints [K,D], sizes, what is known of their insides; all labels."""

    def __init__(self, flat: np.ndarray, noise: float, seed: int, device: str):
        self.flat, self.noise, self.seed, self.device = flat, noise, seed, device
        self.band = max(1, BAND_VALUES // flat.shape[1])
        self.labels = np.full(len(flat), UNATTRIBUTED)
        self.sums = torch.zeros(0, flat.shape[1], device=device)
        self.size, self.inside, self.pairs = np.zeros(0), np.zeros(0), np.zeros(0)

    def attract(self, rows: np.ndarray) -> np.ndarray:
        """Give each item to the cluster that it fits best without itself, or to none; returns the rows with none."""
        for part in _split(rows, self.band) if len(self.sums) else ():
            before, x = self.labels[part], _unit(self.flat, part, self.device)
            member = torch.from_numpy(before[:, None] == np.arange(len(self.sums))).to(self.device)
            own = x.square().sum(1, keepdim=True) * member
            fit = x @ self.sums.T
            length = (self.sums.square().sum(1) - 2 * fit * member + own).clamp(min=1).sqrt()
            others = torch.from_numpy(self.size).to(self.device) - member.double()
            z, best = torch.where(others > 0.5, (fit - own) / length / self.noise, -torch.inf).max(1)
            after = torch.where(z > SIGNIFICANT, best, UNATTRIBUTED).cpu().numpy()
            for which, sign in ((before, -1), (after, 1)):
                moved = (before != after) & (which >= 0)
                self._add(which[moved], x[torch.from_numpy(moved).to(self.device)], sign)
            self.labels[part] = after
        return rows[self.labels[rows] < 0]

    def _add(self, labels: np.ndarray, x: torch.Tensor, sign: int = 1) -> None:
        self.sums.index_add_(0, torch.from_numpy(labels).to(self.device), x, alpha=sign)
        self.size += sign * np.bincount(labels, minlength=len(self.size))

    def discover(self, rows: np.ndarray) -> None:
        """Cluster unattributed rows by themselves, and merge what is found with what is known."""
        similarity = _similarity(self.flat, rows, self.device)
        found = clustering.cluster(similarity, noise=self.noise, seed=self.seed)
        inside, pairs = np.zeros((2, found.max(initial=UNATTRIBUTED) + 1))
        for k in range(len(inside)):
            block = similarity[np.ix_(found == k, found == k)]
            distinct = (block <= SAME_RECORDING) & ~np.eye(len(block), dtype=bool)
            inside[k], pairs[k] = block[distinct].sum(dtype=np.float64), distinct.sum()
        known = len(self.sums)
        self.sums = torch.cat([self.sums, self.sums.new_zeros(len(inside), self.flat.shape[1])])
        self.size = np.append(self.size, np.zeros(len(inside)))
        self.inside, self.pairs = np.append(self.inside, inside), np.append(self.pairs, pairs)
        rows, found = rows[found >= 0], found[found >= 0] + known
        self.labels[rows] = found
        for i in range(0, len(rows), self.band):
            self._add(found[i : i + self.band], _unit(self.flat, rows[i : i + self.band], self.device))
        self._merge()

    def _merge(self) -> None:
        total = torch.cat([self.sums[:0] @ self.sums.T, *(part @ self.sums.T for part in self.sums.split(TILE))])
        total = total.cpu().numpy().astype(np.float64)
        into, self.inside, self.pairs = merged(total, self.size, self.inside, self.pairs, self.noise)
        kept, into = np.unique(into, return_inverse=True)
        where = torch.from_numpy(into).to(self.device)
        self.sums = self.sums.new_zeros(len(kept), self.flat.shape[1]).index_add_(0, where, self.sums)
        self.size = np.bincount(into, self.size, len(kept))
        self.inside, self.pairs = self.inside[kept], self.pairs[kept]
        self.labels = np.append(into, UNATTRIBUTED)[self.labels]


def _linked(cameras: _Cameras, left: np.ndarray, compressed: int, rng: np.random.Generator) -> np.ndarray:
    """The items of `left` with a pair that is rare by chance, in groups of linked items, the largest group first."""
    values, device = cameras.flat.shape[1], cameras.device
    signs = torch.from_numpy(rng.integers(0, 2, values, dtype=np.int8) * 2 - 1).to(device)
    small = torch.zeros(len(left), min(values, compressed), device=device)
    for i in range(0, len(left), cameras.band):
        x = _unit(cameras.flat, left[i : i + cameras.band], device)
        small[i : i + len(x)] = sketch(x, signs, compressed) if values > compressed else x
    noise = float(np.hypot(cameras.noise, compressed**-0.5 if values > compressed else 0))
    rare = noise * float(norm.isf(CHANCE_LINKS / max(1, len(left))))
    group = np.arange(len(left))
    for i in range(0, len(left), TILE):
        for j in range(i, len(left), TILE):
            block = small[i : i + TILE] @ small[j : j + TILE].T
            if i == j:
                block.fill_diagonal_(0)
            a, b = torch.nonzero(block > rare).cpu().numpy().T
            links = coo_array((np.ones(len(a), bool), (group[a + i], group[b + j])), (len(left), len(left)))
            group = connected_components(links, directed=False)[1][group]
    sizes = np.bincount(group)[group]
    linked = np.flatnonzero(sizes > 1)
    return left[linked[np.lexsort((group[linked], -sizes[linked]))]]
