"""Adapters for Celeb-DF, UADFV, DFDC, the DFDC preview and FFIW."""

import re
from pathlib import Path, PurePosixPath

from unmask.data.manifest import is_inside
from unmask.data.tree import DatasetError, Tree, read_json, read_table, read_text, some

# folder -> (label, how its files are named); the first id of a fake is its target.
CELEBDF = {
    "Celeb-real": (0, r"(id\d+)_\d+"),
    "YouTube-real": (0, r"(\d{5})"),
    "Celeb-synthesis": (1, r"(id\d+)_(id\d+)_\d+"),
}
CELEBDF_LIST = "List_of_testing_videos.txt"


def celebdf_test_list(root: Path) -> set[str]:
    """Listed test videos as "folder/stem". In the file 1 = REAL and 0 = fake, the reverse of this kit's label.

    Raises DatasetError if the list is missing, malformed, or contradicts the folder that a video is in.
    """
    path, listed = root / CELEBDF_LIST, set()
    for number, line in enumerate(read_text(path, "Official Celeb-DF test list").splitlines(), 1):
        if not line.strip():
            continue
        entry = re.fullmatch(r"([01])\s+([^/]+)/([^/]+)", line.strip())
        if entry is None or entry[2] not in CELEBDF:
            raise DatasetError(f"{path}, line {number}: expected '<0 or 1> <folder>/<file>', not {line!r}.")
        if int(entry[1]) != 1 - CELEBDF[entry[2]][0]:
            raise DatasetError(f"{path}, line {number}: {line!r} contradicts its folder; in this list 1 means real.")
        listed.add(f"{entry[2]}/{PurePosixPath(entry[3]).stem}")
    return listed


def celebdf(tree: Tree) -> None:
    """Celeb-DF v1 and v2 (Li et al., CVPR 2020): the listed videos are test; the rest is train, less a val part.

    The official test list is not identity-disjoint. The val part is cut by target identity.
    """
    listed, present = celebdf_test_list(tree.root), set()
    for folder, (label, pattern) in CELEBDF.items():
        found = tree.clips(folder, folder) or {}
        odd = [stem for stem in found if not re.fullmatch(pattern, stem)]
        if odd:
            tree.note(f"{folder}: {len(odd)} files have names unlike the release and were left out: {some(odd)}.")
        for stem in sorted(set(found) - set(odd)):
            target, *donor = re.fullmatch(pattern, stem).groups()
            key = f"{folder}/{stem}"
            present.add(key)
            for path in found[stem]:
                tree.add(
                    path,
                    "test" if key in listed else "",
                    label,
                    "Celeb-synthesis",
                    subject=f"celebdf:{'yt' if folder == 'YouTube-real' else ''}{target}",
                    source_id=f"celebdf:{donor[0]}" if donor else "",
                )
    missing = listed - present
    if missing:
        tree.note(f"{len(missing)} of {len(listed)} listed test videos not on disk: {some(missing)}.")
    test, rest = ({r["subject"] for r in tree.rows if (r["split"] == "test") == side} for side in (True, False))
    if test & rest:
        tree.note(
            f"the official test list is not identity-disjoint: {len(test & rest)} of its {len(test)} target "
            "identities are also in train or val."
        )
    tree.note("groups are target identities; donors are not followed, they would join nearly all clips into one group.")


def uadfv(tree: Tree) -> None:
    """UADFV (Yang et al., ICASSP 2019): real/0000.mp4 and fake/0000_fake.mp4 in pairs. No split: all of it is test."""
    for folder, label, ending in (("real", 0, ""), ("fake", 1, "_fake")):
        for stem, paths in (tree.clips(folder, folder) or {}).items():
            original = stem.removesuffix(ending)
            for path in paths:
                tree.add(
                    path,
                    "test",
                    label,
                    "UADFV",
                    subject=f"uadfv:{original}",
                    source_id=f"uadfv:{original}" if label else "",
                )
    stems = [{row["subject"] for row in tree.rows if row["label"] == label} for label in (0, 1)]
    unpaired = stems[0] ^ stems[1]
    if unpaired:
        tree.note(f"{len(unpaired)} clips have no partner of the other class: {some(unpaired)}.")


def _dfdc_part(tree: Tree, part: Path) -> None:
    path = part / "metadata.json"
    found = tree.clips(part.name, part.name) or {}
    files = {PurePosixPath(p).name: p for paths in found.values() for p in paths}
    files.pop("metadata.json", None)
    if not path.exists():
        tree.note(f"{part.name}: metadata.json missing; its {len(files)} files were left out.")
        return
    metadata = read_json(path, "DFDC metadata", dict)
    for name, info in metadata.items():
        if (
            not isinstance(info, dict)
            or info.get("label") not in ("REAL", "FAKE")
            or not isinstance(info.get("original") or "", str)
        ):
            raise DatasetError(f"{path}: the entry of {name!r} must be an object with label REAL or FAKE.")
    for name in tree.match(files, metadata, part.name):
        fake = metadata[name]["label"] == "FAKE"
        original = PurePosixPath(metadata[name].get("original") or name).stem if fake else PurePosixPath(name).stem
        tree.add(
            files[name],
            "",
            int(fake),
            "dfdc",
            subject=f"dfdc:{original}",
            source_id=f"dfdc:{original}" if fake else "",
            unit=f"dfdc:{part.name}",
        )


def _dfdc_test(tree: Tree, folder: Path) -> None:
    path, what = folder / "labels.csv", "DFDC test labels"
    rows = read_table(path, what, ("filename", "label"))
    files = {
        p.name: p.relative_to(tree.root).as_posix()
        for base in (folder, folder / "videos")
        if base.is_dir()
        for p in tree.media(base)
        if p != path
    }
    labels = {}
    for line, row in rows:
        if row["label"] not in ("0", "1"):
            raise DatasetError(f"{path}, line {line}: label must be 0 (real) or 1 (fake), not {row['label']!r}.")
        labels[row["filename"]] = int(row["label"])
    for name in tree.match(files, labels, what):
        tree.add(files[name], "test", labels[name], "dfdc", subject=f"dfdc:{PurePosixPath(name).stem}")


def dfdc(tree: Tree) -> None:
    """DFDC (Dolhansky et al., 2020): dfdc_train_part_*/metadata.json, grouped by `original` and split by part.

    Test is labels.csv (1 = fake) in ROOT or ROOT/test with its videos beside it or in `videos`; without it,
    some of the parts are held out as test.
    """
    parts = [p for p in tree.entries(tree.root) if p.is_dir() and re.fullmatch(r"dfdc_train_part_\d+", p.name)]
    for part in parts:
        _dfdc_part(tree, part)
    tests = [f for f in (tree.root, tree.root / "test") if (f / "labels.csv").exists()]
    for folder in tests:
        _dfdc_test(tree, folder)
    if not tests:
        tree.fractions = {"train": 0.8, "val": 0.1, "test": 0.1}
        tree.note("labels.csv of the test set not found in ROOT or ROOT/test: test is cut from the training parts.")
    if len(parts) < 50:
        tree.note(f"{len(parts)} of 50 training parts on disk.")


def dfdc_preview(tree: Tree) -> None:
    """DFDC preview (Dolhansky et al., 2019): dataset.json names path, label and set; val is cut from train by group.

    Groups are target actors: `target_id` of the entry, else the first number in the path.
    """
    path = tree.root / "dataset.json"
    listed = read_json(path, "DFDC preview list", dict)
    found = {
        p.relative_to(tree.root).as_posix()
        for top in ("original_videos", "method_A", "method_B")
        if (tree.root / top).is_dir()
        for p in tree.walk(tree.root / top)
    }
    for name, info in listed.items():
        if (
            not is_inside(name)
            or not isinstance(info, dict)
            or info.get("label") not in ("real", "fake")
            or info.get("set") not in ("train", "test")
        ):
            raise DatasetError(
                f"{path}: the entry of {name!r} must lie inside ROOT and have label real or fake and set train or test."
            )
    for name in tree.match(found, listed, "dataset.json"):
        info, top = listed[name], PurePosixPath(name).parts[0]
        target = str(info.get("target_id") or next(iter(re.findall(r"\d+", name)), PurePosixPath(name).stem))
        donor = info.get("swapped_id")
        tree.add(
            name,
            "test" if info["set"] == "test" else "",
            int(info["label"] == "fake"),
            top,
            subject=f"dfdc-preview:{target}",
            source_id=f"dfdc-preview:{donor}" if donor else "",
        )


def ffiw(tree: Tree) -> None:
    """FFIW-10K (Zhou et al., CVPR 2021): source is real, target is fake; val (250 + 250) serves as the test set.

    Clips of the same name in source and target are a pair. If train is there, a val part is cut from it.
    """
    for split, name in (("", "train"), ("test", "val")):
        if split == "" and not any((tree.root / side / name).is_dir() for side in ("source", "target")):
            continue
        for side, label in (("source", 0), ("target", 1)):
            for stem, paths in (tree.clips(f"{side}/{name}", f"{side}/{name}") or {}).items():
                for path in paths:
                    tree.add(path, split, label, "ffiw", subject=f"ffiw:{name}/{stem}")
