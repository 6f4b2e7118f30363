"""Train one of the kit's own small ConvNeXts on a world that no table uses, and keep it in half precision (3.8 MB).

    OMP_NUM_THREADS=1 python jobs/pretrain_convnext.py NAME FOLDER

NAME is one of WEIGHTS. FOLDER takes the world, its crops and the checkpoint of each seed; the one with the lowest loss
on self-blends of the real validation faces goes to lib/unmask/weights/NAME. No forged medium is opened. Ten minutes
on two cores for `convnext-demo`, an hour on a shared one for `convnext-demo-128`.
"""

import argparse
from pathlib import Path

import torch

from unmask import training
from unmask.data.world import generate
from unmask.detectors.base import load_checkpoint, save_checkpoint
from unmask.preprocessing import preprocess
from unmask.profile import ROOT, load_profile

# By name: the world's seed, the seeds of training, and what differs from profile demo.
WEIGHTS = {
    "convnext-demo": (
        7, (0, 1),
        {"convnext.size": 96, "sbi.recipe": "intended", "train.epochs": 35, "train.lr": 1e-3, "train.layer_decay": 1.0},
    ),
    "convnext-demo-128": (
        770013, (0,),
        {"world.pairs_train": 80, "world.pairs_val": 10, "world.pairs_test": 1, "world.pairs_b": 1,
         "convnext.size": 128, "sbi.recipe": "smooth", "train.epochs": 24, "train.lr": 1e-3, "train.warmup": 0.05,
         "train.layer_decay": 1.0},
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=WEIGHTS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    seed, seeds, changes = WEIGHTS[options.name]
    profile = load_profile("demo", {"train.init": "none", **changes})
    world, crops = options.folder / "world", options.folder / "crops"
    generate(world, dict(profile.world), seed, profile.workers)
    preprocess(world / "manifest.parquet", crops, workers=profile.workers, **profile.preprocess)
    runs = {options.folder / f"checkpoint-{number}": training.Run(number) for number in seeds}
    training.train_runs(profile, world / "manifest.parquet", crops, runs)
    best = min(runs, key=lambda run: min(epoch["val_loss"] for epoch in load_checkpoint(run)[1]["history"]))
    keep(best, options.name, f"world of seed {seed}; self-blends of its real training faces; synthetic world")


def keep(checkpoint: Path, name: str, trained_on: str) -> None:
    """Copy a checkpoint in half precision to where `train.init` finds it by name."""
    detector, card = load_checkpoint(checkpoint)
    for tensor in [*detector.parameters(), *detector.buffers()]:
        tensor.data = tensor.data.half() if tensor.dtype == torch.float32 else tensor.data
    kept = {key: card[key] for key in ("seed", "options", "history", "preprocessing")}
    save_checkpoint(detector, ROOT / "lib/unmask/weights" / name, trained_on=trained_on, **kept)


if __name__ == "__main__":
    main()
