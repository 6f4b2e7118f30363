"""What each of D2ST's three stages minimises, and which weights it moves at which rate.

The terms are those of `d2st_losses`, weighed by the profile: at 0 a term is off and costs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unmask import d2st_losses as losses
from unmask.d2st_losses import gathered
from unmask.detectors.clip_d2st import AdaptedClip

PROJECTED = 128
TERMS = {
    1: ("uniformity", "label_alignment", "boundary"),
    2: ("frame_ce", "distillation"),
    3: ("supcon", "consistency", "agreement", "mmd"),
}
"""The terms that every stage adds to the cross-entropy, by their names in the profile."""
RATES = {
    1: {"shared": 1.0, "spatial": 1.0, "head": 1.0},
    2: {"temporal": 1.0, "shared": 0.25, "head": 0.25, "spatial": 0.1, "spatial offsets": 0.1},
    3: {"norms": 1.0, "out": 1.0, "up": 1.0, "head": 1.0},
}
"""Learning rate of each part of the weights, relative to the stage's; parts that are not here stay as they are."""
LATE = ("spatial offsets",)
"""Parts that stay as they are in the first epoch of stage 2."""


def part_of(name: str, stage: int) -> str:
    """Which part of RATES a trainable parameter belongs to, or one that is not there."""
    if not name.startswith("detector.adapters."):
        return "head"
    inner = name.split(".", 3)[3]
    if stage == 3:
        kind = {"norm": "norms", "out": "out", "up": "up"}
        return next((kind[word] for word in inner.split(".")[:-1] if word in kind and "offsets" not in inner), "frozen")
    if inner.startswith(("paths.temporal.", "time.")):  # `time` is an ST-Adapter's convolution
        return "temporal"
    if inner.startswith("paths.spatial."):
        return "spatial offsets" if stage == 2 and ".offsets." in inner else "spatial"
    return "shared"


class Step(nn.Module):
    """A detector with what only training needs: a projection for contrasts, and a map of the blending boundary.

    One forward pass of it is one step of a process, so that DistributedDataParallel can wrap it.
    """

    def __init__(self, detector: AdaptedClip, stage: int, weights: Mapping[str, float]):
        super().__init__()
        self.detector = detector
        width, dim = detector.width, detector.backbone.dim
        self.boundary = nn.Linear(width, 1) if stage == 1 and weights["boundary"] else None
        self.projection = nn.Linear(dim, PROJECTED) if stage == 3 and weights["supcon"] else None
        for name, parameter in self.named_parameters():
            if not name.startswith("detector.backbone."):
                parameter.requires_grad_(part_of(name, stage) in RATES[stage])

    def forward(self, prefix: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Tokens float[F,L,D] of units (see `d2st_plan`) to what the losses need.

        "frames" float[F]: logits of single frames within their clip; "features" float[U,dim] and "logits" float[U]: of
        units; where asked for "projected" float[U,128], unit length, and "edges" float[F,g,g], logits.
        """
        detector = self.detector
        tokens = detector.tokens(prefix, shapes)
        pooled = detector.pool(tokens).float()
        counts = [b * t for b, t in shapes]
        means = [part.unflatten(0, (b, t)).mean(1) for part, (b, t) in zip(pooled.split(counts), shapes, strict=True)]
        features = torch.cat(means)
        found = {"features": features, "logits": detector.head(features).squeeze(1)}
        found["frames"] = detector.head(pooled).squeeze(1)
        if self.boundary is not None:
            side = round((tokens.shape[1] - 1) ** 0.5)
            found["edges"] = self.boundary(tokens[:, 1:]).squeeze(2).unflatten(1, (side, side))
        if self.projection is not None:
            found["projected"] = F.normalize(self.projection(F.normalize(features, dim=1)).float(), dim=1)
        return found


@dataclass(frozen=True)
class Facts:
    """What is known of the units of a global batch, in the order of `gathered`: on the device of the logits.

    labels float[U]; image bool[U]: of one frame; carried bool[U]: every frame has the label; pair int64[U]: for the
    frame of a clip, the clip's number in the batch, else -1; unit int64[F]: whose frame it is; teacher float[U]: logits
    of the stage before; edges float[F,g,g] and known bool[F], or None.
    """

    labels: torch.Tensor
    image: torch.Tensor
    carried: torch.Tensor
    pair: torch.Tensor
    unit: torch.Tensor
    teacher: torch.Tensor | None = None
    edges: torch.Tensor | None = None
    known: torch.Tensor | None = None


def gather(found: Mapping[str, torch.Tensor], units: Sequence[int], frames: Sequence[int]) -> dict[str, torch.Tensor]:
    """The results of all processes, given how many units and frames each of them has."""
    per_frame = ("frames", "edges")
    return {name: gathered(value, frames if name in per_frame else units) for name, value in found.items()}


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.where(where, values, 0).sum() / where.sum().clamp(min=1)


def loss(
    found: Mapping[str, torch.Tensor], facts: Facts, stage: int, weights: Mapping[str, float]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a global batch and its terms, unweighted; found: of `gather`."""
    logits, features = found["logits"], found["features"]
    cross = F.binary_cross_entropy_with_logits(logits, facts.labels, reduction="none")
    # An image of a clip whose label only its motion tells has no label.
    images, clips = facts.image & facts.carried, ~facts.image
    terms = {"image_ce": _mean(cross, images), "clip_ce": _mean(cross, clips)}
    total = terms["image_ce"] + terms["clip_ce"] if stage != 3 else (terms["image_ce"] + terms["clip_ce"]) / 2
    kinds = {1: _spread_terms, 2: _clip_terms, 3: _joint_terms}
    extra = kinds[stage](found, facts, features, logits, [name for name in TERMS[stage] if weights[name]])
    for name, value in extra.items():
        total = total + weights[name] * value
    return total, terms | extra


def _spread_terms(found, facts: Facts, features, logits, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Stage 1: features that fill the sphere and gather by label, and where the blending is."""
    unit = F.normalize(features, dim=1)
    terms = {
        "uniformity": lambda: losses.uniformity(unit),
        "label_alignment": lambda: losses.label_alignment(unit, facts.labels.long()),
        "boundary": lambda: losses.boundary_mse(found["edges"], facts.edges, facts.known),
    }
    return {name: terms[name]() for name in names}


def _clip_terms(found, facts: Facts, features, logits, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Stage 2: single frames still tell what they can tell, and clips what the frames of stage 1 told."""
    carried = facts.carried
    truth = facts.labels[facts.unit]
    terms = {
        "frame_ce": lambda: _mean(
            F.binary_cross_entropy_with_logits(found["frames"], truth, reduction="none"), carried[facts.unit]
        ),
        "distillation": lambda: losses.distillation(logits[carried], facts.teacher[carried]),
    }
    return {name: terms[name]() for name in names}


def _joint_terms(found, facts: Facts, features, logits, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Stage 3: images and clips of one class together, and a frame near the clip it is of."""
    own = (facts.pair >= 0) & facts.carried
    pair = facts.pair[own]
    labels, unit = facts.labels.long(), F.normalize(features, dim=1)
    image = facts.image & facts.carried
    counted = image | ~facts.image
    modality = facts.image.long()
    terms = {
        "supcon": lambda: losses.supcon(found["projected"][counted], labels[counted], other=modality[counted]),
        "consistency": lambda: losses.half_consistency(features[own], features[pair]),
        "agreement": lambda: losses.distillation(logits[own], logits[pair]),
        "mmd": lambda: losses.mmd(unit[image], unit[~facts.image], labels[image], labels[~facts.image]),
    }
    return {name: terms[name]() for name in names}
