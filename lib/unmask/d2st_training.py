"""Train adapters in a frozen CLIP in three stages: images and single frames, then clips, then both together.

Labelled media of the train split teach, with fakes made of its real ones; those of the validation split, treated alike,
choose the epoch. No step sees the test split. The blocks before the first adapter run once (`prefixes`), unless the
profile says otherwise. Beyond one GPU, `accelerate launch -m unmask.cli train d2st ...`: the processes share every
batch, and the loss and its gradient are those of the whole batch.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import AutocastKwargs
from torch import nn

from unmask import (
    clip_bank,
    clip_views,
    clips,
    d2st_fitting,
    d2st_losses,
    d2st_objective,
    d2st_plan,
    hulls,
    prefixes,
    sbi,
)
from unmask.clip_bank import Clips
from unmask.clip_training import Faces, labelled
from unmask.d2st_fitting import Fitter, Options
from unmask.d2st_objective import TERMS
from unmask.data.crops import CropStore
from unmask.data.manifest import read_manifest
from unmask.detectors import base, clip_backbone, clip_d2st, clip_prompts, d2st, st_adapter
from unmask.detectors.clip_d2st import AdaptedClip
from unmask.learning import finished
from unmask.pairs import TrainingError, fingerprint
from unmask.parallel import in_turn, side_by_side
from unmask.prefixes import LivePrefixes, Prefixes
from unmask.profile import Profile, digest, source_hash
from unmask.training import STATE, own_randomness, precision

STAGES = (1, 2, 3)
SOURCES = (
    clip_bank, clip_views, clips, d2st_fitting, d2st_losses, d2st_objective, d2st_plan, prefixes, hulls, sbi,
    clip_backbone, clip_prompts, clip_d2st, d2st, st_adapter, base,
)  # fmt: skip
ALL = 10**9  # crops of a medium
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Run:
    """One training: what to train on what, from where. name: "d2st" or "st-adapter"; init: the checkpoint of the stage
    before, for stages 2 and 3."""

    name: str
    stage: int
    profile: Profile
    faces: Faces
    seed: int
    init: str | os.PathLike | None = None


def options_of(run: Run) -> Options:
    """What the profile says of a run. TrainingError for a stage that does not exist."""
    keys, stage = run.profile.d2st, run.stage
    if stage not in STAGES:
        raise TrainingError(f"There are stages 1, 2 and 3, not {stage}.")
    staged = {name: keys[name][stage - 1] for name in ("samples", "epochs", "batch", "lr")}
    shared = ("frames", "versions", "blends", "even_rates", "weight_decay", "warmup", "ema")
    alike = {name: keys[name] for name in shared}
    terms = {name: keys[name] for name in TERMS[stage]}
    return Options(stage, run.seed, **staged, **alike, recipe=run.profile.sbi.recipe, terms=terms)


def build(name: str, profile: Profile) -> AdaptedClip:
    """A new detector on the profile's CLIP; the temporal pathway adds nothing yet. TrainingError if it cannot be."""
    keys = profile.d2st
    if name == "d2st" and keys.mode == "reference":
        raise TrainingError("The published layer needs four frames, stage 1 learns from one: set d2st.mode=aligned.")
    config = {"backbone": profile.clip.backbone, "weights": profile.clip.weights or None}
    config |= {key: keys[key] for key in ("placement", "frames")}
    if name == "d2st":
        config |= {key: keys[key] for key in ("mode", "backend", "pathways", "embedding", "differences")}
    try:
        detector = base.build(name, **config)
    except ValueError as error:
        raise TrainingError(f"{name} cannot be built from the profile's `clip` and `d2st` keys: {error}") from error
    for adapter in detector.adapters if name == "d2st" else ():
        if "temporal" in adapter.paths:
            nn.init.zeros_(adapter.paths["temporal"].out.weight)
            nn.init.zeros_(adapter.paths["temporal"].out.bias)
    return detector


def _start(run: Run) -> tuple[AdaptedClip, str]:
    """The detector that a stage begins with, and the hash of the weights that it takes over."""
    if run.stage == 1 and run.init is not None:
        raise TrainingError("Stage 1 begins with the CLIP alone: leave out --init.")
    if run.stage == 1:
        return build(run.name, run.profile), ""
    if run.init is None:
        raise TrainingError(
            f"Stage {run.stage} begins where stage {run.stage - 1} ended: name its checkpoint by --init."
        )
    detector, card = base.load_checkpoint(run.init)
    if detector.name != run.name or card.get("stage") != run.stage - 1:
        raise TrainingError(f"{run.init} is not a checkpoint of stage {run.stage - 1} of {run.name}.")
    keys, config = run.profile.d2st, detector.config
    if other := next((name for name in config if name in keys and config[name] != keys[name]), None):
        raise TrainingError(f"{run.init} has d2st.{other}={config[other]}, and the profile {keys[other]}.")
    return detector, card["sha256"]


def _rows(run: Run) -> dict[str, pd.DataFrame]:
    """Index rows of the splits, with label and data set."""
    datasets = read_manifest(run.faces.manifest).set_index("item_id")["dataset"]
    rows = {split: labelled(run.faces, split, ALL) for split in ("train", "val")}
    return {split: part.assign(dataset=part["item_id"].map(datasets)) for split, part in rows.items()}


def banks(run: Run, detector: AdaptedClip, workers: int) -> dict[str, Prefixes | LivePrefixes]:
    """The clips that a run learns from ("train") and is judged by ("val"): tokens in a cache, or made when asked for.

    A validation clip has one augmented view, always the same.
    """
    keys, store, found = run.profile.d2st, CropStore(run.faces.crops), {}
    for split, rows in _rows(run).items():
        versions = keys.versions if split == "train" else 1
        made = Clips(
            store, rows, detector.input_spec.size, keys.frames, versions, run.seed, run.profile.sbi.recipe,
            blends=keys.blends > 0,
        )  # fmt: skip
        if keys.cache:
            found[split] = prefixes.of_clips(detector, made, run.faces.features, workers)
        else:
            found[split] = LivePrefixes(detector, made)
    return found


def new_accelerator() -> Accelerator:
    """In float32 on a processor, which computes these networks slower in bfloat16, though Accelerate, which wants one
    precision for all trainings of a process, is told what the others are told. Processes wait long for each other:
    while one computes what goes into the cache."""
    handlers = [AutocastKwargs(enabled=torch.cuda.is_available()), InitProcessGroupKwargs(timeout=PATIENCE)]
    return Accelerator(mixed_precision=precision(), kwargs_handlers=handlers)


def train(run: Run, out: str | os.PathLike) -> Path:
    """Train one stage and leave the checkpoint of the epoch with the lowest validation loss in `out`; returns `out`.

    Killed at any point, the same call goes on from the last whole epoch and ends with the same weights; finished and
    unchanged, it returns at once. Raises TrainingError, and CheckpointError for `init`.
    """
    out, options = Path(out), options_of(run)
    with own_randomness(run.seed):
        accelerator = new_accelerator()
        detector, taken = _start(run)
        used = [[fingerprint(rows), rows["label"].tolist(), rows["dataset"].tolist()] for rows in _rows(run).values()]
        source = source_hash(*SOURCES, sys.modules[__name__])
        key = digest([run.name, detector.config, asdict(options), run.profile.d2st.cache, taken, used, source])
        if finished(out, key):
            return out
        detector.to(accelerator.device)
        with accelerator.main_process_first():  # the others find what it computed
            found = banks(run, detector, run.profile.workers)
        history = Fitter(accelerator, detector, found, options, out / STATE, key).run(out.name)
    accelerator.wait_for_everyone()  # another may still be reading the state that is removed below
    if accelerator.is_main_process:
        base.save_checkpoint(
            detector, out, training_key=key, seed=run.seed, stage=run.stage, options=asdict(options), history=history,
            init=taken, preprocessing=CropStore(run.faces.crops).settings(),
        )  # fmt: skip
        (out / STATE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return out


def train_all(chains: Sequence[Mapping[str | os.PathLike, Run]], workers: int) -> None:
    """`train` of runs by folder, a chain's one after another, chains side by side; what banks lack first."""
    shared = {}
    for run in (next(iter(chain.values())) for chain in chains):
        keys = run.profile.d2st
        shared[run.faces, run.seed, keys.placement, keys.frames, keys.versions, keys.blends > 0] = run
    for run in shared.values():
        banks(run, build(run.name, run.profile), workers)
    tasks = [tuple((train, (run, out)) for out, run in chain.items()) for chain in chains]
    side_by_side(in_turn, tasks, workers, "training, chains of stages")
