"""Scores of detectors on a CLIP for crops at hand: of trained ones, of LaRE's error alone, and of perturbed crops."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from unmask import lare
from unmask.clip_training import Faces, FrozenInputs, LiveInputs, cached, judged
from unmask.clip_views import FIXED, Views
from unmask.data.crops import CropStore, read_index
from unmask.detectors import base
from unmask.detectors.clip_backbone import ClipBackbone
from unmask.perturbations import perturbed_crops


@torch.no_grad()
def score(checkpoint: str | os.PathLike, faces: Faces, rows: pd.DataFrame, variant: str = "") -> pd.DataFrame:
    """Score table of index rows by a trained detector, from cached features where its CLIP is frozen.

    A row per frame, and one per item (frame -1) with the mean over its frames. variant: as in the contract of scores.
    """
    detector, card = base.load_checkpoint(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector.to(device)
    if "lare" in detector.extras:
        lare.lare_maps.require(faces.lare, detector.config["lare"])
    rows = rows.sort_values(["item_id", "frame"], ignore_index=True)
    if detector.tuned():
        inputs = LiveInputs(Views(CropStore(faces.crops), rows, detector.input_spec.size, 0), device)
    else:
        inputs = FrozenInputs(detector, cached(detector, faces, rows, 0, 0), device)
    found = np.concatenate([torch.sigmoid(part.double()).cpu().numpy() for part in judged(detector, inputs, len(rows))])
    run = {"detector": detector.name, "variant": variant, "seed": card["seed"], "checkpoint": card["sha256"][:12]}
    return _table(rows, found, run)


def lare_error(faces: Faces, rows: pd.DataFrame) -> pd.DataFrame:
    """Score table of LaRE's error alone, exp(-mean error over the face): what the model guesses well, it may have made.

    The orientation is LaRE's hypothesis (Luo et al., CVPR 2024, section 3) and not fitted to anything.
    """
    rows = rows.sort_values(["item_id", "frame"], ignore_index=True)
    views = Views(CropStore(faces.crops), rows, 96, 0, faces.lare)  # of the pictures only the cut counts
    found = np.array([np.exp(-views[FIXED, i, 0]["lare"].mean().item()) for i in range(len(rows))])
    extractor = lare.lare_maps.read_settings(faces.lare)["extractor"]
    return _table(rows, found, {"detector": "lare-error", "variant": "", "seed": 0, "checkpoint": extractor})


@torch.no_grad()
def pooled(backbone: ClipBackbone, faces: Faces, rows: pd.DataFrame) -> np.ndarray:
    """Pooled features float32[N,dim] of the evaluation views of index rows, in their order."""
    views, where = Views(CropStore(faces.crops), rows, backbone.input_size, 0), next(backbone.parameters()).device
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    found = []
    for start in range(0, len(rows), 64):
        images = [views[FIXED, i, 0]["image"] for i in range(start, min(start + 64, len(rows)))]
        pixels = (torch.stack(images).movedim(-1, 1) / 255 - mean) / std
        found.append(backbone.pooled(pixels.to(where)).cpu())
    return torch.cat(found).numpy()


def _table(rows: pd.DataFrame, found: np.ndarray, run: Mapping) -> pd.DataFrame:
    frames = rows[["item_id", "frame"]].assign(score=found)
    means = frames.groupby("item_id", as_index=False)["score"].mean().assign(frame=-1)
    table = pd.concat([frames, means], ignore_index=True).assign(**run)
    return table.astype({"seed": "int32", "frame": "int32"})[["item_id", "frame", "score", *run]]


def robustness(
    checkpoints: Iterable[str | os.PathLike],
    faces: Faces,
    rows: pd.DataFrame,
    kinds: Iterable[str],
    out: str | os.PathLike,
    settings: lare.Settings,
) -> pd.DataFrame:
    """Score table of index rows, whose `variant` tells how their pictures were perturbed ("none": not at all).

    LaRE maps are those of the perturbed pictures. kinds: of `perturbations.KINDS`; `out` keeps crops and maps.
    """
    tables = [score(checkpoint, faces, rows, "none") for checkpoint in checkpoints]
    for kind in kinds:
        folder = Path(out) / kind
        crops = perturbed_crops(faces.crops, rows, folder / "crops", kind)
        changed = replace(faces, crops=crops, lare=folder / "lare")
        lare.extract(faces.manifest, changed.lare, settings, crops, batch=16)
        tables += [score(checkpoint, changed, read_index(crops), kind) for checkpoint in checkpoints]
    return pd.concat(tables, ignore_index=True)
