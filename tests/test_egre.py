"""Error-guided refinement: attention against plain loops, what errors change, sizes as published."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unmask.detectors import egre

MODULES = {
    "spatial": lambda: egre.SpatialAttention(12, 5), "cross": lambda: egre.CrossAttention(12, 5),
    "two keys": lambda: egre.TwoKeyAttention(12, 5), "gate": lambda: egre.ChannelGate(12),
}  # fmt: skip


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n=3, c=12, g=5, side=16):
    return drawn(n, c, g, g), drawn(n, 4, side, side, seed=2).square()


def made(build):
    torch.manual_seed(0)
    return build().eval()


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def looped(attention, query, keys, values, bias=None):
    """Multi-head attention of one query, one picture, one head and one place after the other; then norm."""
    heads, depth, out = 8, 64, []
    for n in range(len(query)):
        answer = []
        for h in range(heads):
            part = slice(h * depth, (h + 1) * depth)
            asked, scores = attention.query.weight[part] @ query[n], []
            for place in range(values.shape[1]):
                told = [layer.weight[part] @ key[n, place] for layer, key in zip(attention.keys, keys, strict=True)]
                score = sum(asked @ t for t in told) / math.sqrt(len(keys) * depth)
                scores.append(score + (0 if bias is None else bias[n][h][place]))
            weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            answer.append(sum(w * (attention.value.weight[part] @ v) for w, v in zip(weights, values[n], strict=True)))
        x = query[n] + attention.out.weight @ torch.cat(answer) + attention.out.bias
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        out.append(x * attention.norm.weight + attention.norm.bias)
    return torch.stack(out)


def pooled(lare, side):
    """Means of a map over the cells of a coarser grid that divides it or not, as windows from floor to ceiling."""
    size, out = lare.shape[-1], torch.empty(*lare.shape[:2], side, side)
    for i in range(side):
        for j in range(side):
            rows, columns = (slice(k * size // side, -(-(k + 1) * size // side)) for k in (i, j))
            out[:, :, i, j] = lare[:, :, rows, columns].mean((2, 3))
    return out


def sequence(maps):
    """The mean and then all places row by row."""
    places = [maps[:, :, i, j] for i in range(maps.shape[2]) for j in range(maps.shape[3])]
    return torch.stack([sum(places) / len(places), *places], 1)


@torch.no_grad()
def test_spatial_attention_is_biased_by_the_errors_of_each_place():
    spatial, (maps, lare) = made(MODULES["spatial"]), inputs(2)
    x = sequence(maps) + spatial.positions
    weight = spatial.error_bias.weight[:, :, 0, 0]  # head, error channel
    biases = [[weight[h] @ e for e in places] for places in sequence(pooled(lare, 5)) for h in range(8)]
    biases = [biases[:8], biases[8:]]
    expected = looped(spatial.attention, x[:, 0], [x], x, biases)
    torch.testing.assert_close(spatial(maps, lare), expected, atol=1e-5, rtol=1e-4)
    # The same error everywhere says nothing of place; an error at one place draws the answer there, or away.
    level = torch.ones_like(lare)
    torch.testing.assert_close(spatial(maps, level), spatial(maps, 5 * level))
    spot = level.clone()
    spot[..., :4, :4] = 40
    assert not torch.allclose(spatial(maps, spot), spatial(maps, level), atol=1e-2)


@torch.no_grad()
def test_cross_attention_asks_with_the_mean_error_and_its_layers_commute_with_the_mean():
    cross, (maps, lare) = made(MODULES["cross"]), inputs(2)
    assert [(layer.in_features, layer.out_features) for layer in cross.embed] == [
        (4, 8), (8, 32), (32, 64), (64, 128), (128, 256), (256, 12),
    ]  # fmt: skip
    places = lare
    for layer in cross.embed:  # as 1x1 convolutions, place by place
        places = F.conv2d(places, layer.weight[..., None, None], layer.bias)
    x = sequence(maps) + cross.positions
    expected = looped(cross.attention, places.mean((2, 3)), [x], x)
    torch.testing.assert_close(cross(maps, lare), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_two_keys_share_a_score_and_two_attentions_answer():
    two, (maps, lare) = made(MODULES["two keys"]), inputs(2)
    embedded = torch.einsum("oc,nchw->nohw", two.embed.weight[..., 0, 0], pooled(lare, 5))
    x, e = sequence(maps) + two.positions, sequence(embedded + two.embed.bias.view(1, -1, 1, 1)) + two.positions
    image = looped(two.image, x[:, 0], [x, e], x)
    error = looped(two.error, e[:, 0], [x, e], e)
    torch.testing.assert_close(two(maps, lare), torch.cat([image, error], 1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_gate_opens_channels_by_the_mean_error():
    gate, (maps, lare) = made(MODULES["gate"]), inputs()
    first, last = gate.gate[0].weight, gate.gate[2].weight
    for n in range(3):
        error = torch.stack([lare[n, k].mean() for k in range(4)])
        opened = 1 / (1 + torch.exp(-(last @ (first @ error).clamp(min=0))))
        means = torch.stack([maps[n, k].mean() for k in range(12)])
        torch.testing.assert_close(gate(maps, lare)[n], means * opened, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gate(maps, 0 * lare), maps.mean((2, 3)) / 2)


@torch.no_grad()
def test_nets_of_maps():
    _, lare = inputs(side=32)
    mlp, cnn = made(lambda: egre.MapMLP(10)), made(egre.MapCNN)
    first, _, last = mlp.layers
    x = pooled(lare, 8).reshape(3, 256) @ first.weight.T + first.bias
    expected = (x * torch.special.ndtr(x)) @ last.weight.T + last.bias
    torch.testing.assert_close(mlp(lare), expected, atol=1e-5, rtol=1e-4)
    sides = []
    for block in cnn.layers[3:]:
        block.register_forward_hook(lambda *a: sides.append(tuple(a[2].shape[1:])))
    assert cnn(lare).shape == (3, 64)
    assert sides == [(16, 32, 32)] * 2 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2
    assert not torch.allclose(cnn(lare), cnn(lare.flip(3).roll(5, 2)), atol=1e-4)


@pytest.mark.parametrize("name", MODULES)
def test_a_picture_alone_is_as_among_others_and_everything_learns(name):
    module, (maps, lare) = made(MODULES[name]), inputs()
    together = module(maps, lare)
    assert together.shape == (3, 24 if name == "two keys" else 12)
    for n in range(3):
        alone = module(maps[n : n + 1], lare[n : n + 1])
        torch.testing.assert_close(alone[0], together[n], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(module(maps, lare.flip(0)), together, atol=1e-4)
    (module.train()(maps, lare) * drawn(*together.shape, seed=3)).sum().backward()
    still = [k for k, p in module.named_parameters() if p.grad is None or p.grad.norm() < 1e-6 * p.norm()]
    assert not still


def test_dropout_is_on_in_training_only():
    spatial, (maps, lare) = made(MODULES["spatial"]), inputs()
    assert torch.equal(spatial(maps, lare), spatial(maps, lare))
    assert [m.p for m in spatial.modules() if isinstance(m, nn.Dropout)] == [0.1]
    spatial.train()
    assert not torch.equal(spatial(maps, lare), spatial(maps, lare))


def test_sizes_as_published():
    with torch.device("meta"):
        spatial, gate, cnn = egre.SpatialAttention(1024, 14), egre.ChannelGate(1024), egre.MapCNN()
        cross, two, mlp = egre.CrossAttention(1024, 16), egre.TwoKeyAttention(1024, 14), egre.MapMLP(768)
    heads, norm = 3 * 1024 * 512 + 512 * 1024 + 1024, 2 * 1024
    assert parameters(spatial) == 197 * 1024 + heads + norm + 4 * 8
    assert round(parameters(spatial) / 1e6, 2) == 2.30
    assert parameters(gate) == 4 * 128 + 128 * 1024
    chain = 4 * 8 + 8 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * 1024 + 8 + 32 + 64 + 128 + 256 + 1024
    assert parameters(cross) == 257 * 1024 + heads + norm + chain
    assert parameters(two) == 197 * 1024 + 2 * (heads + 1024 * 512 + norm) + 4 * 1024 + 1024
    assert parameters(mlp) == 256 * 768 + 768 + 768 * 768 + 768
    stem, stage1 = 4 * 16 * 9 + 32, 4 * (16 * 16 * 9 + 32)
    stage2 = 16 * 32 * 9 + 64 + 3 * (32 * 32 * 9 + 64) + 16 * 32 + 64
    stage3 = 32 * 64 * 9 + 128 + 3 * (64 * 64 * 9 + 128) + 32 * 64 + 128
    assert parameters(cnn) == stem + stage1 + stage2 + stage3
