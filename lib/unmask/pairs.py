"""What training sees: pairs of a real face and a fake, either its self-blend or a labelled fake of the same people.

Only crops of real media are read for self-blends (labels choose the reals); labelled pairs open the fakes of the same
split as well. Every sample is decided by seed, epoch and crop.
"""

import hashlib
import json

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from unmask import sbi
from unmask.data.crops import CropStore


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says what to change."""


def real_crops(index: pd.DataFrame, manifest: pd.DataFrame, split: str) -> pd.DataFrame:
    """The crop rows of real media of one split, in a fixed order. TrainingError if there are none."""
    return _crops(index, manifest, split, 0)


def fake_crops(index: pd.DataFrame, manifest: pd.DataFrame, split: str) -> pd.DataFrame:
    """The crop rows of fake media of one split, in a fixed order. TrainingError if there are none."""
    return _crops(index, manifest, split, 1)


def supervised(index: pd.DataFrame, manifest: pd.DataFrame) -> bool:
    """Whether the train and validation splits both have crops of labelled fakes to learn from."""
    fakes = manifest[(manifest["label"] == 1) & manifest["item_id"].isin(index["item_id"])]
    return {"train", "val"} <= set(fakes["split"])


def _crops(index: pd.DataFrame, manifest: pd.DataFrame, split: str, label: int) -> pd.DataFrame:
    chosen = manifest.loc[
        (manifest["split"] == split) & (manifest["label"] == label), ["item_id", "group_id", "subject"]
    ]
    rows = index.merge(chosen, on="item_id").sort_values(["item_id", "frame"], ignore_index=True)
    if rows.empty:
        raise TrainingError(
            f"There is no crop of a {('real', 'fake')[label]} face in the {split} split; "
            "check the manifest and the failures of the preprocessing."
        )
    return rows


def fingerprint(rows: pd.DataFrame) -> str:
    """SHA-256 of the crops that are used and their landmarks; the rest of the manifest is no reason to train anew."""
    identity = json.dumps(rows[["item_id", "frame", "sha256"]].to_numpy(dtype=object).tolist()).encode()
    return hashlib.sha256(identity + np.concatenate(rows["landmarks"].tolist()).tobytes()).hexdigest()


def _landmarks(row: dict) -> np.ndarray:
    return np.asarray(row["landmarks"], np.float32).reshape(-1, 2)


class SelfBlendPairs(Dataset):
    """Pairs (real, self-blend) cut from real crops. `training=False` gives one fixed pair per crop, unaugmented.

    A sample is images uint8[2,S,S,3] (real, fake) and boundary float32[2,S/8,S/8]; seed, epoch and crop decide it.
    native: cut windows of S pixels instead of scaling faces.
    """

    boundary = True

    def __init__(
        self, store: CropStore, rows: pd.DataFrame, size: int, seed: int, recipe: str, training: bool,
        native: bool = False,
    ):  # fmt: skip
        self.store, self.rows, self.size, self.side = store, rows.to_dict("records"), size, size if native else None
        self.seed, self.recipe, self.training = seed, recipe, training

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample of (epoch, crop); the epoch is part of the index, so that loader processes live through all epochs."""
        cv2.setNumThreads(1)
        epoch, i = where
        row = self.rows[i]
        image, points = self.store.image(row), _landmarks(row)
        rng = sbi.sample_rng(self.seed, row["item_id"], row["frame"], epoch)
        if self.training:
            real, fake, mask = sbi.training_pair(image, points, rng, self.size, self.recipe, self.side is not None)
        else:
            blend, box = sbi.self_blend(image, points, rng, self.recipe), sbi.crop_box(points, side=self.side)
            real, fake, mask = (sbi.crop(picture, box, self.size) for picture in (blend.real, blend.fake, blend.mask))
        edge = cv2.resize(4 * mask * (1 - mask), (self.size // 8, self.size // 8), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(np.stack([real, fake])), torch.from_numpy(
            np.stack([np.zeros_like(edge), edge]).astype(np.float32)
        )


class LabelledPairs(SelfBlendPairs):
    """Pairs (real, fake) of labelled media, alike in flip and crop; samples as in `SelfBlendPairs`.

    The fake is drawn among the media of the same subject and group, each equally likely, at the frame nearest in time:
    where the footage is the same, nothing but the forgery tells the two apart. Failing these, among the group's;
    failing these, among the fakes whose groups have no real medium, else among all. The boundary is left empty.
    Colours and compression stay as they are: what tells a forgery in a few dozen videos is finer than either.
    """

    boundary = False

    def __init__(
        self, store: CropStore, rows: pd.DataFrame, fakes: pd.DataFrame, size: int, seed: int, recipe: str,
        training: bool, native: bool = False,
    ):  # fmt: skip
        super().__init__(store, rows, size, seed, recipe, training, native)
        self.media = {key: part.to_dict("records") for key, part in fakes.groupby("item_id", sort=True)}
        each = fakes.sort_values("item_id").drop_duplicates("item_id")
        self.subjects = each.groupby(["group_id", "subject"])["item_id"].apply(list).to_dict()
        self.groups = each.groupby("group_id")["item_id"].apply(list).to_dict()
        self.others = list(each.loc[~each["group_id"].isin(rows["group_id"]), "item_id"]) or sorted(self.media)

    def partner(self, row: dict, rng: np.random.Generator) -> dict:
        """The index row of the fake crop that meets a real one."""
        same = self.subjects.get((row["group_id"], row["subject"]))
        frames = self.media[str(rng.choice(same or self.groups.get(row["group_id"], self.others)))]
        return min(frames, key=lambda one: abs(one["pts"] - row["pts"]))

    def __getitem__(self, where: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample of (epoch, crop)."""
        cv2.setNumThreads(1)
        epoch, i = where
        row = self.rows[i]
        rng = sbi.sample_rng(self.seed, row["item_id"], row["frame"], epoch)
        pair = [(self.store.image(one), _landmarks(one)) for one in (row, self.partner(row, rng))]
        if self.training and rng.random() < 0.5:
            pair = [sbi.flip(*one) for one in pair]
        alike = int(rng.integers(2**63))
        dice = [np.random.default_rng(alike) if self.training else None for _ in pair]
        boxes = [sbi.crop_box(marks, one, side=self.side) for (_, marks), one in zip(pair, dice, strict=True)]
        images = [sbi.crop(image, box, self.size) for (image, _), box in zip(pair, boxes, strict=True)]
        return torch.from_numpy(np.stack(images)), torch.zeros(2, self.size // 8, self.size // 8)


def batch_plan(rows: pd.DataFrame, seed: int, batch: int, frames_per_clip: int, epoch: int) -> list[list[tuple]]:
    """The batches of an epoch, as lists of (epoch, crop): up to `frames_per_clip` crops of every item, shuffled."""
    rng = np.random.default_rng([seed, 0x5B1, epoch])
    groups = rows.groupby("item_id", sort=True).indices.values()
    drawn = [rng.choice(g, min(frames_per_clip, len(g)), replace=False) for g in groups]
    order = [(epoch, int(i)) for i in rng.permutation(np.concatenate(drawn))]
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def pair_loader(data: Dataset, batches: list[list[tuple[int, int]]], loaders: int) -> DataLoader:
    """The samples of `batches` in order, made in `loaders` processes (0: this one)."""
    return DataLoader(
        data, batch_sampler=batches, num_workers=loaders, multiprocessing_context="spawn" if loaders else None
    )
