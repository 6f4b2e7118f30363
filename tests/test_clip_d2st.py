"""A CLIP with adapters: the frozen CLIP at first, one result in any grouping, and weights of its own alone kept."""

import pytest
import tiny_clips
import torch
from torch.nn import functional as F

from unmask.detectors import base, clip_d2st
from unmask.detectors.clip_backbone import load

SPATIAL, TEMPORAL = ("spatial",), ("temporal",)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return tiny_clips.write(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def backbone(name):
    return load(name)


@pytest.fixture
def make(backbone):
    """Factory of detectors in evaluation mode; loud: with noise on all that the adapters start with."""

    def call(kind="d2st", loud=True, **given):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            detector = base.build(kind, backbone=backbone, **{"placement": "last-2", "frames": 6} | given).eval()
            for parameter in detector.adapters.parameters() if loud else ():
                parameter.data += 0.3 * torch.randn(parameter.shape)
        return detector

    return call


def clips(*lengths, seed=1):
    """A clip float[T,3,28,28] of every length."""
    return list(tiny_clips.images(sum(lengths), seed=seed).split(lengths))


@pytest.mark.parametrize("kind", ["d2st", "st-adapter"])
@pytest.mark.parametrize("placement", ["last-1", "last-2", "all"])
@torch.no_grad()
def test_at_first_it_is_the_frozen_clip_bit_by_bit(make, backbone, kind, placement):
    detector = make(kind, loud=False, placement=placement)
    assert len(detector.adapters) == {"last-1": 1, "last-2": 2, "all": 3}[placement]
    for b, t in ((3, 1), (2, 5)):
        images = tiny_clips.images(b * t)
        plain = backbone.pooled(images)
        assert torch.equal(detector.embed(detector.prefix(images), [(b, t)]), plain)
        assert torch.equal(detector.features(images.unflatten(0, (b, t))), plain.unflatten(0, (b, t)).mean(1))
    shapes = [(1, 5), (2, 1), (1, 3)]
    assert torch.equal(detector.embed(detector.prefix(images), shapes), plain)


@torch.no_grad()
def test_adapters_stand_behind_the_last_blocks(make, backbone):
    detector, images = make(), tiny_clips.images(4)
    seen, blocks = {}, backbone.model.visual.transformer.resblocks
    with torch.random.fork_rng():
        handles = [
            block.register_forward_hook(lambda m, given, out, k=k: seen.update({k: (given[0], out)}))
            for k, block in enumerate(blocks)
        ]
        backbone.pooled(images)
        plain = dict(seen)
        found = detector(images.unflatten(0, (1, 4)))
    for handle in handles:
        handle.remove()
    assert torch.equal(detector.prefix(images), plain[1][1]), "the first block is before any adapter"
    first = detector.adapters[0](plain[1][1][None])[0]
    torch.testing.assert_close(seen[2][0], first)
    last = detector.adapters[1](seen[2][1][None])[0]
    visual = backbone.model.visual
    pooled = (visual.ln_post(last)[:, 0] @ visual.proj).mean(0)
    expected = detector.linear.weight[0] @ (pooled / pooled.norm()) * 20**0.5 + detector.linear.bias[0]
    torch.testing.assert_close(found, expected[None])
    assert not torch.allclose(first, plain[1][1], atol=1e-2), "the adapters of this test must do something"


@pytest.mark.parametrize("kind", ["d2st", "st-adapter"])
@torch.no_grad()
def test_clips_of_several_lengths_in_one_batch_are_as_by_themselves(make, kind):
    detector, (a, b, c, d, e) = make(kind), clips(1, 4, 4, 1, 6)
    apart = [detector.features(x[None])[0] for x in (a, d, b, c, e)]
    frames = detector.embed(detector.prefix(torch.cat([a, d, b, c, e])), [(2, 1), (2, 4), (1, 6)])
    together = [part.mean(0) for part in frames.split([1, 1, 4, 4, 6])]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    wrong = detector.embed(detector.prefix(torch.cat([b, a, d])), [(1, 6)])[:4].mean(0)
    assert not torch.allclose(wrong, apart[2], atol=1e-3), "frames of other clips would be seen"


@torch.no_grad()
def test_padding_is_never_looked_at(make):
    detector, parts = make(), clips(2, 4, 1, 4)
    padded, mask = torch.full((4, 4, 3, 28, 28), torch.nan), torch.zeros(4, 4, dtype=torch.bool)
    for k, part in enumerate(parts):
        padded[k, : len(part)], mask[k, : len(part)] = part, True
    apart = torch.stack([detector(part[None])[0] for part in parts])
    torch.testing.assert_close(detector(padded, mask), apart, atol=1e-5, rtol=1e-5)
    assert apart.std() > 1e-3
    holes = torch.full((1, 5, 3, 28, 28), torch.nan)
    holes[0, [0, 2, 3, 4]] = parts[1]
    where = torch.tensor([[True, False, True, True, True]])
    torch.testing.assert_close(detector(holes, where), apart[1:2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_image_is_a_clip_that_stands_still_and_order_counts(make):
    (image, clip), turned = clips(1, 6), [3, 0, 5, 1, 4, 2]
    for kind in ("d2st", "st-adapter"):
        detector = make(kind)
        still = detector.features(image.expand(5, -1, -1, -1)[None])
        torch.testing.assert_close(detector.features(image[None]), still, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(detector(clip[None]), detector(clip[turned][None]), atol=1e-4)


@torch.no_grad()
def test_options_reach_the_adapters(make):
    both, one = make(), make(pathways=SPATIAL)
    assert list(both.adapters[0].paths) == [*SPATIAL, *TEMPORAL] and list(one.adapters[0].paths) == list(SPATIAL)
    assert make(embedding=True).adapters[1].embedding.shape == (6, 32) and both.adapters[0].embedding is None
    assert not make(mode="reference").adapters[0].aligned and both.adapters[0].aligned
    with pytest.raises(ValueError, match="at most 6 frames"):
        both(clips(7)[0][None])
    same = make(backend="grid_sample")
    clip = clips(6)[0][None]
    torch.testing.assert_close(same(clip), both(clip), atol=1e-5, rtol=1e-5)
    assert same.adapters[0].paths["spatial"].sample is not both.adapters[0].paths["spatial"].sample


@pytest.mark.parametrize("kind", ["d2st", "st-adapter"])
def test_a_step_leaves_the_clip_as_it_is(make, backbone, kind):
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    detector = make(kind).train()
    own = {key: value.detach().clone() for key, value in detector.named_parameters() if value.requires_grad}
    assert own.keys() == {key for key, _ in detector.named_parameters() if not key.startswith("backbone.")}
    optimizer = torch.optim.AdamW(detector.trainable_parameters(), lr=0.1)
    logits = detector(torch.stack(clips(4, 4)))
    F.binary_cross_entropy_with_logits(logits, torch.tensor([0.0, 1.0])).backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
    assert not any(torch.equal(p, own[key]) for key, p in detector.named_parameters() if key in own)


@pytest.mark.parametrize("kind", ["d2st", "st-adapter"])
@torch.no_grad()
def test_kept_and_loaded_again(name, kind, tmp_path):
    detector = base.build(kind, backbone=name, placement="last-2", frames=6).eval()
    for parameter in detector.adapters.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    base.save_checkpoint(detector, tmp_path)
    again, card = base.load_checkpoint(tmp_path)
    kept = base.read_checkpoint(tmp_path)[0]
    assert {key.split(".")[0] for key in kept} == {"adapters", "linear"}
    assert sum(value.numel() for value in kept.values()) == sum(p.numel() for p in detector.trainable_parameters())
    clip = torch.stack(clips(5, 5))
    assert torch.equal(again(clip), detector(clip)) and again(clip).std() > 0
    assert (again.first, again.input_spec, again.exact_frames) == (1, detector.input_spec, True)
    assert card["input"]["frames"] == 6 and card["input"]["size"] == 28


def test_the_key_of_what_is_computed_once(make, backbone, name, tmp_path):
    keys = [make(placement=p).depth_key for p in ("last-1", "last-2", "all")]
    other = base.build("d2st", backbone=tiny_clips.write(tmp_path, seed=4), placement="last-2", frames=6).depth_key
    assert len({*keys, other}) == 4 and keys[1] == f"{backbone.fingerprint[:12]}-1"
    assert make("st-adapter").depth_key == keys[1] == make(pathways=SPATIAL).depth_key, "they share the cache"
    assert not make().prefix(tiny_clips.images(1).requires_grad_()).requires_grad


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_one_to_compare_with_is_as_large(make):
    ours, theirs = (make(kind).adapters[0] for kind in ("d2st", "st-adapter"))
    fits = {w: abs(2 * 32 * w + w + 32 + 4 * w - count(ours)) for w in range(1, 200)}  # two matrices, a convolution
    assert abs(count(theirs) - count(ours)) == min(fits.values())
    for width, published in ((768, 606192), (1024, 1070400)):
        assert abs(count(clip_d2st._as_large(12, width)) / published - 1) < 0.002


@pytest.mark.parametrize("placement", ["last-0", "last-4", "first-2", "last-", "last-1.5", "", "last--1"])
def test_a_placement_that_the_clip_does_not_have(make, placement):
    with pytest.raises(ValueError, match=r"all or last-1 to last-3 .*not '"):
        make(placement=placement)


def test_another_tower_is_refused(tmp_path):
    name = tiny_clips.write(tmp_path / "resnet", vision=tiny_clips.RESNET)
    with pytest.raises(ValueError, match="not a ViT"):
        base.build("d2st", backbone=name)
    other = load(tiny_clips.write(tmp_path / "vit"))
    other.model.visual.transformer.batch_first = False
    with pytest.raises(ValueError, match="not a ViT"):
        base.build("d2st", backbone=other)


@torch.no_grad()
def test_where_each_adapter_looks_is_where_it_reads(make):
    detector, clip = make(), clips(6)[0]
    prefix = detector.prefix(clip)
    seen = []
    handles = [
        adapter.register_forward_pre_hook(lambda module, given: seen.append(given[0])) for adapter in detector.adapters
    ]
    tokens = detector.adapters[0](prefix[None])[0]
    after = detector.adapters[1](detector.backbone.model.visual.transformer.resblocks[-1](tokens)[None])
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(after[0], detector.tokens(prefix, [(1, 6)]), atol=1e-5, rtol=1e-5)
    for found, adapter, given in zip(detector.look(prefix), detector.adapters, seen, strict=True):
        for path, (places, attention) in adapter.look(given).items():
            torch.testing.assert_close(found[path][0], places, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[path][1], attention, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
