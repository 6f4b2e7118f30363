"""Stage 4 of unsupervised detection: is this one video authentic? Judged alone, by what stages 2 and 3 left behind."""

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from unmask import contrastive, unsupervised
from unmask.camera_clustering import settings_of
from unmask.camera_evidence import CameraEvidence
from unmask.clustering import UNATTRIBUTED
from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import write_manifest
from unmask.detectors import base
from unmask.fingerprints import extract, face_hulls, media_of
from unmask.preprocessing import preprocess
from unmask.profile import Profile, write_atomic
from unmask.scoring import best_locator, expand, placeholder_manifest, printable

VERDICTS = ("authentic", "manipulated")


def authenticate(
    media: Iterable[str | os.PathLike],
    model: str | os.PathLike,
    out: str | os.PathLike,
    profile: Profile,
    seed: int,
    locator: str | None = None,
    workers: int = 1,
) -> pd.DataFrame:
    """Judge files and folders by the stages in the folder `model`; one row per input, failures too, in their order.

    Writes `out` (CSV): path, status, verdict, score = P(fake), its parts (`unmask.unsupervised.Judge.VARIANTS`), the
    inter-frame steps, the number of the training camera that filmed it (-1 = none of them), and the reason of a
    failure. Every video is judged by itself: the same file gets the same score in any company.
    Raises CheckpointError for the model and LocatorError for the locator.
    """
    judge = unsupervised.Judge.load(model, seed)
    if np.isnan(judge.threshold):
        raise base.CheckpointError(f"{model} has no threshold of seed {seed} yet; run stage 3 to its end.")
    card = base.read_checkpoint(unsupervised.stage_folder(model, 3, seed))[1]
    paths = list(expand(media))
    with tempfile.TemporaryDirectory() as folder:
        manifest, crops = Path(folder) / "manifest.parquet", Path(folder) / "crops"
        df = placeholder_manifest(paths, Path(folder) / "media")
        write_manifest(df, manifest)
        chosen = locator or best_locator()
        _warn(chosen, model, seed)
        items = preprocess(manifest, crops, locator=chosen, workers=workers, **card["preprocessing"])
        found, evidence = judge_crops(judge, df, paths, crops, model, profile, workers)
    table = df[["item_id"]].assign(path=[printable(p) for p in paths]).merge(items, on="item_id", how="left")
    table = table.join(found, on="item_id")
    table["filmed_by"] = table["item_id"].map(evidence["camera"]).fillna(UNATTRIBUTED).astype(int)
    verdict = np.where(table["final"] >= judge.threshold, VERDICTS[1], VERDICTS[0])
    table = table.assign(verdict=np.where(table["final"].isna(), "", verdict)).rename(columns={"final": "score"})
    shown = ["path", "status", "verdict", "score", *(c for c in found.columns if c != "final"), "filmed_by", "reason"]
    write_atomic(out, table[shown].to_csv(index=False, float_format="%.6f"))
    return table[shown]


def judge_crops(
    judge: unsupervised.Judge, df: pd.DataFrame, paths: list[Path], crops: Path, model: str | os.PathLike,
    profile: Profile, workers: int = 1,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """What the judge says of the media in `df`, and what the cameras of its training videos say of them.

    paths: theirs, in its order; crops: the folder of their crops. Returns P(fake) by `Judge.VARIANTS` with inter-frame
    steps, and the table of `CameraEvidence`; index item_id, media without a face or a fingerprint are missing.
    """
    start = contrastive.starting_network(unsupervised.network(profile), profile.unsupervised.init, profile.seed)
    store, index = CropStore(crops), read_index(crops)
    index = index.sort_values(["item_id", "frame"], ignore_index=True)
    evidence = _cameras(df, paths, crops, model, profile, workers)
    found = pd.DataFrame(columns=[*judge.VARIANTS, *unsupervised.STEPS], dtype=float)
    if len(index):
        features = unsupervised.measure_crops(index, store, start, workers).set_index("item_id")
        found = judge(store, index, features, evidence["logit"])
    return found, evidence


def _cameras(
    df: pd.DataFrame, paths: list[Path], crops: Path, model: str | os.PathLike, profile: Profile, workers: int
) -> pd.DataFrame:
    """What the training videos' cameras say of each medium (`CameraEvidence.table`)."""
    made = CropStore(crops).settings()
    media = media_of(df, paths, face_hulls(read_index(crops), made["size"], made["align"]))
    folder = crops.parent / "fingerprints"
    return CameraEvidence.load(model).table(folder, extract(media, folder, settings_of(profile), workers))


def _warn(locator: str, model, seed: int) -> None:
    """Say so where faces are found by another locator than those that the stages learned from."""
    kept = unsupervised.stage_folder(model, 3, seed) / unsupervised.THRESHOLD_FILE
    learned = json.loads(kept.read_text(encoding="utf-8")).get("locators", [])
    if learned and locator not in learned:
        print(
            f"Faces are found by {locator}, but the stages learned from faces found by {', '.join(learned)}: "
            "crops differ, and so may verdicts.",
            file=sys.stderr,
        )
