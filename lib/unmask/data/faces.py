"""Where the face is: interchangeable face locators and a tracker that keeps to one person."""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from unmask.data.landmarks import CANONICAL_68, bounding_box, fit_affine, full_landmarks
from unmask.profile import models_folder

YUNET_FILES = ("face_detection_yunet.onnx", "face_detection_yunet_2023mar.onnx")
YUNET_SHA256 = {
    "25a606a145a5b6d7271ae138fbd00eba91dad8b83222ae3f2c7ecd0f4a7b0e31": "libfacedetection.train",
    "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4": "opencv_zoo 2023mar",
}

# What NumPy raises for an .npz that is none, or broken somewhere.
DAMAGED = (
    OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, RuntimeError, OverflowError, SyntaxError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip

# InsightFace's 106 points in iBUG-68 order: jaw, brows, nose, eyes, mouth.
POINTS_106_TO_68 = np.array(
    [1, 10, 12, 14, 16, 3, 5, 7, 0, 23, 21, 19, 32, 30, 28, 26, 17]
    + [43, 48, 49, 51, 50, 102, 103, 104, 105, 101]
    + [72, 73, 74, 86, 78, 79, 80, 85, 84]
    + [35, 41, 42, 39, 37, 36, 89, 95, 96, 93, 91, 90]
    + [52, 64, 63, 71, 67, 68, 61, 58, 59, 53, 56, 55, 65, 66, 62, 70, 69, 57, 60, 54]
)


class LocatorError(RuntimeError):
    """A face locator cannot be used; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Face:
    """One face: `box` x0, y0, x1, y1 float32[4], `score` in 0..1, `points` float32[K,2], K = 5, 68 or 81; pixels."""

    box: np.ndarray
    score: float
    points: np.ndarray


class FaceLocator(Protocol):
    """Finds faces in an RGB frame uint8[H,W,3]. `hash` is the sha256 of what decides its answers (weights, file)."""

    name: str
    hash: str

    def locate(self, frame: np.ndarray, index: int = 0) -> list[Face]: ...


def build_locator(name: str, **options) -> FaceLocator:
    """Build the locator `annotations` (needs path=, scale=), `yunet`, `uniface` or `haar`. Raises LocatorError."""
    kinds = {"annotations": AnnotationLocator, "yunet": YuNetLocator, "uniface": UniFaceLocator, "haar": HaarLocator}
    if name not in kinds:
        raise LocatorError(f"There is no face locator '{name}'; choose one of {', '.join(kinds)}.")
    return kinds[name](**options)


def file_sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class AnnotationLocator:
    """Known landmarks from an .npz with `landmarks` float[T, 68 or 81, 2], looked up by frame index.

    `scale` turns source pixels into the pixels of the given frames. Frames that are not annotated, or whose points
    are not finite, have no face. Raises LocatorError for a missing or malformed file.
    """

    name = "annotations"

    def __init__(self, path: str | os.PathLike, scale: float = 1.0):
        try:
            with np.load(path, allow_pickle=False) as archive:
                marks = archive["landmarks"]
                if marks.dtype.kind not in "fiu":  # a cast would make numbers of dates, and drop halves of complex ones
                    raise ValueError(f"landmarks are numbers, not {marks.dtype}")
                self.landmarks = marks.astype(np.float32) * np.float32(scale)
        except FileNotFoundError as error:
            raise LocatorError("annotation file not found") from error
        except DAMAGED as error:
            raise LocatorError("annotation file is not an .npz with an array 'landmarks'") from error
        if self.landmarks.ndim != 3 or self.landmarks.shape[1:] not in ((68, 2), (81, 2)):
            raise LocatorError(f"annotated landmarks have shape {self.landmarks.shape}, not (frames, 68 or 81, 2)")
        self.hash = file_sha256(path)

    def locate(self, frame: np.ndarray, index: int = 0) -> list[Face]:
        if index >= len(self.landmarks) or not np.isfinite(self.landmarks[index]).all():
            return []
        points = self.landmarks[index]
        return [Face(bounding_box(points), 1.0, points)]


def find_yunet() -> Path:
    """Path of the YuNet weights in $UNMASK_MODELS, else in data/models. Raises LocatorError with how to get them."""
    folder = models_folder()
    for name in YUNET_FILES:
        if (folder / name).is_file():
            return folder / name
    raise LocatorError(
        f"The YuNet weights are not in {folder}: `unmask fetch yunet` downloads {YUNET_FILES[1]} of opencv_zoo "
        "(without a network it says from where, and where to put it), or point UNMASK_MODELS to the folder that has it."
    )


class YuNetLocator:
    """OpenCV's YuNet (Wu et al. 2023), 5 points. Trained on faces of about 10 to 300 pixels, so frames are shrunk."""

    name = "yunet"
    # Long side of the searched picture, and border as a share of it. The later ones are tried only if nothing was
    # found: enlarged for tiny faces, then small and padded for a face that fills the frame.
    SEARCHES = ((640, 0.0), (1280, 0.0), (240, 0.5))
    # OpenCV 4.14 reads memory that was never written where a side has at most 32 pixels, and "finds" faces in it.
    SMALLEST = 64

    def __init__(self, path: str | os.PathLike | None = None, threshold: float = 0.6):
        path = find_yunet() if path is None else Path(path)
        self.hash = file_sha256(path)
        if self.hash not in YUNET_SHA256:
            warnings.warn(f"{path.name} has an unknown sha256 ({self.hash[:12]}...): results may differ.", stacklevel=2)
        try:
            self._net = cv2.FaceDetectorYN.create(str(path), "", (320, 320), threshold, 0.3, 5000)
        except cv2.error as error:
            raise LocatorError(f"{path.name} is not a model that OpenCV can load; download it again.") from error

    def locate(self, frame: np.ndarray, index: int = 0) -> list[Face]:
        for side, border in self.SEARCHES:
            faces = self._search(frame, side, border)
            if faces:
                return faces
        return []

    def _search(self, frame: np.ndarray, side: int, border: float) -> list[Face]:
        height, width = frame.shape[:2]
        scale = side / max(height, width)
        if side == self.SEARCHES[0][0]:
            scale = min(scale, 1.0)
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        picture = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        pad = round(border * side)
        below, beside = (pad + max(self.SMALLEST - 2 * pad - n, 0) for n in picture.shape[:2])
        picture = cv2.copyMakeBorder(picture, pad, below, pad, beside, cv2.BORDER_CONSTANT)
        self._net.setInputSize((picture.shape[1], picture.shape[0]))
        found = self._net.detect(picture)[1]
        zoom = np.array([width / size[0], height / size[1]], np.float32)
        faces = []
        for row in [] if found is None else found.astype(np.float32):
            corner, points = (row[:2] - pad) * zoom, (row[4:14].reshape(5, 2) - pad) * zoom
            faces.append(Face(np.concatenate([corner, corner + row[2:4] * zoom]), float(row[14]), points))
        return faces


class UniFaceLocator:
    """RetinaFace boxes and InsightFace's 106 points, through the optional package uniface, reduced to 68 points."""

    name = "uniface"

    def __init__(self):
        try:
            import uniface
        except ImportError as error:
            raise LocatorError("The locator 'uniface' needs an extra: pip install 'unmask[uniface]'.") from error
        self._detector, self._landmarker = uniface.RetinaFace(), uniface.Landmark106()
        self.hash = hashlib.sha256(f"uniface {uniface.__version__} RetinaFace Landmark106".encode()).hexdigest()

    def locate(self, frame: np.ndarray, index: int = 0) -> list[Face]:
        picture = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        faces = []
        for face in self._detector.detect(picture):
            points = np.asarray(self._landmarker.get_landmarks(picture, face.bbox), np.float32)[POINTS_106_TO_68]
            faces.append(Face(np.asarray(face.bbox[:4], np.float32), float(face.confidence), points))
        return faces


class HaarLocator:
    """OpenCV's frontal-face cascade: needs no weights, finds only upright frontal faces, points are a guess."""

    name = "haar"
    # A cascade's square covers the face from above the brows to the chin; where the mean face lies in it.
    _FRAME = np.array([[0.1, 0.2], [0.9, 0.2], [0.1, 0.98]])

    def __init__(self):
        if not hasattr(cv2, "CascadeClassifier"):
            raise LocatorError("This OpenCV has no cascades; install 'opencv-python-headless<5' or use 'yunet'.")
        path = Path(cv2.data.haarcascades) / "haarcascade_frontalface_alt2.xml"
        self._cascade = cv2.CascadeClassifier(str(path))
        self.hash = file_sha256(path)

    def locate(self, frame: np.ndarray, index: int = 0) -> list[Face]:
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        scale = min(1.0, 640 / max(grey.shape))
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        found, _, weights = self._cascade.detectMultiScale3(grey, 1.1, 3, outputRejectLevels=True)
        x0, y0, x1, y1 = bounding_box(CANONICAL_68)
        matrix = fit_affine(np.array([[x0, y0], [x1, y0], [x0, y1]]), self._FRAME)
        face = CANONICAL_68 @ matrix[:, :2].T + matrix[:, 2]
        faces = []
        for (x, y, w, h), weight in zip(found, np.ravel(weights), strict=True):
            box = np.array([x, y, x + w, y + h], np.float32) / scale
            points = (face * [w, h] + [x, y]).astype(np.float32) / scale
            faces.append(Face(box.astype(np.float32), float(1 / (1 + np.exp(-weight))), points.astype(np.float32)))
        return faces


def _distance(a: Face, b: Face) -> float:
    """How badly two boxes fit as the same face: centre distance in face sizes, plus the change of size in octaves."""
    sizes = [np.sqrt(np.prod(np.maximum(f.box[2:] - f.box[:2], 1e-3))) for f in (a, b)]
    shift = np.linalg.norm((a.box[:2] + a.box[2:]) / 2 - (b.box[:2] + b.box[2:]) / 2)
    return float(shift / np.mean(sizes) + abs(np.log2(sizes[0] / sizes[1])))


def track(faces_per_frame: Sequence[Sequence[Face]], reach: float = 1.2) -> list[Face | None]:
    """Follow one person through a clip: one face, or None, per frame.

    Faces are linked to the nearest track's last face (Hungarian assignment; at most `reach` in face sizes moved plus
    octaves grown). Of the tracks at least half as long as the longest, the one with the largest sum of area * score
    wins, so that a large but short-lived false face cannot displace a person, and the person is never switched.
    """
    tracks: list[dict[int, Face]] = []
    for t, faces in enumerate(faces_per_frame):
        cost = np.array([[_distance(tr[max(tr)], face) for face in faces] for tr in tracks])
        cost = cost.reshape(len(tracks), len(faces))
        # Every pair beyond reach costs the same, so that far pairs never pull a near pair apart.
        linked = {j: i for i, j in zip(*linear_sum_assignment(np.minimum(cost, 10 * reach)), strict=True)
                  if cost[i, j] <= reach}  # fmt: skip
        for j, face in enumerate(faces):
            if j in linked:
                tracks[linked[j]][t] = face
            else:
                tracks.append({t: face})
    if not tracks:
        return [None] * len(faces_per_frame)
    longest = max(map(len, tracks))

    def presence(one: dict[int, Face]) -> float:
        return sum(float(np.prod(f.box[2:] - f.box[:2])) * f.score for f in one.values())

    best = max((tr for tr in tracks if 2 * len(tr) >= longest), key=presence)
    return [best.get(t) for t in range(len(faces_per_frame))]


def landmarks_of(faces: Sequence[Face | None]) -> list[np.ndarray | None]:
    """The 81 points float32[81,2] of each tracked face, None where there is none."""
    return [None if face is None else full_landmarks(face.points) for face in faces]
