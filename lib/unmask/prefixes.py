"""Tokens of clips at the entry of a CLIP's first adapter, computed once, or anew whenever they are asked for.

What comes before the first adapter is frozen and sees single frames. A cache of it is a folder `DEPTH-KEY`; KEY covers
the backbone, the depth, the crops' hashes, how they were cut, the clips that are made of them and the source code. It
holds shards (see `unmask.shards`), read piece by piece since all of them may not fit into memory, and an index with a
row per frame.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from math import isqrt
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import safe_open

from unmask import clip_bank, clip_views, clips, hulls, sbi, shards
from unmask.clip_bank import Clips, Entry, Maker
from unmask.detectors import base, clip_backbone
from unmask.machine import end_with_parent
from unmask.pairs import fingerprint
from unmask.profile import digest, source_hash
from unmask.training import device, own_randomness

SHARD = 256  # frames in a shard, but for whole clips: what a kill can cost
PRECISIONS = ("bf16", "fp32")


def _pooled(edges: torch.Tensor, side: int) -> torch.Tensor:
    """Means over a grid: float[...,S,S] to float[...,side,side]."""
    return F.adaptive_avg_pool2d(edges.flatten(0, -3), side).unflatten(0, edges.shape[:-2])


def _chosen(table: pd.DataFrame, numbers: Sequence[int], ts: Sequence | None) -> list[np.ndarray]:
    """The frames asked for of every clip. ValueError if these are not equally many."""
    lengths = table["frames"].to_numpy()[list(numbers)]
    if ts is None:
        if len(set(lengths.tolist())) > 1:
            raise ValueError(f"clips of {sorted(set(lengths.tolist()))} frames do not fit into one tensor")
        return [np.arange(length) for length in lengths]
    ts = np.asarray(ts, int)
    return list(np.broadcast_to(ts, (len(lengths), ts.shape[-1])))


@dataclass(frozen=True)
class Prefixes:
    """A cache of the clips of `table` (`Clips.table`) in a folder, of which only what is asked for is read."""

    folder: Path
    table: pd.DataFrame
    name: str

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        return _places(self.table["frames"].to_numpy())

    def tokens(self, numbers: Sequence[int], ts: Sequence | None = None) -> torch.Tensor:
        """Tokens float32[B,T,1+g*g,D] of clips by their numbers, all of one length.

        ts: of frames int[T], or of each clip's int[B,T], to read these alone; the clips may differ in length then.
        """
        found = self._read("tokens", numbers, ts)
        return (found.view(torch.bfloat16) if found.dtype == torch.int16 else found).float()

    def edges(self, numbers: Sequence[int], side: int, ts: Sequence | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Where clips were blended, float32[B,T,side,side], and for which one knows, bool[B]; arguments as in `tokens`.

        side: g, or a divisor of it.
        """
        found = self._read("edges", numbers, ts)
        if found.shape[-1] % side:
            raise ValueError(f"edges are kept on a grid of {found.shape[-1]}, which {side} does not divide")
        return _pooled(found, side), torch.from_numpy(self.table["known"].to_numpy()[list(numbers)])

    def _read(self, name: str, numbers: Sequence[int], ts: Sequence | None) -> torch.Tensor:
        chosen, out = _chosen(self.table, numbers, ts), None
        shard, start = (places[list(numbers)] for places in self._places)
        for number in np.unique(shard):
            with safe_open(shards.path_of(self.folder, number), "pt") as file:
                rows = file.get_slice(name)
                for b in np.flatnonzero(shard == number):
                    at = start[b] + chosen[b]
                    part = rows[int(at.min()) : int(at.max()) + 1][at - at.min()]
                    out = part.new_empty(len(chosen), *part.shape) if out is None else out
                    out[b] = part
        return out


class LivePrefixes:
    """What `Prefixes` gives, computed when it is asked for, on the detector's device: cached numbers are these,
    rounded to the cache's precision."""

    def __init__(self, detector: base.Detector, clips: Clips):
        self.detector, self.clips, self.table = detector, clips, clips.table
        self._made: dict[int, dict] = {}

    def _clips(self, numbers: Sequence[int]) -> list[dict]:
        """Clips; those of the last call are kept, since edges are asked for after tokens."""
        self._made = {i: self._made.get(i) or self.clips.clip(i) for i in dict.fromkeys(map(int, numbers))}
        return [self._made[int(i)] for i in numbers]

    def tokens(self, numbers: Sequence[int], ts: Sequence | None = None) -> torch.Tensor:
        """See `Prefixes.tokens`."""
        chosen = _chosen(self.table, numbers, ts)
        found = zip(self._clips(numbers), chosen, strict=True)
        return torch.stack([_prefix(self.detector, clip["images"][at]) for clip, at in found])

    def edges(self, numbers: Sequence[int], side: int, ts: Sequence | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Prefixes.edges`."""
        chosen, found = _chosen(self.table, numbers, ts), self._clips(numbers)
        edges = torch.from_numpy(np.stack([clip["edges"][at] for clip, at in zip(found, chosen, strict=True)]))
        known = torch.from_numpy(self.table["known"].to_numpy()[list(numbers)])
        return _pooled(edges, side).to(device(self.detector)), known.to(device(self.detector))


@torch.no_grad()
def _prefix(detector: base.Detector, images: np.ndarray) -> torch.Tensor:
    """Tokens float32[T,L,D] of frames uint8[T,S,S,3]."""
    return detector.prefix(detector.prepare(torch.from_numpy(images).to(device(detector)))).float()


def _places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shard of each clip and the row there that its frames start at."""
    shard, start, rows, number = [], [], 0, 0
    for length in lengths:
        if rows >= SHARD:
            rows, number = 0, number + 1
        shard.append(number)
        start.append(rows)
        rows += length
    return np.array(shard), np.array(start)


def of_clips(
    detector: base.Detector, clips: Clips, out: str | os.PathLike, workers: int = 0, precision: str = "bf16"
) -> Prefixes:
    """What `detector.prefix` makes of every frame of clips, cached in the folder `out`.

    detector: has `prefix(images float[N,3,S,S] normalised) -> float[N,1+g*g,D]`, which no training changes, and
    `depth_key`, which says what it depends on and names the folder. workers: processes, which build the detector from
    its class and `config`, or, where there is a GPU, only make clips for it; 0: this one. They never change a result.
    precision: that tokens are kept in, "bf16" or "fp32". Stopped at any point, the same call goes on from its last
    shard. Raises CropError, and ValueError for clips of another size and as `sbi.blend`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"tokens are kept in {' or '.join(PRECISIONS)}, not {precision!r}")
    if clips.maker.size != detector.input_spec.size:
        raise ValueError(
            f"the clips are {clips.maker.size} pixels a side, the detector wants {detector.input_spec.size}"
        )
    name = f"{detector.depth_key}-{_key(detector, clips, precision)}"
    folder = Path(out) / name
    numbers = _places(clips.table["frames"].to_numpy())[0]
    works = [(int(k), [clips.entries[i] for i in np.flatnonzero(numbers == k)]) for k in np.unique(numbers)]
    made_by = type(detector), detector.config, detector.depth_key
    before = device(detector)
    _LOADED[made_by[2]] = detector
    try:
        gpu = torch.cuda.is_available() and workers  # it waits for nothing but clips
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, end_with_parent) if gpu else nullcontext() as pool:
            make = partial(_make_shard, made_by, clips.maker, folder, precision, pool)
            shards.fill(folder, works, make, partial(_rows, clips), workers, "tokens, shards")
    finally:
        _LOADED.clear()
        detector.to(before)
    return Prefixes(folder, clips.table, name)


def _key(detector: base.Detector, bank: Clips, precision: str) -> str:
    own = sys.modules[type(detector).__module__]
    source = source_hash(sys.modules[__name__], shards, clip_bank, clip_views, clips, sbi, hulls, base, clip_backbone,
                         own)  # fmt: skip
    maker, drawn = bank.maker, [bank.versions, bank.maker.seed, bank.maker.recipe, bank.blends] if bank.versions else []
    spec = detector.input_spec
    content = [
        spec.size, spec.mean, spec.std, bank.frames, drawn, maker.store.settings(), fingerprint(bank.rows),
        bank.rows["label"].tolist(), precision,
    ]  # fmt: skip
    return digest([detector.depth_key, content, source])


def _rows(bank: Clips) -> pd.DataFrame:
    """The index: a row per frame of every clip, in the order of the shards."""
    columns = ("item_id", "frame", "pts", "sha256")
    rows = [
        (i, t, entry.kind, entry.version, *(row[name] for name in columns))
        for i, entry in enumerate(bank.entries)
        for t, row in enumerate(entry.records)
    ]
    kinds = {"clip": "int32", "t": "int32", "version": "int32", "frame": "int32", "pts": "float64"}
    return pd.DataFrame(rows, columns=["clip", "t", "kind", "version", *columns]).astype(kinds)


_LOADED: dict[str, base.Detector] = {}


def _detector(cls: type[base.Detector], config: dict, depth_key: str) -> base.Detector:
    """The detector, built once in a process. Its adapters are random, which `prefix` does not see."""
    if depth_key not in _LOADED:
        with own_randomness(0):
            _LOADED[depth_key] = cls(**config).eval()
        if _LOADED[depth_key].depth_key != depth_key:
            raise ValueError(f"{cls.__name__} has changed: its `config` does not build it again")
    return _LOADED[depth_key].to("cuda" if torch.cuda.is_available() else "cpu")


def _made(maker: Maker, entries: list[Entry], pool: ProcessPoolExecutor | None) -> Iterator[dict]:
    """The clips of entries, in order; those made of the same crops in one process, since they share work."""
    if pool is None:
        yield from map(maker.make, entries)
        return
    parts = [list(part) for _, part in groupby(entries, lambda entry: id(entry.records))]
    for part in pool.map(maker.make_all, parts):
        yield from part


def _make_shard(
    made_by: tuple[type[base.Detector], dict, str], maker: Maker, folder: Path, precision: str,
    pool: ProcessPoolExecutor | None, work: tuple[int, list[Entry]],
) -> None:  # fmt: skip
    """Compute one shard. Every clip is a batch of its own, so that no other clip changes its tokens."""
    number, entries = work
    detector, tokens, edges = _detector(*made_by), [], []
    for clip in _made(maker, entries, pool):
        found = _prefix(detector, clip["images"]).cpu()
        side = isqrt(found.shape[1] - 1)
        tokens.append(found if precision == "fp32" else found.bfloat16().view(torch.int16))
        edges.append(_pooled(torch.from_numpy(clip["edges"]), side))
    shards.write(folder, number, {"tokens": torch.cat(tokens).numpy(), "edges": torch.cat(edges).numpy()})
