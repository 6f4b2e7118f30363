"""From what the detectors of a panel say of one medium to a verdict: real, fake, or cannot tell, with the reasons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import expit

REAL, FAKE, UNKNOWN = "real", "fake", "cannot tell"
RANGE = 1.96  # standard errors to either side: 95 % of a normal distribution


@dataclass(frozen=True)
class Limit:
    """A number below (or, if `above`, over) which nothing is told, and where the number comes from. If `itself`, the
    number, too, is beyond."""

    value: float
    about: str
    source: str
    above: bool = False
    itself: bool = False

    @property
    def stands(self) -> str:
        """Where a verdict stands, in words: "at least 40"."""
        words = ("above", "below") if self.itself else ("at least", "at most")
        return f"{words[self.above]} {self.value:.3g}"

    def crossed(self, value: float | None) -> bool:
        """Whether a measurement is beyond the limit; one that is missing (None, NaN) is not."""
        if value is None or math.isnan(value):
            return False
        if value == self.value:
            return self.itself
        return value > self.value if self.above else value < self.value


LIMITS = {
    "frames": Limit(8, "frames of a video", "by convention: fewer last less than a third of a second at 25 a second"),
    "share": Limit(0.5, "share of the looked-at frames that show the face", "by convention: the face is the subject"),
    "face": Limit(
        40, "width of the face in pixels of the medium",
        "with its surroundings such a face has 50 x 50 pixels, of 96 x 96 or more that the study's detectors look at",
    ),
    "qp": Limit(
        38, "median H.264 quantiser",
        "x264 left medians of 31 to 41 on 13 real videos at CRF 34 and of 35 to 47 at CRF 40, which is the low quality "
        "of FaceForensics++, where the published detectors fail most (Rössler et al., ICCV 2019)", above=True,
    ),
    "bits": Limit(
        0.01, "bits per pixel of a video that is not H.264", "the least that H.264 at CRF 40 left of the same 13 videos"
    ),
    "jpeg": Limit(30, "JPEG quality of a picture", "the strongest compression of the robustness curves, chapter 09"),
    "odds": Limit(2, "odds of the verdict, to one", "by convention: a probability between 1/3 and 2/3 decides nothing"),
    "against": Limit(
        1 / 3, "share of the decided votes against the majority", "by convention: a third of the panel", above=True,
        itself=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """What one detector says: P(fake) as it scores, calibrated log odds of "fake" with their standard error, and why
    it has no vote ("" if it has one). Without calibration the log odds are the score's own and the error is NaN."""

    name: str
    score: float
    log_odds: float
    error: float
    silent: str = ""

    @property
    def probability(self) -> float:
        """P(fake) after calibration."""
        return float(expit(self.log_odds))


@dataclass(frozen=True)
class Verdict:
    """verdict; P(fake) with a 95 % range (NaN without a vote); votes; agreement: share of the votes on the side of
    P(fake); reasons why nothing can be told ("cannot tell" has one or more, the others none)."""

    verdict: str
    probability: float
    low: float
    high: float
    votes: int
    agreement: float
    reasons: tuple[str, ...]


def combine(voices: Sequence[Voice]) -> tuple[float, float]:
    """Log odds of "fake" of the voices with a vote, and their standard error; NaN without one.

    The mean of the calibrated log odds: every detector counts alike, no weight is learned. The error is the mean of the
    calibrations' errors, for detectors calibrated on the same media err together. How far the detectors are apart is
    not in it, for a weak one stays near to even by right; that they contradict each other is for `doubts`.
    """
    votes = [voice for voice in voices if not voice.silent]
    if not votes:
        return math.nan, math.nan
    return tuple(sum(getattr(voice, name) for voice in votes) / len(votes) for name in ("log_odds", "error"))


def decide(facts: dict, voices: Sequence[Voice]) -> Verdict:
    """The verdict on a medium. facts: see `quality`; voices: all detectors, silent ones too."""
    mean, error = combine(voices)
    votes = [voice for voice in voices if not voice.silent]
    reasons = [*quality(facts), *doubts(votes, mean, error)]
    low, high = (float(expit(mean + side * RANGE * error)) for side in (-1, 1))
    agreement = sum((v.log_odds > 0) == (mean > 0) for v in votes) / len(votes) if votes else math.nan
    verdict = UNKNOWN if reasons else FAKE if mean > 0 else REAL
    return Verdict(verdict, float(expit(mean)), low, high, len(votes), agreement, tuple(reasons))


def quality(facts: dict) -> list[str]:
    """Why a medium is no ground for a verdict, whatever the detectors say.

    facts: picture (bool), total (frames of the medium), frames (looked at), faces (frames with the face), face (width
    of the face in pixels), qp, bits (per pixel), jpeg (quality); None or NaN where unknown.
    """
    found = []
    if not facts["picture"] and LIMITS["frames"].crossed(facts["total"]):
        found.append(f"too short: {facts['total']:.0f} frames, {LIMITS['frames'].value:.0f} are the least")
    if facts["frames"] and LIMITS["share"].crossed(facts["faces"] / facts["frames"]):
        found.append(f"too few frames with a face: {facts['faces']} of {facts['frames']}")
    if LIMITS["face"].crossed(facts["face"]):
        found.append(f"face too small: {facts['face']:.0f} pixels wide, {LIMITS['face'].value:.0f} are the least")
    for name, text in (
        ("qp", "H.264 quantiser {:.0f}"),
        ("bits", "{:.4f} bits per pixel"),
        ("jpeg", "JPEG quality {:.0f}"),
    ):
        if LIMITS[name].crossed(facts[name]):
            found.append(f"too compressed: {text.format(facts[name])}, the limit is {LIMITS[name].value:g}")
    return found


def doubts(votes: Sequence[Voice], mean: float, error: float) -> list[str]:
    """Why the votes decide nothing."""
    if not votes:
        return ["no detector here is calibrated and better than chance on validation media"]
    found, decided = [], math.log(LIMITS["odds"].value)
    sides = [voice.log_odds > 0 for voice in votes if abs(voice.log_odds) >= decided]
    against = min(sum(sides), len(sides) - sum(sides))
    if sides and LIMITS["against"].crossed(against / len(sides)):
        found.append(f"the detectors disagree: {sum(sides)} say fake, {len(sides) - sum(sides)} say real")
    p, low, high = (float(expit(mean + side * RANGE * error)) for side in (0, -1, 1))
    if abs(mean) < decided:
        found.append(f"too near to even: P(fake) is {p:.2f}")
    elif low <= 0.5 <= high or math.isnan(error):
        found.append(f"too uncertain: P(fake) is {p:.2f}, but anything from {low:.2f} to {high:.2f} fits")
    return found
