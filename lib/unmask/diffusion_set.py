"""A test set of faces that a latent diffusion model drew: is it seen that the model knows its own work?

LaRE rests on a diffusion model's guessing the noise better in what it generated itself. To see or refute that, three
twins of every real video are written, alike in frames, landmarks, face region, mask and encoder settings:

- `real` (label 0): decoded and encoded again, nothing else;
- `vae` (label 1): the face went through the model's autoencoder and back;
- `diffusion` (label 1): the same, but its latents were noised and denoised on the way, SDEdit (Meng et al., ICLR 2022),
  by deterministic DDIM (Song et al., ICLR 2021).

What tells `diffusion` from `vae` is the model's drawing alone; what tells `vae` from `real` is its autoencoder, the
crop's scaling to the model's size and back, and the seam. Colours are left as the model gave them, since moving them
towards the original would be one more forgery, and the pixels no longer the model's.

Limits: the noise is a clip's own, but every frame is denoised alone, so that the face may boil as the head moves.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
import torch

from unmask import lare_model, preprocessing
from unmask.data import derived, forgeries, landmarks, video
from unmask.profile import digest, source_hash

MARGIN = 0.3
"""Share of the face around it on each side of the square that the model sees, as in stored crops."""
SHRINK, FEATHER = 0.95, 0.03
"""The mask: the outline's hull, shrunk by this factor and blurred by this share of the face's width."""
ENCODING = {"crf": 17, "gop": 12}
BATCH = 8
"""Frames that the model is given at a time."""


@dataclass(frozen=True)
class Settings:
    """What the twins are drawn with.

    source: the model's folder, or its name in lib/unmask/weights. steps: of DDIM, from `strength`, a share of the
    schedule, down to nothing. side: pixels of the square that the model sees. prompt: one for all faces, LaRE's.
    `revision` is for models of the hub, of which this set takes none.
    """

    source: str
    steps: int
    strength: float
    side: int
    prompt: str = lare_model.Settings.prompt
    revision: str = ""


def timesteps(strength: float, steps: int, total: int) -> list[int]:
    """Timesteps of a schedule of `total`, from the noisiest: at most `steps`, evenly spaced; the last goes to clean.

    `strength` is the share of the schedule that they span, from 0, for none, to 1.
    """
    levels = np.round(np.linspace(strength * total, 0, steps + 1)[:-1]).astype(int)
    return sorted({int(level) - 1 for level in levels if level > 0}, reverse=True)


@contextmanager
def _plainly() -> Iterator[None]:
    """Without gradients and on one thread, since the number of threads changes sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


class Painter:
    """A Stable Diffusion in float32 that draws pictures again, on the GPU if there is one.

    Latents are float32[N,C,h,w], scaled as the UNet takes them. Raises LareError if the model cannot be loaded, and
    ValueError if it cannot see pictures of the settings' side.
    """

    def __init__(self, settings: Settings):
        parts = lare_model.load(settings, decoder=True)
        factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
        if settings.side < factor or settings.side % factor:
            raise ValueError(f"The side must be a multiple of {factor} pixels, not {settings.side}.")
        self.settings, self.fingerprint = settings, parts.fingerprint
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.vae, self.unet = (part.float().to(self.device) for part in (parts.vae, parts.unet))
        self.embedding, self.scaling = parts.embedding.to(self.device), parts.vae.config.scaling_factor
        self.kept = parts.scheduler.alphas_cumprod.double()
        self.velocity = parts.scheduler.config.prediction_type == "v_prediction"

    def _batches(self, function: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> Iterator[torch.Tensor]:
        for part in given.split(BATCH):
            with _plainly():
                made = function(part.to(self.device)).cpu()
            yield made

    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        """Latents of uint8[N,S,S,3] RGB: the mode of the autoencoder's posterior, which has no noise of its own."""
        pixels = torch.from_numpy(pictures).movedim(-1, 1)

        def mode(part: torch.Tensor) -> torch.Tensor:
            return self.vae.encode(part.float() / 127.5 - 1).latent_dist.mode() * self.scaling

        return torch.cat(list(self._batches(mode, pixels)))

    def decode(self, latents: torch.Tensor) -> Iterator[np.ndarray]:
        """Pictures float32[S,S,3] RGB 0..255, not rounded, made in batches as they are asked for."""
        for part in self._batches(lambda z: self.vae.decode(z / self.scaling).sample, latents):
            yield from ((part.movedim(1, -1) + 1) * 127.5).clamp(0, 255).numpy()

    def redraw(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents noised by the one `noise` float32[1,C,h,w] and denoised; the same ones where the strength is 0."""
        times = timesteps(self.settings.strength, self.settings.steps, len(self.kept))
        noise = noise.to(self.device)
        return torch.cat(list(self._batches(lambda part: self._sample(part, noise, times), latents)))

    def _sample(self, clean: torch.Tensor, noise: torch.Tensor, times: list[int]) -> torch.Tensor:
        prompt = self.embedding.expand(len(clean), -1, -1)
        for time in times:
            signal, dirt = (float(value) ** 0.5 for value in (self.kept[time], 1 - self.kept[time]))
            noisy = signal * clean + dirt * noise
            guess = self.unet(noisy, time, encoder_hidden_states=prompt).sample
            if self.velocity:
                clean, noise = signal * noisy - dirt * guess, signal * guess + dirt * noisy
            else:
                clean, noise = (noisy - dirt * guess) / signal, guess
        return clean


@lru_cache(maxsize=1)
def _painter(settings: Settings, fingerprint: str) -> Painter:
    """One for all videos of a process. `fingerprint`: another model may have come to the same folder."""
    return Painter(settings)


def squares(points: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Where the model looks: x, y and side int64[T,3] in pixels; 0 where a frame has no face (landmarks are NaN)."""
    found = [one if np.isfinite(one).all() else None for one in points]
    boxes = np.nan_to_num(landmarks.stabilised_box(found, MARGIN, times))
    return np.column_stack([np.round(boxes[:, :2]), np.round(boxes[:, 2] - boxes[:, 0])]).astype(np.int64)


def paste(frame: np.ndarray, face: np.ndarray, square: np.ndarray, points: np.ndarray, feather: float) -> np.ndarray:
    """The frame uint8[H,W,3] with the face float32[S,S,3] laid over its square where the mask of the face is.

    points: float[81,2], in the frame; feather in pixels. Unchanged where the mask is 0.
    """
    x, y, side = square
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, frame.shape[1]), min(y + side, frame.shape[0])
    if x0 >= x1 or y0 >= y1:
        return frame
    face = cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA if side < len(face) else cv2.INTER_CUBIC)
    mask = forgeries.soft_hull(points[forgeries.FACE] - [x, y], int(side), SHRINK, feather)[..., None]
    inside = np.s_[y0 - y : y1 - y, x0 - x : x1 - x]
    part, out = frame[y0:y1, x0:x1].astype(np.float32), frame.copy()
    out[y0:y1, x0:x1] = np.clip(np.round(part + mask[inside] * (face[inside] - part)), 0, 255)
    return out


def _pasted(clip: video.Clip, points: np.ndarray, where: np.ndarray, faces: Iterable[np.ndarray]) -> Iterator:
    """The clip's frames with the next of `faces` in each that has a face."""
    feather, faces = FEATHER * float(np.nanmedian(np.ptp(points[..., 0], axis=1))), iter(faces)
    for frame, own, square in zip(clip.frames, points, where, strict=True):
        yield paste(frame, next(faces), square, own, feather) if square[2] else frame


def twins(painter: Painter, seed: int, item: str, clip: video.Clip, points: np.ndarray) -> derived.Twins:
    """The twins of a clip as `derived.Recipe` takes them; points: landmarks float[T,81,2], NaN without a face.

    The noise is drawn from seed and item on the processor and is the same for all frames, which would flicker more with
    noises of their own.
    """
    where, side = squares(points, clip.pts), painter.settings.side
    crops = [
        preprocessing.crop_face(frame, np.array([x, y, x + size, y + size]), side)[0]
        for frame, (x, y, size) in zip(clip.frames, where.tolist(), strict=True) if size
    ]  # fmt: skip
    latents = painter.encode(np.stack(crops))
    generator = torch.Generator().manual_seed(int(digest([seed, item]), 16))
    noise = torch.randn(1, *latents.shape[1:], generator=generator)
    yield "real", 0, clip.frames
    yield "vae", 1, _pasted(clip, points, where, painter.decode(latents))
    yield "diffusion", 1, _pasted(clip, points, where, painter.decode(painter.redraw(latents, noise)))


def _twins(settings: Settings, fingerprint: str, seed: int, *clip) -> derived.Twins:
    return twins(_painter(settings, fingerprint), seed, *clip)


def make(
    source: str | os.PathLike,
    out: str | os.PathLike,
    model: str | os.PathLike,
    splits: Collection[str] = ("test",),
    seed: int = 0,
    workers: int = 1,
    locator: str = "yunet",
    frames: int = derived.LONGEST,
    steps: int = 8,
    strength: float = 0.6,
    side: int = 128,
) -> Path:
    """Write the twins of all real videos of these splits into the folder `out`; returns the path of their manifest.

    source: path of a manifest, see `derived.make`; model: a folder in diffusers' layout, or the name of one of the
    kit's; `frames` in a row, at most, of each video; steps, strength and side as in `Settings`. The same seed gives the
    same bytes for any `workers`, each of which has the model in memory; on a GPU there is but one. Data sets are named
    after the originals', with "-diffusion" behind. An interrupted run goes on where it was; media, settings or models
    that changed are done again. Videos without a readable face are left out and counted on stderr. Raises LareError for
    a folder that is no model, ValueError for settings that cannot be, ManifestError for a broken manifest or if no
    video is left.
    """
    if steps < 1 or not 0 <= strength <= 1:
        raise ValueError(f"It takes a step or more and a strength from 0 to 1, not {steps} and {strength}.")
    folder = Path(model).absolute() if Path(model).is_dir() else model
    settings = Settings(str(folder), steps, strength, side)
    fingerprint = Painter(settings).fingerprint
    code = source_hash(forgeries, landmarks, preprocessing, sys.modules[__name__])
    shaping = {name: value for name, value in asdict(settings).items() if name != "source"}
    key = digest([shaping, fingerprint, code])
    draw = partial(_twins, settings, fingerprint, seed)
    recipe = derived.Recipe("{}-diffusion", draw, key, ENCODING, seed, locator, frames)
    workers = 1 if torch.cuda.is_available() else workers
    return derived.make(Path(source), Path(out), recipe, splits, workers, "diffusion test set")
