"""A panel: detectors that judge a medium together, each with what its score was worth on validation media.

A JSON file beside the checkpoints that it names; `unmask.calibration` makes probabilities of scores.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from unmask.calibration import Calibration, calibrate, uncertainty
from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest
from unmask.detectors import base
from unmask.intervals import auc_interval
from unmask.metrics import balanced_threshold
from unmask.profile import Profile, write_json
from unmask.scoring import score_crops

VERSION = 2
JUDGE = "unsupervised"  # the name of chapter 03's judge among the members


class PanelError(ValueError):
    """A panel that is missing, malformed, or not of the checkpoints that lie there."""


@dataclass(frozen=True)
class Member:
    """One detector: its checkpoint (a path relative to the panel's folder) and what validation media said of it.

    pictures: how many of them were no videos. frames: of a video at most, behind a score by single frames; 0 = all that
    were cut. auc with its interval (low, high), threshold: of best balanced accuracy; NaN where unknown. calibration:
    None where they lacked a class.
    """

    name: str
    checkpoint: str
    sha256: str
    n_real: int
    n_fake: int
    groups: int
    pictures: int
    frames: int
    auc: float
    low: float
    high: float
    threshold: float
    calibration: Calibration | None

    @property
    def votes(self) -> bool:
        """Whether it has a say: calibrated, and better than chance on validation media."""
        return self.calibration is not None and self.low > 0.5

    @property
    def why_silent(self) -> str:
        """Why it has no vote, in half a sentence; "" if it has one."""
        if self.calibration is None:
            return "not calibrated: its validation media are unknown or of one class"
        if self.votes:
            return ""
        if not self.low <= 0.5:
            return f"its AUC on validation media, {self.auc:.2f}, has no interval: too few groups"
        return f"not better than chance on validation media (AUC {self.auc:.2f}, {self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Unsupervised:
    """Chapter 03's stages, which give camera evidence and the member JUDGE: their folder, relative to the panel's, the
    seed, and the profile's keys that they were made with."""

    folder: str
    seed: int
    settings: dict


@dataclass(frozen=True)
class Panel:
    """What judges. `home`: the panel's folder. `locators`: how the faces of the validation media were found. `level`:
    of the intervals of the members' AUCs."""

    home: Path
    members: tuple[Member, ...]
    unsupervised: Unsupervised | None = None
    locators: tuple[str, ...] = ()
    level: float = 0.95

    def folder(self, member: Member) -> Path:
        """Where a member's checkpoint lies."""
        return self.home / member.checkpoint


def _judged(validation: pd.DataFrame, level: float, draws: int) -> dict:
    """What validation media, as in `fit`, say of a detector: the fields of Member."""
    known = validation.dropna(subset="score")
    labels, scores, groups = (known[key].to_numpy() for key in ("label", "score", "group_id"))
    found = {"n_real": int((labels == 0).sum()), "n_fake": int((labels == 1).sum()), "groups": len(set(groups))}
    found["pictures"] = int((known["kind"] == "image").sum()) if "kind" in known else 0
    # The most and not the median: whoever takes at most N frames takes fewer of a short video, and one of a picture.
    frames = known["frames"].max() if "frames" in known else 0
    found["frames"] = 0 if np.isnan(frames) else int(frames)
    nothing = dict.fromkeys(("auc", "low", "high", "threshold"), float("nan"))
    if not (found["n_real"] and found["n_fake"]):
        return found | nothing | {"calibration": None}
    auc, low, high = auc_interval(labels, scores, groups, level, draws)
    line = calibrate(labels, scores)
    calibration = Calibration(*line, *uncertainty(labels, scores, groups, *line))
    numbers = {"auc": auc, "low": low, "high": high, "threshold": balanced_threshold(labels, scores)}
    return found | numbers | {"calibration": calibration}


def member(name: str, checkpoint: str | os.PathLike, home: Path, validation: pd.DataFrame | None = None,
           level: float = 0.95, draws: int = 1000) -> Member:  # fmt: skip
    """A detector's place on a panel in the folder `home`; `validation` as in `fit`, None where there is none.

    Raises CheckpointError for the checkpoint, PanelError for a detector that needs more than face crops.
    """
    card = base.read_checkpoint(checkpoint)[1]
    if "preprocessing" not in card:
        raise base.CheckpointError(f"The checkpoint in {checkpoint} does not say how its crops were made; train anew.")
    if base.registered(card["detector"]).extras:
        raise PanelError(f"{name} reads LaRE maps or regions; a panel's members see face crops alone.")
    if validation is None:
        validation = pd.DataFrame({"label": [], "score": [], "group_id": []})
    where = os.path.relpath(Path(checkpoint).absolute(), home.absolute())
    return Member(name, Path(where).as_posix(), card["sha256"], **_judged(validation, level, draws))


def fit(
    members: Mapping[str, tuple[str | os.PathLike, pd.DataFrame | None]],
    path: str | os.PathLike,
    unsupervised: tuple[str | os.PathLike, int, Profile, pd.DataFrame | None] | None = None,
    locators: Iterable[str] = (),
    level: float = 0.95,
    draws: int = 1000,
) -> Panel:
    """Calibrate detectors on validation media and write the panel to `path` (JSON).

    members: by name, the folder of a checkpoint and its scores of validation media, a row each: label (1 = fake), score
    = P(fake), group_id, where they are not all videos their kind (video|image), and for a detector of single frames
    that judged some of those that were cut, frames: how many its score is the mean of. None leaves it uncalibrated.
    unsupervised: the folder of chapter 03's stages, their seed, the profile they were made with and the scores of their
    variant "final", as those of a member. locators: how the faces of the validation media were found. Raises
    CheckpointError for a checkpoint, PanelError for one that has no place.
    """
    from unmask.unsupervised import stage_folder  # not above: chapter 03 is for those who have it

    path, named, stages = Path(path), dict(members), None
    if not named and not unsupervised:
        raise PanelError("A panel needs a detector.")
    if unsupervised:
        folder, seed, profile, validation = unsupervised
        named[JUDGE] = stage_folder(folder, 3, seed), validation
        settings = {key: profile.as_dict()[key] for key in ("seed", "cameras", "unsupervised")}
        where = os.path.relpath(Path(folder).absolute(), path.parent.absolute())
        stages = Unsupervised(Path(where).as_posix(), seed, settings)
    found = [member(name, folder, path.parent, rows, level, draws) for name, (folder, rows) in named.items()]
    panel = Panel(path.parent, tuple(found), stages, tuple(sorted(set(locators))), level)
    content = {key: value for key, value in asdict(panel).items() if key != "home"}
    write_json(path, {"version": VERSION, **content})
    return panel


def uncalibrated(checkpoints: Iterable[str | os.PathLike]) -> Panel:
    """A panel of checkpoints of which nothing else is known: they are heard and have no vote. Raises as `member`."""
    home = Path.cwd()
    found = tuple(member(Path(checkpoint).resolve().name, checkpoint, home) for checkpoint in checkpoints)
    _names(found)
    return Panel(home, found)


def _names(members: Iterable[Member]) -> None:
    names = [one.name for one in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PanelError(f"Two checkpoints are named {twice[0]}; a panel tells its members apart by their folders.")


def score_validation(
    checkpoints: Iterable[str | os.PathLike], manifest: str | os.PathLike, crops: Iterable[str | os.PathLike]
) -> dict[str, tuple[Path, pd.DataFrame]]:
    """What `fit` takes, named by the checkpoints' folders: scores of the manifest's validation split.

    crops: folders that `unmask preprocess` filled; each detector reads the one that was made as it needs. Raises
    PanelError where none was, and for two checkpoints of one name.
    """
    listed, found = read_manifest(manifest), {}
    val = listed[listed["split"] == "val"]
    stores, checkpoints = [CropStore(folder) for folder in crops], [Path(checkpoint) for checkpoint in checkpoints]
    uncalibrated(checkpoints)  # refuses what has no place before anything is scored
    for checkpoint in checkpoints:
        detector, card = base.load_checkpoint(checkpoint)
        store = next((store for store in stores if store.settings() == card.get("preprocessing")), None)
        if store is None:
            asked = ", ".join(f"{key}={value}" for key, value in card.get("preprocessing", {}).items())
            raise PanelError(f"{checkpoint} was trained on other crops than those given: {asked or 'unknown ones'}.")
        index = read_index(store.out)
        scores = score_crops(detector, store, index[index["item_id"].isin(set(val["item_id"]))])
        clips = scores[scores["frame"] == -1]
        known = val[["item_id", "label", "group_id", "kind"]]
        found[checkpoint.resolve().name] = checkpoint, clips.merge(known, on="item_id")
    return found


def read(path: str | os.PathLike) -> Panel:
    """Read what `fit` wrote. Raises PanelError for anything else, and for checkpoints that are gone or others now."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PanelError(f"There is no panel at {path}; `unmask panel` and chapter 09 write one.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PanelError(f"{path} cannot be read as a panel (JSON).") from error
    try:
        panel = _panel(content, path.parent)
    except (TypeError, ValueError, KeyError) as error:
        raise PanelError(f"{path} is not a panel of this version of Unmask: {error}") from error
    for one in panel.members:
        if base.read_checkpoint(panel.folder(one))[1]["sha256"] != one.sha256:
            raise PanelError(f"The checkpoint of {one.name} in {path} is another by now; make the panel again.")
    return panel


def _panel(content: dict, home: Path) -> Panel:
    _exactly(content, {"version", "members", "unsupervised", "locators", "level"}, "the panel")
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']!r}")
    members = []
    for entry in content["members"]:
        _exactly(entry, {field.name for field in fields(Member)}, "a member")
        line = entry["calibration"] and _typed(Calibration, entry["calibration"])
        if line and not (line.slope >= 0 and all(np.isfinite(list(asdict(line).values())))):
            raise ValueError("a calibration needs finite numbers and a slope of 0 or more")
        members.append(_typed(Member, entry | {"calibration": line or None}))
        _relative(members[-1].checkpoint)
        if members[-1].frames < 0:
            raise ValueError("frames are 0 (all) or more")
    if not members or len({one.name for one in members}) < len(members):
        raise ValueError("members need names of their own")
    stages = content["unsupervised"] and _typed(Unsupervised, content["unsupervised"])
    if stages:
        _relative(stages.folder)
    if bool(stages) != any(one.name == JUDGE for one in members):
        raise ValueError(f"the member {JUDGE} and its stages go together")
    if not all(isinstance(name, str) for name in content["locators"]):
        raise TypeError("locators are names")
    if type(content["level"]) is not float or not 0 < content["level"] < 1:
        raise ValueError("the level of intervals is a share")
    return Panel(home, tuple(members), stages or None, tuple(content["locators"]), content["level"])


def _relative(path: str) -> None:
    """ValueError for a place that `fit` would not write: it may be above the panel's folder, but is relative to it."""
    if not path or "\0" in path or Path(path).is_absolute():
        raise ValueError(f"a checkpoint is named by its path from the panel's folder, not {path!r}")


def _exactly(entry: dict, names: set[str], what: str) -> None:
    if not isinstance(entry, dict) or set(entry) != names:
        raise ValueError(f"{what} has the keys {', '.join(sorted(names))}")


def _typed(kind: type, entry: dict):
    """A dataclass from JSON: its fields and no others, each of its type; null is NaN where a number is due."""
    _exactly(entry, {field.name for field in fields(kind)}, kind.__name__.lower())
    values = {}
    for field in fields(kind):
        value = entry[field.name]
        if field.type is float:
            value = float("nan") if value is None else value
            value = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        if field.type in (float, int, str, dict) and type(value) is not field.type:
            raise TypeError(f"{field.name} must be {field.type.__name__}, not {value!r}")
        values[field.name] = value
    return kind(**values)
