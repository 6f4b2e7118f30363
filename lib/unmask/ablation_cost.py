"""What the study's detectors cost, beside what they achieve on the home set, and which of them none beats for less."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes

from unmask.ablation_rows import whole_numbers
from unmask.contenders import CONTENDERS, Contender, gather, home
from unmask.data.manifest import read_manifest
from unmask.detectors import base
from unmask.evaluation import join
from unmask.figures import COLOURS
from unmask.intervals import auc_interval
from unmask.profile import Study
from unmask.training import seconds_of

COLUMNS = [
    "arm", "seeds", "n_real", "n_fake", "auc", "low", "high", "frames", "parameters", "trainable", "gflops",
    "frames_per_s", "train_s", "front", "note",
]  # fmt: skip
COUNTED = ["seeds", "n_real", "n_fake", "frames", "parameters", "trainable"]
BATCH = 8  # frames at a time when a detector of single frames is timed


@dataclass(frozen=True)
class Costed:
    """A contender with a checkpoint, what its price leaves out, and the checkpoints that were trained before it."""

    contender: Contender
    note: str = ""
    before: tuple[str, ...] = ()


_KNOWN = {contender.name: contender for contender in CONTENDERS}


def _clip(name: str, label: str, note: str = "") -> Costed:
    folder = f"clip/checkpoints/{name.replace(':', '-')}-{{seed}}"
    return Costed(Contender(label, "07_clip_prompts", "clip", name, checkpoint=folder), note)


def _head(name: str) -> Costed:
    return Costed(_KNOWN[name], before=(_KNOWN["ConvNeXt, self-blends"].checkpoint,))


_ST = Contender(
    "CLIP + ST-Adapter", "08_clip_d2st", "clip_d2st", "st-adapter, stage 2", "clip",
    checkpoint="checkpoints/d2st/st-adapter-2-{seed}",
)  # fmt: skip
COSTED = (
    Costed(
        replace(_KNOWN["unsupervised"], checkpoint="unsupervised/stage3-{seed}"),
        "the network alone, without fingerprints", ("unsupervised/stage2-{seed}",),
    ),
    Costed(_KNOWN["ConvNeXt, self-blends"]),
    _head("mean over frames"),
    _head("GRU"),
    _head("Transformer"),
    Costed(_KNOWN["CLIP, linear probe"]),
    _clip("clip-adapter", "CLIP, adapter on features"),
    Costed(_KNOWN["CLIP, LayerNorm"]),
    Costed(_KNOWN["CLIP, CoOp"]),
    Costed(_KNOWN["CLIP, CoCoOp"]),
    _clip("clip-finetune", "CLIP, fine-tuned"),
    _clip("clip-lare:F2c", "CLIP + LaRE, F2c", "without the diffusion model"),
    _clip("clip-lare:F4c", "CLIP + LaRE, F4c", "without the diffusion model"),
    Costed(_ST, before=("checkpoints/d2st/st-adapter-1-{seed}",)),
    Costed(_KNOWN["CLIP + D2ST"], before=tuple(f"checkpoints/d2st/d2st-{k}-{{seed}}" for k in (1, 2))),
)  # fmt: skip


def table(study: Study, costed: tuple[Costed, ...] = COSTED) -> pd.DataFrame:
    """A row per detector, `COLUMNS`: AUC, mean over seeds, on test videos of the home set (`home`), and price.

    frames: judged of a video; gflops: multiply-adds of a video, in thousands of millions (`base.cost` of a frame x
    frames); frames_per_s: `speed`, measured now; train_s: seconds that its training took, with all that it stands on
    (`training.seconds_of`; pretraining and features made beforehand are not in it), the first seed's. front: no
    detector of the table has as high an AUC for fewer multiply-adds. A detector without scores or checkpoint says so.
    """
    manifest = read_manifest(study.input("manifest.parquet", made_by="00_data"))
    videos = manifest[(manifest["split"] == "test") & (manifest["kind"] == "video")]
    videos = videos[videos["dataset"] == home(manifest)]
    scores, missing = gather(study.work, [one.contender for one in costed])
    options, rows = study.profile.evaluate, []
    for one in costed:
        name, folders = one.contender.name, _folders(study, one.contender.checkpoint)
        if name in missing or not folders:
            rows.append({"arm": name, "note": missing.get(name, "missing: no checkpoint")})
            continue
        own = scores[(scores["detector"] == name) & scores["item_id"].isin(videos["item_id"])]
        value = judged(own, videos, options.level, options.draws)
        paid = price(folders[0], own, study.profile.preprocess.frames)
        trained = [folders[0], *(found[0] for pattern in one.before if (found := _folders(study, pattern)))]
        paid["train_s"] = sum(map(seconds_of, trained)) if len(trained) == 1 + len(one.before) else float("nan")
        rows.append({"arm": name, **value, **paid, "note": one.note})
    found = whole_numbers(pd.DataFrame(rows).reindex(columns=COLUMNS), COUNTED)
    return found.assign(front=front(found["gflops"].to_numpy(float), found["auc"].to_numpy(float)))


def judged(scores: pd.DataFrame, videos: pd.DataFrame, level: float, draws: int) -> dict:
    """Seeds, counts and AUC with interval of one detector's scores of whole videos, on those that every seed has."""
    part = join(scores[scores["frame"] == -1], videos)
    wide = part.pivot(index=["item_id", "label", "group_id"], columns="seed", values="score").dropna()
    labels, groups = (wide.index.get_level_values(key).to_numpy() for key in ("label", "group_id"))
    auc, low, high = auc_interval(labels, wide.to_numpy(), groups, level, draws)
    n_fake = int((labels == 1).sum())
    counts = {"seeds": wide.shape[1], "n_real": len(labels) - n_fake, "n_fake": n_fake}
    return counts | {"auc": auc, "low": low, "high": high}


def price(checkpoint: Path, scores: pd.DataFrame, cropped: int) -> dict:
    """Frames of a video, parameters, those that learn, multiply-adds of a video in thousands of millions, and speed.

    A detector of clips sees its clip's number of frames; one of single frames as many as `scores`, its own, has of a
    video (median), or all that are `cropped` if it has kept none.
    """
    detector = base.load_checkpoint(checkpoint)[0]
    single = scores[scores["frame"] >= 0].groupby(["item_id", "seed"]).size()
    frames = int(single.median()) if len(single) else cropped
    frames = detector.input_spec.frames if detector.input_spec.frames > 1 else frames
    found = base.cost(detector)
    return {
        "frames": frames, "parameters": found["parameters"], "trainable": found["trainable"],
        "gflops": frames * found["multiply_adds"] / 1e9, "frames_per_s": speed(detector),
    }  # fmt: skip


@torch.no_grad()
def speed(detector: base.Detector, times: int = 3) -> float:
    """Frames per second, forward, on empty frames: the fastest of `times` tries after one to warm up."""
    size, length = detector.input_spec.size, detector.input_spec.frames
    shape = (1, length) if length > 1 else (BATCH, 1)
    extras = {name: torch.zeros(*shape, *detector.extra_shapes[name]) for name in detector.extras}
    clips, took = torch.zeros(*shape, 3, size, size), []
    for _ in range(times + 1):
        start = time.perf_counter()
        detector(clips, **extras)
        took.append(time.perf_counter() - start)
    return shape[0] * shape[1] / min(took[1:])


def front(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """bool[N]: which of N points no other beats, none being at most as dear and at least as good and not the same.

    costs, values: float[N]; a point with NaN is never one, and beats none.
    """
    known = ~(np.isnan(costs) | np.isnan(values))
    as_good = (costs[None] <= costs[:, None]) & (values[None] >= values[:, None])
    better = as_good & ((costs[None] < costs[:, None]) | (values[None] > values[:, None]))
    return known & ~better.any(1)


def draw(ax: Axes, found: pd.DataFrame) -> None:
    """AUC with its interval over the multiply-adds of a video, for the rows of `table` that have both; the front."""
    known = found.dropna(subset=["gflops", "auc"]).sort_values(["gflops", "auc"])
    for k, row in enumerate(known.to_dict("records")):
        colour = COLOURS["fake" if row["front"] else "control"]
        error = None if np.isnan(row["low"]) else [[row["auc"] - row["low"]], [row["high"] - row["auc"]]]
        ax.errorbar(row["gflops"], row["auc"], yerr=error, fmt="o", color=colour, capsize=2, elinewidth=1)
        beside = (4, 4) if k % 2 else (4, -9)  # neighbours cost much the same
        ax.annotate(row["arm"], (row["gflops"], row["auc"]), xytext=beside, textcoords="offset points", fontsize=7)
    best = known[known["front"]]
    ax.plot(best["gflops"], best["auc"], color=COLOURS["fake"], linewidth=1, drawstyle="steps-post")
    ax.axhline(0.5, color=COLOURS["control"], linestyle="--")
    ax.set(xscale="log", xlabel="multiply-adds of a video, thousands of millions", ylabel="AUC on the home set")


def _folders(study: Study, pattern: str) -> list[Path]:
    """The checkpoints of the study's seeds that are there."""
    found = [study.work / pattern.format(seed=seed) for seed in study.seeds]
    return [folder for folder in found if (folder / base.CONFIG).is_file()]
