"""What a few real videos teach: self-blends of their reals alone, and their labelled fakes, beside what the files tell.

    python benchmarks/real_media.py MEDIA --work DIR [--method deepfacelive] [--out benchmarks/RESULTS.md]

MEDIA is a folder as for `run_all.sh --data` (real/, fake/, media.csv with groups and splits); faces are found by YuNet.
The network is `unmask train residual` with profile `few`, on windows that are not scaled again. Two questions are asked
of it: the test split, over seeds; and, because that has few pairs, every group that has fakes of `--method` with all
others to learn from. Detection accuracy, not speed; a killed run goes on where it stopped.
"""

import argparse
import platform
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sections import processor, write_section

from unmask.data.crops import CropStore, read_index
from unmask.data.datasets import index
from unmask.data.manifest import read_manifest, write_manifest
from unmask.detectors.base import load_checkpoint
from unmask.evaluation import join
from unmask.intervals import auc_interval
from unmask.leaks import file_facts, metadata_scores
from unmask.parallel import side_by_side
from unmask.preprocessing import preprocess
from unmask.profile import load_profile
from unmask.scoring import score_table
from unmask.training import Run, train_run

HEADING = "## A few real videos"
SOURCES = {"sbi": "self-blends of reals alone", "fakes": "labelled fakes"}


def trained(profile, crops: Path, runs: dict[Path, tuple[Run, Path]]) -> pd.DataFrame:
    """Score table of the test items of every run's manifest; `detector` is what it learned from."""
    tasks = [(run, profile, manifest, crops, out) for out, (run, manifest) in runs.items()]
    side_by_side(train_run, tasks, profile.workers, "training, runs")
    tables, crop_index = [], read_index(crops)
    for out, (run, path) in runs.items():
        detector, card = load_checkpoint(out)
        manifest = read_manifest(path)
        judged = crop_index[crop_index["item_id"].isin(manifest.loc[manifest["split"] == "test", "item_id"])]
        table = score_table(detector, card, CropStore(crops), judged, "")
        tables.append(table[table["frame"] == -1].assign(detector=SOURCES[run.options["source"]]))
    return pd.concat(tables, ignore_index=True)


def folds(manifest: pd.DataFrame, method: str, folder: Path) -> list[Path]:
    """A manifest for every group with fakes of `method`: that group is the test split, val stays, the rest is train."""
    paths = []
    for group in sorted(manifest.loc[manifest["method"] == method, "group_id"].unique()):
        held = manifest["group_id"] == group
        split = np.where(held, "test", np.where(manifest["split"] == "val", "val", "train"))
        if set(split[manifest["label"] == 1]) != {"train", "val", "test"}:
            # The only group to validate on is held out; the last epoch is kept anyway, so any other will do.
            other = manifest.loc[~held & (manifest["method"] == method), "group_id"].iloc[0]
            split = np.where(manifest["group_id"] == other, "val", split)
        paths.append(folder / f"fold-{len(paths)}.parquet")
        write_manifest(manifest.assign(split=split), paths[-1])
    return paths


def ranked(part: pd.DataFrame) -> str:
    """Of the pairs of a real and a fake video of the same footage, in how many the fake is scored higher."""
    pairs = part[part["label"] == 0].merge(part[part["label"] == 1], on=["group_id", "subject", "seed"])
    if pairs.empty:
        return ""
    return f"{(pairs['score_y'] > pairs['score_x']).sum()} of {len(pairs)}"


def rows(question: str, scores: pd.DataFrame, manifest: pd.DataFrame, method: str) -> list[str]:
    """Lines of the table: everything pooled, and the fakes of `method` against the reals of the same groups."""
    joined = join(scores, manifest).merge(manifest[["item_id", "subject"]], on="item_id")
    own = set(manifest.loc[manifest["method"] == method, "group_id"])
    matched = joined[joined["group_id"].isin(own) & joined["method"].isin(["real", method])]
    lines = []
    for detector, shown in joined.groupby("detector", sort=False):
        cells = []
        for part in (shown, matched[matched["detector"] == detector]):
            wide = part.pivot(index=["item_id", "label", "group_id"], columns="seed", values="score").reset_index()
            auc, low, high = auc_interval(wide["label"], wide.iloc[:, 3:], wide["group_id"])
            cells.append(f"{auc:.3f} ({low:.3f} to {high:.3f})")
        counts = wide["label"].value_counts()
        cells += [f"{counts[0]} real, {counts[1]} fake", ranked(part), str(shown["seed"].nunique())]
        lines.append(f"| {question} | {detector} | " + " | ".join(cells) + " |")
    return lines


def table(media: Path, work: Path, method: str, seeds: int, workers: int) -> str:
    """Measure everything; the section as Markdown."""
    profile = load_profile("few", {"workers": workers})
    work.mkdir(parents=True, exist_ok=True)
    path, crops = work / "manifest.parquet", work / "crops"
    manifest, _ = index(media, "folder")
    write_manifest(manifest, path)
    preprocess(path, crops, workers=workers, **profile.preprocess)
    runs = {
        work / f"{source}-{seed}": (Run(seed, "residual", options={"source": source}), path)
        for source in SOURCES for seed in range(seeds)
    }  # fmt: skip
    tests = pd.concat([trained(profile, crops, runs), file_alone(manifest, path)], ignore_index=True)
    left_out = folds(manifest, method, work)
    runs = {
        work / f"{source}-{fold.stem}": (Run(0, "residual", options={"source": source}), fold)
        for source in SOURCES for fold in left_out
    }  # fmt: skip
    others = trained(profile, crops, runs)
    others = pd.concat([others, *(file_alone(read_manifest(fold), path) for fold in left_out)], ignore_index=True)
    counts = manifest["label"].value_counts()
    return "\n".join([
        HEADING, "",
        f"`python benchmarks/real_media.py`: {counts[0]} real and {counts[1]} fake videos from public repositories, "
        f"not part of the kit; CPU {processor()}, Python {platform.python_version()}, PyTorch {torch.__version__}. "
        "Area under the ROC curve of whole videos with 95 % intervals from 1000 draws over groups; chance is 0.5. "
        f"Matched: fakes of {method} against the very footage that they were made of. Across all videos, sources "
        "differ by format, so that pooled figures partly measure the file.", "",
        "| question | learned from | all videos | matched | videos there | fake above its own real | seeds |",
        "|---|---|---|---|---|---|---|",
        *rows("test split", tests, manifest, method),
        *rows(f"each group with {method} left out in turn", others, manifest, method), "",
    ])  # fmt: skip


def file_alone(manifest: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Scores of the test items by a random forest on size, length, rate, bits per pixel and codec."""
    scores = metadata_scores(file_facts(manifest, path))
    test = set(manifest.loc[manifest["split"] == "test", "item_id"])
    return scores[scores["item_id"].isin(test)].assign(detector="the file alone")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("media", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for crops and checkpoints")
    parser.add_argument("--method", default="deepfacelive", help="whose fakes have their own footage among the reals")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced")
    arguments = parser.parse_args()
    section = table(arguments.media, arguments.work, arguments.method, arguments.seeds, arguments.workers)
    print(section)
    if arguments.out:
        write_section(arguments.out, section)


if __name__ == "__main__":
    main()
