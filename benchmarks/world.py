"""Checks of the synthetic world at the demo's compression: do cameras leave their mark, and does nothing else leak?

Run: python benchmarks/world.py [--world FOLDER] [--seed 0] [--out benchmarks/RESULTS.md]

1. Camera fingerprints: correlation of noise residuals of same-camera against different-camera pairs of real clips, and
   the control where one residual is shifted by 4 pixels.
2. Background: a classifier that sees only what lies outside the face must not tell real from fake.
3. The file: size, length, rate and bits per pixel taken as detectors.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from scipy.signal import wiener
from scipy.stats import kurtosis, skew
from sections import write_section
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score

from unmask.data.video import read_frames
from unmask.data.world import METHODS, generate
from unmask.intervals import auc_interval
from unmask.leaks import file_facts, metadata_auc
from unmask.profile import load_profile
from unmask.progress import track


def luma(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float64)


def fingerprint(frames: np.ndarray) -> np.ndarray:
    """Sum of residual times luma over sum of luma squared (Chen et al. 2008, eq. 6), rows and columns centred."""
    pictures = [luma(frame) for frame in frames]
    with np.errstate(divide="ignore", invalid="ignore"):  # flat areas have no variance; `wiener` takes their mean
        residuals = [picture - wiener(picture, 5, noise=9.0) for picture in pictures]
    k = sum(r * p for r, p in zip(residuals, pictures, strict=True)) / sum(p * p for p in pictures)
    k = k - k.mean(0, keepdims=True)
    return k - k.mean(1, keepdims=True)


def camera_aucs(clips: pd.DataFrame, folder: Path) -> dict[str, float]:
    """AUC of the correlation as a same-camera test over all pairs, aligned and with one residual 4 pixels shifted."""
    prints = [fingerprint(read_frames(folder / p, 24).frames) for p in track(clips["path"], label="fingerprints")]
    cameras = clips["camera"].tolist()
    same, aligned, shifted = [], [], []
    for i, j in itertools.combinations(range(len(prints)), 2):
        same.append(cameras[i] == cameras[j])
        aligned.append(np.corrcoef(prints[i].ravel(), prints[j].ravel())[0, 1])
        shifted.append(np.corrcoef(prints[i].ravel(), np.roll(prints[j], 4, axis=1).ravel())[0, 1])
    return {"pairs": len(same), "auc": roc_auc_score(same, aligned), "auc_shifted": roc_auc_score(same, shifted)}


def background_features(frames: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Noise, blocking and colour statistics of the pixels outside the face (its hull, enlarged by half)."""
    rows = []
    for frame, points in zip(frames, landmarks, strict=True):
        centre = points.mean(0)
        hull = cv2.convexHull((centre + 1.5 * (points - centre)).astype(np.int32))
        outside = cv2.fillConvexPoly(np.ones(frame.shape[:2], np.uint8), hull, 0) > 0
        picture = luma(frame)
        rest = picture - cv2.GaussianBlur(picture, (0, 0), 1.0)
        steps = np.abs(np.diff(picture, axis=1))[:, 7::8].mean() / (np.abs(np.diff(picture, axis=1)).mean() + 1e-6)
        values = rest[outside]
        bands = [
            np.abs(cv2.Laplacian(cv2.GaussianBlur(picture, (0, 0), s), cv2.CV_64F))[outside].mean() for s in (0.5, 1, 2)
        ]
        rows.append(
            [
                values.std(),
                skew(values),
                kurtosis(values),
                steps,
                *bands,
                *frame[outside].mean(0),
                *frame[outside].std(0),
            ]
        )
    return np.concatenate([np.mean(rows, 0), np.std(rows, 0)])


def add_background_features(clips: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The clips with a column `background` of their features."""
    features = []
    for row in track(clips.to_dict("records"), label="backgrounds"):
        clip = read_frames(folder / row["path"], 6)
        landmarks = np.load(folder / row["annotations"])["landmarks"][clip.indices]
        features.append(background_features(clip.frames, landmarks))
    return clips.assign(background=features)


def background_auc(clips: pd.DataFrame) -> tuple[float, float, float]:
    """AUC with interval on the test split of a random forest fitted on the backgrounds of the train split."""
    train, test = (clips[clips["split"] == split] for split in ("train", "test"))
    forest = RandomForestClassifier(500, class_weight="balanced", random_state=0)
    forest.fit(np.stack(train["background"]), train["label"])
    scores = forest.predict_proba(np.stack(test["background"]))[:, 1]
    return auc_interval(test["label"], scores, test["group_id"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", help="folder of a generated world (default: generate the demo's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the table into this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.world or temporary)
        profile = load_profile("demo")
        df = generate(folder, dict(profile.world), options.seed, profile.workers)
        own = df[(df["dataset"] == "world-a") & (df["kind"] == "video")]
        cameras = camera_aucs(own[own["label"] == 0], folder)
        rows = [("same camera, aligned", f"{cameras['auc']:.3f}", f"{cameras['pairs']} pairs of real clips")]
        rows.append(("same camera, shifted by 4 pixels", f"{cameras['auc_shifted']:.3f}", "control"))
        own = add_background_features(own[own["split"] != "val"], folder)
        for method in (None, *METHODS):
            part = own if method is None else own[own["method"].isin(["real", method])]
            auc, low, high = background_auc(part)
            name = f"background, real against {method or 'all'}"
            rows.append((name, f"{auc:.3f} [{low:.3f}, {high:.3f}]", f"{(part['split'] == 'test').sum()} test clips"))
        for row in metadata_auc(file_facts(df, folder / "manifest.parquet"), 200).itertuples():
            rows.append(
                (
                    f"{row.dataset} {row.kind}: {row.fact}",
                    f"{row.auc:.3f} [{row.low:.3f}, {row.high:.3f}]",
                    f"{row.n} media",
                )
            )
    table = pd.DataFrame(rows, columns=["what is taken as a detector", "AUC", "of"]).to_markdown(index=False)
    text = (
        f"## World\n\nDemo world, seed {options.seed}, generated by `benchmarks/world.py`. Synthetic world.\n\n{table}"
    )
    print(text)
    if options.out:
        write_section(Path(options.out), text)


if __name__ == "__main__":
    main()
