"""Learned prompts: with words for vectors they are those words' texts; and which words vectors are nearest to."""

import numpy as np
import pytest
import tiny_clips
import torch
from open_clip.tokenizer import bytes_to_unicode

from unmask.detectors import clip_backbone, prompts
from unmask.detectors.prompts import Prompts, nearest_words

LAYOUTS = {"clip": {}, "custom": {"custom_text": True, "quick_gelu": True, "text": {"proj_bias": True}}}
WORDS = {"end": "a photo of a {}.", "middle": "a photo {} of a.", "front": "{} a photo of a."}


@pytest.fixture(scope="module", params=LAYOUTS)
def backbone(request, tmp_path_factory):
    return clip_backbone.load(tiny_clips.write(tmp_path_factory.mktemp("clip"), **LAYOUTS[request.param]))


def table(backbone):
    """The token embeddings, where open_clip keeps them."""
    return getattr(backbone.model, "text", backbone.model).token_embedding.weight.detach()


@pytest.mark.parametrize("position", WORDS)
@torch.no_grad()
def test_context_set_to_words_is_encode_text_bit_by_bit(backbone, position):
    expected = backbone.model.encode_text(backbone.token_ids([WORDS[position].format(c) for c in ("real", "fake")]))
    assert torch.equal(Prompts(backbone, "a photo of a", position, False)(backbone)[0], expected)
    own = backbone.tokenizer.encode("a photo of a")
    for specific in (False, True):
        drawn = Prompts(backbone, 4, position, specific)
        assert not torch.allclose(drawn(backbone)[0], expected, atol=1e-3)
        drawn.context.copy_(torch.stack([table(backbone)[i] for i in own]).expand(1 + specific, -1, -1))
        assert torch.equal(drawn(backbone)[0], expected)


@torch.no_grad()
def test_a_name_of_several_tokens_stands_where_it_should(backbone, monkeypatch):
    monkeypatch.setattr(prompts, "CLASSES", ("real face", "made by a machine"))
    for position, words in WORDS.items():
        expected = backbone.model.encode_text(backbone.token_ids([words.format(c) for c in prompts.CLASSES]))
        assert torch.equal(Prompts(backbone, "a photo of a", position, False)(backbone)[0], expected)


def test_contexts_are_drawn_from_the_callers_generator(backbone):
    torch.manual_seed(3)
    one, two = (Prompts(backbone, 16, "end", False).context for _ in range(2))
    torch.manual_seed(3)
    again = Prompts(backbone, 16, "end", False).context
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert one.shape == (1, 16, 24) and one.std().item() == pytest.approx(0.02, rel=0.15)
    assert [tuple(Prompts(backbone, c, "end", True).context.shape) for c in (16, "a")] == [(2, 16, 24), (2, 1, 24)]


def test_what_does_not_fit_says_so(backbone):
    with pytest.raises(ValueError, match="position must be one of end, middle, front"):
        Prompts(backbone, 4, "last", False)
    assert Prompts(backbone, 73, "end", False).length == 73  # with start, name, stop and end: 77
    for context in (74, 200, 0, ""):
        with pytest.raises(ValueError, match="fit into 77 tokens"):
            Prompts(backbone, context, "end", False)


def shown(backbone, token):
    """A token of the vocabulary as it should be shown, from the tokenizer's spelling of its bytes."""
    spelled = backbone.tokenizer.decoder[token]
    byte = {character: value for value, character in bytes_to_unicode().items()}
    text = bytes(byte[c] for c in spelled.removesuffix("</w>")).decode("utf-8", errors="replace")
    return text if spelled.endswith("</w>") else f"{text}..."


def test_the_nearest_words_are_those_of_a_search_through_the_vocabulary(backbone):
    torch.manual_seed(4)
    learned = Prompts(backbone, 3, "end", specific=True)
    rows = table(backbone).double().numpy()
    with torch.no_grad():
        learned.context.copy_(torch.randn(2, 3, 24))
    found = nearest_words(learned, backbone, 5)
    vectors = [learned.context[label, m].detach().double().numpy() for label in range(2) for m in range(3)]
    assert len(found) == 6 and len({words[0][0] for words in found}) > 1
    for vector, words in zip(vectors, found, strict=True):
        away = np.sqrt(((rows - vector) ** 2).sum(1))
        nearest = np.argsort(away)[:5]
        assert [word for word, _ in words] == [shown(backbone, int(i)) for i in nearest]
        np.testing.assert_allclose([distance for _, distance in words], away[nearest], rtol=1e-5)


def test_words_that_a_context_begins_with_are_its_nearest_at_no_distance(backbone):
    words = Prompts(backbone, "a photo of a", "end", False)
    assert [found[0] for found in nearest_words(words, backbone, 1)] == [(w, 0.0) for w in ("a", "photo", "of", "a")]
    assert [len(found) for found in nearest_words(words, backbone)] == [3] * 4
    part = backbone.tokenizer.encoder["photo"]  # as in "photon"
    with torch.no_grad():
        words.context[0, 2] = table(backbone)[part]
        words.context[0, 3] = table(backbone)[backbone.tokenizer.sot_token_id]
    assert nearest_words(words, backbone, 2)[2][0] == ("photo...", 0.0)
    assert nearest_words(words, backbone, 1)[1][0] == ("photo", 0.0), "the whole word is another token"
    assert nearest_words(words, backbone, 1)[3][0] == ("<start_of_text>", 0.0)
    with pytest.raises(ValueError, match="from 1 on, not 0"):
        nearest_words(words, backbone, 0)
