"""A binary classifier on cleaned pseudo-labels: starts from the contrastive weights, drops what looks mislabelled.

Networks learn right labels before wrong ones, so after every epoch two Gaussians are fitted to the items' mean losses
and the items of the upper one drop out of the next epoch (Li, Socher and Hoi, "DivideMix", ICLR 2020, section 3.1;
here with one network). The frames of an item keep its pseudo-label; no true label enters.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture

from unmask import learning
from unmask.contrastive import data_key, own_source
from unmask.data.crops import CropStore
from unmask.detectors import base
from unmask.learning import LoopOptions, Run
from unmask.profile import digest, source_hash
from unmask.training import TrainingError, own_randomness

# Mean cross-entropy above which the network has not learned enough for its losses to tell wrong labels from hard videos
# (ln 2 = 0.69 is guessing).
UNDECIDED = 0.6


@dataclass(frozen=True)
class Options(LoopOptions):
    """min_confidence: items below it are not learned from, see `clean`."""

    min_confidence: float = 0.5


def clean(labels: pd.DataFrame, min_confidence: float) -> pd.DataFrame:
    """The rows of a table item_id, label, confidence (0..1) whose confidence is at least `min_confidence`."""
    return labels[labels["confidence"] >= min_confidence].reset_index(drop=True)


def small_loss(losses: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Which items stay, bool[N]: P(clean) >= 0.5 under two Gaussians fitted to losses float[N], labels int[N] 0 or 1.

    P(clean) is that of the Gaussian with the smaller mean. Of either label at least half stays, those of least loss.
    """
    spread = np.ptp(losses)
    if len(losses) < 2 or spread < 1e-9:
        return np.ones(len(losses), bool)
    scaled = ((losses - losses.min()) / spread)[:, None]
    mixture = GaussianMixture(2, reg_covar=5e-4, n_init=3, random_state=seed).fit(scaled)
    low = mixture.means_.ravel().argmin()
    # A wide upper Gaussian can claim the smallest losses too; they are no sign of a wrong label.
    stays = (mixture.predict_proba(scaled)[:, low] >= 0.5) | (scaled[:, 0] <= mixture.means_[low, 0])
    for label in (0, 1):
        own = np.flatnonzero(labels == label)
        stays[own[np.argsort(losses[own], kind="stable")[: -(-len(own) // 2)]]] = True
    return stays


class CrossEntropy:
    """The objective: the pseudo-label of every view, from items whose loss is small."""

    def __init__(self, labels: np.ndarray):
        self.labels = labels  # of all frames to learn from: an item that dropped out may come back

    def loss(self, run: Run, views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = run.detector(views.flatten(0, 1).unsqueeze(1))
        return F.binary_cross_entropy_with_logits(logits.float(), labels.repeat_interleave(views.shape[1]).float())

    def validate(self, run: Run) -> float:
        """Mean cross-entropy of the items, either label counting as much as the other."""
        items = _item_losses(run, run.val, run.rows["label"].to_numpy()[run.val])
        return float(items.groupby("label")["loss"].mean().mean())

    def review(self, run: Run, epoch: int) -> dict:
        items = _item_losses(run, run.train, self.labels)
        if items["loss"].mean() > UNDECIDED:
            run.labels = self.labels.copy()
            return {"items": len(items), "items_kept": len(items)}
        stays = small_loss(items["loss"].to_numpy(), items["label"].to_numpy(), run.options.seed)
        names = run.rows["item_id"].to_numpy()[run.train]
        run.labels = np.where(np.isin(names, items.index[stays]), self.labels, -1)
        return {"items": len(items), "items_kept": int(stays.sum())}


def _item_losses(run: Run, rows: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Mean cross-entropy of the fixed views of every item: columns label and loss, index item_id."""
    logits = torch.cat(run.each(rows, lambda views: run.detector(views.unsqueeze(1)))).double().cpu()
    losses = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels).double(), reduction="none")
    frames = pd.DataFrame({"item_id": run.rows["item_id"].to_numpy()[rows], "label": labels, "loss": losses.numpy()})
    return frames.groupby("item_id").mean()


def fit(
    stage2: str | os.PathLike,
    labels: pd.DataFrame,
    val_labels: pd.DataFrame,
    index: pd.DataFrame,
    store: CropStore,
    out: str | os.PathLike,
    options: Options,
) -> Path:
    """Train all weights of the checkpoint `stage2` (see `contrastive.learn`) to tell the labels; returns `out`.

    labels, val_labels: item_id, label (0, 1 = taken for a fake), confidence; both are cleaned first, and val_labels
    choose the epoch. `out` gets a checkpoint of the same detector, whose history says how many items every split
    kept. Resumed and skipped as `learn` is. Raises TrainingError and CheckpointError.
    """
    out = Path(out)
    rows, val_rows = (
        learning.labelled_rows(index, clean(part, options.min_confidence)) for part in (labels, val_labels)
    )
    source = [own_source(), source_hash(sys.modules[__name__])]
    started = base.read_checkpoint(stage2)[1]
    if started["detector"] != "embedding":
        raise TrainingError(f"{stage2} holds the detector {started['detector']}; contrastive learning leaves another.")
    key = digest([started["sha256"], options.settings(), *data_key(rows, val_rows), *source])
    if learning.finished(out, key):
        return out
    with own_randomness(options.seed):
        run = Run(base.load_checkpoint(stage2)[0], rows, val_rows, store, options)
        history = learning.fit(run, CrossEntropy(run.labels.copy()), out, key)
        run.detector.load_state_dict(learning.best(out))
        return learning.save(run, out, key, history)
