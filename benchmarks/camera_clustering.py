"""Camera clustering: noise residuals, memory of a stream, similarities and the two-stage clustering, beside plain ways.

    python benchmarks/camera_clustering.py [--quick] [--out benchmarks/RESULTS.md]

Needs PyWavelets (`pip install PyWavelets`) for the plain residual. Wall time of all ways on the same arrays. The
similarity takes 5.2 GB of memory; where less is free, fewer fingerprints are compared, and the text says so.
"""

import argparse
import math
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # PyTorch has threads of its own; the plain ways are to have one

import numpy as np  # noqa: E402
import scipy  # noqa: E402
import torch  # noqa: E402
from scipy import fft  # noqa: E402
from scipy.ndimage import uniform_filter  # noqa: E402
from sections import processor, write_section  # noqa: E402

from unmask import clustering, prnu  # noqa: E402
from unmask.clustering_large import BAND_VALUES, cluster_large  # noqa: E402

try:
    import pywt
except ImportError as error:
    raise SystemExit("This benchmark needs PyWavelets for the plain residual: pip install PyWavelets") from error

HEADING = "## Camera clustering"
THREADS = 2
RUN = 10  # frames of a way in a row
SIDE = 512
CAMERAS, VALUES, CHUNK, LONERS = 60, 4096, 2000, 0.1
FULL = {"frame": (720, 1280), "rounds": 7, "stream": (1080, 1920), "frames": (20, 200), "count": 5000,
        "curve": (2500, 5000, 10_000, 20_000)}  # fmt: skip
QUICK = {"frame": (360, 640), "rounds": 3, "stream": (540, 960), "frames": (5, 20), "count": 300,
         "curve": (2200, 3000, 4000)}  # fmt: skip
PAPER = (100_000, 1_000_000)


def plain_residual(frame: np.ndarray, colours: bool) -> np.ndarray:
    """The residual of uint8[H,W,3] with PyWavelets and SciPy, float64[H,W] as NumPy computes: of the luma, or of each
    colour."""
    planes = np.moveaxis(frame.astype(np.float64), -1, 0)
    grey = np.array(prnu.GREY)
    if colours:
        rest = np.tensordot(grey, np.stack([_plain_rest(plane) for plane in planes]), 1)
    else:
        rest = _plain_rest(np.tensordot(grey, planes, 1))
    for dy in (0, 1):
        for dx in (0, 1):
            part = rest[dy::2, dx::2]
            part -= part.mean()
            part -= part.mean(1, keepdims=True)
            part -= part.mean(0, keepdims=True)
    spectrum = fft.fft2(rest)
    noise = rest.var(ddof=1)
    return fft.ifft2(spectrum * _wiener(np.abs(spectrum) ** 2 / rest.size, noise)).real


def _plain_rest(plane: np.ndarray) -> np.ndarray:
    _, *details = pywt.wavedec2(plane, "db4", mode="symmetric", level=prnu.LEVELS)
    noise = prnu.SIGMA**2
    weighted = [tuple(x * _wiener(x**2, noise) for x in level) for level in details]
    approximation = np.zeros_like(details[0][0])
    return pywt.waverec2([approximation, *weighted], "db4", mode="symmetric")[: plane.shape[0], : plane.shape[1]]


def _wiener(energy: np.ndarray, noise: np.floating) -> np.ndarray:
    """The share of a coefficient that is noise."""
    local = np.min([uniform_filter(energy, w, mode="constant") for w in prnu.WINDOWS], 0)
    return noise / (np.maximum(local - noise, 0) + noise)


def frames(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames uint8[H,W,3] of a smooth scene with noise, made one at a time."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    scene = 120 + 60 * np.sin(x / 41)[..., None] * np.cos(y / np.array([29, 37, 53]).reshape(3, 1, 1)).transpose(
        1, 2, 0
    )
    for _ in range(count):
        yield np.clip(scene + 5 * rng.standard_normal((height, width, 3), dtype=np.float32), 0, 255).astype(np.uint8)


def in_turns(ways: dict[str, Callable], rounds: int, run: int = 1) -> dict[str, list[float]]:
    """Seconds per call of each way in runs of `run` calls, `rounds` times in turns after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for r in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(run):
                way()
            if r:
                seconds[name].append((time.perf_counter() - start) / run)
    return seconds


def ratio(a: list[float], b: list[float]) -> str:
    """Median and range of a/b within each round."""
    each = sorted(x / y for x, y in zip(a, b, strict=True))
    return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def residuals(size: tuple[int, int], rounds: int) -> list[str]:
    """Time of the residual of one frame, and how well the ways agree."""
    frame = next(frames(1, *size))
    kit, luma, colours = prnu.noise_residual(frame), plain_residual(frame, False), plain_residual(frame, True)
    ways = {
        f"`noise_residual`, {THREADS} threads": lambda: prnu.noise_residual(frame),
        "plain, luma": lambda: plain_residual(frame, False),
        "plain, three colours": lambda: plain_residual(frame, True),
    }
    if torch.cuda.is_available():
        ways["`noise_residual`, GPU"] = lambda: prnu.noise_residual(frame, device="cuda")
    seconds, single = in_turns(ways, rounds, RUN), in_turns(ways, rounds)
    agree = {"plain, luma": (kit, luma), "plain, three colours": (kit, colours)}
    lines = [
        f"### Noise residual of a frame of {size[1]}x{size[0]}",
        "",
        "Plain: the definition in float64, frame by frame with PyWavelets and SciPy, which use one thread. Three "
        f"colours are the published definition; the kit takes the luma first. Medians of {rounds} rounds of {RUN} "
        "frames of each way in turns (lowest to highest ratio in brackets); single frames in turns scatter more, for "
        "each way may pay for memory that the other has given back. The last columns compare with the kit's result.",
        "",
        "| way | ms | plain, luma / way | plain, three colours / way | single frames: ms | plain, luma / way "
        "| correlation | relative difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        a, b = agree.get(name, (kit, kit))
        same = f"{prnu.ncc(a, b):.5f} | {np.linalg.norm(a - b) / np.linalg.norm(a):.1e}" if a is not b else "|"
        over = " | ".join(ratio(seconds[plain], values) for plain in agree)
        alone = f"{1000 * statistics.median(single[name]):.1f} | {ratio(single['plain, luma'], single[name])}"
        lines.append(f"| {name} | {1000 * statistics.median(values):.1f} | {over} | {alone} | {same} |")
    return lines


def peak() -> float:
    """Highest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def stream(count: int, height: int, width: int) -> tuple[float, float, float]:
    """For a fresh process: memory (MiB) before and at the peak of a fingerprint of `count` frames, and seconds."""
    torch.set_num_threads(THREADS)
    prnu.fingerprint(frames(1, prnu.MIN_SIDE, prnu.MIN_SIDE))
    before, start = peak(), time.perf_counter()
    prnu.fingerprint(frames(count, height, width))
    return before, peak(), time.perf_counter() - start


def memory(size: tuple[int, int], counts: tuple[int, ...]) -> list[str]:
    """Memory of fingerprints of streams of several lengths."""
    lines = [
        f"### Memory of a fingerprint of frames of {size[1]}x{size[0]}",
        "",
        "`fingerprint` of a generator that makes its frames; a fresh process each; highest resident memory before the "
        "first frame and at the end. One frame is "
        f"{3 * math.prod(size) / 2**20:.0f} MiB, one plane of the accumulator {4 * math.prod(size) / 2**20:.0f} MiB.",
        "",
        "| frames | before (MiB) | peak (MiB) | growth (MiB) | ms per frame |",
        "|---|---|---|---|---|",
    ]
    for count in counts:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            before, most, seconds = pool.apply(stream, (count, *size))
        lines.append(f"| {count} | {before:.0f} | {most:.0f} | {most - before:.0f} | {1000 * seconds / count:.0f} |")
    return lines


def free_memory() -> float:
    """Bytes that can be allocated without swapping, as far as the system tells."""
    info = Path("/proc/meminfo")
    found = [line for line in info.read_text().splitlines() if line.startswith("MemAvailable")] if info.exists() else []
    return 1024 * int(found[0].split()[1]) if found else 8e9


def similarities(wanted: int) -> tuple[list[str], float]:
    """Time of the similarity of `wanted` fingerprints beside a plain matrix product; operations per second of that."""
    values = SIDE**2
    count = min(wanted, int(0.6 * free_memory() / (4 * values)))
    torch.manual_seed(0)
    x = torch.empty(count, values).normal_()
    for i in range(0, count, 100):
        x[i : i + 100] /= torch.linalg.vector_norm(x[i : i + 100], dim=1, keepdim=True)
    patterns, results = x.numpy(), {}
    ways = {
        "plain `X @ X.T`": lambda: x @ x.T,
        "`similarity`": lambda: torch.from_numpy(clustering.similarity(patterns)),
    }
    if torch.cuda.is_available():
        ways["`similarity`, GPU"] = lambda: torch.from_numpy(clustering.similarity(patterns, device="cuda"))
    seconds = {}
    for name, way in ways.items():
        start = time.perf_counter()
        results[name] = way()
        seconds[name] = time.perf_counter() - start
    plain, operations = next(iter(results)), 2 * count**2 * values
    less = "" if count == wanted else f" ({wanted} wanted; the free memory holds no more)"
    lines = [
        f"### Similarity of {count} fingerprints of {SIDE}x{SIDE}{less}",
        "",
        f"float32, {4 * count * values / 1e9:.1f} GB in memory, {operations:.1e} operations as one product; once each. "
        "`similarity` multiplies the upper triangle in tiles.",
        "",
        "| way | seconds | plain / way | largest difference |",
        "|---|---|---|---|",
    ]
    for name, value in seconds.items():
        apart = float((results[name] - results[plain]).abs().max())
        lines.append(f"| {name} | {value:.1f} | {seconds[plain] / value:.2f} | {apart:.0e} |")
    return lines, operations / seconds[plain]


def media(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints float32[N,VALUES] of CAMERAS cameras of very unequal size, and a share LONERS of none; truth int[N].

    Two of one camera correlate by about 0.08.
    """
    rng = np.random.default_rng(0)
    share = np.geomspace(200, 1, CAMERAS)
    sizes = np.round(share / share.sum() * count * (1 - LONERS)).astype(int)
    alone = np.arange(CAMERAS, CAMERAS + count - sizes.sum())
    truth = rng.permutation(np.append(np.repeat(np.arange(CAMERAS), sizes), alone))
    patterns = rng.standard_normal((count, VALUES), dtype=np.float32)
    sensors = rng.standard_normal((CAMERAS, VALUES), dtype=np.float32)
    strength = np.sqrt(0.087 * np.exp(0.4 * rng.standard_normal(count) - 0.08)).astype(np.float32)
    for i in np.flatnonzero(truth < CAMERAS):
        patterns[i] += strength[i] * sensors[truth[i]]
    return patterns, truth


def curve(counts: tuple[int, ...]) -> tuple[list[str], np.ndarray]:
    """Time and quality of the two-stage clustering over the number of media; slope and intercept of the time."""
    lines = [
        f"### Two-stage clustering, fingerprints of {VALUES} values",
        "",
        f"`cluster_large`, chunk {CHUNK}: {CAMERAS} cameras, the largest of 200 times the media of the smallest, and "
        f"{LONERS:.0%} of no camera. ARI counts every unattributed medium as a cluster of its own.",
        "",
        "| media | seconds | ARI | clusters | unattributed |",
        "|---|---|---|---|---|",
    ]
    seconds = []
    cluster_large(media(500)[0], 100)  # warm-up
    for count in counts:
        patterns, truth = media(count)
        start = time.perf_counter()
        labels = cluster_large(patterns, CHUNK, VALUES)
        seconds.append(time.perf_counter() - start)
        s = clustering.scores(truth, labels)
        row = f"| {count} | {seconds[-1]:.1f} | {s['ari']:.4f} | {s['clusters']:.0f} | {s['unattributed']:.3f} |"
        lines.append(row)
    return lines, np.polyfit(counts, seconds, 1)


def on_paper(line: np.ndarray, rate: float) -> list[str]:
    """Time and memory of the two-stage clustering of more media than can be measured here."""
    lines = [
        "Extrapolated, not measured. The time at "
        f"{VALUES} values is the straight line through the times above, {line[1]:.1f} + {1000 * line[0]:.2f} N/1000 s, "
        f"and M^2 {VALUES} operations to search what is left, M = {LONERS:g} N. At {SIDE}x{SIDE} values (D) it is "
        f"4 N {CAMERAS} D + 2 ({CHUNK} + M) {CHUNK} D + M^2 {VALUES} operations, at the {rate / 1e9:.0f}e9 a second "
        f"of the plain product above; reading {2 * SIDE**2 / 1e6:.1f} MB per fingerprint twice from a file "
        f"comes on top. Memory is 8 {CAMERAS} D + 4 M {VALUES} + 60 {CHUNK}^2 + 12 x {BAND_VALUES} bytes.",
        "",
        f"| media (extrapolated) | s, {VALUES} values | s, {SIDE}x{SIDE} values | GB, {SIDE}x{SIDE} values |",
        "|---|---|---|---|",
    ]
    for count in PAPER:
        left, values = LONERS * count, SIDE**2
        pairs = left**2 * VALUES
        wide = 4 * count * CAMERAS * values + 2 * (CHUNK + left) * CHUNK * values + pairs
        memory = 8 * CAMERAS * values + 4 * left * VALUES + 60 * CHUNK**2 + 12 * BAND_VALUES
        short = np.polyval(line, count) + pairs / rate
        lines.append(f"| {count} | {short:.0f} | {wide / rate:.0f} | {memory / 1e9:.1f} |")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    sizes = QUICK if arguments.quick else FULL
    # First: a process inherits the record of the one that started it, so that one must still be small.
    parts = [memory(sizes["stream"], sizes["frames"]), residuals(sizes["frame"], sizes["rounds"])]
    compared, rate = similarities(sizes["count"])
    measured, line = curve(sizes["curve"])
    parts += [compared, measured]
    if not arguments.quick:  # so few sizes say nothing of larger ones
        parts.append(on_paper(line, rate))
    gpu = f", GPU {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    what = (
        f"Wall time, {THREADS} threads, {os.cpu_count()} cores, CPU {processor()}{gpu}; Python "
        f"{platform.python_version()}, PyTorch {torch.__version__}, NumPy {np.__version__}, SciPy {scipy.__version__}, "
        f"PyWavelets {version('PyWavelets')}; load average at the end {os.getloadavg()[0]:.1f} (with more than "
        f"{THREADS} the cores were shared, and what runs in {THREADS} threads is not to be judged). "
        f"`python benchmarks/camera_clustering.py{' --quick' * arguments.quick}`."
    )
    section = "\n".join([HEADING, "", what, *("\n" + "\n".join(part) for part in parts)]) + "\n"
    print(section)
    if arguments.out:
        write_section(arguments.out, section)


if __name__ == "__main__":
    main()
