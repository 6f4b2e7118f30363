"""Media as they come back from the world: recompressed, resized, blurred, noisy, with gaps. For tests of robustness.

`perturb` changes one picture; `perturbed_crops` makes a folder of perturbed crops that stands in for the one
it was made from: same items, frames and landmarks. `recompress` writes a whole video anew, `kept` loses frames of one.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pandas as pd
from av.container import InputContainer
from av.video.stream import VideoStream

from unmask import sbi
from unmask.data.crops import (
    INDEX_SCHEMA,
    CropError,
    CropStore,
    CropWriter,
    collate,
    encode_crop,
    read_index,
    read_items,
)
from unmask.data.decoding import CONTAINERS
from unmask.data.frames import MediaError
from unmask.data.video import encode
from unmask.profile import digest, source_hash, write_atomic
from unmask.progress import track

LEVELS = {
    "jpeg": (95, 80, 65, 50, 30),
    "resize": (0.75, 0.5, 0.35, 0.25, 0.15),
    "blur": (1, 1.5, 2, 3, 4),
    "noise": (2, 4, 8, 12, 16),
    "h264": (18, 23, 28, 34, 40),
    "drop": (10, 25, 50, 75, 90),
}
"""What is studied, from mild to strong. A kind is NAME-LEVEL: the first four change a picture, as `perturb` says;
h264-C: a video encoded anew at constant rate factor C; drop-P: P % of a clip's frames are lost."""
KINDS = ("jpeg-75", *(f"{name}-{level:g}" for name in list(LEVELS)[:4] for level in LEVELS[name]))
"""Of a picture."""
VIDEO_KINDS = tuple(f"{name}-{level:g}" for name in ("h264", "drop") for level in LEVELS[name])
"""Of a video."""
_SIDE = 256  # pixels; of the picture that the widths of blurs are given for
_PLACE = ("shard", "offset", "size")  # columns that say where a crop lies, not what it is


def perturb(image: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The picture uint8[H,W,3] RGB after one of KINDS, of the same size; the picture given is left as it is.

    jpeg-Q: JPEG of quality Q (4:2:0). resize-F: to the share F of its sides by area, and back by bicubic
    interpolation. blur-S: Gaussian of S pixels in a picture whose shorter side is 256, scaled to this one's.
    noise-S: Gaussian of S grey levels of 255, each value its own; nothing else draws from rng. ValueError for others.
    """
    _check(kind)
    name, _, amount = kind.partition("-")
    height, width = image.shape[:2]
    if name == "jpeg":
        options = [cv2.IMWRITE_JPEG_QUALITY, int(amount)]
        data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1]
        return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    if name == "resize":
        small = tuple(max(round(side * float(amount)), 1) for side in (width, height))
        shrunk = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC)
    if name == "blur":
        return cv2.GaussianBlur(image, (0, 0), float(amount) * min(height, width) / _SIDE)
    noise = rng.normal(0, float(amount), image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def perturbed_crops(
    crops: str | os.PathLike, rows: pd.DataFrame, out: str | os.PathLike, kind: str, seed: int = 0
) -> Path:
    """Make `out` a folder of crops like `crops`, of the perturbed pictures of `rows` alone; returns it.

    rows: of `read_index(crops)`, further columns are ignored. Item ids, frames, times, boxes and landmarks stay;
    pictures are stored without loss (png), whatever the encoding of the originals. Each one's noise hangs on the seed,
    its item and its frame alone. A folder made before from the same rows, kind and seed is kept; another one is
    replaced once the new one is whole. Stopped at any point, the same call goes on from its last item. ValueError for
    an unknown kind; CropError for damaged crops, an `out` that holds anything else, or one that is being written.
    """
    _check(kind)
    crops, out = Path(crops), Path(out)
    rows = rows.sort_values(["item_id", "frame"]).drop_duplicates(["item_id", "frame"])
    parts = {name: part.to_dict("records") for name, part in rows.groupby("item_id")}
    source = source_hash(sys.modules[__name__])
    keys = {name: digest([source, kind, seed, [_facts(row) for row in part]]) for name, part in parts.items()}
    items = read_items(crops)
    items = items[items["item_id"].isin(list(parts))].to_dict("records")
    if len(items) < len(parts):
        raise CropError(
            f"{len(parts) - len(items)} items of the given rows are not in {crops}; give rows of its index."
        )
    store = CropStore(crops)
    settings = store.settings() | {"encoding": "png"}
    settings |= {"perturbation": {"kind": kind, "seed": seed, "rows": digest([keys, store.settings()])}}
    if _is_made(out, crops, settings):
        return out
    partial = out.with_name(f".{out.name}.partial")
    with CropWriter(partial, 0, 1) as writer:
        wanted = [(item["item_id"], keys[item["item_id"]]) for item in items]
        done = writer.resume(wanted)
        for key, item in track(zip(wanted[done:], items[done:], strict=True), len(items) - done, f"perturbing, {kind}"):
            found = [_crop(store, row, kind, seed) for row in parts[item["item_id"]]]
            writer.add(key, item | {"faces": len(found)}, found, "png")
        writer.finish()
        collate(partial, 1)
        write_atomic(partial / "settings.json", json.dumps(settings, indent=1, sort_keys=True) + "\n")
        _replace(out, partial)
    return out


def recompress(source: str | os.PathLike, target: str | os.PathLike, crf: int) -> Path:
    """Write all frames of a video as H.264 of constant rate factor `crf` (0 to 51, 51 the worst); returns `target`.

    Every frame stays, upright and at the video's mean rate; of an odd width or height the last pixels are lost, as
    4:2:0 video has even ones. For media that could be decoded before: the native decoder runs in this process.
    MediaError for others.
    """
    try:
        with av.open(str(source), options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS}) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise MediaError("no video stream")
            rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            return encode(target, _upright(container, stream), rate, crf)
    except (av.error.FFmpegError, ValueError) as error:  # ValueError: no frames, or frames that change size
        raise MediaError("cannot be encoded anew") from error


def _upright(container: InputContainer, stream: VideoStream) -> Iterator[np.ndarray]:
    """All frames as displayed, uint8[H,W,3], one after another: a whole video may not fit the memory."""
    stream.codec_context.thread_count = 1
    for frame in container.decode(stream):
        picture = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation % 360 // 90)
        yield picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]


def kept(count: int, lost: float, rng: np.random.Generator) -> np.ndarray:
    """Positions int[K] in order of what is left of a clip's `count` frames after `lost` % of them; at least one.

    The same rng gives losses that hold each other: what 25 % lose, 50 % lose too.
    """
    order = rng.permutation(count)
    return np.sort(order[min(round(count * lost / 100), count - 1) :])


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"There is no perturbation {kind!r}; choose one of {', '.join(KINDS)}.")


def _facts(row: dict) -> dict:
    """The columns of an index row that say what a crop is, as JSON knows them, and its content."""
    facts = {name: row[name] for name in INDEX_SCHEMA.columns if name not in _PLACE}
    return facts | {"landmarks": np.asarray(row["landmarks"]).tolist()}


def _crop(store: CropStore, row: dict, kind: str, seed: int) -> dict:
    """What `CropWriter.add` takes: the row's facts and the perturbed picture."""
    rng = sbi.sample_rng(seed, row["item_id"], row["frame"], 0)
    facts = {name: value for name, value in _facts(row).items() if name != "sha256"}
    return facts | {"data": encode_crop(perturb(store.image(row, check=True), kind, rng), "png")}


def _is_made(out: Path, crops: Path, settings: dict) -> bool:
    """Whether `out` holds just these crops. CropError if it holds what this module has not made."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if "perturbation" not in found or out.resolve() == crops.resolve():
        raise CropError(f"{out} holds something else than perturbed crops of {crops}; give another folder.")
    try:
        shards = set(read_index(out)["shard"])
    except CropError:
        return False
    return found == settings and all((out / "shards" / name).is_file() for name in shards)


def _replace(out: Path, partial: Path) -> None:
    """Give the finished folder its name. Killed in between, there is no folder of that name, never half of one."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)
