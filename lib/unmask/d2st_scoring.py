"""Scores of clips and of their single frames by one detector, and how far apart its judgements of the two are.

A detector with adapters looks at the same frames in several ways (`LOOKS`), so that what time adds can be told from
what more frames add.
"""

import os
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from unmask import prefixes, sbi
from unmask.clip_bank import Clips
from unmask.clip_training import Faces
from unmask.d2st_fitting import FRAMES_AT_ONCE
from unmask.d2st_plan import groups
from unmask.data.crops import CropStore
from unmask.detectors import base
from unmask.detectors.clip_d2st import AdaptedClip
from unmask.features import arranged
from unmask.metrics import balanced_threshold, calibration_error
from unmask.prefixes import Prefixes

LOOKS = {
    "image": "the middle frame alone",
    "frames": "the mean over the frames, each judged alone",
    "clip": "all frames together, in order",
    "shuffled": "all frames together, in a random order",
    "frozen": "the middle frame in place of all",
}
COLUMNS = ["item_id", "frame", "score", "detector", "variant", "seed", "checkpoint"]


Part = tuple[Faces, pd.DataFrame, Sequence[str]]
"""Where faces are, index rows of the media to score, and the looks at them."""


def score(
    checkpoint: str | os.PathLike, faces: Faces, rows: pd.DataFrame, looks: Sequence[str] = ("image", "frames", "clip")
) -> pd.DataFrame:
    """Score table of the media of index rows by a detector with adapters; frame is -1, `variant` tells the look.

    Of each medium the detector's number of frames is taken from its middle; an image gives the same in every look.
    KeyError for an unknown look.
    """
    return score_parts(checkpoint, [(faces, rows, looks)])[0]


@torch.no_grad()
def score_parts(checkpoint: str | os.PathLike, parts: Sequence[Part]) -> list[pd.DataFrame]:
    """`score` of several parts by one detector, which is loaded once."""
    detector, card = base.load_checkpoint(checkpoint)
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    run = {"detector": detector.name, "seed": np.int32(card["seed"]), "checkpoint": card["sha256"][:12]}
    tables = []
    for faces, rows, looks in parts:
        if unknown := set(looks) - set(LOOKS):
            raise KeyError(f"there is no look {sorted(unknown)[0]!r}; known are {', '.join(LOOKS)}")
        cached = _cached(detector, faces, rows, 0)
        found = np.empty((len(cached.table), len(looks)))
        lengths = cached.table["frames"].to_numpy()
        for batch in groups([(i, -1) for i in cached.table.index], lengths, FRAMES_AT_ONCE):
            numbers = [i for i, _ in batch]
            found[numbers] = _looked_at(detector, cached, numbers, looks)
        items = cached.table["item_id"].repeat(len(looks)).to_numpy()
        table = pd.DataFrame({"item_id": items, "frame": np.int32(-1), "score": found.ravel()})
        tables.append(table.assign(variant=[*looks] * len(found), **run)[COLUMNS].astype({"seed": "int32"}))
    return tables


def warm(detector: AdaptedClip, parts: Sequence[Part], workers: int) -> None:
    """Compute what `score_parts` will find in the cache, for all detectors on this CLIP with as many adapters."""
    for faces, rows, _ in parts:
        _cached(detector, faces, rows, workers)


def _cached(detector: AdaptedClip, faces: Faces, rows: pd.DataFrame, workers: int) -> Prefixes:
    spec = detector.input_spec
    clips = Clips(CropStore(faces.crops), rows.assign(label=0), spec.size, spec.frames, versions=0)
    return prefixes.of_clips(detector, clips, faces.features, workers)


def _looked_at(detector: AdaptedClip, cached: Prefixes, numbers: list[int], looks: Sequence[str]) -> np.ndarray:
    """P(fake) float64[B,looks] of clips of one length."""
    tokens = cached.tokens(numbers).to(next(detector.parameters()).device)
    count, items = tokens.shape[1], cached.table["item_id"]
    found = []
    for look in looks:
        if look == "image":
            clips, alone = tokens[:, count // 2][:, None], True
        elif look in ("frames", "clip"):
            clips, alone = tokens, look == "frames"
        else:
            orders = [arranged(np.arange(count), look, sbi.sample_rng(0, items[i], 0, 0)) for i in numbers]
            at = torch.from_numpy(np.stack(orders)).to(tokens.device)
            clips, alone = tokens[torch.arange(len(numbers), device=tokens.device)[:, None], at], False
        b, t = clips.shape[:2]
        pooled = detector.embed(clips.flatten(0, 1), [(b * t, 1) if alone else (b, t)]).unflatten(0, (b, t))
        features = pooled if alone else pooled.mean(1, keepdim=True)
        logits = detector.head(features.flatten(0, 1)).double().unflatten(0, features.shape[:2])
        found.append(torch.sigmoid(logits).mean((1, 2)).cpu().numpy())
    return np.stack(found, 1)


def agreement(val: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    """How well one threshold serves images and clips: a row per seed and modality, "image" and "clip".

    val, test: scores with `label`, `variant` (of these two) and `seed`, of media that were looked at both ways.
    threshold: the best balanced one on validation, as a logit; gap: its distance to the other modality's; relative_gap:
    that, in standard deviations of the validation logits, which a network that only says less loudly does not shrink;
    ece: expected calibration error on test; own, other: balanced accuracy there at the own threshold, at the other's.
    """
    rows = []
    for seed, part in val.groupby("seed"):
        own = {look: balanced_threshold(p["label"], p["score"]) for look, p in part.groupby("variant")}
        gap = abs(_logit(own["image"]) - _logit(own["clip"]))
        spread = part["score"].map(_logit).std()
        for look, other in (("image", "clip"), ("clip", "image")):
            judged = test[(test["seed"] == seed) & (test["variant"] == look)]
            accuracy = [_balanced_accuracy(judged, own[kind]) for kind in (look, other)]
            ece = calibration_error(judged["label"].to_numpy(), judged["score"].to_numpy())
            about = {
                "seed": seed,
                "modality": look,
                "threshold": _logit(own[look]),
                "gap": gap,
                "relative_gap": gap / spread,
                "ece": ece,
            }
            rows.append(about | dict(zip(("own", "other"), accuracy, strict=True)))
    return pd.DataFrame(rows)


def _logit(p: float) -> float:
    p = min(max(p, 1e-6), 1 - 1e-6)
    return float(np.log(p / (1 - p)))


def _balanced_accuracy(scores: pd.DataFrame, threshold: float) -> float:
    """NaN where validation lacks a class, and so has no threshold."""
    if np.isnan(threshold):
        return float("nan")
    hits = (scores["score"] >= threshold) == (scores["label"] == 1)
    return float(np.mean([hits[scores["label"] == label].mean() for label in (0, 1)]))
