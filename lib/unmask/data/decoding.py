"""Decode one picture or video to RGB frames. Runs inside the child process of `unmask.data.video`; see there.

Native decoders can hang or crash on damaged files, so nothing here is called in the process that does the work.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import warnings
from dataclasses import dataclass
from typing import BinaryIO

import av
import cv2
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from PIL import UnidentifiedImageError

from unmask.data.frames import MediaError, choose, fit, spread
from unmask.data.pictures import read_picture

# Playlists and other formats that name further files or addresses are refused.
CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,mxf,h264,hevc,ivf,m4v,mjpeg,wav,mp3,aac,flac"
# FFmpeg's AVVideoEncParams (libavutil/video_enc_params.h): number, offset and size of the blocks, type, base
# quantiser, eight offsets for colour planes. A block is its place and size, then its difference from the base.
_ENC_PARAMS = struct.Struct("@INNii8i")
_BLOCK = struct.Struct("@iiiii")
_TYPE_H264 = 1
SIZE_CHANGES = "frame size changes within the clip"
TOO_LARGE = "too large for the memory"


@dataclass
class Scan:
    """What the container says, without decoding more than one frame.

    `width` and `height` are those of the displayed frame, `rotation` the quarter turns to it in degrees; `pts` float[N]
    are seconds in display order; `intact` is False if packets are missing or cut short; `keys` maps the place of each
    undamaged key frame's packet in the file to the place of the frame in display order.
    """

    width: int
    height: int
    fps: float
    pts: np.ndarray
    codec: str
    rotation: int
    intact: bool
    keys: dict[int, int]

    def size(self, upright: bool) -> tuple[int, int]:
        """Width and height of the frames as displayed or as stored."""
        turned = self.rotation not in (0, 180) and not upright
        return (self.height, self.width) if turned else (self.width, self.height)


@dataclass(frozen=True)
class View:
    """How frames are wanted: as displayed or as stored, cut to a centre of `crop` pixels, with their quantisers.

    And which of them: `sampling` and `fps` as in `unmask.data.frames.choose`.
    """

    upright: bool = True
    crop: int | None = None
    qp: bool = False
    sampling: str = "uniform"
    fps: float = 0.0

    def choose(self, times: np.ndarray, count: int) -> np.ndarray:
        """The wanted ones of frames with these time stamps."""
        return choose(times, count, self.sampling, self.fps)


PLAIN = View()


def _open(path: str):
    try:
        return av.open(path, options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS})
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError("not a readable picture or video") from error


def _video_stream(container, qp: bool = False):
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise MediaError("no video stream")
    if stream.codec_context is None:
        raise MediaError("no decoder for this video codec")
    stream.codec_context.thread_count = 1
    if qp:
        stream.codec_context.options = stream.codec_context.options | {"export_side_data": "venc_params"}
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
        shown = [i for i, p in enumerate(packets) if not p.is_discard]
        stamps = [packets[i].pts for i in shown]
        if any(stamp is None for stamp in stamps):
            pts, order = np.arange(len(stamps)) / fps, range(len(stamps))
        else:
            order = np.argsort(stamps, kind="stable")
            pts = np.array(stamps, np.float64)[order] * float(stream.time_base)
        places = {shown[j]: place for place, j in enumerate(order)}
        keys = {i: places[i] for i in shown if packets[i].is_keyframe and not packets[i].is_corrupt}
    width, height = size if rotation in (0, 180) else size[::-1]
    return Scan(width, height, fps, pts, codec, rotation, intact, keys)


def mean_qp(frame: av.VideoFrame) -> float:
    """Mean H.264 quantiser QP_Y (0 to 51 for 8 bits) over the macroblocks of a frame; NaN if it was not exported.

    FFmpeg attaches it as side data when asked to; the bytes are checked, since their layout may change.
    """
    try:
        data = next((bytes(item) for item in frame.side_data if item.type == SideDataType.VIDEO_ENC_PARAMS), b"")
    except ValueError:  # PyAV refuses kinds that it does not know, such as EXIF.
        return math.nan
    if len(data) < _ENC_PARAMS.size:
        return math.nan
    count, offset, size, kind, base = _ENC_PARAMS.unpack_from(data)[:5]
    if kind != _TYPE_H264 or size < _BLOCK.size or offset < _ENC_PARAMS.size or offset + count * size > len(data):
        return math.nan
    differences = np.ndarray(count, np.int32, data, offset + _BLOCK.size - 4, size) if count else np.zeros(1)
    # FFmpeg counts from 0, the standard from -6 for each bit beyond 8, so that 51 is equally coarse at any depth.
    beyond = 6 * (frame.format.components[0].bits - 8)
    qp = base + float(differences.mean()) - beyond
    return qp if -beyond <= qp <= 51 else math.nan


def _rgb(frame: av.VideoFrame, max_side: int | None, found: Scan, view: View) -> np.ndarray:
    """The wanted pixels of a frame. Raises MediaError if a crop would not show that the frame size has changed."""
    turns = found.rotation // 90 if view.upright else 0
    picture = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    if view.crop is not None and picture.shape[1::-1] != found.size(view.upright):
        raise MediaError(SIZE_CHANGES)
    return fit(picture, max_side, view.crop)


def _with_decord(path: str, count: int, max_side: int | None, found: Scan, view: View = PLAIN):
    """Frames by random access, or None where PyAV has to do it: no wheel, or a file that decord cannot read.

    decord may give wrong frames, or loop for ever, on a file that promises more frames than it has.
    """
    hidden = found.codec == "mjpeg" and not view.upright  # Its mark may be in the pictures, where decord does not look.
    if not found.intact or hidden:
        return None
    try:
        import decord
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    back = 0 if view.upright else -found.rotation // 90  # decord always applies the mark.
    try:
        reader = decord.VideoReader(path, num_threads=1)
        if len(reader) != len(found.pts):
            return None
        indices = view.choose(found.pts, count)
        frames = [fit(np.rot90(reader[int(i)].asnumpy(), back), max_side, view.crop) for i in indices]
        return frames, indices, {"pts": found.pts[indices].tolist()}
    except (decord.DECORDError, RuntimeError, IndexError):
        return None


def _with_pyav(path: str, count: int, max_side: int | None, found: Scan, view: View = PLAIN):
    """Decode in sequence. If fewer or more frames come than packets promised, choose again from what came."""
    expected = found.pts
    while True:
        wanted = set(view.choose(expected, count).tolist())
        frames, indices, qps, stamps = [], [], [], []
        with _open(path) as container:
            stream = _video_stream(container, view.qp)
            for i, frame in enumerate(_frames(container, stream)):
                stamps.append(i / found.fps if frame.pts is None else float(frame.pts * stream.time_base))
                if i in wanted:
                    frames.append(_rgb(frame, max_side, found, view))
                    indices.append(i)
                    qps.append(mean_qp(frame) if view.qp else math.nan)
        if not stamps:
            raise MediaError("no decodable frame")
        if len(stamps) == len(expected):
            return frames, np.array(indices), {"pts": [stamps[i] for i in indices], "qp": qps}
        expected = np.array(stamps)


def _alone(context: av.VideoCodecContext, packet: av.Packet) -> av.VideoFrame | None:
    """The frame of one key frame's packet, whatever was decoded before; None if the decoder rejects it."""
    try:
        frames = [*context.decode(packet), *context.decode(None)]
    except av.error.FFmpegError:
        frames = []
    context.flush_buffers()
    return frames[0] if frames else None


def _key_frames(path: str, count: int, max_side: int | None, found: Scan, view: View):
    """Decode nothing but the wanted key frames. If some of them fail, spread again over the others."""
    keys = sorted(found.keys)
    while keys:
        wanted = [keys[i] for i in spread(len(keys), count)]
        frames, qps, failed = [], [], []
        with _open(path) as container:
            stream = _video_stream(container, view.qp)
            for i, packet in enumerate(_packets(container, stream)):
                if i not in wanted:
                    continue
                frame = _alone(stream.codec_context, packet)
                if frame is None:
                    failed.append(i)
                else:
                    frames.append(_rgb(frame, max_side, found, view))
                    qps.append(mean_qp(frame) if view.qp else math.nan)
        if not failed:
            indices = np.array([found.keys[i] for i in wanted])
            return frames, indices, {"pts": found.pts[indices].tolist(), "qp": qps}
        keys = [i for i in keys if i not in failed]
    raise MediaError("no decodable key frame")


def read(
    path: str,
    count: int,
    max_side: int | None,
    decoders: list[str],
    keyframes: bool = False,
    **view: bool | int | None,
) -> tuple[dict, list[np.ndarray]]:
    """Facts and up to `count` RGB frames of a picture or video by the first decoder that manages.

    `view` has the fields of View. With a count of 0 only the facts are of use. Raises MediaError.
    """
    view = View(**view)
    try:
        return read_picture(path, max(count, 1), max_side, view.upright, view.crop, view.sampling, view.fps)
    except UnidentifiedImageError:
        found = scan(path)
    width, height = found.size(view.upright)
    facts = {"width": width, "height": height, "fps": found.fps, "codec": found.codec, "total": len(found.pts)}
    facts["orientation"] = (1, 8, 3, 6)[found.rotation // 90]  # by quarter turns, as np.rot90 counts them
    if count == 0:
        return facts | {"indices": [], "pts": [], "decoder": "none"}, []
    name, result = "pyav", None
    if keyframes:
        result = _key_frames(path, count, max_side, found, view)
    elif "decord" in decoders:
        name, result = "decord", _with_decord(path, count, max_side, found, view)
    if result is None:
        name, result = "pyav", _with_pyav(path, count, max_side, found, view)
    frames, indices, more = result
    return facts | {"indices": indices.tolist(), "decoder": name} | more, frames


def answer(request: dict) -> tuple[dict, list[np.ndarray]]:
    """Serve one request of `unmask.data.video`: facts and frames, or {"error": reason}."""
    try:
        facts, frames = read(**request)
    except MediaError as error:
        return {"error": error.reason}, []
    except MemoryError:
        return {"error": TOO_LARGE}, []
    except cv2.error as error:
        if error.code != cv2.Error.StsNoMem:
            raise
        return {"error": TOO_LARGE}, []
    except PermissionError:
        return {"error": "permission denied"}, []
    same = [frame for frame in frames if frame.shape == frames[0].shape]
    if len(same) != len(frames):
        return {"error": SIZE_CHANGES}, []
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
