"""Train heads over clips on frozen features, and judge what time adds: in order, shuffled, frozen.

Only real media of the train and validation splits are read: a head learns from the clips that `clips.make_clips` makes
of the former, and the same kinds of clips of the latter choose the epoch. No fake is opened and no test item seen.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from unmask import features
from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest
from unmask.detectors import base
from unmask.detectors import temporal as heads
from unmask.features import Clips, Features
from unmask.pairs import TrainingError, real_crops
from unmask.profile import Profile, digest, source_hash
from unmask.progress import track
from unmask.training import DIVERGED, STATE, own_randomness, save_state, schedule

POOLED = "frame logits"
"""In tables of heads, the frozen detector itself: the mean of its frames' P(fake)."""
VAL_VERSIONS = 2


@dataclass(frozen=True)
class Options:
    """How a head is trained; the profile's `temporal` keys that are not the head's own, with the seed."""

    seed: int
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    warmup: float


def head_config(name: str, profile: Profile) -> dict:
    """What the profile's `temporal` keys say of head `name`, without its frozen detector."""
    keys = profile.temporal
    config = {"frames": keys.frames}
    if name != "mean":
        config |= {key: keys[key] for key in ("differences", "width", "layers", "dropout")}
    return config | ({"heads": keys.heads} if name == "transformer" else {})


def head_options(name: str, profile: Profile, seed: int) -> Options:
    """What they say of its training."""
    keys = profile.temporal
    lr = keys.lr_transformer if name == "transformer" else keys.lr
    return Options(seed, keys.epochs, keys.batch, lr, keys.weight_decay, keys.warmup)


def training_clips(
    profile: Profile,
    manifest: pd.DataFrame,
    crops: str | os.PathLike,
    backbone: str | os.PathLike,
    cache: str | os.PathLike,
    seed: int,
    workers: int = 0,
) -> tuple[Features, Features]:
    """Frozen features of the made clips of the train and validation splits, computed or read from `cache`."""
    index, keys = read_index(crops), profile.temporal
    drawn = {"train": keys.versions, "val": VAL_VERSIONS}
    rows = {split: _videos(real_crops(index, manifest, split), split) for split in drawn}
    return tuple(
        features.of_made_clips(
            backbone, crops, rows[split], cache, keys.frames, versions, seed, profile.sbi.recipe, workers
        )
        for split, versions in drawn.items()
    )


def _videos(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """The crops of items that have more than one: a single frame has no time to learn from."""
    rows = rows[rows.groupby("item_id")["frame"].transform("size") > 1]
    if rows.empty:
        raise TrainingError(f"No real item of the {split} split has more than one crop; heads learn from videos.")
    return rows


def train_head(
    name: str,
    profile: Profile,
    manifest: str | os.PathLike,
    crops: str | os.PathLike,
    out: str | os.PathLike,
    seed: int,
    backbone: str | os.PathLike,
    cache: str | os.PathLike | None = None,
    config: dict | None = None,
    workers: int = 0,
) -> Path:
    """Train head `name` on the frozen features of the detector in `backbone`; leave its checkpoint in `out`.

    manifest, crops: files, the crops in a row (sampling dense). cache: folder of features that heads share, by default
    `features` beside the crops. config: changes of `head_config`. workers: processes that compute missing features.
    Killed at any point, the same call goes on and ends with the same weights; finished and unchanged, it returns at
    once. Raises TrainingError, and what reading its inputs raises.
    """
    cache = Path(crops).with_name("features") if cache is None else Path(cache)
    parts = training_clips(profile, read_manifest(manifest), crops, backbone, cache, seed, workers)
    config = head_config(name, profile) | (config or {})
    options = head_options(name, profile, seed)
    return fit(name, config, backbone, *parts, out, options, CropStore(crops).settings())


def fit(
    name: str,
    config: dict,
    backbone: str | os.PathLike,
    train: Features,
    val: Features,
    out: str | os.PathLike,
    options: Options,
    preprocessing: dict,
) -> Path:
    """`train_head` from features at hand. preprocessing: how the crops were made, for the checkpoint's card."""
    out = Path(out)
    below = base.read_checkpoint(backbone)[1]
    config = config | {"spatial": {key: below[key] for key in ("detector", "config")}}
    source = source_hash(base, heads, sys.modules[__name__])
    key = digest([name, config, vars(options), below["sha256"], train.name, val.name, source])
    if (out / base.CONFIG).exists() and json.loads((out / base.CONFIG).read_text()).get("training_key") == key:
        return out
    with own_randomness(options.seed):
        detector = _start(name, config, backbone)
        frames = detector.input_spec.frames
        history, best = _epochs(detector, train.clips(frames), val.clips(frames), out, options, key)
    detector.load_state_dict(best, strict=False)
    base.save_checkpoint(
        detector, out, training_key=key, seed=options.seed, options=vars(options), history=history,
        preprocessing=preprocessing, backbone=below["sha256"],
    )  # fmt: skip
    (out / STATE).unlink(missing_ok=True)
    return out


def _start(name: str, config: dict, backbone: str | os.PathLike) -> heads.Temporal:
    """A new head on the weights of the detector in `backbone`."""
    spatial, _ = base.load_checkpoint(backbone)
    try:
        detector = base.build(name, **config)
    except (ValueError, AssertionError) as error:  # torch asserts that heads divide the width
        raise TrainingError(f"The head cannot be built from the profile's temporal keys: {error}") from error
    detector.adopt(spatial)
    return detector


def _tensors(clips: Clips) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.tensor(clips.rows["label"].to_numpy(np.float32))
    return torch.from_numpy(clips.features), torch.from_numpy(clips.mask), labels


def _epochs(detector, train: Clips, val: Clips, out: Path, options: Options, key: str) -> tuple[list[dict], dict]:
    """The whole training; returns the history and the head's weights of the epoch with the lowest validation loss."""
    x, mask, labels = _tensors(train)
    steps = options.epochs * -(-len(x) // options.batch)
    optimizer = torch.optim.AdamW(detector.trainable_parameters(), lr=options.lr, weight_decay=options.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps, options.warmup))
    history, best = _resume(out / STATE, detector, optimizer, scheduler, key)
    for epoch in track(range(len(history), options.epochs), label=f"training {out.name}, epochs"):
        # Seeded by epoch, so that a resumed run draws the same dropout.
        torch.manual_seed(int(digest([options.seed, epoch]), 16))
        order = np.random.default_rng([options.seed, 0x7E4, epoch]).permutation(len(x))
        detector.train()
        losses = []
        for start in range(0, len(x), options.batch):
            chosen = torch.from_numpy(order[start : start + options.batch])
            loss = F.binary_cross_entropy_with_logits(detector.head(x[chosen], mask[chosen]), labels[chosen])
            if not torch.isfinite(loss):
                raise TrainingError(DIVERGED.replace("train.lr", "temporal.lr"))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(detector.trainable_parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        history.append({"epoch": epoch, "loss": float(np.mean(losses)), **validate(detector, val)})
        if min(range(len(history)), key=lambda i: history[i]["val_loss"]) == epoch:
            best = {name: value.clone() for name, value in detector.head_state().items()}
        state = {"key": key, "history": history, "best": best, "head": detector.head_state()}
        save_state(out / STATE, state | {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    return history, best


def _resume(path: Path, detector, optimizer, scheduler, key: str) -> tuple[list[dict], dict]:
    """Go on from the state of an interrupted training with the same key; otherwise start from nothing."""
    state = torch.load(path, weights_only=True) if path.exists() else {}
    if state.get("key") != key:
        return [], {}
    detector.load_state_dict(state["head"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state["history"], state["best"]


def logits_of(detector, clips: Clips) -> np.ndarray:
    """Logits float64[B] of the head on cached clips, in evaluation mode."""
    detector.eval()
    x, mask, _ = _tensors(clips)
    with torch.no_grad():
        parts = [detector.head(a, b).double() for a, b in zip(x.split(256), mask.split(256), strict=True)]
    return torch.cat(parts).numpy() if len(x) else np.empty(0)


def validate(detector, clips: Clips) -> dict[str, float]:
    """Cross-entropy and AUC on made clips, and the AUC of the two kinds that only time tells apart."""
    logits, kinds = logits_of(detector, clips), clips.rows["kind"]
    labels = clips.rows["label"].to_numpy()
    loss = F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels.astype(float)))
    time = kinds.isin(["steady", "varying"]).to_numpy()
    return {
        "val_loss": float(loss),
        "val_auc": float(roc_auc_score(labels, logits)),
        "val_time_auc": float(roc_auc_score(labels[time], logits[time])),
    }


def score_features(detector, cached: Features, order: str = "in order", seed: int = 0) -> pd.DataFrame:
    """P(fake) of every cached item, from its frames in `order` (see `Features.clips`): item_id, frame (-1), score.

    detector: a head, scored as `scoring.score_crops` does; None for the mean of the frozen detector's own P(fake).
    """
    if detector is None:
        clips = cached.clips(len(cached.rows), order, seed)  # one window, so that every frame counts alike
        probability = np.where(clips.mask, _sigmoid(clips.logits), 0).sum(1) / clips.mask.sum(1)
    else:
        clips = cached.clips(detector.input_spec.frames, order, seed)
        probability = _sigmoid(logits_of(detector, clips))
    scores = clips.rows[["item_id"]].assign(score=probability).groupby("item_id", as_index=False)["score"].mean()
    return scores.assign(frame=np.int32(-1))[["item_id", "frame", "score"]].astype({"frame": "int32"})


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return torch.sigmoid(torch.from_numpy(logits).double()).numpy()
