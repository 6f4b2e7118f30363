"""Real or fake without a label: pseudo-labels, contrastive learning, a classifier, one video judged. Chapter 03.

Four stages, each a function on files, so that each can be run, stopped and run again by itself:
1. `label`: measure every video, split the videos of each camera in two (`unmask.pseudo_labels`).
2. `represent`: contrastive learning from those labels (`unmask.contrastive`).
3. `classify`: a binary classifier on the surest labels, of the network and of the measurements (`unmask.classifier`).
4. `authenticate`: judge media by what stages 2 and 3 left, one at a time (`unmask.authentication`).
The manifest's labels and methods are never read here; a test exchanges them and finds the same files.
"""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from unmask import classifier, contrastive, traces
from unmask.camera_clustering import cluster_rows, recording_rows, settings_of, similarities, take
from unmask.camera_evidence import CameraEvidence
from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest
from unmask.detectors import base
from unmask.fingerprints import best_device, read_patterns, write_rows
from unmask.metrics import balanced_threshold
from unmask.parallel import side_by_side
from unmask.profile import Profile, write_json
from unmask.progress import track
from unmask.pseudo_labels import AGREEMENT, CUE, ORIENTATION, face_agreement, pseudo_labels
from unmask.scoring import frame_images
from unmask.trace_model import TraceModel
from unmask.training import TrainingError

FEATURES_FILE, LABELS_FILE = "features.parquet", "pseudo_labels.parquet"
TRACES_FILE, THRESHOLD_FILE = "traces.json", "threshold.json"
STEPS = ("spearman", "euclidean", "euclidean_unit")
TRACES = (*traces.FEATURES, *STEPS)


def stage_folder(out: str | os.PathLike, stage: int, seed: int, control: bool = False) -> Path:
    """Where stage 2 or 3 of a seed leaves its checkpoint; the control learns from shuffled features."""
    return Path(out) / f"stage{stage}-{'control-' if control else ''}{seed}"


def network(profile: Profile) -> dict:
    """The arguments of `unmask.detectors.embedding.Embedding` that the profile gives."""
    return {key: profile.unsupervised[key] for key in ("backbone", "frequency", "pretrained", "size")}


def videos(manifest: pd.DataFrame, clusters: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """The videos that have a fingerprint and a face: rows of `clusters` (chapter 02) with `split`, by item_id."""
    usable = manifest[(manifest["kind"] == "video") & manifest["item_id"].isin(set(index["item_id"]))]
    rows = clusters[clusters["status"] == "ok"].merge(usable[["item_id", "split"]], on="item_id")
    return rows.sort_values("item_id", ignore_index=True)


def agreement(fingerprints: str | os.PathLike, rows: pd.DataFrame) -> pd.DataFrame:
    """How well each face fits its camera, the columns of AGREEMENT for rows of `videos`, bucket by bucket."""
    found = pd.DataFrame(np.nan, index=rows.index, columns=list(AGREEMENT))
    for _, part in rows.groupby("bucket", sort=True):
        regions = [x for region in ("background", "face") for x in read_patterns(fingerprints, part, region)]
        table = face_agreement(*regions, part["cluster"].to_numpy(), part["recording"].to_numpy())
        found.loc[part.index] = table.to_numpy()
    return found


@torch.no_grad()
def embeddings(detector, store: CropStore, index: pd.DataFrame, what: str = "features", batch: int = 128) -> np.ndarray:
    """Embeddings float32[N,D] of the crops of `index`: the representation ("features") or "projection"."""
    device, parts = next(detector.parameters()).device, []
    for start in track(range(0, len(index), batch), label="embedding, batches"):
        images = torch.from_numpy(frame_images(store, index.iloc[start : start + batch], detector.input_spec))
        clips = detector.prepare(images.to(device))
        found = detector.features(clips.unsqueeze(1)) if what == "features" else detector.project(clips)
        parts.append(found.float().cpu().numpy())
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def step_table(items: np.ndarray, vectors: np.ndarray) -> pd.DataFrame:
    """Inter-frame steps (`unmask.traces.steps`) of every item: item_id and STEPS; vectors float[N,D] in frame order."""
    rows = [{"item_id": item, **traces.steps(vectors[items == item])} for item in np.unique(items)]
    return pd.DataFrame(rows, columns=["item_id", *STEPS])


def measure(
    rows: pd.DataFrame, fingerprints: str | os.PathLike, crops: str | os.PathLike, detector, workers: int
) -> pd.DataFrame:
    """All measurements of stage 1 for rows of `videos`: item_id, split, cluster, recording, AGREEMENT and TRACES.

    detector: the network before it has learned anything here, for the inter-frame steps.
    """
    index = read_index(crops)
    index = index[index["item_id"].isin(set(rows["item_id"]))].sort_values(["item_id", "frame"], ignore_index=True)
    table = pd.concat([rows[["item_id", "split", "cluster", "recording"]], agreement(fingerprints, rows)], axis=1)
    return table.merge(measure_crops(index, CropStore(crops), detector, workers), on="item_id")


def measure_crops(index: pd.DataFrame, store: CropStore, detector, workers: int) -> pd.DataFrame:
    """What crops alone can tell: item_id and TRACES of the items of a crop index, sorted by item and frame."""
    steps = step_table(index["item_id"].to_numpy(), embeddings(detector, store, index))
    return traces.table(index, store, workers).merge(steps, on="item_id")


def label_collection(features: pd.DataFrame, seed: int, shuffled: bool = False) -> pd.DataFrame:
    """Pseudo-labels of the videos to learn from (train and val together) and, apart from them, of the test videos.

    Each collection is split in two by itself. `shuffled`: every camera's videos exchange their measurements, so that
    nothing is left to learn from: the control.
    """
    parts = []
    for held_out in (False, True):
        part = features[(features["split"] == "test") == held_out].reset_index(drop=True)
        if part.empty:
            continue
        values = part[[CUE, *TRACES]]
        if shuffled:
            rng = np.random.default_rng([seed, 0x5F])
            order = part.groupby("cluster").indices.values()
            values = values.copy()
            for own in order:
                values.iloc[own] = values.iloc[rng.permutation(own)].to_numpy()
        found = pseudo_labels(values, part["cluster"].to_numpy(), part["recording"].to_numpy(), TRACES, seed)
        parts.append(pd.concat([part[["item_id", "split", "cluster"]], found], axis=1))
    return pd.concat(parts, ignore_index=True)


def surest(labels: pd.DataFrame, share: float) -> pd.DataFrame:
    """The videos to learn from: in each split, camera and label the `share` of which the physical cue is surest.

    A video on whose label the two views disagree is left out. Columns item_id, split, label, confidence.
    """
    both = labels[labels["agree"]]
    # By the cue, for the traces' odds rank the crudest kind of forgery before all others.
    certainty = (both["cue"] - 0.5).abs()
    rank = certainty.groupby([both[key] for key in ("split", "cluster", "label")]).rank(pct=True, method="first")
    # A share of 0.8 must not turn into all of five by a rounding error.
    return both.loc[rank > 1 - share + 1e-9, ["item_id", "split", "label", "confidence"]].reset_index(drop=True)


def obstacle(labels: pd.DataFrame, share: float) -> str:
    """Why nothing can be learned from these pseudo-labels or judged afterwards, in a sentence; "" if something can."""
    if labels.empty or not (labels["split"] == "test").any():
        return "There are no test videos with a face and a fingerprint: nothing can be judged."
    sure = surest(labels, share)
    if sure.loc[sure["split"] == "train", "label"].nunique() < 2:
        return "The measurements do not split the training videos in two halves: nothing can be learned from them."
    return ""


def label(
    profile: Profile, manifest: pd.DataFrame, clusters: pd.DataFrame, fingerprints: str | os.PathLike,
    crops: str | os.PathLike, out: str | os.PathLike,
) -> pd.DataFrame:  # fmt: skip
    """Stage 1: leaves FEATURES_FILE and LABELS_FILE in `out`; returns the labels (see `label_collection`).

    clusters: the table of chapter 02 (item_id, status, bucket, height, width, cluster, recording). Raises TrainingError
    if no video can be labelled.
    """
    rows = videos(manifest, clusters, read_index(crops))
    if rows.empty:
        raise TrainingError("No video of the manifest has both a fingerprint and a face; there is nothing to label.")
    detector = contrastive.starting_network(network(profile), profile.unsupervised.init, profile.seed)
    detector = detector.to(best_device())
    features = measure(rows, fingerprints, crops, detector, profile.workers)
    write_rows(features, Path(out) / FEATURES_FILE)
    kept = rows["item_id"].isin(set(features.loc[features["split"] != "test", "item_id"]))
    cue = rows["item_id"].map(features.set_index("item_id")[CUE])
    CameraEvidence.fit(fingerprints, rows[kept], cue[kept], profile.seed).save(out)
    labels = label_collection(features, profile.seed)
    write_rows(labels, Path(out) / LABELS_FILE)
    return labels


def run_stage(
    stage: int, profile: Profile, out: str | os.PathLike, crops: str | os.PathLike, manifest: str | os.PathLike | None,
    seed: int,
) -> str:  # fmt: skip
    """Stage 1, 2 or 3 on files, for the command line; returns a sentence on what it left.

    Stage 1 clusters the cameras first, into `out`/cameras. Raises CheckpointError where the stage
    before is missing.
    """
    if stage == 1:
        listed = read_manifest(manifest)
        rows = camera_rows(profile, listed, Path(manifest), crops, Path(out) / "cameras")
        labels = label(profile, listed, rows, Path(out) / "cameras" / "fingerprints", crops, out)
        return f"{len(labels)} videos, {int(labels['label'].sum())} taken for fakes: {Path(out) / LABELS_FILE}"
    _need(Path(out) / LABELS_FILE, 1)
    if stage == 3:
        _need(stage_folder(out, 2, seed) / base.CONFIG, 2)
    return f"Checkpoint: {(represent if stage == 2 else classify)(profile, crops, out, seed)}"


def _need(path: Path, stage: int) -> None:
    if not path.is_file():
        raise base.CheckpointError(f"There is no {path}; run stage {stage} first.")


def camera_rows(
    profile: Profile, manifest: pd.DataFrame, path: Path, crops: str | os.PathLike, out: Path
) -> pd.DataFrame:
    """The media of a manifest with their cameras, as chapter 02 leaves them in `out`; known fingerprints are kept."""
    rows = take(manifest, path, out / "fingerprints", settings_of(profile), crops, profile.workers)
    matrices = similarities(out / "fingerprints", rows)
    cameras = cluster_rows(matrices, len(rows), profile.cameras.method, profile.seed)
    rows = rows.assign(cluster=cameras, recording=recording_rows(matrices, len(rows)))
    write_rows(rows, out / "clusters.parquet")
    return rows


def _labels(out: Path, seed: int, control: bool) -> pd.DataFrame:
    """The pseudo-labels of stage 1, or those of the control."""
    if control:
        return label_collection(pd.read_parquet(out / FEATURES_FILE), seed, shuffled=True)
    return pd.read_parquet(out / LABELS_FILE)


def _splits(out: Path, seed: int, share: float, control: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The surest labels of train and of val."""
    sure = surest(_labels(out, seed, control), share)
    return tuple(sure[sure["split"] == split].drop(columns="split") for split in ("train", "val"))


def _options(profile: Profile, kind: type, seed: int, epochs: int, **more):
    keys = ("batch", "lr", "weight_decay", "warmup", "frames_per_clip", "loaders")
    return kind(seed=seed, epochs=epochs, **{key: profile.unsupervised[key] for key in keys}, **more)


def represent(
    profile: Profile, crops: str | os.PathLike, out: str | os.PathLike, seed: int, control: bool = False,
    backbone: str | None = None,
) -> Path:  # fmt: skip
    """Stage 2: contrastive learning from the surest pseudo-labels of `out`; returns the checkpoint's folder.

    `backbone` takes another network in place of the profile's, from its own start, for comparison.
    """
    own, out = profile.unsupervised, Path(out)
    sure, val = _splits(out, seed, own.confidence, control)
    options = _options(
        profile, contrastive.Options, seed, own.contrastive_epochs,
        temperature=own.temperature, feedback=own.feedback, keep=own.keep,
    )  # fmt: skip
    config, init, folder = network(profile), own.init, stage_folder(out, 2, seed, control)
    if backbone:
        config, init = config | {"backbone": backbone, "frequency": "none"}, "none"
        folder = out / f"stage2-{backbone}-{seed}"
    return contrastive.learn(config, sure, val, read_index(crops), CropStore(crops), folder, options, init)


def classify(
    profile: Profile, crops: str | os.PathLike, out: str | os.PathLike, seed: int, control: bool = False
) -> Path:
    """Stage 3: the network fine-tuned on the surest labels, and a model of the traces; returns the checkpoint's folder.

    Beside the checkpoint lies traces.json (`TraceModel`), fitted to the same videos.
    """
    own, out = profile.unsupervised, Path(out)
    sure, val = _splits(out, seed, own.confidence, control)
    folder = stage_folder(out, 3, seed, control)
    options = _options(profile, classifier.Options, seed, own.classifier_epochs, min_confidence=0.0)
    start = stage_folder(out, 2, seed, control)
    classifier.fit(start, sure, val, read_index(crops), CropStore(crops), folder, options)
    features = pd.read_parquet(out / FEATURES_FILE)
    train = features.merge(sure[["item_id", "label"]], on="item_id")
    TraceModel.fit(train[list(TRACES)], train["label"].to_numpy(), TRACES).save(folder / TRACES_FILE)
    labels = _labels(out, seed, control)
    # All of them: between the surest alone lies a wide gap, and where in it the doubtful ones part they cannot say.
    _keep_threshold(crops, out, labels[labels["split"] == "val"], seed, control)
    return folder


def _keep_threshold(crops, out: Path, val: pd.DataFrame, seed: int, control: bool) -> None:
    """Leave the P(fake) from which a video is called fake: best balanced agreement with the validation's labels.

    It lies halfway to the next lower score, for any threshold between the two agrees as well.
    """
    judge = Judge.load(out, seed, control)
    index = read_index(crops)
    index = index[index["item_id"].isin(set(val["item_id"]))].sort_values(["item_id", "frame"], ignore_index=True)
    found = float("nan")
    if val["label"].nunique() == 2 and len(index):
        features = pd.read_parquet(out / FEATURES_FILE).set_index("item_id")
        camera = CameraEvidence.load(out).logits(features.loc[index["item_id"].unique()])
        scores = judge(CropStore(crops), index, features, camera)["final"]
        found = balanced_threshold(val.set_index("item_id")["label"].loc[scores.index], scores)
        found = (found + scores[scores < found].max()) / 2 if (scores < found).any() else found
    kept = {"threshold": 0.5 if np.isnan(found) else found, "orientation": ORIENTATION}
    kept["locators"] = sorted(read_index(crops)["locator"].unique())
    write_json(stage_folder(out, 3, seed, control) / THRESHOLD_FILE, kept)


def _learn_one(profile: Profile, crops, out, seed: int, control: bool, backbone: str | None) -> None:
    represent(profile, crops, out, seed, control, backbone)
    if backbone is None:
        classify(profile, crops, out, seed, control)


def learn(
    profile: Profile, crops: str | os.PathLike, out: str | os.PathLike, seeds: list[int], rival: str = ""
) -> None:
    """Stages 2 and 3 for every seed and for the control, and stage 2 of a rival backbone; side by side on a CPU."""
    tasks = [(profile, crops, out, seed, control, None) for seed in seeds for control in (False, True)]
    tasks += [(profile, crops, out, seeds[0], False, rival)] if rival else []
    side_by_side(_learn_one, tasks, profile.workers, "contrastive learning and classifier, runs")


def score(
    crops: str | os.PathLike, fingerprints: str | os.PathLike, clusters: pd.DataFrame, out: str | os.PathLike,
    items: pd.Series, seeds: list[int],
) -> pd.DataFrame:  # fmt: skip
    """Scores of videos by every stage, in the contract of score tables (frame -1), detector "unsupervised".

    Media that stage 1 could not measure (pictures, or without a face or a fingerprint) have no row.

    variants: cue, traces, pseudo (stage 1, each collection by itself), centroid (stage 2, nearer to which centre),
    classifier and measured (stage 3, network and traces), no-camera (their mean in log odds), camera (the camera's word
    on the face, by fingerprints of the training videos), final (the mean of all three), and final-control.
    """
    out, store, index = Path(out), CropStore(crops), read_index(crops)
    features = pd.read_parquet(out / FEATURES_FILE).set_index("item_id")
    known = set(items) & set(features.index)
    index = index[index["item_id"].isin(known)].sort_values(["item_id", "frame"], ignore_index=True)
    labels = pd.read_parquet(out / LABELS_FILE).set_index("item_id")
    cameras, learned = CameraEvidence.load(out), labels.index[labels["split"] != "test"].intersection(list(known))
    others = known - set(learned)
    # Fingerprints of cameras hold the videos that stage 1 learned from; for those stands what the others say of them.
    told = features.loc[learned, ["cluster", CUE]].rename(columns={"cluster": "camera"})
    told["logit"] = cameras.logits(features.loc[learned])
    evidence = pd.concat([cameras.table(fingerprints, clusters[clusters["item_id"].isin(others)]), told])
    evidence = evidence.astype({"camera": int, CUE: float, "logit": float})
    rows = []
    for seed in seeds:
        for name, column in (("cue", "cue"), ("traces", "traces"), ("pseudo", "p_fake")):
            rows.append(_score_rows(labels.loc[labels.index.isin(set(items)), column], name, seed, ""))
        for control in (False, True):
            judge = Judge.load(out, seed, control)
            # The control's videos exchange what was measured of them, as its training videos did.
            told = exchanged(evidence, seed) if control else evidence
            found = judge(store, index, features, told["logit"])
            for name in ("final", "no-camera") if control else Judge.VARIANTS:
                rows.append(_score_rows(found[name], name + ("-control" if control else ""), seed, judge.identity))
    return pd.concat(rows, ignore_index=True).astype({"frame": "int32", "seed": "int32"})


def exchanged(evidence: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The table with rows exchanged among the videos of each camera."""
    rng, moved = np.random.default_rng([seed, 0x5F]), evidence.copy()
    for own in evidence.groupby("camera").indices.values():
        moved.iloc[own] = evidence.iloc[rng.permutation(own)].to_numpy()
    return moved


def _score_rows(values: pd.Series, variant: str, seed: int, checkpoint: str) -> pd.DataFrame:
    run = {"frame": -1, "score": values.to_numpy(float), "detector": "unsupervised", "variant": variant, "seed": seed}
    return pd.DataFrame({"item_id": values.index.to_numpy(), **run, "checkpoint": checkpoint})


class Judge:
    """What stages 2 and 3 left, applied to videos one at a time: nothing is pooled over those that are judged."""

    def __init__(self, contrast, centroids: np.ndarray, network, model: TraceModel, threshold: float, identity: str):
        self.contrast, self.centroids, self.network, self.model = contrast, centroids, network, model
        self.threshold, self.identity = threshold, identity

    @classmethod
    def load(cls, out: str | os.PathLike, seed: int, control: bool = False) -> "Judge":
        """Read the checkpoints of a seed. Raises CheckpointError if one is missing or not whole."""
        for stage in (2, 3):
            _need(stage_folder(out, stage, seed, control) / base.CONFIG, stage)
        contrast, card = base.load_checkpoint(stage_folder(out, 2, seed, control))
        last, last_card = base.load_checkpoint(stage_folder(out, 3, seed, control))
        contrast, last = contrast.to(best_device()), last.to(best_device())
        folder = stage_folder(out, 3, seed, control)
        model, kept = TraceModel.load(folder / TRACES_FILE), folder / THRESHOLD_FILE
        try:  # absent only while stage 3 is choosing it
            limit = float(json.loads(kept.read_text(encoding="utf-8"))["threshold"]) if kept.exists() else float("nan")
        except (ValueError, KeyError, TypeError) as error:
            raise base.CheckpointError(f"{kept} is damaged; run stage 3 again.") from error
        return cls(contrast, np.asarray(card["centroids"]), last, model, limit, last_card["sha256"][:12])

    VARIANTS = ("centroid", "classifier", "measured", "no-camera", "camera", "final")

    def __call__(
        self, store: CropStore, index: pd.DataFrame, features: pd.DataFrame, camera: pd.Series
    ) -> pd.DataFrame:
        """P(fake) per item (index) by each of VARIANTS, and its inter-frame steps.

        index: crop rows; features: TRACES by item_id (their steps are those of the untrained network); camera: log odds
        by item_id (`CameraEvidence.table`), 0 or missing where no camera is known, which then has no part in the mean.
        """
        items = index["item_id"].to_numpy()
        unit = embeddings(self.contrast, store, index, "projection").astype(np.float64)
        # Cosines to the two centres; twice as near is about one unit of log odds at the training temperature.
        nearer = pd.Series(unit @ (self.centroids[1] - self.centroids[0])).groupby(items).mean()
        logits = pd.Series(_logits(self.network, store, index)).groupby(items).mean()
        measured = pd.Series(self.model.logits(features.loc[logits.index, list(TRACES)]), index=logits.index)
        table = pd.DataFrame({"centroid": nearer, "classifier": logits, "measured": measured})
        table["no-camera"] = (table["classifier"] + table["measured"]) / 2
        table["camera"] = camera.reindex(table.index).fillna(0.0)
        told = (table["camera"] != 0).astype(int)
        table["final"] = (table["classifier"] + table["measured"] + table["camera"]) / (2 + told)
        table = 1 / (1 + np.exp(-table.clip(-30, 30)))
        return table.join(step_table(items, unit).set_index("item_id"))


@torch.no_grad()
def _logits(detector, store: CropStore, index: pd.DataFrame, batch: int = 128) -> np.ndarray:
    device, parts = next(detector.parameters()).device, []
    for start in range(0, len(index), batch):
        images = torch.from_numpy(frame_images(store, index.iloc[start : start + batch], detector.input_spec))
        parts.append(detector(detector.prepare(images.to(device)).unsqueeze(1)).double().cpu().numpy())
    return np.concatenate(parts)
