"""Read frames from any picture or video with a hard deadline, and write H.264.

Decoding runs in a child process that stays warm between clips. A clip that hangs or crashes the native decoder costs
that child, which is killed and replaced; the caller gets a MediaError with a reason. Frames come back through the
child's pipe straight into one array: for clips of this kit that costs less than a tenth of the decoding.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from unmask.data import decoding
from unmask.data.frames import MediaError, check_sampling
from unmask.machine import writing

__all__ = ["Clip", "MediaError", "MediaInfo", "encode", "probe", "read_frames"]


@dataclass(frozen=True)
class Clip:
    """Frames of one medium.

    `frames` uint8[T,H,W,3] RGB, `indices` int64[T] in display order, `pts` float64[T] seconds, `decoder`
    decord|pyav|pillow, `fps` (0 for a still), `width` and `height` of the source as displayed (or stored, if read so),
    `scale` = frame pixels per source pixel, `total` frames in the source as its container counts them, `qp` float32[T]
    mean H.264 quantiser of each frame, NaN where unknown or not asked for, `orientation` the file's mark, 1 to 8
    as in EXIF, whether it was applied or not (`unmask.data.frames.as_stored` undoes it).
    """

    frames: np.ndarray
    indices: np.ndarray
    pts: np.ndarray
    decoder: str
    fps: float
    width: int
    height: int
    scale: float
    total: int
    qp: np.ndarray
    orientation: int


@dataclass(frozen=True)
class MediaInfo:
    """What `probe` tells: displayed size in pixels, frames as counted in the container, rate and codec name."""

    width: int
    height: int
    frames: int
    fps: float
    codec: str


class _Timeout(Exception):
    pass


class _Crash(Exception):
    pass


class _Killed(_Crash):
    """By a signal that no fault of the decoder sends: by a person, a job system or a machine without memory."""


class _Decoder:
    """The warm child process: one request at a time, killed when its time is up."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._errors = tempfile.TemporaryFile()
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def _start(self) -> subprocess.Popen:
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._errors.seek(0)
        self._errors.truncate()
        return subprocess.Popen(
            [sys.executable, "-m", decoding.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )

    def ask(self, request: dict, seconds: float) -> tuple[dict, np.ndarray | None]:
        """Send one request; returns facts and frames. Raises MediaError, _Timeout or _Crash."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process, late = self._process, threading.Event()

            def stop() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(max(seconds, 0.01), stop)
            timer.start()
            try:
                reply = self._exchange(process, request)
            except (BrokenPipeError, EOFError) as error:
                code = process.wait()  # Its end of the pipe is closed: it is dead or dying.
                if late.is_set():
                    raise _Timeout from error
                raise self._crash(code) from error
            finally:
                timer.cancel()
        facts, frames = reply
        if "error" in facts:
            raise MediaError(facts["error"])
        return facts, frames

    @staticmethod
    def _exchange(process: subprocess.Popen, request: dict) -> tuple[dict, np.ndarray | None]:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        facts = json.loads(line)
        if "error" in facts:
            return facts, None
        frames = np.empty((len(facts["indices"]), *facts["shape"]), np.uint8)
        if frames.size and process.stdout.readinto(memoryview(frames).cast("B")) != frames.nbytes:
            raise EOFError
        return facts, frames

    def _crash(self, code: int) -> Exception:
        if code < 0:
            return (_Killed if code == -signal.SIGKILL else _Crash)(signal.Signals(-code).name)
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return RuntimeError(f"The decoding process stopped with exit code {code}: {' '.join(last)}")

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()


_decoder: _Decoder | None = None


def _child() -> _Decoder:
    """This process's decoder; a forked process gets its own, since two readers would mix up the pipe."""
    global _decoder
    if _decoder is None or _decoder._owner != os.getpid():
        _decoder = _Decoder()
        atexit.register(_decoder.close)
    return _decoder


def _check_file(path: Path) -> None:
    try:
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # opening a pipe waits for ever
            raise MediaError("a pipe or device, not a file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise MediaError("empty file")
    except FileNotFoundError as error:
        raise MediaError("file not found") from error
    except IsADirectoryError as error:
        raise MediaError("a folder, not a file") from error
    except PermissionError as error:
        raise MediaError("permission denied") from error
    except OSError as error:
        raise MediaError("file cannot be opened") from error


def _ask(request: dict, seconds: float):
    try:
        return _child().ask(request, seconds)
    except _Killed:  # perhaps an accident: what it says of the file counts the second time
        return _child().ask(request, seconds)


def _request(path: str | os.PathLike, count: int, deadline: float, max_side: int | None = None, **view):
    """Ask for frames: decord first with half the time, then PyAV in what is left if decord hung or crashed."""
    path = Path(path).absolute()
    _check_file(path)
    request = {"path": str(path), "count": count, "max_side": max_side} | view
    end = time.monotonic() + deadline
    if not (view.get("keyframes") or view.get("qp")):  # decord can do neither.
        try:
            return _ask(request | {"decoders": ["decord", "pyav"]}, deadline / 2)
        except (_Timeout, _Crash):
            pass  # The other decoder may manage.
    try:
        return _ask(request | {"decoders": ["pyav"]}, end - time.monotonic())
    except _Timeout as error:
        raise MediaError(f"deadline of {deadline:g} s exceeded") from error
    except _Crash as error:
        raise MediaError(f"decoder crashed ({error})") from error


def read_frames(
    path: str | os.PathLike,
    count: int,
    deadline: float = 30.0,
    max_side: int | None = None,
    upright: bool = True,
    crop: int | None = None,
    keyframes: bool = False,
    qp: bool = False,
    sampling: str = "uniform",
    fps: float = 0.0,
) -> Clip:
    """Read `count` frames of a picture (T=1), animation or video; all of them if there are fewer.

    With `sampling="uniform"` frame i is the middle of the i-th of `count` equal parts of the clip. With "dense" they
    follow each other in the middle of the clip, `fps` a second, 0 for every frame, and are chosen by time stamp
    (`unmask.data.frames.in_a_row`); a clip that lasts too short gives fewer. Rotation marks are applied, `pts` are the
    true time stamps, and of a damaged file the decodable frames count. `max_side` shrinks each frame as it is
    decoded, so that a large clip never needs all its pixels in memory. `deadline` is in seconds, for the whole call.

    For sensor noise: `upright=False` gives frames as stored, whatever their rotation mark. `crop` cuts each frame as it
    is decoded to its centre, at most `crop` pixels high and wide, from the even row and column that
    `unmask.data.frames.crop_origin` tells. `keyframes` spreads over a video's key frames alone, and no others are
    decoded. `qp` fills `Clip.qp`, for H.264 alone.

    Raises MediaError with a short reason for any file that gives no frame; ValueError if count < 1, crop < 1, for a
    crop together with max_side, dense key frames or a sampling that does not exist.
    """
    if count < 1:
        raise ValueError("Ask for at least one frame.")
    if crop is not None and (crop < 1 or max_side is not None):
        raise ValueError("A crop has at least one pixel, and its frames are not shrunk: leave out max_side.")
    check_sampling(sampling, fps)
    if keyframes and sampling != "uniform":
        raise ValueError("Key frames are not in a row: sample them uniformly.")
    view = {"upright": upright, "crop": crop, "keyframes": keyframes, "qp": qp, "sampling": sampling, "fps": fps}
    facts, frames = _request(path, count, deadline, max_side, **view)
    return Clip(
        frames=frames,
        indices=np.array(facts["indices"], np.int64),
        pts=np.array(facts["pts"], np.float64),
        decoder=facts["decoder"],
        fps=facts["fps"],
        width=facts["width"],
        height=facts["height"],
        scale=1.0 if crop else max(frames.shape[1:3]) / max(facts["width"], facts["height"]),
        total=facts["total"],
        qp=np.array(facts.get("qp", [math.nan] * len(frames)), np.float32),
        orientation=facts["orientation"],
    )


def probe(path: str | os.PathLike, deadline: float = 10.0) -> MediaInfo:
    """Size, frame count, rate and codec of a medium, decoding at most one frame of a video. Raises MediaError."""
    facts, _ = _request(path, 0, deadline)
    return MediaInfo(facts["width"], facts["height"], facts["total"], facts["fps"], facts["codec"])


def encode(
    path: str | os.PathLike,
    frames: Iterable[np.ndarray],
    fps: float | Fraction = 25,
    crf: int = 23,
    gop: int = 12,
    bframes: int = 2,
    preset: str = "medium",
    pix_fmt: str = "yuv420p",
) -> Path:
    """Write RGB frames uint8[H,W,3] as H.264 (.mp4 or .mkv), the same bytes each time, atomically.

    One thread and no CPU-dependent code paths in x264; `gop` is the largest distance of key frames. Raises
    ValueError for no frames, frames that change size, or odd sizes with 4:2:0 sub-sampling.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    options = {"crf": str(crf), "g": str(gop), "bf": str(bframes), "preset": preset}
    options["x264-params"] = "threads=1:lookahead-threads=1:cpu-independent=1"
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("There are no frames to encode.")
    height, width = first.shape[:2]
    if pix_fmt == "yuv420p" and (height % 2 or width % 2):
        raise ValueError(f"4:2:0 video needs an even width and height, not {width}x{height}.")
    try:
        with writing(path.parent), av.open(str(part), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            stream.codec_context.thread_count = 1
            picture = first
            while picture is not None:
                if picture.shape != first.shape:
                    raise ValueError("All frames of a video must have the same size.")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
                picture = next(frames, None)
            container.mux(stream.encode())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
