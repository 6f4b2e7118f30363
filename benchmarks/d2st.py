"""D2ST-Adapters: alone and in a CLIP, beside the published layer written straightforwardly, in one run.

    python benchmarks/d2st.py [--out benchmarks/RESULTS.md]

On a GPU if there is one (8 clips of 12 frames, bfloat16, wall-clock time), else on one thread (one clip, shorter in a
CLIP, ViT-B/16 alone, float32, processor time). Weights are random: only time counts.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import open_clip  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from sections import processor, run  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from unmask.detectors import base  # noqa: E402
from unmask.detectors.clip_backbone import ClipBackbone  # noqa: E402
from unmask.detectors.d2st import D2STAdapter, Pathway  # noqa: E402

HEADING = "## D2ST-Adapters"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ROUNDS, BATCH, FRAMES = (10, 8, 12) if GPU else (3, 1, 12)
FRAMES_IN_CLIP = 12 if GPU else 4
WIDTHS = {"ViT-B-16": (768, 14), "ViT-L-14": (1024, 16)}  # and patches a side
IN_CLIP = tuple(WIDTHS) if GPU else ("ViT-B-16",)  # the large one takes a processor half an hour
PLACEMENTS = ("last-1", "last-4", "all")


def seconds(work: Callable[[], object]) -> float:
    """Of one call: of the wall clock on a GPU, of the processor elsewhere."""
    if GPU:
        torch.cuda.synchronize()
    clock = time.perf_counter if GPU else time.process_time
    start = clock()
    work()
    if GPU:
        torch.cuda.synchronize()
    return clock() - start


def in_turns(works: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> tuple[list[int], list[list[float]]]:
    """Operations of each work, counted in a warm-up, and its seconds in every round."""
    counted = [flops(work) for work in works]
    if GPU:  # where other kernels run than while counting
        for work in works:
            work()
    times = [[seconds(work) for work in works] for _ in range(rounds)]
    return counted, [list(column) for column in zip(*times, strict=True)]


def ratio(slow: list[float], fast: list[float]) -> str:
    """Median of the rounds' ratios, with its range."""
    found = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def ms(times: list[float]) -> str:
    value = 1000 * statistics.median(times)
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def precision() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU)


def flops(work: Callable[[], object]) -> int:
    """Operations of matrix products and convolutions, two for each product that is added."""
    torch.backends.mha.set_fastpath_enabled(False)  # which is not counted
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


def plain_rate() -> float:
    """Operations a second of a plain matrix product in the precision that is measured."""
    n = 8192 if GPU else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32) for _ in range(2))
    return 2 * n**3 / statistics.median(in_turns([lambda: a @ b], 10)[1][0])


class Straightforward(nn.Module):
    """The published layer as its description reads: volumes of channels first, a grid made in every forward pass,
    grid_sample, and an attention whose weights are kept. Weights are those of an adapter in reference mode."""

    def __init__(self, adapter: D2STAdapter):
        super().__init__()
        self.weights = adapter

    def adapt(self, frames: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> torch.Tensor:
        ((b, t),) = shapes
        return self(frames.unflatten(0, (b, t))).flatten(0, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.weights.down(tokens))
        volume = self.volume(x[:, :, 1:], 1)
        conv = self.weights.positional
        volume = volume + F.conv3d(volume, conv.weight, conv.bias, padding=1, groups=conv.groups)
        x = torch.cat([x[:, :, :1], volume.permute(0, 2, 3, 4, 1).flatten(2, 3)], 2)
        pathways = [x + self.attend(path, x) for path in self.weights.paths.values()]
        x = F.gelu((pathways[0] + pathways[1]) / 2)
        return tokens + F.gelu(self.weights.up(x))

    def volume(self, patches: torch.Tensor, groups: int) -> torch.Tensor:
        """float[B,T,H*W,r] to float[B*groups,r/groups,T,H,W]."""
        b, t, n, r = patches.shape
        side = math.isqrt(n)
        volume = patches.reshape(b, t, side, side, groups, r // groups)
        return volume.permute(0, 4, 5, 1, 2, 3).reshape(b * groups, r // groups, t, side, side).contiguous()

    def attend(self, path: Pathway, x: torch.Tensor) -> torch.Tensor:
        b, t, n, r = x.shape
        g, net = path.groups, path.offsets
        x = path.norm(x)
        q = path.query(x)
        found = net["conv"](self.volume(q[:, :, 1:], g)).permute(0, 2, 3, 4, 1)
        shift = net["to_offset"](F.gelu(net["norm"](found))).float().tanh()
        sizes = shift.shape[1:4]
        axes = [2 * (torch.arange(k) + 0.5) / k - 1 for k in sizes]
        uniform = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).to(x.device)
        reach = torch.tensor([min(1.0, 2 / k) for k in sizes]).to(x.device)
        places = (uniform + shift * reach).flip(-1)
        volume = self.volume(x[:, :, 1:], g).to(places.dtype)
        read = F.grid_sample(volume, places, align_corners=True)
        read = read.reshape(b, r, -1).permute(0, 2, 1)
        q, k, v = (y.reshape(b, -1, g, r // g).permute(0, 2, 1, 3) for y in (q, path.key(read), path.value(read)))
        weights = torch.softmax(torch.einsum("bgqc,bgkc->bgqk", q, k) * (r // g) ** -0.5, -1)
        out = torch.einsum("bgqk,bgkc->bgqc", weights, v).permute(0, 2, 1, 3).reshape(b, t, n, r)
        return path.out(out)


def adapter_of(dim: int, **arguments) -> D2STAdapter:
    """An adapter that does something: its last layer is not zero."""
    torch.manual_seed(0)
    adapter = D2STAdapter(dim, **arguments)
    nn.init.normal_(adapter.up.weight, std=0.02)
    return adapter.to(DEVICE)


def passes(module: nn.Module, tokens: torch.Tensor) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """A forward pass without gradients, and one with the backward pass to weights and tokens."""

    def forward() -> torch.Tensor:
        with torch.no_grad(), precision():
            return module(tokens)

    def both() -> None:
        module.zero_grad(set_to_none=True)
        with precision():
            out = module(tokens.detach().requires_grad_())
        out.float().square().mean().backward()

    return forward, both


def alone(name: str) -> list[str]:
    """Rows: one adapter on a batch of clips, forward and backward."""
    dim, side = WIDTHS[name]
    tokens = torch.randn(BATCH, FRAMES, 1 + side * side, dim, device=DEVICE)
    kinds = [("reference", "gather"), ("reference", "grid_sample"), ("aligned", "gather"), ("aligned", "grid_sample")]
    adapters = [adapter_of(dim, mode=mode, backend=backend) for mode, backend in kinds]
    modules = [Straightforward(adapters[0]), *adapters]
    works = [work for module in modules for work in passes(module, tokens)]
    gap = (works[0]() - works[2]()).abs().max().item()
    counted, times = in_turns(works)
    rows = []
    for i, label in enumerate(["straightforward", *(f"{mode}, {backend}" for mode, backend in kinds)]):
        forward, both = times[2 * i : 2 * i + 2]
        giga = counted[2 * i + 1] / 1e9
        rows.append(
            f"| {name} | {label} | {giga:.0f} | {ms(forward)} | {ms(both)} | {ratio(times[0], forward)} "
            f"| {ratio(times[1], both)} | {f'{gap:.0e}' if i == 1 else ''} |"
        )
    return rows


def detector_of(backbone: ClipBackbone, placement: str, mode: str) -> base.Detector:
    torch.manual_seed(0)
    detector = base.build("d2st", backbone=backbone, placement=placement, mode=mode)
    for adapter in detector.adapters:
        nn.init.normal_(adapter.up.weight, std=0.02)
    return detector.to(DEVICE)


def step(detector: base.Detector, logits: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A training step on `logits()`."""
    optimizer = torch.optim.AdamW(detector.trainable_parameters(), lr=1e-6)
    labels = (torch.arange(BATCH, device=DEVICE) % 2).float()

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision():
            out = logits()
        F.binary_cross_entropy_with_logits(out.float(), labels).backward()
        optimizer.step()

    return once


def memory(work: Callable[[], object]) -> str:
    """GB at the peak of a call, on a GPU."""
    if not GPU:
        return "-"
    torch.cuda.reset_peak_memory_stats()
    work()
    return f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"


def inside(name: str, backbone: ClipBackbone, placement: str, rate: float) -> tuple[str, str]:
    """A row of the forward pass and one of the training step."""
    clips = torch.randn(BATCH, FRAMES_IN_CLIP, 3, backbone.input_size, backbone.input_size, device=DEVICE)
    detector, other = (detector_of(backbone, placement, mode) for mode in ("aligned", "reference"))
    other.adapters = nn.ModuleList(Straightforward(adapter) for adapter in other.adapters)
    with precision():
        prefix = detector.prefix(clips.flatten(0, 1))

    def quiet(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            with torch.no_grad(), precision():
                return work()

        return forward

    def cached() -> torch.Tensor:
        pooled = detector.embed(prefix, [(BATCH, FRAMES_IN_CLIP)])
        return detector.head(pooled.unflatten(0, (BATCH, -1)).mean(1)).squeeze(1)

    works = [
        quiet(lambda: backbone.pooled(clips.flatten(0, 1))),
        *(quiet(lambda d=d: d(clips)) for d in (detector, other)),
        *(step(d, lambda d=d: d(clips)) for d in (detector, other)),
        step(detector, cached),
    ]
    counted, times = in_turns(works)
    frozen, forward, forward_other, train, train_other, train_cached = times
    floors = [operations / rate for operations in counted]
    over = [f"{statistics.median(t) / floor:.2f}" for t, floor in zip(times, floors, strict=True)]
    speed = BATCH * FRAMES_IN_CLIP / statistics.median(forward)
    tera = [operations / 1e12 for operations in counted]
    added = sorted(100 * (a / b - 1) for a, b in zip(forward, frozen, strict=True))
    first = (
        f"| {name} | {placement} | {tera[1]:.3g} | {speed:.3g} | {over[1]} "
        f"| {over[0]} | {statistics.median(added):.0f} ({added[0]:.0f} to {added[-1]:.0f}) "
        f"| {100 * (floors[1] / floors[0] - 1):.1f} | {ratio(forward_other, forward)} |"
    )
    second = (
        f"| {name} | {placement} | {tera[3]:.3g} | {ms(train)} | {over[3]} | {ratio(train_other, train)} "
        f"| {tera[5]:.3g} | {ms(train_cached)} | {over[5]} | {ratio(train_other, train_cached)} "
        f"| {memory(works[3])} | {memory(works[4])} | {memory(works[5])} |"
    )
    return first, second


def table() -> str:
    """Measure everything; the section as Markdown."""
    where = f"{torch.cuda.get_device_name()}, bfloat16" if GPU else f"one thread, float32, CPU {processor()}"
    rate, rows = plain_rate(), []
    adapters = [row for name in WIDTHS for row in alone(name)]
    for name in IN_CLIP:
        torch.manual_seed(0)
        backbone = ClipBackbone(open_clip.create_model(name), name, None).to(DEVICE)
        rows += [inside(name, backbone, placement, rate) for placement in PLACEMENTS]
    forward, training = zip(*rows, strict=True)
    lines = [
        HEADING,
        "",
        f"{where}; Python {platform.python_version()}, PyTorch {torch.__version__}. `python benchmarks/d2st.py`: "
        f"medians of {ROUNDS} rounds in turns (lowest to highest in brackets). A floor is the time that the counted "
        f"operations would take at {rate:.3g} a second, a plain matrix product's here.",
        "",
        f"One adapter on clips of {FRAMES} frames, {BATCH} at once, beside a straightforward implementation of the "
        "published layer (volumes of channels first, grid_sample, attention weights kept); the difference is between "
        "their outputs. Aligned, it reads more points of 16x16 patches: 75 and 108 instead of 48.",
        "",
        "| tokens of | layer | GFLOP, both ways | forward (ms) | and backward (ms) | ratio, forward | ratio, both "
        "| difference |",
        "|---|---|---|---|---|---|---|---|",
        *adapters,
        "",
        f"In a CLIP, on clips of {FRAMES_IN_CLIP} frames, {BATCH} at once: the forward pass from pictures. What "
        "adapters add is relative to the frozen CLIP alone.",
        "",
        "| CLIP | adapters | TFLOP | frames/s | over the floor | frozen CLIP over its floor | adapters add (%) "
        "| in operations (%) | straightforward / this |",
        "|---|---|---|---|---|---|---|---|---|",
        *forward,
        "",
        "A training step, from pictures and from cached tokens of the entry of the first adapter. Memory at its peak: "
        "from pictures, straightforwardly, and from the cache.",
        "",
        "| CLIP | adapters | TFLOP | ms | over the floor | straightforward / this | TFLOP, cached | ms | over the "
        "floor | straightforward / cached | memory (GB) | straightforward | cached |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *training,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(__doc__, table)
