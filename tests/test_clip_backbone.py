"""CLIP by open_clip: what it gives equals its own layers run one by one, and nothing loads that would not be right."""

import json
import subprocess
import sys

import open_clip
import pytest
import tiny_clips
import torch
from safetensors.torch import load_file, save_file
from tiny_clips import CONFIG, RESNET, VIT, WEIGHTS, images
from torch import nn

from unmask import downloads
from unmask.detectors import base, clip_backbone
from unmask.detectors.clip_backbone import BackboneError

LAYOUTS = {"clip": {}, "custom": {"custom_text": True}, "biased": {"text": {"proj_bias": True}, "custom_text": True},
           "quick": {"quick_gelu": True}, "both ways": {"text": {"no_causal_mask": True}},
           "linear": {"text": {"proj_bias": True}}}  # fmt: skip
TEXTS = ["a photo of a real face.", "fake", "a much longer text, with a comma and ten or more words in it"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return clip_backbone.load(tiny_clips.write(tmp_path_factory.mktemp("vit")))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return clip_backbone.load(tiny_clips.write(tmp_path_factory.mktemp("resnet"), vision=RESNET))


@pytest.fixture
def named(tmp_path):
    """Make architectures that open_clip knows by name; returns the name and the state of random weights for it."""

    def make(name, **changes):
        (tmp_path / f"{name}.json").write_text(json.dumps(tiny_clips.config(**changes)))
        open_clip.add_model_config(tmp_path / f"{name}.json")
        tiny_clips.write(tmp_path / name, **changes)
        return load_file(tmp_path / name / WEIGHTS)

    return make


@torch.no_grad()
def test_a_vit_equals_its_layers_run_one_by_one(vit):
    visual, x = vit.model.visual, images()
    cells = visual.conv1(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([visual.class_embedding.expand(3, 1, -1), cells], 1) + visual.positional_embedding
    tokens = visual.ln_pre(tokens)
    for block in visual.transformer.resblocks:
        tokens = block(tokens)
    expected = torch.stack([tokens[:, 1 + 4 * i + j] for i in range(4) for j in range(4)], 2).view(3, 32, 4, 4)
    pooled, maps = vit.pooled_and_maps(x)
    assert maps.shape == (3, vit.map_channels, vit.map_side, vit.map_side)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(pooled, visual.ln_post(tokens[:, 0]) @ visual.proj)
    torch.testing.assert_close(vit.tokens(x), torch.stack([visual.ln_post(tokens[:, 1 + i]) for i in range(16)], 1))
    assert torch.equal(vit.maps(x), maps) and torch.equal(vit.pooled(x), pooled)
    assert torch.equal(pooled, vit.model.encode_image(x)) and pooled.shape == (3, vit.dim) == (3, 20)
    assert not visual.transformer._forward_hooks


@torch.no_grad()
def test_a_resnet_equals_its_layers_run_one_by_one(resnet):
    visual, x = resnet.model.visual, images(size=64)
    expected = visual.layer3(visual.layer2(visual.layer1(visual.stem(x))))
    kept = expected.clone()
    last = visual.layer4(expected)
    pooled, maps = resnet.pooled_and_maps(x)
    assert maps.shape == (3, 128, 4, 4) and (resnet.map_channels, resnet.map_side) == (128, 4)
    assert torch.equal(maps, kept) and torch.equal(pooled, visual.attnpool(last))
    assert torch.equal(resnet.tokens(x), last.flatten(2).transpose(1, 2)) and resnet.tokens(x).shape == (3, 4, 256)
    assert resnet.input_size == 64 and resnet.dim == 20 and kept.std() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_text_path_is_encode_text_bit_by_bit(tmp_path, layout):
    backbone = clip_backbone.load(tiny_clips.write(tmp_path, **LAYOUTS[layout]))
    assert isinstance(backbone.model, open_clip.CustomTextCLIP) == ("custom_text" in LAYOUTS[layout])
    ids = backbone.token_ids(TEXTS)
    assert ids.dtype == torch.int64 and ids.shape == (3, 77) == (3, backbone.context_length)
    embedded = backbone.embed(ids)
    assert embedded.shape == (3, 77, 24) and backbone.text_width == 24
    found = backbone.text_features(embedded, ids)
    assert torch.equal(found, backbone.model.encode_text(ids)) and found.shape == (3, 20)
    later = embedded.clone()
    later[0, 30:] += 1  # behind the end of the text
    unchanged = torch.equal(backbone.text_features(later, ids)[0], found[0])
    assert unchanged != (layout == "both ways")


def test_gradients_reach_the_embeddings_and_no_weight(vit):
    ids = vit.token_ids(TEXTS)
    embedded = vit.embed(ids).requires_grad_()
    vit.text_features(embedded, ids).square().sum().backward()
    ends = ids.argmax(1).tolist()
    for k, end in enumerate(ends):
        moved = embedded.grad[k].abs().sum(1) > 0
        assert moved[: end + 1].all() and not moved[end + 1 :].any()
    assert not any(p.requires_grad or p.grad is not None for p in vit.parameters())


def test_it_stays_in_evaluation_mode_and_loading_draws_nothing(tmp_path):
    name = tiny_clips.write(tmp_path, vision=VIT | {"patch_dropout": 0.5})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    backbone = clip_backbone.load(name)
    assert torch.equal(torch.get_rng_state(), before)
    nn.ModuleList([backbone]).train()
    assert not any(module.training for module in backbone.modules())
    assert torch.equal(backbone.pooled(images()), backbone.pooled(images()))


def test_normalisation_is_that_of_the_folder(tmp_path, vit):
    assert vit.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4) and vit.std[0] == pytest.approx(
        0.2686, abs=1e-4
    )
    other = clip_backbone.load(tiny_clips.write(tmp_path, preprocess={"mean": [0.5] * 3, "std": [0.25] * 3}))
    assert other.mean == (0.5,) * 3 and other.std == (0.25,) * 3 and other.fingerprint != vit.fingerprint


def test_the_fingerprint_knows_weights_activation_and_heads_but_not_where_they_lie(tmp_path, named, vit):
    same = tiny_clips.write(tmp_path / "same")
    assert clip_backbone.load(same).fingerprint == vit.fingerprint and len(vit.fingerprint) == 64
    state = named("tiny-finger")
    torch.save(state, tmp_path / "own.pt")
    assert clip_backbone.load("tiny-finger", str(tmp_path / "own.pt")).fingerprint == vit.fingerprint
    others = {"quick": {"quick_gelu": True}, "heads": {"vision": VIT | {"head_width": 8}}, "seed": {"seed": 1},
              "eps": {"text": {"norm_kwargs": {"eps": 1e-3}}}, "pool": {"vision": VIT | {"pool_type": "avg"}},
              "mask": {"text": {"no_causal_mask": True}}}  # fmt: skip
    found = {clip_backbone.load(tiny_clips.write(tmp_path / k, **v)).fingerprint for k, v in others.items()}
    assert len(found | {vit.fingerprint}) == 1 + len(others)
    for name in ("logit_scale", "visual.positional_embedding", "ln_final.bias"):
        changed = {k: v.clone() for k, v in state.items()}
        changed[name].view(-1)[0] += 1e-3
        save_file(changed, tmp_path / "same" / WEIGHTS)
        found.add(clip_backbone.load(same).fingerprint)
    assert len(found | {vit.fingerprint}) == 4 + len(others)


@torch.no_grad()
def test_the_activation_is_the_one_the_configuration_names(tmp_path):
    for quick, name in ((True, "quick"), (False, "exact")):
        backbone = clip_backbone.load(tiny_clips.write(tmp_path / name, quick_gelu=quick))
        for tower in (backbone.model.visual.transformer, backbone.model.transformer):
            block, x = tower.resblocks[0], torch.linspace(-3, 3, 7)
            expected = x / (1 + torch.exp(-1.702 * x)) if quick else x * torch.distributions.Normal(0, 1).cdf(x)
            torch.testing.assert_close(block.mlp.gelu(x), expected)


@pytest.mark.parametrize("weights", [None, ""])
def test_random_weights_are_never_used(tmp_path, weights, named):
    with pytest.raises(BackboneError, match="random|neither a file"):
        clip_backbone.load("ViT-B-32", weights)
    name = tiny_clips.write(tmp_path / "folder")
    (tmp_path / "folder" / WEIGHTS).unlink()
    with pytest.raises(BackboneError, match="could not be loaded"):
        clip_backbone.load(name)


def test_what_does_not_exist_or_does_not_fit_says_so(tmp_path, named):
    name = tiny_clips.write(tmp_path / "folder")
    with pytest.raises(BackboneError, match="weights of its own"):
        clip_backbone.load(name, "openai")
    with pytest.raises(BackboneError, match="no architecture 'ViT-Z'"):
        clip_backbone.load("ViT-Z", "openai")
    with pytest.raises(BackboneError, match="neither a file nor a tag.*laion2b_s34b_b79k"):
        clip_backbone.load("ViT-B-32", "nothing")
    with pytest.raises(BackboneError, match="open_clip_config.json"):
        clip_backbone.load(f"local-dir:{tmp_path}")
    state = named("tiny-fit")
    file = tmp_path / "file.safetensors"
    for damaged in (
        state | {"visual.proj": torch.zeros(32, 7)},
        {k: v for k, v in state.items() if k != "ln_final.bias"},
    ):
        save_file(damaged, file)
        with pytest.raises(BackboneError, match="tiny-fit cannot be loaded.*(visual.proj|ln_final.bias)"):
            clip_backbone.load("tiny-fit", str(file))
    for name, content in (("a.safetensors", b"no weights"), ("a.pt", b"no weights")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BackboneError, match="tiny-fit cannot be loaded"):
            clip_backbone.load("tiny-fit", str(tmp_path / name))


def test_tags_with_another_activation_are_refused_before_anything_is_fetched(monkeypatch, named):
    with pytest.raises(BackboneError, match="trained with QuickGELU.*with -quickgelu"):
        clip_backbone.load("ViT-L-14", "openai")
    with pytest.raises(BackboneError, match="trained with QuickGELU"):
        clip_backbone.load("ViT-B/32", "laion400m_e32")
    named("tiny-tag-quickgelu", quick_gelu=True)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"url": "none", "quick_gelu": False})
    with pytest.raises(BackboneError, match="trained with GELU.*without -quickgelu"):
        clip_backbone.load("tiny-tag-quickgelu", "tag")


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_files_that_look_like_those_of_openai_need_quickgelu(tmp_path, named, kind):
    state, file = named("tiny-half"), tmp_path / f"half.{kind}"
    named("tiny-half-quickgelu", quick_gelu=True)

    def keep(values):
        save_file(values, file) if kind == "safetensors" else torch.save(values, file)

    matrices = {k for k, v in state.items() if v.ndim > 1 and "embedding" not in k}
    half = {k: v.half() if k in matrices else v for k, v in state.items()}
    keep(half)
    with pytest.raises(BackboneError, match="-quickgelu"):
        clip_backbone.load("tiny-half", str(file))
    quick = clip_backbone.load("tiny-half-quickgelu", str(file))
    keep({k: v.float() for k, v in half.items()})
    with pytest.raises(BackboneError, match="-quickgelu"):
        clip_backbone.load("tiny-half", str(file))
    assert clip_backbone.load("tiny-half-quickgelu", str(file)).fingerprint == quick.fingerprint
    keep(half | {"visual.proj": state["visual.proj"]})
    clip_backbone.load("tiny-half", str(file))


def test_a_folder_of_half_precision_weights_must_say_which_activation_it_has(tmp_path):
    name = tiny_clips.write(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({k: v.half() for k, v in state.items()}, tmp_path / WEIGHTS)
    with pytest.raises(BackboneError, match="quick_gelu true or false"):
        clip_backbone.load(name)
    found = {}
    for quick in (True, False):
        (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": tiny_clips.config(quick_gelu=quick)}))
        found[quick] = clip_backbone.load(name).fingerprint
    assert found[True] != found[False]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The kit's folder of weights, with a CLIP of half-precision weights and short texts as its own."""
    folder = tmp_path / "weights"
    monkeypatch.setattr(clip_backbone, "WEIGHTS", folder)
    tiny_clips.write(folder / "clip-demo", quick_gelu=False, text={"context_length": 48})
    state = load_file(folder / "clip-demo" / WEIGHTS)
    save_file({k: v.half() for k, v in state.items()}, folder / "clip-demo" / WEIGHTS)
    return folder


@torch.no_grad()
def test_the_kits_own_clip_is_known_by_name(kept):
    backbone, same = clip_backbone.load("clip-demo"), clip_backbone.load(f"local-dir:{kept / 'clip-demo'}")
    assert (backbone.name, backbone.weights) == ("clip-demo", None) and backbone.fingerprint == same.fingerprint
    assert torch.equal(backbone.pooled(images()), same.pooled(images()))
    ids = backbone.token_ids([*TEXTS, "long " * 99])
    assert ids.shape == (4, 48) == (4, backbone.context_length) and ids[3, -1] == 49407
    assert ids[1].tolist() == [49406, *open_clip.SimpleTokenizer().encode("fake"), 49407, *[0] * 45]
    assert torch.equal(backbone.text_features(backbone.embed(ids), ids), backbone.model.encode_text(ids))
    with pytest.raises(BackboneError, match="clip-demo has weights of its own"):
        clip_backbone.load("clip-demo", "openai")


def test_checkpoints_on_the_kits_own_clip_know_no_folder(tmp_path, kept, monkeypatch):
    detector = base.build("coop", backbone="clip-demo").eval()
    out = base.save_checkpoint(detector, tmp_path / "ck")
    assert str(tmp_path) not in (out / base.CONFIG).read_text()
    monkeypatch.setattr(clip_backbone, "WEIGHTS", kept.rename(tmp_path / "elsewhere"))
    loaded, card = base.load_checkpoint(out)
    assert card["config"]["backbone"] == "clip-demo" and card["config"]["weights"] is None
    with torch.no_grad():
        assert torch.equal(loaded(images().unsqueeze(1)), detector(images().unsqueeze(1)))


def test_where_the_kits_own_clip_is_absent_it_says_so(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_backbone, "WEIGHTS", tmp_path / "none")
    with pytest.raises(BackboneError, match="clip-demo is the kit's own CLIP, and it is not here: there is no folder"):
        clip_backbone.load("clip-demo")
    monkeypatch.setattr(clip_backbone, "WEIGHTS", kept)
    (kept / "clip-demo" / WEIGHTS).unlink()
    with pytest.raises(BackboneError, match="clip-demo cannot be loaded with weights of its folder"):
        clip_backbone.load("clip-demo")


class Archive(nn.Module):
    """A TorchScript module with the state of a CLIP, as OpenAI publishes it."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split(".")
            here = self
            for part in path:
                if part not in dict(here.named_children()):
                    here.add_module(part, nn.Module())
                here = here.get_submodule(part)
            here.register_buffer(leaf, value.half() if value.ndim > 1 and "embedding" not in name else value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_archive_of_openai_is_converted_once(tmp_path, named, monkeypatch):
    state = named("tiny-archive-quickgelu", quick_gelu=True)
    numbers = {k: torch.tensor(1) for k in ("input_resolution", "context_length", "vocab_size")}
    torch.jit.save(torch.jit.script(Archive(state | numbers)), str(tmp_path / "clip.pt"))
    with pytest.raises(BackboneError, match="TorchScript.*convert_openai"):
        clip_backbone.load("tiny-archive-quickgelu", str(tmp_path / "clip.pt"))
    with pytest.raises(BackboneError, match="none of the archives that OpenAI published"):
        clip_backbone.convert_openai(tmp_path / "clip.pt", tmp_path / "clip.safetensors")
    entry = downloads.Published("https://nowhere/clip.pt", downloads.sha256_of(tmp_path / "clip.pt"), "a test")
    monkeypatch.setitem(downloads.CATALOGUE, "test", entry)
    out = clip_backbone.convert_openai(tmp_path / "clip.pt", tmp_path / "new" / "clip.safetensors")
    backbone = clip_backbone.load("tiny-archive-quickgelu", str(out))
    for name, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_tag_is_fetched_by_its_sha256_or_not_at_all(tmp_path, named, monkeypatch):
    state, url = named("tiny-tag-quickgelu", quick_gelu=True), "https://127.0.0.1:9/models/clip.pt"
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"url": url, "quick_gelu": True})
    with pytest.raises(BackboneError, match="has none of 'openai' for tiny-tag-quickgelu.*local-dir:PATH"):
        clip_backbone.load("tiny-tag-quickgelu", "openai")
    torch.jit.save(torch.jit.script(Archive(state)), str(tmp_path / "clip.pt"))
    entry = downloads.Published(url, downloads.sha256_of(tmp_path / "clip.pt"), "a test")
    monkeypatch.setitem(downloads.CATALOGUE, "test", entry)
    with pytest.raises(downloads.DownloadError, match=f"copy it to {tmp_path}/models/clip.pt"):
        clip_backbone.load("tiny-tag-quickgelu", "openai")
    (tmp_path / "clip.pt").rename(tmp_path / "models" / "clip.pt")
    backbone = clip_backbone.load("tiny-tag-quickgelu", "openai")
    assert (backbone.name, backbone.weights) == ("tiny-tag-quickgelu", "openai")
    (tmp_path / "models" / "clip.pt").write_bytes(b"no longer looked at")
    assert clip_backbone.load("tiny-tag-quickgelu", "openai").fingerprint == backbone.fingerprint
    for name, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-3, rtol=1e-3)


UNSUPPORTED = {
    "timm tower": ("not supported", {"vision": {"image_size": 64, "timm_model_name": "test_vit"}}),
    "attention pooling": ("not supported", {"vision": VIT | {"attentional_pool": True, "attn_pooler_heads": 4}}),
    "not square": ("28x14 pixels; only square", {"vision": VIT | {"image_size": [28, 14]}}),
    "last token": ("learned prompts cannot follow", {"text": {"pool_type": "last"}}),
    "appended token": ("not supported", {"text": {"embed_cls": True}, "custom_text": True}),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_towers_that_would_be_misread_are_refused(tmp_path, kind):
    why, changes = UNSUPPORTED[kind]
    name = tiny_clips.write(tmp_path, **changes)
    with pytest.raises(BackboneError, match=why):
        clip_backbone.load(name)


@pytest.mark.parametrize("key", ["hf_model_name", "hf_tokenizer_name", "timm_model_name"])
def test_what_other_libraries_would_fetch_is_refused_before_they_do(tmp_path, key, monkeypatch):
    name = tiny_clips.write(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["model_cfg"]["vision_cfg" if key == "timm_model_name" else "text_cfg"][key] = "hf-hub:nobody/anything"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(BackboneError, match="not supported: its hf-hub:nobody/anything is another library's"):
        clip_backbone.load(name)


def test_detectors_are_imported_without_open_clip():
    code = "import sys, unmask.detectors; sys.exit('open_clip' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
