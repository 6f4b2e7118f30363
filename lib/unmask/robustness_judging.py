"""Judge the videos of a robustness test after one kind of change, in a process of its own: see `unmask.robustness`."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from unmask import perturbations, sbi
from unmask.data.crops import CropError, CropStore, read_index
from unmask.data.frames import MediaError
from unmask.data.manifest import media_path, read_manifest, write_manifest
from unmask.detectors import base
from unmask.detectors.temporal import Temporal, frame_outputs
from unmask.evaluation import write_scores
from unmask.perturbations import KINDS
from unmask.preprocessing import preprocess
from unmask.scoring import frame_images, score_crops, windows
from unmask.training import device

_CUT = ("locator", "frames", "size", "margin", "align", "deadline", "encoding", "sampling", "fps")


@dataclass(frozen=True)
class Task:
    """What all kinds have in common. panel: name, folder and sha256 of every checkpoint; frames: see `score` there."""

    panel: tuple[tuple[str, str, str], ...]
    manifest: str
    crops: str
    frames: int
    seed: int


def settings(crops: str | os.PathLike) -> dict:
    """How the crops were cut, as `preprocess` takes it. CropError if they do not say."""
    try:
        found = json.loads((Path(crops) / "settings.json").read_text(encoding="utf-8"))
        return {key: found[key] for key in _CUT}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CropError(f"{crops} does not say how its crops were cut; run the preprocessing again.") from error


@torch.no_grad()
def make(task: Task, rows: pd.DataFrame, kind: str, path: Path) -> None:
    """Judge all videos after one kind of change and keep the table."""
    name, work = kind.partition("-")[0], path.with_name(f".{path.stem}")
    panel, count = _load(task.panel), rows["item_id"].nunique()
    if name == "h264":
        store = Changed(_recompressed(task, set(rows["item_id"]), int(level_of(kind)), work), "", task.seed)
        rows = read_index(store.out).merge(rows[["item_id", "frame"]])
    else:
        store = Changed(task.crops, kind if kind in KINDS else "", task.seed)
    found = []
    for item, part in rows.groupby("item_id", sort=True):
        lost = level_of(kind) if name == "drop" else 0
        found += [(item, *judged) for judged in _judged(panel, store, part, task, lost).items()]
    if gone := count - rows["item_id"].nunique():
        print(f"{kind}: {gone} of {count} videos show no face any more or cannot be encoded anew.", file=sys.stderr)
    table = pd.DataFrame(found, columns=["item_id", "detector", "score"]).assign(frame=-1, variant=kind)
    table["seed"] = [panel.seeds[detector] for detector in table["detector"]]
    shas = {detector: sha[:12] for detector, _, sha in task.panel}
    table["checkpoint"] = [shas[detector] for detector in table["detector"]]
    table = table.astype({"frame": "int32", "seed": "int32"})
    write_scores(table[["item_id", "frame", "score", "detector", "variant", "seed", "checkpoint"]], path)
    shutil.rmtree(work, ignore_errors=True)


def level_of(kind: str) -> float:
    """The level of a kind, such as 28 of "h264-28"."""
    return float(kind.partition("-")[2])


class Changed(CropStore):
    """A folder of crops whose pictures are perturbed as they are read; "" leaves them as they are.

    Those of one item are kept, since every detector reads them.
    """

    def __init__(self, out: str | os.PathLike, kind: str, seed: int):
        super().__init__(out)
        self.kind, self.seed, self._item, self._pictures = kind, seed, "", {}

    def image(self, row, check: bool = False) -> np.ndarray:
        item, frame = row["item_id"], row["frame"]
        if item != self._item:
            self._item, self._pictures = item, {}
        if frame not in self._pictures:
            picture = super().image(row, check)
            if self.kind:
                picture = perturbations.perturb(picture, self.kind, sbi.sample_rng(self.seed, item, frame, 0))
            self._pictures[frame] = picture
        return self._pictures[frame]


def _recompressed(task: Task, items: set[str], crf: int, work: Path) -> Path:
    """Encode videos anew in `work` and cut their faces as those of `task.crops` were; the folder of the crops.

    What an interrupted call has left there is used. CropError if no video can be encoded.
    """
    manifest, media, listed = read_manifest(task.manifest), work / "media", []
    media.mkdir(parents=True, exist_ok=True)
    for row in manifest[manifest["item_id"].isin(items)].to_dict("records"):
        target = media / f"{row['item_id']}.mp4"
        try:
            if not target.exists():
                perturbations.recompress(media_path(row, task.manifest), target, crf)
        except MediaError:
            continue
        if row["annotations"]:
            annotations = media_path(row, task.manifest, "annotations").absolute()
            link = media / f"{row['item_id']}.annotations{annotations.suffix}"
            if not link.is_symlink():
                link.symlink_to(annotations)
            row["annotations"] = link.name
        listed.append(row | {"root": media.name, "path": target.name})
    if not listed:
        raise CropError("None of the videos could be encoded anew; `unmask doctor` tells whether H.264 can be written.")
    write_manifest(pd.DataFrame(listed).astype({"label": "int8"}), work / "manifest.parquet")
    preprocess(work / "manifest.parquet", work / "crops", workers=0, **settings(task.crops))
    return work / "crops"


@dataclass(frozen=True)
class Panel:
    """Detectors and their seeds by name; together: names of heads on the same frozen part, and of that part itself."""

    detectors: dict[str, base.Detector]
    seeds: dict[str, int]
    together: list[list[str]]


@lru_cache(maxsize=1)
def _load(panel: tuple[tuple[str, str, str], ...]) -> Panel:
    """The checkpoints, loaded once in a process. ValueError for a detector that reads more than pictures."""
    detectors, seeds, groups = {}, {}, []
    for name, folder, _ in panel:
        with torch.random.fork_rng():  # building it draws weights that the checkpoint then replaces
            detector, card = base.load_checkpoint(folder)
        if detector.extras:
            raise ValueError(f"{name} reads more than pictures ({', '.join(detector.extras)}); leave it out here.")
        detectors[name] = detector.to("cuda" if torch.cuda.is_available() else "cpu")
        seeds[name] = card["seed"]
        alike = (names for names in groups if _same(_spatial(detectors[names[0]]), _spatial(detector)))
        if (names := next(alike, None)) is None:
            groups.append(names := [])
        names.append(name)
    with_heads = [names for names in groups if any(isinstance(detectors[name], Temporal) for name in names)]
    return Panel(detectors, seeds, with_heads)


def _spatial(detector: base.Detector) -> base.Detector:
    """What looks at single frames: a head's frozen part, else the detector itself."""
    return detector.spatial if isinstance(detector, Temporal) else detector


def _same(one: base.Detector, other: base.Detector) -> bool:
    if (one.name, one.config) != (other.name, other.config):
        return False
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _seen(detector: base.Detector, rows: pd.DataFrame, task: Task, lost: float) -> pd.DataFrame:
    """The rows of one video that a detector sees, after the loss of `lost` % of them."""
    wanted = max(task.frames, detector.input_spec.frames if detector.exact_frames else 0)
    first = max(len(rows) - wanted, 0) // 2
    rows = rows.iloc[first : first + wanted]
    return rows.iloc[perturbations.kept(len(rows), lost, sbi.sample_rng(task.seed, rows["item_id"].iloc[0], 0, 0))]


def _judged(panel: Panel, store: CropStore, rows: pd.DataFrame, task: Task, lost: float) -> dict[str, float]:
    """P(fake) of one video by every detector, as `scoring.score_crops` judges; what heads share is computed once."""
    found = {}
    for names in panel.together:
        head = next(panel.detectors[name] for name in names if isinstance(panel.detectors[name], Temporal))
        seen = _seen(head, rows, task, lost)
        images = torch.from_numpy(frame_images(store, seen, head.input_spec)).to(device(head))
        outputs, logits = frame_outputs(head.spatial, head.prepare(images))
        for name in names:
            detector = panel.detectors[name]
            if isinstance(detector, Temporal):
                cuts = windows(len(seen), detector.input_spec.frames)
                heard = torch.cat([detector.head(outputs[torch.from_numpy(cut)].unsqueeze(0)) for cut in cuts])
            else:
                heard = logits
            found[name] = float(torch.sigmoid(heard.double()).mean())
    for name in panel.detectors.keys() - found.keys():
        scores = score_crops(panel.detectors[name], store, _seen(panel.detectors[name], rows, task, lost))
        found[name] = float(scores.loc[scores["frame"] == -1, "score"].iloc[0])
    return {name: found[name] for name in panel.detectors}
