"""Which media come from the same camera? Chapter 02: fingerprints, their similarity, clusters, and the controls.

No label is read here: media go in, clusters come out. What the cameras really were enters only `judge`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import roc_auc_score

from unmask import prnu
from unmask.clustering import METHODS, UNATTRIBUTED, by_linkage, chance, cluster, scores, similarity
from unmask.data.crops import CropStore, index_hash, read_index
from unmask.data.journals import Journal, gather, name_shards, state_of
from unmask.data.manifest import COLUMNS, ManifestError, item_id, media_path, read_manifest
from unmask.data.tree import IMAGE_SUFFIXES, VIDEO_SUFFIXES, kind_of
from unmask.data.video import MediaError, encode, read_frames
from unmask.fingerprints import (
    SOURCE,
    FingerprintError,
    Settings,
    best_device,
    extract,
    face_hulls,
    media_of,
    read_patterns,
    read_scenes,
    write_rows,
)
from unmask.prnu import correlation_peak, fingerprint, ncc, noise_residual, pce
from unmask.profile import Profile, digest, write_atomic
from unmask.progress import track
from unmask.pseudo_labels import recordings

__all__ = [
    "METHODS", "Compared", "cluster", "cluster_files", "cluster_rows", "controls", "fingerprint", "fingerprint_files",
    "first_readable", "judge", "matching", "ncc", "noise_residual", "pairs", "pce", "quality", "recording_rows",
    "scenes_with_known_count", "separation", "settings_of", "similarities", "take",
]  # fmt: skip

FINGERPRINTS = "fingerprints.parquet"


def settings_of(profile: Profile, changes: Mapping[str, int | None] | None = None) -> Settings:
    """The profile's `cameras` keys that decide about fingerprints, with changes where they are not None."""
    keys = {key: value for key, value in profile.cameras.items() if key != "method"}
    return Settings(**keys | {key: value for key, value in (changes or {}).items() if value is not None})


def take(
    manifest: pd.DataFrame,
    manifest_path: Path,
    out: str | os.PathLike,
    settings: Settings,
    crops: str | os.PathLike | None = None,
    workers: int = 1,
) -> pd.DataFrame:
    """Fingerprints of all media of a manifest into the folder `out`; one row per medium (`unmask.fingerprints`).

    With `crops`, the folder that preprocessing filled, faces are kept apart from the background.
    """
    hulls: Mapping = {}
    if crops is not None:
        made, index = CropStore(crops).settings(), read_index(crops)
        hulls = face_hulls(index[index["item_id"].isin(manifest["item_id"])], made["size"], made["align"])
    paths = [media_path(row, manifest_path) for row in manifest.to_dict("records")]
    return extract(media_of(manifest, paths, hulls), out, settings, workers)


class Compared(NamedTuple):
    """Media of frames of one size: positions int[n] in the rows, correlations float32[n,n], and what chance gives."""

    where: np.ndarray
    matrix: np.ndarray
    noise: float


def similarities(out: str | os.PathLike, rows: pd.DataFrame) -> dict[str, Compared]:
    """The backgrounds of all media compared, by bucket of frames of one size."""
    return {
        bucket: Compared(part.index.to_numpy(), *_compared(*read_patterns(out, part)))
        for bucket, part in _buckets(rows)
    }


def _compared(patterns: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, float]:
    """Correlations float32[n,n] of fingerprints, and the standard deviation of chance.

    Few media have few pairs to learn chance from, or none that are unrelated. Some of them, moved by many pixels, are
    unrelated to all for sure, so chance is at least what those show.
    """
    matrix = similarity(patterns, valid, device=best_device())
    some, rng, moved = min(len(patterns), 8), np.random.default_rng(0), []
    for _ in range(8):
        shift = rng.integers(16, np.array(patterns.shape[1:]) - 15)
        both = [np.concatenate([x[:some], np.roll(x[:some], shift, (1, 2))]) for x in (patterns, valid)]
        moved.append(similarity(*both, device=best_device())[:some, some:])
    return matrix, max(chance(matrix), float(np.sqrt(np.mean(np.square(moved)))))


def _buckets(rows: pd.DataFrame):
    rows = rows.reset_index(drop=True)
    return rows[rows["status"] == "ok"].groupby("bucket", sort=True)


def cluster_rows(buckets: Mapping[str, Compared], count: int, method: str = "linkage", seed: int = 0) -> np.ndarray:
    """Camera of each of `count` media, int[count], from `similarities`; -1 = unattributed or failed.

    Cameras of different buckets have different numbers: nothing compares frames of different sizes.
    """
    return _numbered(count, ((b.where, cluster(b.matrix, method, b.noise, seed)) for b in buckets.values()))


def recording_rows(buckets: Mapping[str, Compared], count: int) -> np.ndarray:
    """Recording of each of `count` media, int[count]: versions of one video, such as a forgery and its original, share
    a number. -1 = failed. Media of different buckets have different numbers."""
    return _numbered(count, ((b.where, recordings(b.matrix)) for b in buckets.values()))


def _numbered(count: int, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """One labelling int[count] from parts (positions, labels), of which no two share a number; -1 elsewhere."""
    labels = np.full(count, UNATTRIBUTED)
    for where, own in parts:
        labels[where] = np.where(own >= 0, own + labels.max(initial=-1) + 1, UNATTRIBUTED)
    return labels


def controls(out: str | os.PathLike, rows: pd.DataFrame, method: str, seed: int) -> dict[str, np.ndarray]:
    """Labels int[N] of what must not work, or must work worse, if it is the sensor that is measured.

    shifted: every fingerprint moved by its own few pixels, so that the sensor no longer lies on itself while the
    picture's content nearly does. scene: thumbnails of the mean frame instead of fingerprints. random: noise.
    """
    rng = np.random.default_rng(seed)
    parts = {name: [] for name in ("shifted", "scene", "random")}
    for _, part in _buckets(rows):
        patterns, valid = read_patterns(out, part)
        for i, (dy, dx) in enumerate(rng.integers(-16, 17, (len(part), 2))):
            patterns[i], valid[i] = np.roll(patterns[i], (dy, dx), (0, 1)), np.roll(valid[i], (dy, dx), (0, 1))
        matrix, noise = _compared(patterns, valid)
        scenes = _correlation(read_scenes(out, part).reshape(len(part), -1))
        found = {
            "shifted": cluster(matrix, method, noise, seed),
            # Thumbnails are all alike to some degree, so the silhouette alone decides and nothing is left out.
            "scene": by_linkage(scenes, 0.0, seed) if len(part) > 2 else np.zeros(len(part), int),
            "random": cluster(_correlation(rng.standard_normal((len(part), 4096))), method, 1 / 64, seed),
        }
        for name, own in found.items():
            parts[name].append((part.index.to_numpy(), own))
    return {name: _numbered(len(rows), found) for name, found in parts.items()}


def scenes_with_known_count(out: str | os.PathLike, rows: pd.DataFrame, cameras: Sequence[str]) -> np.ndarray:
    """Labels int[N] by thumbnails as in `controls`, cut into as many clusters as there are true `cameras` (str[N]).

    Only for judging: it knows what nobody knows, so that scenes do not lose by a wrong number of clusters.
    """
    cameras, parts = np.asarray(cameras, object), []
    for _, part in _buckets(rows):
        where = part.index.to_numpy()
        own = np.zeros(len(part), int)
        if len(part) > 1:
            distance = np.clip(1 - _correlation(read_scenes(out, part).reshape(len(part), -1)), 0, None)
            tree = linkage(distance[np.triu_indices(len(part), 1)], "average")
            own = fcluster(tree, len(set(cameras[where])), "maxclust")
        parts.append((where, own))
    return _numbered(len(rows), parts)


def _correlation(vectors: np.ndarray) -> np.ndarray:
    centred = vectors - vectors.mean(1, keepdims=True)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def judge(cameras: Sequence[str], results: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """A row of `unmask.clustering.scores` for each named result; media whose camera is unknown ("") do not count."""
    known = np.asarray(cameras, object).astype(str) != ""
    truth = np.asarray(cameras, object)[known]
    if not known.any():
        return pd.DataFrame()
    return pd.DataFrame([{"method": name, **scores(truth, labels[known])} for name, labels in results.items()])


def matching(
    patterns: np.ndarray, valid: np.ndarray, names: Sequence[str], shifts: Sequence[tuple[int, int]], noise: float
) -> pd.DataFrame:
    """The first of N fingerprints float[N,H,W] (valid bool[N,H,W]) against the others, `names` str[N-1], each moved by
    `shifts` (dy, dx): columns pair, shift, ncc, deviations (of chance, `noise`), pce, false_alarm."""
    rows = []
    for name, pattern, keep in zip(names, patterns[1:], valid[1:], strict=True):
        for shift in shifts:
            moved, both = np.roll(pattern, shift, (0, 1)), valid[0] & np.roll(keep, shift, (0, 1))
            agreement, peak = ncc(patterns[0], moved, both), correlation_peak(patterns[0], moved)
            rows.append({"pair": name, "shift": f"{shift[0]}, {shift[1]}", "ncc": agreement,
                         "deviations": agreement / max(noise, 1e-12), "pce": peak.pce,
                         "false_alarm": peak.false_alarm})  # fmt: skip
    return pd.DataFrame(rows)


def first_readable(paths: Sequence[str | os.PathLike], settings: Settings) -> tuple[int, np.ndarray]:
    """The first medium that gives a fingerprint: its position in `paths` and its frames uint8[T,H,W,3] as stored.

    Raises FingerprintError if there is none.
    """
    for i, path in enumerate(paths):
        try:
            clip = read_frames(path, settings.frames, settings.deadline, upright=False, crop=settings.crop or None)
        except MediaError:
            continue
        if min(clip.frames.shape[1:3]) >= prnu.MIN_SIDE:
            return i, clip.frames
    raise FingerprintError(f"None of the {len(paths)} media can be read and has {prnu.MIN_SIDE} pixels on each side.")


def pairs(matrix: np.ndarray, cameras: Sequence[str], recordings: Sequence[str]) -> pd.DataFrame:
    """All pairs of different recordings: columns ncc and same (of one camera)."""
    camera, recording = (np.unique(np.asarray(x).astype(str), return_inverse=True)[1] for x in (cameras, recordings))
    i, j = np.triu_indices(len(matrix), 1)
    other = recording[i] != recording[j]
    return pd.DataFrame({"ncc": matrix[i, j][other], "same": (camera[i] == camera[j])[other]})


def separation(pairs: pd.DataFrame) -> float:
    """AUC of pairs of one camera against pairs of different ones (see `pairs`); NaN if one kind is missing."""
    return float(roc_auc_score(pairs["same"], pairs["ncc"])) if pairs["same"].nunique() == 2 else np.nan


def quality(
    paths: Sequence[Path],
    cameras: Sequence[str],
    crfs: Sequence[int],
    counts: Sequence[int],
    settings: Settings,
) -> pd.DataFrame:
    """How well pairs of one camera are told from others as compression grows and frames lack: crf, frames, auc, ncc.

    Every clip (of another recording each) is encoded anew at each `crf` (H.264, medium) and read back; fingerprints are
    taken of the first 1, 2, ... of `max(counts)` frames. auc: same camera against different ones over all pairs of
    clips; ncc: the mean of pairs of one camera.
    """
    table, patterns = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for k, path in enumerate(track(list(paths), label="quality, clips")):
            frames = read_frames(path, max(counts), settings.deadline, upright=False, crop=settings.crop or None).frames
            frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
            for crf in crfs:
                seen = read_frames(encode(Path(folder) / "clip.mp4", frames, crf=crf), len(frames)).frames
                total = prnu.Accumulator(*seen.shape[1:3], sigma=settings.sigma, device=best_device())
                for start, stop in zip([0, *counts], counts, strict=False):
                    if start < len(seen):
                        total.add(seen[start:stop])
                    patterns[crf, stop, k] = total.fingerprints()[0]
    for crf in crfs:
        for count in counts:
            matrix = similarity(np.stack([patterns[crf, count, k] for k in range(len(paths))]))
            both = pairs(matrix, cameras, range(len(paths)))
            table.append(
                {"crf": crf, "frames": count, "auc": separation(both), "ncc": both.loc[both["same"], "ncc"].mean()}
            )
    return pd.DataFrame(table)


def _listed(target: Path) -> tuple[pd.DataFrame, Path]:
    """The manifest at `target`, or one made up for the media below a folder; nothing reads its labels."""
    if not target.is_dir():
        return read_manifest(target), target
    files = sorted(p for p in target.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise ManifestError(f"There is no picture or video in {target}.")
    rows = []
    for file in files:
        path = file.relative_to(target).as_posix()
        rows.append(dict.fromkeys(COLUMNS, "") | {"item_id": item_id("media", path), "root": target.name, "path": path,
                                                  "kind": kind_of(path), "dataset": "media"})  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS)), target


def _keys(manifest: pd.DataFrame, where: Path, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Each medium of a manifest and what changes with its file, if that is not `known` from before it was read."""
    for row in manifest.to_dict("records"):
        name = row["item_id"]
        yield name, known[name] if name in known else state_of(media_path(row, where))


def fingerprint_files(
    target: str | os.PathLike,
    out: str | os.PathLike,
    settings: Settings,
    crops: str | os.PathLike | None = None,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> pd.DataFrame:
    """Fingerprints of the media of a manifest or below a folder into the folder `out`; a row per medium, failures too.

    `shard=(i, n)` does every n-th medium from the i-th on. The call that completes the last shard writes
    fingerprints.parquet, with which `cluster_files` goes on; others return their own rows and name the shards that are
    still to do. Stopped at any point, the same call goes on where it was. Raises ManifestError for a target without
    media and ShareError if another process is doing the same shard.
    """
    target, out, (number, of) = Path(target).resolve(), Path(out), shard
    manifest, where = _listed(target)
    own = dict(_keys(manifest.iloc[number::of], where, {}))
    stamp = digest([asdict(settings), SOURCE, index_hash(crops) if crops is not None else ""])
    with Journal(out / "shards", shard, stamp) as journal:
        journal.resume([])  # `take` knows what is done; rows come from there
        rows = take(manifest.iloc[number::of], where, out, settings, crops, workers)
        journal.add(zip(own.items(), rows.to_dict("records"), strict=True))
        journal.finish()
    found, to_do = gather(out / "shards", of, stamp, _keys(manifest, where, own))
    if to_do:
        print(f"Still to do: {name_shards(to_do, of)}. The last of them writes {FINGERPRINTS}.", file=sys.stderr)
        return rows
    rows = pd.DataFrame(found, columns=rows.columns)
    write_rows(rows, out / FINGERPRINTS)
    return rows


def _fingerprints(folder: Path, manifest: pd.DataFrame) -> pd.DataFrame:
    """The rows that `fingerprint_files` left for the media of a manifest. Raises FingerprintError."""
    again = "Run `unmask fingerprints` for the same media to its end first."
    if not (folder / FINGERPRINTS).is_file():
        raise FingerprintError(f"There is no {FINGERPRINTS} in {folder}. {again}")
    try:
        rows = pd.read_parquet(folder / FINGERPRINTS)
    except (OSError, ValueError) as error:  # ValueError: what pyarrow raises for bytes that are no Parquet
        raise FingerprintError(f"{folder / FINGERPRINTS} is damaged. {again}") from error
    if rows["item_id"].tolist() != manifest["item_id"].tolist():
        raise FingerprintError(f"The fingerprints in {folder} are of other media. {again}")
    return rows


def cluster_files(
    target: str | os.PathLike,
    out: str | os.PathLike,
    settings: Settings,
    crops: str | os.PathLike | None = None,
    method: str = "linkage",
    workers: int = 1,
    fingerprints: str | os.PathLike | None = None,
) -> pd.DataFrame:
    """Cluster the media of a manifest or below a folder by camera; returns a row per medium, failures too.

    Writes `out` (CSV: path as in the manifest or below the folder, cluster; -1 = unattributed or unreadable), beside
    it a JSON that says why, and a folder with the fingerprints, from which a stopped call goes on. `fingerprints`: the
    folder that `fingerprint_files` filled; nothing is decoded then, and `settings`, `crops` and `workers` do not count.
    Raises ManifestError for a target without media, and FingerprintError for a folder that is of other media or not
    complete.
    """
    target, out = Path(target).resolve(), Path(out)
    manifest, where = _listed(target)
    folder = Path(fingerprints) if fingerprints else out.with_suffix(".fingerprints")
    rows = _fingerprints(folder, manifest) if fingerprints else take(manifest, where, folder, settings, crops, workers)
    buckets = similarities(folder, rows)
    rows = rows.assign(path=manifest["path"].tolist(), cluster=cluster_rows(buckets, len(rows), method))
    shown = rows.drop(columns=["item_id", "seconds"]).to_dict("records")
    document = {"method": method, "settings": None if fingerprints else vars(settings), "media": shown}
    write_atomic(out.with_suffix(".json"), json.dumps(document, indent=1, default=int) + "\n")
    write_atomic(out, rows[["path", "cluster"]].to_csv(index=False))
    return rows
