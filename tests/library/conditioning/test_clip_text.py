"""Tokens and conditions: the published ids, sd-scripts' chunks, layers counted from the end, weights that act."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from library.checkpoints.tokenizers import shipped_tokenizer
from library.conditioning.clip_text import Layers, TokenBatch, chunk_batch, encode, text_chunks, token_ids, tokenize
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from tests.support.tiny_models import build_tiny_parts

START, END = 49406, 49407
CAT = 2368


@pytest.fixture(scope="module", params=[SD1, SD2], ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(family):
    return shipped_tokenizer(family.text_encoders[0])


@pytest.fixture(scope="module")
def text_encoder(family):
    return build_tiny_parts(family)["text_encoder"]


def test_the_published_example_has_its_published_ids(family, tokenizer):
    ids = tokenize(tokenizer, ["a photo of a cat"]).ids
    assert ids.shape == (1, 1, 77)
    assert ids[0, 0, :7].tolist() == [START, 320, 1125, 539, 320, CAT, END]
    assert ids[0, 0, 7:].unique().tolist() == [family.text_encoders[0].pad_token_id]


def test_one_chunk_is_what_the_tokenizer_itself_makes_of_a_text(tokenizer):
    texts = ["", "a cat", "Ünïcode 猫, (brackets) 3.5", "dog " * 100]
    expected = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(tokenize(tokenizer, texts).ids[:, 0], expected)


def sd_scripts_chunks(row: list[int], pad: int) -> list[list[int]]:
    """The published rule, written as it is told: cut a row of L tokens at 1, 76, 151 and mend the ends."""
    chunks = []
    for first in range(1, len(row) - 77 + 2, 75):
        chunk = [row[0], *row[first : first + 75], row[-1]]
        if pad != END:
            chunk[-1] = END if chunk[-2] not in (END, pad) else chunk[-1]
            chunk[1] = END if chunk[1] == pad else chunk[1]
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize("max_length", [150, 225])
@pytest.mark.parametrize("words", [0, 5, 74, 75, 76, 149, 150, 151, 225, 400])
def test_long_texts_are_cut_as_sd_scripts_cuts_them(family, tokenizer, max_length, words):
    text = "cat " * words
    row = tokenizer(text, padding="max_length", truncation=True, max_length=max_length + 2).input_ids
    expected = sd_scripts_chunks(row, family.text_encoders[0].pad_token_id)
    assert tokenize(tokenizer, [text], max_length=max_length).ids[0].tolist() == expected
    assert len(expected) == max_length // 75


def test_exclamation_marks_are_text_and_not_sd2s_padding(tokenizer):
    """OpenCLIP, with which SD2 was trained, reads "!" as 256; the ready-made SD2 tokenizer reads it as its padding, 0."""
    assert token_ids(tokenizer, "cat!") == [CAT, 256]
    assert token_ids(tokenizer, "wow!!") == token_ids(shipped_tokenizer(SD1.text_encoders[0]), "wow!!")


def test_lengths_that_are_no_whole_chunks_are_refused(tokenizer):
    with pytest.raises(ValueError, match="multiple of 75, not 100"):
        tokenize(tokenizer, ["a"], max_length=100)


def test_conditions_join_the_chunks_without_their_inner_ends(text_encoder, tokenizer):
    tokens = tokenize(tokenizer, ["cat " * 100, "a dog"], max_length=150)
    with torch.no_grad():
        conditions = encode(text_encoder, tokens).context
        first, second = (text_encoder(tokens.ids[:1, chunk]).last_hidden_state for chunk in (0, 1))
    assert conditions.shape == (2, 152, 32)
    expected = torch.cat([first[0, :76], second[0, 1:]])
    torch.testing.assert_close(conditions[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_whole_chunks_are_each_what_the_encoder_makes_of_them(text_encoder, tokenizer):
    tokens = chunk_batch(tokenizer, [text_chunks(tokenizer, "cat " * 80, breaks=True)], chunks=2)
    whole = encode(text_encoder, tokens, whole_chunks=True).context
    chunks = [text_encoder(chunk[None]).last_hidden_state for chunk in tokens.ids[0]]
    torch.testing.assert_close(whole, torch.cat(chunks, dim=1))


def truncated(text_encoder: torch.nn.Module, ids: Tensor, layers: int) -> Tensor:
    """Reference: an encoder of the first `layers` layers only, with the final norm."""
    import copy

    shorter = copy.deepcopy(text_encoder)
    shorter.encoder.layers = shorter.encoder.layers[:layers]
    shorter.config.num_hidden_layers = layers
    return shorter(ids).last_hidden_state


def test_clip_skip_counts_layers_from_the_end_and_keeps_the_norm(text_encoder, tokenizer):
    tokens = tokenize(tokenizer, ["a photo of a cat"])
    layers = text_encoder.config.num_hidden_layers
    with torch.no_grad():
        whole = encode(text_encoder, tokens).context
        assert torch.equal(encode(text_encoder, tokens, layers=Layers(1)).context, whole)
        for skip in range(2, layers + 1):
            skipped = encode(text_encoder, tokens, layers=Layers(skip)).context
            assert not torch.allclose(skipped, whole, atol=1e-2), "the skipped layers must act, or this says nothing"
            torch.testing.assert_close(skipped, truncated(text_encoder, tokens.ids[0], layers - skip + 1))
    with pytest.raises(ValueError, match=f"clip_skip must be 1 to {layers}"):
        encode(text_encoder, tokens, layers=Layers(layers + 1))


def test_weights_of_one_change_nothing(text_encoder, tokenizer):
    with torch.no_grad():
        plain = encode(text_encoder, tokenize(tokenizer, ["a photo of a cat"])).context
        for mode in ("multiply", "keep_mean"):
            weighted = tokenize(tokenizer, ["a photo of a (cat:1.0)"], weighted=True)
            assert torch.equal(encode(text_encoder, weighted, weight_mode=mode).context, plain)


def test_weights_multiply_exactly_the_tokens_they_belong_to(text_encoder, tokenizer):
    with torch.no_grad():
        plain = encode(text_encoder, tokenize(tokenizer, ["a photo of a cat"])).context
        weighted = encode(text_encoder, tokenize(tokenizer, ["a (photo:1.5) of a [cat]"], weighted=True)).context
    expected = torch.ones(77)
    expected[2], expected[5] = 1.5, 1 / 1.1
    torch.testing.assert_close(weighted[0], plain[0] * expected[:, None])


def test_weights_follow_their_tokens_into_later_chunks(tokenizer):
    tokens = tokenize(tokenizer, ["dog " * 80 + "(cat:1.5)"], max_length=150, weighted=True)
    assert tokens.weights is not None
    assert (tokens.weights == 1.5).nonzero().tolist() == [[0, 1, 6]]
    assert tokens.ids[0, 1, 6] == CAT


def test_keep_mean_scales_back_to_the_unweighted_mean(text_encoder, tokenizer):
    texts = ["a (photo:1.5) of a (cat:0.3)", "a dog"]
    with torch.no_grad():
        tokens = tokenize(tokenizer, texts, weighted=True)
        multiplied = encode(text_encoder, tokens).context
        kept = encode(text_encoder, tokens, weight_mode="keep_mean").context
        plain = encode(text_encoder, TokenBatch(tokens.ids)).context
    torch.testing.assert_close(kept.mean(dim=(1, 2)), plain.mean(dim=(1, 2)))
    ratio = kept[0] / multiplied[0]
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0, 0].item()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(kept[1], plain[1])


def test_gradients_flow_into_the_encoder(text_encoder, tokenizer):
    text_encoder.requires_grad_(True)
    encode(text_encoder, tokenize(tokenizer, ["a cat"]), layers=Layers(2)).context.sum().backward()
    assert text_encoder.encoder.layers[0].mlp.fc1.weight.grad is not None
    text_encoder.requires_grad_(False)


# Prompts in chunks

A, DOG, COMMA = 320, 1929, 267


WEIGHTED_CHUNKS = {
    "": [[]],
    "a cat": [[(A, 1.0), (CAT, 1.0)]],
    "a (cat:1.5)": [[(A, 1.0), (CAT, 1.5)]],
    "a BREAK cat": [[(A, 1.0)], [(CAT, 1.0)]],
    "a,BREAK\ncat": [[(A, 1.0), (COMMA, 1.0)], [(CAT, 1.0)]],
    "(a BREAK cat:1.5) BREAK [dog]": [[(A, 1.5)], [(CAT, 1.5)], [(DOG, 1 / 1.1)]],
    "(a) BREAK (cat:0.5) dog": [[(A, 1.1)], [(CAT, 0.5), (DOG, 1.0)]],
    "((a BREAK) cat:2)": [[(A, 2.2)], [(CAT, 2.0)]],
    "BREAK a": [[], [(A, 1.0)]],
    "a BREAK": [[(A, 1.0)]],
    "a BREAK BREAK cat": [[(A, 1.0)], [], [(CAT, 1.0)]],
    "BREAK": [[]],
}


@pytest.mark.parametrize("text", WEIGHTED_CHUNKS)
def test_prompts_have_these_tokens_and_weights(tokenizer, text):
    chunks, expected = text_chunks(tokenizer, text, breaks=True), WEIGHTED_CHUNKS[text]
    assert [[token for token, _ in chunk] for chunk in chunks] == [[token for token, _ in chunk] for chunk in expected]
    for chunk, weights in zip(chunks, expected, strict=True):
        assert [weight for _, weight in chunk] == pytest.approx([weight for _, weight in weights])


def test_break_is_a_word_where_it_is_not_asked_for_and_in_other_words(tokenizer):
    (chunk,) = text_chunks(tokenizer, "a BREAK cat", breaks=False)
    assert [token for token, _ in chunk] == token_ids(tokenizer, "a break cat")
    assert len(text_chunks(tokenizer, "a break, a BREAKER, OUTBREAK", breaks=True)) == 1


def lengths(tokenizer, text: str) -> list[int]:
    return [len(chunk) for chunk in text_chunks(tokenizer, text, breaks=True)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (75, 0, [75, 1]),  # the comma itself is what overflows
        (74, 0, [75]),
        (74, 1, [75, 1]),
        (70, 4, [75]),
        (70, 5, [71, 5]),
        (55, 20, [56, 20]),
        (54, 21, [75, 1]),  # the comma is not among the last 20
        (70, 100, [71, 75, 25]),
    ],
)
def test_full_chunks_end_at_a_comma_that_is_near(tokenizer, before, after, expected):
    assert lengths(tokenizer, "cat " * before + "," + " dog" * after) == expected


def test_no_token_is_lost_or_moved_by_cutting_at_commas(tokenizer):
    text = ", ".join("(cat:1.5) " * (number % 7) + "dog" for number in range(90))
    chunks = text_chunks(tokenizer, text, breaks=True)
    whole = tokenize(tokenizer, [text], max_length=75 * 6, weighted=True)
    tokens = [pair for chunk in chunks for pair in chunk]
    assert whole.weights is not None
    assert [token for token, _ in tokens] == whole.ids[0, :, 1:-1].flatten()[: len(tokens)].tolist()
    assert [weight for _, weight in tokens] == whole.weights[0, :, 1:-1].flatten()[: len(tokens)].tolist()
    assert all(COMMA in (left[-1][0], right[0][0]) for left, right in pairwise(chunks))


@pytest.mark.parametrize("words", [0, 5, 74, 75, 76, 150, 151, 225])
def test_prompts_without_commas_are_laid_out_as_in_training(tokenizer, words):
    texts = ["cat " * words, "a (dog:1.5)"]
    expected = tokenize(tokenizer, texts, max_length=225, weighted=True)
    laid_out = chunk_batch(tokenizer, [text_chunks(tokenizer, text, breaks=True) for text in texts], chunks=3)
    assert torch.equal(laid_out.ids, expected.ids)
    assert laid_out.weights is not None
    assert expected.weights is not None
    assert torch.equal(laid_out.weights, expected.weights)
    assert (laid_out.ids.dtype, laid_out.weights.dtype) == (torch.int64, torch.float32)


def test_break_fills_its_chunk_with_the_padding_of_the_model(family, tokenizer):
    chunks = text_chunks(tokenizer, "cat BREAK dog", breaks=True)
    ids = chunk_batch(tokenizer, [chunks], chunks=3).ids[0]
    assert ids[:, :3].tolist() == [[START, CAT, END], [START, DOG, END], [START, END, family.text_encoders[0].pad_token_id]]
    assert ids[:, 3:].unique().tolist() == [family.text_encoders[0].pad_token_id]


def test_chunks_beyond_the_room_are_left_out(tokenizer):
    batch = chunk_batch(tokenizer, [text_chunks(tokenizer, "cat BREAK dog", breaks=True)], chunks=1)
    assert batch.ids.shape == (1, 1, 77)
    assert torch.equal(batch.ids, tokenize(tokenizer, ["cat"]).ids)
