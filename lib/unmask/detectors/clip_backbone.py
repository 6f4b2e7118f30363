"""CLIP as open_clip loads it, frozen: features, tokens and maps of images, and a text path that takes embeddings.

open_clip is imported when a backbone is loaded and not before: it brings Transformers along, which takes seconds.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from unmask import downloads
from unmask.profile import models_folder, write_atomic

FOLDER = "local-dir:"
DEMO = "clip-demo"  # the kit's own, by this name wherever the kit lies
WEIGHTS = Path(__file__).parents[1] / "weights"


# What open_clip, PyTorch and NumPy raise for weights that are damaged, or another model's.
UNLOADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, zipfile.BadZipFile,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


class BackboneError(ValueError):
    """A CLIP cannot be loaded, or not so that its outputs would be those that it was trained for."""


class ClipBackbone(nn.Module):
    """An open_clip model (`CLIP` or `CustomTextCLIP`) whose weights need no gradient; always in evaluation mode.

    input_size: pixels a side; mean, std: of the normalisation; dim: of the projected feature; map_channels, map_side:
    of `maps`; text_width: of token embeddings; context_length: tokens in a text; fingerprint: sha256 of the weights and
    of what else decides the outputs (activation, heads, normalisation of the input, ...). `load` makes it.
    """

    def __init__(self, model: nn.Module, name: str, weights: str | None):
        super().__init__()
        self.model, self.name, self.weights = model.requires_grad_(False), name, weights
        visual, text = model.visual, self._text
        visual.output_tokens = text.output_tokens = False  # else they return pairs
        size = visual.image_size
        height, width = size if isinstance(size, Sequence) else (size, size)
        if height != width:
            raise BackboneError(f"{name} takes images of {height}x{width} pixels; only square ones are supported.")
        self.input_size, self.mean, self.std = height, tuple(visual.image_mean), tuple(visual.image_std)
        self.dim = visual.output_dim
        self._resnet = hasattr(visual, "layer3")
        if self._resnet:
            self.map_channels, self.map_side = visual.layer3[-1].conv3.out_channels, height // 16
        else:
            self.map_channels, self.map_side = visual.transformer.width, visual.grid_size[0]
        self.text_width, self.context_length = text.token_embedding.embedding_dim, text.context_length
        self.fingerprint = _fingerprint(model, self)
        self.eval()

    @property
    def _text(self) -> nn.Module:
        """What holds the parts of the text tower: CLIP itself, or its `.text` in a CustomTextCLIP."""
        return getattr(self.model, "text", self.model)

    @cached_property
    def tokenizer(self):
        """open_clip's tokenizer of this architecture."""
        import open_clip

        return open_clip.get_tokenizer(_source(self.name))

    @property
    def scale(self) -> torch.Tensor:
        """What cosines are multiplied by to become logits, exp(logit_scale)."""
        return self.model.logit_scale.exp()

    def train(self, mode: bool = True) -> "ClipBackbone":
        """Stays in evaluation mode: no patch is dropped, and no statistic of a batch norm moves."""
        return super().train(False)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images float[N,3,S,S] to projected features float[N,dim], not scaled to unit length."""
        return self.model.visual(images)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images float[N,3,S,S] to the last patch features float[N,L,width], before pooling and projection.

        For a ViT the patch tokens behind ln_post, without the class token; for a ResNet the places of layer4.
        """
        visual = self.model.visual
        if self._resnet:
            return self._tap(images, visual.layer4)[1].flatten(2).transpose(1, 2)
        return visual.ln_post(self._tap(images, visual.transformer)[1])[:, 1:]

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """The second result of `pooled_and_maps`."""
        return self.pooled_and_maps(images)[1]

    def pooled_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images float[N,3,S,S] to `pooled` float[N,dim] and maps float[N,map_channels,g,g], in one pass.

        The map is that of layer3 for a ResNet (stride 16), and for a ViT the last block before ln_post, without the
        class token.
        """
        visual, g = self.model.visual, self.map_side
        if self._resnet:
            return self._tap(images, visual.layer3)
        pooled, out = self._tap(images, visual.transformer)
        return pooled, out[:, 1:].transpose(1, 2).unflatten(2, (g, g))

    def _tap(self, images: torch.Tensor, part: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """The pooled features, and what `part` of the image tower gave on the way.

        By a hook: forward_intermediates of a ModifiedResNet fails for layer3 alone in open_clip 3.3 (it cuts off the
        later layers exactly when it is told not to).
        """
        seen = []
        handle = part.register_forward_hook(lambda module, given, out: seen.append(out))
        try:
            return self.model.visual(images), seen[0]
        finally:
            handle.remove()

    def token_ids(self, texts: Sequence[str]) -> torch.Tensor:
        """K texts to int64[K,context_length]; longer texts are cut, as CLIP does."""
        return self.tokenizer(list(texts)).to(self._text.token_embedding.weight.device)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64[K,L] to their embeddings float[K,L,text_width], without positions."""
        return self._text.token_embedding(ids)

    def text_features(self, embedded: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings float[K,L,text_width] to projected features float[K,dim], not scaled to unit length.

        ids: int64[K,L], of which only the place of the largest counts, the end of the text. For `embed(ids)` these are
        `encode_text(ids)`, bit by bit; gradients reach `embedded` (Zhou et al., IJCV 2022, section 3).
        """
        text = self._text
        x = embedded + text.positional_embedding
        x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask))
        x = x[torch.arange(x.shape[0], device=x.device), ids.argmax(1)]
        projection = text.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def load(name: str, weights: str | None = None) -> ClipBackbone:
    """A pretrained CLIP with all its weights.

    name: an architecture of open_clip, with `weights` OpenAI's by the tag `openai` (downloaded once into data/models,
    or $UNMASK_MODELS, and checked) or a file; or `local-dir:PATH`, a folder with open_clip_config.json and weights; or
    `clip-demo`, such a folder that comes with the kit. Normalisation is that of the folder, and of OpenAI's CLIP for a
    tag or a file. Raises BackboneError where weights are missing or do not fit, where the activation (QuickGELU or
    GELU) is not the one they were trained with, where they are of a tag that has no pinned sha256, or where the towers
    are not a ViT or ModifiedResNet and CLIP's own text transformer; DownloadError where they cannot be fetched.
    """
    import open_clip

    name = name if ":" in name else name.replace("/", "-")  # both spellings are known
    tag, stated = _checked(name, weights)
    file = str(_published(name, weights, tag)) if tag else weights
    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights that the loaded ones then replace
            model = open_clip.create_model(_source(name), pretrained=file, require_pretrained=True)
    except UNLOADABLE as error:
        why = " ".join(str(error).split())[:200]  # torch lists every weight that does not fit
        raise BackboneError(f"{name} cannot be loaded with weights {weights or 'of its folder'}: {why}") from error
    if not tag and not stated and _half_precision(model):
        raise BackboneError(
            f"The weights for {name} are half-precision numbers, as OpenAI's are, which need QuickGELU, and {name} has "
            "GELU. If they are OpenAI's, name the architecture whose name ends in -quickgelu; otherwise put them into "
            f"a `{FOLDER}` folder and say in its open_clip_config.json which it is: quick_gelu true or false."
        )
    _supported(model, name)
    backbone = ClipBackbone(model, name, weights)
    _same_as_encode_text(backbone)
    return backbone


def _published(name: str, weights: str, tag: dict) -> Path:
    """The file of a tag of open_clip, fetched and converted if need be. BackboneError if it has no pinned sha256."""
    known = {entry.url: key for key, entry in downloads.CATALOGUE.items()}
    if tag.get("url") not in known:
        raise BackboneError(
            f"The kit downloads what it has a sha256 of, and it has none of '{weights}' for {name}. Fetch the weights "
            f"yourself from {tag.get('hf_hub') or tag.get('url')} with their open_clip_config.json, and name their "
            f"folder: `{FOLDER}PATH`."
        )
    archive = models_folder() / downloads.CATALOGUE[known[tag["url"]]].file
    converted = archive.with_name(f"{archive.stem}.openai.safetensors")
    if not converted.is_file():
        convert_openai(downloads.fetch(known[tag["url"]]), converted)
    return converted


def convert_openai(archive: str | Path, out: str | Path) -> Path:
    """OpenAI's published file (a TorchScript archive) as a safetensors file `out`, which `load` takes; returns it.

    BackboneError for any other archive: TorchScript is a program, and would run.
    """
    if downloads.sha256_of(archive) not in {entry.sha256 for entry in downloads.CATALOGUE.values()}:
        raise BackboneError(f"{archive} is none of the archives that OpenAI published; what else it does is unknown.")
    state = torch.jit.load(str(archive), map_location="cpu").state_dict()
    numbers = ("input_resolution", "context_length", "vocab_size")  # not weights, and open_clip stumbles over them
    return write_atomic(out, save({k: v.contiguous() for k, v in state.items() if k not in numbers}))


def _source(name: str) -> str:
    """What open_clip calls a backbone."""
    return f"{FOLDER}{WEIGHTS / name}" if name == DEMO else name


def _checked(name: str, weights: str | None) -> tuple[dict, bool]:
    """What open_clip knows of the tag `weights` ({}: they are a file), and whether the architecture's configuration
    says which activation it has. BackboneError for what open_clip would load all the same, with a warning at most."""
    import open_clip

    source = _source(name)
    if ":" in name and not name.startswith(FOLDER):  # open_clip would fetch an hf-hub: model, whoever made it
        raise BackboneError(
            f"The kit downloads what it has a sha256 of, and it has none of '{name}'. Fetch it yourself, with its "
            f"open_clip_config.json, and name its folder: `{FOLDER}PATH`."
        )
    if name == DEMO and not (WEIGHTS / name).is_dir():
        raise BackboneError(f"{name} is the kit's own CLIP, and it is not here: there is no folder {WEIGHTS / name}.")
    try:
        config = open_clip.get_model_config(source)
    except (OSError, ValueError) as error:
        raise BackboneError(f"{name} is not a folder of a CLIP: it needs open_clip_config.json and weights.") from error
    if config is None:
        raise BackboneError(f"open_clip has no architecture '{name}'; see open_clip.list_models().")
    _built_here(config, name)
    stated = "quick_gelu" in config
    if source.startswith(FOLDER):
        if weights is not None:
            raise BackboneError(f"{name} has weights of its own; open_clip would not use '{weights}'. Leave it out.")
        return {}, stated
    if weights is None:
        raise BackboneError(f"{name} needs weights, a tag of open_clip or a file: without, they would be random.")
    tag = open_clip.get_pretrained_cfg(name, weights)
    if not tag and not Path(weights).is_file():
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise BackboneError(f"'{weights}' is neither a file nor a tag of open_clip for {name}; tags: {known}.")
    if tag and bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
        trained, other = ("QuickGELU", "with") if tag.get("quick_gelu") else ("GELU", "without")
        raise BackboneError(
            f"The weights '{weights}' were trained with {trained}, which {name} does not have: take the architecture "
            f"of the same name {other} -quickgelu at its end."
        )
    if not tag and _torchscript(weights):
        raise BackboneError(
            f"{weights} is a TorchScript archive, as OpenAI publishes CLIP; put it into {models_folder()} under its "
            "own name and use the tag openai, or convert it once with clip_backbone.convert_openai and name the new "
            "file, for an architecture that ends in -quickgelu."
        )
    return tag, stated


def _built_here(config: dict, name: str) -> None:
    """BackboneError for towers and tokenizers that other libraries would fetch by a name in the configuration."""
    parts = [config.get(key) for key in ("vision_cfg", "text_cfg")]
    if not all(isinstance(part, dict) for part in parts):
        raise BackboneError(f"{name} is not a folder of a CLIP: its open_clip_config.json lacks a tower.")
    elsewhere = ("timm_model_name", "hf_model_name", "hf_tokenizer_name")
    if named := [part[key] for part in parts for key in elsewhere if part.get(key)]:
        raise BackboneError(
            f"{name} is not supported: its {named[0]} is another library's, and its image tower must be a ViT with a "
            "class token or a ModifiedResNet of open_clip, its text tower open_clip's own transformer."
        )


def _torchscript(path: str) -> bool:
    """Whether a file is a TorchScript archive, which torch.load refuses as such."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _half_precision(model: nn.Module) -> bool:
    """Whether every convolution and matrix holds numbers of float16: OpenAI's do, and still do after a conversion.

    Their embeddings need not.
    """
    matrices = [value for name, value in model.state_dict().items() if value.ndim > 1 and "embedding" not in name]
    return all(torch.equal(value.half().float(), value) for value in matrices)


def _supported(model: nn.Module, name: str) -> None:
    """BackboneError unless both towers are among those whose parts `ClipBackbone` knows."""
    from open_clip import CLIP, CustomTextCLIP
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import TextTransformer, VisionTransformer

    visual, tower = model.visual, getattr(model, "text", model)
    image = isinstance(visual, (VisionTransformer, ModifiedResNet)) and getattr(visual, "attn_pool", None) is None
    text = isinstance(model, (CLIP, CustomTextCLIP)) and isinstance(tower, (CLIP, TextTransformer))
    if not image or not text or len(tower.positional_embedding) != tower.context_length:
        raise BackboneError(
            f"{name} is not supported: its image tower must be a ViT with a class token or a ModifiedResNet of "
            "open_clip, and its text tower open_clip's own transformer."
        )


@torch.no_grad()
def _same_as_encode_text(backbone: ClipBackbone) -> None:
    """BackboneError if the text path for learned prompts is not this model's own, as with another way of pooling."""
    vocabulary, length = len(backbone._text.token_embedding.weight), backbone.context_length
    ids = torch.arange(length).unsqueeze(0) % (vocabulary - 1)
    ids[0, length // 2] = vocabulary - 1  # the end of the text; behind it is what padding would be
    if not torch.equal(backbone.text_features(backbone.embed(ids), ids), backbone.model.encode_text(ids)):
        raise BackboneError(f"{backbone.name} reads texts in a way that learned prompts cannot follow.")


def _fingerprint(model: nn.Module, backbone: ClipBackbone) -> str:
    """sha256 of names, shapes and float32 values of all weights, and of what else decides the outputs."""
    modules, text = list(model.modules()), backbone._text
    facts = {
        "layout": type(model).__name__,
        "activation": sorted({str(m) for m in modules if type(m).__name__ in ("GELU", "QuickGELU")}),
        "heads": [m.num_heads for m in modules if hasattr(m, "num_heads")],
        "eps": sorted({m.eps for m in modules if hasattr(m, "eps")}),
        "pooling": [getattr(model.visual, key, None) for key in ("pool_type", "final_ln_after_pool")],
        "causal": text.attn_mask is not None,
        "input": [backbone.input_size, backbone.mean, backbone.std],
    }
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {list(value.shape)}".encode())
        found.update(value.detach().float().cpu().reshape(-1).numpy())
    return found.hexdigest()
