"""Camera simulator: scene radiance in, the frames that a particular sensor would deliver out.

Order of the steps as in a real camera: lens (blur, vignetting), photo-response non-uniformity, shot and read noise,
Bayer mosaic, demosaicing, white balance, gamma. Compression is left to `unmask.data.video.encode`.
"""

from dataclasses import dataclass

import cv2
import numpy as np

BAYER = {
    "RG": cv2.COLOR_BayerBG2RGB,
    "BG": cv2.COLOR_BayerRG2RGB,
    "GR": cv2.COLOR_BayerGB2RGB,
    "GB": cv2.COLOR_BayerGR2RGB,
}
FULL_WELL = 4095.0  # a 12-bit sensor


@dataclass(frozen=True)
class CameraModel:
    """What all cameras of one model share: optics, noise, colour processing and the encoder's habits."""

    name: str
    bayer: str  # colours of the first two photosites
    blur: float  # lens blur, standard deviation in pixels
    vignetting: float  # relative loss of light in the corners
    shot: float  # variance of shot noise per unit of signal, in sensor units of FULL_WELL
    read: float  # standard deviation of read noise, in sensor units
    white_balance: tuple[float, float, float]
    gamma: float
    crf: int  # quality of the camera's own H.264 encoder
    gop: int
    bframes: int


@dataclass(frozen=True)
class Camera:
    """One device: a model and a sensor with its own multiplicative pattern `prnu` (float32[H,W], mean 0)."""

    name: str
    model: CameraModel
    prnu: np.ndarray


def sample_model(name: str, rng: np.random.Generator) -> CameraModel:
    """Draw a camera model; ranges are those of consumer cameras, wide enough for two models to look different."""
    return CameraModel(
        name=name,
        bayer=str(rng.choice(sorted(BAYER))),
        blur=float(rng.uniform(0.45, 0.8)),
        vignetting=float(rng.uniform(0.05, 0.3)),
        shot=float(rng.uniform(0.5, 1.5)),
        read=float(rng.uniform(4, 12)),
        white_balance=(float(rng.uniform(0.92, 1.1)), 1.0, float(rng.uniform(0.9, 1.12))),
        gamma=float(rng.uniform(2.0, 2.4)),
        crf=int(rng.integers(9, 14)),  # phones spend 0.2 to 0.3 bits per pixel
        gop=int(rng.choice([8, 12, 24])),
        bframes=int(rng.integers(0, 4)),
    )


def make_cameras(prefix: str, count: int, size: int, prnu: float, rng: np.random.Generator) -> list[Camera]:
    """Draw `count` cameras of `ceil(count / 2)` models, so that most models come as two devices.

    prnu: standard deviation of the sensor pattern, relative to the light. Real sensors have 0.005 to 0.02 on millions
    of pixels; a small world needs more for the same evidence.
    """
    models = [sample_model(f"{prefix}{chr(ord('A') + i)}", rng) for i in range((count + 1) // 2)]
    return [
        Camera(
            f"{models[i // 2].name}{i % 2 + 1}",
            models[i // 2],
            (prnu * rng.standard_normal((size, size))).astype(np.float32),
        )
        for i in range(count)
    ]


def _mosaic(linear: np.ndarray, bayer: str) -> np.ndarray:
    """float32[H,W,3] to float32[H,W]: each photosite keeps the colour of its filter."""
    second = {"RG": "GB", "BG": "GR", "GR": "BG", "GB": "RG"}[bayer]
    mosaic = np.empty(linear.shape[:2], np.float32)
    for row, colours in enumerate((bayer, second)):
        for column, colour in enumerate(colours):
            mosaic[row::2, column::2] = linear[row::2, column::2, "RGB".index(colour)]
    return mosaic


def _falloff(size: int, strength: float) -> np.ndarray:
    axis = np.linspace(-1, 1, size, dtype=np.float32) ** 2
    return 1 - strength * (axis[:, None] + axis[None, :]) / 2


def expose(radiance: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Film one frame.

    radiance: float32[H,W,3], linear, 1.0 = white. Returns uint8[H,W,3] RGB. The pattern multiplies the light before
    anything else is added, I(1 + K) (Chen et al., IEEE TIFS 2008, eq. 1).
    """
    model = camera.model
    light = cv2.GaussianBlur(radiance, (0, 0), model.blur) * _falloff(radiance.shape[0], model.vignetting)[..., None]
    signal = _mosaic(light, model.bayer) * (1 + camera.prnu) * (0.9 * FULL_WELL)
    noise = rng.standard_normal(signal.shape, dtype=np.float32) * np.sqrt(
        model.shot * np.maximum(signal, 0) + model.read**2
    )
    raw = np.clip(signal + noise, 0, FULL_WELL).astype(np.uint16)
    linear = cv2.cvtColor(raw, BAYER[model.bayer]).astype(np.float32) / FULL_WELL
    balanced = np.clip(linear * np.float32(model.white_balance), 0, 1)
    return (255 * cv2.pow(balanced, 1 / model.gamma) + 0.5).astype(np.uint8)
