"""Judge detectors from score tables and the manifest alone: AUC with intervals over groups, EER, AP, thresholds.

The threshold of a detector is the one with the best balanced accuracy on the validation split of the data set it was
trained on; test scores never choose anything.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pandera.pandas as pa
import pyarrow
from sklearn.metrics import average_precision_score, roc_curve

from unmask.data.manifest import media_path, read_manifest
from unmask.intervals import auc_interval
from unmask.intervals import delong as delong  # for whoever asks this module
from unmask.metrics import (
    balanced_threshold,
    calibration_error,
    equal_error_rate,
    partial_auc,
    recalls,
    tpr_at_fpr,
)
from unmask.profile import write_atomic

SCORES = pa.DataFrameSchema(
    {
        "item_id": pa.Column(str),
        "frame": pa.Column("int32", pa.Check.ge(-1)),
        "score": pa.Column(float, pa.Check.in_range(0, 1)),
        "detector": pa.Column(str), "variant": pa.Column(str), "seed": pa.Column("int32"), "checkpoint": pa.Column(str),
    },
    strict=True, unique=["item_id", "frame", "detector", "variant", "seed"],
)  # fmt: skip
RUN = ["detector", "variant", "seed"]


class ScoreError(ValueError):
    """A score table that is missing, malformed, or does not fit the manifest."""


def write_scores(df: pd.DataFrame, path: str | os.PathLike) -> None:
    """Check a score table against its schema and write it as Parquet, whole or not at all. Raises ScoreError."""
    buffer = pyarrow.BufferOutputStream()
    _check(df, "The table").to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue().to_pybytes())


def read_scores(path: str | os.PathLike) -> pd.DataFrame:
    """Read and check a score table. Raises ScoreError."""
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException) as error:
        raise ScoreError(f"{path} cannot be read as a score table, as a detector's chapter leaves them.") from error
    return _check(table, path)


def read_media_scores(
    path: str | os.PathLike, manifest: pd.DataFrame, manifest_path: str | os.PathLike
) -> pd.DataFrame:
    """The CSV that `unmask score` writes (or any with columns path and score) as a score table of clips.

    Files are found in the manifest by their absolute path, relative ones taken from the working directory; rows without
    a score, the failures, are left out. Raises ScoreError for another CSV and for scored files outside the manifest.
    """
    try:
        rows = pd.read_csv(path)[["path", "score"]].dropna(subset="score").astype({"path": str, "score": float})
    except (OSError, ValueError, KeyError) as error:
        raise ScoreError(f"{path} cannot be read as a CSV with columns path and score.") from error
    known = {os.path.abspath(media_path(row, manifest_path)): row["item_id"] for row in manifest.to_dict("records")}
    found = rows["path"].map(os.path.abspath).map(known)
    if found.isna().any():
        raise ScoreError(
            f"{int(found.isna().sum())} scored files are not in the manifest (the first: "
            f"{rows.loc[found.isna(), 'path'].iloc[0]}); give the manifest that lists them, and start in the folder "
            "where they were scored."
        )
    run = {"frame": np.int32(-1), "score": rows["score"], "detector": Path(path).stem, "variant": "", "checkpoint": ""}
    table = found.rename("item_id").to_frame().assign(**run, seed=0).astype({"frame": "int32", "seed": "int32"})
    return _check(table, path)


def _check(table: pd.DataFrame, name: str | os.PathLike) -> pd.DataFrame:
    """The table if it fits the schema; otherwise ScoreError with the first fault."""
    try:
        return SCORES.validate(table.reset_index(drop=True), lazy=True)
    except pa.errors.SchemaErrors as error:
        column, check, case = error.failure_cases[["column", "check", "failure_case"]].iloc[0]
        raise ScoreError(f"{name} is not a valid score table: {column} fails {check} (found {case}).") from error


def join(scores: pd.DataFrame, manifest: pd.DataFrame) -> pd.DataFrame:
    """Scores with what the manifest knows of each item. ScoreError if an item is unknown."""
    unknown = set(scores["item_id"]) - set(manifest["item_id"])
    if unknown:
        raise ScoreError(
            f"{len(unknown)} scored items are not in the manifest (the first: {sorted(unknown)[0]}); "
            "give the manifest they were scored from."
        )
    return scores.merge(manifest[["item_id", "kind", "dataset", "split", "label", "method", "group_id"]], on="item_id")


def levels(df: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The joined table at each level: `frame` (every frame of a video), `video` and `image` (one row per item)."""
    clip, video = df["frame"] == -1, df["kind"] == "video"
    return {"frame": df[~clip & video], "video": df[clip & video], "image": df[clip & ~video]}


@dataclass(frozen=True)
class Slice:
    """Part of a test set: which data set, method and reals (`all`, or `matched`: those in the fakes' groups)."""

    dataset: str
    method: str
    reals: str


def slices(df: pd.DataFrame) -> dict[Slice, pd.DataFrame]:
    """Every data set as a whole and every method against its reals; `matched` only where it differs from `all`."""
    found = {}
    for dataset, part in df.groupby("dataset", sort=True):
        reals, fakes = part[part["label"] == 0], part[part["label"] == 1]
        if fakes["method"].nunique() != 1:
            found[Slice(dataset, "all", "all")] = part
        for method, own in fakes.groupby("method", sort=True):
            matched = reals[reals["group_id"].isin(set(own["group_id"]))]
            found[Slice(dataset, method, "all")] = pd.concat([reals, own])
            if 0 < matched["item_id"].nunique() < reals["item_id"].nunique():
                paired = own[own["group_id"].isin(set(matched["group_id"]))]
                found[Slice(dataset, method, "matched")] = pd.concat([matched, paired])
    return found


def slices_by_kind(df: pd.DataFrame) -> dict[Slice, pd.DataFrame]:
    """`slices` of videos, then of images, whose methods are named "METHOD (image)" where there are videos, too.

    Never a video against an image: one detector's scores of the two lie on scales of their own, and an AUC over both
    would credit it with telling them apart.
    """
    found = slices(df[df["kind"] == "video"])
    suffix = " (image)" if found else ""
    for where, part in slices(df[df["kind"] == "image"]).items():
        found[replace(where, method=f"{where.method}{suffix}")] = part
    return found


def _by_seed(part: pd.DataFrame) -> pd.DataFrame:
    """A row per item and frame that every seed scored, with a column of scores per seed."""
    keys = ["item_id", "frame", "label", "group_id"]
    return part.pivot(index=keys, columns="seed", values="score").dropna().reset_index()


def _row(wide: pd.DataFrame, seeds: list[int], thresholds: dict[int, float], level: float, draws: int) -> dict:
    """The figures of one slice; several seeds are averaged, and the groups are drawn for all seeds together."""
    labels, scores, groups = wide["label"].to_numpy(), wide[seeds].to_numpy(), wide["group_id"].to_numpy()
    n_real, n_fake = int((labels == 0).sum()), int((labels == 1).sum())
    auc, low, high = auc_interval(labels, scores, groups, level, draws)
    both = n_real > 0 and n_fake > 0
    recall = np.array([recalls(labels, s, thresholds[k]) for k, s in zip(seeds, scores.T, strict=True)])
    return {
        "seeds": len(seeds), "n_real": n_real, "n_fake": n_fake, "groups": len(set(groups)),
        "auc": auc, "low": low, "high": high,
        "eer": np.mean([equal_error_rate(labels, s) for s in scores.T]) if both else np.nan,
        "ap": np.mean([average_precision_score(labels, s) for s in scores.T]) if both else np.nan,
        "pauc": np.mean([partial_auc(labels, s) for s in scores.T]),
        "tpr_at_1": np.mean([tpr_at_fpr(labels, s, 0.01) for s in scores.T]),
        "ece": np.mean([calibration_error(labels, s) for s in scores.T]),
        "threshold": np.mean([thresholds[k] for k in seeds]),
        "balanced_accuracy": recall.mean(), "recall_real": recall[:, 0].mean(), "recall_fake": recall[:, 1].mean(),
        "accuracy": (recall.mean(0) * (n_real, n_fake)).sum() / (n_real + n_fake) if both else np.nan,
        "majority": max(n_real, n_fake) / (n_real + n_fake) if len(wide) else np.nan,
    }  # fmt: skip


def evaluate(
    scores: pd.DataFrame,
    manifest: pd.DataFrame,
    level: float = 0.95,
    draws: int = 1000,
    split: str = "test",
    seeds: str = "mean",
) -> pd.DataFrame:
    """The result table: one row per detector, variant, level, data set, method and choice of reals.

    Columns: auc with its interval (low, high), eer, ap, pauc (to a false positive rate of 10 %), tpr_at_1 (at 1 %),
    ece (calibration error), balanced_accuracy / recalls / accuracy at the validation threshold (NaN where no validation
    item was scored), majority (accuracy of the constant answer), counts and the median of scored frames per video (NaN
    if only clips were scored). seeds="each" gives a row per seed. Items of the manifest that lack the score of a seed
    lower `coverage` and count nowhere else.
    """
    df, rows = join(scores, manifest), []
    keys = ["detector", "variant"] if seeds == "mean" else RUN
    for key, run in df.groupby(keys, sort=True):
        validation, test = levels(run[run["split"] == "val"]), levels(run[run["split"] == split])
        per_video = test["frame"].groupby(["item_id", "seed"]).size()
        for name, part in test.items():
            chosen = validation[name] if len(validation[name]) else validation["video"]
            thresholds = {s: balanced_threshold(v["label"], v["score"]) for s, v in chosen.groupby("seed")}
            thresholds = {s: thresholds.get(s, float("nan")) for s in part["seed"].unique()}
            for where, piece in slices(part).items():
                wide = _by_seed(piece)
                own = per_video[per_video.index.isin(piece["item_id"], level="item_id")]
                frames = 1.0 if name == "image" else own.median()
                rows.append(
                    {
                        **dict(zip(keys, key, strict=True)),
                        "level": name,
                        **vars(where),
                        **_row(wide, sorted(piece["seed"].unique()), thresholds, level, draws),
                        "frames_per_video": frames if np.isnan(frames) else int(frames),
                        "coverage": wide["item_id"].nunique() / _due(manifest, name, split, where),
                    }
                )
    if not rows:
        raise ScoreError(f"No score belongs to the {split} split of this manifest.")
    return pd.DataFrame(rows)


def _due(manifest: pd.DataFrame, level: str, split: str, where: Slice) -> int:
    """Number of items of the manifest that a slice should have."""
    kind = "image" if level == "image" else "video"
    due = manifest[(manifest["split"] == split) & (manifest["dataset"] == where.dataset) & (manifest["kind"] == kind)]
    if where.method != "all":
        due = due[due["method"].isin(["real", where.method])]
    if where.reals == "matched":
        due = due[due.groupby("group_id")["label"].transform("nunique") == 2]
    return len(due)


def evaluate_files(
    scores: str | os.PathLike, manifest: str | os.PathLike, out: str | os.PathLike, **options
) -> pd.DataFrame:
    """`evaluate` on files; writes the table as CSV and returns it. scores: Parquet, or the CSV of `unmask score`."""
    listed = read_manifest(Path(manifest))
    csv = Path(scores).suffix.lower() == ".csv"
    table = evaluate(read_media_scores(scores, listed, manifest) if csv else read_scores(scores), listed, **options)
    write_atomic(out, table.to_csv(index=False, float_format="%.4f"))
    return table


def plot_roc(ax, clips: pd.DataFrame) -> dict[str, float]:
    """Draw a ROC curve per detector (joined clip rows, mean score over seeds); returns the areas by name.

    A detector whose rows lack a class has none.
    """
    mean = clips.groupby(["detector", "item_id", "label"], as_index=False, sort=False)["score"].mean()
    areas = {}
    for name, part in mean.groupby("detector", sort=False):
        if part["label"].nunique() == 2:
            fpr, tpr, _ = roc_curve(part["label"], part["score"])
            areas[name] = float(np.trapezoid(tpr, fpr))
            ax.plot(fpr, tpr, label=f"{name} ({areas[name]:.2f})")
    ax.plot([0, 1], [0, 1], color="0.6", linestyle="--")
    ax.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return areas
