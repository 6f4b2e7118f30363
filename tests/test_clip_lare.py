"""The fusion matrix as detectors: every cell builds by name, learns, is saved without its CLIP, and averages frames."""

import itertools

import numpy as np
import pytest
import tiny_clips
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tiny_clips import RESNET

from unmask.detectors import base, clip_backbone, clip_lare, fusion

# The cells of the matrix, written out once more: what each reads besides the picture, and its fused width.
READS = {
    "F0": ((), 20), "F1": (("lare",), 64), "F2c": (("lare",), 40), "F2s": (("lare",), 20), "F3c": (("lare",), 96),
    "F3s": (("lare",), 20), "F4c": (("lare", "boxes"), 128), "F5a": (("lare",), 96), "F5b": (("lare",), 96),
    "F5c": (("lare",), 128),
}  # fmt: skip
NAMES = [f"clip-lare:{kind}{end}" for kind, end in itertools.product(READS, ("", "-text"))]
SIDE = 8  # cells a side of the LaRE maps


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_backbone.load(tiny_clips.write(tmp_path_factory.mktemp("clip")))


def kind_of(name):
    return name.removeprefix("clip-lare:").removesuffix("-text")


def make(name, backbone, **changes):
    """A detector whose numbers are all other than those it starts with, so that every part counts."""
    torch.manual_seed(0)
    detector = base.build(name, **{"backbone": backbone, "lare_side": SIDE, "lare": "0123456789ab"} | changes)
    with torch.no_grad():
        for parameter in detector.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return detector


def inputs(b=4, t=1, size=28, seed=1):
    """Clips, LaRE maps and boxes, one of which is absent."""
    g = torch.Generator().manual_seed(seed)
    corner = 0.6 * size * torch.rand(b, t, 9, 2, generator=g)
    boxes = torch.cat([corner, corner + size * (0.1 + 0.2 * torch.rand(b, t, 9, 2, generator=g))], -1)
    boxes[0, 0, 2] = torch.nan
    return {
        "clips": torch.randn(b, t, 3, size, size, generator=g), "lare": torch.rand(b, t, 4, SIDE, SIDE, generator=g),
        "boxes": boxes,
    }  # fmt: skip


def read(detector, given):
    """What of the inputs a detector takes."""
    return {name: given[name] for name in ("clips", *detector.extras)}


def test_every_cell_is_registered_under_its_name():
    assert sorted(n for n in base.names() if n.startswith("clip-lare:")) == sorted(NAMES)
    assert all(base.module(name) is clip_lare for name in NAMES)
    with pytest.raises(ValueError, match="no detector 'clip-lare:F4s'"):
        base.build("clip-lare:F4s")


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_learns_all_of_itself_and_nothing_of_the_clip_and_is_kept(tmp_path, clip, name):
    detector, given = make(name, clip).train(), inputs()
    assert detector.name == name and detector.extras == READS[kind_of(name)][0]
    side = {"image_size": 28, "lare_side": SIDE, "map_side": 4}
    cell = fusion.FusionConfig(kind_of(name), detector.head_kind, 20, 32, text_dim=20, **side)
    learning = {f"fusion.{n}" for n, _ in fusion.Fusion(cell).named_parameters()}
    learning |= {"prompts.context"} if name.endswith("-text") else set()
    assert {n for n, p in detector.named_parameters() if p.requires_grad} == learning
    before = {n: v.detach().clone() for n, v in detector.state_dict().items()}
    frozen = {n: v.clone() for n, v in clip.state_dict().items()}
    optimiser = torch.optim.Adam(detector.trainable_parameters(), 1e-3)
    logits = detector(**read(detector, given))
    F.binary_cross_entropy_with_logits(logits, torch.tensor([0.0, 1.0, 1.0, 0.0])).backward()
    optimiser.step()
    changed = {n for n, p in detector.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert changed == learning
    assert all(torch.equal(v, frozen[n]) for n, v in detector.backbone.state_dict().items())
    out = base.save_checkpoint(detector.eval(), tmp_path / "ck")
    with safe_open(out / base.WEIGHTS, "pt") as kept:
        held = set(kept.keys())
    assert held - learning == {n for n, _ in detector.fusion.named_buffers(prefix="fusion")} and learning <= held
    loaded, card = base.load_checkpoint(out)
    assert loaded.config == detector.config and card["config"]["lare"] == "0123456789ab" and type(loaded).name == name
    with torch.no_grad():
        expected = detector(**read(detector, given))
        assert torch.equal(loaded(**read(detector, given)), expected) and expected.std() > 0


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_clips_are_means_of_frames_and_masked_frames_do_not_matter(clip, name):
    detector, given = make(name, clip).eval(), inputs(2, 3)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    logits, features = torch.zeros(2), torch.zeros(2, READS[kind_of(name)][1])
    for i, t in [(0, 0), (0, 2), (1, 1), (1, 2)]:
        picture = given["clips"][i, t].unsqueeze(0)
        own = {n: given[n][i, t].unsqueeze(0) for n in detector.extras}
        frame = {"pooled": clip.model.encode_image(picture), "maps": clip.maps(picture)} | own
        logits[i] += detector.head(**frame).item() / 2
        features[i] += detector.fusion.fused(**frame)[0] / 2
    for value in given.values():
        value[~mask] = torch.nan
    found = detector(mask=mask, **read(detector, given))
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(detector.features(mask=mask, **read(detector, given)), features, atol=1e-5, rtol=1e-4)
    assert abs(found[0] - found[1]) > 1e-4
    whole = {n: v[:, [0, 2]][:1] for n, v in read(detector, given).items()}
    torch.testing.assert_close(detector(**whole), logits[:1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip-lare:F0", "clip-lare:F1", "clip-lare:F2c", "clip-lare:F4c-text"])
@torch.no_grad()
def test_what_is_frozen_goes_into_the_head(clip, name):
    detector, given = make(name, clip).eval(), inputs()
    frozen = detector.frozen(given["clips"][:, 0])
    assert set(frozen) == ({"pooled", "maps"} if "F4c" in name else {"pooled"})
    assert torch.equal(frozen["pooled"], clip.model.encode_image(given["clips"][:, 0]))
    found = detector.head(**frozen, **{n: given[n][:, 0] for n in detector.extras})
    assert found.shape == (4, 1) and torch.equal(found[:, 0], detector(**read(detector, given)))


def test_padding_does_not_move_the_statistics_of_the_maps(clip):
    mask, given = torch.tensor([[True, False], [True, True], [True, False]]), inputs(3, 2)
    one, other = (make("clip-lare:F1", clip).train() for _ in range(2))
    loss = one(given["clips"], mask, given["lare"])
    kept = {n: v.clone() for n, v in one.fusion.named_buffers()}
    given["lare"][~mask] = 1e6
    assert torch.equal(other(given["clips"], mask, given["lare"]), loss)
    assert kept and all(torch.equal(v, kept[n]) for n, v in other.fusion.named_buffers())


@torch.no_grad()
def test_a_text_head_compares_with_its_prompts(clip):
    detector = make("clip-lare:F0-text", clip, context="a photo of a", lare_side=None).eval()
    words = clip.tokenizer.encode("a photo of a")
    detector.prompts.context.copy_(clip.model.token_embedding.weight[words].unsqueeze(0))
    text = clip.model.encode_text(clip.token_ids(["a photo of a real.", "a photo of a fake."])).numpy()
    project, given = detector.fusion.head.project, inputs()
    text = text @ project.weight.numpy().T + project.bias.numpy()
    expected = []
    for feature in clip.model.encode_image(given["clips"][:, 0]).numpy():
        real, fake = ((feature @ t) / np.sqrt((feature @ feature) * (t @ t)) for t in text)
        expected.append(np.exp(detector.fusion.head.logit_scale.item()) * (fake - real))
    np.testing.assert_allclose(detector(given["clips"]), expected, rtol=1e-3, atol=1e-4)
    assert make("clip-lare:F0-text", clip).prompts.context.shape == (1, 16, 24)


@torch.no_grad()
def test_the_maps_of_a_resnet_and_their_boxes(tmp_path):
    backbone = clip_backbone.load(tiny_clips.write(tmp_path, vision=RESNET))
    detector, given = make("clip-lare:F4c", backbone).eval(), inputs(size=64)
    visual = backbone.model.visual
    maps = visual.layer3(visual.layer2(visual.layer1(visual.stem(given["clips"][:, 0]))))
    x0, y0, x1, y1 = 16, 32, 48, 64  # two cells a side, of 16 pixels
    given["boxes"][:] = torch.nan
    given["boxes"][:, :, 4] = torch.tensor([x0, y0, x1, y1])
    found = detector.features(**read(detector, given))
    # RoIAlign reads between the centres of cells, up to the edges of the box.
    column, row = ((torch.arange(4.0) + 0.5) * 16 for _ in range(2))
    grid = (torch.arange(14) + 0.5) / 14
    xs, ys = x0 + grid * (x1 - x0), y0 + grid * (y1 - y0)

    def weights(points, centres):
        """Of every cell in every point, between the centres of two cells or beyond the last."""
        return torch.stack([(1 - (p.clamp(8, 56) - centres).abs() / 16).clamp(min=0) for p in points])

    regions = torch.einsum("nchw,yh,xw->nc", maps, weights(ys, row), weights(xs, column)) / 14**2
    torch.testing.assert_close(found[:, -128:], regions, atol=1e-4, rtol=1e-3)


def test_what_is_missing_or_of_another_shape_is_refused(clip):
    given = inputs(2, 3)
    detector = make("clip-lare:F4c", clip)
    for missing in ("lare", "boxes"):
        with pytest.raises(ValueError, match=f"clip-lare:F4c needs {missing} of shape .* not None"):
            detector(**{n: v for n, v in given.items() if n != missing})
    for name, wrong in (
        ("lare", given["lare"][:, :2]), ("lare", given["lare"][..., :7]), ("lare", given["lare"].flatten(0, 1)),
        ("boxes", given["boxes"][:1]), ("boxes", given["boxes"][..., :3]),
    ):  # fmt: skip
        shape = ", ".join(map(str, wrong.shape))
        for call in (detector, detector.features):
            with pytest.raises(ValueError, match=rf"needs {name} of shape \(2, 3, .* not \({shape}\)"):
                call(**given | {name: wrong})
    with pytest.raises(ValueError, match="F1 needs lare of shape"):
        make("clip-lare:F1", clip).head(torch.zeros(2, 20))
    with pytest.raises(ValueError, match="needs lare_side as a whole number, not None"):
        base.build("clip-lare:F2c", backbone=clip)
    with pytest.raises(ValueError, match="at least 8 cells a side, not 7"):
        base.build("clip-lare:F2c-text", backbone=clip, lare_side=7)
    with pytest.raises(TypeError, match="context"):
        base.build("clip-lare:F2c", backbone=clip, lare_side=8, context=4)


def test_another_clip_is_refused(tmp_path):
    where = tiny_clips.write(tmp_path / "clip")
    out = base.save_checkpoint(make("clip-lare:F2s-text", where), tmp_path / "ck")
    tiny_clips.write(tmp_path / "clip", seed=1)
    with pytest.raises(base.CheckpointError, match="fingerprint"):
        base.load_checkpoint(out)


def test_cost_counts_what_is_computed(clip):
    costs = {kind: base.cost(make(f"clip-lare:{kind}", clip)) for kind in ("F0", "F1", "F2c", "F4c")}
    assert costs["F0"]["trainable"] == 2 * 20 + 2
    first, second = 4 * 64 * 20, 20 * 20  # the layers of the MLP, 256 and 20 wide
    assert costs["F2c"]["multiply_adds"] - costs["F0"]["multiply_adds"] == first + second + 2 * 20
    assert costs["F4c"]["multiply_adds"] > costs["F0"]["multiply_adds"]
    stages = [
        9 * 64 * 16 * (4 + 4 * 16),
        16 * (9 * 32 * (16 + 3 * 32) + 16 * 32),
        4 * (9 * 64 * (32 + 3 * 64) + 32 * 64),
    ]
    assert costs["F1"]["multiply_adds"] == sum(stages) + 2 * 64, "the CLIP is not asked"
