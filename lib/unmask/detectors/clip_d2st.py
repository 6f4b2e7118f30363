"""Adapters over space and time in a frozen CLIP: D2ST-Adapter's, and ST-Adapter's of the same size for comparison.

After each of the last blocks of the image tower an adapter lets the frames of a clip look at each other. An image is a
clip of one frame. In evaluation and training alike the blocks before the first adapter see single frames and never
change, so what they make of a frame (`prefix`) can be computed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from unmask.detectors.base import register
from unmask.detectors.clip_backbone import ClipBackbone
from unmask.detectors.clip_prompts import ClipDetector
from unmask.detectors.d2st import D2STAdapter
from unmask.detectors.st_adapter import STAdapter, matched


class AdaptedClip(ClipDetector):
    """A CLIP (ViT) with adapters behind its last blocks, and a linear head on the mean feature of a clip's frames.

    placement: "last-K", behind each of the last K blocks, or "all". frames: of a clip, at most. adapter: makes one for
    tokens of a width. The rest: see `ClipDetector`. ValueError for a ResNet or a placement that the CLIP does not have.
    """

    exact_frames = True

    def __init__(
        self, backbone: str | ClipBackbone, weights: str | None, fingerprint: str | None, placement: str, frames: int,
        adapter: Callable[[int], nn.Module],
    ):  # fmt: skip
        super().__init__(backbone, weights, fingerprint)
        transformer = getattr(self.backbone.model.visual, "transformer", None)
        if transformer is None or not transformer.batch_first:
            raise ValueError(f"the image tower of {self.backbone.name} is not a ViT, which adapters need.")
        total = len(transformer.resblocks)
        count = total if placement == "all" else placement.removeprefix("last-")
        if not str(count).isdecimal() or not 1 <= int(count) <= total:
            raise ValueError(f"placement is all or last-1 to last-{total} for {self.backbone.name}, not {placement!r}.")
        self.first, self.width = total - int(count), transformer.width
        self.config |= {"placement": placement, "frames": frames}
        self.input_spec = replace(self.input_spec, frames=frames, still=True)
        self.adapters = nn.ModuleList(adapter(self.width) for _ in range(int(count)))
        self.linear = nn.Linear(self.backbone.dim, 1)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    @property
    def depth_key(self) -> str:
        """What `prefix` depends on besides the picture."""
        return f"{self.backbone.fingerprint[:12]}-{self.first}"

    @torch.no_grad()
    def prefix(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised frames float[N,3,S,S] to the tokens float[N,1+g*g,width] that the first adapter gets."""
        visual = self.backbone.model.visual
        tokens = visual._embeds(images)
        for block in visual.transformer.resblocks[: self.first + 1]:
            tokens = block(tokens)
        return tokens

    def tokens(self, prefix: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Tokens float[F,1+g*g,width] after the last adapter; arguments as in `embed`."""
        blocks = self.backbone.model.visual.transformer.resblocks
        tokens = self.adapters[0].adapt(prefix, shapes)
        for block, adapter in zip(blocks[self.first + 1 :], self.adapters[1:], strict=True):
            tokens = adapter.adapt(block(tokens), shapes)
        return tokens

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens float[F,1+g*g,width] of the last block to the CLIP's projected feature float[F,dim]."""
        visual = self.backbone.model.visual
        pooled = visual._pool(tokens)[0]
        return pooled if visual.proj is None else pooled @ visual.proj

    def embed(self, prefix: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Tokens of `prefix` float[F,1+g*g,width] to the feature float[F,dim] of every frame in its clip.

        shapes: (clips, frames a clip) of groups of clips that follow each other in F, so that images and videos go
        through the CLIP together.
        """
        return self.pool(self.tokens(prefix, shapes))

    def head(self, pooled: torch.Tensor) -> torch.Tensor:
        """Features float[N,dim] of frames, or their means over a clip, to logits float[N,1]; only directions count."""
        return self.linear(F.normalize(pooled.float(), dim=1) * pooled.shape[1] ** 0.5)

    def features(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is None:
            b, t = clips.shape[:2]
            return self.embed(self.prefix(clips.flatten(0, 1)), [(b, t)]).unflatten(0, (b, t)).mean(1)
        lengths = mask.sum(1)
        out = clips.new_zeros(len(clips), self.backbone.dim)
        for t in lengths.unique().tolist():  # clips of one length go together; padding is never looked at
            own = lengths == t
            out[own] = self.features(clips[own][mask[own]].unflatten(0, (-1, t))).to(out.dtype)
        return out

    def forward(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.features(clips, mask)).squeeze(1)


@register("d2st")
class D2ST(AdaptedClip):
    """Deformable attention over space and time, apart (Pei et al., ICCV 2025). mode, backend, pathways, embedding,
    differences: see `D2STAdapter`; placement "all" is the publication's, the last four blocks cost a fraction of it."""

    def __init__(
        self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None,
        placement: str = "last-4", frames: int = 12, mode: str = "aligned", backend: str = "gather",
        pathways: Sequence[str] = ("spatial", "temporal"), embedding: bool = False, differences: float = 0.0,
    ):  # fmt: skip
        options = {"mode": mode, "backend": backend, "pathways": list(pathways), "embedding": embedding}
        options["differences"] = differences
        adapter = partial(D2STAdapter, frames_max=frames, **options)
        super().__init__(backbone, weights, fingerprint, placement, frames, adapter)
        self.config |= options

    @torch.no_grad()
    def look(self, prefix: torch.Tensor) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Where each adapter reads one clip, given its tokens float[T,1+g*g,width]: see `D2STAdapter.look`."""
        blocks, tokens, found = self.backbone.model.visual.transformer.resblocks, prefix, []
        for k, adapter in enumerate(self.adapters):
            tokens = blocks[self.first + k](tokens) if k else tokens
            found.append(adapter.look(tokens.unsqueeze(0)))
            tokens = adapter.adapt(tokens, [(1, len(tokens))])
        return found


@register("st-adapter")
class STAdapted(AdaptedClip):
    """ST-Adapter (Pan et al., NeurIPS 2022) in the same places, as wide as makes it as large as a D2ST-Adapter."""

    def __init__(
        self, backbone: str | ClipBackbone, weights: str | None = None, fingerprint: str | None = None,
        placement: str = "last-4", frames: int = 12,
    ):  # fmt: skip
        super().__init__(backbone, weights, fingerprint, placement, frames, partial(_as_large, frames))


def _as_large(frames: int, width: int) -> STAdapter:
    """An ST-Adapter with about as many parameters as a D2ST-Adapter has."""
    return STAdapter(width, matched(width, sum(p.numel() for p in D2STAdapter(width).parameters())), frames)
