"""What the cameras of a collection say of one more video: which of them filmed it, and whether they filmed its face."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load, save

from unmask.clustering import SIGNIFICANT, UNATTRIBUTED
from unmask.detectors.base import CheckpointError
from unmask.fingerprints import read_patterns
from unmask.profile import write_atomic, write_json
from unmask.pseudo_labels import CLIP, CUE, FEWEST, masked_ncc, robust_scale, two_halves_model

SAYING = 4.6  # log odds, 99 to 1: as much as either view of stage 1 may say, so that one witness cannot silence all
WEIGHTS, CARD = "cameras.safetensors", "cameras.json"


@dataclass(frozen=True)
class CameraEvidence:
    """Fingerprints float32[H,W] by camera number, with each one's frame size (`bucket`), and the median and spread of
    CUE over its videos, as `standardise` has them: together for cameras of few videos, absent where no CUE is known.
    `slope` and `intercept` turn the standardised cue into log odds of "fake"."""

    patterns: dict[int, np.ndarray]
    bucket: dict[int, str]
    median: dict[int, float]
    spread: dict[int, float]
    slope: float
    intercept: float

    @classmethod
    def fit(cls, fingerprints: str | os.PathLike, rows: pd.DataFrame, cue: pd.Series, seed: int) -> "CameraEvidence":
        """From the videos to learn from: rows of `unmask.unsupervised.videos` and their CUE, no label."""
        patterns, buckets = {}, {}
        known = rows[rows["cluster"] != UNATTRIBUTED]
        for (bucket, camera), part in known.groupby(["bucket", "cluster"], sort=True):
            background, keep = read_patterns(fingerprints, part, "background")
            face, _ = read_patterns(fingerprints, part, "face")
            patterns[int(camera)] = np.where(keep, background, face).mean(0)
            buckets[int(camera)] = bucket
        values = cue.loc[known.index]
        sizes = known["cluster"].map(known["cluster"].value_counts())
        groups = known["cluster"].where(sizes >= FEWEST, UNATTRIBUTED)
        scale = {group: robust_scale(own) for group, own in values.groupby(groups) if own.notna().any()}
        group_of = dict(zip(known["cluster"], groups, strict=True))
        median, spread = ({int(c): scale[g][i] for c, g in group_of.items() if g in scale} for i in (0, 1))
        scaled = (values - known["cluster"].map(median)) / known["cluster"].map(spread)
        slope, intercept = two_halves_model(-scaled.clip(-CLIP, CLIP).dropna().to_numpy(), seed)
        return cls(patterns, buckets, median, spread, -slope, intercept)

    def judge(self, bucket: str, regions: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[int, float, float]:
        """Camera (-1 = none of these), CUE, and log odds of "fake" (0 without a camera or a face) of one video.

        regions: for "background" and "face" the fingerprint float[H,W] and its pixels bool[H,W].
        """
        best, found = SIGNIFICANT, UNATTRIBUTED
        for camera, pattern in self.patterns.items():
            if self.bucket[camera] == bucket and pattern.shape == regions["background"][0].shape:
                ncc, pixels = masked_ncc(regions["background"][0], pattern, regions["background"][1])
                if ncc * np.sqrt(pixels) > best:
                    best, found = ncc * np.sqrt(pixels), camera
        if found == UNATTRIBUTED:
            return found, float("nan"), 0.0
        cue, pixels = masked_ncc(regions["face"][0], self.patterns[found], regions["face"][1])
        if not pixels or found not in self.median:
            return found, float("nan"), 0.0
        scaled = np.clip((cue - self.median[found]) / self.spread[found], -CLIP, CLIP)
        return found, cue, float(np.clip(self.slope * scaled + self.intercept, -SAYING, SAYING))

    def logits(self, features: pd.DataFrame) -> pd.Series:
        """Log odds of "fake" of videos whose `cluster` and CUE were measured already; 0 where either is missing."""
        scale = features["cluster"].map(self.median), features["cluster"].map(self.spread)
        scaled = ((features[CUE] - scale[0]) / scale[1]).clip(-CLIP, CLIP)
        return (self.slope * scaled + self.intercept).clip(-SAYING, SAYING).fillna(0.0)

    def table(self, fingerprints: str | os.PathLike, rows: pd.DataFrame) -> pd.DataFrame:
        """`judge` for rows of `unmask.fingerprints.extract`, each by itself: camera, cue, logit; index item_id."""
        found = {}
        for _, row in rows[rows["status"] == "ok"].iterrows():
            one = row.to_frame().T
            regions = {
                name: tuple(x[0] for x in read_patterns(fingerprints, one, name)) for name in ("background", "face")
            }
            found[row["item_id"]] = self.judge(row["bucket"], regions)
        return pd.DataFrame.from_dict(found, "index", columns=["camera", CUE, "logit"])

    def save(self, folder: str | os.PathLike) -> None:
        """Write WEIGHTS and CARD into the folder, atomically."""
        write_atomic(Path(folder) / WEIGHTS, save({str(k): v.astype(np.float16) for k, v in self.patterns.items()}))
        numbers = {key: value for key, value in vars(self).items() if key != "patterns"}
        write_json(Path(folder) / CARD, numbers)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "CameraEvidence":
        """Read what `save` wrote. Raises CheckpointError if it is missing or damaged."""
        try:
            kept = json.loads((Path(folder) / CARD).read_text(encoding="utf-8"))
            patterns = {int(k): v.astype(np.float32) for k, v in load((Path(folder) / WEIGHTS).read_bytes()).items()}
            named = {key: {int(k): v for k, v in kept[key].items()} for key in ("bucket", "median", "spread")}
            if patterns.keys() != named["bucket"].keys():
                raise ValueError("The fingerprints are of other cameras.")
            return cls(patterns, **named, slope=float(kept["slope"]), intercept=float(kept["intercept"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} has no fingerprints of cameras; run stage 1 again.") from error
