"""The fusion matrix as detectors: a frozen CLIP's features and LaRE maps, joined and judged as `fusion` says.

Registered by cell, under a linear head as "clip-lare:F4c" and under a text head with learned prompts as
"clip-lare:F4c-text". CLaRE's published training left its fusion at random weights; here all of it learns.
"""

from collections.abc import Callable

import torch

from unmask.detectors import roi
from unmask.detectors.base import masked_mean, register
from unmask.detectors.clip_backbone import ClipBackbone
from unmask.detectors.clip_prompts import ClipDetector
from unmask.detectors.egre import LATENT
from unmask.detectors.fusion import KINDS, Fusion, FusionConfig
from unmask.detectors.prompts import Prompts


class ClipLare(ClipDetector):
    """A cell of the matrix under a linear head; subclasses set `kind`, one of `fusion.KINDS`, and `extras`.

    lare_side: cells a side of the LaRE maps, for all kinds but F0. lare: `Extractor.key` of those that it learns from,
    "" if unknown. backbone, weights, fingerprint: see `ClipDetector`. ValueError for what does not fit together.
    """

    kind: str
    head_kind = "linear"

    def __init__(
        self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None,
        lare_side: int | None = None, lare: str = "",
    ):  # fmt: skip
        super().__init__(backbone, weights, fingerprint)
        b = self.backbone
        self.config |= {"lare_side": lare_side, "lare": lare}
        self.fusion = Fusion(
            FusionConfig(
                self.kind, self.head_kind, b.dim, b.map_channels, b.map_side, lare_side, b.input_size, text_dim=b.dim
            )
        )
        shapes = {"lare": (LATENT, lare_side, lare_side), "boxes": (len(roi.REGIONS), 4)}
        self.extra_shapes = {name: shapes[name] for name in self.extras}

    def frozen(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """As in `ClipDetector`, and "maps" float[N,C,g,g] where the kind reads feature maps."""
        if not self.fusion.config.reads_maps:
            return super().frozen(images)
        pooled, maps = self.backbone.pooled_and_maps(images)
        return {"pooled": pooled, "maps": maps}

    def _text(self) -> torch.Tensor | None:
        """What a text head compares with, float[2,dim]."""
        return None

    def head(
        self,
        pooled: torch.Tensor | None = None,
        maps: torch.Tensor | None = None,
        lare: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Frames to logits float[N,1]: what `frozen` gives, LaRE maps float[N,4,l,l] and boxes float[N,9,4].

        What the kind does not read may be left out. ValueError for an input that is missing or of another shape.
        """
        return self.fusion(pooled, maps, lare, boxes, self._text()).unsqueeze(1)

    def _mean(self, of: Callable, clips: torch.Tensor, mask: torch.Tensor | None, **extras) -> torch.Tensor:
        """The mean over the frames that count, float[B,D], of what `of` makes of frames, float[N,D].

        Only those frames are looked at: padding must not move the statistics of a batch norm.
        """
        for name in self.extras:
            found = None if extras[name] is None else tuple(extras[name].shape)
            if found != (wanted := (*clips.shape[:2], *self.extra_shapes[name])):
                raise ValueError(f"{self.name} needs {name} of shape {wanted} with these clips, not {found}.")
        # Not a mask of ones where there is none: torch.export has to know how many frames are looked at.
        frames, *given = (
            x.flatten(0, 1) if mask is None else x[mask] for x in (clips, *(extras[name] for name in self.extras))
        )
        # F1 does not look at the picture, and need not pay for it.
        inputs = {"pooled": None} if self.kind == "F1" else self.frozen(frames)
        values = of(**inputs, **dict(zip(self.extras, given, strict=True)))
        if mask is None:
            return values.unflatten(0, clips.shape[:2]).mean(1)
        found = values.new_zeros(*mask.shape, values.shape[1]).masked_scatter(mask.unsqueeze(2), values)
        return masked_mean(found, mask)

    def features(
        self,
        clips: torch.Tensor,
        mask: torch.Tensor | None = None,
        lare: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The fused feature before the head, float[B,D]; arguments and errors as in `forward`."""
        return self._mean(self.fusion.fused, clips, mask, lare=lare, boxes=boxes)

    def forward(
        self,
        clips: torch.Tensor,
        mask: torch.Tensor | None = None,
        lare: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits float[B] of clips float[B,T,3,S,S], the mean over their frames; mask bool[B,T], True = use the frame.

        lare: maps float[B,T,4,l,l]; boxes: float[B,T,9,4] in pixels of the frames, NaN where absent. Both only where
        `extras` names them. ValueError for one that is missing or of another shape.
        """
        return self._mean(self.head, clips, mask, lare=lare, boxes=boxes).squeeze(1)


class ClipLareText(ClipLare):
    """A cell of the matrix under a text head with learned prompts. context: see `Prompts`; the rest: see `ClipLare`."""

    head_kind = "text"

    def __init__(
        self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None,
        lare_side: int | None = None, lare: str = "", context: int | str = 16,
    ):  # fmt: skip
        super().__init__(backbone, weights, fingerprint, lare_side, lare)
        self.config |= {"context": context}
        self.prompts = Prompts(self.backbone, context, "end", specific=False)

    def _text(self) -> torch.Tensor:
        return self.prompts(self.backbone)[0]


for _kind in KINDS:
    _extras = {"F0": (), "F4c": ("lare", "boxes")}.get(_kind, ("lare",))
    for _class, _end in ((ClipLare, ""), (ClipLareText, "-text")):
        _cell = type(f"{_class.__name__}{_kind}", (_class,), {"kind": _kind, "extras": _extras})
        register(f"clip-lare:{_kind}{_end}")(_cell)
