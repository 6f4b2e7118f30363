"""Prompts whose words are learned vectors, for the text tower of a CLIP, and the words that they come nearest."""

import torch
from torch import nn

from unmask.detectors.clip_backbone import ClipBackbone

CLASSES, POSITIONS = ("real", "fake"), ("end", "middle", "front")


class Prompts(nn.Module):
    """Learned vectors around the names of the classes (Zhou et al., IJCV 2022, section 3): start, context, name, end.

    context: their number, or words to begin with. position: where the name stands among them. specific: own vectors for
    every class. ValueError for what does not fit into the text tower.
    """

    def __init__(self, backbone: ClipBackbone, context: int | str, position: str, specific: bool):
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, not '{position}'.")
        ends = backbone.token_ids([context if isinstance(context, str) else "", *CLASSES]).argmax(1) - 1
        self.length = int(ends[0]) if isinstance(context, str) else context
        self.names, self.position = [int(n) for n in ends[1:]], position
        fill = "X " * self.length  # one token each; only the places count
        ids = backbone.token_ids([f"{fill}{name}." for name in CLASSES])
        # The tokenizer cuts what is too long without a word.
        if self.length < 1 or ids.argmax(1).tolist() != [1 + self.length + n + 1 for n in self.names]:
            raise ValueError(f"context must be at least one vector and fit into {backbone.context_length} tokens.")
        with torch.no_grad():
            start = 0.02 * torch.randn(len(CLASSES) if specific else 1, self.length, backbone.text_width)
            if isinstance(context, str):
                words = backbone.embed(backbone.token_ids([context]))[:, 1 : 1 + self.length]
                start = words.expand(len(start), -1, -1).clone()
            self.register_buffer("fixed", backbone.embed(ids), persistent=False)
        self.context = nn.Parameter(start)
        self.register_buffer("ids", ids, persistent=False)

    def _sequence(self, label: int, context: torch.Tensor) -> torch.Tensor:
        """Context float[N,M,w] to the embedded prompt of one class, float[N,L,w]."""
        start, name, rest = self.fixed[label].split(
            [1 + self.length, self.names[label], len(self.ids[label]) - 1 - self.length - self.names[label]]
        )
        before = {"end": self.length, "middle": self.length // 2, "front": 0}[self.position]
        start, name, rest = (part.expand(context.shape[0], -1, -1) for part in (start[:1], name, rest))
        return torch.cat([start, context[:, :before], name, context[:, before:], rest], 1)

    def forward(self, backbone: ClipBackbone, shift: torch.Tensor | None = None) -> torch.Tensor:
        """Features of both classes' prompts, float[N,2,dim]; shift: float[N,w] added to every vector, or N = 1."""
        contexts = self.context.expand(len(CLASSES), -1, -1).unsqueeze(1)
        if shift is not None:
            contexts = contexts + shift.unsqueeze(1)
        embedded = torch.stack([self._sequence(label, contexts[label]) for label in range(len(CLASSES))], 1)
        found = backbone.text_features(embedded.flatten(0, 1), self.ids.repeat(embedded.shape[0], 1))
        return found.unflatten(0, (-1, len(CLASSES)))


@torch.no_grad()
def nearest_words(prompts: Prompts, backbone: ClipBackbone, count: int = 3) -> list[list[tuple[str, float]]]:
    """For every learned vector, class by class, the `count` nearest words of the tokenizer's vocabulary, nearest first.

    Each with its Euclidean distance from the vector in the space of token embeddings, as Zhou et al. (IJCV 2022) read
    their prompts; they warn that the nearest word need not be what a vector means. Parts of words that others continue
    end in "...". ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is the number of words a vector, from 1 on, not {count}.")
    tokenizer = backbone.tokenizer
    table = backbone.embed(torch.arange(tokenizer.vocab_size, device=prompts.context.device))
    # The faster way by matrix products loses small distances, as those from the words that a context began with.
    away = torch.cdist(prompts.context.flatten(0, 1), table, compute_mode="donot_use_mm_for_euclid_dist")
    distances, ids = away.topk(count, largest=False)
    return [
        [(_word(tokenizer, token), distance) for token, distance in zip(*found, strict=True)]
        for found in zip(ids.tolist(), distances.tolist(), strict=True)
    ]


def _word(tokenizer, token: int) -> str:
    """A token as it is shown; where a word ends, the tokenizer puts a space."""
    text = tokenizer.decode([token])
    if text.endswith(" "):
        return text[:-1]
    return text if token in tokenizer.all_special_ids else f"{text}..."
