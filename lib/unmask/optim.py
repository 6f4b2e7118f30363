"""Optimisation: layer-wise learning rates and sharpness-aware minimisation on top of PyTorch's AdamW."""

import re
from collections.abc import Callable

import torch
from torch import nn


def depth(name: str) -> int:
    """How many steps a parameter of a backbone lies below the head: the last stage 1, the stem 5; all else 0."""
    if stage := re.match(r"backbone\.stages\.(\d)\.", name):
        return 4 - int(stage[1])
    return 5 if name.startswith("backbone.stem.") else 0


def parameter_groups(module: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """AdamW groups of the trainable parameters: lr * layer_decay^depth, and no decay for biases and norms.

    Layer-wise rates keep what pretraining left in the early layers (as in BEiT, ICLR 2022, appendix, and ConvNeXt's
    own fine-tuning); what was added to the backbone learns at the full rate.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = depth(name), parameter.ndim > 1
            start = {"params": [], "lr": lr * layer_decay ** key[0], "weight_decay": weight_decay if key[1] else 0.0}
            groups.setdefault(key, start)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


@torch.no_grad()
def ascend(module: nn.Module, rho: float) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Move the weights by `rho` along their gradient, where the loss is highest nearby; what was added to each.

    First half of a step of SAM (Foret et al., ICLR 2021, algorithm 1).
    """
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters]))
    moved = [(p, p.grad * (rho / (norm + 1e-12))) for p in parameters]
    for parameter, step in moved:
        parameter.add_(step)
    return moved


def sharpness_aware(module: nn.Module, rho: float, backward: Callable[[], None]) -> None:
    """Replace the gradients by those at the worst nearby weights; `backward` computes them anew.

    Second half of the step. The running statistics of batch norms are those of the true weights alone.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    moved = ascend(module, rho)
    for one in norms:
        one.momentum = 0.0
    try:
        module.zero_grad(set_to_none=True)
        backward()
    finally:
        for one, momentum in zip(norms, momenta, strict=True):
            one.momentum = momentum
        with torch.no_grad():
            for parameter, step in moved:
                parameter.sub_(step)
