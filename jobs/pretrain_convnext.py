"""Train the kit's own small ConvNeXt on a world that no table uses, and keep it in half precision (3.8 MB).

    OMP_NUM_THREADS=1 python jobs/pretrain_convnext.py FOLDER [--set KEY=VALUE]...

FOLDER takes the world, its crops and the checkpoints of two seeds; the one with the lower loss on self-blends of the
real validation faces goes to lib/unmask/weights/convnext-demo. No forged medium is opened. About ten minutes on two
cores.
"""

import argparse
from pathlib import Path

import torch

from unmask import training
from unmask.data.world import generate
from unmask.detectors.base import load_checkpoint, save_checkpoint
from unmask.preprocessing import preprocess
from unmask.profile import ROOT, load_profile, parse_changes

WORLD_SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    profile = load_profile("demo", parse_changes(["train.init=none", *options.set]))
    world, crops = options.folder / "world", options.folder / "crops"
    generate(world, dict(profile.world), WORLD_SEED, profile.workers)
    preprocess(world / "manifest.parquet", crops, workers=profile.workers, **profile.preprocess)
    runs = {options.folder / f"checkpoint-{seed}": training.Run(seed) for seed in (0, 1)}
    training.train_runs(profile, world / "manifest.parquet", crops, runs)
    best = min(runs, key=lambda run: min(epoch["val_loss"] for epoch in load_checkpoint(run)[1]["history"]))
    keep(best)


def keep(checkpoint: Path) -> None:
    """Copy a checkpoint in half precision to where `train.init: convnext-demo` finds it."""
    detector, card = load_checkpoint(checkpoint)
    for tensor in [*detector.parameters(), *detector.buffers()]:
        tensor.data = tensor.data.half() if tensor.dtype == torch.float32 else tensor.data
    kept = {key: card[key] for key in ("seed", "options", "history", "preprocessing")}
    made = f"world of seed {WORLD_SEED}, profile demo; self-blends of its real training faces; synthetic world"
    save_checkpoint(detector, ROOT / "lib/unmask/weights/convnext-demo", trained_on=made, **kept)


if __name__ == "__main__":
    main()
