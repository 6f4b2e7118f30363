"""A panel: detectors that judge a medium together, each with what its score was worth on validation media.

A JSON file beside the checkpoints that it names. A score becomes a probability by a logistic regression on its log odds
in which both classes weigh alike: where nothing but the score is known, real and fake are taken to be as likely.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from unmask.data.crops import CropStore, read_index
from unmask.data.manifest import read_manifest
from unmask.detectors import base
from unmask.evaluation import auc_interval, balanced_threshold
from unmask.profile import Profile, write_json
from unmask.scoring import score_crops

FLOOR = 1e-6  # scores nearer to 0 or 1 than this say no more: a sigmoid in float32 ends there
VERSION = 1
JUDGE = "unsupervised"  # the name of chapter 03's judge among the members


class PanelError(ValueError):
    """A panel that is missing, malformed, or not of the checkpoints that lie there."""


@dataclass(frozen=True)
class Calibration:
    """log odds of "fake" = slope * log odds of the score + intercept; `variance` of slope and of intercept, and their
    `covariance`."""

    slope: float
    intercept: float
    slope_variance: float
    covariance: float
    intercept_variance: float

    def log_odds(self, scores) -> np.ndarray:
        """Calibrated log odds of "fake", float64 as scores float[...]."""
        return self.slope * logit(scores) + self.intercept

    def error(self, scores) -> np.ndarray:
        """Standard error of `log_odds` that comes from the finite validation set, float64 as scores float[...]."""
        x = logit(scores)
        return np.sqrt(self.slope_variance * x**2 + 2 * self.covariance * x + self.intercept_variance)


@dataclass(frozen=True)
class Member:
    """One detector: its checkpoint (a path relative to the panel's folder) and what validation media said of it.

    calibration: None where they lacked a class. auc with its interval (low, high), threshold: of best balanced
    accuracy; NaN where unknown.
    """

    name: str
    checkpoint: str
    sha256: str
    n_real: int
    n_fake: int
    groups: int
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
    """What judges. `home`: the panel's folder. `locators`: how the faces of the validation media were found."""

    home: Path
    members: tuple[Member, ...]
    unsupervised: Unsupervised | None = None
    locators: tuple[str, ...] = ()

    def folder(self, member: Member) -> Path:
        """Where a member's checkpoint lies."""
        return self.home / member.checkpoint


def logit(scores) -> np.ndarray:
    """Log odds of P(fake), float64, at most those of 1 - FLOOR."""
    p = np.clip(np.asarray(scores, float), FLOOR, 1 - FLOOR)
    return np.log(p) - np.log1p(-p)


def _weights(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights float[N] by which both classes count alike, and the targets float[N] of the regression.

    The weights sum to the number of observations that they are worth (Kish, Survey Sampling, 1965: (sum w)^2 over sum
    w^2). Targets stop short of 0 and 1 as in Platt, Probabilistic Outputs for SVMs, 1999, section 2.2, so that classes
    which a score parts leave its odds finite; as far for both, by the smaller class.
    """
    counts = np.bincount(labels, minlength=2)
    weights = (2 * counts.prod() / counts.sum()) / counts[labels]
    short = 1 / (counts.min() + 2)
    return weights, np.where(labels == 1, 1 - short, short)


def calibrate(labels, scores) -> tuple[float, float]:
    """Slope (0 or more) and intercept that make P(fake) float[N] a probability; labels int[N], 1 = fake.

    Logistic regression of the label on the log odds of the score, both classes weighing alike (so the odds assume that
    real and fake are equally likely), targets smoothed after Platt, 1999. A score that is no better than a constant, or
    turned around, gets slope 0: it says nothing. ValueError if a class is missing.
    """
    labels, x = np.asarray(labels).astype(int), logit(scores)
    if len(np.unique(labels)) < 2:
        raise ValueError("Calibration needs real and fake media.")
    if (spread := x.std()) < 1e-12:
        return 0.0, 0.0
    weights, targets = _weights(labels)
    scaled = np.stack([(x - x.mean()) / spread, np.ones_like(x)], 1)

    def loss(beta):
        z = scaled @ beta
        return weights @ (np.logaddexp(0, z) - targets * z), scaled.T @ (weights * (_sigmoid(z) - targets))

    def curvature(beta):
        p = _sigmoid(scaled @ beta)
        return (scaled.T * (weights * p * (1 - p))) @ scaled

    beta = minimize(loss, np.zeros(2), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-9}).x
    if beta[0] <= 0:
        return 0.0, 0.0
    return float(beta[0] / spread), float(beta[1] - beta[0] * x.mean() / spread)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def uncertainty(labels, scores, groups, slope: float, intercept: float) -> tuple[float, float, float]:
    """How far a finite validation set leaves the line of `calibrate` open: variance of the slope, covariance, variance
    of the intercept.

    The inverse information of the regression, times the mean design effect of its groups where that is above 1: items
    of one group err together (Rao and Scott, JASA 76(374), 1981; groups' sums of scores against the information).
    """
    labels, x = np.asarray(labels).astype(int), logit(scores)
    weights, targets = _weights(labels)
    both = np.stack([x, np.ones_like(x)], 1)
    p = _sigmoid(slope * x + intercept)
    # A slope of 0 is a bound, and a constant score has none: a pseudo-inverse leaves the intercept alone there.
    inverse = np.linalg.pinv((both.T * (weights * p * (1 - p))) @ both)
    _, member = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    count = member.max() + 1
    sums = np.zeros((count, 2))
    np.add.at(sums, member, (weights * (labels - p))[:, None] * both)
    sums -= sums.mean(0)  # smoothed targets leave a rest
    effect = np.trace(inverse @ (sums.T @ sums)) / 2 * count / max(count - 1, 1)
    inverse *= max(effect, 1.0)
    return float(inverse[0, 0]), float(inverse[0, 1]), float(inverse[1, 1])


def _judged(validation: pd.DataFrame, level: float, draws: int) -> dict:
    """What validation media (label, score, group_id) say of a detector: the fields of Member."""
    known = validation.dropna(subset="score")
    labels, scores, groups = (known[key].to_numpy() for key in ("label", "score", "group_id"))
    found = {"n_real": int((labels == 0).sum()), "n_fake": int((labels == 1).sum()), "groups": len(set(groups))}
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
    = P(fake), group_id; None leaves it uncalibrated. unsupervised: the folder of chapter 03's stages, their seed, the
    profile they were made with and the scores of their variant "final", as those of a member. locators: how the faces
    of the validation media were found. Raises CheckpointError for a checkpoint, PanelError for one that has no place.
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
    panel = Panel(path.parent, tuple(found), stages, tuple(sorted(set(locators))))
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
        found[checkpoint.resolve().name] = checkpoint, clips.merge(val[["item_id", "label", "group_id"]], on="item_id")
    return found


def read(path: str | os.PathLike) -> Panel:
    """Read what `fit` wrote. Raises PanelError for anything else, and for checkpoints that are gone or others now."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PanelError(f"There is no panel at {path}; `unmask panel` and chapter 09 write one.") from error
    except (OSError, ValueError) as error:
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
    _exactly(content, {"version", "members", "unsupervised", "locators"}, "the panel")
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']!r}")
    members = []
    for entry in content["members"]:
        _exactly(entry, {field.name for field in fields(Member)}, "a member")
        line = entry["calibration"] and _typed(Calibration, entry["calibration"])
        if line and not (line.slope >= 0 and all(np.isfinite(list(asdict(line).values())))):
            raise ValueError("a calibration needs finite numbers and a slope of 0 or more")
        members.append(_typed(Member, entry | {"calibration": line or None}))
    if not members or len({one.name for one in members}) < len(members):
        raise ValueError("members need names of their own")
    stages = content["unsupervised"] and _typed(Unsupervised, content["unsupervised"])
    if bool(stages) != any(one.name == JUDGE for one in members):
        raise ValueError(f"the member {JUDGE} and its stages go together")
    if not all(isinstance(name, str) for name in content["locators"]):
        raise TypeError("locators are names")
    return Panel(home, tuple(members), stages or None, tuple(content["locators"]))


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
