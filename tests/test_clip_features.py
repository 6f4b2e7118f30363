"""The cache of a CLIP's frozen features: the backbone's own numbers of the right views, whole after any kill."""

import cv2
import numpy as np
import pandas as pd
import pytest
import tiny_clips
import torch
from tiny_crops import face, write_crops, write_maps

from unmask import clip_features, clip_views, hulls, sbi, scoring, shards
from unmask.clip_views import Views
from unmask.data.crops import CropStore
from unmask.detectors import base, clip_backbone, roi
from unmask.lare_maps import LareError

SIDE, SIZE, CELLS = 96, 28, 8


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return clip_backbone.load(tiny_clips.write(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of seven crops of noise, their index, and the folder of their LaRE maps."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    pictures = [cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), (SIDE, SIDE)) for _ in range(7)]
    index = write_crops(folder / "crops", pictures, [face(SIDE, 0.5 + 0.02 * k) for k in range(7)])
    maps = rng.random((7, 4, CELLS, CELLS), np.float32)
    return folder / "crops", index, write_maps(folder / "maps", folder / "crops", maps)


@pytest.fixture
def made(backbone, data, tmp_path):
    """Features in a folder by name; keywords change arguments."""

    def call(name="cache", **given):
        crops, index, _ = data
        keys = {"backbone": backbone, "crops": crops, "rows": index, "seed": 0, "versions": 3} | given
        return clip_features.of_crops(out=tmp_path / name, **keys)

    return call


def pooled(backbone, images):
    """What the backbone makes of pictures uint8[N,S,S,3], one after another, normalised in NumPy."""
    x = (np.asarray(images, np.float64) / 255 - backbone.mean) / backbone.std
    with torch.no_grad():
        return [backbone.pooled_and_maps(torch.from_numpy(one.transpose(2, 0, 1)[None]).float()) for one in x]


def close(found, expected, atol=2e-3):
    """float16 against float32: a step of float16 for values of about 1 to 4, and relative beyond."""
    np.testing.assert_allclose(found.float().numpy(), expected.numpy(), rtol=1e-3, atol=atol)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()}


def test_the_fixed_view_gives_the_backbones_own_features(made, backbone, data):
    crops, index, maps = data
    found = made(versions=0, rows=index.sample(frac=1, random_state=1), maps=True, lare=maps)
    ordered = index.sort_values(["item_id", "frame"], ignore_index=True)
    pd.testing.assert_frame_equal(found.rows, ordered[["item_id", "frame", "pts", "sha256"]])
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in found.tensors.items()}
    assert shapes == {
        "pooled": ((7, 1, 20), torch.float16), "boxes": ((7, 1, 9, 4), torch.float32),
        "maps": ((7, 1, 32, 4, 4), torch.float16), "lare": ((7, 1, 4, CELLS, CELLS), torch.float32),
    }  # fmt: skip
    images = scoring.frame_images(CropStore(crops), ordered, base.InputSpec(SIZE))
    for i, (own, cells) in enumerate(pooled(backbone, images)):
        close(found.tensors["pooled"][i], own)
        close(found.tensors["maps"][i], cells)
    assert found.tensors["pooled"].float().std(0).min() > 0.01, "the pictures must differ for this to say anything"
    assert made(versions=0, seed=5).name == made(versions=0).name, "no dice, no seed"
    assert set(made(versions=0).tensors) == {"pooled", "boxes"}


def test_every_version_is_a_view_of_its_own(made, backbone, data):
    crops, index, maps = data
    found = made(lare=maps, seed=2)
    assert found.tensors["pooled"].shape == (7, 3, 20)
    ordered = index.sort_values(["item_id", "frame"], ignore_index=True)
    samples = Views(CropStore(crops), ordered, SIZE, 2, maps)
    for i in range(7):
        for version in range(3):
            view = samples[version, i, 0]
            close(found.tensors["pooled"][i, version], pooled(backbone, view["image"][None])[0][0][0])
            assert torch.equal(found.tensors["boxes"][i, version], view["boxes"])
            assert torch.equal(found.tensors["lare"][i, version], view["lare"])
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert (found.tensors["pooled"][i, one] - found.tensors["pooled"][i, other]).abs().max() > 0.01
            assert not torch.equal(found.tensors["boxes"][i, one], found.tensors["boxes"][i, other])


def test_killed_and_resumed_equals_uninterrupted(made, monkeypatch, tmp_path, data):
    monkeypatch.setattr(clip_features, "SHARD", 6)  # two crops
    whole, (true, written) = made("whole", lare=data[2], maps=True), (shards.write, [])

    def dying(folder, number, arrays):
        if len(written) == 2:
            raise Killed
        written.append(number)
        true(folder, number, arrays)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shards, "write", dying)
        made("cut", lare=data[2], maps=True)
    assert len(files(tmp_path / "cut")) == 2 and "index.parquet" not in files(tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", lambda f, number, a: (written.append(number), true(f, number, a)))
        cut = made("cut", lare=data[2], maps=True)
    assert written == [0, 1, 2, 3], "no shard is computed twice"
    assert files(tmp_path / "cut") == files(tmp_path / "whole") and len(files(tmp_path / "whole")) == 5
    assert cut.name == whole.name and all(torch.equal(cut.tensors[k], v) for k, v in whole.tensors.items())


def test_computed_once_and_again_only_for_what_changes_them(made, monkeypatch, data, tmp_path, backbone):
    crops, index, maps = data
    first, again = made(lare=maps), None
    monkeypatch.setattr(clip_features, "_make_shard", lambda *a: (_ for _ in ()).throw(Killed))
    again = made(lare=maps, batch=2)
    assert again.name == first.name and torch.equal(again.tensors["pooled"], first.tensors["pooled"])
    values = np.ones((7, 4, CELLS, CELLS), np.float32)
    other = clip_backbone.load(tiny_clips.write(tmp_path / "clip", seed=1))
    changes = [
        {"seed": 1}, {"versions": 2}, {"versions": 0}, {"maps": True}, {"rows": index.iloc[:6]}, {"lare": None},
        {"rows": index.assign(sha256=["0" * 64, *index["sha256"].iloc[1:]])}, {"backbone": other},
        {"lare": write_maps(tmp_path / "extractor", crops, values, extractor="f" * 12)},
        {"lare": write_maps(tmp_path / "precision", crops, values, precision="float16")},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(Killed):
            made(**{"lare": maps} | change)
    hashed = []
    monkeypatch.setattr(clip_features, "source_hash", lambda *modules: hashed.extend(modules) or "another")
    with pytest.raises(Killed):
        made(lare=maps)
    assert {clip_features, clip_views, shards, clip_backbone, roi, sbi, hulls} <= set(hashed)
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == len(changes) + 2, "every change has a folder of its own"
    assert sum(name.startswith(backbone.fingerprint[:12]) for name in names) == len(names) - 1


def test_other_crop_settings_are_other_features(made, data, tmp_path, monkeypatch):
    settings = CropStore(data[0]).settings()
    name = made().name
    monkeypatch.setattr(CropStore, "settings", lambda store: settings | {"margin": 0.75})
    assert made().name != name


def test_a_batch_of_any_size_gives_the_same_beyond_rounding(made):
    one, all_at_once = made("one", batch=1), made("all", batch=64)
    close(one.tensors["pooled"], all_at_once.tensors["pooled"].float())
    assert torch.equal(one.tensors["boxes"], all_at_once.tensors["boxes"])


def test_a_missing_map_ends_it_before_anything_is_computed(made, data, tmp_path, monkeypatch):
    partly = write_maps(tmp_path / "maps", data[0], np.ones((7, 4, CELLS, CELLS), np.float32), failed=[3])
    monkeypatch.setattr(clip_features, "_make_shard", lambda *a: (_ for _ in ()).throw(Killed))
    with pytest.raises(LareError, match="has no LaRE map: the map is not finite"):
        made(lare=partly)
    with pytest.raises(ValueError, match="no crops"):
        made(rows=data[1].iloc[:0])
    assert not (tmp_path / "cache").exists()


def test_nothing_global_is_drawn_from_or_changed(made, backbone):
    torch.manual_seed(5)
    np.random.seed(5)
    before, numbers, threads = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    where = {name: value.device for name, value in backbone.state_dict().items()}
    found = made()
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numbers)
    assert torch.get_num_threads() == threads and not found.tensors["pooled"].requires_grad
    assert {name: value.device for name, value in backbone.state_dict().items()} == where


def test_a_resnet_gives_its_own_maps(made, data, tmp_path):
    net = clip_backbone.load(tiny_clips.write(tmp_path / "rn", vision=tiny_clips.RESNET))
    found = made(backbone=net, versions=0, maps=True, rows=data[1].iloc[:1])
    images = scoring.frame_images(CropStore(data[0]), data[1].iloc[:1], base.InputSpec(64))
    own, cells = pooled(net, images)[0]
    close(found.tensors["pooled"][0], own)
    close(found.tensors["maps"][0], cells)
    assert found.tensors["maps"].shape == (1, 1, net.map_channels, 4, 4)
