"""Scores: a checkpoint applied to crops, or straight to media files."""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from torch.utils.data import default_collate

from unmask import __version__, clip_views, lare, lare_maps, preprocessing, sbi
from unmask.clip_views import FIXED, Views
from unmask.data import decoding, faces, landmarks, video
from unmask.data import frames as sampled
from unmask.data.crops import CropStore, read_index
from unmask.data.faces import build_locator
from unmask.data.journals import Journal, gather, healed, in_turn, name_shards, path_of, state_of
from unmask.data.manifest import write_manifest
from unmask.detectors import base
from unmask.evaluation import ScoreError
from unmask.lare import Settings, extract
from unmask.machine import check_writable
from unmask.media import best_locator, expand, placeholder_manifest, printable
from unmask.preprocessing import OF_THE_MACHINE, preprocess
from unmask.profile import digest, source_hash, write_atomic
from unmask.progress import track
from unmask.training import device

AT_ONCE = 128  # media whose crops are on the disk together, and that a killed call may have to do again
SOURCES = (base, clip_views, decoding, faces, sampled, landmarks, lare, lare_maps, preprocessing, sbi, video)
REPORT = ["path", "status", "score", "reason", "frames", "faces", "decoder"]


def frame_images(store: CropStore, rows: pd.DataFrame, spec: base.InputSpec) -> np.ndarray:
    """The evaluation crops of index rows, uint8[N,S,S,3], S = spec.size: no augmentation.

    The face with 12.5 % on every side or, if `spec.native`, the window of S pixels in its middle. If `spec.still`, the
    rows are those of one clip, and all are cut where its median landmarks say.
    """
    size = spec.size
    images = np.empty((len(rows), size, size, 3), np.uint8)
    found = [np.asarray(marks, np.float32).reshape(-1, 2) for marks in rows["landmarks"]]
    middle = np.median(found, axis=0) if spec.still else None
    for i, (row, points) in enumerate(zip(rows.to_dict("records"), found, strict=True)):
        box = sbi.crop_box(points if middle is None else middle, side=size if spec.native else None)
        images[i] = sbi.crop(store.image(row), box, size)
    return images


def windows(count: int, frames: int) -> list[np.ndarray]:
    """Positions 0..count-1 of a clip in the fewest windows of at most `frames`, alike in length, every frame once."""
    return [part for part in np.array_split(np.arange(count), max(-(-count // frames), 1)) if len(part)]


def whole_windows(count: int, frames: int) -> list[np.ndarray]:
    """Positions 0..count-1 of a clip in the fewest windows of exactly `frames` that leave none out, spread evenly.

    They may overlap. A clip of fewer frames is one window, in which they repeat in their order.
    """
    if count < frames:
        return [np.rint(np.linspace(0, count - 1, frames)).astype(int)] if count else []
    starts = np.rint(np.linspace(0, count - frames, -(-count // frames))).astype(int)
    return [np.arange(start, start + frames) for start in starts]


@torch.no_grad()
def _probabilities(
    detector: base.Detector, clips: np.ndarray, extras: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> np.ndarray:
    """P(fake) float64[B] of clips uint8[B,T,S,S,3]; extras: see `base.Detector`."""
    where = device(detector)
    extras = {name: values.to(where) for name, values in extras.items()}
    logits = detector(detector.prepare(torch.from_numpy(clips).to(where)), **extras)
    return torch.sigmoid(logits.double()).cpu().numpy()


def _batches(index: pd.DataFrame, batch: int | None) -> list[range]:
    """Positions of sorted index rows, `batch` at a time; None: those of an item at a time."""
    ends = [*range(0, len(index), batch), len(index)] if batch else [0, *index.groupby("item_id").size().cumsum()]
    return [range(start, stop) for start, stop in itertools.pairwise(ends) if start < stop]


def _score_frames(
    detector: base.Detector, store: CropStore, index: pd.DataFrame, batch: int | None, lare: str | os.PathLike | None
) -> pd.DataFrame:
    """P(fake) of every crop and, with frame -1, of every item (mean over its frames)."""
    probabilities, spec = [], replace(detector.input_spec, still=False)  # each frame is a clip of its own
    views = Views(store, index, detector.input_spec.size, 0, lare) if detector.extras else None
    for rows in track(_batches(index, batch), label="scoring, batches"):
        extras = {}
        if views:  # the same pictures, with what belongs to them
            samples = default_collate([views[FIXED, i, 0] for i in rows])
            images, extras = samples["image"].numpy(), {name: samples[name].unsqueeze(1) for name in detector.extras}
        else:
            images = frame_images(store, index.iloc[rows], spec)
        probabilities.append(_probabilities(detector, images[:, None], extras))
    frames = index[["item_id", "frame"]].assign(score=np.concatenate(probabilities) if probabilities else np.empty(0))
    clips = frames.groupby("item_id", as_index=False)["score"].mean().assign(frame=-1)
    return pd.concat([frames, clips], ignore_index=True)


def score_windows(detector: base.Detector, store: CropStore, index: pd.DataFrame) -> pd.DataFrame:
    """P(fake) of every window of a clip's crops in order: columns item_id, first, last (frames), start, end (seconds),
    score. For a detector of clips; index rows are sorted by item and frame."""
    rows, cut, spec = [], whole_windows if detector.exact_frames else windows, detector.input_spec
    groups = index.groupby("item_id", sort=True)
    for name, part in track(groups, groups.ngroups, "scoring, clips"):
        for w in cut(len(part), spec.frames):
            own = part.iloc[w]
            score = _probabilities(detector, frame_images(store, own, spec)[None])[0]
            rows.append(
                (name, own["frame"].iloc[0], own["frame"].iloc[-1], own["pts"].iloc[0], own["pts"].iloc[-1], score)
            )
    table = pd.DataFrame(rows, columns=["item_id", "first", "last", "start", "end", "score"])
    return table.astype({"score": float})


def _score_clips(detector: base.Detector, store: CropStore, index: pd.DataFrame) -> pd.DataFrame:
    """P(fake) of every item, frame -1: the mean over the windows of its crops in order."""
    found = score_windows(detector, store, index)
    return found.groupby("item_id", as_index=False, sort=True)["score"].mean().assign(frame=-1)


def score_crops(
    detector: base.Detector,
    store: CropStore,
    index: pd.DataFrame,
    batch: int | None = 64,
    lare: str | os.PathLike | None = None,
) -> pd.DataFrame:
    """P(fake) of every item with frame -1, and before that of every crop if the detector judges single frames: columns
    item_id, frame, score. A detector of clips gives none for single frames.

    batch: crops at a time; None takes those of one item, so that its score does not depend on the others, not even in
    the last digits.

    lare: folder of the crops' LaRE maps, for a detector that reads them. LareError where one is missing.
    """
    index = index.sort_values(["item_id", "frame"], ignore_index=True)
    if "lare" in detector.extras:
        lare_maps.require(lare, detector.config["lare"])
    if detector.input_spec.frames > 1:
        scores = _score_clips(detector, store, index)
    else:
        scores = _score_frames(detector, store, index, batch, lare)
    return scores[["item_id", "frame", "score"]].astype({"frame": "int32"})


def score_table(
    detector: base.Detector, card: dict, store: CropStore, index: pd.DataFrame, variant: str
) -> pd.DataFrame:
    """`score_crops` with the columns that say where the scores come from, as in the contract of score tables."""
    run = {
        "detector": detector.name,
        "variant": variant,
        "seed": np.int32(card["seed"]),
        "checkpoint": card["sha256"][:12],
    }
    return score_crops(detector, store, index).assign(**run).astype({"seed": "int32"})


def _maps(card: dict, manifest: Path, crops: Path, out: Path, model: str | os.PathLike | None) -> pd.DataFrame:
    """Make LaRE maps of crops as those that a checkpoint learned from, in the folder `out`; returns their index."""
    settings = Settings(**card["lare"]["settings"])
    if model:
        settings = replace(settings, source=str(model), revision="")
    index = extract(manifest, out, settings, crops)
    if set(index["extractor"]) != {card["lare"]["extractor"]}:
        raise base.CheckpointError(
            f"The detector learned from LaRE maps of another model than {settings.source}, or another version of it."
        )
    return index


def _load(checkpoint: str | os.PathLike) -> tuple[base.Detector, dict]:
    """The detector of a checkpoint's folder or of an exported file, and its card."""
    if not Path(checkpoint).is_file():
        return base.load_checkpoint(checkpoint)
    from unmask import onnx_detector  # not above: ONNX Runtime is for this alone

    return onnx_detector.load(checkpoint)


def _report(rows: Sequence[Mapping]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=REPORT).astype({"score": float})


def _key(path: Path) -> tuple[str, str]:
    """Which file, and that it has not changed since."""
    return printable(path), state_of(path)


@dataclass(frozen=True)
class _Job:
    """All that decides about the rows of media."""

    detector: base.Detector
    card: Mapping
    locator: str
    workers: int
    deadline: float
    model: str | os.PathLike | None

    def stamp(self) -> str:
        """Changes with whatever changes a row: the whole card, for weights alone are not what they compute."""
        code = source_hash(*SOURCES, sys.modules[__name__], sys.modules[type(self.detector).__module__])
        card = dict(self.card) | {"input": asdict(self.detector.input_spec)}
        given = [card, self.deadline, str(self.model or ""), build_locator(self.locator).hash]
        return digest([*given, __version__, code])

    def rows(self, paths: Sequence[Path]) -> list[dict]:
        """A row of the JSON for each of some media; each depends on its own medium alone."""
        with tempfile.TemporaryDirectory() as folder:
            manifest, crops = Path(folder) / "manifest.parquet", Path(folder) / "crops"
            df = placeholder_manifest(list(paths), Path(folder) / "media")
            write_manifest(df, manifest)
            how = {"locator": self.locator, "workers": self.workers, "deadline": self.deadline}
            items = preprocess(manifest, crops, **how, **self.card["preprocessing"])
            index, maps = read_index(crops), None
            if "lare" in self.detector.extras:
                made = _maps(self.card, manifest, crops, maps := Path(folder) / "maps", self.model)
                index = index.merge(made.loc[made["status"] == "ok", ["item_id", "frame"]])
            scores = score_crops(self.detector, CropStore(crops), index, batch=None, lare=maps)
        unmapped = (items["status"] == "ok") & ~items["item_id"].isin(scores["item_id"])
        items.loc[unmapped, ["status", "reason"]] = "failed", "no LaRE map is finite"
        table = df[["item_id"]].assign(path=[printable(p) for p in paths]).merge(items, on="item_id", how="left")
        table = table.merge(scores.loc[scores["frame"] == -1, ["item_id", "score"]], on="item_id", how="left")
        single = scores[scores["frame"] >= 0].assign(frame=lambda df: df["frame"].astype(str))
        frames = {k: g.set_index("frame")["score"].round(6).to_dict() for k, g in single.groupby("item_id")}
        return [
            {**row, "score": None if np.isnan(row["score"]) else row["score"], "frame_scores": frames.get(identity, {})}
            for identity, row in zip(table["item_id"], table[REPORT].to_dict("records"), strict=True)
        ]


def _fill(journal: Journal, own: Sequence[tuple[tuple[str, str], Path]], job: _Job) -> None:
    """The rows of one share, media with their keys, that its journal lacks."""

    def again(some: list[int]) -> Iterator[str]:
        for start in range(0, len(some), AT_ONCE):
            yield from (row["reason"] for row in job.rows([own[i][1] for i in some[start : start + AT_ONCE]]))

    keys = [key for key, _ in own]
    done = journal.resume(keys, healed((row["reason"] for row in journal.kept(keys)), OF_THE_MACHINE, again))
    for start in track(range(done, len(own), AT_ONCE), label=f"scoring, {AT_ONCE} media at a time"):
        keys, some = zip(*own[start : start + AT_ONCE], strict=True)
        journal.add(zip(keys, job.rows(some), strict=True))
    journal.finish()


def score_media(
    media: Iterable[str | os.PathLike],
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    locator: str | None = None,
    workers: int = 1,
    deadline: float = 30.0,
    model: str | os.PathLike | None = None,
    shard: tuple[int, int] = (0, 1),
) -> pd.DataFrame:
    """Score files and folders with a checkpoint; one row per input, failures too, in the order given.

    checkpoint: a folder, or an ONNX file that `unmask export` wrote. Writes `out` (CSV: path, status ok|failed, score =
    P(fake), reason, frames, faces, decoder) and beside it a JSON with the score of every frame. model: for a detector
    that reads LaRE maps, the folder of the diffusion model, in place of where its own came from. Rows are kept in a
    hidden folder beside `out` while they are made, from which a stopped call goes on. `shard=(i, n)` does every n-th
    file from the i-th on; the call that completes the last shard writes `out`, others return their own rows and name
    the shards that are still to do. Raises CheckpointError for the checkpoint, LocatorError for the locator, LareError
    for the model and ShareError if another process is doing the same.
    """
    document_path, (number, of) = Path(out).with_suffix(".json"), shard
    if document_path == Path(out):
        raise ScoreError(
            f"{out} would be overwritten by the JSON beside it; give the table another ending, such as .csv."
        )
    check_writable(document_path.parent)  # now, not after hours of decoding
    detector, card = _load(checkpoint)
    if "preprocessing" not in card:
        raise base.CheckpointError(f"The checkpoint in {checkpoint} does not say how its crops were made; train anew.")
    made = {Path(out).absolute(), document_path.absolute()}  # by an earlier call, perhaps into a folder of media
    paths = [path for path in expand(media) if path.absolute() not in made]
    job = _Job(detector, card, locator or best_locator(), workers, deadline, model)
    parts, stamp = Path(out).with_name(f".{Path(out).name}.parts"), job.stamp()
    own = [(_key(path), path) for path in paths[number::of]]
    known = {path: key for key, path in own}  # as they were before they were read
    with Journal(parts, shard, stamp) as journal:
        _fill(journal, own, job)
        rows, to_do = gather(parts, of, stamp, (known.get(path) or _key(path) for path in paths))
        if to_do:
            print(f"Still to do: {name_shards(to_do, of)}. The last of them writes {out}.", file=sys.stderr)
            return _report([line["row"] for _, line in in_turn([path_of(parts, number, of)]) if "row" in line])
        report = _report(rows)
        write_atomic(out, report.to_csv(index=False, float_format="%.6f"))
        document = {"checkpoint": str(checkpoint), "sha256": card["sha256"], "locator": job.locator, "media": rows}
        write_atomic(document_path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        if of == 1:
            journal.remove()
    return report
