"""Self-blending samples per second on one core, beside a plain full-resolution version measured in the same run.

    python benchmarks/sbi.py [--out benchmarks/RESULTS.md]

The plain version shares hulls, colours, softening and crops with the kit. It differs in the elastic deformation, done
as published: white noise blurred at full resolution (scipy gaussian_filter), image and mask resampled
(map_coordinates), the bent image then thrown away; and in warping and blending the whole picture instead of the
mask's window.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import scipy  # noqa: E402
from scipy import ndimage  # noqa: E402
from sections import processor, write_section  # noqa: E402

from unmask import hulls, sbi  # noqa: E402

HEADING = "## Self-blending"
SIZES = (256, 380)
ROUNDS = 7
SAMPLES = 30


def drawn_face(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8[side,side,3] (smooth colours and grain) and 81 landmarks of a face as a loose crop holds it."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(40, 210, (8, 8, 3)).astype(np.float32)
    image = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC) + rng.normal(0, 4, (side, side, 3))

    def arc(start: float, stop: float, count: int, centre: tuple[float, float], radii: tuple[float, float]):
        angle = np.radians(np.linspace(start, stop, count))
        return np.c_[centre[0] + radii[0] * np.cos(angle), centre[1] + radii[1] * np.sin(angle)]

    parts = [arc(180, 0, 17, (0, -0.2), (0.5, 0.75))]
    parts += [arc(200, 340, 5, (x, -0.3), (0.16, 0.06)) for x in (-0.26, 0.26)]
    parts += [np.c_[np.zeros(4), np.linspace(-0.18, 0.08, 4)], np.c_[np.linspace(-0.1, 0.1, 5), np.full(5, 0.14)]]
    parts += [arc(180, 480, 6, (x, -0.16), (0.07, 0.03)) for x in (-0.24, 0.24)]
    parts += [arc(180, 510, 12, (0, 0.31), (0.2, 0.07)), arc(180, 495, 8, (0, 0.31), (0.15, 0.03))]
    parts += [arc(192, 348, 13, (0, -0.25), (0.5, 0.45))]
    landmarks = np.vstack(parts) * side / 2 + (side / 2, side * 0.55)
    return np.clip(image, 0, 255).astype(np.uint8), landmarks.astype(np.float32)


def plain_elastic(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Bend image and mask at full resolution with alpha 50, sigma 7 px; returns the mask."""
    # A generator of its own, so that later steps take the same draws as the kit's.
    noise = np.random.default_rng(0).uniform(-1, 1, (2, *mask.shape))
    dy, dx = (ndimage.gaussian_filter(field, 7) * 50 for field in noise)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    for channel in range(3):
        ndimage.map_coordinates(image[..., channel], [y + dy, x + dx], order=1, mode="reflect")
    return ndimage.map_coordinates(mask, [y + dy, x + dx], order=1)


def plain_self_blend(image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator) -> sbi.SelfBlend:
    """`sbi.self_blend`, recipe "intended", over the whole picture."""
    recipe = sbi.RECIPES["intended"]
    draw = sbi.draw_blend(rng, recipe)
    points = hulls.check_face(image, landmarks)
    shape = image.shape[:2]
    altered = sbi._transform(image, draw, recipe)
    source, real = (altered, image.copy()) if draw.transform_source else (image, sbi._to_uint8(altered))
    matrix = sbi.affine(shape, draw, points)
    source = cv2.warpAffine(source.astype(np.float32), matrix, shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    hull = hulls.hull_mask(points[:68] if draw.first_68 else points, shape, draw.hull)
    bent = plain_elastic(source, cv2.warpAffine(hull, matrix, shape[::-1]))
    mask = hulls.soften(bent, draw.soft_shape, draw.erode_kernel, draw.blur_kernel, draw.blur_sigma) * draw.ratio
    weight = mask[..., None]
    fake = sbi._to_uint8(weight * source + (1 - weight) * real)
    return sbi.SelfBlend(fake, real, mask, 4 * mask * (1 - mask))


def plain_training_pair(image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator, size: int) -> tuple:
    """`sbi.training_pair` around `plain_self_blend`."""
    points = hulls.check_face(image, landmarks)
    x0, y0, x1, y1 = hulls.loose_box(points, image.shape[:2])
    image, points = image[y0:y1, x0:x1], points - np.array([x0, y0], np.float32)
    if rng.random() < 0.5:
        image, points = sbi.flip(image, points)
    sample = plain_self_blend(image, points, rng)
    real, fake = sbi.augment_pair(sample.real, sample.fake, rng)
    box = sbi.crop_box(points, rng)
    return tuple(sbi.crop(part, box, size) for part in (real, fake, sample.mask))


def rate(function, seed: int) -> float:
    """Calls per second of processor time (other programs do not count) over SAMPLES calls of `function(rng)`."""
    generators = [sbi.sample_rng(seed, "benchmark", frame, 0) for frame in range(SAMPLES)]
    start = time.process_time()
    for rng in generators:
        function(rng)
    return SAMPLES / (time.process_time() - start)


def compare(kit, plain) -> tuple[float, float, float, float, float]:
    """Median rates of both, taken in turns on the same draws, and the median, lowest and highest ratio of a round."""
    rate(kit, -1)  # warm-up
    rounds = [(rate(kit, seed), rate(plain, seed)) for seed in range(ROUNDS)]
    ratios = sorted(fast / slow for fast, slow in rounds)
    fast, slow = (statistics.median(column) for column in zip(*rounds, strict=True))
    return fast, slow, statistics.median(ratios), ratios[0], ratios[-1]


def table() -> str:
    """Measure everything; the section as Markdown."""
    lines = [
        HEADING,
        "",
        f"One thread, seconds of processor time, CPU {processor()}; Python {platform.python_version()}, "
        f"NumPy {np.__version__}, OpenCV {cv2.__version__}, SciPy {scipy.__version__}. `python benchmarks/sbi.py`: "
        f"drawn face with 81 landmarks, recipe `intended`, medians of {ROUNDS} rounds of {SAMPLES} samples, in turns "
        "on the same draws (lowest to highest ratio in brackets).",
        "",
        "Plain: the same steps, but elastic deformation of image and mask at full resolution with SciPy, and warping "
        "and blending of the whole picture.",
        "",
        "| step | picture (px) | kit (samples/s) | plain (samples/s) | ratio |",
        "|---|---|---|---|---|",
    ]
    for size in SIZES:
        image, points = drawn_face(size)
        pairs = {
            "self_blend": (
                lambda rng, a=image, b=points: sbi.self_blend(a, b, rng),
                lambda rng, a=image, b=points: plain_self_blend(a, b, rng),
            ),
            "training_pair": (
                lambda rng, a=image, b=points, s=size: sbi.training_pair(a, b, rng, s),
                lambda rng, a=image, b=points, s=size: plain_training_pair(a, b, rng, s),
            ),
        }
        for name, (kit, plain) in pairs.items():
            fast, slow, ratio, low, high = compare(kit, plain)
            lines.append(f"| {name} | {size} | {fast:.0f} | {slow:.1f} | {ratio:.1f} ({low:.1f} to {high:.1f}) |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    section = table()
    print(section)
    if arguments.out:
        write_section(arguments.out, section)


if __name__ == "__main__":
    main()
