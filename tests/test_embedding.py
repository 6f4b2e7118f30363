"""The embedding detector: unit vectors, one logit, any backbone, and the same network after saving."""

import pytest
import torch

from unmask.detectors import base
from unmask.detectors.embedding import Embedding

CASES = [
    {"backbone": "test_convnext", "size": 32},
    {"backbone": "test_resnet", "size": 48, "projection": 16},
    {"backbone": "convnext_zepto_rms", "size": 32},
    {"backbone": "convnext_zepto_rms", "size": 32, "frequency": "srm"},
]


@pytest.fixture(params=CASES, ids=lambda c: c["backbone"] + "-" + c.get("frequency", "none"))
def detector(request):
    torch.manual_seed(0)
    return Embedding(**request.param).eval()


def clips(detector, b=3, t=2):
    size = detector.input_spec.size
    return torch.randn(b, t, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_shapes_and_unit_length(detector):
    frames = clips(detector).flatten(0, 1)
    features, units = detector.embed(frames)
    assert units.shape == (6, detector.config["projection"]) and units.dtype == torch.float32
    torch.testing.assert_close(units.square().sum(1), torch.ones(6))
    first, norm, _, last = detector.projector
    scaled = (features @ first.weight.T - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    raw = torch.relu(scaled * norm.weight + norm.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(units, raw / raw.square().sum(1, keepdim=True).sqrt())
    assert torch.equal(detector.project(frames), units)
    assert detector.projector[0].weight.shape == (features.shape[1],) * 2


def test_a_clip_is_the_mean_of_its_frames_and_masked_frames_do_not_count(detector):
    video = clips(detector)
    each = torch.stack([detector(video[:, t : t + 1]) for t in range(2)], 1)
    torch.testing.assert_close(detector(video), each.mean(1), rtol=1e-4, atol=1e-5)
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    expected = torch.stack([each[0, 0], each[1, 1], each[2].mean()])
    torch.testing.assert_close(detector(video, mask), expected, rtol=1e-4, atol=1e-5)
    features = detector.features(video, mask)
    torch.testing.assert_close(features[0], detector.embed(video[0, :1])[0][0], rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_is_the_same_network(detector, tmp_path):
    base.save_checkpoint(detector, tmp_path, seed=0)
    again, card = base.load_checkpoint(tmp_path)
    assert card["detector"] == "embedding" and "pretrained" not in card["config"]
    video = clips(detector)
    assert torch.equal(again(video), detector(video)) and torch.equal(
        again.project(video[0]), detector.project(video[0])
    )


def test_every_weight_is_trained_by_one_of_the_heads(detector):
    detector.train()
    video = clips(detector)
    (detector(video).sum() + detector.project(video.flatten(0, 1)).sum()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []


def test_without_layer_scale_the_blocks_count_from_the_start():
    def effect(**options):
        """How much the blocks of the first stage change what passes through them."""
        torch.manual_seed(0)
        net = Embedding("convnext_zepto_rms", size=32, **options).eval().body.backbone
        x = net.stem(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        return ((net.stages[0](x) - x).norm() / x.norm()).item()

    assert effect(layer_scale=True) < 1e-4 < 1e-2 < effect()
    assert Embedding("convnext_zepto_rms", size=32).config["layer_scale"] is False


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="for a ConvNeXt, not for 'test_resnet'"):
        Embedding("test_resnet", frequency="srm")
    with pytest.raises(ValueError, match="multiple of 32"):
        Embedding("convnext_zepto_rms", size=50)
    with pytest.raises(ValueError, match="cannot take crops of 48 pixels"):
        Embedding("vit_tiny_patch16_224", size=48)
