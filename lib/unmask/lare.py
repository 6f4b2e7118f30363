"""LaRE maps of a manifest's media or of their crops: how badly a diffusion model guesses the noise in their latents.

`extract` makes the maps, `read` gives one back. `unmask.lare_model` computes them, `unmask.lare_maps` keeps them.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from unmask import lare_maps
from unmask.data.crops import CropStore, read_index, read_items, spread
from unmask.data.manifest import ManifestError, media_path, read_manifest
from unmask.data.video import MediaError, read_frames
from unmask.lare_maps import LareError, read
from unmask.lare_model import SETTINGS, Extractor, Settings, content_hash, fetch, named
from unmask.preprocessing import MAX_SIDE, MIN_SIDE
from unmask.profile import digest
from unmask.progress import track

__all__ = ["SETTINGS", "Extractor", "LareError", "Settings", "extract", "fetch", "named", "read"]

SHARD = 64  # pictures in a shard: what a kill can cost


@dataclass(frozen=True)
class _Unit:
    """One medium of the manifest. `source` stands for its content, `count` is how many pictures to expect, and
    `pictures()` gives (frame, pts, uint8[H,W,3] RGB) of each, or raises MediaError."""

    item_id: str
    source: str
    count: int
    pictures: Callable[[], Iterable[tuple[int, float, np.ndarray]]]


def _media(manifest: pd.DataFrame, manifest_path: Path, sampling: dict) -> Iterator[_Unit]:
    """The frames of the media, decoded as `unmask preprocess` decodes them."""
    chosen = {key: value for key, value in sampling.items() if key != "deadline"}
    for row in track(manifest.to_dict("records"), label="LaRE, hashing media"):
        content = ""
        try:
            path = media_path(row, manifest_path)
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            pictures = partial(_frames, path, sampling)
        except ManifestError as error:
            pictures = partial(_fail, str(error))
        except OSError:
            pictures = partial(_frames, path, sampling)  # which says what is wrong with the file
        count = 1 if row["kind"] == "image" else sampling["frames"]
        yield _Unit(row["item_id"], digest([content, chosen, MAX_SIDE]), count, pictures)


def _fail(reason: str) -> list:
    raise MediaError(reason)


def _frames(path: Path, sampling: dict) -> list[tuple[int, float, np.ndarray]]:
    options = {"sampling": sampling["sampling"], "fps": sampling["fps"]}
    clip = read_frames(path, sampling["frames"], sampling["deadline"], MAX_SIDE, **options)
    if min(clip.width, clip.height) < MIN_SIDE:
        raise MediaError(f"frame smaller than {MIN_SIDE} pixels")
    return list(zip(clip.indices.tolist(), clip.pts.tolist(), clip.frames, strict=True))


def _crops(manifest: pd.DataFrame, crops: str | os.PathLike, most: int | None) -> Iterator[_Unit]:
    """The whole stored crops of the media, and the reason of those that have none."""
    store, index = CropStore(crops), read_index(crops)
    reasons = read_items(crops).set_index("item_id")["reason"].to_dict()
    parts = dict(list((index if most is None else spread(index, most)).groupby("item_id")))
    for name in manifest["item_id"]:
        if name in parts:
            rows = parts[name].sort_values("frame").to_dict("records")
            source = digest([[row["frame"], row["sha256"]] for row in rows])
            yield _Unit(name, source, len(rows), partial(_stored, store, rows))
        else:
            reason = reasons.get(name) or "not among the crops"
            yield _Unit(name, digest(reason), 1, partial(_fail, reason))


def _stored(store: CropStore, rows: list[dict]) -> Iterator[tuple[int, float, np.ndarray]]:
    """Of crops. A damaged one ends the run: it is the kit's own and can be made again, so no row may stay for it."""
    yield from ((row["frame"], row["pts"], store.image(row, check=True)) for row in rows)


def extract(
    manifest_path: str | os.PathLike,
    out: str | os.PathLike,
    settings: Settings,
    crops: str | os.PathLike | None = None,
    frames: int = 8,
    sampling: str = "uniform",
    fps: float = 0.0,
    deadline: float = 30.0,
    batch: int = 8,
    most: int | None = None,
) -> pd.DataFrame:
    """Make the LaRE maps of all items of a manifest in the folder `out`; returns their index (`lare_maps.SCHEMA`).

    crops: the folder that `unmask preprocess` filled; without it, `frames` of every medium are decoded as it decodes
    them (`sampling`, `fps` and `deadline` as there). most: crops of a medium at most, spread over it. batch: pictures
    at a time, each `ensemble` times in the UNet.

    Stopped at any point, the same call goes on from its last shard; what is there already is not made again. Maps of
    other settings or weights are removed once the new ones are complete. Every input gets a row, failures with their
    reason and no map. Raises LareError, ManifestError for the manifest, CropError for the crops.
    """
    manifest, out = read_manifest(manifest_path), Path(out)
    extractor = Extractor(settings)
    given = {"frames": frames, "sampling": sampling, "fps": fps, "deadline": deadline}
    units = list(_crops(manifest, crops, most) if crops else _media(manifest, Path(manifest_path), given))
    done = lare_maps.kept(out, extractor.key)
    missing = [unit for unit in units if (unit.item_id, unit.source) not in done]
    before = {row["precision"] for rows in done.values() for row in rows}
    if missing and before - {extractor.precision}:
        raise LareError(f"The maps in {out} were begun in {before.pop()}: finish them there, or name another folder.")
    for part in track(parts := list(_dealt(missing)), len(parts), "LaRE, shards"):
        lare_maps.write_shard(out, extractor.key, *_shard(extractor, part, batch))
    done = lare_maps.kept(out, extractor.key)
    lare_maps.write_settings(out, extractor.key, extractor.precision, asdict(settings))
    index = lare_maps.write_index(out, [row for unit in units for row in done[unit.item_id, unit.source]])
    for path in lare_maps.others(out, extractor.key):
        path.unlink()
    return index


def _dealt(units: list[_Unit]) -> Iterator[list[_Unit]]:
    """Units in their order, in parts of about SHARD pictures."""
    part: list[_Unit] = []
    for unit in units:
        part.append(unit)
        if sum(u.count for u in part) >= SHARD:
            yield part
            part = []
    if part:
        yield part


def _shard(extractor: Extractor, units: list[_Unit], batch: int) -> tuple[np.ndarray, list[dict]]:
    """Maps of all pictures that could be read, and a row for each and for each failure."""
    rows, pictures = [], []
    for unit in units:
        known = {"item_id": unit.item_id, "source": unit.source, "precision": extractor.precision}
        try:
            for frame, pts, picture in unit.pictures():
                row = {"frame": frame, "pts": pts, "sha256": content_hash(picture), "status": "ok", "reason": ""}
                rows.append(known | row | {"position": len(pictures)})
                pictures.append(picture)
        except MediaError as error:
            row = {"frame": -1, "pts": float("nan"), "sha256": "", "status": "failed", "reason": error.reason}
            rows.append(known | row | {"position": -1})
    maps = extractor.maps(pictures, batch)
    for row in rows:
        if row["position"] >= 0 and not np.isfinite(maps[row["position"]]).all():
            row |= {"status": "failed", "reason": "the map is not finite", "position": -1}
    return maps, rows
