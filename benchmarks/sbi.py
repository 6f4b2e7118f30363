"""Self-blending samples per second on one core, beside a plain full-resolution version measured in the same run.

    python benchmarks/sbi.py [--out benchmarks/RESULTS.md]

The plain version starts from a full 1280x720 frame as PNG, the kit from the crop that it stored once. Both end with
the same training pair of the same draws. The plain version takes every step over the whole loose crop and in the
published order; its elastic deformation is the published one: white noise blurred at full resolution (scipy
gaussian_filter), image and mask resampled (map_coordinates), the bent image then thrown away. Hulls, colours,
softening and the final crop are shared.

Beside it: the batched torch version, and how many samples a second the loader makes and the demo's ConvNeXt takes.
"""

import os
import platform
import statistics
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import scipy  # noqa: E402
import torch  # noqa: E402
from scipy import ndimage  # noqa: E402
from sections import processor, run  # noqa: E402
from torch.nn.functional import binary_cross_entropy_with_logits  # noqa: E402

from unmask import hulls, sbi, sbi_torch  # noqa: E402
from unmask.data.crops import CropStore, CropWriter, encode_crop  # noqa: E402
from unmask.detectors import base  # noqa: E402
from unmask.pairs import SelfBlendPairs  # noqa: E402
from unmask.profile import load_profile  # noqa: E402
from unmask.training import precision  # noqa: E402

HEADING = "## Self-blending"
FRAME = (720, 1280)  # height, width
SIZES = (256, 380)
ROUNDS = 5
SAMPLES = 20
BATCH = {"cpu": 16, "cuda": 128}


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


def framed(image: np.ndarray, landmarks: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A frame with the face in its middle as PNG, and the landmarks in it."""
    frame, _ = drawn_face(max(FRAME))
    frame, side = frame[: FRAME[0]].copy(), len(image)
    y, x = (FRAME[0] - side) // 2, (FRAME[1] - side) // 2
    frame[y : y + side, x : x + side] = image
    return cv2.imencode(".png", frame)[1].tobytes(), landmarks + np.float32([x, y])


def decode(data: bytes) -> np.ndarray:
    """Encoded picture to uint8[H,W,3] RGB."""
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def plain_elastic(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Bend image and mask at full resolution with alpha 50, sigma 7 px; returns the mask."""
    # A generator of its own, so that later steps take the same draws as the kit's.
    noise = np.random.default_rng(0).uniform(-1, 1, (2, *mask.shape))
    dy, dx = (ndimage.gaussian_filter(field, 7) * 50 for field in noise)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    for channel in range(3):
        ndimage.map_coordinates(image[..., channel], [y + dy, x + dx], order=1, mode="reflect")
    return ndimage.map_coordinates(mask, [y + dy, x + dx], order=1)


def plain_transform(image: np.ndarray, draw: sbi.BlendDraw, recipe: sbi.Recipe) -> np.ndarray:
    """Source-target transform: colours of every pixel, then lost resolution or sharpening."""
    altered, size = sbi._recolour(image, draw.colour, recipe.single), image.shape[1::-1]
    if draw.down_factor > 1:
        small = tuple(side // draw.down_factor for side in size)
        return cv2.resize(cv2.resize(altered, small, interpolation=cv2.INTER_NEAREST), size)
    alpha, lightness = draw.sharpen
    kernel = np.full((3, 3), -alpha, np.float32)
    kernel[1, 1] = 1 + alpha * (7 + lightness)
    return np.clip(cv2.filter2D(altered, -1, kernel), 0, 255)


def plain_self_blend(image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator, name: str) -> sbi.SelfBlend:
    """`sbi.self_blend` over the whole picture."""
    recipe = sbi.find_recipe(name)
    draw = sbi.draw_blend(rng, recipe)
    points = hulls.check_face(image, landmarks)
    shape = image.shape[:2]
    altered = plain_transform(image, draw, recipe)
    source, real = (altered, image.copy()) if draw.transform_source else (image, sbi._to_uint8(altered))
    matrix = sbi.affine(shape, draw, points)
    source = cv2.warpAffine(source.astype(np.float32), matrix, shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    hull = hulls.hull_mask(points[:68] if draw.first_68 else points, shape, draw.hull)
    bent = plain_elastic(source, cv2.warpAffine(hull, matrix, shape[::-1]))
    mask = hulls.soften(bent, draw.soft_shape, draw.erode_kernel, draw.blur_kernel, draw.blur_sigma) * draw.ratio
    weight = mask[..., None]
    fake = sbi._to_uint8(weight * source + (1 - weight) * real)
    return sbi.SelfBlend(fake, real, mask, 4 * mask * (1 - mask))


def plain_training_pair(
    image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator, size: int, recipe: str
) -> tuple:
    """`sbi.training_pair` around `plain_self_blend`."""
    points = hulls.check_face(image, landmarks)
    x0, y0, x1, y1 = hulls.loose_box(points, image.shape[:2])
    image, points = image[y0:y1, x0:x1], points - np.array([x0, y0], np.float32)
    if rng.random() < 0.5:
        image, points = sbi.flip(image, points)
    sample = plain_self_blend(image, points, rng, recipe)
    real, fake = sbi.augment_pair(sample.real, sample.fake, rng, recipe)
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


def against_plain() -> list[str]:
    """Rows of the kit beside the plain version."""
    lines = []
    for size in SIZES:
        image, points = drawn_face(size)
        stored, (frame, places) = encode_crop(image, "png"), framed(image, points)
        for recipe in ("intended", "faithful"):  # the published ways
            ways = {
                "blend alone": (
                    lambda rng, a=image, b=points, r=recipe: sbi.self_blend(a, b, rng, r),
                    lambda rng, a=image, b=points, r=recipe: plain_self_blend(a, b, rng, r),
                ),
                "file to training pair": (
                    lambda rng, b=points, s=size, r=recipe, f=stored: sbi.training_pair(decode(f), b, rng, s, r),
                    lambda rng, b=places, s=size, r=recipe, f=frame: plain_training_pair(decode(f), b, rng, s, r),
                ),
            }
            for name, way in ways.items():
                fast, slow, ratio, low, high = compare(*way)
                ratio = f"{ratio:.1f} ({low:.1f} to {high:.1f})"
                lines.append(f"| {name}, {recipe} | {size} | {fast:.0f} | {slow:.1f} | {ratio} |")
    return lines


def batched(device: str, size: int) -> float:
    """Samples per second of wall time of `sbi_torch.blend_batch` on draws made before."""
    image, points = drawn_face(size)
    draws = [sbi.draw_blend(sbi.sample_rng(0, "batch", frame, 0)) for frame in range(BATCH[device])]
    images = torch.from_numpy(np.stack([image] * len(draws))).to(device)
    landmarks, seconds = np.stack([points] * len(draws)), []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        result = sbi_torch.blend_batch(images, landmarks, draws)
        float(result[2].sum())  # waits for the device
        seconds.append(time.perf_counter() - start)
    return len(draws) / statistics.median(seconds[1:])


def loader_rate(config: dict, crop: int) -> float:
    """Pairs per second of processor time that the training's data set makes of stored crops of `crop` px."""
    image, points = drawn_face(crop)
    with tempfile.TemporaryDirectory() as folder:
        with CropWriter(folder, 0, 1) as writer:
            writer.resume([])
            data = encode_crop(image, "png")
            crops = [{"frame": k, "data": data} for k in range(SAMPLES)]
            writer.add(("face", ""), {"item_id": "face"}, crops, "png")
            writer.finish()
            place = {"item_id": "face", "shard": writer.tar.name, "size": len(data), "landmarks": points.ravel()}
        block = 512 + -(-len(data) // 512) * 512  # a tar entry: a header, then the data in whole blocks
        rows = pd.DataFrame([place | {"frame": k, "offset": 512 + k * block} for k in range(SAMPLES)])
        pairs = SelfBlendPairs(CropStore(folder), rows, config["size"], 0, "intended", True)
        rates = []
        for epoch in range(ROUNDS + 1):
            start = time.process_time()
            for i in range(SAMPLES):
                pairs[epoch, i]
            rates.append(SAMPLES / (time.process_time() - start))
    return statistics.median(rates[1:])


def model_rate(config: dict, pairs: int) -> float:
    """Pairs per second of processor time that a training step of the demo's ConvNeXt takes, on one thread."""
    detector = base.build("convnext", **config).train()
    optimizer = torch.optim.AdamW(detector.trainable_parameters(), lr=1e-4)
    images = torch.randint(0, 256, (2 * pairs, config["size"], config["size"], 3), dtype=torch.uint8)
    labels, edges = torch.tensor([0.0, 1.0]).repeat(pairs), torch.zeros(2 * pairs, *[config["size"] // 8] * 2)
    rates = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision() == "bf16"):
            logits, boundary = detector.with_boundary(detector.prepare(images))
            losses = (binary_cross_entropy_with_logits(*x) for x in ((logits, labels), (boundary, edges)))
            sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rates.append(pairs / (time.process_time() - start))
    return statistics.median(rates[1:])


def table() -> str:
    """Measure everything; the section as Markdown."""
    profile = load_profile("demo")
    made = loader_rate(dict(profile.convnext), profile.preprocess.size)
    used = model_rate(dict(profile.convnext), profile.train.batch)
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    names = {"cpu": "CPU, one thread", "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else ""}
    lines = [HEADING, ""]
    lines += [
        f"One thread, seconds of processor time, CPU {processor()}; Python {platform.python_version()}, NumPy "
        f"{np.__version__}, OpenCV {cv2.__version__}, SciPy {scipy.__version__}, PyTorch {torch.__version__}. "
        f"`python benchmarks/sbi.py`: drawn face with 81 landmarks, medians of {ROUNDS} rounds of {SAMPLES} samples, "
        "in turns on the same draws (lowest to highest ratio in brackets).",
        "",
        "Plain: every step over the whole picture in the published order, elastic deformation of image and mask at "
        "full resolution with SciPy. Its file is the 1280x720 frame as PNG, the kit's is the stored crop as PNG.",
        "",
    ]
    lines += ["| step, recipe | picture (px) | kit (samples/s) | plain (samples/s) | ratio |", "|---|---|---|---|---|"]
    lines += [*against_plain(), "", "Batched torch version, blend alone, recipe `intended`, wall time:", ""]
    lines += ["| device | batch | picture (px) | samples/s |", "|---|---|---|---|"]
    lines += [f"| {names[d]} | {BATCH[d]} | {size} | {batched(d, size):.0f} |" for d in devices for size in SIZES]
    lines += [
        "",
        f"Training in the demo profile, one core: the loader makes {made:.0f} pairs a second, the ConvNeXt "
        f"(`{profile.convnext.backbone}`, {profile.convnext.size} px, mixed precision: {precision()}) learns from "
        f"{used:.0f}; ratio {made / used:.1f}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    run(__doc__, table)
