"""The loop in which a network learns from pseudo-labels; what it learns for is an `Objective`.

No true label enters: the tables passed in say which item is taken for a fake, and the checkpoint is the epoch with
the lowest loss on other pseudo-labelled items. Killed at any point, a run goes on from the last whole epoch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from unmask.data.crops import CropStore
from unmask.detectors import base
from unmask.detectors.embedding import Embedding
from unmask.profile import digest
from unmask.progress import track
from unmask.training import STATE, TrainingError, precision, save_state, schedule
from unmask.views import Loader, Views, balanced_plan, fixed_plan

DIVERGED = "The loss is no longer a number; lower the learning rate (lr)."


@dataclass(frozen=True)
class LoopOptions:
    """batch and frames_per_clip count frames; warmup is a fraction of the steps; loaders changes speed only."""

    seed: int
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    warmup: float
    frames_per_clip: int
    loaders: int = 0

    def settings(self) -> dict:
        """All that changes the result."""
        return {name: value for name, value in vars(self).items() if name != "loaders"}


def labelled_rows(index: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Crop index rows of the labelled items with a column `label`, by item and frame. Items without crops are left out.

    Raises TrainingError for a label that is neither 0 nor 1 or an item that is labelled twice.
    """
    if not labels["label"].isin([0, 1]).all() or labels["item_id"].duplicated().any():
        raise TrainingError("Pseudo-labels are 0 (real) or 1 (fake), one row per item.")
    kept = labels[["item_id", "label"]].astype({"item_id": index["item_id"].dtype, "label": "int64"})
    return index.merge(kept, on="item_id").sort_values(["item_id", "frame"], ignore_index=True)


class Run:
    """A network, the frames it learns from, and those by which its checkpoint is chosen.

    rows: the frames of both, those to learn from first. labels: int64 of the frames to learn from, changed as the run
    goes on: 0, 1, or -1 for a frame that is left out.
    """

    def __init__(self, detector: Embedding, train: pd.DataFrame, val: pd.DataFrame, store: CropStore, options):
        if train["label"].nunique() < 2:
            raise TrainingError("The pseudo-labels are all alike, or have no crops: there is nothing to tell apart.")
        if set(train["item_id"]) & set(val["item_id"]):
            raise TrainingError("Some items are to learn from and to choose the checkpoint by; give each to one.")
        self.accelerator = Accelerator(mixed_precision=precision())
        self.detector = detector.to(self.accelerator.device, memory_format=torch.channels_last)
        self.rows, self.store, self.options = pd.concat([train, val], ignore_index=True), store, options
        self.labels = train["label"].to_numpy().copy()
        self.train, self.val = np.arange(len(train)), np.arange(len(train), len(self.rows))
        views = Views(store, self.rows, detector.input_spec.size, options.seed)
        self._batches = Loader(views, options.loaders)

    def batches(self, plan):
        """Normalised views float32[B,V,3,H,W] of a plan, on the device."""
        for images in self._batches(plan):
            yield self.detector.prepare(images.to(self.accelerator.device, non_blocking=True))

    @torch.no_grad()
    def each(self, rows: np.ndarray, function, batch: int = 256) -> list[torch.Tensor]:
        """`function` of the fixed views float32[B,3,H,W] of rows, batch by batch; its results on the device."""
        self.detector.eval()
        return [function(images[:, 0]) for images in self.batches(fixed_plan(rows, batch))]

    def embed(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Representation float32[N,D] and unit vectors float32[N,P] of the fixed views of rows."""
        found = zip(*self.each(rows, self.detector.embed), strict=True)
        features, units = (torch.cat(part).float().cpu().numpy() for part in found)
        if not np.isfinite(units).all():
            raise TrainingError(DIVERGED)
        return features, units


class Objective(Protocol):
    """What a run learns for."""

    def loss(self, run: Run, views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scalar to minimise, for views float32[B,V,3,H,W] of frames with labels int64[B]."""

    def validate(self, run: Run) -> float:
        """The same on the fixed views of the frames to choose by."""

    def review(self, run: Run, epoch: int) -> dict:
        """Called after an epoch that another follows; may change `run.labels`. What it did, for the history."""


def fit(run: Run, objective: Objective, out: Path, key: str) -> list[dict]:
    """Train, leaving `run.detector` with the weights of the last epoch and STATE in `out`; returns the history.

    The weights of the chosen epoch are `best(out)`: lowest val_loss, or the last epoch where there is none.
    """
    options, detector = run.options, run.detector
    optimizer = torch.optim.AdamW(detector.trainable_parameters(), lr=options.lr, weight_decay=options.weight_decay)
    parts = {"detector": detector, "optimizer": optimizer}
    history, chosen = _resume(out / STATE, parts, run, key)
    for epoch in track(range(len(history), options.epochs), label=f"training {out.name}, epochs"):
        # Seeded by epoch, not once: a resumed run then draws the same noise.
        torch.manual_seed(int(digest([options.seed, epoch]), 16))
        kept = int((run.labels >= 0).sum())
        entry = {"epoch": epoch, "loss": _epoch(run, objective, optimizer, epoch), "val_loss": None, "kept": kept}
        if len(run.val):
            entry["val_loss"] = objective.validate(run)
            if not np.isfinite(entry["val_loss"]):
                raise TrainingError(DIVERGED)
        if epoch + 1 < options.epochs:
            entry |= objective.review(run, epoch)
        history.append(entry)
        if _best_epoch(history) == epoch:
            chosen = {name: value.detach().cpu().clone() for name, value in detector.state_dict().items()}
        state = {"key": key, "history": history, "best": chosen, "labels": torch.from_numpy(run.labels)}
        save_state(out / STATE, state | {name: part.state_dict() for name, part in parts.items()})
    return history


def best(out: Path) -> dict[str, torch.Tensor]:
    """The weights of the chosen epoch of a run that `fit` has finished."""
    return torch.load(out / STATE, weights_only=True, map_location="cpu")["best"]


def _best_epoch(history: list[dict]) -> int:
    """The epoch with the lowest validation loss, the first of equals; without validation the last."""
    losses = [entry["val_loss"] for entry in history]
    return len(losses) - 1 if losses[-1] is None else int(np.argmin(losses))


def _resume(path: Path, parts: dict, run: Run, key: str) -> tuple[list[dict], dict]:
    """Load the state of an interrupted run with the same key; otherwise start from nothing."""
    if not path.exists():
        return [], {}
    state = torch.load(path, weights_only=True, map_location="cpu")
    if state["key"] != key:
        return [], {}
    for name, part in parts.items():
        part.load_state_dict(state[name])
    run.labels = state["labels"].numpy()
    return state["history"], state["best"]


def _epoch(run: Run, objective: Objective, optimizer: torch.optim.Optimizer, epoch: int) -> float:
    """One pass; returns the mean loss of the steps."""
    options, accelerator = run.options, run.accelerator
    items = run.rows["item_id"].to_numpy()[run.train]
    plan = balanced_plan(items, run.labels, options.batch, options.frames_per_clip, options.seed, epoch)
    run.detector.train()
    losses = []
    for step, views in enumerate(run.batches(plan)):
        # The number of steps changes with the frames that are kept, so progress counts in this epoch's own.
        rate = schedule(epoch * len(plan) + step, options.epochs * len(plan), options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        labels = torch.from_numpy(run.labels[[i for _, i, _ in plan[step]]])
        with accelerator.autocast():
            loss = objective.loss(run, views, labels.to(accelerator.device, non_blocking=True))
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(run.detector.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.detach())  # not .item(): one wait for the device an epoch, not one a step
    mean = float(torch.stack(losses).double().mean())
    if not np.isfinite(mean):
        raise TrainingError(DIVERGED)
    return mean


def finished(out: Path, key: str) -> bool:
    """Whether `out` holds the checkpoint of a run with this key."""
    try:
        return json.loads((out / base.CONFIG).read_text(encoding="utf-8")).get("training_key") == key
    except FileNotFoundError:
        return False


def save(run: Run, out: Path, key: str, history: list[dict], **card) -> Path:
    """Write `run.detector` with its card as a checkpoint, and remove the state of the run."""
    base.save_checkpoint(
        run.detector,
        out,
        training_key=key,
        seed=run.options.seed,
        options=run.options.settings(),
        history=history,
        preprocessing=run.store.settings(),
        **card,
    )
    (out / STATE).unlink()
    return out
