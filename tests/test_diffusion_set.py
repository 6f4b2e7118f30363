"""Twins of real videos: only inside the mask do they differ, by the autoencoder's doing or also by the model's."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from test_lare import SCALING, diffusion

from unmask import diffusion_set
from unmask.data import decoding, derived
from unmask.data.landmarks import CANONICAL_68, forehead
from unmask.data.manifest import ManifestError, item_id, read_manifest, write_manifest
from unmask.data.video import Clip, encode, read_frames
from unmask.diffusion_set import Painter, Settings, make, paste, squares, timesteps, twins
from unmask.lare_model import LareError
from unmask.preprocessing import preprocess

CENTRE, SCALE, SIDE = (64, 48), 20.0, 32
FACE = (forehead(CANONICAL_68) * SCALE + CENTRE).astype(np.float32)
METHODS = {"real": 0, "vae": 1, "diffusion": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: diffusion(tmp_path_factory.mktemp(kind), kind) for kind in ("epsilon", "v_prediction", "sample")}


@pytest.fixture(scope="module")
def model(folders):
    return folders["epsilon"]


def textured(seed, height=101, width=128):
    noise = np.random.default_rng(seed).normal(120, 60, (height, width, 3))
    return np.clip(cv2.GaussianBlur(noise, (0, 0), 2), 0, 255).astype(np.uint8)


def film(count=5, faceless=(3,), travel=2.0):
    """A clip whose face goes right, with landmarks; in some frames there is none."""
    frames = np.stack([np.roll(textured(1), t, 1) for t in range(count)])
    points = np.stack([FACE + [travel * t, 0] for t in range(count)]).astype(np.float32)
    points[list(faceless)] = np.nan
    times = np.arange(count) / 25
    return Clip(frames, np.arange(count), times, "", 25, 128, 101, 1.0, count, np.full(count, np.nan), 1), points


def hull(points, shape, around):
    """Where a face's outline, `around` pixels wider, lies; bool[H,W]."""
    inside = np.zeros(shape, np.uint8)
    cv2.fillConvexPoly(inside, cv2.convexHull(np.round(points).astype(np.int32)), 1)
    return cv2.dilate(inside, np.ones((2 * around + 1, 2 * around + 1))) > 0


def made(folder, seed=0, item="ab", shown=None, **changes):
    shown = shown or film()
    painter = Painter(Settings(str(folder), **({"steps": 2, "strength": 0.6, "side": SIDE} | changes)))
    return {name: (label, np.stack(list(frames))) for name, label, frames in twins(painter, seed, item, *shown)}


def test_twins_are_the_same_frames_outside_the_mask(model):
    clip, points = film()
    found = made(model)
    assert {name: label for name, (label, _) in found.items()} == METHODS
    assert np.array_equal(found["real"][1], clip.frames)
    for t, frame in enumerate(clip.frames):
        for name in ("vae", "diffusion"):
            other = found[name][1][t]
            if t == 3:
                assert np.array_equal(other, frame)
                continue
            outside = ~hull(points[t], frame.shape[:2], 4)  # thrice the feather
            assert outside.mean() > 0.5 and np.array_equal(other[outside], frame[outside])
            # The outline is shrunk, and the feather is narrow: this is all the model's.
            inner = hull((points[t] - points[t].mean(0)) * 0.75 + points[t].mean(0), frame.shape[:2], 0)
            assert np.abs(other[inner].astype(float) - frame[inner]).mean() > 10
        assert t == 3 or not np.array_equal(found["vae"][1][t], found["diffusion"][1][t])


def through_the_vae(folder, crop):
    """The face float64[S,S,3] after the autoencoder, as one would write it down."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        x = torch.from_numpy(crop.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
        y = vae.decode(vae.encode(x).latent_dist.mean).sample[0].permute(1, 2, 0).double().numpy()
    return np.clip((y + 1) / 2 * 255, 0, 255)


def test_the_face_is_what_the_autoencoder_makes_of_the_square_around_it(model):
    """A face that stands still; its square is found by hand, and as large as what the model sees."""
    clip, points = film(count=3, faceless=(), travel=0)
    low, high = FACE.min(0).astype(float), FACE.max(0).astype(float)
    size = round(float((high - low).max() * 1.6))
    side = size // 8 * 8 + (8 if size % 8 else 0)
    x, y = np.round((low + high) / 2 - (high - low).max() * 0.8).astype(int)
    assert squares(points, clip.pts).tolist() == [[x, y, size]] * 3
    crop = np.zeros((size, size, 3), np.uint8)
    top = max(-y, 0)
    part = clip.frames[0][max(y, 0) : y + size, x : x + size]
    crop[top : top + len(part)] = part
    small = cv2.resize(crop, (side, side), interpolation=cv2.INTER_CUBIC)
    face = cv2.resize(through_the_vae(model, small), (size, size), interpolation=cv2.INTER_AREA)
    goal = clip.frames[0].astype(float)
    goal[max(y, 0) : y + size, x : x + size] = face[top : top + len(part)]
    inner = hull((FACE - FACE.mean(0)) * 0.7 + FACE.mean(0), goal.shape[:2], 0)
    found = made(model, shown=(clip, points), side=side)["vae"][1][0]
    assert inner.sum() > 500 and np.abs(found[inner] - goal[inner]).max() < 1.01


def test_pasting_at_the_border_keeps_the_place():
    frame, square, face = textured(2), np.array([-20, -5, 64]), np.full((64, 64, 3), 250, np.float32)
    face[:30] = 5
    out = paste(frame, face, square, FACE - FACE.mean(0) + [10, 25], 1.0)
    assert (
        (out[20:24, 2:12] == 5).all() and (out[26:30, 2:12] == 250).all() and np.array_equal(out[:, 45:], frame[:, 45:])
    )
    for away in ((500, 5), (5, 500), (-500, 5), (5, -500)):
        assert np.array_equal(paste(frame, face, np.array([*away, 64]), FACE + away, 1.0), frame)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoising_is_ddim(folders, kind):
    """Against diffusers' own sampler: of five trailing steps, those from 0.6 of the schedule on."""
    painter = Painter(Settings(str(folders[kind]), steps=3, strength=0.6, side=SIDE))
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(11, 4, 4, 4, generator=generator), torch.randn(1, 4, 4, 4, generator=generator)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind, clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(5)
    unet = UNet2DConditionModel.from_pretrained(folders[kind] / "unet").eval()
    with torch.no_grad():
        z = scheduler.add_noise(latents, noise.expand_as(latents), torch.tensor([599]))
        for t in scheduler.timesteps[2:]:
            guess = unet(z, t, encoder_hidden_states=painter.embedding.expand(11, -1, -1)).sample
            z = scheduler.step(guess, t, z).prev_sample
    torch.testing.assert_close(painter.redraw(latents, noise), z, atol=2e-4, rtol=1e-4)
    assert (z - latents).abs().mean() > 0.3


def test_timesteps_span_the_share_of_the_schedule_evenly():
    assert timesteps(0.6, 8, 1000) == [599, 524, 449, 374, 299, 224, 149, 74]
    assert timesteps(1, 4, 1000) == [999, 749, 499, 249] and timesteps(0, 8, 1000) == []
    assert timesteps(0.003, 8, 1000) == [2, 1, 0] and timesteps(0.6, 1, 1000) == [599]


def test_latents_are_scaled_as_the_model_learned_them(model):
    crop = textured(3, SIDE, SIDE)
    painter = Painter(Settings(str(model), 1, 0.5, SIDE))
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    with torch.no_grad():
        x = torch.from_numpy(crop.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
        goal = vae.encode(x).latent_dist.mean * SCALING
    torch.testing.assert_close(painter.encode(crop[None]), goal, atol=1e-5, rtol=0)


def test_no_strength_leaves_what_the_autoencoder_makes(model):
    found = made(model, strength=0.0)
    assert np.array_equal(found["vae"][1], found["diffusion"][1])
    assert not np.array_equal(found["vae"][1], found["real"][1])


def test_noise_is_the_clips_own_and_that_of_all_its_frames(model, monkeypatch):
    noises, real = [], Painter.redraw
    monkeypatch.setattr(Painter, "redraw", lambda s, z, noise: (noises.append((z, noise)), real(s, z, noise))[1])
    still = film(count=10, faceless=(), travel=0)
    still[0].frames[:] = still[0].frames[0]
    first = made(model, shown=still)["diffusion"][1]
    # Ten frames are two batches, and rounding may differ between their sizes.
    assert np.abs(first.astype(int) - first[0]).max() <= 1
    for seed, item in ((0, "ab"), (1, "ab"), (0, "cd")):
        made(model, seed, item)
    (latents, drawn), (_, again), *others = noises
    assert latents.shape == (10, 4, SIDE // 8, SIDE // 8) and drawn.shape == (1, *latents.shape[1:])
    assert torch.equal(drawn, again) and abs(drawn.mean()) < 0.5 and 0.6 < drawn.std() < 1.4
    assert all(abs(np.corrcoef(drawn.ravel(), other.ravel())[0, 1]) < 0.5 for _, other in others)
    state = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    made(model)
    assert torch.equal(torch.random.get_rng_state(), state[0]) and torch.get_num_threads() == 2
    torch.set_num_threads(state[1])


def originals(folder: Path, count: int = 2, frames: int = 4) -> Path:
    """A manifest of real videos of two data sets, one in another split, and of a fake, a picture, a faceless video."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count + 4):
        kind = "image" if i == count else "video"
        method, split = "swap" if i == count + 1 else "real", "train" if i == count + 2 else "test"
        name, dataset = f"{i}.mp4", f"set {i % 2}"
        encode(folder / name, [textured(i)[:, :, [0, 0, 0]]] * frames, crf=12, pix_fmt="yuv444p")
        points = np.repeat(FACE[None], frames, 0)
        points[slice(None) if i == count + 3 else 1] = np.nan
        np.savez(folder / f"{name}.npz", landmarks=points)
        rows.append({
            "item_id": item_id(dataset, name), "root": ".", "path": name, "kind": kind, "dataset": dataset,
            "split": split, "label": int(method == "swap"), "method": method, "subject": f"person {i}",
            "source_id": "", "group_id": f"group {i}", "camera": f"camera {i}", "annotations": f"{name}.npz",
        })  # fmt: skip
    write_manifest(pd.DataFrame(rows).astype({"label": "int8"}), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


FAST = {"steps": 2, "side": SIDE}


def test_manifest_and_videos(model, tmp_path, capsys):
    path = make(originals(tmp_path / "a"), tmp_path / "out", model, splits=("test", "train"), **FAST)
    assert capsys.readouterr().err.endswith("1 of 4 real videos left out: fewer than two frames with a face.\n")
    df = read_manifest(path)
    assert len(df) == 9 and df["path"].is_monotonic_increasing
    for i, split in ((0, "test"), (1, "test"), (4, "train")):
        own = df[df["group_id"] == f"group {i}"].set_index("method")
        assert own["label"].to_dict() == METHODS and len(set(own["annotations"])) == 1
        assert set(own["split"]) == {split} and set(own["camera"]) == {f"camera {i}"}
        assert set(own["subject"]) == {f"person {i}"} and set(own["dataset"]) == {f"set {i % 2}-diffusion"}
        source = read_frames(tmp_path / "a" / f"{i}.mp4", 99).frames[:, :100].astype(float)
        outside = ~hull(FACE, source.shape[1:3], 12)
        for method in METHODS:
            media = tmp_path / "out" / own.at[method, "path"]
            frames = read_frames(media, 99).frames.astype(float)
            assert frames.shape == source.shape and len(decoding.scan(str(media)).keys) == 1
            error = np.abs(frames - source)
            assert error[:, outside].mean() < 3 and (error[:, ~outside].mean() < 3) == (method == "real")
    items = preprocess(path, tmp_path / "crops", frames=99, size=32, workers=0)
    assert set(items["status"]) == {"ok"} and set(items["faces"]) == {3}


def test_any_workers_and_any_interruption_give_the_same_files(model, tmp_path, monkeypatch):
    monkeypatch.setattr(derived, "WORTH", 1)
    source = originals(tmp_path / "a", frames=3)
    make(source, tmp_path / "whole", model, workers=1, **FAST)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 1 + 2 * (3 + 1 + 1)
    make(source, tmp_path / "two", model, workers=2, **FAST)
    assert contents(tmp_path / "two") == whole
    written, real = [], diffusion_set.video.encode

    def dies(path, *arguments, **options):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(diffusion_set.video, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "out", model, **FAST)
    monkeypatch.setattr(diffusion_set.video, "encode", lambda p, *a, **o: written.append(p) or real(p, *a, **o))
    make(source, tmp_path / "out", model, **FAST)
    make(source, tmp_path / "out", shutil.copytree(model, tmp_path / "moved"), **FAST)
    assert contents(tmp_path / "out") == whole and len(written) == 4 + 3


def test_another_model_or_setting_makes_the_drawn_twins_anew(model, tmp_path):
    source, out, folder = originals(tmp_path / "a", frames=4), tmp_path / "out", tmp_path / "model"
    shutil.copytree(model, folder)
    read = {}

    def videos(what, **changes):
        df = read_manifest(make(source, out, folder, **(FAST | changes)))
        read[what] = {m: [(out / p).read_bytes() for p in sorted(part["path"])] for m, part in df.groupby("method")}
        assert len(list((out / "videos").iterdir())) == 6
        return read[what]

    first = videos("first")
    for what, changes in {"steps": 3, "strength": 0.9, "seed": 1}.items():
        other = videos(what, **{what: changes})
        assert sorted(other["real"]) == sorted(first["real"]) and sorted(other["vae"]) == sorted(first["vae"])
        assert not set(other["diffusion"]) & set(first["diffusion"])
    assert not set(videos("side", side=40)["vae"]) & set(first["vae"])
    assert videos("as at first") == first
    for part in ("unet", "vae"):
        shutil.rmtree(folder / part)
        shutil.copytree(diffusion(tmp_path / f"another {part}", seed=1) / part, folder / part)
    replaced = videos("model")
    assert not {*replaced["vae"], *replaced["diffusion"]} & {*first["vae"], *first["diffusion"]}
    assert {len(read_frames(path, 9).pts) for path in (out / "videos").iterdir()} == {4}
    videos("shorter", frames=3)
    assert {len(read_frames(path, 9).pts) for path in (out / "videos").iterdir()} == {3}


def test_what_cannot_be_is_refused_before_anything_is_written(folders, model, tmp_path):
    source, out = originals(tmp_path / "a", count=1, frames=2), tmp_path / "out"
    broken = shutil.copytree(model, tmp_path / "broken")
    shutil.rmtree(broken / "vae")
    for folder, said in ((tmp_path / "a", "not a Stable Diffusion"), (tmp_path / "no", "no folder"),
                         (broken, "not a Stable Diffusion"), (folders["sample"], "predicts sample")):  # fmt: skip
        with pytest.raises(LareError, match=said):
            make(source, out, folder, **FAST)
    for changes, said in (({"steps": 0}, "a step"), ({"strength": 1.1}, "strength"), ({"strength": -0.1}, "strength"),
                          ({"side": 36}, "multiple of 8"), ({"side": 0}, "multiple of 8")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            make(source, out, model, **(FAST | changes))
    assert not out.exists()
    with pytest.raises(ManifestError, match="no rows"):
        make(source, out, model, splits=("val",), **FAST)


def test_videos_of_the_world(tiny_world, model, tmp_path):
    world = read_manifest(tiny_world / "manifest.parquet")
    expected = world[(world["split"] == "test") & (world["method"] == "real") & (world["kind"] == "video")]
    df = read_manifest(make(tiny_world / "manifest.parquet", tmp_path, model, frames=3, **FAST))
    assert len(df) == 3 * len(expected) > 0 and set(df["dataset"]) == {"world-a-diffusion", "world-b-diffusion"}
    counts = df.groupby(["dataset", "subject", "camera", "group_id"]).size()
    assert set(counts) == {3} and set(df["group_id"]) == set(expected["group_id"])
