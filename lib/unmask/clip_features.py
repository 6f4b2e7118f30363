"""Frozen features of a CLIP, computed once: what its image tower makes of crops, kept for heads to learn from.

A cache is a folder `BACKBONE-KEY`; KEY covers the backbone's weights, the crops' hashes, how they were cut, the views
that are made of them, their LaRE maps and the source code. It holds shards (see `unmask.shards`) and an index with a
row per crop.
"""

import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional as V

from unmask import clip_views, hulls, sbi, shards
from unmask.clip_views import FIXED, Views
from unmask.data.crops import CropStore
from unmask.detectors import clip_backbone, roi
from unmask.detectors.clip_backbone import ClipBackbone
from unmask.pairs import fingerprint
from unmask.profile import digest, source_hash
from unmask.training import device

SHARD = 256  # pictures in a shard: what a kill can cost


@dataclass(frozen=True)
class Cached:
    """A whole cache: `rows` (item_id, frame, pts, sha256 of N crops) and `tensors` of their V views: pooled
    float16[N,V,dim], boxes float32[N,V,9,4] in pixels of the view, and where asked for maps float16[N,V,C,g,g] and lare
    float32[N,V,4,l,l]."""

    rows: pd.DataFrame
    tensors: dict[str, torch.Tensor]
    name: str


def of_crops(
    backbone: ClipBackbone,
    crops: str | os.PathLike,
    rows: pd.DataFrame,
    out: str | os.PathLike,
    seed: int,
    versions: int,
    lare: str | os.PathLike | None = None,
    maps: bool = False,
    names: Collection[str] | None = None,
    batch: int = 64,
) -> Cached:
    """Features of views of index rows (`clip_views.Views`), cached in the folder `out`; rows by item and frame.

    versions: augmented views of every crop, V of them; 0: the one view of evaluation, V = 1, whatever the seed. lare:
    folder of the crops' LaRE maps, which are cut along. maps: keep the backbone's maps too; they are large. names: of
    the tensors that are read, all if None. batch: pictures at a time, which changes nothing beyond rounding. It runs on
    the GPU if there is one, else on one thread. Stopped at any point, the same call goes on from its last shard. Raises
    LareError, CropError, and ValueError if there are no rows.
    """
    if rows.empty:
        raise ValueError("there are no crops to compute features of")
    rows = rows.sort_values(["item_id", "frame"], ignore_index=True)
    views = Views(CropStore(crops), rows, backbone.input_size, seed, lare)
    source = source_hash(sys.modules[__name__], shards, clip_views, clip_backbone, roi, hulls, sbi)
    drawn = [versions, seed] if versions else [0]
    content = [backbone.fingerprint, views.store.settings(), fingerprint(rows), drawn, views.sources, maps, source]
    name = f"{backbone.fingerprint[:12]}-{digest(content)}"
    folder = Path(out) / name
    each = max(SHARD // max(versions, 1), 1)
    parts = [range(start, min(start + each, len(rows))) for start in range(0, len(rows), each)]
    make = partial(_make_shard, backbone, views, folder, range(versions) if versions else [FIXED], maps, batch)
    index, before = rows[["item_id", "frame", "pts", "sha256"]], device(backbone)
    try:
        shards.fill(folder, list(enumerate(parts)), make, lambda: index, 0, "CLIP features, shards")
    finally:
        backbone.to(before)
    index, arrays = shards.read(folder, names)
    return Cached(index, {key: torch.from_numpy(values) for key, values in arrays.items()}, name)


@torch.no_grad()
def _make_shard(
    backbone: ClipBackbone, views: Views, folder: Path, epochs: list[int], maps: bool, batch: int,
    work: tuple[int, range],
) -> None:  # fmt: skip
    """Compute one shard, number and positions of its rows; `epochs` are their views."""
    number, part = work
    backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    where = [(epoch, i, 0) for i in part for epoch in epochs]
    made = []
    for start in range(0, len(where), batch):
        samples = default_collate([views[one] for one in where[start : start + batch]])
        images = samples.pop("image").to(device(backbone)).movedim(-1, 1).float() / 255
        pooled, cells = backbone.pooled_and_maps(V.normalize(images, list(backbone.mean), list(backbone.std)))
        made.append(samples | {"pooled": pooled.half().cpu()} | ({"maps": cells.half().cpu()} if maps else {}))
    arrays = {key: torch.cat([one[key] for one in made]).unflatten(0, (len(part), -1)).numpy() for key in made[0]}
    shards.write(folder, number, arrays)
