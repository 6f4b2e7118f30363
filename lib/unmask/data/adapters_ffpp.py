"""Adapters for the data sets that share FaceForensics++'s tree or identities: ffpp, dfd, deeperforensics, df40."""

import os
import re
from pathlib import Path, PurePosixPath

from unmask.data.tree import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DatasetError, Tree, kind_of, read_json, read_text, some

COMPRESSIONS = ("raw", "c23", "c40")
FFPP_METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter")
DFO_VARIANTS = (
    "end_to_end",
    *(f"end_to_end_level_{k}" for k in range(1, 6)),
    "end_to_end_random_level",
    *(f"end_to_end_mix_{k}_distortions" for k in (2, 3, 4)),
    "reenact_postprocess",
)
# DF40 paper, table 1, under the folder names of its release: 9 swapping, 12 reenactment, 10 synthesis methods.
DF40_KNOWN = (
    "fsgan",
    "faceswap",
    "simswap",
    "inswap",
    "blendface",
    "uniface",
    "mobileswap",
    "e4s",
    "facedancer",
    "fomm",
    "facevid2vid",
    "wav2lip",
    "MRAA",
    "one_shot_free",
    "pirender",
    "tpsm",
    "lia",
    "danet",
    "sadtalker",
    "mcnet",
    "hyperreenact",
    "VQGAN",
    "StyleGAN2",
    "StyleGAN3",
    "StyleGANXL",
    "sd2.1",
    "ddim",
    "RDDM",
    "pixart",
    "DiT",
    "SiT",
)
DF40_UNKNOWN = (
    "deepfacelab",
    "heygen",
    "MidJourney",
    "whichfaceisreal",
    "stargan",
    "starganv2",
    "styleclip",
    "e4e",
    "CollabDiff",
)
_DF40_NAMES = {m.lower(): m for m in DF40_KNOWN + DF40_UNKNOWN} | {"whichisreal": "whichfaceisreal"}
# Preprocessed trees also hold landmarks, masks and latent codes, which are no media.
_DF40_SIDE = frozenset({"landmarks", "masks"})
_DF40_PLAIN = frozenset({"frames", "videos", "inversions", "celeb-real", "youtube-real", "celeb-synthesis"})
DF40_DOMAINS = ("ff", "cdf", "real", "fake")


def _compression(name: str) -> str:
    if name not in COMPRESSIONS:
        raise DatasetError(f"Compression {name!r} is unknown; choose one of {', '.join(COMPRESSIONS)}.")
    return name


def ffpp_pairs(root: Path) -> list[tuple[str, str, str]]:
    """Official pairs (split, first id, second id) from ROOT/splits/{train,val,test}.json. Raises DatasetError."""
    pairs = []
    for split in ("train", "val", "test"):
        path = root / "splits" / f"{split}.json"
        for pair in read_json(path, "Official FaceForensics++ split list", list):
            if not (
                isinstance(pair, list)
                and len(pair) == 2
                and all(isinstance(i, str) and re.fullmatch(r"\d{3}", i) for i in pair)
            ):
                raise DatasetError(f"{path} must hold pairs of three-digit ids such as '071', '054', not {pair!r}.")
            pairs.append((split, *pair))
    return pairs


def ffpp(tree: Tree, compression: str = "c23") -> None:
    """FaceForensics++ (Rössler et al., ICCV 2019): 1,000 reals, five methods, official pairs in both directions.

    The first id of a fake is the target (subject), the second the source.
    """
    comp = _compression(compression)
    pairs = ffpp_pairs(tree.root)
    reals = {i: (split, i, "") for split, *pair in pairs for i in pair}
    fakes = {f"{a}_{b}": (split, a, b) for split, *pair in pairs for a, b in (pair, pair[::-1])}
    sources = [("real", f"original_sequences/youtube/{comp}/videos", reals)]
    sources += [(m, f"manipulated_sequences/{m}/{comp}/videos", fakes) for m in FFPP_METHODS]
    for method, folder, wanted in sources:
        found = tree.clips(folder, f"{comp} {method}")
        for stem in tree.match(found, wanted, f"{comp} {method}") if found is not None else []:
            split, target, source = wanted[stem]
            for path in found[stem]:
                tree.add(
                    path,
                    split,
                    int(method != "real"),
                    method,
                    subject=f"ffpp:{target}",
                    source_id=f"ffpp:{source}" if source else "",
                )


def dfd(tree: Tree, compression: str = "c23") -> None:
    """DeepFakeDetection (Google, 2019), kept in FaceForensics++'s tree. No official split: all of it is test."""
    comp = _compression(compression)
    real, fake = "original_sequences/actors", "manipulated_sequences/DeepFakeDetection"
    for folder, label, pattern in ((real, 0, r"(\d+)__.+"), (fake, 1, r"(\d+)_(\d+)__.+")):
        what = f"{comp} {folder.split('/')[-1]}"
        found = tree.clips(f"{folder}/{comp}/videos", what) or {}
        ids = {stem: m.groups() for stem in found if (m := re.fullmatch(pattern, stem))}
        _note_odd_names(tree, what, set(found) - set(ids))
        for stem, (target, *source) in ids.items():
            for path in found[stem]:
                tree.add(
                    path,
                    "test",
                    label,
                    "DeepFakeDetection",
                    subject=f"dfd:{target}",
                    source_id=f"dfd:{source[0]}" if source else "",
                )


def _note_odd_names(tree: Tree, what: str, names: set[str]) -> None:
    if names:
        tree.note(f"{what}: {len(names)} files have names unlike the release and were left out: {some(names)}.")


def _dfo_splits(root: Path) -> dict[str, tuple[str, str, str]]:
    """stem -> (split, FF++ target id, actor) from ROOT/lists/splits/{train,val,test}.txt. Raises DatasetError."""
    wanted: dict[str, tuple[str, str, str]] = {}
    for split in ("train", "val", "test"):
        path = root / "lists" / "splits" / f"{split}.txt"
        for number, line in enumerate(read_text(path, "Official DeeperForensics split list").splitlines(), 1):
            stem = Path(line.strip()).stem
            ids = re.fullmatch(r"(\d{3})_(\w+)", stem)
            if ids:
                wanted[stem] = (split, *ids.groups())
            elif stem:
                raise DatasetError(f"{path}, line {number}: expected a name such as 980_W010.mp4, not {line!r}.")
    return wanted


def deeperforensics(tree: Tree, ffpp_root: str | Path | None = None, compression: str = "c23") -> None:
    """DeeperForensics-1.0 (Jiang et al., CVPR 2020): eleven variants of 1,000 fakes, official lists (fakes only).

    The reals are the FaceForensics++ targets, read from `ffpp_root`; source_videos (the actors) are not the real class.
    """
    wanted = _dfo_splits(tree.root)
    for variant in DFO_VARIANTS:
        found = tree.clips(f"manipulated_videos/{variant}", variant)
        for stem in tree.match(found, wanted, variant) if found is not None else []:
            split, target, actor = wanted[stem]
            for path in found[stem]:
                tree.add(path, split, 1, variant, subject=f"ffpp:{target}", source_id=f"deeperforensics:{actor}")
    if ffpp_root is None:
        tree.note("no real class: its reals are the FaceForensics++ targets; give their folder as ffpp_root.")
        return
    reals = Tree(Path(ffpp_root).absolute(), tree.dataset)
    found = reals.clips(f"original_sequences/youtube/{_compression(compression)}/videos", "real targets in ffpp_root")
    targets = {target: split for split, target, _ in wanted.values()}
    # The 1,000 targets are listed; what else ffpp_root holds is no business of this data set.
    found = {stem: paths for stem, paths in (found or {}).items() if stem in targets}
    for target in reals.match(found, targets, "real targets in ffpp_root"):
        for path in found[target]:
            reals.add(path, targets[target], 0, "real", subject=f"ffpp:{target}")
    tree.rows += reals.rows
    tree.notes += reals.notes


def _df40_folders(relative: PurePosixPath | Path) -> tuple[str, ...]:
    """The folders above a file, below its domain folder, that name a clip."""
    return tuple(p for p in relative.parts[:-1] if p.lower() not in _DF40_PLAIN)


def df40_place(path: str) -> tuple[str, str, tuple[str, ...]] | None:
    """Method, domain (DF40_DOMAINS) and the folders that name the clip (none: the file stands alone) of a DF40 path.

    path: relative to the data set's root, below train/ or test/ if it has these. None for any other path.
    """
    parts = PurePosixPath(path).parts
    below = parts[1:] if parts[0] in ("train", "test") else parts
    if len(below) < 3 or below[0].lower() not in _DF40_NAMES or below[1] not in DF40_DOMAINS:
        return None
    return _DF40_NAMES[below[0].lower()], below[1], _df40_folders(PurePosixPath(*below[2:]))


def df40_empty_folders(folder: Path) -> list[str]:
    """Folders below a domain folder with nothing in them, as clips without frames leave them; sorted, printable."""
    found = [Path(here) for here, folders, files in os.walk(folder) if not folders and not files]
    below = [path.relative_to(folder) for path in found if path != folder]
    names = [path.as_posix() for path in below if not _DF40_SIDE.intersection(path.parts)]
    return sorted(name.encode("utf-8", "backslashreplace").decode() for name in names)


def _df40_ids(domain: str, method: str, relative: Path, kind: str) -> dict[str, str]:
    """subject and source_id of a DF40 file from its clip's name: the file's own, or for a frame its folder's.

    A clip without a donor in its name keeps the clip's name as source_id, so that its frames stay together.
    """
    folders = _df40_folders(relative)
    clip = relative.stem if kind == "video" or not folders else folders[-1]
    family = {"ff": "ffpp", "cdf": "celebdf"}.get(domain, "")
    if family == "ffpp" and (m := re.fullmatch(r"(\d{3})(?:_(\d{3}))?", clip)):
        return {"subject": f"ffpp:{m[1]}", "source_id": f"ffpp:{m[2] or m[1]}"}
    if family == "celebdf" and (m := re.fullmatch(r"(id\d+)(?:_(id\d+))?_\d+", clip)):
        return {"subject": f"celebdf:{m[1]}", "source_id": f"celebdf:{m[2] or m[1]}"}
    if family == "celebdf" and re.fullmatch(r"\d{5}", clip) and (folders or kind == "video"):
        return {"subject": f"celebdf:yt{clip}", "source_id": f"celebdf:yt{clip}"}
    return {"subject": "", "source_id": f"df40:{method}/{clip}"}


def _df40_is_medium(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not _DF40_SIDE.intersection(path.parts)


def _df40_method(tree: Tree, folder: Path, method: str, split: str) -> None:
    # e4e counts as unknown, but what is released of it are inversions of the two known sources.
    inverted = method in DF40_KNOWN or method == "e4e"
    expected = ("ff", "cdf") if inverted and split == "test" else ("ff",) if inverted else ("real", "fake")
    what = f"{split or 'train'} {method}"
    for domain in DF40_DOMAINS:
        files = list(tree.walk(folder / domain)) if (folder / domain).is_dir() else None
        if files is None and domain in expected:
            tree.note(f"{what}: folder missing (expected {tree.short(folder / domain)}).")
        elif files == []:
            tree.note(f"{what}: folder {tree.short(folder / domain)} is empty.")
        elif empty := df40_empty_folders(folder / domain) if files else []:
            tree.note(f"{what}: {len(empty)} folders in {tree.short(folder / domain)} are empty: {some(empty)}.")
        media = [p for p in files or [] if _df40_is_medium(p.relative_to(folder))]
        if files and len(media) < len(files):
            tree.note(
                f"{what}: {len(files) - len(media)} files in {tree.short(folder / domain)} are landmarks, masks "
                "or other side files and were left out."
            )
        for path in media:
            ids = _df40_ids(domain, method, path.relative_to(folder / domain), kind_of(path.name))
            tree.add(path.relative_to(tree.root).as_posix(), split, int(domain != "real"), method, **ids)


def df40(tree: Tree) -> None:
    """DF40 (Yan et al., NeurIPS 2024): frame images, a folder per clip; each frame is an item, its clip the folder.

    31 known methods lie in <method>/{ff,cdf} (fakes only: their reals are the FaceForensics++ and Celeb-DF
    downloads), nine unknown ones in <method>/{fake,real}. ROOT/train and ROOT/test are the two downloads;
    without them all of ROOT is test. Part of train is cut off by group as val. Holes are counted.
    """
    parts = [
        (split, tree.root / name) for split, name in (("", "train"), ("test", "test")) if (tree.root / name).is_dir()
    ]
    if not parts:
        tree.note("no folders ROOT/train and ROOT/test: all of ROOT is taken as test.")
    for split, base in parts or [("test", tree.root)]:
        folders = {f: _DF40_NAMES.get(f.name.lower()) for f in tree.entries(base) if f.is_dir()}
        odd = [f.name for f, method in folders.items() if method is None]
        if odd:
            tree.note(f"{tree.short(base)}: {len(odd)} folders are no DF40 method and were left out: {some(odd)}.")
        for folder, method in folders.items():
            if method:
                _df40_method(tree, folder, method, split)
        missing = set(_DF40_NAMES.values()) - set(folders.values())
        if missing:
            tree.note(f"{tree.short(base)}: {len(missing)} of 40 methods not on disk: {some(missing, 40)}.")
    if not any(row["label"] == 0 for row in tree.rows):
        tree.note("no real items: index FaceForensics++ and Celeb-DF for the reals of the known methods.")
