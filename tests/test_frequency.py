"""Frequency branches against NumPy and SciPy, and the three ways in which they join a ConvNeXt."""

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch

from unmask.detectors.frequency import (
    BRANCHES,
    AttentionJoin,
    ConcatJoin,
    FADBranch,
    FFTBranch,
    PhaseBranch,
    SRMBranch,
    StemJoin,
)

SECOND = np.array([1, -2, 1])
KERNELS = {
    4: np.pad(-np.outer(SECOND, SECOND), 1),
    12: np.array([[-1, 2, -2, 2, -1], [2, -6, 8, -6, 2], [-2, 8, -12, 8, -2], [2, -6, 8, -6, 2], [-1, 2, -2, 2, -1]]),
    2: np.pad(SECOND[None], ((2, 2), (1, 1))),
}


@pytest.fixture
def images():
    """Two smooth pictures with noise, grey levels float32[2,3,64,64]."""
    rng = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(0, 400, (2, 3, 64, 64)), (0, 0, 4, 4)) + 120
    return torch.from_numpy(np.clip(np.rint(smooth + rng.normal(0, 3, smooth.shape)), 0, 255).astype(np.float32))


def stir(module, seed=0, amount=0.3):
    """Noise on every parameter, so that what starts at zero counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return module


def test_srm_is_the_three_filters_of_every_colour(images):
    expected = [
        6 * np.tanh(scipy.ndimage.correlate(plane, kernel / divisor, mode="mirror") / 6)
        for plane in images[0].double().numpy()
        for divisor, kernel in KERNELS.items()
    ]
    np.testing.assert_allclose(SRMBranch(8, 64).transform(images)[0].numpy(), expected, atol=1e-4)


def test_the_high_pass_filters_see_noise_and_nothing_smooth():
    branch = SRMBranch(8, 32)
    flat = branch.transform(torch.full((1, 3, 32, 32), 200.0) * torch.tensor([1.0, 0.5, 0.1]).view(1, 3, 1, 1))
    sloped = branch.transform(torch.arange(32.0).expand(1, 3, 32, 32))[..., 2:-2, 2:-2]
    impulse = torch.full((1, 3, 32, 32), 100.0)
    impulse[0, 1, 16, 16] += 4
    point = branch.transform(impulse)
    for smooth in (flat, sloped):
        torch.testing.assert_close(smooth, torch.zeros_like(smooth), atol=1e-3, rtol=0)
    # Channels 3 to 5 are those of green; the centre taps are -4/4, -12/12 and -2/2, softly limited at 6.
    torch.testing.assert_close(point[0, 3:6, 16, 16], torch.full((3,), -6 * torch.tanh(torch.tensor(4 / 6)).item()))
    assert point[0, [0, 1, 2, 6, 7, 8]].abs().max() < 1e-3 and point.abs().max() <= 6


def test_fad_bands_are_a_dct_cut_by_the_sum_of_its_indices(images):
    found = FADBranch(8, 64).transform(images).detach().numpy()
    spectrum = scipy.fft.dctn(images.double().numpy(), axes=(2, 3), norm="ortho")
    order = np.add.outer(np.arange(64), np.arange(64))
    # 64 / 2.82 is 22.7 and 64 / 2 is 32.
    bands = [order <= 22, (order >= 23) & (order <= 31), order >= 32, order >= 0]
    expected = [scipy.fft.idctn(spectrum * band, axes=(2, 3), norm="ortho") for band in bands]
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=2e-3)
    np.testing.assert_allclose(found[:, 9:], images.numpy(), atol=2e-3)


@pytest.mark.parametrize("size", [64, 96, 224])
def test_the_masks_of_fad_part_the_spectrum(size):
    low, middle, high, whole = FADBranch(4, size).bands.bool().unbind()
    assert torch.equal(low.int() + middle.int() + high.int(), torch.ones(size, size, dtype=torch.int32))
    assert whole.all() and low[0, 0] and high[-1, -1] and middle[0, size // 2 - 1] and high[0, size // 2]
    assert 0 < low.sum() < middle.sum() + low.sum() < high.sum()


def test_the_masks_of_fad_are_learned(images):
    branch = stir(FADBranch(8, 64))
    spectrum = scipy.fft.dctn(images.double().numpy(), axes=(2, 3), norm="ortho")
    masks = (branch.bands + torch.tanh(branch.masks / 2)).detach().double().numpy()
    assert np.abs(masks - branch.bands.numpy()).min(axis=0).max() > 0.05
    expected = [scipy.fft.idctn(spectrum * mask, axes=(2, 3), norm="ortho") for mask in masks]
    found = branch.transform(images)
    np.testing.assert_allclose(found.detach().numpy(), np.concatenate(expected, axis=1), atol=5e-3)
    (found.square() * torch.rand(found.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert (branch.masks.grad != 0).all()


def test_fft_is_the_log_amplitude_with_frequency_zero_in_the_middle(images):
    expected = np.log(1 + np.abs(np.fft.fftshift(np.fft.fft2(images.double().numpy()) / 64, axes=(2, 3))))
    found = FFTBranch(8, 64).transform(images).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found.reshape(6, -1).argmax(1) == 32 * 64 + 32).all()


def test_phase_keeps_the_phase_and_nothing_of_the_amplitude(images):
    branch = PhaseBranch(8, 64)
    luma = np.tensordot([0.299, 0.587, 0.114], images.double().numpy(), (0, 1))
    expected = np.fft.ifft2(np.exp(1j * np.angle(np.fft.fft2(luma)))).real * 64
    found = branch.transform(images)
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=2e-3)
    np.testing.assert_allclose(np.abs(np.fft.fft2(found[:, 0].numpy())), 64, rtol=1e-3)
    torch.testing.assert_close(branch.transform(images * 0.5), found, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", BRANCHES)
def test_every_branch_has_one_shape_and_one_way_to_be_called(name, images):
    torch.manual_seed(0)
    branch = BRANCHES[name](16, 64).eval()
    with torch.no_grad():
        out = branch(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough, signal = branch(images), branch.transform(images)
    assert out.shape == (2, 16, 16, 16) and rough.shape == out.shape
    assert out.is_contiguous(memory_format=torch.channels_last) and rough.dtype == torch.bfloat16
    assert signal.shape == (2, branch.maps, 64, 64)
    torch.testing.assert_close(rough.float(), out, atol=0.03 * out.abs().max().item(), rtol=0.05)
    keys = {key.split(".")[0] for key in branch.state_dict()}
    assert keys == {"scale", "stem"} | ({"masks"} if name == "fad" else set())


@pytest.mark.parametrize("name", BRANCHES)
def test_the_signal_does_not_lose_precision_under_autocast(name, images):
    branch, seen = BRANCHES[name](16, 64).eval(), []
    branch.scale.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        branch(images)
        with torch.autocast("cpu", torch.bfloat16):
            branch(images)
    assert seen[1].dtype == torch.float32 and torch.equal(*seen)


def maps(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WIDTHS = [8, 12, 16, 20]


def test_joins_start_as_nothing_and_then_count():
    torch.manual_seed(0)
    at_stem, middle, branch = maps(2, 8, 16, 16), maps(2, 16, 4, 4), maps(2, 8, 16, 16, seed=2)
    for join, x in ((StemJoin(8), at_stem), (ConcatJoin(WIDTHS), middle), (AttentionJoin(WIDTHS, 64), middle)):
        assert torch.equal(join(x, branch), x)
        stir(join)
        assert (join(x, branch) - x).abs().mean() > 0.1
        assert not torch.allclose(join(x, branch), join(x, branch.flip(1)), atol=1e-3)


def test_stem_and_concat_join_place_by_place():
    stem, concat = stir(StemJoin(8)), stir(ConcatJoin(WIDTHS)).eval()
    x, middle, branch = maps(2, 8, 16, 16), maps(2, 16, 4, 4), maps(2, 8, 16, 16, seed=2)
    weight, bias = (p.detach() for p in stem.project.parameters())
    expected = x + torch.einsum("oc,nchw->nohw", weight[..., 0, 0], branch) + bias.view(1, -1, 1, 1)
    torch.testing.assert_close(stem(x, branch), expected, atol=1e-5, rtol=1e-4)
    weight, bias = (p.detach() for p in concat.project.parameters())
    below = concat.down(branch).detach()
    assert below.shape == middle.shape
    expected = middle + bias.view(1, -1, 1, 1)
    expected += torch.einsum("oc,nchw->nohw", weight[:, :16, 0, 0], middle)
    expected += torch.einsum("oc,nchw->nohw", weight[:, 16:, 0, 0], below)
    torch.testing.assert_close(concat(middle, branch), expected, atol=1e-5, rtol=1e-4)


def layer_norm(values, norm):
    spread = np.sqrt(values.var(-1, keepdims=True) + 1e-5)
    return (values - values.mean(-1, keepdims=True)) / spread * norm.weight.numpy() + norm.bias.numpy()


@torch.no_grad()
def test_attention_join_is_softmax_attention_of_the_picture_to_the_branch():
    torch.manual_seed(0)
    width, side = 48, 4
    join = stir(AttentionJoin([8, 12, width], 64)).eval()
    x, branch = maps(1, width, side, side), maps(1, 8, 16, 16, seed=2)
    tokens = x[0].reshape(width, -1).T.double().numpy()
    told = layer_norm(join.down(branch)[0].reshape(width, -1).T.double().numpy(), join.norm_key)
    rates = 10000.0 ** (-np.arange(12) / 12)
    axis = np.array([[f(i * rate) for f in (np.sin, np.cos) for rate in rates] for i in range(side)])
    places = np.array([np.concatenate([axis[row], axis[column]]) for row in range(side) for column in range(side)])
    query = (layer_norm(tokens, join.norm_query) + places) @ join.query.weight.T.numpy()
    key, value = (told + places) @ join.key.weight.T.numpy(), told @ join.value.weight.T.numpy()
    value += join.value.bias.numpy()
    answers = []
    for head in range(3):  # gcd(48, 32) = 16 channels a head
        part = slice(16 * head, 16 * head + 16)
        score = np.exp(query[:, part] @ key[:, part].T / 4)
        answers.append(score / score.sum(1, keepdims=True) @ value[:, part])
    expected = tokens + np.concatenate(answers, 1) @ join.project.weight.T.numpy() + join.project.bias.numpy()
    np.testing.assert_allclose(join(x, branch)[0].reshape(width, -1).T.numpy(), expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_tells_frequencies_apart():
    """Without positions the answer would be the same wherever a token of the branch stands."""
    torch.manual_seed(0)
    join = stir(AttentionJoin(WIDTHS, 64)).eval()
    join.down = torch.nn.Identity()
    x, told = maps(1, 16, 4, 4), maps(1, 16, 4, 4, seed=2)
    swapped = told.flip(2, 3)
    with_places = (join(x, told) - join(x, swapped)).abs().max()
    join.positions.zero_()
    assert with_places > 0.01 > 1e-4 > (join(x, told) - join(x, swapped)).abs().max()
