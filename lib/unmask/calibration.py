"""From a detector's score to a probability: a logistic regression on its log odds, fitted to validation media.

Both classes weigh alike in it: where nothing but the score is known, real and fake are taken to be equally likely.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

FLOOR = 1e-6  # scores nearer to 0 or 1 than this say no more: a sigmoid in float32 ends there


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
        return weights @ (np.logaddexp(0, z) - targets * z), scaled.T @ (weights * (expit(z) - targets))

    def curvature(beta):
        p = expit(scaled @ beta)
        return (scaled.T * (weights * p * (1 - p))) @ scaled

    beta = minimize(loss, np.zeros(2), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-9}).x
    if beta[0] <= 0:
        return 0.0, 0.0
    return float(beta[0] / spread), float(beta[1] - beta[0] * x.mean() / spread)


def uncertainty(labels, scores, groups, slope: float, intercept: float) -> tuple[float, float, float]:
    """How far a finite validation set leaves the line of `calibrate` open: variance of the slope, covariance, variance
    of the intercept.

    The inverse information of the regression, times the mean design effect of its groups where that is above 1: items
    of one group err together (Rao and Scott, JASA 76(374), 1981; groups' sums of scores against the information).
    """
    labels, x = np.asarray(labels).astype(int), logit(scores)
    weights, targets = _weights(labels)
    both = np.stack([x, np.ones_like(x)], 1)
    p = expit(slope * x + intercept)
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
