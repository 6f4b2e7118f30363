"""Detectors on one pooled feature of a CLIP: linear probe, neighbours, LayerNorm tuning, prompts, adapter, fine-tuning.

All judge frame by frame and average the logits of a clip. A checkpoint holds what training changed and the backbone's
fingerprint, never the backbone: it is named, loaded again, and refused where it is another.
"""

import pickle
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from unmask.detectors import clip_backbone
from unmask.detectors.base import CheckpointError, Detector, InputSpec, masked_mean, register
from unmask.detectors.clip_backbone import ClipBackbone
from unmask.detectors.prompts import CLASSES, Prompts

TEMPLATE = "a {} photo."
PUBLISHED = ("ViT-L-14-quickgelu", "openai")  # what UFD's published head was trained on, as open_clip names it


class ClipDetector(Detector):
    """A head on a CLIP's pooled feature; subclasses implement `head`, and `tuned` where the CLIP itself learns.

    backbone, weights: see `clip_backbone.load`; a loaded ClipBackbone may be given instead, and is shared unless it is
    to learn. fingerprint: that of the backbone a kept head belongs to. ValueError if the backbone is another one.
    """

    def __init__(self, backbone: str | ClipBackbone, weights: str | None, fingerprint: str | None):
        super().__init__()
        given = isinstance(backbone, ClipBackbone)
        self.backbone = backbone if given else clip_backbone.load(backbone, weights)
        if fingerprint not in (None, self.backbone.fingerprint):
            raise ValueError(
                f"it belongs to a CLIP with fingerprint {fingerprint[:12]}, and {self.backbone.name} has "
                f"{self.backbone.fingerprint[:12]}: other weights, or another activation or normalisation."
            )
        tuned = set(self.tuned())
        if tuned and given:
            self.backbone = deepcopy(backbone)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in tuned)
        self._frozen = {f"backbone.{name}" for name in self.backbone.state_dict() if name not in tuned}
        self.register_load_state_dict_post_hook(_frozen_may_miss)
        b = self.backbone
        self.config = {"backbone": b.name, "weights": b.weights, "fingerprint": b.fingerprint}
        self.input_spec = InputSpec(b.input_size, b.mean, b.std)

    def tuned(self) -> list[str]:
        """Names of the backbone's parameters that training changes."""
        return []

    def head(self, pooled: torch.Tensor) -> torch.Tensor:
        """What `frozen` gives, pooled features of frames float[N,dim], to logits float[N,1]."""
        raise NotImplementedError

    def state_dict(self, *arguments, **options) -> dict[str, torch.Tensor]:
        """What training changes, by name; the rest of the backbone is not in it, and loading does not ask for it."""
        state = super().state_dict(*arguments, **options)
        for name in self._frozen:
            del state[options.get("prefix", "") + name]
        return state

    def frozen(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the CLIP makes of normalised frames float[N,3,S,S], by the names of `head`'s arguments: "pooled"
        float[N,dim]. Unless something is `tuned`, training does not change it, and it may be computed once."""
        return {"pooled": self.backbone.pooled(images)}

    def features(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        pooled = self.frozen(clips.flatten(0, 1))["pooled"]
        return masked_mean(pooled.unflatten(0, clips.shape[:2]), mask)

    def forward(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return masked_mean(self.head(**self.frozen(clips.flatten(0, 1))).view(clips.shape[:2]), mask)


def _frozen_may_miss(detector: ClipDetector, keys) -> None:
    """Strike the frozen weights from what loading misses; names may have prefixes, as of a wrapper around it."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(tuple(detector._frozen))]


def difference(backbone: ClipBackbone, pooled: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Logit of fake less logit of real, float[N,1]: scaled cosines of float[N,dim] and text float[N or 1,2,dim].

    The sigmoid of it is the softmax of the two, and its binary cross-entropy theirs.
    """
    cosines = (F.normalize(pooled, dim=-1).unsqueeze(1) * F.normalize(text, dim=-1)).sum(2)
    return backbone.scale * (cosines[:, 1:] - cosines[:, :1])


def _linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, 1)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


@register("ufd")
class UFD(ClipDetector):
    """A linear probe on the projected feature, whose length counts (Ojha et al., CVPR 2023)."""

    def __init__(self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None):
        super().__init__(backbone, weights, fingerprint)
        self.linear = _linear(self.backbone.dim)

    def head(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.linear(pooled)

    def load_published(self, path: str | Path, fingerprint: str | None = None) -> None:
        """Take over a published head: a file with `weight` float[1,dim] and `bias` float[1].

        fingerprint: of the backbone that the head was trained on. Without one the head is taken for UFD's own, and the
        backbone must be what open_clip has under `PUBLISHED`. Raises CheckpointError for another backbone or file.
        """
        b = self.backbone
        if fingerprint not in (None, b.fingerprint) or (fingerprint is None and (b.name, b.weights) != PUBLISHED):
            wanted = f"the CLIP with fingerprint {fingerprint[:12]}" if fingerprint else "{}, {}".format(*PUBLISHED)
            raise CheckpointError(
                f"The head in {path} belongs to {wanted}; on {b.name} with fingerprint {b.fingerprint[:12]} it would "
                "guess. Load that backbone, or give the fingerprint of a copy of it."
            )
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            self.linear.load_state_dict(found)
        except (OSError, RuntimeError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} is not a head of weight (1, {b.dim}) and bias (1,).") from error


@register("clip-nn")
class Neighbours(ClipDetector):
    """Nearest neighbours by cosine: mean similarity to the k nearest fakes, less that to the k nearest reals.

    With k = 1 its sign is the rule of Ojha et al. (CVPR 2023). members: reals and fakes in the bank, which
    `fill` sets. No training. ValueError for k below 1.
    """

    def __init__(
        self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None, k: int = 1,
        members: Sequence[int] = (0, 0),
    ):  # fmt: skip
        super().__init__(backbone, weights, fingerprint)
        if k < 1:
            raise ValueError(f"k counts neighbours, from 1 on, not {k}.")
        self.config |= {"k": k, "members": list(members)}
        for name, count in zip(CLASSES, members, strict=True):
            self.register_buffer(name, torch.zeros(count, self.backbone.dim))

    def fill(self, pooled: torch.Tensor, labels: torch.Tensor) -> None:
        """Set the bank: features float[N,dim] and labels int[N], 1 = fake. ValueError for fewer than k of a class."""
        for label, name in enumerate(CLASSES):
            chosen = F.normalize(pooled[labels == label].float(), dim=1)
            if len(chosen) < self.config["k"]:
                raise ValueError(f"{self.config['k']} neighbours need as many {name} features, not {len(chosen)}.")
            setattr(self, name, chosen.to(self.backbone.scale.device))
        self.config["members"] = [len(self.real), len(self.fake)]

    def head(self, pooled: torch.Tensor) -> torch.Tensor:
        if not all(self.config["members"]):
            raise ValueError("the bank of neighbours is empty: fill it first.")
        unit = F.normalize(pooled.float(), dim=1)
        real, fake = ((unit @ bank.T).topk(self.config["k"], 1).values.mean(1, True) for bank in (self.real, self.fake))
        return fake - real


@register("lntune")
class LayerNormTuning(ClipDetector):
    """The image tower's LayerNorms learn, and a linear head on the feature at unit length; nothing else.

    As in Yermakov et al., "Deepfake detection that generalizes across benchmarks" (2025), without its extra losses.
    ValueError for an image tower without LayerNorm, a ResNet.
    """

    def __init__(self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None):
        super().__init__(backbone, weights, fingerprint)
        self.linear = _linear(self.backbone.dim)

    def tuned(self) -> list[str]:
        found = [
            f"{where}.{name}"
            for where, module in self.backbone.named_modules()
            if where.startswith("model.visual.") and isinstance(module, nn.LayerNorm)
            for name, _ in module.named_parameters()
        ]
        if not found:
            raise ValueError(f"the image tower of {self.backbone.name} has no LayerNorm to tune.")
        return found

    def head(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.linear(F.normalize(pooled, dim=1))


@register("coop")
class CoOp(ClipDetector):
    """Learned prompts against the frozen image feature (Zhou et al., IJCV 2022). Arguments: see `Prompts`."""

    def __init__(
        self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None,
        context: int | str = 16, position: str = "end", specific: bool = False,
    ):  # fmt: skip
        super().__init__(backbone, weights, fingerprint)
        self.config |= {"context": context, "position": position, "specific": specific}
        self.prompts = Prompts(self.backbone, context, position, specific)

    def head(self, pooled: torch.Tensor) -> torch.Tensor:
        return difference(self.backbone, pooled, self.prompts(self.backbone))


@register("cocoop")
class CoCoOp(ClipDetector):
    """Learned prompts that every image shifts by one vector, from its feature by a small network (Zhou et al., CVPR
    2022, section 3.2). It costs two passes of the text tower for every image. context: see `Prompts`."""

    def __init__(
        self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None,
        context: int | str = "a photo of a",
    ):  # fmt: skip
        super().__init__(backbone, weights, fingerprint)
        self.config |= {"context": context}
        self.prompts = Prompts(self.backbone, context, "end", specific=False)
        dim, hidden = self.backbone.dim, max(self.backbone.dim // 16, 1)
        self.meta = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, self.backbone.text_width))

    def head(self, pooled: torch.Tensor) -> torch.Tensor:
        shift = self.meta(F.normalize(pooled, dim=1))
        return difference(self.backbone, pooled, self.prompts(self.backbone, shift))


@register("clip-adapter")
class ClipAdapter(ClipDetector):
    """ratio * adapter(feature) + (1 - ratio) * feature against fixed prompts (Gao et al., IJCV 2024, section 3).

    The adapter goes down to dim / reduction and back, with a ReLU behind both layers and no biases. The defaults are
    those of CLIPping (Khan and Dang-Nguyen, ICMR 2024).
    """

    def __init__(
        self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None,
        reduction: int = 2, ratio: float = 0.4,
    ):  # fmt: skip
        super().__init__(backbone, weights, fingerprint)
        self.config |= {"reduction": reduction, "ratio": ratio}
        dim, hidden = self.backbone.dim, self.backbone.dim // reduction
        layers = [nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False), nn.ReLU()]
        self.adapter = nn.Sequential(*layers)
        ids = self.backbone.token_ids([TEMPLATE.format(name) for name in CLASSES])
        with torch.no_grad():
            text = self.backbone.text_features(self.backbone.embed(ids), ids).unsqueeze(0)
        self.register_buffer("text", text, persistent=False)

    def head(self, pooled: torch.Tensor) -> torch.Tensor:
        ratio = self.config["ratio"]
        return difference(self.backbone, ratio * self.adapter(pooled) + (1 - ratio) * pooled, self.text)


@register("clip-finetune")
class ClipFinetune(ClipDetector):
    """All of CLIP learns, both towers and the scale, against the prompts "a real photo." and "a fake photo." (Khan and
    Dang-Nguyen, ICMR 2024). Its checkpoint is as large as the CLIP."""

    def __init__(self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None):
        super().__init__(backbone, weights, fingerprint)
        ids = self.backbone.token_ids([TEMPLATE.format(name) for name in CLASSES])
        self.register_buffer("ids", ids, persistent=False)

    def tuned(self) -> list[str]:
        return [name for name, _ in self.backbone.named_parameters()]

    def head(self, pooled: torch.Tensor) -> torch.Tensor:
        text = self.backbone.text_features(self.backbone.embed(self.ids), self.ids)
        return difference(self.backbone, pooled, text.unsqueeze(0))
