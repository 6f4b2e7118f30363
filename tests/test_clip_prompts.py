"""Detectors on a CLIP's pooled feature: what they compute, what of them learns, and what a checkpoint holds."""

import json

import numpy as np
import pytest
import tiny_clips
import torch
import torch.nn.functional as F
from conftest import SHARED
from safetensors import safe_open
from tiny_clips import RESNET, images
from torch.optim.swa_utils import AveragedModel

from unmask.detectors import base, clip_backbone, clip_prompts
from unmask.detectors.base import CheckpointError
from unmask.detectors.temporal import frame_outputs

LEARNING = ("ufd", "lntune", "coop", "cocoop", "clip-adapter", "clip-finetune")
CONFIGS = {
    "coop": {"context": 3, "position": "middle", "specific": True}, "cocoop": {"context": "a photo"},
    "clip-adapter": {"reduction": 4, "ratio": 0.3}, "clip-nn": {"k": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def clip(folder):
    return clip_backbone.load(tiny_clips.write(folder))


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    changes = {"custom_text": True, "quick_gelu": True, "text": {"proj_bias": True}}
    return clip_backbone.load(tiny_clips.write(tmp_path_factory.mktemp("custom"), **changes))


def make(name, backbone, **changes):
    """A detector whose numbers are all other than those it starts with, so that every part counts."""
    torch.manual_seed(0)
    detector = base.build(name, backbone=backbone, **CONFIGS.get(name, {}) | changes)
    if name == "clip-nn":
        detector.fill(torch.randn(9, backbone.dim), torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 0]))
    with torch.no_grad():
        for parameter in detector.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
        if name == "cocoop":
            detector.meta[0].bias += 1  # so that no ReLU is off
    return detector


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def by_cosine(backbone, pooled, text):
    """Difference of the scaled cosines with the prompts of fake and real, one image at a time."""
    scale = float(np.exp(backbone.model.logit_scale.item()))
    return np.array([scale * (unit(p) @ unit(t)[1] - unit(p) @ unit(t)[0]) for p, t in zip(pooled, text, strict=True)])


@torch.no_grad()
def test_cocoop_without_a_shift_is_its_words(clip):
    expected = clip.model.encode_text(clip.token_ids(["a photo of a real.", "a photo of a fake."]))
    detector = base.build("cocoop", backbone=clip)
    assert torch.equal(detector.prompts(clip)[0], expected)
    for parameter in detector.meta[2].parameters():
        parameter.zero_()
    pooled = clip.pooled(images())
    found = detector.prompts(clip, detector.meta(F.normalize(pooled, dim=1)))
    torch.testing.assert_close(found, expected.expand(3, -1, -1), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_each_head_computes_what_its_paper_says(clip, custom):
    for backbone in (clip, custom):
        pooled = 3 * backbone.pooled(images())
        p = pooled.numpy()
        ufd = make("ufd", backbone)
        w, b = ufd.linear.weight.numpy(), ufd.linear.bias.numpy()
        np.testing.assert_allclose(ufd.head(pooled)[:, 0], p @ w[0] + b, rtol=1e-4, atol=1e-5)
        tuned = make("lntune", backbone)
        w, b = tuned.linear.weight.numpy(), tuned.linear.bias.numpy()
        np.testing.assert_allclose(tuned.head(pooled)[:, 0], unit(p) @ w[0] + b, rtol=1e-4, atol=1e-5)
        fixed = backbone.model.encode_text(backbone.token_ids(["a real photo.", "a fake photo."])).numpy()
        adapter = make("clip-adapter", backbone)
        down, up = adapter.adapter[0].weight.numpy(), adapter.adapter[2].weight.numpy()
        assert down.shape == (5, 20) and adapter.adapter[0].bias is None
        mixed = 0.3 * np.maximum(np.maximum(p @ down.T, 0) @ up.T, 0) + 0.7 * p
        np.testing.assert_allclose(adapter.head(pooled)[:, 0], by_cosine(backbone, mixed, [fixed] * 3), atol=1e-4)
        whole = make("clip-finetune", backbone)
        ids = backbone.token_ids(["a real photo.", "a fake photo."])
        image, text, scale = whole.backbone.model(images(), ids)
        logits = scale * image @ text.T
        torch.testing.assert_close(whole(images().unsqueeze(1)), logits[:, 1] - logits[:, 0], atol=1e-4, rtol=1e-4)
        coop = make("coop", backbone)
        learned = coop.prompts(backbone)[0].numpy()
        np.testing.assert_allclose(coop.head(pooled)[:, 0], by_cosine(backbone, p, [learned] * 3), atol=1e-4)


@torch.no_grad()
def test_cocoop_shifts_every_vector_of_an_image_by_its_own_bias(clip):
    detector = make("cocoop", clip)
    pooled, ids = clip.pooled(images()), clip.token_ids(["a photo real.", "a photo fake."])
    texts = []
    for feature in unit(pooled.numpy()):
        first, last = detector.meta[0], detector.meta[2]
        hidden = np.maximum(first.weight.numpy() @ feature + first.bias.numpy(), 0)
        shift = torch.from_numpy(last.weight.numpy() @ hidden + last.bias.numpy())
        embedded = clip.embed(ids)
        for label in range(2):
            for m in range(2):
                embedded[label, 1 + m] = detector.prompts.context[0, m] + shift
        texts.append(clip.text_features(embedded, ids).numpy())
    assert detector.meta[0].weight.shape == (1, 20), "a sixteenth of the feature's length"
    assert np.abs(texts[0] - texts[1]).max() > 0
    np.testing.assert_allclose(detector.head(pooled)[:, 0], by_cosine(clip, pooled.numpy(), texts), atol=1e-4)


@torch.no_grad()
def test_neighbours_are_the_nearest_by_cosine(clip):
    detector = make("clip-nn", clip, k=2)
    members, labels = torch.randn(30, 20), torch.arange(30) % 3 == 0
    detector.fill(members, labels.int())
    queries = torch.randn(7, 20)
    for query, found in zip(queries, detector.head(queries)[:, 0], strict=True):
        near = {True: [], False: []}
        for member, fake in zip(members, labels.tolist(), strict=True):
            near[fake].append(float(query @ member / query.norm() / member.norm()))
        expected = np.mean(sorted(near[True])[-2:]) - np.mean(sorted(near[False])[-2:])
        assert found == pytest.approx(expected, abs=1e-6)
    assert not detector.trainable_parameters() and detector.config["members"] == [20, 10]
    with pytest.raises(ValueError, match="2 neighbours need as many fake features, not 1"):
        detector.fill(members[:3], labels[:3].int())
    with pytest.raises(ValueError, match="fill it first"):
        base.build("clip-nn", backbone=clip)(images().unsqueeze(1))


def expected_names(name, backbone):
    """The parameters that are to learn, by name, from what the methods say."""
    own = {
        "ufd": {"linear.weight", "linear.bias"}, "lntune": {"linear.weight", "linear.bias"},
        "coop": {"prompts.context"}, "clip-finetune": set(),
        "cocoop": {"prompts.context", "meta.0.weight", "meta.0.bias", "meta.2.weight", "meta.2.bias"},
        "clip-adapter": {"adapter.0.weight", "adapter.2.weight"},
    }[name]  # fmt: skip
    below = {f"backbone.{n}" for n, _ in backbone.named_parameters()}
    norms = {n for n in below if ".visual." in n and any(part in n for part in ("ln_pre", "ln_post", "ln_1", "ln_2"))}
    return own | {"lntune": norms, "clip-finetune": below}.get(name, set())


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("which", ["clip", "custom"])
def test_gradients_reach_what_is_to_learn_and_nothing_else_changes(request, which, name):
    backbone = request.getfixturevalue(which)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    detector = make(name, backbone).train()
    learning = expected_names(name, backbone)
    assert {n for n, p in detector.named_parameters() if p.requires_grad} == learning
    assert set(detector.state_dict()) == learning
    start = {k: v.clone() for k, v in detector.named_parameters()}
    loss = F.binary_cross_entropy_with_logits(detector(images().unsqueeze(1)), torch.tensor([0.0, 1.0, 1.0]))
    loss.backward()
    with_gradient = {n for n, p in detector.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == learning
    torch.optim.SGD(detector.parameters(), 1.0).step()
    changed = {n for n, p in detector.named_parameters() if not torch.equal(p, start[n])}
    assert changed == learning
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items()), (
        "the given backbone stays as it was"
    )
    assert not any(p.requires_grad for p in backbone.parameters())


def test_a_resnet_is_probed_and_tuned_but_has_no_layer_norm(tmp_path):
    backbone = clip_backbone.load(tiny_clips.write(tmp_path, vision=RESNET))
    with pytest.raises(ValueError, match="no LayerNorm"):
        base.build("lntune", backbone=backbone)
    detector = make("clip-finetune", backbone).train()
    statistics = {k: v.clone() for k, v in detector.backbone.named_buffers()}
    detector(images(size=64).unsqueeze(1)).sum().backward()
    assert all(torch.equal(v, statistics[k]) for k, v in detector.backbone.named_buffers())
    saved = base.load_checkpoint(base.save_checkpoint(detector, tmp_path / "ck"))[0]
    x = images(size=64).unsqueeze(1)
    torch.testing.assert_close(saved(x), detector(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*LEARNING, "clip-nn"])
@torch.no_grad()
def test_clips_are_means_of_frames_and_masked_frames_do_not_matter(clip, name):
    detector, x = make(name, clip).eval(), images(6).view(2, 3, 3, 28, 28)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logits = detector(x)
    each = torch.stack([detector(x[:, t : t + 1]) for t in range(3)], 1)
    assert logits.shape == (2,) and each.std() > 0
    torch.testing.assert_close(logits, each.mean(1), atol=1e-4, rtol=1e-4)
    hidden = x.clone()
    hidden[0, 2] = float("nan")
    torch.testing.assert_close(
        detector(hidden, mask), torch.stack([each[0, :2].mean(), each[1].mean()]), atol=1e-4, rtol=1e-4
    )
    one = x[:, :1]
    torch.testing.assert_close(detector.head(detector.features(one)).squeeze(1), detector(one))
    frozen = detector.frozen(x[:, 0])
    assert set(frozen) == {"pooled"} and frozen["pooled"].shape == (2, 20) and detector.extras == ()
    assert torch.equal(detector.head(**frozen).squeeze(1), detector(one))
    torch.testing.assert_close(frame_outputs(detector, x[:, 0])[1], detector(one))
    assert detector.features(hidden, mask).shape == (2, 20) and detector.features(hidden, mask).isfinite().all()


def test_input_and_cost(clip):
    detector = base.build("ufd", backbone=clip)
    spec = detector.input_spec
    assert (spec.size, spec.frames) == (28, 1) and spec.mean == clip.mean and spec.std == clip.std
    grey = detector.prepare(torch.full((1, 28, 28, 3), 128, dtype=torch.uint8))
    assert grey[0, 0, 0, 0].item() == pytest.approx((128 / 255 - 0.48145466) / 0.26862954)
    cost = base.cost(detector)
    assert cost["trainable"] == 21 and cost["multiply_adds"] > 0


@pytest.mark.parametrize("name", [*LEARNING, "clip-nn"])
def test_checkpoints_hold_what_was_trained_and_give_the_same_scores(tmp_path, folder, clip, name):
    detector = make(name, clip).eval()
    out = base.save_checkpoint(detector, tmp_path / "ck", seed=1)
    with safe_open(out / base.WEIGHTS, "pt") as kept:
        held = set(kept.keys())
    assert held == ({"real", "fake"} if name == "clip-nn" else expected_names(name, clip))
    card = json.loads((out / base.CONFIG).read_text())
    assert card["config"]["fingerprint"] == clip.fingerprint and card["config"]["backbone"] == f"local-dir:{folder}"
    loaded, _ = base.load_checkpoint(out)
    with torch.no_grad():
        assert torch.equal(loaded(images().unsqueeze(1)), detector(images().unsqueeze(1)))
    assert loaded.config == detector.config and not loaded.training


@pytest.mark.parametrize("change", ["weights", "activation", "normalisation"])
@pytest.mark.parametrize("name", ["ufd", "coop", "clip-finetune"])
def test_checkpoints_are_refused_on_another_backbone(tmp_path, name, change):
    where = tiny_clips.write(tmp_path / "clip")
    out = base.save_checkpoint(base.build(name, backbone=where), tmp_path / "ck")
    base.load_checkpoint(out)
    new = {
        "weights": {"seed": 1},
        "activation": {"quick_gelu": True},
        "normalisation": {"preprocess": {"std": [0.5] * 3}},
    }
    tiny_clips.write(tmp_path / "clip", **new[change])
    with pytest.raises(CheckpointError, match="fingerprint"):
        base.load_checkpoint(out)


def test_a_checkpoint_that_misses_a_trained_tensor_is_refused(tmp_path, clip):
    detector = make("cocoop", clip)
    state = detector.state_dict()
    del state["meta.0.bias"]
    with pytest.raises(RuntimeError, match="meta.0.bias"):
        detector.load_state_dict(state)
    tuned = make("lntune", clip)
    with pytest.raises(RuntimeError, match="ln_post"):
        tuned.load_state_dict({k: v for k, v in tuned.state_dict().items() if "ln_post" not in k})


def test_averages_and_wrappers_save_and_load_it_too(clip):
    detector = make("coop", clip)
    average = AveragedModel(detector)
    average.update_parameters(detector)
    state = average.state_dict()
    assert set(state) == {"n_averaged", "module.prompts.context"}
    average.load_state_dict(state)
    frozen = make("ufd", clip).requires_grad_(False)
    assert set(frozen.state_dict()) == {"linear.weight", "linear.bias"}


def head_file(path, weight=(1, 768), bias=(1,), **more):
    torch.manual_seed(7)
    torch.save({"weight": torch.randn(weight), "bias": torch.randn(bias)} | more, path)
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return clip_backbone.load(tiny_clips.write(tmp_path_factory.mktemp("wide"), dim=768))


def check_published(detector, path):
    """A published head is refused on backbones other than its own, and taken over on that."""
    start = detector.linear.weight.clone()
    for given, why in (({}, "ViT-L-14-quickgelu, openai"), ({"fingerprint": "0" * 64}, "fingerprint 000000000000")):
        with pytest.raises(CheckpointError, match=why):
            detector.load_published(path, **given)
    assert torch.equal(detector.linear.weight, start)
    detector.load_published(path, fingerprint=detector.backbone.fingerprint)
    kept = torch.load(path, weights_only=True, map_location="cpu")
    assert torch.equal(detector.linear.weight, kept["weight"]) and torch.equal(detector.linear.bias, kept["bias"])
    x = images()
    expected = detector.backbone.model.encode_image(x) @ kept["weight"][0] + kept["bias"]
    torch.testing.assert_close(detector(x.unsqueeze(1)), expected, atol=1e-4, rtol=1e-4)


def test_a_published_head_loads_on_its_own_backbone_alone(tmp_path, wide, clip):
    check_published(base.build("ufd", backbone=wide), head_file(tmp_path / "fc.pth"))
    other = base.build("ufd", backbone=clip)
    for path in (
        head_file(tmp_path / "fc.pth"), head_file(tmp_path / "two.pth", (2, 20), (2,)),
        head_file(tmp_path / "more.pth", (1, 20), more=torch.ones(1)), tmp_path / "none.pth",
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"is not a head of weight \(1, 20\) and bias \(1,\)"):
            other.load_published(path, fingerprint=clip.fingerprint)
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no head")
    for name in ("list.pth", "text.pth"):
        with pytest.raises(CheckpointError, match="is not a head"):
            other.load_published(tmp_path / name, fingerprint=clip.fingerprint)


def test_the_tag_of_openai_is_the_published_heads_own_backbone(tmp_path, wide):
    detector = base.build("ufd", backbone=wide)
    detector.backbone.name, kept = "ViT-L-14-quickgelu", detector.backbone.name
    with pytest.raises(CheckpointError):
        detector.load_published(head_file(tmp_path / "fc.pth"))
    detector.backbone.weights = "openai"
    detector.load_published(head_file(tmp_path / "fc.pth"))
    detector.backbone.name, detector.backbone.weights = kept, None


def test_the_head_that_ufd_published(wide, tmp_path):
    path = SHARED / "data" / "weights" / "ufd_fc_weights.pth"
    if not path.is_file():
        pytest.skip("the published head of UFD (../shared/data/weights) is not here")
    detector = base.build("ufd", backbone=wide)
    check_published(detector, path)
    assert detector.linear.weight.shape == (1, 768) and detector.linear.bias.shape == (1,)
    assert detector.linear.weight.abs().mean().item() == pytest.approx(0.1780, abs=1e-4)
    loaded, _ = base.load_checkpoint(base.save_checkpoint(detector, tmp_path / "ck"))
    assert torch.equal(loaded.linear.weight, detector.linear.weight)


def test_options_that_do_not_fit_say_so(clip, folder):
    with pytest.raises(ValueError, match="position must be one of end, middle, front"):
        base.build("coop", backbone=clip, position="last")
    with pytest.raises(ValueError, match="fit into 77 tokens"):
        base.build("cocoop", backbone=clip, context=74)
    with pytest.raises(ValueError, match="from 1 on"):
        base.build("clip-nn", backbone=clip, k=0)
    with pytest.raises(ValueError, match="fingerprint"):
        base.build("ufd", backbone=f"local-dir:{folder}", fingerprint="0" * 64)
    with pytest.raises(clip_backbone.BackboneError, match="random"):
        base.build("ufd", backbone="ViT-L-14-quickgelu")


def test_all_are_registered():
    assert {*LEARNING, "clip-nn"} <= set(base.names()) and base.module("coop") is clip_prompts
