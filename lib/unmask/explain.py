"""Media authenticated by a panel: what every detector says of each and why, and a verdict. Chapter 11.

`judge` looks, `unmask.verdicts` decides, `unmask.explain_figures` draws and `unmask.explain_pages` writes.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, UnidentifiedImageError
from scipy.special import expit

from unmask import verdicts
from unmask.calibration import logit
from unmask.data.crops import CropStore, read_index, spread
from unmask.data.manifest import media_path, read_manifest, write_manifest
from unmask.data.video import MediaError, probe, read_frames
from unmask.detectors import base
from unmask.panel import JUDGE, Member, Panel
from unmask.preprocessing import preprocess
from unmask.profile import load_profile
from unmask.progress import track
from unmask.saliency import occlusion
from unmask.scoring import (
    best_locator,
    expand,
    frame_images,
    placeholder_manifest,
    printable,
    score_crops,
    score_windows,
)
from unmask.verdicts import Verdict, Voice

QP_FRAMES = 8  # of a video, to measure its quantiser
CELLS, CLIP_CELLS = 6, 3  # a side of the map of a frame, and of a clip, whose frames cost as much each


@dataclass(frozen=True)
class Region:
    """Where one detector looks: its strongest frame, or the clip that it judged; frames uint8[T,S,S,3] at `times`
    (seconds). Either `map` float[g,g], by how much the log odds of "fake" fall when a cell is blurred, or `look`, the
    points that the last adapter of a D2ST reads (`D2ST.look`)."""

    detector: str
    frames: np.ndarray
    times: tuple[float, ...]
    map: np.ndarray | None = None
    look: dict | None = None


@dataclass(frozen=True)
class Finding:
    """All about one medium. `status` ok|failed with its `reason`; `facts`: see `verdicts.quality`, and size, codec,
    seconds; `scores` by detector: times and P(fake) as scored and calibrated; `camera`: see `_camera`."""

    path: str
    status: str
    reason: str
    verdict: Verdict
    facts: dict = field(default_factory=dict)
    voices: tuple[Voice, ...] = ()
    scores: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    regions: tuple[Region, ...] = ()
    camera: dict | None = None

    def row(self) -> dict:
        """Its row in the table of verdicts."""
        own = asdict(self.verdict)
        reasons = "; ".join(own.pop("reasons"))
        return {"path": self.path, "status": self.status, **own, "reasons": reasons}

    def document(self) -> dict:
        """Everything but the pictures, for JSON."""
        voices = [asdict(voice) | {"probability": voice.probability} for voice in self.voices]
        times = {name: table.to_dict("records") for name, table in self.scores.items()}
        maps = {r.detector: {"time": r.times[0], "map": r.map} for r in self.regions if r.map is not None}
        return self.row() | {
            "reasons": self.verdict.reasons, "reason": self.reason, "facts": self.facts, "detectors": voices,
            "scores": times, "camera": self.camera, "maps": maps,
        }  # fmt: skip


class _Crops:
    """Face crops of the media as each detector needs them, cut once for each way of cutting."""

    def __init__(self, manifest: Path, folder: Path, locator: str, workers: int, deadline: float):
        self.manifest, self.folder, self.made = manifest, folder, {}
        self.options = {"locator": locator, "workers": workers, "deadline": deadline}

    def __call__(self, settings: Mapping) -> tuple[CropStore, pd.DataFrame, pd.DataFrame]:
        """Store, index (sorted) and items of crops made by `settings` (`CropStore.settings`)."""
        key = tuple(sorted(settings.items()))
        if key not in self.made:
            out = self.folder / f"crops-{len(self.made)}"
            items = preprocess(self.manifest, out, **self.options, **settings)
            index = read_index(out).sort_values(["item_id", "frame"], ignore_index=True)
            self.made[key] = CropStore(out), index, items
        return self.made[key]


def judge(
    manifest: str | os.PathLike, panel: Panel, folder: str | os.PathLike, locator: str | None = None,
    workers: int = 1, deadline: float = 30.0,
) -> list[Finding]:  # fmt: skip
    """A finding for every row of a manifest, in its order; labels are not read. Crops go to `folder`.

    Raises CheckpointError for a checkpoint, LocatorError for the locator. Media that cannot be judged have a finding.
    """
    manifest = Path(manifest)
    df = read_manifest(manifest)
    paths = [media_path(row, manifest).absolute() for row in df.to_dict("records")]
    crops = _Crops(manifest, Path(folder), locator or best_locator(), workers, deadline)
    said, stages = {}, panel.unsupervised
    for member in panel.members:
        judges = _by_stages if stages and member.name == JUDGE else _by_checkpoint
        said[member.name] = judges(panel, member, df, paths, crops)
    evidence = said[JUDGE].camera if JUDGE in said else None
    # Face and frames are measured where the frames are spread over the medium, if any detector looks there.
    seen = sorted(crops.made.values(), key=lambda made: made[0].settings()["sampling"] == "dense")[0]
    pairs = zip(df["item_id"], paths, strict=True)
    return [_finding(i, path, panel, said, seen, evidence, deadline) for i, path in track(pairs, len(df), "verdicts")]


@dataclass
class _Said:
    """What one detector says of all media: P(fake) by item, its course over time, where it looks, and the items.
    `clips`: it judges videos, not pictures."""

    score: pd.Series
    times: pd.DataFrame
    regions: dict[str, Region]
    items: pd.DataFrame
    clips: bool
    camera: pd.DataFrame | None = None


def _by_checkpoint(panel: Panel, member: Member, df: pd.DataFrame, paths: Sequence[Path], crops: _Crops) -> _Said:
    detector, card = base.load_checkpoint(panel.folder(member))
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    store, index, items = crops(card["preprocessing"])
    clips = detector.input_spec.frames > 1
    if clips:
        times = score_windows(detector, store, index)
        score = times.groupby("item_id")["score"].mean()
    else:
        if member.frames:  # as many as its calibration rests on
            index = spread(index, member.frames)
        table = score_crops(detector, store, index)
        score = table[table["frame"] == -1].set_index("item_id")["score"]
        times = table[table["frame"] >= 0].merge(index[["item_id", "frame", "pts"]], on=["item_id", "frame"])
        times = times.rename(columns={"frame": "first", "pts": "start"})
        times = times.assign(last=times["first"], end=times["start"])
    regions = {}
    for item, part in track(times.groupby("item_id"), times["item_id"].nunique(), f"where {member.name} looks"):
        strongest = part.loc[part["score"].idxmax()]
        rows = index[(index["item_id"] == item) & index["frame"].between(strongest["first"], strongest["last"])]
        regions[item] = _region(member, detector, store, rows)
    return _Said(score, times, regions, items, clips)


def _region(member: Member, detector: base.Detector, store: CropStore, rows: pd.DataFrame) -> Region:
    """Where a detector looks in the frame or the clip of these index rows."""
    clip = frame_images(store, rows, detector.input_spec)
    times = tuple(rows["pts"].tolist())
    if hasattr(detector, "look"):
        with torch.no_grad():
            where = next(detector.parameters()).device
            look = detector.look(detector.prefix(detector.prepare(torch.from_numpy(clip).to(where))))[-1]
        return Region(member.name, clip, times, look={k: tuple(x.cpu() for x in v) for k, v in look.items()})
    slope = member.calibration.slope if member.calibration else 1.0
    return Region(member.name, clip, times, slope * occlusion(detector, clip, CELLS if len(clip) == 1 else CLIP_CELLS))


def _by_stages(panel: Panel, member: Member, df: pd.DataFrame, paths: Sequence[Path], crops: _Crops) -> _Said:
    """Chapter 03's judge, which needs the media themselves for their cameras."""
    from unmask.authentication import judge_crops  # not above: for panels that have these stages
    from unmask.unsupervised import Judge

    stages = panel.unsupervised
    card = base.read_checkpoint(panel.folder(member))[1]
    store, index, items = crops(card["preprocessing"])
    model, profile = panel.home / stages.folder, load_profile("demo", stages.settings)
    found, evidence = judge_crops(Judge.load(model, stages.seed), df, list(paths), store.out, model, profile)
    times = pd.DataFrame(columns=["item_id", "first", "last", "start", "end", "score"])
    return _Said(found["final"], times, {}, items, clips=True, camera=evidence)


def _finding(
    item: str, path: Path, panel: Panel, said: Mapping[str, _Said], seen: tuple, evidence: pd.DataFrame | None,
    deadline: float,
) -> Finding:  # fmt: skip
    facts = _facts(item, path, seen, deadline)
    voices, faults = [], []
    for member in panel.members:
        own = said[member.name]
        status = own.items.set_index("item_id").loc[item]
        if item not in own.score.index:
            faults.append(status["reason"] or "no fingerprint or no face")
        voices.append(_voice(member, float(own.score.get(item, np.nan)), own.clips and facts["picture"]))
    heard = [voice for voice in voices if not np.isnan(voice.score)]
    if not heard:
        reason = faults[0]
        verdict = Verdict(verdicts.UNKNOWN, *[float("nan")] * 3, 0, float("nan"), (reason,))
        return Finding(str(path), "failed", reason, verdict, facts, tuple(voices))
    scores = {
        member.name: _course(member, said[member.name].times.query("item_id == @item"))
        for member in panel.members if (said[member.name].times["item_id"] == item).any()
    }  # fmt: skip
    regions = tuple(one.regions[item] for one in said.values() if item in one.regions)
    camera = _camera(evidence.loc[item] if item in evidence.index else None) if evidence is not None else None
    return Finding(str(path), "ok", "", verdicts.decide(facts, voices), facts, tuple(voices), scores, regions, camera)


def _voice(member: Member, score: float, out_of_place: bool) -> Voice:
    """out_of_place: a detector of videos before a picture."""
    silent = member.why_silent
    if np.isnan(score):
        return Voice(member.name, score, float("nan"), float("nan"), silent or "it could not see the face")
    if not silent and out_of_place:
        silent = "judges videos, and this is a picture"
    if member.calibration is None:
        return Voice(member.name, score, float(logit(score)), float("nan"), silent)
    line = member.calibration
    return Voice(member.name, score, float(line.log_odds(score)), float(line.error(score)), silent)


def _course(member: Member, times: pd.DataFrame) -> pd.DataFrame:
    """Scores over time, with what they are worth: start, end (seconds), first, last (frames), score, probability."""
    odds = member.calibration.log_odds(times["score"]) if member.calibration else None
    p = times["score"] if odds is None else expit(odds)
    return times.drop(columns="item_id").assign(probability=p).sort_values("start", ignore_index=True)


def _camera(row: pd.Series | None) -> dict:
    """Which known camera filmed a medium (-1 = none) and the log odds of "fake" by the noise on its face."""
    if row is None:
        return {"camera": -1, "log_odds": 0.0, "text": "No fingerprint could be taken of this medium."}
    camera, odds = int(row["camera"]), float(row["logit"])
    if camera < 0:
        return {"camera": -1, "log_odds": 0.0, "text": "None of the known cameras filmed it: nothing can be said."}
    times = f"{np.exp(abs(odds)):.1f} to 1"
    text = f"Camera {camera} of the known ones filmed it. "
    if odds == 0:
        text += "Whether its noise is on the face cannot be said."
    elif odds < 0:
        text += f"Its noise is on the face too, as on faces it filmed: odds of {times} for real."
    else:
        text += f"Its noise is weaker on the face than on faces it filmed: odds of {times} for fake."
    return {"camera": camera, "log_odds": odds, "text": text}


def _facts(item: str, path: Path, seen: tuple, deadline: float) -> dict:
    """What `verdicts.quality` asks of a medium, and its size, codec and length; None where it cannot be known."""
    store, index, items = seen
    row, own = items.set_index("item_id").loc[item], index[index["item_id"] == item]
    facts = dict.fromkeys(("total", "width", "height", "codec", "seconds", "face", "qp", "bits", "jpeg"))
    facts |= {"picture": False, "frames": int(row["frames"]), "faces": int(row["faces"])}
    if len(own):
        facts["face"] = float((own["x1"] - own["x0"]).median() / (1 + 2 * store.settings()["margin"]))
    try:
        info, size = probe(path, deadline), os.path.getsize(path)
    except (MediaError, OSError):
        return facts  # the row of the item says why
    facts |= {"total": info.frames, "width": info.width, "height": info.height, "codec": info.codec}
    if info.fps == 0 and info.frames <= 1:
        return facts | {"picture": True, "jpeg": jpeg_quality(path)}
    facts["seconds"] = info.frames / info.fps if info.fps else None
    if row["status"] == "ok" and info.codec == "h264":
        facts["qp"] = _qp(path, deadline)
    elif info.frames:
        facts["bits"] = 8 * size / (info.width * info.height * info.frames)
    return facts


def _qp(path: Path, deadline: float) -> float | None:
    """Median H.264 quantiser of a video's frames; None where its decoder does not tell."""
    try:
        found = read_frames(path, QP_FRAMES, deadline, max_side=64, qp=True).qp
    except MediaError:
        return None
    return None if np.isnan(found).all() else float(np.nanmedian(found))


def jpeg_quality(path: str | os.PathLike) -> float | None:
    """Quality 1..100 of a JPEG by its luminance table, on the scale of the Independent JPEG Group (whose mean table
    entry at quality 50 is 57.6); None for other files."""
    try:
        with Image.open(path) as picture:
            table = getattr(picture, "quantization", None)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return None
    if not table:
        return None
    scale = 100 * np.mean(table[0]) / 57.625
    return float(np.clip(5000 / scale if scale > 100 else (200 - scale) / 2, 1, 100))


def explain(
    media: Iterable[str | os.PathLike], panel: Panel, out: str | os.PathLike, locator: str | None = None,
    workers: int = 1, deadline: float = 30.0,
) -> pd.DataFrame:  # fmt: skip
    """Authenticate files and folders: a row, a page and a JSON for every input in the folder `out`, failures too.

    Returns the table that is also written as verdicts.csv: path, status, verdict real|fake|cannot tell, probability =
    P(fake) with its 95 % range (low, high), votes, agreement, reasons, page. Raises CheckpointError for a checkpoint,
    LocatorError for the locator.
    """
    from unmask.explain_pages import write_pages  # draws, so it is slow to import

    chosen = locator or best_locator()
    Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        manifest, paths = listed(media, folder)
        findings = judge(manifest, panel, folder, chosen, workers, deadline)
    return write_pages(findings, [printable(path) for path in paths], panel, out, chosen)


def examples(manifest: str | os.PathLike, out: str | os.PathLike) -> pd.DataFrame:
    """A test video of each kind (real, and of each forgery method) of the manifest's first data set that has any, as a
    manifest of its own in the file `out`; returns its rows; none, and no file, where the test split has no videos."""
    df = read_manifest(manifest)
    videos = df[(df["split"] == "test") & (df["kind"] == "video")]
    rows = videos[videos["dataset"].isin(videos["dataset"].head(1))].groupby("method", sort=False).head(1)
    rows = rows.sort_values(["label", "method"], ignore_index=True)
    rows["root"] = [str((Path(manifest).parent / root).resolve()) for root in rows["root"]]
    if len(rows):
        write_manifest(rows, out)
    return rows


def listed(media: Iterable[str | os.PathLike], folder: str | os.PathLike) -> tuple[Path, list[Path]]:
    """Files and folders as a manifest in `folder`, and what they are called, in its order."""
    paths, manifest = list(expand(media)), Path(folder) / "manifest.parquet"
    write_manifest(placeholder_manifest(paths, Path(folder) / "media"), manifest)
    return manifest, paths


def keep_uploads(uploads: Iterable[Mapping] | Mapping[str, Mapping], folder: str | os.PathLike) -> list[Path]:
    """Write what an `ipywidgets.FileUpload` holds (its `value`) below a folder; returns the files, all apart even if
    their names are alike."""
    if isinstance(uploads, Mapping):  # ipywidgets 7, which Colab has: content and metadata by name
        uploads = [{"name": name, "content": upload["content"]} for name, upload in uploads.items()]
    paths = []
    for number, upload in enumerate(uploads):
        name = Path(upload["name"]).name
        path = Path(folder) / f"{number:04d}" / (name if name not in ("", ".", "..") else "medium")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(upload["content"]))
        paths.append(path)
    return paths
