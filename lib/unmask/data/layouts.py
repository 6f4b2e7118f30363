"""Write a generated world under the official names of a public data set, so that its adapter can be tried on it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pandas as pd

from unmask.data.adapters import CELEBDF_LIST
from unmask.data.manifest import SPLITS, media_path, read_manifest
from unmask.data.tree import DatasetError, some

FFPP_NAMES = {"swap": "FaceSwap", "reenact": "Face2Face", "texture": "NeuralTextures", "synthesis": "Deepfakes"}
DF40_NAMES = {"swap": "faceswap", "reenact": "fomm", "texture": "pirender", "synthesis": "MidJourney"}


@dataclass
class Plan:
    """What goes where: new relative path -> row of the world's manifest; further text files; notes."""

    links: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, why: str, paths: Iterable[str]) -> None:
        paths = list(paths)
        if paths:
            self.notes.append(f"{len(paths)} clips left out, {why}: {some(paths)}.")


def _people(df: pd.DataFrame) -> tuple[pd.Series, pd.Series, dict[str, int]]:
    """Subject and donor keys per row (unique across data sets), and the number of each person in sorted order."""
    subject = df["dataset"] + "/" + df["subject"]
    donor = (df["dataset"] + "/" + df["source_id"]).where(df["source_id"] != "", "")
    return subject, donor, {name: k for k, name in enumerate(sorted(set(subject) | set(donor) - {""}))}


def _pairs(df: pd.DataFrame, subject: pd.Series, donor: pd.Series) -> dict[str, tuple[str, str]]:
    """person -> (partner, split). Fakes say who is paired; people left over are paired in order within their split."""
    partner: dict[str, tuple[str, str]] = {}
    rows = sorted(zip(subject, donor, df["split"], strict=True))
    for a, b, split in rows:
        if b not in ("", a) and a not in partner and b not in partner:
            partner |= {a: (b, split), b: (a, split)}
    for split in SPLITS:
        alone = sorted({a for a, _, s in rows if s == split and a not in partner})
        for a, b in zip(alone[::2], alone[1::2], strict=False):
            partner |= {a: (b, split), b: (a, split)}
    return partner


def _directed(df: pd.DataFrame, plan: Plan, names: dict[str, str]) -> list[tuple[int, str, str]]:
    """(row, target id, source id or "" for a real) of the clips that fit FF++'s scheme, ids of three digits.

    There is one clip per person (real) or per target, source and method (fake), videos before images.
    """
    subject, donor, number = _people(df)
    if len(number) > 1000:
        raise DatasetError(f"FaceForensics++ has room for 1000 people; this world has {len(number)}.")
    partner = _pairs(df, subject, donor)
    taken: set[tuple[str, str, str]] = set()
    placed, unpaired, second, unnamed = [], [], [], []
    for row in df.sort_values(["kind", "path"], ascending=[False, True]).itertuples():
        person = subject[row.Index]
        mate = donor[row.Index] or partner.get(person, ("", ""))[0]
        key = (person, "" if row.label == 0 else mate, row.method)
        if row.method != "real" and row.method not in names:
            unnamed.append(row.path)
        elif person not in partner or partner[person] != (mate, row.split) and row.label == 1:
            unpaired.append(row.path)
        elif key in taken:
            second.append(row.path)
        else:
            taken.add(key)
            placed.append((row.Index, f"{number[person]:03d}", f"{number[mate]:03d}" if row.label else ""))
    plan.leave_out("their method has no name in this layout", unnamed)
    plan.leave_out("their people are in no pair of one split", unpaired)
    plan.leave_out("further clips of the same person or of the same pair and method", second)
    plan.texts |= {
        f"splits/{split}.json": json.dumps(
            [[f"{number[a]:03d}", f"{number[b]:03d}"] for a, (b, s) in sorted(partner.items()) if s == split and a < b],
            indent=2,
        )
        for split in SPLITS
    }
    return placed


def _ffpp(df: pd.DataFrame) -> Plan:
    plan = Plan()
    for row, target, source in _directed(df, plan, FFPP_NAMES):
        suffix = PurePosixPath(df.at[row, "path"]).suffix
        place = f"manipulated_sequences/{FFPP_NAMES[df.at[row, 'method']]}" if source else "original_sequences/youtube"
        plan.links[f"{place}/c23/videos/{target}{'_' if source else ''}{source}{suffix}"] = row
    return plan


def _celebdf2(df: pd.DataFrame) -> Plan:
    """A fake without a donor in the world (whole-face synthesis) is named as its own donor."""
    plan, listed, count = Plan(), [], {}
    subject, donor, number = _people(df)
    for row in df.sort_values("path").itertuples():
        stem = f"id{number[subject[row.Index]]}"
        if row.label:
            stem += f"_id{number[donor[row.Index] or subject[row.Index]]}"
        count[stem] = count.get(stem, -1) + 1
        name = f"{'Celeb-synthesis' if row.label else 'Celeb-real'}/{stem}_{count[stem]:04d}"
        plan.links[name + PurePosixPath(row.path).suffix] = row.Index
        if row.split == "test":
            listed.append(f"{1 - row.label} {name}{PurePosixPath(row.path).suffix}")
    plan.texts[CELEBDF_LIST] = "".join(f"{line}\n" for line in listed)
    return plan


def _dfdc_name(row: pd.Series) -> str:
    """Ten letters that say nothing, as in DFDC."""
    digest = hashlib.sha256(row["item_id"].encode()).digest()[:10]
    return "".join(chr(ord("a") + byte % 26) for byte in digest) + PurePosixPath(row["path"]).suffix


def _dfdc(df: pd.DataFrame) -> Plan:
    """Train and val become one part each, test becomes labels.csv; a fake's original is its subject's first real."""
    plan, labels = Plan(), ["filename,label"]
    names = df.apply(_dfdc_name, axis=1)
    subject = _people(df)[0]
    reals = df[df["label"] == 0].sort_values("path")
    original = {(subject[i], df.at[i, "split"]): names[i] for i in reversed(reals.index)}
    parts: dict[str, dict[str, dict[str, str]]] = {}
    for row in df.sort_values("path").itertuples():
        name = names[row.Index]
        if row.split == "test":
            labels.append(f"{name},{row.label}")
            plan.links[f"videos/{name}"] = row.Index
            continue
        part = f"dfdc_train_part_{('train', 'val').index(row.split)}"
        entry = {"label": "FAKE" if row.label else "REAL", "split": "train"}
        if row.label and (subject[row.Index], row.split) in original:
            entry["original"] = original[subject[row.Index], row.split]
        parts.setdefault(part, {})[name] = entry
        plan.links[f"{part}/{name}"] = row.Index
    plan.texts |= {f"{part}/metadata.json": json.dumps(entries) for part, entries in parts.items()}
    plan.texts["labels.csv"] = "\n".join(labels) + "\n"
    return plan


def _df40(df: pd.DataFrame) -> Plan:
    """Known methods hold fakes only, named by FF++ pair; the reals stand beside whole-face synthesis (MidJourney)."""
    plan = Plan()
    for row, target, source in _directed(df[~df["method"].isin(["real", "synthesis"])], plan, DF40_NAMES):
        part = "test" if df.at[row, "split"] == "test" else "train"
        plan.links[
            f"{part}/{DF40_NAMES[df.at[row, 'method']]}/ff/{target}_{source}" + PurePosixPath(df.at[row, "path"]).suffix
        ] = row
    plan.texts.clear()  # DF40 has no pair lists of its own
    count: dict[str, int] = {}
    subject, _, number = _people(df)
    for row in df[df["method"].isin(["real", "synthesis"])].sort_values("path").itertuples():
        folder = f"{'test' if row.split == 'test' else 'train'}/MidJourney/{'fake' if row.label else 'real'}"
        stem = f"{folder}/p{number[subject[row.Index]]:03d}"
        count[stem] = count.get(stem, -1) + 1
        plan.links[f"{stem}_{count[stem]:02d}{PurePosixPath(row.path).suffix}"] = row.Index
    return plan


WRITERS: dict[str, Callable[[pd.DataFrame], Plan]] = {
    "ffpp": _ffpp,
    "celebdf2": _celebdf2,
    "dfdc": _dfdc,
    "df40": _df40,
}


def write_layout(manifest_path: Path | str, out: Path | str, layout: str) -> list[str]:
    """Lay the media of a generated world out in `out` as `layout` (ffpp, celebdf2, dfdc, df40) would have them.

    Hard links where the file system allows, else copies, with the official split list, test list or metadata,
    so that `index(out, layout)` finds the same labels and test split. `out` appears complete or not at all.
    Returns notes on clips for which the layout has no place. Raises DatasetError if `out` holds anything
    already or a medium is missing.
    """
    if layout not in WRITERS:
        raise DatasetError(f"No layout {layout!r} can be written; choose one of {', '.join(WRITERS)}.")
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out} is in use; give a folder that is empty or not there yet.")
    df = read_manifest(manifest_path)
    sources = {i: media_path(df.loc[i], manifest_path) for i in df.index}
    missing = [str(p) for p in sources.values() if not p.is_file()]
    if missing:
        raise DatasetError(f"{len(missing)} media of {manifest_path} are missing: {some(missing)}.")
    plan = WRITERS[layout](df)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for name, row in plan.links.items():
            _place(sources[row], partial / name)
        for name, text in plan.texts.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [f"{layout}: {note}" for note in plan.notes]


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
