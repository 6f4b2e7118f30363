"""The cache of tokens before the first adapter: the detector's own numbers, in pieces, whole after any kill."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from tiny_crops import face, write_crops
from torch import nn

from unmask import clip_bank, clip_views, clips, hulls, prefixes, sbi, shards
from unmask.clip_bank import Clips
from unmask.data.crops import CropStore
from unmask.detectors import base, clip_backbone
from unmask.prefixes import LivePrefixes
from unmask.views import FIXED

SIDE, SIZE, GRID = 64, 32, 4


class StandIn(base.Detector):
    """Tokens of a picture: the means of the colours of its 8x8 px patches times `gain`, before them that of all."""

    def __init__(self, gain: float = 1.0, size: int = SIZE):
        super().__init__()
        self.config, self.input_spec = {"gain": gain, "size": size}, base.InputSpec(size, frames=3)
        self.gain = nn.Parameter(torch.tensor(gain))

    @property
    def depth_key(self) -> str:
        return f"stand-in-{self.gain.item():g}"

    def prefix(self, images):
        patches = self.gain * nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Store and rows of a real video of five crops, a fake one of four, and a real image."""
    folder, rng = tmp_path_factory.mktemp("crops"), np.random.default_rng(0)
    pictures = [cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), (SIDE, SIDE)) for _ in range(10)]
    rows = write_crops(folder, pictures, [face(SIDE) + np.float32([k % 2, 0]) for k in range(10)])
    rows["item_id"], rows["frame"], rows["label"] = (
        list("aaaaabbbbc"),
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 0],
        [0] * 5 + [1] * 4 + [0],
    )
    return CropStore(folder), rows


@pytest.fixture
def bank(data):
    """Factory of clips; keywords change arguments."""

    def call(**given):
        return Clips(*data, **{"size": SIZE, "frames": 3, "versions": 2, "seed": 0} | given)

    return call


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()}


def expected(images, gain=1.0):
    """Tokens of frames uint8[T,S,S,3] by plain loops: float64[T,1+GRID*GRID,3]."""
    spec, out = base.InputSpec(SIZE), []
    for image in images:
        x = gain * (image / 255 - spec.mean) / spec.std
        patches = [x[8 * i : 8 * i + 8, 8 * k : 8 * k + 8].mean((0, 1)) for i in range(GRID) for k in range(GRID)]
        out.append([np.mean(patches, 0), *patches])
    return np.array(out)


def test_they_are_the_detectors_own(bank, tmp_path):
    some = bank()
    exact = prefixes.of_clips(StandIn(1.5), some, tmp_path, precision="fp32")
    rounded = prefixes.of_clips(StandIn(1.5), some, tmp_path)
    pd.testing.assert_frame_equal(exact.table, some.table)
    for i, length in enumerate(some.table["frames"]):
        own = expected(some.clip(i)["images"], 1.5)
        found, coarse = exact.tokens([i]), rounded.tokens([i])
        assert found.shape == coarse.shape == (1, length, 1 + GRID**2, 3)
        assert found.dtype == coarse.dtype == torch.float32
        np.testing.assert_allclose(found[0], own, atol=1e-5)
        np.testing.assert_allclose(coarse[0], own, rtol=2**-8, atol=1e-5)
    assert exact.name.startswith("stand-in-1.5-") and exact.folder == tmp_path / exact.name


def test_a_batch_is_its_clips_in_the_order_asked_for(bank, tmp_path, monkeypatch):
    monkeypatch.setattr(prefixes, "SHARD", 5)
    some = bank()
    found = prefixes.of_clips(StandIn(), some, tmp_path, precision="fp32")
    assert len(list(found.folder.glob("*.safetensors"))) > 3, "a batch must need several shards"
    numbers = np.random.default_rng(0).permutation(np.flatnonzero(some.table["frames"] == 3)).tolist() + [2]
    np.testing.assert_allclose(found.tokens(numbers), [expected(some.clip(i)["images"]) for i in numbers], atol=1e-5)
    index = pd.read_parquet(found.folder / shards.INDEX)
    rows = [(i, t) for i, length in enumerate(some.table["frames"]) for t in range(length)]
    assert index[["clip", "t"]].to_numpy().tolist() == [list(row) for row in rows]
    assert index["item_id"].tolist() == [some.table["item_id"][i] for i, _ in rows]
    assert index["kind"].tolist() == [some.table["kind"][i] for i, _ in rows]


@pytest.mark.parametrize("live", [False, True])
def test_single_frames_and_other_orders(bank, tmp_path, live):
    some, net = bank(), StandIn()
    found = LivePrefixes(net, some) if live else prefixes.of_clips(net, some, tmp_path, precision="fp32")
    video, image = [0, 4, 11], int(np.flatnonzero(some.table["frames"] == 1)[0])
    whole, edges = found.tokens(video), found.edges(video, GRID)[0]
    for ts in ([1], [2, 0, 1], [0, 0, 2, 2]):
        torch.testing.assert_close(found.tokens(video, ts), whole[:, ts])
        torch.testing.assert_close(found.edges(video, GRID, ts)[0], edges[:, ts])
    each = found.tokens(video, [[2], [0], [1]])
    torch.testing.assert_close(each, torch.stack([whole[0, [2]], whole[1, [0]], whole[2, [1]]]))
    mixed = found.tokens([4, image], [0])
    torch.testing.assert_close(mixed[0], whole[1, :1])
    np.testing.assert_allclose(mixed[1], expected(some.clip(image)["images"]), atol=1e-5)
    with pytest.raises(ValueError, match=r"clips of \[1, 3\] frames"):
        found.tokens([4, image])


def test_live_ones_are_the_same(bank, tmp_path, monkeypatch):
    some, net = bank(), StandIn()
    live = LivePrefixes(net, some)
    exact, rounded = (prefixes.of_clips(net, some, tmp_path, precision=p) for p in ("fp32", "bf16"))
    numbers = np.flatnonzero(some.table["frames"] == 3).tolist()
    made, true = [], clip_bank.Maker.make
    monkeypatch.setattr(clip_bank.Maker, "make", lambda maker, entry: made.append(entry) or true(maker, entry))
    tokens, (edges, known) = live.tokens(numbers + numbers[:1]), live.edges(numbers, GRID)
    assert len(made) == len(numbers), "edges do not need the clips once more"
    assert torch.equal(exact.tokens(numbers), tokens[:-1]) and torch.equal(tokens[-1], tokens[0])
    assert torch.equal(rounded.tokens(numbers), tokens[:-1].bfloat16().float())
    assert not tokens.requires_grad
    for cached in (exact, rounded):
        assert all(torch.equal(a, b) for a, b in zip(cached.edges(numbers, GRID), (edges, known), strict=True))


def test_edges_are_means_over_patches(bank, tmp_path):
    some = bank()
    found = prefixes.of_clips(StandIn(), some, tmp_path)
    for side in (GRID, 2, 1):
        px = SIZE // side
        for i, row in some.table.iterrows():
            values, known = found.edges([i], side)
            edges = some.clip(i)["edges"]
            cells = [[[e[px * y : px * y + px, px * x : px * x + px].mean() for x in range(side)] for y in range(side)]
                     for e in edges]  # fmt: skip
            np.testing.assert_allclose(values[0], cells, atol=1e-6)
            assert known.tolist() == [row["item_id"] != "b"] and known.dtype == torch.bool
            assert bool(values.any()) == (row["kind"] in ("blend", "varying", "steady"))
    with pytest.raises(ValueError, match="grid of 4, which 3 does not divide"):
        found.edges([0], 3)


def test_only_what_is_asked_for_is_read(bank, tmp_path, monkeypatch):
    found = prefixes.of_clips(StandIn(), bank(), tmp_path)
    slices = []

    class Slice:
        def __init__(self, rows):
            self.rows = rows

        def __getitem__(self, where):
            slices.append(where.stop - where.start)
            return self.rows[where]

    class File:
        def __init__(self, *given):
            self.file = safe_open(*given)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *why):
            return self.file.__exit__(*why)

        def get_slice(self, name):
            return Slice(self.file.get_slice(name))

    monkeypatch.setattr(prefixes, "safe_open", File)
    found.tokens([7, 2]), found.tokens([7, 3], [1]), found.edges([2], GRID)
    assert slices == [3, 3, 1, 1, 3]


def test_killed_and_resumed_equals_uninterrupted(bank, monkeypatch, tmp_path):
    monkeypatch.setattr(prefixes, "SHARD", 12)
    whole = prefixes.of_clips(StandIn(), bank(), tmp_path / "whole")
    true, written = shards.write, []

    def dying(folder, number, arrays):
        if len(written) == 2:
            raise Killed
        written.append(number)
        true(folder, number, arrays)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shards, "write", dying)
        prefixes.of_clips(StandIn(), bank(), tmp_path / "cut")
    assert len(files(tmp_path / "cut")) == 2
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", lambda folder, k, arrays: (written.append(k), true(folder, k, arrays)))
        cut = prefixes.of_clips(StandIn(), bank(), tmp_path / "cut")
    assert written == list(range(len(written))) and len(written) > 3, "no shard is computed twice"
    assert files(tmp_path / "cut") == files(tmp_path / "whole") and cut.name == whole.name


def test_processes_change_nothing(bank, monkeypatch, tmp_path):
    monkeypatch.setattr(prefixes, "SHARD", 12)
    here = prefixes.of_clips(StandIn(0.7), bank(), tmp_path / "here")
    there = prefixes.of_clips(StandIn(0.7), bank(), tmp_path / "there", workers=2)
    assert files(tmp_path / "here") == files(tmp_path / "there") and here.name == there.name
    some = bank()
    with ThreadPoolExecutor(2) as pool:  # beside a GPU, processes only make clips
        made = list(prefixes._made(some.maker, some.entries, pool))
    for clip, i in zip(made, range(len(some)), strict=True):
        assert np.array_equal(clip["images"], bank().clip(i)["images"])


def test_computed_once_and_again_only_for_what_changes_them(bank, data, monkeypatch, tmp_path):
    store, rows = data
    first = prefixes.of_clips(StandIn(), bank(), tmp_path)
    fixed = prefixes.of_clips(StandIn(), bank(versions=0), tmp_path)
    monkeypatch.setattr(prefixes, "_make_shard", lambda *given: (_ for _ in ()).throw(Killed))
    again = prefixes.of_clips(StandIn(), bank(), tmp_path)
    assert again.name == first.name and torch.equal(again.tokens([3]), first.tokens([3]))
    assert prefixes.of_clips(StandIn(), bank(versions=0, seed=3, recipe="intended"), tmp_path).name == fixed.name
    assert set(fixed.table["version"]) == {FIXED}
    changes = [{"seed": 1}, {"versions": 1}, {"frames": 2}, {"recipe": "intended"}, {"blends": False}]
    changed = [rows.assign(sha256=["0" * 64, *rows["sha256"].iloc[1:]]), rows.assign(label=1), rows.iloc[:7]]
    calls = [(StandIn(), bank(**change), "bf16") for change in changes]
    calls += [(StandIn(), Clips(store, given, SIZE, 3), "bf16") for given in changed]
    calls += [(StandIn(2.0), bank(), "bf16"), (StandIn(), bank(), "fp32"), (StandIn(size=40), bank(size=40), "bf16")]
    for net, clip, precision in calls:
        with pytest.raises(Killed):
            prefixes.of_clips(net, clip, tmp_path, precision=precision)
    hashed, settings = [], store.settings()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prefixes, "source_hash", lambda *modules: hashed.extend(modules) or "another")
        prefixes.of_clips(StandIn(), bank(), tmp_path)
    assert {prefixes, clip_bank, clip_views, clips, sbi, hulls, shards, base, clip_backbone} <= set(hashed)
    assert StandIn.__module__ in {module.__name__ for module in hashed}
    monkeypatch.setattr(CropStore, "settings", lambda store: settings | {"margin": 0.75})
    with pytest.raises(Killed):
        prefixes.of_clips(StandIn(), bank(), tmp_path)
    assert len(list(tmp_path.iterdir())) == len(calls) + 4, "every change has a folder of its own"


def test_what_does_not_fit_ends_it_before_anything_is_computed(bank, tmp_path):
    with pytest.raises(ValueError, match="40 pixels a side, the detector wants 32"):
        prefixes.of_clips(StandIn(), bank(size=40), tmp_path)
    with pytest.raises(ValueError, match="bf16 or fp32, not 'int8'"):
        prefixes.of_clips(StandIn(), bank(), tmp_path, precision="int8")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="its `config` does not build it again"):
        prefixes._detector(StandIn, {"gain": 2.0}, "stand-in-1")
    prefixes._LOADED.clear()


def test_nothing_global_is_drawn_from_or_changed(bank, tmp_path):
    torch.manual_seed(5)
    before, threads, net = torch.get_rng_state(), torch.get_num_threads(), StandIn().train()
    found = prefixes.of_clips(net, bank(), tmp_path)
    LivePrefixes(net, bank()).tokens([0])
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert net.training and not prefixes._LOADED and not found.tokens([0]).requires_grad
