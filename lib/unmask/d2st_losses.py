"""What the three stages of a detector on a CLIP with adapters learn from, beside the cross-entropy of the labels.

Pure functions of tensors; each is a scalar, computed in float32 (float64 for such input) inside and outside of
autocast, and 0, with a gradient of 0, where there is nothing to compare. `unit` stands for rows of length 1.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
import torch.nn.functional as F

KERNEL_WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of squared distances, which are 0 to 4 between unit vectors


def _exact(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same loss, outside of autocast and in no less than float32: its exponentials and differences of nearly equal
    numbers need more digits than bf16 has."""

    def wide(x):
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.to(torch.promote_types(x.dtype, torch.float32)) if floating else x

    @functools.wraps(loss)
    def wrapped(first: torch.Tensor, *others, **options) -> torch.Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return loss(wide(first), *map(wide, others), **{name: wide(x) for name, x in options.items()})

    return wrapped


def _squared_distances(x: torch.Tensor) -> torch.Tensor:
    """Between all rows of x float[N,D]: float[N,N]."""
    lengths = x.square().sum(1)
    return lengths[:, None] + lengths[None, :] - 2 * x @ x.T


def _pairs(labels: torch.Tensor) -> torch.Tensor:
    """bool[N,N]: whether two different rows have the same label, int[N]."""
    return (labels[:, None] == labels[None, :]).fill_diagonal_(False)


@_exact
def uniformity(unit: torch.Tensor, t: float = 2.0) -> torch.Tensor:
    """Logarithm of the mean of exp(-t |x - y|^2) over the pairs of unit float[N,D]: small where they fill the sphere.

    Wang and Isola, ICML 2020, section 4.1.2.
    """
    if unit.shape[0] < 2:
        return unit[:0].sum()
    i, j = torch.triu_indices(unit.shape[0], unit.shape[0], 1, device=unit.device)
    return (-t * _squared_distances(unit)[i, j]).logsumexp(0) - math.log(i.shape[0])


@_exact
def label_alignment(unit: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the pairs of unit float[N,D] that share a label, int[N]; 0 if none do.

    The alignment loss of Wang and Isola, ICML 2020, section 4.1.1, with alpha = 2 and labels in place of views.
    """
    same = _pairs(labels)
    return torch.where(same, _squared_distances(unit), 0).sum() / same.sum().clamp(min=1)


@_exact
def supcon(
    unit: torch.Tensor, labels: torch.Tensor, temperature: float = 0.1, other: torch.Tensor | None = None
) -> torch.Tensor:
    """Supervised contrastive loss of unit float[N,D] with labels int[N], mean over the anchors that have a positive.

    Khosla et al., NeurIPS 2020, equation 2. `other`, int[N], is the modality of each row: with it, the positives of an
    anchor are those of its class in another modality, or all of its class where no other modality has any. Rows of the
    class that are no positives are left out of the anchor's denominator, which would push them away.
    """
    same = positive = _pairs(labels)
    if other is not None:
        across = same & (other[:, None] != other[None, :])
        positive = torch.where(across.any(1, keepdim=True), across, same)
    compared = positive | (labels[:, None] != labels[None, :])
    similar = (unit @ unit.T / temperature).masked_fill(~compared, -torch.inf)
    log_share = similar - similar.logsumexp(1, keepdim=True)
    count = positive.sum(1)
    anchors = torch.where(positive, -log_share, 0).sum(1) / count.clamp(min=1)
    return anchors.sum() / (count > 0).sum().clamp(min=1)


@_exact
def half_consistency(frame: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """1 - cosine of frame and clip, float[N,D], on the first half of the channels; mean over rows.

    The clip is the teacher, no gradient goes to it. Half, because a frame that says all that its clip says would leave
    the clip nothing of its own.
    """
    half = frame.shape[1] // 2
    cosines = F.cosine_similarity(frame[:, :half], clip[:, :half].detach(), dim=1)
    return (1 - cosines).sum() / max(frame.shape[0], 1)


@_exact
def distillation(logits: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """KL divergence of P(fake) = sigmoid(logits / T) from the teacher's, times T^2; logits and teacher float[N], mean.

    Hinton, Vinyals and Dean, 2015, section 2, for two classes; no gradient goes to the teacher.
    """
    teacher = teacher.detach() / temperature
    target = teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher, target, reduction="none")
    return temperature**2 * (cross - entropy).sum() / max(logits.shape[0], 1)


@_exact
def mmd(a: torch.Tensor, b: torch.Tensor, labels_a: torch.Tensor, labels_b: torch.Tensor) -> torch.Tensor:
    """Squared maximum mean discrepancy between rows of a class in a and in b; mean over the classes that both have.

    a float[N,D] and b float[M,D]: unit vectors; labels 0 or 1, int[N] and int[M]. The kernel is the mean of Gaussians
    exp(-|x - y|^2 / w), w in KERNEL_WIDTHS. Gretton et al., JMLR 13, 2012, equation 5 (the biased estimate, which a
    single row a class also has), with several kernels as in Long et al., ICML 2015, section 3.1.
    """
    distances = _squared_distances(torch.cat([a, b]))
    kernel = torch.stack([(-distances / width).exp() for width in KERNEL_WIDTHS]).mean(0)
    classes = torch.arange(2, device=a.device)[:, None]
    own, others = ((labels[None, :] == classes).to(a.dtype) for labels in (labels_a, labels_b))
    both = (own.sum(1) > 0) & (others.sum(1) > 0)
    means = [x / x.sum(1, keepdim=True).clamp(min=1) for x in (own, others)]
    weights = torch.cat([means[0], -means[1]], 1)
    discrepancies = (weights @ kernel * weights).sum(1)
    return torch.where(both, discrepancies, 0).sum() / both.sum().clamp(min=1)


@_exact
def boundary_mse(predicted: torch.Tensor, target: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Mean squared error of boundary maps sigmoid(predicted) against target, float[N,g,g], where known, bool[N], holds.

    The boundary of a blending mask m is 4 m (1 - m), as in Cui et al. (Forensics Adapter), CVPR 2025.
    """
    errors = (predicted.sigmoid() - target).square().mean((1, 2))
    return torch.where(known, errors, 0).sum() / known.sum().clamp(min=1)


def gathered(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The rows of all processes, in order of rank: x float[n,...] to float[sum(sizes),...]; x itself without a group.

    sizes: the number of rows of every process, which may differ. Gradients flow back to every process: a loss of the
    gathered rows is that of the global batch in each of them, and backward sums over processes what each of them sends
    to a row. That is world size times the gradient of one process, and DistributedDataParallel, which takes the mean
    over processes, divides by it: parameters get exactly the gradient of the global batch. Therefore nothing must be
    divided or multiplied by the world size. All processes have to go backward through it, also those without a row;
    x must need a gradient in all of them or in none. ValueError where sizes do not fit.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    if len(sizes) != dist.get_world_size() or sizes[dist.get_rank()] != x.shape[0]:
        raise ValueError(f"sizes {list(sizes)} do not fit {x.shape[0]} rows in process {dist.get_rank()}")
    padded = F.pad(x, (0, 0) * (x.ndim - 1) + (0, max(sizes) - x.shape[0]))
    parts = collectives.all_gather(padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
