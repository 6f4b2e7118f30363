"""Enhanced contrastive learning: a representation from pseudo-labels alone, which are cleaned as it improves.

After Qiao, Xie, Chen, Retraint and Luo, "Fully Unsupervised Deepfake Video Detection Via Enhanced Contrastive
Learning", TPAMI 46(7), 2024: supervised contrastive learning on two views of every frame, and every few epochs a
confidence feedback that goes on with the frames nearest to the two cluster centres. Written anew, with differences:
- Network and optimiser go on after a feedback. The published code draws the network anew but keeps the optimiser's
  moments, which belong to weights that are gone; and what the network has learned is what made the labels better.
- The checkpoint is chosen by the contrastive loss on other pseudo-labelled items, never by an accuracy.
- Clusters start from the centres of the current labels, so that 1 goes on to mean what it meant (fake).
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save as to_safetensors
from sklearn.cluster import KMeans

from unmask import hulls, learning, pairs, sbi, training, views
from unmask.data.crops import CropStore
from unmask.detectors import base, convnext, embedding, frequency
from unmask.learning import LoopOptions, Run
from unmask.pairs import TrainingError, fingerprint
from unmask.profile import digest, source_hash, write_atomic
from unmask.training import init_folder, own_randomness

# A feedback is refused that finds a cluster with a smaller share of the frames, or centres with a larger cosine:
# k-means also splits what a network that has not learned anything yet says, and would trade the labels for noise.
SMALLEST_CLUSTER, SAME_CENTRE = 0.05, 0.99


@dataclass(frozen=True)
class Options(LoopOptions):
    """feedback: epochs between two confidence feedbacks, 0 is never; keep: fraction of either cluster that it keeps."""

    temperature: float = 0.07
    feedback: int = 0
    keep: float = 0.5


def supcon_loss(z: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Supervised contrastive loss, scalar: z float[N,D] unit vectors, labels int[N].

    Khosla et al., NeurIPS 2020, equation 2 (the mean over positives outside the logarithm), averaged over the anchors
    that have a positive; 0 if none has.
    """
    with torch.autocast(z.device.type, enabled=False):  # cosines divided by 0.07 need more digits than bf16 has
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        similar = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
        log_share = similar - similar.logsumexp(1, keepdim=True)
        positive = (labels[:, None] == labels[None, :]) & ~itself
        count = positive.sum(1)
        anchors = torch.where(positive, -log_share, 0).sum(1) / count.clamp(min=1)
        return anchors.sum() / (count > 0).sum().clamp(min=1)


def centres(units: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Unit vectors float[2,D] in the direction of the mean of units float[N,D] with label 0 and with label 1."""
    means = np.stack([units[labels == label].mean(0, dtype=np.float64) for label in (0, 1)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def confident(
    units: np.ndarray, items: np.ndarray, labels: np.ndarray, keep: float, seed: int
) -> tuple[np.ndarray, int, str]:
    """One confidence feedback: new labels int64[N] (-1 = left out), how many items changed theirs, "" or why refused.

    units float[N,D]: unit vectors of all frames; items: their item ids; labels: 0, 1, or -1. k-means with k=2 starts
    from the centres of the labels; the fraction `keep` of either cluster nearest to its centre (cosine) stays; the
    frames of an item take the majority's cluster, and those of an item without majority are left out.
    """
    kmeans = KMeans(2, init=centres(units, labels), n_init=1, random_state=seed).fit(units.astype(np.float64))
    cluster, sizes = kmeans.labels_.astype(np.int64), np.bincount(kmeans.labels_, minlength=2)
    if sizes.min() < SMALLEST_CLUSTER * len(units):
        return labels, 0, f"cluster {sizes.argmin()} would hold {sizes.min()} of {len(units)} frames"
    directions = centres(units, cluster)
    if (alike := float(directions[0] @ directions[1])) > SAME_CENTRE:
        return labels, 0, f"the centres coincide (cosine {alike:.4f})"
    distance = 1 - (units * directions[cluster]).sum(1)
    stays = np.zeros(len(units), bool)
    for label in (0, 1):
        own = np.flatnonzero(cluster == label)
        stays[own[np.argsort(distance[own], kind="stable")[: max(1, round(keep * len(own)))]]] = True
    votes = pd.Series(2 * cluster - 1).where(stays, 0).groupby(items).transform("sum").to_numpy()
    new = np.where(stays & (votes != 0), (votes > 0).astype(np.int64), -1)
    if not all((new == label).any() for label in (0, 1)):
        return labels, 0, "the votes leave one cluster without an item"
    known = pd.Series(labels).groupby(items).transform("max").to_numpy()  # -1 only for an item that was left out
    changed = (new >= 0) & (known >= 0) & (new != known)
    return new, len(set(items[changed])), ""


class Contrast:
    """The objective: views of frames with the same pseudo-label are alike."""

    def loss(self, run: Run, views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        z = run.detector.project(views.flatten(0, 1))
        return supcon_loss(z, labels.repeat_interleave(views.shape[1]), run.options.temperature)

    def validate(self, run: Run) -> float:
        """Mean over batches in which the labels and the frames of every item are spread evenly."""
        units, labels = torch.from_numpy(run.embed(run.val)[1]), run.rows["label"].to_numpy()[run.val]
        parts = -(-len(labels) // run.options.batch)
        # Rows come by item and frame: dealt out in turns, label by label.
        deal = np.argsort(labels, kind="stable")
        losses = [
            supcon_loss(units[part], torch.from_numpy(labels[part]), run.options.temperature)
            for part in (deal[k::parts] for k in range(parts))
        ]
        return float(torch.stack(losses).mean())

    def review(self, run: Run, epoch: int) -> dict:
        if not run.options.feedback or (epoch + 1) % run.options.feedback:
            return {"changed": 0}
        items = run.rows["item_id"].to_numpy()[run.train]
        units = run.embed(run.train)[1]
        run.labels, changed, refused = confident(units, items, run.labels, run.options.keep, run.options.seed)
        return {"changed": changed} | ({"refused": refused} if refused else {})


def learn(
    config: dict,
    labels: pd.DataFrame,
    val_labels: pd.DataFrame,
    index: pd.DataFrame,
    store: CropStore,
    out: str | os.PathLike,
    options: Options,
    init: str = "none",
) -> Path:
    """Learn an `Embedding(**config)` from pseudo-labels and leave it in `out`; returns `out`.

    labels: item_id, label (0, 1 = taken for a fake); val_labels: the same for other items, which choose the epoch (the
    last one if there are none). init: "none", or a checkpoint (folder, or name of one of the kit) to start from, of an
    `Embedding` or a `ConvNeXt`. The card has the history and `centroids` float[2][projection], the directions of both
    final labels, row 1 = fake. embeddings.safetensors has the middle frame of every item before training ("first")
    and at its end ("last"), in the order of embeddings.json. Killed at any point, the same call goes on from the last
    whole epoch; finished and unchanged, it returns at once. Raises TrainingError.
    """
    out, folder = Path(out), init_folder(init)
    rows, val_rows = learning.labelled_rows(index, labels), learning.labelled_rows(index, val_labels)
    started = base.read_checkpoint(folder)[1]["sha256"] if folder else ""
    key = digest([config, options.settings(), started, *data_key(rows, val_rows), own_source()])
    if learning.finished(out, key):
        return out
    with own_randomness(options.seed):
        run = Run(_start(config, folder), rows, val_rows, store, options)
        shown = _middle_frames(run.rows)
        pictures = dict(zip(("first.features", "first.projection"), run.embed(shown), strict=True))
        history = learning.fit(run, Contrast(), out, key)
        pictures |= zip(("last.features", "last.projection"), run.embed(shown), strict=True)
        run.detector.load_state_dict(learning.best(out))
        used = np.flatnonzero(run.labels >= 0)
        directions = centres(run.embed(run.train[used])[1], run.labels[used])
        write_atomic(
            out / "embeddings.safetensors", to_safetensors({k: torch.from_numpy(v) for k, v in pictures.items()})
        )
        names = {column: run.rows[column].to_numpy()[shown].tolist() for column in ("item_id", "frame")}
        write_atomic(out / "embeddings.json", json.dumps({"items": names["item_id"], "frames": names["frame"]}) + "\n")
        return learning.save(run, out, key, history, centroids=directions.tolist())


def data_key(rows: pd.DataFrame, val_rows: pd.DataFrame) -> list:
    """What identifies labelled crops: the crops, their landmarks and labels."""
    return [[fingerprint(part) if len(part) else "", digest(part["label"].tolist())] for part in (rows, val_rows)]


def own_source() -> str:
    """Hash of the code that decides what `learn` leaves."""
    return source_hash(
        sbi, hulls, base, convnext, frequency, embedding, pairs, views, training, learning, sys.modules[__name__]
    )


def starting_network(config: dict, init: str, seed: int) -> embedding.Embedding:
    """The network before it has learned anything here; arguments as in `learn`."""
    with own_randomness(seed):
        return _start(config, init_folder(init)).eval()


def _start(config: dict, folder: Path | None) -> embedding.Embedding:
    try:
        detector = embedding.Embedding(**config)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"The network cannot be built: {error}") from error
    if folder is None:
        return detector
    weights, card = base.read_checkpoint(folder)
    try:
        if card["detector"] == "convnext":
            heads = ("head.", "boundary_head.")
            detector.body.load_state_dict({k: v for k, v in weights.items() if not k.startswith(heads)})
        else:
            detector.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(f"The weights in {folder} are of another architecture; start from none.") from error
    return detector


def _middle_frames(rows: pd.DataFrame) -> np.ndarray:
    """The row of the middle frame of every item, sorted by item."""
    places = pd.Series(np.arange(len(rows))).groupby(rows["item_id"].to_numpy())
    return np.array([group.iloc[len(group) // 2] for _, group in places])
