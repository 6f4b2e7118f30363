"""Face crops as detectors on a CLIP see them: augmented views to learn from, one fixed view to judge by.

A view is a picture, the boxes of its face's regions and, if wanted, its LaRE map; what cuts and mirrors the picture
cuts and mirrors them. Every view has its own generator, so that any process can replay it.
"""

import io
import os

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import Dataset

from unmask import lare_maps, sbi
from unmask.data.crops import CropStore
from unmask.detectors import roi
from unmask.lare_maps import LareError
from unmask.lare_model import content_hash
from unmask.views import FIXED

SIGMA, QUALITY = 3.0, (30, 100)
PUBLISHED_SIDE = 256  # pixels of the pictures that SIGMA is meant for
P_BLUR = P_JPEG = 0.5


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur that reaches four sigma and reflects at the border."""
    side = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REFLECT)


def _jpeg_by_opencv(image: np.ndarray, quality: int) -> np.ndarray:
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _jpeg_by_pillow(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur in half of the cases and compress in half, each on its own: uint8[S,S,3] RGB to uint8[S,S,3].

    Blur: sigma uniform in 0..3 px of a picture of 256 px a side. JPEG: a whole quality from 30 to 100, by OpenCV or by
    Pillow. As in the published code of UniversalFakeDetect (Ojha et al., CVPR 2023), where the larger pictures are cut
    afterwards; here sigma is scaled along with the side.
    """
    if rng.random() < P_BLUR:
        image = _blurred(image, rng.uniform(0, SIGMA) * len(image) / PUBLISHED_SIDE)
    if rng.random() < P_JPEG:
        compress = _jpeg_by_opencv if rng.random() < 0.5 else _jpeg_by_pillow
        image = compress(image, int(rng.integers(QUALITY[0], QUALITY[1] + 1)))
    return image


class Views(Dataset):
    """Sample (epoch, row, copy) of crop index rows: image uint8[S,S,3], boxes float32[9,4] in its pixels (NaN: not in
    it) and, if there is a folder of LaRE maps, lare float32[4,l,l].

    An epoch gives a random part of the stored crop, mirrored or not, and `augment`; FIXED in its place the view of
    evaluation, whose image is that of `scoring.frame_images`. `copy` tells views of one row in one epoch apart.
    lare: folder that `unmask lare --crops` filled. Raises LareError at once if a row has no map there, and for a map
    that was made of another picture. `sources`: what each row's map was made of and by (sha256 of the picture,
    extractor, precision); empty without a folder.
    """

    def __init__(
        self, store: CropStore, rows: pd.DataFrame, size: int, seed: int, lare: str | os.PathLike | None = None
    ):
        self.store, self.rows, self.size, self.seed = store, rows.to_dict("records"), size, seed
        self.lare, self.sources = lare, _sources(lare, self.rows) if lare is not None else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where: tuple[int, int, int]) -> dict[str, torch.Tensor]:
        cv2.setNumThreads(1)
        epoch, i, copy = where
        row = self.rows[i]
        stored, points = self.store.image(row), np.asarray(row["landmarks"], np.float32).reshape(-1, 2)
        training, rng = epoch != FIXED, None
        if training:
            rng = sbi.sample_rng(self.seed, f"{row['item_id']} copy {copy}", row["frame"], epoch)
        box = tuple(sbi.crop_box(points, rng).tolist())
        crop = roi.Crop(box, self.size, flip=training and rng.random() < 0.5)
        image = sbi.crop(stored, crop.box, self.size)
        if crop.flip:
            image = cv2.flip(image, 1)
        if training:
            image = augment(image, rng)
        # Of the moved landmarks: their margin is a share of the picture that the network sees.
        boxes = roi.region_boxes(crop.landmarks(points), self.size)
        sample = {"image": torch.from_numpy(image), "boxes": boxes}
        return sample | ({"lare": self._map(i, stored, crop)} if self.lare is not None else {})

    def _map(self, i: int, stored: np.ndarray, crop: roi.Crop) -> torch.Tensor:
        """The LaRE map of row i, which spans the whole stored crop, moved as the picture was."""
        item, frame = self.rows[i]["item_id"], self.rows[i]["frame"]
        if content_hash(stored) != self.sources[i][0]:
            raise LareError(
                f"The LaRE map of frame {frame} of item {item} in {self.lare} was made of another picture than the "
                "stored crop: run `unmask lare` again, with --crops."
            )
        cells = torch.from_numpy(lare_maps.read(self.lare, item, frame)).unsqueeze(0)
        height, width = stored.shape[:2]
        return crop.maps(cells, width, height).squeeze(0)


def _sources(folder: str | os.PathLike, rows: list[dict]) -> list[tuple[str, str, str]]:
    """What the map of each row was made of and by. LareError, with the reason, for a row without a map."""
    index = lare_maps.read_index(folder)
    index = index[index["status"] == "ok"]
    made = zip(index["sha256"], index["extractor"], index["precision"], strict=True)
    known = dict(zip(zip(index["item_id"], index["frame"], strict=True), made, strict=True))
    keys = [(row["item_id"], row["frame"]) for row in rows]
    for key in keys:
        if key not in known:
            lare_maps.read(folder, *key)  # says why there is none
    return [known[key] for key in keys]
