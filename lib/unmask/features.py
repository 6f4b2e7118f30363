"""Frozen features, computed once: what a detector of single frames makes of crops (`frame_outputs`), kept for heads.

A cache is a folder `CHECKPOINT-KEY`; KEY covers the crops' hashes, how they were cut, the weights, the clips that are
made of them and the source code. It holds shards (see `unmask.shards`) and an index with a row per frame.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from unmask import clips, hulls, sbi, scoring, shards
from unmask.data.crops import CropStore
from unmask.detectors import base, temporal
from unmask.detectors.temporal import frame_outputs
from unmask.pairs import fingerprint
from unmask.profile import digest, source_hash
from unmask.scoring import frame_images, windows
from unmask.training import device

SHARD = 24  # clips in a shard: what a kill can cost


@dataclass(frozen=True)
class Task:
    """What the shards of one cache have in common. `kinds`: which clips to make of an item; none: its crops as they
    are. At most `frames` in a row of an item go into a made clip."""

    checkpoint: str
    crops: str
    folder: str
    kinds: tuple[str, ...] = ()
    frames: int = 0
    seed: int = 0
    recipe: str = "intended"


@dataclass(frozen=True)
class Clips:
    """Padded clips: features float32[B,T,D], logits float32[B,T], mask bool[B,T], and `rows`: item_id, version, kind,
    label (-1 where it is not known here) of every clip."""

    features: np.ndarray
    logits: np.ndarray
    mask: np.ndarray
    rows: pd.DataFrame

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Features:
    """A whole cache: features float16[N,D], logits float32[N] and `rows`: item_id, version, kind, label, frame, pts."""

    features: np.ndarray
    logits: np.ndarray
    rows: pd.DataFrame
    name: str

    def items(self) -> Iterator[tuple[dict, np.ndarray]]:
        """Every clip as a row of facts and the positions of its frames, in order."""
        for key, part in self.rows.groupby(["item_id", "version", "kind", "label"], sort=False).indices.items():
            yield dict(zip(("item_id", "version", "kind", "label"), key, strict=True)), np.sort(part)

    def clips(self, frames: int, order: str = "in order", seed: int = 0) -> Clips:
        """Windows of at most `frames` frames as padded arrays; a longer clip gives several (see `scoring.windows`).

        order: "in order"; "shuffled", the frames of an item in a random order of its own; or "frozen", its middle
        frame in place of all. ValueError for another order.
        """
        picks, rows = [], []
        for row, where in self.items():
            where = arranged(where, order, sbi.sample_rng(seed, row["item_id"], row["version"], 0))
            for window in windows(len(where), frames):
                picks.append(where[window])
                rows.append(row)
        width = max((len(pick) for pick in picks), default=0)
        mask = np.arange(width) < np.array([len(pick) for pick in picks]).reshape(-1, 1)
        at = np.zeros(mask.shape, int)
        at[mask] = np.concatenate(picks) if picks else []
        table = pd.DataFrame(rows, columns=["item_id", "version", "kind", "label"])
        features = np.where(mask[..., None], self.features[at].astype(np.float32), 0)
        return Clips(features, np.where(mask, self.logits[at], 0), mask, table)


def arranged(where: np.ndarray, order: str, rng: np.random.Generator) -> np.ndarray:
    """Positions int[N] of a clip's frames "in order", "shuffled" or "frozen" (the middle one N times)."""
    if order not in ("in order", "shuffled", "frozen"):
        raise ValueError(f"frames are in order, shuffled or frozen, not {order!r}")
    if order == "frozen":
        return np.repeat(where[len(where) // 2], len(where))
    return rng.permutation(where) if order == "shuffled" else where


def of_crops(
    checkpoint: str | os.PathLike,
    crops: str | os.PathLike,
    rows: pd.DataFrame,
    out: str | os.PathLike,
    workers: int = 1,
) -> Features:
    """Features of the evaluation crops of index rows (`scoring.frame_images`), cached in the folder `out`.

    checkpoint: the folder of a detector of single frames. workers: processes; 0 is this one; never changes a result.
    Stopped at any point, the same call goes on from its last shard. Raises CheckpointError and CropError.
    """
    task = Task(str(checkpoint), str(crops), "")
    return _cached(task, rows, [(part, 0) for part in _per_item(rows)], out, workers)


def of_made_clips(
    checkpoint: str | os.PathLike,
    crops: str | os.PathLike,
    rows: pd.DataFrame,
    out: str | os.PathLike,
    frames: int,
    versions: int,
    seed: int,
    recipe: str = "intended",
    workers: int = 1,
) -> Features:
    """Features of `versions` sets of clips (`clips.make_clips`) of every item, cached as in `of_crops`.

    rows: index rows of real media. Every clip is of at most `frames` crops in a row, drawn anew in every version.
    """
    task = Task(str(checkpoint), str(crops), "", tuple(clips.LABELS), frames, seed, recipe)
    units = [(part, version) for part in _per_item(rows) for version in range(versions)]
    return _cached(task, rows, units, out, workers)


def _per_item(rows: pd.DataFrame) -> list[list[dict]]:
    rows = rows.sort_values(["item_id", "frame"], ignore_index=True)
    return [part.to_dict("records") for _, part in rows.groupby("item_id", sort=True)]


def _cached(task: Task, rows: pd.DataFrame, units: list, out: str | os.PathLike, workers: int) -> Features:
    card = base.read_checkpoint(task.checkpoint)[1]
    if card["input"]["frames"] != 1:
        raise base.CheckpointError(
            f"{task.checkpoint} judges clips; a head needs a detector of single frames below it."
        )
    source = source_hash(
        sys.modules[__name__], shards, clips, sbi, hulls, scoring, temporal, base, base.module(card["detector"])
    )
    content = [task.kinds, task.frames, task.seed, task.recipe, len(units)]
    crops = [CropStore(task.crops).settings(), fingerprint(rows.sort_values(["item_id", "frame"]))] if len(rows) else []
    name = f"{card['sha256'][:12]}-{digest([card['sha256'], content, crops, source])}"
    folder = Path(out) / name
    task = Task(**vars(task) | {"folder": str(folder)})
    parts = [units[i : i + SHARD] for i in range(0, len(units), SHARD)]
    works = [(task, k, part) for k, part in enumerate(parts)]
    shards.fill(folder, works, _make_shard, partial(_rows, task, units), workers, "features, shards")
    rows, arrays = shards.read(folder)
    features = arrays.get("features", np.empty((0, 0), np.float16))
    return Features(features, arrays.get("logits", np.empty(0, np.float32)), rows, name)


def _window(unit: tuple[list[dict], int], task: Task) -> tuple[list[dict], np.random.Generator]:
    """The crops that a made clip takes, and the dice for the rest."""
    records, version = unit
    rng = sbi.sample_rng(task.seed, records[0]["item_id"], version, 0)
    start = int(rng.integers(max(len(records) - task.frames, 0) + 1))
    return records[start : start + task.frames], rng


def _rows(task: Task, units: list) -> pd.DataFrame:
    """The index: a row per frame of every clip, in the order of the shards."""
    rows = []
    for records, version in units:
        used = _window((records, version), task)[0] if task.kinds else records
        for kind, label in ((k, clips.LABELS[k]) for k in task.kinds) if task.kinds else (("crops", -1),):
            rows += [(row["item_id"], version, kind, label, row["frame"], row["pts"], row["sha256"]) for row in used]
    columns = ["item_id", "version", "kind", "label", "frame", "pts", "sha256"]
    kinds = {"version": "int32", "label": "int8", "frame": "int32", "pts": "float64"}
    return pd.DataFrame(rows, columns=columns).astype(kinds)


def _pictures(store: CropStore, unit: tuple[list[dict], int], task: Task, spec: base.InputSpec) -> list[np.ndarray]:
    """The clips of one unit, uint8[T,S,S,3] each, S = spec.size."""
    if not task.kinds:
        return [frame_images(store, pd.DataFrame(unit[0]), spec)]
    used, rng = _window(unit, task)
    images = [store.image(row) for row in used]
    points = [np.asarray(row["landmarks"], np.float32).reshape(-1, 2) for row in used]
    made = clips.make_clips(images, points, rng, spec.size, task.recipe, spec.native)
    return [made[kind] for kind in task.kinds]


_LOADED: dict[str, base.Detector] = {}


def _detector(checkpoint: str) -> base.Detector:
    """The frozen detector, loaded once in a process."""
    sha = base.read_checkpoint(checkpoint)[1]["sha256"]
    if sha not in _LOADED:
        _LOADED.clear()
        with torch.random.fork_rng():  # building it draws weights that the checkpoint then replaces
            detector = base.load_checkpoint(checkpoint)[0]
        _LOADED[sha] = detector.to("cuda" if torch.cuda.is_available() else "cpu")
    return _LOADED[sha]


@torch.no_grad()
def _make_shard(work: tuple[Task, int, Sequence]) -> None:
    """Compute one shard. Every clip is a batch of its own, so that no other clip changes its features."""
    task, number, units = work
    detector, store = _detector(task.checkpoint), CropStore(task.crops)
    outputs = []
    for unit in units:
        for images in _pictures(store, unit, task, detector.input_spec):
            outputs.append(frame_outputs(detector, detector.prepare(torch.from_numpy(images).to(device(detector)))))
    features, logits = (torch.cat(part).cpu() for part in zip(*outputs, strict=True))
    content = {"features": features.half().numpy(), "logits": logits.float().numpy()}
    shards.write(Path(task.folder), number, content)
