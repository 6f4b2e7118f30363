"""DF40's protocol P3, other forgeries on other sources: its eight test sets, what they lack, and how they are judged.

DF40 (Yan et al., NeurIPS 2024) lists nine methods whose sources a detector trained on FaceForensics++ has not seen;
these are the nine without DeepFaceLab. Most are pictures without a video: figures per frame are all they allow.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from unmask.data.adapters_ffpp import DF40_DOMAINS, df40_empty_folders, df40_place
from unmask.data.manifest import media_path
from unmask.data.tree import some
from unmask.evaluation import join, levels
from unmask.intervals import auc_interval
from unmask.metrics import equal_error_rate, recalls

DATASET = "df40"  # as `unmask index --layout df40` names it
_FAMILIES = {"ffpp": "FaceForensics++", "celebdf": "Celeb-DF"}  # by the family of their subjects
_FAMILY_OF = {"ff": "ffpp", "cdf": "celebdf"}


@dataclass(frozen=True)
class P3Set:
    """One test set: the kind of forgery, the source of its faces, whether it has videos, and the release's holes."""

    kind: str
    source: str
    videos: bool
    known: str = ""


# Kinds and sources: DF40's README. Holes: its issues 29 (HeyGen, CollabDiff, e4e) and 25, 41 (e4e).
P3 = {
    "heygen": P3Set("reenactment", "VFHQ", True, "the fakes are videos, of which no frames were released"),
    "MidJourney": P3Set("synthesis", "FFHQ", False),
    "whichfaceisreal": P3Set("synthesis", "FFHQ", False, "the release's lists call it whichisreal"),
    "stargan": P3Set("editing", "CelebA", False),
    "starganv2": P3Set("editing", "CelebA", False),
    "styleclip": P3Set("editing", "CelebA", False),
    "e4e": P3Set(
        "editing",
        "FaceForensics++ and Celeb-DF, not CelebA as listed",
        True,
        "no reals of its own; inversions, not edits; the lists of e4e_ff put the same fakes in train and test",
    ),
    "CollabDiff": P3Set("editing", "CelebA", False, "the folder of reals was missing from the release"),
}


@dataclass(frozen=True)
class _Members:
    """The test items of one set with a column `clip` ("" for a single picture), and what stands in for its reals."""

    fakes: pd.DataFrame
    reals: pd.DataFrame
    stands_in: tuple[str, ...]  # families of _FAMILIES; () if it has reals of its own, or none at all
    unmatched: int  # fakes left out, for want of reals of their source

    def together(self) -> pd.DataFrame:
        """Reals and fakes; nothing if either is missing, since nothing can be judged then."""
        both = len(self.fakes) and len(self.reals)
        return pd.concat([self.reals, self.fakes]) if both else self.reals.iloc[:0]

    def clips(self) -> tuple[int, int]:
        """Number of clips of reals and of fakes."""
        return tuple(part.loc[part["clip"] != "", "clip"].nunique() for part in (self.reals, self.fakes))

    def judged_by_clip(self) -> bool:
        return min(self.clips()) > 0


def _placed(manifest: pd.DataFrame) -> pd.DataFrame:
    """The DF40 rows of P3's sets, with columns set, domain and clip."""
    own = manifest[manifest["dataset"] == DATASET]
    places = [df40_place(path) or ("", "", ()) for path in own["path"]]
    own = own.assign(set=[p[0] for p in places], domain=[p[1] for p in places], named=[len(p[2]) > 0 for p in places])
    own = own[own["set"].isin(list(P3))]
    # In a set of single pictures a folder is no clip, whatever it is called.
    frames = own["named"] & own["set"].map(lambda name: P3[name].videos)
    folders = own["path"].map(lambda path: str(PurePosixPath(path).parent)).where(frames, "")
    return own.assign(clip=folders.where(own["kind"] == "image", own["path"])).drop(columns="named")


def _members(placed: pd.DataFrame, manifest: pd.DataFrame, name: str) -> _Members:
    test = placed[(placed["set"] == name) & (placed["split"] == "test")]
    fakes, reals = test[test["label"] == 1], test[test["label"] == 0]
    if len(reals) or fakes.empty:
        return _Members(fakes, reals, (), 0)
    others = manifest[(manifest["dataset"] != DATASET) & (manifest["label"] == 0) & (manifest["split"] == "test")]
    others = others.assign(family=others["subject"].str.split(":").str[0], set=name, domain="real")
    others = others.assign(clip=others["path"].where(others["kind"] == "video", ""))
    # Inversions are judged against the very source they invert; what comes from elsewhere, against any.
    wanted = {_FAMILY_OF.get(domain, "") for domain in fakes["domain"]}
    wanted = set(_FAMILIES) if "" in wanted else wanted
    reals = others[others["family"].isin(wanted)]
    families = tuple(sorted(set(reals["family"])))
    matched = fakes["domain"].map(_FAMILY_OF).isin(families) | ~fakes["domain"].isin(list(_FAMILY_OF))
    return _Members(fakes[matched] if families else fakes, reals, families, int((~matched).sum()) if families else 0)


def content_hashes(manifest: pd.DataFrame, manifest_path: Path | str) -> dict[str, str]:
    """item_id -> sha256 of the file, for the items of those P3 sets that lie in more than one split.

    Only these can have duplicates between splits. Files that cannot be read have none.
    """
    placed = _placed(manifest)
    crossing = placed.groupby("set")["split"].transform("nunique") > 1 if len(placed) else []
    hashes = {}
    for row in placed[crossing].to_dict("records"):
        try:
            with open(media_path(row, manifest_path), "rb") as file:
                hashes[row["item_id"]] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            continue  # preprocessing reports it
    return hashes


def _empty_folders(placed: pd.DataFrame, manifest_path: Path | str) -> dict[str, list[str]]:
    """set -> empty folders in its test download."""
    found: dict[str, list[str]] = {}
    test = placed[placed["split"] == "test"]
    for name, part in test.groupby("set"):
        row = part.iloc[0]
        parts = PurePosixPath(row["path"]).parts
        method = "/".join(parts[: 2 if parts[0] == "test" else 1])
        folder = media_path({"root": row["root"], "path": method}, manifest_path)
        found[name] = [f"{d}/{empty}" for d in DF40_DOMAINS for empty in df40_empty_folders(folder / d)]
    return found


def _holes(name: str, own: pd.DataFrame, members: _Members, empty: list[str], hashes: Mapping[str, str]) -> list[str]:
    """What the manifest (and disk and content, as far as given) lacks of one set; own: its rows of all splits."""
    fakes, reals = members.fakes, members.reals
    if fakes.empty and reals.empty:
        return ["set absent" if own.empty else "no test items"]
    holes = []
    if fakes.empty:
        holes.append("no fakes")
    if members.stands_in or reals.empty:
        names = " and ".join(_FAMILIES[family] for family in members.stands_in)
        spared = "" if name == "e4e" else ", though its faces come from " + P3[name].source
        holes.append(f"no reals; those of {names} stand in{spared}" if names else "no reals, and none to stand in")
    if members.unmatched:
        holes.append(f"{members.unmatched} fakes left out: no reals of their source")
    if P3[name].videos and len(fakes) and len(reals) and not members.judged_by_clip():
        holes.append("no clips in both classes")
    if len(fakes) and len(reals) and set(fakes["kind"]) != set(reals["kind"]):
        holes.append("reals and fakes differ in kind of file (pictures and videos), which may tell them apart")
    if empty:
        holes.append(f"{len(empty)} empty folders: {some(empty)}")
    content = own["item_id"].map(hashes).dropna() if hashes else pd.Series(dtype=object)
    splits = own.loc[content.index, "split"].groupby(content).nunique()
    if (splits > 1).any():
        holes.append(f"{int((splits > 1).sum())} files lie in more than one split")
    return holes


def p3(
    manifest: pd.DataFrame, manifest_path: Path | str | None = None, hashes: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """What a manifest has of P3's eight sets (test split), a row each, and a note for every hole found in it.

    Columns: set, kind, source, fakes, reals (items that can be judged), stands_in (data sets whose reals stand in),
    clips (of both classes), singles (pictures in no clip), judged ("clip" where both classes have clips, "frame" where
    there are only pictures, "" where a class is missing), holes, known (holes of the release itself).
    manifest_path: look on the disk for empty folders too. hashes: `content_hashes`, for duplicates between splits.
    """
    placed, rows, notes = _placed(manifest), [], []
    empty = _empty_folders(placed, manifest_path) if manifest_path is not None else {}
    for name, known in P3.items():
        members, own = _members(placed, manifest, name), placed[placed["set"] == name]
        found = _holes(name, own, members, empty.get(name, []), hashes or {})
        both = len(members.fakes) > 0 and len(members.reals) > 0
        all_clips = pd.concat([members.fakes["clip"], members.reals["clip"]])
        rows.append(
            {
                "set": name, "kind": known.kind, "source": known.source,
                "fakes": len(members.fakes), "reals": len(members.reals),
                "stands_in": " and ".join(_FAMILIES[f] for f in members.stands_in),
                "clips": sum(members.clips()), "singles": int((all_clips == "").sum()),
                "judged": ("clip" if members.judged_by_clip() else "frame") if both else "",
                "holes": "; ".join(found), "known": known.known,
            }
        )  # fmt: skip
        notes += [f"{name}: {hole}." for hole in found]
    return pd.DataFrame(rows), notes


def published() -> pd.DataFrame:
    """Figures on P3's sets that others published: columns set, detector, ap, accuracy (threshold 0.5),
    oracle_accuracy (threshold chosen on the test set itself), as shares, and source.

    UFD's official weights (Ojha et al., CVPR 2023), as logged in the history of github.com/2t2c/CLaRE: there is none
    for e4e (NaN). The table of P3 in DF40's own paper (table 5) could not be checked and is left out.
    """
    logged = {
        "heygen": (84.3, 51.4, 75.1), "MidJourney": (60.1, 65.6, 66.1), "whichfaceisreal": (81.5, 58.0, 77.9),
        "stargan": (97.9, 91.9, 93.0), "starganv2": (86.1, 75.2, 79.4), "styleclip": (95.0, 66.9, 84.2),
        "CollabDiff": (61.1, 53.0, 62.1),
    }  # fmt: skip
    columns = ["ap", "accuracy", "oracle_accuracy"]
    table = pd.DataFrame([logged.get(name, (np.nan,) * 3) for name in P3], columns=columns) / 100
    table = pd.concat([pd.DataFrame({"set": list(P3), "detector": "UFD, official weights"}), table], axis=1)
    return table.assign(source="github.com/2t2c/CLaRE, history")


def _scored(part: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """A row per `keys` that every seed scored, with label, group_id and a column of scores per seed."""
    means = part.groupby([*keys, "seed"], as_index=False).agg(score=("score", "mean"))
    wide = means.pivot(index=keys, columns="seed", values="score").dropna()
    return part.groupby(keys)[["label", "group_id"]].first().join(wide, how="inner")


def _figures(wide: pd.DataFrame, threshold: float, level: float, draws: int) -> dict:
    """AUC with interval, AP, EER and balanced accuracy of the rows of `_scored`, means over seeds."""
    labels, scores = wide["label"].to_numpy(), wide.drop(columns=["label", "group_id"]).to_numpy()
    auc, low, high = auc_interval(labels, scores, wide["group_id"], level, draws)
    both = len(set(labels)) == 2
    return {
        "n_real": int((labels == 0).sum()), "n_fake": int((labels == 1).sum()), "auc": auc, "low": low, "high": high,
        "ap": np.mean([average_precision_score(labels, s) for s in scores.T]) if both else np.nan,
        "eer": np.mean([equal_error_rate(labels, s) for s in scores.T]) if both else np.nan,
        "balanced_accuracy": np.mean([recalls(labels, s, threshold) for s in scores.T]) if both else np.nan,
    }  # fmt: skip


def _unjudged(name: str, members: _Members, frames: dict, clips: dict) -> str:
    """Why figures are missing, or ""."""
    if members.together().empty:
        return "no " + " and no ".join(n for n in ("fakes", "reals") if getattr(members, n).empty) + " to judge"
    reasons = []
    if np.isnan(frames["auc"]):
        reasons.append("frame: no scores of single frames in both classes")
    if not members.judged_by_clip():
        reasons.append("video: " + ("no clips in both classes" if P3[name].videos else "single pictures, no videos"))
    elif np.isnan(clips["auc"]):
        reasons.append("video: no scores of clips in both classes")
    return "; ".join(reasons)


def evaluate_p3(
    scores: pd.DataFrame, manifest: pd.DataFrame, level: float = 0.95, draws: int = 1000, threshold: float = 0.5
) -> pd.DataFrame:
    """Figures on P3's sets: a row per detector, variant and set, absent sets too. scores: as `evaluation.SCORES`.

    Over frames (and single pictures): n_real, n_fake, auc with its interval (low, high), ap, eer, balanced_accuracy at
    `threshold`, which should come from validation data. Over clips, each the mean of its frames: clips_real,
    clips_fake, video_auc with video_low, video_high; NaN where the set has no clips in both classes, and `reason` says
    so. Several seeds are averaged. coverage: share of the set's items that every seed scored. Raises ScoreError.
    """
    df, placed, rows = join(scores, manifest), _placed(manifest), []
    sets = {name: _members(placed, manifest, name) for name in P3}
    for (detector, variant), run in df.groupby(["detector", "variant"], sort=True):
        tables = levels(run)
        frames, items = (pd.concat([tables[kind], tables["image"]]) for kind in ("frame", "video"))
        for name, members in sets.items():
            due = members.together()
            clip = due.loc[due["clip"] != "", ["item_id", "clip"]]
            by_frame = _scored(frames[frames["item_id"].isin(due["item_id"])], ["item_id", "frame"])
            by_clip = _scored(items.merge(clip, on="item_id"), ["clip"])
            figures, videos = (_figures(wide, threshold, level, draws) for wide in (by_frame, by_clip))
            scored = _scored(items[items["item_id"].isin(due["item_id"])], ["item_id"])
            rows.append(
                {"detector": detector, "variant": variant, "set": name, **figures, "threshold": threshold}
                | {"clips_real": videos["n_real"], "clips_fake": videos["n_fake"]}
                | {f"video_{key}": videos[key] for key in ("auc", "low", "high")}
                | {"stands_in": " and ".join(_FAMILIES[f] for f in members.stands_in)}
                | {"coverage": len(scored) / len(due) if len(due) else np.nan}
                | {"reason": _unjudged(name, members, figures, videos)}
            )
    return pd.DataFrame(rows)
