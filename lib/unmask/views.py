"""Face crops as a network that learns from pseudo-labels sees them: random views to learn from, one fixed to judge by.

The random views are those of enhanced contrastive learning (Qiao et al., TPAMI 2024, from the published transform):
a random part, mirrored or not, recoloured, sometimes grey, mostly with a rectangle erased. Every view has its own
generator, so that any process can replay it and nothing global is drawn from.
"""

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as V

from unmask import sbi
from unmask.data.crops import CropStore

FIXED = -1  # in place of the epoch: the view of evaluation
# Training cuts a frame of 25 % around the face, evaluation of 12.5 %: a random part of it, on average, is as large.
LOOSE_MARGIN, LOOSE_ZOOM = 0.5, 1.5 / 1.25
NEUTRAL = (124, 116, 104)  # grey levels that the network's normalisation takes to about zero


def _random_part(rng: np.random.Generator, side: int, scale: tuple[float, float], ratio: tuple[float, float]):
    """A rectangle (top, left, height, width) inside a square: its share of the area, and width over height."""
    for _ in range(10):
        area, shape = side * side * rng.uniform(*scale), np.exp(rng.uniform(*np.log(ratio)))
        height, width = round(np.sqrt(area / shape)), round(np.sqrt(area * shape))
        if 0 < height <= side and 0 < width <= side:
            return int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1)), height, width
    return 0, 0, side, side


def _jitter(view: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3)
    hue = rng.uniform(-0.1, 0.1)
    steps = [
        lambda v: V.adjust_brightness(v, brightness),
        lambda v: V.adjust_contrast(v, contrast),
        lambda v: V.adjust_saturation(v, saturation),
        lambda v: V.adjust_hue(v, hue),
    ]
    for step in rng.permutation(len(steps)):
        view = steps[step](view)
    return view


def random_view(picture: torch.Tensor, rng: np.random.Generator, size: int) -> torch.Tensor:
    """One augmented view uint8[3,size,size] of uint8[3,S,S]."""
    view = V.resized_crop(picture, *_random_part(rng, picture.shape[-1], (0.5, 1), (3 / 4, 4 / 3)), [size, size])
    if rng.random() < 0.5:
        view = V.horizontal_flip(view)
    if rng.random() < 0.8:
        view = _jitter(view, rng)
    if rng.random() < 0.2:
        view = V.rgb_to_grayscale(view, 3)
    if rng.random() < 0.8:
        patch = torch.tensor(NEUTRAL, dtype=torch.uint8).view(3, 1, 1)
        view = V.erase(view, *_random_part(rng, size, (0.02, 0.2), (0.5, 2)), patch)
    return view


class Views(Dataset):
    """Sample (epoch, row, copy) of crop index rows: two random views uint8[2,S,S,3], or with FIXED one, uint8[1,S,S,3].

    `copy` counts how often the epoch has used the row before: an oversampled frame gives new views.
    """

    def __init__(self, store: CropStore, rows: pd.DataFrame, size: int, seed: int):
        self.store, self.rows, self.size, self.seed = store, rows.to_dict("records"), size, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where: tuple[int, int, int]) -> torch.Tensor:
        cv2.setNumThreads(1)
        epoch, i, copy = where
        row = self.rows[i]
        image, points = self.store.image(row), np.asarray(row["landmarks"], np.float32).reshape(-1, 2)
        if epoch == FIXED:
            return torch.from_numpy(sbi.crop(image, sbi.crop_box(points), self.size)).unsqueeze(0)
        loose = sbi.crop(image, sbi.crop_box(points, margin=LOOSE_MARGIN), round(LOOSE_ZOOM * self.size))
        picture = torch.from_numpy(loose).permute(2, 0, 1).contiguous()
        views = []
        for view in (2 * copy, 2 * copy + 1):
            rng = sbi.sample_rng(self.seed, f"{row['item_id']} view {view}", row["frame"], epoch)
            views.append(random_view(picture, rng, self.size))
        return torch.stack(views).permute(0, 2, 3, 1)


def balanced_plan(
    items: np.ndarray, labels: np.ndarray, batch: int, frames_per_clip: int, seed: int, epoch: int
) -> list[list[tuple[int, int, int]]]:
    """The batches of an epoch, lists of (epoch, frame, copy): half of either label, up to `frames_per_clip` of an item.

    items: item id of every frame; labels: int, 0, 1 or negative (left out). The items of the label with fewer frames
    are gone through again until it has as many. Batches hold up to `batch` frames and are of nearly one size.
    """
    rng = np.random.default_rng([seed, 0x5C0, epoch])
    frames = [np.flatnonzero(labels == label) for label in (0, 1)]
    groups = [[own.to_numpy() for _, own in pd.Series(f).groupby(items[f])] for f in frames]
    count = max(sum(min(frames_per_clip, len(g)) for g in found) for found in groups)
    halves = []
    for found in groups:
        half, copy = [], 0
        while len(half) < count:
            drawn = np.concatenate([rng.choice(g, min(frames_per_clip, len(g)), replace=False) for g in found])
            half += [(epoch, int(i), copy) for i in rng.permutation(drawn)]
            copy += 1
        halves.append(half[:count])
    pairs = list(zip(*halves, strict=True))
    parts = np.array_split(np.arange(count), -(-2 * count // batch))
    return [[sample for k in part for sample in pairs[k]] for part in parts if len(part)]


def fixed_plan(rows: np.ndarray, batch: int) -> list[list[tuple[int, int, int]]]:
    """Batches of the fixed view of the given rows, in their order."""
    return [[(FIXED, int(i), 0) for i in rows[k : k + batch]] for k in range(0, len(rows), batch)]


class Loader:
    """Batches of any plan; its processes, if any, live as long as it does."""

    def __init__(self, data: Views, loaders: int):
        self._plan: list[list[tuple[int, int, int]]] = []
        self._loader = DataLoader(
            data, batch_sampler=self._plan, num_workers=loaders, persistent_workers=loaders > 0,
            multiprocessing_context="spawn" if loaders else None, pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: else every pass would draw from the network's noise
        )  # fmt: skip

    def __call__(self, plan: list[list[tuple[int, int, int]]]):
        """An iterator over the batches uint8[B,V,S,S,3]; to be used up before the next one is asked for."""
        self._plan[:] = plan
        return iter(self._loader)
