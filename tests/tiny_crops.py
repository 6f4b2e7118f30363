"""Crops and LaRE maps of given pictures, in the folders that `unmask preprocess` and `unmask lare` leave."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

from unmask import lare_maps
from unmask.data.crops import CropStore, CropWriter, collate, encode_crop, read_index
from unmask.data.landmarks import CANONICAL_68
from unmask.lare_model import content_hash

SETTINGS = {
    "frames": 2,
    "size": 96,
    "margin": 0.5,
    "align": False,
    "encoding": "png",
    "sampling": "uniform",
    "fps": 0.0,
}


def identity(item: int) -> str:
    """The id of item number `item`."""
    return hashlib.sha256(f"tiny {item}".encode()).hexdigest()[:16]


def face(size: int, width: float = 0.55) -> np.ndarray:
    """Landmarks float32[68,2] of a level face that fills `width` of a picture of `size` pixels a side."""
    return (CANONICAL_68 * width * size / 2.3 + [0.5 * size, 0.36 * size]).astype(np.float32)


def write_crops(folder: Path, pictures: list[np.ndarray], landmarks: list[np.ndarray]) -> pd.DataFrame:
    """Keep pictures uint8[S,S,3] as crops, two frames (0 and 5) of an item after another; returns their index."""
    with CropWriter(folder, 0, 1) as writer:
        writer.resume([])
        for start in range(0, len(pictures), 2):
            name, found = identity(start // 2), []
            for k, picture in enumerate(pictures[start : start + 2]):
                place = {"x0": 0.0, "y0": 0.0, "x1": 1.0, "y1": 1.0, "landmarks": landmarks[start + k].ravel().tolist()}
                found.append({"item_id": name, "frame": 5 * k, "pts": 0.2 * k, "locator": "none", "locator_hash": ""}
                             | place | {"data": encode_crop(picture, "png")})  # fmt: skip
            item = {"item_id": name, "status": "ok", "reason": "", "frames": 2, "faces": len(found), "decoder": "",
                    "seconds": 0.0}  # fmt: skip
            writer.add((name, ""), item, found, "png")
        writer.finish()
    collate(folder, 1)
    (folder / "settings.json").write_text(json.dumps(SETTINGS | {"fps": 0.0}))
    return read_index(folder)


def write_maps(folder: Path, crops: Path, maps: np.ndarray, failed=(), extractor="abcdef012345", precision="float32"):
    """Keep maps float32[N,4,l,l] as the LaRE maps of all crops, but for the rows numbered in `failed`."""
    rows, store = [], CropStore(crops)
    for i, row in enumerate(read_index(crops).to_dict("records")):
        ok = i not in failed
        rows.append({
            "item_id": row["item_id"], "frame": row["frame"], "pts": row["pts"], "source": "",
            "status": "ok" if ok else "failed", "reason": "" if ok else "the map is not finite",
            "sha256": content_hash(store.image(row)), "precision": precision, "position": i if ok else -1,
        })  # fmt: skip
    lare_maps.write_shard(folder, extractor, maps, rows)
    kept = lare_maps.kept(folder, extractor)
    lare_maps.write_index(folder, [row for part in kept.values() for row in part])
    return folder
