"""A thousand damaged inputs, made alike by every run, and what the kit makes of them; see hardening.py."""

import io
import os
import platform
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from sections import processor

from unmask.data.crops import read_index, read_items
from unmask.data.manifest import write_manifest
from unmask.data.tree import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from unmask.data.video import encode, read_frames
from unmask.data.world import generate
from unmask.detectors import base
from unmask.media import best_locator, placeholder_manifest
from unmask.profile import load_profile

HEADING = "## Damaged inputs"
INPUTS = 1000
EVERY = 20  # one good file after so many damaged ones
SMALL = 400_000  # bytes; of larger media, decoding from the start takes most of the time
DEADLINE = 30.0  # seconds that an item may take, the profile's own
SETTINGS = {"frames": 2, "size": 96, "margin": 0.3, "align": False, "encoding": "png"}
Damage = Callable[[Path, Path, np.random.Generator], None]


def sources(folder: Path, media: Path | None) -> list[Path]:
    """Whole media in every format that the kit reads: faces of the synthetic world, and some of `media`."""
    spec = dict(load_profile("tiny").world) | {"size": 160, "pairs_train": 1, "pairs_val": 0, "pairs_test": 0}
    world = generate(folder / "world", spec | {"pairs_b": 0}, seed=1)
    clip = folder / "world" / world.loc[world["kind"] == "video", "path"].iloc[0]
    frames = read_frames(clip, 6).frames
    found = [clip]
    for suffix in (".mkv", ".mov"):
        found.append(encode(folder / f"clip{suffix}", frames))
    shots = [Image.fromarray(frame) for frame in frames]
    for suffix in (".png", ".jpg", ".webp", ".bmp", ".tif"):
        shots[0].save(folder / f"still{suffix}")
        found.append(folder / f"still{suffix}")
    for suffix in (".gif", ".webp"):
        shots[0].save(folder / f"moving{suffix}", save_all=True, append_images=shots[1:], duration=40)
        found.append(folder / f"moving{suffix}")
    if media:
        wanted = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        found += sorted(p for p in media.rglob("*") if p.suffix.lower() in wanted and p.stat().st_size < SMALL)
    return found


def truncated(source: Path, path: Path, rng) -> None:
    data = source.read_bytes()
    path.write_bytes(data[: rng.integers(1, len(data))])


def flipped(source: Path, path: Path, rng) -> None:
    data = bytearray(source.read_bytes())
    for place in rng.integers(0, len(data), int(rng.integers(1, 60))):
        data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def zeroed(source: Path, path: Path, rng) -> None:
    data = bytearray(source.read_bytes())
    start, stop = sorted(rng.integers(0, len(data), 2).tolist())
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def shuffled(source: Path, path: Path, rng) -> None:
    data = source.read_bytes()
    blocks = [data[i : i + 512] for i in range(0, len(data), 512)]
    path.write_bytes(b"".join(blocks[:1] + [blocks[1:][i] for i in rng.permutation(len(blocks) - 1)]))


def wrongly_named(source: Path, path: Path, rng) -> None:
    other = rng.choice([s for s in (".mp4", ".jpg", ".png", ".txt", "") if s != source.suffix])
    path.with_suffix(other).write_bytes(source.read_bytes())


def unreadable(source: Path, path: Path, rng) -> None:
    path.write_bytes(source.read_bytes())
    path.chmod(0)


def empty(source: Path, path: Path, rng) -> None:
    path.touch()


def noise(source: Path, path: Path, rng) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(1, 50_000))))


def folder(source: Path, path: Path, rng) -> None:
    path.mkdir()


def pipe(source: Path, path: Path, rng) -> None:
    os.mkfifo(path)


def dangling(source: Path, path: Path, rng) -> None:
    path.symlink_to(path if rng.random() < 0.5 else "nowhere")


def huge(source: Path, path: Path, rng) -> None:
    """A header that promises 60 000 x 60 000 pixels, correct in itself, and the data of a small picture."""
    kind = ("png", "jpg", "gif", "bmp")[rng.integers(4)]
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "jpeg" if kind == "jpg" else kind)
    data = bytearray(buffer.getvalue())
    if kind == "png":
        data[16:24] = struct.pack(">II", 60_000, 60_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "jpg":
        place = data.index(b"\xff\xc0")
        data[place + 5 : place + 9] = struct.pack(">HH", 60_000, 60_000)
    elif kind == "gif":
        data[6:10] = struct.pack("<HH", 60_000, 60_000)
    else:
        data[18:26] = struct.pack("<ii", 60_000, 60_000)
    path.with_suffix(f".{kind}").write_bytes(data)


def silent(source: Path, path: Path, rng) -> None:
    """A container with a video stream and no frame in it."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "+empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


def sound(source: Path, path: Path, rng) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        for _ in range(int(rng.integers(1, 20))):
            samples = rng.normal(0, 0.1, (1, 1024)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def half_written(source: Path, path: Path, rng) -> None:
    """A recording that ended with the power: the index that belongs at the end of the file never came."""
    whole = path.with_suffix(".whole")
    with av.open(str(whole), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(10):
            picture = av.VideoFrame.from_ndarray(rng.integers(0, 255, (64, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    data = whole.read_bytes()
    path.write_bytes(data[: rng.integers(40, data.index(b"moov"))])
    whole.unlink()


# What each must come to: a reason, the crops of the source, or (None) whatever can still be read of it.
FAILED, WHOLE = "failed", "whole"
DAMAGES: dict[Damage, str | None] = {
    truncated: None, flipped: None, zeroed: None, shuffled: None, wrongly_named: WHOLE, unreadable: None, empty: FAILED,
    noise: FAILED, folder: FAILED, pipe: FAILED, dangling: FAILED, huge: FAILED, silent: FAILED, sound: FAILED,
    half_written: FAILED,
}  # fmt: skip


def make(where: Path, found: list[Path], count: int, seed: int) -> pd.DataFrame:
    """`count` damaged files and a good one after every EVERY; one row each: path, damage ("" if good), source."""
    rows, damages = [], list(DAMAGES)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        damage, source = damages[i % len(damages)], found[rng.integers(len(found))]
        own = where / f"{i:04d}"
        own.mkdir(parents=True)
        damage(source, own / f"file{source.suffix}", rng)
        rows.append((next(own.iterdir()), damage.__name__, source))
        if i % EVERY == EVERY - 1:
            good = found[i // EVERY % len(found)]
            rows.append((good, "", good))
    return pd.DataFrame(rows, columns=["path", "damage", "source"])


def through_preprocess(paths: list[Path], work: Path) -> tuple[pd.DataFrame, pd.Series, float]:
    """Items of the paths in order, the hashes of each one's crops, and the seconds that it took."""
    work.mkdir()
    manifest = placeholder_manifest(paths, work / "media")
    write_manifest(manifest, work / "manifest.parquet")
    settings = [f"--set=preprocess.{key}={value}" for key, value in SETTINGS.items()]
    started = time.monotonic()
    command("preprocess", str(work / "manifest.parquet"), str(work / "crops"), "--locator", best_locator(), *settings)
    seconds = time.monotonic() - started
    items, index = read_items(work / "crops"), read_index(work / "crops")
    if items["item_id"].tolist() != manifest["item_id"].tolist():
        raise SystemExit("A row is missing.")
    hashes = index.groupby("item_id")["sha256"].agg(tuple).reindex(items["item_id"])
    return items, hashes.reset_index(drop=True), seconds


def through_score(paths: list[Path], work: Path) -> tuple[pd.DataFrame, float]:
    """The CSV of `unmask score` for the paths in order, as text, and the seconds that it took."""
    torch.manual_seed(0)
    detector = base.build("convnext", backbone="test_convnext", size=64)
    base.save_checkpoint(detector, work / "checkpoint", seed=0, preprocessing=SETTINGS)
    started = time.monotonic()
    command("score", *map(str, paths), "--checkpoint", str(work / "checkpoint"), "--out", str(work / "scores.csv"))
    seconds = time.monotonic() - started
    return pd.read_csv(work / "scores.csv", keep_default_na=False, dtype=str), seconds


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "unmask.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def inputs(work: Path, count: int, seed: int, media: Path | None) -> tuple[str, list[str]]:
    """Make the inputs, run them, and tell: the section as Markdown, and what went wrong."""
    cv2.setNumThreads(1)
    found = sources(work, media)
    table = make(work / "damaged", found, count, seed)
    alone, own, _ = through_preprocess(found, work / "alone")
    items, hashes, seconds = through_preprocess(table["path"].tolist(), work / "all")
    table = table.assign(status=items["status"], reason=items["reason"], seconds=items["seconds"], crops=hashes)
    known = dict(zip(found, zip(alone["status"], own, strict=True), strict=True))
    # `score` takes a folder for what lies in it, and a file once.
    asked = table.drop_duplicates("path").reset_index(drop=True)
    scored, score_seconds = through_score(asked["path"].tolist(), work)
    whole, _ = through_score(found, work)
    faults = check(table, known) + check_scores(asked, scored, whole)
    return report(table, scored, seconds, score_seconds, len(found), media), faults


def check(table: pd.DataFrame, known: dict) -> list[str]:
    """Sentences about rows that are not as they must be."""
    faults = []
    expected = {damage.__name__: what for damage, what in DAMAGES.items()} | {"": WHOLE}
    for row in table.itertuples():
        wanted, name = expected[row.damage], f"{row.damage or 'good'} {row.path}"
        if (row.status == "failed") != bool(row.reason):
            faults.append(f"{name}: {row.status} with the reason {row.reason!r}.")
        if wanted == FAILED and row.status != "failed":
            faults.append(f"{name}: not failed.")
        if wanted == WHOLE and (row.status, row.crops) != known[row.source] and row.status == "ok":
            faults.append(f"{name}: other crops than those of the file alone.")
        if wanted == WHOLE and row.status != known[row.source][0]:
            faults.append(f"{name}: {row.status} ({row.reason}), alone {known[row.source][0]}.")
        if row.reason.startswith(("internal error", "worker process", "decoder crashed", "deadline")):
            faults.append(f"{name}: {row.reason}.")
        if row.seconds > DEADLINE + 2:
            faults.append(f"{name}: took {row.seconds:.0f} s.")
    return faults


def check_scores(asked: pd.DataFrame, scored: pd.DataFrame, whole: pd.DataFrame) -> list[str]:
    """The same of `score`: a row for each, in order, alike in status; the good ones to the last digit as alone."""
    if scored["path"].tolist() != [str(path) for path in asked["path"]]:
        return ["score: not a row for every input, in order."]
    faults = [
        f"score: {path}: {here}, preprocess: {there}."
        for path, here, there in zip(asked["path"], scored["reason"], asked["reason"], strict=True) if here != there
    ]  # fmt: skip
    both = scored.merge(whole, on="path", suffixes=("", "_alone"))
    return faults + [
        f"score: {row.path}: {row.score}, alone {row.score_alone}." for row in both.itertuples()
        if abs(float(row.score or -1) - float(row.score_alone or -1)) > 2e-6
    ]  # fmt: skip


def report(table, scored, seconds, score_seconds, kinds, media) -> str:
    damaged, good = table[table["damage"] != ""], table[table["damage"] == ""]
    rows = []
    for name, part in damaged.groupby("damage", sort=False):
        reasons = part.loc[part["status"] == "failed", "reason"].value_counts()
        told = "; ".join(f"{reason} ({number})" for reason, number in reasons.items())
        rows.append(f"| {name.replace('_', ' ')} | {len(part)} | {(part['status'] == 'ok').sum()} | {told} |")
    real = ", and real media that are not part of the kit" if media else ""
    root = " Run as root, who may read everything." if os.geteuid() == 0 else ""
    about = (
        f"`python benchmarks/hardening.py inputs`: {len(damaged)} damaged files made of {kinds} whole ones (the "
        f"synthetic world in ten formats{real}), {len(good)} whole ones among them; locator {best_locator()}, "
        f"{os.cpu_count()} cores, CPU {processor()}, Python {platform.python_version()}.{root} `preprocess` took "
        f"{seconds:.0f} s and gave {len(table)} rows, the slowest item {table['seconds'].max():.1f} s; `score` took "
        f"{score_seconds:.0f} s and gave {len(scored)}. The whole ones had the same crops and scores as alone, and so "
        "had every wrongly named one."
    )
    header = ["| damage | files | still readable | reasons of the others (files) |", "|---|---|---|---|"]
    return "\n".join([HEADING, "", about, "", *header, *rows]) + "\n"
