"""D2ST-Adapter: the layer against plain loops, still clips, whole coverage, sampling back ends, export."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import erf

from unmask.detectors import d2st
from unmask.detectors.d2st import D2STAdapter

GEOMETRIES = {"toy": (32, 4), "ViT-B/16": (768, 14), "ViT-L/14": (1024, 16)}  # width and patches a side
PARAMETERS = {768: 606_192, 1024: 1_070_400}
each_geometry = pytest.mark.parametrize("dim, side", GEOMETRIES.values(), ids=GEOMETRIES)
each_mode = pytest.mark.parametrize("mode", d2st.MODES)
each_backend = pytest.mark.parametrize("backend", d2st.BACKENDS)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def trained(dim, seed=0, **arguments):
    """An adapter with no weight at zero, and points that are shifted by all that is allowed."""
    adapter = D2STAdapter(dim, **arguments)
    generator = torch.Generator().manual_seed(seed)
    for name, value in adapter.named_parameters():
        value.normal_(std=0.5 / math.sqrt(max(1, value[0].numel())), generator=generator)
        if "norm.weight" in name:
            value.add_(1)
        if "to_offset" in name:
            value.mul_(4)
    return adapter


# The layer in NumPy, one window, point, corner and query at a time


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def depthwise(maps, kernel, bias, strides):
    """maps [T,H,W,C], kernel [C,1,t,h,w]: every window of the maps as they are."""
    windows = kernel.shape[2:]
    counts = [(s - k) // step + 1 for s, k, step in zip(maps.shape, windows, strides, strict=False)]
    out = np.empty((*counts, maps.shape[3]))
    for place in itertools.product(*map(range, counts)):
        part = tuple(slice(i * step, i * step + k) for i, step, k in zip(place, strides, windows, strict=True))
        out[place] = np.einsum("zyxc,czyx->c", maps[part], kernel[:, 0]) + bias
    return out


def trilinear(maps, place, border):
    """The value of maps [T,H,W,C] at one place z,y,x."""
    if border:
        place = [min(max(p, 0), size - 1) for p, size in zip(place, maps.shape, strict=False)]
    low, value = [math.floor(p) for p in place], np.zeros(maps.shape[3])
    for step in itertools.product((0, 1), repeat=3):
        cell = [a + b for a, b in zip(low, step, strict=True)]
        if all(0 <= i < size for i, size in zip(cell, maps.shape, strict=False)):
            value += np.prod([1 - abs(p - i) for p, i in zip(place, cell, strict=True)]) * maps[tuple(cell)]
    return value


def place_of(window, shift, sizes, aligned):
    """z,y,x in cells of the point of one window; shift [T',H',W',3] in -1..1."""
    place = []
    for axis, size in enumerate(sizes):
        n = shift.shape[axis]
        unit = 2 * (window[axis] + 0.5) / n - 1 + min(1, 2 / n) * shift[window][axis]  # -1 and 1 are the map's ends
        place.append(((unit + 1) * size - 1) / 2 if aligned else (unit + 1) / 2 * (size - 1))
    return place


def plain_pathway(w, x, groups, kernel, strides, aligned):
    """One clip [T,1+H*W,r]: what is added to it, the places [G,n,3] and the attention [G,T,1+H*W,n]."""
    t, tokens, r = x.shape
    side, c = math.isqrt(tokens - 1), r // groups
    x = layer_norm(x, w["norm.weight"], w["norm.bias"])
    q = x @ w["query.weight"].T + w["query.bias"]
    maps, values = (a[:, 1:].reshape(t, side, side, r) for a in (q, x))
    if aligned:  # 5 + 3 k and 7 k patches, 4 k frames
        wide = next(k for k in itertools.count(kernel[1], strides[1]) if k >= side) - side
        late = -t % kernel[0]
        maps = np.pad(maps, [(0, late), *[(wide // 2, wide - wide // 2)] * 2, (0, 0)], "edge")
    places, read = [], []
    for g in range(groups):
        own = slice(g * c, (g + 1) * c)
        found = depthwise(maps[..., own], w["offsets.conv.weight"], w["offsets.conv.bias"], strides)
        found = gelu(layer_norm(found, w["offsets.norm.weight"], w["offsets.norm.bias"]))
        shift = np.tanh(found @ w["offsets.to_offset.weight"].T)
        ours = [place_of(p, shift, (t, side, side), aligned) for p in np.ndindex(shift.shape[:3])]
        places.append(ours)
        read.append([trilinear(values[..., own], p, aligned) for p in ours])
    read = np.concatenate(read, 1)  # [n,r]
    k, v = (read @ w[f"{name}.weight"].T + w[f"{name}.bias"] for name in ("key", "value"))
    attention, out = np.empty((groups, t, tokens, len(read))), np.empty_like(x)
    for g, i, j in np.ndindex(groups, t, tokens):
        own = slice(g * c, (g + 1) * c)
        scores = np.exp(k[:, own] @ q[i, j, own] / math.sqrt(c))
        attention[g, i, j] = scores / scores.sum()
        out[i, j, own] = attention[g, i, j] @ v[:, own]
    return out @ w["out.weight"].T + w["out.bias"], np.array(places), attention


def plain(adapter, clip, groups, aligned):
    """One clip [T,1+H*W,D]: the layer's output, and places and attention of its pathways."""
    w = {name: value.detach().numpy() for name, value in adapter.state_dict().items()}
    t, tokens, _ = clip.shape
    side = math.isqrt(tokens - 1)
    x = gelu(clip @ w["down.weight"].T + w["down.bias"])
    r = x.shape[2]
    maps = x[:, 1:].reshape(t, side, side, r)
    maps = np.pad(maps, [(1, 1), (0, 0), (0, 0), (0, 0)], "edge" if aligned else "constant")
    maps = np.pad(maps, [(0, 0), (1, 1), (1, 1), (0, 0)])
    added = depthwise(maps, w["positional.weight"], w["positional.bias"], (1, 1, 1))
    x = np.concatenate([x[:, :1], x[:, 1:] + added.reshape(t, -1, r)], 1)
    published = {"spatial": ((4, 5, 5), (4, 3, 3)), "temporal": ((1, 7, 7), (1, 7, 7))}
    seen = {}
    for name, (kernel, strides) in published.items():
        own = {key.removeprefix(f"paths.{name}."): value for key, value in w.items() if f"paths.{name}." in key}
        seen[name] = plain_pathway(own, x, groups, kernel, strides, aligned)
    both = ((x + seen["spatial"][0]) + (x + seen["temporal"][0])) / 2
    return clip + gelu(gelu(both) @ w["up.weight"].T + w["up.bias"]), seen


@pytest.mark.parametrize(
    "mode, t, side, points",
    [("reference", 5, 8, (4, 5)), ("aligned", 5, 8, (8, 20)), ("aligned", 3, 4, (1, 3))],
    ids=str,
)
@each_backend
def test_the_layer_equals_plain_loops(mode, t, side, points, backend):
    adapter = trained(24, mode=mode, backend=backend, ratio=0.5, groups=2).double()
    tokens = noise(2, t, 1 + side * side, 24, dtype=torch.float64)
    found, seen = adapter(tokens).detach().numpy(), adapter.look(tokens)
    for i, clip in enumerate(tokens.numpy()):
        expected, parts = plain(adapter, clip, 2, mode == "aligned")
        assert np.abs(expected - clip).max() > 0.1
        assert np.abs(found[i] - expected).max() < 1e-12
        for (name, (places, attention)), n in zip(seen.items(), points, strict=True):
            assert places.shape == (2, 2, n, 3)
            assert np.abs(places[i].numpy() - parts[name][1]).max() < 1e-12
            assert np.abs(attention[i].numpy() - parts[name][2]).max() < 1e-12


# Size, start and first step


@pytest.mark.parametrize("dim, count", PARAMETERS.items())
@each_mode
def test_as_many_parameters_as_published(dim, count, mode):
    adapter = D2STAdapter(dim, mode=mode)
    assert sum(value.numel() for value in adapter.parameters()) == count
    for name, offsets in {"spatial": {768: 5088, 1024: 6784}, "temporal": {768: 2640, 1024: 3520}}.items():
        assert sum(value.numel() for value in adapter.paths[name].offsets.parameters()) == offsets[dim]


def test_modes_and_back_ends_share_weights():
    states = [D2STAdapter(32, mode=m, backend=b).state_dict() for m in d2st.MODES for b in d2st.BACKENDS]
    assert all({k: v.shape for k, v in s.items()} == {k: v.shape for k, v in states[0].items()} for s in states)


def tower(dim, side):
    """An image tower of CLIP with random weights, frozen, and its blocks; 8 pixels a patch."""
    from open_clip.transformer import VisionTransformer

    visual = VisionTransformer(8 * side, 8, dim, 2 if dim < 100 else 1, dim // 16, 4.0, output_dim=16)
    return visual.requires_grad_(False).eval()


def with_adapters(visual, adapters, clips):
    """Pooled outputs float[B,T,16] of clips, with an adapter behind every block."""
    b, t = clips.shape[:2]

    def hook(adapter):
        return lambda block, given, out: adapter(out.unflatten(0, (b, t))).flatten(0, 1)

    blocks = visual.transformer.resblocks
    handles = [block.register_forward_hook(hook(a)) for block, a in zip(blocks, adapters, strict=True)]
    try:
        return visual(clips.flatten(0, 1)).unflatten(0, (b, t))
    finally:
        for handle in handles:
            handle.remove()


@each_geometry
def test_at_first_the_frozen_clip_and_only_the_last_layer_learns(dim, side):
    visual = tower(dim, side)
    adapters = [D2STAdapter(dim) for _ in visual.transformer.resblocks]
    clips = noise(1, 2, 3, 8 * side, 8 * side)
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    with torch.no_grad():  # with gradients, PyTorch's attention rounds in other places
        frozen = visual(clips.flatten(0, 1))
        assert torch.equal(with_adapters(visual, adapters, clips).flatten(0, 1), frozen)
    optimizer = torch.optim.AdamW([p for a in adapters for p in a.parameters()], lr=1e-3)
    with_adapters(visual, adapters, clips).square().sum().backward()
    for adapter in adapters:
        for name, value in adapter.named_parameters():
            assert bool(value.grad.any()) == name.startswith("up."), name
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(with_adapters(visual, adapters, clips).flatten(0, 1), frozen)
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())
    assert all(value.grad is None for value in visual.parameters())


@pytest.mark.parametrize("dim, side", list(GEOMETRIES.values())[1:], ids=list(GEOMETRIES)[1:])
def test_the_published_layer_starts_as_identity_too(dim, side):
    tokens = noise(1, 4, 1 + side * side, dim)
    assert torch.equal(D2STAdapter(dim, mode="reference")(tokens), tokens)


# Where points are


def unshifted(dim, mode, side, t):
    adapter = D2STAdapter(dim, mode=mode)
    for path in adapter.paths.values():
        torch.nn.init.zeros_(path.offsets["to_offset"].weight)
    return {name: places[0].numpy() for name, (places, _) in adapter.look(noise(1, t, 1 + side * side, dim)).items()}


def grid(z, y, x):
    return np.stack(np.meshgrid(z, y, x, indexing="ij"), -1).reshape(-1, 3)


def test_without_shifts_points_are_on_a_uniform_grid():
    found = unshifted(32, "aligned", 14, 12)
    whole = [1.25, 4.75, 8.25, 11.75]  # centres of quarters of 14 patches
    assert np.allclose(found["spatial"], grid([1.5, 5.5, 9.5], whole, whole), atol=1e-5)
    assert np.allclose(found["temporal"], grid(range(12), [3, 10], [3, 10]), atol=1e-5)
    found = unshifted(32, "aligned", 16, 6)  # 6 frames are padded to 8, and 16 patches to 17 and 21
    fifths, thirds = 3.2 * np.arange(5) + 1.1, 16 / 3 * np.arange(3) + 13 / 6
    assert np.allclose(found["spatial"], grid([1, 4], fifths, fifths), atol=1e-5)
    assert np.allclose(found["temporal"], grid(range(6), thirds, thirds), atol=1e-5)
    found = unshifted(32, "reference", 16, 12)
    z, quarters = 11 * (np.arange(12) + 0.5) / 12, 15 * (np.arange(4) + 0.5) / 4
    assert np.allclose(found["spatial"], grid([11 / 6, 11 / 2, 55 / 6], quarters, quarters), atol=1e-5)
    assert np.allclose(found["temporal"], grid(z, [3.75, 11.25], [3.75, 11.25]), atol=1e-5)
    assert z[0] == pytest.approx(0.458, abs=1e-3)  # not on a frame


@each_backend
@each_mode
def test_ramps_are_read_as_the_coordinates_of_the_points(backend, mode):
    t, side, g = 5, 8, 2
    path = trained(24, mode=mode, backend=backend, ratio=0.5, groups=g).paths["spatial"]
    torch.nn.init.eye_(path.key.weight)
    torch.nn.init.zeros_(path.key.bias)
    ramps = torch.from_numpy(grid(range(t), range(side), range(side))).float().view(1, t, side * side, 3)
    values = torch.zeros(1, t, 1 + side * side, 12)
    for group in range(g):
        values[:, :, 1:, 6 * group : 6 * group + 3] = ramps
    places, keys, _ = path.points(values, noise(*values.shape))
    inside = (places >= 0) & (places <= torch.tensor([t - 1, side - 1, side - 1]))
    assert 0.2 < inside.float().mean() and places.std(2).min() > 0.2
    if mode == "aligned":
        places = places.clamp(torch.zeros(3), torch.tensor([t - 1.0, side - 1, side - 1]))
        inside = torch.ones_like(inside)
    inside = inside.all(3)
    assert inside.any() and (keys[..., :3] - places)[inside].abs().max() < 1e-5


@pytest.mark.parametrize("side, mode, rows", [(16, "aligned", 16), (14, "aligned", 14), (16, "reference", 14)])
def test_offsets_see_every_patch_and_every_frame_when_aligned(side, mode, rows):
    adapter = trained(32, mode=mode)
    queries = noise(1, 6, side, side, 8).requires_grad_()
    for path in adapter.paths.values():
        (gradient,) = torch.autograd.grad(path.places(queries).sum(), queries)
        seen = gradient[0].abs().amax(3) > 0
        frames = 4 if mode == "reference" and path is adapter.paths["spatial"] else 6
        assert seen[:frames, :rows, :rows].all()
        assert not seen[frames:].any() and not seen[:, rows:].any() and not seen[:, :, rows:].any()


# Images, clips and batches


@pytest.mark.parametrize(
    "dim, side, lengths",
    [(*GEOMETRIES["toy"], range(2, 17)), (*GEOMETRIES["ViT-B/16"], (3,)), (*GEOMETRIES["ViT-L/14"], (5,))],
    ids=GEOMETRIES,
)
def test_an_image_is_that_image_repeated(dim, side, lengths):
    adapter = trained(dim)
    image = noise(2, 1, 1 + side * side, dim)
    expected = adapter(image)
    assert (expected - image).abs().max() > 0.1
    for t in lengths:
        found = adapter(image.expand(-1, t, -1, -1))
        assert (found - expected).abs().max() < 5e-6, t


def test_the_published_layer_takes_repeated_images_for_clips():
    adapter, image = trained(32, mode="reference"), noise(1, 1, 50, 32)
    short, long = (adapter(image.expand(-1, t, -1, -1)) for t in (4, 8))
    assert (short[:, 1] - long[:, 1]).abs().max() > 1e-3


@each_mode
def test_clips_of_a_batch_do_not_meet_and_frames_of_a_clip_do(mode):
    adapter, tokens = trained(32, mode=mode), noise(4, 5, 50, 32)
    found, order = adapter(tokens), torch.tensor([2, 0, 3, 1])
    assert (adapter(tokens[order]) - found[order]).abs().max() < 1e-6
    other = tokens.clone()
    other[1:] = noise(3, 5, 50, 32, seed=1)
    assert (adapter(other)[0] - found[0]).abs().max() < 1e-6
    other = tokens.clone()
    other[0, 4] = 0
    assert (adapter(other)[0, 0] - found[0, 0]).abs().max() > 1e-4
    frames = torch.tensor([1, 0, 4, 2, 3])
    assert (adapter(tokens[:, frames]) - found[:, frames]).abs().max() > 1e-3


@pytest.mark.parametrize("t", [1, 5])
def test_every_pathway_alone(t):
    tokens, both = noise(2, t, 50, 32), trained(32)
    found = {}
    for name in d2st.WINDOWS:
        adapter = D2STAdapter(32, pathways=(name,))
        adapter.load_state_dict({k: v for k, v in both.state_dict().items() if k in adapter.state_dict()})
        assert list(adapter.look(tokens)) == [name]
        found[name] = adapter(tokens)
    # What the other pathway would add is zero when its last layer is.
    for name, other in zip(d2st.WINDOWS, reversed(d2st.WINDOWS), strict=True):
        one = trained(32)
        torch.nn.init.zeros_(one.paths[other].out.weight)
        torch.nn.init.zeros_(one.paths[other].out.bias)
        assert (one(tokens) - found[name]).abs().max() < 1e-6
    assert (found["spatial"] - found["temporal"]).abs().max() > 1e-3


@each_backend
def test_clips_of_several_lengths_at_once_equal_separate_batches(backend):
    adapter, shapes = trained(32, backend=backend).double(), [(3, 1), (2, 12), (1, 5)]
    clips = [noise(b, t, 17, 32, seed=t, dtype=torch.float64) for b, t in shapes]
    apart = [adapter(clip).flatten(0, 1) for clip in clips]
    together = adapter.adapt(torch.cat([clip.flatten(0, 1) for clip in clips]), shapes)
    assert (together - torch.cat(apart)).abs().max() < 1e-12
    names, values = zip(*adapter.named_parameters(), strict=True)
    expected = torch.autograd.grad(sum(part.square().sum() for part in apart), values)
    found = torch.autograd.grad(together.square().sum(), values)
    for name, one, other in zip(names, found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-12 * (1 + other.abs().max()), name


def test_an_embedding_of_the_frame_tells_frames_apart():
    adapter, image = trained(32, frames_max=6, embedding=True), noise(2, 1, 17, 32)
    clip = adapter(image.expand(-1, 6, -1, -1))
    assert (clip - adapter(image)).abs().max() > 1e-2
    with torch.no_grad():
        adapter.embedding.copy_(adapter.embedding[:1].expand(6, -1).clone())
    constant = adapter.embedding[0]
    expected = adapter(image)
    assert (adapter(image.expand(-1, 6, -1, -1)) - expected).abs().max() < 5e-6
    moved = trained(32, frames_max=6)  # the constant moves into the bias of the first layer
    state = {k: v for k, v in adapter.state_dict().items() if k != "embedding"}
    state["down.bias"] = state["down.bias"] + adapter.down.weight @ constant
    moved.load_state_dict(state)
    assert (moved(image) - expected).abs().max() < 1e-5


# Sampling and gradients


@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize("sample", [d2st.sample_gather, d2st.sample_grid])
def test_sampling_equals_plain_loops_far_outside_too(sample, border):
    values, places = noise(2, 3, 4, 5, 2, 3, dtype=torch.float64), 4 * noise(2, 2, 40, 3, dtype=torch.float64) + 1
    found = sample(values, places, border).numpy()
    for b, g, i in np.ndindex(2, 2, 40):
        expected = trilinear(values[b, ..., g, :].numpy(), places[b, g, i].tolist(), border)
        assert np.abs(found[b, g, i] - expected).max() < 1e-13


@each_mode
@each_geometry
def test_both_back_ends_have_the_same_outputs_and_gradients(mode, dim, side):
    t = 5 if dim < 100 else 4
    side = 7 if mode == "reference" and dim < 100 else side
    found = []
    for backend in d2st.BACKENDS:
        adapter = trained(dim, mode=mode, backend=backend).double()
        tokens = noise(1, t, 1 + side * side, dim, dtype=torch.float64).requires_grad_()
        out = adapter(tokens)
        values = [tokens, *adapter.parameters()]
        found.append([out, *torch.autograd.grad(out.square().mean(), values)])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-12 * (1 + one.abs().max())
    to_offset = [name for name, _ in adapter.named_parameters()].index("paths.spatial.offsets.to_offset.weight")
    assert found[0][2 + to_offset].abs().max() > 1e-9


def test_gradients_are_right_to_values_and_places():
    values = noise(1, 3, 3, 2, 2, 2, dtype=torch.float64).requires_grad_()
    places = (2 * noise(1, 2, 6, 3, dtype=torch.float64) + 0.7).requires_grad_()
    for border in (True, False):
        assert torch.autograd.gradcheck(lambda v, p, b=border: d2st.sample_gather(v, p, b), (values, places))


def test_softmax_cancels_the_bias_of_keys():
    adapter = trained(32).double()
    adapter(noise(2, 4, 50, 32, dtype=torch.float64)).square().sum().backward()
    for path in adapter.paths.values():
        assert path.key.bias.grad.abs().max() < 1e-10 * path.value.bias.grad.abs().max()


def test_places_stay_in_float32_under_autocast():
    adapter, tokens = trained(32), noise(2, 12, 197, 32)
    expected = adapter(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapter(tokens)
        places = adapter.look(tokens)["temporal"][0]
    assert places.dtype == torch.float32 and (places.frac() * 256 % 1 != 0).any()
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.05
    found.square().mean().backward()
    assert all(value.grad.isfinite().all() for value in adapter.parameters())


# Export, and what is refused


@pytest.mark.parametrize("t", [1, 12])
@each_backend
def test_export_keeps_the_batch_symbolic(t, backend):
    adapter = trained(32, backend=backend).eval()
    program = torch.export.export(
        adapter, (noise(2, t, 17, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    (shape,) = [node.meta["val"].shape for node in program.graph.nodes if node.name == "tokens"]
    assert [isinstance(size, torch.SymInt) for size in shape] == [True, False, False, False]
    for b in (1, 2, 5):
        tokens = noise(b, t, 17, 32, seed=b)
        assert (program.module()(tokens) - adapter(tokens)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "arguments, shape, message",
    [
        ({}, (1, 2, 16, 32), "square"),
        ({}, (1, 2, 1, 32), "square"),
        ({"frames_max": 4}, (1, 5, 17, 32), "at most 4 frames"),
        ({"mode": "reference"}, (1, 3, 50, 32), "4 frames"),
        ({"mode": "reference"}, (1, 4, 37, 32), "7x7"),
        ({"mode": "published"}, None, "mode"),
        ({"backend": "scatter"}, None, "backend"),
        ({"pathways": ("sound",)}, None, "pathways"),
        ({"pathways": ()}, None, "pathways"),
        ({"groups": 3}, None, "groups"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(arguments, shape, message):
    with pytest.raises(ValueError, match=message):
        adapter = D2STAdapter(32, **arguments)
        adapter(noise(*shape))


@torch.no_grad()
def test_channels_that_start_as_changes_between_frames():
    torch.manual_seed(0)
    adapter, tokens = D2STAdapter(32, differences=0.5), noise(1, 5, 17, 32)
    assert torch.equal(adapter(tokens), tokens), "nothing is added at first"
    hidden = adapter._bottleneck(tokens[0], [(1, 5)])
    squeezed = torch.nn.functional.gelu(tokens[0, :, 1:] @ adapter.down.weight.T + adapter.down.bias)
    for t in range(5):
        change = d2st.GAIN * (squeezed[min(t + 1, 4)] - squeezed[max(t - 1, 0)])
        for channel in range(4):  # of 8, in pairs of opposite sign
            sign = 1 if channel % 2 == 0 else -1
            torch.testing.assert_close(hidden[t, 1:, channel], sign * change[:, channel], atol=1e-4, rtol=1e-4)
            assert torch.equal(squeezed[..., channel], squeezed[..., channel // 2 * 2])
    still = adapter._bottleneck(tokens[0, :1].expand(5, -1, -1), [(1, 5)])
    assert still[:, 1:, :4].abs().max() < 1e-4 < still[:, 1:, 4:].abs().max()
    plain = D2STAdapter(32)
    assert plain.positional.weight[:4, 0, 1, 1, 1].min() > -1, "as PyTorch starts it, if not asked for"
