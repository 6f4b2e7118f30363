"""Faces of the synthetic world with captions, to pretrain a small CLIP: who is shown, how, and by what camera.

Every picture is a filmed person as the world films its reals; nothing here knows of forgeries.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from joblib import Parallel, delayed

from unmask import hulls
from unmask.data import cameras, scenes, subjects
from unmask.profile import digest, write_atomic
from unmask.progress import track

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "skin": ("very pale skin", "pale skin", "tan skin", "brown skin", "dark skin"),
    "hair": ("black hair", "dark brown hair", "brown hair", "blond hair", "grey hair"),
    "length": ("short hair", "long hair"),
    "glasses": ("no glasses", "glasses"),
    "beard": ("no beard", "a beard"),
    "mouth": ("a closed mouth", "an open mouth"),
    "direction": ("looking left", "looking ahead", "looking right"),
    "camera": ("in cold colours", "in neutral colours", "in warm colours"),
}
"""Every attribute with the phrase of each of its values."""
OPEN_MOUTH, TURNED, CAST = 0.35, 0.12, 0.06  # opening; yaw in radians; red over blue, less 1
FILM = 192  # pixels
SHOWN = 0.5  # probability of an attribute to be told


def _nearest(colour: np.ndarray, palette: np.ndarray) -> int:
    """The row of a palette that a varied colour was made of: variation is by factors, so logarithms are compared."""
    return int(np.abs(np.log(palette) - np.log(colour)).sum(1).argmin())


def attributes(subject: subjects.Subject, pose: subjects.Pose, camera: cameras.CameraModel) -> dict[str, int]:
    """The value of every attribute, an index into ATTRIBUTES."""
    cast = camera.white_balance[0] / camera.white_balance[2] - 1
    return {
        "skin": _nearest(subject.skin, subjects.SKIN),
        "hair": _nearest(subject.hair, subjects.HAIR),
        "length": int(subject.long_hair),
        "glasses": int(subject.glasses),
        "beard": int(subject.beard > 0),
        "mouth": int(pose.mouth > OPEN_MOUTH),
        "direction": int(pose.yaw > -TURNED) + int(pose.yaw > TURNED),
        "camera": int(cast > -CAST) + int(cast > CAST),
    }


def prompt(*phrases: str) -> str:
    """The sentence of some phrases of ATTRIBUTES."""
    return "a photo of a person, " + ", ".join(phrases)


def caption(values: Mapping[str, int], rng: np.random.Generator) -> str:
    """A sentence about some of the attributes, in any order."""
    told = [name for name in ATTRIBUTES if rng.random() < SHOWN] or [str(rng.choice(list(ATTRIBUTES)))]
    return prompt(*(ATTRIBUTES[name][values[name]] for name in rng.permutation(told)))


def face(
    seed: int, number: int, size: int, film: int = FILM, margin: float = 0.25
) -> tuple[np.ndarray, dict[str, int]]:
    """A face that nobody else has: crop uint8[size,size,3] RGB and its `attributes`. Same arguments, same face.

    film: pixels of the filmed frame, which the face is cut from. margin: see `hulls.crop_box`.
    """
    rng = np.random.default_rng([seed, 0xCA97, number])
    subject = subjects.sample_subject(rng)
    take = scenes.film(subject, rng, 1, 25.0, film)
    model = cameras.sample_model("", rng)
    frame = cameras.expose(take.radiance[0], cameras.Camera("", model, np.zeros((film, film), np.float32)), rng)
    crop = hulls.crop(frame, hulls.crop_box(take.landmarks[0], rng, margin), size)
    return _compress(crop, rng), attributes(subject, take.poses[0], model)


def faces(folder: Path, seed: int, count: int, workers: int, **shape) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` faces of a seed, made once and kept in `folder`: pictures uint8[N,S,S,3] and values
    int64[N, attributes]. shape: `size` and what else `face` takes."""
    path = folder / f"faces-{digest([seed, count, shape])}.npz"
    if not path.exists():
        tasks = (delayed(_numbered)(seed, number, shape) for number in range(count))
        made = list(track(Parallel(workers, return_as="generator")(tasks), count, "faces"))
        buffer = io.BytesIO()
        np.savez(buffer, images=np.stack([image for image, _ in made]), values=np.array([v for _, v in made]))
        write_atomic(path, buffer.getvalue())
    kept = np.load(path)
    return kept["images"], kept["values"]


def _numbered(seed: int, number: int, shape: Mapping) -> tuple[np.ndarray, list[int]]:
    cv2.setNumThreads(1)
    image, values = face(seed, number, **shape)
    return image, [values[name] for name in ATTRIBUTES]


def _compress(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG of a random quality, so that compression tells nothing else."""
    quality = int(rng.integers(50, 101))
    data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
