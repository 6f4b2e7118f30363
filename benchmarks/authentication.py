"""What a panel says of real media that its detectors never saw: verdicts, and who gets "cannot tell" and why.

    python benchmarks/authentication.py MEDIA --work DIR [--out benchmarks/RESULTS.md]

MEDIA is a folder as for `run_all.sh --data` (real/, fake/, media.csv with groups and splits); faces are found by YuNet.
Two questions: the test split, by what the other media teach, and the other media, by what the test split teaches. Those
to learn from are dealt out by groups in two halves; of each family (`residual` with profile `few` on labelled fakes,
and `ufd` on the kit's own small CLIP) one network learns from either half and is calibrated on the other, so a panel
has four members. A killed run goes on where it stopped. DIR gets a row and a page for every medium.
"""

import argparse
import platform
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sections import processor, write_section

from unmask import clip_training, panel
from unmask.data.datasets import index
from unmask.data.manifest import media_path, write_manifest
from unmask.explain import explain
from unmask.preprocessing import preprocess
from unmask.profile import load_profile
from unmask.training import train_detector

HEADING = "## Authentication of real videos"


def halves(manifest: pd.DataFrame, learned: pd.Series, folder: Path) -> list[Path]:
    """Two manifests in which each half of the groups to learn from is once train and once val; the rest is test."""
    groups = manifest[learned].groupby("group_id")["label"].agg(["max", "size"])
    groups = groups.sort_values(["max", "size"], ascending=False, kind="stable")
    side = pd.Series(np.arange(len(groups)) // 2 % 2 ^ np.arange(len(groups)) % 2, groups.index)
    paths = []
    for half in (0, 1):
        split = np.where(manifest["group_id"].map(side) == half, "train", "val")
        paths.append(folder / f"half-{half}.parquet")
        write_manifest(manifest.assign(split=np.where(learned, split, "test")), paths[-1])
    return paths


def panel_of(manifests: list[Path], crops: dict[str, Path], folder: Path, few, demo) -> panel.Panel:
    """Train each family on each half, calibrate on the other, and write the panel."""
    members = {}
    for half, path in enumerate(manifests):
        residual, ufd = folder / f"residual-{half}", folder / f"ufd-{half}"
        train_detector("residual", few, path, crops["few"], residual, seed=0)
        clip_training.train("ufd", demo, clip_training.Faces(path, crops["demo"], folder / "features"), ufd, 0)
        members |= panel.score_validation([residual, ufd], path, crops.values())
    return panel.fit(members, folder / "panel.json", locators=["yunet"], **demo.evaluate)


def judged(media: Path, work: Path, epochs: int, workers: int) -> tuple[pd.DataFrame, list[str]]:
    """Verdicts on all media with the truth, and a sentence about every member of the panels."""
    few = load_profile("few", {"workers": workers, "train.source": "fakes", "train.epochs": epochs})
    demo = load_profile("demo", {"workers": workers, "preprocess.locator": "yunet", "clip.frames": 8})
    manifest, _ = index(media, "folder")
    work.mkdir(parents=True, exist_ok=True)
    path, crops = work / "manifest.parquet", {"few": work / "crops", "demo": work / "crops-demo"}
    write_manifest(manifest, path)
    for name, profile in (("few", few), ("demo", demo)):
        preprocess(path, crops[name], workers=workers, **profile.preprocess)
    tables, about = [], []
    for name, asked in (("test", manifest["split"] == "test"), ("train and val", manifest["split"] != "test")):
        folder = work / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        judges = panel_of(halves(manifest, ~asked, folder), crops, folder, few, demo)
        for one in judges.members:
            auc = f"AUC {one.auc:.2f} ({one.low:.2f} to {one.high:.2f})"
            about.append(f"- {name}: {one.name}, {auc} on {one.n_real} real and {one.n_fake} fake; "
                         f"{one.why_silent or 'votes'}")  # fmt: skip
        rows = manifest[asked]
        files = [media_path(row, path) for row in rows.to_dict("records")]
        table = explain(files, judges, folder / "pages", "yunet", workers)
        tables.append(table.assign(asked=name, label=rows["label"].to_numpy(), name=rows["path"].to_numpy()))
    return pd.concat(tables, ignore_index=True), about


def counted(table: pd.DataFrame) -> list[str]:
    """Lines of the result: verdicts by truth, and how many of them are right."""
    lines = ["| judged | truth | real | fake | cannot tell |", "|---|---|---|---|---|"]
    for (asked, label), part in table.groupby(["asked", "label"]):
        n = part["verdict"].value_counts()
        lines.append(f"| {asked} | {('real', 'fake')[label]} | " + " | ".join(
            str(n.get(verdict, 0)) for verdict in ("real", "fake", "cannot tell")) + " |")  # fmt: skip
    told = table[table["verdict"] != "cannot tell"]
    right = int(((told["verdict"] == "fake") == (told["label"] == 1)).sum())
    larger = int(told["label"].value_counts().max()) if len(told) else 0
    lines += ["", f"A verdict for {len(told)} of {len(table)}: {right} right, {larger} by always saying the class that "
              "most of them have."]  # fmt: skip
    return lines


def unknown(table: pd.DataFrame) -> list[str]:
    """Who got no verdict, and why."""
    rows = table[table["verdict"] == "cannot tell"]
    return [f"- {row.name}: {row.reasons}" for row in rows[["name", "reasons"]].itertuples(index=False, name="Row")]


def section(media: Path, work: Path, epochs: int, workers: int) -> str:
    """Measure everything; the section as Markdown. Who got no verdict is printed: the names are not the kit's."""
    table, about = judged(media, work, epochs, workers)
    print("No verdict:", *unknown(table), sep="\n")
    reasons = table["reasons"].str.split("; ").explode().str.split(":").str[0]
    causes = ", ".join(f"{cause} {count}" for cause, count in reasons[reasons != ""].value_counts().items())
    return "\n".join([
        HEADING, "",
        f"`python benchmarks/authentication.py`: {len(table)} videos from public repositories, not part of the kit; "
        f"CPU {processor()}, Python {platform.python_version()}, PyTorch {torch.__version__}. `residual` learned for "
        f"{epochs} epochs.", "", *counted(table), "", f"Reasons (a medium may have several): {causes}.", "",
        "Who judged, with AUC on the half that each was calibrated on:", "", *about, "",
    ])  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("media", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for crops, checkpoints and pages")
    parser.add_argument("--epochs", type=int, default=4, help="of residual (default 4)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced")
    arguments = parser.parse_args()
    found = section(arguments.media.resolve(), arguments.work, arguments.epochs, arguments.workers)
    print(found)
    if arguments.out:
        write_section(arguments.out, found)


if __name__ == "__main__":
    main()
