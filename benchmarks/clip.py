"""Detectors on a frozen CLIP: cached features, batched LaRE, and what CoCoOp costs beside CoOp, in one run.

    python benchmarks/clip.py [--out benchmarks/RESULTS.md]

On a GPU if there is one (wall-clock time), else on one thread (processor time); pictures are smooth colours.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from sections import processor, run  # noqa: E402

from unmask import lare  # noqa: E402
from unmask.detectors import base, clip_backbone  # noqa: E402
from unmask.detectors.clip_backbone import ClipBackbone  # noqa: E402

HEADING = "## Detectors on a CLIP"
ROUNDS, PICTURES, BATCH = 5, 64, 32
LARGER = "ViT-B-32"  # random weights: only its time counts
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object]) -> float:
    """Of one call: of the wall clock on a GPU, of the processor elsewhere."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    work()
    return time.process_time() - start


def compared(fast: Callable[[], object], slow: Callable[[], object]) -> tuple[float, float, str]:
    """Median seconds of both, in turns, and their ratio with its range."""
    fast(), slow()  # warm-up
    pairs = [(seconds(fast), seconds(slow)) for _ in range(ROUNDS)]
    ratios = sorted(b / a for a, b in pairs)
    own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    return own, other, f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"


def pictures(size: int, count: int = PICTURES) -> np.ndarray:
    """uint8[count,size,size,3] of smooth colours."""
    coarse = torch.from_numpy(np.random.default_rng(0).uniform(20, 230, (count, 3, 9, 9)).astype(np.float32))
    return F.interpolate(coarse, (size, size), mode="bicubic").movedim(1, -1).clamp(0, 255).to(torch.uint8).numpy()


def backbones() -> dict[str, ClipBackbone]:
    """The kit's own CLIP and a larger one."""
    torch.manual_seed(0)
    larger = ClipBackbone(open_clip.create_model(LARGER), LARGER, None)
    return {"clip-demo": clip_backbone.load("clip-demo", None), f"{LARGER}, random weights": larger}


def epoch(detector: base.Detector, logits: Callable[[slice], torch.Tensor]) -> None:
    """Train one epoch of `logits(part)`."""
    optimizer = torch.optim.AdamW(detector.trainable_parameters(), lr=1e-3)
    labels = (torch.arange(PICTURES, device=DEVICE) % 2).float()
    detector.train()
    for start in range(0, PICTURES, BATCH):
        part = slice(start, start + BATCH)
        loss = F.binary_cross_entropy_with_logits(logits(part), labels[part])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def caching(name: str, backbone: ClipBackbone) -> str:
    """A row: an epoch of the linear probe from cached features and from pictures."""
    detector = base.build("ufd", backbone=backbone).to(DEVICE)
    images = torch.from_numpy(pictures(backbone.input_size)).to(DEVICE)
    with torch.no_grad():
        cache = torch.cat([backbone.pooled(detector.prepare(part)) for part in images.split(BATCH)]).half()

    def from_cache() -> None:
        epoch(detector, lambda part: detector.head(cache[part].float()).squeeze(1))

    def from_pictures() -> None:
        epoch(detector, lambda part: detector(detector.prepare(images[part]).unsqueeze(1)))

    fast, slow, ratio = compared(from_cache, from_pictures)
    return f"| {name} | {PICTURES / fast:.0f} | {PICTURES / slow:.1f} | {ratio} |"


def batching(batch: int) -> str:
    """A row: LaRE maps in batches and one picture at a time."""
    extractor, images = lare.Extractor(lare.named("demo-t200-e4-128")), list(pictures(160))
    fast, slow, ratio = compared(lambda: extractor.maps(images, batch), lambda: extractor.maps(images, 1))
    gap = np.abs(extractor.maps(images[:8], batch) - extractor.maps(images[:8], 1)).max()
    return f"| {batch} | {PICTURES / fast:.1f} | {PICTURES / slow:.1f} | {ratio} | {gap:.0e} |"


def prompting(name: str, backbone: ClipBackbone) -> str:
    """A row: a step of CoOp and of CoCoOp on cached features; both have four vectors."""
    pooled = torch.randn(BATCH, backbone.dim, device=DEVICE)
    labels = (torch.arange(BATCH, device=DEVICE) % 2).float()

    def step(detector: base.Detector) -> Callable[[], None]:
        optimizer = torch.optim.SGD(detector.trainable_parameters(), lr=1e-3)

        def once() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.binary_cross_entropy_with_logits(detector.head(pooled).squeeze(1), labels).backward()
            optimizer.step()

        return once

    coop, cocoop = (
        base.build(kind, backbone=backbone, context="a photo of a").to(DEVICE) for kind in ("coop", "cocoop")
    )
    fast, slow, ratio = compared(step(coop), step(cocoop))
    return f"| {name} | {1000 * fast:.1f} | {1000 * slow:.0f} | {ratio} |"


def table() -> str:
    """Measure everything; the section as Markdown."""
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"one thread, CPU {processor()}"
    clips = {name: backbone.to(DEVICE) for name, backbone in backbones().items()}
    lines = [
        HEADING,
        "",
        f"{where}; Python {platform.python_version()}, PyTorch {torch.__version__}. `python benchmarks/clip.py`: "
        f"{PICTURES} pictures; medians of {ROUNDS} rounds in turns (lowest to highest ratio in brackets).",
        "",
        f"An epoch of the linear probe in batches of {BATCH}, from features kept as float16 and from pictures:",
        "",
        "| CLIP | from the cache (pictures/s) | from pictures (pictures/s) | ratio |",
        "|---|---|---|---|",
        *[caching(name, backbone) for name, backbone in clips.items()],
        "",
        "LaRE maps of `demo-t200-e4-128` in batches, beside one picture at a time (its four noises together), and the "
        "largest difference:",
        "",
        "| batch | batched (pictures/s) | one at a time (pictures/s) | ratio | difference |",
        "|---|---|---|---|---|",
        *[batching(batch) for batch in (4, 16)],
        "",
        f"A training step on {BATCH} cached features, the same four context vectors: CoOp passes two prompts through "
        f"the text tower, CoCoOp {2 * BATCH}:",
        "",
        "| CLIP | CoOp (ms) | CoCoOp (ms) | ratio |",
        "|---|---|---|---|",
        *[prompting(name, backbone) for name, backbone in clips.items()],
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(__doc__, table)
