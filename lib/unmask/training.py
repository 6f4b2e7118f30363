"""Train a detector on real faces and their self-blends: a short visible loop on Hugging Face Accelerate.

Only the crops of real media of the train split are read (labels choose the reals, no fake is ever opened), the checkpoint
is chosen on self-blends of the real validation faces, and no step sees the test split.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from unmask import sbi
from unmask.data.crops import CropStore
from unmask.data.manifest import manifest_hash
from unmask.detectors import base
from unmask.profile import digest, write_atomic
from unmask.progress import track

STATE = "last.pt"


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says what to change."""


@dataclass(frozen=True)
class Options:
    """The profile's `train` and `sbi` keys, with the seed. `shuffle` trains the shuffled-label control."""

    seed: int
    epochs: int
    batch: int
    frames_per_clip: int
    lr: float
    weight_decay: float
    warmup: float
    ema: float
    patience: int
    boundary: float
    recipe: str
    workers: int = 0
    shuffle: bool = False

    def key(self) -> str:
        """Hash of all that changes the result."""
        return digest({k: v for k, v in vars(self).items() if k != "workers"})


def real_crops(index: pd.DataFrame, manifest: pd.DataFrame, split: str) -> pd.DataFrame:
    """The crop rows of real media of one split, in a fixed order. TrainingError if there are none."""
    reals = manifest.loc[(manifest["split"] == split) & (manifest["label"] == 0), "item_id"]
    rows = index[index["item_id"].isin(set(reals))].sort_values(["item_id", "frame"], ignore_index=True)
    if rows.empty:
        raise TrainingError(f"There is no crop of a real face in the {split} split; check the manifest and the failures of the preprocessing.")
    return rows


class SelfBlendPairs(Dataset):
    """Pairs (real, self-blend) cut from real crops. `training=False` gives one fixed pair per crop, unaugmented.

    A sample is images uint8[2,S,S,3] (real, fake) and boundary float32[2,S/8,S/8]; it depends on seed, epoch and crop alone.
    """

    def __init__(self, store: CropStore, rows: pd.DataFrame, size: int, seed: int, recipe: str, training: bool):
        self.store, self.rows, self.size, self.seed, self.recipe, self.training = store, rows.to_dict("records"), size, seed, recipe, training
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        cv2.setNumThreads(1)
        row = self.rows[i]
        image, points = self.store.image(row), np.asarray(row["landmarks"], np.float32).reshape(-1, 2)
        rng = sbi.sample_rng(self.seed, row["item_id"], row["frame"], self.epoch)
        if self.training:
            real, fake, mask = sbi.training_pair(image, points, rng, self.size, self.recipe)
        else:
            blend, box = sbi.self_blend(image, points, rng, self.recipe), sbi.crop_box(points)
            real, fake, mask = (sbi.crop(picture, box, self.size) for picture in (blend.real, blend.fake, blend.mask))
        edge = cv2.resize(4 * mask * (1 - mask), (self.size // 8, self.size // 8), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(np.stack([real, fake])), torch.from_numpy(np.stack([np.zeros_like(edge), edge]).astype(np.float32))


def epoch_order(rows: pd.DataFrame, frames_per_clip: int, seed: int, epoch: int) -> list[int]:
    """Which crops an epoch visits: `frames_per_clip` of every item (with repetition if it has fewer), shuffled."""
    rng = np.random.default_rng([seed, 0x5B1, epoch])
    groups = rows.groupby("item_id", sort=True).indices.values()
    drawn = [rng.choice(g, frames_per_clip, replace=len(g) < frames_per_clip) for g in groups]
    return rng.permutation(np.concatenate(drawn)).tolist()


def _batches(data: SelfBlendPairs, order: list[int], batch: int, workers: int) -> Iterator:
    chunks = [order[i : i + batch] for i in range(0, len(order), batch)]
    context = "spawn" if workers else None
    yield from DataLoader(data, batch_sampler=chunks, num_workers=workers, multiprocessing_context=context)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a fraction of the steps, then half a cosine to zero."""
    ramp = max(1, round(warmup * steps))
    return (step + 1) / ramp if step < ramp else 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def _loss(detector, images: torch.Tensor, edges: torch.Tensor, options: Options, flipped: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the label, plus that of the blending boundary where the detector predicts one."""
    pairs = images.shape[0]
    labels = torch.tensor([0.0, 1.0], device=images.device).repeat(pairs)
    labels = torch.where(flipped.repeat_interleave(2), 1 - labels, labels)
    logits, boundary = detector.with_boundary(detector.prepare(images.flatten(0, 1)))
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    if options.boundary and not options.shuffle:
        loss = loss + options.boundary * F.binary_cross_entropy_with_logits(boundary, edges.flatten(0, 1))
    return loss


def _flips(rows: list[str], options: Options) -> torch.Tensor:
    """Which samples have their two labels exchanged: none, or in the control a fixed half of the crops."""
    if not options.shuffle:
        return torch.zeros(len(rows), dtype=torch.bool)
    return torch.tensor([np.random.default_rng([options.seed, int(digest(r), 16)]).random() < 0.5 for r in rows])


@torch.no_grad()
def validate(detector, loader) -> dict[str, float]:
    """AUC and cross-entropy on the fixed self-blends of the validation faces."""
    detector.eval()
    logits = torch.cat([detector(detector.prepare(images.flatten(0, 1).to(device(detector))).unsqueeze(1)).float().cpu() for images, _ in loader])
    labels = torch.tensor([0.0, 1.0]).repeat(len(logits) // 2)
    return {"val_auc": float(roc_auc_score(labels, logits)), "val_loss": float(F.binary_cross_entropy_with_logits(logits, labels))}


def device(module: torch.nn.Module) -> torch.device:
    """Where a module's parameters live."""
    return next(module.parameters()).device


def _precision() -> str:
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def _save_state(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


@contextlib.contextmanager
def _own_randomness(seed: int):
    """Torch's generators seeded inside, restored outside; nothing else is reseeded."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def train(name: str, config: dict, manifest: pd.DataFrame, index: pd.DataFrame, store: CropStore, out: str | os.PathLike, options: Options) -> Path:
    """Train detector `name` with `config` and leave the checkpoint of the best validation epoch in `out`; returns `out`.

    Killed at any point, the same call goes on from the last whole epoch and ends with the same weights; finished and
    unchanged, it returns at once. Raises TrainingError.
    """
    out = Path(out)
    rows, val_rows = real_crops(index, manifest, "train"), real_crops(index, manifest, "val")
    key = digest([name, config, options.key(), manifest_hash(manifest), index["sha256"].tolist()])
    if (out / base.CONFIG).exists() and json.loads((out / base.CONFIG).read_text()).get("training_key") == key:
        return out
    with _own_randomness(options.seed):
        accelerator = Accelerator(mixed_precision=_precision())
        detector = base.build(name, **config)
        return _fit(accelerator, detector, SelfBlendPairs(store, rows, detector.input_spec.size, options.seed, options.recipe, True),
                    SelfBlendPairs(store, val_rows, detector.input_spec.size, options.seed, options.recipe, False), rows, out, options, key)


def _fit(accelerator, detector, data, val_data, rows, out: Path, options: Options, key: str) -> Path:
    per_epoch = math.ceil(rows["item_id"].nunique() * options.frames_per_clip / options.batch)
    steps = per_epoch * options.epochs
    optimizer = torch.optim.AdamW(detector.trainable_parameters(), lr=options.lr, weight_decay=options.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps, options.warmup))
    detector, optimizer = accelerator.prepare(detector, optimizer)
    average = AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(options.ema)) if options.ema else None
    parts = {"detector": detector, "optimizer": optimizer, "scheduler": scheduler} | ({"average": average} if average else {})
    history, best = _resume(out / STATE, parts, key)
    val_loader = DataLoader(val_data, batch_size=32)
    stale = len(history) - 1 - max(range(len(history)), key=lambda i: -history[i]["val_loss"], default=-1)
    for epoch in track(range(len(history), options.epochs), options.epochs - len(history), f"training {out.name}, epochs"):
        if options.patience and history and stale >= options.patience:
            break
        data.epoch = epoch
        losses = _epoch(accelerator, detector, average, optimizer, scheduler, data, epoch_order(rows, options.frames_per_clip, options.seed, epoch), options)
        shown = average.module if average else detector
        history.append({"epoch": epoch, "loss": float(np.mean(losses)), **validate(accelerator.unwrap_model(shown), val_loader)})
        stale = 0 if history[-1]["val_loss"] <= min(h["val_loss"] for h in history) else stale + 1
        if stale == 0:
            best = {k: v.detach().cpu().clone() for k, v in accelerator.unwrap_model(shown).state_dict().items()}
        _save_state(out / STATE, {"key": key, "history": history, "best": best, "rng": torch.get_rng_state(), **{k: p.state_dict() for k, p in parts.items()}})
    final = accelerator.unwrap_model(detector)
    final.load_state_dict(best)
    base.save_checkpoint(final, out, training_key=key, seed=options.seed, options=vars(options) | {"workers": None}, history=history, trained_on="self-blends of real faces")
    (out / STATE).unlink()
    return out


def _resume(path: Path, parts: dict, key: str) -> tuple[list[dict], dict]:
    """Load the state of an interrupted training with the same key into `parts`; otherwise start from nothing."""
    if not path.exists():
        return [], {}
    state = torch.load(path, weights_only=True, map_location="cpu")
    if state["key"] != key:
        return [], {}
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])
    return state["history"], state["best"]


def _epoch(accelerator, detector, average, optimizer, scheduler, data, order, options: Options) -> list[float]:
    """One pass over `order`; returns the loss of every step."""
    detector.train()
    losses, names = [], [f"{r['item_id']}/{r['frame']}" for r in data.rows]
    for step, (images, edges) in enumerate(_batches(data, order, options.batch, options.workers)):
        chosen = order[step * options.batch : (step + 1) * options.batch]
        flipped = _flips([names[i] for i in chosen], options)
        with accelerator.autocast():
            loss = _loss(accelerator.unwrap_model(detector), images.to(accelerator.device), edges.to(accelerator.device), options, flipped.to(accelerator.device))
        if not torch.isfinite(loss):
            raise TrainingError("The loss is no longer a number; lower train.lr.")
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if average:
            average.update_parameters(detector)
        losses.append(loss.item())
    return losses
