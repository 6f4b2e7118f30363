"""The manifest of a study: the data sets that its profile names, indexed one after the other and joined."""

from pathlib import Path

import pandas as pd

from unmask.data.datasets import index
from unmask.data.manifest import ManifestError, media_path, read_manifest
from unmask.data.tree import DatasetError
from unmask.data.world import generate
from unmask.profile import Profile


def collect(profile: Profile, work: Path, root: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of all data sets in `profile.data.sets`, and notes on what is missing or odd.

    An entry is "layout=folder" (relative to the repository `root`), "manifest=file", or "world=folder": the synthetic
    world, made in that folder of `work` if need be. The first set is trained on; of the others only the test split is
    used. A later set that is missing is left out with a note. Raises DatasetError if the first one is missing.
    """
    tables, notes = [], []
    for position, entry in enumerate(profile.data.sets):
        layout, _, place = entry.partition("=")
        try:
            found, remarks = _one(layout, place, profile, work, root)
        except DatasetError as error:
            if position == 0:
                raise
            notes.append(f"{entry}: left out. {error}")
            continue
        if position:
            found = found[found["split"] == "test"]
        notes += [f"{layout}: {remark}" for remark in remarks]
        tables.append(found)
    joined = pd.concat(tables, ignore_index=True)
    twice = joined["item_id"].duplicated()
    if twice.any():
        raise DatasetError(
            f"{int(twice.sum())} media are in two of the data sets {', '.join(profile.data.sets)}; name each set once."
        )
    return joined, notes


def _one(layout: str, place: str, profile: Profile, work: Path, root: Path) -> tuple[pd.DataFrame, list[str]]:
    if layout == "world":
        folder = work / place
        return generate(folder, dict(profile.world), profile.seed, profile.workers).assign(root=place), []
    path = root / place
    if layout == "manifest":
        try:
            df = read_manifest(path)
        except ManifestError as error:
            raise DatasetError(str(error)) from error
        roots = [str(path.parent.absolute() / r) for r in df["root"]]
        gone = sum(not media_path(row, path).exists() for row in df.to_dict("records"))
        return df.assign(root=roots), [f"{gone} of {len(df)} listed files are missing."] if gone else []
    return index(path, layout, profile.seed)
