"""A linear model of the measured traces of one video: logistic regression that can be kept as JSON and read."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from unmask.detectors.base import CheckpointError
from unmask.profile import write_json
from unmask.pseudo_labels import CLIP, robust_scale


@dataclass(frozen=True)
class TraceModel:
    """Columns `names`; each is centred by `median`, divided by `spread`, clipped, and weighed by `weight`."""

    names: tuple[str, ...]
    median: np.ndarray
    spread: np.ndarray
    weight: np.ndarray
    bias: float

    @classmethod
    def fit(cls, features: pd.DataFrame, labels: np.ndarray, names: Sequence[str]) -> "TraceModel":
        """Fit to float[N,D] and labels int[N] (1 = taken for a fake), either label counting as much as the other."""
        median, spread = np.array([robust_scale(features[name]) for name in names]).T
        scaled = _scaled(features[list(names)].to_numpy(float), median, spread)
        model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000).fit(scaled, labels)
        return cls(tuple(names), median, spread, model.coef_[0], float(model.intercept_[0]))

    def logits(self, features: pd.DataFrame) -> np.ndarray:
        """Log odds float64[N] of "fake"; a measurement that is missing says nothing."""
        return _scaled(features[list(self.names)].to_numpy(float), self.median, self.spread) @ self.weight + self.bias

    def save(self, path: str | os.PathLike) -> None:
        """Write the model as JSON, atomically."""
        write_json(path, vars(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TraceModel":
        """Read what `save` wrote. Raises CheckpointError if it is missing or damaged."""
        try:
            kept = json.loads(Path(path).read_text(encoding="utf-8"))
            arrays = {key: np.asarray(kept[key], float) for key in ("median", "spread", "weight")}
            if any(values.shape != (len(kept["names"]),) for values in arrays.values()):
                raise ValueError("Its parts do not fit each other.")
            return cls(tuple(kept["names"]), **arrays, bias=float(kept["bias"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a model of traces; run stage 3 again.") from error


def _scaled(values: np.ndarray, median: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.clip((values - median) / spread, -CLIP, CLIP))
