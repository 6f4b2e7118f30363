"""The detectors that the study sets against each other, and where the chapters left their scores.

A chapter that did not run, or ended for want of data, leaves no scores: its contenders are then missing, with the
reason, and everything else goes on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from unmask.evaluation import read_scores


@dataclass(frozen=True)
class Contender:
    """A detector by the name it is shown under; `detector` and `variant` are its own in scores/`table`.parquet.

    control: it must fail, or knows too little to be a detector, such as one trained on shuffled labels. checkpoint: its
    folder in the work folder, with {seed} in it, where it judges crops by itself; empty where it needs more than crops.
    """

    name: str
    chapter: str
    table: str
    detector: str
    variant: str = ""
    control: bool = False
    checkpoint: str = ""


CONTENDERS = (
    Contender("unsupervised", "03_unsupervised", "unsupervised", "unsupervised", "final"),
    Contender("unsupervised, exchanged", "03_unsupervised", "unsupervised", "unsupervised", "final-control", True),
    Contender(
        "ConvNeXt, self-blends", "05_convnext", "convnext", "convnext", "sbi", checkpoint="checkpoints/convnext-{seed}"
    ),
    Contender("ConvNeXt, labelled fakes", "05_convnext", "convnext", "convnext", "fakes"),
    Contender("ConvNeXt, shuffled labels", "05_convnext", "convnext", "convnext", "shuffled", True),
    Contender("mean over frames", "06_temporal", "temporal", "mean", "in order", checkpoint="checkpoints/mean-{seed}"),
    Contender("GRU", "06_temporal", "temporal", "gru", "in order", checkpoint="checkpoints/gru-{seed}"),
    Contender(
        "Transformer", "06_temporal", "temporal", "transformer", "in order", checkpoint="checkpoints/transformer-{seed}"
    ),
    Contender("CLIP, linear probe", "07_clip_prompts", "clip", "ufd", checkpoint="clip/checkpoints/ufd-{seed}"),
    Contender("CLIP, LayerNorm", "07_clip_prompts", "clip", "lntune", checkpoint="clip/checkpoints/lntune-{seed}"),
    Contender("CLIP, CoOp", "07_clip_prompts", "clip", "coop", checkpoint="clip/checkpoints/coop-{seed}"),
    Contender("CLIP, CoCoOp", "07_clip_prompts", "clip", "cocoop", checkpoint="clip/checkpoints/cocoop-{seed}"),
    Contender("CLIP + LaRE", "07_clip_prompts", "clip", "clip-lare:F2c"),
    Contender("LaRE error alone", "07_clip_prompts", "clip", "lare-error", control=True),
    Contender(
        "CLIP + D2ST", "08_clip_d2st", "clip_d2st", "d2st, stage 3", "clip", checkpoint="checkpoints/d2st/d2st-3-{seed}"
    ),
)


def gather(work: Path, contenders: Sequence[Contender] = CONTENDERS) -> tuple[pd.DataFrame, dict[str, str]]:
    """Scores of all contenders that left some, `detector` being their name, and the reason for every other one.

    work: the run's work folder. Raises ScoreError for a table that is there and is none.
    """
    tables, missing = [], {}
    for contender in contenders:
        path = work / "scores" / f"{contender.table}.parquet"
        if reason := _absent(work, contender, path):
            missing[contender.name] = reason
            continue
        scores = read_scores(path)
        own = scores[(scores["detector"] == contender.detector) & (scores["variant"] == contender.variant)]
        if own.empty:
            called = ", ".join(filter(None, (contender.detector, contender.variant)))
            missing[contender.name] = f"missing: {path.name} has no scores of {called}"
            continue
        tables.append(own.assign(detector=contender.name, variant=""))
    columns = ["item_id", "frame", "score", "detector", "variant", "seed", "checkpoint"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns), missing


def _absent(work: Path, contender: Contender, path: Path) -> str:
    """Why the chapter left no scores in this run, or nothing. Scores that outlived their chapter's results do count."""
    if reason := ended(work, contender.chapter):
        return f"missing: {reason}"
    return "" if path.is_file() else f"missing: {contender.chapter} left no scores"


def ended(work: Path, chapter: str) -> str:
    """Why a chapter ended early in this run, so that its other files are of an earlier one; "" if it did not."""
    results = work / "results" / f"{chapter}.json"
    return json.loads(results.read_text(encoding="utf-8"))["numbers"].get("ended", "") if results.is_file() else ""


def home(manifest: pd.DataFrame) -> str:
    """The data set that the study trains on: with most train rows, the first of equals; else the test split's first."""
    train = manifest.loc[manifest["split"] == "train", "dataset"]
    if len(train):
        return train.groupby(train, sort=False).size().idxmax()
    test = manifest.loc[manifest["split"] == "test", "dataset"]
    return (test if len(test) else manifest["dataset"]).iloc[0]


def coverage(scores: pd.DataFrame, manifest: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """What became of every test medium: a row per detector, data set and kind.

    scores: of `gather`; items: `unmask.data.crops.read_items`. Columns due, scored, rejected (no crop could be made,
    so no detector saw it), unjudged (this detector does not judge such media, or failed on them) and reasons: those of
    the rejected, most frequent first.
    """
    test = manifest[manifest["split"] == "test"].merge(items[["item_id", "status", "reason"]], on="item_id", how="left")
    rows = []
    for detector, part in scores.groupby("detector", sort=False):
        done = test["item_id"].isin(set(part["item_id"]))
        rejected = ~done & (test["status"] != "ok")
        for (dataset, kind), due in test.groupby(["dataset", "kind"], sort=True):
            out = rejected.loc[due.index]
            reasons = due.loc[out, "reason"].fillna("never preprocessed").value_counts()
            counts = {"due": len(due), "scored": int(done.loc[due.index].sum()), "rejected": int(out.sum())}
            counts["unjudged"] = counts["due"] - counts["scored"] - counts["rejected"]
            why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
            rows.append({"detector": detector, "dataset": dataset, "kind": kind, **counts, "reasons": why})
    return pd.DataFrame(rows)
