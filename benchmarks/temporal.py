"""Training a head from cached features, beside running the frozen detector below in every epoch, in one run.

    python benchmarks/temporal.py [--out benchmarks/RESULTS.md]

Both train the same GRU on the same clips, drawn faces in uint8; only where the features come from differs.
"""

import os
import platform
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from sections import processor, run  # noqa: E402

from unmask.detectors import base  # noqa: E402
from unmask.detectors.temporal import frame_outputs  # noqa: E402

HEADING = "## Temporal heads"
ROUNDS = 5
CLIPS, FRAMES, BATCH = 32, 16, 16
BACKBONES = {"convnext_zepto_rms": 96, "convnext_atto": 224}


def clips_of(size: int, count: int) -> torch.Tensor:
    """Clips uint8[count,FRAMES,size,size,3] of smooth colours that tremble."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(40, 210, (count, 3, 9, 9)).astype(np.float32))
    still = F.interpolate(coarse, (size, size), mode="bicubic").movedim(1, -1).unsqueeze(1)
    noise = torch.from_numpy(rng.normal(0, 4, (count, FRAMES, size, size, 1)).astype(np.float32))
    return (still + noise).clamp(0, 255).to(torch.uint8)


def detector_of(backbone: str, size: int):
    """A GRU of the demo's size on a frozen ConvNeXt of random weights."""
    torch.manual_seed(0)
    below = {"detector": "convnext", "config": {"backbone": backbone, "size": size}}
    return base.build("gru", spatial=below, frames=FRAMES, width=128, layers=2)


def cache_of(detector, clips: torch.Tensor) -> torch.Tensor:
    """What the cache holds: float16[B,T,D]."""
    with torch.no_grad():
        return torch.stack([frame_outputs(detector.spatial, detector.prepare(clip))[0] for clip in clips]).half()


def epoch(detector, forward, clips: torch.Tensor) -> float:
    """Train one epoch of `forward(batch)`; seconds of processor time."""
    optimizer = torch.optim.AdamW(detector.trainable_parameters(), lr=1e-3)
    labels = torch.arange(len(clips)) % 2
    detector.train()
    start = time.process_time()
    for i in range(0, len(clips), BATCH):
        loss = F.binary_cross_entropy_with_logits(forward(clips[i : i + BATCH]), labels[i : i + BATCH].float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return time.process_time() - start


def measure(backbone: str, size: int, count: int, rounds: int) -> str:
    """One row of the table."""
    detector, clips = detector_of(backbone, size), clips_of(size, count)
    begin = time.process_time()
    cache = cache_of(detector, clips)
    once = time.process_time() - begin

    def from_cache(part: torch.Tensor) -> torch.Tensor:
        return detector.head(part.float())

    def from_pictures(part: torch.Tensor) -> torch.Tensor:
        return detector(detector.prepare(part))

    epoch(detector, from_cache, cache)  # warm-up
    pairs = [(epoch(detector, from_cache, cache), epoch(detector, from_pictures, clips)) for _ in range(rounds)]
    ratios = sorted(slow / fast for fast, slow in pairs)
    fast, slow = (statistics.median(column) for column in zip(*pairs, strict=True))
    detector.eval()
    with torch.no_grad():
        gap = (torch.sigmoid(from_cache(cache)) - torch.sigmoid(from_pictures(clips))).abs().max().item()
    return (
        f"| {backbone}, {size} px | {count / fast:.0f} | {count / slow:.2f} | {statistics.median(ratios):.0f} "
        f"({ratios[0]:.0f} to {ratios[-1]:.0f}) | {count / once:.2f} | {gap:.1e} |"
    )


def table() -> str:
    """Measure everything; the section as Markdown."""
    lines = [
        HEADING,
        "",
        f"One thread, seconds of processor time, CPU {processor()}; Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}. `python benchmarks/temporal.py`: one epoch of a GRU (width 128, 2 layers, with "
        f"differences) on clips of {FRAMES} frames, batches of {BATCH}; medians of rounds in turns (lowest to highest "
        "ratio in brackets).",
        "",
        "Cache: features kept as float16. Pictures: the frozen ConvNeXt runs in every epoch. Filling the cache costs "
        "about what one epoch from pictures costs. The last column is the largest difference of a clip's P(fake) "
        "between the two.",
        "",
        "| ConvNeXt | from the cache (clips/s) | from pictures (clips/s) | ratio | filling (clips/s) | difference |",
        "|---|---|---|---|---|---|",
    ]
    for (backbone, size), (count, rounds) in zip(BACKBONES.items(), ((CLIPS, ROUNDS), (BATCH, 3)), strict=True):
        lines.append(measure(backbone, size, count, rounds))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(__doc__, table)
