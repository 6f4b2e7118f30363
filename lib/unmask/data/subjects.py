"""Parametric people: a drawn face on an ellipsoidal head that turns, blinks and speaks, with exact landmarks.

The head is an ellipsoid seen orthographically. Its frontal texture (skin, brows, eyes, lips, hair) is drawn once per
person, eyes and mouth once per frame, and every image pixel looks its colour up through the inverse of the projection;
the landmarks go through the same projection forwards, so they are exact, not fitted.

Head units: x right, y down, z towards the camera, 1.0 = half the width of the face.
"""

from dataclasses import dataclass

import cv2
import numpy as np

AXES = np.array([1.03, 1.32, 1.15])  # half-axes of the head ellipsoid
EXTENT = 1.4  # the texture covers [-EXTENT, EXTENT] in both head axes
TEXTURE = 320  # pixels along a side of the texture
SKIN = np.array([[0.78, 0.56, 0.45], [0.66, 0.44, 0.33], [0.52, 0.33, 0.23], [0.33, 0.19, 0.13], [0.19, 0.11, 0.07]])
HAIR = np.array([[0.02, 0.018, 0.016], [0.06, 0.035, 0.02], [0.14, 0.075, 0.035], [0.42, 0.3, 0.14], [0.3, 0.3, 0.31]])
IRIS = np.array([[0.1, 0.06, 0.03], [0.12, 0.2, 0.32], [0.12, 0.2, 0.1], [0.05, 0.03, 0.02]])


@dataclass(frozen=True)
class Subject:
    """A person: geometry in head units, colours as linear RGB."""

    shape: dict[str, float]
    skin: np.ndarray
    hair: np.ndarray
    lips: np.ndarray
    iris: np.ndarray
    clothes: np.ndarray
    texture_seed: int
    beard: float
    glasses: bool
    long_hair: bool


@dataclass(frozen=True)
class Pose:
    """The state of a head in one frame: angles in radians, position and scale (pixels per head unit) in the image."""

    yaw: float
    pitch: float
    roll: float
    x: float
    y: float
    scale: float
    mouth: float  # opening, 0 closed to 1
    smile: float
    eyes: float  # opening, 0 closed to 1


def sample_subject(rng: np.random.Generator) -> Subject:
    """Draw a person."""
    u = rng.uniform
    skin = SKIN[rng.integers(len(SKIN))] * u(0.9, 1.1, 3) * u(0.9, 1.1)
    shape = {
        "jaw": u(0.75, 1.15), "chin": u(1.1, 1.22), "eye_gap": u(0.37, 0.43), "eye_width": u(0.15, 0.19),
        "eye_height": u(0.06, 0.09), "eye_slant": u(-0.03, 0.03), "brow_height": u(0.17, 0.26),
        "brow_thick": u(0.03, 0.06), "brow_arch": u(0.02, 0.09), "nose_width": u(0.16, 0.25),
        "nose_length": u(0.36, 0.46),
        "mouth_width": u(0.29, 0.4), "mouth_height": u(0.68, 0.76), "lip": u(0.05, 0.09), "hairline": u(-0.95, -0.68),
        "hair_volume": u(0.05, 0.25),
    }  # fmt: skip
    return Subject(
        shape=shape,
        skin=skin,
        hair=HAIR[rng.integers(len(HAIR))] * u(0.8, 1.25),
        lips=skin * (1.05, 0.62, 0.66) * u(0.85, 1.1),
        iris=IRIS[rng.integers(len(IRIS))],
        clothes=u(0.02, 0.6, 3),
        texture_seed=int(rng.integers(2**31)),
        beard=float(u(0.2, 0.7)) if u() < 0.25 else 0.0,
        glasses=bool(u() < 0.2),
        long_hair=bool(u() < 0.45),
    )


def perform(rng: np.random.Generator, frames: int, fps: float, size: int) -> list[Pose]:
    """Draw a performance: head sway, blinks and speech-like mouth movement in a `size`-pixel image."""
    t = np.arange(frames) / fps

    def sway(amplitude: float, low: float = 0.15, high: float = 0.6) -> np.ndarray:
        waves = [
            rng.uniform(0.4, 1) * np.sin(2 * np.pi * rng.uniform(low, high) * t + rng.uniform(0, 2 * np.pi))
            for _ in range(2)
        ]
        return amplitude * sum(waves) / 1.4

    syllables = np.abs(np.sin(np.pi * rng.uniform(2.5, 4.5) * t + rng.uniform(0, np.pi)))
    mouth = syllables * np.clip(0.5 + sway(0.6, 0.5, 1.2), 0, 1)
    eyes = np.ones(frames)
    for start in rng.uniform(0, max(t[-1], 0.1) + 0.3, rng.poisson(0.4 * (t[-1] + 0.5)) + 1):
        eyes = np.minimum(eyes, np.clip(np.abs(t - start) / 0.09, 0.06, 1))
    base_yaw, base_pitch = rng.normal(0, 0.12), rng.normal(0, 0.06)
    scale = size * rng.uniform(0.175, 0.225)
    curves = [
        base_yaw + sway(0.16), base_pitch + sway(0.07), sway(0.06),
        size * rng.uniform(0.45, 0.55) + sway(0.02 * size), size * rng.uniform(0.45, 0.52) + sway(0.012 * size),
        scale * (1 + sway(0.02)), mouth, np.clip(rng.uniform(-0.2, 0.6) + sway(0.25), -0.3, 1), eyes,
    ]  # fmt: skip
    return [Pose(*(float(c[i]) for c in curves)) for i in range(frames)]


def _eye(shape: dict, side: int, opening: float) -> np.ndarray:
    """Six points of an eye, in iBUG order for the image-left eye; side -1 left, +1 right."""
    angle = np.array([np.pi, 2 * np.pi / 3, np.pi / 3, 0, -np.pi / 3, -2 * np.pi / 3])
    lid = np.where(np.sin(angle) > 0, -opening, 0.8 * max(opening, 0.35)) * np.abs(np.sin(angle))
    x = shape["eye_width"] * np.cos(angle)
    points = np.stack([x, shape["eye_height"] * 1.15 * lid + shape["eye_slant"] * -x / shape["eye_width"]], 1)
    if side > 0:
        points = points[[3, 2, 1, 0, 5, 4]] * (-1, 1)  # mirrored, again starting at the image-left corner
    return points + (side * shape["eye_gap"], -0.14)


def canonical_landmarks(subject: Subject, pose: Pose) -> np.ndarray:
    """The 81 landmarks (iBUG 68 and 13 forehead points) in head units, float64[81,2], before the head turns."""
    s = subject.shape
    theta = np.linspace(0, np.pi, 17)
    jaw = np.stack(
        [
            -0.95 * np.sign(np.cos(theta)) * np.abs(np.cos(theta)) ** s["jaw"],
            -0.16 + (s["chin"] + 0.1 * pose.mouth + 0.16) * np.sin(theta),
        ],
        1,
    )
    arch = np.array([0, 0.7, 1, 0.8, 0.3])
    brow = np.stack(
        [np.linspace(-0.71, -0.17, 5), -0.14 - s["brow_height"] - s["brow_arch"] * arch - 0.03 * max(pose.smile, 0)], 1
    )
    bridge = np.stack([np.zeros(4), np.linspace(-0.16, -0.16 + s["nose_length"], 4)], 1)
    nostrils = np.stack(
        [s["nose_width"] * np.linspace(-1, 1, 5), -0.06 + s["nose_length"] + 0.06 * np.array([0, 0.7, 1, 0.7, 0])], 1
    )
    w, y, lip, gap = (
        s["mouth_width"] * (1 + 0.15 * pose.smile - 0.12 * pose.mouth),
        s["mouth_height"],
        s["lip"],
        0.2 * pose.mouth,
    )
    lift = -0.07 * pose.smile
    top = [(-0.65, -0.75), (-0.25, -1), (0, -0.85), (0.25, -1), (0.65, -0.75)]
    bottom = [(0.65, 0.8), (0.3, 1.1), (0, 1.2), (-0.3, 1.1), (-0.65, 0.8)]
    outer = [
        (-w, y + lift),
        *((w * a, y + lip * b) for a, b in top),
        (w, y + lift),
        *((w * a, y + gap * (1 - abs(a) / 2) + lip * b) for a, b in bottom),
    ]
    inner_top, inner_bottom = [(-0.45, -0.05), (0, 0.0), (0.45, -0.05)], [(0.45, 0.8), (0, 1.0), (-0.45, 0.8)]
    inner = [
        (-0.85 * w, y + 0.8 * lift),
        *((w * a, y + lip * b) for a, b in inner_top),
        (0.85 * w, y + 0.8 * lift),
        *((w * a, y + 0.02 + gap * b) for a, b in inner_bottom),
    ]
    arc = np.linspace(np.pi - 0.25, 0.25, 13)
    forehead = np.stack([0.9 * np.cos(arc), -0.2 + (s["hairline"] + 0.16) * np.sin(arc)], 1)
    parts = [
        jaw,
        brow,
        brow[::-1] * (-1, 1),
        bridge,
        nostrils,
        _eye(s, -1, pose.eyes),
        _eye(s, 1, pose.eyes),
        outer,
        inner,
        forehead,
    ]
    return np.concatenate([np.asarray(p, float) for p in parts])


def rotation(pose: Pose) -> np.ndarray:
    """Head-to-view rotation, float64[3,3]: yaw about y, then pitch about x, then roll about z."""
    (sy, sp, sr), (cy, cp, cr) = np.sin([pose.yaw, pose.pitch, pose.roll]), np.cos([pose.yaw, pose.pitch, pose.roll])
    yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return roll @ pitch @ yaw


def project(points: np.ndarray, pose: Pose) -> np.ndarray:
    """Head-unit points float[N,2] on the ellipsoid's front to image pixels float32[N,2]."""
    depth = AXES[2] * np.sqrt(np.maximum(1 - (points[:, 0] / AXES[0]) ** 2 - (points[:, 1] / AXES[1]) ** 2, 0.0))
    view = np.column_stack([points, depth]) @ rotation(pose).T
    return (view[:, :2] * pose.scale + (pose.x, pose.y)).astype(np.float32)


def _pixels(points: np.ndarray) -> np.ndarray:
    return (np.asarray(points) + EXTENT) * (TEXTURE / (2 * EXTENT)) - 0.5


def _smooth(points: np.ndarray, samples: int = 6) -> np.ndarray:
    """A closed Catmull-Rom curve through the points."""
    p0, p1, p2, p3 = np.roll(points, 1, 0), points, np.roll(points, -1, 0), np.roll(points, -2, 0)
    t = (np.arange(samples) / samples)[:, None, None]
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    return curve.transpose(1, 0, 2).reshape(-1, 2)


def _fill(points: np.ndarray, blur: float = 0.0) -> np.ndarray:
    """An anti-aliased polygon (head units) as float32[TEXTURE,TEXTURE] coverage."""
    mask = np.zeros((TEXTURE, TEXTURE), np.uint8)
    cv2.fillPoly(mask, [np.round(_pixels(points) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return (cv2.GaussianBlur(mask, (0, 0), blur) if blur else mask).astype(np.float32) / 255


def _paint(canvas: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
    """Blend a colour (or an image) into the canvas, in place, by coverage; works in its bounding box only."""
    rows, columns = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    if not len(rows):
        return
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    paint = colour[box] if np.ndim(colour) == 3 else np.float32(colour)
    canvas[box] += coverage[box][..., None] * (paint - canvas[box])


def _noise(rng: np.random.Generator, sigma: float, aspect: float = 1.0) -> np.ndarray:
    """Smooth noise of unit variance, float32[TEXTURE,TEXTURE]; aspect > 1 makes vertical streaks."""
    field = cv2.GaussianBlur(
        rng.standard_normal((TEXTURE, TEXTURE), dtype=np.float32), (0, 0), sigma, sigmaY=sigma * aspect
    )
    return field / field.std()


def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(TEXTURE, dtype=np.float32) + 0.5) * (2 * EXTENT / TEXTURE) - EXTENT
    return axis[None, :], axis[:, None]


def base_texture(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """All that does not move: albedo float32[S,S,3] and the slopes of the relief float32[S,S,2], S = TEXTURE."""
    rng = np.random.default_rng(subject.texture_seed)
    s, (x, y) = subject.shape, _grid()
    still = Pose(0, 0, 0, 0, 0, 1, 0, 0, 1)
    points = canonical_landmarks(subject, still)
    skin = 1 + 0.05 * _noise(rng, 18) + 0.035 * _noise(rng, 4) + 0.05 * _noise(rng, 0.9)
    albedo = (skin[..., None] * subject.skin).astype(np.float32)
    cheeks = sum(np.exp(-((x - c) ** 2 + (y - 0.3) ** 2) / 0.06) for c in (-0.5, 0.5))
    albedo *= 1 + cheeks[..., None] * np.float32([0.12, -0.06, -0.04])
    for _ in range(int(rng.poisson(5))):
        spot = np.exp(
            -((x - rng.uniform(-0.8, 0.8)) ** 2 + (y - rng.uniform(-0.6, 1)) ** 2) / rng.uniform(2e-4, 1.2e-3)
        )
        albedo *= 1 - 0.5 * spot[..., None]
    if subject.beard:
        region = _fill(_smooth(np.concatenate([points[2:15], points[[54, 53, 52, 51, 50, 49, 48]] - (0, 0.08)])), 4)
        _paint(albedo, region * subject.beard * np.clip(0.8 + 0.4 * _noise(rng, 0.9, 2), 0, 1.2), subject.hair)
    for brow in (points[17:22], points[22:27]):
        thick = s["brow_thick"] * np.array([0.5, 1, 1, 0.9, 0.7])[:, None] * (0, 1)
        _paint(
            albedo,
            0.85
            * _fill(np.concatenate([brow - thick, (brow + thick)[::-1]]), 1.0)
            * np.clip(0.9 + 0.2 * _noise(rng, 0.8), 0, 1),
            subject.hair,
        )
    nostril = sum(
        np.exp(-(((x - c) / 0.055) ** 2 + ((y - points[33, 1] + 0.01) / 0.03) ** 2))
        for c in (-0.45 * s["nose_width"], 0.45 * s["nose_width"])
    )
    albedo *= 1 - 0.65 * nostril[..., None]
    hairline = s["hairline"] + 0.95 * np.clip(np.abs(x) - 0.35, 0, None) ** 1.5 * 1.4 + 0.02 * _noise(rng, 3)
    cover = 1 / (1 + np.exp(np.clip((y - hairline) / 0.02, -30, 30)))
    sides = 1 / (1 + np.exp(np.clip((0.99 - np.abs(x)) / 0.015, -30, 30))) * (y < (1.0 if subject.long_hair else 0.0))
    strands = np.clip(1 + 0.35 * _noise(rng, 1.0, 8) + 0.15 * _noise(rng, 5, 4), 0.2, 2.2)
    _paint(albedo, np.maximum(cover, sides).astype(np.float32), (strands[..., None] * subject.hair).astype(np.float32))
    tip = s["nose_length"] - 0.16
    relief = (
        0.10
        * np.exp(-((x / 0.13) ** 2))
        * np.clip((y + 0.3) / (tip + 0.3), 0, 1) ** 1.3
        * (1 / (1 + np.exp(np.clip((y - tip - 0.06) / 0.025, -30, 30))))
    )
    relief = relief - sum(
        0.05 * np.exp(-(((x - c) / 0.2) ** 2 + ((y + 0.16) / 0.13) ** 2)) for c in (-s["eye_gap"], s["eye_gap"])
    )
    relief = (
        relief
        + 0.05 * np.exp(-((x / 0.35) ** 2 + ((y - 0.75) / 0.16) ** 2))
        + 0.04 * np.exp(-((x / 0.2) ** 2 + ((y - 1.0) / 0.12) ** 2))
    )
    step = 2 * EXTENT / TEXTURE
    slopes = np.stack(
        [cv2.Sobel(relief.astype(np.float32), cv2.CV_32F, *d, ksize=3) / (8 * step) for d in ((1, 0), (0, 1))], 2
    )
    return albedo, slopes


def frame_texture(subject: Subject, base: np.ndarray, pose: Pose, points: np.ndarray) -> np.ndarray:
    """The base albedo with this frame's eyes and mouth drawn in; points as from `canonical_landmarks`."""
    albedo = base.copy()
    for side, eye in ((-1, points[36:42]), (1, points[42:48])):
        outline = _smooth(eye)
        opening = _fill(outline)
        centre = np.array([side * subject.shape["eye_gap"] - 0.15 * pose.yaw * subject.shape["eye_width"], -0.14])
        circle = np.stack([np.cos(a := np.linspace(0, 2 * np.pi, 24, endpoint=False)), np.sin(a)], 1)
        _paint(albedo, _fill(outline + (0, -0.012), 1.2) * 0.6, subject.skin * 0.35)
        _paint(albedo, opening, np.array([0.75, 0.73, 0.7]))
        for radius, colour in ((0.078, subject.iris), (0.036, np.full(3, 0.01))):
            _paint(albedo, opening * _fill(centre + radius * circle), colour)
        _paint(albedo, opening * _fill(centre + (-0.025, -0.03) + 0.014 * circle), np.full(3, 1.6))
    _paint(albedo, _fill(_smooth(points[48:60]), 0.6), subject.lips)
    inner = _fill(_smooth(points[60:68], 4))
    _paint(albedo, inner, np.array([0.03, 0.008, 0.008]))
    teeth = points[60:68].copy()
    teeth[5:8, 1] = teeth[1:4, 1].mean() + 0.07
    _paint(albedo, inner * _fill(teeth) * min(1.0, 2.5 * pose.mouth), np.array([0.62, 0.6, 0.53]))
    if subject.glasses:
        circle = np.stack([np.cos(a := np.linspace(0, 2 * np.pi, 40, endpoint=False)), 0.75 * np.sin(a)], 1)
        rims = sum(
            _fill((side * 0.41, -0.13) + 0.29 * circle) - _fill((side * 0.41, -0.13) + 0.26 * circle)
            for side in (-1, 1)
        )
        bridge = _fill(np.array([(-0.13, -0.17), (0.13, -0.17), (0.13, -0.14), (-0.13, -0.14)]))
        _paint(albedo, np.clip(rims + bridge, 0, 1), np.full(3, 0.015))
    return albedo


def render_head(
    subject: Subject, textures: tuple[np.ndarray, np.ndarray], pose: Pose, light: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the head alone.

    light: unit vector float[3] from the head to the light, view space. Returns radiance float32[H,W,3], coverage
    float32[H,W] and landmarks float32[81,2] in pixels.
    """
    albedo, slopes = textures
    points = canonical_landmarks(subject, pose)
    albedo = frame_texture(subject, albedo, pose, points)
    r = rotation(pose)
    m = r @ np.diag(AXES**-2.0) @ r.T
    axis = np.arange(size, dtype=np.float32)
    x, y = (axis[None, :] - pose.x) / pose.scale, (axis[:, None] - pose.y) / pose.scale
    a, b, c = m[2, 2], m[0, 2] * x + m[1, 2] * y, m[0, 0] * x * x + 2 * m[0, 1] * x * y + m[1, 1] * y * y
    outline = np.sqrt(np.maximum(c - b * b / a, 1e-9))  # 1 on the silhouette
    coverage = np.clip((1 - outline) * pose.scale * 1.1 + 0.5, 0, 1).astype(np.float32)
    z = (-b + np.sqrt(np.maximum(b * b - a * (c - 1), 0))) / a
    view = np.stack([np.broadcast_to(x, z.shape), np.broadcast_to(y, z.shape), z], 2).astype(np.float32)
    head = view @ r.astype(np.float32)
    lookup = ((head[..., :2] + EXTENT) * (TEXTURE / (2 * EXTENT)) - 0.5).astype(np.float32)
    colour = cv2.remap(albedo, lookup, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    slope = cv2.remap(slopes, lookup, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    normal = head * (AXES**-2.0).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True) + 1e-6
    normal[..., :2] -= 1.6 * slope * (normal[..., 2:] > 0)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True) + 1e-6
    in_head = (r.T @ light).astype(np.float32)
    shade = np.maximum(normal @ in_head, 0)
    gloss = np.maximum(normal @ ((in_head + r.T[:, 2].astype(np.float32)) / np.linalg.norm(light + (0, 0, 1))), 0) ** 24
    radiance = colour * (0.35 + 0.75 * shade)[..., None] + 0.05 * gloss[..., None]
    return radiance.astype(np.float32), coverage, project(points, pose)
