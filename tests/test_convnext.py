"""The ConvNeXt detector: shapes, masks, gradients, its fixed filters, and checkpoints that are refused."""

import json
from pathlib import Path

import pytest
import torch

from unmask.detectors import base, convnext
from unmask.detectors.base import CheckpointError, load_checkpoint, masked_mean, save_checkpoint
from unmask.detectors.convnext import SRM, SRMBranch


def make(frequency="srm", size=64, backbone="test_convnext", **options):
    torch.manual_seed(0)
    return base.build("convnext", backbone=backbone, frequency=frequency, size=size, **options).eval()


def clips(b=2, t=3, size=64):
    return torch.randn(b, t, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def detector():
    return make()


@torch.no_grad()
def test_shapes_and_a_clip_is_the_mean_of_its_frames(detector):
    x = clips()
    logits = detector(x)
    assert logits.shape == (2,) and detector.features(x).shape == (2, detector.backbone.num_features)
    frames = torch.stack([detector(x[:, t : t + 1]) for t in range(3)], 1)
    torch.testing.assert_close(logits, frames.mean(1))
    alone, boundary = detector.with_boundary(x[:, 0])
    torch.testing.assert_close(alone, frames[:, 0])
    assert boundary.shape == (2, 8, 8)
    torch.testing.assert_close(detector.head(detector.features(x)).squeeze(1), logits)


@torch.no_grad()
def test_frames_outside_the_mask_do_not_matter(detector):
    x, mask = clips(), torch.tensor([[True, True, False], [True, True, True]])
    expected = torch.cat([detector(x[:1, :2]), detector(x[1:])])
    torch.testing.assert_close(detector(x, mask), expected)
    x[0, 2] = float("nan")
    torch.testing.assert_close(detector(x, mask), expected)
    torch.testing.assert_close(detector.features(x, mask)[0], detector.features(x[:1, :2])[0])
    assert masked_mean(torch.ones(1, 2), torch.tensor([[False, False]])) == 0


def test_prepare_normalises_as_imagenet(detector):
    white = detector.prepare(torch.full((1, 2, 64, 64, 3), 255, dtype=torch.uint8))
    assert white.shape == (1, 2, 3, 64, 64) and white.dtype == torch.float32
    torch.testing.assert_close(
        white[0, 0, :, 0, 0], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, 0.594 / 0.225])
    )


@pytest.mark.parametrize("frequency", ["none", "srm"])
def test_every_parameter_gets_a_gradient(frequency):
    detector = make(frequency, drop_path=0.0).train()
    logits, boundary = detector.with_boundary(clips()[:, 0])
    (logits.square().sum() + boundary.square().sum()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    assert len(detector.trainable_parameters()) == len(list(detector.parameters()))
    assert any(name.startswith("frequency.") for name, _ in detector.named_parameters()) == (frequency == "srm")


def test_without_layer_scale_the_blocks_count_from_the_start():
    def effect(**options):
        """How much the blocks of the last stage change what passes through them."""
        net = make("none", **options).backbone
        x = net.stages[3].downsample(torch.randn(1, net.feature_info[2]["num_chs"], 4, 4))
        return ((net.stages[3].blocks(x) - x).norm() / x.norm()).item()

    assert effect(layer_scale=True) < 1e-4 < 1e-2 < effect()
    assert make("none").config["layer_scale"] is False
    assert not any(name.endswith("gamma") for name in make("none", backbone="convnextv2_atto").state_dict())


@pytest.mark.parametrize("layer_scale", [True, False])
def test_the_weights_that_come_with_the_kit_fit(layer_scale):
    weights, card = base.read_checkpoint(Path(convnext.__file__).parents[1] / "weights/convnext-demo")
    detector = base.build("convnext", **card["config"] | {"layer_scale": layer_scale})
    detector.load_state_dict(weights)
    assert detector.backbone.stages[0].blocks[0].gamma.abs().max() < 0.2


def test_the_high_pass_filters_see_noise_and_nothing_smooth():
    assert SRM.shape == (3, 5, 5) and torch.allclose(SRM.sum((1, 2)), torch.zeros(3), atol=1e-6)
    branch = SRMBranch(8).eval()
    seen = []
    branch.scale.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    branch(torch.full((1, 3, 32, 32), 200.0) * torch.tensor([1.0, 0.5, 0.1]).view(1, 3, 1, 1))
    ramp = torch.arange(32.0).expand(1, 3, 32, 32)
    branch(ramp)
    impulse = torch.full((1, 3, 32, 32), 100.0)
    impulse[0, 1, 16, 16] += 4
    assert branch(impulse).shape == (1, 8, 8, 8)
    flat, sloped, point = seen
    torch.testing.assert_close(flat, torch.zeros_like(flat), atol=1e-3, rtol=0)
    inner = sloped[..., 2:-2, 2:-2]
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-3, rtol=0)
    # Channels 3 to 5 are those of green; the centre taps are -4/4, -12/12 and -2/2, softly limited at 6.
    torch.testing.assert_close(point[0, 3:6, 16, 16], torch.full((3,), -6 * torch.tanh(torch.tensor(4 / 6)).item()))
    assert point[0, [0, 1, 2, 6, 7, 8]].abs().max() < 1e-3 and point.abs().max() <= 6


def test_the_frequency_branch_sees_grey_levels(detector):
    images, seen = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8), []
    hook = detector.frequency.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        detector(detector.prepare(images).unsqueeze(1))
    hook.remove()
    torch.testing.assert_close(seen[0], images.movedim(-1, 1).float(), atol=1e-3, rtol=0)


def test_wrong_arguments_say_what_is_right():
    for options, message in (
        ({"size": 50}, "multiple of 32, not 50"), ({"size": 0}, "multiple of 32, not 0"),
        ({"frequency": "dct"}, "'none' or 'srm', not 'dct'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match="no detector 'resnet'; known are .*convnext"):
        base.build("resnet")
    assert "convnext" in base.names()


@pytest.mark.parametrize("frequency", ["none", "srm"])
def test_a_checkpoint_gives_the_same_logits(tmp_path, frequency):
    detector = make(frequency, drop_path=0.1)
    with torch.no_grad():  # running statistics are part of the weights
        detector.train()(clips())
        expected = detector.eval()(clips())
    assert save_checkpoint(detector, tmp_path / "ck", seed=5) == tmp_path / "ck"
    again, card = load_checkpoint(tmp_path / "ck")
    assert torch.equal(again(clips()), expected) and not again.training
    assert (card["seed"], card["detector"], card["config"]["frequency"]) == (5, "convnext", frequency)
    assert sorted(p.name for p in (tmp_path / "ck").iterdir()) == ["config.json", "model.safetensors"]


def test_what_is_no_checkpoint_or_another_one_is_refused(tmp_path, detector):
    folder = save_checkpoint(detector, tmp_path / "ck")
    weights, config = (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())

    def refused(match):
        with pytest.raises(CheckpointError, match=match) as caught:
            load_checkpoint(folder)
        assert "\n" not in str(caught.value)

    def change(**keys):
        (folder / "config.json").write_text(json.dumps(config | keys))

    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused("not those its config.json describes")
    (folder / "model.safetensors").write_bytes(weights)
    load_checkpoint(folder)
    for keys in (
        {"config": config["config"] | {"frequency": "none"}}, {"config": config["config"] | {"backbone": "nonsense"}},
        {"config": config["config"] | {"depth": 3}}, {"config": config["config"] | {"size": 96}},
        {"detector": "resnet"}, {"config": None}, {"input": config["input"] | {"std": [1, 1, 1]}},
    ):  # fmt: skip
        change(**keys)
        refused("does not fit this version")
    for text in ("[]", "{}", '"text"'):
        (folder / "config.json").write_text(text)
        refused("not those its config.json describes")
    (folder / "config.json").write_text("{")
    refused("is not a checkpoint")
    change()
    (folder / "model.safetensors").unlink()
    refused("is not a checkpoint")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(tmp_path)
