"""Fixtures shared by several test files: small clips with known content, and the folder of real media."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from unmask.data.video import encode

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real test media beside the repository; tests that need them skip where they are absent."""
    if not (SHARED / "data" / "media" / "media.csv").is_file():
        pytest.skip("real test media (../shared/data) are not here")
    return SHARED / "data"


def pytest_collection_modifyitems(items):
    # The whole tiny study takes longest: first, and the other files beside it.
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def moving_frames(count: int = 24, height: int = 96, width: int = 128, squares: int = 1) -> np.ndarray:
    """Frames uint8[T,H,W,3]: a smooth coloured background, white squares that drift, brightness that tells time."""
    y, x = np.mgrid[:height, :width]
    frames = np.empty((count, height, width, 3), np.uint8)
    side = max(min(height, width) // (3 if squares == 1 else 8), 1)
    pitch = 0.9 * width / min(squares, 5)
    for t in range(count):
        frames[t] = np.dstack([60 + 90 * x / width, 60 + 90 * y / height, np.full(x.shape, 20 + 100 * t / count)])
        for k in range(squares):
            left, top = int((k % 5 + 0.3) * pitch) + t // 4, int((k // 5 + 0.3) * height / 2.2)
            cv2.rectangle(frames[t], (left, top), (left + side, top + side), (255, 255, 255), -1)
    return frames


def textured_frames(count: int, height: int, width: int) -> np.ndarray:
    """`moving_frames` with noise on the background, so that a clip of them is more than headers."""
    frames = moving_frames(count, height, width)
    noise = np.random.default_rng(0).integers(0, 50, frames.shape, np.uint8)
    return np.where(frames < 200, frames + noise, frames)


@pytest.fixture
def make_clip():
    """Factory: write a small H.264 clip with B-frames; returns its path."""

    def make(path: Path, count: int = 24, height: int = 96, width: int = 128, squares: int = 1, **options) -> Path:
        return encode(path, moving_frames(count, height, width, squares), **({"crf": 18} | options))

    return make


TINY = {
    "world.size": 96, "world.frames": 5, "world.cameras": 3, "world.pairs_train": 2, "world.pairs_val": 1,
    "world.pairs_test": 2, "world.pairs_b": 1, "convnext.backbone": "test_convnext", "train.batch": 4,
    "train.init": "none",
}  # fmt: skip


def tiny_profile(**changes):
    """Profile `tiny` with a still smaller world and network; keywords change keys: `train__epochs=2`."""
    from unmask.profile import load_profile

    return load_profile("tiny", TINY | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    """The folder of a tiny synthetic world with its manifest.parquet; not to be changed."""
    from unmask.data.world import generate

    out = tmp_path_factory.mktemp("shared") / "world"
    generate(out, dict(tiny_profile().world), seed=3)
    return out


@pytest.fixture(scope="session")
def tiny_crops(tiny_world) -> Path:
    """The folder of its crops, two per clip; not to be changed."""
    from unmask.preprocessing import preprocess

    preprocess(tiny_world / "manifest.parquet", out := tiny_world.parent / "crops", workers=0,
               **tiny_profile().preprocess)  # fmt: skip
    return out


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_world, tiny_crops) -> Path:
    """A ConvNeXt trained on it for one epoch."""
    from unmask.training import train_detector

    manifest, out = tiny_world / "manifest.parquet", tiny_world.parent / "checkpoint"
    return train_detector("convnext", tiny_profile(), manifest, tiny_crops, out, seed=0)


@pytest.fixture(scope="session")
def dense_crops(tiny_world) -> Path:
    """Crops of four frames in a row of the same media."""
    from unmask.preprocessing import preprocess

    settings = dict(tiny_profile().preprocess) | {"sampling": "dense", "frames": 4}
    preprocess(tiny_world / "manifest.parquet", out := tiny_world.parent / "dense", workers=0, **settings)
    return out
