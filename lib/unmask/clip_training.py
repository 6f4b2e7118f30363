"""Train a detector on a CLIP with the labelled faces of the training split; those of validation choose the epoch.

A CLIP that stays frozen looks once at several augmented views of every crop, and all detectors learn from what it made
of them (`clip_features`); where the CLIP learns, views are made anew in every epoch. No step sees the test split.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from unmask import clip_features, clip_recipes, clip_views, hulls, lare_maps, pairs, sbi, views
from unmask.clip_features import Cached
from unmask.clip_recipes import Recipe
from unmask.data.crops import CropStore, read_index, spread
from unmask.data.manifest import read_manifest
from unmask.detectors import base, clip_backbone, clip_lare, clip_prompts, egre, fusion, prompts, roi
from unmask.detectors.clip_prompts import ClipDetector, Neighbours
from unmask.learning import finished
from unmask.pairs import TrainingError, fake_crops, fingerprint, real_crops
from unmask.parallel import side_by_side
from unmask.profile import Profile, digest, source_hash
from unmask.progress import track
from unmask.training import DIVERGED, STATE, own_randomness, precision, save_state
from unmask.views import balanced_plan

SOURCES = (
    clip_features, clip_recipes, clip_views, clip_backbone, clip_prompts, clip_lare, prompts, fusion, egre, roi,
    views, pairs, sbi, hulls, lare_maps,
)  # fmt: skip


@dataclass(frozen=True)
class Faces:
    """Where the faces are: a manifest, the folder of its crops, one to keep features in, that of LaRE maps."""

    manifest: str | os.PathLike
    crops: str | os.PathLike
    features: str | os.PathLike
    lare: str | os.PathLike | None = None


def labelled(faces: Faces, split: str, frames: int) -> pd.DataFrame:
    """Index rows of a split with `label`, at most `frames` a medium, evenly over it; sorted by item and frame.

    Raises TrainingError where the split lacks reals or fakes.
    """
    manifest, index = read_manifest(faces.manifest), read_index(faces.crops)
    parts = [kind(index, manifest, split).assign(label=k) for k, kind in enumerate((real_crops, fake_crops))]
    rows = pd.concat(parts).drop(columns=["group_id", "subject"])
    return spread(rows, frames)


def build(name: str, profile: Profile, lare: str | os.PathLike | None = None) -> ClipDetector:
    """A new detector on the profile's CLIP; lare: the folder of the LaRE maps, for those of "clip-lare:..." that read
    maps. Raises TrainingError where they are not given, and for what cannot be built."""
    keys = profile.clip
    config = {"backbone": keys.backbone, "weights": keys.weights or None} | _options(name, keys)
    try:
        if "lare" in base.registered(name).extras:
            if lare is None:
                raise TrainingError(f"{name} reads LaRE maps: name their folder by --lare (`unmask lare` makes it).")
            about = lare_maps.read_settings(lare)
            config |= {"lare_side": about["shape"][-1], "lare": about["extractor"]}
        return base.build(name, **config)
    except ValueError as error:
        raise TrainingError(f"{name} cannot be built from the profile's `clip` keys: {error}") from error


def _options(name: str, keys: Mapping) -> dict:
    """What the profile says of a detector beyond its CLIP."""
    context = keys.words or keys.context
    if name == "coop":
        return {"context": context, "position": keys.position, "specific": keys.specific}
    if name == "cocoop":
        return {"context": keys.words} if keys.words else {}
    if name.endswith("-text"):
        return {"context": context}
    return {"k": keys.neighbours} if name == "clip-nn" else {}


def inputs_of(detector: ClipDetector) -> list[str]:
    """The names of what its head reads of `Cached.tensors`."""
    if not isinstance(detector, clip_lare.ClipLare):
        return ["pooled"]
    return ["pooled", *(["maps"] if detector.fusion.config.reads_maps else []), *detector.extras]


def cached(detector: ClipDetector, faces: Faces, rows: pd.DataFrame, versions: int, seed: int) -> Cached:
    """What a detector reads of the views of rows; one cache for all: with all inputs where there are LaRE maps."""
    given = {"lare": faces.lare, "maps": faces.lare is not None, "names": inputs_of(detector)}
    return clip_features.of_crops(detector.backbone, faces.crops, rows, faces.features, seed, versions, **given)


class FrozenInputs:
    """What a head learns from where the CLIP is frozen: cached views of crops."""

    def __init__(self, detector: ClipDetector, found: Cached, device: torch.device):
        self.tensors = {name: found.tensors[name].to(device) for name in inputs_of(detector)}

    def logits(self, detector: ClipDetector, samples: list[tuple[int, int, int]]) -> torch.Tensor:
        """Logits float[B] of samples (epoch, row, copy): the views of a crop take turns."""
        versions = next(iter(self.tensors.values())).shape[1]
        at = [i for _, i, _ in samples], [(max(epoch, 0) + copy) % versions for epoch, _, copy in samples]
        return detector.head(**{name: values[at].float() for name, values in self.tensors.items()}).squeeze(1)


class LiveInputs:
    """What a CLIP learns from: views of crops, made when they are asked for."""

    def __init__(self, views: clip_views.Views, device: torch.device):
        self.views, self.device = views, device

    def logits(self, detector: ClipDetector, samples: list[tuple[int, int, int]]) -> torch.Tensor:
        """Logits float[B] of samples (epoch, row, copy)."""
        images = torch.stack([self.views[sample]["image"] for sample in samples]).to(self.device)
        # Judged in float32, as everywhere.
        half = torch.is_grad_enabled() and precision() == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            pooled = detector.frozen(detector.prepare(images))["pooled"]
        return detector.head(pooled.float()).squeeze(1)


def train(name: str, profile: Profile, faces: Faces, out: str | os.PathLike, seed: int) -> Path:
    """Train a detector and leave the checkpoint of the epoch with the lowest validation loss in `out`; returns `out`.

    name: "ufd", "clip-nn", "lntune", "coop", "cocoop", "clip-adapter", "clip-finetune" or "clip-lare:KIND" with or
    without "-text". Killed at any point, the same call goes on from the last whole epoch and ends with the same
    weights; finished and unchanged, it returns at once. Raises TrainingError.
    """
    keys, out = profile.clip, Path(out)
    rows = {split: labelled(faces, split, keys.frames) for split in ("train", "val")}
    with own_randomness(seed):
        detector = build(name, profile, faces.lare)
        recipe = None if name == "clip-nn" else _recipe(keys, name)
        used = [fingerprint(part) for part in rows.values()] + [part["label"].tolist() for part in rows.values()]
        source = source_hash(*SOURCES, base, sys.modules[__name__])
        about = {"recipe": recipe and asdict(recipe), "frames": keys.frames}
        about |= {} if detector.tuned() else {"versions": keys.versions}
        key = digest([name, detector.config, about, seed, used, _maps_of(detector, faces), source])
        if finished(out, key):
            return out
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        detector.to(device)
        if isinstance(detector, Neighbours):
            found = cached(detector, faces, rows["train"], keys.versions, seed)
            detector.fill(found.tensors["pooled"][:, 0].to(device), torch.tensor(rows["train"]["label"].to_numpy()))
            history = []
        else:
            history = _fit(detector, recipe, _inputs(detector, faces, rows, keys, seed, device), rows, out, key, seed)
    base.save_checkpoint(
        detector, out, training_key=key, seed=seed, options=about, history=history,
        preprocessing=CropStore(faces.crops).settings(), lare=_maps_of(detector, faces),
    )  # fmt: skip
    (out / STATE).unlink(missing_ok=True)
    return out


def _recipe(keys, name: str) -> Recipe:
    try:
        found = clip_recipes.recipe_of(keys.recipe, name)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    return Recipe(**asdict(found) | {"epochs": keys.epochs}) if keys.epochs else found


def _maps_of(detector: ClipDetector, faces: Faces) -> Mapping | None:
    """What the LaRE maps that a detector reads were made with."""
    return lare_maps.read_settings(faces.lare) if "lare" in detector.extras else None


def _inputs(detector: ClipDetector, faces: Faces, rows: dict, keys, seed: int, device: torch.device) -> dict:
    """What is learned from, and what judges it, by split."""
    if detector.tuned():
        store, size = CropStore(faces.crops), detector.input_spec.size
        return {split: LiveInputs(clip_views.Views(store, part, size, seed), device) for split, part in rows.items()}
    versions = {"train": keys.versions, "val": 0}
    return {
        split: FrozenInputs(detector, cached(detector, faces, part, versions[split], seed), device)
        for split, part in rows.items()
    }


def _fit(detector, recipe: Recipe, inputs: dict, rows: dict, out: Path, key: str, seed: int) -> list[dict]:
    """Train, leaving the weights of the best epoch in `detector`; returns the history."""
    optimizer = clip_recipes.optimizer_of(recipe, detector.trainable_parameters())
    parts = {"detector": detector, "optimizer": optimizer}
    history, best = _resume(out / STATE, parts, key)
    labels = {split: part["label"].to_numpy() for split, part in rows.items()}
    items = rows["train"]["item_id"].to_numpy()
    for epoch in track(range(len(history), recipe.epochs), label=f"training {out.name}, epochs"):
        rate = clip_recipes.rate(recipe, [entry["val_loss"] for entry in history])
        if not rate:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Seeded by epoch, so that a resumed run draws the same dropout.
        torch.manual_seed(int(digest([seed, epoch]), 16))
        detector.train()
        losses = []
        for samples in balanced_plan(items, labels["train"], recipe.batch, len(items), seed, epoch):
            truth = torch.tensor(labels["train"][[i for _, i, _ in samples]], dtype=torch.float32)
            logits = inputs["train"].logits(detector, samples)
            loss = F.binary_cross_entropy_with_logits(logits, truth.to(logits.device))
            if not torch.isfinite(loss):
                raise TrainingError(DIVERGED.replace("train.lr", "the recipe's rate"))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        history.append({"epoch": epoch, "loss": float(np.mean(losses)), **_validate(detector, inputs["val"], labels)})
        if min(range(len(history)), key=lambda i: history[i]["val_loss"]) == epoch:
            best = {name: value.detach().cpu().clone() for name, value in detector.state_dict().items()}
        state = {name: part.state_dict() for name, part in parts.items()}
        save_state(out / STATE, state | {"key": key, "history": history, "best": best})
    detector.load_state_dict(best)
    return history


def _resume(path: Path, parts: dict, key: str) -> tuple[list[dict], dict]:
    """Load the state of an interrupted training with the same key into `parts`; otherwise start from nothing."""
    state = torch.load(path, weights_only=True, map_location="cpu") if path.exists() else {}
    if state.get("key") != key:
        return [], {}
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["history"], state["best"]


@torch.no_grad()
def _validate(detector: ClipDetector, inputs, labels: dict) -> dict[str, float]:
    """Cross-entropy, both labels weighing alike, and AUC of the unaugmented validation frames."""
    detector.eval()
    logits = np.concatenate([x.cpu().numpy() for x in judged(detector, inputs, len(labels["val"]))]).astype(float)
    if not np.isfinite(logits).all():
        raise TrainingError(DIVERGED.replace("train.lr", "the recipe's rate"))
    truth = labels["val"]
    losses = np.logaddexp(0, np.where(truth == 1, -logits, logits))
    return {
        "val_loss": float(np.mean([losses[truth == label].mean() for label in (0, 1)])),
        "val_auc": float(roc_auc_score(truth, logits)),
    }


def judged(detector: ClipDetector, inputs, count: int, batch: int = 128) -> Iterator[torch.Tensor]:
    """Logits of the evaluation views of rows 0..count-1, batch by batch."""
    for start in range(0, count, batch):
        yield inputs.logits(detector, [(clip_views.FIXED, i, 0) for i in range(start, min(start + batch, count))])


@dataclass(frozen=True)
class Run:
    """One of several trainings: the arguments of `train` but its folder."""

    name: str
    profile: Profile
    faces: Faces
    seed: int


def train_all(runs: Mapping[str | os.PathLike, Run], workers: int) -> None:
    """`train` of several runs by folder, side by side; the features that they share are computed first."""
    shared = {(run.profile.hash, run.faces, run.seed): run for run in runs.values()}
    for run in shared.values():
        keys, detector = run.profile.clip, build("ufd", run.profile)
        for split, versions in (("train", keys.versions), ("val", 0)):
            cached(detector, run.faces, labelled(run.faces, split, keys.frames), versions, run.seed)
    tasks = [(run.name, run.profile, run.faces, out, run.seed) for out, run in runs.items()]
    side_by_side(train, tasks, workers, "training, detectors")
