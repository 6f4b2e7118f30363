"""Train a detector on real faces and their self-blends: a short visible loop on Hugging Face Accelerate.

Only crops of real media are read (labels choose the reals, no fake is ever opened): those of the train split to learn
from, those of the validation split, with their self-blends, to choose the checkpoint. No step sees the test split.
"""

import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
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

from unmask import hulls, sbi
from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest
from unmask.detectors import base
from unmask.profile import Profile, digest, source_hash, write_atomic
from unmask.progress import track

STATE = "last.pt"
DIVERGED = "The loss is no longer a number; lower train.lr."


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
    init: str = "none"
    loaders: int = 0
    shuffle: bool = False

    def key(self) -> str:
        """Hash of all that changes the result."""
        return digest({k: v for k, v in vars(self).items() if k != "loaders"})


def real_crops(index: pd.DataFrame, manifest: pd.DataFrame, split: str) -> pd.DataFrame:
    """The crop rows of real media of one split, in a fixed order. TrainingError if there are none."""
    reals = manifest.loc[(manifest["split"] == split) & (manifest["label"] == 0), "item_id"]
    rows = index[index["item_id"].isin(set(reals))].sort_values(["item_id", "frame"], ignore_index=True)
    if rows.empty:
        raise TrainingError(
            f"There is no crop of a real face in the {split} split; "
            "check the manifest and the failures of the preprocessing."
        )
    return rows


def fingerprint(rows: pd.DataFrame) -> str:
    """SHA-256 of the crops that are used and their landmarks; the rest of the manifest is no reason to train anew."""
    identity = json.dumps(rows[["item_id", "frame", "sha256"]].to_numpy(dtype=object).tolist()).encode()
    return hashlib.sha256(identity + np.concatenate(rows["landmarks"].tolist()).tobytes()).hexdigest()


class SelfBlendPairs(Dataset):
    """Pairs (real, self-blend) cut from real crops. `training=False` gives one fixed pair per crop, unaugmented.

    A sample is images uint8[2,S,S,3] (real, fake) and boundary float32[2,S/8,S/8]; seed, epoch and crop decide it.
    """

    def __init__(self, store: CropStore, rows: pd.DataFrame, size: int, seed: int, recipe: str, training: bool):
        self.store, self.rows, self.size = store, rows.to_dict("records"), size
        self.seed, self.recipe, self.training = seed, recipe, training

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample of (epoch, crop); the epoch is part of the index, so that loader processes live through all epochs."""
        cv2.setNumThreads(1)
        epoch, i = where
        row = self.rows[i]
        image, points = self.store.image(row), np.asarray(row["landmarks"], np.float32).reshape(-1, 2)
        rng = sbi.sample_rng(self.seed, row["item_id"], row["frame"], epoch)
        if self.training:
            real, fake, mask = sbi.training_pair(image, points, rng, self.size, self.recipe)
        else:
            blend, box = sbi.self_blend(image, points, rng, self.recipe), sbi.crop_box(points)
            real, fake, mask = (sbi.crop(picture, box, self.size) for picture in (blend.real, blend.fake, blend.mask))
        edge = cv2.resize(4 * mask * (1 - mask), (self.size // 8, self.size // 8), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(np.stack([real, fake])), torch.from_numpy(
            np.stack([np.zeros_like(edge), edge]).astype(np.float32)
        )


def batch_plan(rows: pd.DataFrame, options: Options, epoch: int) -> list[list[tuple[int, int]]]:
    """The batches of an epoch, as lists of (epoch, crop): up to `frames_per_clip` crops of every item, shuffled."""
    rng = np.random.default_rng([options.seed, 0x5B1, epoch])
    groups = rows.groupby("item_id", sort=True).indices.values()
    drawn = [rng.choice(g, min(options.frames_per_clip, len(g)), replace=False) for g in groups]
    order = [(epoch, int(i)) for i in rng.permutation(np.concatenate(drawn))]
    return [order[i : i + options.batch] for i in range(0, len(order), options.batch)]


def _loader(data: SelfBlendPairs, batches: list[list[tuple[int, int]]], loaders: int) -> DataLoader:
    return DataLoader(
        data, batch_sampler=batches, num_workers=loaders, multiprocessing_context="spawn" if loaders else None
    )


def schedule(step: int, steps: int, warmup: float) -> float:
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


def _flips(rows: list[dict], options: Options) -> torch.Tensor:
    """Which pairs have their labels exchanged, bool[len(rows)]: none, or in the control a fixed half of the crops."""
    keys = (f"{options.seed}/{row['item_id']}/{row['frame']}" for row in rows)
    return torch.tensor([options.shuffle and int(digest(key), 16) % 2 == 1 for key in keys])


@torch.no_grad()
def validate(detector, loader) -> dict[str, float]:
    """AUC and cross-entropy on the fixed self-blends of the validation faces."""
    detector.eval()
    logits = torch.cat(
        [
            detector(detector.prepare(images.flatten(0, 1).to(device(detector))).unsqueeze(1)).float().cpu()
            for images, _ in loader
        ]
    )
    if not torch.isfinite(logits).all():
        raise TrainingError(DIVERGED)
    labels = torch.tensor([0.0, 1.0]).repeat(len(logits) // 2)
    return {
        "val_auc": float(roc_auc_score(labels, logits)),
        "val_loss": float(F.binary_cross_entropy_with_logits(logits, labels)),
    }


def device(module: torch.nn.Module) -> torch.device:
    """Where a module's parameters live."""
    return next(module.parameters()).device


def precision() -> str:
    """bf16 where the device computes in it, GPU or processor; float32 elsewhere."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if found.get("avx512_bf16") or found.get("amx_bf16") else "no"


def save_state(path: Path, state: dict) -> None:
    """Write what an interrupted training needs to go on, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


@contextlib.contextmanager
def own_randomness(seed: int):
    """Torch's generators seeded inside, restored outside; nothing else is reseeded."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def train(
    name: str,
    config: dict,
    manifest: pd.DataFrame,
    index: pd.DataFrame,
    store: CropStore,
    out: str | os.PathLike,
    options: Options,
) -> Path:
    """Train detector `name` with `config`, leave the checkpoint of the best validation epoch in `out` and return `out`.

    Killed at any point, the same call goes on from the last whole epoch and ends with the same weights; finished and
    unchanged (options, real crops, source code), it returns at once. Raises TrainingError.
    """
    out = Path(out)
    rows, val_rows = real_crops(index, manifest, "train"), real_crops(index, manifest, "val")
    source = source_hash(sbi, hulls, base, base.module(name), sys.modules[__name__])
    folder = _init_folder(options)
    init = base.read_checkpoint(folder)[1]["sha256"] if folder else ""
    key = digest([name, config, options.key(), init, fingerprint(rows), fingerprint(val_rows), source])
    if (out / base.CONFIG).exists() and json.loads((out / base.CONFIG).read_text()).get("training_key") == key:
        return out
    with own_randomness(options.seed):
        accelerator = Accelerator(mixed_precision=precision())
        detector = _start(name, config, options)
        pairs = [
            SelfBlendPairs(store, part, detector.input_spec.size, options.seed, options.recipe, training)
            for part, training in ((rows, True), (val_rows, False))
        ]
        return _fit(accelerator, detector, *pairs, rows, out, options, key)


def init_folder(init: str) -> Path | None:
    """Where initial weights are: a checkpoint of the kit by name, or a folder; None for "none"."""
    if init == "none":
        return None
    kept = Path(__file__).parent / "weights" / init
    return kept if kept.is_dir() else Path(init)


def _init_folder(options: Options) -> Path | None:
    """Where the initial weights of a run are. The control starts from nothing."""
    return None if options.shuffle else init_folder(options.init)


def _start(name: str, config: dict, options: Options):
    """The detector as training finds it: random or timm's weights, or those of `options.init`."""
    try:
        detector = base.build(name, **config)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"The detector cannot be built from the profile's `{name}` keys: {error}") from error
    folder = _init_folder(options)
    if folder is not None:
        try:
            detector.load_state_dict(base.read_checkpoint(folder)[0])
        except RuntimeError as error:
            raise TrainingError(
                f"The weights that train.init names ({options.init}) are of another architecture; set train.init=none."
            ) from error
    return detector


def _fit(accelerator, detector, data, val_data, rows, out: Path, options: Options, key: str) -> Path:
    plans = [batch_plan(rows, options, epoch) for epoch in range(options.epochs)]
    steps = sum(map(len, plans))
    optimizer = torch.optim.AdamW(detector.trainable_parameters(), lr=options.lr, weight_decay=options.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps, options.warmup))
    detector, optimizer = accelerator.prepare(detector, optimizer)
    average = (
        AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True)
        if options.ema
        else None
    )
    parts = {"detector": detector, "optimizer": optimizer, "scheduler": scheduler} | (
        {"average": average} if average else {}
    )
    history, best = _resume(out / STATE, parts, key)
    ahead = plans[len(history) :]
    batches = iter(_loader(data, [batch for plan in ahead for batch in plan], options.loaders))
    val_batches = [[(0, i) for i in range(k, min(k + 16, len(val_data)))] for k in range(0, len(val_data), 16)]
    for plan in track(ahead, label=f"training {out.name}, epochs"):
        if options.patience and history and len(history) - _best_epoch(history) > options.patience:
            break
        # Seeded by epoch, not once: a resumed run then draws the same noise, on every device.
        torch.manual_seed(int(digest([options.seed, len(history)]), 16))
        losses = _epoch(accelerator, parts, (next(batches) for _ in plan), plan, data, options)
        shown = accelerator.unwrap_model(average.module if average else detector)
        figures = validate(shown, _loader(val_data, val_batches, 0))
        history.append({"epoch": len(history), "loss": float(np.mean(losses)), **figures})
        if _best_epoch(history) == len(history) - 1:
            best = {k: v.detach().cpu().clone() for k, v in shown.state_dict().items()}
        state = {"key": key, "history": history, "best": best}
        save_state(out / STATE, state | {name: part.state_dict() for name, part in parts.items()})
    final = accelerator.unwrap_model(detector)
    final.load_state_dict(best)
    settings = {k: v for k, v in vars(options).items() if k != "loaders"}
    base.save_checkpoint(
        final,
        out,
        training_key=key,
        seed=options.seed,
        options=settings,
        history=history,
        preprocessing=data.store.settings(),
    )
    (out / STATE).unlink()
    return out


def _best_epoch(history: list[dict]) -> int:
    """The epoch with the lowest validation loss; the first of equals."""
    return min(range(len(history)), key=lambda i: history[i]["val_loss"])


def _resume(path: Path, parts: dict, key: str) -> tuple[list[dict], dict]:
    """Load the state of an interrupted training with the same key into `parts`; otherwise start from nothing."""
    if not path.exists():
        return [], {}
    state = torch.load(path, weights_only=True, map_location="cpu")
    if state["key"] != key:
        return [], {}
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["history"], state["best"]


def _epoch(accelerator, parts: dict, batches, plan, data: SelfBlendPairs, options: Options) -> list[float]:
    """One pass; returns the loss of every step."""
    detector, optimizer = parts["detector"].train(), parts["optimizer"]
    losses = []
    for (images, edges), chosen in zip(batches, plan, strict=True):
        flipped = _flips([data.rows[i] for _, i in chosen], options).to(accelerator.device)
        with accelerator.autocast():
            model = accelerator.unwrap_model(detector)
            loss = _loss(model, images.to(accelerator.device), edges.to(accelerator.device), options, flipped)
        if not torch.isfinite(loss):
            raise TrainingError(DIVERGED)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        parts["scheduler"].step()
        if "average" in parts:
            parts["average"].update_parameters(detector)
        losses.append(loss.item())
    return losses


def train_detector(
    name: str,
    profile: Profile,
    manifest: str | os.PathLike,
    crops: str | os.PathLike,
    out: str | os.PathLike,
    seed: int,
    shuffle: bool = False,
) -> Path:
    """`train` with everything a profile says, on files: a manifest and the folder of its crops."""
    options = Options(seed=seed, recipe=profile.sbi.recipe, shuffle=shuffle, **profile.train)
    return train(name, dict(profile[name]), read_manifest(manifest), read_index(crops), CropStore(crops), out, options)


def _one_run(arguments: tuple) -> Path:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the number of threads changes sums: one, and `workers` never changes a result
    return train_detector(*arguments)


def train_runs(
    name: str,
    profile: Profile,
    manifest: str | os.PathLike,
    crops: str | os.PathLike,
    runs: Mapping[str | os.PathLike, tuple[int, bool]],
) -> None:
    """`train_detector` for several runs {folder: (seed, shuffle)}: in turns on a GPU, side by side on a CPU."""
    tasks = [(name, profile, manifest, crops, out, seed, shuffle) for out, (seed, shuffle) in runs.items()]
    side_by_side = 1 if torch.cuda.is_available() else min(profile.workers, len(tasks))
    with ProcessPoolExecutor(side_by_side, multiprocessing.get_context("spawn")) as pool:
        for _ in track(pool.map(_one_run, tasks), len(tasks), f"training {name}, runs"):
            pass
