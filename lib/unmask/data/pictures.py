"""Decode stills and animations through Pillow. Runs inside the child process of `unmask.data.video`; see there."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from unmask.data.frames import MediaError, choose, fit

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF")
_ANIMATED = ("GIF", "WEBP", "AVIF", "PNG")
# What undoes the turn or mirror of each EXIF orientation (EXIF 2.3, table 6).
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


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


def _loaded(file: Image.Image, upright: bool) -> Image.Image:
    """The current picture of a file, turned as its EXIF data say or as stored."""
    if upright:
        file.load()
        return ImageOps.exif_transpose(file)
    orientation = file.getexif().get(Base.Orientation) if file.format == "TIFF" else None
    file.load()
    # Pillow turns a TIFF while loading it, and then drops the mark.
    if orientation in _UNDO and Base.Orientation not in file.getexif():
        return file.transpose(_UNDO[orientation])
    return file


def _times(file: Image.Image, total: int) -> np.ndarray:
    """When each picture of an animation is shown, in seconds; it has to be decoded to know."""
    durations = np.zeros(total)
    for i in range(total - 1):
        file.seek(i)
        file.load()
        durations[i + 1] = file.info.get("duration", 0) / 1000
    return np.cumsum(durations)


def read_picture(
    path: str,
    count: int,
    max_side: int | None = None,
    upright: bool = True,
    crop: int | None = None,
    sampling: str = "uniform",
    fps: float = 0.0,
) -> tuple[dict, list[np.ndarray]]:
    """Facts and up to `count` RGB frames of a still (one) or animation, chosen as `unmask.data.frames.choose` says.

    Raises UnidentifiedImageError if the file is no picture, MediaError if it is one that cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            total = getattr(file, "n_frames", 1) if file.format in _ANIMATED else 1
            orientation = file.getexif().get(Base.Orientation, 1)
            times = _times(file, total) if sampling == "dense" and fps else np.zeros(total)
            indices, frames, pts, clock = choose(times, count, sampling, fps), [], [], 0.0
            for i in range(int(indices[-1]) + 1):
                file.seek(i)
                if i in indices:
                    full = _to_rgb(_loaded(file, upright))
                    frames.append(fit(full, max_side, crop))
                    pts.append(clock)
                else:
                    file.load()
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
    facts["orientation"] = orientation if orientation in _UNDO else 1
    return facts | {"indices": indices.tolist(), "pts": pts, "decoder": "pillow"}, frames
