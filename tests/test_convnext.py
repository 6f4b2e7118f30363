"""The ConvNeXt detector: shapes, masks, gradients, variants, cost, and checkpoints that are refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from unmask.detectors import base, convnext
from unmask.detectors.base import CheckpointError, load_checkpoint, masked_mean, save_checkpoint
from unmask.detectors.convnext import TopDown
from unmask.detectors.frequency import zeroed

JOINED = [("none", "stem"), ("fft", "attention")]
JOINED += [(name, join) for name in ("srm", "fad", "phase") for join in ("stem", "concat", "attention")]
VARIANTS = [
    {"fusion": fusion, "frequency": name, "join": join} for name, join in JOINED for fusion in ("none", "topdown")
]


def make(frequency="srm", size=64, backbone="test_convnext", **options):
    torch.manual_seed(0)
    return base.build("convnext", backbone=backbone, frequency=frequency, size=size, **options).eval()


def stirred(module, amount=0.1):
    """Noise on every parameter, so that what starts at zero counts."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return module


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


def identity(variant):
    return "-".join(variant.values())


@pytest.mark.parametrize("variant", VARIANTS, ids=identity)
@pytest.mark.parametrize("size", [64, 96])
@torch.no_grad()
def test_every_variant_has_the_same_shapes_in_both_precisions(variant, size):
    detector, x = stirred(make(size=size, **variant)), clips(size=size)
    logits = detector(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough, (alone, boundary) = detector(x), detector.with_boundary(x[:, 0])
    assert logits.shape == rough.shape == alone.shape == (2,) and boundary.shape == (2, size // 8, size // 8)
    assert detector.features(x).shape == (2, 64) and torch.isfinite(rough.float()).all()
    torch.testing.assert_close(detector.head(detector.features(x)).squeeze(1), logits)
    torch.testing.assert_close(rough.float(), logits, atol=0.1, rtol=0.1)
    torch.testing.assert_close(detector.with_boundary(x[:, 0])[0], detector(x[:, :1]))


@pytest.mark.parametrize("variant", VARIANTS, ids=identity)
def test_every_parameter_gets_a_gradient(variant):
    detector = stirred(make(**variant)).train()
    logits, boundary = detector.with_boundary(clips()[:, 0])
    (logits.square().sum() + boundary.square().sum()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    assert len(detector.trainable_parameters()) == len(list(detector.parameters()))
    parts = {name.split(".")[0] for name in detector.state_dict()}
    expected = {"backbone", "head", "boundary_head"}
    expected |= {"frequency"} if variant["frequency"] != "none" else set()
    expected |= {"fusion"} if variant["fusion"] != "none" else set()
    expected |= {"join"} if variant["join"] != "stem" or variant["frequency"] in ("fad", "phase") else set()
    assert parts == expected


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=identity)
@torch.no_grad()
def test_a_variant_starts_as_the_plain_one_and_then_differs(variant):
    plain, other, x = make("none"), make(**variant), clips()
    missing, unexpected = other.load_state_dict(stirred(plain).state_dict(), strict=False)
    assert not unexpected and missing and all(k.startswith(("frequency.", "join.", "fusion.")) for k in missing)
    same = torch.allclose(other(x), plain(x), atol=1e-5, rtol=1e-4)
    assert same == ((variant["frequency"], variant["join"]) != ("srm", "stem"))
    for part in (other.frequency, other.join, other.fusion):
        if part is not None:
            stirred(part)
    assert not torch.allclose(other(x), plain(x), atol=1e-3)


@torch.no_grad()
def test_every_option_is_heard():
    """With all that is added awake, no two variants agree; and what is switched off is what differs."""
    logits = torch.stack([stirred(make(**variant))(clips()) for variant in VARIANTS])
    gaps = (logits[:, None] - logits[None]).abs().amax(2) + torch.eye(len(VARIANTS))
    assert gaps.min() > 1e-4
    detector = stirred(make(fusion="topdown", frequency="fad", join="attention"))
    whole, x = detector(clips()), clips()
    for part in (detector.fusion.project, detector.join.project):
        kept = {k: v.clone() for k, v in part.state_dict().items()}
        zeroed(part)
        assert not torch.allclose(detector(x), whole, atol=1e-4)
        part.load_state_dict(kept)
    assert torch.equal(detector(x), whole)


@pytest.mark.parametrize("variant", VARIANTS, ids=identity)
@torch.no_grad()
def test_maps_stay_channels_last(variant):
    detector, seen = stirred(make(backbone="convnext_zepto_rms", **variant)), []
    for stage in detector.backbone.stages:
        stage.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0], out)))
    detector(clips())
    assert len(seen) == 8 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@torch.no_grad()
def test_fusion_is_a_feature_pyramid():
    torch.manual_seed(0)
    fusion = stirred(TopDown([8, 12, 16], 10, 6))
    maps = [torch.randn(2, width, side, side) for width, side in ((8, 8), (12, 4), (16, 2))]
    levels = []
    for lateral, x in zip(fusion.laterals, maps, strict=True):
        norm, project = lateral
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        x = x * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
        levels.append(torch.einsum("oc,nchw->nohw", project.weight[..., 0, 0], x) + project.bias.view(1, -1, 1, 1))
    levels[1] = levels[1] + levels[2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    levels[0] = levels[0] + levels[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    pairs = zip(fusion.smooth, levels, strict=True)
    smooth = [nn.functional.conv2d(x, part[0].weight, part[0].bias, 1, 1, 1, 10) for part, x in pairs]
    means = torch.cat([(x * torch.special.ndtr(x)).mean((2, 3)) for x in smooth], 1)
    normed = (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    normed = normed * fusion.norm.weight + fusion.norm.bias
    expected = normed @ fusion.project.weight.T + fusion.project.bias
    torch.testing.assert_close(fusion(maps), expected, atol=1e-4, rtol=1e-3)
    # It sees which places of two scales belong together: the same fine map, turned, is another answer.
    assert not torch.allclose(fusion([maps[0].flip(2), *maps[1:]]), expected, atol=1e-3)


def test_cost_of_a_small_case_and_of_the_published_one():
    class Small(base.Detector):
        def __init__(self):
            super().__init__()
            self.input_spec = base.InputSpec(8)
            self.conv, self.drop, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Dropout(), nn.Linear(4, 1)
            self.conv.requires_grad_(False)

        def forward(self, clips, mask=None):
            return self.head(self.drop(self.conv(clips.flatten(0, 1)).mean((2, 3)))).squeeze(1)

    small = Small()
    # 16 places x 4 filters x 27 products, and 4 of the head.
    assert base.cost(small) == {"parameters": 4 * 28 + 5, "trainable": 5, "multiply_adds": 16 * 4 * 27 + 4}
    assert small.training and small.drop.training
    plain = base.cost(make("none", 224, "convnext_tiny"))
    # Liu et al. 2022, table 1: 28.6 million parameters with a head of 1,000 classes, 4.5 G.
    assert round((plain["parameters"] + 1000 * 769) / 1e6, 1) == 28.6
    assert round(plain["multiply_adds"] / 1e9, 1) == 4.5


def test_every_option_has_its_cost():
    costs = {identity(v): base.cost(make(backbone="convnext_zepto_rms", **v)) for v in VARIANTS}
    plain = costs["none-none-stem"]
    for name, cost in costs.items():
        assert name == "none-none-stem" or all(cost[key] > plain[key] for key in plain)
    # The attention alone: 16 places ask 16, 128 channels wide; four projections, scores and answer.
    parts = costs["none-srm-attention"]["multiply_adds"] - costs["none-srm-concat"]["multiply_adds"]
    assert parts == 4 * 16 * 128**2 + 2 * 16 * 16 * 128 - 16 * 256 * 128


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
    folder = Path(convnext.__file__).parents[1] / "weights/convnext-demo"
    load_checkpoint(folder)
    weights, card = base.read_checkpoint(folder)
    detector = base.build("convnext", **card["config"] | {"layer_scale": layer_scale})
    detector.load_state_dict(weights)
    assert detector.backbone.stages[0].blocks[0].gamma.abs().max() < 0.2


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
        ({"frequency": "dct"}, "frequency must be one of none, srm, fad, fft, phase, not 'dct'"),
        ({"fusion": "sum"}, "fusion must be one of none, topdown, not 'sum'"),
        ({"join": "add"}, "join must be one of stem, concat, attention, not 'add'"),
        ({"frequency": "none", "join": "concat"}, "set frequency to one of srm, fad, fft, phase, or join to stem"),
        ({"frequency": "fft"}, "join='stem' could add it: set join to attention"),
        ({"frequency": "fft", "join": "concat"}, "join='concat' could add it: set join to attention"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match="no detector 'resnet'; known are .*convnext"):
        base.build("resnet")
    assert "convnext" in base.names()


@pytest.mark.parametrize("variant", VARIANTS, ids=identity)
def test_a_checkpoint_gives_the_same_logits(tmp_path, variant):
    detector = stirred(make(drop_path=0.1, **variant))
    with torch.no_grad():  # running statistics are part of the weights
        detector.train()(clips())
        expected = detector.eval()(clips())
    assert save_checkpoint(detector, tmp_path / "ck", seed=5) == tmp_path / "ck"
    again, card = load_checkpoint(tmp_path / "ck")
    assert torch.equal(again(clips()), expected) and not again.training
    assert (card["seed"], card["detector"]) == (5, "convnext") and variant.items() <= card["config"].items()
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


def test_native_is_part_of_what_a_checkpoint_wants_to_see(tmp_path):
    detector = base.build("convnext", backbone="convnext_zepto_rms", size=32, native=True)
    folder = save_checkpoint(detector, tmp_path / "native", seed=0)
    assert load_checkpoint(folder)[0].input_spec.native
    card = json.loads((folder / "config.json").read_text())
    card["input"]["native"] = False
    (folder / "config.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="another size or normalisation"):
        load_checkpoint(folder)
