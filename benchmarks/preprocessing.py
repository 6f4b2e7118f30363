"""Frames per second of the whole of preprocessing beside decoding alone, and of two workers beside one.

    python benchmarks/preprocessing.py [--manifest FILE --locator NAME] [--out benchmarks/RESULTS.md]

Without a manifest, 40 clips with known landmarks are made first. "Decoding alone" is the same decoder for the same
frames inside this process: no child process, no pipe, no deadline. Everything is wall time of one thread per process,
in turns; starting the workers counts.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import av  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from sections import processor, write_section  # noqa: E402

from unmask.data import decoding, video  # noqa: E402
from unmask.data.landmarks import CANONICAL_68  # noqa: E402
from unmask.data.manifest import item_id, media_path, read_manifest, write_manifest  # noqa: E402
from unmask.preprocessing import preprocess  # noqa: E402

HEADING = "## Preprocessing"
CLIPS, LENGTH, HEIGHT, WIDTH = 40, 200, 480, 640
FRAMES = 32
ROUNDS = 3


def make_clips(folder: Path) -> Path:
    """Write CLIPS clips of a textured head that moves over a textured ground, and their manifest."""
    rows = []
    for i in range(CLIPS):
        rng = np.random.default_rng(i)
        ground = cv2.GaussianBlur(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8), (0, 0), 3)
        skin = cv2.GaussianBlur(rng.integers(60, 255, (HEIGHT, WIDTH, 3), np.uint8), (0, 0), 2)
        centres = np.array([320, 220]) + 40 * np.sin(np.arange(LENGTH)[:, None] / 15 + rng.uniform(0, 6, 2))
        frames = (
            np.where(cv2.ellipse(ground * 0, centre.astype(int).tolist(), (60, 85), 0, 0, 360, (1, 1, 1), -1),
                     np.roll(skin, int(centre[0]), 1), np.roll(ground, t // 3, 1))
            for t, centre in enumerate(centres)
        )  # fmt: skip
        name = f"clip{i:02d}.mp4"
        video.encode(folder / name, frames, preset="veryfast")
        np.savez(folder / f"{name}.npz", landmarks=(CANONICAL_68 * 50 + centres[:, None]).astype(np.float32))
        rows.append({"item_id": item_id("made", name), "root": ".", "path": name, "kind": "video", "dataset": "made",
                     "split": "train", "label": 0, "method": "real", "subject": "", "source_id": "", "group_id": name,
                     "camera": "", "annotations": f"{name}.npz"})  # fmt: skip
    write_manifest(pd.DataFrame(rows).astype({"label": "int8"}), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def decode_alone(paths: list[str]) -> int:
    """Decode in this process; returns the number of frames."""
    return sum(len(decoding.read(path, FRAMES, 1920, ["decord", "pyav"])[1]) for path in paths)


def decode_safely(paths: list[str]) -> int:
    """Decode in the child process, under its deadline."""
    return sum(len(video.read_frames(path, FRAMES, max_side=1920).frames) for path in paths)


def measure(manifest: Path, locator: str) -> dict[str, list[float]]:
    """Frames per second of each way, ROUNDS times in turns."""
    paths = [str(media_path(row, manifest)) for row in read_manifest(manifest).to_dict("records")]
    rates: dict[str, list[float]] = {}

    def whole(workers: int) -> int:
        with tempfile.TemporaryDirectory() as out:
            return int(preprocess(manifest, out, locator=locator, frames=FRAMES, workers=workers)["frames"].sum())

    ways = {
        "decoding alone": lambda: decode_alone(paths),
        "decoding in the child process": lambda: decode_safely(paths),
        "preprocessing, 1 worker": lambda: whole(1),
        "preprocessing, 2 workers": lambda: whole(2),
    }
    decode_safely(paths)  # warm-up: the page cache and the child
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            count = way()
            rates.setdefault(name, []).append(count / (time.perf_counter() - start))
    return rates


def table(rates: dict[str, list[float]], what: str) -> str:
    """The section as Markdown: medians, and ratios to decoding alone and to one worker within each round."""
    alone, one = rates["decoding alone"], rates["preprocessing, 1 worker"]

    def ratio(a: list[float], b: list[float]) -> str:
        each = sorted(x / y for x, y in zip(a, b, strict=True))
        return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"

    lines = [
        HEADING,
        "",
        f"Wall time, one thread per process, {os.cpu_count()} cores, CPU {processor()}; Python "
        f"{platform.python_version()}, PyAV {av.__version__}, OpenCV {cv2.__version__}; load average at the end "
        f"{os.getloadavg()[0]:.1f} (with more than 2 the cores were shared and ratios over 1 worker mean little). "
        f"`python benchmarks/preprocessing.py`: {what}; {FRAMES} frames per clip; medians of {ROUNDS} rounds in turns, "
        "starting the workers included (lowest to highest ratio in brackets). Rates count the frames used, not those "
        "decoded on the way to them.",
        "",
        "| step | frames/s | over decoding alone | over 1 worker |",
        "|---|---|---|---|",
    ]
    for name, values in rates.items():
        over_one = ratio(values, one) if name.endswith("2 workers") else ""
        lines.append(f"| {name} | {statistics.median(values):.1f} | {ratio(values, alone)} | {over_one} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--manifest", type=Path, help="media of your own instead of made clips")
    parser.add_argument("--locator", default="annotations")
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    av.logging.set_level(av.logging.PANIC)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.manifest is None:
            manifest = make_clips(Path(folder))
            what = f"{CLIPS} made clips of {WIDTH}x{HEIGHT} and {LENGTH} frames (H.264), locator `annotations`"
        else:
            manifest = arguments.manifest
            what = f"{len(read_manifest(manifest))} media of a given manifest, locator `{arguments.locator}`"
        section = table(measure(manifest, arguments.locator), what)
    print(section)
    if arguments.out:
        write_section(arguments.out, section)


if __name__ == "__main__":
    main()
