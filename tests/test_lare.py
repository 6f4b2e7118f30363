"""LaRE against a plain loop, and its maps on disk: one row for every input, whole after any kill."""

import json
import shutil
from dataclasses import asdict, replace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from unmask import cli, lare, lare_maps, lare_model
from unmask.data.crops import CropStore, read_index
from unmask.data.landmarks import CANONICAL_68
from unmask.data.manifest import item_id, write_manifest
from unmask.data.video import read_frames
from unmask.preprocessing import preprocess

SCALING = 0.3
SIDE, LATENT = 64, 8


class Killed(BaseException):
    pass


def diffusion(folder, prediction="epsilon", seed=0):
    """A Stable Diffusion of 50 thousand random weights, in diffusers' layout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1,
            block_out_channels=(4, 8, 8, 8), latent_channels=4, norm_num_groups=2, scaling_factor=SCALING,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(4, 8), cross_attention_dim=8, norm_num_groups=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=1000, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                bos_token_id=2, eos_token_id=3,
            )
        )  # fmt: skip
    for part, network in (("vae", vae), ("unet", unet), ("text_encoder", text)):
        network.save_pretrained(folder / part)
    # Published ones name the sampler they were made for, here those of SD 1.5 and 2.1.
    kind = {"epsilon": PNDMScheduler, "v_prediction": DDIMScheduler, "sample": DDPMScheduler}[prediction]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = kind(**betas, prediction_type=prediction)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    words = {"a</w>": 0, "b</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: diffusion(tmp_path_factory.mktemp(kind), kind) for kind in ("epsilon", "v_prediction", "sample")}


@pytest.fixture(scope="module")
def settings(folders):
    return lare.Settings(str(folders["epsilon"]), "", timestep=200, ensemble=3, side=SIDE, prompt="a b")


def noisy_pictures(count, seed=0):
    """Pictures uint8[H,W,3], no two of one size."""
    rng = np.random.default_rng(seed)
    blocks = (rng.integers(0, 256, (5, 6, 3), dtype=np.uint8) for _ in range(count))
    return [
        cv2.resize(block, (50 + 7 * i, 90 - 5 * i), interpolation=cv2.INTER_CUBIC) for i, block in enumerate(blocks)
    ]


def bare_maps(folder, settings, pictures, noises):
    """LaRE as one would write it down: a picture, then a noise, at a time; the schedule by its formula."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    prediction = json.loads((folder / "scheduler/scheduler_config.json").read_text())["prediction_type"]
    tokens = torch.tensor([[2, 0, 1] + [3] * 74])  # start, a, b, end and padding
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()(tokens).last_hidden_state
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.prod(1 - betas[: settings.timestep + 1])
    maps = []
    for picture, noise in zip(pictures, noises, strict=True):
        small = np.asarray(Image.fromarray(picture).resize((settings.side,) * 2, Image.BICUBIC))
        x = torch.from_numpy(small.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
        z = vae.encode(x).latent_dist.mean * SCALING
        total = np.zeros((4, LATENT, LATENT))
        for eps in noise:
            z_t = kept**0.5 * z + (1 - kept) ** 0.5 * eps
            target = eps if prediction == "epsilon" else kept**0.5 * eps - (1 - kept) ** 0.5 * z[0]
            guess = unet(z_t.float(), settings.timestep, encoder_hidden_states=text).sample[0]
            total += ((guess - target) ** 2).double().numpy()
        maps.append(total / len(noise))
    return np.stack(maps)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_maps_are_those_of_a_plain_loop(folders, settings, kind):
    settings = replace(settings, source=str(folders[kind]))
    extractor, pictures = lare.Extractor(settings), noisy_pictures(5)
    noises = [extractor._noise(lare_model.content_hash(p), (4, LATENT, LATENT)) for p in pictures]
    maps = extractor.maps(pictures, batch=2)
    assert maps.dtype == np.float32 and maps.shape == (5, 4, LATENT, LATENT)
    np.testing.assert_allclose(maps, bare_maps(folders[kind], settings, pictures, noises), rtol=0, atol=1e-5)
    assert extractor.embedding.shape == (1, 77, 8)


def test_noise_is_standard_normal_and_a_pictures_own(settings):
    extractor = lare.Extractor(replace(settings, ensemble=50))
    first, again, other = (extractor._noise(content, (4, 32, 32)) for content in ("p", "p", "q"))
    assert torch.equal(first, again) and abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(first.reshape(50, -1)) - np.eye(50)).max() < 0.1, "the noises of one picture differ too"
    assert abs(first.mean()) < 0.01 and first.std() == pytest.approx(1, abs=0.01)


def test_same_picture_same_map_in_any_company(settings):
    extractor, pictures = lare.Extractor(settings), noisy_pictures(7)
    alone = np.concatenate([extractor.maps([picture], batch=1) for picture in pictures])
    order = [3, 6, 0, 5, 1, 4, 2]
    for batch in (2, 3, 7):
        np.testing.assert_allclose(extractor.maps([pictures[i] for i in order], batch), alone[order], atol=1e-5)
    twice = extractor.maps([pictures[0], pictures[1], pictures[0].copy()])
    np.testing.assert_allclose(twice[0], twice[2], atol=1e-5)
    assert abs(twice[0] - twice[1]).max() > 0.1
    state = torch.random.get_rng_state()
    extractor.maps(pictures[:1])
    lare.Extractor(settings)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's dice are left alone"
    assert extractor.maps([]).shape[0] == 0


def test_error_is_taken_in_float32_also_where_the_networks_are_not(settings):
    full, half = lare.Extractor(settings), lare.Extractor(settings)
    half.vae, half.unet, half.embedding = half.vae.half(), half.unet.half(), half.embedding.half()
    exact, rough = full.maps(pictures := noisy_pictures(3)), half.maps(pictures)
    assert rough.dtype == np.float32 and len(np.unique(rough - rough.astype(np.float16))) > 100
    assert 0 < abs(rough - exact).max() < 0.05


def test_key_covers_settings_and_weights_but_not_where_they_lie(folders, settings, tmp_path):
    keys = {"as it is": (key := lare.Extractor(settings).key)}
    for name, value in {"timestep": 201, "ensemble": 4, "side": 128, "prompt": "b a"}.items():
        keys[name] = lare.Extractor(replace(settings, **{name: value})).key
    keys["v"] = lare.Extractor(replace(settings, source=str(folders["v_prediction"]))).key
    for part in ("vae", "unet", "text_encoder"):
        folder = shutil.copytree(folders["epsilon"], tmp_path / part)
        shutil.rmtree(folder / part)
        shutil.copytree(diffusion(tmp_path / f"{part} of another", seed=1) / part, folder / part)
        keys[part] = lare.Extractor(replace(settings, source=str(folder))).key
    assert len(set(keys.values())) == len(keys)
    moved = shutil.copytree(folders["epsilon"], tmp_path / "moved")
    assert lare.Extractor(replace(settings, source=str(moved), revision="x")).key == key


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model", "text_encoder/model"])
def test_a_file_that_lacks_weights_is_refused(folders, settings, tmp_path, part):
    # The libraries would fill the gap with random numbers.
    path = shutil.copytree(folders["epsilon"], tmp_path / "model") / f"{part}.safetensors"
    tensors = load_file(path)
    lost = next(name for name in sorted(tensors) if "conv_out" not in name)
    save_file({name: value for name, value in tensors.items() if name != lost}, path, metadata={"format": "pt"})
    with pytest.raises(lare.LareError, match=f"lacks 1 weights of its network, such as .*{lost.split('.')[-2]}"):
        lare.Extractor(replace(settings, source=str(path.parents[1])))


def test_the_kits_text_encoder_is_read_by_transformers_4_and_5():
    # Version 4 finds tensors under these names alone; 5 writes others and reads both.
    names = load_file(lare_model.KIT / "diffusion-demo" / "text_encoder" / "model.safetensors")
    assert names and all(name.startswith("text_model.") for name in names)


def test_named_settings_are_the_published_ones_and_the_kits_own():
    published = {"sd15-t200-e4-256": (200, 4, 256), "sd21-t280-e8-512": (280, 8, 512)}
    own = {"demo-t200-e4-128": (200, 4, 128)}
    assert {n: (s.timestep, s.ensemble, s.side) for n, s in lare.SETTINGS.items()} == published | own
    for name in published:
        assert len(bytes.fromhex(lare.SETTINGS[name].revision)) == 20, "a commit, not a branch"
    local = lare.named("sd15-t200-e4-256", "here")
    assert asdict(local) == asdict(lare.SETTINGS["sd15-t200-e4-256"]) | {"source": "here", "revision": ""}


@pytest.mark.parametrize(
    "change, said", [({"timestep": 1000}, "from 0 to 999"), ({"source": "nowhere"}, "no folder nowhere")]
)
def test_what_cannot_be_loaded_is_said(settings, change, said):
    with pytest.raises(lare.LareError, match=said):
        lare.Extractor(replace(settings, **change))


def test_models_that_lack_a_part_or_predict_something_else_are_refused(folders, settings, tmp_path):
    with pytest.raises(lare.LareError, match="predicts sample"):
        lare.Extractor(replace(settings, source=str(folders["sample"])))
    folder = shutil.copytree(folders["epsilon"], tmp_path / "part")
    shutil.rmtree(folder / "unet")
    with pytest.raises(lare.LareError, match="not a Stable Diffusion"):
        lare.Extractor(replace(settings, source=str(folder)))
    with pytest.raises(lare.LareError, match="no settings 'sd15'"):
        lare.named("sd15")


def manifest(folder, names):
    rows = [{
        "item_id": item_id("t", name), "root": ".", "path": name, "kind": "image" if name.endswith("png") else "video",
        "dataset": "t", "split": "train", "label": 0, "method": "real", "subject": "", "source_id": "",
        "group_id": name, "camera": "", "annotations": f"{name}.npz" if (folder / f"{name}.npz").exists() else "",
    } for name in names]  # fmt: skip
    write_manifest(pd.DataFrame(rows).astype({"label": "int8"}), folder / "manifest.parquet")
    return folder / "manifest.parquet"


NAMES = ["a/face.png", "b/face.png", "clip.mp4", "broken.png", "copy.png", "absent.png", "c.png"]
IDS = {name: item_id("t", name) for name in NAMES}


@pytest.fixture
def media(tmp_path, make_clip):
    """Pictures of one basename, a picture and its copy, a clip, a file that is no picture and one that is not there."""
    folder = tmp_path / "media"
    for name, picture in zip(("a/face.png", "b/face.png", "c.png"), noisy_pictures(3), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), picture[..., ::-1])
    shutil.copy(folder / "a/face.png", folder / "copy.png")
    make_clip(folder / "clip.mp4", count=9)
    (folder / "broken.png").write_bytes((folder / "c.png").read_bytes()[:60])
    return manifest(folder, NAMES)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_input_has_a_row_and_failures_have_no_map(media, settings, tmp_path):
    index = lare.extract(media, tmp_path / "maps", settings, frames=2, batch=3)
    pd.testing.assert_frame_equal(index, lare_maps.read_index(tmp_path / "maps"))
    clip = read_frames(media.parent / "clip.mp4", 2)
    frames = [
        clip.indices.tolist() if n == "clip.mp4" else [-1] if n[0:6] in ("broken", "absent") else [0] for n in NAMES
    ]
    expected = [(IDS[name], frame) for name, part in zip(NAMES, frames, strict=True) for frame in part]
    assert list(zip(index["item_id"], index["frame"], strict=True)) == expected
    failed = index[index["status"] == "failed"].set_index("item_id")
    assert failed.index.tolist() == [IDS["broken.png"], IDS["absent.png"]] and failed["reason"].str.len().min() > 5
    assert failed.loc[IDS["absent.png"], "reason"] == "file not found" and (failed["position"] == -1).all()
    extractor, pictures = lare.Extractor(settings), noisy_pictures(3)
    shown = {("a/face.png", 0): pictures[0], ("b/face.png", 0): pictures[1], ("c.png", 0): pictures[2],
             ("copy.png", 0): pictures[0]}  # fmt: skip
    shown |= {("clip.mp4", int(i)): frame for i, frame in zip(clip.indices, clip.frames, strict=True)}
    for (name, frame), picture in shown.items():
        kept = lare.read(tmp_path / "maps", IDS[name], frame)
        assert kept.dtype == np.float32
        np.testing.assert_allclose(kept, extractor.maps([picture])[0], atol=1e-5)
    assert index.set_index("item_id").loc[IDS["copy.png"], "sha256"] == index["sha256"][0]
    for name, said in (("broken.png", failed["reason"].iloc[0]), ("absent.png", "file not found")):
        with pytest.raises(lare.LareError, match=said):
            lare.read(tmp_path / "maps", IDS[name], 0)
    with pytest.raises(lare.LareError, match="not among the inputs"):
        lare.read(tmp_path / "maps", IDS["c.png"], 7)
    with pytest.raises(lare.LareError, match="no index.parquet"):
        lare.read(tmp_path / "media", IDS["c.png"], 0)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(lare, "SHARD", 2)


def kill_after(monkeypatch, count):
    """From now on the run is killed once `count` shards are written."""
    real, left = lare_maps.write_shard, [count]

    def write(*arguments):
        if not left[0]:
            raise Killed
        left[0] -= 1
        real(*arguments)

    monkeypatch.setattr(lare_maps, "write_shard", write)


def test_killed_and_resumed_is_the_same_as_uninterrupted(media, settings, tmp_path, monkeypatch, small_shards):
    lare.extract(media, tmp_path / "whole", settings, frames=2)
    for count in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, count)
            lare.extract(media, tmp_path / "killed", settings, frames=2)
        assert not (tmp_path / "killed/index.parquet").exists()
    found = {path: path.stat().st_ino for path in (tmp_path / "killed/shards").iterdir()}
    assert len(found) == 3
    lare.extract(media, tmp_path / "killed", settings, frames=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {path: path.stat().st_ino for path in found} == found, "what was there is not made again"


def test_only_what_is_new_is_computed(media, settings, tmp_path, monkeypatch, small_shards):
    pictures = []
    real = lare.Extractor.maps
    monkeypatch.setattr(lare.Extractor, "maps", lambda s, p, b=8: (pictures.extend(p), real(s, p, b))[1])
    before = lare.extract(media, tmp_path / "maps", settings, frames=2)
    assert len(pictures) == 6
    pictures.clear()
    pd.testing.assert_frame_equal(lare.extract(media, tmp_path / "maps", settings, frames=2), before)
    assert not pictures
    old = lare.read(tmp_path / "maps", IDS["c.png"], 0)
    cv2.imwrite(str(media.parent / "c.png"), noisy_pictures(1, seed=5)[0])
    cv2.imwrite(str(media.parent / "absent.png"), noisy_pictures(1, seed=6)[0])
    index = lare.extract(media, tmp_path / "maps", settings, frames=2)
    assert len(pictures) == 2 and len(index) == len(before) and (index["status"] == "failed").sum() == 1
    assert abs(lare.read(tmp_path / "maps", IDS["c.png"], 0) - old).max() > 0.1, "the new index is seen at once"
    pictures.clear()
    shard = tmp_path / "maps/shards" / index["shard"].iloc[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(lare.LareError, match="damaged"):
        lare.read(tmp_path / "maps", IDS["a/face.png"], 0)
    lare.extract(media, tmp_path / "maps", settings, frames=2)
    assert 0 < len(pictures) < 4 and len(lare.read(tmp_path / "maps", IDS["a/face.png"], 0)) == 4


def test_maps_of_another_extractor_stay_until_the_new_ones_are_whole(media, settings, tmp_path, monkeypatch):
    index, out = lare.extract(media, tmp_path / "maps", settings, frames=2), tmp_path / "maps"
    first, other = lare.read(out, IDS["c.png"], 0), replace(settings, timestep=500)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 0)
        lare.extract(media, out, other, frames=2)
    assert np.array_equal(lare.read(out, IDS["c.png"], 0), first)
    changed = lare.extract(media, out, other, frames=2)
    assert not set(changed["extractor"]) & set(index["extractor"])
    assert {path.name for path in (out / "shards").iterdir()} == set(changed["shard"])
    assert abs(lare.read(out, IDS["c.png"], 0) - first).max() > 0.05


def test_precisions_are_not_mixed(media, settings, tmp_path, monkeypatch, small_shards):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 1)
        lare.extract(media, tmp_path / "maps", settings, frames=2)
    real = lare_model.Extractor.__init__
    monkeypatch.setattr(lare.Extractor, "__init__", lambda s, g: (real(s, g), setattr(s, "precision", "float16"))[0])
    with pytest.raises(lare.LareError, match="begun in float32"):
        lare.extract(media, tmp_path / "maps", settings, frames=2)


def test_a_map_that_is_not_finite_is_a_failure(media, settings, tmp_path, monkeypatch):
    spoilt = lare_model.content_hash(noisy_pictures(2)[1])
    noise = lare.Extractor._noise
    monkeypatch.setattr(
        lare.Extractor, "_noise", lambda s, c, shape: noise(s, c, shape) * (float("inf") if c == spoilt else 1)
    )
    index = lare.extract(media, tmp_path / "maps", settings, frames=2).set_index("item_id")
    assert index.loc[IDS["b/face.png"], ["status", "reason", "position"]].tolist() == [
        "failed", "the map is not finite", -1,
    ]  # fmt: skip
    assert (
        index.loc[IDS["c.png"], "status"] == "ok" and np.isfinite(lare.read(tmp_path / "maps", IDS["c.png"], 0)).all()
    )


def test_of_crops(tmp_path, make_clip, settings):
    """The stored crops of a clip; another has no face, and a third came to the manifest after the preprocessing."""
    names = ["clip.mp4", "faceless.mp4", "late.mp4"]
    z = CANONICAL_68 @ [1, 1j] * 8
    for name, face in zip(names[:2], (np.stack([z.real, z.imag], 1) + (60, 45), np.full((68, 2), np.nan)), strict=True):
        make_clip(tmp_path / name, count=6)
        np.savez(tmp_path / f"{name}.npz", landmarks=np.stack([face] * 6).astype(np.float32))
    preprocess(manifest(tmp_path, names[:2]), tmp_path / "crops", frames=3, size=48, workers=0)
    make_clip(tmp_path / names[2], count=6)
    listed, crops = manifest(tmp_path, names), tmp_path / "crops"
    index = lare.extract(listed, tmp_path / "maps", settings, crops)
    rows, store, extractor = read_index(crops), CropStore(crops), lare.Extractor(settings)
    assert index["frame"].tolist() == [*rows["frame"], -1, -1] and len(rows) == 3
    assert index["pts"].tolist()[:3] == rows["pts"].tolist()
    assert index["reason"].tolist() == ["", "", "", "no face found", "not among the crops"]
    for row in rows.to_dict("records"):
        kept = lare.read(tmp_path / "maps", row["item_id"], row["frame"])
        np.testing.assert_allclose(kept, extractor.maps([store.image(row)])[0], atol=1e-5)


def test_command(media, folders, tmp_path, capsys):
    out = tmp_path / "maps"
    given = ["lare", str(media), "--settings", "sd15-t200-e4-256", "--model", str(folders["epsilon"])]
    assert cli.main([*given, "--out", str(out), "--set", "preprocess.frames=2", "--batch", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"6 maps of 7 items, 2 failures: {out}") and "file not found" in said
    assert lare.read(out, IDS["c.png"], 0).shape == (4, 32, 32)


def test_crops_can_be_thinned_out_and_the_folder_says_what_its_maps_are(tiny_world, tiny_crops, folders, tmp_path):
    settings = lare.Settings(str(folders["epsilon"]), "", 200, 1, 64, "a b")
    manifest = tiny_world / "manifest.parquet"
    index = lare.extract(manifest, tmp_path / "maps", settings, tiny_crops, most=1)
    assert (index.groupby("item_id").size() == 1).all()
    about = lare_maps.read_settings(tmp_path / "maps")
    assert about["shape"] == [4, 8, 8] and about["settings"] == asdict(settings)
    assert {about["extractor"]} == set(index["extractor"])
    (tmp_path / "maps" / lare_maps.SETTINGS).unlink()
    with pytest.raises(lare.LareError, match="again"):
        lare_maps.read_settings(tmp_path / "maps")
