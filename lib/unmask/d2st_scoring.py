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
from unmask.data.crops import CropStore
from unmask.detectors import base
from unmask.detectors.clip_d2st import AdaptedClip
from unmask.evaluation import balanced_threshold, calibration_error
from unmask.features import arranged
from unmask.prefixes import Prefixes

LOOKS = {
    "image": "the middle frame alone",
    "frames": "the mean over the frames, each judged alone",
    "clip": "all frames together, in order",
    "shuffled": "all frames together, in a random order",
    "frozen": "the middle frame in place of all",
}


@torch.no_grad()
def score(
    checkpoint: str | os.PathLike,
    faces: Faces,
    rows: pd.DataFrame,
    looks: tuple[str, ...] = ("image", "frames", "clip"),
    workers: int = 0,
) -> pd.DataFrame:
    """Score table of the media of index rows by a detector with adapters; frame is -1, `variant` tells the look.

    Of each medium the detector's number of frames is taken from its middle; an image gives the same in every look.
    workers: processes that compute what is not in the cache `faces.features`. KeyError for an unknown look.
    """
    if unknown := set(looks) - set(LOOKS):
        raise KeyError(f"there is no look {sorted(unknown)[0]!r}; known are {', '.join(LOOKS)}")
    detector, card = base.load_checkpoint(checkpoint)
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    cached = _cached(detector, faces, rows, workers)
    found = [row for i in cached.table.index for row in _looks(detector, cached, i, looks)]
    table = pd.DataFrame(found, columns=["item_id", "score", "variant"]).assign(
        frame=-1, detector=detector.name, seed=card["seed"], checkpoint=card["sha256"][:12]
    )
    columns = ["item_id", "frame", "score", "detector", "variant", "seed", "checkpoint"]
    return table.astype({"frame": "int32", "seed": "int32"})[columns]


def warm(tasks: Sequence[tuple], workers: int) -> None:
    """Compute what `score` of these arguments (checkpoint, faces, rows, ...) will find in the cache."""
    done = set()
    for checkpoint, faces, rows, *_ in tasks:
        detector = base.load_checkpoint(checkpoint)[0]
        key = detector.depth_key, faces, id(rows)
        if key not in done:
            _cached(detector, faces, rows, workers)
            done.add(key)


def _cached(detector: AdaptedClip, faces: Faces, rows: pd.DataFrame, workers: int) -> Prefixes:
    spec = detector.input_spec
    clips = Clips(CropStore(faces.crops), rows.assign(label=0), spec.size, spec.frames, versions=0)
    return prefixes.of_clips(detector, clips, faces.features, workers)


def _looks(detector: AdaptedClip, cached: Prefixes, i: int, looks: tuple[str, ...]) -> list[tuple[str, float, str]]:
    """One clip in several looks: item, P(fake), look."""
    item, count = cached.table.at[i, "item_id"], int(cached.table.at[i, "frames"])
    tokens = cached.tokens([i])[0].to(next(detector.parameters()).device)

    def judged(frames: torch.Tensor, together: bool) -> float:
        shape = (1, len(frames)) if together else (len(frames), 1)
        pooled = detector.embed(frames, [shape])
        features = pooled.mean(0, keepdim=True) if together else pooled
        return float(torch.sigmoid(detector.head(features).double()).mean())

    found = []
    for look in looks:
        if look in ("image", "frames"):
            frames = tokens[count // 2 : count // 2 + 1] if look == "image" else tokens
            found.append((item, judged(frames, together=False), look))
        else:
            order = {"clip": "in order"}.get(look, look)
            where = arranged(np.arange(count), order, sbi.sample_rng(0, item, 0, 0))
            found.append((item, judged(tokens[torch.from_numpy(where)], together=True), look))
    return found


def agreement(val: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    """How well one threshold serves images and clips: a row per seed and modality, "image" and "clip".

    val, test: scores with `label`, `variant` (of these two) and `seed`, of media that were looked at both ways.
    threshold: the best balanced one on validation, as a logit; gap: its distance to the other modality's; ece: expected
    calibration error on test; own, other: balanced accuracy on test at the own threshold and at the other's.
    """
    rows = []
    for seed, part in val.groupby("seed"):
        own = {look: balanced_threshold(p["label"], p["score"]) for look, p in part.groupby("variant")}
        gap = abs(_logit(own["image"]) - _logit(own["clip"]))
        for look, other in (("image", "clip"), ("clip", "image")):
            judged = test[(test["seed"] == seed) & (test["variant"] == look)]
            accuracy = [_balanced_accuracy(judged, own[kind]) for kind in (look, other)]
            ece = calibration_error(judged["label"].to_numpy(), judged["score"].to_numpy())
            about = {"seed": seed, "modality": look, "threshold": _logit(own[look]), "gap": gap, "ece": ece}
            rows.append(about | dict(zip(("own", "other"), accuracy, strict=True)))
    return pd.DataFrame(rows)


def _logit(p: float) -> float:
    p = min(max(p, 1e-6), 1 - 1e-6)
    return float(np.log(p / (1 - p)))


def _balanced_accuracy(scores: pd.DataFrame, threshold: float) -> float:
    hits = (scores["score"] >= threshold) == (scores["label"] == 1)
    return float(np.mean([hits[scores["label"] == label].mean() for label in (0, 1)]))
