"""What stands around the face: a room or a landscape, a moving camera, hair, neck and shoulders."""

from dataclasses import dataclass

import cv2
import numpy as np

from unmask.data.subjects import Pose, Subject, base_texture, perform, render_head


@dataclass(frozen=True)
class Take:
    """One filmed performance, before the camera: radiance float32[T,H,W,3], landmarks float32[T,81,2], poses, light."""

    radiance: np.ndarray
    landmarks: np.ndarray
    poses: list[Pose]
    light: np.ndarray


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A larger still scene float32[1.4 size,1.4 size,3] for the camera to move over: wall, shelves or landscape."""
    side = int(1.4 * size)
    base = rng.uniform(0.05, 0.6, 3)
    ramp = np.linspace(rng.uniform(0.6, 1), rng.uniform(1, 1.4), side, dtype=np.float32)
    scene = np.ascontiguousarray(np.broadcast_to(ramp[:, None, None] * base, (side, side, 3)), np.float32)
    kind = rng.integers(3)
    if kind == 0:  # shelves and pictures: many edges
        for _ in range(int(rng.integers(14, 34))):
            x, y, w, h = rng.uniform(-0.1, 1, 2).tolist() + rng.uniform(0.03, 0.25, 2).tolist()
            corners = (np.array([[x, y], [x + w, y + h]]) * side).astype(int)
            cv2.rectangle(scene, corners[0].tolist(), corners[1].tolist(), rng.uniform(0.02, 0.8, 3).tolist(), -1)
    elif kind == 1:  # leaves: blobs of one hue
        tint = base * (0.6, 1.3, 0.5)
        for _ in range(int(rng.integers(60, 140))):
            centre = (rng.uniform(0, 1, 2) * side).astype(int).tolist()
            axes = (rng.uniform(0.01, 0.08, 2) * side).astype(int) + 1
            cv2.ellipse(
                scene, centre, axes.tolist(), rng.uniform(0, 180), 0, 360, (tint * rng.uniform(0.3, 1.6)).tolist(), -1
            )
        scene = cv2.GaussianBlur(scene, (0, 0), rng.uniform(0.5, 2.5))
    else:  # a plain wall with stains
        stains = cv2.GaussianBlur(rng.standard_normal((side, side), dtype=np.float32), (0, 0), side / 14)
        scene = scene * (1 + 0.25 * stains / stains.std())[..., None]
    grain = cv2.GaussianBlur(rng.standard_normal((side, side), dtype=np.float32), (0, 0), 1.2)
    return np.clip(scene * (1 + 0.06 * grain / grain.std())[..., None], 0.003, 1).astype(np.float32)


def _blend(canvas: np.ndarray, polygon: np.ndarray, colour: np.ndarray, soft: float) -> None:
    mask = np.zeros(canvas.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.round(polygon * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    cover = cv2.GaussianBlur(mask, (0, 0), soft).astype(np.float32)[..., None] / 255
    canvas += cover * (colour - canvas)


def _ellipse(x: float, y: float, w: float, h: float, start: float = 0.0, end: float = 2 * np.pi) -> np.ndarray:
    angle = np.linspace(start, end, 48)
    return np.stack([x + w * np.cos(angle), y + h * np.sin(angle)], 1)


def draw_body(canvas: np.ndarray, subject: Subject, pose: Pose, fabric: np.ndarray) -> None:
    """Paint what is behind the head into the canvas float32[H,W,3], in place: hair, neck, shoulders."""
    s, x, y = pose.scale, pose.x + 0.25 * pose.scale * np.sin(pose.roll), pose.y
    volume = 1 + subject.shape["hair_volume"]
    if subject.long_hair:
        _blend(canvas, _ellipse(x, y + 0.45 * s, 1.18 * volume * s, 1.75 * s), 0.7 * subject.hair, 1.5)
    _blend(canvas, _ellipse(x, y - 0.22 * s, 1.04 * volume * s, 1.2 * volume * s), 0.9 * subject.hair, 1.2)
    neck = np.array([[-0.52, 0.7], [0.52, 0.7], [0.6, 1.9], [-0.6, 1.9]]) * s + (x, y)
    _blend(canvas, neck, 0.5 * subject.skin, 2.0)
    shoulders = np.concatenate(
        [
            _ellipse(x, y + 3.0 * s, 2.5 * s, 1.5 * s, np.pi, 2 * np.pi),
            [[x + 2.5 * s, y + 6 * s], [x - 2.5 * s, y + 6 * s]],
        ]
    )
    _blend(canvas, shoulders, fabric[..., None] * subject.clothes, 1.0)


def film(subject: Subject, rng: np.random.Generator, frames: int, fps: float, size: int) -> Take:
    """Stage one take: draw scene, light, performance and camera movement, and render all frames (linear radiance)."""
    scene, poses = background(rng, size), perform(rng, frames, fps, size)
    angle = rng.uniform(-1.1, 1.1)
    light = np.array([np.sin(angle) * 0.8, -rng.uniform(0.2, 0.7), 0.9])
    light /= np.linalg.norm(light)
    metered = rng.uniform(0.28, 0.4)  # automatic exposure: mean of the first frame, relative to white
    weave = 1 + 0.06 * rng.standard_normal((size, size), dtype=np.float32)
    t = np.arange(frames) / fps
    margin = scene.shape[0] - size
    pan = [
        margin * (0.5 + 0.35 * np.sin(2 * np.pi * rng.uniform(0.1, 0.4) * t + rng.uniform(0, 2 * np.pi)))
        for _ in range(2)
    ]
    shake = 0.6 * cv2.GaussianBlur(rng.standard_normal((frames, 2)).astype(np.float32), (1, 5), 1.0)
    textures = base_texture(subject)
    radiance, landmarks = np.empty((frames, size, size, 3), np.float32), np.empty((frames, 81, 2), np.float32)
    for i, pose in enumerate(poses):
        shift = np.float32([[1, 0, -pan[0][i] + shake[i, 0]], [0, 1, -pan[1][i] + shake[i, 1]]])
        canvas = cv2.warpAffine(scene, shift, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        draw_body(canvas, subject, pose, weave)
        head, cover, landmarks[i] = render_head(subject, textures, pose, light, size)
        canvas += cover[..., None] * (head - canvas)
        radiance[i] = canvas
    return Take(radiance * np.float32(metered / radiance[0].mean()), landmarks, poses, light)
