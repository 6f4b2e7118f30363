"""Decode one picture or video to RGB frames. Runs inside the child process of `unmask.data.video`; see there.

Native decoders can hang or crash on damaged files, so nothing here is called in the process that does the work.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass
from typing import BinaryIO

import av
import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PICTURES = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF")
# Playlists and other formats that name further files or addresses are refused.
CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,mxf,h264,hevc,ivf,m4v,mjpeg,wav,mp3,aac,flac"


class MediaError(RuntimeError):
    """A picture or video cannot be read; `reason` is one short sentence that stays the same for the same cause."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Scan:
    """What the container says, without decoding more than one frame.

    `pts` float[N] are seconds in display order; `intact` is False if packets are missing or cut short.
    """

    width: int
    height: int
    fps: float
    pts: np.ndarray
    codec: str
    rotation: int
    intact: bool


def spread(total: int, count: int) -> np.ndarray:
    """Indices int[min(count, total)] of frames spread evenly over `total`: the middles of `count` equal parts."""
    count = min(count, total)
    return ((np.arange(count) + 0.5) * total / max(count, 1)).astype(int)


def _open(path: str):
    try:
        return av.open(path, options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS})
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError("not a readable picture or video") from error


def _video_stream(container):
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise MediaError("no video stream")
    if stream.codec_context is None:
        raise MediaError("no decoder for this video codec")
    stream.codec_context.thread_count = 1
    return stream


def _packets(container, stream):
    """Packets of the stream up to its end or to the first damage of the container, then None for the flush."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except av.error.FFmpegError:
        pass  # A truncated file ends here; what was read so far counts.
    yield None


def _frames(container, stream):
    """Decodable frames in display order; packets that the decoder rejects are passed over."""
    for packet in _packets(container, stream):
        try:
            yield from stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            continue


def scan(path: str) -> Scan:
    """Read sizes, rate and time stamps of a video. Raises MediaError if there is no decodable video."""
    with _open(path) as container:
        stream = _video_stream(container)
        first = next(_frames(container, stream), None)
        if first is None:
            raise MediaError("no decodable frame")
        size, rotation = (first.width, first.height), first.rotation % 360
        fps, codec = float(stream.average_rate or stream.guessed_rate or 25), stream.codec_context.name
    with _open(path) as container:
        stream = _video_stream(container)
        packets = list(_packets(container, stream))[:-1]
        intact = stream.frames in (0, len(packets)) and not any(p.is_corrupt for p in packets)
        stamps = [p.pts for p in packets if not p.is_discard]
        if any(stamp is None for stamp in stamps):
            pts = np.arange(len(stamps)) / fps
        else:
            pts = np.sort(np.array(stamps, np.float64)) * float(stream.time_base)
    width, height = size if rotation in (0, 180) else size[::-1]
    return Scan(width, height, fps, pts, codec, rotation, intact)


def shrink(frame: np.ndarray, max_side: int | None) -> np.ndarray:
    """Downscale uint8[H,W,3] so that its long side is at most `max_side`; smaller frames stay as they are."""
    height, width = frame.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return np.ascontiguousarray(frame)
    scale = max_side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def _with_decord(path: str, count: int, max_side: int | None, found: Scan):
    """Frames by random access, or None where PyAV has to do it: no wheel, or a file that decord cannot read.

    decord may give wrong frames, or loop for ever, on a file that promises more frames than it has.
    """
    if not found.intact:
        return None
    try:
        import decord
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(path, num_threads=1)
        if len(reader) != len(found.pts):
            return None
        indices = spread(len(reader), count)
        return [shrink(reader[int(i)].asnumpy(), max_side) for i in indices], indices, found.pts[indices]
    except (decord.DECORDError, RuntimeError, IndexError):
        return None


def _with_pyav(path: str, count: int, max_side: int | None, found: Scan):
    """Decode in sequence. If fewer or more frames come than packets promised, spread again over what came."""
    total = len(found.pts)
    while True:
        wanted = set(spread(total, count).tolist())
        frames, indices, pts, decoded = [], [], [], 0
        with _open(path) as container:
            stream = _video_stream(container)
            for i, frame in enumerate(_frames(container, stream)):
                decoded = i + 1
                if i in wanted:
                    picture = np.rot90(frame.to_ndarray(format="rgb24"), found.rotation // 90)
                    frames.append(shrink(picture, max_side))
                    indices.append(i)
                    pts.append(i / found.fps if frame.pts is None else float(frame.pts * stream.time_base))
        if decoded == 0:
            raise MediaError("no decodable frame")
        if decoded == total:
            return frames, np.array(indices), np.array(pts)
        total = decoded


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """Any Pillow mode to uint8[H,W,3]: 16 bits keep their high byte, transparency becomes black."""
    if picture.mode.startswith("I"):
        grey = np.clip(np.asarray(picture).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode == "F":
        raise MediaError("pictures of floating-point numbers are not supported")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return np.asarray(picture.convert("RGB"))


def _picture(path: str, count: int, max_side: int | None) -> tuple[dict, list[np.ndarray]]:
    """Still or animated picture through Pillow; EXIF rotation is applied. UnidentifiedImageError if it is neither."""
    try:
        with Image.open(path, formats=PICTURES) as file:
            total = getattr(file, "n_frames", 1) if file.format in ("GIF", "WEBP", "AVIF", "PNG") else 1
            indices, frames, pts, clock = spread(total, count), [], [], 0.0
            for i in range(int(indices[-1]) + 1):
                file.seek(i)
                file.load()
                if i in indices:
                    full = _to_rgb(ImageOps.exif_transpose(file))
                    frames.append(shrink(full, max_side))
                    pts.append(clock)
                clock += file.info.get("duration", 0) / 1000
            codec = str(file.format).lower()
    except UnidentifiedImageError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError("picture larger than 179 megapixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise MediaError("damaged picture") from error
    fps = (int(indices[-1]) + 1) / clock if clock else 0.0
    facts = {"width": full.shape[1], "height": full.shape[0], "fps": fps, "total": total, "codec": codec}
    return facts | {"indices": indices.tolist(), "pts": pts, "decoder": "pillow"}, frames


def read(path: str, count: int, max_side: int | None, decoders: list[str]) -> tuple[dict, list[np.ndarray]]:
    """Facts and up to `count` RGB frames of a picture or video by the first decoder that manages.

    With a count of 0 only the facts are of use. Raises MediaError.
    """
    try:
        return _picture(path, max(count, 1), max_side)
    except UnidentifiedImageError:
        found = scan(path)
    facts = {"width": found.width, "height": found.height, "fps": found.fps, "codec": found.codec}
    facts["total"] = len(found.pts)
    if count == 0:
        return facts | {"indices": [], "pts": [], "decoder": "none"}, []
    name, result = "decord", _with_decord(path, count, max_side, found) if "decord" in decoders else None
    if result is None:
        name, result = "pyav", _with_pyav(path, count, max_side, found)
    frames, indices, pts = result
    return facts | {"indices": indices.tolist(), "pts": pts.tolist(), "decoder": name}, frames


def answer(request: dict) -> tuple[dict, list[np.ndarray]]:
    """Serve one request of `unmask.data.video`: facts and frames, or {"error": reason}."""
    try:
        facts, frames = read(**request)
    except MediaError as error:
        return {"error": error.reason}, []
    except MemoryError:
        return {"error": "too large for the memory"}, []
    except PermissionError:
        return {"error": "permission denied"}, []
    same = [frame for frame in frames if frame.shape == frames[0].shape]
    if len(same) != len(frames):
        return {"error": "frame size changes within the clip"}, []
    return facts | {"shape": list(frames[0].shape) if frames else [0, 0, 3]}, frames


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer JSON lines with a JSON line and the raw frames, until the parent closes the pipe."""
    for line in requests:
        facts, frames = answer(json.loads(line))
        replies.write(json.dumps(facts).encode() + b"\n")
        for frame in frames:
            replies.write(memoryview(np.ascontiguousarray(frame)).cast("B"))
        replies.flush()


if __name__ == "__main__":
    # Libraries that print must not disturb the replies.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    cv2.setNumThreads(1)
    av.logging.set_level(av.logging.PANIC)
    warnings.simplefilter("ignore")
    serve(sys.stdin.buffer, pipe)
