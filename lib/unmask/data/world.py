"""The synthetic world: people filmed by simulated cameras, and four families of forgery with known ground truth.

Two data sets are generated: `world-a` (train, val, test) and `world-b` (test only: other cameras, subjects, codec
settings and blending). People come in pairs who are each other's donors, so a pair is the leakage unit. Real and forged
clips take the same road: camera, the camera's own encoder, decoder, forgery or nothing, distribution encoder. File
names, sizes, lengths and encoder settings therefore say nothing about the label.

Limits: one light, no occlusion, drawn rather than photographed skin; nothing here stands for a real population.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from unmask.data import cameras, forgeries, manifest, scenes, subjects, video
from unmask.machine import writing
from unmask.profile import ProfileError, source_hash, write_atomic
from unmask.progress import track

METHODS = ("swap", "reenact", "texture", "synthesis")
NAMES = ("world-a", "world-b")
SOURCES = (cameras, forgeries, scenes, subjects, video, sys.modules[__name__])


@dataclass(frozen=True)
class Clip:
    """A subject's camera file, decoded: frames uint8[T,H,W,3], with what the simulator knows about them."""

    subject: str
    camera: cameras.Camera
    frames: np.ndarray
    take: scenes.Take


@dataclass(frozen=True)
class Pair:
    """A unit of work: two people, everything filmed of them and forged with them."""

    world: str
    index: int  # unique over both worlds
    split: str


def plan(spec: dict) -> list[Pair]:
    """The pairs of both worlds in order; spec holds the profile's `world` keys."""
    splits = [("world-a", split) for split in ("train", "val", "test") for _ in range(spec[f"pairs_{split}"])]
    splits += [("world-b", "test")] * spec["pairs_b"]
    return [Pair(world, index, split) for index, (world, split) in enumerate(splits)]


def _stream(seed: int, *key: str | int) -> np.random.Generator:
    """An independent random stream named by its key, whatever else is drawn and in whichever process."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def world_cameras(world: str, spec: dict, seed: int) -> list[cameras.Camera]:
    """The cameras of a world; world-b has its own, fewer."""
    count = spec["cameras"] if world == "world-a" else max(2, spec["cameras"] // 2)
    return cameras.make_cameras(world[-1].upper(), count, spec["size"], spec["prnu"], _stream(seed, world, "cameras"))


def _recode(frames: np.ndarray, fps: float, model: cameras.CameraModel) -> np.ndarray:
    """The frames after the camera's own encoder and a decoder."""
    with tempfile.TemporaryDirectory() as folder:
        path = video.encode(
            Path(folder) / "camera.mp4", frames, fps, model.crf, model.gop, model.bframes, preset="veryfast"
        )
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _film(pair: Pair, member: int, clip: int, spec: dict, seed: int, devices: list[cameras.Camera]) -> Clip:
    name = f"s{2 * pair.index + member:03d}"
    subject = subjects.sample_subject(_stream(seed, pair.world, name))
    rng = _stream(seed, pair.world, name, clip)
    # Neighbouring numbers get different cameras, so cameras spread evenly over pairs and splits.
    camera = devices[(2 * pair.index + member + clip * 3) % len(devices)]
    take = scenes.film(subject, rng, spec["frames"], spec["fps"], spec["size"])
    frames = np.stack([cameras.expose(radiance, camera, rng) for radiance in take.radiance])
    return Clip(name, camera, _recode(frames, spec["fps"], camera.model), take)


def _imagine(subject: subjects.Subject, textures, clip: Clip, light: np.ndarray, i: int, side: int) -> np.ndarray:
    """The picture of a person who was never filmed, in the pose of frame i; float32[side,side,3] RGB 0..255."""
    size = clip.frames.shape[1]
    pose = clip.take.poses[i]
    zoom = side / size
    pose = replace(pose, x=pose.x * zoom, y=pose.y * zoom, scale=pose.scale * zoom)
    head, cover, _ = subjects.render_head(subject, textures, pose, light, side)
    canvas = 0.4 * subject.skin + cover[..., None] * (head - 0.4 * subject.skin)
    return (255 * np.clip(canvas, 0, 1) ** (1 / 2.2)).astype(np.float32)


def _forge(method: str, target: Clip, donor: Clip, world: str, spec: dict, seed: int) -> forgeries.Forgery:
    rng = _stream(seed, world, target.subject, method)
    difficulty = float(np.clip(spec["difficulty"] + rng.uniform(-0.15, 0.15), 0, 1))
    points = target.take.landmarks
    if method == "swap":
        blend = "alpha" if world == "world-a" else "multiband"
        return forgeries.swap(target.frames, points, donor.frames, donor.take.landmarks, rng, difficulty, blend)
    if method == "reenact":
        return forgeries.reenact(target.frames, points, donor.take.landmarks, rng, difficulty)
    if method == "texture":
        return forgeries.texture(target.frames, points, rng, difficulty)
    nobody = subjects.sample_subject(rng)
    light = rng.normal(0, 0.4, 3) + (0, -0.4, 1)
    imagine = partial(_imagine, nobody, subjects.base_texture(nobody), target, light / np.linalg.norm(light))
    return forgeries.synthesise(target.frames, points, imagine, rng, difficulty)


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def _write(
    out: Path,
    pair: Pair,
    clip: Clip,
    key: str,
    forgery: forgeries.Forgery | None,
    image: int | None,
    spec: dict,
    seed: int,
) -> dict:
    """Encode one medium with its landmarks and mask; returns its manifest row without item and group ids."""
    # The name is a hash, so neither it nor the order of the manifest tells the label.
    name = hashlib.sha256(f"{seed}/{pair.world}/{clip.subject}/{key}".encode()).hexdigest()[:12]
    frames, landmarks = (clip.frames, clip.take.landmarks) if forgery is None else (forgery.frames, forgery.landmarks)
    chosen = slice(None) if image is None else slice(image, image + 1)
    path = f"{pair.world}/{'videos' if image is None else 'images'}/{name}.{'mp4' if image is None else 'png'}"
    if image is None:
        codec = _stream(seed, pair.world, clip.subject, "distribution")
        crf = spec["crf"] if pair.world == "world-a" else spec["crf_b"]
        gop, bframes = int(codec.choice([12, 24])), int(codec.integers(1, 4))
        video.encode(
            out / path,
            frames,
            spec["fps"],
            crf,
            gop,
            bframes,
            preset="veryfast" if pair.world == "world-a" else "medium",
        )
    else:
        # Uncompressed, so that the size of the file depends on the size of the picture alone.
        bgr = cv2.cvtColor(frames[image], cv2.COLOR_RGB2BGR)
        write_atomic(out / path, cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes())
    annotations = f"{pair.world}/annotations/{name}.npz"
    _save_arrays(out / annotations, landmarks=landmarks[chosen])
    if forgery is not None:
        _save_arrays(out / f"{pair.world}/masks/{name}.npz", mask=np.round(255 * forgery.mask[chosen]).astype(np.uint8))
    return {
        "path": path, "kind": "video" if image is None else "image", "dataset": pair.world, "split": pair.split,
        "label": int(forgery is not None), "subject": clip.subject, "camera": clip.camera.name,
        "annotations": annotations,
    }  # fmt: skip


def _equalise(videos: list[Path]) -> None:
    """Give all these mp4 files the size of the largest, by a `free` box (ISO/IEC 14496-12) at the end.

    A smooth forged face costs the encoder fewer bits; without this the size of a file would tell its label.
    """
    size = max(path.stat().st_size for path in videos) + 8
    for path in videos:
        box = size - path.stat().st_size
        write_atomic(path, path.read_bytes() + box.to_bytes(4, "big") + b"free" + bytes(box - 8))


def _make_pair(out: Path, pair: Pair, spec: dict, seed: int) -> None:
    """Film, forge and write everything of one pair; the rows are written last, so a part that exists is whole."""
    part = out / ".parts" / f"{pair.index:05d}.json"
    # Whole unless somebody, or an interrupted clearing, has removed files since.
    if part.exists() and all(
        (out / row[column]).exists() for row in json.loads(part.read_text()) for column in ("path", "annotations")
    ):
        return
    cv2.setNumThreads(1)
    devices = world_cameras(pair.world, spec, seed)
    filmed = [[_film(pair, member, clip, spec, seed, devices) for clip in range(spec["clips"])] for member in (0, 1)]
    rows = []
    for member, takes in enumerate(filmed):
        target, donor = takes[0], filmed[1 - member][0]
        middle = spec["frames"] // 2
        for i, clip in enumerate(takes):
            rows.append(
                _write(out, pair, clip, f"real{i}", None, None, spec, seed) | {"method": "real", "source_id": ""}
            )
        rows.append(
            _write(out, pair, target, "real-image", None, middle, spec, seed) | {"method": "real", "source_id": ""}
        )
        for method in METHODS:
            forgery = _forge(method, target, donor, pair.world, spec, seed)
            from_donor = {"method": method, "source_id": donor.subject if method in ("swap", "reenact") else ""}
            rows.append(_write(out, pair, target, method, forgery, None, spec, seed) | from_donor)
            if method == "synthesis":
                rows.append(_write(out, pair, target, f"{method}-image", forgery, middle, spec, seed) | from_donor)
    _equalise([out / row["path"] for row in rows if row["kind"] == "video"])
    for row in rows:
        row["group_id"] = f"{pair.world}:p{pair.index:03d}"
    write_atomic(part, json.dumps(rows))


def _clear(out: Path) -> None:
    """Remove what an earlier generation left in its own folders; nothing else in `out` is touched."""
    for folder in (*NAMES, ".parts"):
        shutil.rmtree(out / folder, ignore_errors=True)
    (out / "manifest.parquet").unlink(missing_ok=True)


def generate(out: str | os.PathLike, spec: dict, seed: int = 0, workers: int = 1) -> pd.DataFrame:
    """Generate both worlds below `out` and return the manifest, also written to out/manifest.parquet.

    spec: the profile's `world` keys. Resumes where an interrupted run stopped; with other settings (or another version
    of the simulator) the earlier world in `out` is replaced. The same seed gives the same bytes for any `workers`.
    Raises ProfileError for a size that H.264 cannot have.
    """
    if spec["size"] < 32 or spec["size"] % 2:
        raise ProfileError(f"world.size must be an even number of pixels from 32 on, not {spec['size']}.")
    out = Path(out)
    settings = json.dumps({"spec": spec, "seed": seed, "source": source_hash(*SOURCES)}, sort_keys=True)
    stamp = out / "world.json"
    if stamp.exists() and stamp.read_text() != settings:
        print(f"{out} holds a world with other settings; making it anew.")
        _clear(out)
    kinds = ("videos", "images", "annotations", "masks")
    with writing(out):
        for folder in [".parts", *(f"{w}/{kind}" for w in NAMES for kind in kinds)]:
            (out / folder).mkdir(parents=True, exist_ok=True)
    write_atomic(stamp, settings)
    pairs = plan(spec)
    tasks = Parallel(n_jobs=workers, return_as="generator")(
        delayed(_make_pair)(out, pair, spec, seed) for pair in pairs
    )
    for _ in track(tasks, len(pairs), "world, pairs of people"):
        pass
    rows = [row for pair in pairs for row in json.loads((out / ".parts" / f"{pair.index:05d}.json").read_text())]
    df = pd.DataFrame(rows).assign(root=".")
    df["item_id"] = [manifest.item_id(d, p) for d, p in zip(df["dataset"], df["path"], strict=True)]
    df = df.sort_values("path", ignore_index=True).astype({"label": "int8"})[list(manifest.COLUMNS)]
    manifest.write_manifest(df, out / "manifest.parquet")
    return df


def contact_sheet(out: str | os.PathLike, df: pd.DataFrame, people: int = 4) -> np.ndarray:
    """A picture uint8[H,W,3]: one row per person, the middle frame of the real clip and of each forgery."""
    clips = df[df["kind"] == "video"].drop_duplicates(["subject", "method"])
    rows = []
    for subject in clips["subject"].drop_duplicates().sort_values().iloc[:people]:
        own = clips[clips["subject"] == subject].set_index("method")["path"]
        frames = [video.read_frames(Path(out) / own[m], 3).frames[1] for m in ("real", *METHODS)]
        rows.append(np.concatenate(frames, 1))
    return np.concatenate(rows, 0)
