"""Which images and clips the three stages of D2ST learn from, batch by batch, and how processes share a batch.

A unit is a clip of a bank (see `clip_bank`), whole (t = -1) or one frame of it (t >= 0), which is an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice

import numpy as np
import pandas as pd

from unmask.clips import PAIRS

CARRIED = ("medium", "real", "blend")
"""Kinds of clips whose label every single frame carries; `varying` and `steady` differ over time alone."""
Units = list[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """Units of one step: whole clips, one frame of each of them (`own`, in stage 3 only), and images by themselves."""

    clips: Units = field(default_factory=list)
    own: Units = field(default_factory=list)
    images: Units = field(default_factory=list)

    def share(self, rank: int, of: int, lengths: np.ndarray) -> "Batch":
        """What one of `of` processes sees; clips of one length, by clip number in `lengths`, follow each other."""
        clips, own = self.clips[rank::of], self.own[rank::of]
        order = np.argsort([lengths[c] for c, _ in clips], kind="stable")
        return Batch([clips[k] for k in order], [own[k] for k in order] if own else [], self.images[rank::of])

    @property
    def units(self) -> Units:
        """All of them in order: clips, their own frames, images."""
        return [*self.clips, *self.own, *self.images]


def _deck(members: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Members in a random order, every one once before any comes again; without end, unless there are none."""
    while len(members):
        yield from (int(member) for member in rng.permutation(members))


def evenly(groups: list[np.ndarray], rng: np.random.Generator) -> Iterator[int]:
    """Members of `groups`, which take turns in a random order; every member of a group once before any of it comes
    again."""
    decks = [_deck(group, rng) for group in groups]
    return (next(decks[k]) for k in cycle(rng.permutation(len(decks))))


def _cells(table: pd.DataFrame) -> list[np.ndarray]:
    """Clip numbers by data set, modality and kind, which are to be seen equally often."""
    keys = [table["dataset"], table["frames"] > 1, table["kind"]]
    return [part.to_numpy() for _, part in table.index.to_series().groupby(keys, sort=True)]


def _partners(table: pd.DataFrame) -> dict[int, int]:
    """For each clip that was made, the one made of the same frames with the other label: they differ in it alone."""
    other = {kind: pair[1 - k] for pair in PAIRS for k, kind in enumerate(pair)}
    made = table[table["kind"].isin(list(other))]
    keys = list(zip(made["item_id"], made["version"], made["kind"], strict=True))
    numbers = dict(zip(keys, made.index, strict=True))
    return {number: numbers[item, version, other[kind]] for (item, version, kind), number in numbers.items()}


class _Balanced:
    """Draws from clips in even measure: labels, and within each a share `made` of those that were made of real ones, if
    there are any, the rest media. ValueError where a label has none.

    Made clips come as pairs, so that what they share cancels out of the gradient: the label is what is left to learn.
    """

    def __init__(self, table: pd.DataFrame, made: float, rng: np.random.Generator):
        media = table["kind"] == "medium"
        self.shares, self.media = [], []
        for label in (0, 1):
            own = table["label"] == label
            if not own.any():
                raise ValueError(f"it has no {('real', 'fake')[label]} ones")
            some, all_made = (own & ~media).any(), not (own & media).any()
            self.shares.append(1.0 if all_made else made if some else 0.0)
            self.media.append(evenly(_cells(table[own & media]), rng))
        self.partners = _partners(table)
        self.fakes = evenly(_cells(table[~media & (table["label"] == 1)]), rng)

    def draw(self, count: int) -> list[int]:
        """`count` clips, reals and fakes in turn."""
        found = [0] * count
        halves = [len(found[label::2]) for label in (0, 1)]
        few = [round(share * half) for share, half in zip(self.shares, halves, strict=True)]
        fakes = list(islice(self.fakes, max(few)))
        made = [self.partners[clip] for clip in fakes[: few[0]]], fakes[: few[1]]
        for label, media in enumerate(self.media):
            found[label::2] = [*made[label], *islice(media, halves[label] - few[label])]
        return found


def _frames(table: pd.DataFrame, clips: list[int], rng: np.random.Generator) -> Units:
    """A frame of each clip; of a pair of clips, made of the same frames, the same one."""
    places = rng.random(-(-len(clips) // 2)).repeat(2)
    return [(clip, int(place * table.at[clip, "frames"])) for clip, place in zip(clips, places, strict=False)]


def batches(
    table: pd.DataFrame, stage: int, samples: int, batch: int, made: float, seed: int, epoch: int
) -> list[Batch]:
    """The batches of an epoch: `samples` images (stage 1) or clips, `batch` of them at a time, half of either label.

    table: `Clips.table` with columns item_id, version, kind, label, dataset, frames. made: share of either label that
    is made of real media (self-blends and the like). Labels are balanced, and within a label data sets, modalities and
    kinds; within each of these every clip comes once in the epoch before any comes again. In stage 3 every clip comes
    with one frame of its own and two other images. ValueError where a label has none.
    """
    rng = np.random.default_rng([seed, 0xD257, stage, epoch])
    images = _Balanced(table[table["kind"].isin(CARRIED)], made, rng) if stage != 2 else None
    clips = _Balanced(table[table["frames"] > 1], made, rng) if stage != 1 else None
    found = []
    parts = -(-samples // batch)
    for part in np.array_split(np.arange(samples), parts):
        count = len(part)
        if stage == 1:
            found.append(Batch(images=_frames(table, images.draw(count), rng)))
            continue
        chosen = clips.draw(count)
        if stage == 2:
            found.append(Batch(clips=[(c, -1) for c in chosen]))
            continue
        own = _frames(table, chosen, rng)
        others = _frames(table, images.draw(2 * count), rng)
        found.append(Batch([(c, -1) for c in chosen], own, others))
    return found


def judged(table: pd.DataFrame, stage: int, most: int = 4) -> Units:
    """The units of a validation bank that a stage is judged by: up to `most` frames of a clip, whole clips, or both."""
    units: Units = []
    if stage != 2:
        for clip, row in table[table["kind"].isin(CARRIED)].iterrows():
            units += [(clip, int(t)) for t in spaced(row["frames"], most)]
    if stage != 1:
        units += [(clip, -1) for clip in table.index[table["frames"] > 1]]
    return units


def spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of positions 0..count-1, evenly from the middle of each part."""
    some = min(count, most)
    return ((np.arange(some) + 0.5) * count / some).astype(int)


def groups(units: Units, lengths: np.ndarray, batch: int) -> Iterator[Units]:
    """Units in batches of about `batch` frames, those of one length together."""
    length = {unit: 1 if unit[1] >= 0 else int(lengths[unit[0]]) for unit in units}
    for t in sorted(set(length.values())):
        own = [unit for unit in units if length[unit] == t]
        each = max(batch // t, 1)
        yield from (own[k : k + each] for k in range(0, len(own), each))
