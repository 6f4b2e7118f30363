"""ST-Adapter against NumPy loops: what it calculates, what it leaves alone, how large it is, its export."""

import numpy as np
import pytest
import torch

from unmask.detectors.st_adapter import STAdapter, matched


def adapter(dim=8, width=5, seed=0, **options):
    """An adapter with all weights drawn, in double."""
    made, generator = STAdapter(dim, width, **options), torch.Generator().manual_seed(seed)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return made


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(made, tokens):
    """The published formula for float[B,T,N,D], one token and one channel of the bottleneck at a time."""
    w = {name: p.detach().numpy() for name, p in made.named_parameters()}
    kernel = w["time.weight"].reshape(-1, 3)
    x = tokens.numpy()
    b, t, n, _ = x.shape
    down = x @ w["down.weight"].T + w["down.bias"]
    mixed = np.empty_like(down)
    for clip, now, token, channel in np.ndindex(mixed.shape):
        near = [down[clip, min(max(now + step, 0), t - 1), token, channel] for step in (-1, 0, 1)]
        mixed[clip, now, token, channel] = kernel[channel] @ near + w["time.bias"][channel]
    return x + mixed @ w["up.weight"].T + w["up.bias"]


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_it_calculates_the_published_formula(frames):
    made, tokens = adapter(), draw(3, frames, 10, 8)
    np.testing.assert_allclose(made(tokens).detach().numpy(), by_loops(made, tokens), rtol=1e-12, atol=1e-12)


def test_inside_the_clip_it_is_the_convolution_of_torch():
    made, tokens = adapter(), draw(2, 6, 10, 8)
    maps = made.down(tokens).permute(0, 3, 1, 2).unsqueeze(4)
    expected = tokens[:, 1:-1] + made.up(made.time(maps).squeeze(4).permute(0, 2, 3, 1))
    torch.testing.assert_close(made(tokens)[:, 1:-1], expected)


def test_a_new_one_changes_nothing_and_learns_from_its_last_layer_on():
    made, tokens = STAdapter(8, 5), draw(2, 3, 5, 8).float()
    found = made(tokens)
    assert torch.equal(found, tokens)
    found.square().sum().backward()
    assert made.up.weight.grad.abs().min() > 0 and made.up.bias.grad.abs().min() > 0
    assert not made.down.weight.grad.any() and not made.time.weight.grad.any()


def test_an_image_gives_what_it_gives_as_a_still_clip():
    made, image = adapter(), draw(2, 1, 10, 8)
    for frames in (2, 3, 8, 32):
        still = made(image.expand(-1, frames, -1, -1))
        torch.testing.assert_close(still, made(image).expand_as(still), rtol=0, atol=1e-12)


def test_groups_of_clips_in_one_batch_do_not_touch_one_another():
    made = adapter()
    clips, images, short = draw(2, 6, 5, 8), draw(4, 1, 5, 8, seed=2), draw(1, 3, 5, 8, seed=3)
    mixed = torch.cat([x.flatten(0, 1) for x in (clips, images, short)])
    found = made.adapt(mixed, [(2, 6), (4, 1), (1, 3)])
    expected = torch.cat([made(x).flatten(0, 1) for x in (clips, images, short)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(made(clips.flip(0)), made(clips).flip(0), rtol=0, atol=1e-12)


def test_it_reads_time():
    made, tokens = adapter(), draw(1, 6, 5, 8)
    assert (made(tokens.flip(1)) - made(tokens).flip(1)).abs().max() > 0.1


def test_clips_that_are_too_long_are_refused():
    made = adapter(frames_max=4)
    made(draw(1, 4, 5, 8))
    with pytest.raises(ValueError, match="at most 4 frames here, not 5"):
        made(draw(1, 5, 5, 8))
    with pytest.raises(ValueError, match="at most 4 frames here, not 5"):
        made.adapt(draw(6, 5, 8), [(1, 1), (1, 5)])


@pytest.mark.parametrize("dim, parameters", [(768, 606_192), (1024, 1_070_400), (32, 1_000), (32, 1)])
def test_no_width_comes_closer_in_parameters(dim, parameters):
    def off(width):
        return abs(sum(p.numel() for p in STAdapter(dim, width).parameters()) - parameters)

    width = matched(dim, parameters)
    assert off(width) <= off(width + 1) and (width == 1 or off(width) <= off(width - 1))
    assert parameters < 1e5 or off(width) < 0.001 * parameters


@pytest.mark.parametrize("frames", [1, 12])
def test_export_keeps_the_batch_open(frames):
    made, tokens = adapter(), draw(2, frames, 5, 8)
    batch = torch.export.Dim("batch")
    program = torch.export.export(made, (tokens,), dynamic_shapes=({0: batch},))
    shape = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"][-1]
    assert isinstance(shape[0], torch.SymInt) and shape[1:] == (frames, 5, 8)
    for count in (1, 5):
        tokens = draw(count, frames, 5, 8, seed=count)
        torch.testing.assert_close(program.module()(tokens), made(tokens), rtol=0, atol=1e-12)


def test_it_runs_in_half_precision():
    made = adapter().float()
    tokens = draw(2, 3, 5, 8).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = made(tokens)
    found.sum().backward()
    assert found.dtype == torch.float32 and all(p.grad.isfinite().all() for p in made.parameters())
    assert 0 < (found - made(tokens)).abs().max() < 0.3
