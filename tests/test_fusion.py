"""The fusion matrix: every cell builds, learns, is saved and read; sizes by hand; what is not in it is refused."""

import itertools
import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from unmask.detectors import egre, fusion, roi
from unmask.detectors.fusion import Fusion, FusionConfig

# The cells that the matrix has, written out once more: what each reads, besides text.
READS = {
    "F0": {"pooled"}, "F1": {"lare"}, "F2c": {"pooled", "lare"}, "F2s": {"pooled", "lare"},
    "F3c": {"pooled", "maps", "lare"}, "F3s": {"pooled", "maps", "lare"},
    "F4c": {"pooled", "maps", "lare", "boxes"}, "F5a": {"pooled", "maps", "lare"}, "F5b": {"pooled", "maps", "lare"},
    "F5c": {"pooled", "maps", "lare"},
}  # fmt: skip
CELLS = list(itertools.product(READS, ["linear", "text"]))
SHAPE = {"image_dim": 24, "map_channels": 32, "map_side": 4, "lare_side": 8, "image_size": 64, "text_dim": 24}
# image_dim, map_channels, map_side, text_dim
BACKBONES = {"RN50": (1024, 1024, 14, 1024), "L/14": (768, 1024, 16, 768), "B/32": (512, 768, 7, 512)}


def make(kind, head="linear", **shape):
    torch.manual_seed(0)
    return Fusion(FusionConfig(kind, head, **SHAPE | shape))


def inputs(n=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    corner = 40 * torch.rand(n, 9, 2, generator=g)
    boxes = torch.cat([corner, corner + 5 + 15 * torch.rand(n, 9, 2, generator=g)], 2)
    boxes[0, 2] = torch.nan
    return {
        "pooled": torch.randn(n, 24, generator=g), "maps": torch.randn(n, 32, 4, 4, generator=g),
        "lare": torch.rand(n, 4, 8, 8, generator=g), "boxes": boxes, "text": torch.randn(2, 24, generator=g),
    }  # fmt: skip


def of_backbone(name, kind, head="linear"):
    d, c, g, t = BACKBONES[name]
    with torch.device("meta"):
        return Fusion(FusionConfig(kind, head, d, c, g, 32, 224, t))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def loss_of(model, given):
    labels = torch.tensor([0.0, 1.0] * 3)
    return F.binary_cross_entropy_with_logits(model(**given), labels[: len(given["pooled"])])


@pytest.mark.parametrize("kind,head", CELLS)
def test_every_cell_learns_and_is_the_same_when_read_again(tmp_path, kind, head):
    model, given = make(kind, head), inputs()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    first = loss_of(model, given)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    first.backward()
    without = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    assert not without and all(p.requires_grad for p in model.parameters())
    optimiser.step()
    assert not [k for k, p in model.named_parameters() if torch.equal(p, before[k])]
    assert loss_of(model, given) < first
    with torch.no_grad():
        expected = model.eval()(**given)
    assert expected.shape == (6,) and torch.isfinite(expected).all() and expected.std() > 0
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(asdict(model.config)))
    again = Fusion(FusionConfig(**json.loads((tmp_path / "config.json").read_text()))).eval()
    with torch.no_grad():
        assert not torch.equal(again(**given), expected)
        again.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(again(**given), expected) and again.config == model.config


@pytest.mark.parametrize("kind,head", CELLS)
def test_a_picture_alone_is_as_among_others_and_can_be_learnt_from(kind, head):
    model, given = make(kind, head).eval(), inputs()
    with torch.no_grad():
        together, fused = model(**given), model.fused(*(given[k] for k in ("pooled", "maps", "lare", "boxes")))
        torch.testing.assert_close(model.head(fused, given["text"]), together)
        assert fused.shape == (6, model.config.dim)
        for i in range(6):
            alone = model(**{k: v if k == "text" else v[i : i + 1] for k, v in given.items()})
            assert alone.shape == (1,)
            torch.testing.assert_close(alone, together[i : i + 1], atol=1e-4, rtol=1e-4)
    one = {k: v if k == "text" else v[:1] for k, v in given.items()}
    loss_of(model.train(), one).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind,reads", READS.items())
@torch.no_grad()
def test_every_cell_reads_its_inputs_and_no_others(kind, reads):
    model, given, other = make(kind).eval(), inputs(), inputs(seed=2)
    expected = model(**given)
    for name in ("pooled", "maps", "lare", "boxes"):
        assert torch.equal(model(**given | {name: other[name]}), expected) == (name not in reads)
        without = given | {name: None}
        if name in reads:
            with pytest.raises(ValueError, match=rf"{kind} needs {name} of shape \(N, .*, not None"):
                model(**without)
            with pytest.raises(ValueError, match=f"{kind} needs {name}.*, not .6, 3"):
                model(**given | {name: torch.zeros(6, 3, 3, 3)})
        else:
            assert torch.equal(model(**without), expected)
    if len(reads) > 1:
        with pytest.raises(ValueError, match="not of the same number of pictures"):
            model(**given | {"lare": given["lare"][:1]})


@pytest.mark.parametrize("head", ["linear", "text"])
@pytest.mark.parametrize("kind", ["F3c", "F5b", "F4c"])
def test_the_optimiser_has_every_trainable_tensor_by_name(kind, head):
    attention = ["query.weight", "keys.0.weight", "value.weight", "out.weight", "out.bias", "norm.weight", "norm.bias"]
    names = [f"spatial.attention.{name}" for name in attention] + ["spatial.positions"]
    names += ["channel.gate.0.weight", "channel.gate.2.weight", "image_project.weight", "image_project.bias"]
    if kind == "F5b":
        names += [f"spatial.embed.{i}.{name}" for i in range(6) for name in ("weight", "bias")]
    else:  # regions are averaged, which takes no parameters
        names += ["spatial.error_bias.weight"]
    if head == "text":
        names += ["head.project.weight", "head.project.bias", "head.logit_scale"]
    else:
        names += ["head.classes.weight", "head.classes.bias"]
    model = make(kind, head)
    optimiser = torch.optim.AdamW(model.parameters())
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if id(p) in held)
    assert set(names) == set(model.state_dict())


def test_widths_of_the_matrix():
    widths = {
        "RN50": {
            "F0": 1024, "F1": 64, "F2c": 2048, "F2s": 1024, "F3c": 3072, "F3s": 1024, "F4c": 4096, "F5a": 3072,
            "F5b": 3072, "F5c": 4096,
        },
        "L/14": {
            "F0": 768, "F1": 64, "F2c": 1536, "F2s": 768, "F3c": 3072, "F3s": 768, "F4c": 4096, "F5a": 3072,
            "F5b": 3072, "F5c": 4096,
        },
        "B/32": {
            "F0": 512, "F1": 64, "F2c": 1024, "F2s": 512, "F3c": 2304, "F3s": 512, "F4c": 3072, "F5a": 2304,
            "F5b": 2304, "F5c": 3072,
        },
    }  # fmt: skip
    for backbone, row in widths.items():
        assert list(row) == list(fusion.KINDS)
        for kind, dim in row.items():
            model = of_backbone(backbone, kind)
            assert model.config.dim == dim == model.head.classes.in_features


def test_parameters_of_the_matrix():
    for backbone, (d, c, g, t) in BACKBONES.items():
        attention = 3 * c * 512 + 512 * c + c + 2 * c
        spatial, channel = (g * g + 1) * c + 4 * 8 + attention, 4 * 128 + 128 * c
        chain = sum(a * b + b for a, b in ((4, 8), (8, 32), (32, 64), (64, 128), (128, 256), (256, c)))
        crossed = (g * g + 1) * c + chain + attention
        two_keys = (g * g + 1) * c + 4 * c + c + 2 * (attention + c * 512)
        mlp, image = 256 * d + d + d * d + d, 0 if d == c else d * c + c
        bodies = {
            "F0": (0, d), "F1": (174752, 64), "F2c": (mlp, 2 * d), "F2s": (mlp + 4 * d, d),
            "F3c": (image + spatial + channel, 3 * c), "F3s": (spatial + channel + 2 * (c * d + d), d),
            "F4c": (image + spatial + channel, 4 * c), "F5a": (image + spatial + channel, 3 * c),
            "F5b": (image + crossed + channel, 3 * c), "F5c": (image + two_keys + channel, 4 * c),
        }  # fmt: skip
        for kind, (body, dim) in bodies.items():
            assert parameters(of_backbone(backbone, kind)) == body + 2 * dim + 2
            assert parameters(of_backbone(backbone, kind, "text")) == body + t * dim + dim + 1
    assert round(parameters(of_backbone("RN50", "F3c").spatial) / 1e6, 2) == 2.30


@torch.no_grad()
def test_parts_stand_where_they_should():
    given = inputs()
    pooled, maps, lare, boxes = (given[k] for k in ("pooled", "maps", "lare", "boxes"))
    for kind in ("F3c", "F4c", "F5a", "F5b", "F5c"):
        model = make(kind).eval()
        found = model.fused(pooled, maps, lare, boxes)
        image = pooled @ model.image_project.weight.T + model.image_project.bias
        parts = [image, model.spatial(maps, lare), model.channel(maps, lare)]
        parts += [roi.pool(maps, boxes, 64)] if kind == "F4c" else []
        torch.testing.assert_close(found, torch.cat(parts, 1))
    kinds = {k: type(make(k).spatial) for k in ("F3c", "F3s", "F4c", "F5a", "F5b", "F5c")}
    assert kinds == dict.fromkeys(kinds, egre.SpatialAttention) | {
        "F5b": egre.CrossAttention, "F5c": egre.TwoKeyAttention,
    }  # fmt: skip
    none = make("F4c").eval().fused(pooled, maps, lare, torch.full_like(boxes, torch.nan))
    assert torch.equal(none[:, -32:], torch.zeros(6, 32))
    model = make("F3s").eval()
    summed = pooled.clone()
    for part, layer in ((model.spatial, model.spatial_project), (model.channel, model.channel_project)):
        summed += part(maps, lare) @ layer.weight.T + layer.bias
    torch.testing.assert_close(model.fused(pooled, maps, lare), summed)
    torch.testing.assert_close(make("F2c").eval().fused(pooled, None, lare)[:, :24], pooled)
    added = make("F2s").eval()
    normed = (x - x.mean(1, keepdim=True) for x in (pooled, added.map(lare)))
    expected = sum(x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() for x in normed)
    torch.testing.assert_close(added.fused(pooled, None, lare), expected)


@torch.no_grad()
def test_features_as_wide_as_their_maps_go_in_as_they_are():
    model, given = make("F3c", image_dim=32).eval(), inputs()
    pooled = torch.randn(6, 32)
    assert torch.equal(model.fused(pooled, given["maps"], given["lare"])[:, :32], pooled)


@torch.no_grad()
def test_the_linear_head_gives_the_difference_of_two_logits():
    model, given = make("F0").eval(), inputs()
    two = given["pooled"] @ model.head.classes.weight.T + model.head.classes.bias
    probability = two.double().softmax(1)[:, 1]
    torch.testing.assert_close(torch.sigmoid(model(**given).double()), probability, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_text_head_starts_as_clip_where_widths_are_equal():
    model, given = make("F0", "text").eval(), inputs()
    probability = []
    for f in given["pooled"]:
        cosines = torch.stack([f @ t / (f.norm() * t.norm()) for t in given["text"]])
        probability.append((cosines / 0.07).exp()[1] / (cosines / 0.07).exp().sum())
    torch.testing.assert_close(torch.sigmoid(model(**given)), torch.stack(probability), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(model(**given | {"pooled": 7 * given["pooled"]}), model(**given), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(**given | {"text": given["text"].flip(0)}), -model(**given))
    for kind in ("F2s", "F3s"):
        assert torch.equal(make(kind, "text").head.project.weight, torch.eye(24))
    wide = make("F3c", "text").head.project
    assert wide.weight.shape == (96, 24) and (wide.bias != 0).any()
    assert make("F0", "text", text_dim=16).head.project.weight.shape == (24, 16)


def test_every_picture_may_have_its_own_prompts():
    model, given = make("F3c", "text").eval(), inputs()
    own = torch.randn(6, 2, 24, generator=torch.Generator().manual_seed(3)).requires_grad_()
    found = model(**given | {"text": own})
    for i in range(6):
        one = {k: v[i : i + 1] for k, v in given.items() if k != "text"}
        torch.testing.assert_close(model(**one, text=own[i]), found[i : i + 1], atol=1e-4, rtol=1e-4)
    found[2].backward()
    reached = own.grad.abs().sum((1, 2)) > 0
    assert reached.tolist() == [i == 2 for i in range(6)]
    for text in (None, torch.zeros(3, 24), torch.zeros(2, 23)):
        with pytest.raises(ValueError, match=r"needs text of shape \(2, 24\), not "):
            model(**given | {"text": text})


@pytest.mark.parametrize("kind", [f"F{i}{join}" for i in range(7) for join in ("", "c", "s", "a")])
@pytest.mark.parametrize("head", ["linear", "text"])
def test_what_is_not_in_the_matrix_is_refused(kind, head):
    if (kind, head) in CELLS:
        FusionConfig(kind, head, **SHAPE)
        return
    sentence = (
        "There is no F4s: .*; choose F4c or F3s" if kind == "F4s" else f"There is no fusion '{kind}'; known are F0"
    )
    with pytest.raises(ValueError, match=sentence):
        FusionConfig(kind, head, **SHAPE)


def test_shapes_that_do_not_fit_are_refused():
    for kind, head, change, message in (
        ("F0", "cosine", {}, "A head is one of linear, text, not 'cosine'"),
        ("F0", "text", {"text_dim": None}, "F0 with a text head needs text_dim as a whole number, not None"),
        ("F2c", "linear", {"image_dim": 0}, "F2c with a linear head needs image_dim as a whole number, not 0"),
        ("F3c", "linear", {"map_channels": None}, "needs map_channels as a whole number, not None"),
        ("F5b", "linear", {"map_side": 7.0}, "needs map_side as a whole number, not 7.0"),
        ("F4c", "linear", {"image_size": None}, "needs image_size as a whole number, not None"),
        ("F1", "linear", {"lare_side": None}, "needs lare_side as a whole number, not None"),
        ("F1", "linear", {"lare_side": 7}, "LaRE maps need at least 8 cells a side, not 7"),
    ):
        with pytest.raises(ValueError, match=message):
            FusionConfig(kind, head, **SHAPE | change)
    assert FusionConfig("F0", image_dim=24).dim == 24 and FusionConfig("F1", lare_side=32).dim == 64
