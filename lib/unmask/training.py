"""Train a detector on pairs of a real face and a fake: a short visible loop on Hugging Face Accelerate.

With `source="sbi"` only crops of real media are read (labels choose the reals, no fake is ever opened): those of the
train split to learn from, those of the validation split, with their self-blends, to choose the checkpoint. With
`source="fakes"`, the supervised reference, the labelled fakes of the same two splits take the place of self-blends. No
step sees the test split.
"""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unmask import hulls, jobstep, optim, pairs, sbi
from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest
from unmask.detectors import base, frequency
from unmask.pairs import (
    LabelledPairs,
    SelfBlendPairs,
    TrainingError,
    batch_plan,
    fake_crops,
    fingerprint,
    pair_loader,
    real_crops,
)
from unmask.parallel import side_by_side
from unmask.profile import Profile, digest, source_hash, write_atomic
from unmask.progress import track

STATE = "last.pt"
TIMES = "epochs.json"  # when each epoch ended, seconds since 1970; None where that is not known
DIVERGED = "The loss is no longer a number; lower train.lr."

# What `unmask train` knows by name: the detector, whose keys the profile has, and changes of these. Detectors of your
# own (`unmask.plugins`) come to these.
VARIANTS: dict[str, tuple[str, dict]] = {
    "convnext": ("convnext", {}),
    "convnext-fusion": ("convnext", {"fusion": "topdown"}),
    "convnext-frequency": ("convnext", {"join": "attention"}),
    "residual": ("residual", {}),
}


def variant(name: str) -> tuple[str, dict]:
    """The detector of a variant and the changes of its keys. TrainingError for an unknown one."""
    if name in VARIANTS:
        return VARIANTS[name]
    try:
        own = base.registered(name)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if own.__module__.startswith("unmask."):
        raise TrainingError(f"{name} is not trained on pairs of frames; those that are: {', '.join(VARIANTS)}.")
    return name, {}


@dataclass(frozen=True)
class Options:
    """The profile's `train` and `sbi` keys, with the seed. `shuffle` trains the shuffled-label control.

    source: "sbi" (real faces and their self-blends) or "fakes" (real and labelled fake faces, supervised). layer_decay:
    see `optim.parameter_groups`. sam: radius of sharpness-aware minimisation, 0 is off. compile: use torch.compile.
    select: keep the "best" epoch by validation loss, or the "last", where validation has too few videos to choose by.
    """

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
    source: str = "sbi"
    layer_decay: float = 1.0
    sam: float = 0.0
    compile: bool = False
    select: str = "best"
    loaders: int = 0
    shuffle: bool = False

    def __post_init__(self):
        if self.source not in ("sbi", "fakes"):
            raise TrainingError(f"train.source is sbi or fakes, not {self.source!r}.")
        if self.select not in ("best", "last"):
            raise TrainingError(f"train.select is best or last, not {self.select!r}.")

    def key(self) -> str:
        """Hash of all that changes the result."""
        return digest({k: v for k, v in vars(self).items() if k != "loaders"})


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a fraction of the steps, then half a cosine to zero."""
    ramp = max(1, round(warmup * steps))
    return (step + 1) / ramp if step < ramp else 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def _loss(
    detector, forward, images: torch.Tensor, edges: torch.Tensor, boundary: float, flipped: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the label, plus `boundary` times that of the blending boundary where the detector locates it."""
    labels = torch.tensor([0.0, 1.0], device=images.device).repeat(images.shape[0])
    labels = torch.where(flipped.repeat_interleave(2), 1 - labels, labels)
    logits, found = forward(detector.prepare(images.flatten(0, 1)))
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    if boundary and found is not None:
        loss = loss + boundary * F.binary_cross_entropy_with_logits(found, edges.flatten(0, 1))
    return loss


def _flips(rows: list[dict], options: Options) -> torch.Tensor:
    """Which pairs have their labels exchanged, bool[len(rows)]: none, or in the control a fixed half of the crops."""
    keys = (f"{options.seed}/{row['item_id']}/{row['frame']}" for row in rows)
    return torch.tensor([options.shuffle and int(digest(key), 16) % 2 == 1 for key in keys])


@torch.no_grad()
def validate(detector, loader) -> dict[str, float]:
    """AUC and cross-entropy on the fixed pairs of the validation faces."""
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
    """Where a module's parameters live; the processor for a module without any."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def precision() -> str:
    """bf16 where the device computes in it, GPU or processor; float32 elsewhere."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if found.get("avx512_bf16") or found.get("amx_bf16") else "no"


def save_state(path: Path, state: dict) -> None:
    """Write what an interrupted training needs to go on, atomically, and beside it when this epoch ended (TIMES).

    Raises TrainingError where the job that this runs in is to stop at its next checkpoint (see `jobstep`).
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())
    times, epochs = path.with_name(TIMES), len(state["history"])
    ended = json.loads(times.read_text(encoding="utf-8"))[: epochs - 1] if epochs > 1 and times.exists() else []
    write_atomic(times, json.dumps([*ended, *[None] * (epochs - 1 - len(ended)), round(time.time(), 3)]) + "\n")
    if jobstep.stopping():
        raise TrainingError(jobstep.STOPPED)


def seconds_of(folder: str | os.PathLike) -> float:
    """Wall-clock seconds that the training in a checkpoint's folder took, validation included.

    Its epochs times their median length, so that pauses of an interrupted training do not count; NaN where one epoch
    alone was trained, or none.
    """
    try:
        ended = json.loads((Path(folder) / TIMES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return float("nan")
    steps = np.diff(np.array(ended, float))
    return float(len(ended) * np.nanmedian(steps)) if np.isfinite(steps).any() else float("nan")


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
    """Train a `variant` with `config`, leave the checkpoint of the best validation epoch in `out`; `out`.

    Killed at any point, the same call goes on from the last whole epoch and ends with the same weights; finished and
    unchanged (options, crops that are used, source code), it returns at once. Raises TrainingError.
    """
    kind, changes = variant(name)
    out, config = Path(out), dict(config) | changes
    splits = {split: _split_rows(index, manifest, split, options) for split in ("train", "val")}
    used = [fingerprint(rows) for split in splits.values() for rows in split]
    source = source_hash(sbi, hulls, optim, pairs, base, frequency, base.module(kind), sys.modules[__name__])
    folder = _init_folder(options)
    init = base.read_checkpoint(folder)[1]["sha256"] if folder else ""
    key = digest([name, config, options.key(), init, *used, source])
    if (out / base.CONFIG).exists() and json.loads((out / base.CONFIG).read_text()).get("training_key") == key:
        return out
    with own_randomness(options.seed):
        accelerator = Accelerator(mixed_precision=precision())
        detector = _start(kind, config, options)
        spec = detector.input_spec
        data, val_data = (_pairs(store, rows, spec, options, split == "train") for split, rows in splits.items())
        return _fit(accelerator, detector, data, val_data, splits["train"][0], out, options, key)


def _split_rows(index: pd.DataFrame, manifest: pd.DataFrame, split: str, options: Options) -> list[pd.DataFrame]:
    """The crops that a split lends to training: those of real media and, if supervised, those of fakes."""
    reals = real_crops(index, manifest, split)
    return [reals] if options.source == "sbi" else [reals, fake_crops(index, manifest, split)]


def _pairs(store: CropStore, rows: list[pd.DataFrame], spec: base.InputSpec, options: Options, training: bool):
    kind = SelfBlendPairs if options.source == "sbi" else LabelledPairs
    return kind(store, *rows, spec.size, options.seed, options.recipe, training, spec.native)


def init_folder(init: str) -> Path | None:
    """Where initial weights are: a checkpoint of the kit by name, or a folder; None for "none"."""
    if init == "none":
        return None
    kept = Path(__file__).parent / "weights" / init
    return kept if kept.is_dir() else Path(init)


def _init_folder(options: Options) -> Path | None:
    """Where the initial weights of a run are. The control starts from nothing."""
    return None if options.shuffle else init_folder(options.init)


def _start(kind: str, config: dict, options: Options):
    """The detector as training finds it: random or timm's weights, or what fits of those of `options.init`."""
    try:
        detector = base.build(kind, **config)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"The detector cannot be built from the profile's `{kind}` keys: {error}") from error
    folder = _init_folder(options)
    if folder is not None:
        (kept, card), own = base.read_checkpoint(folder), detector.state_dict()
        fitting = {name: value for name, value in kept.items() if name in own and own[name].shape == value.shape}
        if card["detector"] != kind or not {name for name in own if name.startswith("backbone.")} <= set(fitting):
            raise TrainingError(
                f"The weights that train.init names ({options.init}) are of another architecture; set train.init=none."
            )
        detector.load_state_dict(own | fitting)
    return detector


def _fit(accelerator, detector, data, val_data, rows, out: Path, options: Options, key: str) -> Path:
    plans = [batch_plan(rows, options.seed, options.batch, options.frames_per_clip, e) for e in range(options.epochs)]
    steps = sum(map(len, plans))
    groups = optim.parameter_groups(detector, options.lr, options.weight_decay, options.layer_decay)
    optimizer = torch.optim.AdamW(groups)
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
    batches = iter(pair_loader(data, [batch for plan in ahead for batch in plan], options.loaders))
    val_batches = [[(0, i) for i in range(k, min(k + 16, len(val_data)))] for k in range(0, len(val_data), 16)]
    for plan in track(ahead, label=f"training {out.name}, epochs"):
        if options.patience and history and len(history) - _best_epoch(history) > options.patience:
            break
        # Seeded by epoch, not once: a resumed run then draws the same noise, on every device.
        torch.manual_seed(int(digest([options.seed, len(history)]), 16))
        losses = _epoch(accelerator, parts, (next(batches) for _ in plan), plan, data, options)
        shown = accelerator.unwrap_model(average.module if average else detector)
        figures = validate(shown, pair_loader(val_data, val_batches, 0))
        history.append({"epoch": len(history), "loss": float(np.mean(losses)), **figures})
        if options.select == "last" or _best_epoch(history) == len(history) - 1:
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
    model = accelerator.unwrap_model(detector)
    forward = torch.compile(model.with_boundary) if options.compile else model.with_boundary
    boundary = options.boundary if data.boundary and not options.shuffle else 0.0
    losses = []
    for (images, edges), chosen in zip(batches, plan, strict=True):
        flipped = _flips([data.rows[i] for _, i in chosen], options).to(accelerator.device)
        images, edges = images.to(accelerator.device), edges.to(accelerator.device)

        def backward() -> torch.Tensor:
            with accelerator.autocast():
                loss = _loss(model, forward, images, edges, boundary, flipped)  # noqa: B023
            if not torch.isfinite(loss):
                raise TrainingError(DIVERGED)
            accelerator.backward(loss)
            return loss

        optimizer.zero_grad(set_to_none=True)
        losses.append(backward().item())
        if options.sam:
            optim.sharpness_aware(model, options.sam, backward)
        accelerator.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        parts["scheduler"].step()
        if "average" in parts:
            parts["average"].update_parameters(detector)
    return losses


@dataclass(frozen=True)
class Run:
    """One training among several: the variant, and what differs from the profile's detector and `train` keys."""

    seed: int
    name: str = "convnext"
    shuffle: bool = False
    config: Mapping = field(default_factory=dict)
    options: Mapping = field(default_factory=dict)


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
    return train_run(Run(seed, name, shuffle), profile, manifest, crops, out)


def train_run(
    run: Run, profile: Profile, manifest: str | os.PathLike, crops: str | os.PathLike, out: str | os.PathLike
) -> Path:
    """`train_detector` for a `Run`."""
    given = {**profile.train, **run.options}
    options = Options(seed=run.seed, recipe=profile.sbi.recipe, shuffle=run.shuffle, **given)
    # A detector of your own has no keys in the profile: its constructor's defaults hold.
    config = {**profile.get(variant(run.name)[0], {}), **run.config}
    return train(run.name, config, read_manifest(manifest), read_index(crops), CropStore(crops), out, options)


def train_runs(
    profile: Profile,
    manifest: str | os.PathLike,
    crops: str | os.PathLike,
    runs: Mapping[str | os.PathLike, Run],
) -> None:
    """`train_run` for several runs by folder, `side_by_side`."""
    tasks = [(run, profile, manifest, crops, out) for out, run in runs.items()]
    side_by_side(train_run, tasks, profile.workers, "training, runs")
