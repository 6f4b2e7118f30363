"""How detectors on a CLIP are trained: the published recipes, and our own for a few thousand crops.

A published recipe fits its publication's data (720,000 pictures for UFD): on a few hundred videos most of them stop
long before anything is learned. `small` is what the demo uses, chosen on validation faces of the synthetic world.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

WARMUP_LR = 1e-5  # constant, in the epochs of warm-up (CoOp's code)
PATIENCE, LOWEST = 5, 1e-6  # of "plateau": epochs without a better validation loss, and the rate that ends training


@dataclass(frozen=True)
class Recipe:
    """How one detector is trained.

    optimizer: "adamw" or "sgd" (momentum 0.9). batch: half of it reals. warmup: epochs at WARMUP_LR. decay: "cosine"
    towards zero, or "plateau": a tenth of the rate after PATIENCE epochs without a better validation loss, until below
    LOWEST.
    """

    optimizer: str
    lr: float
    weight_decay: float
    batch: int
    epochs: int
    warmup: int = 0
    decay: str = "cosine"


_COOP = {"optimizer": "sgd", "lr": 2e-3, "weight_decay": 5e-4, "warmup": 1}
RECIPES: dict[str, dict[str, Recipe]] = {
    "published": {
        "ufd": Recipe("adamw", 1e-4, 0.0, 256, 100, decay="plateau"),  # Ojha et al.'s code
        "coop": Recipe(**_COOP, batch=32, epochs=50),  # Zhou et al., IJCV 2022, and its code
        "cocoop": Recipe(**_COOP, batch=2, epochs=10),  # Zhou et al., CVPR 2022, and its code, one picture at a time
        "clip-adapter": Recipe(**_COOP, batch=16, epochs=2),  # CLIPping, see below
        "clip-finetune": Recipe(**_COOP, batch=16, epochs=1),
        # GenD (Yermakov et al., 2025), the defaults of its code; they train for one epoch of all FF++ frames.
        "lntune": Recipe("adamw", 3e-4, 0.0, 512, 1),
        "clip-lare": Recipe(**_COOP, batch=64, epochs=2),  # CLaRE's code
    },
    # Khan and Dang-Nguyen, ICMR 2024, and its code: fine-tuning ends with the one epoch of warm-up.
    "clipping": {
        "ufd": Recipe("sgd", 3e-3, 5e-4, 16, 2, warmup=1),
        "coop": Recipe(**_COOP, batch=16, epochs=2),  # with clip.position=front
        "clip-adapter": Recipe(**_COOP, batch=16, epochs=2),
        "clip-finetune": Recipe(**_COOP, batch=16, epochs=1),
    },
    "small": {
        "ufd": Recipe("adamw", 3e-3, 1e-4, 32, 6),
        "coop": Recipe("adamw", 3e-3, 1e-4, 32, 6),
        "cocoop": Recipe("adamw", 3e-3, 1e-4, 32, 6),
        "clip-adapter": Recipe("adamw", 1e-3, 1e-4, 32, 6),
        "clip-finetune": Recipe("adamw", 1e-4, 1e-4, 32, 4),
        "lntune": Recipe("adamw", 1e-3, 1e-4, 32, 4),
        "clip-lare": Recipe("adamw", 3e-4, 1e-2, 32, 6),
    },
}


def recipe_of(name: str, detector: str) -> Recipe:
    """A named recipe for a detector; all of "clip-lare:..." share one. ValueError for names that are not known."""
    if name not in RECIPES:
        raise ValueError(f"clip.recipe is one of {', '.join(RECIPES)}, not {name!r}.")
    family = detector.partition(":")[0]
    if family not in RECIPES[name]:
        raise ValueError(f"There is no recipe for {detector!r}; known are {', '.join(RECIPES[name])}.")
    return RECIPES[name][family]


def optimizer_of(recipe: Recipe, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a recipe over all that learns; `rate` tells its learning rate."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)


def rate(recipe: Recipe, losses: Sequence[float]) -> float:
    """The learning rate of the next epoch, given the validation losses of those before; 0 where training has ended."""
    epoch = len(losses)
    if epoch >= recipe.epochs:
        return 0.0
    if epoch < recipe.warmup:
        return WARMUP_LR
    if recipe.decay == "cosine":
        # CoOp's scheduler counts from the end of the warm-up, but over all epochs.
        return 0.5 * recipe.lr * (1 + math.cos(math.pi * (epoch - recipe.warmup) / recipe.epochs))
    found, best, waited = recipe.lr, math.inf, 0
    for loss in losses:
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == PATIENCE:
            found, waited = found / 10, 0
    return found if found >= LOWEST else 0.0
